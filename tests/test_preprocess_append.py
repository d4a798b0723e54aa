"""A dataset grows: old shards keep their bytes, statistics speak of all, nothing leaks, a cut does no harm."""

import json
import os
import re
import shutil
from fractions import Fraction

import numpy as np
import pyarrow.parquet as pq
import pytest

from geokr import config, manifests, records
from geokr.config import ConfigError
from geokr.identity import check_identity
from geokr.records import RecordError
from pipelines.dataset import Dataset
from preprocess import (
    appending,
    finishing,
    gather,
    inputs,
    plan,
    report,
    report_sections,
    sampling,
    tile_table,
    verify_records,
    workfolder,
)
from preprocess.errors import RasterError
from preprocess.inputs import PlanError
from preprocess.options import PackOptions
from preprocess.plan import make_plan
from preprocess.workfolder import FutileError
from tests.scenes import (
    NO_QUALITY,
    command,
    contents,
    noise,
    pack_quietly,
    patches,
    pixels_of,
    read_records,
    write_raster,
)

KEYS = (
    *NO_QUALITY, "tile.size=32", "tile.step=24", "tile.bands=[1,2,3]", "tile.codec=raw", "stretch.mode=none",
    "shards.records=32", "split.val_fraction=0.3", "split.block_m=2000", "seed=5", "workers=0",
)  # fmt: skip
PLACES = {"a": (4e5, 5.2e6), "b": (402000, 5.197e6), "c": (400600, 5.1996e6), "d": (401500, 5.1986e6)}


class PowerCut(BaseException):
    """Nothing in the code under test catches it."""


class World:
    """Scenes that overlap one another, over two sheets."""

    def __init__(self, folder):
        self.folder = folder
        self.scenes = {
            name: write_raster(
                folder / f"{name}.tif", noise(i, (3, 130, 170), "uint16", 1, 60000), (30, 0, x, 0, -30, y)
            )
            for i, (name, (x, y)) in enumerate(PLACES.items())
        }
        codes = patches(3, 300, 400, [10, 20, 30, 50, 80], 5)
        self.west = write_raster(folder / "west.tif", codes[:, :200], (30, 0, 399000, 0, -30, 5201000))
        self.east = write_raster(folder / "east.tif", codes[:, 200:], (30, 0, 405000, 0, -30, 5201000))
        self.first = folder / "first"
        self.pack(self.first, "ab")
        self.grown = folder / "grown"
        self.bytes = self.undisturbed(self.grown)

    def undisturbed(self, out):
        shutil.copytree(self.first, out)
        assert self.pack(out, "abcd", append=True).written
        return contents(out)

    def pack(self, out, names, *more, covers=None, **keywords):
        scenes = [self.scenes.get(name, name) for name in names]
        return pack_quietly(scenes, covers or [self.west, self.east], "worldcover", out, *KEYS, *more, **keywords)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("append"))


@pytest.fixture
def out(world, tmp_path):
    return shutil.copytree(world.first, tmp_path / "out")


def parts(folder, name="manifest.json"):
    return manifests.load_manifest(folder if name == "manifest.json" else folder / name)


def test_old_files_stay_and_new_ones_follow(world):
    before = contents(world.first)
    old, new = parts(world.first), parts(world.grown)
    assert {name: data for name, data in world.bytes.items() if name in before and name != manifests.MANIFEST} == {
        name: data for name, data in before.items() if name != manifests.MANIFEST
    }
    assert world.bytes["manifest-v1.json"] == before[manifests.MANIFEST]
    for split in records.SPLITS:
        names = [shard.name for shard in new.split(split).shards]
        assert names == [f"{split}-{number:05d}.tfrecord" for number in range(len(names))]
        assert len(names) > len(old.split(split).shards) > 0
        assert new.split(split).shards[: len(old.split(split).shards)] == old.split(split).shards
    assert (old.version, new.version) == (1, 2)
    assert [part.scenes for part in new.parts] == [2, 2]
    assert [scene.scene_id for scene in new.scenes] == ["a", "b", "c", "d"]
    assert sum(part.train_shards for part in new.parts) == len(new.train.shards)
    assert verify_records.verify(world.grown, 1) == ([], new)


