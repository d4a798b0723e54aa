"""report.html: one file that opens without a network and answers clicks."""

import base64
import json
import re
import shutil
import warnings

import numpy as np
import pytest
import rasterio
from rasterio.io import MemoryFile
from rasterio.warp import transform as warp_points

from geokr import manifests
from geokr.landcover import build_legend, load_product
from preprocess import report_base, report_page, report_pictures, report_sections, report_tiles, tile_table
from preprocess.grid import Grid
from preprocess.report_plane import MapPlace, Plane, plane_of
from preprocess.sheet_headers import read_sheet
from preprocess.sheets import label_sheets
from preprocess.tile_facts import Facts, row_dtype
from tests.scenes import NO_QUALITY, command, noise, patches, write_raster

KEYS = ("tile.size=32", "tile.step=24", "split.block_m=2000", "split.val_fraction=0.3", "workers=0")
EVIL = '<b>&"{{data}}'  # a scene's name that a careless page would take for its own


def pixels():
    made = noise(1, (3, 200, 300))
    made[:, :60, :80] = 3  # dark
    made[:, 100:, :70] = 250  # bright
    made[:, 100:110, :70] = 120
    return made


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    scene = write_raster(folder / f"{EVIL}.tif", pixels(), (9.4, 3.4, 500_000, 3.4, -9.4, 5_400_000))
    cover = write_raster(folder / "cover.tif", patches(2, 120, 160, [10, 30, 80]), (30, 0, 499_000, 0, -30, 5_402_000))
    assert command([scene], [cover], "worldcover", folder / "out", *KEYS) == 0
    return folder, ([scene], [cover], "worldcover")


def data_of(path):
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.S)
    return json.loads(text[1])


def decoded(text, dtype):
    return np.frombuffer(base64.b64decode(text), dtype)


# ------------------------------------------------------------------------------------------------ what it holds


def test_the_file_asks_nothing_of_a_network(packed):
    text = (packed[0] / "out" / report_page.NAME).read_text()
    assert "default-src 'none'" in text
    assert not re.search(r'(src|href)="(?!data:|#)', text)
    assert not re.search(r"url\((?!data:)|@import|https?://", text)


def test_text_from_files_is_escaped(packed):
    text = (packed[0] / "out" / report_page.NAME).read_text()
    assert EVIL not in text
    assert "&lt;b&gt;&amp;&quot;{{data}}" in text
    assert data_of(packed[0] / "out" / report_page.NAME)["map"]["scenes"] == [EVIL]


def test_the_map_holds_every_tile_in_its_place(packed):
    out = packed[0] / "out"
    data, tiles = data_of(out / report_page.NAME), data_of(out / report_page.NAME)["map"]
    table = tile_table.pq.read_table(out / tile_table.NAME)
    assert tiles["count"] == table.num_rows
    assert [EVIL + end for end in tiles["ids"]] == table["tile_id"].to_pylist()
    names = [entry["name"] for entry in data["classes"]]
    shares = decoded(tiles["shares"], "u1").reshape(-1, len(names)) / report_tiles.SHARE_STEPS
    np.testing.assert_allclose(shares, np.stack([table[name].to_numpy() for name in names], 1), atol=0.0021)
    assert decoded(tiles["split"], "u1").tolist() == [split == "val" for split in table["split"].to_pylist()]
    ends = decoded(tiles["ends"], "<u4")
    assert ends.tolist() == list(range(4, 4 * len(ends) + 4, 4))
    # the sides of tiles, 32 pixels of 10 m, on a plane of true areas
    points = decoded(tiles["points"], "<f4").reshape(-1, 4, 2).astype(np.float64)
    x, y = points[..., 0], points[..., 1]
    area = np.abs((x * np.roll(y, -1, 1) - np.roll(x, -1, 1) * y).sum(1)) / 2
    assert area == pytest.approx((32**2) * (9.4**2 + 3.4**2), rel=0.01)


