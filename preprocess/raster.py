"""Reading rasters: the only module that opens files with GDAL (through rasterio).

Everything that leaves it is plain data, so a task for another process or machine carries paths, never handles.
"""

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from rasterio._err import CPLE_BaseError
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.errors import CRSError, RasterioError, RasterioIOError
from rasterio.windows import Window

from preprocess import rpc
from preprocess.errors import RasterError
from preprocess.georeference import Dem, Placement, crs_of, grid_of, place_of
from preprocess.grid import Grid
from preprocess.place import AffinePlace, Place

# First bytes to the only driver that may open such a file. A file that merely pretends to be an image, such as a
# VRT or WMS description named .tif, could make GDAL read other files or the network.
SIGNATURES = {
    b"II*\x00": "GTiff",
    b"MM\x00*": "GTiff",
    b"II+\x00": "GTiff",  # BigTIFF
    b"MM\x00+": "GTiff",
    b"\x00\x00\x00\x0cjP  ": "JP2OpenJPEG",
    b"\xffO\xffQ": "JP2OpenJPEG",  # a bare codestream
}
SCENE_DTYPES = ("uint8", "uint16", "int16", "float32")
SHEET_DTYPES = ("uint8", "int8", "uint16", "int16")
PROBABILITY_DTYPES = ("uint8", "uint16", "int16", "float32", "float64")

ENVIRONMENT: dict[str, Any] = {
    "GDAL_CACHEMAX": 64 << 20,  # bytes; the default is 5 % of the machine's memory for every process
    "GDAL_NUM_THREADS": "1",  # processes are the parallelism; a second level only makes them wait
    "GDAL_PAM_ENABLED": "YES",  # masks and tags may lie beside the file
    "OGR_CT_FORCE_TRADITIONAL_GIS_ORDER": "YES",  # longitude before latitude in every geographic CRS
    "GDAL_HTTP_MAX_RETRY": "0",  # nothing here reads from a network
}


@dataclass(frozen=True, slots=True)
class Scene:
    """What planning needs to know of a scene. ``place`` is its size and ground; ``nodata`` one value a band or None.

    masked: whether a mask or alpha band says which pixels hold data. date: ISO or empty. mask: of clouds, beside it.
    """

    path: str
    scene_id: str
    place: Place
    dtype: str
    band_names: tuple[str, ...]
    wavelengths_nm: tuple[float | None, ...]
    nodata: tuple[float | None, ...]
    masked: bool
    date: str
    fingerprint: str
    mask: "Sheet | None" = None


@dataclass(frozen=True, slots=True)
class Sheet:
    """A land-cover raster. geographic: whether its columns are longitudes. bands: 1-based numbers of those that hold
    the classes' probabilities, in the product's order; none where it holds codes.
    """

    path: str
    name: str
    grid: Grid
    crs: str
    geographic: bool
    nodata: float | None
    fingerprint: str
    bands: tuple[int, ...] = ()

    @property
    def place(self) -> AffinePlace:
        return AffinePlace(self.grid, self.crs)


@contextmanager
def environment() -> Iterator[None]:
    """GDAL's options for everything here; cheap, and may be nested."""
    with rasterio.Env(**ENVIRONMENT):
        yield


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    """The dataset, or RasterError saying what is wrong with the file."""
    if path.startswith("/vsi") or "://" in path:
        raise RasterError(f"{path}: only local files are read; copy it here first", "remote")
    if not Path(path).is_file():
        raise RasterError(f"{path}: there is no such file", "missing")
    try:
        with open(path, "rb") as file:
            start = file.read(8)
    except OSError as error:
        raise RasterError(f"{path}: cannot be read ({error.strerror})") from error
    driver = next((name for signature, name in SIGNATURES.items() if start.startswith(signature)), None)
    if driver is None:
        raise RasterError(f"{path}: is neither GeoTIFF nor JPEG 2000; {_conversion(path, start)}", "format")
    try:
        with environment(), rasterio.open(path, driver=driver) as dataset:
            yield dataset
    except RasterioIOError as error:
        raise RasterError(
            f"{path}: cannot be read as GeoTIFF or JPEG 2000 ({error}); check that the file is whole"
        ) from error
    except (RasterioError, CRSError, CPLE_BaseError) as error:
        raise RasterError(f"{path}: {error}") from error


def _conversion(path: str, start: bytes) -> str:
    """How a file that begins like this becomes a GeoTIFF. rasterio's wheels hold no driver for HDF."""
    name = Path(path).name
    if start.startswith(b"\x0e\x03\x13\x01"):
        return (
            "it is HDF4, as MODIS comes. Convert it with a GDAL that reads HDF4 (conda's libgdal-hdf4, OSGeo's "
            f"containers): gdal_translate 'HDF4_EOS:EOS_GRID:\"{name}\":MCD12Q1:LC_Type1' {Path(path).stem}.tif"
        )
    if start.startswith((b"\x89HDF", b"CDF\x01", b"CDF\x02")):
        driver = "HDF5" if start.startswith(b"\x89HDF") else "NETCDF"
        return (
            f"it is HDF5 or netCDF. gdalinfo {name} lists what is in it; convert the layer you need: "
            f"gdal_translate '{driver}:\"{name}\":LAYER' {Path(path).stem}.tif"
        )
    return "convert it with gdal_translate"


