"""What the driver, the process that plans and hands out work, takes for very many tiles.

Planning reads thousands of headers. What it holds while packing is seen on a work folder that is all but done: every
chunk has a commit, a table and frames, as a run leaves them that was cut short when its last chunk had been
scanned. Packing goes on from there, through the order of all tiles, up to the first shard.
"""

import contextlib
import json
import os
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bench_pack_inputs import Inputs
from benchmarks.bench_pack_ours import KEEP_ALL
from benchmarks.bench_pack_watch import Watch, peak_mb

# given limits, so that no scene is sampled
OPTIONS = (*KEEP_ALL, "stretch.mode=limits", "stretch.limits=[[0, 3000]]", "workers=0")
LINKS = 10_000  # names of one file; file systems allow some tens of thousands


def _plan(inputs: Inputs) -> Any:
    from geokr import config
    from preprocess.options import PackOptions
    from preprocess.plan import make_plan

    options = config.load(PackOptions, None, OPTIONS)
    return make_plan([str(path) for path in inputs.scenes], list(map(str, inputs.sheets)), inputs.product, options)


def planning(inputs: Inputs, out: Path) -> dict[str, Any]:
    """Time and memory of planning; bytes_a_tile: what the process grew by."""
    _plan(inputs.small())  # imports, compiled code
    before = peak_mb()
    with Watch() as watch:
        plan = _plan(inputs)
    found = watch.found()
    return {**found, "tiles": plan.tiles, "bytes_a_tile": (found["driver_mb"] - before) * 1e6 / plan.tiles}


class _Stopped(Exception):  # noqa: N818 - how packing is stopped, no error
    """As far as it was wanted."""


class _OneChunk:
    """An engine that stops packing when the limits are there and the first chunk has been scanned."""

    def __init__(self) -> None:
        self.calls = 0

    def run_all(
        self, function: Callable[[Any], Any], tasks: Sequence[Any], describe: Callable[[Any], str]
    ) -> Generator[Any, None, None]:
        self.calls += 1
        yield from map(function, tasks if self.calls == 1 else tasks[:1])
        if self.calls == 2:
            raise _Stopped

    def __enter__(self) -> "_OneChunk":
        return self

    def __exit__(self, *error: object) -> None:
        return None


def driving(inputs: Inputs, out: Path) -> dict[str, Any]:
    """Time and memory from the plan to the first shard, with all chunks scanned before; planning is included."""
    from preprocess.pack import pack

    out.mkdir(parents=True)
    _pretend_scanned(_plan(inputs), out)

    def progress(phase: str, done: int, total: int) -> None:
        if phase == "shards":
            raise _Stopped

    before = peak_mb()
    with Watch() as watch:
        plan = _plan(inputs)
        with contextlib.suppress(_Stopped):
            pack(plan, out, progress)
            raise AssertionError("packing ended without gathering")
    found = watch.found()
    return {**found, "tiles": plan.tiles, "bytes_a_tile": (found["driver_mb"] - before) * 1e6 / plan.tiles}


def _pretend_scanned(plan: Any, out: Path) -> None:
    """Spill files of every chunk: the first one is scanned, the others get its frames and tiles of their own hash."""
    from preprocess import spill, workfolder
    from preprocess.pack import pack

    with contextlib.suppress(_Stopped):
        pack(plan, out, lambda *progress: None, open_engine=_OneChunk)
    folder = workfolder.folder_of_last_run(out / workfolder.WORK) / "spill"
    frames, rows, commit = spill.spill_paths(folder, 0)
    table, tree = np.load(rows), json.loads(commit.read_bytes())
    assert len(table) == plan.tasks[0].chunks[0].tiles, "every tile is kept"
    rng, number = np.random.default_rng(0), 0
    for task in plan.tasks:
        for chunk in task.chunks:
            frames = _chunk(folder, number, frames, table[: chunk.tiles], rng)
            text = {**tree, "number": number, "scene_id": task.scene.scene_id, "kept": chunk.tiles}
            spill.spill_paths(folder, number)[2].write_text(json.dumps(text))
            number += 1


def _chunk(folder: Path, number: int, frames: Path, table: np.ndarray, rng: np.random.Generator) -> Path:
    """Frames and table of a chunk; returns the frames that the next one shares."""
    from preprocess import spill

    own, rows, _ = spill.spill_paths(folder, number)
    if own != frames:
        os.link(frames, own)
        if number % LINKS == 0:
            own.unlink()
            own.write_bytes(frames.read_bytes())
            frames = own
    table["hash"] = np.sort(rng.integers(0, 2**64, len(table), np.uint64, endpoint=False))
    np.save(rows, table)
    return frames
