"""Stretch limits of a scene from a regular sample of its pixels.

Which pixels: about one in 20, taken from whole blocks of the file, since a block is decoded whole or not at all. Of a
scene with many blocks up to one in five is read, spread evenly like a knight's moves on a chessboard; of one with few
blocks all. A pure function of the scene's file and the options.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from preprocess import gdal_files, kernels, masks, raster
from preprocess.errors import RasterError
from preprocess.options import MaskOptions, PackOptions
from preprocess.pixels import read_valid
from preprocess.raster import Scene

MAX_SAMPLES = 4_000_000
# Units are left out only while this many stay: ground differs from place to place.
MIN_UNITS = 64
# A unit is a block, or as many as make it this long: less is not worth a call.
UNIT_SIDE = 128
MOST_UNITS = 64  # along a side
# One unit in this many is read, at most; (columns, rows) between the pixels sampled in it; the step between rows.
EVERY = {1: ((5, 4), 0), 2: ((5, 2), 1), 3: ((3, 2), 1), 4: ((3, 2), 1), 5: ((2, 2), 2)}
STRIP_BYTES = 64 << 20


def stretch_limits(scene: Scene, bands: tuple[int, ...], options: PackOptions) -> np.ndarray:
    """(low, high) of each band, float64 [C, 2], low < high, in the scene's units.

    Percentiles of a regular sample of pixels that have data, that no mask beside the scene speaks against, and whose
    mean over bands is not 0 (the fill of scenes that name no nodata), over all bands together (`joint`, and for
    previews where the mode is `none`) or each by itself (`per_band`). Negative values, such as decibels, are data.
    """
    return limits_over([scene], bands, options)


def limits_over(
    scenes: Sequence[Scene], bands: tuple[int, ...], options: PackOptions, pass_over: bool = False
) -> np.ndarray:
    """One pair a band for all scenes, which have one dtype. pass_over: those that cannot be read have no say."""
    if options.stretch.limits is not None or not scenes:
        return limits_from([], len(bands), "uint8", options)
    dtype = scenes[0].dtype
    with gdal_files.environment():
        found = _counted(_parts_over(scenes, bands, options.mask, pass_over), len(bands), dtype, options)
    return limits_from([found], len(bands), dtype, options)


# A scene's sample is taken in so many parts at most, each of so many pixels at least.
MOST_SHARES = 16
SHARE_PIXELS = 2 << 20


def shares_of(scene: Scene, scenes: int, options: PackOptions) -> int:
    """In how many parts to take the sample of one of so many scenes, so that all processes have something to do.

    Depends on nothing but its arguments, never on the number of workers.
    """
    if options.stretch.limits is not None:  # nothing is read
        return 1
    columns, rows = scene.place.width, scene.place.height
    return max(1, min(MOST_SHARES // scenes, columns * rows // max(EVERY) // SHARE_PIXELS))


def sample(scene: Scene, bands: tuple[int, ...], options: PackOptions, share: int, shares: int) -> np.ndarray:
    """Part number ``share`` of ``shares`` of a scene's sample, for :func:`limits_from`."""
    with gdal_files.environment():
        return _counted(_parts(scene, bands, options.mask, share, shares), len(bands), scene.dtype, options)


def limits_from(samples: Sequence[np.ndarray], bands: int, dtype: str, options: PackOptions) -> np.ndarray:
    """Limits [bands, 2] from all parts of a sample."""
    stretch = options.stretch
    if stretch.limits is not None:
        return np.array(stretch.limits * (bands if len(stretch.limits) == 1 else 1), np.float64)
    find = _float_limits if np.dtype(dtype).kind == "f" else _integer_limits
    limits = find(samples, dtype, stretch.percentiles) if samples else None
    if limits is None:
        return np.tile([0.0, 1.0], (bands, 1))
    if len(limits) == 1:
        limits = np.tile(limits, (bands, 1))
    least = limits[:, 0] + np.maximum(1e-6, np.abs(limits[:, 0]) * 1e-6)
    limits[:, 1] = np.maximum(limits[:, 1], least)  # a constant scene; its tiles are rejected as flat
    return limits


