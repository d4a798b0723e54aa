"""Numba kernels that count by cell (see preprocess.cells). Serial and without the GIL; arrays in, arrays out.

Legend of shapes: Y, X rows and columns of cells; H, W rows and columns of pixels; C bands; V values counted.
``down_Y2`` and ``across_X2`` hold the first pixel and the end of each cell, int64. A cell is counted into small
histograms that stay in the nearest cache, several in turn, since equal neighbours would wait for one another's sum.
"""

import numpy as np
from numba import njit

COLUMNS = 1024  # a multiple of any vector's length


@njit(nogil=True, cache=True)
def _sums_of_three(sums_W, row_V):
    for x in range(len(sums_W)):
        sums_W[x] = np.uint32(row_V[3 * x]) + np.uint32(row_V[3 * x + 1]) + np.uint32(row_V[3 * x + 2])


@njit(nogil=True, cache=True)
def _sums_of_bands(sums_W, row_V):
    bands = len(row_V) // len(sums_W)
    for x in range(len(sums_W)):
        total = np.uint32(0)
        for c in range(bands):
            total += np.uint32(row_V[x * bands + c])
        sums_W[x] = total


@njit(nogil=True, cache=True)
def grey_sum_histograms(counts_YXS, grey_HWC, down_Y2, across_X2):
    """Counts pixels by the sum of their bands (0 to 255 * C) into ``counts_YXS``, uint32, which begins at 0.

    A row's sums first, many at once; then one count after the other."""
    width, bands = grey_HWC.shape[1:]
    sums_W, odd_XS = np.empty(width, np.uint32), np.empty(counts_YXS.shape[1:], np.uint32)
    for i in range(down_Y2.shape[0]):
        odd_XS[:] = 0
        for y in range(down_Y2[i, 0], down_Y2[i, 1]):
            row_V = grey_HWC[y].reshape(-1)
            if bands == 3:  # so common that its loop is worth writing out
                _sums_of_three(sums_W, row_V)
            else:
                _sums_of_bands(sums_W, row_V)
            for j in range(across_X2.shape[0]):
                even, odd = counts_YXS[i, j], odd_XS[j]
                left, right = across_X2[j, 0], across_X2[j, 1]
                for x in range(left, right - 1, 2):
                    even[np.uintp(sums_W[x])] += np.uint32(1)
                    odd[np.uintp(sums_W[x + 1])] += np.uint32(1)
                if (right - left) % 2:
                    even[np.uintp(sums_W[right - 1])] += np.uint32(1)
        for j in range(across_X2.shape[0]):
            for s in range(counts_YXS.shape[2]):
                counts_YXS[i, j, s] += odd_XS[j, s]


@njit(nogil=True, cache=True)
def count_valid(counts_YX1, valid_HW, down_Y2, across_X2):
    """Counts pixels that are 1 (of 0 and 1) into ``counts_YX1``, uint32."""
    column_W = np.empty(valid_HW.shape[1], np.uint32)
    for i in range(down_Y2.shape[0]):
        column_W[:] = 0
        for y in range(down_Y2[i, 0], down_Y2[i, 1]):
            for x in range(len(column_W)):
                column_W[x] += np.uint32(valid_HW[y, x])
        for j in range(across_X2.shape[0]):
            for x in range(across_X2[j, 0], across_X2[j, 1]):
                counts_YX1[i, j, 0] += column_W[x]


@njit(nogil=True, cache=True)
def band_sums(sums_YXV, pixels_HWC, down_Y2, across_X2, column_V, squares_V):
    """Adds each band's sum and sum of squares to ``sums_YXV``: [..., :C] and [..., C:], int64 or float64.

    column_V, squares_V: room for the sums down the columns of a row of cells, [W * C], wide enough for one: uint32
    for 8-bit pixels, int64 for 16-bit ones, float64. Columns first, because neighbours in memory then add to
    neighbours, many at once.
    """
    bands = pixels_HWC.shape[2]
    for i in range(down_Y2.shape[0]):
        column_V[:] = 0
        squares_V[:] = 0
        for y in range(down_Y2[i, 0], down_Y2[i, 1]):
            row = pixels_HWC[y].reshape(-1)
            for v in range(len(row)):
                value = column_V.dtype.type(row[v])
                column_V[v] += value
                squares_V[v] += value * value
        for j in range(across_X2.shape[0]):
            for v in range(across_X2[j, 0] * bands, across_X2[j, 1] * bands):
                c = v % bands
                sums_YXV[i, j, c] += column_V[v]
                sums_YXV[i, j, bands + c] += squares_V[v]


