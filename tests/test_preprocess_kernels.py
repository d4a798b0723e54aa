"""Kernels and quality rules against NumPy, written out plainly, and against the verdicts of the published rules."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocess import cell_kernels, kernels, label_kernels, quality, sampling
from preprocess.cells import Axis, Cells, axis
from preprocess.grid import Chunk
from preprocess.options import QualityOptions
from preprocess.raster import SCENE_DTYPES
from preprocess.spill import band_sums
from preprocess.stretching import Stretch, stretch_to_uint8
from tests.scenes import SHARED

GOLDEN = SHARED / "golden/quality.npz"


def scene_pixels(dtype, bands=3, height=17, width=23, seed=0):
    rng = np.random.default_rng(seed)
    if dtype == "float32":
        pixels = rng.normal(0, 1e4, (bands, height, width)).astype(np.float32)
        pixels[0, 0, :4] = np.nan, np.inf, -np.inf, np.finfo(np.float32).max
        return pixels
    info = np.iinfo(dtype)
    pixels = rng.integers(info.min, info.max + 1, (bands, height, width)).astype(dtype)
    pixels[0, 0, :2] = info.min, info.max
    return pixels


def views(pixels):
    """The same values in memory laid out in other ways; for one dtype, since each layout is compiled by itself."""
    yield pixels
    if pixels.dtype != np.uint16:
        return
    yield np.asfortranarray(pixels)
    wide = np.empty((*pixels.shape[:2], 2 * pixels.shape[2]), pixels.dtype)
    wide[..., ::2] = pixels
    yield wide[..., ::2]
    yield pixels[:, ::-1, ::-1].copy()[:, ::-1, ::-1]


def stretched(pixels, limits, valid):
    with np.errstate(all="ignore"):
        low, high = limits[:, 0, None, None], limits[:, 1, None, None]
        grey = np.trunc(np.clip((pixels.astype(np.float64) - low) * (255.0 / (high - low)), 0, 255))
    return np.where(np.isnan(grey) | (valid == 0), 0, grey).astype(np.uint8).transpose(1, 2, 0)


@pytest.mark.parametrize("dtype", SCENE_DTYPES)
def test_stretch(dtype):
    pixels = scene_pixels(dtype)
    valid = (np.random.default_rng(1).random(pixels.shape[1:]) < 0.8).astype(np.uint8)
    for limits in (
        [[0, 255]] * 3,
        [[-5.5, 1e3], [10, 10 + 1e-6], [0, 65535]],
        [[-1e30, 1e30], [0, 1e-30], [-3e4, -2e4]],
    ):
        limits = np.array(limits, np.float64)
        for view in views(pixels):
            np.testing.assert_array_equal(stretch_to_uint8(view, limits, valid), stretched(pixels, limits, valid))


def test_stretch_of_8_bits_from_0_to_255_changes_nothing():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    grey = stretch_to_uint8(pixels, np.array([[0.0, 255.0]]), np.ones((16, 16), np.uint8))
    np.testing.assert_array_equal(grey[..., 0], pixels[0])


@pytest.mark.parametrize("dtype", SCENE_DTYPES)
def test_interleave(dtype):
    pixels = scene_pixels(dtype)
    valid = (np.random.default_rng(2).random(pixels.shape[1:]) < 0.7).astype(np.uint8)
    for view in views(pixels):
        found = np.empty((*pixels.shape[1:], 3), pixels.dtype)
        kernels.interleave(found, view, valid)
        np.testing.assert_array_equal(found, np.where(valid[..., None], pixels.transpose(1, 2, 0), 0))


@pytest.mark.parametrize("dtype", SCENE_DTYPES)
@pytest.mark.parametrize("has", [(True, True, True), (True, False, True), (False, False, False)])
def test_valid_pixels(dtype, has):
    rng = np.random.default_rng(3)
    pixels = rng.integers(0, 3, (3, 20, 20)).astype(dtype)
    if dtype == "float32":
        pixels[1, 3, 3:6] = np.nan, np.inf, -np.inf
    nodata = np.array([0.0, 1.0, 2.0])
    empty = (pixels == nodata[:, None, None]) & np.array(has)[:, None, None]
    expected = ~empty.all(axis=0) & np.isfinite(pixels.astype(np.float64)).all(axis=0)
    for view in views(pixels):
        np.testing.assert_array_equal(kernels.valid_pixels(view, nodata, np.array(has)), expected)
    assert 0 < expected.mean() <= 1


def test_a_nodata_value_the_type_cannot_hold_rejects_nothing():
    pixels = np.zeros((2, 3, 4), np.uint8)
    for nodata in (-9999.0, 300.0, 0.5, np.nan):
        assert kernels.valid_pixels(pixels, np.array([nodata, 0.0]), np.array([True, True])).all()


def test_nodata_in_the_types_own_precision():
    pixels = np.full((1, 2, 2), -9999.9, np.float32)
    assert not kernels.valid_pixels(pixels, np.array([-9999.9]), np.array([True])).any()


@pytest.mark.parametrize("bands", [1, 3, 4])
def test_stretch_of_any_number_of_bands(bands):
    pixels, valid = scene_pixels("int16", bands), np.ones((17, 23), np.uint8)
    limits = np.stack([np.linspace(-4000, 100, bands), np.linspace(2000, 30000, bands)], axis=1)
    found = np.empty((17, 23, bands), np.uint8)
    Stretch.of(limits, "int16").into(found, pixels, valid)
    np.testing.assert_array_equal(found, stretched(pixels, limits, valid))


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.integers(0, 300), min_size=1, max_size=60),
    percent=st.sampled_from([0, 0.5, 1, 37.7, 50, 99, 100]),
)
def test_percentiles_of_counts_are_numpys(values, percent):
    assert sampling.percentile(np.bincount(values, minlength=400), percent) == np.percentile(values, percent)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16"])
def test_count_values(dtype):
    pixels, lowest = scene_pixels(dtype, 3, 30, 40), int(np.iinfo(dtype).min)
    pixels[:, 4, 5:9], pixels[:, 5] = 0, 7
    valid = (np.random.default_rng(1).random((30, 40)) < 0.8).astype(np.uint8)
    counts = np.zeros((3, 1 << 8 * pixels.itemsize), np.int64)
    kernels.count_values(counts, pixels[:, ::2, ::3], valid[::2, ::3], lowest)
    part, keep = pixels[:, ::2, ::3].astype(np.int64), valid[::2, ::3] != 0
    keep &= part.sum(0) != 0
    for band in range(3):
        np.testing.assert_array_equal(counts[band], np.bincount(part[band][keep] - lowest, minlength=counts.shape[1]))


# -------------------------------------------------------------------------------------------------- cells


@st.composite
def tiled(draw, longest=60):
    """(chunk, height, width) of tiles at rising places, the last one wherever it fits, as planning cuts them."""
    size, step = draw(st.integers(1, 20)), draw(st.integers(1, 25))
    ends = []
    for _ in range(2):
        starts = [step * i for i in range(draw(st.integers(1, 6)))]
        if draw(st.booleans()):
            starts.append(starts[-1] + draw(st.integers(1, step)))  # moved inward to the scene's edge
        ends.append(tuple(starts))
    shift = draw(st.integers(0, 9))
    chunk = Chunk(tuple(shift + x for x in ends[0]), ends[1], size)
    return chunk, ends[1][-1] + size, ends[0][-1] + size


def tiles_of(chunk, array):
    """Each tile's part of an array [H, W, ...], in the order of Chunk.origins."""
    for left, top in chunk.origins() - chunk.window[:2]:
        yield array[top : top + chunk.size, left : left + chunk.size]


