"""Scenes with RPCs or ground control points and no CRS, against places computed without GDAL, pixel by pixel."""

import pickle
import shutil
import warnings

import numpy as np
import pytest
import rasterio
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS
from rasterio.errors import NotGeoreferencedWarning
from rasterio.transform import from_origin
from rasterio.warp import reproject
from scipy.interpolate import RBFInterpolator

from geokr import manifests
from geokr.landcover import build_legend, load_product
from preprocess import labels, pack_records, rpc, scene_headers, sheet_headers, sheets
from preprocess.errors import RasterError
from preprocess.georeference import Placement
from preprocess.grid import Grid
from preprocess.inputs import PlanError
from preprocess.place import AffinePlace
from tests.scenes import (
    RAW,
    UTM31,
    OtherWay,
    contents,
    noise,
    pack_quietly,
    patches,
    read_records,
    shares,
    write_raster,
)
from tests.sensors import Relief, forward, located, rpb_text, rpc_text, sensor, write_image

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
LON, LAT, WIDTH, HEIGHT, SIZE = 4.0, 47.0, 110, 100, 32
GLOBELAND = [10, 20, 30, 60, 80, 90]
KEYS = (*RAW, f"tile.size={SIZE}", "tile.step=30")


@pytest.fixture
def cover(tmp_path):
    """A map of 30 m around the image, larger than any height moves it."""
    return write_raster(
        tmp_path / "n31_45_2020lc030.tif", patches(3, 400, 400, GLOBELAND), (30, 0, 570e3, 0, -30, 5212e3), UTM31
    )


def rpc_scene(tmp_path, pixel=30.0, name="s.tif", seed=0, tilt=0.3):
    coefficients = sensor(LON, LAT, pixel, WIDTH, HEIGHT, seed, tilt)
    path = write_image(tmp_path / name, WIDTH, HEIGHT)
    path.with_suffix(".rpb").write_text(rpb_text(coefficients))
    return path, coefficients


def check(out, cover, where, k=(1, 1), crs="EPSG:4326"):
    """Every record's fractions against land cover looked up where ``where`` (columns, rows -> x, y) says."""
    manifest, other = manifests.load_manifest(out), OtherWay("globeland30", [cover])
    names = [entry.name for entry in manifest.classes]
    worst, count = 0.0, 0
    for _, record in read_records(out, manifest):
        left, top = map(int, record.tile_id.split(":")[1:])
        columns, rows = np.meshgrid(
            left + (np.arange(SIZE * k[0]) + 0.5) / k[0], top + (np.arange(SIZE * k[1]) + 0.5) / k[1]
        )
        fractions, share = shares(names, other.labels_at(*where(columns, rows), crs), columns.size)
        worst = max(worst, float(np.abs(record.fractions - fractions).max()), abs(record.valid_fraction - share))
        count += 1
    assert count == 16
    assert worst <= 0.001
    return manifest


# --------------------------------------------------------------------------------------------------------- RPCs


@pytest.mark.parametrize("kind", ["tags", ".rpb", ".RPB", ".rpc", "_RPC.TXT", "_rpc.txt"])
def test_rpcs_wherever_they_stand(tmp_path, cover, kind):
    coefficients = sensor(LON, LAT, 30, WIDTH, HEIGHT)
    one = write_image(tmp_path / "GF1_PMS1_L1A-MSS1.tiff", WIDTH, HEIGHT, rpcs=coefficients if kind == "tags" else None)
    if kind != "tags":
        text = rpb_text if kind.lower() == ".rpb" else rpc_text
        (tmp_path / f"GF1_PMS1_L1A-MSS1{kind}").write_text(text(coefficients))
    pack_quietly([one], [cover], "globeland30", tmp_path / "out", *KEYS)
    check(tmp_path / "out", cover, lambda c, r: located(coefficients, c, r, 300.0))


@pytest.mark.parametrize(("pixel", "height"), [(30.0, 0), (30.0, 800), (8.0, None), (8.0, 800), (75.0, None)])
def test_rpcs_at_a_height(tmp_path, cover, pixel, height):
    one, coefficients = rpc_scene(tmp_path, pixel)
    keys = () if height is None else (f"scene.height={height}",)
    pack_quietly([one], [cover], "globeland30", tmp_path / "out", *KEYS, *keys)
    k = (3, 3) if pixel == 75 else (1, 1)
    check(tmp_path / "out", cover, lambda c, r: located(coefficients, c, r, 300.0 if height is None else height), k)
    if height is not None:  # and another height is another place
        with pytest.raises(AssertionError):
            check(tmp_path / "out", cover, lambda c, r: located(coefficients, c, r, height + 150.0), k)


