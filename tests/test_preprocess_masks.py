"""Cloud masks beside scenes: found, understood, sampled, counted; against NumPy and rasterio's own warp."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from affine import Affine
from rasterio.enums import Resampling
from rasterio.transform import rowcol
from rasterio.warp import reproject
from rasterio.warp import transform as warp_points

from geokr.config import ConfigError, load
from geokr.manifests import load_manifest
from preprocess import estimate, gdal_files, masks
from preprocess.grid import MAX_CHUNK_TILES
from preprocess.inputs import PlanError
from preprocess.options import MaskOptions, PackOptions
from preprocess.plan import make_plan
from tests.scenes import RAW, UTM31, contents, noise, pack_quietly, patches, read_records, scene_at, write_raster

T10 = Affine(10, 0, 500_000, 0, -10, 5_000_000)
T20 = Affine(20, 0, 500_000, 0, -20, 5_000_000)
T30 = Affine(30, 0, 500_000, 0, -30, 5_000_000)
SMALL = (*RAW, "tile.size=32", "tile.step=24", "tile.bands=[1]")
# By the product guides: the values of SCL that say cloud, shadow, saturated or nothing.
SCL_BAD = {0, 1, 3, 8, 9, 10}


def scene_with(folder: Path, mask: np.ndarray, mask_name: str, transform: Affine = T20, crs: str = UTM31, **profile):
    """A scene of 160 x 128 pixels of 10 m, its land cover, and a mask; (scene, cover, mask) paths."""
    name = "T31UFS_20200817T105031_B02_10m.tif"
    scene = write_raster(folder / "R10m" / name, noise(1, (1, 128, 160)), T10)
    cover = write_raster(folder / "cover.tif", patches(2, 128, 160, (10, 20, 30)), T10)
    return scene, cover, write_raster(folder / mask_name, mask, transform, crs, **profile)


def blobs(seed: int, height: int, width: int, values) -> np.ndarray:
    return patches(seed, height, width, values, side=7)


def kept_ids(folder: Path) -> set[tuple[int, ...]]:
    """(column, row) of every tile."""
    return {tuple(map(int, record.tile_id.rsplit(":", 2)[1:])) for _, record in read_records(folder)}


def expected(bad_HW: np.ndarray, size: int, step: int, limit: float) -> tuple[set[tuple[int, ...]], int]:
    """(tiles that stay, how many do not) by slicing alone. bad_HW: bool a scene pixel."""
    height, width = bad_HW.shape
    places = [sorted({*range(0, n - size + 1, step), n - size}) for n in (width, height)]
    every = [(column, row) for row in places[1] for column in places[0]]
    stay = {(c, r) for c, r in every if bad_HW[r : r + size, c : c + size].mean() <= limit}
    return stay, len(every) - len(stay)


@pytest.mark.parametrize("driver", ["GTiff", "JP2OpenJPEG"])
def test_scl_beside_a_sentinel2_scene(tmp_path, driver):
    """20 m against 10 m pixels: every mask pixel stands for two by two."""
    mask = blobs(3, 64, 80, (4, 4, 4, 5, 5, 6, 6, *range(12)))
    options: dict[str, Any] = {} if driver == "GTiff" else {"QUALITY": "100", "REVERSIBLE": "YES"}
    name = f"R20m/T31UFS_20200817T105031_SCL_20m.{'tif' if driver == 'GTiff' else 'jp2'}"
    scene, cover, path = scene_with(tmp_path, mask, "plain.tif")
    target = tmp_path / name
    target.parent.mkdir()
    with rasterio.open(path) as source, rasterio.open(
        target, "w", driver=driver, width=80, height=64, count=1, dtype="uint8", crs=UTM31, transform=T20, **options
    ) as file:  # fmt: skip
        file.write(source.read())
    packed = pack_quietly(
        [scene], [cover], "worldcover", tmp_path / "out", *SMALL, "mask.kind=scl", "mask.max_fraction=0.3"
    )
    bad = np.isin(mask, list(SCL_BAD)).repeat(2, 0).repeat(2, 1)
    stay, gone = expected(bad, 32, 24, 0.3)
    assert len(stay) > 3
    assert gone > 3
    assert kept_ids(tmp_path / "out") == stay
    assert packed.manifest.counts["rejected_cloud"] == gone
    assert packed.manifest.counts["scenes_without_mask"] == 0
    # what is masked keeps its value and its label
    with rasterio.open(scene) as file:
        pixels = file.read(1)
    masked_somewhere = 0
    for _, record in read_records(tmp_path / "out"):
        column, row = map(int, record.tile_id.rsplit(":", 2)[1:])
        tile = np.frombuffer(record.image, np.uint8).reshape(32, 32)
        assert (tile == pixels[row : row + 32, column : column + 32]).all()
        assert record.valid_fraction == 1
        masked_somewhere += bad[row : row + 32, column : column + 32].any()
    assert masked_somewhere


@pytest.mark.parametrize("limit", [0.0, 0.1, 0.5, 1.0])
def test_the_limit_is_a_share_that_may_be_reached(tmp_path, limit):
    mask = blobs(5, 128, 160, (*(0,) * 14, 1))
    scene, cover, _ = scene_with(tmp_path, mask, "R10m/clouds.tif", T10)
    own = ("mask.kind=values", "mask.reject=[1]", "mask.pattern=clouds.tif", f"mask.max_fraction={limit}")
    pack_quietly([scene], [cover], "worldcover", tmp_path / "out", *SMALL, *own)
    assert kept_ids(tmp_path / "out") == expected(mask == 1, 32, 24, limit)[0]


def test_chunk_borders_do_not_show(tmp_path, monkeypatch):
    """The same tiles, byte for byte, however a scene is cut into chunks, strips and label strips."""
    mask = blobs(6, 40, 50, (4, 5, 9, 3, 6))
    scene, cover, _ = scene_with(tmp_path, mask, "R10m/SCL.tif", Affine(33, 2, 499_990, -1, -34, 5_000_020))
    sheets = {}
    for name, most, strip in (("whole", MAX_CHUNK_TILES, 4 << 20), ("cut", 3, 500)):
        monkeypatch.setattr("preprocess.grid.MAX_CHUNK_TILES", most)
        monkeypatch.setattr("preprocess.labels.STRIP_PIXELS", strip)
        own = ("mask.kind=scl", "mask.max_fraction=0.4", "tile.codec=raw", "stretch.mode=joint")
        pack_quietly([scene], [cover], "worldcover", tmp_path / name, *SMALL, *own)
        sheets[name] = contents(tmp_path / name)
    assert load_manifest(tmp_path / "whole").counts["rejected_cloud"] > 3
    assert sheets["whole"] == sheets["cut"]


def other_way(scene: Path, mask: Path, bad: set[int]) -> np.ndarray:
    """bool [H, W]: every pixel's centre through rasterio by itself; outside of the mask is bad."""
    with rasterio.open(scene) as file, rasterio.open(mask) as other:
        codes = other.read(1)
        columns, rows = np.meshgrid(np.arange(file.width) + 0.5, np.arange(file.height) + 0.5)
        x, y = file.transform * (columns, rows)
        moved = warp_points(file.crs, other.crs, x.ravel(), y.ravel())
        r, c = rowcol(other.transform, moved[0], moved[1], op=math.floor)
        r, c = np.array(r), np.array(c)
        inside = (r >= 0) & (c >= 0) & (r < other.height) & (c < other.width)
        found = np.ones(len(r), bool)
        found[inside] = np.isin(codes[r[inside], c[inside]], list(bad))
    return found.reshape(file.height, file.width)