@settings(max_examples=60, deadline=None)
@given(starts=st.lists(st.integers(0, 80), min_size=1, max_size=9, unique=True), size=st.integers(1, 30))
def test_cells_cut_at_every_edge_and_cover_each_pixel_of_a_tile_once(starts, size):
    found: Axis = axis(sorted(starts), size)
    lines = {start - min(starts) + end for start in starts for end in (0, size)}
    for begin, end in found.spans:
        assert begin < end
        assert not any(begin < line < end for line in lines)
    for start, first, last in zip(sorted(starts), found.first, found.last, strict=True):
        pixels = [x for begin, end in found.spans[first:last] for x in range(begin, end)]
        assert pixels == list(range(start - min(starts), start - min(starts) + size))
    covered = {x for start in starts for x in range(start - min(starts), start - min(starts) + size)}
    assert sum(end - begin for begin, end in found.spans) == len(covered)  # gaps between tiles are left out


@settings(max_examples=40, deadline=None)
@given(place=tiled(), bands=st.sampled_from([1, 3, 4]), seed=st.integers(0, 99))
def test_grey_histograms_and_valid_shares_by_cells(place, bands, seed):
    chunk, height, width = place
    rng = np.random.default_rng(seed)
    grey = rng.integers(0, 256, (height, width, bands)).astype(np.uint8)
    grey[rng.random((height, width)) < 0.3] = rng.choice([0, 255])
    valid = (rng.random((height, width)) < 0.8).astype(np.uint8)
    cells = Cells.of(chunk)
    histograms, counted = cells.zeros(255 * bands + 1), cells.zeros(1)
    cell_kernels.grey_sum_histograms(histograms, grey, cells.down.spans, cells.across.spans)
    cell_kernels.count_valid(counted, valid, cells.down.spans, cells.across.spans)
    for found, tile in zip(cells.tiles(histograms), tiles_of(chunk, grey), strict=True):
        expected = np.bincount(tile.astype(np.int64).sum(2).ravel(), minlength=255 * bands + 1)
        np.testing.assert_array_equal(found, expected)
    for found, tile in zip(cells.tiles(counted)[:, 0], tiles_of(chunk, valid), strict=True):
        assert found == tile.sum(dtype=np.int64)


