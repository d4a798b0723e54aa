"""PNG of tiles, written and read without any image library: 1 to 4 bands of 8 or 16 bits, exactly.

A PNG is a signature and chunks: IHDR says size, depth and colour type, IDAT holds the rows deflated, each behind a byte
that names its filter (the difference to pixels beside and above, which deflates better), and IEND ends it. Sixteen bits
are big-endian. Any PNG reader takes what is written here; what is read here are PNGs of that kind, neither
interlaced nor with a palette. Python's zlib and the kernels below hold no GIL, so threads scale.
"""

import struct
import zlib
from typing import Any

import numpy as np

from geokr import numba_cache

numba_cache.choose(__file__)
import numba  # noqa: E402 - it looks for its folder when it is imported

SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Bands to PNG's colour type: grey, grey and alpha, RGB, RGB and alpha.
COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}
DEPTHS = {"uint8": 8, "uint16": 16}
# After the filters imagery repeats nothing but runs: looking for runs alone (zlib's RLE strategy, at any level) took a
# sixth to a half of the time of the usual search and gave 2 % fewer bytes, on 8 and on 16 bit Landsat tiles.
STRATEGY, LEVEL, MEMORY = zlib.Z_RLE, 3, 9

_HEADER = struct.Struct(">IIBBBBB")
_FILTER_SUB, _FILTER_UP, _FILTER_AVERAGE, _FILTER_PAETH = 1, 2, 3, 4


class PngError(ValueError):
    """Bytes that are no PNG of this kind; the message says what is wrong."""


