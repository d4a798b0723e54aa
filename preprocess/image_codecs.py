"""A tile's pixels as the bytes of a record."""

import numpy as np
import simplejpeg

from preprocess.options import PackOptions


def encode_image(tile_HWC: np.ndarray, options: PackOptions) -> bytes:
    """The tile's bytes by ``tile.codec``."""
    if options.tile.codec == "raw":
        return tile_HWC.astype(tile_HWC.dtype.newbyteorder("<"), copy=False).tobytes()
    return simplejpeg.encode_jpeg(
        tile_HWC,
        quality=options.tile.jpeg_quality,
        colorspace="RGB",
        colorsubsampling=options.tile.jpeg_subsampling,
        fastdct=False,  # the accurate transform: the same pixels in every decoder
    )
