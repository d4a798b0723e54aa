"""Opening files with GDAL (through rasterio): its options, the drivers allowed, its errors, files kept open."""

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import rasterio
import rasterio.env
from rasterio._err import CPLE_BaseError, CPLE_OutOfMemoryError
from rasterio.errors import CRSError, RasterioError, RasterioIOError
from rasterio.io import DatasetReader

from preprocess import remote
from preprocess.errors import RasterError, UnreadableError

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

ENVIRONMENT: dict[str, Any] = {
    "GDAL_CACHEMAX": 64 << 20,  # bytes; the default is 5 % of the machine's memory for every process
    "GDAL_NUM_THREADS": "1",  # processes are the parallelism; a second level only makes them wait
    "GDAL_PAM_ENABLED": "YES",  # masks and tags may lie beside the file
    "OGR_CT_FORCE_TRADITIONAL_GIS_ORDER": "YES",  # longitude before latitude in every geographic CRS
    "GDAL_HTTP_MAX_RETRY": "0",  # local files need no network; for URLs see remote_reads
}

KEPT_OPEN = 8
_thread = threading.local()  # handles must not be shared between threads


@contextmanager
def environment(**further: str) -> Iterator[None]:
    """GDAL's options for everything here; may be nested, and costs next to nothing where they hold already."""
    wanted = {**ENVIRONMENT, **further}
    if rasterio.env.hasenv() and wanted.items() <= rasterio.env.getenv().items():
        yield
        return
    with rasterio.Env(**wanted):
        yield


def many_small_files() -> AbstractContextManager[None]:
    """The same where thousands of files are opened: GDAL would list their folder for each, to see what lies beside it.
    It asks for each such file by its name instead, as it does by itself in folders of over 1,000 files."""
    return environment(GDAL_DISABLE_READDIR_ON_OPEN="TRUE")


@contextmanager
def opened(path: str) -> Iterator[Any]:
    """The dataset, or RasterError saying what is wrong with the file."""
    if remote.is_remote(path):
        shown, drivers = remote.shown(path), sorted(set(SIGNATURES.values()))
        with _errors_of(shown), DatasetReader(remote.virtual_path(path), driver=drivers) as dataset:
            yield dataset
        return
    driver = _driver(path)
    with _errors_of(path), DatasetReader(path, driver=[driver]) as dataset:
        yield dataset


def _driver(path: str) -> str:
    """The one driver that a file's first bytes call for: a VRT in disguise could make GDAL read what nobody named."""
    if not Path(path).is_file():
        raise RasterError(f"{path}: there is no such file", "missing")
    try:
        with open(path, "rb") as file:
            start = file.read(262)  # as far as the mark of a tar
    except OSError as error:
        raise RasterError(f"{path}: cannot be read ({error.strerror})") from error
    driver = next((name for signature, name in SIGNATURES.items() if start.startswith(signature)), None)
    if driver is None:
        raise RasterError(f"{path}: is neither GeoTIFF nor JPEG 2000; {_conversion(path, start)}", "format")
    return driver


@contextmanager
def _errors_of(shown: str) -> Iterator[None]:
    """GDAL's options, and its errors as RasterError saying what is wrong with the file."""
    try:
        with environment():
            yield
    except (RasterioError, CPLE_BaseError) as error:
        _raise_if_memory(error, shown)
        if not isinstance(error, RasterioIOError):
            raise UnreadableError(f"{shown}: {error}") from error
        raise UnreadableError(
            f"{shown}: cannot be read as GeoTIFF or JPEG 2000 ({error}); check that the file is whole"
        ) from error
    except CRSError as error:
        raise UnreadableError(f"{shown}: {error}") from error


def _raise_if_memory(error: BaseException | None, shown: str) -> None:
    """Memory that ran out says nothing against a file, which must not be left out as damaged."""
    while error is not None:
        if isinstance(error, CPLE_OutOfMemoryError):
            raise MemoryError(f"{shown}: no memory left to read it ({error})") from error
        error = error.__cause__


@contextmanager
def kept_open(path: str) -> Iterator[Any]:
    """The same for reading pixels: a local file stays open in this thread for the next call while it is unchanged.

    Opening takes as long as reading a megabyte, and closing forgets the blocks that GDAL has decoded.
    """
    if remote.is_remote(path):
        with opened(path) as dataset:
            yield dataset
        return
    files: OrderedDict[Any, Any] = vars(_thread).setdefault("files", OrderedDict())
    state = _state(path)
    driver = "" if state in files else _driver(path)
    with _errors_of(path):
        dataset = files.pop(state, None) or DatasetReader(path, driver=[driver])
        yield dataset  # after an error it is not kept
    files[state] = dataset
    while len(files) > KEPT_OPEN:
        files.popitem(last=False)[1].close()


def _state(path: str) -> tuple[Any, ...]:
    """What changes when a file, or the mask beside it, does."""
    found: list[Any] = [path]
    for file in (path, f"{path}.msk"):
        try:
            status = os.stat(file)
            found.append((status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns))
        except OSError:
            found.append(None)
    return tuple(found)


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
    if start.startswith((b"PK\x03\x04", b"\x1f\x8b", b"BZh", b"\xfd7zXZ")) or start[257:262] == b"ustar":
        return "it is an archive: unpack it, and name the folder or the files in it"
    return "convert it with gdal_translate"
