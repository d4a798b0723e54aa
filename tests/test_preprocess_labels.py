"""Class fractions of tiles against an independent computation (tests.scenes.OtherWay), tile by tile."""

import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import rasterio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rasterio.enums import Resampling
from rasterio.vrt import WarpedVRT
from rasterio.warp import transform as warp_points

from geokr import manifests
from geokr.config import load
from geokr.landcover import build_legend, load_product
from preprocess import label_kernels, labels, lattice, sheet_headers, sheets
from preprocess.coordinates import transform_points
from preprocess.grid import Grid
from preprocess.inputs import PlanError
from preprocess.options import PackOptions
from preprocess.place import AffinePlace
from preprocess.plan import make_plan
from preprocess.sheets import LabelError
from tests.scenes import (
    NLCD,
    RAW,
    UTM31,
    WORLD,
    WORLDCOVER,
    ZION,
    OtherWay,
    check_labels,
    needs_shared,
    noise,
    pack_quietly,
    patches,
    pixels_of,
    read_records,
    write_raster,
)

GLOBELAND = [10, 20, 30, 60, 80, 90]
LAEA = (
    'PROJCS["a grid of our own",GEOGCS["WGS 84",DATUM["WGS_1984",SPHEROID["WGS 84",6378137,298.257223563]],'
    'PRIMEM["Greenwich",0],UNIT["degree",0.0174532925199433]],PROJECTION["Lambert_Azimuthal_Equal_Area"],'
    'PARAMETER["latitude_of_center",47.3],PARAMETER["longitude_of_center",4.1],PARAMETER["false_easting",12345],'
    'PARAMETER["false_northing",-777],UNIT["metre",1]]'
)
ALBERS = (
    'PROJCS["conic",GEOGCS["GRS 1980",DATUM["D_GRS",SPHEROID["GRS 1980",6378137,298.257222101]],'
    'PRIMEM["Greenwich",0],UNIT["degree",0.0174532925199433]],PROJECTION["Albers_Conic_Equal_Area"],'
    'PARAMETER["standard_parallel_1",41],PARAMETER["standard_parallel_2",49],PARAMETER["latitude_of_center",45],'
    'PARAMETER["longitude_of_center",2],UNIT["metre",1]]'
)


def place(crs, lon, lat):
    """Coordinates of a place in a CRS."""
    x, y = warp_points("EPSG:4326", crs, [lon], [lat])[:2]
    return x[0], y[0]


def at(crs, lon, lat, pixel, width, height, turn=0.0, shear=0.0):
    """Transform of a scene of width x height pixels whose middle lies at a place."""
    px, py = pixel if isinstance(pixel, tuple) else (pixel, pixel)
    cos, sin = np.cos(np.radians(turn)), np.sin(np.radians(turn))
    a, b, d, e = px * cos, py * (sin + shear * cos), px * sin, py * (-cos + shear * sin)
    x, y = place(crs, lon, lat)
    return a, b, x - a * width / 2 - b * height / 2, d, e, y - d * width / 2 - e * height / 2


def cover(
    tmp_path, name="cover.tif", crs=UTM31, lon=4.0, lat=47.0, pixel=30.0, side=400, codes=GLOBELAND, seed=0, **more
):
    """A map around a place, a third of a pixel off it, so that no centre of a scene pixel lies on an edge of its."""
    a, b, c, d, e, f = at(crs, lon, lat, pixel, side, side)
    return write_raster(
        tmp_path / name, patches(seed, side, side, codes), (a, b, c + a / 3, d, e, f + e / 3), crs, **more
    )


def scene(tmp_path, transform, crs=UTM31, shape=(70, 90), name="scene.tif", **profile):
    return write_raster(tmp_path / name, noise(9, (2, *shape)), transform, crs, **profile)


def packed(tmp_path, scenes, sheets, product="globeland30", *overrides):
    keys = ("tile.size=24", "tile.step=20", "labels.min_valid_fraction=0.01", *overrides)
    return pack_quietly(scenes, sheets, product, tmp_path / "out", *RAW, *keys)


def check(tmp_path, scenes, sheets, product="globeland30", k=(1, 1), *overrides, other=None, **how):
    """Packs, and compares; returns the manifest."""
    manifest = packed(tmp_path, scenes, sheets, product, *overrides).manifest
    assert check_labels(tmp_path / "out", other or OtherWay(product, sheets), *k, **how) > 3
    return manifest


# ----------------------------------------------------------------------------------------------- real scenes


