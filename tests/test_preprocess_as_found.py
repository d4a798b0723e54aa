"""Scenes, sheets and tiles as programs leave them: masks beside codes, bands tagged as alpha, orders that change."""

import json
import os

import numpy as np
import pytest
import rasterio
from rasterio.enums import ColorInterp

from geokr import config
from preprocess import bands, pack_records, sampling, scene_headers, stac, verify_records
from preprocess.options import MaskOptions, PackOptions
from preprocess.scene import Source, open_scene
from tests.scenes import NO_QUALITY, RAW, command, noise, pack_quietly, patches, read_records, write_raster

PLACE = (30, 0, 4e5, 0, -30, 5.2e6)
KEYS = (*RAW, "tile.size=32", "tile.step=32")
SIDE = 96


@pytest.fixture
def scene(tmp_path):
    return write_raster(tmp_path / "scene.tif", noise(1, (3, SIDE, SIDE)), PLACE)


@pytest.fixture
def sheet(tmp_path):
    return write_raster(tmp_path / "land.tif", patches(2, SIDE, SIDE, [10, 20, 30]), PLACE)


def test_a_sheet_with_a_mask_and_no_nodata_value(scene, sheet, tmp_path, capsys):
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(sheet, "r+") as file:
        file.write_mask(np.arange(SIDE * SIDE).reshape(SIDE, SIDE) % 2 == 0)
    assert command([scene], [sheet], "worldcover", tmp_path / "out", *KEYS) == 1
    assert "has a mask of its own and no nodata value" in capsys.readouterr().err
    with rasterio.open(sheet) as file:
        codes = np.where(file.read_masks(1) == 0, 255, file.read(1)).astype(np.uint8)
    burnt = write_raster(tmp_path / "burnt.tif", codes, PLACE, nodata=255)
    assert command([scene], [burnt], "worldcover", tmp_path / "out", *KEYS, "labels.min_valid_fraction=0.3") == 0
    assert all(record.valid_fraction == pytest.approx(0.5) for _, record in read_records(tmp_path / "out"))


def test_a_described_band_is_no_alpha(tmp_path):
    """Four bands of 8 bits are tagged red, green, blue, alpha where nobody says otherwise."""
    pixels = noise(1, (4, 8, 8))
    for name, described in (("named", ("blue", "green", "red", "nir")), ("nameless", ())):
        path = write_raster(tmp_path / f"{name}.tif", pixels, PLACE, names=described)
        with rasterio.open(path, "r+") as file:
            file.colorinterp = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha]
        header = scene_headers.read_header(str(path))
        assert bands.own_names(header) == (list(described) or ["red", "green", "blue", "alpha"])


def test_tiles_whose_bands_change_their_order(tmp_path, capsys):
    land = write_raster(tmp_path / "land.tif", patches(2, 32, 64, [10, 20]), PLACE)
    for n, order in enumerate((("red", "green", "blue"), ("blue", "green", "red"))):
        place = (30, 0, 4e5 + 960 * n, 0, -30, 5.2e6)
        write_raster(tmp_path / f"tiles/t{n}.tif", noise(n, (3, 32, 32)), place, names=order)
    words = ["--tiles", str(tmp_path / "tiles"), "--land-cover", str(land), "--product", "worldcover"]
    keys = (*NO_QUALITY, "split.val_fraction=0", "workers=0")
    assert pack_records.main([*words, "--out", str(tmp_path / "a"), *keys]) == 1
    assert "its bands are blue, green, red, of which (3, 2, 1) are asked for" in capsys.readouterr().err
    assert pack_records.main([*words, "--out", str(tmp_path / "b"), *keys, "tile.bands=[1,2,3]"]) == 0


@pytest.mark.parametrize("mode", ["joint", "per_band"])
@pytest.mark.parametrize("fill", [-3.4028235e38, 9.96921e36, 1e12])
def test_a_scene_of_one_huge_value(tmp_path, sheet, fill, mode):
    pixels = np.full((3, SIDE, SIDE), fill, np.float32)
    path = write_raster(tmp_path / "fill.tif", pixels, PLACE)
    other = write_raster(tmp_path / "other.tif", noise(3, (3, SIDE, SIDE)).astype(np.float32), PLACE)
    keys = ("tile.size=32", "tile.step=32", "workers=0", "split.val_fraction=0", f"stretch.mode={mode}")
    packed = pack_quietly([path, other], [sheet], "worldcover", tmp_path / "out", *keys)
    assert {record.scene_id for _, record in read_records(tmp_path / "out")} == {"other"}
    assert packed.manifest.counts["kept"] == 9


