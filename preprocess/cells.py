"""Tiles put together from cells, so that pixels under overlapping tiles are counted once.

The edges of all tiles of a chunk cut it into cells; a tile is a rectangle of whole cells. What is counted (histograms,
sums) is counted a cell at a time and added up a tile at a time, never subtracted: a single huge value spoils nothing
but the tiles it lies in.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from preprocess import cell_kernels
from preprocess.grid import Chunk


@dataclass(frozen=True, slots=True, eq=False)
class Axis:
    """One direction of a chunk. spans: int64 [cells, 2], first pixel and end of each cell that some tile covers.

    first, last: int64 [tiles along the axis], a tile's cells are spans[first:last].
    """

    spans: np.ndarray
    first: np.ndarray
    last: np.ndarray


def axis(starts: Sequence[int], size: int) -> Axis:
    """Cells of tiles of ``size`` pixels that begin at ``starts`` (rising), counted from the first one."""
    begin = np.array(starts, np.int64) - starts[0]
    edges = np.unique(np.concatenate([begin, begin + size]))
    spans = np.stack([edges[:-1], edges[1:]], axis=1)
    nearest = begin[np.searchsorted(begin, spans[:, 0], side="right") - 1]  # the last tile to begin before a cell
    spans = spans[spans[:, 0] < nearest + size]
    return Axis(spans, np.searchsorted(spans[:, 0], begin), np.searchsorted(spans[:, 1], begin + size) + 1)


@dataclass(frozen=True, slots=True, eq=False)
class Cells:
    """The cells of a chunk, counted from its window's corner. Tiles are in the order of Chunk.origins."""

    down: Axis
    across: Axis

    @staticmethod
    def of(chunk: Chunk) -> "Cells":
        return Cells(axis(chunk.rows, chunk.size), axis(chunk.columns, chunk.size))

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of cells."""
        return len(self.down.spans), len(self.across.spans)

    def zeros(self, values: int, dtype: type = np.uint32) -> np.ndarray:
        """Counters [rows of cells, columns of cells, values]."""
        return np.zeros((*self.shape, values), dtype)

    def parted(self, size: int, parts: int) -> "Parts":
        """The cells of tiles of ``size`` pixels that are each cut into ``parts`` x ``parts`` squares."""
        assert size % parts == 0, "squares of whole pixels"
        side, axes, numbers = size // parts, [], []
        for along in (self.down, self.across):
            begins = along.spans[along.first, 0][:, None] + side * np.arange(parts)
            starts = np.unique(begins)
            axes.append(axis(starts.tolist(), side))
            numbers.append(np.searchsorted(starts, begins))
        return Parts(Cells(*axes), numbers[0], numbers[1])

    def tiles(self, counted_YXV: np.ndarray) -> np.ndarray:
        """What was counted by cell, added up by tile: [tiles, V], int64 for integers, else float64."""
        dtype = np.float64 if counted_YXV.dtype.kind == "f" else np.int64
        out = np.zeros((len(self.down.first), len(self.across.first), counted_YXV.shape[2]), dtype)
        cell_kernels.add_ranges(out, counted_YXV, self.down.first, self.down.last, self.across.first, self.across.last)
        return out.reshape(-1, counted_YXV.shape[2])


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """As :class:`Cells`, for the squares that tiles are cut into.

    cells: of all squares. down, across: int64 [tiles along the axis, parts], which of the squares' starts are a tile's.
    """

    cells: Cells
    down: np.ndarray
    across: np.ndarray

    def tiles(self, counted_YXV: np.ndarray) -> np.ndarray:
        """What was counted by cell, added up by square: [tiles, parts, parts, V], int64 or float64."""
        values = counted_YXV.shape[2]
        starts = len(self.cells.down.first), len(self.cells.across.first)
        squares = self.cells.tiles(counted_YXV).reshape(*starts, values)
        parts = self.down.shape[1]
        found = squares[self.down[:, None, :, None], self.across[None, :, None, :]]
        return found.reshape(-1, parts, parts, values)