@pytest.mark.parametrize("pixel", [24.0, 8.0])
@pytest.mark.parametrize("above", [None, 45])
def test_rpcs_over_a_dem(tmp_path, cover, pixel, above):
    one, coefficients = rpc_scene(tmp_path, pixel)
    relief = Relief(LON, LAT, 0.06, 1 / 3600)
    dem = relief.write(tmp_path / "dem.tif")
    keys = (f"scene.dem={dem}", *(() if above is None else (f"scene.height={above}",)))
    pack_quietly([one], [cover], "globeland30", tmp_path / "out", *KEYS, *keys)
    check(tmp_path / "out", cover, lambda c, r: located(coefficients, c, r, lambda x, y: relief(x, y) + (above or 0)))
    with pytest.raises(AssertionError):  # the hills count
        check(tmp_path / "out", cover, lambda c, r: located(coefficients, c, r, 300.0 + (above or 0)))


def test_a_dem_in_another_crs(tmp_path, cover):
    """Level ground at 500 m, so that how heights are interpolated does not matter."""
    one, coefficients = rpc_scene(tmp_path)
    dem = write_raster(tmp_path / "dem.tif", np.full((200, 200), 500, np.int16), (60, 0, 570e3, 0, -60, 5212e3), UTM31)
    pack_quietly([one], [cover], "globeland30", tmp_path / "out", *KEYS, f"scene.dem={dem}")
    check(tmp_path / "out", cover, lambda c, r: located(coefficients, c, r, 500.0))


def test_a_hole_in_the_dem_leaves_its_tiles_unlabelled(tmp_path, cover):
    one, _ = rpc_scene(tmp_path)
    relief = Relief(LON, LAT, 0.06, 1 / 3600)
    relief.heights[200:240, 200:240] = -9999
    dem = relief.write(tmp_path / "dem.tif", nodata=-9999)
    packed = pack_quietly([one], [cover], "globeland30", tmp_path / "out", *KEYS, f"scene.dem={dem}")
    assert packed.manifest.counts["rejected_unlabelled"] in range(1, 10)
    assert packed.manifest.counts["kept"] + packed.manifest.counts["rejected_unlabelled"] == 16


@pytest.mark.parametrize("kind", ["rpc", "dem", "gcp"])
def test_the_same_scene_warped_to_a_crs_first(tmp_path, cover, kind):
    """GDAL warps the numbers of the tiles to UTM at a quarter of the pixel, and that map is labelled as any scene is.

    Each tile then counts the sub-pixels that bear its number. They are as many as 16 a pixel of the tile but lie
    elsewhere in it, so fractions agree only to what another sampling of the same ground gives: 0.006 here, at three
    pixels of the image a pixel of the map.
    """
    how: dict = {}
    if kind == "gcp":
        one = write_image(tmp_path / "s.tif", WIDTH, HEIGHT, gcps=(curved_points(scale=1 / 3), "EPSG:4326"))
        how["gcps"] = curved_points(scale=1 / 3)
    else:
        one, coefficients = rpc_scene(tmp_path, pixel=10.0)
        how["rpcs"] = rasterio.rpc.RPC(**coefficients)
        how["RPC_HEIGHT"] = 600
    keys = [] if kind == "gcp" else ["scene.height=600"]
    if kind == "dem":
        dem = Relief(LON, LAT, 0.06, 1 / 3600, relief=100).write(tmp_path / "dem.tif")
        how |= {"RPC_DEM": str(dem), "RPC_HEIGHT": 0}
        keys = [f"scene.dem={dem}"]
    manifest = pack_quietly(
        [one], [cover], "globeland30", tmp_path / "out", *KEYS, f"tile.step={SIZE}", *keys
    ).manifest  # tiles side by side, the last row and column moved inward
    place = scene_headers.read_header(str(one), Placement()).place
    lon, lat = place.points("EPSG:4326", np.array([WIDTH / 2]), np.array([HEIGHT / 2]))
    x, y = (float(v[0]) for v in rasterio.warp.transform("EPSG:4326", UTM31, lon, lat)[:2])
    side = 900
    transform = from_origin(x - side * 1.25, y + side * 1.25, 2.5, 2.5)
    legend = build_legend(load_product("globeland30"))
    entries = sheets.label_sheets([sheet_headers.read_sheet(str(cover))], load_product("globeland30"))
    warped_labels = labels.label_grid(
        AffinePlace(Grid(side, side, tuple(transform)[:6]), CRS.from_epsg(32631).to_wkt()), entries, legend
    )
    numbers, here = np.zeros((HEIGHT, WIDTH), np.uint8), np.zeros((side, side), np.uint8)
    found = {}
    for number, (_, record) in enumerate(read_records(tmp_path / "out", manifest), 1):
        left, top = map(int, record.tile_id.split(":")[1:])
        if left % SIZE == top % SIZE == 0:
            numbers[top : top + SIZE, left : left + SIZE] = number
            found[number] = record.fractions
    assert len(found) == 9
    reproject(numbers, here, src_crs="EPSG:4326", dst_crs=UTM31, dst_transform=transform, tolerance=1e-6, **how)
    for number, fractions in found.items():
        counts = np.bincount(warped_labels[here == number], minlength=256)[: len(manifest.classes)]
        np.testing.assert_allclose(fractions, counts / counts.sum(), atol=0.006)