@pytest.mark.parametrize(
    ("crs", "transform"),
    [
        ("EPSG:4326", Affine(0.0002, 0, 2.999, 0, -0.0002, 45.1545)),
        ("EPSG:3035", Affine(17, 0, 3_750_000, 0, -17, 2_480_000)),
        (UTM31, Affine(15.03, 6.01, 500_100.37, 5.02, -14.07, 4_999_900.41)),  # no centre lies on a border
    ],
    ids=["degrees", "another projection", "rotated"],
)
def test_a_mask_on_another_grid(tmp_path, crs, transform):
    """Any CRS, a part of the scene only; what the mask does not reach is masked."""
    side = 90
    mask = blobs(7, side, side, (0, 1, 2, 3, 0))
    if crs == "EPSG:3035":  # about the scene's middle
        x, y = warp_points(UTM31, crs, [500_800], [4_999_360])
        transform = Affine(17, 0, x[0] - 600, 0, -17, y[0] + 500)
    scene, cover, path = scene_with(tmp_path, mask, "R10m/m.tif", transform, crs)
    bad = other_way(scene, path, {1, 3})
    assert 0.2 < bad.mean() < 0.95
    found = scene_at(scene, "s")
    options = MaskOptions(kind="values", pattern="m.tif", reject=(1, 3), max_fraction=0.5)
    found = masks.with_mask(found, options)
    assert found.mask is not None
    assert (masks.masked_pixels(found.mask, found.place, options) == bad).all()
    pack_quietly(
        [scene], [cover], "worldcover", tmp_path / "out", *SMALL,
        "mask.kind=values", "mask.pattern=m.tif", "mask.reject=[1,3]", "mask.max_fraction=0.5",
    )  # fmt: skip
    assert kept_ids(tmp_path / "out") == expected(bad, 32, 24, 0.5)[0]


