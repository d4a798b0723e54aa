"""Makes demo data: scenes of a procedural landscape and the GlobeLand30-like land-cover sheets below them.

    python preprocess/make_demo.py --out out/demo

writes out/demo/scenes/*.tif (blue, green, red, near infrared; uint16; 10 m; UTM) and out/demo/landcover/*.tif (30 m,
a sheet for each UTM zone). The landscape straddles 12 degrees east, so zones 32 and 33 are both needed. The same
settings give the same bytes; a folder that already holds them is left as it is.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the folder on the path must be the project's, not this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from geokr.landcover import load_product
from preprocess import demo_raster
from preprocess.demo_map import SHEET_PIXELS, draw_sheet
from preprocess.demo_materials import BANDS, WAVELENGTHS_NM
from preprocess.demo_noise import chance, mix
from preprocess.demo_sensor import Sky, photograph
from preprocess.demo_survey import NODE_PIXELS, PIXEL_M, Frame, node_places

VERSION = 1  # of the landscape: raise it when the same settings would give other bytes
WGS84, WORLD_EPSG = 4326, 32632
CENTRE_LON, CENTRE_LAT = 12.0, 48.0
ZONES, SOUTHMOST_LAT, MAP_YEAR, IMAGE_YEAR = (32, 33), 45, 2020, 2023
ZONE_OVERLAP_DEGREES = 0.05  # 3.7 km at this latitude: how far a sheet goes on beyond its zone
SCENE_OVERLAP = 0.1
SHEET_PIXEL_M = SHEET_PIXELS * PIXEL_M
_SCENE_SALT, _SKY_SALT = 1100, 1120
TAG = "TIFFTAG_IMAGEDESCRIPTION"


class DemoError(ValueError):
    """Demo data that cannot be made; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Placement:
    """A raster north up in a UTM zone. west, north: its corner in metres. rows, columns: pixels of 10 m."""

    epsg: int
    west: float
    north: float
    rows: int
    columns: int

    def nodes(self, epsg: int) -> np.ndarray:
        """float64 [ny, nx, 2]: coordinates of the frame's nodes in another projection."""
        xs, ys = np.meshgrid(
            self.west + PIXEL_M * node_places(self.columns), self.north - PIXEL_M * node_places(self.rows)
        )
        return np.stack(demo_raster.transform(self.epsg, epsg, xs, ys), axis=-1)

    def frame(self) -> Frame:
        return Frame(self.rows, self.columns, self.nodes(WORLD_EPSG) - world_centre())


def world_centre() -> np.ndarray:
    """Easting and northing of the world's centre, in metres of the world's projection, on whole 10 m."""
    x, y = demo_raster.transform(WGS84, WORLD_EPSG, np.array([CENTRE_LON]), np.array([CENTRE_LAT]))
    return np.round(np.array([x[0], y[0]]) / PIXEL_M) * PIXEL_M


def spiral() -> Iterator[tuple[int, int]]:
    """(0, 0), then the cells around it ring by ring; the n-th does not depend on how many are taken."""
    yield 0, 0
    ring = 1
    while True:
        x, y = ring, 1 - ring
        for dx, dy in ((0, 1), (-1, 0), (0, -1), (1, 0)):
            for _ in range(2 * ring - (dy == 1 and dx == 0)):
                yield x, y
                x, y = x + dx, y + dy
        yield x, y
        ring += 1


def scene_placement(number: int, size: int) -> Placement:
    """Scene ``number`` of a block of scenes that overlap by a tenth, in the zone that its centre lies in."""
    cells = spiral()
    column, row = [next(cells) for _ in range(number + 1)][-1]
    pitch = size * PIXEL_M * (1.0 - SCENE_OVERLAP)
    x, y = world_centre() + pitch * np.array([column, row])
    (lon,), _ = demo_raster.transform(WORLD_EPSG, WGS84, np.array([x]), np.array([y]))
    zone = math.floor((lon + 1e-6 + 180.0) / 6.0) + 1 if number else ZONES[0]
    epsg = 32600 + zone
    (east,), (north,) = demo_raster.transform(WORLD_EPSG, epsg, np.array([x]), np.array([y]))
    half = size * PIXEL_M / 2.0
    return Placement(
        epsg, math.floor((east - half) / PIXEL_M) * PIXEL_M, math.ceil((north + half) / PIXEL_M) * PIXEL_M, size, size
    )


