"""What users get wrong, through the command line: status 1, what and where and what to do, nothing published."""

import os
import re
import shutil
import struct

import numpy as np
import pytest
import rasterio
from rasterio.control import GroundControlPoint

from geokr import manifests
from preprocess import gdal_files, grid, pack_records, sampling
from tests.scenes import NO_QUALITY, UTM31, ZION, command, noise, patches, read_records, write_raster

PLACE = (30, 0, 4e5, 0, -30, 5.2e6)
KEYS = (*NO_QUALITY, "tile.size=32", "tile.step=32", "split.val_fraction=0", "workers=0")


@pytest.fixture
def at(tmp_path):
    """A folder with a sound scene and its map."""
    write_raster(tmp_path / "scene.tif", noise(1, (3, 100, 100)), PLACE)
    write_raster(tmp_path / "cover.tif", patches(3, 120, 120, [10, 20, 50]), (30, 0, 399700, 0, -30, 5200300))
    return tmp_path


def refused(at, capsys, message, *rest, scenes=("scene.tif",), cover="cover.tif", product="worldcover", out="out"):
    """Runs the command; the message must match, and nothing may be published. Returns what was said."""
    scenes = [at / name for name in scenes]
    last = {key.split("=")[0]: key for key in (*KEYS, *rest)}
    assert command(scenes, [at / cover], product, at / out, *last.values()) == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert re.search(message, said, re.DOTALL), said
    assert not (at / out / manifests.MANIFEST).exists()
    assert not list((at / out).glob("*.tfrecord"))
    return said


def test_the_sound_case_is_sound(at, capsys):
    assert command([at / "scene.tif"], [at / "cover.tif"], "worldcover", at / "out", *KEYS) == 0
    said = capsys.readouterr().out
    assert re.search(r"tile positions +16\n +kept +16", said)
    assert re.search(r"class +train +validation\n", said)
    assert re.search(r"tree_cover +\d+\.\d\d% +-", said)


# ------------------------------------------------------------------------------------------ files and folders


def test_no_scenes_match(at, capsys):
    refused(at, capsys, r"--scenes '.*none\*\.tif': nothing matches \(current folder: ", scenes=["none*.tif"])


def test_a_folder_in_place_of_files(at, capsys):
    refused(at, capsys, r"a folder: add /\*\.tif to it", scenes=["."])


def test_no_land_cover_matches(at, capsys):
    refused(at, capsys, r"--land-cover '.*no\.tif': nothing matches", cover="no.tif")


def test_a_list_of_files(at, capsys):
    (at / "list.txt").write_text("# two\nscene.tif\n\ngone.tif\n")
    assert command([f"@{at}/list.txt"], [at / "cover.tif"], "worldcover", at / "out", *KEYS) == 1
    assert re.search(r"1 of its files do not exist, the first is .*gone\.tif", capsys.readouterr().err)
    assert command([f"@{at}/nolist.txt"], [at / "cover.tif"], "worldcover", at / "out", *KEYS) == 1
    assert "cannot be read as a text" in capsys.readouterr().err
    assert command([f"@{at}/scene.tif"], [at / "cover.tif"], "worldcover", at / "out", *KEYS) == 1
    assert re.search(r"@.*scene\.tif: cannot be read as a text with a path a line", capsys.readouterr().err)
    (at / "list.txt").write_text("scene.tif\n./scene.tif\n")
    assert command([f"@{at}/list.txt"], [at / "cover.tif"], "worldcover", at / "out", *KEYS) == 0
    assert manifests.load_manifest(at / "out").counts["scenes"] == 1


def test_names_with_brackets_are_files(at):
    shutil.copy(at / "scene.tif", at / "scene[1].tif")
    assert command([at / "scene[1].tif"], [at / "cover.tif"], "worldcover", at / "out", *KEYS) == 0


