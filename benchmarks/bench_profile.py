"""Where a training step's time goes: a trace for Perfetto or TensorBoard, and the costliest operations."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]
from torch.profiler import ProfilerActivity, profile

from benchmarks.bench_cases import synchronize


@dataclass(frozen=True, slots=True)
class Profile:
    """costliest: operations or kernels with calls and milliseconds a step and their share of all of them. trace: the
    file. step_ms: under the profiler. busy: the share of that in which the device worked; on a CPU the threads' time
    of this process's main thread and autograd's, so it may be above 1."""

    costliest: list[dict[str, Any]]
    trace: Path
    step_ms: float
    busy: float


def profile_steps(step: Callable[[], Any], steps: int, device: torch.device, folder: Path, top: int = 10) -> Profile:
    """Profiles ``steps`` steps, which must have been warmed up; writes the trace into the folder.

    On CUDA kernels are counted by their time on the device, on a CPU operations by their own time, without that of
    the operations they call.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    synchronize(device)
    with profile(activities=activities) as profiler:
        start = time.perf_counter()
        for _ in range(steps):
            step()
        synchronize(device)
        step_ms = 1000 * (time.perf_counter() - start) / steps
    folder.mkdir(parents=True, exist_ok=True)
    trace = folder / f"step-{device.type}.pt.trace.json.gz"  # the ending by which TensorBoard's plugin knows traces
    profiler.export_chrome_trace(str(trace))
    cost = {event: own_ms(event, on_gpu) / steps for event in profiler.key_averages() if counts(event, on_gpu)}
    total = sum(cost.values())
    first = sorted(cost, key=lambda event: -cost[event])[:top]
    costliest = [
        {"operation": event.key, "calls": event.count / steps, "ms": cost[event], "share": cost[event] / total}
        for event in first
    ]
    return Profile(costliest, trace, step_ms, total / step_ms)


def counts(event: Any, on_gpu: bool) -> bool:
    """Whether an event is a kernel on the GPU, or an operation on the CPU; spans that people marked are neither."""
    if getattr(event, "is_user_annotation", False):
        return False
    return event.device_type == (DeviceType.CUDA if on_gpu else DeviceType.CPU)


def own_ms(event: Any, on_gpu: bool) -> float:
    return (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1000


def show_profile(found: Profile) -> None:
    """The table, on standard output."""
    print(f"{'ms a step':>10}  {'share':>6}  {'calls':>7}  operation")
    for line in found.costliest:
        print(f"{line['ms']:10.3f}  {line['share']:6.1%}  {line['calls']:7.1f}  {line['operation'][:100]}")
    print(f"step {found.step_ms:.1f} ms under the profiler, busy {found.busy:.0%} of it; trace: {found.trace}")
