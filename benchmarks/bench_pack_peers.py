"""Other ways to cut and label the same tiles, each as a careful user of it would tune it.

`published`: as the published tools work. For every tile the scene is opened, a window read, stretched, and written as
a GeoTIFF with DEFLATE 9; then the land-cover sheet is opened, two corners of the tile are projected, the window
between them is read and its histogram written as JSON.
`threads`: as gdal_retile works. Threads, each with the scene opened once, read windows, stretch, and write
JPEG-compressed GeoTIFFs; each has a warped view of the sheets on the scene's own grid and writes histograms from it.

Neither applies quality rules, and processes and threads are started before the clock.
"""

import json
import multiprocessing
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from rasterio.enums import Resampling
from rasterio.vrt import WarpedVRT
from rasterio.warp import transform
from rasterio.windows import Window

from benchmarks.bench_pack_inputs import SIZE, Inputs, positions
from benchmarks.bench_pack_watch import Watch

Position = tuple[int, int]
Tiler = Callable[[Position], tuple[float, float]]  # gives the seconds that cutting and labelling took
BANDS = [1, 2, 3]


def published(inputs: Inputs, out: Path, processes: int) -> dict[str, Any]:
    """One process, or a pool of them."""
    if processes == 1:
        return _run(inputs, out, PublishedTiler, None)
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))
    with pool:
        return _run(inputs, out, PublishedTiler, pool)


def threads(inputs: Inputs, out: Path, count: int) -> dict[str, Any]:
    with ThreadPoolExecutor(count) as pool:
        return _run(inputs, out, ThreadsTiler, pool)


def _run(inputs: Inputs, out: Path, make: Callable[..., Tiler], pool: Executor | None) -> dict[str, Any]:
    out.mkdir(parents=True)
    with rasterio.open(inputs.scene) as dataset:
        places = positions(dataset.width, dataset.height)
    if pool is not None:
        list(pool.map(time.sleep, [0.2] * 4))  # all have started
    with Watch() as watch:
        tiler = make(inputs.scene, inputs.sheets, out, stretch_limits(inputs.scene))
        spent = list(map(tiler, places) if pool is None else pool.map(tiler, places, chunksize=8))
    cut, labelled = np.sum(spent, axis=0)
    return {**watch.found(), "tiles": len(places), "crop_s": float(cut), "label_s": float(labelled)}


def stretch_limits(scene: Path) -> tuple[float, float]:
    """1st and 99th percentile of one pixel in 20 whose mean over bands is not 0."""
    with rasterio.open(scene) as dataset:
        sample = dataset.read(BANDS)[:, ::4, ::5]
    low, high = np.percentile(sample[:, sample.mean(axis=0) > 0], (1, 99))
    return float(low), float(high)


def stretched(pixels: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    low, high = limits
    return np.clip((pixels.astype(np.float32) - low) * (255 / (high - low)), 0, 255).astype(np.uint8)


def _write_histogram(path: Path, codes: np.ndarray) -> None:
    counts = np.bincount(codes.ravel(), minlength=256)
    path.write_text(json.dumps({int(code): int(counts[code]) for code in counts.nonzero()[0]}))


class PublishedTiler:
    """A tile as the published tools make it: (seconds of cropping, seconds of labelling)."""

    def __init__(self, scene: Path, sheets: tuple[Path, ...], out: Path, limits: tuple[float, float]) -> None:
        self.scene, self.sheet, self.out, self.limits = scene, sheets[0], out, limits

    def __call__(self, position: Position) -> tuple[float, float]:
        start = time.perf_counter()
        path = self.out / f"{position[0]}_{position[1]}.tif"
        crs, place = self.crop(path, position)
        middle = time.perf_counter()
        self.label(path.with_suffix(".json"), crs, place)
        return middle - start, time.perf_counter() - middle

    def crop(self, path: Path, position: Position) -> tuple[Any, Any]:
        with rasterio.open(self.scene) as dataset:
            window = Window(*position, SIZE, SIZE)  # type: ignore[call-arg]
            grey = stretched(dataset.read(BANDS, window=window), self.limits)
            crs, place = dataset.crs, dataset.window_transform(window)
        kind = {"driver": "GTiff", "width": SIZE, "height": SIZE, "count": 3, "dtype": "uint8"}
        with rasterio.open(path, "w", crs=crs, transform=place, compress="DEFLATE", zlevel=9, **kind) as tile:
            tile.write(grey)
        return crs, place

    def label(self, path: Path, crs: Any, place: Any) -> None:
        (x0, y0), (x1, y1) = place * (0, 0), place * (SIZE, SIZE)
        with rasterio.open(self.sheet) as sheet:
            xs, ys = transform(crs, sheet.crs, [x0, x1], [y0, y1])[:2]
            (top, left), (bottom, right) = sheet.index(xs[0], ys[0]), sheet.index(xs[1], ys[1])
            window = Window(left, top, max(1, right - left), max(1, bottom - top))  # type: ignore[call-arg]
            _write_histogram(path, sheet.read(1, window=window, boundless=True))


class ThreadsTiler:
    """A tile as gdal_retile makes it: (seconds of cutting, seconds of labelling), of this thread."""

    def __init__(self, scene: Path, sheets: tuple[Path, ...], out: Path, limits: tuple[float, float]) -> None:
        self.scene, self.sheets, self.out, self.limits = scene, sheets, out, limits
        self.here = threading.local()  # handles must not be shared

    def opened(self) -> tuple[Any, list[Any]]:
        """This thread's scene and its warped views of the sheets."""
        if not hasattr(self.here, "scene"):
            scene = rasterio.open(self.scene)
            grid = {"crs": scene.crs, "transform": scene.transform, "width": scene.width, "height": scene.height}
            views = [WarpedVRT(rasterio.open(path), resampling=Resampling.nearest, **grid) for path in self.sheets]
            self.here.scene, self.here.views = scene, views
        return self.here.scene, self.here.views

    def __call__(self, position: Position) -> tuple[float, float]:
        start = time.perf_counter()
        scene, views = self.opened()
        path = self.out / f"{position[0]}_{position[1]}.tif"
        window = Window(*position, SIZE, SIZE)  # type: ignore[call-arg]
        grey = stretched(scene.read(BANDS, window=window), self.limits)
        kind = {"driver": "GTiff", "width": SIZE, "height": SIZE, "count": 3, "dtype": "uint8", "compress": "JPEG"}
        colour = {"photometric": "YCBCR", "jpeg_quality": 95, "crs": scene.crs}
        # one block a tile
        block = {"tiled": True, "blockxsize": SIZE, "blockysize": SIZE, "transform": scene.window_transform(window)}
        with rasterio.open(path, "w", **kind, **colour, **block) as tile:
            tile.write(grey)
        middle = time.perf_counter()
        codes = views[0].read(1, window=window)
        for view in views[1:]:  # further sheets where the first says nothing
            if codes.all():
                break
            codes = np.where(codes == 0, view.read(1, window=window), codes)
        _write_histogram(path.with_suffix(".json"), codes)
        return middle - start, time.perf_counter() - middle
