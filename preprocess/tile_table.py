"""``tiles.parquet``: one row a tile, as GeoParquet 1.1, so that QGIS, geopandas and DuckDB show what a dataset holds.

It is made from parts, one a shard, that gathering leaves in ``.work``; shards without one are read again. Row groups
hold many shards, and the driver holds one row group at a time.
"""

import bisect
import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import date
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from geokr import manifests, records
from geokr.manifests import Manifest, Shard, shard_digests
from preprocess import footprints, shards
from preprocess.tile_facts import QUALITY, Facts, facts_of_records, further

NAME = "tiles.parquet"
PARTS = "tiles"  # folder of the parts in .work
ROW_GROUP = 1 << 16  # rows; some 20 MB in memory, and few enough groups for any number of tiles
BATCH = 256  # records read at a time where a shard has no part

_BBOX = pa.struct([(name, pa.float64()) for name in ("xmin", "ymin", "xmax", "ymax")])
_BEFORE = (
    ("tile_id", pa.string()),
    ("scene_id", pa.string()),
    ("split", pa.string()),
    ("date", pa.date32()),
    ("lon", pa.float64()),
    ("lat", pa.float64()),
    ("dominant", pa.string()),
    ("dominant_share", pa.float32()),
    ("valid_fraction", pa.float32()),
    ("label_gap_years", pa.float32()),
    *((name, pa.float32()) for name in QUALITY),
    ("shard", pa.string()),
    ("record", pa.int64()),
    ("offset", pa.int64()),
    ("bytes", pa.int64()),
)
Classes = Mapping[str, Sequence[str]]  # names of further products' classes, by product
_AFTER = (("bbox", _BBOX), ("geometry", pa.binary()))


def class_columns(names: Sequence[str]) -> list[str]:
    """The columns of classes: their names, behind ``class_`` where another column has that name, and then with ``_``
    behind it where a class has that one."""
    others = {name for name, _ in (*_BEFORE, *_AFTER)}
    taken, found = others | set(names), list[str]()
    for name in names:
        column = name
        if name in others:
            column = f"class_{name}"
            while column in taken:
                column += "_"
            taken.add(column)
        found.append(column)
    return found


def further_columns(names: Sequence[str], also: Classes) -> dict[str, list[str]]:
    """The columns of each further product, its name before each: valid fraction, gap to its year, classes. names: of
    the first product's classes. A name that is taken gets ``_`` behind it."""
    taken = {name for name, _ in (*_BEFORE, *_AFTER)} | set(class_columns(names))
    found: dict[str, list[str]] = {}
    for product in sorted(also):
        found[product] = []
        for name in ("valid_fraction", "label_gap_years", *also[product]):
            column = f"{product}_{name}"
            while column in taken:
                column += "_"
            taken.add(column)
            found[product].append(column)
    return found


def schema(names: Sequence[str], also: Classes = MappingProxyType({})) -> pa.Schema:
    """names: of the classes. also: of further products' classes."""
    columns = [*class_columns(names), *(name for part in further_columns(names, also).values() for name in part)]
    return pa.schema([*_BEFORE, *((name, pa.float32()) for name in columns), *_AFTER])