def sheet_bounds(zone: int) -> tuple[float, float, float, float]:
    """West, east, south, north in degrees of what a zone's sheet shows: the zone and a little beyond."""
    west = 6.0 * zone - 186.0
    return west - ZONE_OVERLAP_DEGREES, west + 6.0 + ZONE_OVERLAP_DEGREES, SOUTHMOST_LAT, SOUTHMOST_LAT + 5.0


def sheet_placement(zone: int, scenes: Sequence[Placement]) -> Placement | None:
    """The part of a zone's sheet that lies below the scenes, or None where they don't reach into it."""
    epsg, (west, east, _, _) = 32600 + zone, sheet_bounds(zone)
    found = []
    for scene in scenes:
        lon = scene.nodes(WGS84)[..., 0]
        found.append(scene.nodes(epsg)[(lon >= west) & (lon <= east)])
    places = np.concatenate(found)
    if not len(places):
        return None
    step = NODE_PIXELS * PIXEL_M  # between nodes: the zone's edge lies somewhere between two of them
    low = np.floor((places.min(axis=0) - step) / SHEET_PIXEL_M) * SHEET_PIXEL_M
    high = np.ceil((places.max(axis=0) + step) / SHEET_PIXEL_M) * SHEET_PIXEL_M
    columns, rows = (np.round((high - low) / PIXEL_M)).astype(int).tolist()
    return Placement(epsg, float(low[0]), float(high[1]), rows, columns)


def overpass(seed: int, number: int) -> tuple[Sky, str]:
    """Weather, season and sun of a scene, and when it was taken, ``YYYY:MM:DD hh:mm:ss``."""
    key = mix(np.uint64(seed), _SKY_SALT, number, 0)
    days = 45 + round(40.0 * chance(np.uint64(seed), _SCENE_SALT, number, 0)) if number else 58
    season = days / 110.0
    taken = np.datetime64(f"{IMAGE_YEAR}-06-05") + days
    sky = Sky(key, season, sun_azimuth=152.0, sun_elevation=63.0 - 15.0 * season)
    return sky, f"{str(taken).replace('-', ':')} 10:16:31"


def make_scene(path: Path, number: int, size: int, seed: int, threads: int, label: str) -> None:
    """Paints and writes one scene."""
    placement = scene_placement(number, size)
    frame, (sky, taken) = placement.frame(), overpass(seed, number)
    image = photograph(frame.backdrop(np.uint64(seed)), frame, sky, threads)
    demo_raster.write_geotiff(
        path, image, placement.epsg, placement.west, placement.north, PIXEL_M,
        nodata=0, bands=BANDS, tags={TAG: label, "TIFFTAG_DATETIME": taken, "AREA_OR_POINT": "Area"},
        band_tags=[{"CENTRAL_WAVELENGTH_UM": f"{nm / 1000:.3f}"} for nm in WAVELENGTHS_NM],
    )  # fmt: skip


