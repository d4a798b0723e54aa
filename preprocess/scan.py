"""The work of one task, in whatever process: a scene's stretch limits, or one chunk's tiles.

Both are pure functions of the job; a job carries paths and plain data, never handles. What a chunk yields is
spilled to a file of its own in hash order and committed by a small JSON file, so that a job run twice, or cut
short and run again, does no harm.
"""

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from geokr.records import FurtherLabels, Record
from preprocess import blocks, cell_kernels, gdal_files, kernels, masks, quality
from preprocess.cells import Cells
from preprocess.coordinates import WGS84
from preprocess.covers import SceneCover, tile_labels
from preprocess.errors import RasterError
from preprocess.footprints import ring_of
from preprocess.grid import Chunk
from preprocess.labels import TileLabels
from preprocess.options import PackOptions
from preprocess.pixels import Room, read_valid, strips
from preprocess.place import Place, ScenePlace
from preprocess.precut import Files
from preprocess.raster import Scene
from preprocess.report_pictures import Rejected, keep_examples
from preprocess.spill import Kept, band_sums, spill
from preprocess.stages import Clock
from preprocess.stretching import Stretch
from preprocess.tile_facts import QUALITY, pack_facts

_thread = threading.local()  # each has a room of its own

POINTS = 5  # a side of the lattice over a tile's footprint; odd, so that its middle is the tile's centre
REASONS = (*quality.REASONS, "cloud", "unlabelled", "straddles_split", "unreadable")


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """One chunk of a scene with all it takes to scan it. limits: float64 [C, 2] stretch limits, scene units.

    chunk: Files where tiles are cut already (preprocess.scan_tiles). tile_id: of a scene that is one tile, its name.
    """

    number: int
    scene: Scene
    bands: tuple[int, ...]
    covers: tuple[SceneCover, ...]
    chunk: Chunk | Files
    limits: np.ndarray
    options: PackOptions
    folder: str
    tile_id: str = ""


def scan_or_report(job: Job) -> dict[str, Any]:
    """:func:`scan_chunk`, or what is wrong with the scene: {number, scene_id, damage}. Nothing is spilled then."""
    try:
        return scan_chunk(job)
    except RasterError as error:
        return {"number": job.number, "scene_id": job.scene.scene_id, "damage": str(error)}


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """A chunk's pixels and the tiles in them.

    cells: how its tiles overlap. image: [H, W, C], what tiles are cut from. grey: its 8-bit preview [H, W, C], often
    the same array. valid: uint8 [H, W], 1 where there is data, else 0. origins: int64 [tiles, 2], first (column, row)
    of each tile in these pixels. reasons: why each tile is rejected, or None; measures: what the quality rules looked
    at. Every step fills in what it finds.
    """

    job: Job
    place: ScenePlace
    cells: Cells
    image: np.ndarray
    grey: np.ndarray
    valid: np.ndarray
    origins: np.ndarray
    reasons: list[str | None]
    measures: list[quality.Measures] = field(default_factory=list)


def scan_chunk(job: Job) -> dict[str, Any]:
    """Reads a chunk, judges and labels its tiles, encodes the kept ones, spills them. Returns the commit's content.

    Raises RasterError for a damaged scene or sheet, LabelError for unknown codes.
    """
    with gdal_files.environment():
        return _scan_chunk(job, Clock())


def _scan_chunk(job: Job, clock: Clock) -> dict[str, Any]:
    view = read_view(job, clock, vars(_thread).setdefault("room", Room()))
    with clock("judge"):
        judge(view)
    with clock("mask"):
        reject_clouds(view)
    with clock("label"):
        found = label(view, job.covers)
    with clock("place"):
        tiles = place_tiles(view, found)
    with clock("examples"):
        leave_examples(view)
    with clock("statistics"):
        sums = band_sums(view.image, view.cells)
    rejected = Counter(reason for reason in view.reasons if reason)
    return spill(job.folder, job.number, job.scene.scene_id, job.options, tiles, sums, rejected, clock)


