"""Planning: which scenes, which land cover, which chunks; everything that can go wrong early does so here.

A plan is a pure function of the inputs, the configuration and the seed. It reads headers only.
"""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from geokr.landcover import Legend, Product
from geokr.manifests import SCHEMA_VERSION, Band
from preprocess import bands, covers, gdal_files, ground, masks, precut, scene_headers
from preprocess.coordinates import WGS84
from preprocess.covers import Cover, SceneCover
from preprocess.errors import RasterError
from preprocess.georeference import Placement
from preprocess.grid import Chunk, chunk_tiles, chunks
from preprocess.inputs import PlanError, scene_ids
from preprocess.options import PackOptions
from preprocess.precut import Files, Sample
from preprocess.raster import Scene
from preprocess.scene import Source, open_scene
from preprocess.sensor import Sensor, load_sensor
from preprocess.sheets import LabelSheet
from preprocess.sources import find_sources


@dataclass(frozen=True, slots=True)
class SceneTask:
    """A scene with what labels it. bands: 1-based numbers. covers: the dataset's products over it, in its order.

    Tiles that are cut already are one task: scene is the first of them under the folder's name, sample says which to
    take stretch limits from, and covers hold all sheets, of which each tile finds its own.
    """

    scene: Scene
    bands: tuple[int, ...]
    covers: tuple[SceneCover, ...]
    chunks: tuple[Chunk | Files, ...]
    sample: Sample | None = None

    @property
    def is_covered(self) -> bool:
        """Whether every product has a sheet that may lie under it."""
        return all(cover.sheets for cover in self.covers)

    @property
    def tiles(self) -> int:
        return sum(chunk.tiles for chunk in self.chunks)


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """All that packing needs. covers: the product of ``--product``, then further ones. rejected: scenes left out, by
    id, with the reason's key. warnings: what is allowed but may not be meant."""

    options: PackOptions
    covers: tuple[Cover, ...]
    bands: tuple[Band, ...]
    dtype: str
    tasks: tuple[SceneTask, ...]
    rejected: Mapping[str, str]
    config: Mapping[str, Any]
    warnings: tuple[str, ...] = ()
    checksums: Mapping[str, str] = field(default_factory=dict)

    @property
    def product(self) -> Product:
        return self.covers[0].product

    @property
    def legend(self) -> Legend:
        return self.covers[0].legend

    @property
    def sheets(self) -> tuple[LabelSheet, ...]:
        return self.covers[0].sheets

    @property
    def tiles(self) -> int:
        return sum(task.tiles for task in self.tasks)

    def inputs(self) -> list[str]:
        """Paths or URLs of what tasks read."""
        layers = (layer.path for task in self.tasks for layer in task.scene.layers if layer is not None)
        masks = (task.scene.mask.path for task in self.tasks if task.scene.mask is not None)
        return list(dict.fromkeys((*layers, *masks, *self.shared_inputs())))

    def shared_inputs(self) -> list[str]:
        """Those that belong to no scene: land-cover sheets, and the DEM if there is one."""
        dem = [self.options.scene.dem] if self.options.scene.dem else []
        return [*(sheet.sheet.path for cover in self.covers for sheet in cover.sheets), *dem]

    def identity(self) -> dict[str, Any]:
        """What decides the dataset's bytes: two runs with equal identities write equal files."""
        return {
            "schema_version": SCHEMA_VERSION,
            "config": dict(self.config),
            "scenes": {task.scene.scene_id: task.scene.fingerprint for task in self.tasks},
            "rejected": dict(self.rejected),
            "land_cover": {str(i): sheet.sheet.fingerprint for i, sheet in enumerate(self.sheets)},
            # fingerprints do not see every byte: what was scanned of a damaged file must not go into a checked dataset
            **({"checksums": dict(self.checksums)} if self.checksums else {}),
            "also": {
                cover.name: {str(i): sheet.sheet.fingerprint for i, sheet in enumerate(cover.sheets)}
                for cover in self.covers[1:]
            },
        }


