"""Tiles that are cut already: packed as they are, labelled by a map, by rasters or by JSON beside them."""

import json
import re
import shutil

import numpy as np
import pytest
import rasterio

from geokr import manifests
from preprocess import pack_records, precut, verify_records
from preprocess.image_codecs import decode_image
from tests.scenes import (
    NO_QUALITY,
    RAW,
    OtherWay,
    contents,
    noise,
    pack_quietly,
    patches,
    pixels_of,
    read_records,
    write_raster,
)

SIZE = 24
CODES = (10, 20, 30)
NAMES = {10: "tree_cover", 20: "shrubland", 30: "grassland"}
KEYS = (*NO_QUALITY, "split.val_fraction=0", "tile.codec=png", "workers=0")


def place(column, row):
    return (10.0, 0.0, 5e5 + 10 * column, 0.0, -10.0, 4e6 - 10 * row)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A scene, its map, and the scene's tiles as files: those a user cut with another tool."""
    root = tmp_path_factory.mktemp("precut")
    image, codes = noise(1, (3, 96, 120)), patches(2, 96, 120, CODES, side=5)
    write_raster(root / "scene.tif", image, place(0, 0))
    write_raster(root / "land.tif", codes, place(0, 0))
    for row in range(0, 96, SIZE):
        for column in range(0, 120, SIZE):
            part = slice(row, row + SIZE), slice(column, column + SIZE)
            name = f"{row // SIZE}/tile_{column:03d}"
            write_raster(root / "tiles" / f"{name}.tif", image[:, *part], place(column, row))
            write_raster(root / "rasters" / f"{name}.tif", codes[part], place(column, row))
            counts = {str(code): int((codes[part] == code).sum()) for code in CODES}
            for folder, values in (("counts", counts), ("shares", {k: v / SIZE**2 for k, v in counts.items()})):
                path = root / folder / f"{name}.json"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(values))
    return root


def command(tiles, out, *arguments):
    return pack_records.main(["--tiles", str(tiles), "--product", "worldcover", "--out", str(out), *arguments])


def by_place(folder):
    return {record.transform: record for _, record in read_records(folder)}


@pytest.fixture(scope="module")
def from_scene(world):
    keys = (*RAW, f"tile.size={SIZE}", f"tile.step={SIZE}")
    pack_quietly([world / "scene.tif"], [world / "land.tif"], "worldcover", world / "from_scene", *keys)
    return by_place(world / "from_scene")


@pytest.mark.parametrize("labels", ["land", "rasters", "counts", "shares"])
def test_tiles_are_the_scenes_own(labels, world, from_scene, tmp_path):
    """As if the scene had been packed: pixels, place and fractions."""
    how = ["--land-cover", str(world / "land.tif")] if labels == "land" else ["--labels", str(world / labels)]
    assert command(world / "tiles", tmp_path / "d", *how, *KEYS) == 0
    found = by_place(tmp_path / "d")
    assert found.keys() == from_scene.keys()
    assert len(found) == 20
    for where, record in found.items():
        same = from_scene[where]
        assert np.array_equal(decode_image(record, ""), pixels_of(same))
        np.testing.assert_allclose(record.fractions, same.fractions, atol=1e-6)
        assert record.valid_fraction == pytest.approx(1)
        assert record.scene_id == "tiles"
        column, row = round((where[2] - 5e5) / 10), round((4e6 - where[5]) / 10)
        assert record.tile_id == f"tiles/{row // SIZE}/tile_{column:03d}"
        np.testing.assert_allclose(record.lonlat, same.lonlat, rtol=1e-7)
    manifest = manifests.load_manifest(tmp_path / "d")
    assert manifest.tile.size == SIZE
    assert [(scene.scene_id, scene.kept) for scene in manifest.scenes] == [("tiles", 20)]
    assert manifest.counts["positions"] == manifest.counts["kept"] == 20
    assert verify_records.verify(tmp_path / "d", 1)[0] == []


