"""Verified copies of remote files on this machine, shared by its processes and kept for later runs.

    CACHE/lock                             held while room is made
    CACHE/NAME-HASH/manifest.json, *.idx   a dataset, known by the hash of its manifest, not by its URL
    CACHE/NAME-HASH/train-00000.tfrecord   a complete shard: size and hash were right before it got this name
    CACHE/NAME-HASH/*.part, *.BYTES.claim  one on its way, and the room it will take
    CACHE/NAME-HASH/locks/*                one a file: held alone by the process that fetches or removes it,
                                           together by those that will soon read it
Locks are the kernel's (flock), so that a process that dies leaves none behind.
"""

import contextlib
import enum
import fcntl
import hashlib
import os
import random
import re
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geokr.manifests import MANIFEST
from geokr.options import RecordsSource
from pipelines.errors import ReadTimeoutError, TransferError
from pipelines.remote import NEVER, Progress, Store, sync_folder
from pipelines.threads import StoppedError

_POLL_S = 0.1
GB = 10**9


def default_root() -> Path:
    """Where copies are kept if data.cache_dir is not set."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "geokr" / "records"


class FileLock:
    """A lock on a file of its own. Neither way of taking it waits."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def alone(self) -> bool:
        return self._take(fcntl.LOCK_EX)

    def together(self) -> bool:
        return self._take(fcntl.LOCK_SH)

    def _take(self, kind: int) -> bool:
        try:
            fcntl.flock(self._handle, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            raise TransferError(
                f"data.cache_dir lies on a file system without file locks ({error}): give a folder on a local disk"
            ) from error
        return True

    def release(self) -> None:
        """Gives the lock back; the object is of no more use."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


class Obstacle(enum.Enum):
    """Why a file is not here yet: another process fetches or removes it, or readers hold all that could go for it."""

    ELSEWHERE = 1
    NO_ROOM = 2


@dataclass(frozen=True, slots=True)
class Wanted:
    """A file as the manifest lists it. size: of a shard; None for the small files, which always stay."""

    name: str
    sha256: str
    size: int | None = None


class Cache:
    """The folder that holds the copies. limit: bytes of shards that are kept, None for no limit."""

    def __init__(self, root: Path, limit: int | None = None):
        self.root, self.limit = root, limit
        try:
            root.mkdir(parents=True, exist_ok=True)
            FileLock(root / "lock").release()
        except OSError as error:
            raise TransferError(f"data.cache_dir={root} cannot be written ({error}): give another folder") from error

    @contextlib.contextmanager
    def _guarded(self, stopped: threading.Event) -> Iterator[None]:
        lock = FileLock(self.root / "lock")
        try:
            while not lock.alone():
                if stopped.wait(_POLL_S / 5):
                    raise StoppedError
            yield
        finally:
            lock.release()

    def claim(self, path: Path, size: int, stopped: threading.Event, beyond: bool = False) -> Path | None:
        """Makes room for a shard, the least recently used going first; the file that claims it, to be removed later.

        None: what could go is held by readers. beyond: claim even so.
        """
        claim = path.with_name(f"{path.name}.{size}.claim")
        claim.unlink(missing_ok=True)  # a dead process's
        if self.limit is not None:
            with self._guarded(stopped):
                if not self._make_room(size) and not beyond:
                    return None
                claim.touch()
        else:
            claim.touch()
        return claim

    def _make_room(self, size: int) -> bool:
        assert self.limit is not None
        claims = self._claims()  # before the shards: one that arrives meanwhile must not be missed
        shards = [item for item in self._shards() if item[2] not in claims]
        used = sum(bytes_ for bytes_, _, _ in shards) + sum(claims.values())
        for bytes_, _, path in sorted(shards, key=lambda item: item[1]):
            if used + size <= self.limit:
                break
            if _removed(path):
                used -= bytes_
        return used + size <= self.limit

    def _shards(self) -> list[tuple[int, float, Path]]:
        """(bytes, time of last use, path) of every complete shard."""
        found = []
        for path in self.root.glob("*/*.tfrecord"):
            with contextlib.suppress(FileNotFoundError):
                about = path.lstat()
                found.append((about.st_size, about.st_mtime, path))
        return found

    def _claims(self) -> dict[Path, int]:
        """Bytes claimed by shards on their way; what a dead process left of one is removed."""
        claims = {}
        for claim in self.root.glob("*/*.claim"):
            name, bytes_, _ = claim.name.rsplit(".", 2)
            shard = claim.with_name(name)
            lock = FileLock(lock_path(shard))
            try:
                if lock.alone():
                    part_path(shard).unlink(missing_ok=True)
                    claim.unlink(missing_ok=True)
                else:
                    claims[shard] = int(bytes_)
            finally:
                lock.release()
        return claims


def lock_path(path: Path) -> Path:
    return path.parent / "locks" / path.name


def part_path(path: Path) -> Path:
    """A file's name while it is on its way."""
    return path.with_name(f"{path.name}.part")


def _removed(path: Path) -> bool:
    """Removes a shard unless a process holds it."""
    lock = FileLock(lock_path(path))
    try:
        if not lock.alone():
            return False
        path.unlink(missing_ok=True)
        return True
    finally:
        lock.release()


class Copy:
    """A remote dataset's folder in the cache. Its files come when they are asked for, each by one process only."""

    def __init__(self, store: Store, folder: Path, cache: Cache):
        self.store, self.folder, self.cache = store, folder, cache

    def is_here(self, wanted: Wanted) -> bool:
        """Whether the file is complete: a plain file under its own name, of the right size, or hash if it is small."""
        path = self.folder / wanted.name
        if path.is_symlink() or not path.is_file():
            return False
        if wanted.size is None:
            return hashlib.sha256(path.read_bytes()).hexdigest() == wanted.sha256
        return path.stat().st_size == wanted.size

    def take(
        self,
        wanted: Wanted,
        *,
        progress: Progress = lambda: None,
        stopped: threading.Event = NEVER,
        beyond: bool = False,
    ) -> "FileLock | Obstacle":
        """The file's lock, which keeps it from being removed, once it is here; it is fetched if nobody else does.

        beyond: whether to fetch it even over the cache's limit. Raises TransferError, and StoppedError if ``stopped``
        is set meanwhile.
        """
        path = self.folder / wanted.name
        while True:
            with contextlib.ExitStack() as stack:
                lock = FileLock(lock_path(path))
                stack.callback(lock.release)
                if not lock.together():
                    return Obstacle.ELSEWHERE
                if self.is_here(wanted):
                    os.utime(path)
                    stack.pop_all()
                    return lock
                if not lock.alone():
                    return Obstacle.ELSEWHERE
                if not self.is_here(wanted) and not self._bring(wanted, progress, stopped, beyond):
                    return Obstacle.NO_ROOM
                # Between the two ways of holding a lock there is a gap, in which it could be removed.
                if lock.together() and self.is_here(wanted):
                    stack.pop_all()
                    return lock

    def renew(self, wanted: Wanted, seen: os.stat_result, stopped: threading.Event = NEVER) -> bool:
        """Puts a new copy of a file in the place of ``seen``, which is damaged; False where that had been done.

        Readers may hold the file meanwhile: it is replaced at once, and what they have open stays as it is. Raises
        TransferError, and StoppedError if ``stopped`` is set meanwhile.
        """
        path = self.folder / wanted.name
        lock = FileLock(lock_path(path.with_name(f"{path.name}.renewed")))  # of those who renew it, one at a time
        try:
            while not lock.alone():
                if stopped.wait(_POLL_S / 5):
                    raise StoppedError
            if path.exists() and not os.path.samestat(path.stat(), seen):
                return False
            part = path.with_name(f"{path.name}.renewed.part")
            try:
                self.store.fetch(wanted.name, part, size=wanted.size, sha256=wanted.sha256, stopped=stopped)
                publish(part, path)
            finally:
                part.unlink(missing_ok=True)
            return True
        finally:
            lock.release()

    def fetch(self, wanted: Wanted, timeout_s: float, stopped: threading.Event = NEVER) -> None:
        """Waits until a small file is here. Raises as ``take``, and ReadTimeoutError if another process fetches it and
        gets no further for ``timeout_s``."""
        begin, size = time.monotonic(), -1
        while isinstance(lock := self.take(wanted, stopped=stopped), Obstacle):
            if (now := self.arrived(wanted)) != size:
                begin, size = time.monotonic(), now
            if time.monotonic() - begin > timeout_s:
                raise ReadTimeoutError(
                    f"{self.store.label(wanted.name)}: another process on this machine has been fetching it to "
                    f"{self.folder} for {timeout_s:g} s (data.read_timeout_s): end that process, then start again"
                )
            if stopped.wait(_POLL_S * random.uniform(0.5, 1.5)):
                raise StoppedError
        lock.release()

    def arrived(self, wanted: Wanted) -> int:
        """Bytes of a file on its way that are here, whoever fetches it; -1 if there are none."""
        try:
            return part_path(self.folder / wanted.name).stat().st_size
        except FileNotFoundError:
            return -1

    def _bring(self, wanted: Wanted, progress: Progress, stopped: threading.Event, beyond: bool) -> bool:
        """Fetches a file; False if there is no room for it. Its lock must be held."""
        path = self.folder / wanted.name
        part, claim = part_path(path), None
        if wanted.size is not None:
            claim = self.cache.claim(path, wanted.size, stopped, beyond)
            if claim is None:
                return False
            progress()
        check: dict[str, Any] = {"size": wanted.size, "sha256": wanted.sha256}
        try:
            self.store.fetch(wanted.name, part, **check, progress=progress, stopped=stopped)
            publish(part, path)
        finally:
            part.unlink(missing_ok=True)
            if claim is not None:
                claim.unlink(missing_ok=True)
        return True


def open_copy(source: RecordsSource, cache: Cache, timeout_s: float) -> Copy:
    """Fetches a dataset's manifest; the folder that its other files will come to. timeout_s: data.read_timeout_s."""
    store = Store(source, timeout_s)
    handle, name = tempfile.mkstemp(prefix=".manifest-", dir=cache.root)
    os.close(handle)
    temporary = Path(name)
    try:
        store.fetch(MANIFEST, temporary)
        key = hashlib.sha256(temporary.read_bytes()).hexdigest()[:16]
        title = re.sub(r"[^A-Za-z0-9_-]+", "-", store.url.rpartition("/")[2])[:40]
        folder = cache.root / f"{title}-{key}"
        folder.mkdir(exist_ok=True)
        publish(temporary, folder / MANIFEST)
    finally:
        temporary.unlink(missing_ok=True)
    return Copy(store, folder, cache)


def publish(part: Path, path: Path) -> None:
    """Gives a checked file its name, so that it lasts through a power loss."""
    try:
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise TransferError(f"{path}: cannot be written ({error}): check data.cache_dir") from error
