"""Planning: which scenes, which land cover, which chunks; everything that can go wrong early does so here.

A plan is a pure function of the inputs, the configuration and the seed. It reads headers only.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from geokr.landcover import Legend, Product, build_legend, load_product
from geokr.records import SCHEMA_VERSION, Band
from preprocess import bands, ground, labels, masks, precut, raster, sheets
from preprocess.coordinates import WGS84
from preprocess.georeference import Placement
from preprocess.grid import Chunk, chunks
from preprocess.inputs import PlanError, find_files, scene_ids
from preprocess.options import PackOptions
from preprocess.precut import Files, Sample
from preprocess.raster import RasterError, Scene
from preprocess.scene import Source, open_scene
from preprocess.sensor import Sensor, load_sensor
from preprocess.sheets import LabelSheet
from preprocess.sources import find_sources


@dataclass(frozen=True, slots=True)
class SceneTask:
    """A scene with what labels it. bands: 1-based numbers. subdivisions: label pixels a scene pixel (x, y).

    Tiles that are cut already are one task: scene is the first of them under the folder's name, and sample says which
    to take stretch limits from; each tile finds its own sheets.
    """

    scene: Scene
    bands: tuple[int, ...]
    sheets: tuple[LabelSheet, ...]
    subdivisions: tuple[int, int]
    chunks: tuple[Chunk | Files, ...]
    sample: Sample | None = None

    @property
    def tiles(self) -> int:
        return sum(chunk.tiles for chunk in self.chunks)


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """All that packing needs. rejected: scenes left out, by id, with the reason's key. warnings: what is allowed but
    may not be meant."""

    options: PackOptions
    product: Product
    legend: Legend
    bands: tuple[Band, ...]
    dtype: str
    tasks: tuple[SceneTask, ...]
    sheets: tuple[LabelSheet, ...]
    rejected: Mapping[str, str]
    config: Mapping[str, Any]
    warnings: tuple[str, ...] = ()

    @property
    def tiles(self) -> int:
        return sum(task.tiles for task in self.tasks)

    def inputs(self) -> list[str]:
        """Paths or URLs of what tasks read."""
        layers = (layer.path for task in self.tasks for layer in task.scene.layers if layer is not None)
        return [*dict.fromkeys(layers), *(sheet.sheet.path for sheet in self.sheets)]

    def identity(self) -> dict[str, Any]:
        """What decides the dataset's bytes: two runs with equal identities write equal files."""
        return {
            "schema_version": SCHEMA_VERSION,
            "config": dict(self.config),
            "scenes": {task.scene.scene_id: task.scene.fingerprint for task in self.tasks},
            "rejected": dict(self.rejected),
            "land_cover": {str(i): sheet.sheet.fingerprint for i, sheet in enumerate(self.sheets)},
        }


def make_plan(scene_patterns: Sequence[str], sheet_patterns: Sequence[str], product: str, options: PackOptions) -> Plan:
    """Raises PlanError, ConfigError, RasterError or LabelError before any pixel is read."""
    table = load_product(product)
    legend = make_legend(table, options)
    sensor = load_sensor(options.scene.sensor) if options.scene.sensor else None
    allow_remote = options.scene.remote
    sources = find_sources(scene_patterns, sensor, allow_remote)
    with raster.environment():
        paths = find_files(sheet_patterns, "--land-cover", allow_remote)
        land_cover = sheets.label_sheets([raster.read_sheet(path) for path in paths], table)
        legend = sheets.with_sheet_colours(legend, table, land_cover)
        scenes, rejected = _read_scenes(sources, options, sensor)
        bands.check_alike(scenes)
        chosen = bands.choose_bands(scenes[0], options)
        bands.check_band_names(scenes, chosen, options)
        dtype = bands.tile_dtype(scenes[0], len(chosen), options)
        tasks = _scene_tasks(scenes, land_cover, options)
    config = _config(table, legend, options, sensor)
    warnings = tuple(bands.warnings(scenes[0], options))
    return Plan(options, table, legend, chosen, dtype, tasks, tuple(land_cover), rejected, config, warnings)


def make_tile_plan(
    folder: str, label_folder: str | None, sheet_patterns: Sequence[str], product: str, options: PackOptions
) -> Plan:
    """The plan for tiles that are cut already (preprocess.precut): labelled by files beside them, or by a map.

    Raises as :func:`make_plan`.
    """
    table = load_product(product)
    legend = make_legend(table, options)
    sensor = load_sensor(options.scene.sensor) if options.scene.sensor else None
    tiles, scene_id = precut.list_tiles(folder), Path(folder).resolve().name
    land_cover: list[LabelSheet] = []
    with raster.environment():
        if label_folder is None:
            paths = find_files(sheet_patterns, "--land-cover", options.scene.remote)
            land_cover = sheets.label_sheets([raster.read_sheet(path) for path in paths], table)
            legend = sheets.with_sheet_colours(legend, table, land_cover)
            by, listings, label_names = precut.Labels("map"), [tiles], ()
        else:
            kind, listing, label_names = precut.list_labels(label_folder, tiles)
            names = tuple((entry.name, entry.codes[0]) for entry in table.classes)
            by, listings = precut.Labels(kind, listing.folder, names), [tiles, listing]
        first, sample = precut.first_tile(tiles, scene_id, options, sensor)
        options = precut.tile_options(options, first)
        chosen = bands.choose_bands(first, options)
        dtype = bands.tile_dtype(first, len(chosen), options)
        _check_block(first, options)
        whole = replace(first, path=tiles.folder, fingerprint=precut.fingerprint(listings), date="")
    numbers = tuple(band.number for band in chosen)
    cut = precut.chunks(tiles, by, label_names, first, sensor)
    few = Sample(tiles.folder, tuple(sample), sensor)
    task = SceneTask(whole, numbers, tuple(land_cover), (1, 1), cut, few)
    config = {**_config(table, legend, options, sensor), **precut.config_of(by)}
    warnings = tuple(bands.warnings(first, options))
    return Plan(options, table, legend, chosen, dtype, (task,), tuple(land_cover), {}, config, warnings)


