"""The bytes of a record's image: JPEG, and without loss raw, PNG and LZ4. Shared by packer and readers.

jpeg: 3 bands of uint8, which the packer encodes as its options say (preprocess.image_codecs).
raw: the pixels [H, W, C] in C order, little-endian.
png: see geokr.png; 1 to 4 bands of uint8 or uint16.
lz4: one LZ4 block, no header, of the raw bytes; where a value takes more than one byte, of all values' lowest bytes,
then all values' second bytes, and so on: high bytes hardly differ among neighbours, and only thus LZ4 finds that.
"""

import lz4.block
import numpy as np
import simplejpeg

from geokr import png

LOSSLESS = ("png", "raw", "lz4")


class CodecError(ValueError):
    """Bytes that do not decode to what their record says; the message says what is wrong."""


def encode(tile_HWC: np.ndarray, codec: str) -> bytes:
    """The tile's bytes by a lossless codec. Those of png and lz4 also depend on the version of zlib and liblz4."""
    if codec == "png":
        return png.encode(tile_HWC)
    little = tile_HWC.astype(tile_HWC.dtype.newbyteorder("<"), copy=False)
    if codec == "raw":
        return little.tobytes()  # the only copy, also of a tile that is a window of a larger image
    assert codec == "lz4", codec
    return lz4.block.compress(_planes(np.ascontiguousarray(little)), store_size=False)


def decode(data: bytes | np.ndarray, codec: str, shape: tuple[int, int, int], dtype: str) -> np.ndarray:
    """The pixels [H, W, C] in native order, C-contiguous and aligned; for raw a view where that is possible.

    Raises CodecError, before anything larger than the tile is made.
    """
    try:
        if codec == "jpeg":
            return _decode_jpeg(data, shape)
        if codec == "png":
            return png.decode(data, shape, dtype)
        kind = np.dtype(dtype).newbyteorder("<")
        count = int(np.prod(shape, dtype=np.int64))
        if codec == "lz4":
            data = inflate(data, count * kind.itemsize)
            if kind.itemsize > 1:
                data = np.ascontiguousarray(np.frombuffer(data, np.uint8).reshape(kind.itemsize, count).T)
        values = np.frombuffer(data, kind)
        return np.require(values.reshape(shape).astype(dtype, copy=False), requirements=["C", "A"])
    except (ValueError, lz4.block.LZ4BlockError) as error:
        raise CodecError(str(error)) from error


def inflate(data: bytes | np.ndarray, size: int) -> bytes:
    """An LZ4 block that must hold ``size`` bytes. Raises CodecError, or LZ4BlockError."""
    if size > 255 * len(data):  # no block does more, and room for all of it is made first
        raise CodecError(f"{len(data)} bytes cannot hold the {size} that were expected")
    found = lz4.block.decompress(data, uncompressed_size=size)
    if len(found) != size:
        raise CodecError(f"{len(found)} bytes, {size} were expected")
    return found


def _decode_jpeg(data: bytes | np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    height, width = simplejpeg.decode_jpeg_header(data)[:2]
    if (height, width, 3) != shape:
        raise CodecError(f"it is {height} x {width} x 3, its record says {' x '.join(map(str, shape))}")
    return simplejpeg.decode_jpeg(data, colorspace="RGB")


def _planes(raw_HWC: np.ndarray) -> np.ndarray:
    """All lowest bytes, then all second ones, ..."""
    values = raw_HWC.reshape(-1).view(np.uint8).reshape(-1, raw_HWC.itemsize)
    return np.ascontiguousarray(values.T)


def unfit(codec: str, bands: int, dtype: str) -> str:
    """Why a codec cannot hold such tiles, and what can; an empty string where it can."""
    if codec == "jpeg" and (bands != 3 or dtype != "uint8"):
        better = "png, raw or lz4" if bands <= 4 and dtype in png.DEPTHS else "raw or lz4"
        return f"jpeg holds 3 bands of uint8, not {bands} of {dtype}: use {better}"
    if codec == "png" and (bands not in png.COLOUR_TYPES or dtype not in png.DEPTHS):
        return f"png holds 1 to 4 bands of uint8 or uint16, not {bands} of {dtype}: use raw or lz4"
    return ""
