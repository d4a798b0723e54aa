"""Land-cover products as they come: codings, colours, formats, probabilities, and several of them in one record."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import rasterio
import yaml
from affine import Affine
from rasterio.warp import transform as warp_points

from geokr import landcover, manifests, records
from geokr.config import ConfigError
from preprocess import pack_records, sheet_headers, tile_table, verify_records
from preprocess.errors import RasterError
from preprocess.inputs import PlanError
from preprocess.sheets import LabelError
from tests.scenes import (
    RAW,
    UTM31,
    OtherWay,
    check_labels,
    command,
    contents,
    noise,
    pack_quietly,
    patches,
    read_records,
    write_raster,
)

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
        ("cover.tar", b"name" + bytes(253) + b"ustar\0" + bytes(250), r"cover\.tar: .*it is an archive: unpack it"),
        ("cover.zip", b"PK\x03\x04" + bytes(30), r"cover\.zip: .*it is an archive: unpack it"),
        ("cover.tar.gz", b"\x1f\x8b\x08" + bytes(30), r"cover\.tar\.gz: .*it is an archive: unpack it"),
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
        sheet_headers.read_sheet(str(path))


# --------------------------------------------------------------------------------------------------- probabilities

BANDS = ("water", "trees", "grass", "flooded_vegetation", "crops", "shrub_and_scrub", "built", "bare", "snow_and_ice")


def dirichlet(seed: int, height: int, width: int) -> np.ndarray:
    """Probabilities of nine classes, float32 [9, height, width]."""
    return np.random.default_rng(seed).dirichlet(np.full(9, 0.4), (height, width)).transpose(2, 0, 1).astype(np.float32)


class SoftOtherWay:
    """Mean probabilities under tiles, sub-pixel by sub-pixel through rasterio.warp.transform; first sheet first."""

    def __init__(self, paths: list[Path], bands: Iterable[int] = range(1, 10)):
        self.sheets = []
        for path in sorted(paths, key=lambda p: p.name):
            with rasterio.open(path) as file:
                self.sheets.append((file.read(list(bands)).astype(np.float64), file.transform, file.crs, file.nodata))

    def means(self, record: records.Record, kx: int, ky: int, valid: np.ndarray) -> tuple[np.ndarray, float]:
        """(sum of the shares of each band over the sub-pixels that count, how many sub-pixels there are)."""
        size = record.shape[0]
        columns, rows = np.meshgrid((np.arange(size * kx) + 0.5) / kx, (np.arange(size * ky) + 0.5) / ky)
        x, y = Affine(*record.transform) * (columns, rows)
        counted = valid.repeat(ky, 0).repeat(kx, 1)
        places = [self._pixels(sheet, record.crs, x[counted], y[counted]) for sheet in self.sheets]
        sums = np.zeros(9)
        for i in range(counted.sum()):
            for (values, _, _, nodata), (across, down) in zip(self.sheets, places, strict=True):
                here = self._known(values, nodata, across[i], down[i])
                if here is not None:
                    sums += here / here.sum()
                    break
        return sums, columns.size

    def _pixels(self, sheet, crs: str, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        moved = warp_points(crs, sheet[2], x, y)
        columns, rows = ~sheet[1] * (np.array(moved[0]), np.array(moved[1]))
        return np.floor(columns).astype(int), np.floor(rows).astype(int)

    def _known(self, values, nodata, column: int, row: int) -> np.ndarray | None:
        if not (0 <= column < values.shape[2] and 0 <= row < values.shape[1]):
            return None
        here = values[:, row, column]
        empty = not np.isfinite(here).all() or (nodata is not None and (here == nodata).all()) or here.sum() <= 0
        return None if empty else here


def check_soft(folder: Path, other: SoftOtherWay, kx: int, ky: int, columns: list[list[int]], valid=None) -> int:
    """Compares every fifth record. columns: for each class, the bands that count as it."""
    every = [record for _, record in read_records(folder)]
    for record in every[::5]:
        size = record.shape[0]
        mask = np.ones((size, size), bool) if valid is None else valid(record)
        sums, total = other.means(record, kx, ky, mask)
        expected = np.array([sums[own].sum() for own in columns])
        np.testing.assert_allclose(record.fractions, expected / expected.sum(), atol=1e-5, err_msg=record.tile_id)
        assert record.valid_fraction == pytest.approx(expected.sum() / total, abs=1e-5)
    return len(every[::5])


EACH = [[k] for k in range(9)]


@pytest.mark.parametrize("how", ["float32", "float64", "uint8", "uint16", "by name", "ten bands", "ten nameless bands"])
def test_dynamic_world_in_every_export(tmp_path, how):
    values = dirichlet(3, 100, 120)
    names: tuple[str, ...] = ()
    wanted: tuple[int, ...] = tuple(range(1, 10))
    if how in ("uint8", "uint16"):
        values = np.rint(values * (200 if how == "uint8" else 10000)).astype(how)
    if how == "float64":
        values = values.astype(how)
    if how == "by name":  # Earth Engine's exports may come in any order
        order = [4, 0, 8, 2, 1, 3, 7, 6, 5]
        values, names = values[order], tuple(BANDS[k] for k in order)
        wanted = tuple(order.index(k) + 1 for k in range(9))
    if "ten" in how:
        values = np.concatenate([values, values.argmax(0)[None].astype(np.float32)])
        names = (*BANDS, "label") if how == "ten bands" else ()
    place = Affine(13.1, 0.3, 499_990.2, 0.2, -12.9, 5_000_010.3)
    cover = write_raster(tmp_path / "20200817T105031_20200817T105430_T31UFS.tif", values, place, names=names)
    scene = scene_at(tmp_path, "s_20210201.tif")
    packed = pack_quietly([scene], [cover], "dynamicworld", tmp_path / "out", *SMALL)
    assert packed.manifest.land_cover_years == (2020,)
    assert [entry.name for entry in packed.manifest.classes] == list(BANDS)
    assert check_soft(tmp_path / "out", SoftOtherWay([cover], wanted), 1, 1, EACH) > 3
    np.testing.assert_allclose(
        packed.manifest.train.prior,
        np.mean([record.fractions for _, record in read_records(tmp_path / "out")], axis=0, dtype=np.float64),
        atol=1e-6,
    )


def test_the_label_band_alone_holds_codes(tmp_path):
    cover = write_raster(tmp_path / "label.tif", patches(3, 128, 160, range(9)), T10, names=("label",))
    pack_quietly([scene_at(tmp_path)], [cover], "dynamicworld", tmp_path / "out", *SMALL)
    assert check_labels(tmp_path / "out", OtherWay("dynamicworld", [cover]), 1, 1) > 3


@pytest.mark.parametrize("strip", [4 << 20, 3000])
def test_probabilities_finer_than_the_scene_with_holes_and_neighbours(tmp_path, monkeypatch, strip):
    """Another CRS, 3 x 2 sub-pixels, merged and dropped classes, NaN, all-nodata, an overlap, a scene with nodata."""
    monkeypatch.setattr("preprocess.labels.STRIP_PIXELS", strip)
    values = dirichlet(5, 300, 260)
    values[:, 40:90, 30:60] = np.nan
    values[4, 120:130, 100:200] = np.nan
    first = write_raster(
        tmp_path / "a.tif", values, Affine(4.0317, 0, 499_996.3, 0, -5.0219, 4_999_990.1), nodata=np.nan
    )
    values = dirichlet(6, 200, 200)
    values[:, :50] = -9999
    second = write_raster(
        tmp_path / "b.tif", values, Affine(0.00006, 0, 2.9995, 0, -0.00005, 45.1535), "EPSG:4326", nodata=-9999.0
    )
    pixels = noise(1, (96, 96))
    pixels[20:50, 10:70] = 0
    scene = write_raster(tmp_path / "s.tif", pixels, T10, nodata=0)
    own = (
        "tile.step=20",
        "labels.merge={green: [trees, grass]}",
        "labels.drop=[built]",
        "labels.min_valid_fraction=0.01",
        "quality.min_valid_pixels=0",
    )
    packed = pack_quietly([scene], [first, second], "dynamicworld", tmp_path / "out", *SMALL, *own)
    names = ["water", "green", *(name for name in BANDS[3:] if name != "built")]
    assert [entry.name for entry in packed.manifest.classes] == names

    def valid(record):
        column, row = map(int, record.tile_id.rsplit(":", 2)[1:])
        return pixels[row : row + 32, column : column + 32] > 0

    columns = [[0], [1, 2], [3], [4], [5], [7], [8]]
    assert check_soft(tmp_path / "out", SoftOtherWay([first, second]), 3, 2, columns, valid) > 3


def test_a_band_of_what_a_table_calls_no_data(tmp_path):
    """As if its class were dropped."""
    scene, cover = scene_at(tmp_path), write_raster(tmp_path / "good.tif", dirichlet(3, 128, 160), T10)
    table = Path(landcover.__file__).with_name("products") / "dynamicworld.yaml"
    (tmp_path / "own.yaml").write_text(table.read_text().replace("nodata: []", "nodata: [6]"))
    pack_quietly([scene], [cover], str(tmp_path / "own.yaml"), tmp_path / "own", *SMALL)
    pack_quietly([scene], [cover], "dynamicworld", tmp_path / "drop", *SMALL, "labels.drop=[built]")
    own, dropped = (
        {record.tile_id: record.fractions for _, record in read_records(tmp_path / name)} for name in ("own", "drop")
    )
    assert own.keys() == dropped.keys()
    assert own
    assert all(len(own[tile]) == 8 and (own[tile] == dropped[tile]).all() for tile in own)


def test_probabilities_that_cannot_be(tmp_path):
    scene = scene_at(tmp_path)
    for name, change, words in (
        ("negative", -0.2, r"negative\.tif: holds no probabilities at column 7, row 5: .*-0\.2"),
        ("percent", 40.0, r"percent\.tif: holds no probabilities .* stored as whole numbers"),
    ):
        values = dirichlet(3, 128, 160)
        values[2, 5, 7] = change
        cover = write_raster(tmp_path / f"{name}.tif", values, T10)
        with pytest.raises(LabelError, match=words):
            pack_quietly([scene], [cover], "dynamicworld", tmp_path / "out" / name, *SMALL)
    codes = write_raster(tmp_path / "codes.tif", patches(3, 128, 160, range(9)), T10)
    cover = write_raster(tmp_path / "good.tif", dirichlet(3, 128, 160), T10)
    with pytest.raises(PlanError, match=r"good\.tif holds probabilities but .*codes\.tif codes"):
        pack_quietly([scene], [codes, cover], "dynamicworld", tmp_path / "out" / "both", *SMALL)
    with pytest.raises(RasterError, match=r"good\.tif: 9 band\(s\) of float32; a land-cover sheet has one band"):
        pack_quietly([scene], [cover], "worldcover", tmp_path / "out" / "codes", *SMALL)
    few = write_raster(tmp_path / "few.tif", dirichlet(3, 128, 160)[:5], T10)
    with pytest.raises(RasterError, match=r"few\.tif: 5 band\(s\).*or a band for each of water, trees"):
        pack_quietly([scene], [few], "dynamicworld", tmp_path / "out" / "few", *SMALL)


# ---------------------------------------------------------------------------------------------- years between


@pytest.mark.parametrize(
    ("name", "cover", "own", "years"),
    [
        ("s_20200817.tif", "n31_45_2020lc030.tif", (), 47 / 365.25),
        ("s_20190630.tif", "n31_45_2020lc030.tif", (), -367 / 365.25),
        ("s_20110701.tif", "cover.tif", ("labels.year=2001",), 3652 / 365.25),
        ("s_20110701.tif", "n31_45_2020lc030.tif", ("labels.year=2001",), -3288 / 365.25),
        ("s_20200817.tif", "cover.tif", (), None),
        ("s.tif", "n31_45_2020lc030.tif", (), None),
    ],
)
def test_years_between_picture_and_map(tmp_path, name, cover, own, years):
    sheet = write_raster(tmp_path / cover, patches(3, 128, 160, (10, 20)), T10)
    packed = pack_quietly([scene_at(tmp_path, name)], [sheet], "globeland30", tmp_path / "out", *SMALL, *own)
    for _, record in read_records(tmp_path / "out"):
        assert record.label_gap_years == (None if years is None else pytest.approx(years, rel=1e-6))
    gaps = packed.manifest.scenes[0].label_gap_years
    assert gaps == ({} if years is None else {"globeland30": pytest.approx(years)})


# --------------------------------------------------------------------------------------- several in one record


WORLD = (10, 20, 95)


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """A dataset with a first product and three further ones, and the sheets of each."""
    folder = tmp_path_factory.mktemp("several")
    scenes = [
        write_raster(folder / "s_20200817.tif", noise(1, (160, 200)), T10),
        write_raster(folder / "t_20210102.tif", noise(2, (160, 200)), Affine(10, 0, 500_700, 0, -10, 4_999_000)),
    ]
    degrees = Affine(0.00007, 0, 2.999, 0, -0.00006, 45.1545)
    made = {
        "globeland30": ("n31_45_2020lc030.tif", patches(3, 80, 120, (10, 20, 30, 255)), 33, 34),
        "worldcover": ("ESA_WorldCover_10m_2021_v200_N45E003_Map.tif", patches(4, 600, 700, (*WORLD * 4, 0), 9), 0, 0),
        "dynamicworld": ("dw.tif", dirichlet(5, 300, 340), 10.317, 10.143),
        "again": ("m.tif", patches(6, 80, 120, (10, 40, 90)), 31, 32),
    }
    sheets = {}
    for product, (name, codes, across, down) in made.items():
        place = Affine(across, 0, 499_970.4, 0, -down, 5_000_050.3) if across else degrees
        sheets[product] = [write_raster(folder / name, codes, place, UTM31 if across else "EPSG:4326")]
    arguments = [
        str(part) for name in ("worldcover", "dynamicworld", "again") for part in ("--also", name, *sheets[name])
    ]
    options = [
        *(option for option in RAW if not option.startswith("tile.bands")),
        "split.val_fraction=0.3", "split.block_m=700", "tile.size=32", "tile.step=24", "tile.bands=[1]",
        "shards.records=40",
        "labels.drop=[grassland]", "labels.min_valid_fraction=0.3",
        "labels.also={again: {product: globeland30, merge: {green: [shrubland, forest]}, year: 2010},"
        " worldcover: {min_valid_fraction: 0.9}}",
    ]  # fmt: skip
    last = {option.split("=")[0]: option for option in options}
    assert command(scenes, sheets["globeland30"], "globeland30", folder / "out", *arguments, *last.values()) == 0
    return folder / "out", sheets, scenes, arguments, list(last.values())


def test_each_product_has_its_own_fractions(several):
    folder, sheets, *_ = several
    manifest = manifests.load_manifest(folder)
    assert list(manifest.products) == ["again", "dynamicworld", "worldcover"]
    ways = {
        "globeland30": (OtherWay("globeland30", sheets["globeland30"], drop=["grassland"]), 1, 1),
        "again": (OtherWay("globeland30", sheets["again"], merge={"green": ["shrubland", "forest"]}), 1, 1),
        "worldcover": (OtherWay("worldcover", sheets["worldcover"]), 2, 2),
    }
    soft = SoftOtherWay(sheets["dynamicworld"])
    every = [record for _, record in read_records(folder)]
    assert len(every) > 20
    for record in every[::6]:
        assert set(record.also) == set(manifest.products)
        everything = np.ones((32, 32), bool)
        for name, (way, kx, ky) in ways.items():
            first = name == "globeland30"
            classes = manifest.classes if first else manifest.products[name].classes
            names = [entry.name for entry in classes]
            fractions, share = way.fractions(names, record.transform, record.crs, 32, kx, ky, everything)
            labels = record if first else record.also[name]
            np.testing.assert_allclose(labels.fractions, fractions, atol=1e-6)
            assert labels.valid_fraction == pytest.approx(share, abs=1e-6)
        sums, _ = soft.means(record, 1, 1, everything)
        np.testing.assert_allclose(record.also["dynamicworld"].fractions, sums / sums.sum(), atol=1e-5)
    assert min(record.valid_fraction for record in every) < 0.9  # the limits are each product's own
    assert min(record.also["worldcover"].valid_fraction for record in every) >= 0.9
    assert manifest.counts["rejected_unlabelled"] > 0


def test_what_the_manifest_says_of_further_products(several):
    folder, *_ = several
    manifest = manifests.load_manifest(folder)
    again, world = manifest.products["again"], manifest.products["worldcover"]
    assert (again.product, again.land_cover_years) == ("globeland30", (2010,))
    assert (world.product, world.land_cover_years) == ("worldcover", (2021,))
    assert "green" in [entry.name for entry in again.classes]
    assert [entry.rgb for entry in world.classes][:2] == [(0, 100, 0), (255, 187, 34)]
    gaps = {scene.scene_id: scene.label_gap_years for scene in manifest.scenes}
    assert set(gaps["s_20200817"]) == {"globeland30", "again", "worldcover"}  # dw.tif says no year
    assert gaps["t_20210102"]["again"] == pytest.approx((31 + 30 + 31 + 30 + 31 + 31 + 1) / 365.25 + 10, abs=0.01)
    for name in records.SPLITS:
        mine = [record for split, record in read_records(folder) if split == name]
        for product in manifest.products:
            chosen, key = manifests.labelled_by(manifest, product, "here")
            assert key == product
            mean = np.mean([record.also[product].fractions for record in mine], axis=0, dtype=np.float64)
            np.testing.assert_allclose(chosen.split(name).prior, mean / mean.sum(), atol=1e-6)
    assert verify_records.verify(folder, 1)[0] == []


@pytest.mark.parametrize("made_of", ["parts", "records", "older table"])
def test_the_table_of_tiles_has_all_products(several, tmp_path, made_of):
    folder, *_ = several
    manifest = manifests.load_manifest(folder)
    if made_of != "parts":
        folder = shutil.copytree(folder, tmp_path / "d")
        older = pq.read_table(folder / tile_table.NAME)
        (folder / tile_table.NAME).unlink()
        if made_of == "older table":  # of a version that did not know further products
            held = {name: text for name, text in older.schema.metadata.items() if name == b"geokr"}
            fewer = [name for name in older.column_names if not name.startswith("again_") and name != "label_gap_years"]
            pq.write_table(older.select(fewer).replace_schema_metadata(held), folder / tile_table.NAME)
            assert tile_table.is_current(folder, manifest)
        tile_table.write(folder, manifest, tmp_path, None, lambda done, total: None)
    rows = {row["tile_id"]: row for row in pq.read_table(folder / tile_table.NAME).to_pylist()}
    about = json.loads(pq.read_metadata(folder / tile_table.NAME).metadata[b"geokr"])
    assert list(about["products"]) == ["again", "dynamicworld", "worldcover"]
    every = [record for _, record in read_records(folder)]
    assert len(rows) == len(every)
    for record in every:
        row = rows[record.tile_id]
        for name, labels in (("", record), *record.also.items()):
            classes = manifest.products[name].classes if name else manifest.classes
            first = f"{name}_" if name else ""
            assert [row[first + entry.name] for entry in classes] == labels.fractions.tolist()
            assert row[f"{first}valid_fraction"] == labels.valid_fraction
            assert row[f"{first}label_gap_years"] == labels.label_gap_years
    assert {row["dynamicworld_label_gap_years"] for row in rows.values()} == {None}
    assert len({row["label_gap_years"] for row in rows.values()}) == 2
    assert {row["valid_pixels"] for row in rows.values()} == ({None} if made_of == "records" else {1.0})


def test_columns_of_further_products_never_meet_others():
    names = ["forest", "nlcd_forest", "label_gap_years"]
    columns = tile_table.schema(names, {"nlcd": ["forest", "forest_"]}).names
    assert len(set(columns)) == len(columns)
    assert tile_table.further_columns(names, {"nlcd": ["forest"]}) == {
        "nlcd": ["nlcd_valid_fraction", "nlcd_label_gap_years", "nlcd_forest_"]
    }


def test_the_same_command_again_and_other_sheets(several, tmp_path, capsys):
    folder, sheets, scenes, arguments, options = several
    before = contents(folder)
    assert command(scenes, sheets["globeland30"], "globeland30", folder, *arguments, *options) == 0
    assert contents(folder) == before
    assert "nothing to do" in capsys.readouterr().out
    other = write_raster(
        tmp_path / "dw.tif", dirichlet(8, 300, 340), Affine(10.317, 0, 499_970.4, 0, -10.143, 5_000_050.3)
    )
    changed = [str(other) if part.endswith("dw.tif") else part for part in arguments]
    assert command(scenes, sheets["globeland30"], "globeland30", folder, *changed, *options) == 1
    assert "also.dynamicworld.0" in capsys.readouterr().err
    fewer = arguments[: arguments.index("again") - 1]
    quiet = [option for option in options if not option.startswith("labels.also")]
    assert command(scenes, sheets["globeland30"], "globeland30", folder, *fewer, *quiet) == 1
    assert "also.again" in capsys.readouterr().err
    assert contents(folder) == before
    text = before["manifest.json"].decode()
    assert str(folder.parent) not in text


def test_first_labels_do_not_depend_on_further_ones(several, tmp_path):
    """Where the further products are everywhere, the first one's fractions are those of a dataset without them."""
    folder, sheets, scenes, _, options = several
    alone = [option for option in options if not option.startswith("labels.also")]
    assert command(scenes, sheets["globeland30"], "globeland30", tmp_path / "out", *alone) == 0
    plain = {record.tile_id: record for _, record in read_records(tmp_path / "out")}
    for _, record in read_records(folder):
        assert (plain[record.tile_id].fractions == record.fractions).all()
        assert plain[record.tile_id].also == {}


