"""Open files of a dataset, shared by reader threads."""

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

# A link in place of a shard was refused on opening the dataset; it is refused here too if it comes later.
_FLAGS = os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0)


@contextmanager
def opened(path: str) -> Iterator[int]:
    """A descriptor of the file that has this name now, whatever file of that name is open already. Raises OSError."""
    handle = os.open(path, _FLAGS)
    try:
        yield handle
    finally:
        os.close(handle)


class OpenFiles:
    """Open files, the least recently used closed beyond a limit; one in use is never closed."""

    def __init__(self, limit: int):
        self._limit = limit
        self._lock = threading.Lock()
        self._open: OrderedDict[str, list[int]] = OrderedDict()  # path: [descriptor, users]
        self._finalizer = weakref.finalize(self, _close_unused, self._open)

    @contextmanager
    def use(self, path: str) -> Iterator[int]:
        """The file's descriptor, open as long as the block lasts. Raises OSError."""
        handle = self.acquire(path)
        try:
            yield handle
        finally:
            self.release(path)

    def acquire(self, path: str) -> int:
        """The file's descriptor, which stays open until ``release``. Raises OSError."""
        return self._entry(path)[0]

    def release(self, path: str) -> None:
        with self._lock:
            self._open[path][1] -= 1

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
        """Closes a file that is not needed any more, unless it is in use."""
        with self._lock:
            entry = self._open.get(path)
            if entry is not None and entry[1] == 0:
                os.close(self._open.pop(path)[0])

    def close(self) -> None:
        """Closes what nobody uses; a file whose read hangs stays open with it."""
        with self._lock:
            self._finalizer()


def _close_unused(files: OrderedDict[str, list[int]]) -> None:
    for path in [path for path, (_, users) in files.items() if users == 0]:
        os.close(files.pop(path)[0])
