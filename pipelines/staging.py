"""Shards of remote datasets are brought here ahead of the reader, in the order in which it will need them.

The order of samples is known in advance, so a scout walks it ahead of the reader and keeps a window of batches to
come; threads fetch the shard that is needed next and not here yet. What a batch still to come needs is held in the
cache; where the limit leaves no room, the shard that is needed last makes way for the one that is needed first.
An error waits for the batch that needs the shard, so that a run always stops at the same sample.
"""

import contextlib
import os
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np

from pipelines.cache import GB, FileLock, Obstacle, Wanted
from pipelines.dataset import Split
from pipelines.errors import PipelineError, ReadTimeoutError, TransferError
from pipelines.threads import StoppedError, join_all

# Shards that come at once: one stream of an object store gives some 50 to 100 MB/s.
TRANSFERS = 4
# Shards held at once, each by an open lock file; beyond it, which takes tiny shards, only the order of use protects.
_HELD = 256
_URGENT, _NEVER = -1, float("inf")
# How soon to look again for a shard that another process fetches, and for room that other processes may have made.
_LOOK_S, _ROOM_S = 0.2, 1.0


class Stager:
    """Gives the paths of a split's shards, waiting for those that are still on their way.

    upcoming: record ids of one batch after another, as the reader will ask for them. ahead: batches to look ahead.
    """

    def __init__(self, split: Split, upcoming: Iterator[np.ndarray], ahead: int, timeout_s: float):
        self._state = _State(split, ahead, timeout_s)
        self._threads = [
            threading.Thread(target=_scout, args=(self._state, upcoming), name="geokr-scout", daemon=True),
            *(
                threading.Thread(target=_fetch_all, args=(self._state,), name=f"geokr-stage-{number}", daemon=True)
                for number in range(TRANSFERS)
            ),
        ]
        self._finalizer = weakref.finalize(self, _end, self._state, self._threads)
        for thread in self._threads:
            thread.start()

    def locate(self, shard: int, again: bool = False) -> Path:
        """The shard's file, once it is here. again: it was here and is not any more.

        Raises TransferError, PipelineError where data.cache_gb is too small, ReadTimeoutError that names the shard
        if nothing moves for the time-out, StoppedError after ``stop``.
        """
        return self._state.locate(shard, again)

    def renew(self, shard: int, seen: os.stat_result) -> bool:
        """Fetches a shard again whose file, ``seen``, is damaged; False where another had done so.

        Raises as ``locate``.
        """
        copy = self._state.split.origin(shard).copy
        assert copy is not None
        return copy.renew(self._state.wanted(shard), seen, self._state.stopped)

    def advance(self) -> list[Path]:
        """Says that a batch was read; the files that are not needed any more, for the reader to close."""
        return self._state.advance()

    def stop(self) -> None:
        """Ends transfers and waits; does not wait for the threads."""
        self._state.stop()

    def close(self) -> None:
        self._finalizer()


