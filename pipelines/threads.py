"""Threads that end: a team that works on parts of a batch, and a stage that prepares items ahead.

All of them are daemons, so that a thread stuck in a read from dead storage cannot keep the process alive, and all
of them hold no reference to their owner, so that an owner that is dropped without ``close`` still stops them.
"""

import contextlib
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

T = TypeVar("T")
# Longest wait for threads to end on close. Only one stuck in a read from dead storage takes longer, and it is left.
_JOIN_S = 3.0


class Team:
    """Threads that take jobs from one queue. For work that releases the GIL."""

    def __init__(self, threads: int, name: str):
        self._jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=_serve, args=(self._jobs,), name=f"{name}-{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()
        self._finalizer = weakref.finalize(self, _stop_team, self._jobs, self._threads)

    def __len__(self) -> int:
        return len(self._threads)

    def submit(self, function: Callable[..., T], *arguments: Any) -> "Future[T]":
        future: Future[T] = Future()
        self._jobs.put((future, function, arguments))
        return future

    def map(self, function: Callable[..., Any], parts: Iterable[Any]) -> list[Any]:
        """Results in the parts' order, once all have ended; raises the first part's error."""
        futures = [self.submit(function, part) for part in parts]
        errors = [future.exception() for future in futures]
        for error in errors:
            if error is not None:
                raise error
        return [future.result() for future in futures]

    def close(self) -> None:
        """Ends the threads after the jobs in hand."""
        self._finalizer()


def _serve(jobs: "queue.SimpleQueue[Any]") -> None:
    while (job := jobs.get()) is not None:
        _work(*job)
        del job  # nothing may live on while this thread waits: the job may hold the team's owner


def _work(future: "Future[Any]", function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        future.set_result(function(*arguments))
    except BaseException as error:
        future.set_exception(error)


def _stop_team(jobs: "queue.SimpleQueue[Any]", threads: list[threading.Thread]) -> None:
    for _ in threads:
        jobs.put(None)
    join_all(threads)


def join_all(threads: list[threading.Thread]) -> None:
    """Waits for threads that were told to end; one that is stuck is left after a while."""
    deadline = time.monotonic() + _JOIN_S
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(max(0.0, deadline - time.monotonic()))


class StoppedError(Exception):
    """The other side of a stage was closed."""


class _Slots:
    """A bounded queue that can be closed from either side while the other waits."""

    def __init__(self, depth: int):
        self.depth = depth
        self.items: deque[Any] = deque()
        self.changed = threading.Condition()
        self.closed = False

    def put(self, item: Any) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.closed or len(self.items) < self.depth)
            if self.closed:
                raise StoppedError
            self.items.append(item)
            self.changed.notify_all()

    def get(self) -> Any:
        with self.changed:
            self.changed.wait_for(lambda: self.closed or self.items)
            if self.closed:
                raise StoppedError
            item = self.items.popleft()
            self.changed.notify_all()
            return item

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.items.clear()
            self.changed.notify_all()


class Stage(Generic[T]):
    """An iterator that runs another one in a thread, at most ``depth`` items ahead.

    The source's exception is raised by ``next`` after the items before it; after it, or the end, StopIteration.
    """

    def __init__(self, source: Iterator[T], depth: int, name: str):
        self._slots = _Slots(depth)
        self._ended = False
        self._thread = threading.Thread(target=_fill, args=(source, self._slots), name=name, daemon=True)
        self._finalizer = weakref.finalize(self, _stop_stage, self._slots, self._thread)
        self._thread.start()

    def __iter__(self) -> "Stage[T]":
        return self

    def __next__(self) -> T:
        if self._ended:
            raise StopIteration
        try:
            item, error = self._slots.get()
        except StoppedError:
            raise StopIteration from None
        if error is None:
            return item
        self._ended = True
        raise error

    def stop(self) -> None:
        """Ends both sides and forgets what was prepared; does not wait for the thread."""
        self._slots.close()

    def close(self) -> None:
        """Stops and waits for the thread. Of stages that draw from one another stop all before closing any."""
        self._finalizer()


def _fill(source: Iterator[Any], slots: _Slots) -> None:
    try:
        for item in source:
            slots.put((item, None))
            del item
    except StoppedError:
        return
    except BaseException as error:
        end: BaseException = error
    else:
        end = StopIteration()
    with contextlib.suppress(StoppedError):
        slots.put((None, end))


def _stop_stage(slots: _Slots, thread: threading.Thread) -> None:
    slots.close()
    join_all([thread])
