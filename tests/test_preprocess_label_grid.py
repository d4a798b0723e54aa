"""Fractions by squares of a tile: where the classes lie, against each pixel by itself."""

import json
from dataclasses import replace

import numpy as np
import pytest

from geokr import manifests, records
from geokr.records import RecordError
from preprocess import pack_records, shards, verify_records
from preprocess.cells import Cells
from preprocess.grid import Chunk
from preprocess.inputs import PlanError
from tests.datasets import make_dataset
from tests.scenes import (
    RAW,
    OtherWay,
    command,
    contents,
    noise,
    pack_quietly,
    patches,
    read_records,
    shares,
    write_raster,
)

PLACE = (30, 0, 4e5, 0, -30, 5.2e6)
COVER = (10, 0, 399_996, 0, -10, 5_200_007)
KEYS = (*RAW[:-1], "tile.size=32", "tile.step=23")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    pixels = noise(1, (3, 120, 150))
    pixels[:, 20:50, 30:61] = 0
    scene = write_raster(folder / "a.tif", pixels, PLACE, nodata=0)
    codes = patches(3, 380, 470, [0, 10, 20, 30, 50, 80], 7)
    return scene, write_raster(folder / "cover.tif", codes, COVER), pixels


def pack(world, out, *more):
    return pack_quietly(
        [world[0]], [world[1]], "worldcover", out, *KEYS, "workers=0", "quality.min_valid_pixels=0", *more
    ).manifest


@pytest.mark.parametrize("side", [4, 8])
def test_squares_against_every_pixel(world, tmp_path, side):
    manifest = pack(world, tmp_path / "d", f"labels.grid={side}")
    assert manifest.tile.grid == side
    names = [entry.name for entry in manifest.classes]
    other, seen = OtherWay("worldcover", [world[1]]), 0
    for _, record in list(read_records(tmp_path / "d"))[::3]:
        labels = other.labels(record.transform, record.crs, 32, 3, 3)
        column, row = map(int, record.tile_id.rsplit(":", 2)[1:])
        valid = world[2][0, row : row + 32, column : column + 32] > 0
        labels[~np.repeat(np.repeat(valid, 3, 0), 3, 1)] = None
        whole, _ = shares(names, labels, labels.size)
        np.testing.assert_allclose(record.fractions, whole, atol=1e-6)
        counted = sum(np.sum(labels == name) for name in names)
        each = len(labels) // side
        assert record.grid.shape == (side, side, len(names))
        for y in range(side):
            for x in range(side):
                part = labels[y * each : (y + 1) * each, x * each : (x + 1) * each]
                expected = [np.sum(part == name) / counted for name in names]
                np.testing.assert_allclose(record.grid[y, x], expected, atol=1e-6)
        np.testing.assert_allclose(record.grid.sum((0, 1)), record.fractions, atol=1e-5)
        seen += 1
    assert seen > 5
    assert verify_records.main([str(tmp_path / "d")]) == 0


def test_nothing_else_of_a_dataset_changes(world, tmp_path):
    """Without a grid, bytes are those of datasets that know none; with one, everything else is the same."""
    plain, squared = pack(world, tmp_path / "plain"), pack(world, tmp_path / "squared", "labels.grid=4")
    tree = json.loads((tmp_path / "plain/manifest.json").read_text())
    assert "grid" not in {*tree["tile"], *tree["config"]["labels"]}
    assert plain.train.prior == squared.train.prior
    first, second = (dict(read_records_by_id(tmp_path / name)) for name in ("plain", "squared"))
    assert first.keys() == second.keys()
    for name, record in second.items():
        assert first[name].grid is None
        assert records.encode_record(replace(record, grid=None)) == records.encode_record(first[name])


def read_records_by_id(folder):
    return ((record.tile_id, record) for _, record in read_records(folder))


def test_any_number_of_workers_and_further_products(world, tmp_path):
    extra = ["--also", "second", str(world[1]), "labels.also={second: {product: worldcover, drop: [grassland]}}"]
    for name, workers in (("a", 0), ("b", 2)):
        keys = (*KEYS, "quality.min_valid_pixels=0", "labels.grid=4", f"workers={workers}")
        assert command([world[0]], [world[1]], "worldcover", tmp_path / name, *extra, *keys) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    for _, record in read_records(tmp_path / "a"):
        also = record.also["second"]
        assert also.grid.shape == (4, 4, len(also.fractions))
        np.testing.assert_allclose(also.grid.sum((0, 1)), also.fractions, atol=1e-5)


def test_probabilities_have_squares_too(world, tmp_path):
    values = np.random.default_rng(0).dirichlet(np.ones(9), (125, 155)).transpose(2, 0, 1).astype(np.float32)
    names = (
        "water",
        "trees",
        "grass",
        "flooded_vegetation",
        "crops",
        "shrub_and_scrub",
        "built",
        "bare",
        "snow_and_ice",
    )
    sheet = write_raster(tmp_path / "p.tif", values, PLACE, names=names)
    keys = (*KEYS, "workers=0", "quality.min_valid_pixels=0")
    pack_quietly([world[0]], [sheet], "dynamicworld", tmp_path / "d", *keys, "labels.grid=4")
    pack_quietly([world[0]], [sheet], "dynamicworld", tmp_path / "plain", *keys)
    plain, found = dict(read_records_by_id(tmp_path / "plain")), 0
    for name, record in read_records_by_id(tmp_path / "d"):
        np.testing.assert_allclose(record.fractions, plain[name].fractions, atol=1e-6)
        column, row = map(int, name.rsplit(":", 2)[1:])
        valid = (world[2][0, row : row + 32, column : column + 32] > 0)[None]
        tile = values[:, row : row + 32, column : column + 32] * valid
        expected = tile.reshape(9, 4, 8, 4, 8).sum((2, 4)).transpose(1, 2, 0) / tile.sum()
        np.testing.assert_allclose(record.grid, expected, atol=1e-5)
        found += 1
    assert found > 5


