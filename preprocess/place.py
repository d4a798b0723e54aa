"""Where a raster's pixels lie on the Earth: a size in pixels, and coordinates of pixel positions in any CRS.

A place is immutable plain data that travels to workers. Parts of a place and finer pixels over it are places too, so
size and ground cannot drift apart. (0, 0) is the outer corner of the first pixel, (0.5, 0.5) its centre.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Self

import numpy as np

from preprocess.coordinates import transform_points
from preprocess.grid import Grid, Transform


class Place(ABC):
    """Ground of width x height pixels."""

    __slots__ = ()

    @property
    @abstractmethod
    def width(self) -> int: ...

    @property
    @abstractmethod
    def height(self) -> int: ...

    @abstractmethod
    def window(self, column: int, row: int, width: int, height: int) -> Self:
        """The part that begins at (column, row). Raises ValueError if it leaves the place."""

    @abstractmethod
    def subdivided(self, kx: int, ky: int) -> Self:
        """The same ground with kx by ky pixels in place of each one."""

    @abstractmethod
    def points(self, target: str, columns: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Exact coordinates (x, y) in the CRS ``target`` (WKT or EPSG:..) of pixel positions of equal shapes, float64.

        NaN where the target cannot express a point. Geographic coordinates are longitude, latitude in degrees.
        """

    @abstractmethod
    def georeference(self) -> tuple[Transform, str]:
        """(transform, WKT) for the record: x = a*column + b*row + c, y = d*column + e*row + f in that CRS."""


@dataclass(frozen=True, slots=True)
class AffinePlace(Place):
    """A grid in a CRS (WKT)."""

    grid: Grid
    crs: str

    @property
    def width(self) -> int:
        return self.grid.width

    @property
    def height(self) -> int:
        return self.grid.height

    def window(self, column: int, row: int, width: int, height: int) -> Self:
        return type(self)(self.grid.window(column, row, width, height), self.crs)

    def subdivided(self, kx: int, ky: int) -> Self:
        return type(self)(self.grid.subdivided(kx, ky), self.crs)

    def points(self, target: str, columns: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return transform_points(self.crs, target, *self.grid.xy(columns, rows))

    def georeference(self) -> tuple[Transform, str]:
        return self.grid.transform, self.crs
