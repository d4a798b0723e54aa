"""Sensor tables: what bands are called and where they lie, file names, dates, and tables of the user's own."""

import pytest
import yaml

from geokr import config, manifests
from geokr.config import ConfigError
from preprocess import sensor
from preprocess.inputs import PlanError
from preprocess.options import PackOptions
from preprocess.plan import make_plan
from tests.scenes import NO_QUALITY, command, noise, patches, write_raster

PLACE = (10, 0, 4e5, 0, -10, 5.2e6)
GF1 = "GF1_PMS1_E116.5_N39.4_20160508_L1A0001573999-MSS1.tiff"


@pytest.fixture(scope="module")
def cover(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cover")
    return write_raster(folder / "cover.tif", patches(3, 100, 100, [10, 20, 50]), (30, 0, 399700, 0, -30, 5200300))


def plan_of(scenes, cover, *keys):
    keys = [*NO_QUALITY, "tile.size=32", "tile.step=32", "workers=0", *keys]
    return make_plan([str(s) for s in scenes], [str(cover)], "worldcover", config.load(PackOptions, None, keys))


def scene(path, count, dtype="uint16", **more):
    return write_raster(path, noise(1, (count, 64, 64), dtype), PLACE, **more)


def choice(plan):
    return [(band.name, band.number, band.wavelength_nm) for band in plan.bands]


def test_every_table_is_sound_and_knows_its_example():
    assert set(sensor.sensor_names()) == {
        "gaofen1", "gaofen2", "gaofen6", "sentinel2", "landsat8", "landsat9", "naip"
    }  # fmt: skip
    for name in sensor.sensor_names():
        table = sensor.load_sensor(name)
        assert table.name == name
        assert {"red", "green", "blue", "nir"} <= {band.name for band in table.table.bands}
        says = table.parse(table.table.example)
        assert says is not None
        assert says.date[:2] == "20"
        assert all(200 < band.nm < 13_000 for band in table.table.bands)


@pytest.mark.parametrize(
    ("name", "count", "order"),
    [
        ("gaofen1", 4, "blue green red nir"),
        ("gaofen2", 4, "blue green red nir"),
        ("gaofen6", 4, "blue green red nir"),
        ("gaofen6", 8, "blue green red nir rededge1 rededge2 coastal yellow"),
        ("naip", 4, "red green blue nir"),
        ("naip", 3, "red green blue"),
        ("landsat9", 7, "coastal blue green red nir swir16 swir22"),
        ("sentinel2", 10, "blue green red rededge1 rededge2 rededge3 nir nir08 swir16 swir22"),
    ],
)
def test_stacked_files(cover, tmp_path, name, count, order):
    path = scene(tmp_path / "stack.tif", count, photometric="minisblack")
    plan = plan_of([path], cover, f"scene.sensor={name}")
    names = order.split()
    (task,) = plan.tasks
    assert task.scene.band_names == tuple(names)
    assert task.bands == tuple(names.index(colour) + 1 for colour in ("red", "green", "blue"))
    assert plan.warnings == ()


def test_gaofen_trains_on_red_green_blue(cover, tmp_path):
    path = scene(tmp_path / GF1, 4, photometric="minisblack")
    plan = plan_of([path], cover, "scene.sensor=gaofen1")
    assert choice(plan) == [("red", 3, 660), ("green", 2, 555), ("blue", 1, 485)]
    assert plan.tasks[0].scene.date == "2016-05-08"
    assert choice(plan_of([path], cover, "scene.sensor=gaofen1", "tile.bands=[nir, B3, 2]"))[0] == ("nir", 4, 830)


def test_without_names_there_is_a_warning(cover, tmp_path, capsys):
    path = scene(tmp_path / GF1, 4, photometric="minisblack")
    (warning,) = plan_of([path], cover).warnings
    assert "nothing says which of its bands are red, green and blue" in warning
    assert "--sensor" in warning
    keys = (*NO_QUALITY, "tile.size=32", "tile.step=32", "split.val_fraction=0", "workers=0")
    for more in ((), ("--dry-run",)):
        assert command([path], [cover], "worldcover", tmp_path / f"out{len(more)}", *keys, *more) == 0
        assert capsys.readouterr().err.startswith("warning: ")
    assert choice(plan_of([path], cover))[0] == ("band_1", 1, None)
    for silent in (["tile.bands=[1,2,3]"], ["scene.sensor=gaofen1"], ["tile.bands=null", "tile.codec=raw"]):
        assert plan_of([path], cover, *silent).warnings == ()
    coloured = scene(tmp_path / "rgb.tif", 3, "uint8")  # GDAL calls three bands of 8 bits red, green, blue
    assert plan_of([coloured], cover).warnings == ()


@pytest.mark.parametrize(
    ("names", "numbers"),
    [
        (("B4 red", "B3 green", "B2 blue", "B5 nir"), (1, 2, 3)),
        (("blue", "green", "red edge", "red"), (4, 2, 1)),
        (("Blue", "Green", "Red", "NIR"), (3, 2, 1)),
    ],
)
def test_names_in_the_file(cover, tmp_path, names, numbers):
    path = scene(tmp_path / "named.tif", 4, names=names)
    plan = plan_of([path], cover)
    assert plan.tasks[0].bands == numbers
    assert plan.warnings == ()


def test_names_in_the_file_before_the_layout(cover, tmp_path):
    """Someone stacked Landsat's bands his own way and said so."""
    path = scene(tmp_path / "mine.tif", 4, names=("B5 nir", "B4 red", "SR_B3", "blue"))
    plan = plan_of([path], cover, "scene.sensor=landsat8")
    assert choice(plan) == [("red", 2, 655), ("green", 3, 561), ("blue", 4, 482)]
    unknown = scene(tmp_path / "unknown.tif", 4, photometric="minisblack")
    with pytest.raises(
        PlanError, match=r"unknown\.tif: has 4 bands, which fits no layout of sensor landsat8 \(11: .*7"
    ):
        plan_of([unknown], cover, "scene.sensor=landsat8")


def test_a_fourth_band_that_a_writer_took_for_alpha(cover, tmp_path):
    path = scene(tmp_path / "gf.tif", 4, "uint8", photometric="rgb", alpha="unspecified")
    rgba = scene(tmp_path / "rgba.tif", 4, "uint8", photometric="rgb", alpha="yes")
    for file in (path, rgba):
        plan = plan_of([file], cover, "scene.sensor=gaofen1")
        assert choice(plan) == [("red", 3, 660), ("green", 2, 555), ("blue", 1, 485)]
        assert not plan.tasks[0].scene.masked
    plan = plan_of([rgba], cover, "scene.sensor=naip")  # three bands and alpha are a layout of its own there
    assert plan.tasks[0].scene.band_names == ("red", "green", "blue", "alpha")
    assert plan.tasks[0].scene.masked


def test_folders_take_what_the_names_say(cover, tmp_path):
    scene(tmp_path / "a" / GF1, 4, photometric="minisblack")
    scene(tmp_path / "a" / GF1.replace("MSS1", "PAN1"), 1)
    scene(tmp_path / "b" / "GF1_WFV2_E116.5_N39.4_20170101_L1A0001573000.tiff", 4, photometric="minisblack")
    plan = plan_of([tmp_path], cover, "scene.sensor=gaofen1")
    assert [task.scene.date for task in plan.tasks] == ["2016-05-08", "2017-01-01"]
    globbed = plan_of([tmp_path / "**/*.tiff"], cover, "scene.sensor=gaofen1")  # the panchromatic file is left out
    assert globbed.identity() == plan.identity()
    pan = plan_of([tmp_path / "a" / GF1.replace("MSS1", "PAN1")], cover, "scene.sensor=gaofen1", "tile.codec=raw",
                  "tile.bands=[pan]")  # fmt: skip
    assert choice(pan) == [("pan", 1, 675)]


@pytest.mark.parametrize(
    ("name", "file", "band", "date"),
    [
        ("landsat8", "LC08_L1TP_038034_20150818_20200908_02_T1_B10.TIF", "lwir11", "2015-08-18"),
        ("landsat8", "LC80380342015230LGN00_B2.TIF", "blue", "2015-08-18"),
        ("landsat8", "LC08_CU_007011_20150818_20210505_02_SR_B4.TIF", "red", "2015-08-18"),
        ("landsat8", "landsat_b2.tif", "blue", ""),
        ("landsat9", "LC09_L2SP_038034_20220829_20230331_02_T1_ST_B10.TIF", "lwir11", "2022-08-29"),
        ("sentinel2", "T32TQM_20200817T102031_B8A.jp2", "nir08", "2020-08-17"),
        ("sentinel2", "S2A_32TQM_20200817_0_L2A_B04.tif", "red", ""),
        ("sentinel2", "B11_20m.tif", "swir16", ""),
        ("naip", "m_4709963_se_14_1_20170827.tif", "", "2017-08-27"),
        ("naip", "m_4709963_se_14_060_20190827_20191105.tif", "", "2019-08-27"),
        ("gaofen6", "GF6_WFV_E112.9_N28.2_20190612_L1A1119885999-2.tiff", "", "2019-06-12"),
        ("gaofen2", "GF2_PMS1_E113.6_N23.4_20180216_L1A0003003999-MSS1.tiff", "", "2018-02-16"),
    ],
)
def test_file_names(name, file, band, date):
    says = sensor.load_sensor(name).parse(file)
    assert (says.band, says.date) == (band, date)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("landsat8", "LC08_L2SP_038034_20150818_20200908_02_T1_QA_PIXEL.TIF"),
        ("landsat8", "LC08_L2SP_038034_20150818_20200908_02_T1_SR_B99.TIF"),
        ("sentinel2", "T32TQM_20200817T102031_TCI_10m.jp2"),
        ("sentinel2", "T32TQM_20200817T102031_SCL_20m.jp2"),
        ("sentinel2", "MSK_CLDPRB_20m.jp2"),
        ("sentinel2", "MSK_DETFOO_B02.jp2"),  # masks of bands, which come since baseline 04.00
        ("sentinel2", "MSK_QUALIT_B8A.jp2"),
        ("gaofen1", "GF1_PMS1_E116.5_N39.4_20160508_L1A0001573999-PAN1.tiff"),
    ],
)
def test_names_of_no_band(name, file):
    assert sensor.load_sensor(name).parse(file) is None