def fingerprint(path: str, header: tuple[Any, ...]) -> str:
    """Identifies a raster cheaply: its size, a hash of its first and last 256 KiB, and what its header came to.

    header: what was read, which may come from files beside it (a world file, an .aux.xml) as well.
    A mask beside it counts with its bytes.
    """
    size = Path(path).stat().st_size
    digest = hashlib.sha256(repr((size, *header)).encode())
    for file in (path, f"{path}.msk"):
        if os.path.isfile(file):
            with open(file, "rb") as content:
                digest.update(content.read(256 << 10))
                content.seek(max(0, os.path.getsize(file) - (256 << 10)))
                digest.update(content.read())
    return f"{size}-{digest.hexdigest()[:24]}"


def _band_names(dataset: Any) -> tuple[str, ...]:
    """Descriptions, else colours (red, green, ...), else band_N; made unique."""
    names = []
    for number in range(1, dataset.count + 1):
        colour = dataset.colorinterp[number - 1]
        known = {ColorInterp.red, ColorInterp.green, ColorInterp.blue}
        name = (dataset.descriptions[number - 1] or "").strip() or (colour.name if colour in known else "")
        name = "alpha" if colour == ColorInterp.alpha else name  # whatever it is called: it is no band to train on
        names.append(name if name and name not in names else f"band_{number}")
    return tuple(names)


_DATE_TAGS = ("ACQUISITIONDATETIME", "ACQUISITION_DATE", "DATE_ACQUIRED", "datetime")
# The day must stand alone: no digits around it. The scene id of a Landsat name (038034) is none.
_DATE = re.compile(r"(?<!\d)(19[7-9]\d|20\d\d)([-:/]?)(0[1-9]|1[0-2])\2(0[1-9]|[12]\d|3[01])(?!\d)")


def find_date(text: str) -> str:
    """The first day in a text, ISO, or an empty string: 20200612, 2020-06-12, 2020:06:12 or 2020/06/12."""
    for match in _DATE.finditer(text):
        try:
            return date(int(match[1]), int(match[3]), int(match[4])).isoformat()
        except ValueError:  # the 30th of February
            continue
    return ""


def _date(dataset: Any, path: str) -> str:
    """ISO date of acquisition from the tags that say so, else from the file's name, else empty.

    TIFFTAG_DATETIME comes last: many programs write the day of processing there.
    """
    tags = {**dataset.tags(), **dataset.tags(ns="IMAGERY")}
    texts = [*(str(tags.get(tag, "")) for tag in _DATE_TAGS), Path(path).stem, str(tags.get("TIFFTAG_DATETIME", ""))]
    return next((found for text in texts if (found := find_date(text))), "")


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


def read_scene(path: str, scene_id: str, nodata: float | None = None, placement: Placement | None = None) -> Scene:
    """A scene's header. nodata: value to take where the file names none. Raises RasterError."""
    try:
        return _read_scene(path, scene_id, nodata, placement or Placement())
    except RasterError:
        if beside := rpc.file_beside(path):
            rpc.read(beside)  # GDAL does not open an image whose RPCs are broken; this says what is wrong with them
        raise


def _read_scene(path: str, scene_id: str, nodata: float | None, placement: Placement) -> Scene:
    with _opened(path) as dataset:
        dtypes = set(dataset.dtypes)
        if len(dtypes) != 1 or not dtypes <= set(SCENE_DTYPES):
            raise RasterError(
                f"{path}: bands of {', '.join(sorted(dtypes))}; expected one of {', '.join(SCENE_DTYPES)} for all: "
                "convert with gdal_translate -ot",
                "dtype",
            )
        flags = dataset.mask_flag_enums[0]
        masked = MaskFlags.per_dataset in flags or ColorInterp.alpha in dataset.colorinterp
        values = tuple(nodata if value is None else value for value in dataset.nodatavals)
        place, placed = place_of(dataset, path, placement)
        names, day = _band_names(dataset), _date(dataset, path)
        return Scene(
            path=path,
            scene_id=scene_id,
            place=place,
            dtype=dtypes.pop(),
            band_names=names,
            wavelengths_nm=_wavelengths(dataset),
            nodata=values,
            masked=masked,
            date=day,
            fingerprint=fingerprint(path, (*placed, names, values, masked, day)),
        )


