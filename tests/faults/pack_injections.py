"""What is done to a packing process before it starts: called in the forked process, never in the test's own."""

import errno
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from preprocess import pack_records, shards
from tests.scenes import NO_QUALITY, noise, pack_quietly, patches, write_raster

# Calls that change files, as Python's auditing names them; fsync is added below.
AUDITED = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}


class NothingToLookAt:
    """In place of tiles.parquet and report.html: they take most of a small run's time and are no part of a dataset."""

    warnings: Sequence[str] = ()

    def __init__(self, *_: object) -> None: ...
    def with_work(self, *_: object) -> None: ...
    def afterwards(self, *_: object) -> None: ...


def warm() -> None:
    """In the server: kernels are loaded and GDAL has read something."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scene = write_raster(folder / "s.tif", noise(1, (3, 64, 64), "uint16", 1, 4000), (30, 0, 4e5, 0, -30, 5.2e6))
        cover = write_raster(folder / "c.tif", patches(3, 90, 90, [10, 20], 5), (30, 0, 399900, 0, -30, 5200100))
        keys = (*NO_QUALITY, "tile.size=32", "split.val_fraction=0", "workers=0")
        for codec in ("raw", "jpeg"):
            pack_quietly([scene], [cover], "worldcover", folder / codec, *keys, f"tile.codec={codec}")


def pack(arguments: Sequence[str], inject: str = "") -> int:
    """The command. inject: ``name:value,...`` of what is done first."""
    pack_records.Finishing = NothingToLookAt  # type: ignore[assignment,misc]
    for item in filter(None, inject.split(",")):
        name, _, value = item.partition(":")
        INJECTIONS[name](value)
    return pack_records.main(arguments)


def die_before(at: str) -> None:
    """NUMBER/FILE: SIGKILL just before the n-th change to the disk (0: never); FILE then holds how many there were."""
    number, file = at.split("/", 1)
    count = 0

    def change() -> None:
        nonlocal count
        count += 1
        if count == int(number):
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, arguments: tuple) -> None:
        if event in AUDITED and (event != "open" or _writes(arguments)):
            change()

    fsync, main = os.fsync, pack_records.main

    def counted_fsync(handle: int) -> None:
        change()
        fsync(handle)

    def counted_main(arguments: Sequence[str]) -> int:
        status = main(arguments)
        Path(f"/{file}").write_text(str(count))
        return status

    os.fsync, pack_records.main = counted_fsync, counted_main
    sys.addaudithook(audit)


def _writes(arguments: tuple) -> bool:
    return bool(arguments[2] & (os.O_WRONLY | os.O_RDWR)) if isinstance(arguments[2], int) else False


class FullDisk:
    """A file on a disk with ``room`` bytes left for all files together."""

    room = 0

    def __init__(self, file) -> None:
        self.file = file

    def write(self, data) -> int:
        if len(data) > FullDisk.room:
            self.file.write(data[: FullDisk.room])  # what still fits is written, as a disk does
            FullDisk.room = 0
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        FullDisk.room -= len(data)
        return self.file.write(data)

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str):
        return getattr(self.file, name)


def full_disk(room: str) -> None:
    FullDisk.room = int(room)
    shards.open = lambda *arguments: FullDisk(open(*arguments))  # type: ignore[attr-defined]  # noqa: SIM115


def largest_file(size: str) -> None:
    """No file may grow beyond that: a quota of the system's own."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), int(size)))


INJECTIONS: dict[str, Callable[[str], None]] = {
    "die_before": die_before,
    "full_disk": full_disk,
    "largest_file": largest_file,
}