def test_scenes_of_one_name_in_different_folders_and_of_different_endings(at):
    for name in ("a/x.tif", "b/x.tif", "b/x.tiff", "c/b/x.tif"):
        (at / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(at / "scene.tif", at / name)
    assert command([at / "**/x.tif*"], [at / "cover.tif"], "worldcover", at / "out", *KEYS) == 0
    ids = [scene.scene_id for scene in manifests.load_manifest(at / "out").scenes]
    assert len(set(ids)) == 4
    tiles = [record.tile_id for _, record in read_records(at / "out")]
    assert len(set(tiles)) == len(tiles) == 64


def test_names_that_are_not_utf8(at, capsys):
    """As archives from Chinese systems hold them; GDAL, Arrow and the manifest take no others."""
    gbk = os.fsdecode(b"\xb6\xab")
    for folder in (gbk, "products", "tiles"):
        (at / folder).mkdir()
    for name in (f"{gbk}.tif", f"{gbk}/x.tif", f"tiles/{gbk}.tif", f"products/{gbk}_B4.TIF"):
        shutil.copy(at / "scene.tif", at / name)
    say = r"\\xb6\\xab{}: its name is not UTF-8; rename it \(.*convmv -f gbk"
    refused(at, capsys, "--scenes /.*" + say.format(r"\.tif"), scenes=["*.tif"])
    refused(at, capsys, "--scenes /.*" + say.format(r"\.tif"), "max_bad_fraction=0.9", scenes=["*.tif"])
    refused(at, capsys, "--scenes /.*" + say.format(""), scenes=[f"{gbk}/x.tif"])
    refused(at, capsys, "--land-cover /.*" + say.format(r"\.tif"), cover=f"{gbk}.tif")
    table = at / "own.yaml"
    table.write_text("name: own\nbands: [{name: red, id: B4}]\nband_files: ['(?P<product>.+)_(?P<band>B4)\\.TIF']\n")
    refused(at, capsys, "--scenes /.*" + say.format(r"_B4\.TIF"), "--sensor", str(table), scenes=["products"])
    how = ["--land-cover", str(at / "cover.tif"), "--product", "worldcover", "--out", str(at / "out"), *KEYS]
    for folder, shown in (("tiles", r"\.tif"), (gbk, "")):
        assert pack_records.main(["--tiles", str(at / folder), *how]) == 1
        assert re.search("--tiles /.*" + say.format(shown), capsys.readouterr().err)
    refused(at, capsys, r"--out /.*o\\xb6\\xab: its name is not UTF-8; choose another folder", out=f"new/o{gbk}")
    assert not (at / "new").exists()


def test_a_configuration_whose_name_is_not_utf8_goes_into_the_report(at, capsys):
    (config := at / os.fsdecode(b"\xb6\xab.yaml")).write_text("seed: 1\n")
    how = (*KEYS, "--config", str(config))
    assert command([at / "scene.tif"], [at / "cover.tif"], "worldcover", at / "out", *how) == 0
    assert r"\xb6\xab.yaml" in (at / "out/report.html").read_text()


def test_a_mask_whose_name_is_not_utf8(at, capsys):
    shutil.copy(at / "cover.tif", at / os.fsdecode(b"clouds_\xb6\xab.tif"))
    keys = ("mask.kind=values", "mask.reject=[1]", "mask.pattern=./clouds_*.tif")
    refused(at, capsys, r"clouds_\\xb6\\xab\.tif: its name is not UTF-8; rename it", *keys)


# -------------------------------------------------------------------------------------------- what scenes lack


def test_no_crs(at, capsys):
    write_raster(at / "bare.tif", noise(1, (3, 50, 50)), PLACE, None)
    refused(at, capsys, r"1 of 1 scenes cannot be used.*bare\.tif: has no CRS; .*gdalwarp", scenes=["bare.tif"])


def test_ground_control_points_alone_do_for_a_scene_but_not_for_land_cover(at, capsys):
    points = [GroundControlPoint(r, c, 4e5 + 30 * c, 5.2e6 - 30 * r, 0) for r in (0, 100) for c in (0, 100)]
    with rasterio.open(at / "scene.tif") as file:
        bands, profile = file.read(), {**file.profile, "crs": None, "transform": None}
    with rasterio.open(at / "gcp.tif", "w", **profile) as file:
        file.write(bands)
        file.gcps = (points, rasterio.crs.CRS.from_epsg(32631))
    assert command([at / "gcp.tif"], [at / "cover.tif"], "worldcover", at / "out", *KEYS) == 0
    assert manifests.load_manifest(at / "out").counts["kept"] == 16
    with rasterio.open(at / "map.tif", "w", **{**profile, "count": 1}) as file:
        file.write(bands[:1])
        file.gcps = (points, rasterio.crs.CRS.from_epsg(32631))
    refused(at, capsys, r"map\.tif: has ground control points alone; .*gdalwarp", cover="map.tif", out="other")


def test_a_crs_without_a_transform(at, capsys):
    profile = {"driver": "GTiff", "width": 50, "height": 50, "count": 3, "dtype": "uint8", "crs": UTM31}
    with rasterio.open(at / "unplaced.tif", "w", **profile) as file:
        file.write(noise(1, (3, 50, 50)))
    refused(at, capsys, r"unplaced\.tif: has a CRS but no geotransform", scenes=["unplaced.tif"])


def test_bad_scenes_within_the_allowed_share_are_left_out(at, capsys):
    write_raster(at / "bare.tif", noise(1, (3, 50, 50)), PLACE, None)
    both = [at / "scene.tif", at / "bare.tif"]
    assert command(both, [at / "cover.tif"], "worldcover", at / "out", *KEYS, "max_bad_fraction=0.5") == 0
    assert "left out: bare (no_crs)" in capsys.readouterr().err
    assert manifests.load_manifest(at / "out").counts["scenes_rejected"] == 1
    refused(
        at, capsys, "1 of 2 scenes cannot be used", "max_bad_fraction=0.4", scenes=["scene.tif", "bare.tif"], out="o"
    )


def test_no_overlap_with_land_cover(at, capsys):
    write_raster(at / "far.tif", noise(1, (3, 50, 50)), (30, 0, 7e5, 0, -30, 5.2e6))
    refused(
        at, capsys, r"none of the 1 scenes overlaps.*far\.tif lies at longitude 5\.6.*--land-cover", scenes=["far.tif"]
    )


def test_a_scene_without_land_cover_is_counted(at):
    write_raster(at / "far.tif", noise(1, (3, 50, 50)), (30, 0, 7e5, 0, -30, 5.2e6))
    assert command([at / "scene.tif", at / "far.tif"], [at / "cover.tif"], "worldcover", at / "out", *KEYS) == 0
    manifest = manifests.load_manifest(at / "out")
    assert manifest.counts["scenes_without_land_cover"] == 1
    assert [scene.kept for scene in manifest.scenes] == [0, 16]


# ------------------------------------------------------------------------------------------ products and codes


@pytest.mark.skipif(not ZION.exists(), reason="the real scenes are not beside this checkout")
def test_codes_the_product_does_not_have(at, capsys):
    said = refused(
        at, capsys, r"nlcd\.tif: holds codes that the product does not have: .*Is it the right --product\?",
        scenes=[ZION], cover=ZION.parent / "nlcd.tif", product="nlcd",
    )  # fmt: skip
    codes = {int(code) for code in re.findall(r"(\d+) \(\d+ pixels\)", said)}
    assert codes <= set(range(1, 11))
    assert len(codes) >= 5


def test_unknown_product(at, capsys):
    refused(
        at,
        capsys,
        r"product 'worldcovr' is not known \(did you mean 'worldcover'\?\).*globeland30",
        product="worldcovr",
    )
    refused(at, capsys, r"my\.yaml: cannot be read", product=str(at / "my.yaml"))


def test_unknown_keys_and_classes(at, capsys):
    refused(at, capsys, r"override tile\.sise=3: unknown key \(did you mean 'tile\.size'\?\)", "tile.sise=3")
    refused(at, capsys, r"labels: product 'worldcover' has no class 'treess'", "labels.drop=[treess]")
    refused(at, capsys, r"product 'worldcover' defines no groups", "labels.groups=true")
    refused(at, capsys, r"tile\.size: .*'abc'", "tile.size=abc")


def test_land_cover_of_a_kind_that_holds_no_codes(at, capsys):
    write_raster(at / "cover2.tif", noise(1, (3, 50, 50)), PLACE)
    refused(at, capsys, r"cover2\.tif: 3 band\(s\) of uint8; a land-cover sheet has one band", cover="cover2.tif")
    write_raster(at / "cover3.tif", np.ones((50, 50), np.float32), PLACE)
    refused(at, capsys, r"cover3\.tif: 1 band\(s\) of float32", cover="cover3.tif")
    write_raster(at / "cover4.tif", patches(1, 50, 50, [10]), PLACE, None)
    refused(at, capsys, r"cover4\.tif: has no CRS", cover="cover4.tif")


# ------------------------------------------------------------------------------------------- scenes that differ


def test_mixed_bands(at, capsys):
    write_raster(at / "four.tif", noise(1, (4, 50, 50)), PLACE)
    refused(at, capsys, r"mixed scenes: .*four\.tif has bands 4.*scene\.tif has 3", scenes=["scene.tif", "four.tif"])


def test_mixed_dtypes(at, capsys):
    write_raster(at / "wide.tif", noise(1, (3, 50, 50), "uint16"), PLACE)
    refused(at, capsys, r"mixed scenes: .*has dtype uint8.*wide\.tif has uint16", scenes=["scene.tif", "wide.tif"])


def test_mixed_band_names(at, capsys):
    for name, bands in (("rgb.tif", ("red", "green", "blue")), ("bgr.tif", ("blue", "green", "red"))):
        write_raster(at / name, noise(1, (3, 50, 50)), PLACE, names=bands)
    message = (
        r"tile\.bands: means blue, green, red in .*bgr\.tif but red, green, blue in .*rgb\.tif; choose bands by name"
    )
    refused(at, capsys, message, "tile.bands=[1,2,3]", scenes=["rgb.tif", "bgr.tif"])
    both = [at / "rgb.tif", at / "bgr.tif"]
    assert command(both, [at / "cover.tif"], "worldcover", at / "out", *KEYS, "tile.bands=[red,green,blue]") == 0


def test_a_dtype_that_tiles_cannot_hold(at, capsys):
    write_raster(at / "double.tif", np.ones((3, 50, 50)), PLACE)
    refused(
        at, capsys, r"double\.tif: bands of float64; expected one of uint8, .*gdal_translate -ot", scenes=["double.tif"]
    )


@pytest.mark.parametrize(
    ("bands", "message"),
    [("[1,2,9]", "no band 9 in .*has 1 to 3"), ("[1,2,nir]", "no band 'nir' in .*it has"), ("[1,1,2]", "stands twice")],
)
def test_bands_that_are_not_there(at, capsys, bands, message):
    refused(at, capsys, message, f"tile.bands={bands}")


def test_jpeg_of_four_bands_or_16_bits(at, capsys):
    write_raster(at / "four.tif", noise(1, (4, 50, 50), "uint16"), PLACE)
    refused(at, capsys, r"tile\.codec=jpeg holds exactly 3 bands.*use tile\.codec=png, raw", "tile.bands=[1,2,3,4]")
    refused(at, capsys, "jpeg holds 3 bands of uint8, not 4.*use png, raw or", "tile.bands=null", scenes=["four.tif"])
    refused(at, capsys, "not 3 of uint16.*stretch to 8 bits", "stretch.mode=none", scenes=["four.tif"])


# ---------------------------------------------------------------------------------------- files that are no scene


def test_a_vrt_named_tif(at, capsys):
    (at / "sly.tif").write_text('<VRTDataset rasterXSize="9" rasterYSize="9"><SRS>EPSG:32631</SRS></VRTDataset>')
    refused(at, capsys, r"sly\.tif: is neither GeoTIFF nor JPEG 2000", scenes=["sly.tif"])


@pytest.mark.parametrize(
    "content",
    [b"", b"II*\x00", b"II*\x00\xff\xff\xff\xff", b"\x00\x00\x00\x0cjP  \r\n", b"hello", b"MM\x00*" + bytes(99)],
)
def test_files_that_only_begin_like_an_image(at, capsys, content):
    (at / "odd.tif").write_bytes(content)
    refused(at, capsys, r"1 of 1 scenes cannot be used.*odd\.tif: ", scenes=["odd.tif"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/vsicurl/http://example.org/x.tif", "is not on this machine: give scene.remote=true"),
        ("http://example.org/x.tif", "is not on this machine: give scene.remote=true"),
        ("/vsizip/x.zip/x.tif", "is not read; http://"),
        ("ftp://example.org/x.tif", "is not read; http://"),
    ],
)
def test_nothing_is_fetched(at, capsys, name, message):
    (at / "list.txt").write_text(name + "\n")
    sound = at / "cover.tif"
    for scenes, cover in (([f"@{at}/list.txt"], sound), ([name], sound), ([at / "scene.tif"], name)):
        assert command(scenes, [cover], "worldcover", at / "out", *KEYS) == 1
        assert message in capsys.readouterr().err


def truncated(at):
    """A scene that opens and cannot be read through: its directory is whole, its last pixels are missing."""
    path = write_raster(at / "cut.tif", noise(7, (3, 100, 100)), PLACE, blockysize=10)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    with rasterio.open(path) as file:
        assert file.width == 100
    return path


@pytest.mark.parametrize("stretch", ["stretch.mode=joint", "stretch.limits=[[0,255]]"])
def test_a_truncated_scene(at, capsys, stretch):
    truncated(at)
    more = ("stretch.mode=limits",) if "limits" in stretch else ()
    refused(at, capsys, r"1 of 2 scenes cannot be used \(max_bad_fraction=0\).*cut\.tif", stretch, *more,
            scenes=["scene.tif", "cut.tif"])  # fmt: skip


@pytest.mark.parametrize("share_pixels", [1 << 20, 500])
@pytest.mark.parametrize("stretch", ["stretch.mode=joint", "stretch.limits=[[0,255]]"])
def test_a_truncated_scene_within_the_allowed_share_leaves_no_partial_tiles(at, stretch, share_pixels, monkeypatch):
    """Its first chunks are sound, and go too; that several parts of its sample are damaged counts once."""
    monkeypatch.setattr(grid, "MAX_CHUNK_TILES", 4)
    monkeypatch.setattr(sampling, "SHARE_PIXELS", share_pixels)
    truncated(at)
    keys = (*KEYS, "max_bad_fraction=0.5", stretch, *(["stretch.mode=limits"] if "limits" in stretch else []))
    assert command([at / "scene.tif", at / "cut.tif"], [at / "cover.tif"], "worldcover", at / "out", *keys) == 0
    manifest = manifests.load_manifest(at / "out")
    assert {record.scene_id for _, record in read_records(at / "out")} == {"scene"}
    assert manifest.counts["scenes_rejected"] == 1
    assert manifest.counts["rejected_unreadable"] == 16
    assert manifest.counts["positions"] == 32 == manifest.counts["kept"] + 16
    assert command([at / "scene.tif", at / "cut.tif"], [at / "cover.tif"], "worldcover", at / "out", *keys) == 0


def huge_header(width, height):
    """A TIFF directory that declares any size over no pixels, in UTM 31."""
    tags = [
        (256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8),
        (277, 3, 1, 1), (278, 4, 1, height), (279, 4, 1, 100), (33550, 12, 3, 300), (33922, 12, 6, 324),
        (34735, 3, 16, 372),
    ]  # fmt: skip
    data = b"II*\0" + struct.pack("<IH", 8, len(tags))
    data += b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    data = data.ljust(300, b"\0") + struct.pack("<3d6d", 30, 30, 0, 0, 0, 0, 4e5, 5.2e6, 0)
    keys = (1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 1, 3072, 0, 1, 32631)
    return data.ljust(372, b"\0") + struct.pack("<16H", *keys)


@pytest.mark.parametrize(
    ("width", "height", "message"),
    [
        (2**31 - 1, 2**31 - 1, r"declares 2147483647 x 2147483647 pixels"),
        (2**31 - 1, 1, r"declares 2147483647 x 1 pixels"),
        (8_000_000, 8_000_000, r"tiles of 32 px every 32 px in 8000000 x 8000000 pixels.*its header is damaged"),
        (60_000, 60_000, r"huge\.tif"),
    ],
)
def test_a_header_that_declares_a_huge_size(at, capsys, width, height, message):
    (at / "huge.tif").write_bytes(huge_header(width, height))
    keys = ("tile.codec=raw", "tile.bands=[1]")
    refused(at, capsys, message, *keys, scenes=["huge.tif"])


def test_a_scene_smaller_than_a_tile(at, capsys):
    refused(at, capsys, r"no scene holds a tile of 128 pixels \(scenes of 100x100\); set tile\.size", "tile.size=128")


# ----------------------------------------------------------------------------------------- nothing to train on


def test_no_tile_is_left(at, capsys):
    said = refused(at, capsys, r"not one usable tile: 16 dark\.", "quality.min_brightest=300")
    assert "docs/configuration.md" in said
    refused(at, capsys, r"not one usable tile: 16 unlabelled", "labels.drop=[tree_cover, shrubland, built_up]", out="b")


def test_a_block_that_is_too_small(at, capsys):
    message = (
        r"split\.block_m=1000 is under two sides of a tile of .*scene\.tif \(9\d\d m each\): set it to at least 19\d\d"
    )
    refused(at, capsys, message, "split.val_fraction=0.2", "split.block_m=1000")


def test_validation_would_be_empty(at, capsys):
    message = r"no tile fell into a validation block, 1% were asked for.*split\.block_m.*now 100000 m.*another seed"
    keys = ("split.val_fraction=0.01", "split.block_m=100000")
    refused(at, capsys, message, *keys)
    # with so few tiles left the reason may be another one
    message = r"no tile fell into a validation block \(kept: \d+; turned away: \d+ bright_share\), 1% were"
    refused(at, capsys, message, *keys, "quality.max_bright_fraction=0.32", "quality.bright_above=150", out="b")


def test_training_would_be_empty(at, capsys):
    message = r"every tile fell into validation blocks: use a smaller split\.block_m, or another seed"
    refused(at, capsys, message, "split.val_fraction=0.999", "split.block_m=100000")


def test_a_share_that_is_far_off_is_a_warning(at, capsys):
    keys = (*KEYS[:-2], "split.val_fraction=0.9", "split.block_m=2000", "seed=1", "workers=0")
    scene = write_raster(at / "s.tif", noise(1, (3, 120, 120)), PLACE)
    status = command([scene], [at / "cover.tif"], "worldcover", at / "out", *keys)
    manifest = manifests.load_manifest(at / "out")
    share = manifest.val.records / manifest.counts["kept"]
    said = capsys.readouterr().err
    assert status == 0
    assert ("warning: validation holds" in said) == (not 0.45 <= share <= 1.35)


# --------------------------------------------------------------------------------------------- the command line


def test_a_dry_run_writes_nothing(at, capsys):
    assert command([at / "scene.tif"], [at / "cover.tif"], "worldcover", at / "out", *KEYS, "--dry-run") == 0
    said = capsys.readouterr().out
    assert re.search(r"tile positions +16\n", said)
    assert "of disk at the peak" in said
    assert not (at / "out").exists()


def test_overrides_between_the_values_of_an_option(at):
    arguments = ["--scenes", str(at / "scene.tif"), *KEYS, "--land-cover", str(at / "cover.tif"), "--product",
                 "worldcover", "seed=3", "--out", str(at / "out")]  # fmt: skip
    assert pack_records.main(arguments) == 0
    assert manifests.load_manifest(at / "out").config["seed"] == 3


def test_a_configuration_file(at, capsys):
    (at / "c.yaml").write_text("tile: {size: 20, step: 20}\nquality: {min_contrast: null}\n")
    rest = ("--config", str(at / "c.yaml"), "tile.step=40", "split.val_fraction=0", "workers=0")
    assert command([at / "scene.tif"], [at / "cover.tif"], "worldcover", at / "out", *rest) == 0
    config = manifests.load_manifest(at / "out").config
    assert (config["tile"]["size"], config["tile"]["step"]) == (20, 40)
    assert "workers" not in config
    (at / "c.yaml").write_text("tile: {size: 20, size: 30}\n")
    assert command([at / "scene.tif"], [at / "cover.tif"], "worldcover", at / "o2", *rest) == 1
    assert "c.yaml: duplicate key 'size' in line 1" in capsys.readouterr().err


def test_arguments_that_are_missing(capsys):
    with pytest.raises(SystemExit) as end:
        pack_records.main(["--scenes", "a.tif"])
    assert end.value.code == 2
    assert "--land-cover" in capsys.readouterr().err


@pytest.mark.parametrize("seed", range(3))
def test_scenes_with_flipped_bytes_never_end_in_a_traceback(at, capsys, seed):
    """Whatever the damage: the scene packs, or is refused by name."""
    rng = np.random.default_rng(seed)
    data = (write_raster(at / "z.tif", noise(1, (3, 64, 64)), PLACE, compress="deflate")).read_bytes()
    for number in range(12):
        spoiled = bytearray(data)
        for place in rng.integers(0, 600 if number % 2 else len(data), 6):
            spoiled[place] = rng.integers(0, 256)
        (at / "bad.tif").write_bytes(spoiled)
        status = command([at / "bad.tif"], [at / "cover.tif"], "worldcover", at / f"out{number}", *KEYS)
        said = capsys.readouterr().err
        assert status in (0, 1)
        assert "Traceback" not in said
        assert status == 0 or "bad.tif" in said or "not one usable tile" in said, said


def test_memory_that_runs_out_is_not_held_against_a_file():
    from rasterio._err import CPLE_AppDefinedError, CPLE_OutOfMemoryError
    from rasterio.errors import RasterioIOError

    from preprocess.errors import RasterError

    def failing(cause):
        with gdal_files._errors_of("a.tif"):
            raise RasterioIOError("Read failed.") from cause

    with pytest.raises(MemoryError, match=r"a\.tif: no memory left"):
        failing(CPLE_OutOfMemoryError(1, 2, "cannot allocate"))
    with pytest.raises(RasterError, match=r"a\.tif: cannot be read"):
        failing(CPLE_AppDefinedError(1, 1, "broken"))
