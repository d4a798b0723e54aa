"""Where tasks run: in the caller, in processes of this machine, or on a Dask cluster; one pool for a whole run.

Code is against ``concurrent.futures.Executor``. The work is safe to repeat (see preprocess.scan), so an engine may run
a task twice, even at the same time; it must not lose one.
"""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol


class WorkerLost(RuntimeError):  # noqa: N818 - it is what happened
    """A process died twice while it worked on a task, most often for want of memory."""


class Engine(Protocol):
    """What packing asks of an engine. Use as a context manager: leaving it ends what is still running."""

    def run_all(
        self, function: Callable[[Any], Any], tasks: Sequence[Any], describe: Callable[[Any], str]
    ) -> Generator[Any, None, None]:
        """Results of ``function(task)`` in whatever order they finish; the first error stops everything.

        A task whose worker dies is given again; at the second death WorkerLost names it with ``describe``.
        """
        ...

    def __enter__(self) -> "Engine": ...
    def __exit__(self, *error: object) -> None: ...


def default_workers() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def open_engine(workers: int | None) -> Engine:
    """The engine of one machine. workers: processes; None for one a core; 0 runs in the caller."""
    count = default_workers() if workers is None else workers
    return ProcessPool(count) if count else InCaller()


class InCaller:
    """Tasks one after another in the calling process."""

    def run_all(
        self, function: Callable[[Any], Any], tasks: Sequence[Any], describe: Callable[[Any], str]
    ) -> Generator[Any, None, None]:
        yield from map(function, tasks)

    def __enter__(self) -> "InCaller":
        return self

    def __exit__(self, *error: object) -> None:
        return None


class ProcessPool:
    """Processes of this machine, started when there is something to do and kept until the end of the run."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.pool: ProcessPoolExecutor | None = None

    def run_all(
        self, function: Callable[[Any], Any], tasks: Sequence[Any], describe: Callable[[Any], str]
    ) -> Generator[Any, None, None]:
        waiting = deque(tasks)
        deaths: Counter[int] = Counter()
        pending: dict[Future[Any], Any] = {}
        try:
            while waiting:
                try:
                    yield from drain(self._started(), function, waiting, pending, 3 * self.workers)
                except BrokenProcessPool as error:
                    deaths.update(id(task) for task in pending.values())
                    if twice := {describe(task) for task in pending.values() if deaths[id(task)] > 1}:
                        raise WorkerLost(lost("process", twice)) from error
                    waiting.extendleft(pending.values())
                    pending.clear()
                    self._stop()
        finally:
            if pending:  # left in the middle: what is still in hand is nobody's any more
                self._stop()

    def _started(self) -> ProcessPoolExecutor:
        if self.pool is None:
            # spawn: a forked child would inherit GDAL's and Numba's state in the middle of whatever they were doing
            context = multiprocessing.get_context("spawn")
            self.pool = ProcessPoolExecutor(self.workers, context, initializer=_worker_start)
        return self.pool

    def _stop(self) -> None:
        """Ends the workers at once; what they leave behind is an uncommitted temporary file at most."""
        if self.pool is None:
            return
        processes = list((self.pool._processes or {}).values())
        self.pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()
        self.pool = None

    def __enter__(self) -> "ProcessPool":
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()


def lost(what: str, tasks: set[str]) -> str:
    """The message of WorkerLost."""
    return (
        f"a worker {what} died twice; it was working on one of: {', '.join(sorted(tasks))}. Most often "
        "memory ran out: try fewer workers (workers=1). The same command goes on from here"
    )


def drain(
    pool: Executor, function: Callable[[Any], Any], waiting: deque[Any], pending: dict[Future[Any], Any], most: int
) -> Iterator[Any]:
    """Results as they come; at most ``most`` tasks are submitted at a time, so that memory stays flat."""
    while waiting or pending:
        while waiting and len(pending) < most:
            task = waiting.popleft()
            try:
                pending[pool.submit(function, task)] = task
            except BrokenProcessPool:
                waiting.appendleft(task)
                raise
        for future in wait(pending, return_when=FIRST_COMPLETED).done:
            result = future.result()
            del pending[future]
            yield result


def _worker_start() -> None:
    # Ctrl-C reaches the whole process group; the caller alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Processes are the parallelism: numeric libraries must not start threads of their own in each.
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ[variable] = "1"
    threading.Thread(target=_end_with_caller, daemon=True).start()


def _end_with_caller() -> None:
    """A caller that is killed outright cannot end its processes; without this they would wait for work for ever."""
    caller = multiprocessing.parent_process()
    assert caller is not None, "runs in a worker"
    with contextlib.suppress(OSError):
        multiprocessing.connection.wait([caller.sentinel])
    os._exit(1)