class _State:
    """What the threads share. It does not know the Stager, so that one that is dropped ends."""

    def __init__(self, split: Split, ahead: int, timeout_s: float):
        self.split, self.ahead, self.timeout_s = split, ahead, timeout_s
        self.changed, self.stopped = threading.Condition(), threading.Event()
        self.window: deque[tuple[int, tuple[int, ...]]] = deque()
        self.uses: dict[int, deque[int]] = {}  # shard: numbers of the batches in the window that need it
        self.asked: Counter[int] = Counter()  # shards that a reader waits for
        self.held: dict[int, FileLock | None] = {}  # shards that are here
        self.busy: set[int] = set()  # shards that a thread has in hand
        self.fetching: set[int] = set()  # those of them that have their room and are on their way
        self.asking: int | None = None  # one that asks for room; where that is short, those needed later wait
        self.errors: dict[int, Exception] = {}
        self.gone: list[Path] = []
        self.moves: dict[int, float] = {}  # when a shard's transfer last moved
        self.moved = time.monotonic()
        self.elsewhere: dict[int, tuple[float, int]] = {}  # fetched by another process: (when to look again, bytes)
        self.turns = 0  # goes up whenever there may be room, or another shard has become urgent

    # ------------------------------------------------------------------------------------ reader's side

    def locate(self, shard: int, again: bool) -> Path:
        if self.split.origin(shard).copy is None:
            return self.split.path(shard)
        begin = time.monotonic()
        with self.changed:
            if again:
                self.let_go(shard)
            if isinstance(self.errors.get(shard), TransferError):
                del self.errors[shard]  # it failed while nobody needed it: storage may be back
            self.asked[shard] += 1
            self.turns += 1
            self.changed.notify_all()
            try:
                while shard not in self.held:
                    self._raise_if_hopeless(shard, begin)
                    self.changed.wait(min(0.5, self.timeout_s / 4))
            finally:
                self.asked[shard] -= 1
        return self.split.path(shard)

    def _raise_if_hopeless(self, shard: int, begin: float) -> None:
        if self.stopped.is_set():
            raise StoppedError
        if shard in self.errors:
            raise self.errors[shard]
        # One that is on its way must move itself; one that waits for its turn is alive while others move.
        moved = self.moves.get(shard, 0.0) if shard in self.busy or shard in self.elsewhere else self.moved
        idle_s = time.monotonic() - max(begin, moved)
        if idle_s > self.timeout_s:
            self._time_out(shard, idle_s)

    def _time_out(self, shard: int, idle_s: float) -> NoReturn:
        raise ReadTimeoutError(
            f"{self.split.label(shard)}: no answer from storage for {idle_s:.0f} s while it was fetched to "
            f"{self.split.path(shard)} (data.read_timeout_s is {self.timeout_s:g}): check the storage and the way "
            "there, then resume"
        )

    def advance(self) -> list[Path]:
        with self.changed:
            if self.window:
                _, shards = self.window.popleft()
                for shard in shards:
                    self.uses[shard].popleft()
                    if not self.uses[shard]:
                        for about in (self.uses, self.errors, self.elsewhere):
                            about.pop(shard, None)
                        self.let_go(shard)
            gone, self.gone = self.gone, []
            self.changed.notify_all()
        return gone

    # ------------------------------------------------------------------------------------ threads' side

    def wanted(self, shard: int) -> Wanted:
        about = self.split.shards[shard]
        return Wanted(about.name, about.sha256, about.bytes)

    def let_go(self, shard: int) -> None:
        """Lets a shard be removed for others, and marks when it was last of use."""
        lock, path = self.held.pop(shard, None), self.split.path(shard)
        self.gone.append(path)
        self.turns += 1
        if lock is not None:
            with contextlib.suppress(FileNotFoundError):
                os.utime(path)
            lock.release()

    def next_use(self, shard: int) -> float:
        """Number of the batch that needs it next; those that a reader waits for come before all others."""
        if self.asked[shard]:
            return _URGENT
        return self.uses[shard][0] if shard in self.uses else _NEVER

    def wanted_next(self) -> int | None:
        """The shard to be fetched next; none while another one asks for room."""
        if self.asking is not None:
            return None
        now, settled = time.monotonic(), self.held.keys() | self.busy | self.errors.keys()
        candidates = [
            shard
            for shard in {*self.uses, *(+self.asked)}
            if shard not in settled and self.elsewhere.get(shard, (0.0, 0))[0] <= now
        ]
        return min(candidates, key=lambda shard: (self.next_use(shard), shard), default=None)

    def has_room(self, shard: int) -> None:
        """The shard asks no more: the next one may."""
        if self.asking == shard:
            self.asking = None
            self.changed.notify_all()

    def last_needed(self, shard: int) -> int | None:
        """Of the shards that are held, the one that is needed last, if later than this one and the next batch."""
        last = max(self.held, key=self.next_use, default=None)
        batch = self.window[0][0] if self.window else 0
        return None if last is None or self.next_use(last) <= max(self.next_use(shard), batch) else last

    def stop(self) -> None:
        with self.changed:
            self.stopped.set()
            self.changed.notify_all()


