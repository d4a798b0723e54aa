"""DALI on its own, beside geokr's use of it: the decoder on bytes in memory, and DALI's own reader of the shards with
nothing, decoding, or decoding and augmentation behind it."""

from collections.abc import Callable
from itertools import cycle
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, tfrecord, types
from nvidia.dali.pipeline import pipeline_def

from benchmarks.bench_cases import Setting
from pipelines import dali

BATCH = 128


def decoder(setting: Setting, batches: list[list[np.ndarray]]) -> Callable[[], int]:
    """DALI's decoder fed through external_source."""
    source = cycle(batches)
    pipeline = dali.build(
        lambda: (next(source),),
        count=len(batches[0]),
        shape=setting.dataset.train.origins[0].shape,
        codec="jpeg",
        transform=None,
        threads=setting.threads,
        device_id=_device_id(setting.device),
        depth=2,
    )
    return _runs(pipeline, len(batches[0]), setting)


def own_reader(setting: Setting, *, decode: bool, augment: bool = False) -> Callable[[], int]:
    """DALI's own reader of the same shards, shuffled its own way: it checks no checksum and gives no position."""
    pipeline = _tfrecord_graph(
        setting,
        decode,
        augment,
        batch_size=BATCH,
        num_threads=setting.threads,
        device_id=_device_id(setting.device),
        prefetch_queue_depth=2,
        seed=0,
    )
    pipeline.build()
    return _runs(pipeline, BATCH, setting)


@pipeline_def(enable_conditionals=True)
def _tfrecord_graph(setting: Setting, decode: bool, augment: bool) -> Any:
    split = setting.dataset.train
    features: Any = fn.readers.tfrecord(
        path=[str(split.folder / shard.name) for shard in split.shards],
        index_path=[str(split.folder / shard.index_name) for shard in split.shards],
        features={"image": tfrecord.FixedLenFeature([], tfrecord.string, "")},
        random_shuffle=True,
        initial_fill=256,
    )
    images = features["image"]
    if decode:
        backend = "cpu" if setting.device.type == "cpu" else "mixed"
        images = fn.decoders.image(images, device=backend, output_type=types.DALIImageType.RGB)
    return _augmented(images, setting) if augment else images


def _augmented(images: Any, setting: Setting) -> Any:
    """The augmentation that geokr does, in DALI's own operators as its users write it."""
    options = setting.options.augment
    images = fn.flip(images, horizontal=fn.random.coin_flip(), vertical=fn.random.coin_flip())
    transposed: Any = fn.random.coin_flip(dtype=types.DALIDataType.BOOL)
    if transposed:
        images = fn.transpose(images, perm=[1, 0, 2], transpose_layout=False)
    coloured: Any = fn.random.coin_flip(probability=options.colour_probability, dtype=types.DALIDataType.BOOL)
    if coloured:
        images = fn.color_twist(
            images,
            brightness=fn.random.uniform(range=options.brightness),
            contrast=fn.random.uniform(range=options.contrast),
            saturation=fn.random.uniform(range=options.saturation),
            hue=fn.random.uniform(range=tuple(360 * share for share in options.hue)),  # in degrees
        )
    return images


def _runs(pipeline: Any, batch: int, setting: Setting) -> Callable[[], int]:
    runs = max(1, setting.images // batch)

    def run() -> int:
        for _ in range(runs):
            pipeline.run()
        return runs * batch

    return run


def _device_id(device: torch.device) -> int | None:
    return None if device.type == "cpu" else device.index or 0