def test_the_tiles_are_those_of_packing_all_at_once(world, tmp_path):
    world.pack(tmp_path / "once", "abcd")
    once, grown = ({r.tile_id: (split, r.image, r.fractions.tobytes()) for split, r in read_records(folder)}
                   for folder in (tmp_path / "once", world.grown))  # fmt: skip
    assert once == grown
    one, two = parts(tmp_path / "once"), parts(world.grown)
    assert one.counts == two.counts
    for split in records.SPLITS:
        assert one.split(split).moments.sum == two.split(split).moments.sum
        assert one.split(split).moments.squares == two.split(split).moments.squares
        assert (one.split(split).mean, one.split(split).std) == (two.split(split).mean, two.split(split).std)
        np.testing.assert_allclose(one.split(split).prior, two.split(split).prior, atol=1e-14)


def test_statistics_are_exact_over_all_pixels(world):
    manifest = parts(world.grown)
    for split in records.SPLITS:
        mine = [record for name, record in read_records(world.grown, manifest) if name == split]
        pixels = np.concatenate([pixels_of(record).reshape(-1, 3) for record in mine]).astype(object)
        mean = [Fraction(sum(pixels[:, band]), len(pixels)) for band in range(3)]
        squares = [Fraction(sum(pixels[:, band] ** 2), len(pixels)) for band in range(3)]
        assert manifest.split(split).mean == tuple(float(value) for value in mean)
        expected = [float(square - value**2) ** 0.5 for square, value in zip(squares, mean, strict=True)]
        np.testing.assert_allclose(manifest.split(split).std, expected, rtol=1e-15)
        prior = np.mean([record.fractions.astype(np.float64) for record in mine], axis=0)
        np.testing.assert_allclose(manifest.split(split).prior, prior, atol=1e-7)


def test_no_ground_in_both_splits(world):
    """Any two tiles of different splits, of whatever scenes, lie apart."""
    boxes = {"train": [], "val": []}
    for split, record in read_records(world.grown):
        _, _, x, _, _, y = record.transform
        boxes[split].append((x, y - 32 * 30, x + 32 * 30, y))
    train, val = np.array(boxes["train"]), np.array(boxes["val"])
    across = (train[:, None, 0] < val[None, :, 2]) & (val[None, :, 0] < train[:, None, 2])
    down = (train[:, None, 1] < val[None, :, 3]) & (val[None, :, 1] < train[:, None, 3])
    assert len(train) > 30
    assert len(val) > 10
    assert not (across & down).any()


def stamps(folder):
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_ino) for p in [folder, *folder.rglob("*")]}


@pytest.mark.parametrize("names", ["abcd", "cd", "d", "ab"])
def test_again_writes_nothing(world, tmp_path, names):
    out = shutil.copytree(world.grown, tmp_path / "out")
    before = stamps(out)
    assert not world.pack(out, names, append=True).written
    assert stamps(out) == before


def test_only_the_new_scenes_need_be_named(world, out):
    world.pack(out, "cd", append=True)
    assert contents(out) == world.bytes


def test_several_times_and_through_the_command(world, out, capsys):
    arguments = ([world.west, world.east], "worldcover", out, *KEYS, "--append")
    assert command([world.scenes["c"]], *arguments) == 0
    assert command([world.scenes["d"]], *arguments) == 0
    manifest = parts(out)
    assert manifest.version == 3
    assert [part.scenes for part in manifest.parts] == [2, 1, 1]
    assert {name for name in contents(out) if name.startswith("manifest")} >= {"manifest-v1.json", "manifest-v2.json"}
    assert verify_records.verify(out, 1)[0] == []
    assert sorted(r.tile_id for _, r in read_records(out)) == sorted(r.tile_id for _, r in read_records(world.grown))
    assert parts(out).counts == parts(world.grown).counts
    assert not (out / ".work").exists()
    rows = pq.read_table(out / "tiles.parquet", columns=["tile_id", "shard"]).to_pylist()
    assert sorted(row["tile_id"] for row in rows) == sorted(r.tile_id for _, r in read_records(out))
    assert {row["shard"] for row in rows} == {s.name for split in records.SPLITS for s in manifest.split(split).shards}
    capsys.readouterr()
    assert command([world.scenes["d"]], *arguments) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_append_to_nothing_is_a_new_dataset(world, tmp_path):
    world.pack(tmp_path / "out", "ab", append=True)
    assert contents(tmp_path / "out") == contents(world.first)


