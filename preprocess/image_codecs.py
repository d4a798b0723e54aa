"""A tile's pixels as the bytes of a record, and back."""

import threading

import numpy as np
import simplejpeg

from geokr import tile_codecs
from geokr.records import Record, RecordError
from preprocess.options import PackOptions

_thread = threading.local()


def encode_image(tile_HWC: np.ndarray, options: PackOptions) -> bytes:
    """The tile's bytes by ``tile.codec``."""
    if options.tile.codec in tile_codecs.LOSSLESS:
        return tile_codecs.encode(tile_HWC, options.tile.codec)
    return simplejpeg.encode_jpeg(
        _contiguous(tile_HWC),
        quality=options.tile.jpeg_quality,
        colorspace="RGB",
        colorsubsampling=options.tile.jpeg_subsampling,
        fastdct=False,  # the accurate transform: the same pixels in every decoder
    )


def _contiguous(tile_HWC: np.ndarray) -> np.ndarray:
    """The tile, which is most often a window of a larger image, in memory that stays for the next one: what is new
    takes longer to touch than to fill."""
    if tile_HWC.flags.c_contiguous:
        return tile_HWC
    if getattr(_thread, "tile", None) is None or _thread.tile.shape != tile_HWC.shape:
        _thread.tile = np.empty(tile_HWC.shape, tile_HWC.dtype)
    np.copyto(_thread.tile, tile_HWC)
    return _thread.tile


def decode_image(record: Record, where: str) -> np.ndarray:
    """The pixels [H, W, C] of a record. Raises RecordError, beginning with ``where``, if they are not what it says."""
    try:
        return tile_codecs.decode(record.image, record.codec, record.shape, record.dtype)
    except tile_codecs.CodecError as error:
        raise RecordError(f"{where}: the image does not decode as {record.codec} ({error})") from error