def test_workers_and_interruptions_change_nothing(world, tmp_path, monkeypatch):
    monkeypatch.setattr(precut, "MAX_FILES", 3)
    how = ["--labels", str(world / "counts")]
    assert command(world / "tiles", tmp_path / "a", *how, *KEYS) == 0
    calls = []
    real = precut.open_tile

    def stops(folder, name, *rest):
        calls.append(name)
        if len(calls) > 30:  # 20 headers in planning, 20 for the limits
            raise KeyboardInterrupt
        return real(folder, name, *rest)

    monkeypatch.setattr(precut, "open_tile", stops)
    assert command(world / "tiles", tmp_path / "b", *how, *KEYS) == 130
    assert len(list((tmp_path / "b/.work").glob("run-*/spill/*.json"))) < 7
    monkeypatch.setattr(precut, "open_tile", real)
    assert command(world / "tiles", tmp_path / "b", *how, *KEYS[:-1], "workers=1") == 0
    monkeypatch.setattr(precut, "MAX_FILES", 256)
    assert command(world / "tiles", tmp_path / "c", *how, *KEYS) == 0
    a, b, c = (
        {name: data for name, data in contents(tmp_path / folder).items() if not name.endswith(".parquet")}
        for folder in "abc"
    )
    assert a == b == c
    before = contents(tmp_path / "a")
    assert command(world / "tiles", tmp_path / "a", *how, *KEYS) == 0
    assert contents(tmp_path / "a") == before


def test_another_folder_over_the_same_dataset_is_refused(world, tmp_path, capsys):
    how = ["--labels", str(world / "counts")]
    assert command(world / "tiles", tmp_path / "d", *how, *KEYS) == 0
    for row in range(4):
        for path in sorted((world / "tiles" / str(row)).glob("*.tif")):
            (tmp_path / "tiles" / str(row)).mkdir(parents=True, exist_ok=True)
            (tmp_path / "tiles" / str(row) / path.name).write_bytes(path.read_bytes())
    assert command(tmp_path / "tiles", tmp_path / "d", *how, *KEYS) == 0  # the same tiles elsewhere
    path = tmp_path / "tiles/0/tile_024.tif"
    with rasterio.open(path, "r+") as file:
        file.write(255 - file.read())
    assert command(tmp_path / "tiles", tmp_path / "d", *how, *KEYS) == 1
    assert "scenes.tiles" in capsys.readouterr().err


def test_another_folder_is_added(world, tmp_path, capsys):
    """Tiles of equal names in folders of different names."""
    for name, row in (("north", 0), ("south", 4000)):
        for column in range(5):
            pixels = noise(row + column, (3, SIZE, SIZE))
            write_raster(tmp_path / name / f"t{column}.tif", pixels, place(column * SIZE, row))
            (tmp_path / name / f"t{column}.json").write_text(json.dumps({"10": 1, "20": column}))
    for name in ("north", "south"):
        assert command(tmp_path / name, tmp_path / "d", "--labels", str(tmp_path / name), *KEYS, "--append") == 0
    found = {record.tile_id for _, record in read_records(tmp_path / "d")}
    assert found == {f"{name}/t{column}" for name in ("north", "south") for column in range(5)}
    assert [scene.scene_id for scene in manifests.load_manifest(tmp_path / "d").scenes] == ["north", "south"]
    assert verify_records.verify(tmp_path / "d", 1)[0] == []


def test_a_folder_that_has_grown_is_not_packed_twice(tmp_path, capsys):
    for column in range(3):
        write_raster(tmp_path / "north" / f"t{column}.tif", noise(column, (3, SIZE, SIZE)), place(column * SIZE, 0))
        (tmp_path / "north" / f"t{column}.json").write_text(json.dumps({"10": 1}))
    again = (tmp_path / "north", tmp_path / "d", "--labels", str(tmp_path / "north"), *KEYS, "--append")
    assert command(*again) == command(*again) == 0
    before = contents(tmp_path / "d")
    write_raster(tmp_path / "north" / "t9.tif", noise(9, (3, SIZE, SIZE)), place(9 * SIZE, 0))
    (tmp_path / "north" / "t9.json").write_text(json.dumps({"20": 1}))
    assert command(*again) == 1
    assert "put the new tiles alone into a folder of another name" in capsys.readouterr().err
    assert contents(tmp_path / "d") == before