def test_further_products_that_cannot_be(tmp_path, several):
    _, sheets, scenes, *_ = several
    first, world = sheets["globeland30"], [str(path) for path in sheets["worldcover"]]

    def refused(kind, words, also, *own):
        with pytest.raises(kind, match=words):
            pack_quietly(scenes, first, "globeland30", tmp_path / "out", *SMALL, *own, also=also)

    refused(PlanError, r"--also globeland30: there is a product 'globeland30' already", {"globeland30": world})
    refused(
        ConfigError,
        r"--also mine: product 'mine' is not known.*A name of its own: 'labels\.also=\{mine: \{product: \.\.\.\}\}'",
        {"mine": world},
    )
    refused(ConfigError, r"labels\.also: mine: product 'nlc' is not known", {"mine": world},
            "labels.also={mine: {product: nlc}}")  # fmt: skip
    refused(PlanError, r"labels\.also: 'wordcover'.*did you mean 'worldcover'", {"worldcover": world},
            "labels.also={wordcover: {groups: true}}")  # fmt: skip
    refused(
        PlanError, r"--also worldcover '.*none\.tif': nothing matches", {"worldcover": [str(tmp_path / "none.tif")]}
    )
    refused(PlanError, r"cannot be a name", {"a/b": world}, "labels.also={a/b: {product: worldcover}}")
    far = write_raster(tmp_path / "far.tif", patches(1, 20, 20, (10, 20)), Affine(0.1, 0, 60, 0, -0.1, 10), "EPSG:4326")
    refused(
        PlanError,
        r"none of the 2 scenes overlaps the worldcover: .*check --also worldcover",
        {"worldcover": [str(far)]},
    )
    assert command(scenes, first, "globeland30", tmp_path / "out", "--also", "worldcover") == 1
    assert command(scenes, first, "globeland30", tmp_path / "out", "--also", "nlcd", "x", "--also", "nlcd", "y") == 1