@pytest.mark.parametrize("rows", [7, 1 << 16])
def test_rows_are_in_the_order_of_the_shards_also_where_some_are_kept(world, tmp_path, monkeypatch, rows):
    """As made again from nothing: shards of a split that were added stand behind the older ones of their split."""
    monkeypatch.setattr(tile_table, "ROW_GROUP", rows)
    out = shutil.copytree(world.grown, tmp_path / "out")
    manifest, nothing = manifests.load_manifest(out), lambda done, total: None
    listed = tile_table.shards_of(manifest)
    last = manifest.train.shards[-1]
    assert len(manifest.train.shards) > 1
    assert manifest.val.shards
    tile_table.write(out, manifest, out, None, nothing)
    again = (out / tile_table.NAME).read_bytes()
    train = manifest.train.model_copy(update={"shards": manifest.train.shards[:-1]})
    fewer = manifest.model_copy(update={"train": train})
    tile_table.write(out, fewer, out, None, nothing)
    assert last.name not in pq.read_table(out / tile_table.NAME)["shard"].to_pylist()
    tile_table.write(out, manifest, out, None, nothing)
    assert list(dict.fromkeys(pq.read_table(out / tile_table.NAME)["shard"].to_pylist())) == [s.name for s in listed]
    assert (out / tile_table.NAME).read_bytes() == again


def test_rates_are_those_of_the_run(world, out):
    """Positions of the runs before took no time of this one."""
    seen = []
    packed = world.pack(out, "abcd", append=True, finish=lambda *given: seen.append(given[3]))
    positions = parts(out).counts["positions"] - parts(world.first).counts["positions"]
    assert packed.part.counts["positions"] == seen[0].counts["positions"] == positions > 0
    said = report.summary(packed.manifest, 0.5, positions)
    assert re.search(rf"positions a second +{2 * positions}\n", said)
    assert "positions a second" not in report.summary(packed.manifest, 0.5)


def test_the_report_of_a_run_that_was_cut_short_counts_its_own_positions(world, out, monkeypatch):
    rates, times = [], report_sections.times
    planned_here, quiet = planned(world, "abcd"), lambda *_: None
    make = lambda: finishing.Finishing(planned_here, out, quiet, ["command"])  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(finishing.Finishing, "with_work", lambda *_: (_ for _ in ()).throw(PowerCut()))
        with pytest.raises(PowerCut):
            world.pack(out, "abcd", append=True, finish=make().with_work)
    monkeypatch.setattr(report_sections, "times", lambda *given: rates.append(given[3]) or times(*given))
    assert not world.pack(out, "abcd", append=True, finish=make().with_work).written
    assert rates == [parts(out).counts["positions"] - parts(world.first).counts["positions"]]


def test_land_cover_may_grow(world, tmp_path):
    world.pack(tmp_path / "out", "ab", covers=[world.west])
    world.pack(tmp_path / "out", "cd", covers=[world.east], append=True)
    manifest = parts(tmp_path / "out")
    assert [part.land_cover for part in manifest.parts] == [(0,), (1,)]
    assert len(set(manifest.land_cover_fingerprints)) == 2


