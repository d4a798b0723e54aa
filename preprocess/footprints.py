"""Footprints of tiles as GeoParquet geometry: rings in degrees, cut at the antimeridian, closed around a pole, as WKB.

A ring is the way around a tile in SIDE steps a side, from its first corner along columns, then rows, and back.
"""

import struct

import numpy as np

SIDE = 4  # steps a side: the lattice of preprocess.scan
RING = 4 * SIDE  # points of a ring, the first one not repeated
# Four corners are enough where straight sides in degrees stay within this share of a side of the true ones.
STRAIGHT = 0.005

_POLYGON = np.dtype([("order", "u1"), ("type", "<u4"), ("rings", "<u4"), ("points", "<u4"), ("xy", "<f8", (5, 2))])


def ring_of(longitudes_PP: np.ndarray, latitudes_PP: np.ndarray) -> np.ndarray:
    """The ring [..., RING, 2] of lattices [..., SIDE + 1, SIDE + 1] over tiles, (longitude, latitude)."""
    lattice = np.stack([longitudes_PP, latitudes_PP], axis=-1)
    sides = (
        lattice[..., 0, :-1, :],
        lattice[..., :-1, -1, :],
        lattice[..., -1, :0:-1, :],
        lattice[..., :0:-1, 0, :],
    )
    return np.concatenate(sides, axis=-2)


def unwrapped(rings_TR2: np.ndarray) -> np.ndarray:
    """Rings whose longitudes run on over the antimeridian, the first point within -180..180."""
    lon = np.unwrap(rings_TR2[..., 0], period=360, axis=-1)
    lon = lon - 360 * np.floor((lon[..., :1] + 180) / 360)
    return np.stack([lon, rings_TR2[..., 1]], axis=-1)


def _turns(rings_TR2: np.ndarray) -> np.ndarray:
    """Times each unwrapped ring goes around a pole, -1, 0 or 1."""
    back = rings_TR2[:, 0, 0] - rings_TR2[:, -1, 0]
    last = (back + 180) % 360 - 180
    return np.round((rings_TR2[:, -1, 0] - rings_TR2[:, 0, 0] + last) / 360).astype(int)


def _bent(rings_TR2: np.ndarray) -> np.ndarray:
    """Whether four corners would not do: bool [T]."""
    corners = rings_TR2[:, ::SIDE]
    following = np.roll(corners, -1, axis=1)
    steps = (np.arange(SIDE) / SIDE)[None, None, :, None]
    straight = (corners[:, :, None] * (1 - steps) + following[:, :, None] * steps).reshape(rings_TR2.shape)
    shrink = np.stack([np.cos(np.radians(rings_TR2[..., 1])), np.ones(rings_TR2.shape[:2])], axis=-1)
    off = np.linalg.norm((rings_TR2 - straight) * shrink, axis=-1).max(axis=1)
    side = np.linalg.norm((following - corners) * shrink[:, ::SIDE], axis=-1).max(axis=1)
    return np.logical_not(off <= STRAIGHT * side)


def wkb(rings_TR2: np.ndarray) -> tuple[list[bytes | None], np.ndarray]:
    """(WKB of each footprint, its bounds float64 [T, 4] as west, south, east, north); None and NaN for unknown ground.

    A Polygon, counter-clockwise; a MultiPolygon of two parts where it lies on both sides of the antimeridian. One
    that holds a pole goes up to it. Bounds are those of the parts, so -180 and 180 where there are two.
    """
    known = np.asarray(np.isfinite(rings_TR2).all(axis=(1, 2)))
    rings = unwrapped(np.where(known[:, None, None], rings_TR2, 0.0))
    plain = (_turns(rings) == 0) & (rings[..., 0].max(axis=1) <= 180) & (rings[..., 0].min(axis=1) >= -180)
    plain &= np.logical_not(_bent(rings) & known)
    bounds = np.concatenate([rings.min(axis=1), rings.max(axis=1)], axis=1)
    found: list[bytes | None] = list(_four_corners(rings[:, ::SIDE]))
    for t in np.flatnonzero(~plain).tolist():
        parts = _parts(rings[t])
        found[t] = _written(parts)
        points = np.concatenate(parts)
        bounds[t] = (*points.min(axis=0), *points.max(axis=0))
    bounds[known == 0] = np.nan
    return [written if there else None for written, there in zip(found, known.tolist(), strict=True)], bounds


