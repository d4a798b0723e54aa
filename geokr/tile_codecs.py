"""The bytes of a record's image without loss: raw, PNG and LZ4, both ways. Shared by packer and readers.

raw: the pixels [H, W, C] in C order, little-endian.
png: see geokr.png; 1 to 4 bands of uint8 or uint16.
lz4: one LZ4 block, no header, of the raw bytes; where a value takes more than one byte, of all values' lowest bytes,
then all values' second bytes, and so on: high bytes hardly differ among neighbours, and only thus LZ4 finds that.
"""

import lz4.block
import numpy as np

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

    Raises CodecError.
    """
    try:
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
    found = lz4.block.decompress(data, uncompressed_size=size)
    if len(found) != size:
        raise CodecError(f"{len(found)} bytes, {size} were expected")
    return found


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
