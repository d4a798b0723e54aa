"""Product tables and legends."""

import numpy as np
import pytest
import yaml

from geokr import landcover
from geokr.config import ConfigError
from geokr.landcover import IGNORED, LOOKUP_OFFSET, NODATA, UNKNOWN, build_legend, load_product
from tests.scenes import SHARED


def looked_up(legend, *codes):
    return [int(legend.lookup[code + LOOKUP_OFFSET]) for code in codes]


@pytest.mark.parametrize("name", landcover.product_names())
def test_every_packaged_product(name):
    product = load_product(name)
    legend = build_legend(product)
    assert product.name == name
    assert len({entry.name for entry in legend.classes}) == len(legend.classes) > 1
    for index, entry in enumerate(legend.classes):
        assert set(looked_up(legend, *entry.codes)) == {index}
        assert all(0 <= value <= 255 for value in entry.rgb)
    assert set(looked_up(legend, *product.nodata)) <= {NODATA}
    assert set(looked_up(legend, *(product.ignore - product.nodata))) <= {IGNORED}
    known = {*product.nodata, *product.ignore, *(code for entry in product.classes for code in entry.codes)}
    strangers = np.ones(len(legend.lookup), bool)
    strangers[np.array(sorted(known)) + LOOKUP_OFFSET] = False
    assert (legend.lookup[strangers] == UNKNOWN).all()


# What the gathered tables call unverified, or lack, and the products' own legends say.
MORE_NODATA = {"corine": {49, 50, 990, 995, 999}}


