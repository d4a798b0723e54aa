"""Augmentation parameters: distributions, independence of batching, and colour against step-by-step arithmetic."""

import colorsys

import numpy as np
import pytest

from geokr.options import AugmentOptions
from pipelines.augment import LUMA, BandFacts, apply_dihedral, draw, identity
from pipelines.errors import PipelineError

RGB = BandFacts("uint8", (0, 1, 2), (90.0, 100.0, 80.0), (40.0, 41.0, 42.0))
FOUR = BandFacts("uint16", (0, 1, 2, 3), (900.0, 800.0, 700.0, 3000.0), (100.0, 200.0, 300.0, 400.0))
STILL = {"brightness": (1, 1), "contrast": (1, 1), "saturation": (1, 1), "hue": (0, 0), "colour_probability": 1}
MANY = np.arange(40_000)


def drawn(options, facts=RGB, ids=MANY, epochs=0, seed=0):
    return draw(options, facts, seed, np.broadcast_to(epochs, ids.shape), ids)


def applied(matrix, pixels):
    return pixels @ matrix[:, :-1].T.astype(np.float64) + matrix[:, -1]


def within(counts, expected, limit):
    """Chi-square of counts against expected counts."""
    return ((counts - expected) ** 2 / expected).sum() < limit


def test_dihedral_definition_is_the_square_group():
    square = np.arange(9).reshape(3, 3)
    forms = {apply_dihedral(square, k).tobytes() for k in range(8)}
    expected = {np.rot90(m, turns).tobytes() for m in (square, square.T) for turns in range(4)}
    assert forms == expected
    assert len(expected) == 8


def test_dihedral_distributions():
    even = np.bincount(drawn(AugmentOptions()).dihedral, minlength=8)
    assert within(even, 5000, 29.9)
    published = np.bincount(drawn(AugmentOptions(published=True)).dihedral, minlength=8)
    # Two flips and half the time a quarter turn of four: a transposing turn a quarter of the time.
    assert within(published, np.repeat([7500, 2500], 4), 29.9)
    assert not drawn(AugmentOptions(dihedral=False)).dihedral.any()


def test_colour_share_and_identity():
    colour = drawn(AugmentOptions(colour_probability=0.3)).colour
    plain = (colour == np.eye(3, 4, dtype=np.float32)).all((1, 2))
    assert abs(plain.mean() - 0.7) < 0.01
    assert (drawn(AugmentOptions(colour_probability=0)).colour == np.eye(3, 4)).all()
    assert not (drawn(AugmentOptions(colour_probability=1)).colour == np.eye(3, 4)).all((1, 2)).any()
    still = identity(5, FOUR)
    assert (still.colour == np.eye(4, 5)).all()
    assert not still.dihedral.any()


@pytest.mark.parametrize(("name", "limits"), [("brightness", (0.7, 1.3)), ("contrast", (0.5, 1.5))])
def test_factors_are_uniform_over_their_range(name, limits):
    factor = drawn(AugmentOptions(**{**STILL, name: limits})).colour[:, 0, 0]
    assert within(np.histogram(factor, 20, limits)[0], 2000, 50)


@pytest.mark.parametrize("name", ["brightness", "contrast"])
def test_factors_do_not_depend_on_whether_colour_changes(name):
    colour = drawn(AugmentOptions(**{**STILL, name: (0.5, 1.5), "colour_probability": 0.5})).colour
    factor = colour[colour[:, 0, 0] != 1, 0, 0]
    assert within(np.histogram(factor, 20, (0.5, 1.5))[0], len(factor) / 20, 50)


def test_draws_are_independent_of_one_another():
    """Geometry, whether colour changes, and the factors are uncorrelated."""
    options = AugmentOptions(saturation=(1, 1), hue=(0, 0), colour_probability=1)
    parameters = drawn(options)
    slope, offset = parameters.colour[:, 0, 0].astype(float), parameters.colour[:, 0, 3].astype(float)
    brightness = slope + offset / RGB.mean[0]
    contrast = slope / brightness
    series = np.stack([parameters.dihedral & 1, parameters.dihedral >> 2, brightness, contrast])
    correlation = np.corrcoef(series) - np.eye(4)
    assert np.abs(correlation).max() < 0.025


