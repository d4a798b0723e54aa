"""Small packing jobs for the fault tests, and what they are compared by."""

import json
import random
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

from geokr import manifests, records
from geokr.records import RecordError
from tests.faults.conftest import Tally
from tests.faults.zygote import Child, Zygote
from tests.scenes import NO_QUALITY, noise, patches, write_raster

KEYS = (
    *NO_QUALITY, "tile.size=32", "tile.step=24", "tile.bands=[1,2,3]", "tile.codec=raw", "shards.records=32",
    "split.val_fraction=0.3", "split.block_m=2000", "seed=5",
)  # fmt: skip
PLACES = {"a": (4e5, 5.2e6), "b": (402000, 5.197e6), "c": (400600, 5.1996e6)}


@dataclass
class Job:
    """A command, the folder it begins with, and the files an undisturbed run of it leaves."""

    zygote: Zygote
    name: str
    arguments: list[str]
    start: Path | None = None
    expected: dict[str, bytes] = field(default_factory=dict)
    seconds: float = 0.0
    changes: int = 0

    def run(self, out: Path, inject: str = "", *more: str) -> Child:
        arguments = [*self.arguments, "--out", str(out), *(more or ("workers=0",))]
        return self.zygote.start("tests.faults.pack_injections:pack", arguments, inject)

    def fresh(self, out: Path) -> Path:
        """The folder as it is before the command."""
        if self.start is not None:
            shutil.copytree(self.start, out)
        return out

    def measure(self, out: Path) -> None:
        """The undisturbed run: its files, how long it takes, how many changes it makes to the disk."""
        count = out.with_suffix(".count")
        assert (child := self.run(self.fresh(out), f"die_before:0{count}")).wait() == 0, child.said()
        self.expected, self.changes = files(out), int(count.read_text())
        times = []
        for number in range(3):  # the first was slow: files were not cached
            again, begin = self.fresh(out.with_name(f"{out.name}-{number}")), time.monotonic()
            assert (child := self.run(again)).wait() == 0, child.said()
            times.append(time.monotonic() - begin)
            assert files(again) == self.expected
        self.seconds = min(times)

    def sound(self, out: Path) -> bool:
        """Whether what lies there is sound: nothing but files of the finished dataset beside .work; and a dataset that
        was there is there still, unless the new one is."""
        there = {name: data for name, data in files(out).items() if not name.startswith(manifests.WORK)}
        manifest = there.pop(manifests.MANIFEST, None)
        if not there.items() <= self.expected.items():
            return False
        before = None if self.start is None else (self.start / manifests.MANIFEST).read_bytes()
        return manifest in (before, self.expected[manifests.MANIFEST]) and (manifest is None or opens(out))

    def finish(self, out: Path, tally: Tally) -> None:
        """The same command again, which must leave what an undisturbed run does. Takes the folder away."""
        begin = time.monotonic()
        child = self.run(out)
        assert child.wait() == 0, child.said()
        tally.recovery_s.append(time.monotonic() - begin)
        tally.resumed(files(out) == self.expected)
        shutil.rmtree(out)


def files(folder: Path) -> dict[str, bytes]:
    """All files by their path in the folder; empty where there is none."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def opens(folder: Path) -> bool:
    try:
        manifests.check_folder(folder, manifest := manifests.load_manifest(folder))
        for split in records.SPLITS:
            for shard in manifest.split(split).shards:
                manifests.open_index(folder, shard)
    except RecordError:
        return False
    return True


def make_jobs(zygote: Zygote, folder: Path) -> dict[str, Job]:
    """``new``: two scenes over one map; ``append``: a third added to them."""
    scenes = {
        name: write_raster(folder / f"{name}.tif", noise(i, (3, 130, 170), "uint16", 1, 60000), (30, 0, x, 0, -30, y))
        for i, (name, (x, y)) in enumerate(PLACES.items())
    }
    cover = patches(3, 300, 400, [10, 20, 30, 50, 80], 5)
    write_raster(folder / "cover.tif", cover, (30, 0, 399000, 0, -30, 5201000))
    rest = ["--land-cover", str(folder / "cover.tif"), "--product", "worldcover", *KEYS]
    two, three = ([str(scenes[name]) for name in names] for names in ("ab", "abc"))
    new = Job(zygote, "new", ["--scenes", *two, *rest])
    new.measure(folder / "new")
    append = Job(zygote, "append", ["--scenes", *three, *rest, "--append"], start=folder / "new")
    append.measure(folder / "append")
    assert json.loads(append.expected[manifests.MANIFEST])["version"] == 2
    return {"new": new, "append": append}


def seeded(name: str) -> random.Random:
    return random.Random(f"packing {name}")
