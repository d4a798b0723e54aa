"""Files behind a URL, through fsspec: one transfer at a time, checked, with bounded retries.

A transfer that stands still is given up and tried again, and it can be stopped from another thread: fsspec's
asynchronous file systems (S3, Google, Azure, HTTP) run in its own event loop, where a coroutine can be cancelled.
"""

import asyncio
import concurrent.futures
import errno
import hashlib
import logging
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from geokr.manifests import MANIFEST, Manifest, load_manifest
from geokr.options import RecordsSource
from geokr.records import RecordError
from pipelines.errors import PipelineError, TransferError
from pipelines.threads import StoppedError

log = logging.getLogger("geokr")

# Six attempts with waits of about 0.5, 1, 2, 4 and 8 s: a blip of storage is sat out, a dead one known in 30 s.
ATTEMPTS = 6
FIRST_WAIT_S = 0.5
# A transfer without a byte for this long is begun anew, on another connection.
STALL_S = 30.0
_POLL_S = 0.1
# What a second attempt cannot mend: where the files should come from, and the disk they go to.
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, NotImplementedError)
_FINAL_NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_FINAL_NAMES = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "InvalidURL")
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}

Progress = Callable[[], None]
NEVER = threading.Event()


class Store:
    """The files of a folder behind a URL. timeout_s: data.read_timeout_s; a transfer that stands still is begun anew
    well before that."""

    def __init__(self, source: RecordsSource, timeout_s: float = 4 * STALL_S):
        self.url, self._stall_s = source.shown, min(STALL_S, timeout_s / 4)
        self._protocol, self._files, self._root, self._query = _connect(source)

    def label(self, name: str) -> str:
        """A file's URL for messages, without what may be secret."""
        return f"{self.url}/{name}"

    def fetch(
        self,
        name: str,
        target: Path,
        *,
        size: int | None = None,
        sha256: str | None = None,
        progress: Progress = lambda: None,
        stopped: threading.Event = NEVER,
        attempts: int = ATTEMPTS,
    ) -> None:
        """Writes a file to ``target`` on this machine and checks it; what was there is replaced.

        progress: called whenever more bytes have come than in any attempt before. Raises TransferError after some
        attempts, or at once where another one cannot help; StoppedError if ``stopped`` is set meanwhile.
        """
        watch = _Watch(progress)
        for attempt in range(1, attempts + 1):
            try:
                target.unlink(missing_ok=True)  # a transfer that was given up may still write to its own file
                self._transfer(name, target, watch, stopped)
                return _check(target, size, sha256)
            except StoppedError:
                raise
            except Exception as error:
                if attempt == attempts or _is_final(error):
                    raise self._explained(name, error, attempt) from error
                wait_s = FIRST_WAIT_S * 2 ** (attempt - 1) * random.uniform(0.7, 1.3)
                log.info("%s: %s; trying again in %.1f s", self.label(name), _said(error), wait_s)
            if stopped.wait(wait_s):
                raise StoppedError

    def _transfer(self, name: str, target: Path, watch: "_Watch", stopped: threading.Event) -> None:
        from fsspec.callbacks import Callback

        path = f"{self._root}/{name}{self._query}"
        watch.begin()
        callback = Callback(hooks={"moved": watch.moved})
        if not getattr(self._files, "async_impl", False):
            self._files.get_file(path, str(target), callback=callback)
            return
        coroutine = self._files._get_file(path, str(target), callback=callback, **_arguments(self._protocol))
        future = asyncio.run_coroutine_threadsafe(coroutine, self._files.loop)
        try:
            while not concurrent.futures.wait([future], _POLL_S).done:
                if stopped.is_set():
                    raise StoppedError
                if watch.idle_s() > self._stall_s:
                    raise TimeoutError(f"not a byte for {self._stall_s:g} s")
        finally:
            future.cancel()
        future.result()

    def _explained(self, name: str, error: Exception, attempts: int) -> TransferError:
        tried = f" ({attempts} attempts)" if attempts > 1 else ""
        return TransferError(f"{self.label(name)}: {_said(error)}{tried}: {_remedy(error)}")


