"""The same batches without DALI: libjpeg-turbo (simplejpeg) and numba kernels in threads, no other processes.

Both release the GIL, so threads scale, and images are written straight into the batch.
"""

from collections.abc import Callable, Iterator

import numpy as np
import simplejpeg

from geokr.records import RecordError
from pipelines.augment import Parameters
from pipelines.batch import Decoded, Loaded
from pipelines.threads import Team
from pipelines.transform import Transform

# Images in a thread's job: few enough that threads end together, many enough that a job's cost vanishes.
_CHUNK = 4


def decode_jpeg(data: np.ndarray, shape: tuple[int, int, int], where: Callable[[], str]) -> np.ndarray:
    """A JPEG as uint8 [H, W, 3]. Raises RecordError that begins with ``where`` if it is damaged or of another shape."""
    try:
        image = simplejpeg.decode_jpeg(data, colorspace="RGB")
    except ValueError as error:
        raise RecordError(f"{where()}: the JPEG does not decode ({error}); pack again") from error
    if image.shape != shape:
        raise RecordError(f"{where()}: the JPEG is {image.shape}, its record says {shape}; pack again")
    return image


def view_raw(data: np.ndarray, shape: tuple[int, int, int], dtype: str) -> np.ndarray:
    """Raw image bytes as [H, W, I] of dtype, C-order, aligned; a view where the bytes lie so, else a copy."""
    image = np.frombuffer(data, np.dtype(dtype).newbyteorder("<")).reshape(shape)
    return np.require(image.astype(dtype, copy=False), requirements=["C", "A"])


def augment_all(
    team: Team,
    transform: Transform,
    tile: Callable[[int], np.ndarray],
    parameters: Parameters,
    out_NhwC: np.ndarray,
) -> None:
    """Fills the batch: the team calls ``tile(n)`` for the n-th tile [H, W, I] and augments it into its place."""
    count = len(out_NhwC)

    def work(chunk: range) -> None:
        for n in chunk:
            transform(tile(n), parameters, n, out_NhwC[n])

    team.map(work, [range(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK)])


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
            data = batch.samples.images[n]
            if codec == "raw":
                return view_raw(data, shape, transform.facts.dtype)
            return decode_jpeg(data, shape, lambda: where(int(batch.plan.ids[n])))

        augment_all(team, transform, tile, batch.parameters, images.numpy())
        batch.samples.release()
        yield Decoded(batch.plan, batch.samples.fractions, lambda images=images: images)
