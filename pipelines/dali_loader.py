"""The loader that runs DALI's graph: batches in, images out, errors in their turn and with the record's name.

Legend of shapes: N images, H = W side of the tile, h = w side of the image, I bands of the record, C of the model.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from nvidia.dali.pipeline import Pipeline

from pipelines import torch_loader
from pipelines.batch import Decoded, Loaded
from pipelines.dali import Finish, build, decodes, graph_inputs
from pipelines.threads import Team
from pipelines.transform import Transform


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
        if codec != "jpeg":  # DALI's PNG decoder is no faster, and it inflates LZ4 on a GPU only
            return torch_loader.decode_batches(batches, team, transform, shape, codec, where, False)
        return _on_cpu(batches, team, transform, shape, where, count, threads, depth)
    return _in_graph(batches, team, transform, shape, codec, where, count, threads, device, depth)


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
            made = self._inputs(batch)
        except StopIteration:
            raise
        except BaseException as error:
            self._error = error
            raise StopIteration from error
        self.waiting.append(batch)
        return made

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
            if _other_shapes(tiles, shape):
                find_damage([batch])
                raise RuntimeError(f"DALI gave images of other shapes than {shape}")
            yield batch, tiles


def _other_shapes(tiles: Any, shape: tuple[int, ...]) -> bool:
    """Whether any of DALI's images has another shape. Alike they are one tensor, whose shape says it for all."""
    if tiles.is_dense_tensor():
        return tuple(tiles.as_tensor().shape()[1:]) != shape
    return any(tuple(found) != shape for found in tiles.shape())


def _check_jpegs(batches: Iterable[Loaded], shape: tuple[int, int, int], where: Callable[[int], str]) -> None:
    """Raises a RecordError for the first image that does not decode to this shape: DALI does not name it."""
    for batch in batches:
        for record_id, data in zip(batch.plan.ids.tolist(), batch.samples.images, strict=True):
            torch_loader.decode_tile(data, "jpeg", shape, "uint8", lambda record_id=record_id: where(record_id))


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
        yield Decoded.of(batch, lambda images=images: images)


def _in_graph(
    batches: Iterator[Loaded],
    team: Team,
    transform: Transform,
    shape: tuple[int, int, int],
    codec: str,
    where: Callable[[int], str],
    count: int,
    threads: int,
    device: torch.device,
    depth: int,
) -> Iterator[Decoded]:
    """Everything in DALI's graph on the device, but for what :class:`pipelines.dali.Finish` does, and for decoding
    what the graph does not decode."""
    device_id, dtype = _device_id(device), transform.facts.dtype
    encoded = decodes(codec, dtype, device_id)

    def inputs(batch: Loaded) -> tuple[Any, ...]:
        images: list[np.ndarray] = batch.samples.images
        if not encoded:
            images = torch_loader.decode_all(team, batch, codec, shape, dtype, where)
        return graph_inputs(images, batch.parameters, shape[0], transform.facts)

    feed, kept = _Feed(batches, inputs), _Kept(Finish(transform, device))
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
        yield Decoded.of(batch, lambda tiles=tiles: kept.finished(tiles))


def _device_id(device: torch.device) -> int | None:
    """DALI's number of a GPU; None for its CPU backend, on which the tests run the graph."""
    if device.type == "cpu":
        return None
    return device.index if device.index is not None else torch.cuda.current_device()


class _Kept:
    """Keeps DALI's buffers until the caller's stream has read them: DALI does not know of that stream."""

    def __init__(self, finish: Finish) -> None:
        self._finish = finish
        self._kept: deque[tuple[torch.cuda.Event, Any]] = deque()

    def finished(self, tiles: Any) -> torch.Tensor:
        """A tensor of torch's own from DALI's output, in the current stream."""
        while self._kept and self._kept[0][0].query():
            self._kept.popleft()
        source = torch.from_dlpack(tiles.as_tensor())
        images = self._finish(source)
        images = images.clone() if images is source else images
        event = torch.cuda.Event()
        event.record()
        self._kept.append((event, (tiles, source)))
        return images
