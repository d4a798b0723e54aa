"""Stretch limits of a scene from a regular sample of its pixels."""

import numpy as np

from preprocess import masks
from preprocess.options import MaskOptions, PackOptions
from preprocess.pixels import read_valid
from preprocess.raster import Scene

MAX_SAMPLES = 4_000_000


def sample_strides(width: int, height: int) -> tuple[int, int]:
    """(columns, rows) between sampled pixels: one pixel in 20, fewer where that would be over MAX_SAMPLES."""
    across, down = 5, 4
    while (width // across) * (height // down) > MAX_SAMPLES:
        across, down = across * 2, down * 2
    return across, down


def stretch_limits(scene: Scene, bands: tuple[int, ...], options: PackOptions) -> np.ndarray:
    """(low, high) of each band, float64 [C, 2], low < high, in the scene's units.

    Percentiles of a regular sample of pixels that have data, that no mask beside the scene speaks against, and whose
    mean over bands is not 0 (the fill of scenes that name no nodata), over all bands together (`joint`, and for
    previews where the mode is `none`) or each by itself (`per_band`). Negative values, such as decibels, are data.
    """
    stretch = options.stretch
    if stretch.limits is not None:
        return np.array(stretch.limits * (len(bands) if len(stretch.limits) == 1 else 1), np.float64)
    sample_NC = _sample(scene, bands, options.mask)
    if not len(sample_NC):
        return np.tile([0.0, 1.0], (len(bands), 1))
    if stretch.mode == "per_band":
        limits = np.percentile(sample_NC, stretch.percentiles, axis=0).T.astype(np.float64)
    else:
        limits = np.tile(np.percentile(sample_NC, stretch.percentiles).astype(np.float64), (len(bands), 1))
    limits[:, 1] = np.maximum(limits[:, 1], limits[:, 0] + 1e-6)  # a constant scene; its tiles are rejected as flat
    return limits


def _sample(scene: Scene, bands: tuple[int, ...], mask: MaskOptions) -> np.ndarray:
    """Sampled values [N, C] in the scene's dtype, read strip by strip."""
    across, down = sample_strides(scene.place.width, scene.place.height)
    row_bytes = scene.place.width * len(bands) * np.dtype(scene.dtype).itemsize
    strip = max(down, min(512, (64 << 20) // row_bytes) // down * down)
    parts = []
    for top in range(0, scene.place.height, strip):
        window = (0, top, scene.place.width, min(strip, scene.place.height - top))
        pixels, valid = read_valid(scene, bands, window)
        if scene.mask is not None:
            valid &= 1 - masks.masked_pixels(scene.mask, scene.place.window(*window), mask)
        values = pixels[:, ::down, ::across].reshape(len(bands), -1).T
        keep = (valid[::down, ::across].ravel() != 0) & (values.mean(axis=1, dtype=np.float64) != 0)
        parts.append(values[keep])
    return np.concatenate(parts)
