"""Phase 2: every shard gathers its tiles from the spill files in the global hash order."""

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from geokr import records
from geokr.manifests import Manifest
from geokr.records import RecordError, Split
from preprocess import blocks, shards, spill, tile_table
from preprocess.plan import Plan
from preprocess.stages import Clock
from preprocess.tile_facts import further, unpack_facts
from preprocess.workfolder import PackError


@dataclass(frozen=True, slots=True, eq=False)
class ShardJob:
    """Which frames make a shard, in order: chunk number, offset and length of each, and length of the facts behind it.

    classes: their names. also: those of further products.
    """

    split: Split
    number: int
    chunks: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray
    facts: np.ndarray
    classes: tuple[str, ...]
    also: dict[str, tuple[str, ...]]
    out: str
    work: str

    @property
    def digest(self) -> str:
        """Of its frames, in order: a run that leaves other scenes out has other ones in a shard of the same number."""
        columns = (self.chunks, self.offsets, self.lengths, self.facts)
        return hashlib.sha256(b"".join(np.ascontiguousarray(column).tobytes() for column in columns)).hexdigest()


def gather(job: ShardJob) -> dict[str, Any]:
    """Writes a shard; returns its commit's content: {shard: its entry in the manifest, stages}."""
    out, work, clock = Path(job.out), Path(job.work), Clock()
    facts: list[bytes] = []
    with clock("gather"):
        shard = shards.write_shard(out, job.split, job.number, _frames(job, work / "spill", facts), work)
    with clock("footprints"):
        ends = np.cumsum(job.lengths, dtype=np.int64)
        table = tile_table.make_table(
            unpack_facts(facts, len(job.classes), further(job.also)),
            job.split,
            shard.name,
            0,
            ends - job.lengths,
            job.lengths,
            job.classes,
            job.also,
        )
        tile_table.write_part(work / tile_table.PARTS, table, shard.name)
    entry = {"shard": shard.model_dump(), "stages": clock.times, "rows": job.digest}
    shards.write_whole(work / "shards" / f"{shard.name}.json", json.dumps(entry).encode())
    return entry


def _frames(job: ShardJob, folder: Path, facts: list[bytes]) -> Iterator[bytes]:
    """Frames in the shard's order, each checked again; at most 64 spill files are open at a time.

    facts: gets what lies behind each frame. Raises PackError for a frame that the disk did not keep as it was written,
    and takes its chunk's commit away, so that the same command scans the chunk again.
    """
    opened: OrderedDict[int, tuple[int, Path]] = OrderedDict()
    try:
        columns = (job.chunks.tolist(), job.offsets.tolist(), job.lengths.tolist(), job.facts.tolist())
        for chunk, offset, length, behind in zip(*columns, strict=True):
            if chunk not in opened:
                if len(opened) >= 64:
                    os.close(opened.popitem(last=False)[1][0])
                path = spill.spill_paths(folder, chunk)[0]
                opened[chunk] = os.open(path, os.O_RDONLY), path
            opened.move_to_end(chunk)
            descriptor, path = opened[chunk]
            data = os.pread(descriptor, length, offset)
            facts.append(os.pread(descriptor, behind, offset + length))
            try:
                records.unframe(data, shards.crc32c, f"byte {offset}")
            except RecordError as error:
                spill.spill_paths(folder, chunk)[2].unlink(missing_ok=True)
                raise PackError(
                    f"{path}: the disk does not give back what was written ({error}). The same command makes this file "
                    "again; check the disk if it happens again"
                ) from error
            yield data
    finally:
        for descriptor, _ in opened.values():
            os.close(descriptor)


def tables(work: Path, commits: list[dict[str, Any]], kept: int) -> tuple[np.ndarray, np.ndarray]:
    """All tiles' rows, split by split in global order: (chunk number of each, spill.TABLE rows). 27 bytes a tile."""
    table, chunk_of = np.empty(kept, spill.TABLE), np.empty(kept, np.uint32)
    at = 0
    for commit in commits:
        part = np.load(spill.spill_paths(work / "spill", commit["number"])[1])
        table[at : at + len(part)], chunk_of[at : at + len(part)] = part, commit["number"]
        at += len(part)
    # stable: rows of one hash stay as they were read, in order of chunk and offset
    order = np.argsort(table["hash"], kind="stable")
    order = order[np.argsort(table["split"][order], kind="stable")]
    # column by column, since a second table would double what a run of many tiles needs most memory for
    for column in spill.TABLE.names or ():
        table[column] = table[column][order]
    return chunk_of[order], table


def number_of(name: str) -> tuple[str, int]:
    """(split, number) of a shard's name, which is the order of shards."""
    split, number = name.removesuffix(".tfrecord").split("-")
    return split, int(number)


def next_numbers(base: Manifest | None) -> dict[Split, int]:
    """The first free number of each split behind a dataset's shards."""
    return {
        name: 1 + max((number_of(shard.name)[1] for shard in base.split(name).shards), default=-1) if base else 0
        for name in records.SPLITS
    }


def shard_jobs(
    plan: Plan, out: Path, work: Path, chunk_of: np.ndarray, table: np.ndarray, first: Mapping[Split, int]
) -> Iterator[ShardJob]:
    """first: number of each split's first shard."""
    names = tuple(entry.name for entry in plan.legend.classes)
    also = {cover.name: tuple(entry.name for entry in cover.legend.classes) for cover in plan.covers[1:]}
    splits: tuple[tuple[int, Split], ...] = ((blocks.TRAIN, "train"), (blocks.VAL, "val"))
    for side, split in splits:
        begin, end = np.searchsorted(table["split"], [side, side + 1]).tolist()
        size = plan.options.shards.records
        for number, start in enumerate(range(begin, end, size), first[split]):
            here = slice(start, min(start + size, end))  # views, so that all jobs together hold nothing of their own
            rows = table[here]
            yield ShardJob(
                split,
                number,
                chunk_of[here],
                rows["offset"],
                rows["length"],
                rows["facts"],
                names,
                also,
                str(out),
                str(work),
            )