def test_rejected_tiles_come_with_examples(packed):
    out = packed[0] / "out"
    text, counts = (out / report_page.NAME).read_text(), manifests.load_manifest(out).counts
    section = re.search(r'<section id="rejected">.*?</section>', text, re.S)[0]
    found = {
        match[1].replace(" ", "_"): (int(match[2].replace(",", "")), match[0].count("<img"))
        for match in re.finditer(r'<div class="reason"><div><h3>([\w ]+) <b>([\d,]+)</b>.*?</div></div>', section, re.S)
    }
    expected = {name.removeprefix("rejected_"): n for name, n in counts.items() if name.startswith("rejected_") and n}
    assert {name: n for name, (n, _) in found.items()} == expected
    assert {"dark", "bright_share"} <= set(expected)
    assert all(1 <= pictures <= report_pictures.EXAMPLES for _, pictures in found.values())


def test_examples_do_not_depend_on_the_order_of_chunks(tmp_path):
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 255, (16, 16, 3)).astype(np.uint8)
    measures = report_pictures.Measures(1, 0, 0, 0, 0, 0)
    chunks = [
        [report_pictures.Rejected("flat", f"s:{chunk}:{t}", measures, grey) for t in range(5)] for chunk in range(20)
    ]
    for folder, order in (("a", range(20)), ("b", reversed(range(20)))):
        (tmp_path / folder).mkdir()
        for number in order:
            report_pictures.keep_examples(str(tmp_path / folder), number, 7, chunks[number])
    (tmp_path / "a" / "00000099.examples").write_text("cut sho")
    first, second = (report_pictures.examples(tmp_path / name) for name in "ab")
    assert [e.tile_id for e in first["flat"]] == [e.tile_id for e in second["flat"]]
    assert len(first["flat"]) == report_pictures.EXAMPLES


