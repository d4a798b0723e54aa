"""Grids, tiles, chunks and the spatial split, by their properties."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from rasterio.warp import transform as warp_points

from preprocess import blocks, grid, ground, scan
from preprocess.grid import Chunk, Grid, chunks, offsets
from preprocess.place import AffinePlace
from tests.scenes import NLCD, NO_QUALITY, ZION, needs_shared, noise, pack_quietly, patches, read_records, write_raster

numbers = st.floats(-1e3, 1e3).filter(lambda v: v == 0 or abs(v) > 1e-3)


@st.composite
def grids(draw):
    a, b, d, e = (draw(numbers) for _ in range(4))
    assume(abs(a * e - b * d) > 1e-3)
    place = st.floats(-1e6, 1e6)
    return Grid(draw(st.integers(1, 300)), draw(st.integers(1, 300)), (a, b, draw(place), d, e, draw(place)))


# --------------------------------------------------------------------------------------------------- grids


@given(grids(), st.floats(-50, 350), st.floats(-50, 350))
def test_pixel_is_the_inverse_of_xy(one, column, row):
    x, y = one.xy(column, row)
    a, b, c, d, e, f = one.transform
    expected = (a * column + b * row + c, d * column + e * row + f)
    np.testing.assert_allclose((x, y), expected, rtol=1e-12, atol=1e-9)
    found = one.pixel(x, y)
    worst = np.linalg.cond(np.array([[a, b], [d, e]]))
    np.testing.assert_allclose(found, (column, row), atol=1e-9 * worst * 1e3)


@given(grids(), st.data())
def test_a_window_is_a_grid_over_the_same_ground(one, data):
    column, row = data.draw(st.integers(0, one.width - 1)), data.draw(st.integers(0, one.height - 1))
    width, height = data.draw(st.integers(1, one.width - column)), data.draw(st.integers(1, one.height - row))
    part = one.window(column, row, width, height)
    assert (part.width, part.height) == (width, height)
    for i, j in ((0, 0), (width, height), (0.5, 0.25)):
        np.testing.assert_allclose(part.xy(i, j), one.xy(column + i, row + j), rtol=1e-9, atol=1e-6)
    with pytest.raises(ValueError, match="leaves the grid"):
        one.window(column, row, one.width - column + 1, height)
    with pytest.raises(ValueError, match="leaves the grid"):
        one.window(-1, row, width, height)


@given(grids(), st.integers(1, 7), st.integers(1, 7))
def test_subdivided_covers_the_same_ground(one, kx, ky):
    fine = one.subdivided(kx, ky)
    assert (fine.width, fine.height) == (one.width * kx, one.height * ky)
    for column, row in ((0, 0), (one.width, one.height), (one.width / 2, 0.5)):
        np.testing.assert_allclose(fine.xy(column * kx, row * ky), one.xy(column, row), rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize(
    "transform", [(0, 0, 0, 0, 0, 0), (1, 2, 0, 2, 4, 0), (np.nan, 0, 0, 0, 1, 0), (np.inf, 0, 0, 0, 1, 0)]
)
def test_a_transform_without_an_inverse_is_refused(transform):
    with pytest.raises(ValueError, match="cannot be inverted"):
        Grid(1, 1, transform)


def test_an_empty_grid_is_refused():
    with pytest.raises(ValueError, match="is empty"):
        Grid(0, 5, (1, 0, 0, 0, 1, 0))


# ------------------------------------------------------------------------------------------ tiles and chunks

lengths, sizes, steps = st.integers(0, 400), st.integers(1, 80), st.integers(1, 120)


@given(lengths, sizes, steps)
def test_offsets(length, size, step):
    found = offsets(length, size, step)
    if length < size:
        assert not len(found)
        return
    assert found[0] == 0
    assert found[-1] + size == length  # the edge tile ends at the edge
    assert (np.diff(found) > 0).all()
    assert (np.diff(found)[:-1] == step).all()
    assert len(found) == 1 or np.diff(found)[-1] <= step
    if step <= size:
        covered = np.zeros(length, bool)
        for first in found:
            covered[first : first + size] = True
        assert covered.all()


@settings(deadline=None, max_examples=60)
@given(lengths, lengths, sizes, steps, st.floats(0.5, 5e6), st.integers(1, 300))
def test_chunks_hold_every_tile_once_within_their_budgets(width, height, size, step, bytes_a_pixel, most):
    made = list(chunks(width, height, size, step, bytes_a_pixel, most))
    found = [tuple(origin) for chunk in made for origin in chunk.origins().tolist()]
    expected = {(x, y) for x in offsets(width, size, step).tolist() for y in offsets(height, size, step).tolist()}
    assert len(found) == len(set(found))
    assert set(found) == expected
    for chunk in made:
        column, row, w, h = chunk.window
        assert 0 <= column <= column + w <= width
        assert 0 <= row <= row + h <= height
        assert chunk.tiles == len(chunk.origins()) <= most
        assert chunk.tiles == 1 or w * h * bytes_a_pixel <= grid.MAX_CHUNK_BYTES
        assert all(column <= x and x + size <= column + w for x in chunk.columns)
        assert all(row <= y and y + size <= row + h for y in chunk.rows)


def test_a_small_plan_is_cut_finer():
    """So that its last chunk does not keep one worker busy and the others waiting."""
    assert [grid.chunk_tiles(tiles) for tiles in (1, 900, 5000, 10_000_000)] == [120, 120, 156, 256]
    most = grid.chunk_tiles(900)
    sizes = [chunk.tiles for chunk in chunks(6000, 6000, 256, 200, 16.0, most)]
    assert sum(sizes) == 900
    assert len(sizes) == 8


def test_a_plan_of_ten_million_tiles_stays_small():
    import tracemalloc

    tracemalloc.start()
    made = tuple(chunks(640_000, 640_000, 256, 200, 10.0, grid.MAX_CHUNK_TILES))
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    tiles = sum(chunk.tiles for chunk in made)
    assert tiles > 10_000_000
    assert size / tiles < 20
    assert isinstance(made[0], Chunk)


# --------------------------------------------------------------------------------------------------- blocks

# (crs, x, y, pixel) of tiles' first corners: UTM, degrees, polar on both ends, across the antimeridian
PLACES = {
    "utm": ("EPSG:32631", (2e5, 8e5), (1e5, 9e6), (0.5, 30)),
    "degrees": ("EPSG:4326", (-181, 179), (-88, 88), (1e-5, 1e-3)),
    "north pole": ("EPSG:3413", (-4e5, 4e5), (-4e5, 4e5), (10, 120)),
    "very close to a pole": ("EPSG:3031", (-2e4, 2e4), (-2e4, 2e4), (5, 120)),
    "antimeridian": ("EPSG:32660", (7.5e5, 8.5e5), (1e5, 7.5e6), (10, 60)),
    "stretched": ("EPSG:3857", (-2e7, 2e7), (-1.8e7, 1.8e7), (10, 100)),
    "conic": ("EPSG:3035", (2.5e6, 6.5e6), (1.5e6, 5e6), (10, 100)),
}


def on_ground(transform, points_N2):
    a, b, c, d, e, f = tuple(transform)[:6]
    columns, rows = np.asarray(points_N2, np.float64).T
    return a * columns + b * rows + c, d * columns + e * rows + f


def considered(lon, lat, block_m):
    return blocks.touched_cells(lon, lat, blocks.far_apart(lon, lat), block_m)


def cell_of(lon, lat, block_m):
    row = np.floor((np.asarray(lat) + 90) * blocks.METRES_A_DEGREE / block_m).astype(int)
    cells = [blocks.cells_in_row(int(r), block_m) for r in row]
    return {
        (int(r), int(np.floor((x + 180) % 360 / 360 * count)) % count)
        for r, x, count in zip(row, lon, cells, strict=True)
    }


@pytest.mark.parametrize("place", PLACES)
def test_every_point_of_a_tile_lies_in_a_cell_that_was_considered(place):
    crs, xs, ys, pixels = PLACES[place]
    rng = np.random.default_rng(list(PLACES).index(place))
    block_m, size, checked = 20_000.0, 64, 0
    for _ in range(40):
        pixel = rng.uniform(*pixels)
        turn = rng.uniform(0, 2 * np.pi) if rng.random() < 0.5 else 0.0
        cos, sin = pixel * np.cos(turn), pixel * np.sin(turn)
        one = (cos, sin, rng.uniform(*xs), sin, -cos, rng.uniform(*ys))
        window = Grid(size, size, one)
        lon, lat = scan.footprints(AffinePlace(window, crs), np.array([[0, 0]]), size)
        inside = np.concatenate([rng.uniform(0, size, (1500, 2)), [(0, 0), (size, size), (0, size), (size, 0)]])
        edge = rng.uniform(0, size, (400, 2))
        edge[:200, 0], edge[200:, 1] = rng.choice([0, size], 200), rng.choice([0, size], 200)
        x, y = on_ground(one, np.concatenate([inside, edge]))
        true_lon, true_lat = np.array(warp_points(crs, "EPSG:4326", x, y)[:2])
        truth = cell_of(true_lon, np.clip(true_lat, -90, 90), block_m)
        whole = considered(lon[0], lat[0], block_m)
        step, parts = blocks.far_apart(lon[0], lat[0]), set()
        for i in range(scan.POINTS - 1):
            for j in range(scan.POINTS - 1):
                part = np.s_[0, i : i + 2, j : j + 2]
                parts |= blocks.touched_cells(lon[part], lat[part], step, block_m)
        assert truth <= whole
        assert truth <= parts
        checked += 1
    assert checked == 40


@pytest.mark.parametrize("corners", [(-4, -4), (-60, -60), (-63.5, -0.5), (-32, -64), (-64, 0)])
def test_a_tile_around_a_pole_touches_the_cells_around_it(corners):
    window = Grid(64, 64, (100.0, 0, corners[0] * 100.0, 0, -100.0, -corners[1] * 100.0))
    lon, lat = scan.footprints(AffinePlace(window, "EPSG:3413"), np.array([[0, 0]]), 64)
    found = considered(lon[0], lat[0], 1000.0)
    x, y = on_ground(window.transform, np.random.default_rng(0).uniform(0, 64, (5000, 2)))
    truth = cell_of(*np.array(warp_points("EPSG:3413", "EPSG:4326", x, y)[:2]), 1000.0)
    assert truth <= found


def test_far_from_poles_few_cells_are_considered_in_vain():
    """The box of a tile must not grow: each tile that seems to straddle is lost."""
    rng = np.random.default_rng(5)
    more = 0
    for _ in range(200):
        window = Grid(256, 256, (10.0, 0, rng.uniform(3e5, 7e5), 0, -10.0, rng.uniform(2e6, 6e6)))
        lon, lat = scan.footprints(AffinePlace(window, "EPSG:32631"), np.array([[0, 0]]), 256)
        x, y = on_ground(window.transform, rng.uniform(0, 256, (3000, 2)))
        truth = cell_of(*np.array(warp_points("EPSG:32631", "EPSG:4326", x, y)[:2]), 20_000.0)
        more += len(considered(lon[0], lat[0], 20_000.0) - truth)
    assert more < 40


def test_validation_share_of_many_cells():
    for fraction in (0.1, 0.25, 0.6):
        for seed in (0, 1):
            share = np.mean([blocks.is_validation(r, c, seed, fraction) for r in range(150) for c in range(150)])
            assert share == pytest.approx(fraction, abs=4 * (fraction * (1 - fraction) / 22500) ** 0.5)


def test_cells_are_about_as_wide_as_high():
    for row in range(0, 1000):
        around = (
            2 * np.pi * blocks.EARTH_RADIUS_M * np.cos(np.radians(-90 + (row + 0.5) * 20_000 / blocks.METRES_A_DEGREE))
        )
        if around > 400_000:
            assert around / blocks.cells_in_row(row, 20_000.0) == pytest.approx(20_000, rel=0.03)


def test_seeds_hold_out_different_blocks():
    held = [{(r, c) for r in range(40) for c in range(40) if blocks.is_validation(r, c, seed, 0.3)} for seed in (0, 1)]
    assert held[0] != held[1]
    assert len(held[0] & held[1]) < len(held[0]) * 0.5


def quads(folder):
    """Footprints of a dataset's tiles by split: boxes in their CRS, and the split's name."""
    boxes = []
    for split, record in read_records(folder):
        a, b, c, d, e, f = record.transform
        assert b == d == 0
        boxes.append((split, c, f + e * record.shape[0], c + a * record.shape[1], f, record))
    return boxes


def shared_ground(boxes):
    train = np.array([box[1:5] for box in boxes if box[0] == "train"])
    val = np.array([box[1:5] for box in boxes if box[0] == "val"])
    assert len(train)
    assert len(val)
    wide = np.minimum(train[:, None, 2], val[None, :, 2]) - np.maximum(train[:, None, 0], val[None, :, 0])
    high = np.minimum(train[:, None, 3], val[None, :, 3]) - np.maximum(train[:, None, 1], val[None, :, 1])
    return int(((wide > 0) & (high > 0)).sum())


@needs_shared
def test_train_and_validation_share_no_ground_on_zion(tmp_path):
    packed = pack_quietly(
        [ZION], [NLCD], "nlcd", tmp_path / "out", *NO_QUALITY, "tile.size=32", "tile.step=20", "tile.codec=raw",
        "split.val_fraction=0.25", "split.block_m=4000", "seed=3", "workers=0",
    )  # fmt: skip
    assert packed.manifest.counts["rejected_straddles_split"] > 100
    assert shared_ground(quads(tmp_path / "out")) == 0


def test_overlapping_scenes_agree_on_what_is_held_out(tmp_path):
    """Two scenes over much the same ground, on grids of their own, packed at once and one by one."""
    cover = write_raster(tmp_path / "cover.tif", patches(0, 700, 700, [10, 20, 50]), (30, 0, 4e5, 0, -30, 5.5e6))
    first = write_raster(tmp_path / "first.tif", noise(1, (3, 500, 500)), (30, 0, 401000, 0, -30, 5499000))
    second = write_raster(tmp_path / "second.tif", noise(2, (3, 600, 500)), (25, 0, 403217, 0, -25, 5496311))
    keys = (*NO_QUALITY, "tile.size=32", "tile.step=20", "split.val_fraction=0.4", "split.block_m=3000", "workers=0",
            "tile.codec=raw")  # fmt: skip
    together = tmp_path / "both"
    pack_quietly([first, second], [cover], "worldcover", together, *keys)
    boxes = quads(together)
    assert {box[-1].scene_id for box in boxes} == {"first", "second"}
    assert shared_ground(boxes) == 0
    alone: dict[str, str] = {}
    for scene in (first, second):
        pack_quietly([scene], [cover], "worldcover", tmp_path / scene.stem, *keys)
        alone |= {record.tile_id: split for split, record in read_records(tmp_path / scene.stem)}
    assert alone == {box[-1].tile_id: box[0] for box in boxes}


def test_pixels_have_a_size_on_the_ground_everywhere():
    north = ground.ground_steps(AffinePlace(Grid(10, 10, (1000, 0, -5000, 0, -1000, 5000)), "EPSG:3413"), 5, 5)
    np.testing.assert_allclose(north, 1000 / 0.97, rtol=0.02)  # the scale of that projection at the pole
    utm = ground.ground_steps(AffinePlace(Grid(10, 10, (30, 0, 5e5, 0, -30, 5e6)), "EPSG:32631"), 5, 5)
    np.testing.assert_allclose(utm, 30, rtol=5e-3)
    degrees = ground.ground_steps(AffinePlace(Grid(10, 10, (1e-3, 0, 179.995, 0, -1e-3, 60.005)), "EPSG:4326"), 5, 5)
    np.testing.assert_allclose(degrees, (111.2 * 0.5, 111.2), rtol=5e-3)


@pytest.mark.parametrize("place", PLACES)
def test_sides_of_many_tiles_are_those_of_each(place):
    crs, xs, ys, pixels = PLACES[place]
    rng = np.random.default_rng(list(PLACES).index(place))
    seen = set()
    for _ in range(20):
        pixel = rng.uniform(*pixels)
        window = Grid(192, 64, (pixel, 0.0, rng.uniform(*xs), 0.0, -pixel, rng.uniform(*ys)))
        lon, lat = scan.footprints(AffinePlace(window, crs), np.array([[0, 0], [64, 0], [128, 0]]), 64)
        known = np.isfinite(lon + lat).all(axis=(1, 2))
        for block_m in (5_000.0, 50_000.0):
            sides = blocks.sides_of(lon, lat, block_m, 3, 0.4)
            for t in np.flatnonzero(known).tolist():
                assert sides[t] == blocks.side_of(lon[t], lat[t], block_m, 3, 0.4)
                seen.add(sides[t])
    assert len(seen) > 1
