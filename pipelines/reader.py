"""Records by id: bytes read into reused buffers by threads, checksums checked, features found.

A thread does its share of a batch in one compiled call without the GIL (pipelines.read_kernels). What that finds not
to be in order, and everything where there is no C library for it, goes the slow way in Python, which names the fault.

Not ``mmap``: there a truncated file kills the process (SIGBUS), and a stalled one can hold the GIL.
A read has a deadline: storage that hangs becomes an error with the shard's name, in the caller's thread.
"""

import logging
import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, wait
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import NoReturn

import google_crc32c
import numpy as np

from geokr import records
from geokr.records import FRAME_OVERHEAD, RecordError
from pipelines import native, parse, read_kernels
from pipelines.dataset import Dataset, Split
from pipelines.errors import ReadTimeoutError
from pipelines.files import OpenFiles
from pipelines.forms import Forms
from pipelines.layout import Layout, lay_out
from pipelines.staging import Stager
from pipelines.threads import Team

log = logging.getLogger("geokr")

# Files kept open. The usual limit for a process is 1,024, and a batch comes from the 16 or so shards of a group.
_OPEN_FILES = 128


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """images: N arrays of bytes (uint8 [size]), valid until ``release``. fractions: float32 [N, K]. ids: int64 [N].
    squares: float32 [N, G, G, K], fractions by squares of the tile, where they were asked for."""

    ids: np.ndarray
    images: list[np.ndarray]
    fractions: np.ndarray
    squares: np.ndarray | None
    _buffers: list[np.ndarray]
    _buffer: np.ndarray

    def release(self) -> None:
        """Gives the memory back for another batch; ``images`` must not be used any more."""
        self.images.clear()
        self._buffers.append(self._buffer)


@dataclass(frozen=True, slots=True, eq=False)
class _Work:
    """A batch while it is read. Each thread writes to its own records, runs and place in ``hand``.

    paths: files of the shards. forms: int64 [N]. handles: int64 [runs]. sound: bool [runs].
    hand: int64 [parts], the run that a thread waits for, -1 for none.
    spans: int64 [N, 5, 2]. fractions: float32 [N, K], or [N, G * G * K] by squares. taken: bool [N], whether these two
    are filled.
    frames, expected, results: the arguments of pipelines.read_kernels made of these.
    """

    layout: Layout
    buffer: np.ndarray
    paths: dict[int, str]
    forms: np.ndarray
    handles: np.ndarray
    sound: np.ndarray
    hand: np.ndarray
    spans: np.ndarray
    fractions: np.ndarray
    taken: np.ndarray
    frames: tuple[np.ndarray, ...]
    expected: tuple[np.ndarray | bool, ...]
    results: tuple[np.ndarray, ...]

    @classmethod
    def of(cls, layout: Layout, buffer: np.ndarray, paths: dict[int, str], forms: Forms, parts: int) -> "_Work":
        count, runs = len(layout.ids), len(layout.edges) - 1
        of_record = forms.of_shard[layout.shards]
        spans, taken = np.empty((count, 5, 2), np.int64), np.zeros(count, np.bool_)
        fractions = np.empty((count, forms.values), "<f4")  # filled byte by byte
        return cls(
            layout,
            buffer,
            paths,
            of_record,
            handles=np.full(runs, -1, np.int64),
            sound=np.zeros(runs, np.bool_),
            hand=np.full(parts, -1, np.int64),
            spans=spans,
            fractions=fractions,
            taken=taken,
            frames=(layout.edges, layout.offsets, layout.places, layout.sizes),
            expected=(of_record, forms.names, forms.name_ends, forms.contents, forms.lengths, forms.floats),
            results=(spans, fractions.view(np.uint8), taken),
        )