def test_a_scene_that_could_not_be_used_then(world, tmp_path):
    """Fetched again, it is one of the dataset's, and no longer among those left out."""
    out, whole = tmp_path / "out", world.scenes["c"].read_bytes()
    world.scenes["c"].write_bytes(whole[:100])
    try:
        world.pack(out, "abc", "max_bad_fraction=0.5")
        assert parts(out).left_out.keys() == {"c"}
    finally:
        world.scenes["c"].write_bytes(whole)
    world.pack(out, "abc", "max_bad_fraction=0.5", append=True)
    assert parts(out).left_out == {}
    assert parts(out).counts["scenes_rejected"] == 0
    assert [scene.scene_id for scene in parts(out).scenes] == ["a", "b", "c"]


def cut_short(path):
    """A scene that opens and cannot be read through; returns its sound bytes."""
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 6 // 10])
    return whole


def test_a_scene_that_could_not_be_read_through_is_left_out_until_it_can(world, tmp_path, capsys):
    """As one that could not be opened: it is no scene of the dataset, and repaired it can be added."""
    out, path = tmp_path / "out", world.scenes["c"]
    arguments = ([world.west, world.east], "worldcover", out, *KEYS, "max_bad_fraction=0.5")
    whole, scenes = cut_short(path), [world.scenes[name] for name in "abc"]
    try:
        assert command(scenes, *arguments) == 0
        assert re.search(r"\nleft out: c: .*c\.tif", capsys.readouterr().err)
        manifest, before = parts(out), contents(out)
        assert [scene.scene_id for scene in manifest.scenes] == ["a", "b"]
        assert manifest.left_out == {"c": "unreadable"}
        assert manifest.damaged["c"].positions == manifest.counts["rejected_unreadable"] > 0
        assert (manifest.counts["scenes"], manifest.counts["scenes_rejected"]) == (2, 1)
        for more in ((), ("--append",)):
            assert command(scenes, *arguments, *more) == 0
            said = capsys.readouterr()
            assert "nothing to do" in said.out
            assert "left out: c: " in said.err
            assert contents(out) == before
    finally:
        path.write_bytes(whole)
    with pytest.raises(PlanError, match=r"(?s)scenes\.c: None -> .*--append adds"):
        world.pack(out, "abc", "max_bad_fraction=0.5")
    assert command(scenes, *arguments, "--append") == 0
    world.pack(tmp_path / "sound", "abc", "max_bad_fraction=0.5")
    grown, sound = parts(out), parts(tmp_path / "sound")
    assert (grown.left_out, grown.damaged, grown.counts) == ({}, {}, sound.counts)
    assert [scene.scene_id for scene in grown.scenes] == ["a", "b", "c"]
    assert sorted(r.tile_id for _, r in read_records(out)) == sorted(
        r.tile_id for _, r in read_records(tmp_path / "sound")
    )


def test_a_scene_that_is_still_cut_short_counts_once(world, tmp_path):
    whole = cut_short(world.scenes["c"])
    try:
        world.pack(tmp_path / "out", "abc", "max_bad_fraction=0.5")
        world.pack(tmp_path / "out", "abcd", "max_bad_fraction=0.5", append=True)
        world.pack(tmp_path / "once", "abcd", "max_bad_fraction=0.5")
    finally:
        world.scenes["c"].write_bytes(whole)
    grown, once = parts(tmp_path / "out"), parts(tmp_path / "once")
    assert [scene.scene_id for scene in grown.scenes] == ["a", "b", "d"]
    assert (grown.counts, grown.left_out, grown.damaged) == (once.counts, once.left_out, once.damaged)


def test_a_run_that_ended_before_clearing_up_does_not_block_the_next(world, tmp_path, monkeypatch):
    """Where a scene is left out, the same --append looks at it again, and so is not done."""
    whole, out = cut_short(world.scenes["c"]), tmp_path / "out"
    try:
        world.pack(out, "a", "max_bad_fraction=0.5")
        with monkeypatch.context() as patch:
            patch.setattr(workfolder, "clear", lambda *a, **k: (_ for _ in ()).throw(PowerCut()))
            with pytest.raises(PowerCut):
                world.pack(out, "abc", "max_bad_fraction=0.5", append=True)
        assert parts(out).version == 2
        ended = []
        finish = lambda manifest, *_: ended.append(manifest.version)  # noqa: E731
        assert not world.pack(out, "abc", "max_bad_fraction=0.5", append=True, finish=finish).written
        assert ended == [2]
    finally:
        world.scenes["c"].write_bytes(whole)
    assert not (out / ".work").exists()


