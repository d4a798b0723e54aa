"""Writing files that are either whole or absent, and shards of TFRecord frames with their indexes."""

import hashlib
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c

from geokr import records
from geokr.manifests import Shard
from geokr.records import RecordError, Split


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli) in hardware."""
    return google_crc32c.value(data)


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole_file(path: Path, scratch: Path | None = None) -> Iterator[BinaryIO]:
    """A file that appears under its name only when all of it is on disk; replaces an older one at once.

    scratch: folder on the same disk for the unfinished file, by default its own. OSError names ``path``.
    """
    # a name of its own for every attempt: on a cluster two machines may be at the same task
    temporary = (scratch or path.parent) / f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # "no space left" alone does not say where
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


EARLY_BYTES = 2 << 20


class EarlyWriter:
    """Writes to a file whose bytes the disk begins to take while later ones are made, so that the sync at the end,
    during which nothing else gets done, has little left to wait for. ``at``: bytes so far."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.at = self._begun = 0

    def write(self, data: bytes) -> None:
        self.file.write(data)
        self.at += len(data)
        if self.at - self._begun >= EARLY_BYTES and hasattr(os, "posix_fadvise"):
            self.file.flush()
            # of pages not yet on disk Linux drops none at this advice, but begins to write them; where a file system
            # takes no advice, the sync at the end waits for all of it
            with suppress(OSError):
                os.posix_fadvise(self.file.fileno(), self._begun, self.at - self._begun, os.POSIX_FADV_DONTNEED)
            self._begun = self.at


def write_whole(path: Path, data: bytes, scratch: Path | None = None) -> None:
    """``data`` as a whole file."""
    with whole_file(path, scratch) as file:
        file.write(data)


@contextmanager
def _hashing() -> Iterator[tuple[Any, Callable[[bytes], None]]]:
    """(SHA-256 of all that was added when the context ends, what adds to it): in a thread beside the writing, since it
    takes longer than all else about a shard, and often a run has fewer shards left than cores."""
    digest, waiting, size = hashlib.sha256(), list[bytes](), 0
    with ThreadPoolExecutor(1) as thread:
        last: Future[None] | None = None

        def add(data: bytes, least: int = EARLY_BYTES) -> None:
            nonlocal last, waiting, size
            waiting.append(data)
            size += len(data)
            if size >= least:
                if last is not None:
                    last.result()  # so that no more than two such parts are held
                last, waiting, size = thread.submit(_update, digest, waiting), [], 0

        yield digest, add
        add(b"", 0)
        if last is not None:
            last.result()


def _update(digest: Any, parts: list[bytes]) -> None:
    for part in parts:
        digest.update(part)


def write_shard(folder: Path, split: Split, number: int, frames: Iterable[bytes], scratch: Path | None = None) -> Shard:
    """Writes ``split-number.tfrecord`` and its index from whole frames; returns their entry in the manifest."""
    name = f"{split}-{number:05d}.tfrecord"
    lines = []
    with _hashing() as (digest, add), whole_file(folder / name, scratch) as file:
        writer = EarlyWriter(file)
        for frame in frames:
            lines.append(f"{writer.at} {len(frame)}\n")
            writer.write(frame)
            add(frame)
    index = "".join(lines).encode()
    shard = Shard(
        name=name,
        records=len(lines),
        bytes=writer.at,
        sha256=digest.hexdigest(),
        index_sha256=hashlib.sha256(index).hexdigest(),
    )
    write_whole(folder / shard.index_name, index, scratch)
    return shard


def read_frames(path: Path) -> Iterator[tuple[int, bytes]]:
    """(offset, payload) of every record of a shard in order, both checksums checked, without the index.

    Raises RecordError naming file, record and offset at the first damage; what follows cannot be trusted.
    """
    with open(path, "rb") as file:
        offset = number = 0
        while header := file.read(records.HEADER.size):
            where = f"{path}: record {number} at byte {offset}"
            length = records.payload_length(header, crc32c, where)
            rest = file.read(length + records.FOOTER.size)
            if len(rest) != length + records.FOOTER.size:
                raise RecordError(f"{where}: the shard ends inside it: it is cut short, pack it again")
            yield offset, records.unframe(header + rest, crc32c, where)
            offset += len(header) + len(rest)
            number += 1
