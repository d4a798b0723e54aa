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


@lru_cache(maxsize=1 << 12)
def cells_in_row(row: int, block_m: float) -> int:
    """Number of cells of a latitude row; row 0 begins at the south pole."""
    latitude = min(90.0, -90 + (row + 0.5) * block_m / METRES_A_DEGREE)
    return max(1, round(2 * math.pi * EARTH_RADIUS_M * math.cos(math.radians(latitude)) / block_m))


@lru_cache(maxsize=1 << 16)
def is_validation(row: int, cell: int, seed: int, val_fraction: float) -> bool:
    """Whether a cell is held out: its hash, read as a number in 0..1, lies below ``val_fraction``."""
    digest = hashlib.blake2b(f"block {seed} {row} {cell}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < val_fraction * 2.0**64


def far_apart(longitudes: np.ndarray, latitudes: np.ndarray) -> np.ndarray:
    """The longest way in degrees between neighbours of lattices of points [..., P, Q] over the ground, [...]."""
    lon, lat = np.radians(longitudes), np.radians(latitudes)
    xyz = np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)])
    steps = (np.diff(xyz, axis=-2), np.diff(xyz, axis=-1))
    chord = np.maximum(*(np.sqrt((step**2).sum(axis=0)).max(axis=(-2, -1)) for step in steps))
    return np.degrees(2 * np.arcsin(np.minimum(1.0, chord / 2)))


def _interval(longitudes: np.ndarray) -> tuple[float, float]:
    """(west, east) of the shortest arc that holds all longitudes; east may exceed 180."""
    west, east = float(longitudes.min()), float(longitudes.max())
    if east - west < 180:
        return west, east
    ordered = np.sort(np.ravel(longitudes) % 360)
    gaps = np.diff(ordered, append=ordered[0] + 360)
    widest = int(gaps.argmax())
    west = float(ordered[(widest + 1) % len(ordered)])
    return west, west + 360 - float(gaps[widest])


def touched_cells(longitudes: np.ndarray, latitudes: np.ndarray, step: float, block_m: float) -> set[tuple[int, int]]:
    """Every cell that a part of a tile touches, given by a lattice [P, Q] of points over its footprint, degrees.

    step: at least the way between neighbouring points (:func:`far_apart`).
    Taken from the points' bounding box in longitude and latitude, so a cell too many is possible, one too few is
    not. Between two points a side may bulge beyond the box: a great circle of length s by s^2 tan(latitude) / 8 R,
    and a little more for projections that are not that straight. Within two such lengths of a pole, where a box
    means nothing, the part counts as touching all cells around the pole.
    """
    west, east = _interval(longitudes)
    return _cells_of_box(west, float(latitudes.min()), east, float(latitudes.max()), step, block_m)


def _cells_of_box(
    west: float, south: float, east: float, north: float, step: float, block_m: float
) -> set[tuple[int, int]]:
    """:func:`touched_cells` from the extremes of the points."""
    highest = max(abs(south), abs(north))
    bulge = step**2 * math.pi / 180 / 8 * math.tan(math.radians(min(highest, 89.9)))
    margin = step / 64 + bulge
    south, north = south - margin, north + margin
    around = 90 - highest < 2 * step
    if around:
        south, north = (south, 90.0) if north > -south else (-90.0, north)
    wider = margin / max(1e-9, math.cos(math.radians(min(89.999999, max(abs(south), abs(north))))))
    cells: set[tuple[int, int]] = set()
    first, last = (math.floor((latitude + 90) * METRES_A_DEGREE / block_m) for latitude in (south, min(90.0, north)))
    for row in range(max(0, first), last + 1):
        count = cells_in_row(row, block_m)
        left, right = (math.floor((longitude + 180) / 360 * count) for longitude in (west - wider, east + wider))
        if around:
            left, right = 0, count - 1
        cells.update((row, cell % count) for cell in range(left, min(right, left + count - 1) + 1))
    return cells


def side_of(
    longitudes_PP: np.ndarray,
    latitudes_PP: np.ndarray,
    block_m: float,
    seed: int,
    val_fraction: float,
    step: float | None = None,
) -> int:
    """TRAIN, VAL or BOTH for a tile, given as a lattice of P x P points over its footprint, degrees.

    step: the way between its points (:func:`far_apart`), where it is known already.

    A tile that touches both kinds of block belongs to neither split. Tried on the whole tile's bounding box
    first; where that is mixed, each cell of the lattice has its own, small box.
    """
    if val_fraction == 0:
        return TRAIN

    apart = float(far_apart(longitudes_PP, latitudes_PP)) if step is None else step

    def kinds(part: tuple[slice, slice]) -> set[bool]:
        cells = touched_cells(longitudes_PP[part], latitudes_PP[part], apart, block_m)
        return {is_validation(row, cell, seed, val_fraction) for row, cell in cells}

    found = kinds((slice(None), slice(None)))
    if len(found) == 2:
        steps = range(longitudes_PP.shape[0] - 1)
        found = set().union(*(kinds((slice(i, i + 2), slice(j, j + 2))) for i in steps for j in steps))
    return BOTH if len(found) == 2 else (VAL if True in found else TRAIN)


def sides_of(
    longitudes_TPP: np.ndarray, latitudes_TPP: np.ndarray, block_m: float, seed: int, val_fraction: float
) -> list[int]:
    """:func:`side_of` for many tiles; NaN gives any side."""
    if val_fraction == 0:
        return [TRAIN] * len(longitudes_TPP)
    steps = far_apart(longitudes_TPP, latitudes_TPP).tolist()
    boxes, parts = (_boxes(longitudes_TPP, latitudes_TPP, side) for side in (longitudes_TPP.shape[-1], 2))

    def kinds(some: list[list[float]], step: float) -> set[bool]:
        found: set[bool] = set()
        for west, south, east, north in some:
            cells = _cells_of_box(west, south, east, north, step, block_m)
            found |= {is_validation(row, cell, seed, val_fraction) for row, cell in cells}
            if len(found) == 2:
                break
        return found

    sides = []
    for t, step in enumerate(steps):
        ((west, south, east, _),) = boxes[t]
        if not math.isfinite(west + south):
            sides.append(BOTH)
        elif east - west >= 180:  # over the antimeridian
            sides.append(side_of(longitudes_TPP[t], latitudes_TPP[t], block_m, seed, val_fraction, step))
        else:
            found = kinds(boxes[t], step)
            found = kinds(parts[t], step) if len(found) == 2 else found
            sides.append(BOTH if len(found) == 2 else (VAL if True in found else TRAIN))
    return sides


def _boxes(longitudes_TPP: np.ndarray, latitudes_TPP: np.ndarray, side: int) -> list[list[list[float]]]:
    """Of each tile the boxes (west, south, east, north) of all parts of its lattice that are ``side`` points wide."""
    windows = (
        np.lib.stride_tricks.sliding_window_view(values, (side, side), axis=(1, 2))
        for values in (longitudes_TPP, latitudes_TPP)
    )
    (west, east), (south, north) = ((part.min(axis=(3, 4)), part.max(axis=(3, 4))) for part in windows)
    return np.stack([west, south, east, north], axis=-1).reshape(len(longitudes_TPP), -1, 4).tolist()
