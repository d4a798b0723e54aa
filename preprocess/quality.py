"""Which tiles are worth training on: rules on the grey levels of a tile's preview.

The published rules (Li et al. 2021, code) look at the mean over bands of the stretched tile. That mean takes
255 * C + 1 values only, so one histogram holds all that the rules ask, exactly.
"""

from typing import NamedTuple

import numpy as np

from preprocess import kernels
from preprocess.options import QualityOptions

REASONS = ("nodata", "dark", "dark_share", "flat", "bright_share")


class Measures(NamedTuple):
    """Of a tile: the share of its pixels that have data, and of its mean over bands: the shares of dark and of bright
    pixels, the 99th minus the 1st percentile, the mean, and the highest level, all in grey levels of 0 to 255."""

    valid_pixels: float
    dark_share: float
    bright_share: float
    contrast: float
    brightness: float
    brightest: float


def measures(histogram_S: np.ndarray, bands: int, valid_share: float, rules: QualityOptions) -> Measures:
    """What the rules look at.

    histogram_S: pixels by sum of grey levels over ``bands`` (cell_kernels.grey_sum_histograms).
    valid_share: share of the tile's pixels that have data.
    """
    return Measures(valid_share, *kernels.grey_measures(histogram_S, bands, rules.dark_below, rules.bright_above))


def rejection(found: Measures, rules: QualityOptions) -> str | None:
    """The first rule that a tile breaks, one of REASONS, or None if it is kept."""
    if found.valid_pixels < rules.min_valid_pixels:
        return "nodata"
    if rules.min_brightest is not None and found.brightest < rules.min_brightest:
        return "dark"
    if rules.max_dark_fraction is not None and found.dark_share > rules.max_dark_fraction:
        return "dark_share"
    if rules.min_contrast is not None and found.contrast < rules.min_contrast:
        return "flat"
    if rules.max_bright_fraction is not None and found.bright_share > rules.max_bright_fraction:
        return "bright_share"
    return None