def test_a_table_of_ones_own_as_a_further_product(tmp_path):
    cover = write_raster(tmp_path / "n31_45_2020lc030.tif", patches(3, 128, 160, (10, 20)), T10)
    mine = write_raster(tmp_path / "m.tif", patches(4, 128, 160, (1, 2)), T10)
    table = tmp_path / "mine.yaml"
    classes = {1: {"name": "a"}, 2: {"name": "b"}}
    table.write_text(yaml.safe_dump({"name": "our_map", "nodata": [0], "ignore": [], "classes": classes}))
    also = {str(table): [str(mine)]}
    own = ("labels.also={our_map: {year: 2019}}",)
    out = tmp_path / "out"
    packed = pack_quietly([scene_at(tmp_path)], [cover], "globeland30", out, *SMALL, *own, also=also)
    assert packed.manifest.products["our_map"].land_cover_years == (2019,)
    assert str(tmp_path) not in (out / manifests.MANIFEST).read_text()
    way = OtherWay(str(table), [mine])
    for _, record in list(read_records(out))[::4]:
        expected, _ = way.fractions(["a", "b"], record.transform, record.crs, 32, 1, 1, np.ones((32, 32), bool))
        np.testing.assert_allclose(record.also["our_map"].fractions, expected, atol=1e-6)