def test_the_record_tells_where_a_tile_lies(tmp_path, cover):
    """Its transform is the affine one nearest to the model over the tile; its lonlat is the model's own."""
    one, coefficients = rpc_scene(tmp_path)
    pack_quietly([one], [cover], "globeland30", tmp_path / "out", *KEYS)
    for _, record in read_records(tmp_path / "out"):
        left, top = map(int, record.tile_id.split(":")[1:])
        assert CRS.from_wkt(record.crs) == CRS.from_epsg(4326)
        columns, rows = np.meshgrid(np.linspace(0, SIZE, 9), np.linspace(0, SIZE, 9))
        lon, lat = located(coefficients, left + columns, top + rows, 300.0)
        terms = np.stack([columns.ravel(), rows.ravel(), np.ones(81)], 1)
        fit = np.linalg.lstsq(terms, np.stack([lon.ravel(), lat.ravel()], 1), rcond=None)[0].T.ravel()
        np.testing.assert_allclose(record.transform, fit, rtol=1e-6)
        middle = located(coefficients, np.array([left + SIZE / 2]), np.array([top + SIZE / 2]), 300.0)
        np.testing.assert_allclose(record.lonlat, np.ravel(middle), atol=1e-9)


def test_places_travel(tmp_path):
    one, _ = rpc_scene(tmp_path)
    dem = Relief(LON, LAT, 0.06, 1 / 3600).write(tmp_path / "dem.tif")
    for placement in (Placement(), Placement(dem=scene_headers.read_dem(str(dem)))):
        place = scene_headers.read_header(str(one), placement).place
        part = place.window(10, 20, 50, 40).subdivided(2, 4)
        assert (part.width, part.height) == (100, 160)
        again = pickle.loads(pickle.dumps(part))
        assert again == part
        columns, rows = np.array([0.0, 100.0, 37.0]), np.array([0.0, 160.0, 5.0])
        for a, b in zip(part.points("EPSG:4326", columns, rows),
                        place.points("EPSG:4326", 10 + columns / 2, 20 + rows / 4), strict=True):  # fmt: skip
            np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(again.points(UTM31, columns, rows), part.points(UTM31, columns, rows))


def test_across_the_antimeridian(tmp_path):
    """RPCs and control points that run over 180 degrees of longitude, land cover on both sides."""
    codes = patches(1, 300, 36000, GLOBELAND)
    world = write_raster(tmp_path / "cover.tif", codes, (0.01, 0, -180, 0, -0.01, 1.5), "EPSG:4326", compress="lzw")
    coefficients = sensor(180.0, 0.2, 1000, WIDTH, HEIGHT, tilt=0.1)
    one = write_image(tmp_path / "s.tif", WIDTH, HEIGHT, rpcs=coefficients)
    grid = [(c, r) for c in (0, 55, 110) for r in (0, 50, 100)]
    lon, lat = located(coefficients, *np.array(grid, float).T, 300.0)
    points = [GroundControlPoint(r, c, (x + 180) % 360 - 180, y)
              for (c, r), x, y in zip(grid, lon, lat, strict=True)]  # fmt: skip
    two = write_image(tmp_path / "t.tif", WIDTH, HEIGHT, gcps=(points, "EPSG:4326"))
    for path in (one, two):
        pack_quietly([path], [world], "globeland30", tmp_path / path.stem, *KEYS)
        scene_place = scene_headers.read_header(str(path), Placement()).place
        check(tmp_path / path.stem, world, lambda c, r, p=scene_place: turned(p.points("EPSG:4326", c, r)))
        sides = {np.sign(record.lonlat[0]) for _, record in read_records(tmp_path / path.stem)}
        assert sides == {-1.0, 1.0}
    np.testing.assert_allclose(
        turned(scene_place.points("EPSG:4326", np.array([20.0]), np.array([30.0]))),
        turned(located(coefficients, np.array([20.0]), np.array([30.0]), 300.0)), atol=1e-3,
    )  # fmt: skip


