"""What ``tiles.parquet`` says of a tile beyond its place in a shard, as bytes that travel behind its frame.

Scanning knows all of it already; taking it out of records again would cost more than writing it down. For records
alone, as in datasets of other versions, the same facts are found with footprints by their transform and no quality.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from geokr.records import FurtherLabels, Record
from preprocess import footprints
from preprocess.coordinates import WGS84, transform_points
from preprocess.errors import RasterError
from preprocess.grid import Grid

LAYOUT = 2  # of the bytes below; a run cut short by a version with another begins anew
QUALITY = ("valid_pixels", "dark_share", "bright_share", "contrast", "brightness")
UNKNOWN = (np.nan,) * len(QUALITY)


Further = tuple[tuple[str, int], ...]  # further products by name, and how many classes each has


def further(classes: Mapping[str, Sequence[object]]) -> Further:
    """classes: of further products, by name."""
    return tuple((name, len(classes[name])) for name in sorted(classes))


@lru_cache
def row_dtype(classes: int, also: Further = ()) -> np.dtype:
    """The fixed part of a tile's facts; under ``further`` a field for each further product."""
    return np.dtype(
        [
            ("ring", "<f8", (footprints.RING, 2)),
            ("lonlat", "<f4", (2,)),
            ("quality", "<f4", (len(QUALITY),)),
            *_labels(classes),
            ("further", [(name, _labels(count)) for name, count in also]),
        ]
    )


def _labels(classes: int) -> list[tuple]:
    return [("valid_fraction", "<f4"), ("label_gap_years", "<f4"), ("fractions", "<f4", (classes,))]


def _fill(rows: np.ndarray, records: Sequence[Record]) -> None:
    """What records say by themselves of their places and labels."""
    rows["lonlat"] = [record.lonlat for record in records]
    _fill_labels(rows, records)
    for name in rows["further"].dtype.names or ():
        _fill_labels(rows["further"][name], [record.also[name] for record in records])


def _fill_labels(rows: np.ndarray, labels: Sequence[Record | FurtherLabels]) -> None:
    rows["valid_fraction"] = [one.valid_fraction for one in labels]
    rows["label_gap_years"] = [np.nan if one.label_gap_years is None else one.label_gap_years for one in labels]
    rows["fractions"] = [one.fractions for one in labels]


@dataclass(frozen=True, slots=True, eq=False)
class Facts:
    """Of some tiles: rows of :func:`row_dtype`, and of each (tile id, scene id, date)."""

    rows: np.ndarray
    texts: list[tuple[str, str, str]]


def pack_facts(records: Sequence[Record], rings_TR2: np.ndarray, quality: Sequence[Sequence[float]]) -> list[bytes]:
    """Facts of each of some tiles of one scene. quality: in the order of QUALITY, NaN where it is not known."""
    if not records:
        return []
    also = further({name: labels.fractions for name, labels in records[0].also.items()})  # type: ignore[arg-type]
    rows = np.empty(len(records), row_dtype(len(records[0].fractions), also))
    rows["ring"], rows["quality"] = rings_TR2, quality
    _fill(rows, records)
    data, size = rows.tobytes(), rows.itemsize
    return [
        data[t * size : (t + 1) * size] + "\0".join((record.tile_id, record.scene_id, record.date)).encode()
        for t, record in enumerate(records)
    ]


def unpack_facts(blobs: Sequence[bytes], classes: int, also: Further = ()) -> Facts:
    dtype = row_dtype(classes, also)
    rows = np.frombuffer(b"".join(blob[: dtype.itemsize] for blob in blobs), dtype)
    texts = [blob[dtype.itemsize :].decode().split("\0") for blob in blobs]
    return Facts(rows, [(tile_id, scene_id, date) for tile_id, scene_id, date in texts])


def facts_of_records(records: Sequence[Record], classes: int, also: Further = ()) -> Facts:
    """The facts that records alone give."""
    rows = np.empty(len(records), row_dtype(classes, also))
    for crs in {record.crs for record in records}:
        chosen = [i for i, record in enumerate(records) if record.crs == crs]
        xy = np.array([_ring_in_crs(records[i]) for i in chosen])
        try:
            rows["ring"][chosen] = np.stack(transform_points(crs, WGS84, xy[..., 0], xy[..., 1]), axis=-1)
        except RasterError:  # a CRS of its own, without a way to the Earth
            rows["ring"][chosen] = np.nan
    rows["quality"] = UNKNOWN
    _fill(rows, records)
    return Facts(rows, [(record.tile_id, record.scene_id, record.date) for record in records])


def _ring_in_crs(record: Record) -> np.ndarray:
    height, width, _ = record.shape
    steps = np.arange(footprints.SIDE + 1) / footprints.SIDE
    columns, rows = np.meshgrid(width * steps, height * steps)
    return footprints.ring_of(*Grid(width, height, record.transform).xy(columns, rows))
