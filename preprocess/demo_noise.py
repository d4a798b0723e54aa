"""Noise that is a pure function of a key and a position: the same wherever, in whatever order it is asked for.

Coordinates are in cells (metres over a wavelength); lattice points are hashed, so nothing is stored and the
world has no edge. All functions are scalar and compiled; callers loop.
"""

import hashlib
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba.core import config


def _cache_folder() -> str:
    """Where compiled code of these very sources is kept. numba looks only at the file a function stands in, and
    would go on using old code of what it calls in another one."""
    here = Path(__file__).parent
    sources = b"".join(path.read_bytes() for path in sorted(here.glob("demo_*.py")))
    return str(here / "__pycache__" / f"demo-{hashlib.sha256(sources).hexdigest()[:12]}")


_CACHE_FOLDER = _cache_folder()


def jit(function: Callable[..., Any], signature: str | None = None) -> Any:
    """numba.njit for the demo's scalar functions, compiled once for one state of the sources.

    signature: types to compile for at once. Without one, numba compiles a function anew for every constant that it
    is called with: for the small ones below that took most of the time. error_model="numpy": no branch for a
    division by zero. nogil: strips of a scene are painted in threads.
    """
    writable = os.access(Path(__file__).parent, os.W_OK)
    settings: Any = config
    usual = settings.CACHE_DIR  # read while a function is decorated
    try:
        if writable:
            settings.CACHE_DIR = _CACHE_FOLDER
        return numba.njit(signature, cache=writable, nogil=True, error_model="numpy")(function)
    finally:
        settings.CACHE_DIR = usual


def typed(signature: str) -> Callable[[Callable[..., Any]], Any]:
    """:func:`jit` with a signature."""
    return lambda function: jit(function, signature)


Key = np.uint64
_A, _B, _C = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F), np.uint64(0x165667B19E3779F9)
_D, _E = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S27, _S31, _S32, _S11 = np.uint64(27), np.uint64(31), np.uint64(32), np.uint64(11)
_LOW = np.uint64(0xFFFF)


@typed("uint64(uint64, int64, int64, int64)")
def mix(key: Key, salt: int, i: int, j: int) -> Key:
    """64 bits that look random for (key, salt, i, j). The finisher is splitmix64's."""
    h = key ^ (np.uint64(salt) * _C)
    h = (h ^ np.uint64(i)) * _A
    h = (h ^ (h >> _S32) ^ np.uint64(j)) * _B
    h = (h ^ (h >> _S27)) * _D
    h = (h ^ (h >> _S31)) * _E
    return h ^ (h >> _S31)


@typed("float64(uint64)")
def unit(h: Key) -> float:
    """The upper 53 bits as a number in [0, 1)."""
    return np.int64(h >> _S11) * 1.1102230246251565e-16


@typed("float64(uint64, int64, int64, int64)")
def chance(key: Key, salt: int, i: int, j: int) -> float:
    """A uniform number in [0, 1) for a lattice point."""
    return unit(mix(key, salt, i, j))


@typed("float64(float64, float64, float64)")
def smoothstep(low: float, high: float, x: float) -> float:
    """0 below ``low``, 1 above ``high``, smooth between."""
    t = min(1.0, max(0.0, (x - low) / (high - low)))
    return t * t * (3.0 - 2.0 * t)


@typed("float64(uint64, int64, int64, int64, float64, float64)")
def _corner(key: Key, salt: int, i: int, j: int, dx: float, dy: float) -> float:
    h = mix(key, salt, i, j)
    gx = np.int64(h & _LOW) - 32767.5
    gy = np.int64((h >> _S32) & _LOW) - 32767.5
    return (gx * dx + gy * dy) * 3.0517578125e-05


@typed("float64(uint64, int64, float64, float64)")
def noise(key: Key, salt: int, x: float, y: float) -> float:
    """Gradient noise of wavelength 1, mean 0, standard deviation about 0.3, within -1.7 and 1.7."""
    fx, fy = math.floor(x), math.floor(y)
    i, j = np.int64(fx), np.int64(fy)
    dx, dy = x - fx, y - fy
    wx = dx * dx * dx * (dx * (dx * 6.0 - 15.0) + 10.0)
    wy = dy * dy * dy * (dy * (dy * 6.0 - 15.0) + 10.0)
    low = _corner(key, salt, i, j, dx, dy)
    low += wx * (_corner(key, salt, i + 1, j, dx - 1.0, dy) - low)
    high = _corner(key, salt, i, j + 1, dx, dy - 1.0)
    high += wx * (_corner(key, salt, i + 1, j + 1, dx - 1.0, dy - 1.0) - high)
    return 1.7 * (low + wy * (high - low))


@typed("float64(uint64, int64, float64, float64, int64)")
def fractal(key: Key, salt: int, x: float, y: float, octaves: int) -> float:
    """Sum of octaves, each turned by 37 degrees, twice as fine and half as strong as the one before."""
    total, strength = 0.0, 1.0
    for octave in range(octaves):
        total += strength * noise(key, salt + octave, x, y)
        x, y = 1.6 * x + 1.2 * y, 1.6 * y - 1.2 * x
        strength *= 0.5
    return total


@typed("float64(uint64, int64, float64, float64, int64)")
def ridges(key: Key, salt: int, x: float, y: float, octaves: int) -> float:
    """Ridged multifractal, 0 to about 1.7: sharp crests, valleys smoother than they (after Musgrave)."""
    total, strength, weight = 0.0, 0.75, 1.0
    for octave in range(octaves):
        crest = 1.0 - min(1.0, abs(1.5 * noise(key, salt + octave, x, y)))
        total += strength * weight * crest * crest
        weight = 0.45 + 0.55 * weight * crest
        x, y = 1.6 * x + 1.2 * y, 1.6 * y - 1.2 * x
        strength *= 0.48
    return total


@typed("Tuple((int64, int64, float64))(uint64, int64, float64, float64)")
def cell(key: Key, salt: int, x: float, y: float) -> tuple[Any, Any, float]:
    """The Voronoi cell of a jittered lattice at a point: its lattice indices, and the distance to its border."""
    fi, fj = math.floor(x), math.floor(y)
    best, second = 1e9, 1e9
    bi, bj, bx, by, sx, sy = fi, fj, 0.0, 0.0, 1.0, 1.0
    for dj in range(-1, 2):
        for di in range(-1, 2):
            i, j = fi + di, fj + dj
            h = mix(key, salt, np.int64(i), np.int64(j))
            # 0.8 of the cell: with full jitter a nearer point could stand outside the 3 x 3 neighbours
            px = i + 0.1 + 0.8 * (np.int64(h & _LOW) * 1.52587890625e-05)
            py = j + 0.1 + 0.8 * (np.int64((h >> _S32) & _LOW) * 1.52587890625e-05)
            d = (px - x) * (px - x) + (py - y) * (py - y)
            if d < best:
                second, sx, sy = best, bx, by
                best, bi, bj, bx, by = d, i, j, px, py
            elif d < second:
                second, sx, sy = d, px, py
    apart = math.sqrt((sx - bx) * (sx - bx) + (sy - by) * (sy - by))
    return np.int64(bi), np.int64(bj), (second - best) / (2.0 * max(apart, 1e-6))
