"""Area resize: an output pixel is the mean of the input over the square it covers, by exact overlap.

Where the ratio of the sides is no whole number this differs from torch's ``interpolate(mode="area")``, which takes
whole input pixels, some of them for two neighbours at once: here each input pixel counts as often as any other.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, eq=False)
class AreaTaps:
    """For each output pixel of one axis: its first input pixel (int64 [out]) and weights (float32 [out, taps])."""

    first: np.ndarray
    weights: np.ndarray


def area_matrix(size: int, out: int) -> np.ndarray:
    """float64 [out, size]: share of each input pixel in each output pixel; rows sum to 1."""
    if not 0 < out <= size:
        raise ValueError(f"an area resize makes images smaller: expected 1..{size}, got {out}")
    # Everything in units of 1/out of an input pixel, where all edges are whole numbers and nothing is rounded.
    low, high = np.arange(out)[:, None] * size, (np.arange(out)[:, None] + 1) * size
    left, right = np.arange(size) * out, (np.arange(size) + 1) * out
    overlap = np.minimum(high, right) - np.maximum(low, left)
    return np.maximum(overlap, 0) / size


def area_taps(size: int, out: int) -> AreaTaps:
    """The matrix without its zeros."""
    matrix = area_matrix(size, out)
    first = (matrix > 0).argmax(1)
    taps = int((matrix > 0).sum(1).max())
    columns = first[:, None] + np.arange(taps)
    weights = np.where(columns < size, np.take_along_axis(matrix, np.minimum(columns, size - 1), 1), 0.0)
    return AreaTaps(first.astype(np.int64), np.ascontiguousarray(weights, np.float32))
