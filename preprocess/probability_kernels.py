"""Numba kernels for sheets that hold probabilities: arrays in, arrays out, no policy.

Legend of shapes: K classes, H rows, W columns of label pixels, h rows, w columns of a sheet's pixels; Y, X rows and
columns of cells.
"""

import numpy as np
from numba import njit

from preprocess.label_kernels import TIE, between

# What a pixel of a sheet can be.
SOUND, EMPTY, WRONG = 0, 1, 2


@njit(nogil=True, cache=True)
def normalise(bands_Khw, nodata, has_nodata, highest, shares_hwK, states_hw):
    """Fills shares_hwK (float32), which sum to 1 a pixel, and states_hw (uint8): SOUND, EMPTY or WRONG.

    EMPTY: a band is NaN or infinite, all hold the nodata value, or all are 0. WRONG: a negative number, or a sum above
    ``highest``.
    """
    classes, height, width = bands_Khw.shape
    for y in range(height):
        for x in range(width):
            total, lowest, known, finite = 0.0, 0.0, not has_nodata, True
            for k in range(classes):
                value = np.float64(bands_Khw[k, y, x])
                finite = finite and np.isfinite(value)
                known = known or value != nodata
                lowest = min(lowest, value)
                total += value
            state = SOUND
            if not (finite and known):
                state = EMPTY
            elif lowest < 0.0 or total > highest:
                state = WRONG
            elif total == 0.0:
                state = EMPTY
            states_hw[y, x] = state
            for k in range(classes):
                shares_hwK[y, x, k] = np.float64(bands_Khw[k, y, x]) / total if state == SOUND else 0.0


@njit(nogil=True, cache=True)
def gather_shares(shares_HWK, known_HW, lattice_LL2, sheet_hwK, states_hw, first, period):
    """Fills pixels of shares_HWK (float32) that known_HW (uint8) does not mark yet from a sheet's; both in place.

    lattice_LL2, first, period: as for :func:`preprocess.label_kernels.gather_labels`. Returns the sheet's (row, column)
    of a WRONG pixel that was met, or (-1, -1).
    """
    height, width = known_HW.shape
    sheet_height, sheet_width = states_hw.shape
    wrong_row, wrong_column = -1, -1
    for y in range(height):
        for x in range(width):
            if known_HW[y, x]:
                continue
            column, row = between(lattice_LL2, x, y, width, height)
            if not (np.isfinite(column) and np.isfinite(row)):
                continue
            column, row = column - first[0] + TIE, row - first[1] + TIE
            if period > 0:
                column = column % period
            c, r = int(np.floor(column)), int(np.floor(row))
            if not (0 <= c < sheet_width and 0 <= r < sheet_height) or states_hw[r, c] == EMPTY:
                continue
            if states_hw[r, c] == WRONG:
                wrong_row, wrong_column = r, c
                continue
            known_HW[y, x] = 1
            shares_HWK[y, x] = sheet_hwK[r, c]
    return wrong_row, wrong_column


@njit(nogil=True, cache=True)
def add_shares(sums_YXK, shares_HWK, known_HW, valid_HW, down_Y2, across_X2, kx, ky, first_row):
    """Adds the shares under each cell (see preprocess.cells) to sums_YXK, float64: those of sub-pixels that are known
    and lie in scene pixels with data.

    shares_HWK, known_HW: at kx by ky sub-pixels a scene pixel, from the scene row ``first_row`` on; valid_HW: all rows.
    A cell's pixels are added row by row, so its sums do not depend on where strips of the scene begin.
    """
    last_row = first_row + known_HW.shape[0] // ky
    for i in range(down_Y2.shape[0]):
        for y in range(max(down_Y2[i, 0], first_row), min(down_Y2[i, 1], last_row)):
            for j in range(across_X2.shape[0]):
                for x in range(across_X2[j, 0], across_X2[j, 1]):
                    if not valid_HW[y, x]:
                        continue
                    for sy in range((y - first_row) * ky, (y - first_row + 1) * ky):
                        for sx in range(x * kx, x * kx + kx):
                            if known_HW[sy, sx]:
                                for k in range(sums_YXK.shape[2]):
                                    sums_YXK[i, j, k] += shares_HWK[sy, sx, k]
