"""The ground under a report's map: the land cover itself, read coarsely, as a picture in its classes' colours."""

import struct
import time
import zlib
from collections.abc import Sequence

import numpy as np

from geokr.landcover import LOOKUP_OFFSET, LOOKUP_SIZE, NODATA, Legend
from preprocess import ground, label_kernels, labels, lattice, raster
from preprocess.errors import RasterError
from preprocess.report_plane import MapPlace
from preprocess.sheets import LabelSheet, lookup_of

LONG_SIDE = 1400  # pixels of the picture's longer side
SECONDS = 20.0  # after which the sheets that are left stay undrawn
NODES = 64  # pixels between exact coordinates: a picture needs no better
MAX_UNPREPARED = 2 << 30  # pixels of a sheet without overviews that are read through for a picture


def label_picture(place: MapPlace, sheets: Sequence[LabelSheet], legend: Legend) -> tuple[np.ndarray, int]:
    """(class of each pixel, uint8 [H, W], NODATA or other values above the classes where none is known; sheets drawn).

    Sheets that cannot be read are left out: a report must not fail where packing did not.
    """
    found = np.full((place.height, place.width), NODATA, np.uint8)
    here, start, drawn = ground.cap_of(place), time.monotonic(), 0
    columns, rows = np.meshgrid(_nodes(place.width), _nodes(place.height))
    lattices: dict[str, np.ndarray] = {}
    for entry in sheets:
        sheet = entry.sheet
        if ground.apart(here, entry.cap) or time.monotonic() - start > SECONDS:
            continue
        if sheet.crs not in lattices:
            lattices[sheet.crs] = lattice.points(place, sheet.crs, sheet.geographic, columns, rows)
        try:
            drawn += _draw(found, lattices[sheet.crs], entry, legend)
        except (RasterError, OSError):
            continue
    return found, drawn


def _nodes(pixels: int) -> np.ndarray:
    return 0.5 + np.linspace(0, pixels - 1, max(2, -(-pixels // NODES) + 1))


def _draw(found: np.ndarray, points: np.ndarray, entry: LabelSheet, legend: Legend) -> bool:
    """Fills unknown pixels from a sheet; whether any of it lies under the picture."""
    sheet = entry.sheet
    column, row = sheet.grid.pixel(points[..., 0], points[..., 1])
    if not np.isfinite(column).any():
        return False
    # sheet pixels a picture's pixel: what lies between is not looked at
    across = np.nanmedian(np.hypot(np.diff(column, axis=1), np.diff(row, axis=1))) * (column.shape[1] - 1)
    coarse = max(1.0, float(across) / found.shape[1])
    windows = labels.pieces(sheet, column, row)
    for left, top, width, height in windows:
        out = max(1, round(width / coarse)), max(1, round(height / coarse))
        codes, lookup = _codes(entry, (left, top, width, height), out, legend)
        scale = out[0] / width, out[1] / height
        nodes = np.stack([(column - left) * scale[0], (row - top) * scale[1]], axis=-1)
        period = labels.period(sheet) * scale[0]
        classes = label_kernels.translate(codes, lookup, LOOKUP_OFFSET)
        label_kernels.gather_labels(found, NODATA, nodes, classes, np.zeros(2), period, nodes, np.zeros(4), False)
    return bool(windows)


def _codes(
    entry: LabelSheet, window: tuple[int, int, int, int], out: tuple[int, int], legend: Legend
) -> tuple[np.ndarray, np.ndarray]:
    """(codes [H, W], lookup from code to class): of a sheet of probabilities the most probable band."""
    read = raster.read_coarsely(entry.sheet, window, out, MAX_UNPREPARED)
    if read.ndim == 2:
        return read, lookup_of(legend, entry.sheet)
    lookup = np.full(LOOKUP_SIZE, NODATA, np.uint8)
    lookup[LOOKUP_OFFSET : LOOKUP_OFFSET + len(legend.band_classes)] = legend.band_classes
    known = read.max(axis=0) > read.min(axis=0)  # not where all are nodata or 0, nor where any is NaN
    return np.where(known, read.argmax(axis=0), len(legend.band_classes)).astype(np.uint8), lookup


def png(picture_HW: np.ndarray, colours: Sequence[tuple[int, int, int]]) -> bytes:
    """A palette PNG of class numbers; what is beyond the colours is transparent. RFC 2083."""
    height, width = picture_HW.shape
    clear = len(colours)
    indexes = np.where(picture_HW < clear, picture_HW, clear).astype(np.uint8)
    palette = b"".join(bytes(rgb) for rgb in (*colours, (0, 0, 0)))
    rows = np.concatenate([np.zeros((height, 1), np.uint8), indexes], axis=1).tobytes()  # each behind filter type 0
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
        (b"PLTE", palette),
        (b"tRNS", bytes([255] * clear + [0])),
        (b"IDAT", zlib.compress(rows, 9)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
