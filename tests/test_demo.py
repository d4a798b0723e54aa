"""The demo data: the same bytes again, a sound map, and scenes and sheets that show one and the same world."""

import hashlib
import re
from itertools import islice, pairwise

import numpy as np
import pytest
import rasterio
from rasterio.warp import transform

from geokr.landcover import load_product
from preprocess import demo_backdrop, make_demo
from preprocess.demo_backdrop import make_backdrop, sample
from preprocess.demo_materials import CLASS_OF, NAMES, SPECTRA
from preprocess.demo_noise import fractal, noise
from preprocess.demo_survey import Frame, classes, node_places, survey
from preprocess.demo_town import IMAGE_EPOCH, MAP_EPOCH

SIZE, SEED = 700, 3
KEY = np.uint64(SEED)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A folder with one small scene and its two sheets."""
    out = tmp_path_factory.mktemp("demo")
    assert all(written for _, written in make_demo.make(out, SIZE, 1, SEED, threads=2))
    return out


@pytest.fixture(scope="module")
def truth():
    """The classes painted into the scene, uint8 [SIZE, SIZE]."""
    frame = make_demo.scene_placement(0, SIZE).frame()
    return classes(survey(frame.backdrop(KEY), frame, 0, 0, (SIZE, SIZE), 0.5, IMAGE_EPOCH))


def files(folder):
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*.tif")}


def at_points(path, lon, lat):
    """Codes of a sheet at points in degrees, by rasterio's own arithmetic; 0 outside."""
    with rasterio.open(path) as source:
        x, y = transform("EPSG:4326", source.crs, lon, lat)
        codes, (height, width) = source.read(1), source.shape
        columns, rows = np.array(x), np.array(y)
        columns, rows = (columns - source.bounds.left) / 30, (source.bounds.top - rows) / 30
    rows, columns = np.floor(rows).astype(int), np.floor(columns).astype(int)
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    found = np.zeros(len(x), np.uint8)
    found[inside] = codes[rows[inside], columns[inside]]
    return found


def scene_points(path, step):
    """(rows, columns, lon, lat) of a lattice of pixel centres of the scene."""
    with rasterio.open(path) as source:
        rows, columns = (a.ravel() for a in np.mgrid[0 : source.height : step, 0 : source.width : step])
        x, y = source.bounds.left + 10 * (columns + 0.5), source.bounds.top - 10 * (rows + 0.5)
        lon, lat = transform(source.crs, "EPSG:4326", x, y)
    return rows, columns, np.array(lon), np.array(lat)


def test_same_settings_give_the_same_bytes_on_any_number_of_threads(demo, tmp_path):
    list(make_demo.make(tmp_path, SIZE, 1, SEED, threads=1))
    assert files(tmp_path) == files(demo)
    assert set(files(demo)) == {
        "scenes/scene_00_20230802.tif",
        "landcover/N32_45_2020LC030.tif",
        "landcover/N33_45_2020LC030.tif",
    }


def test_another_seed_gives_another_landscape(demo, tmp_path):
    list(make_demo.make(tmp_path, 300, 1, SEED + 1, threads=2))
    list(make_demo.make(tmp_path / "twin", 300, 1, SEED, threads=2))
    one, two = files(tmp_path), files(tmp_path / "twin")
    assert all(one[name] != two[name] for name in two)


def test_made_again_nothing_is_written(demo):
    before = {path: path.stat().st_mtime_ns for path in demo.rglob("*.tif")}
    assert [written for _, written in make_demo.make(demo, SIZE, 1, SEED)] == [False] * 3
    assert {path: path.stat().st_mtime_ns for path in demo.rglob("*.tif")} == before


def test_a_missing_file_is_made_again(demo):
    expected = files(demo)
    (demo / "landcover" / "N33_45_2020LC030.tif").unlink()
    assert [written for _, written in make_demo.make(demo, SIZE, 1, SEED)] == [False, False, True]
    assert files(demo) == expected


def test_a_folder_of_something_else_is_left_alone(demo, tmp_path):
    before = files(demo)
    with pytest.raises(make_demo.DemoError, match=r"expected .*seed 4.* got .*seed 3"):
        list(make_demo.make(demo, SIZE, 1, SEED + 1))
    with pytest.raises(make_demo.DemoError, match="something else"):
        list(make_demo.make(demo, SIZE, 2, SEED))
    assert files(demo) == before
    (tmp_path / "scenes").mkdir()
    (tmp_path / "scenes" / "mine.tif").write_bytes(b"II*\0")
    with pytest.raises(make_demo.DemoError, match=r"mine\.tif: not part of this demo"):
        list(make_demo.make(tmp_path, SIZE, 1, SEED))
    assert len(list(tmp_path.rglob("*.*"))) == 1


