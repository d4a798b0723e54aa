"""The spatial split: blocks of one grid over the Earth, each wholly training or wholly validation.

The grid has latitude rows ``block_m`` high; each row is cut into round(circumference / block_m) cells. A cell
is validation by a hash of its position and the seed. The grid depends on nothing but ``block_m``, so scenes that
overlap, or are added years later, agree on what is held out.
"""

import hashlib
import math
from functools import lru_cache

import numpy as np

EARTH_RADIUS_M = 6_371_008.8  # mean radius (IUGG); blocks need no ellipsoid
METRES_A_DEGREE = EARTH_RADIUS_M * math.pi / 180

TRAIN, VAL, BOTH = 0, 1, 2


def cells_in_row(row: int, block_m: float) -> int:
    """Number of cells of a latitude row; row 0 begins at the south pole."""
    latitude = min(90.0, -90 + (row + 0.5) * block_m / METRES_A_DEGREE)
    return max(1, round(2 * math.pi * EARTH_RADIUS_M * math.cos(math.radians(latitude)) / block_m))


@lru_cache(maxsize=1 << 16)
def is_validation(row: int, cell: int, seed: int, val_fraction: float) -> bool:
    """Whether a cell is held out: its hash, read as a number in 0..1, lies below ``val_fraction``."""
    digest = hashlib.blake2b(f"block {seed} {row} {cell}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < val_fraction * 2.0**64


def touched_cells(
    longitudes: np.ndarray, latitudes: np.ndarray, margin_m: float, block_m: float
) -> set[tuple[int, int]]:
    """Every cell that a quadrilateral touches, given its corners in degrees and a margin for its curved sides.

    Taken from the corners' bounding box in longitude and latitude, so a cell too many is possible, one too few
    is not. The box of corners on both sides of the antimeridian is the short one across it.
    """
    south, north = latitudes.min() - margin_m / METRES_A_DEGREE, latitudes.max() + margin_m / METRES_A_DEGREE
    west, east = longitudes.min(), longitudes.max()
    if east - west > 180:
        shifted = np.where(longitudes < 0, longitudes + 360, longitudes)
        west, east = shifted.min(), shifted.max()
    metres = METRES_A_DEGREE * max(1e-9, math.cos(math.radians(min(89.999999, max(abs(south), abs(north))))))
    west, east = west - margin_m / metres, east + margin_m / metres
    cells: set[tuple[int, int]] = set()
    first, last = (math.floor((latitude + 90) * METRES_A_DEGREE / block_m) for latitude in (south, north))
    for row in range(max(0, first), last + 1):
        count = cells_in_row(row, block_m)
        left, right = (math.floor((longitude + 180) / 360 * count) for longitude in (west, east))
        cells.update((row, cell % count) for cell in range(left, min(right, left + count - 1) + 1))
    return cells


def side_of(
    longitudes_PP: np.ndarray, latitudes_PP: np.ndarray, margin_m: float, block_m: float, seed: int, val_fraction: float
) -> int:
    """TRAIN, VAL or BOTH for a tile, given as a lattice of P x P points over its footprint, degrees.

    A tile that touches both kinds of block belongs to neither split. Tried on the whole tile's bounding box
    first; where that is mixed, each cell of the lattice has its own, small box.
    """
    if val_fraction == 0:
        return TRAIN

    def kinds(part: tuple[slice, slice]) -> set[bool]:
        cells = touched_cells(longitudes_PP[part], latitudes_PP[part], margin_m, block_m)
        return {is_validation(row, cell, seed, val_fraction) for row, cell in cells}

    found = kinds((slice(None), slice(None)))
    if len(found) == 2:
        steps = range(longitudes_PP.shape[0] - 1)
        found = set().union(*(kinds((slice(i, i + 2), slice(j, j + 2))) for i in steps for j in steps))
    return BOTH if len(found) == 2 else (VAL if True in found else TRAIN)