@pytest.fixture(scope="module")
def zion(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zion")
    return folder / "out", packed(folder, [ZION], [NLCD], "nlcd", "tile.size=64", "tile.step=32").manifest


@needs_shared
def test_zion_tile_by_tile(zion):
    """30 m pixels over a map of 31.53 m with a grid and a datum of its own: k = 1."""
    other = OtherWay("nlcd", [NLCD])
    assert check_labels(zion[0], other, 1, 1, limit=30, exactly=False) >= 30


@needs_shared
def test_zion_by_warping(zion):
    """The second oracle: GDAL's own nearest-neighbour warp of the whole map onto the scene, every tile."""
    out, manifest = zion
    with rasterio.open(ZION) as scene_file, rasterio.open(NLCD) as map_file:
        area = {key: getattr(scene_file, key) for key in ("crs", "transform", "width", "height")}
        with WarpedVRT(map_file, resampling=Resampling.nearest, tolerance=1e-9, **area) as vrt:
            codes = vrt.read(1)
    worst, count = 0.0, 0
    for _, record in read_records(out, manifest):
        left, top = map(int, record.tile_id.split(":")[1:])
        here = codes[top : top + 64, left : left + 64]
        expected = np.array([np.isin(here, entry.codes).sum() for entry in manifest.classes])
        worst = max(worst, np.abs(expected / expected.sum() - record.fractions).max())
        count += 1
    assert count == 1540
    assert worst <= 0.001


@needs_shared
@pytest.mark.parametrize(("pixel", "k"), [(10.0, (2, 2)), (30.0, (4, 4)), (9.0, (1, 1)), ((30.0, 9.0), (4, 1))])
def test_worldcover_over_sao_tome(tmp_path, pixel, k):
    """10 m pixels are a little longer than 1/12000 degree (9.28 m): two of its pixels a side have a say."""
    transform = at("EPSG:32632", 6.6, 0.25, pixel, 90, 70, turn=11)
    other = WorldCoverWindow()
    check(tmp_path, [scene(tmp_path, transform, "EPSG:32632")], [WORLDCOVER], "worldcover", k, other=other, limit=6)


class WorldCoverWindow(OtherWay):
    """Only the part of the sheet around the test's scene: the whole has 1.3 GB of pixels."""

    def __init__(self):
        super().__init__("worldcover", [])
        with rasterio.open(WORLDCOVER) as file:
            window = rasterio.windows.from_bounds(6.5, 0.15, 6.7, 0.35, file.transform).round_offsets().round_lengths()
            self.sheets = [(WORLDCOVER.name, file.read(1, window=window), file.window_transform(window), file.crs, 0)]


# ------------------------------------------------------------------------------------------------ seams

TWO_ZONES = [("n30_45_2020lc030.tif", "EPSG:32630", 1), ("N31_45_2020LC030.tif", "EPSG:32631", 2)]
FOUR_SHEETS = [*TWO_ZONES, ("n30_40_2020lc030.tif", "EPSG:32630", 3), ("n31_40_2020lc030.tif", "EPSG:32631", 4)]


def sheets_around(tmp_path, named, lon, lat):
    """Sheets that all lie over the same ground and disagree everywhere."""
    return [cover(tmp_path, name, crs, lon, lat, 30.0, 500, GLOBELAND, seed) for name, crs, seed in named]


@pytest.mark.parametrize("crs", ["EPSG:32630", "EPSG:32631", "EPSG:4326", LAEA])
def test_a_tile_over_the_seam_of_two_zones(tmp_path, crs):
    sheets = sheets_around(tmp_path, TWO_ZONES, 0.0, 47.0)
    pixel = (30 / 76e3, 30 / 111.2e3) if crs == "EPSG:4326" else 30.0
    scenes = [scene(tmp_path, at(crs, 0.0, 47.0, pixel, 90, 70, turn=7), crs)]
    k = packed_k(scenes, sheets)
    check(tmp_path, scenes, sheets, "globeland30", k)
    # both sheets have a say: with either alone the answer is another
    for alone in ([sheets[0]], [sheets[1]]):
        with pytest.raises(AssertionError):
            check_labels(tmp_path / "out", OtherWay("globeland30", alone), *k)


def packed_k(scenes, sheets, product="globeland30"):
    """Pixels of the map a pixel of the scene, from lengths along geodesics of a sphere at the scene's middle."""
    with rasterio.open(scenes[0]) as file:
        t, crs, middle = file.transform, file.crs, (file.width / 2, file.height / 2)
    x, y = t.a * middle[0] + t.b * middle[1] + t.c, t.d * middle[0] + t.e * middle[1] + t.f
    scene_steps = lengths(t, crs, x, y)
    steps = []
    for sheet in sheets:
        with rasterio.open(sheet) as file:
            sx, sy = (v[0] for v in warp_points(crs, file.crs, [x], [y])[:2])
            if file.crs.is_geographic:
                sy = min(85.0, max(-85.0, sy))
            steps.append(lengths(file.transform, file.crs, sx, sy))
    finest = np.min(steps, axis=0)
    return tuple(int(max(1, np.ceil(s / m - 0.01))) for s, m in zip(scene_steps, finest, strict=True))


def lengths(t, crs, x, y):
    found = []
    for dx, dy in ((t.a, t.d), (t.b, t.e)):
        lon, lat = np.radians(warp_points(crs, "EPSG:4326", [x - dx / 2, x + dx / 2], [y - dy / 2, y + dy / 2])[:2])
        h = np.sin((lat[1] - lat[0]) / 2) ** 2 + np.cos(lat[0]) * np.cos(lat[1]) * np.sin((lon[1] - lon[0]) / 2) ** 2
        found.append(2 * 6371008.8 * np.arcsin(np.sqrt(h)))
    return np.array(found)


def test_four_sheets_meet(tmp_path):
    sheets = sheets_around(tmp_path, FOUR_SHEETS, 0.0, 45.0)
    check(tmp_path, [scene(tmp_path, at(UTM31, 0.0, 45.0, 30, 90, 70), UTM31)], sheets, "globeland30", (1, 1))


def test_where_the_home_sheet_says_nothing_another_fills(tmp_path):
    sheets = sheets_around(tmp_path, TWO_ZONES, 0.0, 47.0)
    with rasterio.open(sheets[1], "r+") as file:
        codes = file.read(1)
        codes[::2] = 0
        file.write(codes, 1)
    check(tmp_path, [scene(tmp_path, at(UTM31, 0.0, 47.0, 30, 90, 70))], sheets)


def test_southern_sheets_count_from_the_equator(tmp_path):
    named = [("S30_30_2020LC030.tif", "EPSG:32730", 1), ("s31_30_2020lc030.tif", "EPSG:32731", 2)]
    sheets = [cover(tmp_path, name, crs, 0.0, -32.0, 30.0, 500, GLOBELAND, seed) for name, crs, seed in named]
    check(tmp_path, [scene(tmp_path, at("EPSG:32731", 0.0, -32.0, 30, 90, 70), "EPSG:32731")], sheets)


def test_above_60_degrees_a_sheet_is_12_degrees_wide(tmp_path):
    named = [("n31_60_2020lc030.tif", "EPSG:32631", 1), ("n33_60_2020lc030.tif", "EPSG:32633", 2)]
    sheets = [cover(tmp_path, name, crs, 12.0, 62.0, 30.0, 500, GLOBELAND, seed) for name, crs, seed in named]
    check(tmp_path, [scene(tmp_path, at("EPSG:32632", 12.0, 62.0, 30, 90, 70), "EPSG:32632")], sheets)


def test_a_sheet_on_the_other_side_of_the_earth_does_no_harm(tmp_path):
    far = [
        cover(tmp_path, "n47_45_2020lc030.tif", "EPSG:32647", 99.0, 47.0),
        cover(tmp_path, "s60_40_2020lc030.tif", "EPSG:32760", 177.0, -42.0),
    ]
    near = cover(tmp_path, "n31_45_2020lc030.tif")
    grid = Grid(90, 70, at(UTM31, 4.0, 47.0, 30, 90, 70))
    under = labels.overlapping(AffinePlace(grid, UTM31), entries([*far, near], "globeland30"))
    assert [entry.sheet.name for entry in under] == [near.name]
    check(
        tmp_path,
        [scene(tmp_path, at(UTM31, 4.0, 47.0, 30, 90, 70))],
        [*far, near],
        other=OtherWay("globeland30", [near]),
    )


# ------------------------------------------------------------------------------- rotated, CRS, sizes of pixels


@pytest.mark.parametrize(
    ("turn", "shear", "pixel"),
    [(0, 0, 30), (30, 0, 30), (90, 0, 30), (200, 0.4, 30), (-45, -0.7, (30, 17)), (0, 0, (12, 30)), (3, 0, 7)],
)
def test_rotated_sheared_and_oblong(tmp_path, turn, shear, pixel):
    check(tmp_path, [scene(tmp_path, at(UTM31, 4.0, 47.0, pixel, 90, 70, turn, shear))], [cover(tmp_path)],
          "globeland30", packed_k([tmp_path / "scene.tif"], [tmp_path / "cover.tif"]))  # fmt: skip


@pytest.mark.parametrize("crs", ["EPSG:4326", LAEA, ALBERS, "EPSG:3857", "EPSG:2154"])
@pytest.mark.parametrize("map_crs", [UTM31, "EPSG:4326", LAEA])
def test_any_crs_on_either_side(tmp_path, crs, map_crs):
    degrees = (33 / 76e3, 33 / 111.2e3)
    map_pixel, pixel = (degrees if c == "EPSG:4326" else 33.0 for c in (map_crs, crs))
    sheets = [cover(tmp_path, crs=map_crs, pixel=map_pixel)]
    scenes = [scene(tmp_path, at(crs, 4.0, 47.0, pixel, 90, 70, turn=5), crs)]
    check(tmp_path, scenes, sheets, "globeland30", packed_k(scenes, sheets), limit=5)


def test_two_custom_grids_without_codes(tmp_path):
    for wkt in (LAEA, ALBERS):
        assert rasterio.crs.CRS.from_wkt(wkt).to_epsg() is None


def test_land_cover_coarser_than_a_tile(tmp_path):
    sheets = [cover(tmp_path, pixel=1000.0, side=60)]
    manifest = check(tmp_path, [scene(tmp_path, at(UTM31, 4.0, 47.0, 10, 90, 70))], sheets)
    assert manifest.counts["kept"] == 20


def test_land_cover_ten_times_finer_than_a_pixel(tmp_path):
    sheets = [cover(tmp_path, pixel=3.0, side=1200)]
    check(tmp_path, [scene(tmp_path, at(UTM31, 4.0, 47.0, 30, 90, 70))], sheets, "globeland30", (10, 10))


def test_every_pixel_of_a_finer_map_on_the_same_grid_counts_once(tmp_path):
    """With aligned grids the rule is a plain count of the map's pixels: no resampling at all."""
    codes = patches(3, 300, 300, GLOBELAND, side=1)
    sheet = write_raster(tmp_path / "cover.tif", codes, (10, 0, 4e5, 0, -10, 5.2e6))
    one = scene(tmp_path, (30, 0, 4e5, 0, -30, 5.2e6), shape=(100, 100))
    manifest = packed(tmp_path, [one], [sheet]).manifest
    for _, record in read_records(tmp_path / "out", manifest):
        left, top = map(int, record.tile_id.split(":")[1:])
        here = codes[3 * top : 3 * (top + 24), 3 * left : 3 * (left + 24)]
        expected = [np.isin(here, entry.codes).mean() for entry in manifest.classes]
        np.testing.assert_allclose(record.fractions, expected, atol=1e-7)


def test_edge_tiles_lie_where_their_transform_says(tmp_path):
    one = scene(tmp_path, at(UTM31, 4.0, 47.0, 30, 101, 77), shape=(77, 101))
    check(tmp_path, [one], [cover(tmp_path)], limit=99)
    with rasterio.open(one) as file:
        for _, record in read_records(tmp_path / "out"):
            a, _, c, _, e, f = record.transform
            left, top = round((c - file.transform.c) / a), round((f - file.transform.f) / e)
            assert record.tile_id == f"scene:{left}:{top}"
            window = rasterio.windows.Window(left, top, 24, 24)
            np.testing.assert_array_equal(pixels_of(record), file.read(window=window).transpose(1, 2, 0))
            assert left + 24 <= 101
            assert top + 24 <= 77
    corners = {tuple(map(int, r.tile_id.split(":")[1:])) for _, r in read_records(tmp_path / "out")}
    assert (101 - 24, 77 - 24) in corners


# --------------------------------------------------------------------------------- what counts, and what not


def test_partial_cover_and_scene_without_data(tmp_path):
    sheets = [cover(tmp_path, side=70)]  # smaller than the scene
    pixels = noise(5, (2, 70, 90))
    rng = np.random.default_rng(6)
    pixels[:, rng.random((70, 90)) < 0.3] = 0
    one = write_raster(tmp_path / "scene.tif", pixels, at(UTM31, 4.0, 47.0, 30, 90, 70), nodata=0)

    def valid(record):
        left, top = map(int, record.tile_id.split(":")[1:])
        return (pixels[:, top : top + 24, left : left + 24] != 0).any(axis=0)

    manifest = check(
        tmp_path, [one], sheets, "globeland30", (1, 1), "quality.min_valid_pixels=0", valid=valid, limit=99
    )
    shares = [record.valid_fraction for _, record in read_records(tmp_path / "out", manifest)]
    assert 0.01 <= min(shares) < 0.5 < max(shares) < 0.8


@pytest.mark.parametrize("minimum", [0.6, 0.95])
def test_minimum_valid_fraction(tmp_path, minimum):
    sheets = [cover(tmp_path, side=70)]
    one = scene(tmp_path, at(UTM31, 4.0, 47.0, 30, 90, 70))
    manifest = packed(tmp_path, [one], sheets, "globeland30", f"labels.min_valid_fraction={minimum}").manifest
    shares = [record.valid_fraction for _, record in read_records(tmp_path / "out", manifest)]
    assert min(shares) >= minimum - 1e-6
    assert manifest.counts["rejected_unlabelled"] == manifest.counts["positions"] - len(shares) > 0


def test_dropped_and_merged_classes(tmp_path):
    sheets = [cover(tmp_path)]
    one = scene(tmp_path, at(UTM31, 4.0, 47.0, 30, 90, 70))
    merge = {"green": ["forest", "grassland"]}
    other = OtherWay("globeland30", sheets, drop=["bareland"], merge=merge)
    keys = ("labels.merge={green: [forest, grassland]}", "labels.drop=[bareland]")
    manifest = check(tmp_path, [one], sheets, "globeland30", (1, 1), *keys, other=other)
    names = [entry.name for entry in manifest.classes]
    assert "green" in names
    assert not {"forest", "grassland", "bareland"} & set(names)
    assert max(record.valid_fraction for _, record in read_records(tmp_path / "out")) < 0.95


def test_sea_is_known_and_does_not_count(tmp_path):
    """255 is sea: it leaves the denominator, and no other sheet fills it."""
    named = [("n31_45_2020lc030.tif", UTM31, 1), ("n32_45_2020lc030.tif", "EPSG:32632", 2)]
    sheets = [
        cover(tmp_path, name, crs, codes=[255, 20] if seed == 1 else [10], seed=seed) for name, crs, seed in named
    ]
    one = scene(tmp_path, at(UTM31, 4.0, 47.0, 30, 90, 70))
    manifest = check(tmp_path, [one], sheets)
    names = [entry.name for entry in manifest.classes]
    assert "sea" not in names
    for _, record in read_records(tmp_path / "out", manifest):
        assert record.fractions[names.index("forest")] == 1
        assert record.valid_fraction < 0.9


def test_the_rasters_own_nodata_joins_the_tables(tmp_path):
    sheets = [cover(tmp_path, nodata=60)]  # water, says the table; nothing, says the file
    one = scene(tmp_path, at(UTM31, 4.0, 47.0, 30, 90, 70))
    manifest = check(tmp_path, [one], sheets)
    assert manifest.train.prior[[entry.name for entry in manifest.classes].index("water_bodies")] == 0


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16"])
def test_codes_in_wider_types(tmp_path, dtype):
    codes = patches(0, 400, 400, GLOBELAND).astype(dtype)
    sheet = write_raster(tmp_path / "cover.tif", codes, at(UTM31, 4.0, 47.0, 30, 400, 400))
    check(tmp_path, [scene(tmp_path, at(UTM31, 4.0, 47.0, 30, 90, 70))], [sheet])


def test_unknown_codes_are_listed_with_their_counts(tmp_path):
    codes = patches(0, 300, 300, GLOBELAND)
    codes[140:150, 140:150] = 77 + 100
    codes[150:160, 150:153] = 13
    sheet = write_raster(tmp_path / "cover.tif", codes, at(UTM31, 4.0, 47.0, 30, 300, 300))
    with pytest.raises(LabelError, match=r"cover\.tif: holds codes .*13 \(30 pixels\), 177 \(100 pixels\).*--product"):
        packed(tmp_path, [scene(tmp_path, at(UTM31, 4.0, 47.0, 30, 90, 70))], [sheet])
    assert not (tmp_path / "out" / manifests.MANIFEST).exists()


def test_damaged_land_cover_is_not_blamed_on_the_scene(tmp_path):
    sheet = cover(tmp_path)
    data = sheet.read_bytes()
    sheet.write_bytes(data[: len(data) // 2])
    with pytest.raises(LabelError, match=r"cover\.tif"):
        packed(
            tmp_path, [scene(tmp_path, at(UTM31, 4.0, 47.0, 30, 90, 70))], [sheet], "globeland30", "max_bad_fraction=1"
        )


# ------------------------------------------------------------------------------------------------------- years

YEARS = {"n31_45_2010lc030.tif": 20, "n31_45_2020lc030.tif": 60}


@pytest.mark.parametrize(
    ("tags", "name", "code"),
    [
        ({"ACQUISITIONDATETIME": "2011-06-01 10:00:00"}, "scene.tif", 20),
        ({"ACQUISITIONDATETIME": "2011-06-01", "TIFFTAG_DATETIME": "2021:01:01 00:00:00"}, "x_20220101.tif", 20),
        ({"TIFFTAG_DATETIME": "2021:01:01 00:00:00"}, "S2A_20120712T101031.tif", 20),
        ({"TIFFTAG_DATETIME": "2021:01:01 00:00:00"}, "scene.tif", 60),
        ({}, "LC08_L1TP_038034_20150818_20170226_01_T1.tif", 60),
        ({}, "area-2015-06-29.tif", 20),
        ({}, "area-2015-07-02.tif", 60),
    ],
)
def test_the_year_nearest_to_the_acquisition(tmp_path, tags, name, code):
    sheets = [cover(tmp_path, sheet, codes=[code]) for sheet, code in YEARS.items()]
    one = scene(tmp_path, at(UTM31, 4.0, 47.0, 30, 90, 70), name=name)
    with rasterio.open(one, "r+") as file:
        file.update_tags(**tags)
    manifest = packed(tmp_path, [one], sheets).manifest
    only = [entry.name for entry, share in zip(manifest.classes, manifest.train.prior, strict=True) if share]
    assert only == [{20: "forest", 60: "water_bodies"}[code]]
    assert manifest.land_cover_years == (2010, 2020)


def test_new_years_day_is_nearer_to_the_july_that_comes(tmp_path):
    """181 days to the one, 184 to the other: mosaics of a year are often dated so."""
    sheets = [cover(tmp_path, f"n31_45_{year}lc030.tif", codes=[code]) for year, code in ((2020, 20), (2021, 60))]
    one = scene(tmp_path, at(UTM31, 4.0, 47.0, 30, 90, 70), name="mosaic_20210101.tif")
    manifest = packed(tmp_path, [one], sheets).manifest
    only = [entry.name for entry, share in zip(manifest.classes, manifest.train.prior, strict=True) if share]
    assert only == ["water_bodies"]
    assert manifest.scenes[0].label_gap_years["globeland30"] == pytest.approx(-181 / 365.25)


@pytest.mark.parametrize("name", ["scene.tif", "scene_20200230.tif", "scene_038034.tif", "scene_120200101.tif"])
def test_several_years_and_no_date(tmp_path, name):
    sheets = [cover(tmp_path, sheet) for sheet in YEARS]
    with pytest.raises(LabelError, match=r"scene.* 2010, 2020 and the scene has no date"):
        packed(tmp_path, [scene(tmp_path, at(UTM31, 4.0, 47.0, 30, 90, 70), name=name)], sheets)


@pytest.mark.parametrize(
    ("shift", "code"), [(0.0, 20), (0.4, 20), (0.9, 60)], ids=["whole scene", "six tenths of it", "its edge only"]
)
@pytest.mark.parametrize("dated", [True, False])
def test_a_year_that_only_touches_the_scene_does_not_decide(tmp_path, shift, code, dated):
    names = list(YEARS)
    one = scene(tmp_path, at(UTM31, 4.0, 47.0, 30, 90, 70), name="scene_20110601.tif" if dated else "scene.tif")
    # the sheet of 2010 ends that share of the scene east of its western edge
    a, b, c, d, e, f = at(UTM31, 4.0, 47.0, 30, 90, 70)
    moved = a, b, c + shift * 90 * 30 + a / 3, d, e, f + 200 * 30 + e / 3
    older = write_raster(tmp_path / names[0], patches(0, 400, 400, [20]), moved, UTM31)
    newer = cover(tmp_path, names[1], codes=[60])
    if not dated and code == 20:
        with pytest.raises(LabelError, match="2010, 2020 and the scene has no date"):
            packed(tmp_path, [one], [older, newer])
        return
    manifest = packed(tmp_path, [one], [older, newer]).manifest
    only = [entry.name for entry, share in zip(manifest.classes, manifest.train.prior, strict=True) if share]
    assert only == [{20: "forest", 60: "water_bodies"}[code]]


@pytest.mark.parametrize(
    ("day", "code"),
    [("20210712", 2), ("20210801", 2), ("20210110", 1), ("20201130", 1), ("20220601", 3), ("", 1)],
)
def test_of_maps_of_single_days_the_nearest_counts(tmp_path, day, code):
    """January 2021 is nearer to December 2020 than to July, whatever the year; without a day the first name counts."""
    names = {"20201230": 1, "20210703": 2, "20210501": 5, "20220401": 3}
    if not day:  # several years need a date
        names = {"20210101": 1, "20210703": 2}
    sheets = [cover(tmp_path, f"{d}T101559_{d}T101754_T32TMT.tif", codes=[code]) for d, code in names.items()]
    one = scene(tmp_path, at(UTM31, 4.0, 47.0, 30, 90, 70), name=f"scene_{day}.tif" if day else "scene.tif")
    manifest = packed(tmp_path, [one], sheets, product="dynamicworld").manifest
    only = [entry.codes for entry, share in zip(manifest.classes, manifest.train.prior, strict=True) if share]
    assert only == [(code,)]


def test_versions_of_a_map_whose_names_tell_no_year(tmp_path):
    one = scene(tmp_path, at(UTM31, 4.0, 47.0, 30, 90, 70))
    older, newer = (cover(tmp_path, f"{word}.tif", codes=[code]) for word, code in (("older", 20), ("newer", 60)))
    with pytest.raises(LabelError, match=r"newer\.tif and .*older\.tif cover the same ground, and their names tell no"):
        packed(tmp_path, [one], [older, newer])
    beside = cover(tmp_path, "beside.tif", lon=4.12, codes=[60])  # neighbours overlap at their edges
    packed(tmp_path, [one], [older, beside])


@pytest.mark.parametrize(
    ("product", "name", "year"),
    [
        ("nlcd", "nlcd_2011_land_cover_l48_20210604.tif", 2011),
        ("nlcd", "Annual_NLCD_LndCov_2021_CU_C1V0.tif", 2021),
        ("modis_igbp", "MCD12Q1.061_LC_Type1_doy2020001_aid0001.tif", 2020),
        ("globeland30", "N32_45_2020LC030.TIF", 2020),
    ],
)
def test_years_in_names(product, name, year):
    assert sheets.sheet_year(load_product(product), name) == year


def test_a_nodata_tag_that_is_the_code_of_a_class(tmp_path):
    """Some exporters tag 0 whatever it means, and here it is water."""
    sheet = cover(tmp_path, "20200817T102031_20200817T103042_T31TCJ.tif", codes=[0, 1, 4], nodata=0)
    one = scene(tmp_path, at(UTM31, 4.0, 47.0, 30, 90, 70))
    plan = make_plan([str(one)], [str(sheet)], "dynamicworld", load(PackOptions, None, [*RAW, "tile.size=24"]))
    assert any("nodata tag, 0, is the code of 'water'" in warning for warning in plan.warnings)


# ------------------------------------------------------------------------------ around the Earth, and its ends

WORLD_TABLE = "name: glcnmo\nnodata: [0]\nignore: []\nclasses:\n" + "".join(
    f"  {c}: {{name: c{c}}}\n" for c in range(1, 21)
)


@pytest.fixture
def world(tmp_path):
    """The user's own product for a map of the world."""
    table = tmp_path / "glcnmo.yaml"
    table.write_text(WORLD_TABLE)
    return str(table)


WORLD_SCENES = {
    "degrees across 180": ("EPSG:4326", 180.0, 66.5, 0.02),
    "degrees from the other side": ("EPSG:4326", -180.0, 66.5, 0.02),
    "UTM 60 across 180": ("EPSG:32660", 179.9, 66.5, 1500.0),
    "UTM 1 across 180": ("EPSG:32601", -179.9, 66.5, 1500.0),
    "Fiji": ("EPSG:3460", 179.9, -17.0, 2000.0),
    "north, off the pole": ("EPSG:3413", -40.0, 75.0, 9000.0),
    "north, with the pole": ("EPSG:3413", 0.0, 90.0, 30000.0),
    "south, off the pole": ("EPSG:3031", 30.0, -75.0, 9000.0),
    "south, with the pole": ("EPSG:3031", 0.0, -90.0, 15000.0),
    "Greenwich": ("EPSG:4326", 0.0, 50.0, 0.02),
}


@needs_shared
@pytest.mark.parametrize("case", WORLD_SCENES)
def test_a_map_of_the_world(tmp_path, world, case):
    crs, lon, lat, pixel = WORLD_SCENES[case]
    if crs == "EPSG:4326":  # the transform may run beyond 180: nothing wraps it
        transform = (pixel, 0.0, lon - 45 * pixel, 0.0, -pixel, lat + 35 * pixel)
    else:
        transform = at(crs, lon, lat, pixel, 90, 70)
    one = scene(tmp_path, transform, crs)
    k = packed_k([one], [WORLD])
    assert k[0] > 4 or "with the pole" not in case
    check(tmp_path, [one], [WORLD], world, k, limit=99 if k == (1, 1) else 8)
    for _, record in read_records(tmp_path / "out"):
        assert -180 <= record.lonlat[0] <= 180
        assert -90 <= record.lonlat[1] <= 90


@needs_shared
@pytest.mark.parametrize("case", ["north, with the pole", "UTM 60 across 180", "degrees across 180"])
def test_a_map_of_the_world_that_begins_at_0(tmp_path, world, case):
    with rasterio.open(WORLD) as file:
        codes = file.read(1)
        half = codes.shape[1] // 2
        turned = np.concatenate([codes[:, half:], codes[:, :half]], axis=1)
        t = file.transform
    sheet = write_raster(tmp_path / "turned.tif", turned, (t.a, 0, 0, 0, t.e, 90), "EPSG:4326")
    crs, lon, lat, pixel = WORLD_SCENES[case]
    transform = (
        (pixel, 0.0, lon - 45 * pixel, 0.0, -pixel, lat + 35 * pixel)
        if crs == "EPSG:4326"
        else at(crs, lon, lat, pixel, 90, 70)
    )
    one = scene(tmp_path, transform, crs)
    check(tmp_path, [one], [sheet], world, packed_k([one], [sheet]), limit=6, other=OtherWay(world, [WORLD]))


@needs_shared
def test_a_scene_of_the_whole_world(tmp_path, world):
    pixels = noise(0, (1, 90, 180))
    one = write_raster(tmp_path / "world.tif", pixels, (2.0, 0, -180.0, 0, -2.0, 90.0), "EPSG:4326")
    sheets = [cover(tmp_path, "utm.tif", side=50, codes=[3]), WORLD]
    manifest = packed(tmp_path, [one], [WORLD], world, "tile.size=30", "tile.step=30").manifest
    assert manifest.counts["kept"] == 18
    # a small sheet in UTM beside it: most of the scene's ground lies where UTM 31 means nothing
    with rasterio.open(one) as file:
        grid = Grid(180, 90, tuple(file.transform)[:6])
        found = labels.overlapping(AffinePlace(grid, file.crs.to_wkt()), entries(sheets, world))
    assert len(found) == 2


def entries(paths, product):
    return sheets.label_sheets([sheet_headers.read_sheet(str(path)) for path in paths], load_product(product))


def test_polar_scenes_under_fine_land_cover(tmp_path):
    """10 m in a polar projection over a map in degrees: its coordinates are harmonic in the scene's, so an error
    measured only in the middle of lattice cells would be none."""
    lon, lat, degree = -40.0, 82.0, 1 / 12000
    codes = patches(1, 300, 2200, [10, 20, 30, 40, 50], side=1)
    origin = (lon - 1100 * degree, lat + 150 * degree)
    sheet = write_raster(tmp_path / "cover.tif", codes, (degree, 0, origin[0], 0, -degree, origin[1]), "EPSG:4326")
    one = write_raster(
        tmp_path / "s.tif", noise(1, (1, 150, 150)), at("EPSG:3413", lon, lat, 10, 150, 150), "EPSG:3413"
    )
    k = packed_k([one], [sheet])
    assert k == (8, 2) or k == (2, 8) or k[0] >= 2
    grid = Grid(150, 150, tuple(at("EPSG:3413", lon, lat, 10, 150, 150)))
    crs = rasterio.crs.CRS.from_epsg(3413).to_wkt()
    legend = build_legend(load_product("worldcover"))
    found = labels.label_grid(AffinePlace(grid, crs), entries([sheet], "worldcover"), legend)
    other = OtherWay("worldcover", [sheet]).labels(grid.transform, crs, 150, 1, 1)
    names = np.array([entry.name for entry in legend.classes])
    assert (names[np.minimum(found, len(names) - 1)] == other).mean() > 0.9995
    assert (found < len(names)).all()


LATTICES = {
    "polar in Mercator": ("EPSG:3413", "EPSG:3857", -40.0, 82.0, 1000.0),
    "polar in UTM": ("EPSG:3413", "EPSG:32624", -40.0, 80.0, 500.0),
    "polar in degrees": ("EPSG:3031", "EPSG:4326", 30.0, -84.0, 100.0),
    "UTM in the next zone": (UTM31, "EPSG:32632", 5.9, 60.0, 100.0),
    "UTM in Albers": (UTM31, ALBERS, 4.0, 47.0, 100.0),
    "around the pole": ("EPSG:3413", "EPSG:4326", 0.0, 90.0, 1000.0),
}


@pytest.mark.parametrize("case", LATTICES)
@pytest.mark.parametrize("size", [(200, 150), (1, 40), (7, 1), (129, 130)])
def test_a_lattice_keeps_its_tolerance_at_every_pixel(case, size):
    """Not in the middle of its cells alone, where the errors of harmonic coordinates cancel."""
    crs, target, lon, lat, pixel = LATTICES[case]
    grid = Grid(*size, at(crs, lon, lat, pixel, *size))
    degrees = target == "EPSG:4326"
    tolerance = 1e-5 if degrees else 1.0
    nodes = lattice.lattice(AffinePlace(grid, crs), target, degrees, (tolerance, tolerance))
    columns, rows = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    a, b, c, d, e, f = grid.transform
    x, y = a * (columns + 0.5) + b * (rows + 0.5) + c, d * (columns + 0.5) + e * (rows + 0.5) + f
    exact = np.array(warp_points(crs, target, x.ravel(), y.ravel())[:2])
    found = np.array(
        [label_kernels.between(nodes, i, j, *size) for i, j in zip(columns.flat, rows.flat, strict=True)]
    ).T
    error = np.abs(found - exact)
    if degrees:
        error[0] = np.abs((found[0] - exact[0] + 180) % 360 - 180)
    assert error.max() <= tolerance


def test_a_map_pixel_at_the_pole_does_not_shrink_to_nothing(tmp_path):
    degree = 1 / 1200
    sheet = write_raster(
        tmp_path / "cover.tif", patches(1, 600, 2000, [10, 20]), (0.18, 0, -180, 0, -degree, 90.0), "EPSG:4326"
    )
    one = Grid(100, 100, (100.0, 0, -5000.0, 0, -100.0, 5000.0))
    crs = rasterio.crs.CRS.from_epsg(3413).to_wkt()
    kx, ky = labels.subdivision(AffinePlace(one, crs), entries([sheet], "worldcover"))
    assert 1 <= kx <= 20
    assert 1 <= ky <= 20


# ------------------------------------------------------------------------------------------------- points


def test_points_a_crs_cannot_express_do_not_spoil_the_others():
    lon, lat = np.array([3.0, 0.0, 93.0, 3.0, np.nan, 4.0]), np.array([45.0, 95.0, 0.0, 46.0, 1.0, np.inf])
    x, y = transform_points("EPSG:4326", UTM31, lon, lat)
    np.testing.assert_array_equal(np.isfinite(x), [True, False, False, True, False, False])
    np.testing.assert_array_equal(np.isnan(x), np.isnan(y))
    np.testing.assert_allclose((x[0], y[0]), place(UTM31, 3.0, 45.0))


def test_a_scene_whose_corners_lie_off_the_earth(tmp_path):
    """The limb of a globe: part of the scene's ground does not exist."""
    crs = "+proj=ortho +lat_0=40 +lon_0=5"
    radius = 6371e3 * np.cos(np.radians(20))  # where the limb is, at that height
    one = scene(tmp_path, (20e3, 0, radius - 45 * 20e3, 0, -20e3, 2.2e6 + 35 * 20e3), crs)
    codes = patches(2, 180, 360, GLOBELAND, side=2)
    sheet = write_raster(tmp_path / "cover.tif", codes, (1.0, 0, -180, 0, -1.0, 90), "EPSG:4326")
    manifest = packed(tmp_path, [one], [sheet]).manifest
    assert 0 < manifest.counts["kept"] < manifest.counts["positions"]
    assert manifest.counts["rejected_unlabelled"] > 0


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_random_grids(data):
    """Labels of random windows of random maps, in random CRSs, equal the other way's pixel by pixel."""
    crs, map_crs = (data.draw(st.sampled_from([UTM31, "EPSG:32630", "EPSG:4326", LAEA, ALBERS])) for _ in range(2))
    lon, lat = data.draw(st.floats(1, 6)), data.draw(st.floats(40, 52))
    metres, map_metres = data.draw(st.floats(3, 200)), data.draw(st.floats(3, 200))
    turn, side = data.draw(st.floats(0, 360)), data.draw(st.integers(8, 40))

    def pixel(which, length):
        return (length / 76e3, length / 111.2e3) if which == "EPSG:4326" else length

    transform = at(crs, lon, lat, pixel(crs, metres), side, side, turn)
    a, b, c, d, e, f = at(map_crs, lon, lat, pixel(map_crs, map_metres), 200, 200, data.draw(st.sampled_from([0, 12])))
    map_transform = (a, b, c + 0.377 * a, d, e, f + 0.377 * e)  # no centre on an edge
    with tempfile.TemporaryDirectory() as folder:
        sheet = write_raster(Path(folder) / "c.tif", patches(side, 200, 200, GLOBELAND, 1), map_transform, map_crs)
        legend = build_legend(load_product("globeland30"))
        wkt = rasterio.crs.CRS.from_user_input(crs).to_wkt()
        found = labels.label_grid(
            AffinePlace(Grid(side, side, transform), wkt), entries([sheet], "globeland30"), legend
        )
        other = OtherWay("globeland30", [sheet]).labels(transform, wkt, side, 1, 1)
    names = np.array([*(entry.name for entry in legend.classes), None], object)
    differ = names[np.minimum(found, len(names) - 1)] != other
    assert differ.mean() <= 0.002  # interpolation: 0.0001 of a map pixel on either side of its edges


def test_product_of_another_name_gives_no_domain():
    table = load_product("io_lulc")
    assert sheets.nominal_cell(table, "31T_20200101-20210101.tif") == (0, 40, 6, 48)
    assert sheets.nominal_cell(table, "31X_20200101-20210101.tif") == (0, 72, 6, 84)
    assert sheets.nominal_cell(table, "31I_20200101-20210101.tif") is None
    assert sheets.nominal_cell(table, "whatever.tif") is None
    assert sheets.sheet_year(table, "31T_20200101-20210101.tif") == 2020


def test_no_overlap_says_where_the_scene_lies(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(PlanError, match=r"overlaps the land cover.*longitude 4\.000, latitude 47\.000"):
            packed(tmp_path, [scene(tmp_path, at(UTM31, 4.0, 47.0, 30, 90, 70))], [cover(tmp_path, lon=5.5)])


@pytest.mark.parametrize("target", ["EPSG:32633", "EPSG:4326", "EPSG:5070"])
def test_lattices_of_smooth_ground_are_as_good_as_exact_ones(target, monkeypatch):
    place = AffinePlace(Grid(3000, 700, (10.0, 1.0, 693780.0, 1.0, -10.0, 5350660.0)), "EPSG:32632")
    tolerance = 1e-8 if target == "EPSG:4326" else 1e-3
    asked, exact = [], lattice._nodes
    monkeypatch.setattr(lattice, "_nodes", lambda *given: asked.append(given) or exact(*given))
    found = lattice.lattice(place, target, target == "EPSG:4326", (tolerance, tolerance))
    assert len(asked) == 1
    truth = exact(place, target, target == "EPSG:4326", found.shape[1] - 1, found.shape[0] - 1)
    assert np.abs(found - truth).max() <= lattice.CUBIC_SHARE * tolerance
    assert found.shape[0] > 2 * 11
