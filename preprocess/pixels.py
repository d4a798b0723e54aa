"""A scene's pixels together with which of them hold data."""

import numpy as np

from preprocess import kernels, raster
from preprocess.raster import Scene


def read_valid(
    scene: Scene, bands: tuple[int, ...], window: tuple[int, int, int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels [C, H, W] and validity uint8 [H, W]: 0 by nodata, mask, alpha, NaN or infinity."""
    pixels, mask = raster.read_pixels(scene, bands, window)
    nodata = [scene.nodata[band - 1] for band in bands]
    # a mask or alpha band says which pixels hold data, whatever their values
    has = np.array([value is not None and mask is None for value in nodata])
    # in the pixels' own precision: a tag of -9999.9 is not what a float32 pixel holds
    values = np.array([0.0 if value is None else value for value in nodata], np.float64)
    if pixels.dtype == np.float32:
        values = values.astype(np.float32).astype(np.float64)
    valid = kernels.valid_pixels(pixels, values, has)
    if mask is not None:
        valid &= (mask != 0).astype(np.uint8)
    return pixels, valid
