"""Weights of the training records' labels: how much each counts in the supervision loss.

A file holds them for one dataset: NumPy's ``.npz`` with ``weights`` [records], in the order of the training records,
and ``shards``, which say whose they are (preprocess/weigh_records.py), or a bare array as ``.npy``.
"""

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from geokr.manifests import shard_marks
from geokr.options import RecordsSource
from pipelines.dataset import Split
from pipelines.errors import PipelineError


def read_label_weights(sources: Sequence[RecordsSource], train: Split) -> np.ndarray | None:
    """float32 [records] of all datasets of a run, their mean 1 in each; None where no source names a file.

    Raises PipelineError that names the file: it cannot be read, is of another dataset, or holds what cannot be.
    """
    if all(source.label_weights is None for source in sources):
        return None
    parts = []
    for number, source in enumerate(sources):
        shards = [shard for shard, of in zip(train.shards, train.origin_of.tolist(), strict=True) if of == number]
        count = sum(shard.records for shard in shards)
        if source.label_weights is None:
            parts.append(np.ones(count, np.float32))
            continue
        values, marks = _read(Path(source.label_weights))
        if marks is not None and marks != shard_marks(shards):
            raise PipelineError(
                f"{source.label_weights}: was made for other records than {source.shown} holds now: make it again with "
                "preprocess/weigh_records.py"
            )
        parts.append(_checked(values, count, source))
    return np.concatenate(parts)


def _read(path: Path) -> tuple[np.ndarray, list[str] | None]:
    """The numbers as they are, and the marks of their shards where there are any."""
    try:
        found = np.load(path, allow_pickle=False)
        if isinstance(found, np.ndarray):
            return found, None
        with found:
            return found["weights"], found["shards"].tolist() if "shards" in found else None
    except FileNotFoundError as error:
        raise PipelineError(f"{path}: there is no such file (label_weights)") from error
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise PipelineError(
            f"{path}: holds no weights of labels ({error}): expected what preprocess/weigh_records.py writes, or one "
            "number a training record as .npy"
        ) from error


def _checked(values: np.ndarray, count: int, source: RecordsSource) -> np.ndarray:
    where = source.label_weights
    if values.shape != (count,):
        raise PipelineError(
            f"{where}: holds {' x '.join(map(str, values.shape))} numbers, {source.shown} has {count} training records"
        )
    if values.dtype.kind not in "iufb" or not np.isfinite(values).all() or (values < 0).any():
        raise PipelineError(f"{where}: weights must be finite numbers of 0 or more")
    mean = values.mean(dtype=np.float64) if count else 1.0
    if mean <= 0:
        raise PipelineError(f"{where}: all weights are 0: nothing would be learned from {source.shown}")
    return (values / mean).astype(np.float32)
