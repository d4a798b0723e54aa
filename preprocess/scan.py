"""The work of one task, in whatever process: a scene's stretch limits, or one chunk's tiles.

Both are pure functions of the job; a job carries paths and plain data, never handles. What a chunk yields is
spilled to a file of its own in hash order and committed by a small JSON file, so that a job run twice, or cut
short and run again, does no harm.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from geokr.landcover import Legend
from geokr.records import Record
from preprocess import blocks, kernels, labels, quality
from preprocess.coordinates import WGS84
from preprocess.grid import Chunk
from preprocess.image_codecs import encode_image
from preprocess.options import PackOptions
from preprocess.pixels import read_valid
from preprocess.place import Place
from preprocess.raster import RasterError, Scene
from preprocess.sheets import LabelSheet
from preprocess.spill import Kept, band_sums, spill

POINTS = 5  # a side of the lattice over a tile's footprint; odd, so that its middle is the tile's centre
REASONS = (*quality.REASONS, "unlabelled", "straddles_split", "unreadable")


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """One chunk of a scene with all it takes to scan it. limits: float64 [C, 2] stretch limits, scene units."""

    number: int
    scene: Scene
    bands: tuple[int, ...]
    sheets: tuple[LabelSheet, ...]
    subdivisions: tuple[int, int]
    chunk: Chunk
    limits: np.ndarray
    legend: Legend
    options: PackOptions
    folder: str


# ---------------------------------------------------------------------------------------------- stretch limits


# ------------------------------------------------------------------------------------------------------ chunks


def scan_or_report(job: Job) -> dict[str, Any]:
    """:func:`scan_chunk`, or what is wrong with the scene: {number, scene_id, damage}. Nothing is spilled then."""
    try:
        return scan_chunk(job)
    except RasterError as error:
        return {"number": job.number, "scene_id": job.scene.scene_id, "damage": str(error)}


def scan_chunk(job: Job) -> dict[str, Any]:
    """Reads a chunk, judges and labels its tiles, encodes the kept ones, spills them. Returns the commit's content.

    Raises RasterError for a damaged scene or sheet, LabelError for unknown codes.
    """
    column, row, width, height = job.chunk.window
    window = job.scene.place.window(column, row, width, height)
    pixels, valid = read_valid(job.scene, job.bands, job.chunk.window)
    grey = kernels.stretch_to_uint8(pixels, job.limits, valid)
    image = kernels.interleave(pixels, valid) if job.options.stretch.mode == "none" else grey
    origins = job.chunk.origins() - (column, row)
    size = job.chunk.size
    reasons = _judge(grey, valid, origins, size, job.options)
    tile_labels = None
    if any(reason is None for reason in reasons):
        tile_labels = labels.tile_labels(window, job.sheets, job.subdivisions, valid, origins, size, job.legend)
    longitudes, latitudes = footprints(window, origins, size)
    tiles = []
    for t, (left, top) in enumerate(origins.tolist()):
        if reasons[t] is not None or tile_labels is None:
            continue
        share = float(tile_labels.valid_fraction[t])
        if share < job.options.labels.min_valid_fraction or not np.isfinite(longitudes[t] + latitudes[t]).all():
            reasons[t] = "unlabelled"
            continue
        split = job.options.split
        side = blocks.side_of(longitudes[t], latitudes[t], split.block_m, job.options.seed, split.val_fraction)
        if side == blocks.BOTH:
            reasons[t] = "straddles_split"
            continue
        middle = longitudes[t][POINTS // 2, POINTS // 2], latitudes[t][POINTS // 2, POINTS // 2]
        lonlat = ((middle[0] + 180) % 360 - 180, middle[1])  # a scene in degrees may run beyond 180
        place = window.window(left, top, size, size)
        tile_HWC = np.ascontiguousarray(image[top : top + size, left : left + size])
        record = _record(job, tile_HWC, tile_labels.fractions[t], share, place, lonlat, (left + column, top + row))
        tiles.append(Kept(side, band_sums(tile_HWC), record))
    rejected = Counter(reason for reason in reasons if reason)
    return spill(job.folder, job.number, job.scene.scene_id, job.options.seed, tiles, rejected)


def _judge(
    grey: np.ndarray, valid: np.ndarray, origins: np.ndarray, size: int, options: PackOptions
) -> list[str | None]:
    reasons = []
    for left, top in origins.tolist():
        part = slice(top, top + size), slice(left, left + size)
        histogram = kernels.grey_sum_histogram(grey[part])
        reasons.append(quality.rejection(histogram, grey.shape[2], float(valid[part].mean()), options.quality))
    return reasons


def footprints(window: Place, origins: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Longitudes and latitudes, float64 [tiles, POINTS, POINTS], of a lattice over each tile's footprint."""
    steps = np.linspace(0, size, POINTS)
    columns = origins[:, 0, None, None] + steps[None, None, :]
    rows = origins[:, 1, None, None] + steps[None, :, None]
    return window.points(WGS84, *np.broadcast_arrays(columns, rows))


def _record(
    job: Job,
    tile_HWC: np.ndarray,
    fractions: np.ndarray,
    share: float,
    place: Place,
    lonlat: tuple[float, float],
    origin: tuple[int, int],
) -> Record:
    transform, crs = place.georeference()
    return Record(
        image=encode_image(tile_HWC, job.options),
        codec=job.options.tile.codec,
        shape=tile_HWC.shape,  # type: ignore[arg-type]
        dtype=tile_HWC.dtype.name,
        fractions=fractions.astype(np.float32),
        valid_fraction=share,
        lonlat=lonlat,
        transform=transform,
        crs=crs,
        scene_id=job.scene.scene_id,
        tile_id=f"{job.scene.scene_id}:{origin[0]}:{origin[1]}",
        date=job.scene.date,
    )


# ------------------------------------------------------------------------------------------------------- spill
