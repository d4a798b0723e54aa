"""Where grids lie on the Earth, and how long their pixels are on the ground."""

import math

import numpy as np

from preprocess import raster
from preprocess.blocks import EARTH_RADIUS_M
from preprocess.grid import Grid

WGS84 = "EPSG:4326"

# A degree of longitude shrinks to nothing at a pole; a geographic map's pixels are sized as if no nearer than this.
SIZED_LATITUDE = 85.0

Cap = tuple[float, float, float, float]

EVERYWHERE: Cap = (0.0, 0.0, 1.0, math.pi)


def on_sphere(lon: np.ndarray, lat: np.ndarray) -> np.ndarray:
    """Unit vectors [..., 3] of degrees."""
    lon, lat = np.radians(lon), np.radians(lat)
    return np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], axis=-1)


def cap_of(grid: Grid, crs: str, parts: int = 16) -> Cap:
    """A circle on the Earth that holds a grid; the whole Earth where its CRS cannot express all of its ground."""
    points = on_sphere(*raster.transform_points(crs, WGS84, *grid.xy(*regular(grid, parts))))
    middle = points.mean(axis=(0, 1))
    length = float(np.linalg.norm(middle))
    if not length > 0.1:  # not a number, or points all around
        return EVERYWHERE
    middle = middle / length
    between = max(float(np.linalg.norm(np.diff(points, axis=axis), axis=-1).max()) for axis in (0, 1))
    reach = float(np.arccos(np.clip(points @ middle, -1, 1)).max())
    # no ground of the grid is farther from all points than their neighbours are; chords are under twice an arc / pi
    return float(middle[0]), float(middle[1]), float(middle[2]), min(math.pi, reach + between * math.pi / 2 + 1e-6)


def apart(a: Cap, b: Cap) -> bool:
    """Whether two caps certainly share no ground."""
    cosine = a[0] * b[0] + a[1] * b[1] + a[2] * b[2]
    return math.acos(max(-1.0, min(1.0, cosine))) > a[3] + b[3]


def ground_steps(grid: Grid, crs: str, column: float, row: float) -> tuple[float, float]:
    """Length in metres on the ground of one pixel along columns and along rows, at a pixel position."""
    columns = np.array([column - 0.5, column + 0.5, column, column])
    rows = np.array([row, row, row - 0.5, row + 0.5])
    ends = on_sphere(*raster.transform_points(crs, WGS84, *grid.xy(columns, rows)))
    # chords, which for pixels are as long as arcs; unlike differences of longitude they hold at a pole
    return float(np.linalg.norm(ends[1] - ends[0])) * EARTH_RADIUS_M, float(
        np.linalg.norm(ends[3] - ends[2])
    ) * EARTH_RADIUS_M


def middle_of(grid: Grid, crs: str) -> tuple[float, float]:
    """(column, row) of a grid's middle, or of the nearest place to it whose pixel lies on the Earth."""
    columns, rows = regular(grid, 16)
    known = np.ones(columns.shape, bool)
    for dx, dy in ((-0.5, 0), (0.5, 0), (0, -0.5), (0, 0.5)):
        known &= np.isfinite(raster.transform_points(crs, WGS84, *grid.xy(columns + dx, rows + dy))[0])
    away = np.where(known, np.hypot(columns - grid.width / 2, rows - grid.height / 2), np.inf)
    nearest = int(away.argmin())
    return float(columns.flat[nearest]), float(rows.flat[nearest])


def regular(grid: Grid, parts: int) -> tuple[np.ndarray, np.ndarray]:
    columns, rows = np.meshgrid(np.linspace(0, grid.width, parts + 1), np.linspace(0, grid.height, parts + 1))
    return columns, rows