def test_the_report_lists_what_any_run_has_left_out(world, tmp_path):
    out, path = tmp_path / "out", world.scenes["c"]
    arguments = ([world.west, world.east], "worldcover", out, *KEYS, "max_bad_fraction=0.5")
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    try:
        assert command([world.scenes[name] for name in "abc"], *arguments) == 0
    finally:
        path.write_bytes(whole)
    assert command([world.scenes["d"]], *arguments, "--append") == 0
    listed = (out / "report.html").read_text().partition("<h3>Left out</h3>")[2].partition("</table>")[0]
    assert f"<td>c</td><td>{parts(out).left_out['c']}</td>" in listed


def test_a_scene_of_the_dataset_whose_file_is_lost_stays(world, tmp_path, capsys):
    out, path = tmp_path / "out", world.scenes["a"]
    arguments = ([world.west, world.east], "worldcover", out, *KEYS, "max_bad_fraction=0.5")
    whole, scenes = path.read_bytes(), [world.scenes[name] for name in "abc"]
    assert command(scenes[:2], *arguments) == 0
    path.write_bytes(whole[:100])
    try:
        assert command(scenes, *arguments, "--append") == 0
    finally:
        path.write_bytes(whole)
    said = capsys.readouterr().err
    assert re.search(r"warning: a cannot be used now \(\w+\): the dataset has it from before", said)
    assert "left out: a" not in said
    assert parts(out).left_out == {}
    assert parts(out).counts["scenes_rejected"] == 0
    assert [scene.scene_id for scene in parts(out).scenes] == ["a", "b", "c"]


# ------------------------------------------------------------------------------------------------ refusals


def refused(world, out, names, *more, match, **keywords):
    before = contents(out)
    with pytest.raises(PlanError, match=match):
        world.pack(out, names, *more, **keywords)
    assert contents(out) == before


def test_without_append_more_scenes_are_refused(world, out):
    refused(world, out, "abc", match=r"(?s)scenes\.c: None -> .*--append adds the new scenes")
    refused(world, out, "bc", match=r"(?s)scenes\.a: .* -> None.*\nchoose another --out$")


def test_the_first_command_is_refused_on_the_larger_dataset(world, tmp_path):
    out = shutil.copytree(world.grown, tmp_path / "out")
    refused(world, out, "ab", match=r"scenes\.c: .* -> None")
    assert not world.pack(out, "abcd").written


def test_another_configuration(world, out):
    refused(world, out, "abcd", "tile.step=20", match=r"(?s)--append.*config\.tile\.step: 24 -> 20", append=True)
    refused(world, out, "abcd", "seed=6", match=r"config\.seed: 5 -> 6", append=True)


def test_another_scene_of_the_same_name(world, out, tmp_path):
    other = write_raster(tmp_path / "a.tif", noise(77, (3, 130, 170), "uint16"), (30, 0, 4e5, 0, -30, 5.2e6))
    with pytest.raises(PlanError, match=r"holds another scene 'a'.*rename this one; where it replaces that one, pack"):
        pack_quietly([other], [world.west, world.east], "worldcover", out, *KEYS, append=True)


def test_the_same_scene_under_another_name(world, out, tmp_path):
    shutil.copy(world.scenes["a"], tmp_path / "z.tif")
    with pytest.raises(PlanError, match=r"z\.tif is in .* already, as scene 'a'"):
        pack_quietly([tmp_path / "z.tif"], [world.west, world.east], "worldcover", out, *KEYS, append=True)