def test_a_write_cut_short_leaves_no_file(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr(make_demo.demo_raster.os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        list(make_demo.make(tmp_path, 300, 1, SEED))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--size", "100"], "--size 100: expected 256 to 10980"),
        (["--scenes", "0"], "--scenes 0: expected 1 to 100"),
        (["--seed", "-1"], "--seed -1"),
        (["--size", "10980", "--scenes", "100"], "fewer --scenes or a smaller --size"),
    ],
)
def test_bad_numbers_are_named(arguments, words, tmp_path, capsys):
    assert make_demo.main(["--out", str(tmp_path / "new"), *arguments]) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_the_scene_is_what_a_packer_expects(demo):
    (path,) = (demo / "scenes").glob("*.tif")
    with rasterio.open(path) as source:
        assert (source.count, source.dtypes[0], source.shape) == (4, "uint16", (SIZE, SIZE))
        assert source.crs.to_epsg() == 32632
        assert (source.transform.a, source.transform.e, source.nodata) == (10.0, -10.0, 0.0)
        assert source.descriptions == ("blue", "green", "red", "near_infrared")
        assert source.tags()["TIFFTAG_DATETIME"] == "2023:08:02 10:16:31"
        assert source.tags(4, ns="IMAGERY")["CENTRAL_WAVELENGTH_UM"] == "0.842"
        image = source.read()
        west, _, east, _ = rasterio.warp.transform_bounds(source.crs, "EPSG:4326", *source.bounds)
    assert image.min() >= 1
    assert image.max() <= 10_000
    assert west < 12 < east


def test_surfaces_look_like_themselves(demo, truth):
    (path,) = (demo / "scenes").glob("*.tif")
    with rasterio.open(path) as source:
        blue, _, red, infrared = source.read().astype(np.float64)
    clear = blue < 2500
    greenness = (infrared - red) / (infrared + red)
    assert greenness[(truth == 20) & clear].mean() > 0.6
    assert greenness[(truth == 80) & clear].mean() < 0.55
    # neighbours resemble each other (an optic), equal ground does not give equal numbers (a sensor)
    row = red[:, 1:-1]
    assert np.corrcoef(row[:, :-1].ravel(), row[:, 1:].ravel())[0, 1] > 0.7
    assert len(np.unique(red)) > 500


