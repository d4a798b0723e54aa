"""Weights of the training records' labels: how much each counts in the supervision loss.

A file holds them for the records and the labels of one dataset (docs/format.md): what preprocess/weigh_records.py
writes, or a bare array as ``.npy``.
"""

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from geokr.manifests import Manifest, Shard, shard_digests
from geokr.options import RecordsSource
from pipelines.errors import PipelineError

if TYPE_CHECKING:
    from pipelines.dataset import Split

# What NumPy raises for a file that is none of its own, cut short or damaged.
_NO_ARRAYS = (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


def read_label_weights(sources: Sequence[RecordsSource], train: "Split") -> np.ndarray | None:
    """float32 [records] of all datasets of a run, their mean 1 in each; None where no source names a file.

    Raises PipelineError that names the file: it cannot be read, is of other records or labels, or holds what cannot be.
    """
    if all(source.label_weights is None for source in sources):
        return None
    parts = []
    for number, source in enumerate(sources):
        shards = [shard for shard, of in zip(train.shards, train.origin_of.tolist(), strict=True) if of == number]
        if source.label_weights is None:
            parts.append(np.ones(sum(shard.records for shard in shards), np.float32))
        else:
            parts.append(_weights(source, source.label_weights, shards, train.origins[number].labels))
    return np.concatenate(parts)


def check_label_weights(source: RecordsSource, manifest: Manifest, labels: str | None) -> None:
    """Whether a source's file, if it names one, fits the dataset. labels: data.labels. Raises as reading does."""
    if source.label_weights is not None:
        further = None if labels == manifest.product else labels
        _weights(source, source.label_weights, manifest.train.shards, further)


def _weights(source: RecordsSource, file: str, shards: Sequence[Shard], labels: str | None) -> np.ndarray:
    """labels: the further product that the run trains on, None for the first."""
    found = _read(Path(file))
    if "shards" in found and found["shards"].tolist() != [" ".join(item) for item in shard_digests(shards).items()]:
        raise PipelineError(
            f"{file}: was made for other records than {source.shown} holds now: make it again with "
            "preprocess/weigh_records.py; a run that began before scenes were added goes on with "
            "data.records=FOLDER/manifest-v1.json (or a later one of those)"
        )
    if "labels" in found and (made_for := str(found["labels"])) != (labels or ""):
        first = "the product that was packed first"
        raise PipelineError(
            f"{file}: was made for the labels of {made_for or first}, the run trains on those of {labels or first}: "
            "give data.labels, or weigh_records.py --labels, so that they are the same"
        )
    values, count = found["weights"], sum(shard.records for shard in shards)
    if values.shape != (count,):
        raise PipelineError(
            f"{file}: holds {' x '.join(map(str, values.shape))} numbers, {source.shown} has {count} training records"
        )
    if values.dtype.kind not in "iufb" or not np.isfinite(values).all() or (values < 0).any():
        raise PipelineError(f"{file}: weights must be finite numbers of 0 or more")
    mean = values.mean(dtype=np.float64) if count else 1.0
    if mean <= 0:
        raise PipelineError(f"{file}: all weights are 0: nothing would be learned from {source.shown}")
    return (values / mean).astype(np.float32)


def _read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file, ``weights`` among them."""
    try:
        found = np.load(path, allow_pickle=False)
        if isinstance(found, np.ndarray):
            return {"weights": found}
        with found:
            return {name: found[name] for name in ("weights", "shards", "labels") if name in found or name == "weights"}
    except FileNotFoundError as error:
        raise PipelineError(f"{path}: there is no such file (label_weights)") from error
    except _NO_ARRAYS as error:
        raise PipelineError(
            f"{path}: holds no weights of labels ({error}): expected what preprocess/weigh_records.py writes, or one "
            "number a training record as .npy"
        ) from error