def test_scenes_that_a_first_packing_refuses_to_mix(world, tmp_path):
    """Both are stretched to 8 bits, so tiles do not show it; and the whole command would fail afterwards."""
    place, names, keys = (30, 0, 401500, 0, -30, 5.1986e6), ("red", "green", "blue"), ("stretch.mode=joint",)
    eight = write_raster(tmp_path / "e.tif", noise(1, (3, 130, 170)), (30, 0, 4e5, 0, -30, 5.2e6), names=names)
    more = write_raster(tmp_path / "f.tif", noise(2, (3, 130, 170)), place, names=names)
    deep = write_raster(tmp_path / "deep.tif", noise(3, (3, 130, 170), "uint16"), place, names=names)
    four = write_raster(tmp_path / "four.tif", noise(4, (4, 130, 170)), place, names=(*names, "nir"))
    out = tmp_path / "out"
    world.pack(out, [eight], *keys)
    assert parts(out).scene_form == manifests.SceneForm(dtype="uint8", bands=3)
    refused(world, out, [deep], *keys, match=r"deep\.tif has dtype uint16, the scenes of .* have uint8", append=True)
    refused(world, out, [four], *keys, match=r"four\.tif has bands 4, the scenes of .* have 3", append=True)
    world.pack(out, [more], *keys, append=True)
    assert parts(out).scene_form == manifests.SceneForm(dtype="uint8", bands=3)
    older = parts(out).model_copy(update={"scene_form": None})
    (out / manifests.MANIFEST).write_bytes(manifests.dump_manifest(older))
    assert b"scene_form" not in (out / manifests.MANIFEST).read_bytes()
    world.pack(out, [deep], *keys, append=True)
    assert parts(out).scene_form is None, "of an older dataset it is not known"


def test_files_of_one_name_in_folder_after_folder(world, tmp_path):
    """What an id begins with depends on what else the command names."""
    out, paths = tmp_path / "out", [tmp_path / f"y{year}/mosaic.tif" for year in (2020, 2021, 2022)]
    for path, name in zip(paths, "abc", strict=True):
        path.parent.mkdir()
        shutil.copy(world.scenes[name], path)
    world.pack(out, paths[:1])
    assert world.pack(out, paths[:2], append=True).written
    assert [scene.scene_id for scene in parts(out).scenes] == ["mosaic", "y2021/mosaic"]
    assert not world.pack(out, paths[:2], append=True).written
    assert not world.pack(out, paths[1:2], append=True).written
    assert not world.pack(out, paths[:2]).written, "the same without --append"
    with pytest.raises(PlanError, match=r"another scene 'mosaic'.*name both in one command"):
        world.pack(out, paths[2:], append=True)
    assert world.pack(out, paths, append=True).written
    assert [scene.scene_id for scene in parts(out).scenes] == ["mosaic", "y2021/mosaic", "y2022/mosaic"]
    assert verify_records.verify(out, 1)[0] == []
    shutil.copy(paths[0], paths[2].with_name("copy.tif"))
    with pytest.raises(PlanError, match=r"copy\.tif is in .* already, as scene 'mosaic'"):
        world.pack(out, [paths[2].with_name("copy.tif")], append=True)


def test_which_scenes_of_a_command_a_dataset_has():
    have = {"m": "1", "a/n": "2", "b": "3", "c/b": "3"}
    wanted = {"x/m": "1", "n": "2", "an": "2", "b": "3", "d/c/b": "3", "o": "1"}
    assert inputs.held_ids(wanted, have) == {"x/m": "m", "n": "a/n", "b": "b", "d/c/b": "c/b"}
    assert inputs.held_ids({"x/m": "1", "m": "9"}, have) == {}, "another file has taken the id"


def test_a_dataset_without_sums(world, out):
    tree = json.loads((out / manifests.MANIFEST).read_bytes())
    for split in records.SPLITS:
        del tree[split]["moments"]
    del tree["digest"]
    (out / manifests.MANIFEST).write_text(json.dumps({**tree, "schema_version": 1}))
    refused(world, out, "abcd", match=r"packed by an earlier version.*data\.records takes a list", append=True)


