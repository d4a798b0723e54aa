"""Where scenes come from: one file a band on several grids, products, lists, STAC; held against rasterio's warp."""

import json
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine
from rasterio.enums import Resampling
from rasterio.io import MemoryFile
from rasterio.vrt import WarpedVRT

from geokr import config, manifests
from geokr.config import ConfigError
from preprocess import raster
from preprocess.alignment import align
from preprocess.grid import Grid
from preprocess.inputs import PlanError
from preprocess.options import PackOptions
from preprocess.plan import make_plan
from tests.scenes import (
    NLCD,
    NO_QUALITY,
    RAW,
    UTM31,
    ZION,
    command,
    needs_shared,
    noise,
    pack_quietly,
    patches,
    pixels_of,
    read_records,
    write_raster,
)

PLACE = (10, 0, 4e5, 0, -10, 5.2e6)
WHOLE = (*RAW[:-2], "workers=0", "tile.size=32", "tile.step=32")  # RAW, whatever the bands
S2 = "T31TCJ_20200817T102031"
SAFE = "S2A_MSIL2A_20200817T102031_N0214_R065_T31TCJ_20200817T130000.SAFE"
LANDSAT = "LC08_L2SP_038034_20150818_20200908_02_T1"


def jp2(path, pixels, transform):
    """Writes a lossless JPEG 2000, as Sentinel-2's bands come."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(
        path, "w", driver="JP2OpenJPEG", width=pixels.shape[1], height=pixels.shape[0], count=1, dtype=pixels.dtype,
        crs=UTM31, transform=Affine(*transform), QUALITY="100", REVERSIBLE="YES", BLOCKXSIZE=64, BLOCKYSIZE=64,
    ) as file:  # fmt: skip
        file.write(pixels, 1)
    return path


def coarser(metres):
    return (metres, 0, 4e5, 0, -metres, 5.2e6)


@pytest.fixture(scope="module")
def cover(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cover")
    return write_raster(folder / "cover.tif", patches(3, 100, 100, [10, 20, 50]), (30, 0, 399700, 0, -30, 5200300))


@pytest.fixture(scope="module")
def safe(tmp_path_factory):
    """A Sentinel-2 level 2A product: 10 m and 20 m bands, some at both, with masks and previews beside them."""
    folder = tmp_path_factory.mktemp("s2") / SAFE
    image = folder / "GRANULE/L2A_T31TCJ_A026919_20200817T102031/IMG_DATA"
    for seed, band in enumerate(("B02", "B03", "B04", "B08")):
        pixels = noise(seed, (128, 192), "uint16", 100, 9000)
        jp2(image / f"R10m/{S2}_{band}_10m.jp2", pixels, coarser(10))
    for seed, band in enumerate(("B02", "B04", "B8A", "B11"), 10):
        jp2(image / f"R20m/{S2}_{band}_20m.jp2", noise(seed, (64, 96), "uint16", 100, 9000), coarser(20))
    jp2(image / f"R60m/{S2}_B01_60m.jp2", noise(30, (22, 32), "uint16", 100, 9000), coarser(60))
    jp2(image / f"R20m/{S2}_SCL_20m.jp2", noise(31, (64, 96), "uint8", 1, 11), coarser(20))
    jp2(image / f"R10m/{S2}_TCI_10m.jp2", noise(32, (128, 192), "uint8"), coarser(10))
    return folder


def landsat(folder, product=LANDSAT, bands=("B2", "B3", "B4"), **more):
    for seed, band in enumerate(bands):
        write_raster(folder / f"{product}_SR_{band}.TIF", noise(seed, (64, 64), "uint16", 1, 9000), PLACE, **more)
    return folder


def plan_of(scenes, cover, *keys):
    options = config.load(PackOptions, None, [*NO_QUALITY, "tile.size=32", "tile.step=32", "workers=0", *keys])
    return make_plan([str(s) for s in scenes], [str(cover)], "worldcover", options)


def packed(scenes, cover, out, *keys):
    """Records by tile id, pixels [H, W, C], of a dataset that keeps values as they are."""
    pack_quietly(scenes, [cover], "worldcover", out, *WHOLE, *keys)
    return {record.tile_id: pixels_of(record) for _, record in read_records(out)}


# ------------------------------------------------------------------------------------------- one grid of several


def warped(coarse, coarse_transform, transform, width, height, method, nodata=None):
    """What GDAL makes of a band on another grid, and which pixels have their centres in its ground (and data there)."""
    with MemoryFile() as memory:
        profile = {"driver": "GTiff", "count": 1, "dtype": coarse.dtype, "crs": UTM31, "nodata": nodata}
        with memory.open(
            width=coarse.shape[1], height=coarse.shape[0], transform=Affine(*coarse_transform), **profile
        ) as file:
            file.write(coarse, 1)
        with memory.open() as file, WarpedVRT(
            file, crs=UTM31, transform=Affine(*transform), width=width, height=height, tolerance=1e-9,
            resampling=Resampling[method],
        ) as vrt:  # fmt: skip
            pixels, mask = vrt.read(1), vrt.dataset_mask() != 0
    edges = Affine(*coarse_transform) * (0, 0), Affine(*coarse_transform) * coarse.shape[::-1]
    columns = (np.arange(width) + 0.5) * transform[0] + transform[2]
    rows = (np.arange(height) + 0.5) * transform[4] + transform[5]
    inside = (columns >= edges[0][0]) & (columns <= edges[1][0]), (rows <= edges[0][1]) & (rows >= edges[1][1])
    return pixels, inside[1][:, None] & inside[0][None] & (mask if nodata is not None else True)


def resampled(coarse, alignment, window, nodata=None):
    source = alignment.source(window)
    if source is None:
        return np.zeros((window[3], window[2]), coarse.dtype)
    part = coarse[source[1] : source[1] + source[3], source[0] : source[0] + source[2]]
    valid = np.ones(part.shape, np.uint8) if nodata is None else (part != nodata).astype(np.uint8)
    return alignment.resample(part, valid, source, window, nodata)


@pytest.mark.parametrize("dtype", raster.SCENE_DTYPES)
@pytest.mark.parametrize("method", ["nearest", "bilinear"])
@pytest.mark.parametrize(
    ("factor", "shift", "nodata"), [(2, 0, None), (2, 0, 0), (2, 15, None), (1, 5, None), (2.5, 3, 0), (4, -20, 0)]
)
def test_resampling_is_gdals_and_knows_no_chunk_borders(dtype, method, factor, shift, nodata):
    width, height = 120, 90
    high = 200 if dtype == "uint8" else 10000
    coarse = noise(1, (int(height / factor), int(width / factor)), dtype, 1, high)
    if nodata is not None:
        coarse[np.random.default_rng(2).random(coarse.shape) < 0.1] = nodata
    transform = (10 * factor, 0, 4e5 + shift, 0, -10 * factor, 5.2e6 - shift)
    alignment = align(Grid(width, height, PLACE), Grid(coarse.shape[1], coarse.shape[0], transform), method)
    got = resampled(coarse, alignment, (0, 0, width, height), nodata)
    want, there = warped(coarse, transform, PLACE, width, height, method, nodata)
    # ties between two whole numbers, and weights that binary cannot hold, are all that may part us from GDAL
    difference = np.abs(got.astype(float) - want)[there]
    assert difference.max() <= (1 if got.dtype.kind != "f" else 1e-3)
    assert (difference > 1e-3).mean() < (0.005 if factor == 2.5 else 1e-9)
    assert there.mean() > 0.7
    columns, rows = alignment.nearest(alignment.source((0, 0, width, height)), (0, 0, width, height))
    if nodata is None:
        np.testing.assert_array_equal((rows[:, None] >= 0) & (columns[None] >= 0), there)
    else:
        np.testing.assert_array_equal(got != nodata, there)
    parts = np.zeros_like(got)
    for top in range(0, height, 37):
        for left in range(0, width, 41):
            window = (left, top, min(41, width - left), min(37, height - top))
            parts[top : top + window[3], left : left + window[2]] = resampled(coarse, alignment, window, nodata)
    np.testing.assert_array_equal(parts, got)


def test_six_to_one_is_exact_and_halves_go_up():
    coarse = noise(5, (15, 20), "uint16", 1, 9000)
    alignment = align(Grid(120, 90, PLACE), Grid(20, 15, coarser(60)), "bilinear")
    got = resampled(coarse, alignment, (0, 0, 120, 90))
    for row, column in np.random.default_rng(1).integers(0, (90, 120), (300, 2)):
        value = Fraction(0)
        for axis_weights_y in _weights(int(row), 15):
            for axis_weights_x in _weights(int(column), 20):
                weight = axis_weights_y[1] * axis_weights_x[1]
                value += weight * int(coarse[axis_weights_y[0], axis_weights_x[0]])
        assert got[row, column] == int(value + Fraction(1, 2))


def _weights(pixel, length):
    at = Fraction(2 * pixel + 1, 12) - Fraction(1, 2)
    low = at.numerator // at.denominator
    clip = lambda n: min(max(n, 0), length - 1)  # noqa: E731
    return [(clip(low), 1 - (at - low)), (clip(low + 1), at - low)]


def test_interpolation_never_makes_nodata_of_data():
    coarse = np.array([[10, 30], [10, 30]], "uint8")
    alignment = align(Grid(4, 4, PLACE), Grid(2, 2, coarser(20)), "bilinear")
    assert 15 in resampled(coarse, alignment, (0, 0, 4, 4))
    assert 15 not in resampled(coarse, alignment, (0, 0, 4, 4), nodata=15)
    signed = np.array([[-10, 30], [-10, 30]], "float32")
    assert 0 in resampled(signed, alignment, (0, 0, 4, 4))
    assert 0 not in resampled(signed, alignment, (0, 0, 4, 4), nodata=0)
    tenths = np.array([[0.1, 0.3], [0.1, 0.3]], "float32")  # 0.15 is no float32, what a pixel holds is near it
    middle = np.float32(0.15)
    assert middle in resampled(tenths, alignment, (0, 0, 4, 4))
    assert middle not in resampled(tenths, alignment, (0, 0, 4, 4), nodata=0.15)


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        ((19, 5, 4e5, 5, -19, 5.2e6), "turned"),
        ((20, 0, 4e5, 0, 20, 5.2e6 - 640), "other way"),
        ((20, 0, 4e5, 0, -5, 5.2e6), "finer along one axis"),
        ((20, 0, 5e5, 0, -20, 5.2e6), "no ground"),
    ],
)
def test_grids_that_do_not_align(transform, message):
    with pytest.raises(ValueError, match=message):
        align(Grid(64, 64, PLACE), Grid(32, 32, transform), "nearest")


def test_turned_alike_is_aligned():
    turned = Affine.translation(4e5, 5.2e6) * Affine.rotation(20) * Affine.scale(10, -10)
    alignment = align(Grid(64, 64, tuple(turned)[:6]), Grid(32, 32, tuple(turned * Affine.scale(2))[:6]), "nearest")
    assert alignment.scale == (0.5, 0.5)
    assert alignment.offset == (0, 0)
    assert align(Grid(64, 64, PLACE), Grid(64, 64, (10, 0, 4e5 + 0.01, 0, -10, 5.2e6)), "nearest") is None


# ------------------------------------------------------------------------------------------------- Sentinel-2


@pytest.mark.parametrize("method", ["bilinear", "nearest"])
def test_a_safe_folder(safe, cover, tmp_path, method):
    keys = ("scene.sensor=sentinel2", f"scene.resampling={method}", "tile.bands=[red, nir, B8A, swir16, coastal]")
    tiles = packed([safe], cover, tmp_path / "out", *keys)
    manifest = manifests.load_manifest(tmp_path / "out")
    assert [(band.name, band.number, band.wavelength_nm) for band in manifest.bands] == [
        ("red", 4, 664.6), ("nir", 8, 832.8), ("nir08", 9, 864.7), ("swir16", 12, 1613.7), ("coastal", 1, 442.7),
    ]  # fmt: skip
    (scene,) = manifest.scenes
    assert (scene.scene_id, scene.date) == (SAFE.removesuffix(".SAFE"), "2020-08-17")
    assert len(tiles) == 4 * 6
    whole = []
    for band, metres in (("B04", 10), ("B08", 10), ("B8A", 20), ("B11", 20), ("B01", 60)):
        (path,) = safe.rglob(f"*_{band}_{metres}m.jp2")
        with rasterio.open(path) as file, WarpedVRT(
            file, crs=UTM31, transform=Affine(*PLACE), width=192, height=128, resampling=Resampling[method],
            tolerance=1e-9,
        ) as vrt:  # fmt: skip
            whole.append(vrt.read(1))
    whole = np.stack(whole, -1).astype(int)
    for tile_id, tile in tiles.items():
        left, top = map(int, tile_id.split(":")[1:])
        there = whole[top : top + 32, left : left + 32]
        np.testing.assert_array_equal(tile[..., :4], there[..., :4], err_msg=tile_id)
        assert np.abs(tile[..., 4] - there[..., 4]).max() <= 1  # sixths: GDAL rounds some halves down


def test_the_default_is_red_green_blue_at_10_m(safe, cover, tmp_path):
    tiles = packed([safe], cover, tmp_path / "out", "scene.sensor=sentinel2", "tile.bands=rgb")
    with rasterio.open(next(safe.rglob("*B02_10m.jp2"))) as file:
        np.testing.assert_array_equal(tiles[f"{SAFE[:-5]}:32:64"][..., 2], file.read(1)[64:96, 32:64])
    bands = manifests.load_manifest(tmp_path / "out").bands
    assert [band.name for band in bands] == ["red", "green", "blue"]


def test_only_coarse_bands_keep_their_own_grid(safe, cover):
    plan = plan_of([safe], cover, "scene.sensor=sentinel2", "tile.codec=raw", "tile.bands=[B8A, B11]")
    (task,) = plan.tasks
    assert (task.scene.place.width, task.scene.place.height) == (96, 64)
    assert {layer.path.rsplit("/")[-2] for layer in task.scene.layers if layer} == {"R20m"}


def test_globs_over_the_files_and_level_1c_names(safe, cover, tmp_path):
    globbed = plan_of([safe / "**/*.jp2"], cover, "scene.sensor=sentinel2")
    assert globbed.identity() == plan_of([safe], cover, "scene.sensor=sentinel2").identity()
    for band in ("B02", "B03", "B04"):
        source = next(safe.rglob(f"*{band}_10m.jp2"))
        shutil.copy(source, tmp_path / f"{S2}_{band}.jp2")
    plan = plan_of([tmp_path / "*.jp2"], cover, "scene.sensor=sentinel2")
    assert [task.scene.scene_id for task in plan.tasks] == [S2]
    assert plan.tasks[0].scene.date == "2020-08-17"


def test_the_day_from_the_metadata_where_names_have_none(cover, tmp_path):
    for band in ("B2", "B3", "B4"):
        write_raster(tmp_path / f"valley_{band}.tif", noise(1, (64, 64), "uint16"), PLACE)
    keys = ("scene.sensor=landsat8", "scene.nodata=7")
    assert plan_of([tmp_path], cover, *keys).tasks[0].scene.date == ""
    (tmp_path / "valley_MTL.txt").write_text('GROUP = IMAGE\n  DATE_ACQUIRED = 2015-08-18\n  X = "2020-01-01"\n')
    scene = plan_of([tmp_path], cover, *keys).tasks[0].scene
    assert (scene.scene_id, scene.date, scene.nodata[1:4]) == ("valley", "2015-08-18", (7, 7, 7))


# ---------------------------------------------------------------------------------------------------- Landsat


@needs_shared
def test_zions_four_files_give_the_tiles_of_the_stacked_one(tmp_path):
    keys = (*NO_QUALITY, "split.val_fraction=0", "tile.codec=raw", "stretch.mode=none", "workers=0", "tile.size=64",
            "tile.step=200", "scene.sensor=landsat8", "tile.bands=[red,green,blue,nir]")  # fmt: skip
    pack_quietly([ZION.parent / "landsat_b*.tif"], [NLCD], "nlcd", tmp_path / "apart", *keys)
    pack_quietly([ZION], [NLCD], "nlcd", tmp_path / "stacked", *keys)
    one, other = ({r.tile_id.split(":", 1)[1]: r for _, r in read_records(tmp_path / d)} for d in ("apart", "stacked"))
    assert len(one) == len(other) > 30
    for place, record in one.items():
        assert record.image == other[place].image
        np.testing.assert_array_equal(record.fractions, other[place].fractions)
        assert (record.transform, record.crs) == (other[place].transform, other[place].crs)
    assert manifests.load_manifest(tmp_path / "apart").train.mean == pytest.approx(
        manifests.load_manifest(tmp_path / "stacked").train.mean, rel=1e-15
    )


def test_landsat_folders_by_product(cover, tmp_path):
    landsat(tmp_path / "one")
    landsat(tmp_path / "two", LANDSAT.replace("20150818_", "20160722_"))
    write_raster(tmp_path / f"one/{LANDSAT}_QA_PIXEL.TIF", noise(1, (64, 64), "uint16"), PLACE)
    plan = plan_of([tmp_path / "one", tmp_path / "two"], cover, "scene.sensor=landsat8")
    assert [(task.scene.date, task.scene.nodata[3]) for task in plan.tasks] == [("2015-08-18", 0), ("2016-07-22", 0)]
    assert plan.tasks[0].scene.scene_id == LANDSAT
    both = plan_of([tmp_path], cover, "scene.sensor=landsat8")
    assert both.identity() == plan.identity()


def test_a_half_pixel_between_the_grids_as_landsats_panchromatic(cover, tmp_path):
    """Tiles take the fine grid; where the coarse bands end, there is no data."""
    landsat(tmp_path, bands=("B2", "B3", "B4"))
    fine = noise(9, (140, 140), "uint16", 1, 9000)
    place = (5, 0, 4e5 - 12.5, 0, -5, 5.2e6 + 12.5)
    write_raster(tmp_path / f"{LANDSAT}_B8.TIF", fine, place)
    keys = ("scene.sensor=landsat8", "tile.bands=[pan, red]", "quality.min_valid_pixels=0")
    tiles = packed([tmp_path], cover, tmp_path / "out", *keys)
    with rasterio.open(tmp_path / f"{LANDSAT}_SR_B4.TIF") as file:
        red, there = warped(file.read(1), PLACE, place, 140, 140, "bilinear")
    np.testing.assert_array_equal(tiles[f"{LANDSAT}:64:32"][..., 0], fine[32:64, 64:96])
    np.testing.assert_array_equal(tiles[f"{LANDSAT}:64:32"][..., 1], red[32:64, 64:96])
    assert there[2:, 2:][:128, :128].all()
    assert not there[:2].any()
    scene = plan_of([tmp_path], cover, *keys, "tile.codec=raw").tasks[0].scene
    pixels, mask = raster.read_pixels(scene, (8, 4), (0, 0, 140, 140))
    np.testing.assert_array_equal(mask != 0, there)
    np.testing.assert_array_equal(pixels[1, 2:130, 2:130], red[2:130, 2:130])


def test_grids_in_degrees_of_half_a_metre(cover, tmp_path):
    """The finer one gives the grid, whichever file comes first."""
    for name, step, side in (("red", 18e-6, 32), ("pan", 4.5e-6, 128)):
        write_raster(tmp_path / f"{name}.tif", noise(1, (side, side)), (step, 0, 1.0, 0, -step, 46.9), "EPSG:4326")
    codes, around = patches(1, 60, 60, (10, 20)), (1e-4, 0, 0.998, 0, -1e-4, 46.902)
    land = write_raster(tmp_path / "land.tif", codes, around, "EPSG:4326")
    for order in (("red", "pan"), ("pan", "red")):
        listed = write_list(tmp_path, [{"id": "a", "bands": {name: f"{name}.tif" for name in order}}])
        plan = plan_of([listed], land, "tile.codec=raw", f"tile.bands=[{order[0]}, {order[1]}]")
        assert plan.tasks[0].scene.place.width == 128


@pytest.mark.parametrize("masked", ["B2", "B4"])
def test_a_mask_of_one_file_counts_for_the_scene(cover, tmp_path, masked):
    landsat(tmp_path)
    with rasterio.open(tmp_path / f"{LANDSAT}_SR_{masked}.TIF", "r+") as file:
        mask = np.full((64, 64), 255, np.uint8)
        mask[:7, :11] = 0
        file.write_mask(mask)
    scene = plan_of([tmp_path], cover, "scene.sensor=landsat8").tasks[0].scene
    assert scene.masked
    _, got = raster.read_pixels(scene, (4, 3, 2), (0, 0, 40, 40))
    np.testing.assert_array_equal(got, mask[:40, :40])


@pytest.mark.parametrize(("name", "masked"), [("", True), ("alpha", True), ("other", False)])
def test_alpha_of_one_file_of_several(cover, tmp_path, name, masked):
    """Each band beside an alpha band of its own, as some services hand bands out; a list may call it otherwise."""
    alpha = np.full((64, 64), 255, np.uint8)
    alpha[:7, :11] = 0
    pixels = np.stack([noise(1, (64, 64)), alpha])
    write_raster(tmp_path / "red.tif", pixels, PLACE, photometric="MINISBLACK", alpha="YES")
    for seed, band in enumerate(("green", "blue"), 2):
        write_raster(tmp_path / f"{band}.tif", noise(seed, (64, 64)), PLACE)
    own = {band: f"{band}.tif" for band in ("red", "green", "blue")}
    own |= {name: {"path": "red.tif", "number": 2}} if name else {}
    scene = plan_of([write_list(tmp_path, [{"id": "a", "bands": own}])], cover, "tile.bands=rgb").tasks[0].scene
    assert scene.masked == masked
    _, got = raster.read_pixels(scene, (1, 2, 3), (0, 0, 40, 40))
    if masked:
        np.testing.assert_array_equal(got, alpha[:40, :40])
    else:
        assert got is None


# ----------------------------------------------------------------------------------------- what does not fit


def refused(scenes, cover, message, *keys):
    with pytest.raises((PlanError, ConfigError), match=message):
        plan_of(scenes, cover, *keys)


def test_a_product_that_lacks_a_band(cover, tmp_path):
    landsat(tmp_path, bands=("B2", "B3"))
    message = rf"1 of 1 scenes.*{LANDSAT} .*: has no file for band red \(B4\); it has blue \(B2\), green \(B3\)"
    refused([tmp_path], cover, f"(?s){message}", "scene.sensor=landsat8")
    landsat(tmp_path / "whole", LANDSAT.replace("20150818_", "20160722_"))
    plan = plan_of([tmp_path], cover, "scene.sensor=landsat8", "max_bad_fraction=0.5")
    assert dict(plan.rejected) == {LANDSAT: "band_missing"}


def test_two_files_for_one_band(cover, tmp_path):
    landsat(tmp_path)
    shutil.copy(tmp_path / f"{LANDSAT}_SR_B4.TIF", tmp_path / f"{LANDSAT}_B4.tif")
    refused([tmp_path], cover, f"product {LANDSAT} .*two files for its band red: .* and ", "scene.sensor=landsat8")


def test_unknown_bands_and_types_of_files(cover, tmp_path):
    landsat(tmp_path)
    refused([tmp_path], cover, r"no band 'rde' in .*did you mean 'red'.*it has coastal \(B1\), blue \(B2\)",
            "scene.sensor=landsat8", "tile.bands=[rde,green,blue]")  # fmt: skip
    write_raster(tmp_path / f"{LANDSAT}_SR_B4.TIF", noise(1, (64, 64)), PLACE)
    refused([tmp_path], cover, r"(?s)SR_B2\.TIF and .*SR_B4\.TIF: bands of uint16, uint8",
            "scene.sensor=landsat8")  # fmt: skip


def test_files_of_another_crs_or_turned(cover, tmp_path):
    landsat(tmp_path)
    path = tmp_path / f"{LANDSAT}_SR_B4.TIF"
    write_raster(path, noise(1, (64, 64), "uint16"), PLACE, "EPSG:32632")
    refused([tmp_path], cover, r"(?s)different coordinate systems, .*B4\.TIF.*gdalwarp", "scene.sensor=landsat8")
    write_raster(path, noise(1, (64, 64), "uint16"), (10, 1, 4e5, 1, -10, 5.2e6))
    refused([tmp_path], cover, r"(?s)grids of .*B4\.TIF.*do not align: its axes are turned", "scene.sensor=landsat8")


def test_folders(cover, tmp_path, safe):
    refused([safe], cover, "a folder: give --sensor sentinel2, or add /")
    refused([tmp_path], cover, "a folder: add /")
    (tmp_path / "notes.txt").write_text("")
    refused(
        [tmp_path], cover, "none of the 1 files below it has a name of sensor naip, such as m_", "scene.sensor=naip"
    )


def test_a_missing_product_changes_the_identity(cover, tmp_path):
    """A changed byte in any file of a scene is another dataset."""
    landsat(tmp_path)
    before = plan_of([tmp_path], cover, "scene.sensor=landsat8").identity()
    path = tmp_path / f"{LANDSAT}_SR_B3.TIF"
    with rasterio.open(path, "r+") as file:
        file.write(noise(77, (64, 64), "uint16"), 1)
    after = plan_of([tmp_path], cover, "scene.sensor=landsat8").identity()
    assert before["scenes"] != after["scenes"]
    assert {**before, "scenes": 0} == {**after, "scenes": 0}


# ------------------------------------------------------------------------------------------------------ lists


def write_list(folder, scenes, name="scenes.yaml"):
    (folder / name).write_text(json.dumps({"scenes": scenes}))
    return folder / name


def test_a_scene_list(cover, tmp_path):
    landsat(tmp_path)
    stack = noise(4, (3, 32, 32), "uint16")
    write_raster(tmp_path / "rest.tif", stack, coarser(20))
    bands = {name: f"{LANDSAT}_SR_{band}.TIF" for name, band in (("red", "B4"), ("green", "B3"), ("blue", "B2"))}
    bands["water"] = {"path": "rest.tif", "number": 3}
    listed = write_list(tmp_path, [
        {"id": "valley", "bands": bands, "date": "2020-06-12", "nodata": 3},
        {"file": "rest.tif", "names": ["blue", "red", "green"], "date": "2019/01/02"},
    ])  # fmt: skip
    plan = plan_of([listed], cover)
    rest, valley = plan.tasks
    assert [(s.scene_id, s.date, s.band_names) for s in (rest.scene, valley.scene)] == [
        ("rest", "2019-01-02", ("blue", "red", "green")),
        ("valley", "2020-06-12", ("red", "green", "blue", "water")),
    ]
    assert (rest.bands, valley.bands) == ((2, 3, 1), (1, 2, 3))
    assert valley.scene.nodata == (3, 3, 3, None)
    only = write_list(tmp_path, [{"id": "valley", "bands": bands}], "only.json")
    tiles = packed([only], cover, tmp_path / "out", "tile.bands=[water, red]", "scene.resampling=nearest")
    np.testing.assert_array_equal(tiles["valley:32:0"][..., 0], np.kron(stack[2], np.ones((2, 2), int))[:32, 32:])


@pytest.mark.parametrize(
    ("scene", "message"),
    [
        ({"file": "a.tif", "bands": {"red": "a.tif"}}, r"scenes\.yaml: scenes\.0: give either `file`"),
        ({}, "give either `file`"),
        ({"bands": {"red": 3}}, r"scenes\.0\.bands\.red"),
        ({"file": "a.tif", "date": "2020-02-30"}, r"scenes\.0\.date: '2020-02-30' is no day"),
        ({"file": "a.tif", "fiel": 1}, r"fiel"),
        ({"file": "a.tif", "names": ["x", "x"]}, "names: one stands twice"),
        ({"file": "gone.tif"}, r"gone\.tif: there is no such file"),
        ({"bands": {"red": "s.tif", "green": "s.tif", "blue": {"path": "s.tif", "number": 2}}}, "has no band 2, 1 at"),
        ({"file": "s.tif", "names": ["red", "green"]}, r"2 names \(red, green\) for a file of 1 bands"),
        ({"bands": {"red": "s.tif"}}, r"no band 'green' in .*scenes\.0; it has red"),
        ({"file": "https://example.org/x.tif"}, r"scenes\.0 https://example\.org/x\.tif: is not on this machine"),
    ],
)
def test_lists_that_do_not_fit(cover, tmp_path, scene, message):
    write_raster(tmp_path / "s.tif", noise(1, (64, 64)), PLACE)
    refused([write_list(tmp_path, [scene])], cover, f"(?s){message}")


def test_one_scene_twice(cover, tmp_path):
    write_raster(tmp_path / "s.tif", noise(1, (3, 64, 64)), PLACE)
    entry = {"id": "a", "bands": {"red": "s.tif", "green": {"path": "s.tif", "number": 2}}}
    refused([write_list(tmp_path, [entry, entry])], cover, "a is named 2 times")


# ------------------------------------------------------------------------------------------------------- STAC


def item(item_id, assets, **properties):
    return {
        "type": "Feature", "stac_version": "1.0.0", "id": item_id, "geometry": None, "links": [],
        "properties": {"datetime": "2021-07-03T10:11:12Z", **properties},
        "assets": {key: {"type": "image/tiff; application=geotiff", **asset} for key, asset in assets.items()},
    }  # fmt: skip


def eo(common, name="", micrometres=None):
    band = {"name": name or common, "common_name": common, "center_wavelength": micrometres}
    return [{key: value for key, value in band.items() if value}]


@pytest.fixture
def stac(tmp_path):
    """Files of an item in the way of the common Sentinel-2 collections."""
    for seed, key in enumerate(("B02", "B03", "B04", "B05", "B06", "TCI", "B04-jp2")):
        count = 3 if key == "TCI" else 1
        write_raster(tmp_path / f"img/{key}.tif", noise(seed, (count, 64, 64), "uint16"), PLACE)
    assets = {
        "visual": {"href": "img/TCI.tif", "eo:bands": [*eo("red"), *eo("green"), *eo("blue")]},
        "B02": {"href": "img/B02.tif", "eo:bands": eo("blue", "B02", 0.49), "roles": ["data"]},
        "B03": {"href": "./img/B03.tif", "eo:bands": eo("green", "B03")},
        "B04": {"href": "img/B04.tif", "eo:bands": eo("red", "B04", 0.665)},
        "B05": {"href": "img/B05.tif", "eo:bands": eo("rededge", "B05")},
        "B06": {"href": "img/B06.tif", "eo:bands": eo("rededge", "B06")},
        "thumbnail": {"href": "t.tif", "roles": ["thumbnail"]},
        "meta": {"href": "m.xml", "type": "application/xml"},
        "scl": {"href": "img/SCL.tif", "roles": ["mask"]},
    }
    return tmp_path, assets


def write_json(path, tree):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree))
    return path


def test_a_stac_item(stac, cover, tmp_path):
    folder, assets = stac
    path = write_json(folder / "item.json", item("S2_item", assets))
    scene = plan_of([path], cover).tasks[0].scene
    assert (scene.scene_id, scene.date) == ("S2_item", "2021-07-03")
    assert scene.band_names == (
        "blue",
        "green",
        "red",
        "B05",
        "B06",
    )  # rededge would be two; the picture's do not count
    assert scene.mask_path == str(folder / "img/SCL.tif")
    tiles = packed([path], cover, tmp_path / "out", "tile.bands=[red, B06, blue]")
    manifest = manifests.load_manifest(tmp_path / "out")
    assert [(band.name, band.wavelength_nm) for band in manifest.bands] == [("red", 665), ("B06", None), ("blue", 490)]
    with rasterio.open(folder / "img/B06.tif") as file:
        np.testing.assert_array_equal(tiles["S2_item:0:32"][..., 1], file.read(1)[32:, :32])
    named = plan_of([path], cover, "scene.sensor=sentinel2", "tile.bands=[B04, rededge2, B02]")
    assert [band.name for band in named.bands] == ["red", "rededge2", "blue"]
    assert [band.wavelength_nm for band in named.bands] == [665, 740.5, 490]


def test_an_asset_with_all_bands_and_the_names_of_stac_1_1(cover, tmp_path):
    write_raster(tmp_path / "naip.tif", noise(1, (4, 64, 64)), PLACE)
    bands = [{"name": name, "eo:common_name": name} for name in ("red", "green", "blue", "nir")]
    path = write_json(tmp_path / "item.json", {**item("m_1", {"image": {"href": "naip.tif", "bands": bands}})})
    assert plan_of([path], cover, "tile.bands=[nir,red,green]").tasks[0].bands == (4, 1, 2)
    assert plan_of([path], cover).tasks[0].bands == (1, 2, 3)


def test_an_assets_own_key_wins_among_two_of_one_name(stac, cover):
    folder, assets = stac
    two = {"red-jp2": {"href": "img/B04-jp2.tif", "eo:bands": eo("red")}, "red": {**assets["B04"]}}
    two |= {"green": assets["B03"], "blue": assets["B02"]}
    scene = plan_of([write_json(folder / "i.json", item("x", two))], cover).tasks[0].scene
    assert scene.band_names == ("red-jp2", "red", "green", "blue")
    assert scene.layers[1].path.endswith("B04.tif")


def test_item_collections_collections_and_globs(stac, cover):
    folder, assets = stac
    names = ("a", "b", "c")
    for name in names:
        deeper = {key: {**asset, "href": f"../../{asset['href']}"} for key, asset in assets.items()}
        write_json(folder / f"items/{name}/{name}.json", item(name, deeper))
    features = [item(name, assets) for name in names]
    whole = write_json(folder / "all.geojson", {"type": "FeatureCollection", "features": features})
    links = [{"rel": "item", "href": f"./items/{name}/{name}.json"} for name in names]
    collection = write_json(folder / "collection.json", {
        "type": "Collection", "stac_version": "1.0.0", "id": "c", "description": "d", "license": "other",
        "links": [*links, {"rel": "root", "href": "./collection.json"}],
        "extent": {"spatial": {"bbox": [[0, 0, 1, 1]]}, "temporal": {"interval": [[None, None]]}},
    })  # fmt: skip
    parent = write_json(folder / "catalog.json", {
        "type": "Catalog", "stac_version": "1.0.0", "id": "top", "description": "d",
        "links": [{"rel": "child", "href": "./collection.json"}],
    })  # fmt: skip
    plans = [plan_of([source], cover) for source in (whole, collection, parent, folder / "items/**/*.json")]
    assert [task.scene.scene_id for task in plans[0].tasks] == list(names)
    assert all(plan.identity() == plans[0].identity() for plan in plans)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"B04": {"href": "gone.tif", "eo:bands": eo("red")}}, r"gone\.tif: there is no such file"),
        ({"B04": None}, r"no band 'red' in x \(.*item\.json\).*; it has blue \(B02\)"),
        (dict.fromkeys(("visual", "B02", "B03", "B04", "B05", "B06")), r"x \(.*no asset is a GeoTIFF.*meta \(applic"),
        (
            {"B04": {"href": "https://example.org/x.tif", "eo:bands": eo("red")}},
            r"x \(.*asset 'B04': https://.*scene\.remote=true",
        ),
    ],
)
def test_items_that_do_not_fit(stac, cover, change, message):
    folder, assets = stac
    assets = {key: asset for key, asset in {**assets, **change}.items() if asset}
    if change == {"B04": None}:
        del assets["visual"]
    refused([write_json(folder / "item.json", item("x", assets))], cover, f"(?s){message}")


@pytest.mark.parametrize("far", ["https://example.org/x.tif", "ftp://example.org/x.tif"])
def test_what_nobody_asks_for_may_lie_elsewhere(stac, cover, far):
    folder, assets = stac
    for key in ("B05", "scl"):
        assets[key] = {**assets[key], "href": far}
    listed = write_json(folder / "item.json", item("x", assets))
    assert len(plan_of([listed], cover, "tile.bands=rgb").tasks) == 1
    refused([listed], cover, r"asset 'B05': \w+://example", "tile.bands=[red, B05]", "tile.codec=raw")
    refused([listed], cover, r"x \(.*mask: \w+://example", "tile.bands=rgb", "mask.kind=scl")
    here = str(write_raster(folder / "here.tif", np.zeros((64, 64), np.uint8), PLACE))
    (task,) = plan_of([listed], cover, "tile.bands=rgb", "mask.kind=scl", f"mask.pattern={here}").tasks
    assert task.scene.mask is not None
    assert task.scene.mask.path == here


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"type": "Feature"', "not valid|cannot be read"),
        ('{"type": "Feature", "id": 3}', r"item\.json: cannot be read as STAC"),
        ('{"type": "FeatureCollection", "features": []}', "holds no STAC item"),
        ("[1, 2]", "expected a mapping"),
        ('{"type": "Catalog", "stac_version": "1.0.0", "id": "t", "description": "d", "links": [{"rel": "item", '
         '"href": "https://example.org/i.json"}]}', "links to https://example.org/i.json: is not on this machine"),
    ],
)  # fmt: skip
def test_damaged_stac_files(cover, tmp_path, text, message):
    (tmp_path / "item.json").write_text(text)
    refused([tmp_path / "item.json"], cover, message)


def test_the_command_line(safe, cover, tmp_path, capsys):
    keys = ("--sensor", "sentinel2", *NO_QUALITY, "tile.size=32", "tile.step=32", "split.val_fraction=0", "workers=0")
    assert command([safe], [cover], "worldcover", tmp_path / "out", *keys) == 0
    assert command([safe], [cover], "worldcover", tmp_path / "out", *keys) == 0
    assert "already holds this dataset" in capsys.readouterr().out
    assert command([safe], [cover], "worldcover", tmp_path / "out", *keys, "tile.bands=[B02,B03,B04]") == 1
    assert "tile.bands" in capsys.readouterr().err


@pytest.mark.parametrize("way", ["safe", "list", "stac"])
def test_cloud_masks_of_products_lists_and_items(safe, cover, tmp_path, way):
    """The classification that lies in the product, or that a list or an item names."""
    image = next(safe.rglob("IMG_DATA"))
    bands = {"red": "B04", "green": "B03", "blue": "B02"}
    paths = {name: str(image / f"R10m/{S2}_{band}_10m.jp2") for name, band in bands.items()}
    scl = str(image / f"R20m/{S2}_SCL_20m.jp2")
    keys, scenes = ["mask.kind=scl"], safe
    if way == "safe":
        keys.append("scene.sensor=sentinel2")
    elif way == "list":
        scenes = write_list(tmp_path, [{"id": "x", "bands": paths, "mask": scl}])
    else:
        assets = {name: {"href": path, "type": "image/jp2"} for name, path in paths.items()}
        scenes = write_json(tmp_path / "i.json", item("x", {**assets, "scl": {"href": scl}}))
    (task,) = plan_of([scenes], cover, *keys).tasks
    assert task.scene.mask is not None
    assert task.scene.mask.path == scl


def test_a_scenes_own_mask_comes_before_the_pattern_and_needs_none(cover, tmp_path):
    for name, value in (("a", 1), ("b", 2)):
        write_raster(tmp_path / f"{name}.tif", noise(value, (3, 64, 64)), PLACE)
        write_raster(tmp_path / f"{name}_mask.tif", np.zeros((64, 64), np.uint8), PLACE)
    write_raster(tmp_path / "own.tif", np.zeros((64, 64), np.uint8), PLACE)
    every = [{"file": "a.tif", "mask": "own.tif"}, {"file": "b.tif", "mask": "own.tif"}]
    keys = ("mask.kind=values", "mask.reject=[1]")

    def masks(scenes, *more):
        found = plan_of([write_list(tmp_path, scenes)], cover, *keys, *more).tasks
        return [task.scene.mask and Path(task.scene.mask.path).name for task in found]

    assert masks(every) == ["own.tif", "own.tif"]
    some = [every[0], {"file": "b.tif"}]
    assert masks(some, "mask.pattern=./{stem}_mask.tif") == ["own.tif", "b_mask.tif"]
    refused([write_list(tmp_path, some)], cover, r"b\.tif: names no mask.*set mask\.pattern", *keys)
    assert masks(some, "mask.required=false") == ["own.tif", None]
