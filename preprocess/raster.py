"""Reading rasters: the only module that opens files with GDAL (through rasterio).

Everything that leaves it is plain data, so a task for another process or machine carries paths, never handles.
"""

import functools
import hashlib
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import rasterio
import rasterio.env
from rasterio._err import CPLE_BaseError, CPLE_OutOfMemoryError
from rasterio.crs import CRS
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.errors import CRSError, RasterioError, RasterioIOError
from rasterio.io import DatasetReader
from rasterio.windows import Window

from preprocess import remote, rpc
from preprocess.alignment import Alignment
from preprocess.errors import RasterError, RemoteError, UnreadableError
from preprocess.georeference import PLAIN, Dem, Placement, crs_of, grid_of, place_of
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
    "GDAL_HTTP_MAX_RETRY": "0",  # local files need no network; for URLs see REMOTE
}

# For files behind URLs, on top.
REMOTE: dict[str, Any] = {
    # a URL is one file: its folder is never listed, and no sidecar is looked for, each of which would be a request
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    # a request that meets 429, 500, 502, 503 or 504 is made again, after 0.5, 1 and 2 s
    "GDAL_HTTP_MAX_RETRY": "3",
    "GDAL_HTTP_RETRY_DELAY": "0.5",
    "GDAL_HTTP_CONNECTTIMEOUT": "10",  # seconds
    # a transfer that stands still is given up; slow ones may take as long as they need
    "GDAL_HTTP_LOW_SPEED_LIMIT": "100",  # bytes a second
    "GDAL_HTTP_LOW_SPEED_TIME": "10",  # seconds
    # requests of 256 KiB in place of 16: whole scenes are read, in order, and a COG's directory comes in one
    "CPL_VSIL_CURL_CHUNK_SIZE": 256 << 10,
    "GDAL_INGESTED_BYTES_AT_OPEN": 256 << 10,
    "CPL_VSIL_CURL_CACHE_SIZE": 64 << 20,  # bytes of such parts, for a process
    "GDAL_HTTP_MERGE_CONSECUTIVE_RANGES": "YES",
}
# A process's GDAL remembers that a file could not be had, and parts that came short; this makes it forget.
FORGET: dict[str, Any] = {"CPL_VSIL_CURL_NON_CACHED": "/vsicurl/:/vsis3/:/vsigs/:/vsiaz/"}
# Seconds before a file behind a URL is opened and read anew. GDAL itself does not repeat a request whose connection
# breaks or whose answer is cut short.
WAITS = (0.5, 2.0, 8.0)
# Seconds after the first failure in which it is tried again: where transfers stand still, each try takes half a minute.
PATIENCE = 60.0


@dataclass(frozen=True, slots=True)
class Layer:
    """Where a band of a scene lies: band ``number``, from 1, of a file. alignment: None if its grid is the scene's.

    masked: whether the file's mask or alpha band says which pixels hold data.
    """

    path: str
    number: int
    masked: bool
    alignment: Alignment | None = None


@dataclass(frozen=True, slots=True)
class Scene:
    """What planning needs to know of a scene. ``place`` is its size and ground; ``nodata`` one value a band or None.

    path: what messages call it: its file, or the product or item that its files belong to.
    band_names, aliases, wavelengths_nm, nodata, layers: one a band. A band that is not chosen may have no layer.
    masked: whether a mask or alpha band, or a file that ends before the others, says which pixels hold data.
    date: ISO or empty. mask_path: a mask of clouds, as a list or an item names it, or empty.
    mask: of clouds, opened, if it is to count.
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
    layers: tuple[Layer | None, ...]
    aliases: tuple[tuple[str, ...], ...] = ()
    mask_path: str = ""
    mask: "Sheet | None" = None

    @property
    def file(self) -> str:
        """Its file, or the first of them."""
        return next(layer.path for layer in self.layers if layer is not None)


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
    place: Place
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


def _without_queries(text: str) -> str:
    """A message of GDAL's without what follows a ``?`` in URLs, which may be a secret."""
    return re.sub(r"\?[^\s,'\")]*", "", text)