def test_new_scenes_without_a_tile_are_known_then(world, out, tmp_path, capsys):
    """Nothing but the configuration, which must stay, decided that; so the next run need not look at them again."""
    empty = write_raster(tmp_path / "e.tif", np.zeros((3, 64, 64), np.uint16), (30, 0, 4e5, 0, -30, 5.2e6), nodata=0)
    before, old = contents(out), parts(out)
    arguments = ([world.west, world.east], "worldcover", out, *KEYS, "--append")
    assert command([empty], *arguments) == 0
    assert "no tile of the new scenes can be used (9 nodata)" in capsys.readouterr().err
    new = parts(out)
    assert contents(out) == before | {
        "manifest-v1.json": before[manifests.MANIFEST],
        manifests.MANIFEST: contents(out)[manifests.MANIFEST],
    }
    assert (new.train, new.val) == (old.train, old.val)
    assert [(scene.scene_id, scene.kept) for scene in new.scenes][2:] == [("e", 0)]
    assert (new.counts["positions"], new.counts["kept"]) == (old.counts["positions"] + 9, old.counts["kept"])
    assert [part.train_shards for part in new.parts] == [len(old.train.shards), 0]
    assert verify_records.verify(out, 1)[0] == []
    assert Dataset.open(out).train.records == old.train.records
    assert tile_table.is_current(out, new)
    assert command([empty], *arguments) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert command([world.scenes["c"], empty], *arguments) == 0, "others can be added"
    assert parts(out).version == 3


def test_new_scenes_off_the_land_cover_change_nothing(world, out, tmp_path):
    """They would be known then and stay out, and what is missing may be a sheet."""
    far = write_raster(tmp_path / "far.tif", noise(9, (3, 64, 64), "uint16"), (30, 0, 7e5, 0, -30, 5.2e6))
    before = stamps(out)
    with pytest.raises(PlanError, match=r"1 new scenes lie under no land cover, the first is .*far\.tif.*--land-cover"):
        world.pack(out, [*"ab", far], append=True)
    assert stamps(out) == before
    world.pack(out, [*"abcd", far], append=True)
    assert [(s.scene_id, s.kept > 0) for s in parts(out).scenes][2:] == [("c", True), ("d", True), ("far", False)]


def test_an_append_that_fails_for_good_leaves_the_folder_as_it_was(world, out, monkeypatch):
    before = contents(out)

    def broken(scene, *more):
        raise RasterError(f"{scene.path}: is cut short")

    with monkeypatch.context() as patch:
        patch.setattr(sampling, "stretch_limits", broken)
        patch.setattr(sampling, "shares_of", lambda *_: 1)
        with pytest.raises(FutileError, match=r"c\.tif: is cut short"):
            world.pack(out, "abcd", append=True)
    assert contents(out) == before
    world.pack(out, "abd", append=True)
    assert [scene.scene_id for scene in parts(out).scenes] == ["a", "b", "d"]


# -------------------------------------------------------------------------------------------- interruptions


def readable(world, out, thoroughly):
    """What training sees: one of the two datasets, whole."""
    dataset = Dataset.open(out)
    assert dataset.manifest in (parts(world.first), parts(world.grown))
    if thoroughly:
        assert verify_records.verify(out, 1)[0] == []


@pytest.mark.parametrize("moment", ["before", "after"])
def test_cut_short_at_every_commit(world, tmp_path, monkeypatch, moment):
    """At the n-th rename, for every n: the old dataset can be read until the new one is there."""
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
        out, left = shutil.copytree(world.first, tmp_path / f"out{number}"), number
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            try:
                world.pack(out, "abcd", append=True)
                break
            except PowerCut:
                readable(world, out, thoroughly=number % 5 == 0)
                if parts(out).version == 1:
                    assert not world.pack(out, "ab").written, "the dataset that is there is whole"
        world.pack(out, "abcd", append=True)
        assert contents(out) == world.bytes
        shutil.rmtree(out)
    assert number > 15