def test_as_gdal_warps_a_mask(tmp_path):
    mask = blobs(8, 64, 80, range(12))
    scene, _, path = scene_with(tmp_path, mask, "R10m/m.tif", Affine(23.03, 0, 499_987.37, 0, -21.07, 5_000_013.41))
    warped = np.full((128, 160), 99, np.uint8)
    with rasterio.open(path) as file:
        reproject(rasterio.band(file, 1), warped, dst_transform=T10, dst_crs=UTM31, resampling=Resampling.nearest)
    found = scene_at(scene, "s")
    for reject in ((3,), (8, 9, 10), (0,)):
        options = MaskOptions(kind="values", pattern="m.tif", reject=reject)
        mask_sheet = masks.with_mask(found, options).mask
        assert mask_sheet is not None
        mine = masks.masked_pixels(mask_sheet, found.place, options)
        assert (mine == np.isin(warped, reject)).all()


# --------------------------------------------------------------------------------------------- what values mean


def rejected_codes(kind: Any, *reject) -> set[int]:
    lookup = masks.mask_legend(MaskOptions(kind=kind, pattern="x", reject=reject or None)).lookup
    return set((np.flatnonzero(lookup[32768:] == masks.MASKED)).tolist())


def test_scl_classes():
    names = "nodata saturated dark cloud_shadow vegetation bare water unclassified cloud_medium cloud_high cirrus snow"
    for value, name in enumerate(names.split()):
        assert rejected_codes("scl", name) == {value} == rejected_codes("scl", value)
    assert rejected_codes("scl") == SCL_BAD


# Values that the archives' guides give as examples, and what they mean there.
QA_PIXEL = {
    1: {"nodata"},
    21824: set(),  # clear land
    21952: {"water"},
    21826: {"dilated_cloud"},
    22080: {"cloud_medium"},
    22280: {"cloud", "cloud_medium"},
    23888: {"cloud_shadow"},
    30048: {"snow"},
    54596: {"cirrus"},
    55052: {"cirrus", "cloud", "cloud_medium"},
}
PIXEL_QA = {
    1: {"nodata"}, 322: set(), 324: {"water"}, 328: {"cloud_shadow"}, 336: {"snow"},
    386: {"cloud_medium"}, 480: {"cloud", "cloud_medium"}, 834: {"cirrus"},
}  # fmt: skip
BQA = {
    1: {"nodata"}, 2720: set(), 2724: {"saturated"}, 2752: {"cloud_medium"}, 2800: {"cloud", "cloud_medium"},
    2976: {"cloud_shadow"}, 3744: {"snow"}, 6816: {"cirrus"},
}  # fmt: skip


@pytest.mark.parametrize(("kind", "codes"), [("qa_pixel", QA_PIXEL), ("pixel_qa", PIXEL_QA), ("bqa", BQA)])
def test_landsat_bits(kind, codes):
    fields = masks.KINDS[kind].fields
    assert fields is not None
    for name in fields:
        found = rejected_codes(kind, name)
        for code, meanings in codes.items():
            assert (code in found) == (name in meanings), (name, code)
    clear, bad = {code for code, meaning in codes.items() if meaning <= {"water", "snow", "saturated"}}, {1}
    assert not clear & rejected_codes(kind)
    assert bad <= rejected_codes(kind)


def test_bits_and_values_of_the_users_own():
    assert rejected_codes("bits", 3, 5) == {code for code in range(65536) if code & 8 or code & 32}
    assert rejected_codes("qa_pixel", 4) == rejected_codes("qa_pixel", "cloud_shadow")
    assert rejected_codes("values", 7, 300) == {7, 300}


def test_qa_pixel_beside_a_landsat_scene(tmp_path):
    transform = T30
    scene = write_raster(
        tmp_path / "LC08_L1TP_038034_20130612_20200912_02_T1_B4.TIF", noise(1, (128, 160), "uint16"), transform
    )
    cover = write_raster(tmp_path / "cover.tif", patches(2, 128, 160, (10, 20)), transform)
    codes = np.array(list(QA_PIXEL), np.uint16)[blobs(9, 128, 160, (1, 1, 1, 1, *range(10)))]
    write_raster(tmp_path / "LC08_L1TP_038034_20130612_20200912_02_T1_QA_PIXEL.TIF", codes, transform, nodata=1)
    own = ("mask.kind=qa_pixel", "mask.max_fraction=0.35")
    pack_quietly([scene], [cover], "worldcover", tmp_path / "out", *SMALL, *own)
    bad = (codes & 0b11111) != 0
    stay, gone = expected(bad, 32, 24, 0.35)
    assert kept_ids(tmp_path / "out") == stay
    assert len(stay) > 3
    assert gone > 3
    pack_quietly([scene], [cover], "worldcover", tmp_path / "snow", *SMALL, *own, "mask.reject=[snow]")
    assert kept_ids(tmp_path / "snow") == expected((codes & 32) != 0, 32, 24, 0.35)[0]