def turned(lonlat):
    return (lonlat[0] + 180) % 360 - 180, lonlat[1]


# ----------------------------------------------------------------------------------------- ground control points


def curved_points(step=25, bend=4e-8, scale=1.0):
    """Points in degrees around the map's middle, on a surface of second order."""
    found = []
    for row in np.arange(0, HEIGHT + 1, step, dtype=float):
        for column in np.arange(0, WIDTH + 1, step, dtype=float):
            x = 3.98 + 3.5e-4 * scale * column + 4e-5 * scale * row + bend * scale * column * row
            y = 47.013 + 3e-5 * scale * column - 2.4e-4 * scale * row + bend * scale * row**2
            found.append(GroundControlPoint(row, column, x, y))
    return found


def fitted(points, order):
    """Least squares in float64: columns, rows to x, y."""
    columns, rows, x, y = np.array([(p.col, p.row, p.x, p.y) for p in points]).T

    def terms(c, r):
        linear = [np.ones_like(c), c, r]
        return np.stack(linear if order == 1 else [*linear, c * c, c * r, r * r], -1)

    solution = np.linalg.lstsq(terms(columns, rows), np.stack([x, y], 1), rcond=None)[0]
    return lambda c, r: tuple(np.moveaxis(terms(c, r) @ solution, -1, 0))


@pytest.mark.parametrize("count", [3, 5, 6, 20])
def test_control_points_by_a_polynomial(tmp_path, cover, count):
    """Noisy points: an exact fit would be another place."""
    rng = np.random.default_rng(count)
    chosen = rng.permutation(curved_points())[:count] if count < 20 else curved_points()
    points = [GroundControlPoint(p.row, p.col, p.x + rng.normal(0, 1e-4), p.y + rng.normal(0, 1e-4)) for p in chosen]
    one = write_image(tmp_path / "s.tif", WIDTH, HEIGHT, gcps=(points, "EPSG:4326"))
    where = fitted(points, 1 if count < 6 else 2)
    assert pack_quietly([one], [cover], "globeland30", tmp_path / "out", *KEYS, "labels.min_valid_fraction=0.01")
    check(tmp_path / "out", cover, where)


def test_control_points_in_a_projection(tmp_path, cover):
    degrees = curved_points()
    x, y = rasterio.warp.transform("EPSG:4326", UTM31, [p.x for p in degrees], [p.y for p in degrees])[:2]
    points = [GroundControlPoint(p.row, p.col, x[i], y[i]) for i, p in enumerate(degrees)]
    one = write_image(tmp_path / "s.tif", WIDTH, HEIGHT, gcps=(points, UTM31))
    pack_quietly([one], [cover], "globeland30", tmp_path / "out", *KEYS)
    check(tmp_path / "out", cover, fitted(points, 2), crs=UTM31)
    for _, record in read_records(tmp_path / "out"):
        assert CRS.from_wkt(record.crs) == CRS.from_epsg(32631)


def test_control_points_by_a_spline(tmp_path, cover):
    rng = np.random.default_rng(0)
    points = [GroundControlPoint(p.row, p.col, p.x + rng.normal(0, 8e-5), p.y + rng.normal(0, 8e-5))
              for p in curved_points()]  # fmt: skip
    one = write_image(tmp_path / "s.tif", WIDTH, HEIGHT, gcps=(points, "EPSG:4326"))
    pack_quietly([one], [cover], "globeland30", tmp_path / "out", *KEYS, "scene.gcp=tps")
    columns, rows, x, y = np.array([(p.col, p.row, p.x, p.y) for p in points]).T
    spline = RBFInterpolator(np.stack([columns, rows], 1), np.stack([x, y], 1), kernel="thin_plate_spline", degree=1)
    place = scene_headers.read_header(str(one), Placement(gcp="tps")).place
    np.testing.assert_allclose(place.points("EPSG:4326", columns, rows), (x, y), atol=1e-9)  # through every point
    inside = np.random.default_rng(1).uniform(0, 100, (300, 2))
    found = np.stack(place.points("EPSG:4326", *inside.T), 1)
    # GDAL's spline has an approximate logarithm; between points that 9 m of noise bend, it is up to 2 m from exact
    np.testing.assert_allclose(found, spline(inside), atol=2.5e-5)
    assert np.abs(found - np.stack(fitted(points, 2)(*inside.T), 1)).max() > 5e-5
    check(tmp_path / "out", cover, lambda c, r: place.points("EPSG:4326", c, r))


