"""Packing: from a plan to a dataset folder, in two phases that can be cut short anywhere and run again.

Phase 1 scans chunks and spills their kept tiles (preprocess.scan). Phase 2 gathers every shard's tiles from the
spill files in the global hash order. Every file appears whole under its final name or not at all; the manifest
comes last, and with it the folder becomes a dataset. Until then everything but finished shards lives in ``.work``.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from geokr import records
from geokr.config import differences
from geokr.records import ClassInfo, Manifest, SceneInfo, Shard, Split, SplitInfo, Tile
from preprocess import blocks, engine, scan, shards
from preprocess.plan import Plan, PlanError, SceneTask, identity_json
from preprocess.raster import RasterError

WORK = ".work"
Progress = Callable[[str, int, int], None]  # (phase, done, of)


class PackError(RuntimeError):
    """Packing that cannot go on; the message says what to do."""


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """What a run did. written: False where the folder already held this very dataset."""

    manifest: Manifest
    written: bool
    seconds: float


def pack(plan: Plan, out: Path, progress: Progress) -> Packed:
    """Makes the dataset ``out`` holds after it, or finds it made.

    Raises PlanError if ``out`` holds another dataset or an unfinished run of another configuration, PackError if
    another process is packing there or not one tile is left, and whatever scanning raises.
    """
    start = time.monotonic()
    workers = engine.default_workers() if plan.options.workers is None else plan.options.workers
    manifest, work = _finished(plan, out), out / WORK
    if manifest is not None and not work.exists():
        return Packed(manifest, written=False, seconds=time.monotonic() - start)
    check_writable(out)
    with _lock(work):
        # another process may have come first, or one died between the manifest and clearing up
        manifest = _finished(plan, out)
        written = manifest is None
        if manifest is None:
            _open_work(plan, out, work)
            manifest = _make(plan, out, work, workers, progress)
        shutil.rmtree(work)
    return Packed(manifest, written, seconds=time.monotonic() - start)


def _make(plan: Plan, out: Path, work: Path, workers: int, progress: Progress) -> Manifest:
    damaged = _Damaged(plan)
    limits = _phase_limits(plan, work, damaged, workers, progress)
    commits = _phase_scan(plan, work, limits, damaged, workers, progress)
    finished = _phase_gather(plan, out, commits, workers, progress)
    manifest = _manifest(plan, limits, commits, damaged, finished)
    shards.write_whole(out / records.MANIFEST, records.dump_manifest(manifest), work)
    return manifest


class _Damaged:
    """Scenes that opened but could not be read through. Raises PackError when they become too many."""

    def __init__(self, plan: Plan) -> None:
        self.scenes: dict[str, str] = {}
        self.before = len(plan.rejected)
        self.total = len(plan.tasks) + self.before
        self.allowed = plan.options.max_bad_fraction

    def add(self, scene_id: str, message: str) -> None:
        self.scenes[scene_id] = message
        if len(self.scenes) + self.before > self.allowed * self.total:
            raise PackError(
                f"{len(self.scenes) + self.before} of {self.total} scenes cannot be used "
                f"(max_bad_fraction={self.allowed:g}):\n" + "\n".join(f"  {line}" for line in self.scenes.values())
            )


# ------------------------------------------------------------------------------------------------ the folder


def check_writable(out: Path) -> None:
    """Raises PackError if ``out`` is not a folder, or cannot be made or written, before any work is done."""
    there = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists() or path.is_symlink())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        what = "is not a folder" if not there.is_dir() else "is not writable"
        raise PackError(f"--out {out}: {there} {what}; choose another folder")


def _finished(plan: Plan, out: Path) -> Manifest | None:
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
    _same_or_error(old, new, out, "a dataset made")
    records.check_folder(out, manifest)
    for name in records.SPLITS:
        for shard in manifest.split(name).shards:
            records.open_index(out, shard)
    return manifest


def _same_or_error(old: dict[str, Any], new: dict[str, Any], out: Path, what: str) -> None:
    lines = differences(json.loads(json.dumps(old)), json.loads(json.dumps(new)))
    if lines:
        raise PlanError(
            f"{out}: holds {what} from other inputs or another configuration (there -> here):\n"
            + "\n".join(f"  {line}" for line in lines[:20])
            + "\nchoose another --out, or remove that folder"
        )


def _open_work(plan: Plan, out: Path, work: Path) -> None:
    foreign = [path.name for path in out.iterdir() if path.name != WORK and not _ours(path.name)]
    if foreign:
        raise PlanError(f"--out {out}: is not empty ({', '.join(sorted(foreign)[:5])}); choose a new folder")
    identity = work / "plan.json"
    if identity.exists():
        _same_or_error(json.loads(identity.read_bytes()), plan.identity(), out, "an unfinished run")
    elif shards_there := sorted(out.glob("*.tfrecord")):
        raise PlanError(f"--out {out}: holds {shards_there[0].name} but no manifest; remove it or choose a new folder")
    else:
        shards.write_whole(identity, identity_json(plan))
    for folder in (work / "spill", work / "shards"):
        folder.mkdir(exist_ok=True)
        for left in folder.glob(".*.tmp"):  # of a process that was killed
            left.unlink(missing_ok=True)


def _ours(name: str) -> bool:
    return name.endswith((".tfrecord", ".idx", ".log"))


@contextlib.contextmanager
def _lock(work: Path) -> Iterator[None]:
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


def _commit(path: Path) -> dict[str, Any] | None:
    """A commit's content, or None if the work behind it is still to be done."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


