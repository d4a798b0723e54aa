"""Tiles that are cut already: a folder of georeferenced rasters, each a tile as it is, and what labels them.

Planning lists names and sizes and opens a few files, spread over the folder; the rest are opened once, by the workers,
some hundreds to a task. Every tile lies where its file says, so the split by ground is that of scenes.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from preprocess import fingerprints, masks, rpc
from preprocess.errors import RasterError
from preprocess.georeference import Placement
from preprocess.inputs import PlanError, check_name
from preprocess.options import PackOptions
from preprocess.raster import Scene
from preprocess.scene import Source, open_scene
from preprocess.sensor import Sensor

RASTERS = (".tif", ".tiff", ".jp2")
# Tiles of a task: enough to make it worth its start, few enough that its kept pixels stay in memory.
MAX_FILES = 256
MAX_BYTES = 128 << 20
# Files that planning opens and that stretch limits are taken from, spread evenly over the folder.
SAMPLE = 256

LabelKind = Literal["map", "raster", "json"]


@dataclass(frozen=True, slots=True)
class Labels:
    """What labels tiles: a land-cover map, or a file beside each of them, in ``folder``.

    codes: class names of the product to one of their codes, for JSON files that name classes.
    """

    kind: LabelKind
    folder: str = ""
    codes: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Files:
    """Tiles of one task. names: paths in ``folder``; label_names: those of their labels in ``labels.folder``, or none.

    shape: (bands, dtype) of every file, all of them ``size`` x ``size`` pixels. sensor: what names their bands.
    placement: what places those without a CRS.
    """

    folder: str
    names: tuple[str, ...]
    label_names: tuple[str, ...]
    labels: Labels
    size: int
    shape: tuple[int, str]
    sensor: Sensor | None
    placement: Placement

    @property
    def tiles(self) -> int:
        return len(self.names)


@dataclass(frozen=True, slots=True)
class Sample:
    """Some of a folder's tiles, to take stretch limits from."""

    folder: str
    names: tuple[str, ...]
    sensor: Sensor | None
    placement: Placement


@dataclass(frozen=True, slots=True)
class Listing:
    """Files of a folder and its subfolders: path in it, with ``/``, to size in bytes; sorted."""

    folder: str
    sizes: dict[str, int]

    @classmethod
    def of(cls, folder: str, what: str, endings: Sequence[str]) -> "Listing":
        """Those with an ending. Raises PlanError if there is no such folder, not one file, or a name is not UTF-8."""
        if not os.path.isdir(folder):
            raise PlanError(f"{what} {folder}: there is no such folder")
        check_name(os.path.abspath(folder), what)
        sizes: dict[str, int] = {}
        for path, folders, names in os.walk(folder, onerror=_unread):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in names:
                if name.lower().endswith(tuple(endings)) and not name.startswith("."):
                    full = check_name(os.path.join(path, name), what)
                    sizes[Path(os.path.relpath(full, folder)).as_posix()] = os.path.getsize(full)
        if not sizes:
            raise PlanError(f"{what} {folder}: holds no {', '.join(endings)}; is it the right folder?")
        return cls(os.path.abspath(folder), dict(sorted(sizes.items())))

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)


def _unread(error: OSError) -> None:
    raise PlanError(f"{error.filename}: the folder cannot be read ({error.strerror}), so tiles would be missing")


def stem(name: str) -> str:
    """What a tile is called: its path in the folder without the ending."""
    return str(PurePosixPath(name).with_suffix(""))


def tile_id(scene_id: str, name: str) -> str:
    """The folder's name before it, so that tiles of other folders may be added to a dataset."""
    return f"{scene_id}/{stem(name)}"


