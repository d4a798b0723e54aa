"""What ``tiles.parquet`` says of a tile beyond its place in a shard, as bytes that travel behind its frame.

Scanning knows all of it already; taking it out of records again would cost more than writing it down. For records
alone, as in datasets of other versions, the same facts are found with footprints by their transform and no quality.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from geokr.records import Record
from preprocess import footprints
from preprocess.coordinates import WGS84, transform_points
from preprocess.errors import RasterError
from preprocess.grid import Grid

QUALITY = ("valid_pixels", "dark_share", "bright_share", "contrast", "brightness")
UNKNOWN = (np.nan,) * len(QUALITY)


@lru_cache
def row_dtype(classes: int) -> np.dtype:
    """The fixed part of a tile's facts."""
    return np.dtype(
        [
            ("ring", "<f8", (footprints.RING, 2)),
            ("lonlat", "<f4", (2,)),
            ("valid_fraction", "<f4"),
            ("quality", "<f4", (len(QUALITY),)),
            ("fractions", "<f4", (classes,)),
        ]
    )


@dataclass(frozen=True, slots=True, eq=False)
class Facts:
    """Of some tiles: rows of :func:`row_dtype`, and of each (tile id, scene id, date)."""

    rows: np.ndarray
    texts: list[tuple[str, str, str]]


def pack_facts(records: Sequence[Record], rings_TR2: np.ndarray, quality: Sequence[Sequence[float]]) -> list[bytes]:
    """Facts of each of some tiles of one scene. quality: in the order of QUALITY, NaN where it is not known."""
    if not records:
        return []
    rows = np.empty(len(records), row_dtype(len(records[0].fractions)))
    rows["ring"], rows["quality"] = rings_TR2, quality
    rows["lonlat"] = [record.lonlat for record in records]
    rows["valid_fraction"] = [record.valid_fraction for record in records]
    rows["fractions"] = [record.fractions for record in records]
    data, size = rows.tobytes(), rows.itemsize
    return [
        data[t * size : (t + 1) * size] + "\0".join((record.tile_id, record.scene_id, record.date)).encode()
        for t, record in enumerate(records)
    ]


def unpack_facts(blobs: Sequence[bytes], classes: int) -> Facts:
    dtype = row_dtype(classes)
    rows = np.frombuffer(b"".join(blob[: dtype.itemsize] for blob in blobs), dtype)
    texts = [blob[dtype.itemsize :].decode().split("\0") for blob in blobs]
    return Facts(rows, [(tile_id, scene_id, date) for tile_id, scene_id, date in texts])


def facts_of_records(records: Sequence[Record], classes: int) -> Facts:
    """The facts that records alone give."""
    rows = np.empty(len(records), row_dtype(classes))
    for crs in {record.crs for record in records}:
        chosen = [i for i, record in enumerate(records) if record.crs == crs]
        xy = np.array([_ring_in_crs(records[i]) for i in chosen])
        try:
            rows["ring"][chosen] = np.stack(transform_points(crs, WGS84, xy[..., 0], xy[..., 1]), axis=-1)
        except RasterError:  # a CRS of its own, without a way to the Earth
            rows["ring"][chosen] = np.nan
    rows["lonlat"] = [record.lonlat for record in records]
    rows["valid_fraction"] = [record.valid_fraction for record in records]
    rows["fractions"] = [record.fractions for record in records]
    rows["quality"] = UNKNOWN
    return Facts(rows, [(record.tile_id, record.scene_id, record.date) for record in records])


def _ring_in_crs(record: Record) -> np.ndarray:
    height, width, _ = record.shape
    steps = np.arange(footprints.SIDE + 1) / footprints.SIDE
    columns, rows = np.meshgrid(width * steps, height * steps)
    return footprints.ring_of(*Grid(width, height, record.transform).xy(columns, rows))