def make_plan(
    scene_patterns: Sequence[str],
    sheet_patterns: Sequence[str],
    product: str,
    options: PackOptions,
    also: Mapping[str, Sequence[str]] | None = None,
) -> Plan:
    """also: further products, name to patterns of their sheets.

    Raises PlanError, ConfigError, RasterError or LabelError before any pixel is read.
    """
    _check_grid(options)
    sensor = load_sensor(options.scene.sensor) if options.scene.sensor else None
    sources = find_sources(scene_patterns, sensor, options.scene.remote)
    with gdal_files.environment():
        products = covers.read_covers(sheet_patterns, product, also or {}, options)
        scenes, rejected = _read_scenes(sources, options, sensor)
        masks.check_some(scenes, options.mask)
        bands.check_alike(scenes)
        chosen = bands.choose_bands(scenes[0], options)
        bands.check_band_names(scenes, chosen, options)
        dtype = bands.tile_dtype(scenes[0], len(chosen), options)
        tasks = _scene_tasks(scenes, products, options)
    warnings = (
        *bands.warnings(scenes[0], options),
        *bands.offset_warnings(scenes, options),
        *covers.warnings(products),
    )
    return Plan(options, products, chosen, dtype, tasks, rejected, _config(products, options, sensor), warnings)


def make_tile_plan(
    folder: str,
    label_folder: str | None,
    sheet_patterns: Sequence[str],
    product: str,
    options: PackOptions,
    also: Mapping[str, Sequence[str]] | None = None,
) -> Plan:
    """The plan for tiles that are cut already (preprocess.precut): labelled by files beside them, or by a map.

    Arguments and errors as for :func:`make_plan`; further products are maps.
    """
    sensor = load_sensor(options.scene.sensor) if options.scene.sensor else None
    tiles, scene_id = precut.list_tiles(folder), Path(folder).resolve().name
    with gdal_files.environment():
        products = covers.read_covers(sheet_patterns, product, also or {}, options)
        if label_folder is None:
            by, listings, label_names = precut.Labels("map"), [tiles], ()
        else:
            kind, listing, label_names = precut.list_labels(label_folder, tiles)
            if kind == "json" and options.labels.grid:
                raise PlanError(
                    f"labels.grid={options.labels.grid}: the histograms in {label_folder} do not say where in a tile "
                    "classes are; give --land-cover sheets or label rasters, or leave labels.grid at 0"
                )
            codes = tuple((entry.name, entry.codes[0]) for entry in products[0].product.classes)
            by, listings = precut.Labels(kind, listing.folder, codes), [tiles, listing]
        with gdal_files.many_small_files():
            placement = _placement(options)
            sample, names_of_sample = precut.look(tiles, scene_id, options, sensor, placement)
        masks.check_some(sample, options.mask)
        first = sample[0]
        options = precut.tile_options(options, first)
        _check_grid(options)
        chosen = bands.choose_bands(first, options)
        dtype = bands.tile_dtype(first, len(chosen), options)
        _check_block(first, options)
        identity = precut.fingerprint(listings, sample, placement)
        whole = replace(first, path=tiles.folder, fingerprint=identity, date="")
    numbers = tuple(band.number for band in chosen)
    cut = precut.chunks(tiles, by, label_names, first, sensor, placement)
    few = Sample(tiles.folder, names_of_sample, sensor, placement)
    task = SceneTask(whole, numbers, tuple(map(covers.whole, products)), cut, few)
    config = {**_config(products, options, sensor), **precut.config_of(by)}
    warnings = (*bands.warnings(first, options), *covers.warnings(products))
    return Plan(options, products, chosen, dtype, (task,), {}, config, warnings)


def _check_grid(options: PackOptions) -> None:
    """Raises PlanError unless squares of whole pixels make up a tile."""
    grid, size = options.labels.grid, options.tile.size
    if grid and size % grid:
        fitting = ", ".join(str(side) for side in range(2, 17) if size % side == 0)
        raise PlanError(
            f"labels.grid={grid} does not divide tiles of {size} pixels into squares of whole pixels: use "
            f"{fitting or 'another tile.size'}"
        )


