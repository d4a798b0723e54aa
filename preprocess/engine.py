"""Where tasks run: in the caller, in processes of this machine, or on a Dask cluster; one pool for a whole run.

Code is against ``concurrent.futures.Executor``. The work is safe to repeat (see preprocess.scan), so an engine may run
a task twice, even at the same time; it must not lose one.
"""

import abc
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
    """A process died again and again while it worked on a task, most often for want of memory."""


THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")

Task = Any
Function = Callable[[Task], Any]
Describe = Callable[[Task], str]
Progress = Callable[[str, int, int], None]  # (phase, done, of)


class Engine(Protocol):
    """What packing asks of an engine. Use as a context manager: leaving it ends what is still running."""

    def run_all(self, function: Function, tasks: Sequence[Task], describe: Describe) -> Generator[Any, None, None]:
        """Results of ``function(task)`` in whatever order they finish; the first error stops everything.

        A task whose worker dies or has no memory left is given again; when it has lost two, WorkerLost names it with
        ``describe``.
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

    def run_all(self, function: Function, tasks: Sequence[Task], describe: Describe) -> Generator[Any, None, None]:
        for task in tasks:
            try:
                yield function(task)
            except MemoryError as error:
                raise WorkerLost(f"no memory left while working on {describe(task)}; it goes on from here") from error

    def __enter__(self) -> "InCaller":
        return self

    def __exit__(self, *error: object) -> None:
        return None


class OverExecutor(abc.ABC):
    """Tasks through a ``concurrent.futures.Executor``, with a bounded number of them in flight.

    fatal: what the future of a task raises whose worker died. fall_together: whether one death breaks the whole
    executor, as it does a process pool. remedy: what to try when a task keeps killing its workers.
    """

    fatal: tuple[type[BaseException], ...] = ()
    fall_together = False
    remedy = ""

    @abc.abstractmethod
    def executor(self) -> Executor:
        """One that takes tasks: a new one where the last one broke."""

    @abc.abstractmethod
    def room(self) -> int:
        """How many tasks may be in flight, so that neither memory nor what a stop throws away grows with the plan."""

    def broken(self) -> None:  # noqa: B027 - only what falls together breaks
        """The executor broke; called once for all the tasks that fell with it."""

    def run_all(self, function: Function, tasks: Sequence[Task], describe: Describe) -> Generator[Any, None, None]:
        """Where all that was in flight falls together, each of those tasks runs by itself then, so that it is known
        which one it was: the innocent never pay for a neighbour."""
        waiting, suspects = deque(tasks), deque[Task]()
        pending: dict[Future[Any], Task] = {}
        deaths: Counter[int] = Counter()
        try:
            while waiting or suspects or pending:
                fell = self._submit(function, waiting, suspects, pending)
                for future in () if fell else wait(pending, return_when=FIRST_COMPLETED).done:
                    try:
                        result = future.result()
                    except (MemoryError, *self.fatal) as error:
                        if self.fall_together and not isinstance(error, MemoryError):
                            fell = error
                            break
                        self._again(pending.pop(future), deaths, suspects, describe, error)
                    else:
                        del pending[future]
                        yield result
                if fell:
                    self.broken()
                    if len(pending) == 1:
                        self._again(next(iter(pending.values())), deaths, suspects, describe, fell)
                    else:
                        suspects.extend(pending.values())
                    pending.clear()
        finally:
            for future in pending:
                future.cancel()

    def _submit(
        self, function: Function, waiting: deque[Task], suspects: deque[Task], pending: dict[Future[Any], Task]
    ) -> BaseException | None:
        """Fills the room there is, with suspects one at a time. Returns the error of an executor found broken."""
        if suspects and pending and self.fall_together:
            return None  # what is in flight ends first
        source, room = (suspects, 1 if self.fall_together else self.room()) if suspects else (waiting, self.room())
        while source and len(pending) < room:
            try:
                future = self.executor().submit(function, source[0])
            except self.fatal as error:
                return error
            pending[future] = source.popleft()
        return None

    def _again(
        self, task: Task, deaths: Counter[int], suspects: deque[Task], describe: Describe, error: BaseException
    ) -> None:
        deaths[id(task)] += 1
        if deaths[id(task)] > 1:
            raise WorkerLost(
                f"a worker process died twice or ran out of memory while it worked on {describe(task)}: {self.remedy}. "
                "The same command goes on from here"
            ) from error
        suspects.appendleft(task)


class ProcessPool(OverExecutor):
    """Processes of this machine, started when there is something to do and kept until the end of the run."""

    fatal = (BrokenProcessPool,)
    fall_together = True
    remedy = "most often memory is short; try fewer workers (workers=1)"

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.pool: ProcessPoolExecutor | None = None

    def executor(self) -> Executor:
        if self.pool is None:
            # spawn: a forked child would inherit GDAL's and Numba's state in the middle of whatever they were doing
            context = multiprocessing.get_context("spawn")
            self.pool = ProcessPoolExecutor(self.workers, context, initializer=_worker_start)
        return self.pool

    def room(self) -> int:
        return 3 * self.workers

    def broken(self) -> None:
        self._stop()

    def run_all(self, function: Function, tasks: Sequence[Task], describe: Describe) -> Generator[Any, None, None]:
        whole = False
        try:
            with _one_thread_each():
                yield from super().run_all(function, tasks, describe)
            whole = True
        finally:
            if not whole:  # left in the middle: what is still in hand is nobody's any more
                self._stop()

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


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """For processes that start meanwhile: they are the parallelism, and numeric libraries must not start threads of
    their own in each. A process imports those with the caller's main module, before any initializer could say so."""
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(dict.fromkeys(THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _worker_start() -> None:
    # Ctrl-C reaches the whole process group; the caller alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_caller, daemon=True).start()


def _end_with_caller() -> None:
    """A caller that is killed outright cannot end its processes; without this they would wait for work for ever."""
    caller = multiprocessing.parent_process()
    assert caller is not None, "runs in a worker"
    with contextlib.suppress(OSError):
        multiprocessing.connection.wait([caller.sentinel])
    os._exit(1)
