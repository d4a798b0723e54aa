"""Image files to arrays: what Pillow reads, and GeoTIFF and JPEG 2000 where rasterio is installed."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from geokr.config import ConfigError

PLAIN = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
GEO = (".tif", ".tiff", ".jp2")
# Pillow's modes that are read: bands and depth. Of a palette the colours count in images, its numbers in masks.
MODES = {
    "1": (1, "uint8"), "L": (1, "uint8"), "RGB": (3, "uint8"), "RGBA": (4, "uint8"), "P": (3, "uint8"),
    "I;16": (1, "uint16"),
}  # fmt: skip


class Form(NamedTuple):
    """What a file's header says of its pixels."""

    bands: int
    dtype: str
    height: int
    width: int


def form(path: Path, *, mask: bool = False) -> Form:
    """By the header alone. Raises ConfigError for what is no image, or of a kind that is not read."""
    if path.suffix.lower() in GEO:
        rasterio = _rasterio(path)
        try:
            with rasterio.open(path) as file:
                return Form(file.count, file.dtypes[0], file.height, file.width)
        except rasterio.errors.RasterioIOError as error:
            raise ConfigError(f"{path}: is no image that can be read ({error})") from error
    try:
        if _png_depth(path) == (16, True):
            raise ConfigError(f"{path}: colours of 16 bits in a PNG are not read; convert it to GeoTIFF")
        with Image.open(path) as image:
            if image.mode not in MODES:
                raise ConfigError(f"{path}: images of mode {image.mode} are not read; convert it to RGB")
            bands, dtype = (1, "uint8") if mask and image.mode == "P" else MODES[image.mode]
            return Form(bands, dtype, image.height, image.width)
    except (OSError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{path}: is no image that can be read ({error})") from error


def read(path: Path, *, mask: bool = False) -> np.ndarray:
    """Pixels [H, W, C]; a masked array (True: no data) of files that say where they have none, see without_data().

    Tags of masks are not looked at: their values are classes. Raises ConfigError for a damaged file.
    """
    try:
        if path.suffix.lower() in GEO:
            with _rasterio(path).open(path) as file:
                if mask or not _says_nodata(file):
                    return np.ascontiguousarray(file.read().transpose(1, 2, 0))
                return _masked(np.ascontiguousarray(file.read().transpose(1, 2, 0)), file)
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB") if image.mode == "P" and not mask else image)
            if mask and image.mode == "L" and (depth := _png_depth(path)[0]) < 8:
                pixels = pixels // (255 // (2**depth - 1))  # grey of 2 or 4 bits comes spread over 0 to 255
    except (OSError, ValueError, SyntaxError) as error:
        raise ConfigError(f"{path}: is damaged ({error})") from error
    if pixels.dtype == bool:  # of 1 bit: white is 255 in an image, as in those of 2 and 4 bits, and 1 in a mask
        pixels = pixels.astype(np.uint8) * np.uint8(1 if mask else 255)
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _says_nodata(file: Any) -> bool:
    """Whether an open file has a nodata value, a mask or an alpha band."""
    return any("all_valid" not in [flag.name for flag in flags] for flags in file.mask_flag_enums)


def _masked(pixels_HWC: np.ndarray, file: Any) -> np.ndarray:
    """The mask beside the pixels. Those without data hold the mean of those with, for whoever leaves the mask behind
    on the way, as np.pad does."""
    mask_HWC = np.ascontiguousarray(file.read_masks().transpose(1, 2, 0)) == 0
    mask_HWC |= (mask_HWC & np.isnan(pixels_HWC)).any(2, keepdims=True)
    seen = [n for n, colour in enumerate(file.colorinterp) if colour.name != "alpha"]
    gone_HW = mask_HWC[..., seen].all(2) if seen else mask_HWC.all(2)
    mask_HWC |= gone_HW[..., None]  # an alpha band has no mask of its own
    if not mask_HWC.any():
        return pixels_HWC
    if not gone_HW.all():
        pixels_HWC[gone_HW] = pixels_HWC[~gone_HW].mean(0, dtype=np.float64).astype(pixels_HWC.dtype)
    return np.ma.array(pixels_HWC, mask=mask_HWC)


def without_data(image_HWC: np.ndarray) -> np.ndarray:
    """Pixels without data, bool [H, W]: where every band is masked, as in packing. A single band's nodata value is
    dark water as often as not. NaN in one band masks all of them."""
    return np.asarray(np.ma.getmaskarray(image_HWC).all(2))


def check_data(paths: Sequence[Path]) -> None:
    """Raises ConfigError naming the first image of which no pixel has data; reads those that say where they have
    none."""
    empty = sorted(path for path in paths if path.suffix.lower() in GEO and _is_empty(path))
    if empty:
        more = f", as of {len(empty) - 1} more" if len(empty) > 1 else ""
        raise ConfigError(
            f"{empty[0]}: by its nodata value or mask none of its pixels has data{more}; take the image out, or "
            "correct the value with gdal_edit.py -a_nodata or -unsetnodata"
        )


def _is_empty(path: Path) -> bool:
    with _rasterio(path).open(path) as file:
        says = _says_nodata(file)
    return says and bool(without_data(read(path)).all())


def _png_depth(path: Path) -> tuple[int, bool]:
    """(bits a band, whether it has colours) of a PNG, which Pillow changes without a word; (8, False) of others."""
    with open(path, "rb") as file:
        head = file.read(26)
    if head[:8] != b"\x89PNG\r\n\x1a\n" or len(head) < 26:
        return 8, False
    return head[24], bool(head[25] & 2) and not head[25] & 1


def same_form(paths: Sequence[Path]) -> tuple[int, str]:
    """(bands, dtype) of all of them. Raises ConfigError naming the first that differs."""
    bands, dtype = form(paths[0])[:2]
    for path in paths[1:]:
        if (other := form(path)[:2]) != (bands, dtype):
            raise ConfigError(f"{path}: {other[0]} band(s) of {other[1]}, {paths[0].name} has {bands} of {dtype}")
    return bands, dtype


def hash_of(path: Path, folder: Path) -> bytes:
    """What files are ordered by before they are split: their name below a folder, on any machine."""
    name = path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name
    return hashlib.blake2b(name.encode()).digest()


def _rasterio(path: Path) -> Any:
    try:
        import rasterio
    except ImportError as error:
        raise ConfigError(
            f"{path}: GeoTIFF and JPEG 2000 need rasterio: pip install -e '.[pack]' in geokr's folder"
        ) from error
    return rasterio