def test_rgb_matrix_is_the_steps_one_after_another():
    pixels = np.random.default_rng(0).uniform(0, 255, (50, 3))
    options = AugmentOptions(
        brightness=(1.2, 1.2), contrast=(0.6, 0.6), saturation=(1.4, 1.4), hue=(0.1, 0.1), colour_probability=1
    )
    matrix = drawn(options, ids=MANY[:1]).colour[0]
    mean = np.array(RGB.mean)
    steps = (mean + 0.6 * (pixels - mean)) * 1.2
    grey = (steps * LUMA).sum(1, keepdims=True)
    steps = grey + 1.4 * (steps - grey)
    # A turn about (1, 1, 1): the part along it stays, the part across it is turned (cross product form).
    axis = np.ones(3) / np.sqrt(3)
    along = (steps @ axis)[:, None] * axis
    angle = 2 * np.pi * 0.1
    steps = along + np.cos(angle) * (steps - along) + np.sin(angle) * np.cross(axis, steps)
    np.testing.assert_allclose(applied(matrix, pixels), steps, atol=2e-4)


def test_hue_turns_red_towards_green_and_keeps_grey():
    matrix = drawn(AugmentOptions(**{**STILL, "hue": (1 / 3, 1 / 3)}), ids=MANY[:1]).colour[0]
    np.testing.assert_allclose(applied(matrix, np.array([[200.0, 0, 0]])), [[0, 200, 0]], atol=1e-3)
    np.testing.assert_allclose(applied(matrix, np.array([[77.0, 77, 77]])), [[77, 77, 77]], atol=1e-3)
    small = drawn(AugmentOptions(**{**STILL, "hue": (0.05, 0.05)}), ids=MANY[:1]).colour[0]
    turned = applied(small, np.array([[150.0, 90, 90]]))[0]
    hue = colorsys.rgb_to_hsv(*(turned / 255))[0]
    assert abs(hue - 0.05) < 0.01  # HSV's hue is the same angle but for the hexagon's corners


def test_equal_ends_switch_a_part_off():
    assert np.abs(drawn(AugmentOptions(**STILL)).colour - np.eye(3, 4)).max() < 1e-6


def test_other_bands_get_gain_and_offset_of_their_own():
    options = AugmentOptions(colour_probability=1, band_gain=(0.9, 1.1), band_offset=(-0.2, 0.2))
    colour = drawn(options, FOUR).colour
    gains = colour[:, range(4), range(4)]
    assert np.count_nonzero(colour[:, :, :4]) == gains.size  # nothing beside the diagonal
    offsets = (colour[:, :, 4] - (1 - gains) * np.array(FOUR.mean)) / np.array(FOUR.std)  # gains turn about the mean
    for series, limits in ((gains, (0.9, 1.1)), (offsets, (-0.2, 0.2))):
        for band in range(4):
            assert within(np.histogram(series[:, band], 20, limits)[0], 2000, 50)
    correlation = np.corrcoef(np.concatenate([gains.T, offsets.T])) - np.eye(8)
    assert np.abs(correlation).max() < 0.025