ReaderT = TypeVar("ReaderT", bound=Callable[..., Any])


def _persistent(reader: ReaderT) -> ReaderT:
    """A function of a path or a sheet that reads files behind URLs again where that fails, and then raises RemoteError.

    A file that is not there is a RasterError, as on a disk.
    """

    @functools.wraps(reader)
    def persistent(of: Any, *arguments: Any, **named: Any) -> Any:
        path = of if isinstance(of, str) else of.path
        if not remote.is_remote(path):
            return reader(of, *arguments, **named)
        failed = None
        for attempt in range(len(WAITS) + 1):
            try:
                with rasterio.Env(**{**REMOTE, **(FORGET if attempt else {})}):
                    return reader(of, *arguments, **named)
            except UnreadableError as error:
                cause = str(error.__cause__.__cause__ or error.__cause__) if error.__cause__ else str(error)
                if "response code: 404" in cause:
                    raise RasterError(f"{remote.shown(path)}: there is no such file", "missing") from error
                denied = re.search(r"response code: 40[13]", cause)
                failed = failed or time.monotonic()
                if attempt == len(WAITS) or denied or time.monotonic() - failed > PATIENCE:
                    hint = (
                        "check the credentials (docs/data.md, Scenes behind URLs)" if denied else "is it up, and whole?"
                    )
                    raise RemoteError(
                        f"{remote.shown(path)}: cannot be read over the network, tried {attempt + 1} times "
                        f"({_without_queries(cause)}); {hint}"
                    ) from error
                time.sleep(WAITS[attempt])
        raise AssertionError("returns or raises")

    return cast(ReaderT, persistent)


@contextmanager
def _opened(path: str) -> Iterator[Any]:
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
            start = file.read(8)
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
def _kept_open(path: str) -> Iterator[Any]:
    """The same for reading pixels: a local file stays open in this thread for the next call while it is unchanged.

    Opening takes as long as reading a megabyte, and closing forgets the blocks that GDAL has decoded.
    """
    if remote.is_remote(path):
        with _opened(path) as dataset:
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
    return "convert it with gdal_translate"


def fingerprint(digests: Sequence[str], header: tuple[Any, ...]) -> str:
    """Identifies a raster cheaply by :func:`digest` of its files and what their headers came to.

    header: what was read, which may come from files beside it (a world file, an .aux.xml) as well.
    """
    combined = hashlib.sha256(repr((tuple(digests), *header)).encode()).hexdigest()[:24]
    return f"{sum(int(digest.partition('-')[0]) for digest in digests)}-{combined}"


def digest(path: str) -> str:
    """A file's size and a hash of its first and last 256 KiB. A mask beside it counts with its bytes."""
    size = Path(path).stat().st_size
    hashed = hashlib.sha256(repr(size).encode())
    for file in (path, f"{path}.msk"):
        if os.path.isfile(file):
            with open(file, "rb") as content:
                hashed.update(content.read(256 << 10))
                content.seek(max(0, os.path.getsize(file) - (256 << 10)))
                hashed.update(content.read())
    return f"{size}-{hashed.hexdigest()[:24]}"