# ------------------------------------------------------------------------------------------- what it does to the rest


def test_pixels_without_data_are_no_clouds(tmp_path):
    pixels = noise(1, (128, 160))
    pixels[:, :30] = 0
    scene = write_raster(tmp_path / "s.tif", pixels, T10, nodata=0)
    cover = write_raster(tmp_path / "cover.tif", patches(2, 128, 160, (10, 20)), T10)
    mask = np.zeros((128, 160), np.uint8)
    mask[:, :30], mask[:32, 100:] = 1, 1
    write_raster(tmp_path / "s_clouds.tif", mask, T10)
    own = ("mask.kind=values", "mask.pattern=./{stem}_clouds.tif", "mask.reject=[1]", "quality.min_valid_pixels=0.5")
    packed = pack_quietly([scene], [cover], "worldcover", tmp_path / "out", *SMALL, "tile.step=32", *own)
    # in the first column 30 of 32 pixels have no data; in the first row two tiles are masked, one for 28 of its columns
    assert packed.manifest.counts["rejected_nodata"] == 4
    assert packed.manifest.counts["rejected_cloud"] == 2
    assert packed.manifest.counts["kept"] == 20 - 6


def test_stretch_limits_come_from_the_clear_pixels(tmp_path, monkeypatch):
    pixels = noise(1, (3, 400, 400), "uint16", 300, 900)
    clouds = np.full((400, 400), 4, np.uint8)
    clouds[:200] = 9
    pixels[:, :200] += 9000
    scene = write_raster(tmp_path / "s.tif", pixels, T10)
    cover = write_raster(tmp_path / "cover.tif", patches(2, 400, 400, (10, 20)), T10)
    write_raster(tmp_path / "s_SCL.tif", clouds, T10)
    limits = {}
    for name, own in (("with", ("mask.kind=scl",)), ("without", ())):
        packed = pack_quietly(
            [scene], [cover], "worldcover", tmp_path / name, *SMALL, "tile.bands=[1,2,3]", "stretch.mode=joint", *own
        )
        of_scene = packed.manifest.scenes[0].stretch_limits
        assert of_scene is not None
        limits[name] = of_scene[0]
        keys = {key.split("=")[0]: key for key in (*SMALL, "tile.bands=[1,2,3]", "stretch.mode=joint", *own)}
        plan = make_plan([str(scene)], [str(cover)], "worldcover", load(PackOptions, None, [*keys.values()]))
        with gdal_files.environment():  # a dry run looks at a few windows for the same
            monkeypatch.setattr(estimate, "SMALL", 0)
            assert estimate._limits(plan, plan.tasks[0])[0] == pytest.approx(of_scene[0], rel=0.05)
    sample = pixels[:, 200:][:, ::4, ::5]
    assert limits["with"] == pytest.approx(np.percentile(sample, [1, 99]))
    assert limits["without"][1] > 9000


def test_a_mask_is_part_of_what_a_dataset_is_made_of(tmp_path):
    mask = blobs(5, 128, 160, (*(0,) * 14, 1))
    scene, cover, path = scene_with(tmp_path, mask, "R10m/clouds.tif", T10)
    own = (*SMALL, "mask.kind=values", "mask.reject=[1]")
    pack_quietly([scene], [cover], "worldcover", tmp_path / "out", *own, "mask.pattern=clouds.tif")
    before = contents(tmp_path / "out")
    (again := tmp_path / "elsewhere").mkdir()
    path.rename(again / "clouds.tif")
    moved = f"mask.pattern={again}/clouds.tif"
    assert not pack_quietly([scene], [cover], "worldcover", tmp_path / "out", *own, moved).written
    assert contents(tmp_path / "out") == before
    assert str(tmp_path) not in before["manifest.json"].decode()
    assert "pattern" not in json.loads(before["manifest.json"])["config"]["mask"]
    mask[0, 0] ^= 1
    write_raster(again / "clouds.tif", mask, T10)
    with pytest.raises(PlanError, match=r"scenes\.T31UFS"):
        pack_quietly([scene], [cover], "worldcover", tmp_path / "out", *own, moved)


