"""What every benchmark reports: machine, versions, medians with spread, ratios; a table and JSON."""

import json
import os
import platform
import statistics
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch", "torchvision", "timm", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "numpy", "numba", "rasterio",
    "simplejpeg", "pillow", "opencv-python-headless", "webdataset", "litdata", "ffcv",
)  # fmt: skip


def machine() -> dict[str, Any]:
    """Processor, cores and memory; and the GPU if torch is loaded and sees one."""
    names = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = [int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")]
    found: dict[str, Any] = {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(memory[0] / 1e6, 1) if memory else None,
        "system": platform.platform(terse=True),
        "gpu": None,
    }
    import sys

    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def versions() -> dict[str, str]:
    """Versions of what decides the speed, where installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def median_and_spread(name: str, rates: Sequence[float]) -> dict[str, float]:
    """``{name: median, "spread": (max - min) / median}``."""
    middle = statistics.median(rates)
    return {name: round(middle, 2), "spread": round((max(rates) - min(rates)) / middle, 3) if middle else 0.0}


def tree(results: list[dict[str, Any]], ratios: dict[str, float], **extra: Any) -> dict[str, Any]:
    """The report."""
    rounded = {name: round(value, 3) for name, value in ratios.items()}
    return {"machine": machine(), "versions": versions(), **extra, "results": results, "ratios": rounded}


def table(lines: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    """Prints what the lines hold under these names; a column that none of them has is left out."""
    columns = [column for column in columns if any(column in entry for entry in lines)]
    rows = [list(columns)] + [[str(entry.get(column, "")) for column in columns] for entry in lines]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def show(report: dict[str, Any], columns: Sequence[str], path: Path | None) -> None:
    """Prints a table, the ratios, and as the last line one JSON object with them; writes the JSON if asked."""
    table(report["results"], columns)
    for name, value in report["ratios"].items():
        print(f"{name}: {value:.2f}")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({"ratios": report["ratios"]}))