def units(width: int, height: int, block: tuple[int, int]) -> tuple[int, int]:
    """(columns, rows) of what is read or left out as one, for blocks of (rows, columns)."""

    def along(side: int, size: int) -> int:
        return min(side, size * -(-max(UNIT_SIDE, side // MOST_UNITS) // size))

    return along(width, block[1]), along(height, block[0])


def windows(
    width: int, height: int, block: tuple[int, int], row_bytes: int
) -> tuple[list[tuple[int, int, int, int]], tuple[int, int]]:
    """(column, row, width, height) of what is read, and (columns, rows) between the pixels sampled in each.

    Where everything is read it goes by strips of rows, and the sample is one grid over the whole scene.
    """
    columns, rows = units(width, height, block)
    across, down = -(-width // columns), -(-height // rows)
    every = max(1, min(max(EVERY), across * down // MIN_UNITS))
    (step_x, step_y), skew = EVERY[every]
    while width * height // (every * step_x * step_y) > MAX_SAMPLES:
        step_x, step_y = step_x * 2, step_y * 2
    if every == 1:
        strip = max(step_y, min(512, STRIP_BYTES // row_bytes) // step_y * step_y)
        return [(0, top, width, min(strip, height - top)) for top in range(0, height, strip)], (step_x, step_y)
    skew = skew if across > 1 else 1  # strips as wide as the scene: one after the other
    chosen = [
        (i * columns, j * rows, min(columns, width - i * columns), min(rows, height - j * rows))
        for j in range(down)
        for i in range(across)
        if (i + skew * j) % every == 0
    ]
    return chosen, (step_x, step_y)


def _parts(
    scene: Scene, bands: tuple[int, ...], mask: MaskOptions, share: int = 0, shares: int = 1
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Sampled pixels [C, h, w] and which of them count, uint8 [h, w]; the next ones lie in the same memory."""
    width, height = scene.place.width, scene.place.height
    row_bytes = width * len(bands) * np.dtype(scene.dtype).itemsize
    chosen, (across, down) = windows(width, height, raster.block_shape(scene, bands), row_bytes)
    chosen = chosen[len(chosen) * share // shares : len(chosen) * (share + 1) // shares]
    room = np.empty(max((window[2] * window[3] for window in chosen), default=0) * len(bands), scene.dtype)
    for window in chosen:
        pixels, valid = read_valid(scene, bands, window, room)
        if scene.mask is not None:
            valid &= 1 - masks.masked_pixels(scene.mask, scene.place.window(*window), mask)
        yield pixels[:, ::down, ::across], valid[::down, ::across]


Parts = Iterator[tuple[np.ndarray, np.ndarray]]


def _parts_over(scenes: Sequence[Scene], bands: tuple[int, ...], mask: MaskOptions, pass_over: bool) -> Parts:
    for scene in scenes:
        try:
            yield from _parts(scene, bands, mask)
        except RasterError:
            if not pass_over:
                raise


def _counted(parts: Parts, bands: int, dtype: str, options: PackOptions) -> np.ndarray:
    """How often each value of an integer type occurs, int64 [bands, V]: nothing is sorted, and memory does not grow.
    Floats as they are, [N, bands]. One column or row for all bands where they share their limits."""
    joint = options.stretch.mode != "per_band"
    if np.dtype(dtype).kind == "f":
        values = [_counting(pixels, valid) for pixels, valid in parts]
        sample_NC = np.concatenate(values) if values else np.zeros((0, bands), dtype)
        return sample_NC.reshape(-1, 1) if joint else sample_NC
    counts_CV = np.zeros((bands, 1 << 8 * np.dtype(dtype).itemsize), np.int64)
    for pixels, valid in parts:
        kernels.count_values(counts_CV, pixels, valid, int(np.iinfo(dtype).min))
    return counts_CV.sum(axis=0, keepdims=True) if joint else counts_CV


def _counting(pixels: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Values [N, C] of pixels [C, h, w] that count."""
    values = pixels.reshape(len(pixels), -1).T
    return values[(valid.ravel() != 0) & (values.mean(axis=1, dtype=np.float64) != 0)]


def _float_limits(samples: Sequence[np.ndarray], dtype: str, percentiles: tuple[float, float]) -> np.ndarray | None:
    sample_NC = np.concatenate(samples)
    return np.percentile(sample_NC, percentiles, axis=0).T.astype(np.float64) if len(sample_NC) else None


def _integer_limits(samples: Sequence[np.ndarray], dtype: str, percentiles: tuple[float, float]) -> np.ndarray | None:
    counts_CV, lowest = np.sum(samples, axis=0), int(np.iinfo(dtype).min)
    if not counts_CV.any():
        return None
    return np.array([[lowest + percentile(counts, percent) for percent in percentiles] for counts in counts_CV])


def percentile(counts_V: np.ndarray, percent: float) -> float:
    """Percentile of numbers 0 to V - 1 that occur so often, interpolated between neighbours as NumPy does."""
    ends = np.cumsum(counts_V)
    position = percent / 100 * (ends[-1] - 1)
    below = int(position)
    low = int(np.searchsorted(ends, below, side="right"))
    high = int(np.searchsorted(ends, min(below + 1, ends[-1] - 1), side="right"))
    share = position - below
    return low + (high - low) * share if share < 0.5 else high - (high - low) * (1 - share)