def test_a_missing_report_is_made_again(packed, tmp_path, capsys):
    folder, inputs = packed
    shutil.copytree(folder / "out", tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert command(*inputs, tmp_path / "out", *KEYS) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    (tmp_path / "out" / report_page.NAME).unlink()
    assert command(*inputs, tmp_path / "out", *KEYS) == 0
    assert "report.html" in capsys.readouterr().out
    again = data_of(tmp_path / "out" / report_page.NAME)
    assert again == data_of(folder / "out" / report_page.NAME)
    assert "this page was made later" in (tmp_path / "out" / report_page.NAME).read_text()


def test_a_report_that_fails_leaves_the_dataset_whole(packed, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report_page, "page", full)
    assert command(*packed[1], tmp_path / "out", *KEYS) == 0
    assert "report.html could not be made" in capsys.readouterr().err
    assert tile_table.is_current(tmp_path / "out", manifests.load_manifest(tmp_path / "out"))
    assert not (tmp_path / "out" / ".work").exists()


OTHERS = (
    ("tile.codec=raw", "stretch.mode=none", *NO_QUALITY),
    ("tile.codec=raw", "tile.bands=[1]"),
    ("split.val_fraction=0",),
)


@pytest.mark.parametrize("keys", OTHERS, ids=["depth", "one band", "no validation"])
def test_other_forms_of_datasets(packed, tmp_path, keys):
    base = tuple(key for key in KEYS if not any(key.startswith(other.split("=")[0] + "=") for other in keys))
    assert command(*packed[1], tmp_path / "out", *base, *keys) == 0
    text = (tmp_path / "out" / report_page.NAME).read_text()
    assert text.count("<figure>") > 3
    assert "{{" not in text.replace(EVIL, "").replace("{{data}}", "")


def test_further_products_and_probabilities(packed, tmp_path, capsys):
    """Every product's shares, in the page and in the command's last words; of a first product, too, that comes as
    probabilities, whose map shows the most probable class."""
    (scene,), covers = packed[1][:2]
    shares = np.zeros((9, 120, 160), np.float32)
    shares[1, :, :80], shares[6, :, 80:], shares[0] = 0.7, 0.6, 0.3
    shares[6, :, 80:] += 0.1
    shares[:, :, :10] = np.nan
    likely = write_raster(tmp_path / "likely.tif", shares, (30, 0, 499_000, 0, -30, 5_402_000))
    also = ("--also", "esa", *map(str, covers), "labels.also={esa: {product: worldcover}}")
    assert command([scene], [likely], "dynamicworld", tmp_path / "out", *KEYS, *also) == 0
    manifest, said = manifests.load_manifest(tmp_path / "out"), capsys.readouterr().out
    text = (tmp_path / "out" / report_page.NAME).read_text()
    assert "class of dynamicworld" in said
    assert "class of esa" in said
    section = re.search(r'<section id="classes">.*?</section>', text, re.S)[0]
    for name, seen in (("dynamicworld", manifest), ("esa", manifests.labelled_by(manifest, "esa", "")[0])):
        part = section.split("<h3>esa: ")[name == "esa"]
        for entry, train, val in zip(seen.classes, seen.train.prior, seen.val.prior, strict=True):
            if train > 0:
                numbers = f"{report_sections.share(train)} / {report_sections.share(val)}"
                assert re.search(rf"{entry.name.replace('_', ' ')}</span></span><div.*?{numbers}</span>", part)
                assert f"{train:.2%}" in said
    product = load_product("dynamicworld")
    sheets = label_sheets([read_sheet(str(likely), product.probability_bands)], product)
    place = MapPlace(plane_of(np.array([3.02]), np.array([48.75])), Grid(180, 140, (25.0, 0, -2200, 0, -25.0, 1800)))
    picture, drawn = report_base.label_picture(place, sheets, build_legend(product))
    assert drawn == 1
    assert set(np.unique(picture)) == {1, 6, 255}


# ------------------------------------------------------------------------------------------------------ the map


@pytest.mark.parametrize("middle", [(10, 50), (180, -20), (-179.99, 66), (45, 90), (0, -89)])
def test_the_plane_is_equal_area_and_goes_back(middle):
    rng = np.random.default_rng(0)
    plane = Plane(*map(float, middle), world=False)
    x, y = rng.uniform(-2e6, 2e6, (2, 200))
    lon, lat = plane.inverse(x, y)
    np.testing.assert_allclose(plane.forward(lon, lat), (x, y), atol=1e-3)
    crs = f"+proj=laea +lon_0={middle[0]} +lat_0={middle[1]} +R=6371008.8 +units=m"
    sphere = "+proj=longlat +R=6371008.8"
    other = warp_points(rasterio.crs.CRS.from_string(sphere), rasterio.crs.CRS.from_string(crs), lon, lat)
    np.testing.assert_allclose(other[:2], (x, y), atol=1e-2)


def test_which_plane():
    assert not plane_of(np.array([179.0, -179.0]), np.array([10.0, 12.0])).world
    assert plane_of(np.linspace(-180, 179, 90), np.tile([40.0, -40.0], 45)).world


def test_the_land_cover_lies_where_it_is(packed):
    """The picture against GDAL, pixel by pixel."""
    product = load_product("worldcover")
    legend = build_legend(product)
    (cover,) = packed[1][1]
    sheets = label_sheets([read_sheet(str(cover))], product)
    plane = plane_of(np.array([3.02]), np.array([48.75]))
    place = MapPlace(plane, Grid(180, 140, (25.0, 0, -2200, 0, -25.0, 1800)))
    picture, drawn = report_base.label_picture(place, sheets, legend)
    assert drawn == 1
    columns, rows = np.meshgrid(np.arange(180) + 0.5, np.arange(140) + 0.5)
    x, y = place.points("EPSG:32631", columns, rows)
    with rasterio.open(cover) as file:
        codes = file.read(1)
        c, r = ~file.transform * (x.ravel(), y.ravel())
    inside = (c >= 0) & (r >= 0) & (c < codes.shape[1]) & (r < codes.shape[0])
    expected = np.full(c.shape, 255)
    expected[inside] = legend.lookup[codes[r[inside].astype(int), c[inside].astype(int)].astype(int) + 32768]
    assert inside.mean() > 0.2
    assert (picture.ravel() == expected).mean() > 0.97  # pixels on the seam of two cells may fall either way


def test_the_picture_is_a_png():
    colours = [(10, 20, 30), (200, 100, 0)]
    picture = np.array([[0, 1, 255], [1, 0, 254]], np.uint8)
    with (
        warnings.catch_warnings(action="ignore"),
        MemoryFile(report_base.png(picture, colours)) as memory,
        memory.open() as file,
    ):
        indexes, table = file.read(1), file.colormap(1)
    shown = [[table[i] for i in row] for row in indexes.tolist()]
    first, second, clear = (*colours[0], 255), (*colours[1], 255), (0, 0, 0, 0)
    assert shown == [[first, second, clear], [second, first, clear]]


# ------------------------------------------------------------------------------------------------ a million tiles


def many(path, count, classes, seed=0):
    """A tiles.parquet of scenes scattered over Europe; returns the manifest's parts that a map needs."""
    rng = np.random.default_rng(seed)
    places = rng.uniform((-10, 37), (30, 62), (200, 2))
    tables = []
    for n in range(0, count, 1 << 16):
        size = min(1 << 16, count - n)
        scene = rng.integers(0, 200, size)
        lonlat = places[scene] + rng.integers(0, 60, (size, 2)) * (0.03, 0.02)
        shares = rng.dirichlet(np.full(classes, 0.3), size).astype(np.float32)
        columns = {
            "lon": lonlat[:, 0],
            "lat": lonlat[:, 1],
            "split": np.where(scene % 10 == 0, "val", "train"),
            **{f"c{k}": shares[:, k] for k in range(classes)},
        }
        tables.append(tile_table.pa.table(columns))
    tile_table.pq.write_table(tile_table.pa.concat_tables(tables), path)


def test_many_tiles_become_cells_that_add_up(tmp_path):
    many(tmp_path / "tiles.parquet", 120_000, 12)
    names = [f"c{k}" for k in range(12)]
    found = report_tiles.map_data(tmp_path / "tiles.parquet", names)
    data, table = found.data, tile_table.pq.read_table(tmp_path / "tiles.parquet")
    assert data["kind"] == "cells"
    assert data["count"] <= report_tiles.MOST_CELLS
    tiles = decoded(data["tiles"], "<u4").reshape(-1, 2)
    assert tiles.sum(0).tolist() == [table["split"].to_pylist().count(name) for name in ("train", "val")]
    shares = decoded(data["shares"], "u1").reshape(-1, 12) / report_tiles.SHARE_STEPS
    mean = (shares * tiles.sum(1)[:, None]).sum(0) / tiles.sum()
    np.testing.assert_allclose(mean, [table[name].to_numpy().mean() for name in names], atol=0.003)


# -------------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (pip install '.[dev]')")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no Chromium with its chromedriver here")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    profile = tmp_path_factory.mktemp("profile")
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
                 "--disable-dev-shm-usage", "--window-size=1280,1000", f"--user-data-dir={profile}"):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.chrome.service.Service(driver))
    yield started
    started.quit()


