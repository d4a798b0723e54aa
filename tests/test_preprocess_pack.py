"""Packing as a whole: the same bytes whatever happens, right pixels, right statistics."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import rasterio
import simplejpeg

from geokr import config, manifests, records
from preprocess import blocks, gather, grid, phases, raster, sampling, shards, spill, tile_facts, workfolder
from preprocess.grid import Grid
from preprocess.inputs import PlanError
from preprocess.options import PackOptions
from preprocess.workfolder import FutileError, PackError
from tests.scenes import (
    NO_QUALITY,
    RAW,
    UTM31,
    command,
    contents,
    noise,
    pack_quietly,
    patches,
    pixels_of,
    read_records,
    scene_at,
    write_raster,
)

ROOT = Path(__file__).parents[1]
PACK = ROOT / "preprocess/pack_records.py"
KEYS = (
    *NO_QUALITY, "tile.size=32", "tile.step=24", "tile.bands=[1,2,3]", "tile.codec=raw", "shards.records=16",
    "split.val_fraction=0.3", "split.block_m=2000", "seed=5",
)  # fmt: skip


class Inputs:
    """Two scenes over one map, and what packing them undisturbed gives."""

    def __init__(self, folder: Path) -> None:
        self.scenes = [
            write_raster(folder / "a.tif", noise(1, (4, 170, 200), "uint16", 1, 4000), (30, 0, 4e5, 0, -30, 5.2e6)),
            write_raster(
                folder / "b.tif", noise(2, (4, 120, 150), "uint16", 1, 4000), (30, 0, 402000, 0, -30, 5.197e6)
            ),
        ]
        self.cover = write_raster(
            folder / "cover.tif", patches(3, 300, 300, [10, 20, 30, 50, 80], 5), (30, 0, 399000, 0, -30, 5201000)
        )
        self.folder = folder
        self.packed = self.pack(folder / "undisturbed")
        self.bytes = contents(folder / "undisturbed")

    def pack(self, out: Path, *more: str, workers: int = 0):
        return pack_quietly(self.scenes, [self.cover], "worldcover", out, *KEYS, f"workers={workers}", *more)

    def arguments(self, out: Path, *more: str) -> list[str]:
        """The same as a command line."""
        return [
            sys.executable, str(PACK), "--scenes", *map(str, self.scenes), "--land-cover", str(self.cover),
            "--product", "worldcover", "--out", str(out), *KEYS, *more,
        ]  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return Inputs(tmp_path_factory.mktemp("inputs"))


# ----------------------------------------------------------------------------------------------- the same bytes


def test_the_undisturbed_dataset_is_whole(inputs):
    manifest = inputs.packed.manifest
    assert len(manifest.train.shards) > 2
    assert len(manifest.val.shards) >= 1
    parts = (*manifest.train.shards, *manifest.val.shards)
    assert set(inputs.bytes) == {manifests.MANIFEST, *(s.name for s in parts), *(s.index_name for s in parts)}
    counts = manifest.counts
    assert counts["positions"] == 7 * 8 + 5 * 6
    assert counts["positions"] == counts["kept"] + sum(v for k, v in counts.items() if k.startswith("rejected_"))
    assert counts["rejected_straddles_split"] > 0
    assert (
        sum(scene.kept for scene in manifest.scenes) == counts["kept"] == manifest.train.records + manifest.val.records
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers(inputs, tmp_path, workers):
    inputs.pack(tmp_path / "out", workers=workers)
    assert contents(tmp_path / "out") == inputs.bytes


def test_nothing_of_the_place_or_the_machine_is_in_it(inputs, tmp_path):
    """Moved inputs, another folder, the order of the arguments."""
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    scenes = [moved / path.name for path in inputs.scenes]
    for old, new in zip([*inputs.scenes, inputs.cover], [*scenes, moved / "cover.tif"], strict=True):
        new.write_bytes(old.read_bytes())
    pack_quietly(scenes[::-1], [moved / "cover.tif"], "worldcover", tmp_path / "o/u/t", *KEYS, "workers=0")
    assert contents(tmp_path / "o/u/t") == inputs.bytes


def test_another_seed_is_another_order_and_another_split(inputs, tmp_path):
    inputs.pack(tmp_path / "out", "seed=8")
    both = [
        {r.tile_id: s for s, r in read_records(folder)} for folder in (inputs.folder / "undisturbed", tmp_path / "out")
    ]
    assert [*both[0]] != [*both[1]]
    assert any(both[0][tile] != both[1][tile] for tile in both[0].keys() & both[1].keys())


def test_the_order_is_the_hash_order_of_tile_ids(inputs):
    for split in records.SPLITS:
        ids = [r.tile_id for s, r in read_records(inputs.folder / "undisturbed") if s == split]
        assert ids == sorted(ids, key=lambda tile: spill.tile_hash(5, tile))


def stamps(folder):
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_ino) for p in [folder, *folder.rglob("*")]}


def test_the_same_command_again_writes_nothing(inputs, tmp_path):
    out = tmp_path / "out"
    assert inputs.pack(out).written
    before = stamps(out)
    again = inputs.pack(out)
    assert not again.written
    assert stamps(out) == before
    assert again.manifest == inputs.packed.manifest


def test_a_finished_dataset_that_lost_a_shard_is_not_called_finished(inputs, tmp_path):
    inputs.pack(tmp_path / "out")
    (tmp_path / "out/val-00000.tfrecord").unlink()
    with pytest.raises(records.RecordError, match=r"val-00000\.tfrecord: missing"):
        inputs.pack(tmp_path / "out")


# ---------------------------------------------------------------------------------------------- interruptions


class PowerCut(BaseException):
    """Nothing in the code under test catches it."""


@pytest.mark.parametrize("changed", [grid, tile_facts])
def test_chunks_of_another_version_are_not_gone_on_with(inputs, tmp_path, monkeypatch, changed):
    """A run of a version that cut scenes otherwise: its chunk of a number holds other tiles. Or wrote other facts."""

    def stop(*arguments):
        raise PowerCut

    monkeypatch.setattr(phases.Run, "gather_shards", stop)
    monkeypatch.setattr(grid, "MAX_CHUNK_TILES", 3)
    with pytest.raises(PowerCut):
        inputs.pack(tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr(changed, "LAYOUT", changed.LAYOUT + 1)
    inputs.pack(tmp_path / "out")
    assert contents(tmp_path / "out") == inputs.bytes


@pytest.mark.parametrize("moment", ["before", "after"])
def test_cut_short_at_every_commit(inputs, tmp_path, monkeypatch, moment):
    """The power goes at the n-th rename, for every n there is; the same command then gives the same bytes."""
    rename, left = os.replace, 0

    def replace(source, target):
        nonlocal left
        left -= 1
        if left == 0 and moment == "before":
            raise PowerCut
        rename(source, target)
        if left == 0:
            raise PowerCut

    number = 0
    while True:
        number += 1
        out, left = tmp_path / f"out{number}", number
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            try:
                inputs.pack(out)
                break
            except PowerCut:
                finished = {name: data for name, data in contents(out).items() if not name.startswith(".work")}
                assert finished.items() <= inputs.bytes.items()
        inputs.pack(out)
        assert contents(out) == inputs.bytes
    assert number > 12


def killed_at(arguments, seconds):
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def kill_again_and_again(inputs, tmp_path, times, seed, *more):
    whole = float("inf")
    for name in ("first", "second"):  # the first may be slow: files not cached, kernels not compiled
        start = time.monotonic()
        subprocess.run(inputs.arguments(tmp_path / name, "workers=0", *more), cwd=ROOT, check=True, capture_output=True)
        whole = min(whole, time.monotonic() - start)
        assert contents(tmp_path / name) == inputs.bytes
    rng, outs, killed, here = np.random.default_rng(seed), [], 0, 3
    for _ in range(4 * times):
        if here == 3:  # kills each
            outs.append(tmp_path / f"out{len(outs)}")
            here = 0
        start = time.monotonic()
        ended = killed_at(inputs.arguments(outs[-1], "workers=0", *more), whole * rng.uniform(0.45, 1.0))
        if ended == -signal.SIGKILL:
            killed, here = killed + 1, here + 1
        else:  # it was faster, as a machine is whose other work has ended; in this folder nothing is left to do
            assert ended == 0
            whole = min(whole, time.monotonic() - start) if here == 0 else whole
            here = 3
        if killed == times:
            break
    assert killed == times
    for out in outs:
        inputs.pack(out)
        assert contents(out) == inputs.bytes


def test_killed_at_random_moments(inputs, tmp_path):
    kill_again_and_again(inputs, tmp_path, 6, 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_killed_at_many_random_moments(inputs, tmp_path, seed):
    kill_again_and_again(inputs, tmp_path, 60, seed)


def children_of(pid):
    """Processes whose parent is ``pid``, without Python's resource tracker."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rsplit(")", 1)[1].split()
            line = (entry.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if int(fields[1]) == pid and b"spawn_main" in line and fields[0] != "Z":
            found.append(int(entry.parent.name))
    return found


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """A job of some seconds, and its undisturbed bytes."""
    folder = tmp_path_factory.mktemp("long")
    scene = write_raster(folder / "scene.tif", noise(1, (3, 900, 900)), (10, 0, 4e5, 0, -10, 5.2e6))
    cover = write_raster(folder / "cover.tif", patches(3, 500, 500, [10, 20, 50], 7), (30, 0, 399000, 0, -30, 5201000))
    keys = (*NO_QUALITY, "tile.size=64", "tile.step=16", "split.block_m=2000", "split.val_fraction=0.3", "seed=1")
    pack_quietly([scene], [cover], "worldcover", folder / "undisturbed", *keys, "workers=0")
    arguments = [sys.executable, str(PACK), "--scenes", str(scene), "--land-cover", str(cover),
                 "--product", "worldcover", *keys]  # fmt: skip
    return arguments, contents(folder / "undisturbed"), ((scene,), (cover,), "worldcover", keys)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_signals(long, tmp_path):
    """SIGTERM, SIGINT and SIGKILL to a run with two workers: the status, no orphans, and then the same bytes."""
    arguments, expected, (scenes, covers, product, keys) = long
    for number, status in ((signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)):
        out = tmp_path / number.name  # each from the beginning, so that most of the work is still to be done
        process = subprocess.Popen([*arguments, "--out", str(out), "workers=2"], stderr=subprocess.PIPE, cwd=ROOT)
        deadline = time.monotonic() + 60
        while len(list(out.glob(".work/run-*/spill/*.json"))) < 2 and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        workers = children_of(process.pid)
        start = time.monotonic()
        process.send_signal(number)
        said = process.communicate(timeout=30)[1].decode()
        assert process.returncode == status, said
        assert time.monotonic() - start < 10
        assert "Traceback" not in said
        assert workers
        while any(alive(pid) for pid in workers):
            assert time.monotonic() - start < 15, "workers outlive their caller"
            time.sleep(0.05)
        assert not (out / manifests.MANIFEST).exists()
        pack_quietly(scenes, covers, product, out, *keys, "workers=0")
        assert contents(out) == expected


# -------------------------------------------------------------------------------------- folders that are not free


def test_another_configuration_is_refused_with_the_difference(inputs, tmp_path):
    out = tmp_path / "out"
    inputs.pack(out)
    with pytest.raises(
        PlanError, match=r"(?s)holds a dataset made from other.*config\.tile\.step: 24 -> 20.*another --out"
    ):
        inputs.pack(out, "tile.step=20")
    with pytest.raises(PlanError, match=r"config\.seed: 5 -> 6"):
        inputs.pack(out, "seed=6")
    assert contents(out) == inputs.bytes


def test_an_unfinished_run_of_another_configuration_is_refused(inputs, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(phases.Run, "gather_shards", lambda *a: (_ for _ in ()).throw(PowerCut()))
    with pytest.raises(PowerCut):
        inputs.pack(out)
    monkeypatch.undo()
    before = contents(out)
    with pytest.raises(PlanError, match=r"(?s)holds an unfinished run from other.*config\.seed: 5 -> 6"):
        inputs.pack(out, "seed=6")
    assert contents(out) == before
    inputs.pack(out)
    assert contents(out) == inputs.bytes


def changed_pixels(folder):
    with rasterio.open(folder / "a.tif", "r+") as file:
        file.write(file.read(1) + 1, 1)


def changed_cover(folder):
    with rasterio.open(folder / "cover.tif", "r+") as file:
        file.write(np.full((300, 300), 10, np.uint8), 1)


def world_file(folder):
    (folder / "b.tif.msk").write_bytes((folder / "cover.tif").read_bytes())


def moved_georeference(folder):
    with rasterio.open(folder / "b.tif", "r+") as file:
        t = file.transform
        file.transform = rasterio.Affine(t.a, t.b, t.c + 30, t.d, t.e, t.f)


def renamed_scene(folder):
    (folder / "a.tif").rename(folder / "c.tif")


def meaning_of_codes(folder):
    table = folder / "mine.yaml"
    table.write_text(table.read_text().replace("nodata: [0]", "nodata: [0, 30]"))


CHANGES = {
    "pixels": (changed_pixels, r"scenes\.a: "),
    "land cover": (changed_cover, r"land_cover\.0: "),
    "a mask beside a scene": (world_file, r"scenes\.b: "),
    "georeference": (moved_georeference, r"scenes\.b: "),
    "a scene's name": (renamed_scene, r"scenes\.a: .* -> None"),
    "what codes mean": (meaning_of_codes, r"config\.product_table: "),
}
TABLE = "name: mine\nnodata: [0]\nignore: []\nclasses:\n" + "".join(
    f"  {code}: {{name: c{code}}}\n" for code in (10, 20, 30, 50, 80)
)


@pytest.mark.parametrize("case", CHANGES)
def test_other_inputs_are_refused(inputs, tmp_path, case):
    for path in (*inputs.scenes, inputs.cover):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "mine.yaml").write_text(TABLE)
    change, message = CHANGES[case]

    def again():
        scenes = sorted(p for p in tmp_path.glob("*.tif") if p.name != "cover.tif")
        return pack_quietly(
            scenes, [tmp_path / "cover.tif"], str(tmp_path / "mine.yaml"), tmp_path / "out", *KEYS, "workers=0"
        )

    assert again().written
    assert not again().written
    change(tmp_path)
    with pytest.raises(PlanError, match=message):
        again()


def test_a_second_packer_is_refused(inputs, tmp_path, capsys):
    out = tmp_path / "out"
    (out / workfolder.WORK).mkdir(parents=True)
    with workfolder.lock(out / workfolder.WORK):
        assert command(inputs.scenes, [inputs.cover], "worldcover", out, *KEYS, "workers=0") == 1
        assert "another process is packing into it" in capsys.readouterr().err
        assert set(contents(out)) == {".work/lock"}
    inputs.pack(out)
    assert contents(out) == inputs.bytes


def test_a_dead_owners_lock_is_taken_over(inputs, tmp_path):
    out = tmp_path / "out"
    code = (
        "import os, sys, signal, pathlib\nfrom preprocess import workfolder\n"
        "with workfolder.lock(pathlib.Path(sys.argv[1])):\n    os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(out / workfolder.WORK)], cwd=ROOT).returncode == -9
    assert (out / ".work/lock").exists()
    inputs.pack(out)
    assert contents(out) == inputs.bytes


def test_a_folder_with_other_things_is_refused(inputs, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.doc").write_text("mine")
    with pytest.raises(PlanError, match=r"is not empty \(thesis\.doc\)"):
        inputs.pack(tmp_path / "out")
    assert contents(tmp_path / "out") == {"thesis.doc": b"mine"}


@pytest.mark.parametrize("where", ["out", "out/deeper/still"])
def test_a_file_in_place_of_the_folder(inputs, tmp_path, capsys, where, monkeypatch):
    (tmp_path / "out").write_text("a file")
    from preprocess import plan

    monkeypatch.setattr(plan, "find_sources", lambda *a: pytest.fail("read before --out was looked at"))
    assert command(inputs.scenes, [inputs.cover], "worldcover", tmp_path / where, *KEYS) == 1
    said = capsys.readouterr().err
    assert "is not a folder; choose another folder" in said
    assert (tmp_path / "out").read_text() == "a file"


def test_left_overs_of_a_killed_process_go(inputs, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(phases.Run, "gather_shards", lambda *a: (_ for _ in ()).throw(PowerCut()))
        with pytest.raises(PowerCut):
            inputs.pack(out)
    (run,) = (out / ".work").glob("run-*")
    (run / "spill/.00000000.frames.99.tmp").write_bytes(b"half")
    inputs.pack(out)
    assert contents(out) == inputs.bytes


def test_a_spill_that_the_disk_did_not_keep_is_made_again(inputs, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(phases.Run, "gather_shards", lambda *a: (_ for _ in ()).throw(PowerCut()))
        with pytest.raises(PowerCut):
            inputs.pack(out)
    (frames,) = (out / ".work").glob("run-*/spill/00000000.frames")
    data = bytearray(frames.read_bytes())
    data[len(data) // 2] ^= 1
    frames.write_bytes(data)
    with pytest.raises(PackError, match=r"00000000\.frames: the disk .*checksum.*same command makes this file again"):
        inputs.pack(out)
    inputs.pack(out)
    assert contents(out) == inputs.bytes


class FullDisk:
    """A file on a disk with ``room`` bytes left for all files together."""

    room = 0

    def __init__(self, file):
        self.file = file

    def write(self, data):
        if len(data) > FullDisk.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        FullDisk.room -= len(data)
        return self.file.write(data)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.6, 1.9])
def test_disk_full(inputs, tmp_path, monkeypatch, capsys, share):
    """Spill and shards take twice the records' bytes. Wherever room ends, what is finished stays."""
    out = tmp_path / "out"
    FullDisk.room = int(share * sum(map(len, inputs.bytes.values())))
    monkeypatch.setattr(shards, "open", lambda *a: FullDisk(open(*a)), raising=False)  # noqa: SIM115
    assert command(inputs.scenes, [inputs.cover], "worldcover", out, *KEYS, "workers=0") == 1
    said = capsys.readouterr().err
    assert "No space left on device" in said
    assert str(out) in said
    assert "the same command goes on" in said
    finished = {name: data for name, data in contents(out).items() if not name.startswith(".work")}
    assert finished.items() <= inputs.bytes.items()
    assert bool(finished) == (share > 1)
    monkeypatch.undo()
    inputs.pack(out)
    assert contents(out) == inputs.bytes


# ------------------------------------------------------------------------------------------------------- memory

MEASURE = """
import resource, sys
from pathlib import Path
from tests.scenes import pack_quietly, NO_QUALITY
folder = Path(sys.argv[1])
pack_quietly([folder / "scene.tif"], [folder / "cover.tif"], "worldcover", folder / "out", *NO_QUALITY,
             "workers=0", "split.val_fraction=0", "tile.size=256", "tile.step=500", "scene.nodata=1", "tile.codec=raw",
             "tile.bands=[1]")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_memory_does_not_grow_with_the_scene(tmp_path):
    """A sparse scene of 144 million pixels against one of 9 million."""
    used = {}
    for side in (3000, 12000):
        folder = tmp_path / str(side)
        folder.mkdir()
        place = rasterio.Affine(10, 0, 4e5, 0, -10, 5.2e6)
        profile = {"driver": "GTiff", "count": 1, "dtype": "uint8", "crs": UTM31, "tiled": True, "sparse_ok": True}
        with rasterio.open(folder / "scene.tif", "w", width=side, height=side, transform=place, **profile):
            pass
        write_raster(folder / "cover.tif", patches(1, 500, 500, [10, 20], 9), (300, 0, 399000, 0, -300, 5201000))
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, str(folder)], cwd=ROOT, capture_output=True, text=True, check=True
        )
        used[side] = int(done.stdout)
        kept = manifests.load_manifest(folder / "out").counts["kept"]
        assert kept == len(range(0, side - 255, 500)) ** 2 + extra(side)
    assert used[12000] < used[3000] + 150


def extra(side):
    """Positions added by the moved last row and column."""
    regular = len(range(0, side - 255, 500))
    return 0 if (regular - 1) * 500 + 256 == side else 2 * regular + 1


# ------------------------------------------------------------------------------------------------- pixels


def world(tmp_path, pixels, **profile):
    """A scene of these pixels over a map of two classes; (scene, cover)."""
    scene = write_raster(tmp_path / "scene.tif", pixels, (30, 0, 4e5, 0, -30, 5.2e6), **profile)
    cover = write_raster(tmp_path / "cover.tif", patches(0, 300, 300, [10, 20], 5), (30, 0, 399000, 0, -30, 5201000))
    return scene, cover


def packed_world(tmp_path, pixels, *overrides, **profile):
    scene, cover = world(tmp_path, pixels, **profile)
    keys = ("tile.size=24", "tile.step=20", *overrides)
    return pack_quietly([scene], [cover], "worldcover", tmp_path / "out", *RAW, *keys).manifest, scene


def place_of(record):
    left, top = map(int, record.tile_id.rsplit(":", 2)[1:])
    return left, top, record.shape[0]


def random_pixels(dtype, shape, seed=0):
    if dtype == "float32":
        return np.random.default_rng(seed).normal(0, 3e3, shape).astype(np.float32)
    info = np.iinfo(dtype)
    return np.random.default_rng(seed).integers(info.min, info.max + 1, shape).astype(dtype)


@pytest.mark.parametrize(
    ("dtype", "bands"), [("uint8", 1), ("uint8", 3), ("uint16", 4), ("int16", 2), ("float32", 5), ("uint16", 13)]
)
def test_raw_pixels_are_the_scenes_at_the_records_transform(tmp_path, dtype, bands):
    pixels = random_pixels(dtype, (bands, 71, 93))
    manifest, scene = packed_world(tmp_path, pixels)
    assert (manifest.tile.dtype, len(manifest.bands)) == (dtype, bands)
    count = 0
    with rasterio.open(scene) as file:
        for _, record in read_records(tmp_path / "out", manifest):
            a, b, c, d, e, f = record.transform
            assert (a, b, d, e) == (30, 0, 0, -30)
            window = rasterio.windows.from_bounds(c, f - 24 * 30, c + 24 * 30, f, file.transform)
            read = file.read(window=window.round_offsets().round_lengths())
            np.testing.assert_array_equal(pixels_of(record), read.transpose(1, 2, 0))
            lon, lat = rasterio.warp.transform(UTM31, "EPSG:4326", [c + 360], [f - 360])
            np.testing.assert_allclose(record.lonlat, (lon[0], lat[0]), atol=1e-5)
            count += 1
    assert count == manifest.counts["kept"] == 5 * 4


def test_bands_by_number_name_and_order(tmp_path):
    pixels = random_pixels("uint16", (4, 30, 30))
    names = ("red", "green", "blue", "nir")
    manifest, _ = packed_world(tmp_path, pixels, "tile.bands=[nir, 1, green]", names=names)
    assert [(band.name, band.number) for band in manifest.bands] == [("nir", 4), ("red", 1), ("green", 2)]
    _, record = next(read_records(tmp_path / "out", manifest))
    left, top, size = place_of(record)
    np.testing.assert_array_equal(
        pixels_of(record), pixels[[3, 0, 1], top : top + size, left : left + size].transpose(1, 2, 0)
    )


def damaged_share(tmp_path, pixels, invalid, *overrides, **profile):
    """Packs, and checks that pixels without data are 0, the others unchanged, and the valid fraction theirs."""
    keys = ("quality.min_valid_pixels=0", "labels.min_valid_fraction=0.01", *overrides)
    manifest, _ = packed_world(tmp_path, pixels, *keys, **profile)
    bands = [band.number - 1 for band in manifest.bands]
    for _, record in read_records(tmp_path / "out", manifest):
        left, top, size = place_of(record)
        part = np.s_[top : top + size, left : left + size]
        expected = np.where(invalid[part], 0, pixels[bands][:, part[0], part[1]]).transpose(1, 2, 0)
        np.testing.assert_array_equal(pixels_of(record), expected)
        assert np.isfinite(pixels_of(record)).all()
        assert record.valid_fraction == pytest.approx(1 - invalid[part].mean(), abs=1e-6)
    return manifest


HOLES = np.random.default_rng(8).random((71, 93)) < 0.2


@pytest.mark.parametrize(
    ("dtype", "value"),
    [("uint8", 0), ("uint8", 255), ("uint16", 65535), ("int16", -9999), ("float32", -9999.9), ("float32", -3.4e38)],
)
@pytest.mark.parametrize("tagged", [True, False])
def test_nodata(tmp_path, dtype, value, tagged):
    pixels = random_pixels(dtype, (3, 71, 93))
    pixels[:, HOLES] = value
    pixels[0, ~HOLES] = np.where(pixels[0, ~HOLES] == value, 7, pixels[0, ~HOLES])
    pixels[1, 5, 5] = value  # one band alone may hold it
    invalid = (pixels == np.asarray(value, dtype)).all(0)
    assert invalid.mean() == HOLES.mean()
    profile = {"nodata": value} if tagged else {}
    overrides = () if tagged else (f"scene.nodata={value}",)
    damaged_share(tmp_path, pixels, invalid, *overrides, **profile)


@pytest.mark.parametrize("nodata", [None, float("nan"), -1.0])
def test_nan_and_infinity_never_reach_a_record(tmp_path, nodata):
    pixels = random_pixels("float32", (3, 71, 93))
    pixels[1, HOLES] = np.nan
    pixels[2, 40, 3:20] = np.inf
    pixels[0, 41, 3:20] = -np.inf
    manifest = damaged_share(tmp_path, pixels, ~np.isfinite(pixels).all(0), nodata=nodata)
    assert np.isfinite(manifest.train.mean).all()


def test_alpha_says_what_holds_data(tmp_path):
    pixels = random_pixels("uint8", (4, 71, 93))
    pixels[3] = np.where(HOLES, 0, 255)
    pixels[3, 2, 2] = 1
    pixels[:3, 10:20, 10:20] = 0  # black, and data
    manifest = damaged_share(tmp_path, pixels, pixels[3] == 0, photometric="RGB", alpha="YES")
    assert [band.name for band in manifest.bands] == ["red", "green", "blue"]


@pytest.mark.parametrize("inside", [True, False])
def test_a_mask_inside_the_file_and_beside_it(tmp_path, inside):
    pixels = random_pixels("uint16", (3, 71, 93))
    scene, _ = world(tmp_path, pixels)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=inside), rasterio.open(scene, "r+") as file:
        file.write_mask(~HOLES)
    assert (tmp_path / "scene.tif.msk").exists() != inside
    cover = tmp_path / "cover.tif"
    keys = (*RAW, "tile.size=24", "tile.step=20", "quality.min_valid_pixels=0")
    manifest = pack_quietly([scene], [cover], "worldcover", tmp_path / "out", *keys).manifest
    for _, record in read_records(tmp_path / "out", manifest):
        left, top, size = place_of(record)
        part = HOLES[top : top + size, left : left + size]
        expected = np.where(part, 0, pixels[:, top : top + size, left : left + size]).transpose(1, 2, 0)
        np.testing.assert_array_equal(pixels_of(record), expected)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_rule_on_nodata_is_counted(tmp_path, share):
    pixels = random_pixels("uint8", (3, 60, 60)) | 1
    pixels[:, : int(60 * share)] = 0
    other = write_raster(tmp_path / "b.tif", noise(1, (3, 30, 30)), (30, 0, 4e5, 0, -30, 5.2e6), nodata=0)
    scene, cover = world(tmp_path, pixels, nodata=0)
    keys = (*RAW, "tile.size=20", "tile.step=20")
    manifest = pack_quietly([scene, other], [cover], "worldcover", tmp_path / "out", *keys).manifest
    assert manifest.counts["rejected_nodata"] == {0.0: 0, 0.5: 6, 1.0: 9}[share]


# ------------------------------------------------------------------------------------------------------ stretch


def expected_grey(pixels, limits):
    low, high = np.array(limits)[:, 0, None, None], np.array(limits)[:, 1, None, None]
    grey = np.clip((pixels.astype(np.float64) - low) * (255 / (high - low)), 0, 255)
    return np.where(np.isnan(grey), 0, np.trunc(grey)).astype(np.uint8)


STRETCHES = {
    "joint": ("stretch.mode=joint", lambda s: [np.percentile(s, (1, 99))] * 3),
    "per band": ("stretch.mode=per_band", lambda s: [np.percentile(band, (1, 99)) for band in s]),
    "other percentiles": ("stretch.percentiles=[5,80]", lambda s: [np.percentile(s, (5, 80))] * 3),
    "limits": ("stretch.limits=[[100,3000]]", lambda s: [(100.0, 3000.0)] * 3),
    "limits a band": ("stretch.limits=[[0,1000],[5,2500],[-10,99]]", lambda s: [(0, 1000), (5, 2500), (-10, 99)]),
}


@pytest.mark.parametrize("dtype", ["uint16", "int16", "float32"])
@pytest.mark.parametrize("case", STRETCHES)
def test_stretch_modes(tmp_path, case, dtype):
    rng = np.random.default_rng(3)
    pixels = (rng.gamma(2, 400, (3, 71, 93)) * np.array([1, 1.5, 0.5])[:, None, None]).astype(dtype)
    if dtype != "uint16":
        pixels -= np.asarray(500, dtype)  # much of it below 0
    pixels[:, 30:40, 30:50] = 0  # fill that no tag names: data for a tile, none for the percentiles
    override, limits_of = STRETCHES[case]
    mode = ("stretch.mode=limits",) if "limits=" in override else ("stretch.mode=joint",)
    manifest, _ = packed_world(tmp_path, pixels, *mode, override)
    sample = pixels[:, ::4, ::5].reshape(3, -1)
    limits = limits_of(sample[:, sample.astype(np.float64).mean(0) != 0])
    np.testing.assert_allclose(manifest.scenes[0].stretch_limits, limits, rtol=1e-6)
    grey = expected_grey(pixels, manifest.scenes[0].stretch_limits)
    for _, record in read_records(tmp_path / "out", manifest):
        left, top, size = place_of(record)
        np.testing.assert_array_equal(
            pixels_of(record), grey[:, top : top + size, left : left + size].transpose(1, 2, 0)
        )


SCENE_BLOCKS = {
    "a small scene": (100, 100, (20, 100), 1.0),
    "few large blocks": (4000, 4000, (1024, 1024), 1.0),
    "tiles": (6000, 6000, (256, 256), 0.2),
    "some tiles": (3000, 3000, (256, 256), 0.5),
    "a row a block": (6001, 9000, (1, 6001), 1.0),
    "many rows a block": (20_000, 90_000, (16, 20_000), 1.0),
    "one block": (12_000, 12_000, (12_000, 12_000), 1.0),
    "small tiles of a huge scene": (1 << 17, 1 << 16, (64, 64), 0.2),
}


@pytest.mark.parametrize("case", SCENE_BLOCKS)
def test_what_a_sample_reads(case):
    """Whole blocks, none twice, spread over all of the scene, enough of them, and not too many pixels."""
    width, height, block, share = SCENE_BLOCKS[case]
    windows, (across, down) = sampling.windows(width, height, block, width * 6)
    areas = np.array(windows)
    read = int((areas[:, 2] * areas[:, 3]).sum())
    assert read / (width * height) == pytest.approx(share, abs=0.04)
    assert len({w[:2] for w in windows}) == len(windows)
    for column, row, wide, high in windows:
        if share < 1:
            assert column % block[1] == 0
            assert row % block[0] == 0
        assert wide % block[1] == 0 or column + wide == width
        assert row + high <= height
    sampled = sum(-(-w[2] // across) * -(-w[3] // down) for w in windows)
    assert sampled <= 1.1 * sampling.MAX_SAMPLES
    assert sampled >= min(width * height / 21, sampling.MAX_SAMPLES / 4)
    for axis, side in enumerate((width, height)):  # no fifth of the scene without its share
        middle = (areas[:, axis] + areas[:, axis + 2] / 2) / side
        weight = np.histogram(middle, 5, (0, 1), weights=areas[:, 2] * areas[:, 3])[0] / read
        assert share == 1 or weight.min() > 0.1


def test_limits_of_a_scene_of_many_blocks_are_those_of_all_pixels(tmp_path):
    """A scene that differs from place to place: percentiles of a fifth of its blocks against those of every pixel."""
    rng = np.random.default_rng(0)
    ground = np.kron(rng.gamma(3, 300, (12, 12)), np.ones((128, 128))) + np.add.outer(*[np.arange(1536) * 0.2] * 2)
    pixels = (ground + rng.normal(0, 40, (3, 1536, 1536))).clip(1, 60000).astype(np.uint16)
    path = write_raster(
        tmp_path / "s.tif", pixels, (30, 0, 4e5, 0, -30, 5.2e6), tiled=True, blockxsize=64, blockysize=64
    )
    scene = scene_at(path)
    assert len(sampling.windows(1536, 1536, raster.block_shape(scene, (1, 2, 3)), 1)[0]) == 72
    limits = sampling.stretch_limits(scene, (1, 2, 3), config.load(PackOptions, None))
    exact = np.percentile(pixels, (1, 99))
    shares = [(pixels < limit).mean() for limit in limits[0]]
    np.testing.assert_allclose(shares, (0.01, 0.99), atol=0.006)
    assert not np.array_equal(limits[0], exact)  # a sample it is


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "float32"])
@pytest.mark.parametrize("mode", ["joint", "per_band", "none"])
def test_a_sample_taken_in_parts_is_the_sample(tmp_path, dtype, mode):
    rng = np.random.default_rng(3)
    pixels = (rng.gamma(3, 20, (2, 320, 400)) * (1, 2)[dtype != "uint8"]).clip(0, 255).astype(dtype)
    pixels[:, :, :40] = 0
    path = write_raster(
        tmp_path / "s.tif", pixels, (30, 0, 4e5, 0, -30, 5.2e6), tiled=True, blockxsize=16, blockysize=16
    )
    scene, options = scene_at(path), config.load(PackOptions, None, [f"stretch.mode={mode}"])
    whole = sampling.stretch_limits(scene, (1, 2), options)
    assert (whole[:, 1] > whole[:, 0] + 1).all()
    for shares in (2, 3, 16, 200):  # some of them empty
        parts = [sampling.sample(scene, (1, 2), options, share, shares) for share in range(shares)]
        np.testing.assert_array_equal(sampling.limits_from(parts[::-1], 2, dtype, options), whole)


def test_samples_are_taken_in_parts_where_scenes_are_few(tmp_path):
    scene = scene_at(write_raster(tmp_path / "s.tif", np.ones((3, 20, 30), np.uint8), (30, 0, 4e5, 0, -30, 5.2e6)))
    large = replace(scene, place=replace(scene.place, grid=Grid(12_000, 9_000, scene.place.grid.transform)))
    joint = config.load(PackOptions, None)
    given = config.load(PackOptions, None, ["stretch.mode=limits", "stretch.limits=[[0, 1]]"])
    assert [sampling.shares_of(large, count, joint) for count in (1, 2, 3, 10, 17, 1000)] == [10, 8, 5, 1, 1, 1]
    assert sampling.shares_of(scene, 1, joint) == sampling.shares_of(large, 1, given) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_datasets_do_not_depend_on_the_parts_of_samples(tmp_path, monkeypatch, workers):
    """Limits are a scene's, whoever took which part of its sample."""
    pixels = np.random.default_rng(5).gamma(3, 300, (3, 256, 256)).clip(1, 60000).astype(np.uint16)
    keys = ("stretch.mode=joint", "tile.codec=raw", "tile.bands=[1,2,3]", f"workers={workers}")
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    packed_world(tmp_path / "whole", pixels, *keys)
    monkeypatch.setattr(sampling, "SHARE_PIXELS", 4000)
    asked = []
    monkeypatch.setattr(sampling, "shares_of", partial(_remembering, asked, sampling.shares_of))
    packed_world(tmp_path / "parts", pixels, *keys)
    assert asked == [3]
    assert contents(tmp_path / "whole/out") == contents(tmp_path / "parts/out")


def _remembering(asked, real, *arguments):
    asked.append(real(*arguments))
    return asked[-1]


def test_jpeg_tiles_show_the_stretched_scene(tmp_path):
    smooth = np.add.outer(np.arange(71) * 20, np.arange(93) * 15)
    pixels = np.stack([smooth, smooth[::-1], smooth[:, ::-1]]).astype(np.uint16) + 10
    keys = ("stretch.mode=joint", "tile.codec=jpeg", "tile.bands=[1,2,3]")
    manifest, _ = packed_world(tmp_path, pixels, *keys)
    grey = expected_grey(pixels, manifest.scenes[0].stretch_limits)
    for _, record in read_records(tmp_path / "out", manifest):
        left, top, size = place_of(record)
        image = simplejpeg.decode_jpeg(record.image, "RGB")
        expected = grey[:, top : top + size, left : left + size].transpose(1, 2, 0)
        assert np.abs(image.astype(int) - expected).mean() < 2
        assert simplejpeg.decode_jpeg_header(record.image)[3] == "444"


# --------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
def test_statistics_of_the_manifest(tmp_path, dtype):
    pixels = random_pixels(dtype, (2, 150, 170)) if dtype != "float32" else random_pixels(dtype, (2, 150, 170)) / 1e4
    keys = ("split.val_fraction=0.4", "split.block_m=1500", "shards.records=5")
    manifest, _ = packed_world(tmp_path, pixels, *keys)
    for name in records.SPLITS:
        part = manifest.split(name)
        mine = [record for split, record in read_records(tmp_path / "out", manifest) if split == name]
        values = np.concatenate([pixels_of(record).reshape(-1, 2) for record in mine]).astype(np.float64)
        assert len(mine) == part.records > 3
        np.testing.assert_allclose(part.mean, values.mean(0), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(part.std, values.std(0), rtol=1e-9)
        prior = np.mean([record.fractions.astype(np.float64) for record in mine], axis=0)
        np.testing.assert_allclose(part.prior, prior, atol=1e-7)
        assert sum(part.prior) == pytest.approx(1, abs=1e-12)


# --------------------------------------------------------------------------------------------------- the format


def digest(data):
    return hashlib.sha256(data).hexdigest()[:16]


def test_the_bytes_of_the_format_stay(tmp_path):
    """Golden: a shard, its index, the order and the split. A change here is another schema version."""
    made = [
        records.Record(
            image=bytes(range(12 * n, 12 * n + 12)), codec="raw", shape=(2, 2, 3), dtype="uint8",
            fractions=np.array([0.25, 0.75], np.float32), valid_fraction=0.5, lonlat=(1.5, -2.25),
            transform=(10.0, 0.0, 5e5, 0.0, -10.0, 4e6 + n), crs="LOCAL", scene_id="s", tile_id=f"s:{n}:0",
            date="2020-01-02" if n else "",
        )
        for n in range(3)
    ]  # fmt: skip
    frames = [records.frame(records.encode_record(record), shards.crc32c) for record in made]
    shard = shards.write_shard(tmp_path, "train", 0, frames)
    assert digest((tmp_path / shard.name).read_bytes()) == shard.sha256[:16] == "fefb208f5b03446a"
    assert (tmp_path / shard.index_name).read_text() == "0 307\n307 331\n638 331\n"
    assert [spill.tile_hash(7, f"s:{n}:0") for n in range(2)] == [6016920751356188091, 16015757309763152741]
    assert "".join("tv"[blocks.is_validation(900, n, 7, 0.3)] for n in range(24)) == "vtttvtvvttttvvvvtttttttt"


def test_the_bytes_of_a_small_dataset_stay(inputs):
    """Golden: every field of every record but the CRS, whose text is GDAL's, in the order of the shards."""
    total = hashlib.sha256()
    for split, record in read_records(inputs.folder / "undisturbed"):
        total.update(split.encode() + record.image + record.fractions.tobytes() + record.tile_id.encode())
        total.update(np.array([record.valid_fraction, *record.transform], "<f8").tobytes())
    assert total.hexdigest()[:16] == "fb937bf89f413780"
    tree = json.loads(inputs.bytes[manifests.MANIFEST])
    assert (tree["schema"], tree["schema_version"]) == ("geokr-records", 2)


def test_no_tile_at_all(inputs, tmp_path):
    with pytest.raises(PackError, match=r"not one usable tile: \d+ dark.*docs/configuration\.md"):
        inputs.pack(tmp_path / "out", "quality.min_brightest=256")
    assert not (tmp_path / "out/manifest.json").exists()
    inputs.pack(tmp_path / "out")  # another command may begin there
    assert contents(tmp_path / "out") == inputs.bytes


def test_a_failed_run_among_its_shards_stays_known(inputs, tmp_path, monkeypatch):
    """Its shards would be those of no dataset."""
    real, made = gather.gather, []

    def cut(job):
        if made:
            raise PowerCut
        made.append(job)
        return real(job)

    with monkeypatch.context() as patch:
        patch.setattr(gather, "gather", cut)
        with pytest.raises(PowerCut):
            inputs.pack(tmp_path / "out")
    with monkeypatch.context() as patch:
        fail = lambda *_: (_ for _ in ()).throw(FutileError("for good"))  # noqa: E731
        patch.setattr(phases.Run, "scan_chunks", fail)
        with pytest.raises(FutileError):
            inputs.pack(tmp_path / "out")
    inputs.pack(tmp_path / "out")
    assert contents(tmp_path / "out") == inputs.bytes
