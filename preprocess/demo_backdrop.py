"""The slow half of the demo landscape: relief, rivers, lakes and moods of the ground, on a lattice of 80 m.

A node's values are pure functions of (key, node), and the lattice lies on whole multiples of 80 m of the world,
so whatever is interpolated from it is a pure function of (key, position) too, whichever part was asked for.
x points east, y north, in metres from the world's centre. North is a plain, the south climbs into mountains.
"""

import math
from dataclasses import dataclass

import numpy as np

from preprocess.demo_noise import fractal, jit, mix, noise, smoothstep, typed, unit

SPACING_M = 80.0
# Beyond the bounds, for what is looked up from inside: a parcel's middle, a cloud's shadow, a bent road.
MARGIN_M = 1200.0

FIELDS = 16
# river, motorway, brook: signed metres to the line. lake: depth, 1 centre, 0 shore, negative outside. upland: 0
# plain, 1 mountains. hills: height in metres. The others are noises, in metres where they displace something.
RIVER, MOTORWAY, BROOK, LAKE, UPLAND, HILLS, MOOR, MOIST, BROAD, WOOD, SWEEP, BEND = range(12)
WARP_X, WARP_Y, FOLD_X, FOLD_Y = range(12, FIELDS)

# field, wavelength in metres, octaves, amplitude
_NOISES = np.array(
    [
        (UPLAND, 24000.0, 3, 0.75),
        (HILLS, 4200.0, 4, 55.0),
        (MOOR, 3000.0, 5, 1.0),
        (MOIST, 5200.0, 1, 1.0),
        (BROAD, 2600.0, 1, 1.0),
        (WOOD, 3300.0, 5, 1.0),
        (SWEEP, 1200.0, 2, 1.0),
        (BEND, 800.0, 1, 30.0),
        (WARP_X, 1900.0, 1, 260.0),
        (WARP_Y, 1900.0, 1, 260.0),
        (FOLD_X, 5200.0, 1, 900.0),
        (FOLD_Y, 5200.0, 1, 900.0),
    ]
)
# field, metres between parallel lines, where one of them crosses the world's centre, swing in metres
_LINES = np.array(
    [
        (RIVER, 36000.0, 5000.0, 2600.0),
        (MOTORWAY, 30000.0, -8000.0, 2400.0),
        (BROOK, 7000.0, 0.0, 1500.0),
    ]
)
# a line's winding: wavelength in metres, share of its swing
_WINDINGS = np.array([(11000.0, 1.0), (2900.0, 0.27), (900.0, 0.07)])
# octaves count upwards from a salt, so they stand 20 apart
_SALT_OF_FIELD, _LAKE_SALT = 20, 400


@dataclass(frozen=True, slots=True, eq=False)
class Backdrop:
    """Slow fields over a part of the world.

    key: the world's. west, south: of the first node, metres. fields: float32 [ny, nx, FIELDS], south to north.
    """

    key: np.uint64
    west: float
    south: float
    fields: np.ndarray


def make_backdrop(key: np.uint64, west: float, south: float, east: float, north: float) -> Backdrop:
    """The backdrop over the bounds, in metres of the world, and a margin around them."""
    i = math.floor((west - MARGIN_M) / SPACING_M)
    j = math.floor((south - MARGIN_M) / SPACING_M)
    nx = math.ceil((east + MARGIN_M) / SPACING_M) - i + 2
    ny = math.ceil((north + MARGIN_M) / SPACING_M) - j + 2
    fields = np.empty((ny, nx, FIELDS), np.float32)
    _fill(key, i, j, fields)
    return Backdrop(key, i * SPACING_M, j * SPACING_M, fields)


