"""GPU, driver and libraries: what is installed, whether it fits together, and whether it does its work."""

import base64
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from geokr.checks.finding import Finding, TrialError, failure, ok, trial, warning

# CUDA major version: oldest driver branch for all its minor versions
# (docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html, table 1).
MINIMUM_DRIVER = {11: 450, 12: 525, 13: 580}
_NEEDED = (
    "torch",
    "torchvision",
    "timm",
    "safetensors",
    "numba",
    "google_crc32c",
    "simplejpeg",
    "lz4",
    "tqdm",
    "matplotlib",
)
_BUSY_MIB = 1024
# 16 x 16 pixels of red, green, blue = 200, 120, 40
TINY_JPEG = (
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAMCAgMCAgMDAwMEAwMEBQgFBQQEBQoHBwYIDAoMDAsKCwsNDhIQDQ4RDgsLEBYQERMUFRUVDA8XGBYU"
    "GBIUFRT/2wBDAQMEBAUEBQkFBQkUDQsNFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBT/wAARCAAQABADAR"
    "EAAhEBAxEB/8QAHwAAAQUBAQEBAQEAAAAAAAAAAAECAwQFBgcICQoL/8QAtRAAAgEDAwIEAwUFBAQAAAF9AQIDAAQRBRIhMUEGE1FhByJxFDKBkaEI"
    "I0KxwRVS0fAkM2JyggkKFhcYGRolJicoKSo0NTY3ODk6Q0RFRkdISUpTVFVWV1hZWmNkZWZnaGlqc3R1dnd4eXqDhIWGh4iJipKTlJWWl5iZmqKjpK"
    "Wmp6ipqrKztLW2t7i5usLDxMXGx8jJytLT1NXW19jZ2uHi4+Tl5ufo6erx8vP09fb3+Pn6/8QAHwEAAwEBAQEBAQEBAQAAAAAAAAECAwQFBgcICQoL"
    "/8QAtREAAgECBAQDBAcFBAQAAQJ3AAECAxEEBSExBhJBUQdhcRMiMoEIFEKRobHBCSMzUvAVYnLRChYkNOEl8RcYGRomJygpKjU2Nzg5OkNERUZHSE"
    "lKU1RVVldYWVpjZGVmZ2hpanN0dXZ3eHl6goOEhYaHiImKkpOUlZaXmJmaoqOkpaanqKmqsrO0tba3uLm6wsPExcbHyMnK0tPU1dbX2Nna4uPk5ebn"
    "6Onq8vP09fb3+Pn6/9oADAMBAAIRAxEAPwDTr+cj99CgAoAKAP/Z"
)
assert base64.b64decode(TINY_JPEG)[:2] == b"\xff\xd8"

_TORCH = """
import json, torch
found = {"version": torch.__version__, "cuda": torch.version.cuda, "gpus": [], "nccl": None}
if torch.cuda.is_available():
    for n in range(torch.cuda.device_count()):
        with torch.cuda.device(n):
            a = torch.randn(64, 64, device="cuda")
            error = float((a @ a - (a.double() @ a.double()).float()).abs().max())
        found["gpus"].append({"name": torch.cuda.get_device_name(n), "error": error})
    found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
print(json.dumps(found))
"""
_REDUCE = """
import json, sys, torch, torch.distributed as dist
cuda = torch.cuda.is_available()
if cuda:
    torch.cuda.set_device(0)
dist.init_process_group("nccl" if cuda else "gloo", store=dist.HashStore(), rank=0, world_size=1)
a = torch.ones(1 << 20, device="cuda" if cuda else "cpu")
dist.all_reduce(a)
assert float(a.sum()) == 1 << 20
dist.destroy_process_group()
print(json.dumps({"backend": "nccl" if cuda else "gloo"}))
"""
_COMPILE = """
import json, torch
device = "cuda" if torch.cuda.is_available() else "cpu"
f = torch.compile(lambda x: torch.relu(x * 2 + 1).sum())
x = torch.arange(4096.0, device=device) - 2000
assert torch.allclose(f(x), torch.relu(x * 2 + 1).sum())
print(json.dumps({"device": device}))
"""
_DALI = """
import base64, json, sys
import numpy as np
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline
import nvidia.dali
def decode(device_id):
    data = np.frombuffer(base64.b64decode(sys.argv[1]), np.uint8)
    pipe = Pipeline(batch_size=1, num_threads=1, device_id=device_id)
    with pipe:
        encoded = fn.external_source(source=lambda: [data], batch=True, dtype=types.DALIDataType.UINT8, ndim=1)
        device = "cpu" if device_id is None else "mixed"
        pipe.set_outputs(fn.decoders.image(encoded, device=device, output_type=types.DALIImageType.RGB))
    pipe.build()
    (out,) = pipe.run()
    image = np.asarray((out.as_cpu() if device_id is not None else out).at(0))
    assert image.shape == (16, 16, 3), image.shape
    error = int(np.abs(image.astype(int) - (200, 120, 40)).max())
    assert error <= 6, f"decoded pixels are off by {error}"
decode(None)
if sys.argv[2] == "gpu":
    decode(0)
print(json.dumps({"version": nvidia.dali.__version__}))
"""


