"""The output folder and its ``.work``: who may write there, whether it is this very dataset, what is left to do."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from geokr import records
from geokr.config import differences
from geokr.records import Manifest
from preprocess import shards
from preprocess.inputs import PlanError
from preprocess.plan import Plan, identity_json

WORK = ".work"
EXTRAS = ("tiles.parquet", "report.html")  # made from a finished dataset, and made again where they are missing


class PackError(RuntimeError):
    """Packing that cannot go on; the message says what to do."""


def check_writable(out: Path) -> None:
    """Raises PackError if ``out`` is not a folder, or cannot be made or written, before any work is done."""
    there = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists() or path.is_symlink())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        what = "is not a folder" if not there.is_dir() else "is not writable"
        raise PackError(f"--out {out}: {there} {what}; choose another folder")


def finished(plan: Plan, out: Path) -> Manifest | None:
    """The manifest of a folder that holds this very dataset, whole as far as sizes and indexes tell."""
    if not (out / records.MANIFEST).exists():
        return None
    manifest = records.load_manifest(out)
    new = plan.identity()
    old = {
        **new,
        "config": manifest.config,
        "scenes": {scene.scene_id: scene.fingerprint for scene in manifest.scenes},
        "land_cover": {str(i): value for i, value in enumerate(manifest.land_cover_fingerprints)},
    }
    same_or_error(old, new, out, "a dataset made")
    records.check_folder(out, manifest)
    for name in records.SPLITS:
        for shard in manifest.split(name).shards:
            records.open_index(out, shard)
    return manifest


def same_or_error(old: dict[str, Any], new: dict[str, Any], out: Path, what: str) -> None:
    lines = differences(json.loads(json.dumps(old)), json.loads(json.dumps(new)))
    if lines:
        raise PlanError(
            f"{out}: holds {what} from other inputs or another configuration (there -> here):\n"
            + "\n".join(f"  {line}" for line in lines[:20])
            + "\nchoose another --out, or remove that folder"
        )


def open_work(plan: Plan, out: Path, work: Path) -> None:
    foreign = [path.name for path in out.iterdir() if path.name != WORK and not _ours(path.name)]
    if foreign:
        raise PlanError(f"--out {out}: is not empty ({', '.join(sorted(foreign)[:5])}); choose a new folder")
    identity = work / "plan.json"
    if identity.exists():
        same_or_error(json.loads(identity.read_bytes()), plan.identity(), out, "an unfinished run")
    elif shards_there := sorted(out.glob("*.tfrecord")):
        raise PlanError(f"--out {out}: holds {shards_there[0].name} but no manifest; remove it or choose a new folder")
    else:
        shards.write_whole(identity, identity_json(plan))
    for folder in (work / "spill", work / "shards"):
        folder.mkdir(exist_ok=True)
        for left in folder.glob(".*.tmp"):  # of a process that was killed
            left.unlink(missing_ok=True)


def _ours(name: str) -> bool:
    return name.endswith((".tfrecord", ".idx", ".log")) or name in EXTRAS


@contextlib.contextmanager
def lock(work: Path) -> Iterator[None]:
    """Only one process packs into a folder. The system drops the lock of a process that dies."""
    path = work / "lock"
    while True:
        try:
            work.mkdir(parents=True, exist_ok=True)
            file = open(path, "w")  # noqa: SIM115 - closed below
        except OSError as error:
            raise PackError(f"--out {work.parent}: cannot be written ({error.strerror})") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise PackError(f"{work.parent}: another process is packing into it; wait for it or stop it") from error
            # whoever held it may have finished and removed the folder between the opening and the lock
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                yield
                return


def read_commit(path: Path) -> dict[str, Any] | None:
    """A commit's content, or None if the work behind it is still to be done."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