# ---------------------------------------------------------------------------------------------------- phases


@dataclass(frozen=True, slots=True, eq=False)
class _LimitsJob:
    task: SceneTask
    options: Any
    path: str


def _limits_of(job: _LimitsJob) -> tuple[str, list[list[float]] | str]:
    """(scene id, its limits or what is wrong with it)."""
    try:
        limits = scan.stretch_limits(job.task.scene, job.task.bands, job.options).tolist()
    except RasterError as error:
        return job.task.scene.scene_id, str(error)
    shards.write_whole(Path(job.path), json.dumps(limits).encode())
    return job.task.scene.scene_id, limits


def _phase_limits(plan: Plan, work: Path, damaged: _Damaged, workers: int, progress: Progress) -> dict[str, np.ndarray]:
    """Limits of every scene that could be read, by scene id."""
    limits: dict[str, np.ndarray] = {}
    jobs = []
    for number, task in enumerate(plan.tasks):
        path = work / f"limits-{number:06d}.json"
        if (done := _commit(path)) is not None:
            limits[task.scene.scene_id] = np.array(done)
        elif task.chunks:
            jobs.append(_LimitsJob(replace(task, chunks=(), sheets=()), plan.options, str(path)))
    done = len(limits)
    progress("stretch limits", done, done + len(jobs))
    with contextlib.closing(engine.run_all(_limits_of, jobs, workers, lambda job: job.task.scene.path)) as results:
        for number, (scene_id, value) in enumerate(results, 1):
            if isinstance(value, str):
                damaged.add(scene_id, value)
            else:
                limits[scene_id] = np.array(value)
            progress("stretch limits", done + number, done + len(jobs))
    return limits


def _jobs(plan: Plan, work: Path, limits: dict[str, np.ndarray]) -> Iterator[scan.Job]:
    number = 0
    for task in plan.tasks:
        here = limits.get(task.scene.scene_id)
        for chunk in task.chunks:
            if here is not None:
                yield scan.Job(
                    number, task.scene, task.bands, task.sheets, task.subdivisions, chunk,
                    here, plan.legend, plan.options, str(work / "spill"),
                )  # fmt: skip
            number += 1


def _phase_scan(
    plan: Plan, work: Path, limits: dict[str, np.ndarray], damaged: _Damaged, workers: int, progress: Progress
) -> list[dict[str, Any]]:
    """Commits of all chunks of sound scenes, in order of their numbers."""
    commits: dict[int, dict[str, Any]] = {}
    todo, done = [], 0
    for job in _jobs(plan, work, limits):
        frames, table, commit_path = scan.spill_paths(job.folder, job.number)
        commit = _commit(commit_path)
        if commit and table.exists() and frames.exists() and frames.stat().st_size == commit["bytes"]:
            commits[job.number] = commit
            done += job.chunk.tiles
        else:
            todo.append(job)
    progress("tiles", done, plan.tiles)
    sizes = {job.number: job.chunk.tiles for job in todo}
    with contextlib.closing(engine.run_all(scan.scan_or_report, todo, workers, lambda job: job.scene.path)) as results:
        for commit in results:
            if "damage" in commit:
                damaged.add(commit["scene_id"], commit["damage"])
            else:
                commits[commit["number"]] = commit
            done += sizes[commit["number"]]
            progress("tiles", done, plan.tiles)
    return [commits[n] for n in sorted(commits) if commits[n]["scene_id"] not in damaged.scenes]


