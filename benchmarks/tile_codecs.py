"""What each codec costs and gives: bytes of a tile, packing, decoding, loading.

    python benchmarks/tile_codecs.py [--size PIXELS] [--seconds S] [--loader NAME] [--cache DIR] [--json FILE]

Packs one demo scene with every codec, as 3 bands of uint8 and, but for JPEG, as 4 bands of uint16, and loads each
dataset with both loaders, augmentation included. A line a codec, form and loader:

    bytes_a_tile      of the records, framing and all
    encode_us         CPU time of encoding a tile
    decode_us         CPU time of decoding a tile, by itself
    pack_tiles_per_s  from planning to the manifest, the start of the processes included; one run after a warm-up
    load_img_per_s    with the loader, all cores, from the page cache; spread is (max - min) / median of five parts
    load_us           CPU time of an image there, all threads

The last line is one JSON object.
"""

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: the folder on the path must be the project's, not this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from benchmarks import bench_data, bench_pack_inputs, bench_pack_ours, bench_report

FORMS = {
    "3 x uint8": (("jpeg", "png", "raw", "lz4"), ("tile.bands=[1,2,3]",)),
    "4 x uint16": (("png", "raw", "lz4"), ("tile.bands=[1,2,3,4]", "stretch.mode=none")),
}
COLUMNS = (
    "tiles", "codec", "loader", "bytes_a_tile", "encode_us", "decode_us", "pack_tiles_per_s", "load_img_per_s",
    "spread", "load_us",
)  # fmt: skip
PARTS, BATCH, TRIED = 5, 64, 256


def packed(
    inputs: bench_pack_inputs.Inputs, out: Path, codec: str, keys: Sequence[str], workers: int | None
) -> dict[str, Any]:
    """Packs a dataset into ``out``: figures of its size, packing and encoding."""
    how = [f"tile.codec={codec}", *keys, *([] if workers is None else [f"workers={workers}"])]
    found = bench_pack_ours.ours(inputs, out, *how, keep=bench_pack_ours.KEEP_ALL)
    encode_s = found["stages"]["encode"][0]
    return {
        "bytes_a_tile": round(found["bytes"] / found["tiles"]),
        "encode_us": round(encode_s / found["tiles"] * 1e6, 1),
        "pack_tiles_per_s": round(found["tiles"] / found["seconds"], 1),
    }


def decoding(out: Path) -> dict[str, float]:
    """CPU time of decoding a tile."""
    from geokr import manifests, records
    from preprocess.image_codecs import decode_image
    from preprocess.shards import read_frames

    shard = manifests.load_manifest(out).train.shards[0]
    frames = itertools.islice(read_frames(out / shard.name), TRIED)
    tiles = [records.decode_record(payload) for _, payload in frames]
    decode_image(tiles[0], "")  # compiled, for PNG
    start = time.process_time()
    for tile in tiles:
        np.sum(decode_image(tile, "")[0, 0])  # raw ones are views
    return {"decode_us": round((time.process_time() - start) / len(tiles) * 1e6, 1)}


def loading(out: Path, loader: Any, seconds: float) -> dict[str, Any]:
    """Rate and CPU time of a loader over the dataset, after two batches of warming up."""
    from geokr.options import AugmentOptions, DataOptions
    from pipelines.dataset import Dataset
    from pipelines.loaders import train_batches

    batch = min(BATCH, Dataset.open(out).train.records)
    options = DataOptions(loader=loader, global_batch=batch)
    with train_batches(Dataset.open(out), options, AugmentOptions(), seed=0) as batches:
        for _ in range(2):
            next(batches)
        rates, images, cpu = [], 0, time.process_time()
        for _ in range(PARTS):
            count, rate = _timed(lambda: next(batches), seconds / PARTS)
            rates.append(rate * batch)
            images += count * batch
        cpu = time.process_time() - cpu
    return {**bench_report.median_and_spread("load_img_per_s", rates), "load_us": round(cpu / images * 1e6, 1)}


def _timed(work: Callable[[], Any], seconds: float) -> tuple[int, float]:
    """(calls, calls a second) in about that time, one at least."""
    start, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - start < seconds:
        work()
        count += 1
    return count, count / (time.perf_counter() - start)


def measured(chosen: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Lines of the table."""
    inputs = bench_pack_inputs.demo(chosen.cache or folder, chosen.size)
    loaders = [chosen.loader] if chosen.loader else ["torch", *(["dali"] if bench_data.has_dali() else [])]
    for form, (codecs, keys) in FORMS.items():
        packed(inputs.small(), folder / f"warm {form}", codecs[0], keys, chosen.workers)
        for codec in codecs:
            out = folder / f"{codec} {form}"
            figures = {**packed(inputs, out, codec, keys, chosen.workers), **decoding(out)}
            for loader in loaders:
                rates = loading(out, loader, chosen.seconds)
                yield {"tiles": form, "codec": codec, "loader": loader, **figures, **rates}


def main(arguments: Sequence[str] | None = None) -> int:
    made = argparse.ArgumentParser(prog="tile_codecs.py", description="Size, packing and loading of every codec.")
    made.add_argument("--size", type=int, default=6000, help="side of the scene in pixels")
    made.add_argument("--seconds", type=float, default=10.0, help="time for each loader")
    made.add_argument("--loader", choices=("torch", "dali"), help="one of them; default both where DALI is installed")
    made.add_argument("--workers", type=int, help="packing processes; default one a core")
    made.add_argument("--cache", type=Path, help="folder that keeps the scene between runs")
    made.add_argument("--json", type=Path)
    chosen = made.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="geokr-codecs-") as folder:
        lines = list(measured(chosen, Path(folder)))
    by_name = {(line["tiles"], line["codec"], line["loader"]): line for line in lines}
    ratios = {
        f"bytes, {codec} / raw, {form}": by_name[form, codec, loader]["bytes_a_tile"]
        / by_name[form, "raw", loader]["bytes_a_tile"]
        for form, codec, loader in by_name
        if codec != "raw"
    }
    bench_report.show(bench_report.tree(lines, ratios), COLUMNS, chosen.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
