"""Disks that are full, closed or lose power (rows 6 to 8)."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from geokr import manifests
from preprocess import shards
from tests.faults.packing import files, make_jobs
from tests.scenes import pack_quietly


@pytest.fixture(scope="module")
def jobs(packers, tmp_path_factory):
    return make_jobs(packers, tmp_path_factory.mktemp("jobs"))


def full(job, out, inject, packing):
    child = job.run(out, inject)
    assert child.wait() == 1, child.said()
    said = child.said()
    assert any(words in said for words in ("No space left on device", "File too large")), said
    assert str(out) in said
    assert "Traceback" not in said
    packing.inject(6, f"a full disk ({job.name}, {inject.partition(':')[0] or 'tmpfs'})")
    packing.right(job.sound(out), "what a full disk left is not sound")


def sizes(job, count):
    """Spill and shards together take twice the records' bytes; the last size lacks a little."""
    total = 2 * sum(len(data) for name, data in job.expected.items() if name not in files_before(job))
    return [int(total * number / count) for number in range(count)]


def files_before(job):
    return files(job.start) if job.start else {}


@pytest.mark.parametrize("name", ["new", "append"])
def test_full_at_twenty_sizes(jobs, tmp_path, packing, name):
    for number, room in enumerate(sizes(jobs[name], 20)):
        out = jobs[name].fresh(tmp_path / f"out{number}")
        full(jobs[name], out, f"full_disk:{room}", packing)
        jobs[name].finish(out, packing)


def test_a_limit_of_the_systems_own(jobs, tmp_path, packing):
    largest = max(map(len, jobs["new"].expected.values()))
    for number, size in enumerate((4096, largest // 2, largest - 1)):
        full(jobs["new"], tmp_path / f"out{number}", f"largest_file:{size}", packing)
        jobs["new"].finish(tmp_path / f"out{number}", packing)


@pytest.mark.slow
def test_a_small_disk_of_its_own(jobs, tmp_path, packing):
    """A tmpfs of twenty sizes, made larger afterwards."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("needs root that may mount")
    try:
        job, out = jobs["new"], place / "out"
        for room in sizes(job, 20):
            subprocess.run(["mount", "-o", f"remount,size={max(8192, room)}", place], check=True)
            full(job, out, "", packing)
            subprocess.run(["mount", "-o", "remount,size=64m", place], check=True)
            job.finish(out, packing)
    finally:
        subprocess.run(["umount", place], check=True)


def test_a_folder_that_cannot_be_written(jobs, tmp_path, packing, monkeypatch, capsys):
    """Said before any input is opened."""
    from preprocess import pack_records, plan

    monkeypatch.setattr(plan, "make_plan", lambda *a: pytest.fail("planned before --out was looked at"))
    monkeypatch.setattr(pack_records, "plan_of", lambda *a: pytest.fail("planned before --out was looked at"))
    (tmp_path / "file").write_text("")
    for out in (Path("/proc/geokr/out"), tmp_path / "file", tmp_path / "file/out"):
        with monkeypatch.context() as patch:
            if out.parts[1] == "proc":  # root may write everywhere else
                patch.setattr(os, "access", lambda *a: False)
            assert pack_records.main([*jobs["new"].arguments, "--out", str(out)]) == 1
        packing.inject(7, "an output folder that cannot be written")
        assert "choose another folder" in capsys.readouterr().err


class Recorder:
    """The order in which files are written, flushed and renamed."""

    def __init__(self, monkeypatch) -> None:
        self.flushed: set[int] = set()  # inodes
        self.faults: list[str] = []
        self.unsafe: set[Path] = set()  # folders with renames that a power failure could undo
        self.renames = 0
        real_fsync, real_replace = os.fsync, os.replace

        def fsync(handle):
            real_fsync(handle)
            self.flushed.add(os.fstat(handle).st_ino)
            self.unsafe.discard(Path(os.readlink(f"/proc/self/fd/{handle}")))

        def replace(source, target):
            source, target = Path(source), Path(target)
            if source.stat().st_ino not in self.flushed:
                self.faults.append(f"{target} was renamed before its bytes were on the disk")
            if self.unsafe - {target.parent}:
                self.faults.append(f"{target} was renamed while {self.unsafe} were not on the disk")
            real_replace(source, target)
            self.renames += 1
            self.unsafe.add(target.parent)

        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(os, "replace", replace)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks up open files in /proc")
@pytest.mark.parametrize("name", ["new", "append"])
def test_power_loss(jobs, tmp_path, packing, monkeypatch, name):
    """What a commit stands for is on the disk before the commit is: every file before its rename, every folder before
    the next rename elsewhere, and everything before the command ends."""
    job = jobs[name]
    out = job.fresh(tmp_path / "out").resolve()
    at = job.arguments
    scenes = at[at.index("--scenes") + 1 : at.index("--land-cover")]
    cover, keys = at[at.index("--land-cover") + 1], [item for item in at if "=" in item]
    recorder = Recorder(monkeypatch)
    pack_quietly(scenes, [cover], "worldcover", out, *keys, "workers=0", append=name == "append")
    monkeypatch.undo()
    packing.inject(8, "the order of flushes and renames looked at", recorder.renames)
    packing.right(not recorder.faults, "\n".join(recorder.faults))
    packing.right(not recorder.unsafe, f"{recorder.unsafe} were not flushed at the end")
    assert recorder.renames > 8
    assert files(out) == job.expected


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks up open files in /proc")
def test_the_recorder_notices_what_is_missing(tmp_path, monkeypatch):
    recorder = Recorder(monkeypatch)
    (tmp_path / "x").write_bytes(b"1")
    os.replace(tmp_path / "x", tmp_path / "y")
    assert recorder.faults
    monkeypatch.setattr(shards, "sync_folder", lambda folder: None)
    shards.write_whole(tmp_path / manifests.MANIFEST, b"{}")
    assert recorder.unsafe
    shutil.rmtree(tmp_path)