@dataclass(frozen=True, slots=True)
class Driver:
    """What nvidia-smi says. version: None where there is no driver; gpus: a line each; fault: what it complained of."""

    version: str | None
    gpus: tuple[str, ...] = ()
    busy: tuple[str, ...] = ()
    fault: str = ""

    @property
    def branch(self) -> int:
        """The driver's main number, 580 of 580.95.05."""
        return int((self.version or "0").split(".")[0])


def read_driver() -> Driver:
    if shutil.which("nvidia-smi") is None:
        return Driver(None)
    query = ["nvidia-smi", "--query-gpu=driver_version,name,memory.total,memory.used", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return Driver(None, fault="nvidia-smi does not answer")
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    # cards that share the machine's memory say [N/A] of it
    rows = [row for row in rows if len(row) == 4 and (row[2].isdecimal() or "N/A" in row[2])]
    if done.returncode != 0 or not rows:
        said = (done.stdout + done.stderr).strip().splitlines()
        return Driver(None, fault=said[0] if said else f"nvidia-smi ended with status {done.returncode}")
    gpus = tuple(
        f"{name}, {int(total) / 1024:.0f} GiB" if total.isdecimal() else f"{name}, memory of the machine"
        for _, name, total, _ in rows
    )
    busy = tuple(
        f"GPU {n} ({row[3]} MiB)" for n, row in enumerate(rows) if row[3].isdecimal() and int(row[3]) > _BUSY_MIB
    )
    return Driver(rows[0][0], gpus, busy)


def has_card(devices: Path = Path("/sys/bus/pci/devices")) -> bool:
    """Whether an NVIDIA display or compute device is plugged in, driver or not."""
    for device in devices.glob("*"):
        try:
            vendor, kind = (device / "vendor").read_text().strip(), (device / "class").read_text().strip()
        except OSError:
            continue
        if vendor == "0x10de" and kind.startswith("0x03"):
            return True
    return False


def check_driver(driver: Driver, card: bool) -> Finding:
    if driver.fault or (driver.version is None and card):
        return failure(
            "driver",
            driver.fault or "an NVIDIA card but no nvidia-smi",
            "The card cannot be used.",
            "Install the driver (580 or newer for the default packages), load its module, or start the container with "
            "--gpus all.",
        )
    if driver.version is None:
        return ok("driver", "no NVIDIA card: training runs on the CPU")
    found = f"{driver.version}, " + "; ".join(driver.gpus)
    if driver.busy:
        return warning(
            "driver",
            found,
            f"Others use the memory of {', '.join(driver.busy)}.",
            "See nvidia-smi; choose free ones with CUDA_VISIBLE_DEVICES.",
        )
    return ok("driver", found)


def check_packages() -> Finding:
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        return failure(
            "packages",
            f"missing: {', '.join(missing)}",
            "Training cannot start.",
            "pip install -e '.[train]' in geokr's folder (drivers before 580: '.[train-cuda12]', docs/cluster.md), or "
            "bash launch/quickstart.sh.",
        )
    return ok("packages", ", ".join(f"{name} {metadata.version(name)}" for name in ("torchvision", "timm", "numba")))


def check_torch(driver: Driver, facts: dict[str, Any] | str) -> Finding:
    """facts: what the trial found, or its complaint."""
    if isinstance(facts, str):
        return failure("torch", facts, "PyTorch does not load or compute.", "pip install --force-reinstall torch.")
    found = f"{facts['version']}, built for " + (f"CUDA {facts['cuda']}" if facts["cuda"] else "the CPU")
    if driver.version is None or facts["gpus"]:
        return _check_products(found, facts)
    if not facts["cuda"]:
        return failure(
            "torch",
            found,
            "The GPUs are not used.",
            "pip install --force-reinstall torch torchvision --index-url https://download.pytorch.org/whl/cu130",
        )
    needed = MINIMUM_DRIVER.get(int(facts["cuda"].split(".")[0]), 0)
    if driver.branch < needed:
        return failure(
            "torch",
            found,
            f"It needs a driver of {needed} or newer; here is {driver.version}.",
            "Update the driver, or take the packages for it: docs/cluster.md has the table.",
        )
    return failure(
        "torch",
        f"{found}, sees no GPU",
        "The driver lists GPUs that torch cannot use.",
        f"See CUDA_VISIBLE_DEVICES ({os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}), the container's GPU flag, "
        "and python -c 'import torch; torch.zeros(1).cuda()'.",
    )


def _check_products(found: str, facts: dict[str, Any]) -> Finding:
    wrong = [f"{gpu['name']} (off by {gpu['error']:.3g})" for gpu in facts["gpus"] if not gpu["error"] < 0.5]
    if wrong:
        return failure(
            "torch", found, f"Matrix products are wrong on {', '.join(wrong)}.", "Take that GPU out: it is defective."
        )
    names = "; ".join(gpu["name"] for gpu in facts["gpus"])
    return ok("torch", f"{found}, {names}" if names else found)


def check_reduce(facts: dict[str, Any]) -> Finding:
    try:
        backend = trial(_REDUCE, 180)["backend"]
    except TrialError as error:
        return failure(
            "collectives",
            str(error),
            "Several processes cannot exchange gradients.",
            "NCCL_DEBUG=INFO says more; see shared memory above, and that torch and NCCL are from one index.",
        )
    return ok("collectives", f"NCCL {facts['nccl']}" if backend == "nccl" else "gloo (no GPU for NCCL)")


def check_compile(has_gpu: bool) -> Finding:
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++")), None)
    try:
        device = trial(_COMPILE, 300)["device"]
    except TrialError as error:
        means = (
            "train.compile=auto goes on without torch.compile, slower."
            if has_gpu
            else "Only train.compile=on needs it."
        )
        remedy = "apt-get install g++ (or your system's), and python3-dev for Triton."
        return warning("compiler", f"{compiler or 'no C++ compiler'}: {error}", means, remedy)
    how = "Triton" if device == "cuda" else compiler
    return ok("compiler", f"torch.compile works on {device} ({how})")


def check_dali(driver: Driver, has_gpu: bool) -> Finding:
    names = [name for name in ("nvidia-dali-cuda130", "nvidia-dali-cuda120") if _installed(name)]
    if not names:
        if platform.system() != "Linux":
            return ok("DALI", "no wheel for this system: data.loader=torch gives the same batches")
        package = "nvidia-dali-cuda120" if 0 < driver.branch < MINIMUM_DRIVER[13] else "nvidia-dali-cuda130"
        means = "data.loader=auto takes the torch loader: the same batches, decoded on the CPU."
        return warning("DALI", "not installed", means, f"pip install {package}")
    try:
        version = trial(_DALI, 180, TINY_JPEG, "gpu" if has_gpu else "cpu")["version"]
    except TrialError as error:
        return failure(
            "DALI",
            f"{', '.join(names)}: {error}",
            "data.loader=dali, and auto, cannot decode.",
            "Take the package for your driver (docs/cluster.md), or data.loader=torch meanwhile. A wiped "
            "LD_LIBRARY_PATH or a second copy of nvImageCodec can be the cause.",
        )
    if len(names) > 1:
        return warning("DALI", " and ".join(names), "Two builds lie over each other.", f"pip uninstall {names[1]}")
    return ok("DALI", f"{version} ({names[0]}), decodes on the CPU" + (" and the GPU" if has_gpu else ""))


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def check_software() -> list[Finding]:
    driver = read_driver()
    findings = [check_driver(driver, has_card()), check_packages()]
    if find_spec("torch") is None:
        means = "Collectives and torch.compile were not tried either."
        findings.append(failure("torch", "not installed", means, "pip install -e '.[train]' in geokr's folder."))
        return [*findings, check_dali(driver, False)]
    try:
        facts: dict[str, Any] | str = trial(_TORCH, 180)
    except TrialError as error:
        facts = str(error)
    findings.append(check_torch(driver, facts))
    has_gpu = not isinstance(facts, str) and bool(facts["gpus"])
    if not isinstance(facts, str):
        findings += [check_reduce(facts), check_compile(has_gpu)]
    return [*findings, check_dali(driver, has_gpu)]
