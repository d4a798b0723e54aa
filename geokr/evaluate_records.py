"""Packed records to evaluate a backbone on: held-out blocks are the test, a fifth of the other tiles is val.

Targets are the shares of classes under each tile.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from geokr import tile_codecs
from geokr.evaluate_data import Data, Part
from geokr.records import SPLITS, Split
from pipelines.dataset import Dataset
from pipelines.reader import Reader

READ = 256  # records at a time, for their labels
TIMEOUT_S = 60.0


def open_records(path: str | Path) -> Data:
    """Raises RecordError for what is no whole dataset, ConfigError where a split is empty."""
    dataset = Dataset.open(path)
    train, test = (_part(dataset, name) for name in SPLITS)
    ids = np.arange(len(train))
    parts = {"train": train.some(ids[ids % 5 != 0]), "val": train.some(ids[ids % 5 == 0]), "test": test}
    classes = tuple(entry.name for entry in dataset.manifest.classes)
    return Data(str(path), classes, True, dataset.manifest.tile.dtype, dataset.tile_shape[2], parts)


def _part(dataset: Dataset, name: Split) -> Part:
    """All records of a split; their labels are read at once, images when they are asked for."""
    split, tile, shape = getattr(dataset, name), dataset.manifest.tile, dataset.tile_shape
    reader = Reader(dataset, split, threads=1, timeout_s=TIMEOUT_S)

    def read(numbers: Sequence[int]) -> list[np.ndarray]:
        samples = reader.read(np.array(numbers, np.int64))
        images = [tile_codecs.decode(data, tile.codec, shape, tile.dtype).copy() for data in samples.images]
        samples.release()
        return images

    targets = np.zeros((split.records, len(dataset.manifest.classes)))
    for first in range(0, split.records, READ):
        samples = reader.read(np.arange(first, min(first + READ, split.records)))
        targets[first : first + READ] = samples.fractions
        samples.release()
    targets /= np.maximum(targets.sum(1, keepdims=True), 1e-12)
    return Part([split.where(n) for n in range(split.records)], targets, read)
