"""Augmentation kernels on the CPU: arrays in, arrays out, serial and without the GIL.

Parallelism is over images, by threads that call these: numba's own threading layer must not be entered by several
callers at once. Arithmetic is float32, in a fixed order (no "fastmath"), so a result does not depend on threads or
batches. Rows are worked on as planes, a band after the other, because that is what the compiler can vectorise: twice
the speed of pixel by pixel. What most datasets need has a faster kernel of its own in pipelines.kernels_rgb.

Legend of shapes: H = W side of the tile, h = w side of the image, I bands of the record, C bands of the model.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    return cast(F, numba.njit(nogil=True, cache=True)(function))


@compiled
def _gather(flat, base, step, planes_IW):
    """Pixels at base, base + step, ... of a flattened image as planes of float32."""
    bands, width = planes_IW.shape
    if bands == 3:  # one walk over the pixels instead of three
        red, green, blue = planes_IW[0], planes_IW[1], planes_IW[2]
        for x in range(width):
            at = np.uint64(base + x * step)  # unsigned: no code for negative indices
            red[x] = flat[at]
            green[x] = flat[at + np.uint64(1)]
            blue[x] = flat[at + np.uint64(2)]
        return
    if abs(step) != bands:  # down a column: pixel by pixel, since each is a cache line of its own
        for x in range(width):
            at = np.uint64(base + x * step)
            for i in range(bands):
                planes_IW[i, x] = flat[at + np.uint64(i)]
        return
    for i in range(bands):
        plane = planes_IW[i]
        for x in range(width):
            plane[x] = flat[np.uint64(base + i + x * step)]


@compiled
def _mix(planes_IW, matrix, low, high, out_CW):
    """An affine map of the bands and a clamp."""
    bands, width = planes_IW.shape
    for c in range(matrix.shape[0]):
        out = out_CW[c]
        out[:] = matrix[c, bands]
        for i in range(bands):
            weight, plane = matrix[c, i], planes_IW[i]
            for x in range(width):
                out[x] += weight * plane[x]
        for x in range(width):
            out[x] = min(max(out[x], low), high)


@compiled
def _augmented_row(image_HWI, y, dihedral, matrix, low, high, planes_IW, out_CW):
    """Row y of the augmented image. The definition of a dihedral is pipelines.augment.apply_dihedral."""
    size, bands = image_HWI.shape[0], image_HWI.shape[2]
    down, right = (bands, size * bands) if dihedral & 4 else (size * bands, bands)
    base = (size - 1 - y if dihedral & 2 else y) * down
    if dihedral & 1:
        base, right = base + (size - 1) * right, -right
    _gather(image_HWI.reshape(-1), base, right, planes_IW)
    _mix(planes_IW, matrix, low, high, out_CW)


@compiled
def _store(values_CW, rounded, out_WC):
    """Planes into pixels: uint8 (rounded half to even; the values lie in its range) or float32 (as they are)."""
    if rounded:
        for c in range(values_CW.shape[0]):
            plane = values_CW[c]
            for x in range(plane.shape[0]):
                plane[x] = np.rint(plane[x])
    if values_CW.shape[0] == 3:
        red, green, blue = values_CW[0], values_CW[1], values_CW[2]
        for x in range(out_WC.shape[0]):
            out_WC[x, 0], out_WC[x, 1], out_WC[x, 2] = red[x], green[x], blue[x]
        return
    for c in range(values_CW.shape[0]):
        for x in range(out_WC.shape[0]):
            out_WC[x, c] = values_CW[c, x]


@compiled
def augment(image_HWI, dihedral, matrix, low, high, rounded, out_HWC):
    """Dihedral and colour in one pass over the pixels, at the tile's own size.

    image_HWI: uint8, uint16, int16 or float32, square, C-order. matrix: float32 [C, I + 1]. low, high: float32 limits
    of the result. out_HWC: uint8 with ``rounded``, or float32.
    """
    size = image_HWI.shape[0]
    planes_IW = np.empty((image_HWI.shape[2], size), np.float32)
    row_CW = np.empty((matrix.shape[0], size), np.float32)
    for y in range(size):
        _augmented_row(image_HWI, y, dihedral, matrix, low, high, planes_IW, row_CW)
        _store(row_CW, rounded, out_HWC[y])


@compiled
def augment_resize(image_HWI, dihedral, matrix, low, high, first, weights, rounded, out_hwC):
    """Dihedral, colour, and area resize with the taps of :func:`pipelines.resize.area_taps`; else as ``augment``."""
    height, count = image_HWI.shape[0], matrix.shape[0]
    size, taps = weights.shape
    planes_IW = np.empty((image_HWI.shape[2], height), np.float32)
    whole_HCW = np.empty((height, count, height), np.float32)
    for y in range(height):
        _augmented_row(image_HWI, y, dihedral, matrix, low, high, planes_IW, whole_HCW[y])
    column_CW = np.zeros((count, height + taps), np.float32)  # zeros on the right, for taps past the edge
    row_Cw = np.empty((count, size), np.float32)
    for y in range(size):
        column_CW[:, :height] = 0
        for tap in range(taps):
            # A tap past the edge weighs 0, so it may read any row.
            weight, source_CW = weights[y, tap], whole_HCW[min(first[y] + tap, height - 1)]
            for c in range(count):
                for x in range(height):
                    column_CW[c, x] += weight * source_CW[c, x]
        _shrink_row(column_CW, first, weights, row_Cw)
        _store(row_Cw, rounded, out_hwC[y])


@compiled
def _shrink_row(column_CW, first, weights, row_Cw):
    """Area resize of a row. Taps that reach past the edge weigh 0, and the column has room for them."""
    size, taps = weights.shape
    for c in range(column_CW.shape[0]):
        plane, out = column_CW[c], row_Cw[c]
        for x in range(size):
            at = np.uint64(first[x])  # unsigned: no code for negative indices
            total = np.float32(0)
            for tap in range(taps):
                total += weights[x, tap] * plane[at + np.uint64(tap)]
            out[x] = total


@compiled
def normalise(image_hwC, scale, offset, limit, bits_hwC):
    """float32 [h, w, C] times scale plus offset (float32 [C]), held within +-limit, as the bits of half precision.

    bits_hwC: uint16, C-order. limit: 65504 at most, the largest finite half. Halves are rounded half to even.
    """
    height, width, bands = image_hwC.shape
    count = width * bands
    scales, offsets = np.empty(count, np.float32), np.empty(count, np.float32)
    for n in range(count):
        scales[n], offsets[n] = scale[n % bands], offset[n % bands]
    values, lifted = np.empty(count, np.float32), np.empty(count, np.float32)
    for y in range(height):
        row = image_hwC[y].reshape(-1)
        for n in range(count):
            value = min(max(row[n] * scales[n] + offsets[n], -limit), limit)
            values[n], lifted[n] = value, abs(value) + np.float32(0.5)
        _half(values.view(np.uint32), lifted.view(np.uint32), bits_hwC[y].reshape(-1))


@compiled
def _half(single, lifted, half):
    """Bits of float32 to bits of half precision. lifted: those of the absolute value plus 0.5, whose last place is
    that of subnormal halves, so that the addition has rounded them."""
    for n in range(half.shape[0]):
        size = single[n] & np.uint32(0x7FFFFFFF)
        # The exponent's bias moves from 127 to 15; 13 bits go, rounded half to even.
        normal = (
            size - np.uint32(0x38000000) + np.uint32(0xFFF) + ((size >> np.uint32(13)) & np.uint32(1))
        ) >> np.uint32(13)
        subnormal = lifted[n] - np.uint32(0x3F000000)
        smallest_normal = np.uint32(0x38800000)
        sign = (single[n] >> np.uint32(16)) & np.uint32(0x8000)
        half[n] = np.uint16((subnormal if size < smallest_normal else normal) | sign)