def test_labels_on_other_grids_and_a_rotated_tile(tmp_path):
    """Label rasters of another resolution and CRS, against every sub-pixel by itself."""
    turned = (8.0, 3.0, 5e5, 3.0, -8.0, 4e6)
    write_raster(tmp_path / "tiles/a.tif", noise(3, (3, SIZE, SIZE)), turned)
    codes = patches(4, 60, 80, CODES, side=4)
    write_raster(tmp_path / "labels/a.tif", codes, (0.0001, 0.0, 2.9995, 0.0, -0.0001, 36.1475), "EPSG:4326")
    assert command(tmp_path / "tiles", tmp_path / "d", "--labels", str(tmp_path / "labels"), *KEYS) == 0
    ((_, record),) = read_records(tmp_path / "d")
    assert np.allclose(record.transform, turned)
    names = [entry.name for entry in manifests.load_manifest(tmp_path / "d").classes]
    other = OtherWay("worldcover", [tmp_path / "labels/a.tif"])
    expected, share = other.fractions(names, turned, record.crs, SIZE, 1, 1, np.ones((SIZE, SIZE), bool))
    np.testing.assert_allclose(record.fractions, expected, atol=1e-6)
    assert record.valid_fraction == pytest.approx(share, abs=1e-6)
    assert share > 0.5


def test_json_by_names_and_what_does_not_count(tmp_path):
    """Names of classes for keys; dropped classes leave the denominator, nodata lowers the valid share."""
    write_raster(tmp_path / "tiles/a.tif", noise(3, (3, SIZE, SIZE)), place(0, 0))
    (tmp_path / "tiles/a.json").write_text(json.dumps({"tree_cover": 30, "20": 10, "30.0": 40, "0": 20}))
    keys = (*KEYS, "labels.drop=[grassland]", "labels.min_valid_fraction=0.3")
    assert command(tmp_path / "tiles", tmp_path / "d", "--labels", str(tmp_path / "tiles"), *keys) == 0
    ((_, record),) = read_records(tmp_path / "d")
    names = [entry.name for entry in manifests.load_manifest(tmp_path / "d").classes]
    found = dict(zip(names, record.fractions.tolist(), strict=True))
    assert found["tree_cover"] == pytest.approx(0.75)
    assert found["shrubland"] == pytest.approx(0.25)
    assert record.valid_fraction == pytest.approx(0.4)
    keys = (*KEYS, "labels.drop=[grassland]")
    assert command(tmp_path / "tiles", tmp_path / "e", "--labels", str(tmp_path / "tiles"), *keys) == 1


@pytest.mark.parametrize("labels", ["rasters", "counts"])
def test_the_year_of_labels_that_tiles_bring(labels, world, tmp_path):
    name = "tile_20200701.tif"
    write_raster(tmp_path / "tiles" / name, noise(3, (3, SIZE, SIZE)), place(0, 0))
    source = next((world / labels / "0").glob("tile_000.*"))
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / name).with_suffix(source.suffix).write_bytes(source.read_bytes())
    how = ["--labels", str(tmp_path / "labels"), *KEYS]
    for year, gap in ((2011, 9), (None, None)):
        keys = () if year is None else (f"labels.year={year}",)
        assert command(tmp_path / "tiles", tmp_path / str(year), *how, *keys) == 0
        ((_, record),) = read_records(tmp_path / str(year))
        assert record.date == "2020-07-01"
        assert record.label_gap_years == (gap if gap is None else pytest.approx(gap, abs=0.01))
        years = manifests.load_manifest(tmp_path / str(year)).land_cover_years
        assert years == (() if year is None else (year,))


def test_masks_of_tiles(world, tmp_path, capsys):
    """From a folder of their own; other masks make another dataset."""
    for path in sorted((world / "tiles/0").glob("*.tif")):
        (tmp_path / "tiles").mkdir(exist_ok=True)
        (tmp_path / "tiles" / path.name).write_bytes(path.read_bytes())
    for n in range(5):
        for folder, masked in (("clouds", n in (1, 3)), ("others", n == 2)):
            mask = np.full((SIZE, SIZE), int(masked), np.uint8)
            write_raster(tmp_path / folder / f"tile_{n * SIZE:03d}.tif", mask, place(n * SIZE, 0))
    how = ["--land-cover", str(world / "land.tif"), *KEYS, "mask.kind=values", "mask.reject=[1]"]
    clouds = "mask.pattern=../clouds/{stem}.tif"
    assert command(tmp_path / "tiles", tmp_path / "d", *how, clouds) == 0
    assert {record.tile_id for _, record in read_records(tmp_path / "d")} == {
        f"tiles/tile_{n}" for n in ("000", "048", "096")
    }
    assert manifests.load_manifest(tmp_path / "d").counts["rejected_cloud"] == 2
    assert command(tmp_path / "tiles", tmp_path / "d", *how, clouds) == 0
    capsys.readouterr()
    assert command(tmp_path / "tiles", tmp_path / "d", *how, "mask.pattern=../others/{stem}.tif") == 1
    assert "scenes.tiles" in capsys.readouterr().err


