"""Numba kernels: arrays in, arrays out, no policy. Serial and without the GIL; parallelism is processes.

Legend of shapes: C bands, H rows, W columns, T tiles, K classes, S grey-level sums (255 * C + 1).
"""

import numpy as np
from numba import njit


@njit(nogil=True, cache=True)
def stretch_to_uint8(pixels_CHW, limits_C2, valid_HW):
    """Grey levels uint8 [H, W, C]: (v - low) / (high - low) * 255, clipped to 0..255, truncated; 0 without data.

    limits_C2: float64 (low, high) a band, low < high. valid_HW: uint8, 0 where the pixel has no data.
    """
    bands, height, width = pixels_CHW.shape
    grey_HWC = np.empty((height, width, bands), np.uint8)
    for c in range(bands):
        low, high = limits_C2[c, 0], limits_C2[c, 1]
        scale = 255.0 / (high - low)
        for y in range(height):
            for x in range(width):
                value = (np.float64(pixels_CHW[c, y, x]) - low) * scale
                # the comparisons are false for NaN, which therefore becomes 0
                level = np.uint8(0)
                if valid_HW[y, x] and value > 0.0:
                    level = np.uint8(255) if value >= 255.0 else np.uint8(value)
                grey_HWC[y, x, c] = level
    return grey_HWC


@njit(nogil=True, cache=True)
def interleave(pixels_CHW, valid_HW):
    """The same values as [H, W, C], 0 where the pixel has no data."""
    bands, height, width = pixels_CHW.shape
    pixels_HWC = np.empty((height, width, bands), pixels_CHW.dtype)
    for c in range(bands):
        for y in range(height):
            for x in range(width):
                pixels_HWC[y, x, c] = pixels_CHW[c, y, x] if valid_HW[y, x] else 0
    return pixels_HWC


@njit(nogil=True, cache=True)
def valid_pixels(pixels_CHW, nodata_C, has_nodata_C):
    """uint8 [H, W]: 0 where every band holds its nodata value, or any band is NaN or infinite.

    A band without a nodata value always holds data, so that a dark water pixel whose blue happens to equal
    nodata stays.
    """
    bands, height, width = pixels_CHW.shape
    valid_HW = np.empty((height, width), np.uint8)
    for y in range(height):
        for x in range(width):
            data, finite = False, True
            for c in range(bands):
                value = np.float64(pixels_CHW[c, y, x])
                finite = finite and np.isfinite(value)
                data = data or not has_nodata_C[c] or value != nodata_C[c]
            valid_HW[y, x] = 1 if data and finite else 0
    return valid_HW


@njit(nogil=True, cache=True)
def grey_sum_histogram(grey_HWC):
    """How many pixels have each sum over bands, int64 [S]; the mean grey level is the sum divided by C."""
    height, width, bands = grey_HWC.shape
    histogram_S = np.zeros(255 * bands + 1, np.int64)
    for y in range(height):
        for x in range(width):
            total = 0
            for c in range(bands):
                total += grey_HWC[y, x, c]
            histogram_S[total] += 1
    return histogram_S


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
def integer_sums(pixels_HWC):
    """Sum and sum of squares of each band, int64 [2, C]: exact, so any order of adding gives the same."""
    height, width, bands = pixels_HWC.shape
    sums_2C = np.zeros((2, bands), np.int64)
    for y in range(height):
        for x in range(width):
            for c in range(bands):
                value = np.int64(pixels_HWC[y, x, c])
                sums_2C[0, c] += value
                sums_2C[1, c] += value * value
    return sums_2C


@njit(nogil=True, cache=True)
def float_sums(pixels_HWC):
    """Sum and sum of squares of each band, float64 [2, C], added row by row."""
    height, width, bands = pixels_HWC.shape
    sums_2C = np.zeros((2, bands), np.float64)
    for y in range(height):
        for x in range(width):
            for c in range(bands):
                value = np.float64(pixels_HWC[y, x, c])
                sums_2C[0, c] += value
                sums_2C[1, c] += value * value
    return sums_2C


