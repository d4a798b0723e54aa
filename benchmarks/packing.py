"""How fast scenes become records, against the published way of working and against JPEG encoding alone.

    python benchmarks/packing.py [--json FILE]

Every measurement is a process of its own, after a warm-up on a small scene (compiled kernels come from Numba's
cache), in turn with the others, `--repeats` times; medians and the ratio of medians are reported. Rates count tile
positions, kept or not. The last line is one JSON object.

The peer works as the published tools do: for every tile it opens the scene, reads a window, stretches it, and
writes a GeoTIFF with DEFLATE 9; for every tile it opens the land-cover sheet, projects two corners of the tile, reads
the window between them, and writes the histogram as JSON.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: the folder on the path must be the project's, not this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from benchmarks import bench_report

SIZE, STEP = 256, 200


# ------------------------------------------------------------------------------------------------ what is measured


def ours(scene: Path, sheets: list[Path], out: Path, workers: int, codec: str) -> int:
    """Packs the scene; returns the number of tile positions."""
    from geokr import config
    from preprocess.options import PackOptions
    from preprocess.pack import pack
    from preprocess.plan import make_plan

    overrides = [f"workers={workers}", f"tile.codec={codec}", "quality.max_dark_fraction=null"]
    if scene.parent.parent.name.startswith("warm"):
        overrides.append("split.val_fraction=0")  # it lies in a single block
    options = config.load(PackOptions, None, [*overrides, "split.block_m=10000"])
    plan = make_plan([str(scene)], [str(sheet) for sheet in sheets], "globeland30", options)
    out.mkdir(parents=True)
    pack(plan, out, lambda phase, done, total: None)
    return plan.tiles


def published(scene: Path, sheets: list[Path], out: Path) -> int:
    """One process, tile by tile, as the published tools do it."""
    import rasterio
    from rasterio.warp import transform
    from rasterio.windows import Window

    from preprocess.grid import offsets

    out.mkdir(parents=True)
    with rasterio.open(scene) as dataset:
        width, height = dataset.width, dataset.height
        sample = dataset.read([1, 2, 3])[:, ::4, ::5]
        low, high = np.percentile(sample[:, sample.mean(axis=0) > 0], (1, 99))
    count = 0
    for top in offsets(height, SIZE, STEP).tolist():
        for left in offsets(width, SIZE, STEP).tolist():
            name = out / f"{left}_{top}.tif"
            with rasterio.open(scene) as dataset:
                window = Window(left, top, SIZE, SIZE)  # type: ignore[call-arg]
                pixels = dataset.read([1, 2, 3], window=window)
                grey = np.clip((pixels - low) / (high - low) * 255, 0, 255).astype(np.uint8)
                place = dataset.window_transform(window)
                profile = {
                    "driver": "GTiff",
                    "width": SIZE,
                    "height": SIZE,
                    "count": 3,
                    "dtype": "uint8",
                    "crs": dataset.crs,
                    "transform": place,
                    "compress": "DEFLATE",
                    "zlevel": 9,
                }
                corners = [place * (0, 0), place * (SIZE, SIZE)]
                crs = dataset.crs
            with rasterio.open(name, "w", **profile) as tile:
                tile.write(grey)
            with rasterio.open(sheets[0]) as sheet:
                xs, ys = transform(crs, sheet.crs, [x for x, _ in corners], [y for _, y in corners])[:2]
                (r0, c0), (r1, c1) = sheet.index(xs[0], ys[0]), sheet.index(xs[1], ys[1])
                area = Window(c0, r0, max(1, c1 - c0), max(1, r1 - r0))  # type: ignore[call-arg]
                codes, counts = np.unique(sheet.read(1, window=area, boundless=True), return_counts=True)
            name.with_suffix(".json").write_text(json.dumps(dict(zip(codes.tolist(), counts.tolist(), strict=True))))
            count += 1
    return count


def encode_only(scene: Path) -> tuple[int, float]:
    """JPEG encoding of the same tiles and nothing else, the codec's own limit on one core: (tiles, seconds)."""
    import rasterio

    from geokr import config
    from preprocess import kernels
    from preprocess.grid import offsets
    from preprocess.image_codecs import encode_image
    from preprocess.options import PackOptions

    options = config.load(PackOptions, None)
    with rasterio.open(scene) as dataset:
        pixels = dataset.read([1, 2, 3])
    low, high = np.percentile(pixels[:, ::20, ::20], (1, 99))
    valid = np.ones(pixels.shape[1:], np.uint8)
    grey = kernels.stretch_to_uint8(pixels, np.tile([low, high], (3, 1)).astype(np.float64), valid)
    tiles = [
        np.ascontiguousarray(grey[y : y + SIZE, x : x + SIZE])
        for y in offsets(grey.shape[0], SIZE, STEP).tolist()
        for x in offsets(grey.shape[1], SIZE, STEP).tolist()
    ]
    start = time.perf_counter()
    for tile in tiles:
        encode_image(tile, options)
    return len(tiles), time.perf_counter() - start


