"""Compiled arithmetic of preprocess.ground, for the few points of a tile, where NumPy's calls would be most of it."""

import math

import numpy as np
from numba import njit


@njit(nogil=True, cache=True)
def cap(lon_PQ, lat_PQ):
    """(x, y, z, radius) of a circle on the Earth that holds a place, of points of a lattice over it in degrees.

    Unit vector to its middle, radius in radians; a radius of NaN where points lie all around or are not known.
    """
    P, Q = lon_PQ.shape
    points = np.empty((P, Q, 3))
    middle = np.zeros(3)
    for p in range(P):
        for q in range(Q):
            lon, lat = math.radians(lon_PQ[p, q]), math.radians(lat_PQ[p, q])
            points[p, q, 0] = math.cos(lat) * math.cos(lon)
            points[p, q, 1] = math.cos(lat) * math.sin(lon)
            points[p, q, 2] = math.sin(lat)
            middle += points[p, q]
    middle /= P * Q
    length = math.sqrt((middle**2).sum())
    if not length > 0.1:
        return 0.0, 0.0, 1.0, np.nan
    middle /= length
    between, reach = 0.0, 0.0
    for p in range(P):
        for q in range(Q):
            if p:
                between = max(between, ((points[p, q] - points[p - 1, q]) ** 2).sum())
            if q:
                between = max(between, ((points[p, q] - points[p, q - 1]) ** 2).sum())
            cosine = (points[p, q] * middle).sum()
            reach = max(reach, math.acos(max(-1.0, min(1.0, cosine))))
    # no ground of the place is farther from all points than their neighbours are; chords are under twice an arc / pi
    radius = min(math.pi, reach + math.sqrt(between) * math.pi / 2 + 1e-6)
    return middle[0], middle[1], middle[2], radius
