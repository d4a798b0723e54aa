"""Scenes and land cover to pack: a demo landscape, sparse scenes of any size, and headers of thousands of scenes.

All are made once and kept in a folder, whose name says what is in it.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import rasterio.shutil
from rasterio.transform import from_origin
from rasterio.windows import Window

SIZE, STEP = 256, 200
WARM_SIDE = 700
SHEET_SIDE = 36_000  # of ESA WorldCover's sheets of 3 degrees
SCENE_SIDE = 10_980  # of Sentinel-2's scenes of 100 km
BLOCK = 1024
COMPRESSIONS = {"deflate": "DEFLATE", "none": "no compression"}  # of the demo scene


@dataclass(frozen=True, slots=True)
class Inputs:
    """What to pack: files, the land cover's product, and small scenes of the same kind for warming up."""

    scenes: tuple[Path, ...]
    sheets: tuple[Path, ...]
    product: str
    warm: tuple[Path, ...]

    @property
    def scene(self) -> Path:
        return self.scenes[0]

    def small(self) -> "Inputs":
        return Inputs(self.warm, self.sheets, self.product, self.warm)


def positions(width: int, height: int) -> list[tuple[int, int]]:
    """First pixel (column, row) of every tile of a scene."""
    from preprocess.grid import offsets

    return [(x, y) for y in offsets(height, SIZE, STEP).tolist() for x in offsets(width, SIZE, STEP).tolist()]


def kept_folder(folder: Path, make: Callable[[Path], None]) -> Path:
    """``folder`` as ``make`` fills it, once."""
    if not (folder / "done").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        make(folder)
        (folder / "done").touch()
    return folder


def demo(cache: Path, side: int, compression: str = "deflate") -> Inputs:
    """A scene of ``side`` pixels of the demo landscape, over GlobeLand30-like sheets of two UTM zones."""

    def make(folder: Path, side: int) -> None:
        command = [sys.executable, "preprocess/make_demo.py", "--out", str(folder), "--size", str(side)]
        subprocess.run(command, check=True, cwd=Path(__file__).parents[1], stdout=subprocess.DEVNULL)

    large = kept_folder(cache / f"scene-{side}", lambda folder: make(folder, side))
    small = kept_folder(cache / f"warm-{WARM_SIDE}", lambda folder: make(folder, WARM_SIDE))
    sheets = tuple(sorted(large.rglob("N*_*LC030.tif")))
    if compression == "none":
        large, small = map(_uncompressed, (large, small))
    return Inputs(_scenes_in(large), sheets, "globeland30", copies(_scenes_in(small)[0]))


def _uncompressed(folder: Path) -> Path:
    """A folder with the scenes of another one, in blocks as large."""

    def make(made: Path) -> None:
        (made / "scenes").mkdir()
        for path in _scenes_in(folder):
            with rasterio.open(path) as file:
                keys = ("tiled", "blockxsize", "blockysize", "interleave")
                how = {key: file.profile[key] for key in keys if key in file.profile}
            rasterio.shutil.copy(path, made / "scenes" / path.name, driver="GTiff", compress="NONE", **how)

    return kept_folder(folder.with_name(f"{folder.name}-none"), make)


def copies(scene: Path) -> tuple[Path, ...]:
    """Four scenes of one, so that two processes are busy while they warm up."""
    folder = scene.parent.with_name("copies")
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{number}-{scene.name}" for number in range(4)]
    for path in paths:
        if not path.exists():
            os.link(scene, path)
    return tuple(paths)


def _scenes_in(folder: Path) -> tuple[Path, ...]:
    return tuple(sorted(folder.rglob("scenes/*.tif")))


# ------------------------------------------------------------------------------------------------- large scenes


def sparse(cache: Path, side: int, sheet: Path | None) -> Inputs:
    """A scene of ``side`` pixels of 8 m, four bands of uint16, in the middle of a sheet of WorldCover.

    Sparse: one block of 1,024 pixels in 16 holds noise, the others are zeros that stand nowhere in the file. Without
    a ``sheet`` one of the same size is made.
    """
    sheets = (sheet or kept_folder(cache / "sheet", _make_sheet) / "ESA_WorldCover_10m_2021_v200_N00E006_Map.tif",)
    warm = kept_folder(cache / f"sparse-{WARM_SIDE}", lambda folder: _make_sparse(folder, WARM_SIDE)) / "scene.tif"
    made = kept_folder(cache / f"sparse-{side}", lambda folder: _make_sparse(folder, side)) / "scene.tif"
    return Inputs((made,), sheets, "worldcover", copies(warm))


