"""What a measurement takes besides its time: CPU time and peak memory of this process and of its workers.

Read from Linux's /proc, since a process that has been started inherits its parent's peak in getrusage's figures.
"""

import os
import resource
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

# A worker's peak is its own high-water mark, so only what it does in its last moment can be missed. Looking every 20 ms
# took 2 % of a core.
INTERVAL_S = 0.25


def children() -> list[int]:
    """Processes that this one has started and that are not yet waited for; none where there is no /proc."""
    found: list[int] = []
    for path in Path("/proc/self/task").glob("*/children"):
        try:
            found += map(int, path.read_text().split())
        except OSError:  # a thread that has ended
            continue
    return found


def peak_mb(pid: int | str = "self") -> float:
    """Most memory a process has held, in units of 1,000,000 bytes; 0 where it cannot be told."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM:")), 0.0)


def cpu_seconds() -> float:
    """CPU time of this process and of its children, ended or running."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    running = 0.0
    for pid in children():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        running += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return time.process_time() + ended.ru_utime + ended.ru_stime + running


class Watch:
    """``with Watch() as watch: ...``, then ``watch.found()``: seconds, cpu_s, driver_mb and worker_mb (the largest).

    Peaks are those of whole processes, their start and a warm-up included.
    """

    def __enter__(self) -> Self:
        self._worker_mb, self._done = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        self._cpu, self._start = cpu_seconds(), time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds, self.cpu_s = time.perf_counter() - self._start, cpu_seconds() - self._cpu
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._done.wait(INTERVAL_S):
            self._worker_mb = max([self._worker_mb, *map(peak_mb, children())])

    def found(self) -> dict[str, Any]:
        return {
            "seconds": self.seconds,
            "cpu_s": self.cpu_s,
            "driver_mb": round(peak_mb()),
            "worker_mb": round(self._worker_mb),
        }