@dataclass(frozen=True, slots=True, eq=False)
class _ShardJob:
    """Which frames make a shard, in order: chunk number, offset and length of each."""

    split: Split
    number: int
    chunks: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray
    out: str


def _gather(job: _ShardJob) -> dict[str, Any]:
    out = Path(job.out)
    work = out / WORK
    shard = shards.write_shard(out, job.split, job.number, _frames(job, work / "spill"), work)
    entry = shard.model_dump()
    shards.write_whole(work / "shards" / f"{shard.name}.json", json.dumps(entry).encode())
    return entry


def _frames(job: _ShardJob, spill: Path) -> Iterator[bytes]:
    """Frames in the shard's order, each checked again; at most 64 spill files are open at a time."""
    opened: OrderedDict[int, int] = OrderedDict()
    try:
        for chunk, offset, length in zip(job.chunks.tolist(), job.offsets.tolist(), job.lengths.tolist(), strict=True):
            if chunk not in opened:
                if len(opened) >= 64:
                    os.close(opened.popitem(last=False)[1])
                opened[chunk] = os.open(scan.spill_paths(spill, chunk)[0], os.O_RDONLY)
            opened.move_to_end(chunk)
            data = os.pread(opened[chunk], length, offset)
            records.unframe(data, shards.crc32c, f"{scan.spill_paths(spill, chunk)[0]} at byte {offset}")
            yield data
    finally:
        for descriptor in opened.values():
            os.close(descriptor)


def _phase_gather(
    plan: Plan, out: Path, commits: list[dict[str, Any]], workers: int, progress: Progress
) -> list[Shard]:
    kept = sum(commit["kept"] for commit in commits)
    if not kept:
        rejected = total_rejected(commits)
        raise PackError(
            "not one usable tile: "
            + ", ".join(f"{count} {reason}" for reason, count in rejected.most_common())
            + ". See quality.*, labels.min_valid_fraction and split.block_m in docs/configuration.md"
        )
    chunk_of, table = _tables(plan, out, commits, kept)
    _check_val_share(plan, table)
    finished: list[Shard] = []
    todo = []
    for job in _shard_jobs(plan, out, chunk_of, table):
        name = f"{job.split}-{job.number:05d}.tfrecord"
        entry = _commit(out / WORK / "shards" / f"{name}.json")
        index = out / name.replace(".tfrecord", ".idx")
        if entry and (out / name).exists() and (out / name).stat().st_size == entry["bytes"] and index.exists():
            finished.append(Shard.model_validate(entry))
        else:
            todo.append(job)
    done = sum(shard.records for shard in finished)
    progress("shards", done, kept)
    name_of = lambda job: f"shard {job.split}-{job.number:05d}"  # noqa: E731
    with contextlib.closing(engine.run_all(_gather, todo, workers, name_of)) as results:
        for entry in results:
            finished.append(Shard.model_validate(entry))
            done += entry["records"]
            progress("shards", done, kept)
    return sorted(finished, key=lambda shard: shard.name)


def _tables(plan: Plan, out: Path, commits: list[dict[str, Any]], kept: int) -> tuple[np.ndarray, np.ndarray]:
    """All tiles' rows in global order: (chunk number of each, scan.TABLE rows). 25 bytes a tile."""
    table, chunk_of = np.empty(kept, scan.TABLE), np.empty(kept, np.uint32)
    at = 0
    for commit in commits:
        part = np.load(scan.spill_paths(out / WORK / "spill", commit["number"])[1])
        table[at : at + len(part)], chunk_of[at : at + len(part)] = part, commit["number"]
        at += len(part)
    order = np.lexsort((table["offset"], chunk_of, table["hash"]))
    return chunk_of[order], table[order]


def _shard_jobs(plan: Plan, out: Path, chunk_of: np.ndarray, table: np.ndarray) -> Iterator[_ShardJob]:
    splits: tuple[tuple[int, Split], ...] = ((blocks.TRAIN, "train"), (blocks.VAL, "val"))
    for side, split in splits:
        rows = np.flatnonzero(table["split"] == side)
        for number, start in enumerate(range(0, len(rows), plan.options.shards.records)):
            part = rows[start : start + plan.options.shards.records]
            yield _ShardJob(split, number, chunk_of[part], table["offset"][part], table["length"][part], str(out))