def encode(tile_HWC: np.ndarray) -> bytes:
    """A PNG of uint8 or uint16 [H, W, 1 to 4]; equal tiles give equal bytes with one version of zlib."""
    height, width, bands = tile_HWC.shape
    depth = DEPTHS[tile_HWC.dtype.name]
    rows = np.ascontiguousarray(tile_HWC.astype(tile_HWC.dtype.newbyteorder(">"), copy=False))
    filtered = _filter(rows.view(np.uint8).reshape(height, -1), bands * depth // 8)
    header = _HEADER.pack(width, height, depth, COLOUR_TYPES[bands], 0, 0, 0)
    packer = zlib.compressobj(LEVEL, zlib.DEFLATED, zlib.MAX_WBITS, MEMORY, STRATEGY)
    data = packer.compress(filtered.data) + packer.flush()
    return SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def decode(data: bytes | np.ndarray, shape: tuple[int, int, int], dtype: str) -> np.ndarray:
    """The pixels [H, W, C] of a PNG that must have this shape and dtype. Raises PngError."""
    header, body = _chunks(memoryview(data if isinstance(data, bytes) else data.data))
    height, width, bands = shape
    wanted = (width, height, DEPTHS.get(dtype), COLOUR_TYPES.get(bands), 0, 0, 0)
    if header != wanted:
        raise PngError(f"its header is {header}, its record needs {wanted}")
    pixel = bands * DEPTHS[dtype] // 8
    size = height * (1 + width * pixel)
    inflater = zlib.decompressobj()
    try:
        rows = inflater.decompress(body, size)
    except zlib.error as error:
        raise PngError(str(error)) from error
    if len(rows) != size or (not inflater.eof and inflater.decompress(inflater.unconsumed_tail, 1)):
        raise PngError(f"{len(rows)} bytes of rows or more, {size} were expected")
    if not inflater.eof:  # the checksum at its end was not reached
        raise PngError("it is cut short")
    out = np.empty((height, width * pixel), np.uint8)
    if not _unfilter(np.frombuffer(rows, np.uint8).reshape(height, -1), pixel, out):
        raise PngError("a row names a filter that does not exist")
    if dtype == "uint8":
        return out.reshape(shape)
    return out.view(">u2").astype(np.uint16).reshape(shape)


def _chunk(name: bytes, content: bytes) -> bytes:
    body = name + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


def _chunks(data: memoryview) -> tuple[tuple[int, ...], bytes | memoryview]:
    """(the header's fields, all IDAT content)."""
    if bytes(data[:8]) != SIGNATURE:
        raise PngError("it does not begin as a PNG")
    at, header, parts = 8, None, []
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        name, content = bytes(data[at + 4 : at + 8]), data[at + 8 : at + 8 + length]
        if at + 12 + length > len(data):
            break
        if zlib.crc32(data[at + 4 : at + 8 + length]) != struct.unpack_from(">I", data, at + 8 + length)[0]:
            raise PngError(f"the checksum of chunk {name!r} does not match")
        if name == b"IHDR" and length == _HEADER.size:
            header = _HEADER.unpack(content)
        elif name == b"IDAT":
            parts.append(content)
        elif name == b"IEND":
            if header is None or not parts:
                raise PngError("it holds no header or no pixels")
            return header, parts[0] if len(parts) == 1 else b"".join(parts)
        at += 12 + length
    raise PngError("it is cut short")


@numba.njit(cache=True, nogil=True)
def _paeth(left: Any, up: Any, corner: Any) -> Any:
    by_left, by_up, by_corner = abs(up - corner), abs(left - corner), abs(left + up - 2 * corner)
    if by_left <= by_up and by_left <= by_corner:
        return left
    return up if by_up <= by_corner else corner


@numba.njit(cache=True, nogil=True)
def _filter(rows: np.ndarray, pixel: int) -> np.ndarray:
    """Rows uint8 [H, bytes] behind their filters, [H, 1 + bytes]: of Sub, Up, Average and Paeth the one whose
    differences, as signed bytes, are smallest in sum. pixel: bytes of a pixel."""
    height, length = rows.shape
    out = np.empty((height, 1 + length), np.uint8)
    tried = np.empty((5, length), np.uint8)
    above = np.zeros(length, np.uint8)
    for y in range(height):
        row = rows[y]
        cost = np.zeros(5, np.int64)
        for x in range(length):
            value, up = np.int64(row[x]), np.int64(above[x])
            left = np.int64(row[x - pixel]) if x >= pixel else 0
            corner = np.int64(above[x - pixel]) if x >= pixel else 0
            tried[_FILTER_SUB, x] = (value - left) & 255
            tried[_FILTER_UP, x] = (value - up) & 255
            tried[_FILTER_AVERAGE, x] = (value - (left + up) // 2) & 255
            tried[_FILTER_PAETH, x] = (value - _paeth(left, up, corner)) & 255
            for kind in range(1, 5):
                found = np.int64(tried[kind, x])
                cost[kind] += min(found, 256 - found)
        best = 1
        for kind in range(2, 5):
            if cost[kind] < cost[best]:
                best = kind
        out[y, 0] = best
        out[y, 1:] = tried[best]
        above = row
    return out


@numba.njit(cache=True, nogil=True)
def _unfilter(filtered: np.ndarray, pixel: int, out: np.ndarray) -> bool:
    """Undoes the filters of rows [H, 1 + bytes] into out [H, bytes]; False where one is unknown."""
    height, length = out.shape
    above = np.zeros(length, np.uint8)
    for y in range(height):
        kind, row, data = filtered[y, 0], out[y], filtered[y, 1:]
        if kind > 4:
            return False
        for x in range(length):
            left = np.int64(row[x - pixel]) if x >= pixel else 0
            up = np.int64(above[x])
            guess = np.int64(0)
            if kind == _FILTER_SUB:
                guess = left
            elif kind == _FILTER_UP:
                guess = up
            elif kind == _FILTER_AVERAGE:
                guess = (left + up) // 2
            elif kind == _FILTER_PAETH:
                guess = _paeth(left, up, np.int64(above[x - pixel]) if x >= pixel else 0)
            row[x] = (np.int64(data[x]) + guess) & 255
        above = row
    return True
