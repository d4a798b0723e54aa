"""A band on a coarser grid brought to the scene's: which of its pixels lie under which of the scene's, and resampling.

Both grids must have one CRS and parallel axes; sizes of pixels and origins may differ. Positions are computed from
the scene's own pixel numbers, never from a window's, so a scene read in parts gives the values of one read whole.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numba
import numpy as np

from preprocess.grid import Grid

Window = tuple[int, int, int, int]
Method = Literal["nearest", "bilinear"]

# Scale and offset are taken for the simple fraction near them, so that 10 m in 20 m is 0.5 and not 0.49999999997, if
# the difference is below this many pixels from edge to edge of the scene.
SAME = 0.01
SIMPLE = 64  # largest denominator of such a fraction
# Axes count as parallel if they part by less than this many pixels of the band from edge to edge of the scene.
PARALLEL = 0.05
# Where a scene's pixel centre falls on the border of two pixels (Landsat's 15 m in its 30 m), the next one is nearest.
BORDER = 1e-6
# A half rounds up. Weights of sixths (10 m in 60 m) are not exact in binary: a mean this much below a half is one.
TIE = 1e-6


@dataclass(frozen=True, slots=True)
class Alignment:
    """How a band's grid lies under the scene's. A scene column c is at column ``scale[0] * c + offset[0]`` of the band,
    a row likewise by the second of each; integers are edges, halves are centres. width, height: the band's own."""

    width: int
    height: int
    scale: tuple[float, float]
    offset: tuple[float, float]
    method: Method

    def covers(self, width: int, height: int) -> bool:
        """Whether every pixel centre of a scene of this size lies in the band's ground."""
        return all(
            scale * 0.5 + offset >= -BORDER and scale * (length - 0.5) + offset < own + BORDER
            for scale, offset, length, own in zip(
                self.scale, self.offset, (width, height), (self.width, self.height), strict=True
            )
        )

    def source(self, window: Window) -> Window | None:
        """The band's pixels that a window of the scene is made from, one more on each side; None if it has none."""
        parts = []
        for axis, own in enumerate((self.width, self.height)):
            first, length = window[axis], window[axis + 2]
            low = math.floor(self.scale[axis] * (first + 0.5) + self.offset[axis]) - 1
            high = math.floor(self.scale[axis] * (first + length - 0.5) + self.offset[axis]) + 2
            low, high = max(0, low), min(own, high)
            if high <= low:
                return None
            parts.append((low, high - low))
        return parts[0][0], parts[1][0], parts[0][1], parts[1][1]

    def nearest(self, source: Window, window: Window) -> tuple[np.ndarray, np.ndarray]:
        """(columns, rows) in ``source`` of the pixels nearest to the window's; -1 where the band does not reach."""
        return _places(self, 0, source, window)[0], _places(self, 1, source, window)[0]

    def resample(
        self, source_HW: np.ndarray, valid_HW: np.ndarray, source: Window, window: Window, nodata: float | None
    ) -> np.ndarray:
        """The pixels of a window of the scene; 0 where the band does not reach.

        source_HW, valid_HW: the band's pixels in ``source`` and which of them hold data (uint8). The pixel nearest to
        the centre decides whether there is data: where it holds none, its own value is taken, nodata or NaN; where it
        does, interpolation is over the valid ones of the four around it and never comes to ``nodata``.
        """
        out = np.zeros((window[3], window[2]), source_HW.dtype)
        columns, rows = (_places(self, axis, source, window) for axis in (0, 1))
        bilinear, whole = self.method == "bilinear", source_HW.dtype.kind != "f"
        missing = np.nan if nodata is None else float(nodata)  # no value equals NaN
        if not whole:
            missing = float(source_HW.dtype.type(missing))
        (nx, x0, x1, wx), (ny, y0, y1, wy) = columns, rows
        _resample(source_HW, valid_HW, out, nx, x0, x1, wx, ny, y0, y1, wy, bilinear, missing, whole)
        return out