@typed("float64(float32[:, :, ::1], float64, float64, int64, float64, float64)")
def sample(fields, west, south, field, x, y):
    """A slow field at a point, bilinear between nodes; points beyond the lattice take its edge."""
    ny, nx, _ = fields.shape
    u = min(max((x - west) / SPACING_M, 0.0), nx - 1.001)
    v = min(max((y - south) / SPACING_M, 0.0), ny - 1.001)
    i, j = int(u), int(v)
    du, dv = u - i, v - j
    low = fields[j, i, field] + du * (fields[j, i + 1, field] - fields[j, i, field])
    high = fields[j + 1, i, field] + du * (fields[j + 1, i + 1, field] - fields[j + 1, i, field])
    return low + dv * (high - low)


@jit
def _line(key, salt, along, across, spacing, swing):
    """Signed metres to the nearest of winding lines that run ``spacing`` apart."""
    index = math.floor(across / spacing + 0.5)
    key = mix(key, salt, index, 0)
    offset, slope = across - (index + 0.3 * (unit(key) - 0.5)) * spacing, 0.0
    for turn in range(_WINDINGS.shape[0]):
        for side in range(-1, 2):
            bent = swing * _WINDINGS[turn, 1] * noise(key, salt + turn, (along + 20.0 * side) / _WINDINGS[turn, 0], 0.5)
            if side == 0:
                offset -= bent
            else:
                slope += side * bent / 40.0
    return offset / math.sqrt(1.0 + slope * slope)


@jit
def _lake(key, x, y):
    """Depth in a lake: 1 at its centre, 0 at the shore, negative outside; at most one in 10 km."""
    size = 10000.0
    i, j = math.floor(x / size), math.floor(y / size)
    h = mix(key, _LAKE_SALT, i, j)
    if unit(h) > 0.75:
        return -2.0
    px = (i + 0.3 + 0.4 * unit(mix(h, _LAKE_SALT, 1, 0))) * size - x
    py = (j + 0.3 + 0.4 * unit(mix(h, _LAKE_SALT, 2, 0))) * size - y
    radius = 400.0 + 1700.0 * unit(mix(h, _LAKE_SALT, 3, 0)) ** 2
    long, broad = 0.8 * px + 0.6 * py, 0.8 * py - 0.6 * px
    ragged = 0.6 * fractal(key, _LAKE_SALT + 1, x / (1.2 * radius), y / (1.2 * radius), 3)
    return max(-2.0, 1.0 - math.sqrt(0.55 * long * long + 1.8 * broad * broad) / radius + ragged)


@jit
def _fill(key, first_column, first_row, fields):
    """Every field of every node; the first node is column first_column, row first_row of the world's lattice."""
    ny, nx, _ = fields.shape
    for j in range(ny):
        for i in range(nx):
            x, y = (first_column + i) * SPACING_M, (first_row + j) * SPACING_M
            node = fields[j, i]
            for k in range(_NOISES.shape[0]):
                field, wavelength, octaves = int(_NOISES[k, 0]), _NOISES[k, 1], int(_NOISES[k, 2])
                value = fractal(key, _SALT_OF_FIELD * field, x / wavelength, y / wavelength, octaves)
                node[field] = _NOISES[k, 3] * value
            for k in range(_LINES.shape[0]):
                field = int(_LINES[k, 0])
                along, across = (y, x) if field == RIVER else (x, y)
                salt = _SALT_OF_FIELD * field
                node[field] = _line(key, salt, along, across - _LINES[k, 2], _LINES[k, 1], _LINES[k, 3])
            node[HILLS] += 480.0 - y / 300.0
            # the main river has cut a wide valley into the mountains
            valley = 0.08 + 0.92 * smoothstep(600.0, 4200.0, abs(node[RIVER]))
            node[UPLAND] = valley * smoothstep(0.55, 1.2, 0.66 + node[UPLAND] - y / 32000.0)
            # lakes keep clear of the motorway and of slopes
            dry = 1.0 - smoothstep(0.0, 1200.0, abs(node[MOTORWAY])) + smoothstep(0.05, 0.2, node[UPLAND])
            node[LAKE] = _lake(key, x, y) - 2.0 * dry
