"""--dry-run: what packing would come to, near enough, from a few tiles, and nothing written."""

import re

import numpy as np
import pytest

from geokr import config
from geokr.manifests import load_manifest
from preprocess import estimate, sampling
from preprocess.options import PackOptions
from preprocess.plan import make_plan
from tests.scenes import command, contents, noise, patches, write_raster

KEYS = ("tile.size=32", "tile.step=24", "split.block_m=3000", "split.val_fraction=0.3", "workers=0")


def make_scenes(folder, count, height=260, width=300):
    scenes = []
    for n in range(count):
        pixels = noise(n, (3, height, width))
        pixels[:, : height // 3] = 3  # a third is dark
        place = (10, 0, 500_000 + 4000 * n, 0, -10, 5_400_000)
        scenes.append(write_raster(folder / f"s{n:04}.tif", pixels, place))
    size = (130, (400 * count + 300) // 3)
    cover = write_raster(folder / "cover.tif", patches(2, *size, [10, 30, 80]), (30, 0, 499_000, 0, -30, 5_402_000))
    return scenes, [cover], "worldcover"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_scenes(tmp_path_factory.mktemp("dry"), 6)


def plan_of(inputs, *keys):
    scenes, covers, product = inputs
    last = {key.split("=")[0]: key for key in (*KEYS, *keys)}
    options = config.load(PackOptions, None, list(last.values()))
    return make_plan([str(path) for path in scenes], [str(path) for path in covers], product, options)


@pytest.mark.parametrize("small", [0, 1 << 22], ids=["from windows", "as packing does"])
def test_it_says_about_what_packing_then_does(inputs, tmp_path, capsys, monkeypatch, small):
    monkeypatch.setattr(estimate, "PARTS", 96)
    monkeypatch.setattr(estimate, "SMALL", small)
    out = tmp_path / "out"
    assert command(*inputs, out, *KEYS, "--dry-run") == 0
    assert not out.exists()
    said = capsys.readouterr().out
    assert "nothing was written" in said
    plan = plan_of(inputs)
    found = estimate.sample(plan)
    guess = estimate.estimate(plan, found)
    assert found.tiles == found.kept + sum(found.rejected.values())
    assert command(*inputs, out, *KEYS) == 0
    manifest = load_manifest(out)
    assert f"{manifest.counts['positions']:,}" in said
    assert guess.kept == pytest.approx(manifest.counts["kept"], rel=0.3)
    size = sum(shard.bytes for part in (manifest.train, manifest.val) for shard in part.shards)
    assert guess.record_bytes == pytest.approx(size, rel=0.35)
    for reason in ("dark_share", "unlabelled"):
        expected = manifest.counts[f"rejected_{reason}"] / manifest.counts["positions"]
        assert found.rejected[reason] / found.tiles == pytest.approx(expected, abs=0.12), reason


def test_a_cloud_between_the_windows_makes_all_tiles_dark(tmp_path):
    """Its values become 255 in packing, and so in a dry run of a scene that is sampled as quickly."""
    pixels = 400 + noise(1, (3, 900, 900)).astype(np.uint16)
    pixels[:, 280:420, 260:420] = 9000
    scene = write_raster(tmp_path / "a.tif", pixels, (10, 0, 500_000, 0, -10, 5_400_000))
    cover = write_raster(tmp_path / "cover.tif", patches(2, 320, 320, [10, 30]), (30, 0, 499_900, 0, -30, 5_400_100))
    plan = plan_of(([scene], [cover], "worldcover"))
    limits = estimate._limits(plan, plan.tasks[0])
    assert limits[0, 1] == 9000
    np.testing.assert_array_equal(limits, sampling.stretch_limits(plan.tasks[0].scene, (1, 2, 3), plan.options))


@pytest.mark.parametrize("small", [9, 40])
def test_scenes_count_by_their_tiles(tmp_path, small):
    """A large bright scene among small dark ones that hold few of the tiles, and more of them than are looked at."""
    place = (10, 0, 500_000, 0, -10, 5_400_000)
    scenes = [write_raster(tmp_path / "large.tif", noise(1, (3, 600, 800)), place)]
    dark = np.full((3, 32, 32), 3, np.uint8)
    scenes += [write_raster(tmp_path / f"dark{n}.tif", dark, place) for n in range(small)]
    codes = patches(2, 300, 330, [10, 30, 80])
    cover = write_raster(tmp_path / "cover.tif", codes, (30, 0, 499_000, 0, -30, 5_402_000))
    keys = ("split.val_fraction=0", "tile.codec=raw", "stretch.mode=none")
    plan = plan_of((scenes, [cover], "worldcover"), *keys)
    found = estimate.sample(plan)
    guess = estimate.estimate(plan, found)
    assert guess is not None
    kept = plan.tiles - small
    assert guess.kept == pytest.approx(kept, rel=0.02 if small == 9 else 0.1)
    assert guess.record_bytes == pytest.approx(guess.kept * found.bytes / found.kept, rel=0.01)
    assert found.rejected.get("dark", 0) == found.tiles - found.kept
    assert f"{guess.kept:,.0f}" in estimate.describe(plan, tmp_path / "out", found)
    assert found.scenes <= estimate.SCENES


def test_the_same_every_time(inputs):
    first, second = estimate.sample(plan_of(inputs)), estimate.sample(plan_of(inputs))
    for name in ("scenes", "tiles", "kept", "held_out", "bytes", "rejected"):
        assert getattr(first, name) == getattr(second, name)


def test_a_thousand_scenes_take_as_many_looks_as_sixteen(inputs, monkeypatch):
    """The work is bounded by what it looks at, not by what there is."""
    plan = plan_of(inputs)
    tasks = tuple(
        estimate.SceneTask(
            **{name: getattr(task, name) for name in task.__dataclass_fields__ if name != "scene"},
            scene=type(task.scene)(**{
                name: getattr(task.scene, name) if name != "scene_id" else f"{task.scene.scene_id}-{n}"
                for name in task.scene.__dataclass_fields__
            }),
        )
        for n in range(200) for task in plan.tasks
    )  # fmt: skip
    many = type(plan)(
        **{name: getattr(plan, name) for name in plan.__dataclass_fields__ if name != "tasks"}, tasks=tasks
    )
    looks = []
    real = estimate.scan.scan_chunk
    monkeypatch.setattr(estimate.scan, "scan_chunk", lambda job: looks.append(job.scene.scene_id) or real(job))
    found = estimate.sample(many)
    assert found.scenes == estimate.SCENES
    assert len(looks) <= estimate.PARTS + 1


def test_a_damaged_scene_and_missing_land_cover_are_said(inputs, tmp_path, capsys):
    scenes, covers, product = inputs
    far = write_raster(tmp_path / "far.tif", noise(9, (3, 64, 64)), (10, 0, 700_000, 0, -10, 4_000_000))
    whole = scenes[0].read_bytes()
    cut = tmp_path / "cut.tif"
    cut.write_bytes(whole[: len(whole) // 8])
    assert command([*scenes[:2], far, cut], covers, product, tmp_path / "out", *KEYS, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "no land cover under far" in said
    assert re.search(r"warning: .*cut\.tif", said)


def test_nothing_kept_is_said(inputs, tmp_path, capsys):
    keys = ("quality.min_contrast=300", "--dry-run")
    assert command(*inputs, tmp_path / "out", *KEYS, *keys) == 0
    assert "not one of the tiles" in capsys.readouterr().out


def test_it_looks_at_what_the_folder_holds_as_packing_does(inputs, tmp_path, capsys):
    """Nothing to do, scenes to be added, and every refusal, by the words and the status of packing."""
    scenes, covers, product = inputs
    out = tmp_path / "out"
    assert command(scenes[:2], covers, product, out, *KEYS) == 0
    before = contents(out)

    def both(given, folder, *more):
        """(status, output, errors) of a dry run and of packing, where packing changes nothing."""
        capsys.readouterr()
        found = []
        for how in (("--dry-run",), ()):
            status = command(given, covers, product, folder, *KEYS, *more, *how)
            found.append((status, *capsys.readouterr()))
        return found

    for more in ((), ("--append",)):
        dry, packed = both(scenes[:2], out, *more)
        assert dry[0] == packed[0] == 0
        line = f"{out}: already holds this dataset, nothing to do"
        assert dry[1].strip() == packed[1].splitlines()[0] == line
    (foreign := tmp_path / "foreign").mkdir()
    (foreign / "thesis.docx").touch()
    (a_file := tmp_path / "file").touch()
    for folder, *more in ((out, "seed=7"), (out, "seed=7", "--append"), (foreign,), (a_file,)):
        dry, packed = both(scenes[:2], folder, *more)
        assert dry[0] == packed[0] == 1
        assert dry[2] == packed[2]
        assert dry[1] == ""
    dry, packed = both(scenes[:3], out)
    assert dry[::2] == packed[::2]
    assert "--append adds the new scenes" in dry[2]
    assert command(scenes[:4], covers, product, out, *KEYS, "--append", "--dry-run") == 0
    said = capsys.readouterr().out
    assert re.search(r"holds [\d,]+ records of 2 scenes; what follows is of the new scenes alone", said)
    assert re.search(r"scenes +2\n", said)
    assert contents(out) == before


def test_columns_line_up(inputs, tmp_path, capsys):
    assert command(*inputs, tmp_path / "out", *KEYS, "--dry-run") == 0
    plan = capsys.readouterr().out.split("\n\n")[0].splitlines()
    rows = [line for line in plan if line.startswith("  ") and not line.startswith("    ")]
    assert len({len(line) for line in rows if re.search(r"\d$", line) and "classes" not in line}) == 1
    assert np.all([len(line) < 121 for line in plan])