def test_masks_of_tiles_in_subfolders(world, tmp_path, capsys):
    """One tree of masks beside the tree of tiles, in which names come again in every subfolder."""
    for row in range(4):
        for n in range(5):
            mask = np.full((SIZE, SIZE), int(n == row), np.uint8)
            write_raster(tmp_path / f"clouds/{row}/tile_{n * SIZE:03d}.tif", mask, place(n * SIZE, row * SIZE))
    shutil.copytree(world / "tiles", tmp_path / "tiles")
    how = ["--land-cover", str(world / "land.tif"), *KEYS, "mask.kind=values", "mask.reject=[1]"]
    pattern = "mask.pattern=../clouds/{path}.tif"
    assert command(tmp_path / "tiles", tmp_path / "d", *how, pattern) == 0
    every = {f"tiles/{row}/tile_{n * SIZE:03d}" for row in range(4) for n in range(5) if n != row}
    assert {record.tile_id for _, record in read_records(tmp_path / "d")} == every
    scene = ["--scenes", str(world / "scene.tif"), "--product", "worldcover", "--out", str(tmp_path / "e")]
    assert pack_records.main([*scene, *how, pattern]) == 1
    assert "{path} is the place of a tile of --tiles" in capsys.readouterr().err


def test_sixteen_bits_are_stretched_over_all_tiles(world, tmp_path):
    """One pair of limits for the whole folder, and none for those that stay as they are."""
    for n in range(3):
        pixels = noise(n, (4, SIZE, SIZE), "uint16", 1000 * n + 1, 1000 * n + 900)
        write_raster(tmp_path / f"tiles/t{n}.tif", pixels, place(SIZE * n, 0))
    land = ["--land-cover", str(world / "land.tif")]
    keys = (*NO_QUALITY, "split.val_fraction=0", "workers=0")
    assert command(tmp_path / "tiles", tmp_path / "kept", *land, *keys, "stretch.mode=none", "tile.bands=null",
                   "tile.codec=lz4") == 0  # fmt: skip
    for _, record in read_records(tmp_path / "kept"):
        assert record.dtype == "uint16"
        with rasterio.open(tmp_path / f"{record.tile_id}.tif") as file:
            assert np.array_equal(decode_image(record, "").transpose(2, 0, 1), file.read())
    assert command(tmp_path / "tiles", tmp_path / "jpeg", *land, *keys, "tile.bands=[1,2,3]") == 0
    (scene,) = manifests.load_manifest(tmp_path / "jpeg").scenes
    ((low, high), *_) = scene.stretch_limits
    assert 1 <= low < 400
    assert 2500 < high < 2900
    means = {record.tile_id: decode_image(record, "").mean() for _, record in read_records(tmp_path / "jpeg")}
    assert means["tiles/t0"] < 60 < means["tiles/t1"] < 180 < means["tiles/t2"]


def test_the_rules_for_scenes_hold(world, tmp_path):
    """Dark tiles leave; the split is that of the ground, and tiles on both sides of it leave."""
    write_raster(tmp_path / "tiles/dark.tif", np.full((3, SIZE, SIZE), 3, np.uint8), place(0, 0))
    rng = np.random.default_rng(0)
    for n in range(40):
        at = rng.integers(0, 20_000, 2)
        write_raster(tmp_path / f"tiles/t{n:02d}.tif", noise(n, (3, SIZE, SIZE)), place(*at))
        (tmp_path / f"tiles/t{n:02d}.json").write_text('{"10": 1}')
    (tmp_path / "tiles/dark.json").write_text('{"10": 1}')
    keys = ("workers=0", "split.block_m=5000", "split.val_fraction=0.4")
    assert command(tmp_path / "tiles", tmp_path / "d", "--labels", str(tmp_path / "tiles"), *keys) == 0
    manifest = manifests.load_manifest(tmp_path / "d")
    assert manifest.counts["rejected_dark"] == 1
    assert manifest.train.records + manifest.val.records == manifest.counts["kept"]
    from preprocess import blocks, scan

    for split, record in read_records(tmp_path / "d"):
        from preprocess.grid import Grid
        from preprocess.place import AffinePlace

        ground = AffinePlace(Grid(SIZE, SIZE, record.transform), record.crs)
        lon, lat = scan.footprints(ground, np.zeros((1, 2), np.int64), SIZE)
        side = blocks.side_of(lon[0], lat[0], 5000, 0, 0.4)
        assert side == (blocks.TRAIN if split == "train" else blocks.VAL)


