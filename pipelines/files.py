"""Open files of a dataset, shared by reader threads."""

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

# A link in place of a shard was refused on opening the dataset; it is refused here too if it comes later.
_FLAGS = os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0)


class OpenFiles:
    """Open files, the least recently used closed beyond a limit; one in use is never closed."""

    def __init__(self, limit: int):
        self._limit = limit
        self._lock = threading.Lock()
        self._open: OrderedDict[str, list[int]] = OrderedDict()  # path: [descriptor, users]
        self._forgotten: dict[int, list[int]] = {}  # descriptor: the same of a file that was forgotten while in use
        self._finalizer = weakref.finalize(self, _close_unused, self._open)

    @contextmanager
    def use(self, path: str) -> Iterator[int]:
        """The file's descriptor, open as long as the block lasts. Raises OSError."""
        handle = self.acquire(path)
        try:
            yield handle
        finally:
            self.release(path, handle)

    def acquire(self, path: str) -> int:
        """The file's descriptor, which stays open until ``release``. Raises OSError."""
        return self._entry(path)[0]

    def release(self, path: str, handle: int) -> None:
        with self._lock:
            entry = self._forgotten.get(handle) or self._open[path]
            entry[1] -= 1
            if handle in self._forgotten and entry[1] == 0:
                os.close(handle)
                del self._forgotten[handle]

    def _entry(self, path: str) -> list[int]:
        with self._lock:
            entry = self._open.get(path)
            if entry is not None:
                entry[1] += 1
                self._open.move_to_end(path)
                return entry
        handle = os.open(path, _FLAGS)  # outside the lock: it may hang
        with self._lock:
            if path in self._open:  # another thread was first
                os.close(handle)
            else:
                self._open[path] = [handle, 0]
            entry = self._open[path]
            entry[1] += 1
            self._evict()
            return entry

    def _evict(self) -> None:
        for path in [path for path, (_, users) in self._open.items() if users == 0]:
            if len(self._open) <= self._limit:
                return
            os.close(self._open.pop(path)[0])

    def forget(self, path: str) -> None:
        """The file's name stands for another from now on, or for none; who uses it keeps it until ``release``."""
        with self._lock:
            entry = self._open.pop(path, None)
            if entry is None:
                return
            if entry[1] == 0:
                os.close(entry[0])
            else:
                self._forgotten[entry[0]] = entry

    def close(self) -> None:
        """Closes what nobody uses; a file whose read hangs stays open with it."""
        with self._lock:
            self._finalizer()


def _close_unused(files: OrderedDict[str, list[int]]) -> None:
    for path in [path for path, (_, users) in files.items() if users == 0]:
        os.close(files.pop(path)[0])