def test_cut_tiles_by_several_products(several, tmp_path):
    """Tiles that are cut already have the labels, by a map or a file of their own and by further maps, that they have
    as parts of their scene."""
    _, sheets, scenes, arguments, options = several
    for scene in scenes:
        with rasterio.open(scene) as file:
            pixels, place = file.read(1), file.transform
        for row in range(0, 128, 32):
            part = pixels[row : row + 32, 64:96]
            write_raster(tmp_path / f"tiles/{scene.stem}_{row}.tif", part, place @ Affine.translation(64, row))
    whole = [option for option in options if not option.startswith(("tile.s", "split"))]
    again = [*whole, "split.val_fraction=0", "labels.min_valid_fraction=0.01"]
    last = {option.split("=")[0]: option for option in again}
    cut = ["--tiles", str(tmp_path / "tiles"), "--product", "globeland30"]
    by_map = [*cut, "--land-cover", *map(str, sheets["globeland30"]), *arguments, *last.values()]
    assert pack_records.main([*by_map, "--out", str(tmp_path / "by_map")]) == 0
    found = {record.tile_id: record for _, record in read_records(tmp_path / "by_map")}
    assert len(found) > 3
    way = OtherWay("worldcover", sheets["worldcover"])
    for record in found.values():
        names = [entry.name for entry in manifests.load_manifest(tmp_path / "by_map").products["worldcover"].classes]
        expected, _ = way.fractions(names, record.transform, record.crs, 32, 2, 2, np.ones((32, 32), bool))
        np.testing.assert_allclose(record.also["worldcover"].fractions, expected, atol=1e-6)
        assert set(record.also) == {"again", "dynamicworld", "worldcover"}
        if record.tile_id.startswith("s_"):
            assert record.label_gap_years == pytest.approx(47 / 365.25)
    (tmp_path / "json").mkdir()
    for path in (tmp_path / "tiles").iterdir():
        (tmp_path / "json" / f"{path.stem}.json").write_text('{"forest": 3, "10": 1}')
    by_file = [*cut, "--labels", str(tmp_path / "json"), *arguments, *last.values()]
    assert pack_records.main([*by_file, "--out", str(tmp_path / "by_file")]) == 0
    for _, record in read_records(tmp_path / "by_file"):
        assert sorted(record.fractions.tolist())[-2:] == [0.25, 0.75]
        for name, labels in record.also.items():
            assert (labels.fractions == found[record.tile_id].also[name].fractions).all()


def test_scenes_added_to_a_dataset_of_several_products(several, tmp_path):
    """First one scene, then the other: statistics of every product are over both."""
    folder, sheets, scenes, arguments, options = several
    wide = [*options, "split.val_fraction=0"]
    last = list({option.split("=")[0]: option for option in wide}.values())
    out, first = tmp_path / "out", sheets["globeland30"]
    assert command(scenes[:1], first, "globeland30", out, *arguments, *last) == 0
    assert command(scenes, first, "globeland30", out, *arguments, *last, "--append") == 0
    grown = manifests.load_manifest(out)
    assert grown.version == 2
    assert grown.products == manifests.load_manifest(folder).products
    every = [record for _, record in read_records(out)]
    assert {record.scene_id for record in every} == {"s_20200817", "t_20210102"}
    for product in grown.products:
        mean = np.mean([record.also[product].fractions for record in every], axis=0, dtype=np.float64)
        chosen, _ = manifests.labelled_by(grown, product, "here")
        np.testing.assert_allclose(chosen.train.prior, mean / mean.sum(), atol=1e-6)
    before = contents(out)
    assert command(scenes, first, "globeland30", out, *arguments, *last) == 0
    assert contents(out) == before
