"""The output folder and its ``.work``: who may write there, whether it is this very dataset, what is left to do."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from geokr import manifests, records
from geokr.config import differences
from geokr.manifests import Manifest
from preprocess import grid, shards, tile_facts
from preprocess.inputs import PlanError, held_ids
from preprocess.plan import Plan, identity_json

WORK = manifests.WORK
LOCK = "lock"
EXTRAS = ("tiles.parquet", "report.html")  # made from a finished dataset, and made again where they are missing


class PackError(RuntimeError):
    """Packing that cannot go on; the message says what to do."""


class FutileError(PackError):
    """What the same command would meet again, so that another one must be free to begin in the same folder."""


def check_writable(out: Path) -> None:
    """Raises PackError if ``out`` is not a folder, or cannot be made or written, before any work is done."""
    there = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists() or path.is_symlink())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        what = "is not a folder" if not there.is_dir() else "is not writable"
        raise PackError(f"--out {out}: {there} {what}; choose another folder")


def check_ours(out: Path) -> None:
    """Raises PlanError for a folder that holds anything but a dataset and its ``.work``."""
    names = sorted(path.name for path in out.iterdir()) if out.exists() else []
    if foreign := [name for name in names if name != WORK and not _ours(name)]:
        raise PlanError(f"--out {out}: is not empty ({', '.join(foreign[:5])}); choose a new folder")


def finished(plan: Plan, out: Path) -> Manifest | None:
    """The manifest of a folder that holds this very dataset, whole as far as sizes and indexes tell."""
    if not (out / manifests.MANIFEST).exists():
        return None
    manifest = manifests.load_manifest(out)
    new = plan.identity()
    damaged = {scene_id: scene.fingerprint for scene_id, scene in manifest.damaged.items()}
    for scene_id in held_ids(new["scenes"], damaged):  # it opened then, as it does now, and is known to be left out
        del new["scenes"][scene_id]
    have = {scene.scene_id: scene.fingerprint for scene in manifest.scenes}
    held = held_ids(new["scenes"], have)
    new["scenes"] = {held.get(scene_id, scene_id): fingerprint for scene_id, fingerprint in new["scenes"].items()}
    old = {
        **new,
        "config": manifest.config,
        "scenes": have,
        "land_cover": {str(i): value for i, value in enumerate(manifest.land_cover_fingerprints)},
        "also": {
            name: {str(i): value for i, value in enumerate(info.land_cover_fingerprints)}
            for name, info in manifest.products.items()
        },
    }
    if manifest.version > 1:  # of several runs, in their order
        old["land_cover"], new["land_cover"] = (sorted(tree["land_cover"].values()) for tree in (old, new))
        old["also"], new["also"] = (
            {name: sorted(prints.values()) for name, prints in tree["also"].items()} for tree in (old, new)
        )
    grown = set(old["scenes"].items()) < set(new["scenes"].items())
    remedy = "choose another --out" + ("; --append adds the new scenes to it" if grown else "")
    same_or_error(old, new, out, "a dataset made", remedy)
    check_whole(out, manifest)
    return manifest


def check_whole(out: Path, manifest: Manifest) -> None:
    """Raises RecordError unless all files are there, as far as sizes and indexes tell, and none too many."""
    manifests.check_folder(out, manifest)
    for name in records.SPLITS:
        for shard in manifest.split(name).shards:
            manifests.open_index(out, shard)


def same_or_error(old: dict[str, Any], new: dict[str, Any], out: Path, what: str, remedy: str) -> None:
    lines = differences(json.loads(json.dumps(old)), json.loads(json.dumps(new)))
    if lines:
        raise PlanError(
            f"{out}: holds {what} from other inputs or another configuration (there -> here):\n"
            + "\n".join(f"  {line}" for line in lines[:20])
            + f"\n{remedy}"
        )


def open_work(plan: Plan, out: Path, base: Manifest | None) -> Path:
    """The run's own folder in .work, made or found. base: the dataset that the run adds to.

    Raises PlanError if the folder holds shards of no dataset, or an unfinished run of other inputs.
    """
    work = out / WORK
    identity, path = _identity(plan, base), work / "plan.json"
    if path.exists():
        old = json.loads(path.read_bytes())
        kind = "an unfinished --append" if "appends_to" in old else "an unfinished run"
        remedy = "choose another --out, or remove that folder"
        if base is not None:  # the folder holds a dataset, which is not to be lost
            remedy = f"give that command again, or give it up: remove {work} and the shards that no manifest lists"
        same_or_error(old, identity, out, kind, remedy)
    else:
        if base is None and (shards_there := sorted(out.glob("*.tfrecord"))):
            raise PlanError(
                f"--out {out}: holds {shards_there[0].name} but no manifest; remove it or choose a new folder"
            )
        if base is not None:  # before any new shard: readers then know what it is
            shards.write_whole(out / manifests.GROWING, json.dumps({"version": base.version + 1}).encode())
        shards.write_whole(path, identity_json(identity))
    # how scenes are cut depends on all that the command names, also those that a growing dataset has already: under
    # another command the same task number may be another window
    cuts = [[task.scene.scene_id, [chunk.tiles for chunk in task.chunks]] for task in plan.tasks]
    cut = identity_json({**identity, "chunks": grid.LAYOUT, "facts": tile_facts.LAYOUT, "cuts": cuts})
    run = work / f"run-{hashlib.sha256(cut).hexdigest()[:16]}"
    for other in work.glob("run-*"):  # given up: what it holds is of other windows
        if other != run:
            shutil.rmtree(other, ignore_errors=True)
    for folder in (run, run / "spill", run / "shards"):
        folder.mkdir(exist_ok=True)
        for left in folder.glob(".*.tmp"):  # of a process that was killed
            left.unlink(missing_ok=True)
    return run


def _identity(plan: Plan, base: Manifest | None) -> dict[str, Any]:
    if base is None:
        return plan.identity()
    return {**plan.identity(), "appends_to": hashlib.sha256(manifests.dump_manifest(base)).hexdigest()}


def folder_of_last_run(work: Path) -> Path:
    """The folder that a run which ended before clearing up has left, or .work itself."""
    return next(iter(sorted(work.glob("run-*"))), work)


def give_up(out: Path, base: Manifest | None) -> None:
    """After an error that the same command would meet again: other commands may begin in the folder.

    What was scanned for a new dataset stays, for it is known by all that it was made from. A dataset that was to grow
    is left as it was. Where an earlier run was cut short among its shards, these need what says whose they are.
    """
    work = out / WORK
    listed = {shard.name for name in records.SPLITS for shard in base.split(name).shards} if base else set()
    if any(path.name not in listed for path in out.glob("*.tfrecord")):
        return
    if base is None:
        (work / "plan.json").unlink(missing_ok=True)
    else:
        clear(work)
        remove(work)


def growing_to(work: Path) -> int:
    """The version that an unfinished --append makes; 0 if there is none."""
    commit = read_commit(work.parent / manifests.GROWING)
    return commit["version"] if commit else 0


def has_leavings(work: Path) -> bool:
    """Whether .work holds anything but its lock."""
    return any(path.name != LOCK for path in work.iterdir())


def clear(work: Path, keep_lock: bool = False) -> None:
    """Empties .work while its lock is held, of which the file goes last. A worker that still writes a file that nobody
    needs any more, or a network file system that keeps a deleted one for a moment, is no reason to fail."""
    for attempt in range(5):
        for path in work.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != LOCK:
                path.unlink(missing_ok=True)
        if {path.name for path in work.iterdir()} <= {LOCK}:
            break
        time.sleep(0.2 * attempt)
    if not keep_lock:
        (work / LOCK).unlink(missing_ok=True)


def remove(work: Path) -> None:
    """Removes an empty .work; after the lock was given up, for a network file system keeps open files."""
    with contextlib.suppress(OSError):
        work.rmdir()


def _ours(name: str) -> bool:
    kept = name == manifests.MANIFEST or manifests.EARLIER_MANIFEST.fullmatch(name)
    return bool(kept) or name.endswith((".tfrecord", ".idx", ".log")) or name in EXTRAS


@contextlib.contextmanager
def lock(work: Path) -> Iterator[None]:
    """Only one process packs into a folder. The system drops the lock of a process that dies."""
    path = work / LOCK
    while True:
        try:
            work.mkdir(parents=True, exist_ok=True)
            file = open(path, "w")  # noqa: SIM115 - closed below
        except OSError as error:
            raise PackError(f"--out {work.parent}: cannot be written ({error.strerror})") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise PackError(f"{work.parent}: another process is packing into it; wait for it or stop it") from error
            except OSError as error:
                raise PackError(
                    f"{work.parent}: its file system does not lock files ({error.strerror}): mount it with locks "
                    "(Lustre: -o flock, NFS: without nolock), or choose another folder"
                ) from error
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
