"""What is measured and how: cases that take turns, by the clock and by the processor time they cost."""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import torch

from benchmarks import bench_report
from geokr.options import PretrainOptions
from pipelines.dataset import Dataset
from pipelines.loaders import available_cores

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
# Quiet: less than a tenth of a core over a twentieth of a second; waiting longer than this is waiting for a spinner.
_QUIET_SHARE, _QUIET_S, _SETTLE_S = 0.1, 0.05, 5.0


@dataclass(frozen=True, slots=True)
class Setting:
    """What all stages share."""

    dataset: Dataset
    options: PretrainOptions
    device: torch.device
    images: int  # of a measurement of the data stages
    steps: int  # of a measurement of the steps
    repeats: int

    @property
    def threads(self) -> int:
        return self.options.data.threads or available_cores()

    @property
    def image_size(self) -> int:
        return self.options.data.image_size or self.dataset.manifest.tile.size


def nothing() -> None:
    """For cases that need no preparation."""


@dataclass(frozen=True, slots=True)
class Case:
    """``run`` works on some images and gives their number; ``prepare`` brings it to its steady state, untimed.
    options: overrides that it runs with, in words."""

    stage: str
    loader: str
    run: Callable[[], int]
    prepare: Callable[[], Any] = nothing
    options: str = ""


def cpu_seconds() -> float:
    """User and system time of this process, of its workers, and of the workers that have ended."""
    own = os.times()
    return own.user + own.system + own.children_user + own.children_system + sum(map(_of_worker, active_children()))


def _of_worker(worker: Any) -> float:
    try:
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it ended meanwhile, or there is no /proc
        return 0.0
    return sum(map(int, fields[11:15])) / _TICKS_PER_S


def settle() -> None:
    """Waits until what other cases prepare ahead is prepared, so that none of it is charged to the next one."""
    end = time.monotonic() + _SETTLE_S
    while time.monotonic() < end:
        before = cpu_seconds()
        time.sleep(_QUIET_S)
        if cpu_seconds() - before < _QUIET_SHARE * _QUIET_S:
            return


def measure(cases: list[Case], setting: Setting) -> list[dict[str, Any]]:
    """A line of results for each case. The cases take turns, so that a machine's moods fall on all of them."""
    rates: list[list[float]] = [[] for _ in cases]
    costs: list[list[float]] = [[] for _ in cases]
    for case in cases:
        case.run()  # compiles kernels, fills caches
    for _ in range(setting.repeats):
        for case, rate, cost in zip(cases, rates, costs, strict=True):
            settle()
            case.prepare()
            synchronize(setting.device)
            start, cpu = time.perf_counter(), cpu_seconds()
            count = case.run()
            synchronize(setting.device)
            rate.append(count / (time.perf_counter() - start))
            cost.append(1000 * (cpu_seconds() - cpu) / count)
    return [_line(*of_case, setting) for of_case in zip(cases, rates, costs, strict=True)]


def _line(case: Case, rates: list[float], costs: list[float], setting: Setting) -> dict[str, Any]:
    about = {"stage": case.stage, "loader": case.loader, "device": setting.device.type}
    rate = bench_report.median_and_spread("img_per_s", rates)
    return {**about, **rate, "cpu_ms_per_img": round(statistics.median(costs), 4), "options": case.options}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