def _four_corners(corners_T42: np.ndarray) -> list[bytes]:
    """WKB polygons of quadrilaterals, all at once."""
    x, y = corners_T42[..., 0], corners_T42[..., 1]
    area = (x * np.roll(y, -1, axis=1) - np.roll(x, -1, axis=1) * y).sum(axis=1)
    turned = np.where((area < 0)[:, None, None], corners_T42[:, ::-1], corners_T42)
    made = np.empty(len(turned), _POLYGON)
    made["order"], made["type"], made["rings"], made["points"] = 1, 3, 1, 5
    made["xy"][:, :4], made["xy"][:, 4] = turned, turned[:, 0]
    data, size = made.tobytes(), _POLYGON.itemsize
    return [data[at : at + size] for at in range(0, len(data), size)]


def _parts(ring_R2: np.ndarray) -> list[np.ndarray]:
    """Polygons [N, 2] within -180..180 that make up an unwrapped ring."""
    turns = int(_turns(ring_R2[None])[0])
    if turns:
        ring_R2 = _around_pole(ring_R2, turns)
    parts = []
    lowest, highest = ring_R2[:, 0].min(), ring_R2[:, 0].max()
    for turn in range(int(np.floor((lowest + 180) / 360)), int(np.ceil((highest - 180) / 360)) + 1):
        moved = ring_R2 - (360.0 * turn, 0)
        inside = _clipped(_clipped(moved, -180.0, 1), 180.0, -1)
        if len(inside) >= 3 and np.ptp(inside[:, 0]) > 0:
            parts.append(inside)
    return parts


def _around_pole(ring_R2: np.ndarray, turns: int) -> np.ndarray:
    """An unwrapped ring once around a pole as a polygon in degrees: from one edge of the world to the other along the
    ring, and back along the pole."""
    following = np.concatenate([ring_R2[1:], ring_R2[:1] + (360.0 * turns, 0)])
    world = np.floor((ring_R2[:, 0] + 180) / 360)
    crossing = int(np.flatnonzero(np.floor((following[:, 0] + 180) / 360) != world)[0])
    here, there = ring_R2[crossing], following[crossing]
    edge = 360 * max(np.floor((here[0] + 180) / 360), np.floor((there[0] + 180) / 360)) - 180
    latitude = here[1] + (edge - here[0]) / (there[0] - here[0]) * (there[1] - here[1])
    rest = np.concatenate([following[crossing:], ring_R2[1 : crossing + 1] + (360.0 * turns, 0)])
    pole = 90.0 if ring_R2[:, 1].mean() > 0 else -90.0
    start, end = edge, edge + 360.0 * turns
    ends = [(end, latitude), (end, pole), (start, pole)]
    polygon = np.concatenate([[(start, latitude)], rest, ends])
    return polygon - (min(start, end) + 180, 0)


def _clipped(points_N2: np.ndarray, edge: float, sign: int) -> np.ndarray:
    """The part of a polygon on one side of a meridian (Sutherland and Hodgman): sign * x >= sign * edge."""
    kept: list[np.ndarray] = []
    for here, there in zip(points_N2, np.roll(points_N2, -1, axis=0), strict=True):
        inside, next_inside = sign * here[0] >= sign * edge, sign * there[0] >= sign * edge
        if inside:
            kept.append(here)
        if inside != next_inside:
            share = (edge - here[0]) / (there[0] - here[0])
            kept.append(np.array([edge, here[1] + share * (there[1] - here[1])]))
    return np.array(kept).reshape(-1, 2)


def _written(parts: list[np.ndarray]) -> bytes:
    polygons = []
    for part in parts:
        x, y = part[:, 0], part[:, 1]
        if (x * np.roll(y, -1) - np.roll(x, -1) * y).sum() < 0:
            part = part[::-1]
        closed = np.concatenate([part, part[:1]])
        polygons.append(struct.pack("<BIII", 1, 3, 1, len(closed)) + closed.astype("<f8").tobytes())
    return polygons[0] if len(polygons) == 1 else struct.pack("<BII", 1, 6, len(polygons)) + b"".join(polygons)
