"""What is measured of geokr's own: packing a scene to a finished dataset, and its JPEG encoder by itself."""

import contextlib
import multiprocessing
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bench_pack_inputs import SIZE, Inputs, positions
from benchmarks.bench_pack_watch import Watch

# All rules are applied, and next to no tile is lost to them or to the split: rates are of tiles that are written.
KEEP = ("quality.max_dark_fraction=1", "quality.max_bright_fraction=1", "split.val_fraction=0")
# Not one tile is lost, be it of one colour.
KEEP_ALL = ("quality.min_brightest=null", "quality.min_contrast=null", "split.val_fraction=0", *KEEP[:2])


def options_of(keep: Sequence[str], overrides: Sequence[str]) -> Any:
    """Options of packing."""
    from geokr import config
    from preprocess.options import PackOptions

    return config.load(PackOptions, None, [*keep, *overrides])


_ENGINES: dict[int, Any] = {}  # of this process, kept as long as it lives


def started(workers: int) -> Any:
    """An engine whose processes stay from one packing to the next: the warm-up starts them."""
    from preprocess.engine import open_engine

    if workers not in _ENGINES:
        _ENGINES[workers] = open_engine(workers)
    return contextlib.nullcontext(_ENGINES[workers])


def ours(inputs: Inputs, out: Path, *overrides: str, keep: tuple[str, ...] = KEEP) -> dict[str, Any]:
    """Packs from planning to the manifest."""
    from preprocess.pack import pack
    from preprocess.plan import make_plan

    # of a small scene several shards, so that all processes come to write one
    options = options_of(keep, (*overrides, "shards.records=16") if inputs.scenes == inputs.warm else overrides)
    out.mkdir(parents=True)
    with Watch() as watch:
        plan = make_plan([str(path) for path in inputs.scenes], list(map(str, inputs.sheets)), inputs.product, options)
        packed = pack(plan, out, lambda *progress: None, open_engine=partial(started, options.workers))
    shards = packed.manifest.train.shards
    sizes = {"tiles": packed.manifest.train.records, "bytes": sum(shard.bytes for shard in shards)}
    return {**watch.found(), **sizes, "positions": plan.tiles, "stages": dict(packed.stages)}


# ---------------------------------------------------------------------------------------------- encoding alone

_TILES: list[np.ndarray] = []  # of a process that encodes
_GATE: list[threading.Barrier] = []


def encode_alone(inputs: Inputs, out: Path, processes: int, *overrides: str) -> dict[str, Any]:
    """JPEG encoding of the same tiles and nothing else, the codec's own limit: every process encodes all of them.

    Processes begin together, so each has a core that is as busy with others as it will be in packing.
    """
    context = multiprocessing.get_context("spawn")
    gate = context.Barrier(processes)
    with ProcessPoolExecutor(processes, context, _load, (inputs.scene, gate)) as pool:
        found = list(pool.map(_encode, [overrides] * processes))
    tiles, seconds, cpu, sizes = zip(*found, strict=True)
    return {"tiles": sum(tiles), "seconds": max(seconds), "cpu_s": sum(cpu), "bytes": sum(sizes)}


def _load(scene: Path, gate: threading.Barrier) -> None:
    import rasterio

    with rasterio.open(scene) as dataset:
        pixels = dataset.read([1, 2, 3])
    low, high = np.percentile(pixels[:, ::20, ::20], (1, 99))
    grey = np.empty((*pixels.shape[1:], 3), np.uint8)
    for band, values in enumerate(pixels):
        grey[..., band] = np.clip((values.astype(np.float32) - low) * (255 / (high - low)), 0, 255)
    places = positions(pixels.shape[2], pixels.shape[1])
    for x, y in places[:: -(-len(places) // 1000)]:  # a thousand are enough
        _TILES.append(np.ascontiguousarray(grey[y : y + SIZE, x : x + SIZE]))
    _GATE.append(gate)


def _encode(overrides: tuple[str, ...]) -> tuple[int, float, float, int]:
    """(tiles, seconds, CPU seconds, bytes)."""
    from preprocess.image_codecs import encode_image

    options = options_of((), overrides)
    for tile in _TILES[:16]:
        encode_image(tile, options)
    _GATE[0].wait(60)
    start, cpu = time.perf_counter(), time.process_time()
    size = sum(len(encode_image(tile, options)) for tile in _TILES)
    return len(_TILES), time.perf_counter() - start, time.process_time() - cpu, size