# ------------------------------------------------------------------------------------- precedence and identity


def test_a_crs_and_transform_come_first(tmp_path, cover):
    """Orthorectified products often keep the RPCs of the image that they were made from."""
    pixels, transform = noise(9, (2, HEIGHT, WIDTH)), (30, 0, 575e3, 0, -30, 5207e3)
    for name in ("with", "without"):
        write_raster(tmp_path / f"{name}/s.tif", pixels, transform)
    (tmp_path / "with/s.rpb").write_text(rpb_text(sensor(LON, LAT, 30, WIDTH, HEIGHT)))
    for name in ("with", "without"):
        pack_quietly([tmp_path / name / "s.tif"], [cover], "globeland30", tmp_path / f"{name}/out", *KEYS)
    assert contents(tmp_path / "with/out") == contents(tmp_path / "without/out")


def test_a_file_beside_the_image_comes_before_its_tags(tmp_path):
    one = write_image(tmp_path / "s.tif", WIDTH, HEIGHT, rpcs=sensor(LON, LAT, 30, WIDTH, HEIGHT, seed=1))
    (tmp_path / "s.rpb").write_text(rpb_text(sensor(LON, LAT, 30, WIDTH, HEIGHT, seed=2)))
    place = scene_headers.read_header(str(one), Placement()).place
    assert place.model.rpc == rpc.read(str(tmp_path / "s.rpb"))


def test_what_places_a_scene_counts_in_its_identity(tmp_path):
    one, coefficients = rpc_scene(tmp_path)
    dem = Relief(LON, LAT, 0.06, 1 / 3600).write(tmp_path / "dem.tif")
    other = Relief(LON, LAT, 0.06, 1 / 3600, seed=1).write(tmp_path / "dem2.tif")
    (tmp_path / "moved").mkdir()
    moved = shutil.copy(dem, tmp_path / "moved/dem.tif")

    def identity(**how):
        if "dem" in how:
            how["dem"] = scene_headers.read_dem(str(how["dem"]))
        return scene_headers.read_header(str(one), Placement(**how)).placed

    found = [identity(), identity(height=10), identity(dem=dem), identity(dem=other), identity(dem=dem, height=5)]
    (tmp_path / "s.rpb").write_text(rpb_text({**coefficients, "line_off": coefficients["line_off"] + 1}))
    found.append(identity())
    assert len(set(found)) == len(found)
    (tmp_path / "s.rpb").write_text(rpb_text(coefficients))
    assert identity(dem=moved) == found[2]


def test_a_dem_may_move_without_changing_a_byte(tmp_path, cover):
    one, _ = rpc_scene(tmp_path)
    relief = Relief(LON, LAT, 0.06, 1 / 3600)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        relief.write(tmp_path / name / "dem.tif")
        pack_quietly(
            [one], [cover], "globeland30", tmp_path / name / "out", *KEYS, f"scene.dem={tmp_path}/{name}/dem.tif"
        )
    assert contents(tmp_path / "a/out") == contents(tmp_path / "b/out")


def test_another_dem_under_the_same_name_is_seen_at_once(tmp_path):
    """A Dask worker lives longer than a run, and must not label the next by the DEM that it opened for the first."""
    one, _ = rpc_scene(tmp_path)
    middle = np.array([WIDTH / 2]), np.array([HEIGHT / 2])
    found = []
    for height in (0, 2000):
        level = np.full((240, 240), height, np.int16)
        dem = write_raster(tmp_path / "new.tif", level, (60, 0, 570e3, 0, -60, 5212e3), UTM31)
        dem = dem.replace(tmp_path / "dem.tif")
        place = scene_headers.read_header(str(one), Placement(dem=scene_headers.read_dem(str(dem)))).place
        found.append(np.ravel(place.points(UTM31, *middle)))
    apart = np.hypot(*(found[1] - found[0]))
    assert apart > 300  # 0.3 of the height, by the tilt
    dem.unlink()
    with pytest.raises(RasterError, match=r"dem\.tif cannot be read: No such file"):
        place.points(UTM31, *middle)