def read_sheet(path: str, probabilities: Sequence[str] = ()) -> Sheet:
    """A land-cover sheet's header. probabilities: the classes that a sheet of many bands holds probabilities of.

    Raises RasterError for bands that hold neither codes nor those.
    """
    with _opened(path) as dataset:
        bands = _probability_bands(dataset, probabilities)
        if not bands and (dataset.count != 1 or dataset.dtypes[0] not in SHEET_DTYPES):
            other = f", or a band for each of {', '.join(probabilities)}" if probabilities else ""
            raise RasterError(
                f"{path}: {dataset.count} band(s) of {dataset.dtypes[0]}; a land-cover sheet has one band of "
                f"{', '.join(SHEET_DTYPES)} with class codes{other}"
            )
        crs, grid, name = crs_of(dataset, path), grid_of(dataset, path), Path(path).name
        return Sheet(
            path=path,
            name=name,
            grid=grid,
            crs=crs,
            geographic=dataset.crs.is_geographic,
            nodata=dataset.nodata,
            # the name too: it says which year and which part of the Earth a sheet stands for
            fingerprint=fingerprint(path, (name, crs, grid.transform, dataset.nodata, *bands)),
            bands=bands,
        )


def _probability_bands(dataset: Any, classes: Sequence[str]) -> tuple[int, ...]:
    """Numbers of the bands that hold the classes' probabilities: by their descriptions, else in the classes' order,
    where there are as many or one more, as Earth Engine exports them with the most likely class behind them."""
    if not classes or set(dataset.dtypes) - set(PROBABILITY_DTYPES):
        return ()
    named = {(name or "").strip().lower(): number for number, name in enumerate(dataset.descriptions, 1)}
    if all(name.lower() in named for name in classes):
        return tuple(named[name.lower()] for name in classes)
    nameless = not any(dataset.descriptions)
    return tuple(range(1, len(classes) + 1)) if nameless and 0 <= dataset.count - len(classes) <= 1 else ()


def read_colours(path: str) -> dict[int, tuple[int, int, int]]:
    """The colour table of a sheet, code to RGB; without black, which stands for codes that have no colour."""
    with _opened(path) as dataset:
        try:
            table = dataset.colormap(1)
        except ValueError:  # it has none
            return {}
    return {code: colour[:3] for code, colour in table.items() if any(colour[:3])}


def read_dem(path: str) -> Dem:
    """The header of a raster of heights. Raises RasterError."""
    with _opened(path) as dataset:
        # GDAL opens it once more by its path alone, and of the files let in here only a TIFF is one for every driver
        if dataset.driver != "GTiff" or dataset.count != 1:
            raise RasterError(
                f"{path}: {dataset.driver} of {dataset.count} band(s); a DEM is a GeoTIFF of one band of metres"
            )
        crs, grid = crs_of(dataset, path), grid_of(dataset, path)
        return Dem(os.path.abspath(path), grid, crs, fingerprint(path, (crs, grid.transform, dataset.nodata)))


def read_pixels(scene: Scene, bands: Sequence[int], window: tuple[int, int, int, int]) -> tuple[np.ndarray, Any]:
    """Pixels [C, H, W] of 1-based ``bands`` in (column, row, width, height), and the file's mask.

    The mask is uint8 [H, W], 0 where a mask or alpha band says there is no data, or None if the file has neither.
    Raises RasterError if the file turns out to be damaged there.
    """
    area = Window(*window)  # type: ignore[call-arg]
    with _opened(scene.path) as dataset:
        pixels = dataset.read(list(bands), window=area)
        mask = dataset.dataset_mask(window=area) if scene.masked else None
    return pixels, mask


def read_probabilities(sheet: Sheet, window: tuple[int, int, int, int]) -> np.ndarray:
    """The probability bands [K, H, W] of a sheet, as they are stored. Raises RasterError if it is damaged there."""
    with _opened(sheet.path) as dataset:
        return dataset.read(list(sheet.bands), window=Window(*window))  # type: ignore[call-arg]


def read_codes(sheet: Sheet, window: tuple[int, int, int, int]) -> np.ndarray:
    """Class codes [H, W] of a sheet in (column, row, width, height). Raises RasterError if it is damaged there."""
    with _opened(sheet.path) as dataset:
        return dataset.read(1, window=Window(*window))  # type: ignore[call-arg]


def read_codes_coarsely(sheet: Sheet, window: tuple[int, int, int, int], out: tuple[int, int], most: int) -> np.ndarray:
    """Codes of a window at a size ``out`` = (width, height): from overviews where the sheet has them, else every
    so-manieth pixel. Raises RasterError, also where a sheet without overviews would take over ``most`` pixels."""
    _, _, width, height = window
    with _opened(sheet.path) as dataset:
        if width * height > most and not dataset.overviews(1):
            raise RasterError(f"{sheet.path}: has no overviews (gdaladdo makes them)", "overviews")
        return dataset.read(1, window=Window(*window), out_shape=(out[1], out[0]))  # type: ignore[call-arg]
