"""Where places lie on the Earth, and how long their pixels are on the ground."""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from preprocess import ground_kernels
from preprocess.blocks import EARTH_RADIUS_M
from preprocess.coordinates import WGS84
from preprocess.place import AffinePlace, Place

# A degree of longitude shrinks to nothing at a pole; a geographic map's pixels are sized as if no nearer than this.
SIZED_LATITUDE = 85.0

Cap = tuple[float, float, float, float]

EVERYWHERE: Cap = (0.0, 0.0, 1.0, math.pi)


def on_sphere(lon: np.ndarray, lat: np.ndarray) -> np.ndarray:
    """Unit vectors [..., 3] of degrees."""
    lon, lat = np.radians(lon), np.radians(lat)
    return np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], axis=-1)


def cap_of(place: Place, parts: int = 16) -> Cap:
    """A circle on the Earth that holds a place; the whole Earth where not all of its ground can be expressed."""
    return _remembered_cap(place, parts) if isinstance(place, AffinePlace) else _cap_of(place, parts)


def _cap_of(place: Place, parts: int) -> Cap:
    x, y, z, radius = ground_kernels.cap(*place.points(WGS84, *regular(place, parts)))
    return (x, y, z, radius) if math.isfinite(radius) else EVERYWHERE


_remembered_cap = lru_cache(maxsize=16)(_cap_of)  # of a tile it is asked for more than once


def apart(a: Cap, b: Cap) -> bool:
    """Whether two caps certainly share no ground."""
    cosine = a[0] * b[0] + a[1] * b[1] + a[2] * b[2]
    return math.acos(max(-1.0, min(1.0, cosine))) > a[3] + b[3]


def near(here: Cap, caps: Sequence[Cap]) -> np.ndarray:
    """Numbers of the caps that may share ground with ``here``: :func:`apart` for thousands at once."""
    caps_N4 = np.array(caps, np.float64).reshape(-1, 4)
    cosine = np.clip(caps_N4[:, :3] @ np.array(here[:3]), -1, 1)
    return np.flatnonzero(np.arccos(cosine) <= caps_N4[:, 3] + here[3])


def ground_steps(place: Place, column: float, row: float) -> tuple[float, float]:
    """Length in metres on the ground of one pixel along columns and along rows, at a pixel position.

    Over a DEM it is that of the pixels around it: one of them may lie on a cliff.
    """
    return _lengths(place, place.points(WGS84, *_cross(place, column, row)))


def at_middle(place: Place) -> tuple[tuple[float, float], tuple[float, float]]:
    """:func:`middle_of` a place and :func:`ground_steps` there."""
    middle = place.width / 2, place.height / 2
    ends = place.points(WGS84, *_cross(place, *middle))
    if np.isfinite(ends[0]).all():
        return middle, _lengths(place, ends)
    middle = middle_of(place)
    return middle, ground_steps(place, *middle)


def _cross(place: Place, column: float, row: float) -> tuple[np.ndarray, np.ndarray]:
    reach = _reach(place)
    columns = np.array([column - reach, column + reach, column, column])
    return columns, np.array([row, row, row - reach, row + reach])


def _lengths(place: Place, ends_of_cross: tuple[np.ndarray, np.ndarray]) -> tuple[float, float]:
    ends = on_sphere(*ends_of_cross)
    # chords, which for pixels are as long as arcs; unlike differences of longitude they hold at a pole
    radius = EARTH_RADIUS_M / (2 * _reach(place))
    return float(np.linalg.norm(ends[1] - ends[0])) * radius, float(np.linalg.norm(ends[3] - ends[2])) * radius


def _reach(place: Place) -> float:
    """Pixels from a place to the ends of what is measured there."""
    return 0.5 if place.smooth else 32.0


def middle_of(place: Place) -> tuple[float, float]:
    """(column, row) of a place's middle, or of the nearest place to it whose pixel lies on the Earth."""
    middle = np.full(4, place.width / 2), np.full(4, place.height / 2)
    across, down = np.array([-1, 1, 0, 0]) * _reach(place), np.array([0, 0, -1, 1]) * _reach(place)
    if np.isfinite(place.points(WGS84, middle[0] + across, middle[1] + down)[0]).all():
        return place.width / 2, place.height / 2
    columns, rows = regular(place, 16)
    known = np.ones(columns.shape, bool)
    for dx, dy in zip(across, down, strict=True):
        known &= np.isfinite(place.points(WGS84, columns + dx, rows + dy)[0])
    away = np.where(known, np.hypot(columns - place.width / 2, rows - place.height / 2), np.inf)
    nearest = int(away.argmin())
    return float(columns.flat[nearest]), float(rows.flat[nearest])


def regular(place: Place, parts: int) -> tuple[np.ndarray, np.ndarray]:
    """Columns and rows [parts + 1, parts + 1] of a regular lattice over a place, its outline included; read-only."""
    return _regular(place.width, place.height, parts)


@lru_cache(maxsize=64)
def _regular(width: int, height: int, parts: int) -> tuple[np.ndarray, np.ndarray]:
    columns, rows = np.meshgrid(np.linspace(0, width, parts + 1), np.linspace(0, height, parts + 1))
    columns.flags.writeable = rows.flags.writeable = False
    return columns, rows