def make_sheet(path: Path, zone: int, placement: Placement, seed: int, threads: int, label: str) -> None:
    """Draws and writes one land-cover sheet."""
    codes = draw_sheet(np.uint64(seed), zone, placement.frame(), placement.nodes(WGS84), sheet_bounds(zone), threads)
    product = load_product("globeland30")
    colours = {code: entry.rgb for entry in product.classes for code in entry.codes}
    demo_raster.write_geotiff(
        path, codes[None], placement.epsg, placement.west, placement.north, SHEET_PIXEL_M,
        nodata=0, tags={TAG: label, "AREA_OR_POINT": "Area"}, colours=colours,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Job:
    """A file of the demo. label: the settings that decide its bytes, kept in the file's description."""

    path: Path
    label: str
    write: Callable[[], None]

    def is_done(self) -> bool:
        """Whether the file stands there, whole, with these settings. Raises DemoError if it has others."""
        if not self.path.exists():
            return False
        found = demo_raster.read_tag(self.path, TAG)
        if found != self.label:
            raise DemoError(
                f"{self.path}: expected {self.label!r}, got {found!r}: the folder holds something else. "
                "Give another --out, or remove the folder"
            )
        return True


def plan(out: Path, size: int, scenes: int, seed: int, threads: int) -> list[Job]:
    """Every file of the demo. Raises DemoError if the scenes would leave the two sheets."""
    label = f"geokr demo {VERSION}: seed {seed}, size {size}"
    sheet_label = f"{label}, {scenes} scenes"
    placements = [scene_placement(number, size) for number in range(scenes)]
    for number, placement in enumerate(placements):
        lon, lat = np.moveaxis(placement.nodes(WGS84), -1, 0)
        if lon.min() < 6.0 or lon.max() > 18.0 or lat.min() < SOUTHMOST_LAT or lat.max() > SOUTHMOST_LAT + 5.0:
            raise DemoError(
                f"scene {number} of {size} pixels lies beyond 6 to 18 degrees east, {SOUTHMOST_LAT} to "
                f"{SOUTHMOST_LAT + 5} degrees north: give fewer --scenes or a smaller --size"
            )
    jobs = []
    for number in range(scenes):
        day = overpass(seed, number)[1][:10].replace(":", "")
        path = out / "scenes" / f"scene_{number:02}_{day}.tif"
        jobs.append(Job(path, label, partial(make_scene, path, number, size, seed, threads, label)))
    for zone in ZONES:
        placement = sheet_placement(zone, placements)
        if placement is not None:
            path = out / "landcover" / f"N{zone}_{SOUTHMOST_LAT}_{MAP_YEAR}LC030.tif"
            jobs.append(Job(path, sheet_label, partial(make_sheet, path, zone, placement, seed, threads, sheet_label)))
    return jobs


def make(out: Path, size: int = 3600, scenes: int = 1, seed: int = 0, threads: int = 2) -> Iterator[tuple[Path, bool]]:
    """Makes what is missing, and yields each file and whether it was written now.

    Raises DemoError if the folder holds anything else, before anything is written.
    """
    jobs = plan(out, size, scenes, seed, threads)
    for folder in ("scenes", "landcover"):
        for path in sorted((out / folder).glob("*.tif")):
            if path not in [job.path for job in jobs]:
                raise DemoError(f"{path}: not part of this demo. Give another --out, or remove the folder")
    done = [job.is_done() for job in jobs]
    for job, finished in zip(jobs, done, strict=True):
        if not finished:
            job.write()
        yield job.path, not finished


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="make_demo.py", description="Scenes of a procedural landscape, and the land-cover sheets below them."
    )
    made.add_argument("--out", required=True, type=Path, help="folder for scenes/ and landcover/")
    made.add_argument("--size", type=int, default=3600, help="side of a scene in pixels of 10 m (default 3600)")
    made.add_argument("--scenes", type=int, default=1, help="scenes side by side, a tenth of each shared (default 1)")
    made.add_argument("--seed", type=int, default=0, help="which landscape (default 0)")
    made.add_argument("--threads", type=int, default=None, help="default: one a core; does not change the bytes")
    return made


def check(chosen: argparse.Namespace) -> None:
    """Raises DemoError for a number that makes no sense."""
    for name, low, high in (("size", 256, 10980), ("scenes", 1, 100), ("seed", 0, 2**63 - 1), ("threads", 1, 1024)):
        value = getattr(chosen, name)
        if value is not None and not low <= value <= high:
            raise DemoError(f"--{name} {value}: expected {low} to {high}")


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = parser().parse_args(arguments)
    started = time.monotonic()
    try:
        check(chosen)
        threads = chosen.threads or os.cpu_count() or 1
        for path, written in make(chosen.out, chosen.size, chosen.scenes, chosen.seed, threads):
            took = f"{time.monotonic() - started:5.1f} s, {path.stat().st_size / 1e6:5.1f} MB" if written else "kept"
            print(f"{path}  ({took.strip()})", flush=True)
    except (DemoError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        f"next: python preprocess/pack_records.py --scenes '{chosen.out}/scenes/*.tif' "
        f"--land-cover '{chosen.out}/landcover/*.tif' --product globeland30 --out out/records "
        "'tile.bands=[red,green,blue]'"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
