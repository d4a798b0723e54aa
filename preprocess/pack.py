"""Packing: from a plan to a dataset folder, in two phases that can be cut short anywhere and run again.

Phase 1 scans chunks and spills their kept tiles (preprocess.scan). Phase 2 gathers every shard's tiles from the
spill files in the global hash order. Every file appears whole under its final name or not at all; the manifest
comes last, and with it the folder becomes a dataset. Until then everything but finished shards lives in ``.work``.
"""

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from geokr import records
from geokr.records import Manifest, Shard
from preprocess import blocks, engine, gather, manifests, sampling, scan, scan_tiles, shards, spill, stages, workfolder
from preprocess.damaged import BadTiles, Damaged
from preprocess.engine import Engine
from preprocess.plan import Plan, SceneTask
from preprocess.precut import Files
from preprocess.raster import RasterError
from preprocess.workfolder import WORK, PackError

Progress = Callable[[str, int, int], None]  # (phase, done, of)
# What else is made of a finished dataset while .work is still there: (manifest, the folder .work, stages of this run).
Finish = Callable[[Manifest, Path, Mapping[str, tuple[float, float]]], None]


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """What a run did. written: False where the folder already held this very dataset.

    stages: where its workers' time went: stage to (CPU seconds, seconds that passed), see preprocess.stages.
    """

    manifest: Manifest
    written: bool
    seconds: float
    stages: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def pack(
    plan: Plan,
    out: Path,
    progress: Progress,
    finish: Finish | None = None,
    open_engine: Callable[[], Engine] | None = None,
) -> Packed:
    """Makes the dataset ``out`` holds after it, or finds it made.

    finish: called once the manifest is there, also where an earlier run ended between the manifest and clearing up.
    open_engine: opens where tasks run; by default processes of this machine, as many as ``workers`` says. Called when
    there is something to do.

    Raises PlanError if ``out`` holds another dataset or an unfinished run of another configuration, PackError if
    another process is packing there or not one tile is left, and whatever scanning raises.
    """
    start = time.monotonic()
    manifest, work = workfolder.finished(plan, out), out / WORK
    if manifest is not None and not work.exists():
        return Packed(manifest, written=False, seconds=time.monotonic() - start)
    workfolder.check_writable(out)
    with workfolder.lock(work):
        # another process may have come first, or one died between the manifest and clearing up
        manifest = workfolder.finished(plan, out)
        written = manifest is None
        spent: dict[str, list[float]] = {}
        if manifest is None:
            workfolder.open_work(plan, out, work)
            with open_engine() if open_engine else engine.open_engine(plan.options.workers) as runs:
                manifest = _make(plan, out, work, runs, progress, spent)
        if finish is not None:
            finish(manifest, work, stages.in_order(spent))
        shutil.rmtree(work)
    return Packed(manifest, written, time.monotonic() - start, stages.in_order(spent))


def _make(
    plan: Plan, out: Path, work: Path, runs: Engine, progress: Progress, spent: dict[str, list[float]]
) -> Manifest:
    damaged = Damaged(plan)
    limits = _phase_limits(plan, work, damaged, runs, progress, spent)
    commits = _phase_scan(plan, work, limits, damaged, runs, progress)
    finished = _phase_gather(plan, out, commits, runs, progress, spent)
    for commit in commits:
        stages.add(spent, commit["stages"])
    manifest = manifests.make_manifest(plan, limits, commits, damaged, finished)
    shards.write_whole(out / records.MANIFEST, records.dump_manifest(manifest), work)
    return manifest


# ------------------------------------------------------------------------------------------------ the folder


# ---------------------------------------------------------------------------------------------------- phases


@dataclass(frozen=True, slots=True, eq=False)
class _LimitsJob:
    task: SceneTask
    options: Any
    path: str


def _limits_of(job: _LimitsJob) -> tuple[str, dict[str, Any] | str]:
    """(scene id, {limits, stages} or what is wrong with it)."""
    clock = stages.Clock()
    try:
        with clock("sample"):
            task = job.task
            if task.sample is None:
                limits = sampling.stretch_limits(task.scene, task.bands, job.options).tolist()
            else:
                limits = scan_tiles.stretch_limits(task.sample, task.bands, job.options).tolist()
    except RasterError as error:
        return job.task.scene.scene_id, str(error)
    commit = {"limits": limits, "stages": clock.times}
    shards.write_whole(Path(job.path), json.dumps(commit).encode())
    return job.task.scene.scene_id, commit


