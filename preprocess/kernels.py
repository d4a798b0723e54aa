"""Numba kernels: arrays in, arrays out, no policy. Serial and without the GIL; parallelism is processes.

Legend of shapes: C bands, H rows, W columns, V values of an integer type.
"""

import numpy as np
from numba import njit


@njit(nogil=True, cache=True, inline="always")
def _level(value, low, scale):
    """Grey level of a value: (value - low) * scale, clipped to 0..255 and truncated."""
    stretched = (np.float64(value) - low) * scale
    # the comparison is false for NaN, which therefore becomes 0
    if stretched > 0.0:
        return np.uint8(255) if stretched >= 255.0 else np.uint8(stretched)
    return np.uint8(0)


@njit(nogil=True, cache=True)
def stretch_table(limits_C2, lowest, values):
    """Grey level of every value of an integer type, uint8 [C, V]; entry v stands for the value lowest + v.

    limits_C2: float64 (low, high) a band, low < high.
    """
    table_CV = np.empty((limits_C2.shape[0], values), np.uint8)
    for c in range(limits_C2.shape[0]):
        low, scale = limits_C2[c, 0], 255.0 / (limits_C2[c, 1] - limits_C2[c, 0])
        for v in range(values):
            table_CV[c, v] = _level(np.float64(lowest + v), low, scale)
    return table_CV


@njit(nogil=True, cache=True)
def stretch_by_table(grey_HWC, pixels_CHW, table_CV, lowest, valid_HW):
    """Grey levels of integer pixels into ``grey_HWC``, uint8; 0 where ``valid_HW`` is 0."""
    bands, height, width = pixels_CHW.shape
    for y in range(height):
        if bands == 3:  # so common that its loop is worth writing out: one pass writes whole pixels
            for x in range(width):
                keep = np.uint8(0) - valid_HW[y, x]  # all bits, or none
                grey_HWC[y, x, 0] = table_CV[0, np.uintp(np.int64(pixels_CHW[0, y, x]) - lowest)] & keep
                grey_HWC[y, x, 1] = table_CV[1, np.uintp(np.int64(pixels_CHW[1, y, x]) - lowest)] & keep
                grey_HWC[y, x, 2] = table_CV[2, np.uintp(np.int64(pixels_CHW[2, y, x]) - lowest)] & keep
        else:
            for c in range(bands):
                for x in range(width):
                    keep = np.uint8(0) - valid_HW[y, x]
                    grey_HWC[y, x, c] = table_CV[c, np.uintp(np.int64(pixels_CHW[c, y, x]) - lowest)] & keep


@njit(nogil=True, cache=True)
def stretch_by_arithmetic(grey_HWC, pixels_CHW, limits_C2, valid_HW):
    """The same for pixels of any type, without a table."""
    bands, height, width = pixels_CHW.shape
    for y in range(height):
        for c in range(bands):
            low, scale = limits_C2[c, 0], 255.0 / (limits_C2[c, 1] - limits_C2[c, 0])
            for x in range(width):
                grey_HWC[y, x, c] = _level(pixels_CHW[c, y, x], low, scale) if valid_HW[y, x] else np.uint8(0)


@njit(nogil=True, cache=True)
def interleave(pixels_HWC, pixels_CHW, valid_HW):
    """The same values as [H, W, C] into ``pixels_HWC``, 0 where the pixel has no data."""
    bands, height, width = pixels_CHW.shape
    for y in range(height):
        for c in range(bands):
            for x in range(width):
                pixels_HWC[y, x, c] = pixels_CHW[c, y, x] if valid_HW[y, x] else pixels_HWC.dtype.type(0)


