"""Land-cover products as they come: codings, colours, formats, probabilities, and several of them in one record."""

import numpy as np
import pytest
import rasterio
import yaml
from affine import Affine

from geokr import landcover
from preprocess import raster
from preprocess.errors import RasterError
from tests.scenes import RAW, noise, pack_quietly, patches, read_records, write_raster

T10 = Affine(10, 0, 500_000, 0, -10, 5_000_000)
SMALL = (*RAW, "tile.size=32", "tile.step=32", "tile.bands=[1]")


def scene_at(folder, name="s.tif", **profile):
    return write_raster(folder / name, noise(1, (128, 160)), T10, **profile)


def shares(codes_HW: np.ndarray, tile_id: str, groups: dict[str, set[int]]) -> list[float]:
    """Share of each group under a tile, where pixels of scene and map are the same."""
    column, row = map(int, tile_id.rsplit(":", 2)[1:])
    under = codes_HW[row : row + 32, column : column + 32]
    counts = np.array([np.isin(under, list(codes)).sum() for codes in groups.values()], np.float64)
    return (counts / counts.sum()).tolist()


# ------------------------------------------------------------------------------------------------------- CORINE

CLC = [
    111, 112, 121, 122, 123, 124, 131, 132, 133, 141, 142, 211, 212, 213, 221, 222, 223, 231, 241, 242, 243, 244,
    311, 312, 313, 321, 322, 323, 324, 331, 332, 333, 334, 335, 411, 412, 421, 422, 423, 511, 512, 521, 522, 523,
]  # fmt: skip


