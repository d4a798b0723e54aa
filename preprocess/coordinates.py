"""CRS, and coordinates of one in another: the part of GDAL that opens no file."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import rasterio
import rasterio.env
from rasterio._err import CPLE_BaseError
from rasterio.crs import CRS
from rasterio.errors import CRSError
from rasterio.warp import transform as warp_points

from preprocess.errors import RasterError

WGS84 = "EPSG:4326"
_TRADITIONAL = "OGR_CT_FORCE_TRADITIONAL_GIS_ORDER"


def wkt_of(crs: str) -> str:
    """WKT of a CRS given as WKT or EPSG:.."""
    return _parsed(crs).to_wkt()


def is_geographic(crs: str) -> bool:
    """Whether its coordinates are longitudes and latitudes."""
    return _parsed(crs).is_geographic


def transform_points(source: str, target: str, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates in another CRS (both WKT or EPSG:..), float64, NaN where the target cannot express a point.

    Geographic coordinates are longitude, latitude in degrees.
    """
    if source == target:
        return np.array(x, np.float64), np.array(y, np.float64)
    shape = np.shape(x)
    flat = np.array([np.ravel(x), np.ravel(y)], np.float64)
    expressible = np.isfinite(flat).all(axis=0)
    if _parsed(source).is_geographic:
        expressible &= np.abs(flat[1]) <= 90
    with _longitude_first():
        if expressible.all():
            moved = _transformed(_parsed(source), _parsed(target), flat)
        else:
            moved = np.full_like(flat, np.nan)
            moved[:, expressible] = _transformed(_parsed(source), _parsed(target), flat[:, expressible])
    if not (finite := np.isfinite(moved).all(axis=0)).all():
        moved[:, ~finite] = np.nan
    return moved[0].reshape(shape), moved[1].reshape(shape)


@contextmanager
def _longitude_first() -> Iterator[None]:
    """GDAL's option for longitude before latitude in every geographic CRS. Setting options takes longer than many
    points do, so not again where it holds already."""
    if rasterio.env.hasenv() and rasterio.env.getenv().get(_TRADITIONAL) == "YES":
        yield
        return
    with rasterio.Env(OGR_CT_FORCE_TRADITIONAL_GIS_ORDER="YES"):
        yield


def _transformed(source: CRS, target: CRS, points_2N: np.ndarray) -> np.ndarray:
    """Points in another CRS, [2, N]. One bad point makes the library refuse all, so those are found by halving."""
    if points_2N.shape[1] == 0:
        return points_2N
    try:
        return np.array(warp_points(source, target, points_2N[0], points_2N[1])[:2], np.float64)
    except CRSError as error:
        raise RasterError(f"no way from the CRS {str(source)[:80]} to {str(target)[:80]}: {error}", "no_crs") from error
    except CPLE_BaseError:
        if points_2N.shape[1] == 1:
            return np.full_like(points_2N, np.nan)
    half = points_2N.shape[1] // 2
    return np.concatenate(
        [_transformed(source, target, points_2N[:, part]) for part in (np.s_[:half], np.s_[half:])], 1
    )


def _parsed(crs: str, _cache: dict[str, CRS] = {}) -> CRS:  # noqa: B006 - the default is the cache
    if crs not in _cache:
        _cache[crs] = CRS.from_user_input(crs)
    return _cache[crs]


def same_crs(one: str, other: str) -> bool:
    """Whether two CRS (WKT) are one, however they are written."""
    return one == other or CRS.from_wkt(one) == CRS.from_wkt(other)