# -------------------------------------------------------------------------------------------------------- errors


def pack_with(tmp_path, scene, cover, *own):
    return pack_quietly([scene], [cover], "worldcover", tmp_path / "out", *SMALL, *own)


def test_a_scene_without_its_mask(tmp_path):
    scene, cover, path = scene_with(tmp_path, np.zeros((64, 80), np.uint8), "R10m/x.tif")
    path.unlink()
    with pytest.raises(PlanError, match=r"B02_10m\.tif: no mask of kind 'scl'.*R20m/T31UFS_20200817T105031_SCL_20m"):
        pack_with(tmp_path, scene, cover, "mask.kind=scl")
    packed = pack_with(tmp_path, scene, cover, "mask.kind=scl", "mask.required=false")
    assert packed.manifest.counts["scenes_without_mask"] == 1
    assert packed.manifest.counts["rejected_cloud"] == 0


def test_masks_that_cannot_be(tmp_path):
    scene, cover, path = scene_with(tmp_path, np.zeros((64, 80), np.uint8), "R10m/a_mask.tif")
    own = ("mask.kind=values", "mask.reject=[1]")
    write_raster(tmp_path / "R10m/b_mask.tif", np.zeros((64, 80), np.uint8), T20)
    with pytest.raises(PlanError, match=r"2 files could be its mask.*set mask\.pattern"):
        pack_with(tmp_path, scene, cover, *own, "mask.pattern=./*_mask.tif")
    write_raster(tmp_path / "R10m/far.tif", np.zeros((64, 80), np.uint8), Affine(20, 0, 700_000, 0, -20, 5_000_000))
    with pytest.raises(PlanError, match=r"B02_10m.tif: its mask .*far.tif lies somewhere else"):
        pack_with(tmp_path, scene, cover, *own, "mask.pattern=far.tif")
    with pytest.raises(PlanError, match=r"no class 'clouds' \(did you mean 'cloud"):
        pack_with(tmp_path, scene, cover, "mask.kind=scl", "mask.reject=[clouds]", "mask.pattern=a_mask.tif")
    with pytest.raises(PlanError, match="17 is no bit"):
        pack_with(tmp_path, scene, cover, "mask.kind=bits", "mask.reject=[17]", "mask.pattern=a_mask.tif")
    with pytest.raises(ConfigError, match=r"needs mask\.reject"):
        pack_with(tmp_path, scene, cover, "mask.kind=values", "mask.pattern=a_mask.tif")
    for more in ((), ("mask.required=false",)):  # which would turn a forgotten pattern into no masks at all
        with pytest.raises(PlanError, match=r"B02_10m\.tif: names no mask.*mask\.kind=values.*set mask\.pattern"):
            pack_with(tmp_path, scene, cover, *own, *more)
    with pytest.raises(ConfigError, match=r"go with mask\.kind"):
        pack_with(tmp_path, scene, cover, "mask.pattern=x.tif")
    path.write_bytes(b"no raster")
    with pytest.raises(PlanError, match=r"a_mask.tif: is neither GeoTIFF nor"):
        pack_with(tmp_path, scene, cover, *own, "mask.pattern=a_mask.tif")


def test_a_damaged_mask_makes_its_scene_unusable(tmp_path):
    big = np.random.default_rng(0).integers(0, 2, (512, 640)).astype(np.uint8)
    blocks = {"tiled": True, "blockxsize": 64, "blockysize": 64, "compress": "deflate"}
    fine = Affine(2.5, 0, 500_000, 0, -2.5, 5_000_000)
    scene, cover, path = scene_with(tmp_path, big, "R10m/m.tif", fine, **blocks)
    other = write_raster(tmp_path / "R10m/other.tif", noise(4, (128, 160)), T10)
    write_raster(tmp_path / "R10m/other_m.tif", np.zeros((128, 160), np.uint8), T10)
    path.rename(tmp_path / "R10m" / f"{scene.stem}_m.tif")
    path = tmp_path / "R10m" / f"{scene.stem}_m.tif"
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 4000] = bytes(4000)
    path.write_bytes(data)
    own = ("mask.kind=values", "mask.reject=[1]", "mask.pattern=./{stem}_m.tif")
    packed = pack_quietly([scene, other], [cover], "worldcover", tmp_path / "out", *SMALL, *own, "max_bad_fraction=0.5")
    assert packed.manifest.counts["rejected_unreadable"] > 0
    assert {record.scene_id for _, record in read_records(tmp_path / "out")} == {"other"}
