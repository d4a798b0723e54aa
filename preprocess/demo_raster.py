"""Where GDAL touches the demo: coordinates between projections, and GeoTIFF files written whole or not at all."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from rasterio.crs import CRS
from rasterio.errors import RasterioIOError
from rasterio.transform import Affine
from rasterio.warp import transform as transform_points


def transform(source: int, target: int, xs: np.ndarray, ys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points from one EPSG code to another, x before y (longitude before latitude); arrays of any shape."""
    found = transform_points(CRS.from_epsg(source), CRS.from_epsg(target), xs.ravel().tolist(), ys.ravel().tolist())
    return np.array(found[0]).reshape(xs.shape), np.array(found[1]).reshape(ys.shape)


def write_geotiff(
    path: Path,
    image_CHW: np.ndarray,
    epsg: int,
    west: float,
    north: float,
    pixel_m: float,
    *,
    nodata: int,
    bands: Sequence[str] = (),
    tags: Mapping[str, str],
    band_tags: Sequence[Mapping[str, str]] = (),
    colours: Mapping[int, tuple[int, int, int]] | None = None,
) -> None:
    """Writes a tiled, compressed GeoTIFF under a temporary name and renames it when it is whole.

    bands: their names. tags: of the file; ``TIFFTAG_*`` become TIFF tags. band_tags: of each band, in the IMAGERY
    domain. colours: a palette for one band of uint8. The same input gives the same bytes.
    """
    count, height, width = image_CHW.shape
    profile: dict[str, Any] = {
        "driver": "GTiff",
        "count": count,
        "height": height,
        "width": width,
        "dtype": image_CHW.dtype.name,
        "crs": CRS.from_epsg(epsg),
        "transform": Affine(pixel_m, 0.0, west, 0.0, -pixel_m, north),
        "nodata": nodata,
        "tiled": True,
        "blockxsize": 256,
        "blockysize": 256,
        "compress": "deflate",
        "zlevel": 1,  # 6 is three times slower here and saves a tenth
        "predictor": 2 if image_CHW.dtype.itemsize > 1 else 1,
        "num_threads": "all_cpus",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with rasterio.open(temporary, "w", **profile) as target:
            target.update_tags(**tags)
            for index, name in enumerate(bands, 1):
                target.set_band_description(index, name)
            for index, entry in enumerate(band_tags, 1):
                target.update_tags(index, ns="IMAGERY", **entry)
            if colours:
                target.write_colormap(1, dict(colours))
            target.write(image_CHW)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_tag(path: Path, name: str) -> str | None:
    """A tag of a raster, or None where there is no such file, no raster, or no such tag."""
    try:
        with rasterio.open(path) as source:
            return source.tags().get(name)
    except RasterioIOError:
        return None
