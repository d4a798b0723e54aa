"""Opened datasets: their manifest and where each record lies. Opening checks everything but the payloads.

A run reads one dataset or a mixture of several. Record ids count through all shards of a split, one dataset after
another, and everything after this module sees one dataset only.
"""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np

from geokr import manifests, records, tile_codecs
from geokr.manifests import Manifest
from geokr.options import DataOptions, RecordsSource
from geokr.records import RecordError
from pipelines.augment import BandFacts
from pipelines.cache import GB, Cache, Copy, Wanted, default_root, open_copy
from pipelines.errors import PipelineError
from pipelines.mixture import Picks, combine, lay_out, shares_of

# Indexes are small: what they cost is the way there and back.
_INDEX_TRANSFERS = 16


@dataclass(frozen=True, slots=True, eq=False)
class Origin:
    """Where a dataset's shards are, and the form of its records.

    shape: (H, W, bands) of its records. pick: places of the images' bands among them, None for all as they are.
    copy: of a remote dataset; its shards come to the folder when they are needed (pipelines.staging).
    labels: the further product whose fractions are wanted, None for those of the first.
    """

    folder: Path
    shape: tuple[int, int, int]
    pick: Picks = None
    copy: Copy | None = None
    labels: str | None = None

    def path(self, shard: manifests.Shard) -> Path:
        """The shard's file on this machine."""
        return self.folder / shard.name

    def label(self, shard: manifests.Shard) -> str:
        """The shard's name in messages."""
        path = self.folder / shard.name
        return str(path) if self.copy is None else f"{self.copy.store.label(shard.name)} (copy: {path})"


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """The records of one split; a record's id is its number in shard order.

    origins: one a dataset. origin_of: int64 [shards]. first_ids: int64 [shards + 1].
    offsets, sizes: int64 [records], bytes of the whole frame in its shard.
    """

    name: str
    origins: tuple[Origin, ...]
    origin_of: np.ndarray
    shards: tuple[manifests.Shard, ...]
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

    @property
    def origin_shard_records(self) -> list[tuple[int, ...]]:
        """Records of each shard, dataset by dataset."""
        sizes = np.array(self.shard_records, np.int64)
        return [tuple(sizes[self.origin_of == number].tolist()) for number in range(len(self.origins))]

    @property
    def is_remote(self) -> bool:
        """Whether any of its shards have to be fetched."""
        return any(origin.copy is not None for origin in self.origins)

    @property
    def folder(self) -> Path:
        """The folder of a split that comes from one dataset."""
        (origin,) = self.origins
        return origin.folder

    def shard_of(self, ids: np.ndarray) -> np.ndarray:
        """Shard numbers of record ids, int64."""
        return np.searchsorted(self.first_ids, ids, "right") - 1

    def origin(self, shard: int) -> Origin:
        """The dataset that a shard belongs to."""
        return self.origins[int(self.origin_of[shard])]

    def path(self, shard: int) -> Path:
        """A shard's file on this machine."""
        return self.origin(shard).path(self.shards[shard])

    def label(self, shard: int) -> str:
        """A shard's name in messages."""
        return self.origin(shard).label(self.shards[shard])

    def where(self, record_id: int) -> str:
        """A record's place, for people: shard, number in it, byte."""
        shard = int(self.shard_of(np.array([record_id]))[0])
        number = record_id - int(self.first_ids[shard])
        return f"{self.label(shard)}: record {number} at byte {int(self.offsets[record_id])}"

    def first(self, count: int) -> np.ndarray:
        """The ids of ``count`` records, int64: the first ones of each dataset, in proportion to its records."""
        ends = np.cumsum([sum(sizes) for sizes in self.origin_shard_records])
        starts = np.concatenate([[0], ends[:-1]])
        # Rounded cumulated quotas: each is within one record of its share, and they sum to the count.
        quotas = np.diff((ends * count + self.records // 2) // max(1, self.records), prepend=0)
        return np.concatenate(
            [np.arange(start, start + quota, dtype=np.int64) for start, quota in zip(starts, quotas, strict=True)]
        )


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """One dataset, or a mixture that looks like one. shares: whole numbers, samples taken from each."""

    name: str
    manifest: Manifest
    train: Split
    val: Split
    shares: tuple[int, ...] = (1,)

    @classmethod
    def open(cls, folder: str | Path, labels: str | None = None) -> Self:
        """Reads manifest and indexes of a folder that pack_records.py wrote, or of an earlier manifest in one.

        labels: as in DataOptions.

        Raises RecordError: no dataset, missing, surplus or changed files, no such labels.
        """
        named, folder = folder, manifests.folder_of(folder)
        manifest = manifests.load_manifest(named)
        _check_manifest(folder, manifest)
        manifests.check_folder(folder, manifest)
        manifest, product = manifests.labelled_by(manifest, labels, str(folder))
        origin = Origin(folder, _shape(manifest), labels=product)
        train, val = (_open_split(origin, manifest, name) for name in records.SPLITS)
        return cls(str(named), manifest, train, val)

    @classmethod
    def open_remote(cls, source: RecordsSource, cache: Cache, timeout_s: float, labels: str | None = None) -> Self:
        """Fetches manifest and indexes of a dataset behind a URL; its shards come when they are needed.

        Raises TransferError, ReadTimeoutError, PipelineError for a URL that cannot be, and RecordError.
        """
        copy = open_copy(source, cache, timeout_s)
        try:
            manifest = manifests.load_manifest(copy.folder)
            _check_manifest(copy.folder, manifest)
            _fetch_indexes(copy, manifest, timeout_s)
            manifest, product = manifests.labelled_by(manifest, labels, str(copy.folder))
            origin = Origin(copy.folder, _shape(manifest), copy=copy, labels=product)
            train, val = (_open_split(origin, manifest, name) for name in records.SPLITS)
        except RecordError as error:
            raise RecordError(f"{source.shown}: {error}") from error
        return cls(source.shown, manifest, train, val)

    @classmethod
    def mix(cls, sources: Sequence[RecordsSource], datasets: Sequence[Self], bands: Sequence[str] | None) -> Self:
        """The mixture of some datasets by the sources' weights. bands: model.bands.

        Raises PipelineError where the datasets do not agree or the weights cannot be.
        """
        of_each = [dataset.manifest for dataset in datasets]
        for n, manifest in enumerate(of_each):
            if manifest in of_each[:n]:
                one, other = sources[of_each.index(manifest)].path, sources[n].path
                raise PipelineError(
                    f"data.records: {one} and {other} are the same dataset: name it once, with a larger weight"
                )
        chosen, picks = lay_out(sources, of_each, bands)
        shares = shares_of(sources, of_each)
        train, val = (_joined(name, [getattr(dataset, name) for dataset in datasets], picks) for name in records.SPLITS)
        name = ", ".join(dataset.name for dataset in datasets)
        return cls(name, combine(of_each, chosen, picks, shares), train, val, shares)

    @property
    def tile_shape(self) -> tuple[int, int, int]:
        """(height, width, bands) of every image as it comes out of the reader."""
        return _shape(self.manifest)

    def band_facts(self, bands: tuple[int, ...] | None = None) -> BandFacts:
        """What augmentation needs; ``bands`` are indices into the images' bands, None for all of them."""
        train = self.manifest.train
        chosen = tuple(range(len(self.manifest.bands))) if bands is None else tuple(bands)
        names, light = zip(*((band.name, band.wavelength_nm) for band in self.manifest.bands), strict=True)
        return BandFacts(self.manifest.tile.dtype, chosen, train.mean, train.std, names, light)


def open_records(options: DataOptions, bands: Sequence[str] | None = None) -> Dataset:
    """The dataset or mixture that data.records names. bands: model.bands, the ones that datasets must share.

    Raises PipelineError where data.records is not set or datasets do not fit together, and as Dataset.open.
    """
    if not options.sources:
        raise PipelineError("data.records is not set: name the folder of a dataset")
    datasets = [_open(source, options) for source in options.sources]
    return datasets[0] if len(datasets) == 1 else Dataset.mix(options.sources, datasets, bands)


def _open(source: RecordsSource, options: DataOptions) -> Dataset:
    if not source.is_remote:
        return Dataset.open(source.folder, options.labels)
    limit = None if options.cache_gb is None else int(options.cache_gb * GB)
    root = default_root() if options.cache_dir is None else Path(options.cache_dir).expanduser()
    return Dataset.open_remote(source, Cache(root, limit), options.read_timeout_s, options.labels)


def _fetch_indexes(copy: Copy, manifest: Manifest, timeout_s: float) -> None:
    shards = (*manifest.train.shards, *manifest.val.shards)
    wanted = [Wanted(shard.index_name, shard.index_sha256) for shard in shards]
    stopped = threading.Event()
    with ThreadPoolExecutor(_INDEX_TRANSFERS) as pool:
        try:
            list(pool.map(lambda item: copy.fetch(item, timeout_s, stopped), wanted))
        except BaseException:
            stopped.set()  # the others would each try several times before they fail too
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _shape(manifest: Manifest) -> tuple[int, int, int]:
    return manifest.tile.size, manifest.tile.size, len(manifest.bands)


def _check_manifest(folder: Path, manifest: Manifest) -> None:
    path, tile, bands = folder / manifests.MANIFEST, manifest.tile, len(manifest.bands)
    if tile.size < 1 or not bands:
        raise RecordError(f"{path}: tiles of side {tile.size} with {bands} bands cannot be; pack again")
    if problem := tile_codecs.unfit(tile.codec, bands, tile.dtype):
        raise RecordError(f"{path}: {problem}")
    for name in records.SPLITS:
        part = manifest.split(name)
        listed = [shard.name for shard in part.shards]
        if len(set(listed)) != len(listed) or not all(shard.startswith(f"{name}-") for shard in listed):
            raise RecordError(f"{path}: {name}.shards lists a shard twice or one of another split; pack again")
        if part.records and not (len(part.mean) == len(part.std) == bands and len(part.prior) == len(manifest.classes)):
            raise RecordError(f"{path}: {name}: statistics do not fit {bands} bands and its classes; pack again")


def _open_split(origin: Origin, manifest: Manifest, name: records.Split) -> Split:
    shards = manifest.split(name).shards
    read = manifests.open_index if origin.copy is None else manifests.load_index
    spans = [read(origin.folder, shard) for shard in shards]
    every = np.concatenate(spans) if spans else np.zeros((0, 2), np.int64)
    first_ids = np.concatenate([[0], np.cumsum([len(span) for span in spans], dtype=np.int64)]).astype(np.int64)
    offsets, sizes = np.ascontiguousarray(every[:, 0]), np.ascontiguousarray(every[:, 1])
    return Split(name, (origin,), np.zeros(len(shards), np.int64), shards, first_ids, offsets, sizes)


def _joined(name: str, parts: Sequence[Split], picks: Sequence[Picks]) -> Split:
    """The splits of several datasets, one after another."""
    origins = tuple(replace(part.origins[0], pick=pick) for part, pick in zip(parts, picks, strict=True))
    counts = [len(part.shards) for part in parts]
    records_of = [shard.records for part in parts for shard in part.shards]
    return Split(
        name,
        origins,
        np.repeat(np.arange(len(parts)), counts),
        tuple(shard for part in parts for shard in part.shards),
        np.cumsum([0, *records_of]),
        np.concatenate([part.offsets for part in parts]),
        np.concatenate([part.sizes for part in parts]),
    )
