"""The disk that a run writes to: whether it takes files, locks and how fast."""

import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

from geokr.checks.finding import Finding, failure, ok, warning

_TRIAL_BYTES = 64 << 20
_PIECE = 4 << 20
_SLOW = 50e6  # bytes a second: a checkpoint of ResNet-50 (400 MB) then takes 8 s
_LOW = 5e9  # bytes: some ten checkpoints of a ResNet-50


def nearest_folder(path: Path) -> Path:
    """The folder itself, or the first above it that exists."""
    path = path.absolute()
    while not path.is_dir():
        path = path.parent
    return path


def measure(folder: Path, size: int = _TRIAL_BYTES) -> tuple[float, float]:
    """(write, read) in bytes a second, of a file that goes to the disk and is not read back from memory.

    Reading is only as cold as the system's advice to drop the file from memory makes it: network storage may still
    answer from a cache of its own. Raises OSError.
    """
    piece = os.urandom(_PIECE)
    handle, name = tempfile.mkstemp(prefix=".geokr-doctor-", dir=folder)
    try:
        begin = time.perf_counter()
        for _ in range(size // _PIECE):
            os.write(handle, piece)
        os.fsync(handle)
        written = time.perf_counter() - begin
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        begin = time.perf_counter()
        os.lseek(handle, 0, os.SEEK_SET)
        while os.read(handle, _PIECE):
            pass
        return size / written, size / (time.perf_counter() - begin)
    finally:
        os.close(handle)
        os.unlink(name)


def _has_locks(folder: Path) -> bool:
    with tempfile.NamedTemporaryFile(prefix=".geokr-doctor-", dir=folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


def check_disk(path: Path) -> list[Finding]:
    """The disk of ``run.dir``."""
    folder, name = nearest_folder(path), f"disk of {path}"
    try:
        write, read = measure(folder)
        locks = _has_locks(folder)
    except OSError as error:
        remedy = f"Give another run.dir, or make room and access: df -h {folder}; ls -ld {folder}."
        return [failure(name, f"cannot be written ({error.strerror})", "No checkpoint could be saved.", remedy)]
    free = shutil.disk_usage(folder).free
    found = f"write {write / 1e6:,.0f} MB/s, read {read / 1e6:,.0f} MB/s, {free / 1e9:,.0f} GB free"
    problems = []
    if free < _LOW:
        problems.append(
            warning(name, found, "Ten checkpoints of a ResNet-50 may not fit.", "Make room, or give another run.dir.")
        )
    if write < _SLOW:
        problems.append(
            warning(
                name,
                found,
                "Checkpoints are written in the background, but a stop before a deadline waits for one.",
                "Give a run.dir on faster storage, or a longer notice before the end of the job.",
            )
        )
    if not locks:
        problems.append(
            warning(
                name,
                f"{found}, no file locks",
                "Two runs that share a run.dir would not notice each other.",
                "Give each run a run.dir of its own.",
            )
        )
    return problems or [ok(name, found)]