def make_table(
    facts: Facts,
    split: str,
    shard: str,
    first: int,
    offsets: np.ndarray,
    sizes: np.ndarray,
    names: Sequence[str],
    also: Classes = MappingProxyType({}),
) -> pa.Table:
    """Rows of tiles that follow one another in a shard. first: record number, in the shard, of the first of them.

    offsets, sizes: int64 of their frames in the shard. names, also: as in :func:`schema`.
    """
    rows, count = facts.rows, len(facts.rows)
    geometry, bounds = footprints.wkb(rows["ring"])
    best = rows["fractions"].argmax(axis=1)
    tile_ids, scene_ids, dates = zip(*facts.texts, strict=True)
    known = {text: _day(text) for text in set(dates)}
    quality = [pa.array(column, from_pandas=True) for column in np.ascontiguousarray(rows["quality"].T)]
    before = [
        pa.array(tile_ids),
        pa.array(scene_ids),
        pa.array([split] * count),
        pa.array([known[text] for text in dates], pa.date32()),
        pa.array(rows["lonlat"][:, 0].astype(np.float64)),
        pa.array(rows["lonlat"][:, 1].astype(np.float64)),
        pa.array(np.array(names, object)[best], pa.string()),
        pa.array(rows["fractions"][np.arange(count), best]),
        pa.array(np.ascontiguousarray(rows["valid_fraction"])),
        pa.array(np.ascontiguousarray(rows["label_gap_years"]), from_pandas=True),
        *quality,
        pa.array([shard] * count),
        pa.array(np.arange(first, first + count)),
        pa.array(np.asarray(offsets, np.int64)),
        pa.array(np.asarray(sizes, np.int64)),
    ]
    shares = _shares(rows)
    for product in sorted(also):
        part = rows["further"][product]
        gaps = pa.array(np.ascontiguousarray(part["label_gap_years"]), from_pandas=True)
        shares += [pa.array(np.ascontiguousarray(part["valid_fraction"])), gaps, *_shares(part)]
    bbox = pa.StructArray.from_arrays(
        [pa.array(c, from_pandas=True) for c in np.ascontiguousarray(bounds.T)], fields=list(_BBOX)
    )
    return pa.Table.from_arrays([*before, *shares, bbox, pa.array(geometry, pa.binary())], schema=schema(names, also))


def _shares(rows: np.ndarray) -> list[pa.Array]:
    return [pa.array(column) for column in np.ascontiguousarray(rows["fractions"].T)]


def _day(text: str) -> date | None:
    try:
        return date.fromisoformat(text)
    except ValueError:  # empty, or what only a program that is not this one would write
        return None


# ------------------------------------------------------------------------------------------------------- parts


def part_path(folder: Path, shard: str) -> Path:
    return folder / f"{shard}.arrow"


def write_part(folder: Path, table: pa.Table, shard: str) -> None:
    """Leaves a shard's rows where :func:`write` finds them."""
    folder.mkdir(exist_ok=True)
    with shards.whole_file(part_path(folder, shard)) as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def _read_part(folder: Path, shard: Shard, wanted: pa.Schema) -> pa.Table | None:
    try:
        with pa.ipc.open_file(part_path(folder, shard.name)) as file:
            table = file.read_all()
    except (OSError, pa.ArrowInvalid):
        return None
    return table if table.schema.equals(wanted) and table.num_rows == shard.records else None


def rows_of_shard(folder: Path, shard: Shard, names: Sequence[str], also: Classes) -> Iterator[pa.Table]:
    """A shard's rows from its records. Raises RecordError."""
    spans = manifests.open_index(folder, shard)
    split = shard.name.split("-")[0]
    frames = shards.read_frames(folder / shard.name)
    for first in range(0, shard.records, BATCH):
        part = spans[first : first + BATCH]
        read = [records.decode_record(next(frames)[1], f"{shard.name}: record {first + i}") for i in range(len(part))]
        facts = facts_of_records(read, len(names), further(also))
        yield make_table(facts, split, shard.name, first, part[:, 0], part[:, 1], names, also)


# ------------------------------------------------------------------------------------------------- the whole file


def classes_of(manifest: Manifest) -> dict[str, tuple[str, ...]]:
    """Names of the classes of further products, by product."""
    return {name: tuple(entry.name for entry in info.classes) for name, info in manifest.products.items()}


def shards_of(manifest: Manifest) -> list[Shard]:
    return [shard for name in records.SPLITS for shard in manifest.split(name).shards]


def _said_about(path: Path) -> dict[str, Any]:
    """What a tiles.parquet says of its dataset (see :func:`_about`); empty if it is none or damaged."""
    try:
        return dict(json.loads((pq.read_metadata(path).metadata or {}).get(b"geokr", b"{}")))
    except (OSError, ValueError, pa.ArrowException):
        return {}