def _config(products: Sequence[Cover], options: PackOptions, sensor: Sensor | None) -> dict[str, Any]:
    """What the manifest keeps of the configuration: no paths, which fingerprints stand for, and no workers."""
    config = {
        "product": products[0].product.name,
        "product_table": products[0].digest(),
        # not where masks were looked for: their fingerprints say which they are
        **options.model_dump(mode="json", exclude={"workers": True, "mask": {"pattern"}, "scene": {"remote"}}),
    }
    config["labels"]["also"] = {
        cover.name: {
            "product_table": cover.digest(),
            **cover.options.model_dump(mode="json"),
            "product": cover.product.name,
        }
        for cover in products[1:]
    }
    if not options.labels.grid:  # as datasets say that were made before there were grids
        del config["labels"]["grid"]
    if sensor is not None:  # its name, for a table of the user's own is given by its path
        config["scene"]["sensor"] = sensor.name
        config["sensor_table"] = sensor.digest
    if options.scene.dem:  # where it lies does not count; its content does, in fingerprints
        config["scene"]["dem"] = Path(options.scene.dem).name
    return config


def _placement(options: PackOptions) -> Placement:
    how = options.scene
    return Placement(how.height, scene_headers.read_dem(how.dem) if how.dem else None, how.gcp)


def _read_scenes(
    sources: Sequence[Source], options: PackOptions, sensor: Sensor | None
) -> tuple[list[Scene], dict[str, str]]:
    placement = _placement(options)

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


def _scene_tasks(scenes: Sequence[Scene], products: Sequence[Cover], options: PackOptions) -> tuple[SceneTask, ...]:
    tasks = []
    most = chunk_tiles(sum(_positions(scene, options) for scene in scenes))
    for scene in scenes:
        numbers = tuple(band.number for band in bands.choose_bands(scene, options))
        over = tuple(covers.narrowed(covers.whole(cover), scene, scene.scene_id) for cover in products)
        _check_block(scene, options)
        bytes_a_pixel = len(numbers) * (_itemsize(scene.dtype) * 2 + 1) + 1  # source, its preview, and a mask
        tile = options.tile
        cut = tuple(chunks(scene.place.width, scene.place.height, tile.size, tile.step, bytes_a_pixel, most))
        tasks.append(SceneTask(scene, numbers, over, cut if all(cover.sheets for cover in over) else ()))
    _check_covered(tasks)
    if not any(task.chunks for task in tasks):
        sizes = {f"{task.scene.place.width}x{task.scene.place.height}" for task in tasks}
        raise PlanError(
            f"no scene holds a tile of {options.tile.size} pixels (scenes of {', '.join(sorted(sizes))}); set tile.size"
        )
    return tuple(tasks)


def _check_covered(tasks: Sequence[SceneTask]) -> None:
    """Raises PlanError where not one scene has land cover of every product."""
    if any(task.is_covered for task in tasks):
        return
    first = tasks[0]
    for number, cover in enumerate(first.covers):
        if not any(task.covers[number].sheets for task in tasks):
            what, option = ("land cover", "--land-cover") if number == 0 else (cover.name, f"--also {cover.name}")
            raise PlanError(
                f"none of the {len(tasks)} scenes overlaps the {what}: "
                f"{first.scene.path} lies at {_place(first.scene)}; check {option}, and the rasters' CRS"
            )
    raise PlanError("no scene overlaps all the products: a tile needs every one of them; check --land-cover and --also")


def _itemsize(dtype: str) -> int:
    return {"uint8": 1, "uint16": 2, "int16": 2, "float32": 4}[dtype]


# A plan keeps some tens of bytes a tile, so this is a few GB; and 20 TB of raw 256 px tiles.
MAX_POSITIONS = 1 << 27


def _positions(scene: Scene, options: PackOptions) -> int:
    """How many tiles a scene has. Raises PlanError for more than a plan can hold."""
    tile = options.tile
    across, down = (len(range(0, n - tile.size + 1, tile.step)) for n in (scene.place.width, scene.place.height))
    if across * down > MAX_POSITIONS:
        raise PlanError(
            f"{scene.path}: {across * down} tiles of {tile.size} px every {tile.step} px in "
            f"{scene.place.width} x {scene.place.height} pixels, at most {MAX_POSITIONS} are possible: "
            "use a larger tile.step, or cut the scene; if that is not its size, its header is damaged"
        )
    return across * down


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
