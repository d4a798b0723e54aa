"""A dry run: what packing would come to, from a plan and a few tiles of a few scenes. Writes nothing that stays."""

import hashlib
import math
import shutil
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from preprocess import engine, masks, report, sampling, scan, scan_tiles
from preprocess.errors import RasterError
from preprocess.grid import Chunk
from preprocess.pixels import read_valid
from preprocess.plan import Plan, SceneTask
from preprocess.precut import Files
from preprocess.stages import Times, add

SCENES = 16  # looked into at most, so that a thousand take as long as a few
PARTS = 32  # of chunks, over all those scenes
ACROSS, DOWN = 4, 2  # tiles of a part
LIMIT_WINDOWS = 9  # of a scene, for its stretch limits
SMALL = 4 << 20  # pixels up to which a scene is sampled for them as packing does: a missed cloud changes every verdict
WINDOW = 256  # their side in pixels
SECONDS = 60.0  # after which no further scene is looked into


@dataclass(slots=True)
class Sums:
    """Over tiles. kept, held_out, rejected (by reason): of them. bytes: of the spill, frames with what follows them.
    busy: seconds that they took."""

    tiles: float = 0
    kept: float = 0
    held_out: float = 0
    bytes: float = 0
    busy: float = 0.0
    rejected: dict[str, float] = field(default_factory=dict)

    def add(self, other: "Sums", factor: float = 1) -> None:
        for name in ("tiles", "kept", "held_out", "bytes", "busy"):
            setattr(self, name, getattr(self, name) + factor * getattr(other, name))
        for reason, count in other.rejected.items():
            self.rejected[reason] = self.rejected.get(reason, 0) + factor * count


@dataclass(slots=True)
class Sampled(Sums):
    """Sums over the tiles that were looked at, and what they stand for.

    whole: the same sums, each scene's in proportion to the tiles that it stands for: a small scene, of which as much is
    looked at as of a large one, must not count as much. times: see preprocess.stages. unread: scenes that could not be
    read, by id. read_pixels: of the tiles.
    """

    whole: Sums = field(default_factory=Sums)
    scenes: int = 0
    read_pixels: int = 0
    times: dict[str, list[float]] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)

    def share(self, count: float) -> float:
        """Of all tiles, as far as the looks tell. count: one of ``whole``."""
        return count / self.whole.tiles if self.whole.tiles else 0.0