def test_bad_files_are_counted_or_stop_the_run(world, tmp_path, capsys):
    for path in sorted((world / "tiles").rglob("*.tif")):
        copied = tmp_path / "tiles" / f"{path.parent.name}_{path.name}"
        copied.parent.mkdir(exist_ok=True)
        copied.write_bytes(path.read_bytes())
    whole = (tmp_path / "tiles/1_tile_024.tif").read_bytes()
    (tmp_path / "tiles/1_tile_024.tif").write_bytes(whole[: len(whole) // 2])
    write_raster(tmp_path / "tiles/2_tile_024.tif", noise(1, (3, SIZE, SIZE)), place(0, 0), None)
    land = ["--land-cover", str(world / "land.tif")]
    assert command(tmp_path / "tiles", tmp_path / "d", *land, *KEYS) == 1
    assert "2_tile_024.tif: has no CRS" in capsys.readouterr().err
    assert command(tmp_path / "tiles", tmp_path / "e", *land, *KEYS, "max_bad_fraction=0.07") == 1
    error = capsys.readouterr().err
    assert re.search(r"2 of 20 tiles cannot be used \(max_bad_fraction=0.07\)", error)
    assert "1_tile_024.tif" in error
    assert command(tmp_path / "tiles", tmp_path / "f", *land, *KEYS, "max_bad_fraction=0.2") == 0
    manifest, error = manifests.load_manifest(tmp_path / "f"), capsys.readouterr().err
    assert (manifest.counts["rejected_unreadable"], manifest.counts["kept"]) == (2, 18)
    assert manifest.left_out == {"tiles/1_tile_024": "unreadable", "tiles/2_tile_024": "no_crs"}
    assert [scene.scene_id for scene in manifest.scenes] == ["tiles"]
    assert re.search(r"left out: tiles/1_tile_024: .*1_tile_024\.tif", error)
    assert "left out: tiles/2_tile_024: " in error


def test_of_many_bad_files_the_first_are_named(world, tmp_path, capsys):
    """The same ones for any number of workers and in any order of tasks."""
    sound = (world / "tiles/0/tile_000.tif").read_bytes()
    for n in range(30):
        path = tmp_path / f"tiles/t{n:02d}.tif"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(sound if n < 5 else sound[:-400])
    land = ["--land-cover", str(world / "land.tif")]
    assert command(tmp_path / "tiles", tmp_path / "d", *land, *KEYS, "max_bad_fraction=0.9") == 0
    assert list(manifests.load_manifest(tmp_path / "d").left_out) == [f"tiles/t{n:02d}" for n in range(5, 25)]
    assert capsys.readouterr().err.count("left out: tiles/") == 20


def test_tiles_that_differ_are_counted_by_form(world, tmp_path, capsys, monkeypatch):
    for n in range(6):
        write_raster(tmp_path / f"tiles/t{n}.tif", noise(n, (3, SIZE, SIZE + 8 * (n == 4))), place(0, 0))
    land = ["--land-cover", str(world / "land.tif")]
    assert command(tmp_path / "tiles", tmp_path / "d", *land, *KEYS) == 1
    error = capsys.readouterr().err
    assert "5 of 24 x 24 pixels, 3 bands of uint8; 1 of 32 x 24 pixels" in error
    assert "t4.tif" in error
    monkeypatch.setattr(precut.spread, "__defaults__", (2,))  # planning sees two of them; the worker finds the odd one
    assert command(tmp_path / "tiles", tmp_path / "e", *land, *KEYS) == 1
    assert "t4.tif: 32 x 24 pixels" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot be read as JSON"),
        ("[1, 2]", "expected an object of class codes and counts, got list"),
        ('{"10": "many"}', "key '10': expected a count or a share"),
        ('{"10": -1}', "key '10': expected"),
        ('{"10": NaN}', "key '10': expected"),
        ('{"10": true}', "key '10': expected"),
        ('{"10": 1' + "0" * 400 + "}", "key '10': expected"),
        ('{"10": 1e307}', "key '10': expected"),
        ('{"77": 3}', "key '77': the product 'worldcover' has no such class"),
        ('{"lava": 3}', "key 'lava': is neither a class code nor a class of tree_cover"),
        ('{"1e99": 3}', "key '1e99': is neither"),
    ],
)
def test_json_that_is_no_histogram(content, said, tmp_path, capsys):
    write_raster(tmp_path / "tiles/a.tif", noise(3, (3, SIZE, SIZE)), place(0, 0))
    (tmp_path / "tiles/a.json").write_text(content)
    assert command(tmp_path / "tiles", tmp_path / "d", "--labels", str(tmp_path / "tiles"), *KEYS) == 1
    error = capsys.readouterr().err
    assert "a.json" in error
    assert said in error