def _phase_limits(
    plan: Plan, work: Path, damaged: Damaged, runs: Engine, progress: Progress, spent: dict[str, list[float]]
) -> dict[str, np.ndarray]:
    """Limits of every scene that could be read, by scene id."""
    limits: dict[str, np.ndarray] = {}
    jobs = []
    for number, task in enumerate(plan.tasks):
        path = work / f"limits-{number:06d}.json"
        if (done := workfolder.read_commit(path)) is not None:
            limits[task.scene.scene_id] = np.array(done["limits"])
            stages.add(spent, done["stages"])
        elif task.chunks:
            jobs.append(_LimitsJob(replace(task, chunks=(), sheets=()), plan.options, str(path)))
    done = len(limits)
    progress("stretch limits", done, done + len(jobs))
    with contextlib.closing(runs.run_all(_limits_of, jobs, lambda job: job.task.scene.path)) as results:
        for number, (scene_id, value) in enumerate(results, 1):
            if isinstance(value, str):
                damaged.add(scene_id, value)
            else:
                limits[scene_id] = np.array(value["limits"])
                stages.add(spent, value["stages"])
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


def _scan(job: scan.Job) -> dict[str, Any]:
    return scan_tiles.scan_files(job) if isinstance(job.chunk, Files) else scan.scan_or_report(job)


def _phase_scan(
    plan: Plan, work: Path, limits: dict[str, np.ndarray], damaged: Damaged, runs: Engine, progress: Progress
) -> list[dict[str, Any]]:
    """Commits of all chunks of sound scenes, in order of their numbers."""
    commits: dict[int, dict[str, Any]] = {}
    todo, done, bad = [], 0, BadTiles(plan)
    for job in _jobs(plan, work, limits):
        frames, table, commit_path = spill.spill_paths(job.folder, job.number)
        commit = workfolder.read_commit(commit_path)
        if commit and table.exists() and frames.exists() and frames.stat().st_size == commit["bytes"]:
            commits[job.number] = commit
            bad.add(commit)
            done += job.chunk.tiles
        else:
            todo.append(job)
    progress("tiles", done, plan.tiles)
    sizes = {job.number: job.chunk.tiles for job in todo}
    with contextlib.closing(runs.run_all(_scan, todo, lambda job: job.scene.path)) as results:
        for commit in results:
            if "damage" in commit:
                damaged.add(commit["scene_id"], commit["damage"])
            else:
                commits[commit["number"]] = commit
                bad.add(commit)
            done += sizes[commit["number"]]
            progress("tiles", done, plan.tiles)
    return [commits[n] for n in sorted(commits) if commits[n]["scene_id"] not in damaged.scenes]


def _phase_gather(
    plan: Plan,
    out: Path,
    commits: list[dict[str, Any]],
    runs: Engine,
    progress: Progress,
    spent: dict[str, list[float]],
) -> list[Shard]:
    kept = sum(commit["kept"] for commit in commits)
    if not kept:
        rejected = manifests.total_rejected(commits)
        raise PackError(
            "not one usable tile: "
            + ", ".join(f"{count} {reason}" for reason, count in rejected.most_common())
            + ". See quality.*, labels.min_valid_fraction and split.block_m in docs/configuration.md"
        )
    chunk_of, table = gather.tables(plan, out, commits, kept)
    _check_val_share(plan, table)
    finished: list[Shard] = []
    todo = []
    for job in gather.shard_jobs(plan, out, chunk_of, table):
        name = f"{job.split}-{job.number:05d}.tfrecord"
        entry = workfolder.read_commit(out / WORK / "shards" / f"{name}.json")
        index = out / name.replace(".tfrecord", ".idx")
        bytes_there = (out / name).stat().st_size if (out / name).exists() else -1
        if entry and bytes_there == entry["shard"]["bytes"] and index.exists():
            finished.append(Shard.model_validate(entry["shard"]))
            stages.add(spent, entry["stages"])
        else:
            todo.append(job)
    done = sum(shard.records for shard in finished)
    progress("shards", done, kept)
    name_of = lambda job: f"shard {job.split}-{job.number:05d}"  # noqa: E731
    with contextlib.closing(runs.run_all(gather.gather, todo, name_of)) as results:
        for entry in results:
            finished.append(Shard.model_validate(entry["shard"]))
            stages.add(spent, entry["stages"])
            done += entry["shard"]["records"]
            progress("shards", done, kept)
    return sorted(finished, key=lambda shard: shard.name)


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
