"""Records by id: bytes read with ``preadv`` into reused buffers by threads, checksums checked, features found.

Not ``mmap``: there a truncated file kills the process (SIGBUS), and a stalled one can hold the GIL.
A read has a deadline: storage that hangs becomes an error with the shard's name, in the caller's thread.
"""

import os
import time
from collections.abc import Iterable
from concurrent.futures import FIRST_EXCEPTION, wait
from dataclasses import dataclass, field
from itertools import pairwise

import google_crc32c
import numpy as np

from geokr import records
from geokr.records import FRAME_OVERHEAD, RecordError
from pipelines import parse
from pipelines.dataset import Dataset, Origin, Split
from pipelines.errors import ReadTimeoutError
from pipelines.files import OpenFiles
from pipelines.staging import Stager
from pipelines.threads import Team

# Files kept open. The usual limit for a process is 1,024, and a batch comes from the 16 or so shards of a group.
_OPEN_FILES = 128


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """images: N arrays of bytes (uint8 [size]), valid until ``release``. fractions: float32 [N, K]. ids: int64 [N]."""

    ids: np.ndarray
    images: list[np.ndarray]
    fractions: np.ndarray
    _buffers: list[np.ndarray]
    _buffer: np.ndarray

    def release(self) -> None:
        """Gives the memory back for another batch; ``images`` must not be used any more."""
        self.images.clear()
        self._buffers.append(self._buffer)


@dataclass(slots=True)
class _Part:
    """A thread's share of a batch: runs of neighbouring records (start, stop), and what it is waiting for."""

    runs: list[tuple[int, int]]
    shard: str = ""
    since: float | None = None


@dataclass(frozen=True, slots=True)
class _Form:
    """What the records of one dataset must say of themselves, and which of their bands are wanted (None: all)."""

    expected: dict[int, bytes]
    shape: tuple[int, int, int]
    dtype: str
    raw_bytes: int | None
    pick: tuple[int, ...] | None

    @classmethod
    def of(cls, tile: records.Tile, origin: Origin) -> "_Form":
        expected = {
            parse.CODEC: tile.codec.encode(),
            parse.DTYPE: tile.dtype.encode(),
            parse.SHAPE: parse.packed(origin.shape),
        }
        raw_bytes = int(np.prod(origin.shape)) * np.dtype(tile.dtype).itemsize
        return cls(expected, origin.shape, tile.dtype, raw_bytes if tile.codec == "raw" else None, origin.pick)

    def wanted(self, image: np.ndarray) -> np.ndarray:
        """The image's bytes with the wanted bands only (a copy where some are not)."""
        if self.pick is None:
            return image
        pixels = np.frombuffer(image, np.dtype(self.dtype).newbyteorder("<")).reshape(self.shape)
        return np.ascontiguousarray(pixels[..., list(self.pick)]).reshape(-1).view(np.uint8)


@dataclass(frozen=True, slots=True)
class _Layout:
    """Records in file order. ids, shards, sizes, places: int64 [N]; places: where each frame begins in the buffer."""

    ids: np.ndarray
    shards: np.ndarray
    sizes: np.ndarray
    places: np.ndarray
    back: np.ndarray
    runs: list[tuple[int, int]] = field(default_factory=list)


