"""Pixel grids on the ground, and the tiles and chunks a scene is cut into. Pure arithmetic.

A :class:`Grid` couples a size in pixels with the affine transform from pixel to CRS coordinates; a window of a
grid is a grid, so pixels and transform cannot drift apart.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

Transform = tuple[float, float, float, float, float, float]


@dataclass(frozen=True, slots=True)
class Grid:
    """width x height pixels; (column, row) lies at x = a*column + b*row + c, y = d*column + e*row + f.

    (0, 0) is the outer corner of the first pixel, (0.5, 0.5) its centre. Rotation and shear are allowed.
    Raises ValueError for an empty grid or a transform that cannot be inverted.
    """

    width: int
    height: int
    transform: Transform

    def __post_init__(self) -> None:
        a, b, _, d, e, _ = self.transform
        if self.width < 1 or self.height < 1:
            raise ValueError(f"a grid of {self.width} x {self.height} pixels is empty")
        if not all(map(math.isfinite, self.transform)) or a * e == b * d:
            raise ValueError(f"the transform {self.transform} cannot be inverted")

    def window(self, column: int, row: int, width: int, height: int) -> "Grid":
        """The part that begins at (column, row). Raises ValueError if it leaves the grid."""
        if column < 0 or row < 0 or column + width > self.width or row + height > self.height:
            raise ValueError(f"window {column},{row} {width}x{height} leaves the grid of {self.width}x{self.height}")
        a, b, c, d, e, f = self.transform
        return Grid(width, height, (a, b, float(a * column + b * row + c), d, e, float(d * column + e * row + f)))

    def subdivided(self, kx: int, ky: int) -> "Grid":
        """The same ground with kx by ky pixels in place of each one."""
        a, b, c, d, e, f = self.transform
        return Grid(self.width * kx, self.height * ky, (a / kx, b / ky, c, d / kx, e / ky, f))

    def xy(self, columns: np.ndarray | float, rows: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
        """CRS coordinates of pixel coordinates, float64, shapes broadcast."""
        a, b, c, d, e, f = self.transform
        columns, rows = np.asarray(columns, np.float64), np.asarray(rows, np.float64)
        return a * columns + b * rows + c, d * columns + e * rows + f

    def pixel(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pixel coordinates (column, row) of CRS coordinates: the inverse of :meth:`xy`."""
        a, b, c, d, e, f = self.transform
        determinant = a * e - b * d
        x, y = x - c, y - f
        return (e * x - b * y) / determinant, (a * y - d * x) / determinant


def offsets(length: int, size: int, step: int) -> np.ndarray:
    """First pixels of tiles of ``size`` every ``step`` along ``length``, int64; empty if not one fits.

    A last tile that would end beyond the edge is moved inward to end at it, and its position says so.
    """
    if length < size:
        return np.zeros(0, np.int64)
    regular = np.arange(0, length - size + 1, step, dtype=np.int64)
    if regular[-1] + size < length:
        regular = np.append(regular, length - size)
    return regular


@dataclass(frozen=True, slots=True)
class Chunk:
    """A window of a scene that is read at once, and the tiles that lie in it.

    columns, rows: first pixels of its tiles in the scene; every pair of them is a tile of side ``size``.
    """

    columns: tuple[int, ...]
    rows: tuple[int, ...]
    size: int

    @property
    def window(self) -> tuple[int, int, int, int]:
        """(column, row, width, height) of the pixels that its tiles cover."""
        column, row = self.columns[0], self.rows[0]
        return column, row, self.columns[-1] + self.size - column, self.rows[-1] + self.size - row

    @property
    def tiles(self) -> int:
        return len(self.columns) * len(self.rows)

    def origins(self) -> np.ndarray:
        """First pixels of its tiles, int64 [tiles, 2] as (column, row), row by row."""
        columns, rows = np.meshgrid(self.columns, self.rows)
        return np.stack([columns.ravel(), rows.ravel()], axis=1).astype(np.int64)


# Enough tiles to make a task worth its start. A plan of few tiles is cut finer, so that its last tasks do not keep one
# worker busy and the others waiting.
MAX_CHUNK_TILES = 256
MIN_CHUNK_TILES = 120
FEW_CHUNKS = 32
MAX_CHUNK_BYTES = 128 << 20
# Goes up when the same plan is cut otherwise than before: a run that was cut short does not go on with such chunks.
LAYOUT = 2


def chunk_tiles(tiles: int) -> int:
    """How many tiles a chunk may have where there are so many in all."""
    return min(MAX_CHUNK_TILES, max(MIN_CHUNK_TILES, tiles // FEW_CHUNKS))


def chunks(width: int, height: int, size: int, step: int, bytes_a_pixel: float, most: int) -> Iterator[Chunk]:
    """Cuts a scene's tiles into chunks of at most ``most`` tiles and about MAX_CHUNK_BYTES, whole rows first.

    Whole rows, because many scenes are stored in strips as wide as the image: a narrower chunk would decode
    each strip again and again. Depends on nothing but its arguments, never on the number of workers.
    """
    columns, rows = offsets(width, size, step), offsets(height, size, step)
    if not len(columns) or not len(rows):
        return
    budget = MAX_CHUNK_BYTES / bytes_a_pixel
    across = int(max(1, min(len(columns), most, (budget / size - size) // step + 1)))
    across = -(-len(columns) // -(-len(columns) // across))  # the same number of parts, evenly filled
    chunk_width = size + (across - 1) * step
    down = int(max(1, min(most // across, (budget / chunk_width - size) // step + 1)))
    # made once and shared by the chunks below one another, so that a plan stays small
    parts = [tuple(columns[left : left + across].tolist()) for left in range(0, len(columns), across)]
    for top in range(0, len(rows), down):
        below = tuple(rows[top : top + down].tolist())
        for part in parts:
            yield Chunk(part, below, size)
