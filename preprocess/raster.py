"""Scenes and land-cover sheets as planning found them, and their pixels.

All of it is plain data, so a task for another process or machine carries paths, never handles.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rasterio.windows import Window

from preprocess.alignment import Alignment
from preprocess.errors import RasterError
from preprocess.gdal_files import kept_open, opened
from preprocess.grid import Grid
from preprocess.place import AffinePlace, ScenePlace
from preprocess.remote_reads import persistent

SCENE_DTYPES = ("uint8", "uint16", "int16", "float32")


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
    place: ScenePlace
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


def block_shape(scene: Scene, bands: Sequence[int]) -> tuple[int, int]:
    """(rows, columns) of what the file of the first of ``bands`` decodes at once. Raises RasterError."""
    layer = next(layer for band in bands if (layer := scene.layers[band - 1]) is not None)
    return _block_shape(layer.path, layer.number)


@persistent
def _block_shape(path: str, number: int) -> tuple[int, int]:
    with kept_open(path) as dataset:
        return dataset.block_shapes[number - 1]


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


@persistent
def _read(
    path: str,
    numbers: Sequence[int],
    masked: bool,
    window: tuple[int, int, int, int],
    out: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Pixels [C, H, W] of a file's bands in a window of its own, ``out`` if it is given, and its mask or None."""
    area = Window(*window)  # type: ignore[call-arg]
    with kept_open(path) as dataset:
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


@persistent
def read_probabilities(sheet: Sheet, window: tuple[int, int, int, int]) -> np.ndarray:
    """The probability bands [K, H, W] of a sheet, as they are stored. Raises RasterError if it is damaged there."""
    with kept_open(sheet.path) as dataset:
        return dataset.read(list(sheet.bands), window=Window(*window))  # type: ignore[call-arg]


@persistent
def read_codes(sheet: Sheet, window: tuple[int, int, int, int]) -> np.ndarray:
    """Class codes [H, W] of a sheet in (column, row, width, height). Raises RasterError if it is damaged there."""
    with kept_open(sheet.path) as dataset:
        return dataset.read(1, window=Window(*window))  # type: ignore[call-arg]


@persistent
def read_coarsely(sheet: Sheet, window: tuple[int, int, int, int], out: tuple[int, int], most: int) -> np.ndarray:
    """Codes [H, W], or probability bands [K, H, W], of a window at a size ``out`` = (width, height): from overviews
    where the sheet has them, else every n-th pixel. Raises RasterError, also where a sheet without overviews would take
    over ``most`` pixels."""
    _, _, width, height = window
    with opened(sheet.path) as dataset:
        if width * height > most and not dataset.overviews(1):
            raise RasterError(f"{sheet.path}: has no overviews (gdaladdo makes them)", "overviews")
        area = Window(*window)  # type: ignore[call-arg]
        if sheet.bands:
            return dataset.read(list(sheet.bands), window=area, out_shape=(len(sheet.bands), out[1], out[0]))
        return dataset.read(1, window=area, out_shape=(out[1], out[0]))
