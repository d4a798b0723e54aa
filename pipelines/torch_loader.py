"""The same batches without DALI: libjpeg-turbo (simplejpeg), zlib, liblz4 and numba in threads, no other processes.

All release the GIL, so threads scale, and images are written straight into the batch.
"""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from geokr import tile_codecs
from geokr.records import RecordError
from pipelines.augment import Parameters
from pipelines.batch import Decoded, Loaded
from pipelines.threads import Team
from pipelines.transform import Transform

# Images in a thread's job: few enough that threads end together, many enough that a job's cost vanishes.
_CHUNK = 4


def decode_tile(
    data: np.ndarray, codec: str, shape: tuple[int, int, int], dtype: str, where: Callable[[], str]
) -> np.ndarray:
    """An image's bytes as [H, W, I] of dtype, C-order, aligned; of raw a view where the bytes lie so.

    Raises RecordError that begins with ``where`` if it is damaged, of another shape, or holds NaN.
    """
    try:
        tile = tile_codecs.decode(data, codec, shape, dtype)
    except tile_codecs.CodecError as error:
        raise RecordError(f"{where()}: the image does not decode as {codec} ({error}); pack again") from error
    # raw ones were looked through when they were read
    if codec == "lz4" and dtype == "float32" and not np.isfinite(tile).all():
        raise RecordError(f"{where()}: feature 'image' holds NaN or infinity; pack again from sound scenes")
    return tile


def decode_all(
    team: Team, batch: Loaded, codec: str, shape: tuple[int, int, int], dtype: str, where: Callable[[int], str]
) -> list[np.ndarray]:
    """A batch's images, decoded by the team."""
    ids, data = batch.plan.ids.tolist(), batch.samples.images
    tiles: list[np.ndarray] = [np.empty(0)] * len(ids)

    def work(chunk: range) -> None:
        for n in chunk:
            tiles[n] = decode_tile(data[n], codec, shape, dtype, partial(where, ids[n]))

    team.map(work, _parts(len(ids)))
    return tiles


def _parts(count: int) -> list[range]:
    return [range(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK)]


def augment_all(
    team: Team,
    transform: Transform,
    tile: Callable[[int], np.ndarray],
    parameters: Parameters,
    out_NhwC: np.ndarray,
) -> None:
    """Fills the batch: the team calls ``tile(n)`` for the n-th tile [H, W, I] and augments it into its place."""

    def work(chunk: range) -> None:
        for n in chunk:
            transform(tile(n), parameters, n, out_NhwC[n])

    team.map(work, _parts(len(out_NhwC)))


def decode_batches(
    batches: Iterator[Loaded],
    team: Team,
    transform: Transform,
    shape: tuple[int, int, int],
    codec: str,
    where: Callable[[int], str],
    pinned: bool,
) -> Iterator[Decoded]:
    """Decodes and augments batch after batch. shape: the records' (H, W, I). where: a record's place, for errors."""
    for batch in batches:
        images = transform.allocate(len(batch.plan.ids), pinned)

        def tile(n: int, batch: Loaded = batch) -> np.ndarray:
            record_id = int(batch.plan.ids[n])
            return decode_tile(batch.samples.images[n], codec, shape, transform.facts.dtype, lambda: where(record_id))

        augment_all(team, transform, tile, batch.parameters, images.numpy())
        batch.samples.release()
        yield Decoded.of(batch, lambda images=images: images)
