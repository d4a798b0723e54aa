"""Every seam, against rasterio's own warp of the land cover onto each tile by itself.

The oracle knows a tile by its record alone (transform, CRS, side): GDAL warps every sheet to the tile's sub-pixels with
its nearest neighbour, and the order of sheets comes from their names. Where a map runs around the Earth, GDAL gets
a copy that runs around it twice, so that no tile lies over its edge.
"""

import tempfile
from pathlib import Path

import numpy as np
import pytest
import rasterio
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rasterio import Affine
from rasterio.io import MemoryFile
from rasterio.vrt import WarpedVRT
from rasterio.warp import transform as warp_points

from geokr import manifests
from preprocess import labels, scene_headers, sheet_headers, sheets
from preprocess.place import AffinePlace
from tests.scenes import RAW, UTM31, noise, pack_quietly, packaged, patches, read_records, write_raster
from tests.scenes import is_at_home as at_home

CODES = [10, 20, 30, 60, 80, 90]
SIZE = 24
NORTH, SOUTH = "EPSG:3413", "EPSG:3031"
LOCAL = "+proj=laea +lat_0=47.3 +lon_0=4.1 +x_0=12345 +y_0=-777 +ellps=GRS80 +units=m"  # no EPSG code
NAMES = {30: "n30_45_2020lc030.tif", 31: "n31_45_2020lc030.tif"}


def around(crs, lon, lat, pixel, width, height, turn=0.0, shear=0.0, flip=1):
    """Transform of width x height pixels (px, py metres or degrees) whose middle lies at a place."""
    px, py = pixel if isinstance(pixel, tuple) else (pixel, pixel)
    x, y = (v[0] for v in warp_points("EPSG:4326", crs, [lon], [lat])[:2])
    linear = Affine.rotation(turn) @ Affine.shear(np.degrees(np.arctan(shear)), 0) @ Affine.scale(px, -flip * py)
    return Affine.translation(x, y) @ linear @ Affine.translation(-width / 2, -height / 2)


def sheet(folder, name, crs, lon, lat, pixel, seed=0, side=300, codes=CODES, patch=2, **how):
    # a third of a pixel off, so that no centre of a sub-pixel lies on an edge
    transform = around(crs, lon, lat, pixel, side, side, **how) @ Affine.translation(0.341, 0.377)
    return write_raster(Path(folder) / name, patches(seed, side, side, codes, patch), transform, crs)


def image(folder, transform, crs, width=70, height=60, name="scene.tif", **more):
    return write_raster(Path(folder) / name, noise(9, (1, height, width)), transform, crs, **more)


def _in_memory(codes, transform, crs):
    profile = {"driver": "GTiff", "count": 1, "dtype": "int16", "nodata": -1, "compress": "lzw"}
    file = MemoryFile()
    with file.open(width=codes.shape[1], height=codes.shape[0], transform=transform, crs=crs, **profile) as written:
        written.write(codes.astype(np.int16), 1)
    return file.open()


class Warped:
    """Class names on a tile's sub-pixels by GDAL's warp of every sheet, the first in order that says anything."""

    def __init__(self, product, paths):
        table = yaml.safe_load(Path(product).read_text() if product.endswith(".yaml") else packaged(product))
        self.names = {code: entry["name"] for code, entry in table["classes"].items()}
        self.silent = set(table["nodata"])
        self.sheets = []
        for path in sorted(paths, key=lambda p: p.name):
            with rasterio.open(path) as file:
                codes, transform = file.read(1), file.transform
                if file.crs.is_geographic and file.width * abs(transform.a) > 359.9:
                    codes = np.concatenate([codes] * 2, 1)
                self.sheets.append((path.name, _in_memory(codes, transform, file.crs)))

    def codes(self, entry, transform, crs, side):
        # WarpedVRT and not reproject(), which interpolates positions to an eighth of a pixel whatever it is told
        with WarpedVRT(entry[1], crs=crs, transform=transform, width=side[0], height=side[1], tolerance=1e-9) as vrt:
            return vrt.read(1)

    def fractions(self, record, classes, k):
        size = record.shape[0]
        transform = Affine(*record.transform) @ Affine.scale(1 / k[0], 1 / k[1])
        side = (size * k[0], size * k[1])
        columns, rows = np.meshgrid(np.arange(side[0]) + 0.5, np.arange(side[1]) + 0.5)
        x, y = transform @ (columns.ravel(), rows.ravel())
        lon, lat = (np.array(v).reshape(columns.shape) for v in warp_points(record.crs, "EPSG:4326", x, y)[:2])
        final = np.full(columns.shape, -1, np.int32)
        for home in (True, False):
            for entry in self.sheets:
                found = self.codes(entry, transform, record.crs, side)
                says = ~np.isin(found, [-1, *self.silent]) & (final == -1)
                if home:
                    says &= np.vectorize(lambda a, b, name=entry[0]: at_home(name, a, b), otypes=[bool])(lon, lat)
                final[says] = found[says]
        counts = np.array([(np.isin(final, [c for c, n in self.names.items() if n == name])).sum() for name in classes])
        return counts / max(1, counts.sum()), counts.sum() / final.size


