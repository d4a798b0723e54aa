"""The phases of a run: limits of every scene, then tiles of every chunk, then shards.

Each phase finds what an earlier run has committed and does the rest. What tasks write lies in the run's own folder,
so that a task of a run that was given up, still busy on some worker, cannot write among the files of another.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from geokr.manifests import Manifest, Shard
from preprocess import (
    blocks,
    checked_inputs,
    gather,
    sampling,
    scan,
    scan_tiles,
    shards,
    spill,
    stages,
    summing,
    workfolder,
)
from preprocess.damaged import BadTiles, Damaged, named_tiles
from preprocess.engine import Engine, Progress
from preprocess.errors import RasterError
from preprocess.options import PackOptions
from preprocess.plan import Plan, SceneTask
from preprocess.precut import Files
from preprocess.workfolder import FutileError


@dataclass(frozen=True, slots=True, eq=False)
class _LimitsJob:
    """Part number ``share`` of ``shares`` of a scene's sample."""

    task: SceneTask
    options: PackOptions
    path: str
    share: int
    shares: int


def _limits_of(job: _LimitsJob) -> tuple[_LimitsJob, dict[str, Any] | str]:
    """The commit {limits, stages}; of a part {sample, stages}; or what is wrong with the scene."""
    clock, task = stages.Clock(), job.task
    try:
        with clock("sample"):
            if job.shares > 1:
                part = sampling.sample(task.scene, task.bands, job.options, job.share, job.shares)
            elif task.sample is None:
                limits = sampling.stretch_limits(task.scene, task.bands, job.options)
            else:
                limits = scan_tiles.stretch_limits(task.sample, task.bands, job.options)
    except RasterError as error:
        return job, str(error)
    if job.shares > 1:
        return job, {"sample": part, "stages": clock.times}
    return job, _commit_limits(job, limits, clock.times)


def _commit_limits(job: _LimitsJob, limits: np.ndarray, times: stages.Times) -> dict[str, Any]:
    commit = {"limits": limits.tolist(), "stages": times}
    shards.write_whole(Path(job.path), json.dumps(commit).encode())
    return commit


def _whole_commit(job: _LimitsJob, value: dict[str, Any], before: list[dict[str, Any]]) -> dict[str, Any] | None:
    """A scene's commit, or None as long as parts are missing, which are kept in ``before``."""
    if "limits" in value:
        return value
    before.append(value)
    if len(before) < job.shares:
        return None
    times: dict[str, list[float]] = {}
    for part in before:
        stages.add(times, part["stages"])
    samples = [part["sample"] for part in before]
    scene, options = job.task.scene, job.options
    return _commit_limits(job, sampling.limits_from(samples, len(job.task.bands), scene.dtype, options), times)


