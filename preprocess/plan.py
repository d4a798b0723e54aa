"""Planning: which scenes, which land cover, which chunks; everything that can go wrong early does so here.

A plan is a pure function of the inputs, the configuration and the seed. It reads headers only.
"""

import glob
import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geokr.config import suggestion
from geokr.landcover import Legend, Product, build_legend, load_product
from geokr.records import SCHEMA_VERSION, Band
from preprocess import labels, raster
from preprocess.grid import Chunk, chunks
from preprocess.labels import LabelSheet
from preprocess.options import PackOptions
from preprocess.raster import RasterError, Scene


class PlanError(ValueError):
    """Inputs that cannot become a dataset; the message names file or key and the remedy."""


@dataclass(frozen=True, slots=True)
class SceneTask:
    """A scene with what labels it. bands: 1-based numbers. subdivisions: label pixels a scene pixel (x, y)."""

    scene: Scene
    bands: tuple[int, ...]
    sheets: tuple[LabelSheet, ...]
    subdivisions: tuple[int, int]
    chunks: tuple[Chunk, ...]

    @property
    def tiles(self) -> int:
        return sum(chunk.tiles for chunk in self.chunks)


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """All that packing needs. rejected: scenes left out, by id, with the reason's key."""

    options: PackOptions
    product: Product
    legend: Legend
    bands: tuple[Band, ...]
    dtype: str
    tasks: tuple[SceneTask, ...]
    sheets: tuple[LabelSheet, ...]
    rejected: Mapping[str, str]
    config: Mapping[str, Any]

    @property
    def tiles(self) -> int:
        return sum(task.tiles for task in self.tasks)

    def identity(self) -> dict[str, Any]:
        """What decides the dataset's bytes: two runs with equal identities write equal files."""
        return {
            "schema_version": SCHEMA_VERSION,
            "config": dict(self.config),
            "scenes": {task.scene.scene_id: task.scene.fingerprint for task in self.tasks},
            "rejected": dict(self.rejected),
            "land_cover": {str(i): sheet.sheet.fingerprint for i, sheet in enumerate(self.sheets)},
        }


def find_files(patterns: Sequence[str], what: str) -> list[str]:
    """Files that match globs, or stand in text lists (``@list.txt``, a path a line), sorted, without doubles.

    Raises PlanError for a pattern that matches nothing.
    """
    found: set[str] = set()
    for pattern in patterns:
        if pattern.startswith("@"):
            found.update(_listed(pattern[1:], what))
            continue
        # a file whose name holds brackets is no pattern
        matches = (
            [pattern] if os.path.isfile(pattern) else list(filter(os.path.isfile, glob.iglob(pattern, recursive=True)))
        )
        if not matches:
            hint = "a folder: add /*.tif to it" if os.path.isdir(pattern) else "nothing matches"
            raise PlanError(f"{what} {pattern!r}: {hint} (current folder: {os.getcwd()})")
        found.update(os.path.abspath(path) for path in matches)
    return sorted(found)


def _listed(path: str, what: str) -> list[str]:
    try:
        lines = [line.strip() for line in Path(path).read_text().splitlines()]
    except OSError as error:
        raise PlanError(f"{what} @{path}: the list cannot be read ({error})") from error
    base = Path(path).resolve().parent
    listed = [os.path.abspath(base / line) for line in lines if line and not line.startswith("#")]
    if missing := [file for file in listed if not os.path.isfile(file)]:
        raise PlanError(f"{what} @{path}: {len(missing)} of its files do not exist, the first is {missing[0]}")
    return listed


def scene_ids(paths: Sequence[str]) -> dict[str, str]:
    """Path to scene id: the file's name without ending, with as many folders before it as make it unique.

    Names in one folder that differ in nothing but the ending keep it.
    """
    bare = Counter(os.path.splitext(path)[0] for path in paths)
    names = {path: Path(path).name if bare[os.path.splitext(path)[0]] > 1 else Path(path).stem for path in paths}
    ids, depth = dict(names), 0
    while len(set(ids.values())) < len(ids):
        depth += 1
        counts = Counter(ids.values())
        for path, name in ids.items():
            if counts[name] > 1:
                ids[path] = "/".join((*Path(path).parts[-1 - depth : -1], names[path]))
    return ids