@njit(nogil=True, cache=True)
def _between(lattice_LL2, x, y, width, height):
    """A lattice's two coordinates at the centre of pixel (x, y) of a grid of width x height pixels.

    The lattice's nodes lie evenly from the centre of the first pixel to that of the last; one node a pixel is
    taken as it is, since next to a node that is NaN even a weight of 0 would give NaN.
    """
    rows, columns = lattice_LL2.shape[0] - 1, lattice_LL2.shape[1] - 1
    if rows + 1 == height and columns + 1 == width:
        return lattice_LL2[y, x, 0], lattice_LL2[y, x, 1]
    u, v = x * columns / max(width - 1, 1), y * rows / max(height - 1, 1)
    i, j = min(int(u), columns - 1), min(int(v), rows - 1)
    u, v = u - i, v - j
    w00, w01, w10, w11 = (1 - u) * (1 - v), u * (1 - v), (1 - u) * v, u * v
    a, b, c, d = lattice_LL2[j, i], lattice_LL2[j, i + 1], lattice_LL2[j + 1, i], lattice_LL2[j + 1, i + 1]
    return (
        w00 * a[0] + w01 * b[0] + w10 * c[0] + w11 * d[0],
        w00 * a[1] + w01 * b[1] + w10 * c[1] + w11 * d[1],
    )


@njit(nogil=True, cache=True)
def gather_labels(
    labels_HW, nodata, lattice_LL2, codes_hw, lookup, lookup_offset, first, period, lonlat_LL2, domain, use_domain
):
    """Fills pixels of ``labels_HW`` (uint8, in place) that are still ``nodata`` from one land-cover sheet.

    lattice_LL2: sheet pixel coordinates (column, row) at nodes spread over the label grid (see _between). NaN marks
        ground the sheet's CRS cannot express.
    codes_hw: the sheet's codes from pixel ``first`` = (column, row) on. lookup: class of code + lookup_offset.
    period: columns after which the sheet repeats (360 degrees), 0 if it does not.
    lonlat_LL2, domain: longitudes and latitudes at nodes of their own, and (west, south, east, north): with
        ``use_domain`` only pixels inside are filled; longitudes count modulo 360.
    """
    height, width = labels_HW.shape
    sheet_height, sheet_width = codes_hw.shape
    for y in range(height):
        for x in range(width):
            if labels_HW[y, x] != nodata:
                continue
            if use_domain:
                lon, lat = _between(lonlat_LL2, x, y, width, height)
                if not ((lon - domain[0]) % 360.0 < domain[2] - domain[0] and domain[1] <= lat < domain[3]):
                    continue
            column, row = _between(lattice_LL2, x, y, width, height)
            if not (np.isfinite(column) and np.isfinite(row)):
                continue
            column, row = column - first[0], row - first[1]
            if period > 0:
                column = column % period
            c, r = int(np.floor(column)), int(np.floor(row))
            if 0 <= c < sheet_width and 0 <= r < sheet_height:
                labels_HW[y, x] = lookup[np.int64(codes_hw[r, c]) + lookup_offset]


@njit(nogil=True, cache=True)
def add_tile_histograms(counts_T256, labels_HW, valid_HW, origins_T2, size, kx, ky, first_row):
    """Counts the labels under each tile, in place: sub-pixels of valid scene pixels by label value, int64 [T, 256].

    labels_HW: uint8 at kx by ky sub-pixels a scene pixel, for the scene rows from ``first_row`` on.
    valid_HW: uint8 a scene pixel, all rows. origins_T2: first (column, row) of each tile in scene pixels.
    """
    last_row = first_row + labels_HW.shape[0] // ky
    for t in range(origins_T2.shape[0]):
        left, top = origins_T2[t, 0], origins_T2[t, 1]
        for y in range(max(top, first_row), min(top + size, last_row)):
            for x in range(left, left + size):
                if not valid_HW[y, x]:
                    continue
                for sy in range((y - first_row) * ky, (y - first_row + 1) * ky):
                    for sx in range(x * kx, x * kx + kx):
                        counts_T256[t, labels_HW[sy, sx]] += 1
