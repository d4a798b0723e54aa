"""DALI's graph: JPEG decoding on the CPU, decoding (JPEG, LZ4) and augmentation on the GPU.

DALI gets encoded bytes and augmentation parameters through ``external_source``; order, randomness and checksums stay
outside, so its own random state and readers play no part.

On the CPU DALI decodes and the numba kernels augment (its CPU colour operators are some 20 times slower). On the
GPU the graph does all of it but the area resize and the normalisation, which torch does on the device. The in-graph
augmentation builds and runs on DALI's CPU backend too, and the tests hold it against the kernels there.
Last seen running on a GPU on 2026-11-26 (one H200, DALI 2.4.0): see docs/performance.md.

Legend of shapes: N images, H = W side of the tile, h = w side of the image, I bands of the record, C of the model.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, math, types
from nvidia.dali.pipeline import Pipeline

from pipelines.augment import BandFacts, Parameters
from pipelines.resize import area_matrix
from pipelines.transform import HALF_LIMIT, Transform

_BYTE, _FLOAT = types.DALIDataType.UINT8, types.DALIDataType.FLOAT
_TYPES = {"uint8": _BYTE, "uint16": types.DALIDataType.UINT16, "int16": types.DALIDataType.INT16, "float32": _FLOAT}
# Share of the images for the hardware decoder, the rest goes to CUDA; 0.9 was 2 % faster with a worse tail.
_HW_DECODER_LOAD = 0.65


def dihedral_affine(dihedral: np.ndarray, size: int) -> np.ndarray:
    """Dihedral numbers [N] as float32 [N, 2, 3]: pixel edges of the result (x, y, 1) to those of the tile."""
    k = dihedral[:, None]
    zero = np.zeros(len(dihedral))
    columns, rows = np.where(k & 1, (-1, size), (1, 0)), np.where(k & 2, (-1, size), (1, 0))
    from_columns = np.stack([columns[:, 0], zero, columns[:, 1]], 1)
    from_rows = np.stack([zero, rows[:, 0], rows[:, 1]], 1)
    plain, transposed = np.stack([from_columns, from_rows], 1), np.stack([from_rows, from_columns], 1)
    return np.where(k[:, :, None] & 4, transposed, plain).astype(np.float32)


# Channels that coord_transform takes, in and out.
_CHANNELS = 6


def colour_groups(facts: BandFacts) -> list[tuple[slice, list[int]]] | None:
    """How colour is applied where a record or the model has more bands than the operator takes: places among the
    model's bands, and which of the record's bands they are made of. None where it takes all of them at once.

    Beyond red, green and blue a band depends on no other.
    """
    count = len(facts.bands)
    if max(count, len(facts.mean)) <= _CHANNELS:
        return None
    cuts = [slice(first, min(first + _CHANNELS, count)) for first in range(0, count, _CHANNELS)]
    return [(cut, list(facts.bands[cut])) for cut in cuts]


def colour_matrices(colour_NCI: np.ndarray, facts: BandFacts) -> list[np.ndarray]:
    """The matrices for :func:`augment_in_graph`: one [N, C, I + 1], or one [N, c, c + 1] for each group."""
    groups = colour_groups(facts)
    if groups is None:
        return [colour_NCI]
    return [np.ascontiguousarray(colour_NCI[:, rows][:, :, [*bands, -1]]) for rows, bands in groups]


def augment_in_graph(images: Any, affine: Any, matrices: Sequence[Any], transform: Transform) -> Any:
    """Dihedral, colour and clamp as DALI operators; uint8 where nothing else is to be done to them, else float."""
    if transform.facts.dtype == "uint16":  # which warp_affine does not take; float holds it exactly
        images = fn.cast(images, dtype=_FLOAT)
    images = fn.warp_affine(images, matrix=affine, interp_type=types.DALIInterpType.INTERP_NN)
    as_bytes = transform.is_bytes and transform.taps is None
    dtype = _BYTE if as_bytes else _FLOAT  # bytes are rounded and clamped
    groups = colour_groups(transform.facts)
    parts = [images] if groups is None else [_picked(images, bands) for _, bands in groups]
    made = [fn.coord_transform(part, MT=matrix, dtype=dtype) for part, matrix in zip(parts, matrices, strict=True)]
    images = made[0] if len(made) == 1 else fn.cat(*made, axis=2)
    if as_bytes:
        return images
    low, high = transform.facts.limits()
    return math.clamp(images, low, high) if np.isfinite(low) else images


def _picked(images: Any, bands: Sequence[int]) -> Any:
    """Some of the bands of images [H, W, I]."""
    parts = [images[:, :, band : band + 1] for band in bands]
    return parts[0] if len(parts) == 1 else fn.cat(*parts, axis=2)


def decodes(codec: str, dtype: str, device_id: int | None) -> bool:
    """Whether the graph decodes this codec; other images come to it decoded.

    LZ4 is inflated on the GPU alone, and not where pixels must be looked through for NaN before they go there.
    """
    return codec == "jpeg" or (codec == "lz4" and dtype != "float32" and device_id is not None)


class Finish:
    """What torch does after the graph, on a device: area resize, then rounding or normalisation."""

    def __init__(self, transform: Transform, device: torch.device):
        def on_device(values: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(values.astype(np.float32)).to(device)

        self._is_bytes = transform.is_bytes
        self._resizes = transform.taps is not None
        self._taps_hH = on_device(area_matrix(transform.tile_size, transform.image_size))
        self._mean_C, self._std_C = (on_device(values) for values in transform.facts.normalisation())

    def __call__(self, images_NHWC: torch.Tensor) -> torch.Tensor:
        """uint8 or float32 [N, H, W, C] to uint8 or float16 [N, h, w, C]."""
        if self._resizes:
            count, side, _, bands = images_NHWC.shape
            rows = torch.matmul(self._taps_hH, images_NHWC.float().reshape(count, side, side * bands))
            images_NHWC = torch.matmul(self._taps_hH, rows.reshape(count, -1, side, bands))
        if not self._is_bytes:
            normalised = (images_NHWC.float() - self._mean_C) / self._std_C
            return normalised.clamp(-HALF_LIMIT, HALF_LIMIT).half()
        if images_NHWC.dtype == torch.uint8:
            return images_NHWC
        return images_NHWC.round().clamp(0, 255).to(torch.uint8)


def build(
    source: Callable[[], tuple[Any, ...]],
    *,
    count: int,
    shape: tuple[int, int, int],
    codec: str,
    transform: Transform | None,
    threads: int,
    device_id: int | None,
    depth: int,
) -> Pipeline:
    """A built pipeline over batches of at most ``count``.

    source: called for each batch; gives (image bytes, or decoded arrays [H, W, I],) and with a transform also
    (affine [N, 2, 3], and matrices, see :func:`colour_matrices`) for the augmentation in the graph. Raises
    StopIteration at the end. codec: what the graph decodes, see :func:`decodes`. device_id: None for the CPU backend.
    """
    pipeline = Pipeline(
        batch_size=count, num_threads=threads, device_id=device_id, prefetch_queue_depth=depth, exec_dynamic=True
    )
    dtype = transform.facts.dtype if transform else "uint8"
    encoded = decodes(codec, dtype, device_id)
    dtypes = [_BYTE if encoded else _TYPES[dtype]]
    dimensions, layouts = [1 if encoded else 3], ["" if encoded else "HWC"]
    if transform is not None:
        more = 1 + len(colour_groups(transform.facts) or [None])
        dtypes, dimensions, layouts = dtypes + [_FLOAT] * more, dimensions + [2] * more, layouts + [""] * more
    with pipeline:
        images, *parameters = fn.external_source(
            source=source, num_outputs=len(dtypes), batch=True, dtype=dtypes, ndim=dimensions, layout=layouts
        )
        if encoded:
            decoded = _decoded(images, shape, device_id) if codec == "jpeg" else _inflated(images, shape, dtype)
        else:
            decoded = images if device_id is None else images.gpu()
        if transform is not None:
            affine, *matrices = parameters
            decoded = augment_in_graph(decoded, affine, matrices, transform)
        pipeline.set_outputs(decoded)
    pipeline.build()
    return pipeline


def _decoded(data: Any, shape: tuple[int, int, int], device_id: int | None) -> Any:
    if device_id is None:
        return fn.decoders.image(data, device="cpu", output_type=types.DALIImageType.RGB)
    height, width, _ = shape
    return fn.decoders.image(
        data,
        device="mixed",
        output_type=types.DALIImageType.RGB,
        hw_decoder_load=_HW_DECODER_LOAD,
        preallocate_height_hint=height,  # tiles are all alike, so memory need never grow
        preallocate_width_hint=width,
    )


def _inflated(data: Any, shape: tuple[int, int, int], dtype: str) -> Any:
    """LZ4 blocks on the GPU. Bytes come in planes (see geokr.tile_codecs), which are put together there."""
    size = np.dtype(dtype).itemsize
    planes = fn.decoders.inflate(data.gpu(), algorithm="LZ4", shape=[size, prod(shape)], dtype=_BYTE)
    return joined_planes(planes, shape, dtype)


def joined_planes(planes: Any, shape: tuple[int, int, int], dtype: str) -> Any:
    """uint8 [bytes of a value, values] as values [H, W, I]."""
    values = fn.transpose(planes, perm=[1, 0]) if np.dtype(dtype).itemsize > 1 else planes
    return fn.reinterpret(values, shape=list(shape), dtype=_TYPES[dtype], layout="HWC")


def graph_inputs(images: list[np.ndarray], parameters: Parameters, size: int, facts: BandFacts) -> tuple[Any, ...]:
    """What a pipeline with in-graph augmentation takes for a batch: one array for all images where they allow it."""
    return images, dihedral_affine(parameters.dihedral, size), *colour_matrices(parameters.colour, facts)