def test_unknown_sensors(cover, tmp_path, capsys):
    path = scene(tmp_path / "s.tif", 4)
    keys = ("tile.size=32", "workers=0")
    assert command([path], [cover], "worldcover", tmp_path / "out", "--sensor", "gaofen", *keys) == 1
    assert "--sensor 'gaofen' is not known (did you mean 'gaofen" in capsys.readouterr().err


OWN = {
    "name": "drone", "bands": [{"name": "green", "id": "G", "nm": 550}, {"name": "red", "id": "R"},
                               {"name": "blue", "id": "X"}],
    "layouts": [["green", "red", "blue"]], "band_files": [r"(?P<product>f\d+)_(?P<band>[GRX])\.tif"],
}  # fmt: skip


def test_a_table_of_ones_own(cover, tmp_path):
    (tmp_path / "drone.yaml").write_text(yaml.safe_dump(OWN))
    for number, band in enumerate("RGX"):
        write_raster(tmp_path / f"f7_{band}.tif", noise(number, (64, 64)), PLACE)
    plan = plan_of([tmp_path / "*.tif"], cover, f"scene.sensor={tmp_path}/drone.yaml")
    assert choice(plan) == [("red", 2, None), ("green", 1, 550), ("blue", 3, None)]
    assert plan.config["scene"]["sensor"] == "drone"
    OTHER = {**OWN, "bands": [{**OWN["bands"][0], "nm": 551}, *OWN["bands"][1:]]}
    (tmp_path / "drone.yaml").write_text(yaml.safe_dump(OTHER))
    other = plan_of([tmp_path / "*.tif"], cover, f"scene.sensor={tmp_path}/drone.yaml")
    assert other.config != plan.config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bands": []}, r"drone\.yaml: bands: "),
        ({"layouts": [["green", "rde"]]}, "layouts: 'rde' is the name of no band"),
        ({"layouts": [["green", "red"], ["red", "green"]]}, "two have the same number"),
        ({"band_files": ["(B"]}, r"band_files: .*not a regular expression"),
        ({"metadata": {"file": "*.xml", "date": "(?P<date>.*)"}}, r"metadata\.file: .*not a regular expression"),
        ({"band_files": ["x"]}, r"no group \(\?P<band>"),
        ({"scene_files": ["(?P<bnad>x)"]}, "unknown group 'bnad'"),
        ({"bands": [OWN["bands"][0], {"name": "red", "id": "g"}, OWN["bands"][2]]}, "two bands share the name 'g'"),
        ({"wavelength": 3}, "wavelength"),
    ],
)
def test_tables_that_do_not_fit(tmp_path, change, message):
    (tmp_path / "drone.yaml").write_text(yaml.safe_dump({**OWN, **change}))
    with pytest.raises(ConfigError, match=message):
        sensor.load_sensor(str(tmp_path / "drone.yaml"))


