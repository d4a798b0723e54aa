"""How the demo landscape looks from orbit: light on slopes, clouds and their shadows, haze, a sensor's blur and noise.

Shape letters: B bands (blue, green, red, near infrared), H rows from north to south, W columns, N nodes.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from preprocess.demo_backdrop import Backdrop
from preprocess.demo_materials import BANDS, SPECTRA
from preprocess.demo_noise import fractal, jit, mix, noise, smoothstep, unit
from preprocess.demo_survey import PIXEL_M, Frame, place, survey
from preprocess.demo_town import IMAGE_EPOCH

HALO = 2  # pixels around a strip for slopes and blur
STRIP_ROWS = 120
_CLOUD_BASE_M = 1300.0
_AMBIENT = 0.38
_CIRRUS, _PUFFS, _HAZE, _GRAIN = range(700, 780, 20)
# What the air adds to each band in clear weather, as reflectance, and the share of the ground's light it keeps.
_PATH = np.array([0.021, 0.013, 0.008, 0.003], np.float32)
_KEPT = np.array([0.93, 0.955, 0.97, 0.985], np.float32)


@dataclass(frozen=True, slots=True)
class Sky:
    """One overpass. key: its weather. season: 0 June to 1 September. sun_*: degrees, azimuth from north."""

    key: np.uint64
    season: float
    sun_azimuth: float
    sun_elevation: float

    def sun(self) -> tuple[float, float, float]:
        """Unit vector to the sun: east, north, up."""
        azimuth, elevation = math.radians(self.sun_azimuth), math.radians(self.sun_elevation)
        flat = math.cos(elevation)
        return math.sin(azimuth) * flat, math.cos(azimuth) * flat, math.sin(elevation)


@jit
def _cloud(key, x, y):
    """Opacity of the clouds over a point, 0 to 1: a cumulus here and there.

    They cover about half a per cent: more than one per cent would be what a stretch by percentiles ends at.
    """
    size = 9000.0
    i, j = math.floor(x / size), math.floor(y / size)
    h = mix(key, _PUFFS, i, j)
    if unit(h) > 0.4:
        return 0.0
    radius = 600.0 + 1100.0 * unit(mix(h, _PUFFS, 1, 0)) ** 2
    dx = (i + 0.3 + 0.4 * unit(mix(h, _PUFFS, 2, 0))) * size - x
    dy = (j + 0.3 + 0.4 * unit(mix(h, _PUFFS, 3, 0))) * size - y
    inside = 1.0 - math.sqrt(0.7 * dx * dx + 1.4 * dy * dy) / radius
    if inside < 0.0:
        return 0.0
    puff = fractal(key, _PUFFS + 1, x / 1500.0, y / 1500.0, 6)
    return smoothstep(0.25, 0.85, inside + 0.75 * puff) * smoothstep(0.0, 0.3, inside)


@jit
def _illuminate(key, nodes, first_row, sun, first_HW, second_HW, share_HW, tone_HW, height_HW, light_BHW):
    """Reflectance as seen from above: materials, relief shading, cloud shadows, haze, cirrus and clouds.

    sun: unit vector east, north, up. The arrays begin HALO pixels before (first_row, 0) on both axes.
    """
    bands, rows, columns = light_BHW.shape
    east, north, up = sun
    drift = _CLOUD_BASE_M / up
    for r in range(rows):
        above, below = max(r - 1, 0), min(r + 1, rows - 1)
        for c in range(columns):
            left, right = max(c - 1, 0), min(c + 1, columns - 1)
            x, y = place(nodes, first_row - HALO + r + 0.5, c - HALO + 0.5)
            gx = (height_HW[r, right] - height_HW[r, left]) / ((right - left) * PIXEL_M)
            gy = (height_HW[above, c] - height_HW[below, c]) / ((below - above) * PIXEL_M)
            facing = (up - gx * east - gy * north) / math.sqrt(gx * gx + gy * gy + 1.0)
            direct = max(0.0, facing) / up * (1.0 - 0.85 * _cloud(key, x + drift * east, y + drift * north))
            lit = (_AMBIENT + (1.0 - _AMBIENT) * direct) * tone_HW[r, c]
            cloud = _cloud(key, x, y)
            white = 0.42 + 0.36 * cloud
            veil = 0.02 * max(0.0, fractal(key, _CIRRUS, (x + y) / 9000.0, (y - x) / 30000.0, 3))
            thick = 1.0 + 0.4 * noise(key, _HAZE, x / 8000.0, y / 8000.0) - 0.0003 * (height_HW[r, c] - 500.0)
            thick = max(0.3, thick)
            share = share_HW[r, c]
            for b in range(bands):
                ground = (1.0 - share) * SPECTRA[first_HW[r, c], b] + share * SPECTRA[second_HW[r, c], b]
                seen = ground * lit * _KEPT[b] + _PATH[b] * thick + veil
                light_BHW[b, r, c] = seen + 0.97 * cloud * (white - seen)


@jit
def _record(key, first_row, light_BHW, counts_BHW):
    """Blur, noise and quantisation: light with HALO pixels around, to reflectance times 10,000 as uint16."""
    bands, rows, columns = counts_BHW.shape
    side, middle = 0.15, 0.70
    low, shift = np.uint64(0xFFFF), np.uint64(16)
    for b in range(bands):
        for r in range(rows):
            for c in range(columns):
                total = 0.0
                for dr in range(-1, 2):
                    line = light_BHW[b, r + HALO + dr]
                    at = c + HALO
                    blurred = side * line[at - 1] + middle * line[at] + side * line[at + 1]
                    total += blurred * (middle if dr == 0 else side)
                h = mix(key, _GRAIN + b, first_row + r, c)
                # four 16-bit numbers add up to nearly a normal one, of standard deviation 37,837
                bell = np.int64(h & low) + np.int64((h >> shift) & low)
                bell += np.int64((h >> (shift + shift)) & low) + np.int64(h >> (shift + shift + shift))
                value = 10000.0 * total
                value += (7.0 + 0.007 * value) * (bell - 131070.0) / 37837.0
                counts_BHW[b, r, c] = np.uint16(min(10000.0, max(1.0, value + 0.5)))


def _strip(backdrop: Backdrop, frame: Frame, sky: Sky, first_row: int, counts_BHW: np.ndarray) -> None:
    bands, rows, columns = counts_BHW.shape
    shape = (rows + 2 * HALO, columns + 2 * HALO)
    ground = survey(backdrop, frame, first_row - HALO, -HALO, shape, sky.season, IMAGE_EPOCH)
    light = np.empty((bands, *shape), np.float32)
    _illuminate(
        sky.key, frame.nodes, first_row, sky.sun(),
        ground.first, ground.second, ground.share, ground.tone, ground.height, light,
    )  # fmt: skip
    _record(sky.key, first_row, light, counts_BHW)


def photograph(backdrop: Backdrop, frame: Frame, sky: Sky, threads: int) -> np.ndarray:
    """The scene as uint16 [4, rows, columns]: surface reflectance times 10,000, between 1 and 10,000.

    The result does not depend on ``threads``.
    """
    counts = np.empty((len(BANDS), frame.rows, frame.columns), np.uint16)
    firsts = range(0, frame.rows, STRIP_ROWS)
    with ThreadPoolExecutor(threads) as pool:
        tasks = [
            pool.submit(_strip, backdrop, frame, sky, first, counts[:, first : first + STRIP_ROWS]) for first in firsts
        ]
    for task in tasks:
        task.result()
    return counts