class _Watch:
    """When bytes last came; ``progress`` hears of those that no attempt before has brought."""

    def __init__(self, progress: Progress):
        self._progress, self._most = progress, 0
        self.begin()

    def begin(self) -> None:
        """Another attempt."""
        self._last, self._value = time.monotonic(), 0

    def moved(self, size: int | None, value: int, **_: Any) -> None:
        if value > self._value:
            self._last, self._value = time.monotonic(), value
        if value > self._most:
            self._most = value
            self._progress()

    def idle_s(self) -> float:
        return time.monotonic() - self._last


class _MismatchError(OSError):
    """A file that came whole, as far as the transfer knows, and is not the one that the manifest means."""


def _connect(source: RecordsSource) -> tuple[str, Any, str, str]:
    """(protocol, fsspec file system, the folder's path in it, query of an HTTP URL)."""
    protocol = source.path.partition("://")[0]
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise PipelineError(
            f"data.records={source.shown}: a URL needs the package fsspec: pip install fsspec"
        ) from error
    path, mark, query = source.path.partition("?") if protocol in ("http", "https") else (source.path, "", "")
    try:
        files, root = url_to_fs(path.rstrip("/"))
    except ImportError as error:
        package = _PACKAGES.get(protocol, "the package that fsspec names")
        raise PipelineError(
            f"data.records={source.shown}: {protocol}:// needs {package}: pip install {package}, or install geokr with "
            f"its extra `remote` ({error})"
        ) from error
    except ValueError as error:
        raise PipelineError(
            f"data.records={source.shown}: {error}; expected a folder, s3://, gs:// or https://"
        ) from error
    return protocol, files, root, mark + query


def _arguments(protocol: str) -> dict[str, Any]:
    """What a file system's transfer is told beyond its defaults."""
    if protocol in ("http", "https"):
        from aiohttp import ClientTimeout

        return {"timeout": ClientTimeout(total=None, sock_connect=30)}  # the default ends a transfer after 5 minutes
    if protocol in ("s3", "s3a"):
        return {"max_concurrency": 1}  # more report nothing until 500 MB have come; shards come side by side anyway
    return {}


def _check(path: Path, size: int | None, sha256: str | None) -> None:
    found = path.stat().st_size
    if size is not None and found != size:
        raise _MismatchError(f"{found} bytes came, the manifest says {size}")
    if sha256 is None:
        return
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            raise _MismatchError("the bytes that came are not those that the manifest lists (SHA-256)")


def _status(error: BaseException) -> int | None:
    """An HTTP status that an error carries: aiohttp's `status`, gcsfs's `code`."""
    for name in ("status", "code"):
        value = getattr(error, name, None)
        if isinstance(value, int) or (isinstance(value, str) and value.isdigit()):
            return int(value)
    return None


def _is_final(error: Exception) -> bool:
    status = _status(error)
    if status is not None and 400 <= status < 500:
        return status not in (408, 425, 429)
    if isinstance(error, _FINAL) or type(error).__name__ in _FINAL_NAMES:
        return True
    return isinstance(error, OSError) and error.errno in _FINAL_NUMBERS


def _said(error: BaseException) -> str:
    """The error in a line; some have no text."""
    status = _status(error)
    if status is not None:
        return f"HTTP status {status}"
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    text = " ".join(str(error).split())
    return text if isinstance(error, _MismatchError | TimeoutError) and text else f"{type(error).__name__}: {text}"


def _remedy(error: BaseException) -> str:
    status = _status(error)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return "data.records must be the URL of the folder that holds manifest.json, with all its shards"
    if isinstance(error, PermissionError) or status in (401, 403) or type(error).__name__ in _FINAL_NAMES:
        return "check the credentials for this storage (docs/data.md says where they are looked for)"
    if isinstance(error, OSError) and error.errno in _FINAL_NUMBERS:
        return "make room, set data.cache_gb, or give another data.cache_dir"
    if isinstance(error, _MismatchError):
        return "upload the folder again as it was packed"
    return "check the storage and the way there, then give the command again"


def fetch_manifest(source: RecordsSource) -> Manifest:
    """The manifest of a dataset behind a URL, without a copy of it in the cache. Raises as Store.fetch; RecordError."""
    with tempfile.TemporaryDirectory() as folder:
        Store(source).fetch(MANIFEST, Path(folder) / MANIFEST, attempts=3)
        try:
            return load_manifest(folder)
        except RecordError as error:
            raise RecordError(f"{source.shown}: {error}") from error


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder last through a power loss."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
