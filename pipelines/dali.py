"""DALI: JPEG decoding on the CPU, decoding and augmentation on the GPU.

DALI gets encoded bytes and augmentation parameters through ``external_source``; order, randomness and checksums stay
outside, so its own random state and readers play no part.

On the CPU DALI decodes and the numba kernels augment (its CPU colour operators are some 20 times slower). On the
GPU the graph does all of it but the area resize and the normalisation, which torch does on the device. The in-graph
augmentation builds and runs on DALI's CPU backend too, and the tests hold it against the kernels there.
The GPU path has not been run on a device in this version.

Legend of shapes: N images, H = W side of the tile, h = w side of the image, I bands of the record, C of the model.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, math, types
from nvidia.dali.pipeline import Pipeline

from pipelines import torch_loader
from pipelines.augment import Parameters
from pipelines.batch import Decoded, Loaded
from pipelines.resize import area_matrix
from pipelines.threads import Team
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


def augment_in_graph(images: Any, affine: Any, matrix: Any, transform: Transform) -> Any:
    """Dihedral, colour and clamp as DALI operators; uint8 where nothing else is to be done to them, else float."""
    if transform.facts.dtype == "uint16":  # which warp_affine does not take; float holds it exactly
        images = fn.cast(images, dtype=_FLOAT)
    images = fn.warp_affine(images, matrix=affine, interp_type=types.DALIInterpType.INTERP_NN)
    if transform.is_bytes and transform.taps is None:
        return fn.coord_transform(images, MT=matrix, dtype=_BYTE)  # rounds and clamps
    images = fn.coord_transform(images, MT=matrix, dtype=_FLOAT)
    low, high = transform.facts.limits()
    return math.clamp(images, low, high) if np.isfinite(low) else images


def finish(images_NHWC: torch.Tensor, transform: Transform) -> torch.Tensor:
    """What torch does after the graph, on the images' own device: area resize, then rounding or normalisation."""
    if transform.taps is not None:
        matrix = area_matrix(transform.tile_size, transform.image_size).astype(np.float32)
        taps_hH = torch.from_numpy(matrix).to(images_NHWC.device)
        count, side, _, bands = images_NHWC.shape
        rows = torch.matmul(taps_hH, images_NHWC.float().reshape(count, side, side * bands))
        images_NHWC = torch.matmul(taps_hH, rows.reshape(count, -1, side, bands))
    if transform.is_bytes:
        return images_NHWC if images_NHWC.dtype == torch.uint8 else images_NHWC.round().clamp(0, 255).to(torch.uint8)
    mean, std = (torch.from_numpy(values).float().to(images_NHWC.device) for values in transform.facts.normalisation())
    return ((images_NHWC.float() - mean) / std).clamp(-HALF_LIMIT, HALF_LIMIT).half()


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

    source: called for each batch; gives (image bytes, or raw arrays [H, W, I],) and with a transform also
    (affine [N, 2, 3], colour [N, C, I + 1]) for the augmentation in the graph. Raises StopIteration at the end.
    device_id: None for the CPU backend.
    """
    pipeline = Pipeline(
        batch_size=count, num_threads=threads, device_id=device_id, prefetch_queue_depth=depth, exec_dynamic=True
    )
    dtypes = [_BYTE if codec == "jpeg" else _TYPES[transform.facts.dtype if transform else "uint8"]]
    dimensions, layouts = [1 if codec == "jpeg" else 3], ["" if codec == "jpeg" else "HWC"]
    if transform is not None:
        dtypes, dimensions, layouts = [*dtypes, _FLOAT, _FLOAT], [*dimensions, 2, 2], [*layouts, "", ""]
    with pipeline:
        images, *parameters = fn.external_source(
            source=source, num_outputs=len(dtypes), batch=True, dtype=dtypes, ndim=dimensions, layout=layouts
        )
        images = _decoded(images, shape, device_id) if codec == "jpeg" else images
        if codec == "raw" and device_id is not None:
            images = images.gpu()
        if transform is not None:
            affine, matrix = parameters
            images = augment_in_graph(images, affine, matrix, transform)
        pipeline.set_outputs(images)
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


def decode_batches(
    batches: Iterator[Loaded],
    team: Team,
    transform: Transform,
    shape: tuple[int, int, int],
    codec: str,
    where: Callable[[int], str],
    *,
    count: int,
    threads: int,
    device: torch.device,
    prefetch: int,
) -> Iterator[Decoded]:
    """Decodes and augments batch after batch. shape: the records' (H, W, I). where: a record's place, for errors."""
    depth = max(2, prefetch)  # one batch in DALI's threads while another one is given out
    if device.type != "cuda":
        if codec == "raw":  # nothing to decode
            return torch_loader.decode_batches(batches, team, transform, shape, codec, where, False)
        return _on_cpu(batches, team, transform, shape, where, count, threads, depth)
    return _on_gpu(batches, transform, shape, codec, where, count, threads, device, depth)


class _Feed:
    """DALI's source: batches that are in the graph wait here for their images.

    DALI asks some batches ahead and passes a source's error on at once. Here an error waits for the batches before
    it, as in the other loader: what a run sees before it stops does not depend on the prefetch.
    """

    def __init__(self, batches: Iterator[Loaded], inputs: Callable[[Loaded], tuple[Any, ...]]):
        self._batches, self._inputs = batches, inputs
        self.waiting: deque[Loaded] = deque()
        self._error: BaseException | None = None

    def __call__(self) -> tuple[Any, ...]:
        try:
            batch = next(self._batches)
        except StopIteration:
            raise
        except BaseException as error:
            self._error = error
            raise StopIteration from error
        self.waiting.append(batch)
        return self._inputs(batch)

    def runs(
        self, pipeline: Pipeline, shape: tuple[int, ...], find_damage: Callable[[Iterable[Loaded]], None]
    ) -> Iterator[tuple[Loaded, Any]]:
        """(batch, DALI's output) run after run, every image of the given shape.

        find_damage: called with the batches in which DALI found something wrong; raises an error that says where.
        """
        while True:
            try:
                (tiles,) = pipeline.run()
            except StopIteration:
                if self._error is not None:
                    raise self._error from None
                return
            except RuntimeError:
                find_damage(self.waiting)
                raise
            batch = self.waiting.popleft()
            if any(tuple(found) != shape for found in tiles.shape()):
                find_damage([batch])
                raise RuntimeError(f"DALI gave images of other shapes than {shape}")
            yield batch, tiles


def _check_jpegs(batches: Iterable[Loaded], shape: tuple[int, int, int], where: Callable[[int], str]) -> None:
    """Raises a RecordError for the first image that does not decode to this shape: DALI does not name it."""
    for batch in batches:
        for record_id, data in zip(batch.plan.ids.tolist(), batch.samples.images, strict=True):
            torch_loader.decode_jpeg(data, shape, lambda record_id=record_id: where(record_id))


def _on_cpu(
    batches: Iterator[Loaded],
    team: Team,
    transform: Transform,
    shape: tuple[int, int, int],
    where: Callable[[int], str],
    count: int,
    threads: int,
    depth: int,
) -> Iterator[Decoded]:
    feed = _Feed(batches, lambda batch: (batch.samples.images,))
    pipeline = build(
        feed, count=count, shape=shape, codec="jpeg", transform=None, threads=threads, device_id=None, depth=depth
    )
    for batch, tiles in feed.runs(pipeline, shape, lambda batches: _check_jpegs(batches, shape, where)):
        batch.samples.release()
        tiles_NHWC = np.asarray(tiles.as_tensor())
        images = transform.allocate(len(tiles_NHWC))
        torch_loader.augment_all(team, transform, tiles_NHWC.__getitem__, batch.parameters, images.numpy())
        yield Decoded(batch.plan, batch.samples.fractions, lambda images=images: images)


# ------------------------------------------------------------------------------------------------- GPU


def graph_inputs(images: list[np.ndarray], parameters: Parameters, size: int) -> tuple[Any, ...]:
    """What a pipeline with in-graph augmentation takes for a batch."""
    return images, list(dihedral_affine(parameters.dihedral, size)), list(parameters.colour)


def _on_gpu(
    batches: Iterator[Loaded],
    transform: Transform,
    shape: tuple[int, int, int],
    codec: str,
    where: Callable[[int], str],
    count: int,
    threads: int,
    device: torch.device,
    depth: int,
) -> Iterator[Decoded]:
    def inputs(batch: Loaded) -> tuple[Any, ...]:
        images = batch.samples.images
        if codec == "raw":
            images = [torch_loader.view_raw(data, shape, transform.facts.dtype) for data in images]
        return graph_inputs(images, batch.parameters, shape[0])

    feed, kept = _Feed(batches, inputs), _Kept()
    device_id = device.index if device.index is not None else torch.cuda.current_device()
    pipeline = build(
        feed,
        count=count,
        shape=shape,
        codec=codec,
        transform=transform,
        threads=threads,
        device_id=device_id,
        depth=depth,
    )

    def find_damage(batches: Iterable[Loaded]) -> None:
        if codec == "jpeg":
            _check_jpegs(batches, shape, where)

    out_shape = (*shape[:2], len(transform.facts.bands))
    for batch, tiles in feed.runs(pipeline, out_shape, find_damage):
        batch.samples.release()
        yield Decoded(batch.plan, batch.samples.fractions, lambda tiles=tiles: kept.finished(tiles, transform))


class _Kept:
    """Keeps DALI's buffers until the caller's stream has read them: DALI does not know of that stream."""

    def __init__(self) -> None:
        self._kept: deque[tuple[torch.cuda.Event, Any]] = deque()

    def finished(self, tiles: Any, transform: Transform) -> torch.Tensor:
        """A tensor of torch's own from DALI's output, in the current stream."""
        while self._kept and self._kept[0][0].query():
            self._kept.popleft()
        source = torch.from_dlpack(tiles.as_tensor())
        images = finish(source, transform)
        images = images.clone() if images is source else images
        event = torch.cuda.Event()
        event.record()
        self._kept.append((event, (tiles, source)))
        return images
