"""The work of one task, in whatever process: a scene's stretch limits, or one chunk's tiles.

Both are pure functions of the job; a job carries paths and plain data, never handles. What a chunk yields is
spilled to a file of its own in hash order and committed by a small JSON file, so that a job run twice, or cut
short and run again, does no harm.
"""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg

from geokr.landcover import Legend
from geokr.records import Record, encode_record, frame
from preprocess import blocks, kernels, labels, quality, raster, shards
from preprocess.grid import Chunk, Grid
from preprocess.labels import LabelSheet
from preprocess.options import PackOptions
from preprocess.raster import RasterError, Scene

# One row of a chunk's table: where a tile's frame lies in the spill file, and its place in the global order.
TABLE = np.dtype([("hash", "<u8"), ("offset", "<u8"), ("length", "<u4"), ("split", "u1")])
MAX_SAMPLES = 4_000_000
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


def sample_strides(width: int, height: int) -> tuple[int, int]:
    """(columns, rows) between sampled pixels: one pixel in 20, fewer where that would be over MAX_SAMPLES."""
    across, down = 5, 4
    while (width // across) * (height // down) > MAX_SAMPLES:
        across, down = across * 2, down * 2
    return across, down


def stretch_limits(scene: Scene, bands: tuple[int, ...], options: PackOptions) -> np.ndarray:
    """(low, high) of each band, float64 [C, 2], low < high, in the scene's units.

    Percentiles of a regular sample of pixels that have data and whose mean over bands is not 0 (the fill of scenes
    that name no nodata), over all bands together (`joint`, and for previews where the mode is `none`) or each by
    itself (`per_band`). Negative values, such as decibels, are data.
    """
    stretch = options.stretch
    if stretch.limits is not None:
        return np.array(stretch.limits * (len(bands) if len(stretch.limits) == 1 else 1), np.float64)
    sample_NC = _sample(scene, bands)
    if not len(sample_NC):
        return np.tile([0.0, 1.0], (len(bands), 1))
    if stretch.mode == "per_band":
        limits = np.percentile(sample_NC, stretch.percentiles, axis=0).T.astype(np.float64)
    else:
        limits = np.tile(np.percentile(sample_NC, stretch.percentiles).astype(np.float64), (len(bands), 1))
    limits[:, 1] = np.maximum(limits[:, 1], limits[:, 0] + 1e-6)  # a constant scene; its tiles are rejected as flat
    return limits


def _sample(scene: Scene, bands: tuple[int, ...]) -> np.ndarray:
    """Sampled values [N, C] in the scene's dtype, read strip by strip."""
    across, down = sample_strides(scene.grid.width, scene.grid.height)
    row_bytes = scene.grid.width * len(bands) * np.dtype(scene.dtype).itemsize
    strip = max(down, min(512, (64 << 20) // row_bytes) // down * down)
    parts = []
    for top in range(0, scene.grid.height, strip):
        window = (0, top, scene.grid.width, min(strip, scene.grid.height - top))
        pixels, valid = read_valid(scene, bands, window)
        values = pixels[:, ::down, ::across].reshape(len(bands), -1).T
        keep = (valid[::down, ::across].ravel() != 0) & (values.mean(axis=1, dtype=np.float64) != 0)
        parts.append(values[keep])
    return np.concatenate(parts)


def read_valid(
    scene: Scene, bands: tuple[int, ...], window: tuple[int, int, int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels [C, H, W] and validity uint8 [H, W]: 0 by nodata, mask, alpha, NaN or infinity."""
    pixels, mask = raster.read_pixels(scene, bands, window)
    nodata = [scene.nodata[band - 1] for band in bands]
    # a mask or alpha band says which pixels hold data, whatever their values
    has = np.array([value is not None and mask is None for value in nodata])
    # in the pixels' own precision: a tag of -9999.9 is not what a float32 pixel holds
    values = np.array([0.0 if value is None else value for value in nodata], np.float64)
    if pixels.dtype == np.float32:
        values = values.astype(np.float32).astype(np.float64)
    valid = kernels.valid_pixels(pixels, values, has)
    if mask is not None:
        valid &= (mask != 0).astype(np.uint8)
    return pixels, valid


# ------------------------------------------------------------------------------------------------------ chunks


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """A tile that stays. side: blocks.TRAIN or VAL. sums: [2, C] of its pixels and their squares."""

    side: int
    sums: np.ndarray
    record: Record


def band_sums(tile_HWC: np.ndarray) -> np.ndarray:
    """Sum and sum of squares of each band, [2, C]: int64 for integer pixels, else float64."""
    return kernels.float_sums(tile_HWC) if tile_HWC.dtype.kind == "f" else kernels.integer_sums(tile_HWC)


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
    window = job.scene.grid.window(column, row, width, height)
    pixels, valid = read_valid(job.scene, job.bands, job.chunk.window)
    grey = kernels.stretch_to_uint8(pixels, job.limits, valid)
    image = kernels.interleave(pixels, valid) if job.options.stretch.mode == "none" else grey
    origins = job.chunk.origins() - (column, row)
    size = job.chunk.size
    reasons = _judge(grey, valid, origins, size, job.options)
    tile_labels = None
    if any(reason is None for reason in reasons):
        tile_labels = labels.tile_labels(
            window, job.scene.crs, job.sheets, job.subdivisions, valid, origins, size, job.legend
        )
    longitudes, latitudes = footprints(window, job.scene.crs, origins, size)
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
    return _spill(job, tiles, Counter(reason for reason in reasons if reason))


def _judge(
    grey: np.ndarray, valid: np.ndarray, origins: np.ndarray, size: int, options: PackOptions
) -> list[str | None]:
    reasons = []
    for left, top in origins.tolist():
        part = slice(top, top + size), slice(left, left + size)
        histogram = kernels.grey_sum_histogram(grey[part])
        reasons.append(quality.rejection(histogram, grey.shape[2], float(valid[part].mean()), options.quality))
    return reasons


def footprints(window: Grid, crs: str, origins: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Longitudes and latitudes, float64 [tiles, POINTS, POINTS], of a lattice over each tile's footprint."""
    steps = np.linspace(0, size, POINTS)
    columns = origins[:, 0, None, None] + steps[None, None, :]
    rows = origins[:, 1, None, None] + steps[None, :, None]
    return raster.transform_points(crs, labels.WGS84, *window.xy(columns, rows))


def tile_hash(seed: int, tile_id: str) -> int:
    """Place of a tile in the global order, uint64; a function of nothing but seed and tile."""
    return int.from_bytes(hashlib.blake2b(f"tile {seed} {tile_id}".encode(), digest_size=8).digest(), "little")


def _record(
    job: Job,
    tile_HWC: np.ndarray,
    fractions: np.ndarray,
    share: float,
    place: Grid,
    lonlat: tuple[float, float],
    origin: tuple[int, int],
) -> Record:
    return Record(
        image=encode_image(tile_HWC, job.options),
        codec=job.options.tile.codec,
        shape=tile_HWC.shape,  # type: ignore[arg-type]
        dtype=tile_HWC.dtype.name,
        fractions=fractions.astype(np.float32),
        valid_fraction=share,
        lonlat=lonlat,
        transform=place.transform,
        crs=job.scene.crs,
        scene_id=job.scene.scene_id,
        tile_id=f"{job.scene.scene_id}:{origin[0]}:{origin[1]}",
        date=job.scene.date,
    )


def encode_image(tile_HWC: np.ndarray, options: PackOptions) -> bytes:
    """The tile's bytes by ``tile.codec``."""
    if options.tile.codec == "raw":
        return tile_HWC.astype(tile_HWC.dtype.newbyteorder("<"), copy=False).tobytes()
    return simplejpeg.encode_jpeg(
        tile_HWC,
        quality=options.tile.jpeg_quality,
        colorspace="RGB",
        colorsubsampling=options.tile.jpeg_subsampling,
        fastdct=False,  # the accurate transform: the same pixels in every decoder
    )


# ------------------------------------------------------------------------------------------------------- spill


def spill_paths(folder: str | Path, number: int) -> tuple[Path, Path, Path]:
    """(frames, table, commit) of a chunk."""
    base = Path(folder)
    return base / f"{number:08d}.frames", base / f"{number:08d}.npy", base / f"{number:08d}.json"


def _spill(job: Job, tiles: list[Kept], rejected: Counter[str]) -> dict[str, Any]:
    frames_path, table_path, commit_path = spill_paths(job.folder, job.number)
    hashed = sorted(
        ((tile_hash(job.options.seed, tile.record.tile_id), tile.side, tile.record) for tile in tiles),
        key=lambda item: (item[0], item[2].tile_id),
    )
    table = np.zeros(len(hashed), TABLE)
    at = 0
    with shards.whole_file(frames_path) as file:
        for i, (place, side, record) in enumerate(hashed):
            data = frame(encode_record(record), shards.crc32c)
            file.write(data)
            table[i] = (place, at, len(data), side)
            at += len(data)
    with shards.whole_file(table_path) as file:
        np.save(file, table)
    commit = {
        "number": job.number,
        "scene_id": job.scene.scene_id,
        "bytes": at,
        "kept": len(hashed),
        "rejected": dict(rejected),
        "splits": [_sums([tile for tile in tiles if tile.side == side]) for side in (blocks.TRAIN, blocks.VAL)],
    }
    shards.write_whole(commit_path, json.dumps(commit).encode())
    return commit


def _sums(tiles: list[Kept]) -> dict[str, Any]:
    """Totals over tiles of one split: tiles, pixels, band sums and sums of squares, and sums of fractions."""
    if not tiles:
        return {"tiles": 0}
    total = np.sum([tile.sums.astype(object) for tile in tiles], axis=0)  # Python's integers have no limit
    return {
        "tiles": len(tiles),
        "pixels": sum(tile.record.shape[0] * tile.record.shape[1] for tile in tiles),
        "sum": total[0].tolist(),
        "squares": total[1].tolist(),
        "fractions": np.sum([tile.record.fractions.astype(np.float64) for tile in tiles], axis=0).tolist(),
    }
