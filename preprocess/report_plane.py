"""The plane that a report's map is drawn on: the Earth around a dataset's middle, in metres.

Lambert's azimuthal equal-area projection on a sphere, so that poles and the antimeridian are places like others; for
datasets all over the Earth longitude and latitude themselves. Formulas: Snyder, Map Projections (1987), page 185.
"""

import math
from dataclasses import dataclass
from typing import Self

import numpy as np

from preprocess.blocks import EARTH_RADIUS_M
from preprocess.coordinates import WGS84, transform_points
from preprocess.grid import Grid
from preprocess.ground import on_sphere
from preprocess.place import Place

WIDEST = math.radians(55)  # of the circle that holds all tiles; beyond it shapes at the rim suffer


@dataclass(frozen=True, slots=True)
class Plane:
    """longitude, latitude: degrees of the middle. world: whether it is a plain map of longitudes and latitudes."""

    longitude: float
    latitude: float
    world: bool

    def forward(self, lon: np.ndarray, lat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(x, y) in metres, y to the north."""
        turned = (np.asarray(lon, np.float64) - self.longitude + 180) % 360 - 180
        away, phi, phi0 = np.radians(turned), np.radians(lat), math.radians(self.latitude)
        if self.world:
            return EARTH_RADIUS_M * away, EARTH_RADIUS_M * phi
        cosine = math.sin(phi0) * np.sin(phi) + math.cos(phi0) * np.cos(phi) * np.cos(away)
        k = EARTH_RADIUS_M * np.sqrt(2 / np.maximum(1 + cosine, 1e-9))
        north = math.cos(phi0) * np.sin(phi) - math.sin(phi0) * np.cos(phi) * np.cos(away)
        return k * np.cos(phi) * np.sin(away), k * north

    def inverse(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(longitude, latitude) in degrees; NaN beyond the edge of the Earth."""
        phi0 = math.radians(self.latitude)
        x, y = np.asarray(x, np.float64) / EARTH_RADIUS_M, np.asarray(y, np.float64) / EARTH_RADIUS_M
        if self.world:
            inside = (np.abs(x) <= math.pi) & (np.abs(y) <= math.pi / 2)
            lon, lat = np.degrees(x) + self.longitude, np.degrees(y)
        else:
            rho = np.hypot(x, y)
            inside = rho <= 2
            c = 2 * np.arcsin(np.minimum(rho / 2, 1))
            share = np.where(rho > 0, y / np.maximum(rho, 1e-300), 0)
            lat = np.degrees(np.arcsin(np.clip(np.cos(c) * math.sin(phi0) + share * np.sin(c) * math.cos(phi0), -1, 1)))
            down = rho * math.cos(phi0) * np.cos(c) - y * math.sin(phi0) * np.sin(c)
            lon = self.longitude + np.degrees(np.arctan2(x * np.sin(c), down))
        lon = (lon + 180) % 360 - 180
        return np.where(inside, lon, np.nan), np.where(inside, lat, np.nan)


def plane_of(lon: np.ndarray, lat: np.ndarray) -> Plane:
    """The plane that suits places given in degrees."""
    points = on_sphere(lon, lat)
    middle = points.mean(axis=0)
    length = float(np.linalg.norm(middle))
    if length > 0.1:
        middle = middle / length
        reach = math.acos(max(-1.0, min(1.0, float((points @ middle).min()))))
        if reach <= WIDEST:
            return Plane(
                math.degrees(math.atan2(middle[1], middle[0])), math.degrees(math.asin(middle[2])), world=False
            )
    return Plane(0.0, 0.0, world=True)


@dataclass(frozen=True, slots=True)
class MapPlace(Place):
    """Pixels over a part of a plane, so that land cover can be looked up under them."""

    plane: Plane
    grid: Grid

    @property
    def width(self) -> int:
        return self.grid.width

    @property
    def height(self) -> int:
        return self.grid.height

    def window(self, column: int, row: int, width: int, height: int) -> Self:
        return type(self)(self.plane, self.grid.window(column, row, width, height))

    def subdivided(self, kx: int, ky: int) -> Self:
        return type(self)(self.plane, self.grid.subdivided(kx, ky))

    def points(self, target: str, columns: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        lon, lat = self.plane.inverse(*self.grid.xy(columns, rows))
        return transform_points(WGS84, target, lon, lat)