def check(folder, scenes, paths, *keys, k=None, product="globeland30", oracle=None, atleast=4):
    """Packs, and compares every record with the oracle; returns the records."""
    out = Path(folder) / "out"
    keys = (*RAW, f"tile.size={SIZE}", "tile.step=18", "labels.min_valid_fraction=0.01", *keys)
    manifest = pack_quietly(scenes, paths, product, out, *keys).manifest
    classes = [entry.name for entry in manifests.load_manifest(out).classes]
    oracle = oracle or Warped(product, paths)
    every = [record for _, record in read_records(out, manifest)]
    assert len(every) >= atleast
    for record in every:
        fractions, share = oracle.fractions(record, classes, k or (1, 1))
        np.testing.assert_allclose(record.fractions, fractions, atol=1e-3, err_msg=record.tile_id)
        np.testing.assert_allclose(record.valid_fraction, share, atol=1e-3, err_msg=record.tile_id)
    return every


def two_zones(folder, lat=47.0, **how):
    return [sheet(folder, NAMES[zone], f"EPSG:326{zone}", 0.0, lat, 30.0, seed=zone, **how) for zone in (30, 31)]


# -------------------------------------------------------------------------------------- the list of seams


@pytest.mark.parametrize("crs", ["EPSG:32630", UTM31, LOCAL, "EPSG:3857"])
@pytest.mark.parametrize(("turn", "shear"), [(0, 0), (33, 0), (-71, 0.5)])
def test_two_zones_that_disagree(tmp_path, crs, turn, shear):
    one = image(tmp_path, around(crs, 0.0, 47.0, 25.0, 70, 60, turn, shear), crs)
    check(tmp_path, [one], two_zones(tmp_path))


def test_a_tile_over_four_sheets(tmp_path):
    paths = [
        sheet(tmp_path, f"n{zone}_{band}_2020lc030.tif", f"EPSG:326{zone}", 0.0, 45.0, 30.0, seed=zone + band)
        for zone in (30, 31)
        for band in (40, 45)
    ]
    every = check(tmp_path, [image(tmp_path, around(UTM31, 0.0, 45.0, 25.0, 70, 60, 12), UTM31)], paths)
    # the four corners of one tile lie at home in four sheets
    homes = [{path.name for path in paths for x, y in corners(record) if at_home(path.name, x, y)} for record in every]
    assert max(map(len, homes)) == 4


def corners(record):
    size = record.shape[0]
    x, y = Affine(*record.transform) @ (np.array([0, size, 0, size]), np.array([0, 0, size, size]))
    return list(zip(*warp_points(record.crs, "EPSG:4326", x, y)[:2], strict=True))


def test_sheets_of_several_years(tmp_path):
    names = {year: f"n31_45_{year}lc030.tif" for year in (2000, 2010, 2020)}
    paths = [sheet(tmp_path, name, UTM31, 4.0, 47.0, 30.0, seed=year) for year, name in names.items()]
    for day, year in (("19990101", 2000), ("20051231", 2010), ("20160101", 2020)):
        one = image(tmp_path / day, around(UTM31, 4.0, 47.0, 25.0, 70, 60), UTM31, name=f"s_{day}.tif")
        check(tmp_path / day, [one], paths, oracle=Warped("globeland30", [tmp_path / names[year]]))


@pytest.mark.parametrize("pixel", [3.0, 400.0, 2000.0])
def test_land_cover_much_finer_or_coarser(tmp_path, pixel):
    paths = [sheet(tmp_path, "cover.tif", UTM31, 4.0, 47.0, pixel, side=900 if pixel < 10 else 60, patch=1)]
    one = image(tmp_path, around(UTM31, 4.0, 47.0, 30.0, 70, 60, 7), UTM31)
    check(tmp_path, [one], paths, k=(10, 10) if pixel < 10 else (1, 1))