def make_plan(scene_patterns: Sequence[str], sheet_patterns: Sequence[str], product: str, options: PackOptions) -> Plan:
    """Raises PlanError, ConfigError, RasterError or LabelError before any pixel is read."""
    table = load_product(product)
    legend = make_legend(table, options)
    paths = find_files(scene_patterns, "--scenes")
    with raster.environment():
        sheets = labels.label_sheets(
            [raster.read_sheet(path) for path in find_files(sheet_patterns, "--land-cover")], table
        )
        scenes, rejected = _read_scenes(paths, options)
        _check_alike(scenes)
        bands = _choose_bands(scenes[0], options)
        _check_band_names(scenes, bands, options)
        dtype = _tile_dtype(scenes[0], len(bands), options)
        tasks = _scene_tasks(scenes, sheets, options)
    config = {
        "product": table.name,
        "product_table": table_digest(table, legend),
        **options.model_dump(mode="json", exclude={"workers"}),
    }
    return Plan(options, table, legend, bands, dtype, tasks, tuple(sheets), rejected, config)


def table_digest(product: Product, legend: Legend) -> str:
    """Identifies what a product's table comes to: another meaning of a code makes another dataset."""
    digest = hashlib.sha256(legend.lookup.tobytes())
    digest.update(repr((product.title, legend.classes, product.filename and product.filename.pattern)).encode())
    return digest.hexdigest()[:24]


def make_legend(product: Product, options: PackOptions) -> Legend:
    """The dataset's classes by ``labels.groups``, ``labels.merge`` and ``labels.drop``. Raises ConfigError."""
    merge = {name: list(members) for name, members in options.labels.merge.items()}
    if options.labels.groups:
        if not product.groups:
            raise PlanError(f"labels.groups: the table of product {product.name!r} defines no groups")
        names = {code: entry.name for entry in product.classes for code in entry.codes}
        merge = {**{group: [names[code] for code in codes] for group, codes in product.groups.items()}, **merge}
    return build_legend(product, merge, options.labels.drop)


def _read_scenes(paths: Sequence[str], options: PackOptions) -> tuple[list[Scene], dict[str, str]]:
    scenes, rejected, messages = [], {}, []
    for path, scene_id in scene_ids(paths).items():
        try:
            scenes.append(raster.read_scene(path, scene_id, options.scene.nodata))
        except RasterError as error:
            rejected[scene_id] = error.reason
            messages.append(str(error))
    if len(rejected) > options.max_bad_fraction * len(paths):
        raise PlanError(
            f"{len(rejected)} of {len(paths)} scenes cannot be used (max_bad_fraction={options.max_bad_fraction}):\n"
            + "\n".join(f"  {message}" for message in messages[:20])
        )
    if not scenes:
        raise PlanError("no scene can be used:\n" + "\n".join(f"  {message}" for message in messages[:20]))
    return sorted(scenes, key=lambda scene: scene.scene_id), rejected


def _check_alike(scenes: Sequence[Scene]) -> None:
    first = scenes[0]
    for scene in scenes[1:]:
        for what, a, b in (
            ("bands", len(first.band_names), len(scene.band_names)),
            ("dtype", first.dtype, scene.dtype),
        ):
            if a != b:
                raise PlanError(
                    f"mixed scenes: {first.path} has {what} {a}, {scene.path} has {b}; pack them as separate datasets"
                )


def _choose_bands(scene: Scene, options: PackOptions) -> tuple[Band, ...]:
    available = scene.band_names
    wanted = options.tile.bands
    if wanted is None:
        wanted = tuple(i + 1 for i, name in enumerate(available) if name != "alpha")
    numbers = []
    for band in wanted:
        if isinstance(band, str) and band not in available:
            raise PlanError(
                f"tile.bands: no band {band!r} in {scene.path}{suggestion(band, available)}; "
                f"it has {', '.join(available)}"
            )
        number = available.index(band) + 1 if isinstance(band, str) else band
        if not 1 <= number <= len(available):
            raise PlanError(f"tile.bands: no band {number} in {scene.path}, which has 1 to {len(available)}")
        numbers.append(number)
    if len(set(numbers)) != len(numbers):
        raise PlanError(f"tile.bands: a band stands twice in {list(wanted)}")
    return tuple(Band(name=available[n - 1], number=n, wavelength_nm=scene.wavelengths_nm[n - 1]) for n in numbers)


def _check_band_names(scenes: Sequence[Scene], bands: Sequence[Band], options: PackOptions) -> None:
    """Bands chosen by number must carry the same names in every scene: band 1 must not be red here, blue there."""
    for scene in scenes[1:]:
        names = [band.name for band in _choose_bands(scene, options)]
        if names != [band.name for band in bands]:
            raise PlanError(
                f"tile.bands: means {', '.join(band.name for band in bands)} in {scenes[0].path} but "
                f"{', '.join(names)} in {scene.path}; choose bands by name, or pack them as separate datasets"
            )