def _scan(job: scan.Job) -> dict[str, Any]:
    return scan_tiles.scan_files(job) if isinstance(job.chunk, Files) else scan.scan_or_report(job)


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """One run of the packer. plan: what is to be done. asked: what the command names, which is more where scenes are
    added to a dataset that has some of them. work: the run's own folder. base: the dataset it adds to, or None for a
    new one.

    spent: stage to [CPU seconds, seconds that passed], filled by the phases. left_out: what came to light to be
    unusable, by scene or tile, with the whole message; filled likewise.
    """

    plan: Plan
    asked: Plan
    out: Path
    work: Path
    engine: Engine
    progress: Progress
    base: Manifest | None = None
    spent: dict[str, list[float]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def make(self) -> Manifest:
        """All phases; the manifest of what they made."""
        damaged = Damaged(self.asked)
        if self.plan.checksums:
            self.check_sums(damaged)
        limits = self.find_limits(damaged)
        commits = self.scan_chunks(limits, damaged)
        tiles = {tile_id: message for tile_id, (_, message) in named_tiles(commits).items()}
        self.left_out.update(damaged.scenes | tiles)
        finished = self.gather_shards(commits)
        return summing.make_manifest(self.plan, limits, commits, damaged, finished)

    def check_sums(self, damaged: Damaged) -> None:
        """Inputs against the hashes that their source gave. Raises FutileError for one of another hash that cannot be
        left out: a land-cover sheet, the DEM, a scene that the dataset has already."""
        wrong = checked_inputs.mismatches(self.plan.checksums, self.engine, self.progress, self.work)
        if self.base is not None:
            checked_inputs.check_held(self.asked, self.base, wrong)
        checked_inputs.check_shared(self.plan, wrong)
        for task in self.plan.tasks:
            if text := checked_inputs.wrong_in(task, wrong):
                damaged.add(task.scene.scene_id, text, "checksum")

    def find_limits(self, damaged: Damaged) -> dict[str, np.ndarray]:
        """Limits of every scene that could be read, by scene id."""
        limits: dict[str, np.ndarray] = {}
        jobs = list(self._limits_jobs(limits, damaged))
        done, of = len(limits), len(limits) + len({job.path for job in jobs})
        self.progress("stretch limits", done, of)
        parts: dict[str, list[dict[str, Any]]] = {}
        with contextlib.closing(
            self.engine.run_all(_limits_of, jobs, lambda job: f"scene {job.task.scene.path}")
        ) as results:
            for job, value in results:
                scene_id = job.task.scene.scene_id
                if scene_id in damaged.scenes:
                    continue
                if isinstance(value, str):
                    damaged.add(scene_id, value)
                elif (commit := _whole_commit(job, value, parts.setdefault(scene_id, []))) is not None:
                    limits[scene_id] = np.array(commit["limits"])
                    stages.add(self.spent, commit["stages"])
                else:
                    continue
                parts.pop(scene_id, None)
                done += 1
                self.progress("stretch limits", done, of)
        return limits

    def _limits_jobs(self, limits: dict[str, np.ndarray], damaged: Damaged) -> Iterator[_LimitsJob]:
        """What is left to sample. limits: gets those that an earlier run has found."""
        scenes = sum(bool(task.chunks) for task in self.plan.tasks)
        for number, task in enumerate(self.plan.tasks):
            path = self.work / f"limits-{number:06d}.json"
            if task.scene.scene_id in damaged.scenes:
                continue
            if (done := workfolder.read_commit(path)) is not None:
                limits[task.scene.scene_id] = np.array(done["limits"])
                stages.add(self.spent, done["stages"])
            elif task.chunks:
                bare, options = replace(task, chunks=(), covers=()), self.plan.options
                shares = sampling.shares_of(task.scene, scenes, options) if task.sample is None else 1
                yield from (_LimitsJob(bare, options, str(path), share, shares) for share in range(shares))

    def scan_chunks(self, limits: dict[str, np.ndarray], damaged: Damaged) -> list[dict[str, Any]]:
        """Commits of all chunks of sound scenes, in order of their numbers."""
        commits: dict[int, dict[str, Any]] = {}
        todo, done, bad = [], 0, BadTiles(self.plan)
        for job in self._scan_jobs(limits):
            frames, table, commit_path = spill.spill_paths(job.folder, job.number)
            commit = workfolder.read_commit(commit_path)
            if commit and table.exists() and frames.exists() and frames.stat().st_size == commit["bytes"]:
                stages.add(self.spent, commit.pop("stages"))  # kept, they would be half of what the driver holds
                commits[job.number] = commit
                bad.add(commit)
                done += job.chunk.tiles
            else:
                todo.append(job)
        self.progress("tiles", done, self.plan.tiles)
        sizes = {job.number: job.chunk.tiles for job in todo}
        with contextlib.closing(self.engine.run_all(_scan, todo, lambda job: f"scene {job.scene.path}")) as results:
            for commit in results:
                if "damage" in commit:
                    damaged.add(commit["scene_id"], commit["damage"])
                else:
                    stages.add(self.spent, commit.pop("stages"))
                    commits[commit["number"]] = commit
                    bad.add(commit)
                done += sizes[commit["number"]]
                self.progress("tiles", done, self.plan.tiles)
        return [commits[n] for n in sorted(commits) if commits[n]["scene_id"] not in damaged.scenes]

    def _scan_jobs(self, limits: dict[str, np.ndarray]) -> Iterator[scan.Job]:
        number, folder, plan = 0, str(self.work / "spill"), self.plan
        for task in plan.tasks:
            here = limits.get(task.scene.scene_id)
            for chunk in task.chunks:
                if here is not None:
                    yield scan.Job(number, task.scene, task.bands, task.covers, chunk, here, plan.options, folder)
                number += 1

    def gather_shards(self, commits: list[dict[str, Any]]) -> list[Shard]:
        """The shards' entries in the manifest, by name; none where nothing is added to a dataset.

        Raises FutileError for a new dataset without a tile, or without one on a side of the split that is to have some.
        """
        kept = sum(commit["kept"] for commit in commits)
        if not kept and self.base is not None:
            return []
        if not kept:
            raise FutileError(
                f"not one usable tile: {_turned_away(commits) or 'no scene could be read through'}. See quality.*, "
                "labels.min_valid_fraction and split.block_m in docs/configuration.md"
            )
        chunk_of, table = gather.tables(self.work, commits, kept)
        if self.base is None:
            _check_val_share(self.plan, table, commits)
        finished: list[Shard] = []
        todo = []
        for job in gather.shard_jobs(self.plan, self.out, self.work, chunk_of, table, gather.next_numbers(self.base)):
            if (entry := self._gathered(job)) is None:
                todo.append(job)
            else:
                finished.append(Shard.model_validate(entry["shard"]))
                stages.add(self.spent, entry["stages"])
        done = sum(shard.records for shard in finished)
        self.progress("shards", done, kept)
        name_of = lambda job: f"shard {job.split}-{job.number:05d}"  # noqa: E731
        with contextlib.closing(self.engine.run_all(gather.gather, todo, name_of)) as results:
            for entry in results:
                finished.append(Shard.model_validate(entry["shard"]))
                stages.add(self.spent, entry["stages"])
                done += entry["shard"]["records"]
                self.progress("shards", done, kept)
        return sorted(finished, key=lambda shard: gather.number_of(shard.name))

    def _gathered(self, job: gather.ShardJob) -> dict[str, Any] | None:
        """The commit of a shard that is there and holds these very tiles."""
        name = f"{job.split}-{job.number:05d}.tfrecord"
        entry = workfolder.read_commit(self.work / "shards" / f"{name}.json")
        shard, index = self.out / name, self.out / name.replace(".tfrecord", ".idx")
        there = shard.exists() and index.exists()
        known = entry and there and entry.get("rows") == job.digest
        return entry if entry and known and shard.stat().st_size == entry["shard"]["bytes"] else None


def _turned_away(commits: list[dict[str, Any]]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in summing.total_rejected(commits).most_common())


def _check_val_share(plan: Plan, table: np.ndarray, commits: list[dict[str, Any]]) -> None:
    wanted = plan.options.split.val_fraction
    share = float((table["split"] == blocks.VAL).mean())
    rejected = _turned_away(commits)
    found = f" (kept: {len(table)}; turned away: {rejected})" if rejected else ""
    if share == 1:
        raise FutileError(
            f"every tile fell into validation blocks{found}: use a smaller split.block_m, or another seed"
        )
    if wanted > 0 and share == 0:
        raise FutileError(
            f"no tile fell into a validation block{found}, {wanted:.0%} were asked for: use a smaller split.block_m "
            f"(now {plan.options.split.block_m:g} m), a larger split.val_fraction, or another seed; "
            "split.val_fraction=0 does without validation"
        )