def test_the_sensor_is_part_of_the_dataset(cover, tmp_path, capsys):
    path = scene(tmp_path / GF1, 4, photometric="minisblack")
    keys = (*NO_QUALITY, "tile.size=32", "tile.step=32", "split.val_fraction=0", "workers=0")
    assert command([path], [cover], "worldcover", tmp_path / "out", "--sensor", "gaofen1", *keys) == 0
    manifest = manifests.load_manifest(tmp_path / "out")
    assert [band.wavelength_nm for band in manifest.bands] == [660, 555, 485]
    assert manifest.config["scene"]["sensor"] == "gaofen1"
    assert command([path], [cover], "worldcover", tmp_path / "out", "--sensor", "gaofen2", *keys) == 1
    assert "config.scene.sensor: 'gaofen1' -> 'gaofen2'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "descriptions", "expected"),
    [
        ("landsat8", "SR_B2 SR_B3 SR_B4 SR_B5 SR_B6 SR_B7 QA_PIXEL", "blue green red nir swir16 swir22 QA_PIXEL"),
        ("gaofen1", "B4 B3 B2 NDVI", "nir red green NDVI"),
        ("gaofen1", "B1 B2 B3 B4", "blue green red nir"),
        ("naip", "N R G B", "nir red green blue"),
        (
            "sentinel2",
            "B1 B2 B3 B4 B5 B6 B7 B8 B8A B9 B11 B12 SCL",
            "coastal blue green red rededge1 rededge2 rededge3 nir nir08 nir09 swir16 swir22 SCL",
        ),
    ],
)
def test_bands_by_their_descriptions_though_a_layout_has_as_many(cover, tmp_path, name, descriptions, expected):
    words = descriptions.split()
    path = scene(tmp_path / "stack.tif", len(words), photometric="minisblack", names=words)
    (task,) = plan_of([path], cover, f"scene.sensor={name}", "tile.bands=[red, green, nir]", "tile.codec=raw").tasks
    assert task.scene.band_names == tuple(expected.split())
    assert task.bands == tuple(expected.split().index(colour) + 1 for colour in ("red", "green", "nir"))