def test_bands_in_files_of_their_own_with_the_same_rpcs(tmp_path, cover):
    """They are one grid; with other RPCs they are not, and nothing brings them together."""
    coefficients, names = sensor(LON, LAT, 30, WIDTH, HEIGHT), ("green", "red")
    for name in names:
        write_image(tmp_path / f"{name}.tif", WIDTH, HEIGHT, rpcs=coefficients)
    bands = "".join(f"      {name}: {name}.tif\n" for name in names)
    (tmp_path / "list.yaml").write_text(f"scenes:\n  - id: one\n    date: 2020-06-12\n    bands:\n{bands}")
    keys = (*KEYS, "tile.bands=[green, red]")
    pack_quietly([tmp_path / "list.yaml"], [cover], "globeland30", tmp_path / "out", *keys)
    check(tmp_path / "out", cover, lambda c, r: located(coefficients, c, r, 300.0))
    write_image(tmp_path / "red.tif", WIDTH, HEIGHT, rpcs=sensor(LON, LAT, 30, WIDTH, HEIGHT, seed=1))
    with pytest.raises(PlanError, match=r"(?s)place them apart: .*red\.tif.*gdalwarp"):
        pack_quietly([tmp_path / "list.yaml"], [cover], "globeland30", tmp_path / "other", *keys)


def test_any_number_of_workers(tmp_path, cover):
    one, _ = rpc_scene(tmp_path)
    dem = Relief(LON, LAT, 0.06, 1 / 3600).write(tmp_path / "dem.tif")
    for workers in (0, 2):
        keys = (*KEYS, f"scene.dem={dem}", f"workers={workers}")
        pack_quietly([one], [cover], "globeland30", tmp_path / f"out{workers}", *keys)
    assert contents(tmp_path / "out0") == contents(tmp_path / "out2")


# ------------------------------------------------------------------------------------------------------ the split