def _place(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def sample(plan: Plan) -> Sampled:
    """Looks at tiles of scenes chosen by hash, the same ones every time. Raises LabelError."""
    found, start = Sampled(), time.monotonic()
    chosen = _chosen([task for task in plan.tasks if task.chunks])
    tiles = sum(stands_for for _, stands_for in chosen)
    with tempfile.TemporaryDirectory(prefix="geokr-dry-run-") as folder:
        for number, (task, stands_for) in enumerate(chosen):
            if time.monotonic() - start > SECONDS:
                break
            parts = max(1, math.floor(PARTS * stands_for / tiles + 0.5))
            try:
                _sample_scene(plan, task, parts, folder, found, stands_for, first=number == 0)
                found.scenes += 1
            except RasterError as error:
                found.unread[task.scene.scene_id] = str(error)
    return found


def _chosen(tasks: Sequence[SceneTask]) -> list[tuple[SceneTask, float]]:
    """(scene, tiles that it stands for) of at most SCENES scenes, in the order of a hash. Of more, a scene's chance
    goes by its tiles: points spread evenly over all tiles fall into some scenes, each of which stands for its points'.
    """
    ordered = sorted(tasks, key=lambda task: _place(task.scene.scene_id))
    if len(ordered) <= SCENES:
        return [(task, task.tiles) for task in ordered]
    ends = np.cumsum([task.tiles for task in ordered])
    total = int(ends[-1])
    points = [(n + _place(f"scene {n}") / 2**64) / SCENES * total for n in range(SCENES)]
    hits = Counter(np.searchsorted(ends, points, side="right").tolist())
    return [(ordered[at], count * total / SCENES) for at, count in sorted(hits.items())]


def _sample_scene(
    plan: Plan, task: SceneTask, parts: int, folder: str, found: Sampled, stands_for: float, *, first: bool
) -> None:
    limits = _limits(plan, task)
    jobs = [
        scan.Job(0, task.scene, task.bands, task.covers, part, limits, plan.options, folder)
        for part in _parts(task, parts)
    ]
    if first:  # compiles, and opens what stays open
        _scan(jobs[0])
    own = Sums()
    for job in jobs:
        start = time.perf_counter()
        commit = _scan(job)
        own.add(_sums(job, commit, time.perf_counter() - start))
        if isinstance(job.chunk, Chunk):
            found.read_pixels += job.chunk.window[2] * job.chunk.window[3]
        add(found.times, commit["stages"])
    found.add(own)
    found.whole.add(own, stands_for / own.tiles)


def _scan(job: scan.Job) -> dict[str, Any]:
    return scan_tiles.scan_files(job) if isinstance(job.chunk, Files) else scan.scan_chunk(job)


def _sums(job: scan.Job, commit: dict[str, Any], seconds: float) -> Sums:
    held_out = commit["splits"][1]["tiles"]
    return Sums(job.chunk.tiles, commit["kept"], held_out, commit["bytes"], seconds, commit["rejected"])


def _limits(plan: Plan, task: SceneTask) -> np.ndarray:
    """Stretch limits as packing finds them for a small scene, from a few windows of a large one."""
    stretch, bands = plan.options.stretch, task.bands
    place = task.scene.place
    if stretch.limits is not None or (task.sample is None and place.width * place.height <= SMALL):
        return sampling.stretch_limits(task.scene, bands, plan.options)
    if task.sample is not None:
        few = task.sample.names[:: max(1, len(task.sample.names) // LIMIT_WINDOWS)]
        return scan_tiles.stretch_limits(replace(task.sample, names=few), bands, plan.options)
    parts = []
    for window in _limit_windows(task):
        pixels, valid = read_valid(task.scene, bands, window)
        if task.scene.mask is not None:  # as packing will: clouds would brighten what is white
            valid &= 1 - masks.masked_pixels(task.scene.mask, task.scene.place.window(*window), plan.options.mask)
        values = pixels.reshape(len(bands), -1).T
        parts.append(values[(valid.ravel() != 0) & (values.mean(axis=1) != 0)])
    sample_NC = np.concatenate(parts)
    if not len(sample_NC):
        return np.tile([0.0, 1.0], (len(bands), 1))
    if stretch.mode != "per_band":
        sample_NC = np.repeat(sample_NC.reshape(-1, 1), len(bands), axis=1)
    limits = np.percentile(sample_NC, stretch.percentiles, axis=0).T.astype(np.float64)
    limits[:, 1] = np.maximum(limits[:, 1], limits[:, 0] + 1e-6)
    return limits


def _limit_windows(task: SceneTask) -> list[tuple[int, int, int, int]]:
    """(column, row, width, height) of windows spread over a scene."""
    width, height = task.scene.place.width, task.scene.place.height
    side = math.isqrt(LIMIT_WINDOWS)
    wide, high = min(WINDOW, width), min(WINDOW, height)
    steps = [(i + 0.5) / side for i in range(side)]
    return sorted({(int((width - wide) * x), int((height - high) * y), wide, high) for x in steps for y in steps})


def _one_of(count: int, size: int, text: str) -> int:
    """Where one of the parts of ``size`` begins that ``count`` things fall into, by the hash of a text."""
    return _place(text) % -(-count // size) * size


def _parts(task: SceneTask, wanted: int) -> list[Chunk | Files]:
    """Small chunks cut out of a scene's, spread evenly over its tiles and within that by hash; or a few files. Places
    are multiples of their size, so that no tile is looked at twice."""
    scene_id = task.scene.scene_id
    ends = np.cumsum([chunk.tiles for chunk in task.chunks])
    found: dict[Any, Chunk | Files] = {}
    for n in range(wanted):
        tile = (n + _place(f"{scene_id} {n}") / 2**64) / wanted * ends[-1]
        chunk = task.chunks[min(int(np.searchsorted(ends, tile, side="right")), len(ends) - 1)]
        if isinstance(chunk, Files):
            first = _one_of(len(chunk.names), ACROSS * DOWN, f"{scene_id} {n} file")
            some = slice(first, first + ACROSS * DOWN)
            found[chunk.names[first]] = replace(chunk, names=chunk.names[some], label_names=chunk.label_names[some])
            continue
        columns, rows = chunk.columns, chunk.rows
        left = _one_of(len(columns), ACROSS, f"{scene_id} {n} column")
        top = _one_of(len(rows), DOWN, f"{scene_id} {n} row")
        part = Chunk(columns[left : left + ACROSS], rows[top : top + DOWN], chunk.size)
        found[part.columns[0], part.rows[0]] = part
    return list(found.values())


# ------------------------------------------------------------------------------------------------------- text


@dataclass(frozen=True, slots=True, eq=False)
class Estimate:
    """What a plan would come to. seconds: with ``workers`` processes on this machine."""

    kept: float
    record_bytes: float
    seconds: float
    workers: int


def estimate(plan: Plan, found: Sampled) -> Estimate | None:
    """None where not one tile could be looked at, or not one is kept."""
    if not found.kept:
        return None
    kept = plan.tiles * found.share(found.whole.kept)
    workers = engine.default_workers() if plan.options.workers is None else plan.options.workers
    size = plan.tiles * found.share(found.whole.bytes)
    return Estimate(kept, size, _seconds(plan, found) / max(1, workers), workers)


def _seconds(plan: Plan, found: Sampled) -> float:
    """Of one process: all tiles at the sampled rate, and once more reading every pixel for stretch limits."""
    tiles = plan.tiles * found.share(found.whole.busy)
    if plan.options.stretch.limits is not None or not found.read_pixels:  # tiles that are cut already: a few of them
        return tiles
    pixels = sum(task.scene.place.width * task.scene.place.height for task in plan.tasks if task.chunks)
    read: Times = {"read": (0.0, 0.0), **found.times}
    return tiles + pixels * read["read"][1] / max(1, found.read_pixels)


def describe(plan: Plan, out: Path, found: Sampled) -> str:
    """What a dry run says."""
    guess = estimate(plan, found)
    blocks = [
        "\n".join(["plan", report.table(_plan_rows(plan)), *_class_lines(plan)]),
        f"sample\n{report.table(_sample_rows(plan, found))}",
    ]
    if guess is not None:
        blocks.append("estimate\n" + report.table(_estimate_rows(plan, guess)))
    warnings = _warnings(plan, out, found, guess)
    return "\n\n".join(blocks) + "".join(f"\nwarning: {line}" for line in warnings) + "\n\nnothing was written"


def _class_lines(plan: Plan) -> list[str]:
    lines = []
    for cover in plan.covers:
        names = [entry.name for entry in cover.legend.classes]
        lines.append(f"  {len(names)} classes of {cover.name}:")
        lines += textwrap.wrap(", ".join(names), 110, initial_indent="    ", subsequent_indent="    ")
    return lines


def _plan_rows(plan: Plan) -> list[list[str]]:
    tile = plan.options.tile
    return [
        ["scenes", f"{len(plan.tasks):,}"],
        ["  left out", f"{len(plan.rejected):,}"],
        ["  without land cover", f"{sum(not task.is_covered and task.sample is None for task in plan.tasks):,}"],
        ["land-cover sheets", f"{sum(len(cover.sheets) for cover in plan.covers):,}"],
        ["tile positions", f"{plan.tiles:,}"],
        ["chunks", f"{sum(len(task.chunks) for task in plan.tasks):,}"],
        ["tiles", f"{tile.size} px every {tile.step} px, {tile.codec}, {plan.dtype}"],
        ["bands", ", ".join(f"{band.number} {band.name}" for band in plan.bands)],
    ]


def _sample_rows(plan: Plan, found: Sampled) -> list[list[str]]:
    def row(name: str, count: float, whole: float) -> list[str]:
        share = found.share(whole)
        return [f"  {name}", f"{count:,.0f}", f"{share:.1%}", f"{plan.tiles * share:,.0f}"]

    reasons = sorted(found.rejected.items(), key=lambda item: (-item[1], item[0]))
    return [
        ["tiles looked at", f"{found.tiles:,.0f} of {found.scenes} scenes", "share of all", "of all, about"],
        row("kept", found.kept, found.whole.kept),
        *(row(f"rejected: {reason}", count, found.whole.rejected[reason]) for reason, count in reasons),
    ]


def _estimate_rows(plan: Plan, guess: Estimate) -> list[list[str]]:
    who = f"{guess.workers} process{'es' if guess.workers != 1 else ''}" if guess.workers else "one process"
    return [
        ["records", f"about {guess.kept:,.0f}, {report.size(guess.record_bytes)}"],
        ["spill while packing", f"as much again: {report.size(2 * guess.record_bytes)} of disk at the peak"],
        ["time", f"about {report.span(guess.seconds)} with {who} here"],
    ]


def _warnings(plan: Plan, out: Path, found: Sampled, guess: Estimate | None) -> list[str]:
    said = [f"{message}" for message in found.unread.values()]
    if lacking := [task.scene.scene_id for task in plan.tasks if not task.is_covered and task.sample is None]:
        more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        said.append(f"no land cover under {', '.join(lacking[:3])}{more}: they give no tiles")
    if guess is None:
        return [
            *said,
            "not one of the tiles that were looked at would be kept: see the reasons above, and docs/data.md",
        ]
    if (share := found.share(found.whole.rejected.get("unlabelled", 0))) > 0.1:
        said.append(f"{share:.0%} of the tiles have too little land cover under them")
    wanted, share = plan.options.split.val_fraction, found.whole.held_out / found.whole.kept
    if wanted and not wanted / 2 <= share <= wanted * 1.5:
        said.append(
            f"{share:.0%} of the sampled tiles fell into validation blocks, split.val_fraction asks for {wanted:.0%}; "
            "a small sample can be off, few large blocks are"
        )
    there = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < 2 * guess.record_bytes:
        said.append(f"{there} has {report.size(free)} free, packing needs about {report.size(2 * guess.record_bytes)}")
    return said
