"""Where tasks run: in the caller, or in processes of this machine.

The work is safe to repeat (see preprocess.scan), so an engine may run a task twice; it must not lose one.
"""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any


class WorkerLost(RuntimeError):  # noqa: N818 - it is what happened
    """A process died twice while it worked on a task, most often for want of memory."""


def default_workers() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
    multiprocessing.connection.wait([caller.sentinel])
    os._exit(1)


def run_all(
    function: Callable[[Any], Any], tasks: Sequence[Any], workers: int, describe: Callable[[Any], str]
) -> Generator[Any, None, None]:
    """Results of ``function(task)`` in whatever order they finish; the first error stops everything.

    workers: processes; 0 runs in the caller. Where a process dies (killed, out of memory) the tasks in hand are
    given again to new ones; a task that was in hand at two deaths raises WorkerLost, which names it.
    """
    if workers == 0 or not tasks:
        yield from map(function, tasks)
        return
    # spawn: a forked child would inherit GDAL's and Numba's state in the middle of whatever they were doing
    context = multiprocessing.get_context("spawn")
    waiting = deque(tasks)
    deaths: Counter[int] = Counter()
    while waiting:
        pool = ProcessPoolExecutor(min(workers, len(waiting)), context, initializer=_worker_start)
        pending: dict[Future[Any], Any] = {}
        try:
            yield from _drain(pool, function, waiting, pending, 3 * workers)
        except BrokenProcessPool as error:
            deaths.update(id(task) for task in pending.values())
            if twice := {describe(task) for task in pending.values() if deaths[id(task)] > 1}:
                raise WorkerLost(
                    f"a worker process died twice; it was working on one of: {', '.join(sorted(twice))}. Most often "
                    "memory ran out: try fewer workers (workers=1). The same command goes on from here"
                ) from error
            waiting.extendleft(pending.values())
        finally:
            _stop(pool)


def _drain(
    pool: Executor, function: Callable[[Any], Any], waiting: deque[Any], pending: dict[Future[Any], Any], most: int
) -> Iterator[Any]:
    """Keeps at most ``most`` tasks submitted, so that the caller's memory does not grow with their number."""
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


def _stop(pool: ProcessPoolExecutor) -> None:
    """Ends the workers at once; what they leave behind is an uncommitted temporary file at most."""
    processes = list((pool._processes or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.terminate()
    for process in processes:
        process.join()