def _scout(state: _State, upcoming: Iterator[np.ndarray]) -> None:
    """Walks the order ahead of the reader."""
    for number, ids in enumerate(upcoming):
        shards = np.unique(state.split.shard_of(ids)).tolist()
        remote = tuple(shard for shard in shards if state.split.origin(shard).copy is not None)
        with state.changed:
            state.changed.wait_for(lambda: state.stopped.is_set() or len(state.window) < state.ahead)
            if state.stopped.is_set():
                return
            state.window.append((number, remote))
            for shard in remote:
                state.uses.setdefault(shard, deque()).append(number)
            if (error := _too_much(state.split, remote)) is not None:
                state.errors.update(dict.fromkeys(remote, error))
            state.changed.notify_all()


def _too_much(split: Split, shards: tuple[int, ...]) -> PipelineError | None:
    """The error for a batch whose shards do not fit the cache together."""
    caches = [copy.cache for shard in shards if (copy := split.origin(shard).copy) is not None]
    need = sum(split.shards[shard].bytes for shard in shards)
    limit = caches[0].limit if caches else None
    if limit is None or need <= limit:
        return None
    return PipelineError(
        f"data.cache_gb={limit / GB:g} is too small: a batch comes from {len(shards)} shards of {need / GB:.3g} GB "
        f"together. Set data.cache_gb={2 * need / GB:.2g} or more, or pack with fewer shards.records"
    )


def _fetch_all(state: _State) -> None:
    """Fetches shard after shard until the end."""
    while True:
        with state.changed:
            while not state.stopped.is_set() and (shard := state.wanted_next()) is None:
                state.changed.wait(_LOOK_S if state.elsewhere else None)
            if state.stopped.is_set():
                return
            state.busy.add(shard)
            state.asking, turn = shard, state.turns
        outcome: FileLock | Obstacle | Exception
        try:
            outcome = _take(state, shard)
        except Exception as error:
            outcome = error
        with state.changed:
            state.has_room(shard)
            state.busy.discard(shard)
            state.fetching.discard(shard)
            _settle(state, shard, outcome, turn)
            state.changed.notify_all()


def _take(state: _State, shard: int) -> FileLock | Obstacle:
    copy = state.split.origin(shard).copy
    assert copy is not None

    def progress() -> None:
        state.moves[shard] = state.moved = time.monotonic()
        if shard not in state.fetching:
            with state.changed:
                state.fetching.add(shard)
                state.has_room(shard)

    with state.changed:
        # What a reader waits for must not starve for what others hold, if nothing of its own could or soon can go.
        beyond = state.next_use(shard) == _URGENT and state.last_needed(shard) is None and not state.fetching
    return copy.take(
        state.wanted(shard),
        progress=progress,
        stopped=state.stopped,
        beyond=beyond,
    )


def _settle(state: _State, shard: int, outcome: FileLock | Obstacle | Exception, turn: int) -> None:
    """Notes what came of a shard; without room for it, another one makes way, or the thread waits for a change."""
    _, arrived = state.elsewhere.pop(shard, (0.0, -1))
    if isinstance(outcome, StoppedError):
        return
    if isinstance(outcome, Exception):
        state.errors[shard] = outcome
    elif outcome is Obstacle.ELSEWHERE:
        _look_again(state, shard, arrived)
    elif outcome is Obstacle.NO_ROOM:
        last = state.last_needed(shard)
        if last is not None:
            state.let_go(last)
        else:
            state.changed.wait_for(lambda: state.stopped.is_set() or state.turns != turn, _ROOM_S)
    elif state.next_use(shard) == _NEVER:
        outcome.release()  # the batch that needed it is over
    elif len(state.held) < _HELD:
        state.held[shard] = outcome
    else:
        outcome.release()
        state.held[shard] = None


def _look_again(state: _State, shard: int, arrived: int) -> None:
    """Another process fetches it: others first, and see whether it moves."""
    copy = state.split.origin(shard).copy
    assert copy is not None
    now, size = time.monotonic(), copy.arrived(state.wanted(shard))
    if size != arrived:
        state.moves[shard] = state.moved = now
    state.elsewhere[shard] = now + _LOOK_S, size


def _end(state: _State, threads: list[threading.Thread]) -> None:
    state.stop()
    join_all(threads)
    with state.changed:
        for lock in state.held.values():
            if lock is not None:
                lock.release()
        state.held.clear()
