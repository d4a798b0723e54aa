"""Class fractions from sheets that hold the classes' probabilities, as Dynamic World does: soft fractions.

The rule is that of :mod:`preprocess.labels`: every sub-pixel takes the sheet's pixel under its centre. A pixel says how
likely each class is there, its shares made to sum to 1; a tile's fractions are the mean over its sub-pixels. Dropped
classes take their part of a pixel out of the denominator. Where sheets overlap, the first by name that knows decides.
"""

from collections.abc import Sequence

import numpy as np

from geokr.landcover import Legend
from preprocess import labels, probability_kernels, raster
from preprocess.cells import Cells
from preprocess.place import Place
from preprocess.sheets import LabelError, LabelSheet

# Means of probabilities over time sum to 1, medians do so nearly.
HIGHEST_SUM = 1.1


def tile_labels(
    window: Place,
    sheets: Sequence[LabelSheet],
    subdivisions: tuple[int, int],
    valid_HW: np.ndarray,
    cells: Cells,
    size: int,
    legend: Legend,
    parts: int = 0,
) -> labels.TileLabels:
    """As :func:`preprocess.labels.tile_labels`, for sheets with probability bands. Raises LabelError."""
    kx, ky = subdivisions
    parted = cells.parted(size, parts) if parts else None
    cells = parted.cells if parted else cells
    by_cell = cells.zeros(len(legend.band_classes), np.float64)
    strip = max(1, labels.STRIP_PIXELS // (window.width * kx * ky * len(legend.band_classes)))
    for top in range(0, window.height, strip):
        part = window.window(0, top, window.width, min(strip, window.height - top))
        shares, known = _share_grid(part.subdivided(kx, ky), sheets, len(legend.band_classes))
        probability_kernels.add_shares(
            by_cell, shares, known, valid_HW, cells.down.spans, cells.across.spans, kx, ky, top
        )
    sums = parted.tiles(by_cell) if parted else cells.tiles(by_cell)
    counted = np.zeros((*sums.shape[:-1], len(legend.classes)))
    for band, index in enumerate(legend.band_classes):
        if index < len(legend.classes):  # else it is dropped, or no class by the table's own nodata and ignore
            counted[..., index] += sums[..., band]
    return labels.normalised(counted, size * size * kx * ky)


def _share_grid(place: Place, sheets: Sequence[LabelSheet], classes: int) -> tuple[np.ndarray, np.ndarray]:
    """(shares float32 [H, W, K] that sum to 1, known uint8 [H, W]) of every pixel of a place."""
    shares = np.zeros((place.height, place.width, classes), np.float32)
    known = np.zeros((place.height, place.width), np.uint8)
    for entry, pixels in labels.sheets_under(place, sheets):
        if known.all():
            break
        for window in labels.pieces(entry.sheet, pixels[..., 0], pixels[..., 1]):
            _gather(shares, known, entry.sheet, pixels, window)
    return shares, known


def _gather(
    shares: np.ndarray, known: np.ndarray, sheet: raster.Sheet, pixels: np.ndarray, window: tuple[int, int, int, int]
) -> None:
    try:
        bands = raster.read_probabilities(sheet, window)
    except raster.RasterError as error:  # not the scene's fault, so never a reason to leave the scene out
        raise LabelError(str(error)) from error
    sheet_shares = np.empty((*bands.shape[1:], len(bands)), np.float32)
    states = np.empty(bands.shape[1:], np.uint8)
    # whole numbers are scaled by whoever wrote them, so their sum is no one's business
    highest = HIGHEST_SUM if bands.dtype.kind == "f" else np.inf
    nodata = np.nan if sheet.nodata is None else _stored(sheet.nodata, bands.dtype)
    probability_kernels.normalise(bands, nodata, sheet.nodata is not None, highest, sheet_shares, states)
    first = np.array(window[:2], np.float64)
    row, column = probability_kernels.gather_shares(
        shares, known, pixels, sheet_shares, states, first, labels.period(sheet)
    )
    if row >= 0:
        values = ", ".join(f"{value:g}" for value in bands[:, row, column].tolist())
        raise LabelError(
            f"{sheet.path}: holds no probabilities at column {window[0] + column}, row {window[1] + row}: {values}. "
            "Expected numbers of 0 or more that sum to 1; scaled ones must be stored as whole numbers"
        )


def _stored(nodata: float, dtype: np.dtype) -> float:
    """A nodata value in the bands' own precision: a tag of -9999.9 is not what a float32 pixel holds."""
    return float(np.float32(nodata)) if dtype == np.float32 else float(nodata)
