"""What the files of scenes, and rasters of heights, say of themselves."""

import os
from dataclasses import dataclass
from typing import Any

from rasterio.enums import ColorInterp, MaskFlags

from preprocess import remote, rpc
from preprocess.dates import find_date
from preprocess.errors import RasterError
from preprocess.fingerprints import digest, digest_of, fingerprint
from preprocess.gdal_files import kept_open, opened
from preprocess.georeference import PLAIN, Dem, Placement, crs_of, grid_of, place_of
from preprocess.place import ScenePlace
from preprocess.remote_reads import persistent

_DATE_TAGS = ("ACQUISITIONDATETIME", "ACQUISITION_DATE", "DATE_ACQUIRED", "datetime")


@dataclass(frozen=True, slots=True)
class Header:
    """What one file says of itself. descriptions, colours, wavelengths_nm, nodata: one a band; colours as GDAL's words.

    masked: whether a mask says which pixels hold data; an alpha band stands in ``colours``.
    placed: what identifies its place, apart from paths.
    tag_date: from tags that say when it was acquired; processed: from TIFFTAG_DATETIME, where many programs write the
    day of processing; both ISO or empty. digest: identifies its bytes cheaply; empty if
    it was not asked for.
    """

    path: str
    place: ScenePlace
    placed: tuple[Any, ...]
    dtypes: tuple[str, ...]
    descriptions: tuple[str, ...]
    colours: tuple[str, ...]
    wavelengths_nm: tuple[float | None, ...]
    nodata: tuple[float | None, ...]
    masked: bool
    tag_date: str
    processed: str
    digest: str

    @property
    def count(self) -> int:
        return len(self.dtypes)


def _tag_date(dataset: Any) -> str:
    tags = {**dataset.tags(), **dataset.tags(ns="IMAGERY")}
    return next((found for tag in _DATE_TAGS if (found := find_date(str(tags.get(tag, ""))))), "")


def _wavelengths(dataset: Any) -> tuple[float | None, ...]:
    """Centre wavelengths in nanometres from the bands' tags (GDAL's IMAGERY domain, in micrometres)."""
    found: list[float | None] = []
    for number in range(1, dataset.count + 1):
        text = dataset.tags(number, ns="IMAGERY").get("CENTRAL_WAVELENGTH_UM")
        try:
            found.append(round(float(text) * 1000, 3) if text else None)
        except ValueError:
            found.append(None)
    return tuple(found)


@persistent
def read_header(path: str, placement: Placement = PLAIN, identify: bool = True) -> Header:
    """A scene file's header. Raises RasterError.

    identify: whether its digest is needed. Without, it is empty, and the file stays open for its pixels.
    """
    try:
        return _header(path, placement, identify)
    except RasterError:
        if beside := rpc.file_beside(path):
            rpc.read(beside)  # GDAL does not open an image whose RPCs are broken; this says what is wrong with them
        raise


def _header(path: str, placement: Placement, identify: bool) -> Header:
    with opened(path) if identify else kept_open(path) as dataset:
        place, placed = place_of(dataset, path, placement)
        flags = dataset.mask_flag_enums[0]
        colours = tuple(colour.name for colour in dataset.colorinterp)
        return Header(
            path=path,
            place=place,
            placed=placed,
            dtypes=tuple(dataset.dtypes),
            descriptions=tuple((text or "").strip() for text in dataset.descriptions),
            colours=colours,
            wavelengths_nm=_wavelengths(dataset),
            nodata=tuple(dataset.nodatavals),
            masked=MaskFlags.per_dataset in flags and ColorInterp.alpha not in dataset.colorinterp,
            tag_date=_tag_date(dataset),
            processed=find_date(str(dataset.tags().get("TIFFTAG_DATETIME", ""))),
            digest=digest_of(dataset, path) if identify else "",
        )


def read_dem(path: str) -> Dem:
    """The header of a raster of heights. Raises RasterError."""
    if remote.is_remote(path):
        raise RasterError(f"scene.dem {remote.shown(path)}: only a local file; copy it here first", "remote")
    with opened(path) as dataset:
        # GDAL opens it once more by its path alone, and of the files let in here only a TIFF is one for every driver
        if dataset.driver != "GTiff" or dataset.count != 1:
            raise RasterError(
                f"{path}: {dataset.driver} of {dataset.count} band(s); a DEM is a GeoTIFF of one band of metres"
            )
        crs, grid = crs_of(dataset, path), grid_of(dataset, path)
        return Dem(os.path.abspath(path), grid, crs, fingerprint([digest(path)], (crs, grid.transform, dataset.nodata)))
