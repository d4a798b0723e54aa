"""Small pictures for a report: tiles of the dataset, and tiles that were turned away."""

import base64
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import simplejpeg

from geokr import records
from geokr.manifests import Band, Manifest
from geokr.records import Record
from preprocess import shards, spill
from preprocess.image_codecs import decode_image
from preprocess.quality import Measures

SIDE = 128  # pixels at most
SAMPLES = {"train": 18, "val": 6}
EXAMPLES = 6  # of each reason
CHUNKS = 500  # looked into for examples


def thumbnail(pixels_HWC: np.ndarray, side: int = SIDE) -> bytes:
    """JPEG of uint8 [H, W, 1 or 3] or its first band, made smaller by the mean of whole blocks of pixels."""
    height, width, bands = pixels_HWC.shape
    pixels_HWC = pixels_HWC[..., : 3 if bands >= 3 else 1]
    factor = max(1, -(-max(height, width) // side))
    height, width = height // factor * factor, width // factor * factor
    blocks = pixels_HWC[:height, :width].reshape(height // factor, factor, width // factor, factor, -1)
    small = np.ascontiguousarray(blocks.mean(axis=(1, 3)).astype(np.uint8))
    if small.shape[2] == 1:
        return simplejpeg.encode_jpeg(small, quality=85, colorspace="GRAY")
    return simplejpeg.encode_jpeg(small, quality=85, colorspace="RGB", colorsubsampling="444")


def shown_bands(bands: Sequence[Band]) -> list[int]:
    """Which bands stand for red, green and blue: those named so, else the first three, else the first."""
    names = [band.name.lower() for band in bands]
    if all(colour in names for colour in ("red", "green", "blue")):
        return [names.index(colour) for colour in ("red", "green", "blue")]
    return [0, 1, 2] if len(bands) >= 3 else [0]


def as_jpeg(data: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()


def preview(record: Record, bands: Sequence[Band]) -> np.ndarray:
    """uint8 [H, W, 3 or 1] of a record; more than 8 bits go from their 2nd to their 98th percentile."""
    pixels = decode_image(record, "record")[..., shown_bands(bands)]
    if pixels.dtype == np.uint8:
        return pixels
    values = np.nan_to_num(pixels.astype(np.float32))
    low, high = np.percentile(values, (2, 98))
    return (np.clip((values - low) / max(high - low, 1e-6), 0, 1) * 255).astype(np.uint8)


# ---------------------------------------------------------------------------------------------- of the dataset


def samples(out: Path, manifest: Manifest) -> list[dict[str, Any]]:
    """The first tiles of each split, which is any tiles: records lie in the order of a hash."""
    found = []
    for split, wanted in SAMPLES.items():
        for shard in manifest.split(split).shards[:1]:  # type: ignore[arg-type]
            frames = shards.read_frames(out / shard.name)
            for _, (_, payload) in zip(range(wanted), frames, strict=False):
                record = records.decode_record(payload)
                picture = as_jpeg(thumbnail(preview(record, manifest.bands)))
                found.append({"split": split, "record": record, "picture": picture})
    return found


# ------------------------------------------------------------------------------------------------ turned away


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """A tile that was turned away. place: its hash, by which examples are chosen."""

    reason: str
    place: int
    tile_id: str
    measures: Measures
    picture: str


def _path(folder: str | Path, number: int) -> Path:
    return spill.spill_paths(folder, number)[2].with_suffix(".examples")


class Rejected(NamedTuple):
    """A tile that is turned away. preview: uint8 [H, W, C]."""

    reason: str
    tile_id: str
    measures: Measures
    preview: np.ndarray


def keep_examples(folder: str, number: int, seed: int, rejected: Iterable[Rejected]) -> None:
    """Leaves one example of each reason beside a chunk's spill: the tile with the lowest hash."""
    best: dict[str, tuple[int, Rejected]] = {}
    for tile in rejected:
        place = spill.tile_hash(seed, tile.tile_id)
        if tile.reason not in best or place < best[tile.reason][0]:
            best[tile.reason] = place, tile
    if not best:
        return
    kept = [
        {
            "reason": reason,
            "place": place,
            "tile_id": tile_id,
            "measures": measures,
            "picture": as_jpeg(thumbnail(grey)),
        }
        for place, (reason, tile_id, measures, grey) in best.values()
    ]
    shards.write_whole(_path(folder, number), json.dumps(kept).encode())


def examples(folder: Path) -> dict[str, list[Example]]:
    """EXAMPLES tiles of each reason, whatever the order in which chunks were scanned."""
    paths = sorted(folder.glob("*.examples"), key=lambda path: spill.tile_hash(0, path.stem))[:CHUNKS]
    found: dict[str, list[Example]] = {}
    for path in paths:
        try:
            for entry in json.loads(path.read_text()):
                example = Example(**{**entry, "measures": Measures(*entry["measures"])})
                found.setdefault(example.reason, []).append(example)
        except (OSError, ValueError, TypeError, KeyError):
            continue
    return {reason: sorted(those, key=lambda e: (e.place, e.tile_id))[:EXAMPLES] for reason, those in found.items()}