def test_sheets_are_globeland30(demo):
    product = load_product("globeland30")
    codes = {code for entry in product.classes for code in entry.codes}
    for path in (demo / "landcover").glob("*.tif"):
        assert product.filename is not None
        named = product.filename.match(path.name)
        assert named is not None
        with rasterio.open(path) as source:
            found = source.read(1)
            assert source.crs.to_epsg() == 32600 + int(named["zone"])
            assert (source.res, source.nodata, source.dtypes[0]) == ((30.0, 30.0), 0.0, "uint8")
            assert source.colormap(1)[20][:3] == (0, 99, 0)
            corner = transform(source.crs, "EPSG:4326", *[[v] for v in source.xy(source.height // 2, 0)])
        assert set(np.unique(found)) <= codes | {0}
        assert len(set(np.unique(found)) - {0}) >= 5
        assert int(named["lat"]) <= corner[1][0] < int(named["lat"]) + 5
        assert int(named["year"]) < 2023


def test_each_side_of_the_seam_agrees_with_what_is_painted(demo, truth):
    (path,) = (demo / "scenes").glob("*.tif")
    rows, columns, lon, lat = scene_points(path, 5)
    for zone, side in ((32, lon < 12), (33, lon >= 12)):
        codes = at_points(demo / "landcover" / f"N{zone}_45_2020LC030.tif", lon[side], lat[side])
        assert side.sum() > 4000
        assert (codes != 0).all()
        agreement = (codes == truth[rows[side], columns[side]]).mean()
        # a map, not a copy: older, shifted, coarser, and wrong in places
        assert 0.70 < agreement < 0.97


def test_sheets_overlap_beyond_the_boundary_and_disagree_a_little(demo):
    (path,) = (demo / "scenes").glob("*.tif")
    _, _, lon, lat = scene_points(path, 3)
    west = at_points(demo / "landcover" / "N32_45_2020LC030.tif", lon, lat)
    east = at_points(demo / "landcover" / "N33_45_2020LC030.tif", lon, lat)
    near, far = abs(lon - 12) < 0.049, abs(lon - 12) > 0.051
    assert near.any()
    assert ((west[near] != 0) & (east[near] != 0)).all()
    assert not ((west[far] != 0) & (east[far] != 0)).any()
    assert 0.01 < (west[near] != east[near]).mean() < 0.10


def test_the_map_is_some_years_older(truth):
    frame = make_demo.scene_placement(0, SIZE).frame()
    before = classes(survey(frame.backdrop(KEY), frame, 0, 0, (SIZE, SIZE), 0.5, MAP_EPOCH))
    assert 0.005 < (before != truth).mean() < 0.08
    assert (before == 80).sum() < (truth == 80).sum()


def test_scenes_of_two_zones_show_the_same_ground():
    first, second = make_demo.scene_placement(0, SIZE), make_demo.scene_placement(1, SIZE)
    assert (first.epsg, second.epsg) == (32632, 32633)
    covers = []
    for placement in (first, second):
        frame = placement.frame()
        covers.append(survey(frame.backdrop(KEY), frame, 0, 0, (SIZE, SIZE), 0.5, IMAGE_EPOCH))
    rows, columns = (a.ravel() for a in np.mgrid[10 : SIZE - 10, 10 : SIZE - 10])
    x, y = second.west + 10.0 * (columns + 0.5), second.north - 10.0 * (rows + 0.5)
    x, y = (np.array(v) for v in transform("EPSG:32633", "EPSG:32632", x, y))
    to_rows, to_columns = np.floor((first.north - y) / 10).astype(int), np.floor((x - first.west) / 10).astype(int)
    shared = (to_rows >= 0) & (to_rows < SIZE) & (to_columns >= 0) & (to_columns < SIZE)
    assert 0.05 < shared.mean() < 0.15
    heights = [covers[1].height[rows, columns][shared], covers[0].height[to_rows[shared], to_columns[shared]]]
    assert np.abs(heights[0] - heights[1]).max() < 15  # metres, half a pixel apart at most
    same = classes(covers[1])[rows, columns][shared] == classes(covers[0])[to_rows[shared], to_columns[shared]]
    assert same.mean() > 0.9


def test_a_window_is_the_same_alone_as_within_the_whole(truth):
    frame = make_demo.scene_placement(0, SIZE).frame()
    part = survey(frame.backdrop(KEY), frame, 311, 17, (40, 90), 0.5, IMAGE_EPOCH)
    assert (classes(part) == truth[311:351, 17:107]).all()


def test_the_backdrop_does_not_depend_on_its_bounds():
    wide = make_backdrop(KEY, -20_000.0, -20_000.0, 20_000.0, 20_000.0)
    small = make_backdrop(KEY, -1_003.0, 2_001.0, 533.0, 4_007.0)
    for x, y in np.random.default_rng(0).uniform((-1_003, 2_001), (533, 4_007), (50, 2)):
        for field in range(demo_backdrop.FIELDS):
            one = sample(wide.fields, wide.west, wide.south, field, x, y)
            assert one == pytest.approx(sample(small.fields, small.west, small.south, field, x, y), rel=1e-5, abs=1e-4)


def test_noise_is_centred_smooth_and_repeatable():
    points = np.random.default_rng(1).uniform(-500, 500, (20_000, 2))
    values = np.array([noise(KEY, 5, x, y) for x, y in points])
    assert abs(values.mean()) < 0.01
    assert 0.25 < values.std() < 0.35
    assert np.abs(values).max() < 1.7
    near = np.array([noise(KEY, 5, x + 1e-4, y) for x, y in points[:500]])
    assert np.abs(near - values[:500]).max() < 1e-3
    assert noise(KEY, 5, 3.0, -7.0) == 0.0  # gradient noise vanishes on its lattice
    assert fractal(KEY, 5, 0.3, 0.4, 1) == noise(KEY, 5, 0.3, 0.4)
    assert np.corrcoef(values[:5000], [noise(KEY, 6, x, y) for x, y in points[:5000]])[0, 1] < 0.05


def test_the_spiral_visits_each_cell_once_and_moves_by_one():
    cells = list(islice(make_demo.spiral(), 49))
    assert set(cells) == {(x, y) for x in range(-3, 4) for y in range(-3, 4)}
    assert all(max(abs(a - c), abs(b - d)) == 1 for (a, b), (c, d) in pairwise(cells))


def test_nodes_reach_beyond_the_raster_on_all_sides():
    for pixels in (1, 63, 64, 65, 700):
        places = node_places(pixels)
        assert places[0] == -64
        assert places[-1] >= pixels + 64
    placement = make_demo.scene_placement(0, 256)
    assert isinstance(placement.frame(), Frame)
    assert placement.frame().nodes.shape == (8, 8, 2)


def test_every_material_has_a_class_the_product_knows():
    codes = {code for entry in load_product("globeland30").classes for code in entry.codes}
    assert set(CLASS_OF.tolist()) <= codes
    assert SPECTRA.shape == (len(NAMES), 4)
    assert re.fullmatch(r"[a-z_]+", "".join(NAMES))
