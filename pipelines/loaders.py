"""Batches for training and validation, composed of order, reader, parameters and one of the decoders.

plan (pure) -> read ahead (bytes, checksums, parameters) -> decode ahead (DALI or torch) -> the caller's device
"""

import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch

from geokr.options import AugmentOptions, DataOptions
from pipelines import augment, synthetic
from pipelines.batch import Batch, Decoded, Loaded, Plan
from pipelines.dataset import Dataset, Split
from pipelines.errors import PipelineError
from pipelines.interleave import MixedOrder
from pipelines.order import GROUP_RECORDS, Order, Share
from pipelines.reader import Reader
from pipelines.threads import Stage, Team
from pipelines.transform import Transform

# Threads that wait for storage cost little, and four hide some of the way to it on any machine. They work without the
# GIL, so that more of them read faster where there are cores to spare, and half are left to decoding. Beyond eight
# a share of a batch is so small that handing it out takes longer than reading it.
_READ_THREADS = 4, 8
# Positions of the stream that remote shards are fetched ahead of: the group that is read and some three more.
_STAGE_AHEAD = 4 * GROUP_RECORDS


class Loader:
    """An iterator over batches that owns threads and files: close it, or use it in a ``with`` statement."""

    def __init__(self, batches: Iterator[Batch], closers: list[Callable[[], None]]):
        self._batches, self._closers = batches, closers

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        try:
            return next(self._batches)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stops what was prepared ahead; may be called again."""
        while self._closers:
            self._closers.pop(0)()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class _Setting:
    """What train and validation loaders share."""

    dataset: Dataset
    split: Split
    options: DataOptions
    transform: Transform
    device: torch.device
    threads: int


def train_batches(
    dataset: Dataset,
    options: DataOptions,
    augmentation: AugmentOptions,
    *,
    seed: int,
    start_sample: int = 0,
    rank: int = 0,
    world_size: int = 1,
    accumulate: int = 1,
    device: torch.device | str = "cpu",
    image_size: int | None = None,
    bands: tuple[int, ...] | None = None,
    local_ranks: int | None = None,
    by_square: bool = False,
    by_colour: bool = False,
    label_weights: np.ndarray | None = None,
) -> Loader:
    """Endless micro-batches of ``global_batch / (world_size * accumulate)`` samples for this rank.

    seed, start_sample: the stream and the samples of it already consumed, over all ranks: the loader's whole state.
    image_size: None for the tiles' own. bands: indices into the record's bands, None for all.
    local_ranks: processes that share this machine's cores (None: all of them).
    by_square: batches have the fractions of the tiles' squares, too. by_colour: they say how each image's colours were
    changed.
    label_weights: float32, one a training record (see :mod:`pipelines.label_weights`), None for 1.
    Raises PipelineError for a batch, image size, band or loader that cannot be; while iterating RecordError for
    damaged records and ReadTimeoutError for storage that hangs.
    """
    share = Share(options.global_batch, rank, world_size, accumulate)
    setting = _setting(dataset, dataset.train, options, device, image_size, bands, local_ranks or world_size)
    facts = setting.transform.facts
    if by_square and not dataset.manifest.tile.grid:
        raise PipelineError(
            f"{dataset.name} does not say where in its tiles classes lie, by one number of squares: pack with "
            "labels.grid=8"
        )
    if options.loader == "synthetic":
        squares = dataset.manifest.tile.grid if by_square else 0
        changes = augment.change_count(facts) if by_colour else 0
        return _synthetic(setting, share.micro_batch, seed + rank, squares, changes)

    def parameters(plan: Plan) -> augment.Parameters:
        drawn = augment.draw(augmentation, facts, seed, plan.epochs, plan.ids)
        return replace(drawn, changes=augment.colour_changes(drawn.colour, facts)) if by_colour else drawn

    def plans() -> Iterator[Plan]:
        return _train_plans(_order(dataset, seed), share, start_sample, label_weights)

    stride = share.global_batch // accumulate
    return _compose(setting, share.micro_batch, plans, parameters, stride, by_square=by_square)


def val_batches(
    dataset: Dataset,
    options: DataOptions,
    *,
    batch: int,
    max_samples: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    image_size: int | None = None,
    bands: tuple[int, ...] | None = None,
    local_ranks: int | None = None,
) -> Loader:
    """Every validation record (or ``max_samples``: the first of each dataset) once over all ranks, as packed.

    Every rank gets the same number of batches of the same shape, at most ``batch`` samples; what pads them has
    weight 0. Raises as :func:`train_batches`, and PipelineError if there are no validation records.
    """
    setting = _setting(dataset, dataset.val, options, device, image_size, bands, local_ranks or world_size)
    facts = setting.transform.facts
    if not 0 <= rank < world_size:
        raise PipelineError(f"rank {rank} of {world_size} processes cannot be")
    count = min(dataset.val.records, max_samples or dataset.val.records)
    if not count:
        raise PipelineError(
            f"{dataset.name}: no validation records: pack with split.val_fraction above 0, "
            "or a split.block_m small enough that some blocks are held out"
        )
    if options.loader == "synthetic":
        setting = _with_real_loader(setting)
    share = min(batch, -(-count // world_size))

    def plans() -> Iterator[Plan]:
        return _val_plans(dataset.val.first(count), share, rank, world_size)

    return _compose(setting, share, plans, lambda plan: augment.identity(len(plan.ids), facts), share * world_size)


# ----------------------------------------------------------------------------------------------- plans


def _order(dataset: Dataset, seed: int) -> Order | MixedOrder:
    if len(dataset.shares) == 1:
        return Order(dataset.train.shard_records, seed)
    return MixedOrder(dataset.train.origin_shard_records, dataset.shares, seed)


def _train_plans(
    order: Order | MixedOrder, share: Share, position: int, label_weights: np.ndarray | None
) -> Iterator[Plan]:
    ones = np.ones(share.micro_batch, np.float32)
    while True:
        for start in share.starts(position):
            ids, epochs = order.take(start, share.micro_batch)
            yield Plan(ids, epochs, ones if label_weights is None else label_weights[ids])
        position += share.global_batch


def _val_plans(ids: np.ndarray, share: int, rank: int, world_size: int) -> Iterator[Plan]:
    for start in range(0, len(ids), share * world_size):
        positions = start + rank * share + np.arange(share)
        weights = (positions < len(ids)).astype(np.float32)
        yield Plan(ids[np.minimum(positions, len(ids) - 1)], np.zeros(share, np.int64), weights)


# ---------------------------------------------------------------------------------------------- set-up


def _setting(
    dataset: Dataset,
    split: Split,
    options: DataOptions,
    device: torch.device | str,
    image_size: int | None,
    bands: tuple[int, ...] | None,
    local_ranks: int,
) -> _Setting:
    tile_size = dataset.manifest.tile.size
    transform = Transform(tile_size, image_size or tile_size, dataset.band_facts(bands))
    threads = options.threads or max(1, available_cores() // local_ranks)
    return _Setting(dataset, split, options, transform, torch.device(device), threads)


def available_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_threads(threads: int) -> int:
    """Threads that read, beside so many that decode: data.threads, or this process's share of the cores."""
    least, most = _READ_THREADS
    return min(most, max(least, threads // 2))


def resolve_loader(name: str) -> str:
    """``auto`` to ``dali`` where it is installed, else ``torch``. Raises PipelineError if dali is asked for in vain."""
    installed = importlib.util.find_spec("nvidia.dali") is not None if _has_nvidia() else False
    if name == "dali" and not installed:
        raise PipelineError(
            "data.loader=dali, but DALI is not installed: install nvidia-dali-cuda130 (Linux), or use data.loader=torch"
        )
    if name == "auto":
        return "dali" if installed else "torch"
    return name


def _has_nvidia() -> bool:
    return importlib.util.find_spec("nvidia") is not None


def _with_real_loader(setting: _Setting) -> _Setting:
    """Validation always sees the records: a loss over random images would say nothing."""
    options = setting.options.model_copy(update={"loader": "auto"})
    return _Setting(setting.dataset, setting.split, options, setting.transform, setting.device, setting.threads)


def _synthetic(setting: _Setting, count: int, seed: int, squares: int, changes: int) -> Loader:
    batch = synthetic.random_batch(
        count=count,
        bands=len(setting.transform.facts.bands),
        image_size=setting.transform.image_size,
        classes=len(setting.dataset.manifest.classes),
        device=setting.device,
        seed=seed,
        uint8=setting.transform.is_bytes,
        squares=squares,
        changes=changes,
    )
    return Loader(synthetic.repeat(batch), [])


def _compose(
    setting: _Setting,
    count: int,
    plans: Callable[[], Iterator[Plan]],
    parameters: Callable[[Plan], augment.Parameters],
    stride: int,
    *,
    by_square: bool = False,
) -> Loader:
    """count: samples of a batch. plans: walks the order from its beginning. stride: positions from batch to batch."""
    name = resolve_loader(setting.options.loader)
    reader = Reader(
        setting.dataset,
        setting.split,
        threads=read_threads(setting.threads),
        timeout_s=setting.options.read_timeout_s,
        upcoming=(plan.ids for plan in plans()),  # a walk of its own, ahead of the one below
        ahead=max(2, _STAGE_AHEAD // stride),
        by_square=by_square,
    )

    def load() -> Iterator[Loaded]:
        for plan in plans():
            yield Loaded(plan, reader.read(plan.ids), parameters(plan))

    loaded = Stage(load(), setting.options.prefetch, "geokr-read-ahead")
    team = Team(setting.threads, "geokr-augment")
    decoded = Stage(_decoder(name, setting, count, loaded, team), setting.options.prefetch, "geokr-decode-ahead")
    batches = (item.to(setting.device) for item in decoded)
    return Loader(batches, [reader.stop, _close_stages(decoded, loaded), team.close, reader.close])


def _close_stages(*stages: Stage[Any]) -> Callable[[], None]:
    def close() -> None:
        for stage in stages:  # all of them first: one may be waiting for another
            stage.stop()
        for stage in stages:
            stage.close()

    return close


def _decoder(name: str, setting: _Setting, count: int, loaded: Iterator[Loaded], team: Team) -> Iterator[Decoded]:
    dataset = setting.dataset
    if name == "dali":
        from pipelines import dali_loader  # DALI is optional, and takes a second to import

        return dali_loader.decode_batches(
            loaded,
            team,
            setting.transform,
            dataset.tile_shape,
            dataset.manifest.tile.codec,
            setting.split.where,
            count=count,
            threads=setting.threads,
            device=setting.device,
            prefetch=setting.options.prefetch,
        )
    from pipelines import torch_loader

    return torch_loader.decode_batches(
        loaded,
        team,
        setting.transform,
        dataset.tile_shape,
        dataset.manifest.tile.codec,
        setting.split.where,
        setting.device.type == "cuda",
    )