class Reader:
    """Reads records of one split. Not to be entered by two threads at once.

    upcoming: the ids of each ``read`` to come, so that remote shards are fetched ahead of it, ``ahead`` reads at most.
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
    ):
        self._split, self._timeout_s = split, timeout_s
        self._stager = Stager(split, iter(upcoming), ahead, timeout_s) if split.is_remote else None
        self._tile = dataset.manifest.tile
        self._classes = len(dataset.manifest.classes)
        self._forms = [_Form.of(self._tile, origin) for origin in split.origins]
        self._team = Team(threads, "geokr-read")
        self._files = OpenFiles(_OPEN_FILES)
        self._buffers: list[np.ndarray] = []

    def read(self, ids: np.ndarray) -> Samples:
        """The records in the given order; repeated ids are allowed.

        Raises RecordError that names shard, record and byte (damage, or bytes that are no such record),
        ReadTimeoutError that names the shard, and TransferError for a remote one that does not come.
        """
        ids = np.asarray(ids, np.int64)
        if len(ids) and not (ids.min() >= 0 and ids.max() < self._split.records):
            raise IndexError(f"record ids reach outside 0..{self._split.records - 1} of split {self._split.name!r}")
        layout = _lay_out(self._split, ids)
        buffer = self._buffer(int(layout.sizes.sum()))
        self._read_all(layout, buffer)
        images, fractions = self._features(layout, buffer)
        if self._stager is not None:
            for path in self._stager.advance():
                self._files.forget(str(path))
        back = layout.back
        return Samples(ids, [images[n] for n in back], fractions[back], self._buffers, buffer)

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

    # ------------------------------------------------------------------------------------------- bytes

    def _buffer(self, size: int) -> np.ndarray:
        """A buffer of at least this size: a returned one where it is large enough."""
        while self._buffers:
            buffer = self._buffers.pop()
            if len(buffer) >= size:
                return buffer
        return np.empty(size + size // 8, np.uint8)  # some room, as batches differ in size

    def _read_all(self, layout: _Layout, buffer: np.ndarray) -> None:
        count = max(1, min(len(self._team), len(layout.runs)))
        parts = [_Part(layout.runs[number::count]) for number in range(count)]
        pending = {self._team.submit(self._read_part, part, layout, buffer) for part in parts}
        while pending:
            done, pending = wait(pending, min(0.5, self._timeout_s / 4), FIRST_EXCEPTION)
            for future in done:
                future.result()
            self._check_deadlines(parts)

    def _check_deadlines(self, parts: list[_Part]) -> None:
        now = time.monotonic()
        for part in parts:
            since = part.since
            if since is not None and now - since > self._timeout_s:
                raise ReadTimeoutError(
                    f"{part.shard}: no answer from storage for {now - since:.0f} s "
                    f"(data.read_timeout_s is {self._timeout_s:g}): check the disk or network it lies on, then resume"
                )

    def _read_part(self, part: _Part, layout: _Layout, buffer: np.ndarray) -> None:
        for start, stop in part.runs:
            shard = int(layout.shards[start])
            path = self._locate(shard)
            part.shard, part.since = self._split.label(shard), time.monotonic()
            self._read_run(path, shard, layout, start, stop, buffer)
            part.since = None
            for n in range(start, stop):
                self._check_frame(layout, n, buffer)

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

    def _read_run(self, path: str, shard: int, layout: _Layout, start: int, stop: int, buffer: np.ndarray) -> None:
        """Fills the buffer with neighbouring frames of one shard."""
        first = int(layout.places[start])
        view = buffer.data[first : int(layout.places[stop - 1] + layout.sizes[stop - 1])]
        offset = int(self._split.offsets[layout.ids[start]])
        try:
            with self._files.use(path) as handle:
                while view:
                    got = os.preadv(handle, [view], offset)
                    if got == 0:
                        label = self._split.label(shard)
                        raise RecordError(f"{label}: ends at byte {offset}: it was cut short after it was opened")
                    view, offset = view[got:], offset + got
        except OSError as error:
            where = self._split.where(int(layout.ids[start]))
            raise RecordError(f"{where}: cannot be read from byte {offset} on ({error})") from error

    def _check_frame(self, layout: _Layout, n: int, buffer: np.ndarray) -> None:
        """Length and both checksums of a frame."""
        start, size = int(layout.places[n]), int(layout.sizes[n])
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
            where = self._split.where(int(layout.ids[n]))
            records.unframe(buffer[start:end].tobytes(), google_crc32c.value, where)
            raise AssertionError(f"{where}: two checks of one frame disagree")

    # ---------------------------------------------------------------------------------------- features

    def _features(self, layout: _Layout, buffer: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """(image bytes of each record, fractions float32 [N, K]), in the layout's order."""
        header, footer = records.HEADER.size, records.FOOTER.size
        payloads = np.stack([layout.places + header, layout.places + layout.sizes - footer], 1)
        spans, canonical = parse.find_features(buffer, payloads)
        images: list[np.ndarray] = []
        fractions = np.empty((len(payloads), self._classes), np.float32)
        for n, origin in enumerate(self._split.origin_of[layout.shards].tolist()):
            form = self._forms[origin]
            if not (canonical[n] and self._take(buffer, spans[n], form, images, fractions[n])):
                self._take_slowly(buffer, payloads[n], int(layout.ids[n]), form, images, fractions[n])
        sums = fractions.sum(1)
        odd = ~(np.isfinite(fractions).all(1) & (fractions >= 0).all(1) & (np.abs(sums - 1) < 1e-4))
        for n in np.flatnonzero(odd):
            self._decode(buffer, payloads[n], int(layout.ids[n]))
            raise AssertionError("two checks of one record's fractions disagree")
        if self._tile.dtype == "float32":
            self._check_finite(images, layout)
        return images, fractions

    def _take(
        self, buffer: np.ndarray, spans: np.ndarray, form: _Form, images: list[np.ndarray], fractions: np.ndarray
    ) -> bool:
        """Stores a canonical record's image and fractions; False where it is not what the manifest says."""
        bounds = spans.tolist()
        for number, expected in form.expected.items():
            start, end = bounds[number]
            if buffer[start:end].tobytes() != expected:
                return False
        start, end = bounds[parse.FRACTIONS]
        if end - start != 4 * self._classes:
            return False
        fractions[:] = np.frombuffer(buffer, "<f4", self._classes, start)
        start, end = bounds[parse.IMAGE]
        if form.raw_bytes is not None and end - start != form.raw_bytes:
            return False
        images.append(form.wanted(buffer[start:end]))
        return True

    def _decode(self, buffer: np.ndarray, payload: np.ndarray, record_id: int) -> records.Record:
        start, end = payload.tolist()
        return records.decode_record(buffer[start:end].tobytes(), self._split.where(record_id))

    def _take_slowly(
        self,
        buffer: np.ndarray,
        payload: np.ndarray,
        record_id: int,
        form: _Form,
        images: list[np.ndarray],
        fractions: np.ndarray,
    ) -> None:
        """A record of unusual form: read in full, then held against the manifest."""
        record = self._decode(buffer, payload, record_id)
        found = (record.codec, record.dtype, record.shape, len(record.fractions))
        expected = (self._tile.codec, self._tile.dtype, form.shape, self._classes)
        if found != expected:
            raise RecordError(
                f"{self._split.where(record_id)}: (codec, dtype, shape, classes) are {found}, the manifest says "
                f"{expected}: shard and manifest do not belong together, pack again"
            )
        images.append(form.wanted(np.frombuffer(record.image, np.uint8)))
        fractions[:] = record.fractions

    def _check_finite(self, images: list[np.ndarray], layout: _Layout) -> None:
        for n, image in enumerate(images):
            if not np.isfinite(np.frombuffer(image, "<f4")).all():
                where = self._split.where(int(layout.ids[n]))
                raise RecordError(f"{where}: feature 'image' holds NaN or infinity; pack again from sound scenes")


def _lay_out(split: Split, ids: np.ndarray) -> _Layout:
    """File order, and runs of records that follow one another in a shard, each to be read at once."""
    unique, back = np.unique(ids, return_inverse=True)  # ids count in shard order
    sizes = split.sizes[unique]
    places = np.cumsum(sizes) - sizes
    shards = split.shard_of(unique)
    breaks = np.flatnonzero((np.diff(unique) != 1) | (np.diff(shards) != 0)) + 1
    edges = [0, *breaks.tolist(), len(unique)] if len(unique) else [0]
    return _Layout(unique, shards, sizes, places, back, list(pairwise(edges)))


__all__ = ["Reader", "Samples"]
