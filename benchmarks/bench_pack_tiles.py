"""Very many small files: tiles that are cut already, each with a histogram beside it, as the published tools do."""

import json
import struct
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from rasterio.transform import from_origin

from benchmarks.bench_pack_inputs import Inputs, kept_folder
from benchmarks.bench_pack_ours import KEEP, options_of, started
from benchmarks.bench_pack_watch import Watch

SIDE, A_FOLDER = 64, 1000
CORNER = 400_000.0, 5_000_000.0  # in UTM zone 32


def cut_tiles(cache: Path, count: int) -> Inputs:
    """``count`` GeoTIFFs of 64 pixels of 10 m, three bands of uint8, and as many JSON files, 1,000 to a folder."""
    made = kept_folder(cache / f"tiles-{count}", lambda folder: _make(folder, count))
    warm = kept_folder(cache / "tiles-16", lambda folder: _make(folder, 16))
    return Inputs((made,), (), "globeland30", (warm,))


def _make(folder: Path, count: int) -> None:
    pixels = np.random.default_rng(0).integers(30, 220, (3, SIDE, SIDE)).astype(np.uint8)
    template = folder / "template.tif"
    kind = {"width": SIDE, "height": SIDE, "count": 3, "dtype": "uint8", "crs": "EPSG:32632"}
    with rasterio.open(template, "w", driver="GTiff", transform=from_origin(*CORNER, 10, 10), **kind) as file:
        file.write(pixels)
    content = template.read_bytes()
    template.unlink()
    corner = struct.pack("<dd", *CORNER)  # in the tie point, the only place where these bytes stand
    assert content.count(corner) == 1, "a tile's corner stands once in its file"
    histogram = json.dumps({"10": 3000, "20": 1000, "80": 96})
    for number in range(count):
        row, column = divmod(number, A_FOLDER)
        place = folder / f"{row:04d}"
        if column == 0:
            place.mkdir()
        west, north = CORNER[0] + column * SIDE * 10, CORNER[1] - row * SIDE * 10
        path = place / f"tile_{number:07d}.tif"
        path.write_bytes(content.replace(corner, struct.pack("<dd", west, north)))
        path.with_suffix(".json").write_text(histogram)


def pack_tiles(inputs: Inputs, out: Path, *overrides: str) -> dict[str, Any]:
    """Packs a folder of tiles and their histograms, from the listing of its files to the manifest."""
    from preprocess.pack import pack
    from preprocess.plan import make_tile_plan

    options, folder = options_of(KEEP, overrides), str(inputs.scene)
    out.mkdir(parents=True)
    with Watch() as watch:
        plan = make_tile_plan(folder, folder, (), inputs.product, options)
        packed = pack(plan, out, lambda *progress: None, open_engine=partial(started, options.workers))
    shards = packed.manifest.train.shards
    sizes = {"tiles": packed.manifest.train.records, "bytes": sum(shard.bytes for shard in shards)}
    return {**watch.found(), **sizes, "positions": plan.tiles, "stages": dict(packed.stages)}
