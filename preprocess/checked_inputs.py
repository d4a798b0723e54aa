"""Inputs read through and held against the hashes that their source gave (see preprocess.checksums)."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path

from geokr.manifests import Manifest
from preprocess import checksums, shards, workfolder
from preprocess.engine import Engine, Progress
from preprocess.plan import Plan, SceneTask
from preprocess.workfolder import FutileError


def _sum_of(job: tuple[str, str, str]) -> tuple[str, str]:
    """(path, its SHA-256). Committed where it is the expected one: another is looked at again by the next run."""
    path, expected, commit = job
    found = checksums.sha256(path)
    if commit and found == expected:
        shards.write_whole(Path(commit), json.dumps({"sha256": found}).encode())
    return path, found


def mismatches(expected: Mapping[str, str], engine: Engine, progress: Progress, work: Path | None) -> dict[str, str]:
    """What is wrong, by path, with files of another hash than the expected one.

    work: where an unfinished run keeps what it has read through; None keeps nothing.
    """
    found, jobs = dict[str, str](), []
    for number, (path, value) in enumerate(expected.items()):
        commit = work / f"sha256-{number:06d}.json" if work else None
        if commit and (done := workfolder.read_commit(commit)) is not None:
            found[path] = done["sha256"]
        else:
            jobs.append((path, value, str(commit or "")))
    progress("checksums", len(found), len(expected))
    with contextlib.closing(engine.run_all(_sum_of, jobs, lambda job: job[0])) as results:
        for path, value in results:
            found[path] = value
            progress("checksums", len(found), len(expected))
    return {path: text for path in found if (text := checksums.mismatch(path, found[path], expected))}


def wrong_in(task: SceneTask, wrong: Mapping[str, str]) -> str:
    """What is wrong with one of a scene's files or its mask, or an empty string."""
    mask = [task.scene.mask.path] if task.scene.mask is not None else []
    paths = (*(layer.path for layer in task.scene.layers if layer is not None), *mask)
    return next((wrong[path] for path in paths if path in wrong), "")


def check_held(plan: Plan, manifest: Manifest, wrong: Mapping[str, str]) -> None:
    """Raises FutileError where a file of another hash is one that a dataset has tiles of: a scene of the plan, or what
    all scenes share, the land cover or the DEM. Nothing can leave those out any more."""
    kept = {scene.fingerprint for scene in manifest.scenes if scene.kept}
    held = [text for task in plan.tasks if task.scene.fingerprint in kept and (text := wrong_in(task, wrong))]
    if held:
        raise FutileError(
            f"--checksums: {len(held)} scenes that the dataset holds tiles of are not what their source gave:\n"
            + "\n".join(f"  {text}" for text in held[:20])
            + "\nthose tiles may be damaged too: pack anew, into another folder"
        )
    check_shared(plan, wrong)


def check_shared(plan: Plan, wrong: Mapping[str, str]) -> None:
    """Raises FutileError for a land-cover sheet or a DEM of another hash, which no scene can do without."""
    for path in plan.shared_inputs():
        if path in wrong:
            raise FutileError(wrong[path])