def complaints(browser):
    """What the console says, but for what this test's own reading of the canvas brings about."""
    return [entry for entry in browser.get_log("browser") if "getImageData" not in entry["message"]]


def opened(browser, path):
    browser.get(path.as_uri())
    browser.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
    assert complaints(browser) == []


def settled(browser):
    browser.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")


def click_on_map(browser, item):
    from selenium.webdriver.common.action_chains import ActionChains

    canvas = browser.find_element("css selector", "canvas")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", canvas)
    x, y = browser.execute_script(f"return geokr.place({item})")
    width, height = canvas.size["width"], canvas.size["height"]
    ActionChains(browser).move_to_element_with_offset(
        canvas, round(x - width / 2), round(y - height / 2)
    ).click().perform()
    settled(browser)


def colours_of(browser):
    """How many distinct colours the map shows, roughly."""
    return browser.execute_script(
        "const c = document.querySelector('canvas'), d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        "const s = {}; for (let i = 0; i < d.length; i += 4) if (d[i + 3] > 200) {"
        "const k = [d[i] >> 4, d[i + 1] >> 4, d[i + 2] >> 4]; s[k] = (s[k] || 0) + 1; } return s;"
    )


def test_in_a_browser(browser, packed, tmp_path):
    path = packed[0] / "out" / report_page.NAME
    opened(browser, path)
    assert browser.execute_script("return document.images.length") > 10
    assert browser.execute_script("return [...document.images].every(i => !i.complete || i.naturalWidth > 0)")
    by_class = colours_of(browser)
    assert sum(by_class.values()) > 20_000
    click_on_map(browser, 0)
    details = browser.find_element("id", "details").text
    table = tile_table.pq.read_table(packed[0] / "out" / tile_table.NAME).to_pylist()
    assert table[browser.execute_script("return geokr.picked()")]["tile_id"] in details
    assert "record" in details
    browser.find_element("css selector", "[data-colour=split]").click()
    settled(browser)
    assert "validation" in browser.find_element("id", "legend").text
    assert set(colours_of(browser)) != set(by_class)
    browser.find_element("css selector", "[data-colour=class]").click()
    browser.find_element("css selector", "#legend button").click()
    settled(browser)
    assert browser.find_element("id", "legend").text.startswith("Share of")
    k = browser.execute_script("return geokr.view.k")
    browser.find_element("css selector", "[data-zoom=in]").click()
    assert browser.execute_script("return geokr.view.k") > k
    browser.find_element("css selector", "[data-zoom=all]").click()
    assert browser.execute_script("return geokr.view.k") == pytest.approx(k)
    assert browser.save_screenshot(str(tmp_path / "report.png"))
    assert complaints(browser) == []


def test_on_a_phone(browser, packed):
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        opened(browser, packed[0] / "out" / report_page.NAME)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
        assert browser.find_element("css selector", "canvas").size["width"] > 300
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_million_tiles_in_a_browser(browser, packed, tmp_path, monkeypatch):
    """The page of a million tiles: small, and drawn at once."""
    out = tmp_path / "out"
    shutil.copytree(packed[0] / "out", out)
    manifest = manifests.load_manifest(out)
    classes = len(manifest.classes)
    many(out / tile_table.NAME, 1_000_000, classes)
    renamed = [entry.model_copy(update={"name": f"c{k}"}) for k, entry in enumerate(manifest.classes)]
    legend = build_legend(load_product("worldcover"))
    page = report_page.page(out, manifest.model_copy(update={"classes": tuple(renamed)}), [], legend, report_page.Run())
    assert len(page) < 3 << 20
    (out / report_page.NAME).write_bytes(page)
    opened(browser, out / report_page.NAME)
    taken = browser.execute_script("return performance.getEntriesByType('navigation')[0].loadEventEnd")
    assert taken < 10_000  # milliseconds; about 600 on an idle core
    assert sum(colours_of(browser).values()) > 20_000
    click_on_map(browser, "geokr.first()")
    assert "tiles" in browser.find_element("id", "details").text
    assert complaints(browser) == []


def test_facts_without_a_footprint_are_shown_where_their_middle_is(tmp_path):
    """Records in a CRS of their own, as in an older dataset: no footprint, but the file opens."""
    rows = np.zeros(2, row_dtype(3))
    rows["ring"], rows["lonlat"], rows["fractions"] = np.nan, [(10, 50), (10.1, 50)], [(1, 0, 0), (0, 1, 0)]
    facts = Facts(rows, [("a:0:0", "a", ""), ("a:0:8", "a", "")])
    names = ["x", "y", "z"]
    table = tile_table.make_table(facts, "train", "train-00000.tfrecord", 0, np.zeros(2), np.ones(2), names)
    tile_table.pq.write_table(table, tmp_path / "tiles.parquet")
    found = report_tiles.map_data(tmp_path / "tiles.parquet", ["x", "y", "z"])
    assert found.data["count"] == 2
    assert np.isfinite(found.bounds).all()