def held_shards(path: Path) -> dict[str, str]:
    """The shards that a tiles.parquet was made from and their hashes' beginnings; empty if it is none or damaged."""
    return dict(_said_about(path).get("shards", {}))


def is_current(out: Path, manifest: Manifest) -> bool:
    """Whether the folder's tiles.parquet is that of this dataset, which may have grown by scenes without a tile."""
    said = _said_about(out / NAME)
    same_shards = said.get("shards", {}) == shard_digests(shards_of(manifest))
    return same_shards and said.get("manifest_sha256") == _digest(manifest)


def _digest(manifest: Manifest) -> str:
    return hashlib.sha256(manifests.dump_manifest(manifest)).hexdigest()


def write(
    out: Path, manifest: Manifest, parts: Path, scratch: Path | None, progress: Callable[[int, int], None]
) -> None:
    """Writes ``out/tiles.parquet``, in the order of the manifest's shards. parts: folder of what gathering left.
    scratch: for the unfinished file.

    What an older tiles.parquet says of shards that are still there is kept. Where its version knew fewer columns, the
    records are read again and its quality numbers are kept. Raises OSError, RecordError.
    """
    names, also = [entry.name for entry in manifest.classes], classes_of(manifest)
    listed, wanted = shards_of(manifest), schema(names, also)
    old = held_shards(out / NAME)
    kept, older = {name for name, digest in shard_digests(listed).items() if old.get(name) == digest}, _Older()
    if kept and pq.read_schema(out / NAME).names != wanted.names:
        older, kept = _Older(out / NAME, kept), set()
    done, total = 0, sum(shard.records for shard in listed)
    with (
        _Kept(out / NAME, kept, wanted) as held,
        shards.whole_file(out / NAME, scratch) as file,
        _Writer(file, wanted) as writer,
    ):
        for shard in listed:
            if shard.name in kept:
                tables = held.rows(shard)
            elif (part := _read_part(parts, shard, wanted)) is not None:
                tables = iter([part])
            else:
                tables = older.with_quality(shard.name, rows_of_shard(out, shard, names, also))
            for table in tables:
                writer.add(table)
                done += table.num_rows
                progress(done, total)
        writer.close(manifest)


