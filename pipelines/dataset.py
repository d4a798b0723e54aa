"""An opened dataset: its manifest and where each record lies. Opening checks everything but the payloads."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from geokr import records
from geokr.records import RecordError
from pipelines.augment import BandFacts


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """The records of one split; a record's id is its number in shard order.

    first_ids: int64 [shards + 1]. offsets, sizes: int64 [records], bytes of the whole frame in its shard.
    """

    name: str
    folder: Path
    shards: tuple[records.Shard, ...]
    first_ids: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray

    @property
    def records(self) -> int:
        return len(self.sizes)

    @property
    def shard_records(self) -> tuple[int, ...]:
        """Records of each shard."""
        return tuple(shard.records for shard in self.shards)

    def shard_of(self, ids: np.ndarray) -> np.ndarray:
        """Shard numbers of record ids, int64."""
        return np.searchsorted(self.first_ids, ids, "right") - 1

    def where(self, record_id: int) -> str:
        """A record's place, for people: shard, number in it, byte."""
        shard = int(self.shard_of(np.array([record_id]))[0])
        number = record_id - int(self.first_ids[shard])
        return f"{self.folder / self.shards[shard].name}: record {number} at byte {int(self.offsets[record_id])}"


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """A folder that pack_records.py wrote."""

    folder: Path
    manifest: records.Manifest
    train: Split
    val: Split

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Reads manifest and indexes. Raises RecordError: no dataset, missing, surplus or changed files."""
        folder = Path(folder)
        manifest = records.load_manifest(folder)
        _check_manifest(folder, manifest)
        records.check_folder(folder, manifest)
        return cls(folder, manifest, _open_split(folder, manifest, "train"), _open_split(folder, manifest, "val"))

    @property
    def tile_shape(self) -> tuple[int, int, int]:
        """(height, width, bands) of every record's image."""
        return self.manifest.tile.size, self.manifest.tile.size, len(self.manifest.bands)

    def band_facts(self, bands: tuple[int, ...] | None = None) -> BandFacts:
        """What augmentation needs; ``bands`` are indices into the record's bands, None for all of them."""
        train = self.manifest.train
        chosen = tuple(range(len(self.manifest.bands))) if bands is None else tuple(bands)
        return BandFacts(self.manifest.tile.dtype, chosen, train.mean, train.std)


def _check_manifest(folder: Path, manifest: records.Manifest) -> None:
    path, tile, bands = folder / records.MANIFEST, manifest.tile, len(manifest.bands)
    if tile.size < 1 or not bands:
        raise RecordError(f"{path}: tiles of side {tile.size} with {bands} bands cannot be; pack again")
    if tile.codec == "jpeg" and (bands != 3 or tile.dtype != "uint8"):
        raise RecordError(f"{path}: jpeg holds three bands of uint8, not {bands} of {tile.dtype}; pack with codec raw")
    for name in records.SPLITS:
        part = manifest.split(name)
        listed = [shard.name for shard in part.shards]
        if len(set(listed)) != len(listed) or not all(shard.startswith(f"{name}-") for shard in listed):
            raise RecordError(f"{path}: {name}.shards lists a shard twice or one of another split; pack again")
        if part.records and not (len(part.mean) == len(part.std) == bands and len(part.prior) == len(manifest.classes)):
            raise RecordError(f"{path}: {name}: statistics do not fit {bands} bands and its classes; pack again")


def _open_split(folder: Path, manifest: records.Manifest, name: records.Split) -> Split:
    shards = manifest.split(name).shards
    spans = [records.open_index(folder, shard) for shard in shards]
    every = np.concatenate(spans) if spans else np.zeros((0, 2), np.int64)
    first_ids = np.concatenate([[0], np.cumsum([len(span) for span in spans], dtype=np.int64)]).astype(np.int64)
    return Split(name, folder, shards, first_ids, np.ascontiguousarray(every[:, 0]), np.ascontiguousarray(every[:, 1]))