@pytest.mark.skipif(not (SHARED / "landcover").is_dir(), reason="the source tables are not beside this checkout")
@pytest.mark.parametrize("path", sorted((SHARED / "landcover").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_packaged_tables_are_the_gathered_ones(path):
    table = yaml.safe_load(path.read_text())
    product = load_product(path.stem)
    assert product.nodata == frozenset(table["nodata"]) | MORE_NODATA.get(path.stem, set())
    assert product.ignore == frozenset(table["ignore"])
    if "classes" in table:
        expected = {
            code: (entry["name"], tuple(entry.get("rgb", ())), (code, *entry.get("also", ())))
            for code, entry in table["classes"].items()
        }
        found = {
            entry.codes[0]: (entry.name, () if entry.codes[0] in product.uncoloured else entry.rgb, entry.codes)
            for entry in product.classes
        }
        assert found == expected
    assert {name: list(codes) for name, codes in product.groups.items()} == table.get("groups", {})
    if path.stem == "corine":
        colours = {entry["name"]: tuple(entry["rgb"]) for entry in table["groups_by_first_digit"].values()}
        assert {entry.name: entry.rgb for entry in product.classes} == colours
        order = table["raster_order"]
        for entry in product.classes:
            ranks, members = np.split(np.array(entry.codes), 2)
            assert [order[rank - 1] for rank in ranks] == members.tolist()


def test_names_of_sheets_say_their_year():
    names = {
        "corine": ("U2018_CLC2018_V2020_20u1.tif", "2018"),
        "corine44": ("U2006_CLC2000_V2020_20u1.tif", "2000"),
        "modis_igbp": ("MCD12Q1.A2019001.h18v04.061.2022169161028.tif", "2019"),
        "nlcd": ("Annual_NLCD_LndCov_2011_CU_C1V0.tif", "2011"),
        "worldcover": ("ESA_WorldCover_10m_2021_v200_N00E006_Map.tif", "2021"),
        "cgls_lc100": ("E020N60_PROBAV_LC100_global_v3.0.1_2019-nrt_Discrete-Classification-map_EPSG-4326.tif", "2019"),
    }
    for product, (name, year) in names.items():
        assert load_product(product).filename.match(name)["year"] == year
    scene = "20200817T105031_20200817T105430_T31UFS.tif"
    assert load_product("dynamicworld").filename.match(scene)["start"] == "20200817"


def test_corine_in_full_has_the_same_groups():
    full, grouped = load_product("corine44"), load_product("corine")
    assert len(full.classes) == 44
    merge = {name: [c.name for c in full.classes if c.codes[0] in codes] for name, codes in full.groups.items()}
    by_group = build_legend(full, merge)
    assert [entry.name for entry in by_group.classes] == [entry.name for entry in grouped.classes]
    assert (by_group.lookup == build_legend(grouped).lookup).all()
    for entry in full.classes:
        rank, code = entry.codes
        assert 1 <= rank <= 44
        assert 111 <= code <= 523
    assert [entry.codes[1] for entry in full.classes] == sorted(entry.codes[1] for entry in full.classes)


def test_a_sheet_colours_what_the_table_does_not():
    product = load_product("modis_igbp")
    legend = build_legend(product, {"forest": ["evergreen_needleleaf_forest", "mixed_forest"]}, ("savannas",))
    coloured = landcover.with_colours(legend, product, {5: (1, 2, 3), 17: (4, 5, 6), 9: (7, 8, 9)})
    by_name = {entry.name: entry.rgb for entry in coloured.classes}
    assert by_name["forest"] == (1, 2, 3)
    assert by_name["water_bodies"] == (4, 5, 6)
    assert by_name["croplands"] == {entry.name: entry.rgb for entry in legend.classes}["croplands"]
    worldcover = load_product("worldcover")
    legend = build_legend(worldcover)
    assert landcover.with_colours(legend, worldcover, {10: (1, 1, 1)}).classes == legend.classes


def test_probability_bands():
    product = load_product("dynamicworld")
    assert build_legend(product).band_classes == tuple(range(9))
    legend = build_legend(product, {"green": ["trees", "grass"]}, ("water",))
    assert next(entry.name for entry in legend.classes) == "green"
    assert legend.band_classes == (IGNORED, 0, 0, 1, 2, 3, 4, 5, 6)


def test_globeland30():
    product = load_product("globeland30")
    legend = build_legend(product)
    names = [entry.name for entry in legend.classes]
    assert len(names) == 10
    assert looked_up(legend, 0, 255, 1) == [NODATA, IGNORED, UNKNOWN]
    assert looked_up(legend, 70, 71, 79) == [names.index("tundra")] * 3
    assert names[looked_up(legend, 20)[0]] == "forest"
    assert product.filename.match("n31_40_2020lc030.tif")["zone"] == "31"
    assert product.filename.match("N48_20_2020LC030.tif")["hemisphere"] == "N"


def test_corine_in_both_codings():
    legend = build_legend(load_product("corine"))
    names = [entry.name for entry in legend.classes]
    order = yaml.safe_load((SHARED / "landcover/corine.yaml").read_text())["raster_order"] if SHARED.is_dir() else [111]
    for rank, code in enumerate(order, 1):
        assert looked_up(legend, rank) == looked_up(legend, code)
    assert names[looked_up(legend, 111)[0]] == names[looked_up(legend, 1)[0]] == "artificial"
    assert names[looked_up(legend, 523)[0]] == names[looked_up(legend, 44)[0]] == "water"
    assert looked_up(legend, 48, 255, 0, 45) == [NODATA, NODATA, NODATA, UNKNOWN]


def test_merge_drop_and_order():
    product = load_product("globeland30")
    legend = build_legend(product, {"green": ["grassland", "forest"], "built": ["artificial_surfaces"]}, ("tundra",))
    names = [entry.name for entry in legend.classes]
    assert names == ["cultivated_land", "green", "shrubland", "wetland", "water_bodies", "built", "bareland",
                     "permanent_snow_and_ice"]  # fmt: skip
    green = legend.classes[1]
    assert green.codes == (20, 30)
    assert green.rgb == product.classes[1].rgb
    assert looked_up(legend, 20, 30, 70, 75) == [1, 1, IGNORED, IGNORED]


BAD_LEGENDS = [
    ({"x": ["forrest"]}, (), "no class 'forrest' \\(did you mean 'forest'\\?\\)"),
    ({}, ("shrub land",), "no class 'shrub land'"),
    ({"x": ["forest"], "y": ["forest"]}, (), "more than one"),
    ({"x": ["forest"]}, ("forest",), "more than one"),
]


@pytest.mark.parametrize(("merge", "drop", "message"), BAD_LEGENDS)
def test_legends_that_cannot_be(merge, drop, message):
    with pytest.raises(ConfigError, match=message):
        build_legend(load_product("globeland30"), merge, drop)


def test_nothing_left():
    product = load_product("worldcover")
    with pytest.raises(ConfigError, match="no class of product 'worldcover' is left"):
        build_legend(product, {}, tuple(entry.name for entry in product.classes))


def test_unknown_product():
    with pytest.raises(ConfigError, match=r"'worldcovr' is not known \(did you mean 'worldcover'\?\).*globeland30"):
        load_product("worldcovr")
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read"):
        load_product("/tmp/none.yaml")


SOUND = {
    "name": "mine",
    "nodata": [0],
    "ignore": [9],
    "classes": {1: {"name": "a", "rgb": [1, 2, 3]}, 2: {"name": "b"}},
}
BAD_TABLES = {
    "lacks nodata": ({"nodata": ...}, "lacks 'nodata'"),
    "lacks ignore": ({"ignore": ...}, "lacks 'ignore'"),
    "lacks name": ({"name": ...}, "lacks 'name'"),
    "no classes": ({"classes": {}}, "expected `classes:`"),
    "classes as a list": ({"classes": [1, 2]}, "expected `classes:`"),
    "code as a word": ({"classes": {"a": {"name": "x"}}}, "whole number as its code"),
    "code as a truth value": ({"classes": {True: {"name": "x"}}}, "whole number as its code"),
    "nameless": ({"classes": {1: {"rgb": [1, 2, 3]}}}, "and a name"),
    "code twice": (
        {"classes": {1: {"name": "a", "also": [2]}, 2: {"name": "b"}}},
        "2 belongs to both 'a'",
    ),
    "probability of no class": ({"probability_bands": ["a", "nothing"]}, "no class is called 'nothing'"),
    "probability twice": ({"probability_bands": ["a", "a"]}, "each once"),
    "probability as a word": ({"probability_bands": "a"}, "expected a list of class names"),
    "code too large": ({"classes": {70000: {"name": "a"}}}, "whole numbers -32768..65535"),
    "code too small": ({"classes": {-40000: {"name": "a"}}}, "whole numbers -32768..65535"),
    "also is no list": ({"classes": {1: {"name": "a", "also": 3}}}, "classes: 1: also: expected a list"),
    "nodata is no list": ({"nodata": 0}, "nodata: expected a list"),
    "nodata out of range": ({"nodata": [1 << 20]}, "nodata: expected a list"),
    "nodata with a point": ({"nodata": [0.5]}, "nodata: expected a list"),
    "ignore is a word": ({"ignore": "sea"}, "ignore: expected a list"),
    "colour": ({"classes": {1: {"name": "a", "rgb": [1, 2, 300]}}}, "rgb"),
    "colour is a word": ({"classes": {1: {"name": "a", "rgb": "red"}}}, "rgb"),
    "filename": ({"filename": "("}, "filename is not a regular expression"),
    "filename is a number": ({"filename": 5}, "filename is not a regular expression"),
    "groups as a list": ({"groups": [1]}, "groups: expected a mapping"),
    "group of strangers": ({"groups": {"g": [1, 7]}}, "groups: g: no class has the code 7"),
    "order without groups": ({"raster_order": [111]}, "raster_order"),
    "too many": ({"classes": {n: {"name": f"c{n}"} for n in range(1, 300)}}, "299 classes, at most 253"),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_tables_that_cannot_be(tmp_path, case):
    change, message = BAD_TABLES[case]
    table = {key: value for key, value in {**SOUND, **change}.items() if value is not ...}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(table))
    with pytest.raises(ConfigError, match=f"mine.yaml.*{message}"):
        load_product(str(path))


def test_a_table_of_the_users(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**SOUND, "groups": {"all": [1, 2]}}))
    product = load_product(str(path))
    legend = build_legend(product)
    assert looked_up(legend, 0, 1, 2, 9, 3) == [NODATA, 0, 1, IGNORED, UNKNOWN]
    assert product.groups == {"all": (1, 2)}
    assert legend.classes[1].rgb != legend.classes[0].rgb


def test_duplicate_keys_in_a_table(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: x\nnodata: []\nignore: []\nclasses:\n  1: {name: a}\n  1: {name: b}\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml: duplicate key 1 in line 6"):
        load_product(str(path))


def test_groups_of_nlcd():
    product = load_product("nlcd")
    codes = [code for group in product.groups.values() for code in group]
    assert len(product.groups) == 9
    assert len(set(codes)) == len(codes)
    assert {code for entry in product.classes for code in entry.codes} >= set(codes)