def align(scene: Grid, band: Grid, method: Method) -> Alignment | None:
    """How ``band`` lies under ``scene``, both in one CRS; None if they are the same grid.

    Raises ValueError if their axes are not parallel, the band's pixels are finer, or they share no ground.
    """
    columns, rows = band.pixel(*scene.xy(np.array([0, scene.width, 0]), np.array([0, 0, scene.height])))
    if abs(rows[1] - rows[0]) > PARALLEL or abs(columns[2] - columns[0]) > PARALLEL:
        raise ValueError("its axes are turned against those of the others")
    scale = (
        _simple(float(columns[1] - columns[0]) / scene.width, SAME / scene.width),
        _simple(float(rows[2] - rows[0]) / scene.height, SAME / scene.height),
    )
    offset = _simple(float(columns[0]), SAME), _simple(float(rows[0]), SAME)
    if min(scale) <= 0:
        raise ValueError("its rows or columns run the other way")
    if max(scale) > 1 + PARALLEL / max(scene.width, scene.height):
        raise ValueError("its pixels are finer along one axis and coarser along the other")
    same_size = (band.width, band.height) == (scene.width, scene.height)
    if same_size and scale == (1, 1) and offset == (0, 0):
        return None
    aligned = Alignment(band.width, band.height, scale, offset, method)
    if aligned.source((0, 0, scene.width, scene.height)) is None:
        raise ValueError("it shares no ground with the others")
    return aligned


def _simple(value: float, tolerance: float) -> float:
    """The simple fraction near a value, or the value."""
    near = Fraction(value).limit_denominator(SIMPLE)
    return float(near) if abs(float(near) - value) < tolerance else value


def _places(
    aligned: Alignment, axis: int, source: Window, window: Window
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Along an axis, for each scene pixel of the window: the nearest pixel and the two that interpolation takes, as
    numbers in ``source``, and the weight of the second. A nearest of -1 says that the band ends before."""
    numbers = np.arange(window[axis], window[axis] + window[axis + 2], dtype=np.float64)
    at = aligned.scale[axis] * (numbers + 0.5) + aligned.offset[axis]
    own = (aligned.width, aligned.height)[axis]
    outside = (at < -BORDER) | (at >= own + BORDER)
    nearest = np.clip(np.floor(at + BORDER), 0, own - 1)
    first = np.floor(at - 0.5)
    weight = at - 0.5 - first
    low, high = np.clip(first, 0, own - 1), np.clip(first + 1, 0, own - 1)
    start, most = source[axis], source[axis + 2] - 1
    numbered = [np.clip(part - start, 0, most).astype(np.int64) for part in (nearest, low, high)]
    numbered[0][outside] = -1
    return numbered[0], numbered[1], numbered[2], weight


@numba.njit(nogil=True, cache=True)
def _resample(source, valid, out, nx, x0, x1, wx, ny, y0, y1, wy, bilinear, nodata, whole):
    """The work of :meth:`Alignment.resample` on arrays."""
    for r in range(out.shape[0]):
        for c in range(out.shape[1]):
            row, column = ny[r], nx[c]
            if row < 0 or column < 0:
                continue
            if not bilinear or valid[row, column] == 0:
                out[r, c] = source[row, column]
                continue
            total = 0.0
            weights = 0.0
            for i in range(2):
                for j in range(2):
                    y = y1[r] if i else y0[r]
                    x = x1[c] if j else x0[c]
                    if valid[y, x]:
                        weight = (wy[r] if i else 1 - wy[r]) * (wx[c] if j else 1 - wx[c])
                        total += weight * source[y, x]
                        weights += weight
            value = total / weights
            if whole:
                value = np.floor(value + 0.5 + TIE)
            out[r, c] = value
            if out[r, c] == nodata:  # data must not turn into none by interpolation
                out[r, c] = source[row, column]