def test_what_lies_far_from_0_is_changed_no_more_than_what_lies_near_it():
    """A temperature in hundredths of a kelvin: a tenth of its value would be three of its deviations."""
    options = AugmentOptions(colour_probability=1)
    near, far = (BandFacts("uint16", (0,), (mean,), (1500.0,)) for mean in (3000.0, 41250.0))
    moves = [drawn(options, facts).colour @ [facts.mean[0], 1.0] - facts.mean[0] for facts in (near, far)]
    assert np.abs(moves[1]).max() < 0.11 * 1500
    np.testing.assert_allclose(moves[0], moves[1], atol=0.1)


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (("red", "green", "blue"), [0, 1, 2]),
        (("B4 red", "B3 green", "B2 blue"), [0, 1, 2]),
        (("band_1", "band_2", "band_3"), [0, 1, 2]),  # nothing is said, so it is taken for what it mostly is
        (("blue", "green", "red"), [2, 1, 0]),
        (("B2 - Blue", "B4 - Red", "B3 - Green"), [2, 0, 1]),
        (("red", "nir", "swir16"), None),
        (("swir22", "swir16", "coastal"), None),
        (("nir08", "red", "green"), None),
        (("rededge1", "red", "green"), None),
        (("Shortwave Infrared 2", "Shortwave Infrared 1", "Near Infrared"), None),
        (("dem", "slope", "aspect"), None),
        (("B", "G", "R"), [2, 1, 0]),
        (("N", "R", "G"), None),
        (("B4", "B3", "B2"), [0, 1, 2]),
        (("B02", "B03", "B04"), [2, 1, 0]),
        (("B12", "B8A", "B4"), None),
        (("B8", "B4", "B3"), None),
        (("b1", "b2", "b3"), [0, 1, 2]),
        (("", "", ""), [0, 1, 2]),
    ],
)
def test_hue_is_for_red_green_and_blue_by_name(names, order):
    facts = BandFacts("uint8", (0, 1, 2), RGB.mean, RGB.std, names)
    assert facts.rgb_order == (order and [order.index(n) for n in range(3)])
    colour = drawn(AugmentOptions(colour_probability=1), facts, MANY[:20]).colour
    if order is None:
        assert np.count_nonzero(colour[:, :, :3]) == colour[:, range(3), range(3)].size
        return
    mean = np.array(RGB.mean)[np.argsort(order)]  # of red, green, blue
    stored = BandFacts("uint8", (0, 1, 2), tuple(mean), RGB.std)
    expected = drawn(AugmentOptions(colour_probability=1), stored, MANY[:20]).colour
    np.testing.assert_allclose(colour, expected[:, order][:, :, [*order, 3]], atol=1e-5)


@pytest.mark.parametrize(
    ("names", "light", "order"),
    [
        (("band_1", "band_2", "band_3"), (490.0, 560.0, 665.0), [2, 1, 0]),
        (("B4", "B3", "B2"), (865.0, 655.0, 561.0), None),  # not the numbers of this sensor
        (("band_1", "band_2", "band_3"), (490.0, None, 665.0), [0, 1, 2]),
        (("pan", "red", "blue"), (590.0, 655.0, 482.0), None),  # of all light, whose middle is green
    ],
)
def test_wavelengths_say_what_numbers_do_not(names, light, order):
    assert BandFacts("uint8", (0, 1, 2), RGB.mean, RGB.std, names, light).rgb_order == order


@pytest.mark.parametrize("facts", [RGB, FOUR])
def test_parameters_do_not_depend_on_batching(facts):
    rng = np.random.default_rng(0)
    ids, epochs = rng.integers(0, 10**7, 60), rng.integers(0, 50, 60)
    whole = draw(AugmentOptions(), facts, 9, epochs, ids)
    for n in rng.permutation(60):
        one = draw(AugmentOptions(), facts, 9, epochs[n : n + 1], ids[n : n + 1])
        assert one.dihedral[0] == whole.dihedral[n]
        assert (one.colour[0] == whole.colour[n]).all()
    assert whole.colour.dtype == np.float32


def test_parameters_change_with_seed_epoch_and_record():
    base = drawn(AugmentOptions(colour_probability=1), ids=MANY[:100]).colour
    for other in ({"seed": 1}, {"epochs": 1}, {"ids": MANY[100:200]}):
        assert (
            (drawn(AugmentOptions(colour_probability=1), **{"ids": MANY[:100], **other}).colour != base)
            .any((1, 2))
            .all()
        )


def test_selected_bands_keep_their_draws_and_colours():
    chosen = BandFacts("uint16", (3, 1), FOUR.mean, FOUR.std)
    whole, part = (drawn(AugmentOptions(), facts, MANY[:50]).colour for facts in (FOUR, chosen))
    assert part.shape == (50, 2, 5)
    assert (part == whole[:, [3, 1]]).all()
    bgr = BandFacts("uint8", (2, 1, 0), RGB.mean, RGB.std)
    whole, part = (drawn(AugmentOptions(), facts, MANY[:50]).colour for facts in (RGB, bgr))
    assert (part == whole[:, [2, 1, 0]]).all()


def test_refuses_bands_that_are_not_there():
    for bands in ((0, 3), (), (1, 1), (-1,)):
        with pytest.raises(PipelineError, match="indices from 0 to 2"):
            BandFacts("uint8", bands, RGB.mean, RGB.std)