@pytest.mark.parametrize("dtype", SCENE_DTYPES)
def test_sums_by_cells(dtype):
    @settings(max_examples=15, deadline=None)
    @given(place=tiled(), bands=st.integers(1, 4), seed=st.integers(0, 99))
    def check(place, bands, seed):
        chunk, height, width = place
        pixels = np.nan_to_num(scene_pixels(dtype, bands, height, width + 4, seed), posinf=0, neginf=0)
        pixels = np.ascontiguousarray(pixels.transpose(1, 2, 0)[:, :width])
        for sums, tile in zip(band_sums(pixels, Cells.of(chunk)), tiles_of(chunk, pixels), strict=True):
            wide = tile.astype(np.float64 if dtype == "float32" else object)
            expected = np.array([wide.sum((0, 1)), (wide**2).sum((0, 1))])
            if dtype == "float32":
                np.testing.assert_allclose(sums, expected, rtol=1e-9, atol=1e-9 * np.abs(wide).max())
            else:
                assert sums.tolist() == expected.tolist()

    check()


def test_a_huge_value_spoils_nothing_but_its_own_tiles():
    pixels = np.full((20, 200, 1), 0.5, np.float32)
    pixels[3, 3] = 1e18
    sums = band_sums(pixels, Cells.of(Chunk(tuple(range(0, 181, 10)), (0,), 20)))
    assert (sums[1:, 0, 0] == 200).all()
    assert (sums[1:, 1, 0] == 100).all()


@pytest.mark.parametrize(("dtype", "value"), [("uint8", 255), ("uint16", 65535), ("int16", -32768)])
def test_sums_of_a_large_bright_tile_do_not_overflow(dtype, value):
    tile = np.full((4096, 2048, 1), value, dtype)
    sums = band_sums(tile, Cells(axis([0], 4096), axis([0], 2048)))
    assert sums.tolist() == [[[value * 2**23], [value**2 * 2**23]]]


@settings(max_examples=40, deadline=None)
@given(place=tiled(), kx=st.integers(1, 4), ky=st.integers(1, 4), strip=st.integers(1, 30), seed=st.integers(0, 99))
def test_label_counts_by_cells_do_not_depend_on_strips(place, kx, ky, strip, seed):
    chunk, height, width = place
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 9, (height * ky, width * kx)).astype(np.uint8)
    labels[rng.random(labels.shape) < 0.1] = 255
    valid = (rng.random((height, width)) < rng.choice([0.8, 1])).astype(np.uint8)
    cells = Cells.of(chunk)
    counts = cells.zeros(7, np.int64)  # 7, 8 and 255 do not count
    for top in range(0, height, strip):
        part = labels[top * ky : min(height, top + strip) * ky].copy()
        cell_kernels.leave_out(part, valid, 255, kx, ky, top)
        cell_kernels.label_counts(counts, part, cells.down.spans, cells.across.spans, kx, ky, top)
    wide = np.repeat(np.repeat(valid, ky, 0), kx, 1) != 0
    for (left, top), found in zip(chunk.origins() - chunk.window[:2], cells.tiles(counts), strict=True):
        area = np.s_[top * ky : (top + chunk.size) * ky, left * kx : (left + chunk.size) * kx]
        np.testing.assert_array_equal(found, np.bincount(labels[area][wide[area]], minlength=256)[:7])