class _Older:
    """The quality numbers, which records do not hold, of the tiles of an older table: 20 bytes a tile.

    kept: the shards that are still those it was made from.
    """

    def __init__(self, path: Path | None = None, kept: Collection[str] = ()) -> None:
        self._first: dict[str, int] = {}  # row of each shard's first record; the others follow in their order
        if path is not None:
            table = pq.read_table(path, columns=["shard", "record", *QUALITY])
            rows = np.flatnonzero(table["record"].to_numpy() == 0)
            names = table["shard"].take(pa.array(rows)).to_pylist()
            self._first = {name: row for name, row in zip(names, rows.tolist(), strict=True) if name in kept}
            self._columns = table.select(QUALITY)

    def with_quality(self, shard: str, tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
        """Rows of a shard, one table after another; with the numbers, where the older table has this shard."""
        at = self._first.get(shard)
        for table in tables:
            if at is not None:
                for name in QUALITY:
                    place = table.schema.get_field_index(name)
                    known = self._columns[name].slice(at, table.num_rows).cast(pa.float32())
                    table = table.set_column(place, table.schema.field(place), known)
                at += table.num_rows
            yield table


class _Kept:
    """Rows of an older table, shard by shard in any order; one of its row groups is held at a time.

    kept: the shards that are still those it was made from; without one the table need not be there.
    """

    def __init__(self, path: Path, kept: Collection[str], wanted: pa.Schema) -> None:
        self._file = pq.ParquetFile(path) if kept else None
        self._wanted, self._held = wanted, (-1, pa.table({}))
        self._ends: list[int] = []  # of row groups, in rows of the table
        self._first: dict[str, int] = {}  # row of each shard's first record; the others follow in their order
        for group in range(self._file.num_row_groups if self._file else 0):
            self._look_at(group)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()

    def _look_at(self, group: int) -> None:
        assert self._file is not None
        table = self._file.read_row_group(group, columns=["shard", "record"])
        begin = self._ends[-1] if self._ends else 0
        rows = np.flatnonzero(table["record"].to_numpy() == 0)
        names = table["shard"].take(pa.array(rows)).to_pylist()
        self._first |= {name: begin + row for name, row in zip(names, rows.tolist(), strict=True)}
        self._ends.append(begin + table.num_rows)

    def rows(self, shard: Shard) -> Iterator[pa.Table]:
        at, end = self._first[shard.name], self._first[shard.name] + shard.records
        while at < end:
            group = bisect.bisect_right(self._ends, at)
            begin = self._ends[group - 1] if group else 0
            count = min(end, self._ends[group]) - at
            yield self._group(group).slice(at - begin, count)
            at += count

    def _group(self, number: int) -> pa.Table:
        assert self._file is not None
        if self._held[0] != number:
            self._held = number, self._file.read_row_group(number).cast(self._wanted)
        return self._held[1]


class _Writer:
    """Rows to row groups, and what GeoParquet's metadata say of all of them."""

    def __init__(self, file: Any, wanted: pa.Schema) -> None:
        self.waiting, self.rows = [], 0
        self.bounds = np.array([np.inf, np.inf, -np.inf, -np.inf])
        self.kinds: set[str] = set()
        self.file = pq.ParquetWriter(
            file, wanted, compression="zstd", write_page_index=True, store_schema=False,
            use_dictionary=["scene_id", "split", "date", "dominant", "shard"],  # type: ignore[arg-type]
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(OSError, pa.ArrowException):  # after an error: nothing but to let go of the file
            self.file.close()

    def add(self, table: pa.Table) -> None:
        while table.num_rows:
            room = ROW_GROUP - self.rows
            self.waiting.append(table.slice(0, room))
            self.rows += min(room, table.num_rows)
            table = table.slice(room)
            if self.rows == ROW_GROUP:
                self._flush()

    def _flush(self) -> None:
        table = pa.concat_tables(self.waiting).combine_chunks()
        bbox = table["bbox"].combine_chunks()
        for i, (field, pick) in enumerate(zip(bbox.flatten(), (min, min, max, max), strict=True)):
            extreme = pc.call_function("min_max", [field])[
                "min" if pick is min else "max"
            ].as_py()  # skips unknown ground
            self.bounds[i] = self.bounds[i] if extreme is None else pick(self.bounds[i], extreme)
        kinds = {data[1] for data in table["geometry"].to_pylist() if data is not None}
        self.kinds |= {{3: "Polygon", 6: "MultiPolygon"}[kind] for kind in kinds}
        self.file.write_table(table, row_group_size=ROW_GROUP)
        self.waiting, self.rows = [], 0

    def close(self, manifest: Manifest) -> None:
        if self.rows:
            self._flush()
        self.file.add_key_value_metadata({"geo": json.dumps(self._geo()), "geokr": json.dumps(_about(manifest))})
        self.file.close()

    def _geo(self) -> dict[str, Any]:
        column = {
            "encoding": "WKB",
            "geometry_types": sorted(self.kinds),  # without "crs": OGC:CRS84, longitude and latitude
            "orientation": "counterclockwise",
            "edges": "planar",
            **({"bbox": self.bounds.tolist()} if np.isfinite(self.bounds).all() else {}),
            "covering": {"bbox": {name: ["bbox", name] for name in ("xmin", "ymin", "xmax", "ymax")}},
        }
        return {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": column}}


def _about(manifest: Manifest) -> dict[str, Any]:
    return {
        "product": manifest.product,
        "classes": [{"name": entry.name, "column": column, "rgb": list(entry.rgb)} for entry, column in zip(
            manifest.classes, class_columns([entry.name for entry in manifest.classes]), strict=True)],
        "products": further_columns([entry.name for entry in manifest.classes], classes_of(manifest)),
        "manifest_sha256": _digest(manifest),
        "shards": shard_digests(shards_of(manifest)),
    }  # fmt: skip