def test_limits_of_a_constant_are_apart():
    samples = [np.full((1, 400), value, np.float32) for value in (5e30,)]
    options = config.load(PackOptions, None, ["stretch.mode=joint"])
    low, high = sampling.limits_from(samples, 1, "float32", options)[0]
    assert np.isfinite(255.0 / (high - low))


def test_the_mask_of_an_item_is_taken_for_what_it_is(tmp_path, scene):
    for key, kind in (("scl", "scl"), ("QA_PIXEL", "qa_pixel")):
        source = Source(str(scene), str(scene), file=str(scene), mask="mask.tif", mask_kind=kind)
        for wanted in ("scl", "qa_pixel"):
            options = PackOptions(mask=MaskOptions(kind=wanted))
            found = open_scene(source, "s", options, None).mask_path
            assert found == ("mask.tif" if wanted == kind else ""), (key, wanted)
        assert stac.MASKS[key] == kind
    unknown = Source(str(scene), str(scene), file=str(scene), mask="mask.tif")
    assert open_scene(unknown, "s", PackOptions(mask=MaskOptions(kind="scl")), None).mask_path == "mask.tif"


def test_file_urls_of_items():
    assert stac._local("file:///a%20b/r.tif") == "/a b/r.tif"
    assert stac._local("./img/r.tif") == "./img/r.tif"
    assert stac._local("s3://b/a%20b.tif") == "s3://b/a%20b.tif"


def test_the_page_keeps_no_secrets(tmp_path, sheet, scene):
    from preprocess.report_sections import making

    manifest = pack_quietly([scene], [sheet], "worldcover", tmp_path / "out", *KEYS).manifest
    page = making(manifest, ["pack", "--scenes", "https://u:pw@h/a.tif?sig=SECRET", "tile.size=32"])
    assert "https://h/a.tif" in page
    assert "SECRET" not in page
    assert "pw@" not in page
    assert "tile.size=32" in page


@pytest.mark.parametrize(
    ("values", "known"),
    [({"10": 0.2}, 0.2), ({"10": 0.2, "20": 0.7999}, 1), ({"10": 1}, 1), ({"10": 3, "20": 1}, 1), ({"10": 0.5}, 0.5)],
)
def test_shares_that_leave_ground_out(tmp_path, values, known):
    write_raster(tmp_path / "tiles/a.tif", noise(1, (3, 32, 32)), PLACE)
    (tmp_path / "tiles/a.json").write_text(json.dumps(values))
    words = ["--tiles", str(tmp_path / "tiles"), "--labels", str(tmp_path / "tiles"), "--product", "worldcover"]
    keys = (*NO_QUALITY, "split.val_fraction=0", "workers=0", "labels.min_valid_fraction=0.1")
    assert pack_records.main([*words, "--out", str(tmp_path / "out"), *keys]) == 0
    ((_, record),) = read_records(tmp_path / "out")
    assert record.valid_fraction == pytest.approx(known)
    assert record.fractions.sum() == pytest.approx(1)
    assert verify_records.verify(tmp_path / "out", 1)[0] == []


def test_folders_that_cannot_be_read(tmp_path, sheet, capsys, monkeypatch):
    write_raster(tmp_path / "tiles/x/a.tif", noise(1, (3, 32, 32)), PLACE)
    write_raster(tmp_path / "tiles/y/b.tif", noise(1, (3, 32, 32)), PLACE)
    scandir = os.scandir

    def refused(path):
        if str(path).endswith("/y"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    words = ["--tiles", str(tmp_path / "tiles"), "--land-cover", str(sheet), "--product", "worldcover"]
    assert pack_records.main([*words, "--out", str(tmp_path / "out"), "split.val_fraction=0"]) == 1
    assert "y: the folder cannot be read (Permission denied)" in capsys.readouterr().err