def cut_after_shards(world, out, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(appending, "joined", lambda *a: (_ for _ in ()).throw(PowerCut()))
        with pytest.raises(PowerCut):
            world.pack(out, "abcd", append=True)


def test_goes_on_with_a_command_that_names_fewer_old_scenes(world, out, monkeypatch):
    """How scenes are cut into tasks follows from all that a command names, so a task's number may be another window."""
    monkeypatch.setattr(plan, "chunk_tiles", lambda positions: 4 if positions > 100 else 9)
    positions = sum(task.tiles for task in planned(world, "abcd").tasks)
    few = sum(task.tiles for task in planned(world, "cd").tasks)
    assert few <= 100 < positions
    cut_after_shards(world, out, monkeypatch)
    world.pack(out, "cd", append=True)
    assert contents(out) == world.bytes


def planned(world, names):
    scenes = [str(world.scenes[name]) for name in names]
    options = config.load(PackOptions, None, KEYS)
    return make_plan(scenes, [str(world.west), str(world.east)], "worldcover", options)


def test_a_scene_that_could_not_be_read_and_then_can(world, tmp_path, monkeypatch):
    """Shards of the first run hold other tiles than those of the same numbers in the second."""
    find, gather_one, made = sampling.stretch_limits, gather.gather, []

    def broken(scene, *more):
        if scene.scene_id == "a":
            raise RasterError(f"{scene.path}: the network is away")
        return find(scene, *more)

    def cut(job):
        if made:
            raise PowerCut
        made.append(job)
        return gather_one(job)

    with monkeypatch.context() as patch:
        patch.setattr(sampling, "stretch_limits", broken)
        patch.setattr(sampling, "shares_of", lambda *_: 1)
        patch.setattr(gather, "gather", cut)
        with pytest.raises(PowerCut):
            world.pack(tmp_path / "out", "abc", "max_bad_fraction=0.5", "stretch.mode=joint")
    world.pack(tmp_path / "out", "abc", "max_bad_fraction=0.5", "stretch.mode=joint")
    world.pack(tmp_path / "plain", "abc", "max_bad_fraction=0.5", "stretch.mode=joint")
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")


def test_an_earlier_manifest_is_verified_by_itself(world):
    assert verify_records.verify(world.grown / "manifest-v1.json", 1)[0] == []


def test_an_unfinished_append_of_other_scenes_is_refused(world, out, monkeypatch):
    cut_after_shards(world, out, monkeypatch)
    before = contents(out)
    with pytest.raises(PlanError, match=r"(?s)unfinished --append.*scenes\.d: .* -> None.*give it up: remove") as error:
        world.pack(out, "abc", append=True)
    assert "that folder" not in str(error.value)
    assert contents(out) == before
    world.pack(out, "abcd", append=True)
    assert contents(out) == world.bytes


def test_shards_that_nobody_speaks_of_are_still_refused(world, out, monkeypatch):
    cut_after_shards(world, out, monkeypatch)
    shutil.copy(out / "train-00000.tfrecord", out / "extra.tfrecord")
    with pytest.raises(RecordError, match=r"extra\.tfrecord: a shard that the manifest does not list"):
        Dataset.open(out)
    (out / "extra.tfrecord").unlink()
    Dataset.open(out)
    shutil.rmtree(out / ".work")  # now nothing says that more is being made
    with pytest.raises(RecordError, match="a shard that the manifest does not list"):
        Dataset.open(out)


def test_the_smaller_dataset_can_be_opened_from_the_larger_folder(world):
    """A reader that took the old manifest just before the new one came."""
    manifests.check_folder(world.grown, parts(world.first))


def test_training_goes_on_with_the_smaller_dataset(world):
    """Its hash is the one that a run began with; the larger one is another dataset, and the message says what to do."""
    small, large = Dataset.open(world.grown / "manifest-v1.json"), Dataset.open(world.grown)
    first = Dataset.open(world.first)
    assert manifests.dump_manifest(small.manifest) == manifests.dump_manifest(first.manifest)
    assert (small.train.records, small.val.records) == (first.train.records, first.val.records)
    assert small.train.records < large.train.records
    where = "out/run"
    with pytest.raises(ConfigError, match=r"data\.dataset.*(?s:.)*manifest-v1\.json"):
        check_identity({"data": {"dataset": "a"}}, {"data": {"dataset": "b"}}, where)