def test_label_counts_of_cells_higher_than_8_bits_count():
    labels = np.full((700, 600), 2, np.uint8)
    cells = Cells(axis([0], 700), axis([0], 600))
    counts = cells.zeros(3, np.int64)
    cell_kernels.label_counts(counts, labels, cells.down.spans, cells.across.spans, 1, 1, 0)
    assert cells.tiles(counts).tolist() == [[0, 0, 700 * 600]]


# ------------------------------------------------------------------------------------------------- labels


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_gathered_labels_are_those_of_every_pixels_own_position(data):
    """Over random lattices, with ground that does not exist, labels already there, turns around the Earth, domains."""
    seed = data.draw(st.integers(0, 9999))
    rng = np.random.default_rng(seed)
    height, width = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 90))
    sheet = rng.integers(0, 9, (30, 50)).astype(np.uint8)
    period = data.draw(st.sampled_from([0.0, 50.0, 65.0]))

    def nodes(corners, noise):
        down, across = (
            data.draw(st.integers(1, min(4, max(1, height - 1)))),
            data.draw(st.integers(1, min(5, max(1, width - 1)))),
        )
        v, u = np.mgrid[: down + 1, : across + 1] / np.array([down, across])[:, None, None]
        made = corners[0] + np.outer(u.ravel(), corners[1]).reshape(*u.shape, 2)
        return made + np.outer(v.ravel(), corners[2]).reshape(*u.shape, 2) + rng.normal(0, noise, made.shape)

    lattice = nodes(rng.uniform([[-9, -9], [-80, -20], [-20, -40]], [[60, 30], [80, 20], [20, 40]]), 0.3)
    if data.draw(st.booleans()):
        lattice[rng.integers(lattice.shape[0]), rng.integers(lattice.shape[1])] = np.nan
    lonlat = nodes(rng.uniform([[-200, 40], [-9, -2], [-2, -9]], [[200, 50], [9, 2], [2, 9]]), 0.1)
    west = lonlat[0, 0, 0] + rng.uniform(-6, 4) + 360 * rng.integers(-1, 2)
    domain = np.array([west, 42.0, west + 6, 48.0])
    use_domain = data.draw(st.booleans())
    first = rng.integers(-3, 4, 2).astype(np.float64)
    labels = np.where(rng.random((height, width)) < rng.choice([0, 0.3]), 7, 255).astype(np.uint8)
    expected, unsure = labels.copy(), np.zeros(labels.shape, bool)
    for y in range(height):
        for x in range(width):
            column, row = label_kernels.between(lattice, x, y, width, height)
            lon, lat = label_kernels.between(lonlat, x, y, width, height)
            column, row = column - first[0], row - first[1]
            column = column % period if period else column
            away = (lon - west) % 360
            inside = away < 6 and 42 <= lat < 48
            edges = [column % 1, row % 1, *([away, away - 6, lat - 42, lat - 48] if use_domain else [])]
            unsure[y, x] = np.isfinite(column) and min(abs(e - n) for e in edges for n in (0, 1)) < 2e-6
            here = np.isfinite(column) and 0 <= column < 50 and 0 <= row < 30 and (inside or not use_domain)
            if labels[y, x] == 255 and here:
                expected[y, x] = sheet[int(row), int(column)]
    label_kernels.gather_labels(labels, 255, lattice, sheet, first, period, lonlat, domain, use_domain)
    np.testing.assert_array_equal(labels[~unsure], expected[~unsure])


