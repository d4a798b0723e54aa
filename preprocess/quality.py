"""Which tiles are worth training on: rules on the grey levels of a tile's preview.

The published rules (Li et al. 2021, code) look at the mean over bands of the stretched tile. That mean takes
255 * C + 1 values only, so one histogram holds all that the rules ask, exactly.
"""

import numpy as np

from preprocess.options import QualityOptions

REASONS = ("nodata", "dark", "dark_share", "flat", "bright_share")


def percentile(histogram_S: np.ndarray, percent: float) -> float:
    """Percentile of the values a histogram counts, interpolated linearly between neighbours as NumPy does."""
    ends = np.cumsum(histogram_S)
    position = percent / 100 * (ends[-1] - 1)
    below = int(np.floor(position))
    low = int(np.searchsorted(ends, below, side="right"))
    high = int(np.searchsorted(ends, min(below + 1, ends[-1] - 1), side="right"))
    return low + (high - low) * (position - below)


def rejection(histogram_S: np.ndarray, bands: int, valid_share: float, rules: QualityOptions) -> str | None:
    """The first rule that a tile breaks, one of REASONS, or None if it is kept.

    histogram_S: pixels by sum of grey levels over ``bands`` (kernels.grey_sum_histogram).
    valid_share: share of the tile's pixels that have data.
    """
    pixels = int(histogram_S.sum())
    level = np.arange(len(histogram_S)) / bands
    if valid_share < rules.min_valid_pixels:
        return "nodata"
    if rules.min_brightest is not None and level[np.flatnonzero(histogram_S)[-1]] < rules.min_brightest:
        return "dark"
    dark = int(histogram_S[level < rules.dark_below].sum())
    if rules.max_dark_fraction is not None and dark / pixels > rules.max_dark_fraction:
        return "dark_share"
    if rules.min_contrast is not None:
        contrast = (percentile(histogram_S, 99) - percentile(histogram_S, 1)) / bands
        if contrast < rules.min_contrast:
            return "flat"
    bright = int(histogram_S[level > rules.bright_above].sum())
    if rules.max_bright_fraction is not None and bright / pixels > rules.max_bright_fraction:
        return "bright_share"
    return None
