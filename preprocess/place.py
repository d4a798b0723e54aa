"""Where a raster's pixels lie on the Earth: a size in pixels, and coordinates of pixel positions in any CRS.

A place is immutable plain data that travels to workers. Parts of a place and finer pixels over it are places too, so
size and ground cannot drift apart. (0, 0) is the outer corner of the first pixel, (0.5, 0.5) its centre.
"""

import math
from dataclasses import dataclass, replace
from typing import Protocol, Self

import numpy as np

from preprocess.coordinates import is_geographic, transform_points, wkt_of
from preprocess.geolocation import Model
from preprocess.grid import Grid, Transform


class Place(Protocol):
    """Ground of width x height pixels."""

    @property
    def width(self) -> int: ...

    @property
    def height(self) -> int: ...

    @property
    def smooth(self) -> bool:
        """Whether interpolation between ever nearer points soon becomes exact; not so over a DEM with its cells."""
        return True

    def window(self, column: int, row: int, width: int, height: int) -> Self:
        """The part that begins at (column, row). Raises ValueError if it leaves the place."""
        ...

    def subdivided(self, kx: int, ky: int) -> Self:
        """The same ground with kx by ky pixels in place of each one."""
        ...

    def points(self, target: str, columns: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Exact coordinates (x, y) in the CRS ``target`` (WKT or EPSG:..) of pixel positions of equal shapes, float64.

        NaN where the target cannot express a point. Geographic coordinates are longitude, latitude in degrees.
        """
        ...


class ScenePlace(Place, Protocol):
    """Ground of an image's pixels, which become records."""

    def georeference(self) -> tuple[Transform, str]:
        """(transform, WKT) for the record: x = a*column + b*row + c, y = d*column + e*row + f in that CRS."""
        ...


@dataclass(frozen=True, slots=True)
class AffinePlace:
    """A grid in a CRS (WKT)."""

    grid: Grid
    crs: str

    @property
    def width(self) -> int:
        return self.grid.width

    @property
    def height(self) -> int:
        return self.grid.height

    @property
    def smooth(self) -> bool:
        return True

    def window(self, column: int, row: int, width: int, height: int) -> Self:
        return replace(self, grid=self.grid.window(column, row, width, height))

    def subdivided(self, kx: int, ky: int) -> Self:
        return replace(self, grid=self.grid.subdivided(kx, ky))

    def points(self, target: str, columns: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return transform_points(self.crs, target, *self.grid.xy(columns, rows))

    def georeference(self) -> tuple[Transform, str]:
        return self.grid.transform, self.crs


@dataclass(frozen=True, slots=True)
class SensorPlace:
    """Pixels of an image without a map projection, placed by a model of the whole image.

    frame: the grid of this place in pixels of the whole image; its transform leads to positions there.
    """

    model: Model
    frame: Grid

    @property
    def width(self) -> int:
        return self.frame.width

    @property
    def height(self) -> int:
        return self.frame.height

    @property
    def smooth(self) -> bool:
        return self.model.smooth

    def window(self, column: int, row: int, width: int, height: int) -> Self:
        return replace(self, frame=self.frame.window(column, row, width, height))

    def subdivided(self, kx: int, ky: int) -> Self:
        return replace(self, frame=self.frame.subdivided(kx, ky))

    def points(self, target: str, columns: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return transform_points(self.model.crs, target, *self.model.located(*self.frame.xy(columns, rows)))

    def georeference(self) -> tuple[Transform, str]:
        """The affine transform nearest to the model over this place, by least squares, in the model's CRS."""
        columns, rows = np.meshgrid(np.linspace(0, self.width, FITTED), np.linspace(0, self.height, FITTED))
        x, y = self.model.located(*self.frame.xy(columns, rows))
        known = np.isfinite(x)
        columns, rows, x, y = columns[known], rows[known], x[known], y[known]
        if is_geographic(self.model.crs) and len(x):
            x = x[0] + (x - x[0] + 180) % 360 - 180
        return (*_plane(columns, rows, x), *_plane(columns, rows, y)), wkt_of(self.model.crs)


FITTED = 9  # points a side that the affine transform of a sensor's place is fitted to


def _plane(columns: np.ndarray, rows: np.ndarray, values: np.ndarray) -> tuple[float, float, float]:
    """(a, b, c) of the plane a*column + b*row + c nearest to values, by least squares.

    Summed exactly: the same bits on every machine, whatever its linear algebra.
    """
    u, v, z = (math.fsum(axis.tolist()) / len(values) for axis in (columns, rows, values))
    p, q, r = columns - u, rows - v, values - z
    pp, pq, qq, pr, qr = (math.fsum((m * n).tolist()) for m, n in ((p, p), (p, q), (q, q), (p, r), (q, r)))
    determinant = pp * qq - pq * pq
    a, b = (pr * qq - qr * pq) / determinant, (qr * pp - pr * pq) / determinant
    return a, b, z - a * u - b * v


def image_frame(width: int, height: int) -> Grid:
    """The frame of a whole image."""
    return Grid(width, height, (1.0, 0.0, 0.0, 0.0, 1.0, 0.0))
