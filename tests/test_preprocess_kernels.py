"""Kernels and quality rules against NumPy, written out plainly, and against the verdicts of the published rules."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocess import kernels, quality
from preprocess.options import QualityOptions
from preprocess.raster import SCENE_DTYPES
from preprocess.spill import band_sums
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
            np.testing.assert_array_equal(
                kernels.stretch_to_uint8(view, limits, valid), stretched(pixels, limits, valid)
            )


def test_stretch_of_8_bits_from_0_to_255_changes_nothing():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    grey = kernels.stretch_to_uint8(pixels, np.array([[0.0, 255.0]]), np.ones((16, 16), np.uint8))
    np.testing.assert_array_equal(grey[..., 0], pixels[0])


@pytest.mark.parametrize("dtype", SCENE_DTYPES)
def test_interleave(dtype):
    pixels = scene_pixels(dtype)
    valid = (np.random.default_rng(2).random(pixels.shape[1:]) < 0.7).astype(np.uint8)
    for view in views(pixels):
        found = kernels.interleave(view, valid)
        assert found.dtype == pixels.dtype
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


@pytest.mark.parametrize("bands", [1, 3, 13])
def test_histogram(bands):
    grey = np.random.default_rng(4).integers(0, 256, (40, 50, bands)).astype(np.uint8)
    grey[0, 0], grey[0, 1] = 0, 255
    for view in (grey, grey[::2, 5:30], np.asfortranarray(grey)):
        expected = np.bincount(view.astype(np.int64).sum(2).ravel(), minlength=255 * bands + 1)
        np.testing.assert_array_equal(kernels.grey_sum_histogram(view), expected)


@pytest.mark.parametrize("dtype", SCENE_DTYPES)
def test_sums(dtype):
    tile = np.nan_to_num(scene_pixels(dtype, 4, 64, 64), posinf=0, neginf=0).transpose(1, 2, 0)
    sums = band_sums(np.ascontiguousarray(tile))
    wide = tile.astype(np.float64 if dtype == "float32" else object)
    expected = np.array([wide.sum((0, 1)), (wide**2).sum((0, 1))])
    if dtype == "float32":
        np.testing.assert_allclose(sums, expected, rtol=1e-12)
    else:
        assert sums.tolist() == expected.tolist()


def test_sums_of_a_large_bright_tile_do_not_overflow():
    tile = np.full((2048, 2048, 1), 65535, np.uint16)
    assert band_sums(tile).tolist() == [[65535 * 2048**2], [65535**2 * 2048**2]]


@settings(max_examples=30, deadline=None)
@given(
    size=st.integers(1, 9),
    kx=st.integers(1, 4),
    ky=st.integers(1, 4),
    strip=st.integers(1, 30),
    seed=st.integers(0, 99),
)
def test_tile_histograms_do_not_depend_on_strips(size, kx, ky, strip, seed):
    rng = np.random.default_rng(seed)
    height, width = 24, 19
    labels = rng.integers(0, 256, (height * ky, width * kx)).astype(np.uint8)
    valid = (rng.random((height, width)) < 0.8).astype(np.uint8)
    origins = np.stack([rng.integers(0, width - size + 1, 6), rng.integers(0, height - size + 1, 6)], 1)
    counts = np.zeros((6, 256), np.int64)
    for top in range(0, height, strip):
        part = labels[top * ky : min(height, top + strip) * ky]
        kernels.add_tile_histograms(counts, part, valid, origins, size, kx, ky, top)
    wide = np.repeat(np.repeat(valid, ky, 0), kx, 1) != 0
    for (left, top), found in zip(origins, counts, strict=True):
        place = np.s_[top * ky : (top + size) * ky, left * kx : (left + size) * kx]
        np.testing.assert_array_equal(found, np.bincount(labels[place][wide[place]], minlength=256))


# ------------------------------------------------------------------------------------------------ quality


def verdict(histogram, share, rules):
    return quality.rejection(quality.measures(histogram, 3, share, rules), rules)


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
    verdicts = []
    for tile_CHW in golden["tiles_chw_uint8"]:
        histogram = kernels.grey_sum_histogram(tile_CHW.transpose(1, 2, 0))
        verdicts.append(verdict(histogram, 1.0, QualityOptions()) is None)
    assert 0 < sum(verdicts) < len(verdicts) == 108
    wrong = [
        (i, str(golden["origin"][i])) for i, (a, b) in enumerate(zip(verdicts, golden["kept"], strict=True)) if a != b
    ]
    assert not wrong


def judged(tile, share=1.0, **rules):
    grey = np.repeat(np.asarray(tile, np.uint8)[..., None], 3, -1)
    return verdict(kernels.grey_sum_histogram(grey), share, QualityOptions(**rules))


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