def _config(table: Product, legend: Legend, options: PackOptions, sensor: Sensor | None) -> dict[str, Any]:
    """What of the configuration decides the dataset's bytes."""
    config = {
        "product": table.name,
        "product_table": table_digest(table, legend),
        # not where masks were looked for: their fingerprints say which they are
        **options.model_dump(mode="json", exclude={"workers": True, "mask": {"pattern"}, "scene": {"remote"}}),
    }
    if sensor is not None:  # its name, for a table of the user's own is given by its path
        config["scene"]["sensor"] = sensor.name
        config["sensor_table"] = sensor.digest
    if options.scene.dem:  # where it lies does not count; its content does, in every scene's fingerprint
        config["scene"]["dem"] = Path(options.scene.dem).name
    return config


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


def _read_scenes(
    sources: Sequence[Source], options: PackOptions, sensor: Sensor | None
) -> tuple[list[Scene], dict[str, str]]:
    how = options.scene
    placement = Placement(how.height, raster.read_dem(how.dem) if how.dem else None, how.gcp)

    def opened(source: Source, scene_id: str) -> Scene | RasterError:
        try:
            return masks.with_mask(open_scene(source, scene_id, options, sensor, placement), options.mask)
        except RasterError as error:
            return error

    ids = scene_ids([(source.path, source.name) for source in sources])
    if options.scene.remote:  # headers behind URLs take a few requests each, most of which is waiting
        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(opened, sources, ids))
    else:
        found = [opened(source, scene_id) for source, scene_id in zip(sources, ids, strict=True)]
    scenes = [scene for scene in found if isinstance(scene, Scene)]
    errors = {name: error for name, error in zip(ids, found, strict=True) if isinstance(error, RasterError)}
    rejected, messages = {name: error.reason for name, error in errors.items()}, list(map(str, errors.values()))
    if len(rejected) > options.max_bad_fraction * len(sources):
        raise PlanError(
            f"{len(rejected)} of {len(sources)} scenes cannot be used (max_bad_fraction={options.max_bad_fraction}):\n"
            + "\n".join(f"  {message}" for message in messages[:20])
        )
    if not scenes:
        raise PlanError("no scene can be used:\n" + "\n".join(f"  {message}" for message in messages[:20]))
    return sorted(scenes, key=lambda scene: scene.scene_id), rejected


def _scene_tasks(
    scenes: Sequence[Scene], land_cover: Sequence[LabelSheet], options: PackOptions
) -> tuple[SceneTask, ...]:
    tasks = []
    for scene in scenes:
        numbers = tuple(band.number for band in bands.choose_bands(scene, options))
        _check_positions(scene, options)
        under = labels.overlapping(scene.place, land_cover)
        under = sheets.sheets_of_nearest_year(under, scene.scene_id, scene.date)
        kx, ky = labels.subdivision(scene.place, under)
        _check_block(scene, options)
        bytes_a_pixel = len(numbers) * (_itemsize(scene.dtype) * 2 + 1) + 1  # source, its preview, and a mask
        tile = options.tile
        cut = tuple(chunks(scene.place.width, scene.place.height, tile.size, tile.step, bytes_a_pixel))
        tasks.append(SceneTask(scene, numbers, tuple(under), (kx, ky), cut if under else ()))
    if not any(task.sheets for task in tasks):
        raise PlanError(
            f"none of the {len(tasks)} scenes overlaps the land cover: "
            f"{tasks[0].scene.path} lies at {_place(tasks[0].scene)}; check --land-cover, and the rasters' CRS"
        )
    if not any(task.chunks for task in tasks):
        sizes = {f"{task.scene.place.width}x{task.scene.place.height}" for task in tasks}
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
    across, down = (len(range(0, n - tile.size + 1, tile.step)) for n in (scene.place.width, scene.place.height))
    if across * down > MAX_POSITIONS:
        raise PlanError(
            f"{scene.path}: {across * down} tiles of {tile.size} px every {tile.step} px in "
            f"{scene.place.width} x {scene.place.height} pixels, at most {MAX_POSITIONS} are possible: "
            "use a larger tile.step, or cut the scene; if that is not its size, its header is damaged"
        )


def _check_block(scene: Scene, options: PackOptions) -> None:
    steps = ground.ground_steps(scene.place, *ground.middle_of(scene.place))
    side = max(steps) * options.tile.size
    if options.split.val_fraction > 0 and options.split.block_m < 2 * side:
        raise PlanError(
            f"split.block_m={options.split.block_m:g} is under two sides of a tile of {scene.path} "
            f"({side:.0f} m each): set it to at least {2 * side:.0f}"
        )


def _place(scene: Scene) -> str:
    lon, lat = scene.place.points(WGS84, np.array([scene.place.width / 2]), np.array([scene.place.height / 2]))
    return f"longitude {lon[0]:.3f}, latitude {lat[0]:.3f}"


def identity_json(identity: Mapping[str, Any]) -> bytes:
    return json.dumps(identity, sort_keys=True, indent=1).encode() + b"\n"