def valid_pixels(pixels_CHW: np.ndarray, nodata_C: np.ndarray, has_nodata_C: np.ndarray) -> np.ndarray:
    """uint8 [H, W]: 0 where every band holds its nodata value, or any band is NaN or infinite.

    A band without a nodata value always holds data, so that a dark water pixel whose blue happens to equal
    nodata stays.
    """
    kind = pixels_CHW.dtype
    if kind.kind == "f":
        return _valid_floats(pixels_CHW, nodata_C.astype(kind), bool(has_nodata_C.all()))
    with np.errstate(invalid="ignore"):  # NaN becomes some number, which then is not NaN
        nodata = nodata_C.astype(kind)
    if not has_nodata_C.all() or (nodata != nodata_C).any():  # some band always holds data
        return np.ones(pixels_CHW.shape[1:], np.uint8)
    return _valid_integers(pixels_CHW, nodata)


@njit(nogil=True, cache=True)
def _valid_integers(pixels_CHW, nodata_C):
    """1 where a band differs from its nodata value of the same type."""
    bands, height, width = pixels_CHW.shape
    valid_HW = np.zeros((height, width), np.uint8)
    for y in range(height):
        valid = valid_HW[y]
        for c in range(bands):
            _or_differs(valid, pixels_CHW[c, y], nodata_C[c])
    return valid_HW


@njit(nogil=True, cache=True)
def _or_differs(valid_W, pixels_W, nodata):
    for x in range(len(valid_W)):
        valid_W[x] |= np.uint8(pixels_W[x] != nodata)


@njit(nogil=True, cache=True)
def _valid_floats(pixels_CHW, nodata_C, every_band_has_nodata):
    """1 where all bands are finite and, if every band has a nodata value, one differs from it."""
    bands, height, width = pixels_CHW.shape
    valid_HW = np.empty((height, width), np.uint8)
    largest = np.finfo(pixels_CHW.dtype).max
    for y in range(height):
        valid_W = valid_HW[y]
        valid_W[:] = not every_band_has_nodata
        for c in range(bands):
            pixels_W = pixels_CHW[c, y]
            if every_band_has_nodata:
                _or_differs(valid_W, pixels_W, nodata_C[c])
        for c in range(bands):
            pixels_W = pixels_CHW[c, y]
            for x in range(width):
                valid_W[x] &= np.uint8(abs(pixels_W[x]) <= largest)  # false for NaN
    return valid_HW


@njit(nogil=True, cache=True)
def _percentile(histogram_S, pixels, percent):
    """Percentile of the values a histogram counts, interpolated linearly between neighbours as NumPy does."""
    position = percent / 100 * (pixels - 1)
    below = int(np.floor(position))
    above = min(below + 1, pixels - 1)
    low = high = -1
    seen = 0
    for value in range(len(histogram_S)):
        seen += histogram_S[value]
        if low < 0 and seen > below:
            low = value
        if seen > above:
            high = value
            break
    return low + (high - low) * (position - below)


@njit(nogil=True, cache=True)
def grey_measures(histogram_S, bands, dark_below, bright_above):
    """(share of pixels below ``dark_below``, share above ``bright_above``, 99th minus 1st percentile, mean, highest)
    of the mean grey level over ``bands``, from :func:`grey_sum_histogram`."""
    pixels = dark = bright = total = brightest = 0
    for value in range(len(histogram_S)):
        count = histogram_S[value]
        if count:
            pixels += count
            total += count * value
            brightest = value
            if value / bands < dark_below:
                dark += count
            if value / bands > bright_above:
                bright += count
    contrast = (_percentile(histogram_S, pixels, 99.0) - _percentile(histogram_S, pixels, 1.0)) / bands
    return dark / pixels, bright / pixels, contrast, total / pixels / bands, brightest / bands


@njit(nogil=True, cache=True)
def count_values(counts_CV, pixels_CHW, valid_HW, lowest):
    """Counts integer pixels by band and value - lowest, in place, where ``valid_HW`` is 1 and their sum is not 0."""
    bands, height, width = pixels_CHW.shape
    for y in range(height):
        for x in range(width):
            total = 0
            for c in range(bands):
                total += np.int64(pixels_CHW[c, y, x])
            if valid_HW[y, x] and total != 0:
                for c in range(bands):
                    counts_CV[c, np.int64(pixels_CHW[c, y, x]) - lowest] += 1