def test_folders_and_arguments_that_do_not_go_together(world, tmp_path, capsys):
    def refused(said, *arguments):
        assert pack_records.main([*arguments, "--product", "worldcover", "--out", str(tmp_path / "d"), *KEYS]) == 1
        assert re.search(said, capsys.readouterr().err, re.DOTALL)

    tiles, land = str(world / "tiles"), str(world / "land.tif")
    refused("give --scenes .* or --tiles", "--land-cover", land)
    refused("give --scenes .* or --tiles", "--tiles", tiles, "--scenes", land, "--land-cover", land)
    refused("--labels go with --tiles", "--scenes", land, "--labels", tiles)
    refused("give --land-cover", "--tiles", tiles)
    refused("one of the two", "--tiles", tiles, "--land-cover", land, "--labels", tiles)
    refused("there is no such folder", "--tiles", str(tmp_path / "none"), "--land-cover", land)
    refused(r"holds no \.tif", "--tiles", str(world / "counts"), "--land-cover", land)
    refused("holds the tiles themselves", "--tiles", tiles, "--labels", tiles)
    refused("tile.size=256: the tiles have 24 pixels", "--tiles", tiles, "--land-cover", land, "tile.size=256")
    write_raster(tmp_path / "few/0/tile_000.tif", patches(1, SIZE, SIZE, CODES), place(0, 0))
    refused(r"19 of 20 tiles have no label file \(raster\).*0/tile_024\.tif", "--tiles", tiles, "--labels",
            str(tmp_path / "few"))  # fmt: skip
    for ending in ("tif", "tiff"):
        write_raster(tmp_path / f"twice/a.{ending}", patches(1, SIZE, SIZE, CODES), place(0, 0))
    refused("a.tif and a.tiff are both for the tile a", "--tiles", tiles, "--labels", str(tmp_path / "twice"))
    wide = write_raster(tmp_path / "wide/a.tif", noise(1, (3, SIZE, 2 * SIZE)), place(0, 0))
    refused("tiles must be square", "--tiles", str(wide.parent), "--land-cover", land)
    refused("none of .*overlap|not one usable tile: 1 unlabelled", "--tiles", str(_far(tmp_path)), "--land-cover", land)


def _far(tmp_path):
    return write_raster(tmp_path / "far/a.tif", noise(1, (3, SIZE, SIZE)), (10.0, 0.0, 7e5, 0.0, -10.0, 2e6)).parent


def test_report_and_dry_run(world, tmp_path, capsys):
    """Dark tiles are shown by name; a dry run looks at some files and writes nothing."""
    dark = tmp_path / "tiles"
    for number in range(12):
        pixels = noise(number, (3, SIZE, SIZE)) if number % 3 else np.full((3, SIZE, SIZE), 2, np.uint8)
        write_raster(dark / f"t{number:02d}.tif", pixels, place(number % 5 * SIZE, number // 5 * SIZE))
    arguments = ("--land-cover", str(world / "land.tif"), "split.val_fraction=0", "workers=0", "tile.codec=png")
    assert command(dark, tmp_path / "out", *arguments, "--dry-run") == 0
    assert not (tmp_path / "out").exists()
    said = capsys.readouterr().out
    assert re.search(r"rejected: dark +\d", said)
    assert re.search(r"tile positions +12\n", said)
    assert command(dark, tmp_path / "out", *arguments) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert re.search(r'title="[^"]*t0[0369]"', page)
