"""A scene's pixels together with which of them hold data."""

import math
from collections.abc import Iterator

import numpy as np

from preprocess import kernels, raster
from preprocess.raster import Scene


def read_valid(
    scene: Scene, bands: tuple[int, ...], window: tuple[int, int, int, int], room: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels [C, H, W] and validity uint8 [H, W]: 0 by nodata, mask, alpha, NaN or infinity.

    room: as many numbers of the scene's dtype or more, 1-D, for the pixels to lie in.
    """
    shape = len(bands), window[3], window[2]
    out = None if room is None else room[: math.prod(shape)].reshape(shape)
    pixels, mask = raster.read_pixels(scene, bands, window, out)
    nodata = [scene.nodata[band - 1] for band in bands]
    has = np.array([value is not None for value in nodata])
    # in the pixels' own precision: a tag of -9999.9 is not what a float32 pixel holds
    values = np.array([0.0 if value is None else value for value in nodata], np.float64)
    if pixels.dtype == np.float32:
        values = values.astype(np.float32).astype(np.float64)
    valid = kernels.valid_pixels(pixels, values, has)
    if mask is not None:
        valid &= (mask != 0).astype(np.uint8)
    return pixels, valid


# A strip is small enough to stay in the second-level cache or near it, and begins where blocks of the file do if they
# are as high as most: none is decoded twice.
STRIP_ROWS = 256
STRIP_BYTES = 64 << 20


class Room:
    """Memory that stays from one task to the next: what is new takes about as long to touch as to fill with pixels.

    An array of a name is good until the next one of that name is taken.
    """

    def __init__(self) -> None:
        self._kept: dict[str, np.ndarray] = {}

    def array(self, name: str, shape: tuple[int, ...], dtype: str | type) -> np.ndarray:
        """Of that shape, its values left to chance."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if name not in self._kept or self._kept[name].nbytes < size:
            self._kept[name] = np.empty(size, np.uint8)
        return self._kept[name][:size].view(dtype).reshape(shape)


def strips(row: int, height: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """(top, bottom) of strips of rows that make ``height`` rows from ``row`` of a scene on, counted from there."""
    rows = STRIP_ROWS
    while rows > 1 and rows * row_bytes > STRIP_BYTES:
        rows //= 2
    top = 0
    while top < height:
        bottom = min(height, ((row + top) // rows + 1) * rows - row)
        yield top, bottom
        top = bottom