def _remote_digest(dataset: Any) -> str:
    """As :func:`digest` for a file behind a URL, from what costs few requests: its form, where its blocks lie and how
    large they are, which compression makes a matter of the pixels, and the first and the last block itself."""
    blocks = list(dataset.block_windows(1))
    hashed = hashlib.sha256(repr((dataset.profile, dataset.tags(), len(blocks))).encode())
    for (row, column), _ in blocks[:: max(1, len(blocks) // 64)]:
        for what in ("BLOCK_OFFSET", "BLOCK_SIZE"):
            hashed.update(repr(dataset.get_tag_item(f"{what}_{column}_{row}", "TIFF", bidx=1)).encode())
    for _, window in (blocks[0], blocks[-1]):
        hashed.update(dataset.read(window=window).tobytes())
    return f"0-{hashed.hexdigest()[:24]}"


def same_crs(one: str, other: str) -> bool:
    """Whether two CRS (WKT) are one, however they are written."""
    return one == other or CRS.from_wkt(one) == CRS.from_wkt(other)


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


@_persistent
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
    with _opened(path) if identify else _kept_open(path) as dataset:
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
            digest=_digest(dataset, path) if identify else "",
        )


def _digest(dataset: Any, path: str) -> str:
    return _remote_digest(dataset) if remote.is_remote(path) else digest(path)


@_persistent
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
        crs, grid, name = crs_of(dataset, path), grid_of(dataset, path), Path(remote.shown(path)).name
        return Sheet(
            path=path,
            name=name,
            grid=grid,
            crs=crs,
            geographic=dataset.crs.is_geographic,
            nodata=dataset.nodata,
            # the name too: it says which year and which part of the Earth a sheet stands for
            fingerprint=fingerprint(
                [_digest(dataset, path)],
                (name, crs, grid.transform, dataset.nodata, *bands),
            ),
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


@_persistent
def read_colours(path: str) -> dict[int, tuple[int, int, int]]:
    """The colour table of a sheet, code to RGB; without black, which stands for codes that have no colour."""
    with _opened(path) as dataset:
        try:
            table = dataset.colormap(1)
        except ValueError:  # it has none
            return {}
    return {code: colour[:3] for code, colour in table.items() if any(colour[:3])}


def block_shape(scene: Scene, bands: Sequence[int]) -> tuple[int, int]:
    """(rows, columns) of what the file of the first of ``bands`` decodes at once. Raises RasterError."""
    layer = next(layer for band in bands if (layer := scene.layers[band - 1]) is not None)
    return _block_shape(layer.path, layer.number)


@_persistent
def _block_shape(path: str, number: int) -> tuple[int, int]:
    with _kept_open(path) as dataset:
        return dataset.block_shapes[number - 1]


def read_dem(path: str) -> Dem:
    """The header of a raster of heights. Raises RasterError."""
    if remote.is_remote(path):
        raise RasterError(f"scene.dem {remote.shown(path)}: only a local file; copy it here first", "remote")
    with _opened(path) as dataset:
        # GDAL opens it once more by its path alone, and of the files let in here only a TIFF is one for every driver
        if dataset.driver != "GTiff" or dataset.count != 1:
            raise RasterError(
                f"{path}: {dataset.driver} of {dataset.count} band(s); a DEM is a GeoTIFF of one band of metres"
            )
        crs, grid = crs_of(dataset, path), grid_of(dataset, path)
        return Dem(os.path.abspath(path), grid, crs, fingerprint([digest(path)], (crs, grid.transform, dataset.nodata)))


def read_pixels(
    scene: Scene, bands: Sequence[int], window: tuple[int, int, int, int], out: np.ndarray | None = None
) -> tuple[np.ndarray, Any]:
    """Pixels [C, H, W] of 1-based ``bands`` in (column, row, width, height), and the scene's mask.

    out: an array of that shape and the scene's dtype to read into: memory that is new at every call costs as much
    as a third of the reading.

    The mask is uint8 [H, W], 0 where a mask or alpha band says there is no data or where a file holds no pixel, or
    None if ``scene.masked`` is False. Raises RasterError if a file turns out to be damaged there.
    """
    pixels = np.empty((len(bands), window[3], window[2]), scene.dtype) if out is None else out
    mask = np.full(pixels.shape[1:], 255, np.uint8) if scene.masked else None
    files: dict[tuple[str, Alignment | None], list[int]] = {}
    for i, band in enumerate(bands):
        layer = scene.layers[band - 1]
        assert layer is not None, "a chosen band has a layer"
        files.setdefault((layer.path, layer.alignment), []).append(i)
    for (path, alignment), places in files.items():
        layers = [layer for i in places if (layer := scene.layers[bands[i] - 1]) is not None]
        numbers, masked = [layer.number for layer in layers], layers[0].masked
        nodata = [scene.nodata[bands[i] - 1] for i in places]
        there = _read(path, numbers, masked, window, pixels if len(files) == 1 else None) if alignment is None else None
        if alignment is not None:
            there = _read_aligned(path, numbers, masked, alignment, nodata, window, scene.dtype)
        assert there is not None
        if there[0] is not pixels:  # in the plain case, one file, it is
            pixels[places] = there[0]
        if mask is not None and there[1] is not None:
            mask = np.minimum(mask, there[1])
    return pixels, mask


@_persistent
def _read(
    path: str,
    numbers: Sequence[int],
    masked: bool,
    window: tuple[int, int, int, int],
    out: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Pixels [C, H, W] of a file's bands in a window of its own, ``out`` if it is given, and its mask or None."""
    area = Window(*window)  # type: ignore[call-arg]
    with _kept_open(path) as dataset:
        return dataset.read(list(numbers), window=area, out=out), dataset.dataset_mask(window=area) if masked else None


def _read_aligned(
    path: str,
    numbers: Sequence[int],
    masked: bool,
    alignment: Alignment,
    nodata: Sequence[float | None],
    window: tuple[int, int, int, int],
    dtype: str,
) -> tuple[np.ndarray, np.ndarray]:
    """As :func:`_read` for bands on another grid, brought to the scene's; window: of the scene."""
    pixels = np.zeros((len(numbers), window[3], window[2]), dtype)
    if (source := alignment.source(window)) is None:
        return pixels, np.zeros(pixels.shape[1:], np.uint8)
    own, own_mask = _read(path, numbers, masked, source)
    has_data = np.full(own.shape[1:], 255, np.uint8) if own_mask is None else own_mask
    for i, value in enumerate(nodata):
        valid = has_data != 0
        if value is not None:  # in the pixels' own precision: a tag of -9999.9 is not what a float32 pixel holds
            valid &= own[i] != (np.float32(value) if own.dtype == np.float32 else value)
        if own.dtype.kind == "f":
            valid &= np.isfinite(own[i])
        pixels[i] = alignment.resample(own[i], valid.view(np.uint8), source, window, value)
    columns, rows = alignment.nearest(source, window)
    mask = has_data[np.ix_(rows, columns)]
    mask[rows < 0], mask[:, columns < 0] = 0, 0
    return pixels, mask


@_persistent
def read_probabilities(sheet: Sheet, window: tuple[int, int, int, int]) -> np.ndarray:
    """The probability bands [K, H, W] of a sheet, as they are stored. Raises RasterError if it is damaged there."""
    with _kept_open(sheet.path) as dataset:
        return dataset.read(list(sheet.bands), window=Window(*window))  # type: ignore[call-arg]


@_persistent
def read_codes(sheet: Sheet, window: tuple[int, int, int, int]) -> np.ndarray:
    """Class codes [H, W] of a sheet in (column, row, width, height). Raises RasterError if it is damaged there."""
    with _kept_open(sheet.path) as dataset:
        return dataset.read(1, window=Window(*window))  # type: ignore[call-arg]


@_persistent
def read_coarsely(sheet: Sheet, window: tuple[int, int, int, int], out: tuple[int, int], most: int) -> np.ndarray:
    """Codes [H, W], or probability bands [K, H, W], of a window at a size ``out`` = (width, height): from overviews
    where the sheet has them, else every n-th pixel. Raises RasterError, also where a sheet without overviews would take
    over ``most`` pixels."""
    _, _, width, height = window
    with _opened(sheet.path) as dataset:
        if width * height > most and not dataset.overviews(1):
            raise RasterError(f"{sheet.path}: has no overviews (gdaladdo makes them)", "overviews")
        area = Window(*window)  # type: ignore[call-arg]
        if sheet.bands:
            return dataset.read(list(sheet.bands), window=area, out_shape=(len(sheet.bands), out[1], out[0]))
        return dataset.read(1, window=area, out_shape=(out[1], out[0]))
