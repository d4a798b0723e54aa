"""Packed records to evaluate a backbone on: held-out blocks are the test, a fifth of the other ground is val.

Targets are the shares of classes under each tile. Tiles overlap, so val is whole cells of the Earth: were it every
fifth tile, all would have neighbours in train that show nearly the same, and settings chosen on it would not hold.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from geokr import records, tile_codecs
from geokr.evaluate_data import Data, Part
from geokr.records import SPLITS, Split
from pipelines.dataset import Dataset
from pipelines.dataset import Split as Records
from pipelines.reader import Reader

READ = 256  # records at a time, for their labels
HEAD, TAIL = 12, 4  # bytes of a frame around its payload
METRES = 111_195.0  # a degree of latitude
BLOCK_M = 20_000.0
CELLS = 20  # that are enough to draw a fifth of
FEWEST = 5  # cells that an interval is drawn from; from fewer it would be chance
TIMEOUT_S = 60.0


def open_records(path: str | Path) -> Data:
    """Raises RecordError for what is no whole dataset, ConfigError where a split is empty."""
    dataset = Dataset.open(path)
    train, test = (_part(dataset, name) for name in SPLITS)
    places = {name: _places(getattr(dataset, name)) for name in SPLITS}
    block_m = float(dataset.manifest.config.get("split", {}).get("block_m", BLOCK_M))
    held = held_out(places["train"], block_m)
    groups = _some_cells(places["val"], block_m)
    test = replace(test, groups=groups if len(np.unique(groups)) >= FEWEST else None)
    parts = {"train": train.some(np.flatnonzero(~held)), "val": train.some(np.flatnonzero(held)), "test": test}
    classes = tuple(entry.name for entry in dataset.manifest.classes)
    names = tuple(band.name for band in dataset.manifest.bands)
    return Data(str(path), classes, True, dataset.manifest.tile.dtype, dataset.tile_shape[2], parts, names)


def _places(split: Records) -> np.ndarray:
    """Longitude and latitude of records, degrees [N, 2]."""
    found = np.zeros((split.records, 2))
    for number in range(len(split.shards)):
        data = split.path(number).read_bytes()
        for n in range(int(split.first_ids[number]), int(split.first_ids[number + 1])):
            first, last = int(split.offsets[n]), int(split.offsets[n] + split.sizes[n])
            found[n] = records.decode_record(data[first + HEAD : last - TAIL], split.where(n)).lonlat
    return found


def held_out(places_N2: np.ndarray, block_m: float) -> np.ndarray:
    """Which tiles are val, bool [N]: those of some cells, a fifth of the tiles or a little more. Where each cell holds
    more than three tenths of them, every fifth tile."""
    count, number = len(places_N2), _some_cells(places_N2, block_m)
    sizes, held = np.bincount(number), []
    for cell in np.random.default_rng(0).permutation(len(sizes)).tolist():
        taken = sizes[held].sum()
        if taken < 0.2 * count and taken + sizes[cell] <= 0.3 * count:
            held.append(cell)
    return np.isin(number, held) if held else np.arange(count) % 5 == 0


def _some_cells(places_N2: np.ndarray, block_m: float) -> np.ndarray:
    """Cells of this side, halved three times at most where there are few of them; int64 [N]."""
    if not len(places_N2):
        return np.zeros(0, np.int64)
    sides = [block_m / 2**halvings for halvings in range(4)]
    found = (cells(places_N2, side) for side in sides)
    return next((number for number in found if number.max() + 1 >= CELLS), cells(places_N2, sides[-1]))


def cells(places_N2: np.ndarray, side_m: float) -> np.ndarray:
    """The number of the cell of that side, of a grid over the Earth, in which each place lies; int64 [N], from 0."""
    rows = np.floor(places_N2[:, 1] * METRES / side_m)
    width_m = METRES * np.cos(np.radians(np.minimum(np.abs(rows * side_m / METRES), 89.0)))  # of a degree
    columns = np.floor(places_N2[:, 0] * width_m / side_m)
    return np.unique(np.stack([rows, columns], 1), axis=0, return_inverse=True)[1].ravel()


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