def test_edges_of_nodata(tmp_path):
    """Holes in the first sheet, at their edges too, are filled by the second, and by nothing where that has a hole."""
    paths = two_zones(tmp_path)
    for seed, path in enumerate(paths):
        with rasterio.open(path, "r+") as file:
            codes = file.read(1)
            codes[patches(seed + 7, 300, 300, [0, 1], side=5) == 0] = 0
            file.write(codes, 1)
    every = check(tmp_path, [image(tmp_path, around(UTM31, 0.0, 47.0, 25.0, 70, 60, 20), UTM31)], paths)
    assert 0.5 < np.mean([record.valid_fraction for record in every]) < 0.9


@pytest.mark.parametrize(
    ("crs", "lon", "lat", "pixel"),
    [(NORTH, -45, 82, 1500), (NORTH, 180, 75, 1500), (SOUTH, 20, -78, 1500), (SOUTH, 179.5, -72, 1500),
     ("EPSG:32660", 180, 60, 1500), ("EPSG:32701", -180, -17, 1500), ("EPSG:4326", 180, 30, (0.02, 0.017))],
)  # fmt: skip
def test_around_the_poles_and_the_antimeridian(tmp_path, crs, lon, lat, pixel):
    """Over a map of the world in degrees that begins at 180 degrees west."""
    step = 0.1
    codes = patches(1, 1800, 3600, CODES)
    world = write_raster(tmp_path / "w.tif", codes, (step, 0, -180, 0, -step, 90), "EPSG:4326", compress="lzw")
    width, height = 70, 60
    if crs == "EPSG:4326":
        transform = Affine(pixel[0], 0, lon - 35 * pixel[0] + 0.0031, 0, -pixel[1], lat + 30 * pixel[1] + 0.0017)
    else:
        transform = around(crs, lon, lat, pixel, width, height, 9)
    one = image(tmp_path, transform, crs, width, height)
    entries = sheets.label_sheets([sheet_headers.read_sheet(str(world))], load("globeland30"))
    k = labels.subdivision(place_of(one), entries)
    check(tmp_path, [one], [world], k=k)


def load(product):
    from geokr.landcover import load_product

    return load_product(product)


def place_of(path) -> AffinePlace:
    return scene_headers.read_header(str(path)).place  # type: ignore[return-value]


# ---------------------------------------------------------------------------------------------- adversaries


def test_sheets_stored_upside_down_turned_and_mirrored(tmp_path):
    """South-up, rotated and mirrored sheets are as good as any."""
    one = image(tmp_path, around(UTM31, 4.0, 47.0, 25.0, 70, 60), UTM31)
    for case, how in {"south-up": {"flip": -1}, "turned": {"turn": 40}, "sheared": {"turn": 10, "shear": 0.6}}.items():
        paths = [sheet(tmp_path / case, "cover.tif", UTM31, 4.0, 47.0, 30.0, **how)]
        check(tmp_path / case, [one], paths)
    paths = [sheet(tmp_path / "mirror", "cover.tif", UTM31, 4.0, 47.0, (-30.0, 30.0))]
    check(tmp_path / "mirror", [one], paths)


@pytest.mark.parametrize("pixel", [(25.0, -25.0), (-25.0, 25.0), (-25.0, -25.0)])
def test_scenes_stored_upside_down_or_mirrored(tmp_path, pixel):
    one = image(tmp_path, around(UTM31, 4.0, 47.0, pixel, 70, 60), UTM31)
    check(tmp_path, [one], [sheet(tmp_path, "cover.tif", UTM31, 4.0, 47.0, 30.0)])


def test_a_scene_over_three_zones(tmp_path):
    """At 78 degrees north, where a zone is narrow; each sheet reaches over all of it."""
    paths = [sheet(tmp_path, f"n{zone}_75_2020lc030.tif", f"EPSG:326{zone}", 21.0, 78.0, 2000.0, seed=zone, side=250)
             for zone in (33, 35, 37)]  # fmt: skip
    one = image(tmp_path, around("EPSG:32634", 21.0, 78.0, 4000.0, 70, 60), "EPSG:32634")
    entries = sheets.label_sheets([sheet_headers.read_sheet(str(path)) for path in paths], load("globeland30"))
    check(tmp_path, [one], paths, k=labels.subdivision(place_of(one), entries))