@pytest.mark.parametrize("kind", [np.int64, np.float64])
@pytest.mark.parametrize("starts", [(0, 23, 46, 61), (5,), (0, 32, 64), (0, 4, 8, 12)])
def test_squares_of_overlapping_tiles(starts, kind):
    """Counted one by one, for tiles that overlap by any number of pixels."""
    chunk = Chunk(starts, starts[:2], 32)
    cells = Cells.of(chunk)
    values = np.random.default_rng(0).integers(0, 50, (chunk.window[3], chunk.window[2])).astype(kind)
    for parts in (1, 2, 8, 32):
        parted, side = cells.parted(32, parts), 32 // parts
        counted = parted.cells.zeros(1, kind)
        for y, (top, bottom) in enumerate(parted.cells.down.spans):
            for x, (left, right) in enumerate(parted.cells.across.spans):
                counted[y, x, 0] = values[top:bottom, left:right].sum()
        found = parted.tiles(counted)
        for t, (left, top) in enumerate(chunk.origins() - (starts[0], starts[0])):
            tile = values[top : top + 32, left : left + 32]
            np.testing.assert_allclose(found[t, :, :, 0], tile.reshape(parts, side, parts, side).sum((1, 3)))


# ---------------------------------------------------------------------------------------------------- bad input


def test_a_grid_that_does_not_divide_the_tile(world, tmp_path, capsys):
    assert command([world[0]], [world[1]], "worldcover", tmp_path / "d", *KEYS, "labels.grid=5") == 1
    assert "labels.grid=5 does not divide tiles of 32 pixels" in capsys.readouterr().err


def test_cut_tiles_have_squares_of_their_own_size(world, tmp_path, capsys):
    """Whose side nobody has to say; sheets, or rasters of labels beside them."""
    (tmp_path / "tiles").mkdir()
    for n in range(3):
        place = (30, 0, 4e5 + 30 * 40 * n, 0, -30, 5.2e6 - 30 * 60)
        write_raster(tmp_path / f"tiles/t{n}.tif", noise(n, (3, 40, 40)), place)
    keys = [key for key in KEYS if not key.startswith("tile.s")]
    given = ["--tiles", str(tmp_path / "tiles"), "--land-cover", str(world[1]), "--product", "worldcover"]
    assert pack_records.main([*given, "--out", str(tmp_path / "d"), *keys, "labels.grid=8", "workers=0"]) == 0
    names = [entry.name for entry in manifests.load_manifest(tmp_path / "d").classes]
    other = OtherWay("worldcover", [world[1]])
    for _, record in read_records(tmp_path / "d"):
        labels = other.labels(record.transform, record.crs, 40, 3, 3)
        whole, _ = shares(names, labels, labels.size)
        np.testing.assert_allclose(record.fractions, whole, atol=1e-6)
        assert record.grid.shape == (8, 8, len(names))
    assert pack_records.main([*given, "--out", str(tmp_path / "e"), *keys, "labels.grid=16", "workers=0"]) == 1
    assert "labels.grid=16 does not divide tiles of 40 pixels into squares of whole pixels: use 2, 4, 5, 8, 10" in (
        capsys.readouterr().err
    )


def test_histograms_say_nothing_of_places(tmp_path):
    from preprocess.options import PackOptions
    from preprocess.plan import make_tile_plan

    for folder in ("tiles", "labels"):
        (tmp_path / folder).mkdir()
    write_raster(tmp_path / "tiles/a.tif", noise(3, (3, 32, 32)), PLACE)
    (tmp_path / "labels/a.json").write_text('{"10": 1}')
    options = PackOptions.model_validate({"tile": {"size": 32, "step": 32}, "labels": {"grid": 4}})
    with pytest.raises(PlanError, match="do not say where in a tile"):
        make_tile_plan(str(tmp_path / "tiles"), str(tmp_path / "labels"), [], "worldcover", options)


def test_squares_that_do_not_add_up(tmp_path):
    record = next(record for _, record in read_records(make_dataset(tmp_path / "d", tiles=4, val=1, grid=4)))
    wrong = record.grid.copy()
    wrong[0, 0] = wrong[0, 0, ::-1] + 0.01
    for grid in (wrong, -record.grid, record.grid * np.nan):
        with pytest.raises(RecordError, match="fractions_grid"):
            records.decode_record(records.encode_record(replace(record, grid=grid)))
    half = records.encode_record(replace(record, grid=record.grid.reshape(-1, 1, record.grid.shape[2])[:7]))
    with pytest.raises(RecordError, match="not a geokr record"):
        records.decode_record(half)


def test_a_manifest_that_says_otherwise(tmp_path, capsys):
    folder = make_dataset(tmp_path / "d", tiles=4, val=1, grid=4)
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"grid": 4', '"grid": 8'))
    assert verify_records.main([str(folder)]) == 1
    assert "fractions by [4] squares a side, the manifest says 8" in capsys.readouterr().err


def test_other_readers_find_the_feature(tmp_path):
    import tfrecord

    folder = make_dataset(tmp_path / "d", tiles=4, val=1, grid=4)
    loader = tfrecord.tfrecord_loader(str(folder / "train-00000.tfrecord"), None, {"fractions_grid": "float"})
    ours = [records.decode_record(payload) for _, payload in shards.read_frames(folder / "train-00000.tfrecord")]
    for theirs, record in zip(loader, ours, strict=True):
        np.testing.assert_array_equal(theirs["fractions_grid"], record.grid.reshape(-1))
