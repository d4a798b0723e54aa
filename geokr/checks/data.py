"""The records a run reads and the checkpoints it has: a sample of the first, all of the second."""

import os
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from geokr import manifests, records
from geokr.checks.finding import Finding, TrialError, failure, ok, trial, warning
from geokr.manifests import Manifest, Shard
from geokr.records import RecordError

SAMPLE = 256  # records; damage that touches a share p of them is missed with probability (1 - p)^256
_SEED = 0

_CHECKPOINTS = """
import json, pathlib, sys
from geokr import checkpoint
found = []
for path in checkpoint.list_checkpoints(pathlib.Path(sys.argv[1])):
    try:
        found.append([path.name, checkpoint.load(path).step, ""])
    except checkpoint.CheckpointError as error:
        found.append([path.name, 0, str(error)])
print(json.dumps({"checkpoints": found}))
"""


def _crc32c() -> Callable[[bytes], int] | None:
    if find_spec("google_crc32c") is None:
        return None
    import google_crc32c

    return google_crc32c.value


def _read(path: Path, spans: np.ndarray) -> list[bytes]:
    """The frames at these spans, not from memory where the system can be told so."""
    frames = []
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        for offset, size in spans.tolist():
            file.seek(offset)
            frames.append(file.read(size))
    return frames


def _check_frames(path: Path, spans: np.ndarray, frames: Sequence[bytes], crc32c: Callable[[bytes], int]) -> None:
    for (offset, _), data in zip(spans.tolist(), frames, strict=True):
        where = f"{path}: record at byte {offset}"
        records.decode_record(records.unframe(data, crc32c, where), where)


def sample_shards(
    folder: Path, shards: Sequence[Shard], count: int, crc32c: Callable[[bytes], int] | None
) -> tuple[int, int, float]:
    """Reads about ``count`` records spread over all shards: (records, bytes, seconds of reading alone).

    Every index is opened, so shards that are missing or cut short are found whatever the sample.
    Raises RecordError.
    """
    rng = np.random.default_rng(_SEED)
    number, size, seconds = 0, 0, 0.0
    for shard in shards:
        spans = manifests.open_index(folder, shard)
        share = min(len(spans), max(1, round(count / len(shards))))
        chosen = spans[np.sort(rng.choice(len(spans), share, replace=False))]
        begin = time.perf_counter()
        frames = _read(folder / shard.name, chosen)
        seconds += time.perf_counter() - begin
        if crc32c is not None:
            _check_frames(folder / shard.name, chosen, frames, crc32c)
        number, size = number + share, size + sum(map(len, frames))
    return number, size, seconds


def check_records(folder: Path, shown: str | None = None) -> Finding:
    """A dataset on this machine. shown: what to call it."""
    name = f"records {shown or folder}"
    try:
        manifest = manifests.load_manifest(folder)
        manifests.check_folder(folder, manifest)
        shards = [shard for split in records.SPLITS for shard in manifest.split(split).shards]
        crc32c = _crc32c()
        number, size, seconds = sample_shards(manifests.folder_of(folder), shards, SAMPLE, crc32c)
    except (RecordError, OSError) as error:
        return failure(
            name, str(error), "Training stops where it meets this.", f"python preprocess/verify_records.py {folder}"
        )
    return _sound(name, manifest, number, size, seconds, crc32c is not None)


def _sound(name: str, manifest: Manifest, number: int, size: int, seconds: float, checked: bool) -> Finding:
    seconds = max(seconds, 1e-9)  # of a dataset without a shard
    found = (
        f"{manifest.train.records} + {manifest.val.records} tiles of {manifest.tile.size} px, {number} read"
        f"{', checksums right' if checked else ''}, {number / seconds:,.0f} records/s, {size / seconds / 1e6:,.0f} MB/s"
        " by one thread"
    )
    if not checked:
        return warning(name, found, "Checksums were not looked at.", "pip install google-crc32c")
    if manifest.train.records == 0:
        return failure(name, found, "There is nothing to train on.", "Pack more scenes.")
    return ok(name, found)


def check_run(folder: Path) -> Finding:
    """The checkpoints of a run, every byte of them."""
    name, path = f"run {folder}", folder / "checkpoints"
    if not path.is_dir():
        return ok(name, "no checkpoint yet")
    try:
        found = trial(_CHECKPOINTS, 600, str(path.absolute()))["checkpoints"]
    except TrialError as error:
        return warning(name, str(error), "Its checkpoints were not looked at.", "Install geokr's train packages.")
    sound = [(where, step) for where, step, fault in found if not fault]
    faults = [fault for _, _, fault in found if fault]
    if faults and not sound:
        return failure(
            name, faults[0], "No checkpoint is sound: the run cannot go on.", "Restore one, or give another run.dir."
        )
    if faults:
        means = f"The run would go on from step {sound[0][1]}, the newest sound one."
        return warning(name, faults[0], means, "See to the disk; the damaged folder may be removed.")
    return ok(name, f"{len(sound)} sound, the newest of step {sound[0][1]}" if sound else "no checkpoint yet")