def timed(function: Callable[..., int], *arguments: Any) -> tuple[int, float]:
    """(tiles, seconds) of a whole call."""
    start = time.perf_counter()
    return function(*arguments), time.perf_counter() - start


CASES: dict[str, Callable[[Path, list[Path], Path], tuple[int, float]]] = {
    "ours, jpeg, 1 process": lambda scene, sheets, out: timed(ours, scene, sheets, out, 0, "jpeg"),
    "ours, jpeg, 2 processes": lambda scene, sheets, out: timed(ours, scene, sheets, out, 2, "jpeg"),
    "ours, raw, 1 process": lambda scene, sheets, out: timed(ours, scene, sheets, out, 0, "raw"),
    "published way, 1 process": lambda scene, sheets, out: timed(published, scene, sheets, out),
    "jpeg encoding alone, 1 process": lambda scene, sheets, out: encode_only(scene),
}


def measure_one(case: str, scene: Path, sheets: list[Path], warm: Path, folder: Path) -> dict[str, float]:
    """Runs one case in this process: rate in tiles/s, and peak memory of this process and its largest child in MB."""
    CASES[case](warm, sheets, folder / "warm")
    tiles, seconds = CASES[case](scene, sheets, folder / "out")
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {"rate": tiles / seconds, "peak_mb": peak / 1024}


# -------------------------------------------------------------------------------------------------------- the run


def make_inputs(folder: Path, size: int) -> tuple[Path, list[Path], Path]:
    """(scene, sheets, small scene for warming up), made by the demo-scene maker and kept in ``folder``."""
    scenes = {}
    for name, side in (("scene", size), ("warm", 700)):
        place = folder / f"{name}-{side}"
        if not (place / "done").exists():
            shutil.rmtree(place, ignore_errors=True)
            command = [sys.executable, "preprocess/make_demo.py", "--out", str(place), "--size", str(side)]
            subprocess.run(command, check=True, cwd=Path(__file__).parents[1], stdout=subprocess.DEVNULL)
            (place / "done").touch()
        scenes[name] = place
    sheets = sorted(scenes["scene"].rglob("N*_*LC030.tif"))
    return _scene_in(scenes["scene"]), sheets, _scene_in(scenes["warm"])


def _scene_in(folder: Path) -> Path:
    return next(path for path in sorted(folder.rglob("*.tif")) if "LC030" not in path.name)


def run(size: int, repeats: int, cache: Path) -> dict[str, Any]:
    """All cases in turn, ``repeats`` times; the report's tree."""
    scene, sheets, warm = make_inputs(cache, size)
    rates: dict[str, list[dict[str, float]]] = {case: [] for case in CASES}
    for _ in range(repeats):
        for case in CASES:
            with tempfile.TemporaryDirectory(dir=cache) as folder:
                command = [sys.executable, __file__, "--case", case, "--paths", str(scene), str(warm), folder]
                command += [str(sheet) for sheet in sheets]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            rates[case].append(json.loads(done.stdout.splitlines()[-1]))
    results = [
        {"stage": "pack", "case": case, **bench_report.median_and_spread("tiles_per_s", [r["rate"] for r in found]),
         "peak_mb": round(max(r["peak_mb"] for r in found))}
        for case, found in rates.items()
    ]  # fmt: skip
    middle = {entry["case"]: entry["tiles_per_s"] for entry in results}
    one = middle["ours, jpeg, 1 process"]
    ratios = {
        "ours / published way (1 process each)": one / middle["published way, 1 process"],
        "ours / jpeg encoding alone (1 process each)": one / middle["jpeg encoding alone, 1 process"],
        "ours, 2 processes / 1": middle["ours, jpeg, 2 processes"] / one,
    }
    return bench_report.tree(results, ratios, scene=f"{size} x {size}, 4 bands of uint16, {SIZE} px every {STEP} px")


def main() -> int:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--size", type=int, default=4000, help="side of the scene in pixels")
    made.add_argument("--repeats", type=int, default=3)
    made.add_argument("--cache", type=Path, default=Path("out/bench-packing"), help="where inputs are kept")
    made.add_argument("--json", type=Path, help="write the report there")
    made.add_argument("--case", help=argparse.SUPPRESS)
    made.add_argument("--paths", nargs="+", type=Path, help=argparse.SUPPRESS)
    chosen = made.parse_args()
    if chosen.case:
        scene, warm, folder, *sheets = chosen.paths
        print(json.dumps(measure_one(chosen.case, scene, sheets, warm, folder)))
        return 0
    chosen.cache.mkdir(parents=True, exist_ok=True)
    tree = run(chosen.size, chosen.repeats, chosen.cache.resolve())
    bench_report.show(tree, ("case", "tiles_per_s", "spread", "peak_mb"), chosen.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
