"""Images without a map projection: from pixels to the Earth by RPCs or ground control points, through GDAL.

The models are plain data and travel to workers. GDAL's transformers do not, and are not safe for several threads:
each process makes its own, and each thread of it too.
"""

import os
import threading
import warnings
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import rasterio
from rasterio._err import CPLE_BaseError
from rasterio.control import GroundControlPoint
from rasterio.errors import RasterioError, TransformWarning
from rasterio.rpc import RPC
from rasterio.transform import GCPTransformer, RPCTransformer

from preprocess.coordinates import WGS84, wkt_of
from preprocess.errors import RasterError
from preprocess.rpc import Rpc

RPC_OPTIONS: dict[str, Any] = {
    "RPC_PIXEL_ERROR_THRESHOLD": 1e-6,  # the inverse of the polynomials is iterated until it is this exact
    "RPC_MAX_ITERATIONS": 50,  # enough for steep ground; GDAL's 10 are enough without a DEM
    "RPC_DEMINTERPOLATION": "bilinear",
    # heights are taken as they stand: a shift from the geoid would depend on which grids a machine has
    "RPC_DEM_APPLY_VDATUM_SHIFT": "NO",
}
ENVIRONMENT: dict[str, Any] = {"GDAL_CACHEMAX": 64 << 20}  # a DEM is read through GDAL's cache

GcpMethod = Literal["polynomial", "tps"]


@dataclass(frozen=True, slots=True)
class RpcModel:
    """RPCs over ground at ``height`` metres above the ellipsoid, or that much above the DEM in the file ``dem``."""

    rpc: Rpc
    height: float
    dem: str = ""

    @property
    def crs(self) -> str:
        return WGS84

    @property
    def smooth(self) -> bool:
        return not self.dem

    def located(self, columns: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Longitude, latitude of pixel positions in the image; NaN where there is none. Raises RasterError."""
        return _located(self, columns, rows)


@dataclass(frozen=True, slots=True)
class GcpModel:
    """Ground control points (column, row, x, y) with x, y in ``crs`` (WKT).

    polynomial: a least-squares fit, of first order with three to five points, of second order with more.
    tps: a thin plate spline through every point.
    """

    points: tuple[tuple[float, float, float, float], ...]
    crs: str
    method: GcpMethod = "polynomial"

    @property
    def smooth(self) -> bool:
        return True

    def located(self, columns: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Coordinates in ``crs`` of pixel positions in the image; NaN where there are none. Raises RasterError."""
        return _located(self, columns, rows)


Model = RpcModel | GcpModel


def gcp_model(points: Any, crs: str, geographic: bool, method: GcpMethod, path: str) -> GcpModel:
    """The model of an image's control points, float [N, 4] as (column, row, x, y). Raises RasterError.

    Longitudes are brought together where the points lie on both sides of the antimeridian.
    """
    points = np.array(points, np.float64).reshape(-1, 4)
    if len(points) < 3:
        raise RasterError(f"{path}: has {len(points)} ground control point(s), at least 3 are needed", "gcp")
    if not np.isfinite(points).all():
        raise RasterError(f"{path}: one of its ground control points is not a number", "gcp")
    if geographic:
        points[:, 2] = points[0, 2] + (points[:, 2] - points[0, 2] + 180) % 360 - 180
    for what, plane in (("in the image", points[:, :2]), ("on the ground", points[:, 2:])):
        spread = np.linalg.svd(plane - plane.mean(axis=0), compute_uv=False)
        if not spread[1] > 1e-6 * spread[0]:
            raise RasterError(
                f"{path}: its {len(points)} ground control points lie on one line {what}: they leave the other "
                "direction open; add points, or warp it to a CRS by other means first",
                "gcp",
            )
    return GcpModel(tuple(map(tuple, points.tolist())), wkt_of(crs), method)


def _located(model: Model, columns: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    columns, rows = np.broadcast_arrays(np.asarray(columns, np.float64), np.asarray(rows, np.float64))
    if not columns.size:
        return np.zeros(columns.shape), np.zeros(columns.shape)
    try:
        with rasterio.Env(**ENVIRONMENT), warnings.catch_warnings():
            warnings.simplefilter("ignore", TransformWarning)  # that some points have no place is no surprise
            transformer = _transformer(model, threading.get_ident(), _state_of_dem(model))
            # "ul": positions as they are, with (0.5, 0.5) the first pixel's centre
            x, y = transformer.xy(rows.ravel(), columns.ravel(), zs=np.zeros(rows.size), offset="ul")
    except (RasterioError, CPLE_BaseError) as error:
        raise RasterError(f"no way from its pixels to the Earth by {_named(model)}: {error}", "geolocation") from error
    found = np.array([x, y], np.float64)
    found[:, ~np.isfinite(found).all(axis=0)] = np.nan
    return found[0].reshape(columns.shape), found[1].reshape(columns.shape)


def _named(model: Model) -> str:
    if isinstance(model, GcpModel):
        return f"{len(model.points)} ground control points"
    return f"RPCs over {model.dem}" if model.dem else "RPCs"


def _state_of_dem(model: Model) -> tuple[int, ...]:
    """What changes when another DEM takes the place of one, which a process that lives on would keep open."""
    if not isinstance(model, RpcModel) or not model.dem:
        return ()
    try:
        status = os.stat(model.dem)
    except OSError as error:
        raise RasterError(f"the DEM {model.dem} cannot be read: {error.strerror}", "dem") from error
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@lru_cache(maxsize=16)
def _transformer(model: Model, thread: int, state_of_dem: tuple[int, ...]) -> Any:
    if isinstance(model, GcpModel):
        points = [GroundControlPoint(row=row, col=column, x=x, y=y) for column, row, x, y in model.points]
        return GCPTransformer(points, tps=model.method == "tps")
    options = {**RPC_OPTIONS, "RPC_HEIGHT": model.height} | ({"RPC_DEM": model.dem} if model.dem else {})
    return RPCTransformer(RPC(**asdict(model.rpc)), **options)
