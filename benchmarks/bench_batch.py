"""The largest batch that a training step fits: doubled until it fails, then bisected.

Every try is a process of its own, so that each finds the memory as the first one did and nothing is left of a failed
one. On a GPU a try fails by running out of memory. On a CPU its allocations are limited, so that a failure is an error
in that process and not the end of the machine's others.
"""

import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench_cases import Setting, synchronize
from benchmarks.bench_steps import geokr_step
from geokr.options import PretrainOptions
from pipelines.augment import change_count
from pipelines.loaders import available_cores
from pipelines.synthetic import random_batch

# A batch is found to within this share of itself: what is left costs more tries than it is worth.
RESOLUTION = 1 / 16
# Of the available memory; the rest is for what else the machine does meanwhile.
_SHARE = 0.9
_MEMORY_WORDS = ("out of memory", "allocate memory", "enough memory", "memory object", "bad_alloc")


@dataclass(frozen=True, slots=True)
class Try:
    """A step at this batch. failure: empty, or why it did not run. rates: images/s of each measurement. peak_bytes:
    taken from the device, or by the process on a CPU. chosen: the step in words."""

    batch: int
    failure: str = ""
    short_of_memory: bool = False
    rates: tuple[float, ...] = ()
    peak_bytes: int = 0
    chosen: str = ""

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)


def largest(attempt: Callable[[int], Try], start: int) -> Try:
    """The largest batch that ``attempt`` runs, to within RESOLUTION.

    Raises RuntimeError if not even 2 images fit, or if the first failure is of another kind than memory.
    """
    batch, best, too_large = max(2, start), None, None
    while best is None or too_large is None or too_large - best.batch > max(1, RESOLUTION * best.batch):
        tried = attempt(batch)
        if not tried.failure:
            best = tried
        elif best is None and (batch == 2 or not tried.short_of_memory):
            raise RuntimeError(f"a step with {batch} images does not run: {tried.failure}")
        else:
            too_large = batch
        if best is None:
            batch = max(2, batch // 2)
        else:
            batch = 2 * best.batch if too_large is None else (best.batch + too_large) // 2
    return best


def find_batch(setting: Setting, limit_bytes: int | None, say: Callable[[Try], None]) -> Try:
    """The largest batch for geokr's step, from ``data.global_batch`` on. limit_bytes: of a process on a CPU; None for
    what is available now. ``say`` hears of each try."""
    if setting.device.type == "cpu":
        limit_bytes = limit_bytes or int(_SHARE * available_bytes())

    def attempt(batch: int) -> Try:
        tried = try_in_process(setting, batch, limit_bytes)
        say(tried)
        return tried

    return largest(attempt, setting.options.data.global_batch)


def available_bytes() -> int:
    """Memory that can be had without swapping, within the control group's limit."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")]
    try:
        group = [int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current")]
    except (OSError, ValueError):  # no limit: the file is missing or says "max"
        return free[0]
    return min(free[0], group[0] - group[1])


def try_in_process(setting: Setting, batch: int, limit_bytes: int | None) -> Try:
    """One try in a process of its own. limit_bytes: what it may take on a CPU."""
    context = multiprocessing.get_context("spawn")
    there, here = context.Pipe(duplex=False)
    process = context.Process(target=_try, args=(here, setting, batch, limit_bytes))
    process.start()
    here.close()
    try:
        tried = there.recv()
    except EOFError:
        tried = None
    process.join()
    if tried is None:  # the kernel kills what takes too much, and some libraries abort where memory is refused
        return Try(batch, f"the process ended with code {process.exitcode}", short_of_memory=True)
    return tried


def _try(answer: Any, setting: Setting, batch: int, limit_bytes: int | None) -> None:
    if setting.device.type == "cpu":
        torch.set_num_threads(available_cores())
    try:
        if limit_bytes is not None:
            _limit(limit_bytes)
        tried = run_steps(setting, batch)
    except Exception as error:
        words = f"{type(error).__name__}: {error}"
        short = isinstance(error, MemoryError) or any(word in words.lower() for word in _MEMORY_WORDS)
        tried = Try(batch, words.splitlines()[0], short)
    answer.send(tried)


def _limit(limit_bytes: int) -> None:
    """Refuses allocations that would take the process past this size. Linux only; elsewhere there is no limit."""
    if sys.platform != "linux":
        return
    found = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    reserved, used = (1024 * int(found[name].split()[0]) for name in ("VmData", "VmRSS"))
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (max(0, reserved + limit_bytes - used), hard))


def run_steps(setting: Setting, batch: int) -> Try:
    """Steps in this process, warmed up. Raises what the step raises where it does not fit."""
    device, manifest = setting.device, setting.dataset.manifest
    data = setting.options.data.model_copy(update={"global_batch": batch})
    options: PretrainOptions = setting.options.model_copy(update={"data": data})
    step, chosen = geokr_step(options, setting.dataset, setting.image_size, device)
    images = random_batch(
        count=batch,
        bands=len(manifest.bands),
        image_size=setting.image_size,
        classes=len(manifest.classes),
        device=device,
        seed=0,
        uint8=manifest.tile.dtype == "uint8",
        changes=change_count(setting.dataset.band_facts()),
    )
    for _ in range(2):  # the second one meets the optimizer's state
        step(images)
    rates = []
    for _ in range(setting.repeats):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(setting.steps):
            step(images)
        synchronize(device)
        rates.append(setting.steps * batch / (time.perf_counter() - start))
    return Try(batch, rates=tuple(rates), peak_bytes=_peak_bytes(device), chosen=str(chosen))


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