@njit(nogil=True, cache=True)
def leave_out(labels_HW, valid_HW, label, kx, ky, first_row):
    """Gives ``label`` to the kx by ky sub-pixels of scene pixels without data (``valid_HW`` 0), in place.

    labels_HW begins at the scene row ``first_row``; valid_HW holds all rows.
    """
    for y in range(labels_HW.shape[0] // ky):
        whole = np.uint8(1)
        for x in range(valid_HW.shape[1]):
            whole &= valid_HW[first_row + y, x]
        if whole:
            continue
        for x in range(valid_HW.shape[1]):
            if not valid_HW[first_row + y, x]:
                labels_HW[y * ky : (y + 1) * ky, x * kx : (x + 1) * kx] = label


@njit(nogil=True, cache=True)
def _add_where_equal(count_W, labels_W, label):
    for x in range(len(count_W)):
        count_W[x] += np.uint8(labels_W[x] == label)


@njit(nogil=True, cache=True)
def label_counts(counts_YXK, labels_HW, down_Y2, across_X2, kx, ky, first_row):
    """Counts the labels 0 to K - 1 (uint8, at kx by ky sub-pixels a scene pixel) into ``counts_YXK``, int64.

    labels_HW begins at the scene row ``first_row``. A comparison for every class, many pixels at once, is faster than
    one counter after the other: equal neighbours, and land cover is made of them, would wait for one another's sum.
    Columns first and cells afterwards, since cells are too narrow for that; so many columns at a time that their
    counters stay in the nearest cache.
    """
    classes, width = counts_YXK.shape[2], labels_HW.shape[1]
    last_row = first_row + labels_HW.shape[0] // ky
    column_KW = np.empty((classes, COLUMNS), np.uint8)
    for i in range(down_Y2.shape[0]):
        top = (max(down_Y2[i, 0], first_row) - first_row) * ky
        bottom = (min(down_Y2[i, 1], last_row) - first_row) * ky
        for begin in range(top, bottom, 255):  # as many rows as 8 bits can count
            for left in range(0, width, COLUMNS):
                right = min(left + COLUMNS, width)
                column_KW[:] = 0
                for y in range(begin, min(begin + 255, bottom)):
                    row = labels_HW[y, left:right]
                    for k in range(classes):
                        _add_where_equal(column_KW[k, : right - left], row, np.uint8(k))
                for j in range(across_X2.shape[0]):
                    first, end = max(across_X2[j, 0] * kx, left) - left, min(across_X2[j, 1] * kx, right) - left
                    if first < end:
                        for k in range(classes):
                            counts_YXK[i, j, k] += column_KW[k, first:end].sum()


@njit(nogil=True, cache=True)
def add_ranges(out_TUV, counted_YXV, first_T, last_T, first_U, last_U):
    """out[t, u] += the sum of counted[first_T[t]:last_T[t], first_U[u]:last_U[u]]."""
    values = counted_YXV.shape[2]
    column_XV = np.empty(counted_YXV.shape[1:], out_TUV.dtype)
    for t in range(len(first_T)):
        column_XV[:] = 0
        for y in range(first_T[t], last_T[t]):
            for x in range(counted_YXV.shape[1]):
                for v in range(values):
                    column_XV[x, v] += counted_YXV[y, x, v]
        for u in range(len(first_U)):
            for x in range(first_U[u], last_U[u]):
                for v in range(values):
                    out_TUV[t, u, v] += column_XV[x, v]