def leave_examples(view: View) -> None:
    """One tile of each reason for the report, beside the chunk's spill."""
    keep_examples(view.job.folder, view.job.number, view.job.options.seed, rejected_tiles(view))


def rejected_tiles(view: View) -> list[Rejected]:
    """What the report may show of the tiles that were turned away."""
    job, size, found = view.job, view.job.chunk.size, []
    for t, (left, top) in enumerate(view.origins.tolist()):
        if reason := view.reasons[t]:
            grey = view.grey[top : top + size, left : left + size]
            found.append(Rejected(reason, _tile_id(job, left, top), view.measures[t], grey))
    return found


def _tile_id(job: Job, left: int, top: int) -> str:
    """left, top: the tile's first column and row in the chunk."""
    if job.tile_id:
        return job.tile_id
    assert isinstance(job.chunk, Chunk)
    return f"{job.scene.scene_id}:{job.chunk.columns[0] + left}:{job.chunk.rows[0] + top}"


def read_view(job: Job, clock: Clock, room: Room) -> View:
    """The chunk's pixels, read and stretched a strip of rows at a time, so that they pass through the caches once.

    The view is good until the next one of the same room.
    """
    chunk = job.chunk
    assert isinstance(chunk, Chunk)
    column, row, width, height = chunk.window
    stretch, bands = Stretch.of(job.limits, job.scene.dtype), len(job.bands)
    grey, valid = room.array("grey", (height, width, bands), np.uint8), room.array("valid", (height, width), np.uint8)
    image = room.array("image", grey.shape, job.scene.dtype) if job.options.stretch.mode == "none" else grey
    parts = list(strips(row, height, width * bands * np.dtype(job.scene.dtype).itemsize))
    strip = room.array("strip", (max(bottom - top for top, bottom in parts) * width * bands,), job.scene.dtype)
    for top, bottom in parts:
        with clock("read"):
            window = (column, row + top, width, bottom - top)
            pixels, valid[top:bottom] = read_valid(job.scene, job.bands, window, strip)
        with clock("stretch"):
            stretch.into(grey[top:bottom], pixels, valid[top:bottom])
            if image is not grey:
                kernels.interleave(image[top:bottom], pixels, valid[top:bottom])
    place = job.scene.place.window(column, row, width, height)
    origins = chunk.origins() - (column, row)
    return View(job, place, Cells.of(chunk), image, grey, valid, origins, [None] * len(origins))


def shares(view: View, pixels_HW: np.ndarray) -> np.ndarray:
    """The share of each tile's pixels that are 1 (of 0 and 1, uint8), float64 [tiles]."""
    counted = view.cells.zeros(1)
    cell_kernels.count_valid(counted, pixels_HW, view.cells.down.spans, view.cells.across.spans)
    return view.cells.tiles(counted)[:, 0] / view.job.chunk.size**2


def judge(view: View) -> None:
    """The quality rules' verdict on every tile."""
    rules, bands, cells = view.job.options.quality, view.grey.shape[2], view.cells
    histograms = cells.zeros(255 * bands + 1)
    cell_kernels.grey_sum_histograms(histograms, view.grey, cells.down.spans, cells.across.spans)
    for t, (histogram, share) in enumerate(zip(cells.tiles(histograms), shares(view, view.valid), strict=True)):
        found = quality.measures(histogram, bands, float(share), rules)
        view.measures.append(found)
        view.reasons[t] = quality.rejection(found, rules)


def reject_clouds(view: View) -> None:
    """The verdict of the mask beside the scene: too many pixels that have data and are masked."""
    job = view.job
    if job.scene.mask is None or all(reason == "nodata" for reason in view.reasons):
        return
    masked = shares(view, view.valid & masks.masked_pixels(job.scene.mask, view.place, job.options.mask))
    for t in np.flatnonzero(masked > job.options.mask.max_fraction).tolist():
        if view.reasons[t] != "nodata":
            view.reasons[t] = "cloud"  # rather than what clouds look like: too bright, or flat