def test_sheets_of_one_pixel(tmp_path):
    """A map in pieces of a single pixel each: 8 x 8 of them under the scene."""
    rng = np.random.default_rng(0)
    x, y = (v[0] for v in warp_points("EPSG:4326", UTM31, [4.0], [47.0])[:2])
    paths = []
    for i in range(8):
        for j in range(8):
            transform = Affine(250, 0, x - 1003 + 250 * i, 0, -250, y + 1007 - 250 * j)
            path = tmp_path / f"piece_{i}_{j}.tif"
            paths.append(write_raster(path, rng.choice(CODES, (1, 1)).astype(np.uint8), transform, UTM31))
    one = image(tmp_path, around(UTM31, 4.0, 47.0, 30.0, 70, 60, 15), UTM31)
    check(tmp_path, [one], paths)


def test_a_scene_within_one_pixel_of_the_map_and_on_its_edge(tmp_path):
    """A map of 50 km pixels; one scene inside a pixel, others over the edge and the corner of it."""
    codes = np.array([[10, 20, 30], [60, 80, 90], [20, 10, 60]], np.uint8)
    x, y = 4.5e5, 5.2e6
    path = write_raster(tmp_path / "cover.tif", codes, (5e4, 0, x, 0, -5e4, y), UTM31)
    for number, (left, top) in enumerate([(6e4, 6e4), (1e5 - 911, 6e4), (6e4, 1e5 - 707), (1e5 - 1013, 1e5 - 509)]):
        one = image(tmp_path / str(number), (30, 0, x + left, 0, -30, y - top), UTM31)
        every = check(tmp_path / str(number), [one], [path])
        assert len({tuple(record.fractions.tolist()) for record in every}) == 1 or number


def test_longitudes_from_0_to_360(tmp_path):
    """A map and scenes whose longitudes go on to 360, in every combination with those from -180 to 180."""
    codes = patches(1, 400, 800, CODES)
    east = write_raster(tmp_path / "c0.tif", codes, (0.01, 0, 196.0, 0, -0.01, 48.0), "EPSG:4326")
    west = write_raster(tmp_path / "c1.tif", codes, (0.01, 0, -164.0, 0, -0.01, 48.0), "EPSG:4326")
    found = []
    for path in (east, west):
        for start in (199.2037, -160.7963):
            folder = tmp_path / f"{path.stem}{start}"
            one = image(folder, (0.0083, 0, start, 0, -0.0083, 46.0031), "EPSG:4326")
            with rasterio.open(path) as file:
                same = file.transform.c > 180 if start > 180 else file.transform.c < 0
            if same:
                found.append(check(folder, [one], [path]))
            else:  # GDAL's warp takes longitudes as they stand; the numbers must be those of the other two
                pack_quietly([one], [path], "globeland30", folder / "out", *RAW, f"tile.size={SIZE}", "tile.step=18",
                             "labels.min_valid_fraction=0.01")  # fmt: skip
                found.append([record for _, record in read_records(folder / "out")])
    for other in found[1:]:
        a, b = ({r.tile_id: r.fractions for r in each} for each in (found[0], other))
        assert a.keys() == b.keys()
        assert max(float(np.abs(a[key] - b[key]).max()) for key in a) <= 1e-3
    assert all(-180 <= record.lonlat[0] < 180 for each in found for record in each)


# ----------------------------------------------------------------------------------------------- random grids


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_random_seams(data):
    """Random scenes over random pairs of sheets that disagree: CRS, size, turn, shear, pixel, side of storage."""
    crs = data.draw(st.sampled_from(["EPSG:32630", UTM31, LOCAL, "EPSG:3857", "EPSG:2154"]))
    metres, aspect = data.draw(st.floats(8, 60)), data.draw(st.floats(0.6, 1.6))
    turn, shear = data.draw(st.floats(-180, 180)), data.draw(st.floats(-0.6, 0.6))
    lat, off = data.draw(st.floats(45.2, 49.8)), data.draw(st.floats(-0.004, 0.004))
    flip = data.draw(st.sampled_from([1, -1]))
    with tempfile.TemporaryDirectory() as folder:
        how = {"turn": data.draw(st.sampled_from([0, 0, 25])), "flip": data.draw(st.sampled_from([1, -1]))}
        paths = two_zones(folder, lat, **how)
        transform = around(crs, off, lat, (metres, metres * aspect), 40, 34, turn, shear, flip)
        one = image(folder, transform, crs, 40, 34)
        entries = sheets.label_sheets([sheet_headers.read_sheet(str(path)) for path in paths], load("globeland30"))
        check(folder, [one], paths, k=labels.subdivision(place_of(one), entries), atleast=1)