def _check_val_share(plan: Plan, table: np.ndarray) -> None:
    wanted = plan.options.split.val_fraction
    share = float((table["split"] == blocks.VAL).mean())
    if share == 1:
        raise PackError("every tile fell into validation blocks: use a smaller split.block_m, or another seed")
    if wanted > 0 and share == 0:
        raise PackError(
            f"no tile fell into a validation block, {wanted:.0%} were asked for: use a smaller split.block_m "
            f"(now {plan.options.split.block_m:g} m), a larger split.val_fraction, or another seed; "
            "split.val_fraction=0 does without validation"
        )


# -------------------------------------------------------------------------------------------------- manifest


def total_rejected(commits: list[dict[str, Any]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for commit in commits:
        total.update(commit["rejected"])
    return total


def _split_info(plan: Plan, commits: list[dict[str, Any]], side: int, parts: tuple[Shard, ...]) -> SplitInfo:
    sums = [commit["splits"][side] for commit in commits if commit["splits"][side]["tiles"]]
    tiles = sum(part["tiles"] for part in sums)
    if not tiles:
        return SplitInfo(records=0, shards=(), mean=(), std=(), prior=())
    pixels = sum(part["pixels"] for part in sums)
    mean, std = [], []
    for band in range(len(plan.bands)):
        # Python's integers have no limit: for integer pixels both moments are exact until the last division
        total = sum(part["sum"][band] for part in sums)
        squares = sum(part["squares"][band] for part in sums)
        mean.append(total / pixels)
        std.append(float(max(0, pixels * squares - total * total)) ** 0.5 / pixels)
    prior = np.sum([part["fractions"] for part in sums], axis=0) / tiles
    return SplitInfo(
        records=tiles, shards=parts, mean=tuple(mean), std=tuple(std), prior=tuple((prior / prior.sum()).tolist())
    )


def _manifest(
    plan: Plan,
    limits: dict[str, np.ndarray],
    commits: list[dict[str, Any]],
    damaged: _Damaged,
    finished: list[Shard],
) -> Manifest:
    kept: Counter[str] = Counter()
    for commit in commits:
        kept[commit["scene_id"]] += commit["kept"]
    rejected = total_rejected(commits)
    rejected["unreadable"] = sum(task.tiles for task in plan.tasks if task.scene.scene_id in damaged.scenes)
    counts = {
        "scenes": len(plan.tasks),
        "scenes_rejected": len(plan.rejected) + len(damaged.scenes),
        "scenes_without_land_cover": sum(not task.sheets for task in plan.tasks),
        "positions": plan.tiles,
        "kept": sum(kept.values()),
        **{f"rejected_{reason}": rejected[reason] for reason in scan.REASONS},
    }
    stretched = plan.options.stretch.mode != "none"
    scenes = tuple(
        SceneInfo(
            scene_id=task.scene.scene_id,
            fingerprint=task.scene.fingerprint,
            date=task.scene.date,
            stretch_limits=tuple((low, high) for low, high in limits[task.scene.scene_id].tolist())
            if stretched and task.scene.scene_id in limits and task.scene.scene_id not in damaged.scenes
            else None,
            kept=kept[task.scene.scene_id],
        )
        for task in plan.tasks
    )
    split = plan.options.split
    by_split = {name: tuple(s for s in finished if s.name.startswith(f"{name}-")) for name in records.SPLITS}
    return Manifest(
        product=plan.product.name,
        product_title=plan.product.title,
        land_cover_years=tuple(sorted({sheet.year for sheet in plan.sheets if sheet.year is not None})),
        land_cover_fingerprints=tuple(sheet.sheet.fingerprint for sheet in plan.sheets),
        classes=tuple(ClassInfo(name=c.name, codes=c.codes, rgb=c.rgb) for c in plan.legend.classes),
        bands=plan.bands,
        tile=Tile(size=plan.options.tile.size, codec=plan.options.tile.codec, dtype=plan.dtype),  # type: ignore[arg-type]
        train=_split_info(plan, commits, blocks.TRAIN, by_split["train"]),
        val=_split_info(plan, commits, blocks.VAL, by_split["val"]),
        split_rule=f"blocks of {split.block_m:g} m on one grid over the Earth, {split.val_fraction:g} of them held out "
        f"by hash with seed {plan.options.seed}; tiles that touch both kinds dropped",
        counts=counts,
        scenes=scenes,
        config=dict(plan.config),
    )


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
