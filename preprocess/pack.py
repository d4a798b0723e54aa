"""Packing: from a plan to a dataset folder, in phases that can be cut short anywhere and run again.

Chunks are scanned and their kept tiles spilled (preprocess.scan); then every shard gathers its tiles from the spill
files in the global hash order. Every file appears whole under its final name or not at all; the manifest comes last,
and with it the folder becomes a dataset, or the dataset a larger one. Until then everything but finished shards lives
in ``.work``.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from geokr import manifests
from geokr.manifests import Manifest
from preprocess import appending, checked_inputs, engine, shards, stages, workfolder
from preprocess.engine import Engine
from preprocess.phases import Progress, Run
from preprocess.plan import Plan
from preprocess.sheets import LabelError
from preprocess.workfolder import WORK, FutileError

# What else is made of a finished dataset while .work is still there: (manifest, the run's folder in it, stages, what
# this run made of it). The latter two are empty and None where an earlier run made it.
Finish = Callable[[Manifest, Path, Mapping[str, tuple[float, float]], Manifest | None], None]


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """What a run did. written: False where the folder already held this very dataset.

    stages: where its workers' time went: stage to (CPU seconds, seconds that passed), see preprocess.stages.
    part: of the dataset, what this run made; None where it made nothing. left_out: what came to light, while it was
    read, to be unusable: scenes, and the first of cut tiles, with the message.
    """

    manifest: Manifest
    written: bool
    seconds: float
    stages: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    part: Manifest | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """What a folder holds and what is to be done. manifest: of the dataset that is there. done: nothing is missing.

    plan: what is to be done, which is less than what was asked for where scenes are added. part, left_out: see
    Packed.
    """

    plan: Plan
    manifest: Manifest | None
    done: bool
    part: Manifest | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)


def pack(
    plan: Plan,
    out: Path,
    progress: Progress,
    finish: Finish | None = None,
    open_engine: Callable[[], Engine] | None = None,
    append: bool = False,
) -> Packed:
    """Makes the dataset ``out`` holds after it, or finds it made.

    finish: called once the manifest is there, also where an earlier run ended between the manifest and clearing up.
    open_engine: opens where tasks run; by default processes of this machine, as many as ``workers`` says. Called when
    there is something to do. append: the plan's scenes that a dataset in ``out`` does not have are added to it.
    Where hashes are given, the inputs of a dataset that is there are held against them too.

    Raises PlanError if ``out`` holds another dataset or an unfinished run of another configuration, PackError if
    another process is packing there, if not one tile is left or if what a dataset was made of has another hash, and
    whatever scanning raises.
    """
    opening = open_engine or (lambda: engine.open_engine(plan.options.workers))
    packed = _pack(plan, out, progress, finish, opening, append)
    if plan.checksums and not packed.written and not packed.left_out:  # a run that scans has looked before it began
        with opening() as running:
            wrong = checked_inputs.mismatches(plan.checksums, running, progress, None)
        checked_inputs.check_held(plan, packed.manifest, wrong)
    return packed


def _pack(
    plan: Plan, out: Path, progress: Progress, finish: Finish | None, opening: Callable[[], Engine], append: bool
) -> Packed:
    start = time.monotonic()
    work = out / WORK
    state = look(plan, out, append)
    if state.done and (not work.exists() or _another_grows(work, state)):
        return _nothing_to_do(state, start)
    workfolder.check_writable(out)
    if not state.done:
        workfolder.check_ours(out)  # before anything is made in it
    with workfolder.lock(work):
        # another process may have come first, or one died between the manifest and clearing up
        state = look(plan, out, append)
        if state.done and _another_grows(work, state):
            return _nothing_to_do(state, start)
        if state.manifest is not None and not _another_grows(work, state) and workfolder.has_leavings(work):
            _end(state, work, finish, {})
        spent: dict[str, list[float]] = {}
        if not state.done:
            with opening() as running:
                state = _make(state, plan, out, running, progress, spent)
            if state.part is not None:
                _end(state, work, finish, stages.in_order(spent))
        workfolder.clear(work)
    workfolder.remove(work)
    assert state.manifest is not None
    seconds = time.monotonic() - start
    return Packed(state.manifest, state.part is not None, seconds, stages.in_order(spent), state.part, state.left_out)


def _end(state: State, work: Path, finish: Finish | None, spent: Mapping[str, tuple[float, float]]) -> None:
    """What is made of a dataset and of what the run that made it left in ``.work``, which then goes."""
    assert state.manifest is not None
    if finish is not None:
        finish(state.manifest, workfolder.folder_of_last_run(work), spent, state.part)
    workfolder.clear(work, keep_lock=True)


def look(plan: Plan, out: Path, append: bool) -> State:
    """Raises PlanError if the folder holds another dataset, or one that the plan's scenes cannot be added to."""
    if not append or not (out / manifests.MANIFEST).exists():
        manifest = workfolder.finished(plan, out)
        return State(plan, manifest, done=manifest is not None)
    manifest = manifests.load_manifest(out)
    new = appending.new_scenes(plan, manifest, out)
    workfolder.check_whole(out, manifest)
    return State(new, manifest, done=not new.tasks)


def _another_grows(work: Path, state: State) -> bool:
    """Whether .work belongs to a run that adds to this dataset and has not ended."""
    assert state.manifest is not None
    return workfolder.growing_to(work) > state.manifest.version


def _nothing_to_do(state: State, start: float) -> Packed:
    assert state.manifest is not None
    return Packed(state.manifest, written=False, seconds=time.monotonic() - start)


def _make(
    state: State, asked: Plan, out: Path, running: Engine, progress: Progress, spent: dict[str, list[float]]
) -> State:
    base = state.manifest
    work = workfolder.open_work(state.plan, out, base)
    run = Run(state.plan, asked, out.absolute(), work.absolute(), running, progress, base, spent)
    try:
        manifest = part = run.make()
    except (FutileError, LabelError):
        workfolder.give_up(out, base)
        raise
    if base is not None and appending.adds_nothing(base, part):
        return State(state.plan, base, done=True, left_out=run.left_out)
    if base is not None:
        # training runs that began on the smaller dataset can go on with it
        shards.write_whole(out / appending.kept_name(base), manifests.dump_manifest(base), work)
        manifest = appending.joined(base, part)
    shards.write_whole(out / manifests.MANIFEST, manifests.dump_manifest(manifest), work)
    return State(state.plan, manifest, done=True, part=part, left_out=run.left_out)
