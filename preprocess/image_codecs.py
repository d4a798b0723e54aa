"""A tile's pixels as the bytes of a record, and back."""

import numpy as np
import simplejpeg

from geokr import tile_codecs
from geokr.records import Record, RecordError
from preprocess.options import PackOptions


def encode_image(tile_HWC: np.ndarray, options: PackOptions) -> bytes:
    """The tile's bytes by ``tile.codec``."""
    if options.tile.codec in tile_codecs.LOSSLESS:
        return tile_codecs.encode(tile_HWC, options.tile.codec)
    return simplejpeg.encode_jpeg(
        np.ascontiguousarray(tile_HWC),
        quality=options.tile.jpeg_quality,
        colorspace="RGB",
        colorsubsampling=options.tile.jpeg_subsampling,
        fastdct=False,  # the accurate transform: the same pixels in every decoder
    )


def decode_image(record: Record, where: str) -> np.ndarray:
    """The pixels [H, W, C] of a record. Raises RecordError, beginning with ``where``, if they are not what it says."""
    try:
        return tile_codecs.decode(record.image, record.codec, record.shape, record.dtype)
    except tile_codecs.CodecError as error:
        raise RecordError(f"{where}: the image does not decode as {record.codec} ({error})") from error