def test_a_layout_names_the_bands_that_a_file_leaves_undescribed(cover, tmp_path):
    path = scene(tmp_path / "stack.tif", 4, photometric="minisblack", names=["B1", "", "B3"])
    assert plan_of([path], cover, "scene.sensor=gaofen2").tasks[0].scene.band_names == ("blue", "green", "red", "nir")


def test_a_described_band_that_a_writer_took_for_alpha(cover, tmp_path):
    path = scene(tmp_path / "m.tif", 4, "uint8", photometric="rgb", alpha="unspecified", names=["R", "G", "B", "N"])
    (task,) = plan_of([path], cover, "scene.sensor=naip", "tile.bands=[red, green, nir]").tasks
    assert (task.scene.band_names, task.scene.masked) == (("red", "green", "blue", "nir"), False)


@pytest.mark.parametrize("product", ["LE07_L2SP_038034_20020818_20200908_02_T1_SR", "LT50380341988230XXX03"])
def test_bands_of_another_landsat(cover, tmp_path, product):
    for band in ("B2", "B3", "B4"):
        scene(tmp_path / f"{product}_{band}.TIF", 1)
    for given in (tmp_path, tmp_path / f"{product}_B*.TIF"):
        with pytest.raises(PlanError, match=rf"{product}_B2\.TIF: its name is that of another sensor"):
            plan_of([given], cover, "scene.sensor=landsat8")


def test_baselines_that_do_not_mean_the_same(cover, tmp_path):
    names = {"N0301": "20210817", "N0509": "20230817"}
    safes = []
    for baseline, day in names.items():
        safe = tmp_path / f"S2A_MSIL2A_{day}T102031_{baseline}_R065_T31TCJ_{day}T130000.SAFE"
        for band in ("B02", "B03", "B04"):
            scene(safe / f"GRANULE/L2A/IMG_DATA/R10m/T31TCJ_{day}T102031_{band}_10m.tif", 1)
            scene(safe / f"GRANULE/L2A/QI_DATA/MSK_DETFOO_{band}.tif", 1, "uint8")
        safes.append(safe)
    limits = ("stretch.mode=limits", "stretch.limits=[[0,4000]]")
    assert len(plan_of(safes, cover, "scene.sensor=sentinel2").tasks) == 2
    assert not plan_of(safes, cover, "scene.sensor=sentinel2").warnings
    assert not plan_of(safes[1:], cover, "scene.sensor=sentinel2", *limits).warnings
    (warning,) = plan_of(safes, cover, "scene.sensor=sentinel2", *limits).warnings
    assert "adds 1,000 to all values" in warning
