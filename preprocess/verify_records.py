"""Checks every byte of a dataset: hashes, checksums, indexes, records, images.

    python preprocess/verify_records.py out/records

Exit status 0 if all is sound; 1 with shard, record and offset of what is not.
"""

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the folder on the path must be the project's, not this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from geokr import manifests, records
from geokr.manifests import Manifest, Shard
from geokr.records import Record, RecordError
from preprocess import engine, report, shards
from preprocess.checksums import sha256
from preprocess.image_codecs import decode_image

Findings = tuple[list[str], list[str]]  # problems, tile ids


def verify_shard(folder: Path, shard: Shard, manifest: Manifest) -> Findings:
    """Problems of one shard, and the ids of its tiles."""
    problems: list[str] = []
    tiles: list[str] = []
    path = manifests.folder_of(folder) / shard.name
    spans = None
    try:
        spans = manifests.open_index(folder, shard)
    except (RecordError, OSError) as error:
        problems.append(str(error))
    try:
        for number, (offset, payload) in enumerate(shards.read_frames(path)):
            where = f"{path}: record {number} at byte {offset}"
            if spans is not None and (number >= len(spans) or spans[number, 0] != offset):
                problems.append(f"{where}: the index does not list it there")
            try:
                record = records.decode_record(payload, where)
                check_tile(record, manifest, where)
                tiles.append(record.tile_id)
            except RecordError as error:
                problems.append(str(error))
    except (RecordError, OSError) as error:
        problems.append(str(error))
    if not problems and sha256(path) != shard.sha256:
        problems.append(f"{path}: its hash is not the manifest's though every record is sound: replaced or reordered")
    return problems, tiles


def check_tile(record: Record, manifest: Manifest, where: str) -> None:
    """Raises RecordError unless the record fits its dataset and its image decodes to the shape it names."""
    tile = manifest.tile
    expected = (tile.size, tile.size, len(manifest.bands)), tile.codec, tile.dtype, len(manifest.classes)
    found = record.shape, record.codec, record.dtype, len(record.fractions)
    if found != expected:
        raise RecordError(f"{where}: (shape, codec, dtype, classes) is {found}, the manifest says {expected}")
    further = {name: len(labels.fractions) for name, labels in record.also.items()}
    listed = {name: len(info.classes) for name, info in manifest.products.items()}
    if further != listed:
        raise RecordError(f"{where}: classes of further products are {further}, the manifest says {listed}")
    sides = {0 if of.grid is None else len(of.grid) for of in (record, *record.also.values())}
    if sides != {tile.grid}:
        raise RecordError(f"{where}: fractions by {sorted(sides)} squares a side, the manifest says {tile.grid}")
    decode_image(record, where)


def verify(folder: Path, workers: int) -> tuple[list[str], Manifest | None]:
    """All problems of a dataset."""
    try:
        manifest = manifests.load_manifest(folder)
        manifests.check_folder(folder, manifest)
    except RecordError as error:
        return [str(error)], None
    parts = [shard for name in records.SPLITS for shard in manifest.split(name).shards]
    if workers > 1 and len(parts) > 1:
        with ProcessPoolExecutor(min(workers, len(parts)), get_context("spawn")) as pool:
            found = list(pool.map(verify_shard, repeat(folder), parts, repeat(manifest)))
    else:
        found = [verify_shard(folder, shard, manifest) for shard in parts]
    problems = [problem for shard_problems, _ in found for problem in shard_problems]
    tiles = [tile for _, shard_tiles in found for tile in shard_tiles]
    if not problems and len(set(tiles)) != len(tiles):
        problems.append(f"{folder}: {len(tiles) - len(set(tiles))} tiles stand in it twice")
    return problems, manifest


def main(arguments: Sequence[str] | None = None) -> int:
    made = argparse.ArgumentParser(prog="verify_records.py", description="Checks every byte of a dataset.")
    made.add_argument("folder", type=Path)
    made.add_argument("--workers", type=int, default=None, help="processes; default one a core")
    chosen = made.parse_args(arguments)
    problems, manifest = verify(chosen.folder, chosen.workers or engine.default_workers())
    if problems or manifest is None:
        for problem in problems[:50]:
            print(problem, file=sys.stderr)
        print(f"{len(problems)} problem(s) found", file=sys.stderr)
        return 1
    total = sum(shard.bytes for name in records.SPLITS for shard in manifest.split(name).shards)
    print(
        f"{chosen.folder}: sound. {manifest.train.records} training and {manifest.val.records} validation records, "
        f"{report.size(total)}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