@contextmanager
def _writer(path: Path, side: int, place: Any, **profile: Any) -> Iterator[Any]:
    profile = {"tiled": True, "blockxsize": BLOCK, "blockysize": BLOCK, "SPARSE_OK": True, **profile}
    with rasterio.open(path, "w", driver="GTiff", width=side, height=side, transform=place, **profile) as file:
        yield file


def _make_sparse(folder: Path, side: int) -> None:
    noise = np.random.default_rng(0).integers(200, 3000, (4, BLOCK, BLOCK)).astype(np.uint16)
    # 7.5 degrees east, 1.5 degrees north in UTM zone 32
    place = from_origin(333_000 - 4 * side, 165_900 + 4 * side, 8, 8)
    with _writer(folder / "scene.tif", side, place, count=4, dtype="uint16", crs="EPSG:32632") as file:
        for top in range(0, side, 4 * BLOCK):
            for left in range(0, side, 4 * BLOCK):
                width, height = min(BLOCK, side - left), min(BLOCK, side - top)
                window = Window(left, top, width, height)  # type: ignore[call-arg]
                file.write(noise[:, :height, :width], window=window)


def _make_sheet(folder: Path) -> None:
    codes = np.random.default_rng(0).choice((10, 30, 40, 50, 80), (BLOCK // 8, BLOCK // 8)).astype(np.uint8)
    block = codes.repeat(8, 0).repeat(8, 1)
    path = folder / "ESA_WorldCover_10m_2021_v200_N00E006_Map.tif"
    place = from_origin(6, 3, 3 / SHEET_SIDE, 3 / SHEET_SIDE)
    with _writer(path, SHEET_SIDE, place, count=1, dtype="uint8", crs="EPSG:4326", compress="DEFLATE") as file:
        for top in range(0, SHEET_SIDE, BLOCK):
            for left in range(0, SHEET_SIDE, BLOCK):
                width, height = min(BLOCK, SHEET_SIDE - left), min(BLOCK, SHEET_SIDE - top)
                file.write(block[:height, :width], 1, window=Window(left, top, width, height))  # type: ignore[call-arg]


# ------------------------------------------------------------------------------------------------ many scenes


def headers(cache: Path, tiles: int) -> Inputs:
    """Enough scenes as large as Sentinel-2's for ``tiles`` tiles, over sheets as large as WorldCover's.

    Headers alone, for planning reads nothing else: four scenes side by side in each UTM zone, 100 km from one to the
    next, 40 rows of them from the equator northward. Only the first rows of the first scene have land cover below them.
    """
    count = -(-tiles // len(positions(SCENE_SIDE, SCENE_SIDE)))
    folder = kept_folder(cache / f"headers-{count}", lambda folder: _make_headers(folder, count))
    scenes = tuple(sorted(folder.glob("scene_*.tif")))
    return Inputs(scenes, tuple(sorted(folder.glob("ESA_*.tif"))), "worldcover", scenes[:1])


def _make_headers(folder: Path, count: int) -> None:
    zones = -(-count // 160)
    for number in range(count):
        zone, (row, column) = 1 + number // 160 % 60, divmod(number % 160, 4)
        place = from_origin(300_000 + 100_000 * column, 100_000 * (row + 2), 10, 10)
        kind = {"count": 4, "dtype": "uint16", "crs": f"EPSG:{32600 + zone}", "compress": "DEFLATE"}
        with _writer(folder / f"scene_{number:06d}.tif", SCENE_SIDE, place, **kind):
            pass
    for west in range(-180, -180 + 6 * min(zones, 60), 3):
        for south in range(0, 39, 3):
            name = f"ESA_WorldCover_10m_2021_v200_N{south:02d}{'W' if west < 0 else 'E'}{abs(west):03d}_Map.tif"
            place = from_origin(west, south + 3, 3 / SHEET_SIDE, 3 / SHEET_SIDE)
            with _writer(folder / name, SHEET_SIDE, place, count=1, dtype="uint8", crs="EPSG:4326") as file:
                if (west, south) == (-180, 0):
                    window = Window(12_000, 13_800, 18_000, 1800)  # type: ignore[call-arg]
                    file.write(np.full((1800, 18_000), 10, np.uint8), 1, window=window)