def test_sensors_and_maps_agree_on_what_is_held_out(tmp_path):
    """A scene with RPCs, one over a DEM, and one with a CRS over the same ground share none between the splits."""
    cover = write_raster(tmp_path / "c.tif", patches(3, 500, 500, GLOBELAND), (60, 0, 560e3, 0, -60, 5222e3), UTM31)
    coefficients = sensor(LON, LAT, 30, 400, 400)
    one = write_image(tmp_path / "rpc.tif", 400, 400, rpcs=coefficients)
    two = write_raster(tmp_path / "map.tif", noise(1, (2, 400, 400)), (28, 0, 571e3, 0, -28, 5211e3), UTM31)
    relief = Relief(LON, LAT, 0.2, 1 / 3600)
    dem = relief.write(tmp_path / "dem.tif")
    keys = (*RAW, "tile.size=16", "tile.step=16", "split.val_fraction=0.4", "split.block_m=2000", f"scene.dem={dem}")
    manifest = pack_quietly([one, two], [cover], "globeland30", tmp_path / "out", *keys).manifest
    assert manifest.counts["rejected_straddles_split"] > 100
    cells: dict[str, set] = {"train": set(), "val": set()}
    within = np.meshgrid(np.linspace(0, 16, 17), np.linspace(0, 16, 17))
    seen = set()
    for split, record in read_records(tmp_path / "out", manifest):
        left, top = map(int, record.tile_id.split(":")[1:])
        seen.add((record.scene_id, split))
        if record.scene_id == "rpc":
            lon, lat = located(coefficients, left + within[0], top + within[1], relief)
            x, y = rasterio.warp.transform("EPSG:4326", UTM31, lon.ravel(), lat.ravel())[:2]
        else:
            a, _, c, _, e, f = record.transform
            x, y = (a * within[0] + c).ravel(), (e * within[1] + f).ravel()
        cells[split] |= set(zip((np.array(x) // 15).astype(int), (np.array(y) // 15).astype(int), strict=True))
    assert len(seen) == 4
    assert not cells["train"] & cells["val"]


# --------------------------------------------------------------------------------------------------------- errors


FIRST = "+1.00000000000000E+00,"
BROKEN = {
    "a number that is none": ("lineOffset = ", "lineOffset = x", r"s\.rpb: its field lineOffset holds 'x\+49\.5"),
    "not finite": ("heightScale = +500.0", "heightScale = nan ", r"field heightScale holds 'nan"),
    "a field that is missing": ("latScale", "latScal", r"s\.rpb: its RPCs have no field latScale"),
    "a number too few": (
        f"sampDenCoef = (\n\t\t\t{FIRST}",
        "sampDenCoef = (",
        "sampDenCoef has 19 numbers, expected 20",
    ),
    "a scale of zero": ("heightScale = +500", "heightScale = 0", r"height_scale is 0\.0: expected a number above 0"),
    "off the Earth": ("latOffset = +47", "latOffset = 4700", "no place on Earth"),
    "of another image": (
        "lineScale = +50",
        "lineScale = 12",
        "110 x 100 pixels, but its RPCs are those of an image of",
    ),
    "cut short": (None, 900, r"s\.rpb: its field lineNumCoef holds ''"),
    "empty": (None, 0, r"s\.rpb: its RPCs have no field LINE_OFF"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_rpcs(tmp_path, cover, case):
    one, coefficients = rpc_scene(tmp_path)
    before, after, message = BROKEN[case]
    text = rpb_text(coefficients).replace("\r\n", "\n")
    assert before is None or before in text
    (tmp_path / "s.rpb").write_text(text[:after] if before is None else text.replace(before, after))
    with pytest.raises(PlanError, match=message):
        pack_quietly([one], [cover], "globeland30", tmp_path / "out", *KEYS)


def test_broken_tags(tmp_path):
    coefficients = sensor(LON, LAT, 30, WIDTH, HEIGHT)
    one = write_image(tmp_path / "s.tif", WIDTH, HEIGHT, rpcs={**coefficients, "lat_scale": 0.0})
    with pytest.raises(RasterError, match=r"s\.tif \(RPC tags\): its RPCs cannot be used: lat_scale is 0"):
        scene_headers.read_header(str(one), Placement())


def test_a_dem_that_does_not_cover_the_scene(tmp_path, cover):
    one, _ = rpc_scene(tmp_path)
    for lon, says in ((4.0, r"covers \d\d?% of it"), (9.0, r"covers 0% of it")):
        dem = Relief(lon, LAT, 0.01, 1 / 3600).write(tmp_path / f"dem{lon}.tif")
        with pytest.raises(PlanError, match=rf"s\.tif: the DEM .*dem{lon}\.tif {says}.*longitudes 3\.9.*reaches over"):
            pack_quietly([one], [cover], "globeland30", tmp_path / "out", *KEYS, f"scene.dem={dem}")


def test_a_dem_that_is_none(tmp_path, cover):
    one, _ = rpc_scene(tmp_path)
    write_raster(tmp_path / "two.tif", noise(1, (2, 9, 9)), (30, 0, 570e3, 0, -30, 5212e3))
    (tmp_path / "sly.tif").write_text("<VRTDataset rasterXSize='9' rasterYSize='9'></VRTDataset>")
    write_raster(tmp_path / "bare.tif", noise(1, (1, 9, 9)), (30, 0, 570e3, 0, -30, 5212e3), None)
    cases = {
        "two": r"two\.tif: GTiff of 2 band\(s\); a DEM is",
        "sly": "is neither GeoTIFF",
        "bare": "has no CRS",
        "no": "no such file",
    }
    for name, message in cases.items():
        with pytest.raises(RasterError, match=message):
            pack_quietly([one], [cover], "globeland30", tmp_path / "out", *KEYS, f"scene.dem={tmp_path}/{name}.tif")
    relief = Relief(LON, LAT, 0.06, 1 / 3600)
    relief.heights[:] = -9999
    dem = relief.write(tmp_path / "void.tif", nodata=-9999)
    with pytest.raises(PlanError, match=r"the DEM .*void\.tif has no height under any of its pixels"):
        pack_quietly([one], [cover], "globeland30", tmp_path / "out", *KEYS, f"scene.dem={dem}")


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([(0, 0, 4, 47)], r"has 1 ground control point\(s\), at least 3"),
        ([(0, 0, 4, 47), (9, 0, 4.1, 47)], r"has 2 ground control point\(s\), at least 3"),
        ([(c, 2 * c, 4 + c / 1e3, 47 - c / 2e3 + c % 2 / 1e3) for c in range(5)], "lie on one line in the image"),
        ([(c, c % 2, 4 + c / 1e3, 47.0) for c in range(5)], "lie on one line on the ground"),
        ([(7, 7, 4, 47)] * 4, "lie on one line in the image"),
    ],
)
@pytest.mark.parametrize("method", ["polynomial", "tps"])
def test_control_points_that_place_nothing(tmp_path, cover, points, message, method):
    gcps = [GroundControlPoint(row, column, x, y) for column, row, x, y in points]
    one = write_image(tmp_path / "s.tif", WIDTH, HEIGHT, gcps=(gcps, "EPSG:4326"))
    with pytest.raises(PlanError, match=rf"s\.tif: .*{message}"):
        pack_quietly([one], [cover], "globeland30", tmp_path / "out", *KEYS, f"scene.gcp={method}")


def test_planning_a_large_image_takes_no_time(tmp_path):
    """30,000 x 30,000 pixels: a few hundred points of it are located, whatever its size."""
    one = tmp_path / "s.tif"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(one, "w", driver="GTiff", width=30000, height=30000, count=4, dtype="uint16", tiled=True,
                           sparse_ok=True) as file:  # fmt: skip
            file.rpcs = rasterio.rpc.RPC(**sensor(LON, LAT, 2, 30000, 30000))
    scene = scene_headers.read_header(str(one), Placement())
    cover = write_raster(tmp_path / "c.tif", patches(3, 1400, 1400, GLOBELAND), (60, 0, 536e3, 0, -60, 5246e3), UTM31)
    entries = sheets.label_sheets([sheet_headers.read_sheet(str(cover))], load_product("globeland30"))
    located_points = []
    model = type(scene.place.model)
    original = model.located
    try:
        model.located = lambda self, c, r: located_points.append(np.size(c)) or original(self, c, r)
        assert labels.overlapping(scene.place, entries) == entries
        assert labels.subdivision(scene.place, entries) == (1, 1)
        assert sum(located_points) < 3000
        located_points.clear()
        labels.label_grid(
            scene.place.window(9000, 9000, 2000, 2000), entries, build_legend(load_product("globeland30"))
        )
        assert sum(located_points) < 2000 * 2000 / 200  # exact points are far apart
    finally:
        model.located = original


def test_the_oracle_itself():
    """Newton's places, put through the polynomials, are the pixels again."""
    coefficients = sensor(LON, LAT, 8, WIDTH, HEIGHT)
    rng = np.random.default_rng(0)
    columns, rows = rng.uniform(0, WIDTH, 500), rng.uniform(0, HEIGHT, 500)
    lon, lat = located(coefficients, columns, rows, 700.0)
    back = forward(coefficients, lon, lat, np.full(500, 700.0))
    np.testing.assert_allclose(back, (columns, rows), atol=1e-8)


# ------------------------------------------------------------------------------------- tiles that are cut already


def test_cut_tiles_are_placed_as_scenes_are(tmp_path, cover):
    """Their own RPCs, the height and the DEM: labels, places and identity are those of a scene of one tile."""
    relief = Relief(LON, LAT, 0.06, 1 / 3600)
    dem = relief.write(tmp_path / "dem.tif")
    (tmp_path / "tiles").mkdir()
    for seed in range(3):
        coefficients = sensor(LON, LAT, 24, SIZE, SIZE, seed)
        one = write_image(tmp_path / f"tiles/{seed}.tif", SIZE, SIZE)
        one.with_suffix(".rpb").write_text(rpb_text(coefficients))

    def as_tiles(out, *keys):
        tiles = ["--tiles", str(tmp_path / "tiles"), "--land-cover", str(cover), "--product", "globeland30"]
        assert pack_records.main([*tiles, "--out", str(tmp_path / out), *RAW, *keys]) == 0
        manifest = manifests.load_manifest(tmp_path / out)
        return {record.transform: record for _, record in read_records(tmp_path / out)}, manifest.scenes[0].fingerprint

    identities, places = set(), set()
    for how in ((), ("scene.height=900",), (f"scene.dem={dem}",), (f"scene.dem={dem}", "scene.height=45")):
        name = "-".join(("d", *(key.split("=")[0] for key in how)))
        found, identity = as_tiles(name, *how)
        pack_quietly(
            [tmp_path / "tiles/*.tif"], [cover], "globeland30", tmp_path / f"{name}-scenes", *RAW,
            f"tile.size={SIZE}", *how,
        )  # fmt: skip
        same = {record.transform: record for _, record in read_records(tmp_path / f"{name}-scenes")}
        assert len(found) == 3
        assert found.keys() == same.keys()
        for where, record in found.items():
            np.testing.assert_array_equal(record.fractions, same[where].fractions)
            assert record.lonlat == same[where].lonlat
        identities.add(identity)
        places |= found.keys()
    assert len(places) == 12
    Relief(LON, LAT, 0.06, 1 / 3600, seed=1).write(dem)
    identities.add(as_tiles("e", f"scene.dem={dem}")[1])
    (tmp_path / "tiles/1.rpb").write_text(rpb_text(sensor(LON, LAT, 24, SIZE, SIZE, 7)))
    identities.add(as_tiles("f", f"scene.dem={dem}")[1])
    assert len(identities) == 4  # no DEM, the first, the second, other RPCs; a height stands in the configuration