def label(view: View, covers: Sequence[SceneCover]) -> list[TileLabels]:
    """Class fractions of every tile for each product, or less where not one tile is left."""
    found: list[TileLabels] = []
    for cover in covers:
        if all(view.reasons):
            break
        parts = view.job.options.labels.grid
        found.append(tile_labels(cover, view.place, view.valid, view.cells, view.job.chunk.size, parts))
        for t in np.flatnonzero(found[-1].valid_fraction < cover.min_valid_fraction).tolist():
            view.reasons[t] = view.reasons[t] or "unlabelled"
    return found


def place_tiles(view: View, found: Sequence[TileLabels]) -> list[Kept]:
    """The tiles that stay: those that have a place on the Earth, on one side of the split."""
    job, size = view.job, view.job.chunk.size
    split = job.options.split
    if all(view.reasons):
        return []
    longitudes, latitudes = footprints(view.place, view.origins, size)
    known = np.asarray(np.isfinite(longitudes + latitudes).all(axis=(1, 2)))
    sides = blocks.sides_of(longitudes, latitudes, split.block_m, job.options.seed, split.val_fraction)
    middle = np.s_[:, POINTS // 2, POINTS // 2]
    # a scene in degrees may run beyond 180
    lonlats = np.stack([(longitudes[middle] + 180) % 360 - 180, latitudes[middle]], axis=1).tolist()
    chosen, records, images = [], [], []
    for t, (left, top) in enumerate(view.origins.tolist()):
        if view.reasons[t]:
            continue
        if not known[t] or sides[t] == blocks.BOTH:
            view.reasons[t] = "straddles_split" if known[t] else "unlabelled"
            continue
        images.append(view.image[top : top + size, left : left + size])
        place = view.place.window(left, top, size, size)
        records.append(
            _record(job, images[-1], [labels_of(part, t) for part in found], place, tuple(lonlats[t]), (left, top))
        )
        chosen.append(t)
    measured = [view.measures[t][: len(QUALITY)] for t in chosen]
    facts = pack_facts(records, ring_of(longitudes[chosen], latitudes[chosen]), measured)
    made = zip(chosen, records, images, facts, strict=True)
    return [Kept(t, sides[t], record, pixels_HWC, blob) for t, record, pixels_HWC, blob in made]


def labels_of(found: TileLabels, t: int) -> FurtherLabels:
    """A tile's labels by one product as records hold them."""
    grid = None if found.grid is None else found.grid[t]
    return FurtherLabels(found.fractions[t].astype(np.float32), float(found.valid_fraction[t]), grid=grid)


def footprints(window: Place, origins: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Longitudes and latitudes, float64 [tiles, POINTS, POINTS], of a lattice over each tile's footprint."""
    steps = np.linspace(0, size, POINTS)
    columns = origins[:, 0, None, None] + steps[None, None, :]
    rows = origins[:, 1, None, None] + steps[None, :, None]
    return window.points(WGS84, *np.broadcast_arrays(columns, rows))


def _record(
    job: Job,
    pixels_HWC: np.ndarray,
    found: Sequence[FurtherLabels],
    place: ScenePlace,
    lonlat: tuple[float, float],
    origin: tuple[int, int],
) -> Record:
    """What a record says of a tile; its image is still empty.

    found: by each product. origin: first (column, row) in the chunk.
    """
    transform, crs = place.georeference()
    return Record(
        image=b"",
        codec=job.options.tile.codec,
        shape=pixels_HWC.shape,  # type: ignore[arg-type]
        dtype=pixels_HWC.dtype.name,
        fractions=found[0].fractions,
        valid_fraction=found[0].valid_fraction,
        grid=found[0].grid,
        lonlat=lonlat,
        transform=transform,
        crs=crs,
        scene_id=job.scene.scene_id,
        tile_id=_tile_id(job, *origin),
        date=job.scene.date,
        label_gap_years=job.covers[0].gap_years,
        also={
            cover.name: replace(labels, label_gap_years=cover.gap_years)
            for cover, labels in zip(job.covers[1:], found[1:], strict=True)
        },
    )