@pytest.mark.parametrize("width", range(2, 40))
def test_a_centre_on_the_edge_of_two_map_pixels_belongs_to_the_latter(width):
    """20 m pixels over a 30 m map: every other centre lies on an edge, and rounding must not choose."""
    sheet = np.arange(60, dtype=np.uint8).reshape(1, 60)
    columns = 1 / 3 + np.arange(width) * 2 / 3
    for cells in (1, 2, 3, width - 1):
        ends = np.linspace(columns[0], columns[-1], cells + 1) + 1e-9 * (-1) ** np.arange(cells + 1)
        lattice = np.stack(np.broadcast_arrays(ends, np.full((3, 1), 0.5)), -1)
        labels = np.full((7, width), 255, np.uint8)
        label_kernels.gather_labels(labels, 255, lattice, sheet, np.zeros(2), 0.0, lattice, np.zeros(4), False)
        np.testing.assert_array_equal(labels, np.tile(np.floor(columns + 1e-7), (7, 1)))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16"])
def test_translation_of_codes(dtype):
    lookup = np.random.default_rng(0).integers(0, 250, 1 << 17).astype(np.uint8)
    info = np.iinfo(dtype)
    codes = np.random.default_rng(1).integers(info.min, info.max + 1, (20, 30)).astype(dtype)
    np.testing.assert_array_equal(label_kernels.translate(codes, lookup, 32768), lookup[codes.astype(np.int64) + 32768])


# ------------------------------------------------------------------------------------------------ quality


def verdict(grey_HWC, share=1.0, **rules):
    histogram = np.bincount(grey_HWC.astype(np.int64).sum(2).ravel(), minlength=766)
    options = QualityOptions(**rules)
    return quality.rejection(quality.measures(histogram, 3, share, options), options)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 765), min_size=1, max_size=300), st.sampled_from([20.0, 37.7]))
def test_measures_are_numpys(values, dark_below):
    found = quality.measures(np.bincount(values, minlength=766), 3, 0.5, QualityOptions(dark_below=dark_below))
    level = np.array(values) / 3
    low, high = np.percentile(level, (1, 99))
    expected = (0.5, np.mean(level < dark_below), np.mean(level > 230), high - low, level.mean(), level.max())
    assert found == pytest.approx(expected, abs=1e-9)


@pytest.mark.skipif(not GOLDEN.exists(), reason="the published verdicts are not beside this checkout")
def test_published_verdicts():
    golden = np.load(GOLDEN)
    verdicts = [verdict(tile_CHW.transpose(1, 2, 0)) is None for tile_CHW in golden["tiles_chw_uint8"]]
    assert 0 < sum(verdicts) < len(verdicts) == 108
    wrong = [
        (i, str(golden["origin"][i])) for i, (a, b) in enumerate(zip(verdicts, golden["kept"], strict=True)) if a != b
    ]
    assert not wrong


def judged(tile, share=1.0, **rules):
    return verdict(np.repeat(np.asarray(tile, np.uint8)[..., None], 3, -1), share, **rules)


FINE = np.linspace(30, 220, 400).reshape(20, 20)
DARK = np.tile([5, 19], (20, 10))
MUCH_DARK = np.where(np.arange(400).reshape(20, 20) < 41, 10, FINE)
FLAT = np.full((20, 20), 100)
BRIGHT = np.where(np.arange(400).reshape(20, 20) < 201, 240, FINE)
RULES = {
    "dark": (DARK, "min_brightest"),
    "dark_share": (MUCH_DARK, "max_dark_fraction"),
    "flat": (FLAT, "min_contrast"),
    "bright_share": (BRIGHT, "max_bright_fraction"),
}


def test_every_reason_has_a_case():
    assert {*RULES, "nodata"} == set(quality.REASONS)
    assert judged(FINE) is None


@pytest.mark.parametrize("reason", RULES)
def test_each_rule_gives_its_reason_and_can_be_switched_off(reason):
    tile, key = RULES[reason]
    assert judged(tile) == reason
    others = {rule: None for _, rule in RULES.values() if rule != key}
    assert judged(tile, **others) == reason
    assert judged(tile, **{rule: None for _, rule in RULES.values()}) is None


def test_rules_stand_exactly_on_their_limits():
    level = np.arange(400).reshape(20, 20)
    assert judged(np.where(level < 40, 10, FINE)) is None  # 10 % dark is allowed, more is not
    assert judged(np.where(level < 200, 240, FINE)) is None  # half bright is allowed
    assert judged(np.where(level == 0, 20, 1), max_dark_fraction=None, min_contrast=None) is None
    assert judged(FINE, share=0.9) is None
    assert judged(FINE, share=0.8999) == "nodata"
    assert judged(FINE, share=0.1, min_valid_pixels=0) is None