class Reader:
    """Reads records of one split. Not to be entered by two threads at once.

    upcoming: the ids of each ``read`` to come, so that remote shards are fetched ahead of it, ``ahead`` reads at most.
    by_square: whether fractions by squares are wanted, too; the dataset must have them.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: Split,
        *,
        threads: int,
        timeout_s: float,
        upcoming: Iterable[np.ndarray] = (),
        ahead: int = 1,
        by_square: bool = False,
    ):
        self._split, self._timeout_s = split, timeout_s
        self._stager = Stager(split, iter(upcoming), ahead, timeout_s) if split.is_remote else None
        self._forms = Forms.of(dataset, split, by_square=by_square)
        self._team = Team(threads, "geokr-read")
        self._files = OpenFiles(_OPEN_FILES)
        self._files_a_thread = max(1, _OPEN_FILES // threads)
        self._buffers: list[np.ndarray] = []
        self._renewing = threading.Lock()

    def read(self, ids: np.ndarray) -> Samples:
        """The records in the given order; repeated ids are allowed.

        Raises RecordError that names shard, record and byte (damage, or bytes that are no such record),
        ReadTimeoutError that names the shard, and TransferError for a remote one that does not come.
        """
        ids = np.asarray(ids, np.int64)
        if len(ids) and not (ids.min() >= 0 and ids.max() < self._split.records):
            raise IndexError(f"record ids reach outside 0..{self._split.records - 1} of split {self._split.name!r}")
        layout = lay_out(self._split, ids)
        # All of them before the first is read, and in one thread: they are fetched in this order.
        paths = {shard: self._locate(shard) for shard in np.unique(layout.shards).tolist()}
        buffer = self._buffer(int(layout.sizes.sum()))
        work = _Work.of(layout, buffer, paths, self._forms, len(self._team))
        self._read_all(work)
        images = self._images(work)
        if self._stager is not None:
            for path in self._stager.advance():
                self._files.forget(str(path))
        fractions, squares = work.fractions[work.layout.back].astype(np.float32, copy=False), None
        if side := self._forms.squares:
            squares = fractions.reshape(len(ids), side, side, self._forms.classes)
            fractions = squares.sum((1, 2))
        return Samples(ids, images, fractions, squares, self._buffers, work.buffer)

    def stop(self) -> None:
        """Ends waiting for remote shards; to be called before whoever may be in ``read`` is waited for."""
        if self._stager is not None:
            self._stager.stop()

    def close(self) -> None:
        """Ends the threads and closes the files."""
        self.stop()
        self._team.close()
        if self._stager is not None:
            self._stager.close()
        self._files.close()

    # ------------------------------------------------------------------------------------------- shares

    def _buffer(self, size: int) -> np.ndarray:
        """A buffer of at least this size: a returned one where it is large enough."""
        while self._buffers:
            buffer = self._buffers.pop()
            if len(buffer) >= size:
                return buffer
        return np.empty(size + size // 8, np.uint8)  # some room, as batches differ in size

    def _read_all(self, work: _Work) -> None:
        parts = work.layout.parts(len(self._team))
        pending = {
            self._team.submit(self._read_part, work, number, low, high) for number, (low, high) in enumerate(parts)
        }
        seen, since = work.hand.copy(), np.full(len(work.hand), time.monotonic())
        while pending:
            done, pending = wait(pending, min(0.5, self._timeout_s / 4), FIRST_EXCEPTION)
            for future in done:
                future.result()
            if pending:
                self._check_deadlines(work, seen, since)

    def _check_deadlines(self, work: _Work, seen: np.ndarray, since: np.ndarray) -> None:
        """seen: the runs that were in hand when last looked at. since: when each was first seen there."""
        now, hand = time.monotonic(), work.hand.copy()
        since[hand != seen] = now
        seen[:] = hand
        for number in np.flatnonzero((hand >= 0) & (now - since > self._timeout_s)).tolist():
            start = work.layout.edges[hand[number]]
            raise ReadTimeoutError(
                f"{self._split.label(int(work.layout.shards[start]))}: no answer from storage for "
                f"{now - since[number]:.0f} s (data.read_timeout_s is {self._timeout_s:g}): check the disk or network "
                "it lies on, then resume"
            )

    def _read_part(self, work: _Work, number: int, low: int, high: int) -> None:
        """Reads runs ``low`` to ``high``, with so many files open at once as a thread may have."""
        hand, calls = work.hand[number : number + 1], native.calls()
        for groups in self._by_files(work.layout, low, high):
            first, last = groups[0], groups[-1]
            if calls is not None and not self._read_compiled(calls, work, hand, groups):
                continue
            for run in (first + np.flatnonzero(~work.sound[first:last])).tolist():
                self._read_run(work, hand, run)
            start, stop = work.layout.edges[first], work.layout.edges[last]
            read_kernels.take_records(start, stop, work.frames, work.buffer, work.expected, work.results)

    def _by_files(self, layout: Layout, low: int, high: int) -> Iterator[list[int]]:
        """Where each shard's runs begin, and at last where they end; again and again for some shards."""
        shards = layout.shards[layout.edges[low:high]]
        begins = [low, *(low + 1 + np.flatnonzero(np.diff(shards))).tolist(), high]
        for at in range(0, len(begins) - 1, self._files_a_thread):
            yield begins[at : at + self._files_a_thread + 1]

    def _read_compiled(self, calls: native.Calls, work: _Work, hand: np.ndarray, groups: list[int]) -> int:
        """Reads runs without the GIL; how many of them are not sound or could not be read."""
        used: list[tuple[str, int]] = []
        try:
            for begin, end in pairwise(groups):
                path = work.paths[int(work.layout.shards[work.layout.edges[begin]])]
                hand[0] = begin
                try:
                    handle = self._files.acquire(path)
                except OSError:
                    continue  # the slow way meets it again and says where
                work.handles[begin:end] = handle
                used.append((path, handle))
            hand[0] = -1
            return read_kernels.read_runs(
                calls.pread,
                calls.crc32c,
                groups[0],
                groups[-1],
                work.handles,
                work.frames,
                work.buffer,
                work.expected,
                work.results,
                hand,
                work.sound,
            )
        finally:
            for path, handle in used:
                self._files.release(path, handle)

    def _locate(self, shard: int) -> str:
        """The shard's file. One that was removed after it was fetched, as by hand, is fetched again."""
        if self._stager is None:
            return str(self._split.path(shard))
        path = str(self._stager.locate(shard))
        try:
            with self._files.use(path):
                return path
        except FileNotFoundError:
            return str(self._stager.locate(shard, again=True))

    # ----------------------------------------------------------------------------------------- slow way

    def _read_run(self, work: _Work, hand: np.ndarray, run: int) -> None:
        """Fills the buffer with neighbouring frames of one shard and checks them. Raises what is wrong with them.

        The copy of a remote shard that is damaged is fetched again, once.
        """
        shard = int(work.layout.shards[work.layout.edges[run]])
        path, seen = self._locate(shard), list[os.stat_result]()
        try:
            self._read_frames(work, hand, run, self._watched(path, seen))
        except RecordError as error:
            if self._stager is None or self._split.origin(shard).copy is None:
                raise
            hand[0] = -1  # what is fetched has a time-out of its own
            self._renew(self._stager, shard, path, seen, error)
            self._read_frames(work, hand, run, self._files.use(path))

    @contextmanager
    def _watched(self, path: str, seen: list[os.stat_result]) -> Iterator[int]:
        """The file, and which one it is: another may soon have its name."""
        with self._files.use(path) as handle:
            seen.append(os.fstat(handle))
            yield handle

    def _renew(self, stager: Stager, shard: int, path: str, seen: Sequence[os.stat_result], error: RecordError) -> None:
        """Puts a new copy in place of the damaged one that was seen, unless another thread or process has done so."""
        with self._renewing:
            if not seen:  # it could not even be opened
                stager.locate(shard, again=True)
            elif stager.renew(shard, seen[0]):
                log.warning("%s; its copy at %s was fetched again", error, path)
            self._files.forget(path)

    def _read_frames(self, work: _Work, hand: np.ndarray, run: int, file: AbstractContextManager[int]) -> None:
        layout = work.layout
        start, stop = layout.edges[run : run + 2].tolist()
        view = work.buffer.data[int(layout.places[start]) : int(layout.places[stop - 1] + layout.sizes[stop - 1])]
        hand[0] = run
        self._fill(file, view, int(layout.ids[start]))
        hand[0] = -1
        for n in range(start, stop):
            self._check_frame(work, n)

    def _fill(self, file: AbstractContextManager[int], view: memoryview, record_id: int) -> None:
        offset = int(self._split.offsets[record_id])
        try:
            with file as handle:
                while view:
                    got = os.preadv(handle, [view], offset)
                    if got == 0:
                        label = self._split.label(int(self._split.shard_of(np.array([record_id]))[0]))
                        raise RecordError(f"{label}: ends at byte {offset}: it was cut short after it was opened")
                    view, offset = view[got:], offset + got
        except OSError as error:
            where = self._split.where(record_id)
            raise RecordError(f"{where}: cannot be read from byte {offset} on ({error})") from error

    def _check_frame(self, work: _Work, n: int) -> None:
        """Length and both checksums of a frame."""
        start, size, buffer = int(work.layout.places[n]), int(work.layout.sizes[n]), work.buffer
        end = start + size
        length, length_crc = records.HEADER.unpack_from(buffer.data, start)
        (crc,) = records.FOOTER.unpack_from(buffer.data, end - records.FOOTER.size)
        value, mask = google_crc32c.value, records.mask_crc
        sound = (
            length == size - FRAME_OVERHEAD
            and mask(value(buffer[start : start + 8])) == length_crc  # type: ignore[arg-type]
            and mask(value(buffer[start + records.HEADER.size : end - records.FOOTER.size])) == crc  # type: ignore[arg-type]
        )
        if not sound:
            where = self._split.where(int(work.layout.ids[n]))
            records.unframe(buffer[start:end].tobytes(), google_crc32c.value, where)
            raise AssertionError(f"{where}: two checks of one frame disagree")

    # ------------------------------------------------------------------------------------------ results

    def _images(self, work: _Work) -> list[np.ndarray]:
        """The images as asked for. Reads records of unusual form, and checks every record's fractions."""
        unusual = {n: self._take_slowly(work, n) for n in np.flatnonzero(~work.taken).tolist()}
        fractions = work.fractions
        odd = ~(np.isfinite(fractions).all(1) & (fractions >= 0).all(1) & (np.abs(fractions.sum(1) - 1) < 1e-4))
        for n in np.flatnonzero(odd).tolist():
            self._explain_fractions(work, n)
        buffer, back = work.buffer, work.layout.back
        if self._forms.are_whole and not unusual:
            return [buffer[start:end] for start, end in work.spans[back, parse.IMAGE].tolist()]
        places, forms = work.spans[:, parse.IMAGE].tolist(), work.forms.tolist()
        images = [
            unusual[n] if n in unusual else self._forms.wanted(buffer[start:end], forms[n])
            for n, (start, end) in enumerate(places)
        ]
        return [images[n] for n in back.tolist()]

    def _payload(self, work: _Work, n: int) -> bytes:
        start, end = int(work.layout.places[n]), int(work.layout.places[n] + work.layout.sizes[n])
        return work.buffer[start + records.HEADER.size : end - records.FOOTER.size].tobytes()

    def _take_slowly(self, work: _Work, n: int) -> np.ndarray:
        """A record's image, where the compiled way did not take it; its fractions are stored."""
        where = self._split.where(int(work.layout.ids[n]))
        image, work.fractions[n] = self._forms.take_slowly(self._payload(work, n), int(work.forms[n]), where)
        return image

    def _explain_fractions(self, work: _Work, n: int) -> NoReturn:
        where = self._split.where(int(work.layout.ids[n]))
        records.decode_record(self._payload(work, n), where)
        raise RecordError(f"{where}: its fractions do not sum to 1; pack again")  # by a hair, as sums of squares may


__all__ = ["Reader", "Samples"]
