"""From an open raster to its place: by its CRS and transform, else by RPCs, else by ground control points."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from preprocess import rpc
from preprocess.coordinates import WGS84, transform_points
from preprocess.errors import RasterError
from preprocess.geolocation import GcpMethod, RpcModel, gcp_model
from preprocess.grid import Grid
from preprocess.place import AffinePlace, ScenePlace, SensorPlace, image_frame
from preprocess.rpc import Rpc

# A 10 m raster around the whole Earth has 4 million columns. Beyond this a header is damaged or made to harm.
MAX_SIDE = 1 << 23


@dataclass(frozen=True, slots=True)
class Dem:
    """A raster of heights in metres, one band."""

    path: str
    grid: Grid
    crs: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Placement:
    """What places scenes without a map projection: see SceneOptions."""

    height: float | None = None
    dem: Dem | None = None
    gcp: GcpMethod = "polynomial"


PLAIN = Placement()


def crs_of(dataset: Any, path: str) -> str:
    """WKT. Raises RasterError for a raster without a CRS, or without a transform to go with it."""
    if dataset.crs is None:
        rpcs = "RPCs alone" if dataset.tags(ns="RPC") else "no CRS"
        hint = "ground control points alone" if dataset.gcps[0] else rpcs
        raise RasterError(f"{path}: has {hint}; warp it to a CRS first (gdalwarp -t_srs EPSG:...)", "no_crs")
    if dataset.transform.is_identity:
        raise RasterError(f"{path}: has a CRS but no geotransform; georeference it first", "no_crs")
    return dataset.crs.to_wkt()


def grid_of(dataset: Any, path: str) -> Grid:
    """Raises RasterError for a size or a transform that cannot be."""
    check_size(dataset, path)
    t = dataset.transform
    try:
        return Grid(dataset.width, dataset.height, (t.a, t.b, t.c, t.d, t.e, t.f))
    except ValueError as error:
        raise RasterError(f"{path}: {error}", "no_crs") from error


def check_size(dataset: Any, path: str) -> None:
    if max(dataset.width, dataset.height) > MAX_SIDE:
        raise RasterError(
            f"{path}: its header declares {dataset.width} x {dataset.height} pixels, more than {MAX_SIDE} on a side: "
            "it is damaged, or to be cut into parts first",
            "size",
        )


def place_of(dataset: Any, path: str, placement: Placement) -> tuple[ScenePlace, tuple[Any, ...]]:
    """A scene's place, and what identifies it apart from paths. Raises RasterError."""
    if dataset.crs is not None and not dataset.transform.is_identity:
        crs, grid = crs_of(dataset, path), grid_of(dataset, path)
        return AffinePlace(grid, crs), (grid.transform, crs)
    found = _rpcs(dataset, path)
    points, crs = dataset.gcps
    if found is None and not points:
        if dataset.crs is not None:
            crs_of(dataset, path)  # says that the transform is missing
        raise RasterError(
            f"{path}: has no CRS; put the RPCs that came with it beside it (.rpb, .rpc, _RPC.TXT), "
            "or warp it to a CRS first (gdalwarp -t_srs EPSG:...)",
            "no_crs",
        )
    check_size(dataset, path)
    if found is not None:
        return _by_rpcs(found, dataset, path, placement)
    return _by_points(points, crs, dataset, path, placement)


def _rpcs(dataset: Any, path: str) -> Rpc | None:
    """From the file beside the image, else from the image's tags."""
    if (beside := rpc.file_beside(path)) is not None:
        return rpc.read(beside)
    tags = dataset.tags(ns="RPC")
    return rpc.from_tags(tags, f"{path} (RPC tags)") if tags else None


def _by_rpcs(found: Rpc, dataset: Any, path: str, placement: Placement) -> tuple[ScenePlace, tuple[Any, ...]]:
    frame = image_frame(dataset.width, dataset.height)
    _check_range(found, frame, path)
    dem = placement.dem
    height = placement.height if placement.height is not None else 0.0 if dem else found.height_off
    level = RpcModel(found, height)
    if dem is None:
        _check_found(place := SensorPlace(level, frame), path, "its RPCs place not one of its pixels on the Earth")
        return place, (level,)
    _check_covered(SensorPlace(replace(level, height=found.height_off), frame), dem, path)
    place = SensorPlace(replace(level, dem=dem.path), frame)
    _check_found(place, path, f"the DEM {dem.path} has no height under any of its pixels")
    return place, (level, dem.fingerprint)


def _check_range(found: Rpc, frame: Grid, path: str) -> None:
    """RPCs of another image, such as those of the panchromatic band beside the multispectral one, place it anywhere."""
    columns, rows = found.samp_off + 2 * found.samp_scale, found.line_off + 2 * found.line_scale
    if frame.width > columns or frame.height > rows:
        raise RasterError(
            f"{path}: has {frame.width} x {frame.height} pixels, but its RPCs are those of an image of about "
            f"{found.samp_off + found.samp_scale:.0f} x {found.line_off + found.line_scale:.0f}: "
            "they belong to another image, or this one was enlarged",
            "rpc",
        )


def _by_points(
    points: Sequence[Any], crs: Any, dataset: Any, path: str, placement: Placement
) -> tuple[ScenePlace, tuple[Any, ...]]:
    if crs is None:
        raise RasterError(f"{path}: its ground control points name no CRS; georeference it first", "no_crs")
    plain = [(point.col, point.row, point.x, point.y) for point in points]
    model = gcp_model(plain, crs.to_wkt(), crs.is_geographic, placement.gcp, path)
    place = SensorPlace(model, image_frame(dataset.width, dataset.height))
    _check_found(place, path, "its ground control points place not one of its pixels on the Earth")
    return place, (model,)


OUTLINE = 16  # cells a side of the lattice over an image that is tried


def _outline(place: SensorPlace, target: str) -> tuple[np.ndarray, np.ndarray]:
    sides = (np.linspace(0, place.width, OUTLINE + 1), np.linspace(0, place.height, OUTLINE + 1))
    return place.points(target, *np.meshgrid(*sides))


def _check_found(place: SensorPlace, path: str, message: str) -> None:
    try:
        lon, _ = _outline(place, WGS84)
    except RasterError as error:
        raise RasterError(f"{path}: {error}", error.reason) from error
    if not np.isfinite(lon).any():
        raise RasterError(f"{path}: {message}", "geolocation")


def _check_covered(level: SensorPlace, dem: Dem, path: str) -> None:
    """The DEM must reach over all of the image, lest tiles be lost in silence; holes in it are another matter."""
    _check_found(level, path, "its RPCs place not one of its pixels on the Earth")
    lon, lat = _outline(level, WGS84)
    column, row = dem.grid.pixel(*transform_points(WGS84, dem.crs, lon, lat))
    inside = (column >= 0) & (column <= dem.grid.width) & (row >= 0) & (row <= dem.grid.height)
    if not inside.all():
        raise RasterError(
            f"{path}: the DEM {dem.path} covers {inside.mean():.0%} of it: it lies between longitudes "
            f"{np.nanmin(lon):.3f} and {np.nanmax(lon):.3f}, latitudes {np.nanmin(lat):.3f} and {np.nanmax(lat):.3f}; "
            "give a scene.dem that reaches over every scene",
            "dem",
        )