def _tile_dtype(scene: Scene, bands: int, options: PackOptions) -> str:
    dtype = scene.dtype if options.stretch.mode == "none" else "uint8"
    if options.tile.codec == "jpeg" and (dtype != "uint8" or bands != 3):
        raise PlanError(
            f"tile.codec=jpeg holds 3 bands of 8 bits; here tiles have {bands} of {dtype} "
            f"(scenes of {scene.dtype}, stretch.mode={options.stretch.mode}): use tile.codec=raw, or stretch to 8 bits"
        )
    pairs = len(options.stretch.limits or ())
    if pairs not in (0, 1, bands):
        raise PlanError(f"stretch.limits has {pairs} pairs for {bands} bands: give one pair, or one a band")
    return dtype


def _scene_tasks(scenes: Sequence[Scene], sheets: Sequence[LabelSheet], options: PackOptions) -> tuple[SceneTask, ...]:
    tasks = []
    for scene in scenes:
        numbers = tuple(band.number for band in _choose_bands(scene, options))
        _check_positions(scene, options)
        under = labels.overlapping(scene.grid, scene.crs, sheets)
        under = labels.sheets_of_nearest_year(under, scene.scene_id, scene.date)
        kx, ky = labels.subdivision(scene.grid, scene.crs, under)
        _check_block(scene, options)
        bytes_a_pixel = len(numbers) * (_itemsize(scene.dtype) * 2 + 1) + 1  # source, its preview, and a mask
        tile = options.tile
        cut = tuple(chunks(scene.grid.width, scene.grid.height, tile.size, tile.step, bytes_a_pixel))
        tasks.append(SceneTask(scene, numbers, tuple(under), (kx, ky), cut if under else ()))
    if not any(task.sheets for task in tasks):
        raise PlanError(
            f"none of the {len(tasks)} scenes overlaps the land cover: "
            f"{tasks[0].scene.path} lies at {_place(tasks[0].scene)}; check --land-cover, and the rasters' CRS"
        )
    if not any(task.chunks for task in tasks):
        sizes = {f"{task.scene.grid.width}x{task.scene.grid.height}" for task in tasks}
        raise PlanError(
            f"no scene holds a tile of {options.tile.size} pixels (scenes of {', '.join(sorted(sizes))}); set tile.size"
        )
    return tuple(tasks)


def _itemsize(dtype: str) -> int:
    return {"uint8": 1, "uint16": 2, "int16": 2, "float32": 4}[dtype]


# A plan keeps some tens of bytes a tile, so this is a few GB; and 20 TB of raw 256 px tiles.
MAX_POSITIONS = 1 << 27


def _check_positions(scene: Scene, options: PackOptions) -> None:
    tile = options.tile
    across, down = (len(range(0, n - tile.size + 1, tile.step)) for n in (scene.grid.width, scene.grid.height))
    if across * down > MAX_POSITIONS:
        raise PlanError(
            f"{scene.path}: {across * down} tiles of {tile.size} px every {tile.step} px in "
            f"{scene.grid.width} x {scene.grid.height} pixels, at most {MAX_POSITIONS} are possible: "
            "use a larger tile.step, or cut the scene; if that is not its size, its header is damaged"
        )


def _check_block(scene: Scene, options: PackOptions) -> None:
    steps = labels.ground_steps(scene.grid, scene.crs, *labels.middle_of(scene.grid, scene.crs))
    side = max(steps) * options.tile.size
    if options.split.val_fraction > 0 and options.split.block_m < 2 * side:
        raise PlanError(
            f"split.block_m={options.split.block_m:g} is under two sides of a tile of {scene.path} "
            f"({side:.0f} m each): set it to at least {2 * side:.0f}"
        )


def _place(scene: Scene) -> str:
    x, y = scene.grid.xy(scene.grid.width / 2, scene.grid.height / 2)
    lon, lat = raster.transform_points(scene.crs, labels.WGS84, x.reshape(1), y.reshape(1))
    return f"longitude {lon[0]:.3f}, latitude {lat[0]:.3f}"


def identity_json(plan: Plan) -> bytes:
    return json.dumps(plan.identity(), sort_keys=True, indent=1).encode() + b"\n"
