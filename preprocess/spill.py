"""What a chunk leaves on the disk: its kept tiles' frames in hash order, each with the tile's facts behind it, a table
of them, and a commit.

The commit is written last: a chunk without one is scanned again.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from geokr.records import Record, encode_record, frame
from preprocess import blocks, cell_kernels, shards
from preprocess.cells import Cells
from preprocess.image_codecs import encode_image
from preprocess.options import PackOptions
from preprocess.stages import Clock

# One row of a chunk's table: where a tile's frame lies in the spill file, how many bytes of facts follow it
# (preprocess.tile_facts), and its place in the global order.
TABLE = np.dtype([("hash", "<u8"), ("offset", "<u8"), ("length", "<u4"), ("facts", "<u2"), ("split", "u1")])
BATCH = 8  # tiles encoded before they are written: few enough to stay in a cache


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """A tile that stays: number t of its chunk.

    side: blocks.TRAIN or VAL. record: all but its image, which is made of pixels [H, W, C]. facts: for tiles.parquet.
    """

    t: int
    side: int
    record: Record
    pixels: np.ndarray
    facts: bytes


def band_sums(pixels_HWC: np.ndarray, cells: Cells) -> np.ndarray:
    """Sum and sum of squares of each band of each tile, [tiles, 2, C]: int64 for integer pixels, else float64."""
    kind, size = pixels_HWC.dtype.kind, pixels_HWC.dtype.itemsize
    wide = np.float64 if kind == "f" else np.uint32 if size == 1 else np.int64  # holds a tile's column of squares
    _, width, bands = pixels_HWC.shape
    sums = cells.zeros(2 * bands, np.float64 if kind == "f" else np.int64)
    column, squares = np.empty((2, width * bands), wide)
    cell_kernels.band_sums(sums, pixels_HWC, cells.down.spans, cells.across.spans, column, squares)
    return cells.tiles(sums).reshape(-1, 2, bands)


def tile_hash(seed: int, tile_id: str) -> int:
    """Place of a tile in the global order, uint64; a function of nothing but seed and tile."""
    return int.from_bytes(hashlib.blake2b(f"tile {seed} {tile_id}".encode(), digest_size=8).digest(), "little")


def spill_paths(folder: str | Path, number: int) -> tuple[Path, Path, Path]:
    """(frames, table, commit) of a chunk."""
    base = Path(folder)
    return base / f"{number:08d}.frames", base / f"{number:08d}.npy", base / f"{number:08d}.json"


def spill(
    folder: str,
    number: int,
    scene_id: str,
    options: PackOptions,
    tiles: Sequence[Kept],
    sums: np.ndarray,
    rejected: Mapping[str, int],
    clock: Clock,
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Encodes a chunk's tiles one after the other, writes them and commits them; returns the commit's content.

    sums: [chunk's tiles, 2, C] of pixels and their squares. facts: what else the commit is to say.
    """
    frames_path, table_path, commit_path = spill_paths(folder, number)
    places = [tile_hash(options.seed, tile.record.tile_id) for tile in tiles]
    order = sorted(range(len(tiles)), key=lambda t: (places[t], tiles[t].record.tile_id))
    table = np.zeros(len(order), TABLE)
    with clock("spill"), shards.whole_file(frames_path) as file:
        writer = shards.EarlyWriter(file)
        for first in range(0, len(order), BATCH):
            some = [tiles[t] for t in order[first : first + BATCH]]
            with clock("encode"):
                images = [encode_image(tile.pixels, options) for tile in some]
            with clock("record"):
                made = [encode_record(tile.record, image) for tile, image in zip(some, images, strict=True)]
                frames = [frame(payload, shards.crc32c) for payload in made]
            for i, (tile, data) in enumerate(zip(some, frames, strict=True), first):
                table[i] = (places[order[i]], writer.at, len(data), len(tile.facts), tile.side)
                writer.write(data)
                writer.write(tile.facts)
    with clock("spill"), shards.whole_file(table_path) as file:
        np.save(file, table)
    commit = {
        "number": number,
        "scene_id": scene_id,
        "bytes": writer.at,
        "kept": len(tiles),
        "rejected": dict(rejected),
        "splits": [_sums([tile for tile in tiles if tile.side == side], sums) for side in (blocks.TRAIN, blocks.VAL)],
        "stages": clock.times,
        **(facts or {}),
    }
    shards.write_whole(commit_path, json.dumps(commit).encode())
    return commit


def _sums(tiles: Sequence[Kept], sums: np.ndarray) -> dict[str, Any]:
    """Totals over tiles of one split: tiles, pixels, band sums and sums of squares, and sums of fractions."""
    if not tiles:
        return {"tiles": 0}
    total = sums[[tile.t for tile in tiles]].astype(object).sum(axis=0)  # Python's integers have no limit
    return {
        "tiles": len(tiles),
        "pixels": sum(tile.record.shape[0] * tile.record.shape[1] for tile in tiles),
        "sum": total[0].tolist(),
        "squares": total[1].tolist(),
        "fractions": np.sum([tile.record.fractions.astype(np.float64) for tile in tiles], axis=0).tolist(),
        "also": {
            name: np.sum([tile.record.also[name].fractions.astype(np.float64) for tile in tiles], axis=0).tolist()
            for name in tiles[0].record.also
        },
    }