def spread(names: Sequence[str], count: int = SAMPLE) -> list[str]:
    """At most ``count`` of the names, evenly spread, the first one among them."""
    return [names[i * len(names) // count] for i in range(count)] if len(names) > count else list(names)


def list_tiles(folder: str) -> Listing:
    """Raises PlanError where two tiles would have one id."""
    tiles = Listing.of(folder, "--tiles", RASTERS)
    twice = [name for name, count in Counter(map(stem, tiles.sizes)).items() if count > 1]
    if twice:
        raise PlanError(f"--tiles {folder}: {len(twice)} tiles are there in two formats, the first is {twice[0]}")
    return tiles


def list_labels(folder: str, tiles: Listing) -> tuple[LabelKind, Listing, tuple[str, ...]]:
    """(kind, listing, name of each tile's label). JSON where there is any, else rasters.

    Raises PlanError that counts and names tiles without one, or names two for one tile.
    """
    there = Listing.of(folder, "--labels", (".json", *RASTERS))
    by_stem: dict[LabelKind, dict[str, str]] = {"json": {}, "raster": {}}
    for name in there.sizes:
        called = by_stem["json" if name.lower().endswith(".json") else "raster"]
        if (other := called.setdefault(stem(name), name)) != name:
            raise PlanError(f"--labels {folder}: {other} and {name} are both for the tile {stem(name)}: keep one")
    kind: LabelKind = "json" if by_stem["json"] else "raster"
    if kind == "raster" and there.folder == tiles.folder:
        raise PlanError(f"--labels {folder}: holds the tiles themselves and no JSON files")
    found = by_stem[kind]
    missing = [name for name in tiles.sizes if stem(name) not in found]
    if missing:
        raise PlanError(
            f"--labels {folder}: {len(missing)} of {len(tiles.sizes)} tiles have no label file ({kind}) of their name: "
            f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}"
        )
    names = tuple(found[stem(name)] for name in tiles.sizes)
    return kind, Listing(there.folder, {name: there.sizes[name] for name in names}), names


def open_tile(
    folder: str, name: str, scene_id: str, options: PackOptions, sensor: Sensor | None, placement: Placement
) -> Scene:
    """A tile's header, without a fingerprint (the folder has one). Raises RasterError, PlanError for missing bands."""
    path = os.path.join(folder, name)
    scene = open_scene(Source(path, path, file=path), scene_id, options, sensor, placement, identify=False)
    return masks.with_mask(scene, options.mask, folder)


def form(scene: Scene) -> tuple[int, int, int, str]:
    """(width, height, bands, dtype)."""
    return scene.place.width, scene.place.height, len(scene.band_names), scene.dtype


def check_form(scene: Scene, size: int, shape: tuple[int, str]) -> None:
    """Raises RasterError for a tile that is not as the others."""
    if form(scene) != (size, size, *shape):
        raise RasterError(
            f"{scene.path}: {_said(form(scene))}, the first tiles are {_said((size, size, *shape))}", "size"
        )


def _said(found: tuple[int, int, int, str]) -> str:
    width, height, count, dtype = found
    return f"{width} x {height} pixels, {count} bands of {dtype}"


def look(
    tiles: Listing, scene_id: str, options: PackOptions, sensor: Sensor | None, placement: Placement
) -> tuple[list[Scene], tuple[str, ...]]:
    """(those of a sample that can be used, names of the whole sample), by their headers.

    Raises PlanError for tiles that are not square or not alike, or where too many cannot be used.
    """
    sample, scenes, errors = spread(list(tiles.sizes)), [], []
    for name in sample:
        try:
            scenes.append(open_tile(tiles.folder, name, scene_id, options, sensor, placement))
        except RasterError as error:
            errors.append(str(error))
    if not scenes or len(errors) > options.max_bad_fraction * len(tiles.sizes):
        raise PlanError(
            f"--tiles {tiles.folder}: {len(errors)} of the {len(sample)} tiles looked at cannot be used "
            f"(max_bad_fraction={options.max_bad_fraction:g}):\n" + "\n".join(f"  {line}" for line in errors[:20])
        )
    first = scenes[0]
    counts = Counter(map(form, scenes))
    if len(counts) > 1:
        odd = next(scene for scene in scenes if form(scene) != form(first))
        listed = "; ".join(f"{count} of {_said(found)}" for found, count in counts.most_common())
        raise PlanError(
            f"--tiles {tiles.folder}: tiles differ, of {len(sample)} looked at {listed}. The first odd one is "
            f"{odd.path}: pack them as separate datasets, or cut larger rasters with --scenes"
        )
    if first.place.width != first.place.height:
        raise PlanError(f"{first.path}: {_said(form(first))}; tiles must be square: cut them with --scenes")
    return scenes, tuple(sample)


def tile_options(options: PackOptions, first: Scene) -> PackOptions:
    """The options with the tiles' own size, and without a stretch where they have 8 bits and none is asked for.

    Raises PlanError where another size is asked for.
    """
    size = first.place.width
    if "size" in options.tile.model_fields_set and options.tile.size != size:
        raise PlanError(f"tile.size={options.tile.size}: the tiles have {size} pixels and are packed as they are")
    stretch = options.stretch
    if first.dtype == "uint8" and "mode" not in stretch.model_fields_set:
        stretch = stretch.model_copy(update={"mode": "none"})
    tile = options.tile.model_copy(update={"size": size, "step": size})
    return options.model_copy(update={"tile": tile, "stretch": stretch})


def fingerprint(listings: Sequence[Listing], sample: Sequence[Scene], placement: Placement) -> str:
    """Identifies folders by names and sizes of all files and the contents of some, evenly spread; masks and RPCs beside
    a sample of tiles, and the DEM, by theirs."""
    digest, total = hashlib.sha256(), 0
    if placement.dem is not None:
        digest.update(placement.dem.fingerprint.encode())
    for listing in listings:
        for name, size in listing.sizes.items():
            digest.update(f"{name}\0{size}\n".encode())
            total += size
        for name in spread(list(listing.sizes)):
            digest.update(fingerprints.digest(listing.path(name)).encode())
    for scene in sample:
        if (beside := rpc.file_beside(scene.file)) is not None:
            digest.update(fingerprints.digest(beside).encode())
        if scene.mask is not None:
            digest.update(scene.mask.fingerprint.encode())
    return f"{total}-{digest.hexdigest()[:24]}"


def chunks(
    tiles: Listing,
    labels: Labels,
    label_names: tuple[str, ...],
    first: Scene,
    sensor: Sensor | None,
    placement: Placement,
) -> tuple[Files, ...]:
    """The tasks, in order of the tiles' names."""
    width, height, count, dtype = form(first)
    itemsize = {"uint8": 1, "uint16": 2, "int16": 2, "float32": 4}[dtype]
    many = max(1, min(MAX_FILES, MAX_BYTES // (width * height * count * itemsize)))
    names = tuple(tiles.sizes)
    whole = Files(tiles.folder, (), (), labels, width, (count, dtype), sensor, placement)
    return tuple(
        replace(whole, names=names[at : at + many], label_names=label_names[at : at + many])
        for at in range(0, len(names), many)
    )


def config_of(labels: Labels) -> dict[str, Any]:
    """What the manifest's configuration says of it."""
    return {"tiles_labelled_by": labels.kind}