@pytest.mark.parametrize("coding", ["ranks", "ranks in int8", "three digits"])
@pytest.mark.parametrize(("product", "groups"), [("corine", False), ("corine44", False), ("corine44", True)])
def test_corine(tmp_path, coding, product, groups):
    ranks = patches(3, 128, 160, range(1, 45), side=4)
    empty = patches(4, 128, 160, (0, 0, 0, 1), side=9) == 1
    if coding == "three digits":
        codes = np.where(empty, 999, np.array(CLC, np.int16)[ranks - 1]).astype(np.int16)
        nodata = None
    else:  # the 2018 release is signed bytes, and its nodata is -128
        codes = np.where(empty, 48 if coding == "ranks" else -128, ranks).astype("int8" if "int8" in coding else "u1")
        nodata = -128 if "int8" in coding else None
    name = "U2018_CLC2018_V2020_20u1.tif"
    cover = write_raster(tmp_path / name, codes, T10, nodata=nodata)
    own = (f"labels.groups={str(groups).lower()}", "labels.min_valid_fraction=0.1")
    packed = pack_quietly([scene_at(tmp_path)], [cover], product, tmp_path / "out", *SMALL, *own)
    assert packed.manifest.land_cover_years == (2018,)
    digits = np.where(empty, 0, np.array(CLC)[ranks - 1])
    if product == "corine" or groups:
        meaning = {str(digit): {code for code in CLC if code // 100 == digit} for digit in range(1, 6)}
    else:
        meaning = {str(code): {code} for code in CLC}
    assert len(packed.manifest.classes) == len(meaning)
    seen = 0
    for _, record in read_records(tmp_path / "out"):
        column, row = map(int, record.tile_id.rsplit(":", 2)[1:])
        np.testing.assert_allclose(record.fractions, shares(digits, record.tile_id, meaning), atol=1e-6)
        known = (digits[row : row + 32, column : column + 32] > 0).mean()
        assert record.valid_fraction == pytest.approx(known, abs=1e-6)
        seen += 1
    assert seen > 15


# ------------------------------------------------------------------------------------------------ colours, formats


def test_colours_of_the_sheet_where_the_table_has_none(tmp_path):
    codes = patches(3, 128, 160, (1, 5, 12, 17))
    cover = write_raster(tmp_path / "MCD12Q1.A2019001.h18v04.061.2022169161028.tif", codes, T10, nodata=255)
    colours = {1: (5, 69, 10), 5: (0, 153, 0), 12: (194, 79, 68), 17: (28, 13, 255), 2: (1, 1, 1)}
    with rasterio.open(cover, "r+") as file:
        file.write_colormap(1, {code: (*colour, 255) for code, colour in colours.items()})
    plain = write_raster(tmp_path / "a_plain.tif", codes, T10)
    made = pack_quietly([scene_at(tmp_path)], [plain, cover], "modis_igbp", tmp_path / "out", *SMALL).manifest
    assert made.land_cover_years == (2019,)
    by_code = {entry.codes[0]: entry.rgb for entry in made.classes}
    own = {entry.codes[0]: entry.rgb for entry in landcover.load_product("modis_igbp").classes}
    assert by_code == {code: colours.get(code, rgb) for code, rgb in own.items()}
    assert own[12] != colours[12]


def test_a_table_with_colours_keeps_them(tmp_path):
    codes = patches(3, 128, 160, (1, 2))
    cover = write_raster(tmp_path / "m.tif", codes, T10)
    with rasterio.open(cover, "r+") as file:
        file.write_colormap(1, {1: (9, 9, 9, 255), 2: (8, 8, 8, 255), 3: (7, 7, 7, 255)})
    classes = {1: {"name": "a", "rgb": [1, 2, 3]}, 2: {"name": "b"}, 3: {"name": "c"}}
    table = tmp_path / "mine.yaml"
    table.write_text(yaml.safe_dump({"name": "mine", "nodata": [0], "ignore": [], "classes": classes}))
    manifest = pack_quietly([scene_at(tmp_path)], [cover], str(table), tmp_path / "out", *SMALL).manifest
    assert [entry.rgb for entry in manifest.classes] == [(1, 2, 3), (8, 8, 8), (7, 7, 7)]


def test_modis_in_its_sinusoidal_projection(tmp_path):
    """500 m sinusoidal cells under a scene of 10 m pixels, each pixel's cell found by arithmetic on the sphere."""
    sinusoidal = "+proj=sinu +lon_0=0 +x_0=0 +y_0=0 +R=6371007.181 +units=m +no_defs"
    cell = 463.3127165
    lon, lat = 3.0, 45.15
    x = np.radians(lon) * 6371007.181 * np.cos(np.radians(lat))
    y = np.radians(lat) * 6371007.181
    transform = Affine(cell, 0, x - 10 * cell, 0, -cell, y + 10 * cell)
    codes = np.random.default_rng(5).integers(1, 18, (20, 20)).astype(np.uint8)
    cover = write_raster(tmp_path / "MCD12Q1.A2019001.h18v04.tif", codes, transform, sinusoidal, nodata=255)
    step = 0.0001
    place = Affine(step, 0, lon, 0, -step, lat)
    scene = write_raster(tmp_path / "s.tif", noise(1, (128, 160)), place, "EPSG:4326")
    pack_quietly([scene], [cover], "modis_igbp", tmp_path / "out", *SMALL)
    for _, record in read_records(tmp_path / "out"):
        column, row = map(int, record.tile_id.rsplit(":", 2)[1:])
        lons = lon + (np.arange(column, column + 32) + 0.5) * step
        lats = lat - (np.arange(row, row + 32) + 0.5) * step
        lats, lons = np.meshgrid(np.radians(lats), np.radians(lons), indexing="ij")
        # the ellipsoid's latitude is what MODIS means by latitude on its sphere
        columns, rows = ~transform * (lons * 6371007.181 * np.cos(lats), lats * 6371007.181)
        under = codes[np.floor(rows).astype(int), np.floor(columns).astype(int)]
        expected = [(under == code).mean() for code in range(1, 18)]
        np.testing.assert_allclose(record.fractions, expected, atol=2e-3)


@pytest.mark.parametrize(
    ("name", "start", "words"),
    [
        ("MCD12Q1.A2019001.h18v04.061.hdf", b"\x0e\x03\x13\x01", r"""gdal_translate 'HDF4_EOS:EOS_GRID:"MCD12Q1"""),
        ("cover.h5", b"\x89HDF\r\n\x1a\n", r"""gdal_translate 'HDF5:"cover\.h5":LAYER' cover\.tif"""),
        ("cover.nc", b"CDF\x01", r"""gdal_translate 'NETCDF:"cover\.nc":LAYER' cover\.tif"""),
    ],
)
def test_hdf_says_how_to_convert_it(tmp_path, name, start, words):
    path = tmp_path / name
    path.write_bytes(start + bytes(100))
    with pytest.raises(RasterError, match=words) as caught:
        pack_quietly([scene_at(tmp_path)], [path], "modis_igbp", tmp_path / "out", *SMALL)
    assert str(path) in str(caught.value)
    assert "LC_Type1" in str(caught.value) or not name.endswith(".hdf")
    with pytest.raises(RasterError, match=words):
        raster.read_sheet(str(path))
