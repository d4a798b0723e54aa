"""What a report's map shows: tiles one by one, or cells of many where there are too many, from ``tiles.parquet``.

Numbers travel to the page as base64 of little-endian arrays; the page's script names the same layouts.
"""

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from preprocess.report_plane import Plane, plane_of
from preprocess.tile_facts import QUALITY
from preprocess.tile_table import class_columns

MOST_TILES = 20_000  # shown one by one; beyond it cells of tiles are
MOST_CELLS = 40_000
FINEST = 2048  # cells along the longer side at most
_POLYGON_BYTES = 93  # WKB of a polygon of four corners
SHARE_STEPS = 250  # a class's share as one byte


@dataclass(frozen=True, slots=True, eq=False)
class MapData:
    """plane, bounds: (x0, y0, x1, y1) of all tiles in metres of the plane. data: for the page."""

    plane: Plane
    bounds: tuple[float, float, float, float]
    data: dict[str, Any]


def encoded(array: np.ndarray) -> str:
    """base64 of an array's little-endian bytes."""
    return base64.b64encode(np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<")).tobytes()).decode()


def map_data(path: Path, names: Sequence[str]) -> MapData:
    """names: of the classes."""
    with pq.ParquetFile(path) as table:
        places = list(_batches(table, ["lon", "lat"]))
        lon = np.concatenate([batch["lon"] for batch in places]).astype(np.float32)
        lat = np.concatenate([batch["lat"] for batch in places]).astype(np.float32)
        plane = plane_of(lon[:: max(1, len(lon) // 100_000)], lat[:: max(1, len(lat) // 100_000)])
        x, y = plane.forward(lon, lat)
        if len(lon) <= MOST_TILES:
            return _single(table, plane, names)
        return _cells(table, plane, x, y, names)


def _batches(table: pq.ParquetFile, columns: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
    for batch in table.iter_batches(batch_size=1 << 16, columns=list(columns)):
        yield {name: batch.column(name).to_numpy(zero_copy_only=False) for name in columns}


def _shares(batch: dict[str, np.ndarray], names: Sequence[str]) -> np.ndarray:
    return np.stack([batch[column] for column in class_columns(names)], axis=1).astype(np.float64)


# ------------------------------------------------------------------------------------------------------ cells


def _cells(table: pq.ParquetFile, plane: Plane, x: np.ndarray, y: np.ndarray, names: Sequence[str]) -> MapData:
    west, south, east, north = float(x.min()), float(y.min()), float(x.max()), float(y.max())
    side = max(east - west, north - south, 1.0) / FINEST
    while True:  # cells twice as wide until they are few
        column, row = ((x - west) // side).astype(np.int64), ((y - south) // side).astype(np.int64)
        keys, cell_of = np.unique(row << 32 | column, return_inverse=True)
        if len(keys) <= MOST_CELLS:
            break
        side *= 2
    counts = np.zeros((len(keys), 2), np.int64)
    sums = np.zeros((len(keys), len(names)))
    at = 0
    for batch in _batches(table, ["split", *class_columns(names)]):
        here = cell_of[at : at + len(batch["split"])]
        at += len(here)
        is_val = (batch["split"] == "val").astype(np.int64)
        np.add.at(counts, (here, is_val), 1)
        shares = _shares(batch, names)
        for k in range(len(names)):
            sums[:, k] += np.bincount(here, shares[:, k], len(keys))
    shares = sums / counts.sum(axis=1, keepdims=True)
    data = {
        "kind": "cells",
        "count": len(keys),
        "side": side,
        "origin": [west, south],
        "columns": encoded((keys & 0xFFFFFFFF).astype(np.uint16)),
        "rows": encoded((keys >> 32).astype(np.uint16)),
        "tiles": encoded(counts.astype(np.uint32)),
        "shares": encoded(np.rint(shares * SHARE_STEPS).astype(np.uint8)),
    }
    bounds = (west, south, west + side * (int(column.max()) + 1), south + side * (int(row.max()) + 1))
    return MapData(plane, bounds, data)


# ------------------------------------------------------------------------------------------------ single tiles


def _single(table: pq.ParquetFile, plane: Plane, names: Sequence[str]) -> MapData:
    rows = table.read()
    column = {name: rows[name].to_numpy() for name in rows.column_names if name not in ("bbox", "geometry")}
    rings = [_polygons(data) for data in rows["geometry"].to_pylist()]
    points = [_in_plane(plane, polygons) for polygons in rings]
    scenes, scene_of = np.unique(column["scene_id"].astype(str), return_inverse=True)
    shards, shard_of = np.unique(column["shard"].astype(str), return_inverse=True)
    dates = [str(day or "") for day in rows["date"].to_pylist()]
    days, day_of = np.unique(dates, return_inverse=True)
    flat = np.concatenate(points) if points else np.zeros((0, 2))
    known = flat[np.isfinite(flat).all(axis=1)]
    if not len(known):
        known = np.stack(plane.forward(column["lon"], column["lat"]), axis=1)
    low, high = known.min(axis=0), known.max(axis=0)
    shares = _shares(column, names)
    data = {
        "kind": "tiles",
        "count": rows.num_rows,
        "origin": low.tolist(),
        "points": encoded((flat - low).astype(np.float32)),
        "ends": encoded(np.cumsum([len(part) for part in points]).astype(np.uint32)),
        "shares": encoded(np.rint(shares * SHARE_STEPS).astype(np.uint8)),
        "split": encoded((column["split"] == "val").astype(np.uint8)),
        "lonlat": encoded(np.stack([column["lon"], column["lat"]], axis=1).astype(np.float32)),
        "valid": encoded(column["valid_fraction"].astype(np.float32)),
        "quality": encoded(np.stack([column[name] for name in QUALITY], axis=1).astype(np.float32)),
        "scene": encoded(scene_of.astype(np.uint32)),
        "scenes": scenes.tolist(),
        "shard": encoded(shard_of.astype(np.uint16)),
        "shards": shards.tolist(),
        "record": encoded(column["record"].astype(np.uint32)),
        "day": encoded(day_of.astype(np.uint16)),
        "days": days.tolist(),
        "ids": _short_ids(column["tile_id"], column["scene_id"]),
    }
    return MapData(plane, (float(low[0]), float(low[1]), float(high[0]), float(high[1])), data)


def _short_ids(tile_ids: np.ndarray, scene_ids: np.ndarray) -> list[str]:
    """Tile ids, with ":" alone in place of a scene's id and the colon after it."""
    return [
        tile_id[len(scene_id) :] if tile_id.startswith(f"{scene_id}:") else tile_id
        for tile_id, scene_id in zip(tile_ids.tolist(), scene_ids.tolist(), strict=True)
    ]


def _polygons(data: bytes | None) -> list[np.ndarray]:
    """Rings of degrees [N, 2] of a WKB Polygon or MultiPolygon as preprocess.footprints writes them."""
    if data is None:
        return []
    if len(data) == _POLYGON_BYTES:
        return [np.frombuffer(data, "<f8", 8, 13).reshape(4, 2)]
    count, at = 1, 0
    if data[1] == 6:
        count, at = int.from_bytes(data[5:9], "little"), 9
    found = []
    for _ in range(count):
        points = int.from_bytes(data[at + 9 : at + 13], "little")
        found.append(np.frombuffer(data, "<f8", 2 * points, at + 13).reshape(-1, 2)[:-1])
        at += 13 + 16 * points
    return found


def _in_plane(plane: Plane, polygons: list[np.ndarray]) -> np.ndarray:
    """Their points in the plane [N, 2], a NaN between polygons."""
    parts: list[np.ndarray] = []
    for ring in polygons:
        if parts:
            parts.append(np.full((1, 2), np.nan))
        # a point on the antimeridian belongs to the side that the polygon lies on
        inner = ring[:, 0] - np.clip(ring[:, 0] - np.median(ring[:, 0]), -1e-9, 1e-9)
        parts.append(np.stack(plane.forward(inner, ring[:, 1]), axis=1))
    return np.concatenate(parts) if parts else np.zeros((0, 2))
