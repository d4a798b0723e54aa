"""From what a user names with ``--scenes`` to scenes: files, folders of products, scene lists, STAC items.

Nothing is opened here but lists; preprocess.scene opens what a :class:`Source` names.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from preprocess import remote, scene_list, stac
from preprocess.inputs import PlanError, check_name, matches
from preprocess.scene import BandFile, Source
from preprocess.sensor import FileName, Sensor, load_sensor, sensor_names

LISTS = (".yaml", ".yml")
ITEMS = (".json", ".geojson")


def find_sources(patterns: Sequence[str], sensor: Sensor | None, allow_remote: bool = False) -> list[Source]:
    """The scenes that files, globs, folders, ``@lists``, scene lists and STAC files name, without doubles.

    With a sensor, files whose names follow its patterns are grouped by product. Raises PlanError or ConfigError.
    """
    rasters: dict[str, bool] = {}  # path: whether it was named itself, and not by a glob or a folder
    sources: list[Source] = []
    for pattern in patterns:
        found, named = matches(pattern, "--scenes", allow_remote, folders=True)
        folders = [path for path in found if os.path.isdir(path)]
        files = [path for path in found if path not in folders]
        if folders and (sensor is not None or not files):
            for path in folders:
                rasters.update((file, False) for file in _walk(path, sensor) if file not in rasters)
        for path in files:
            ending = os.path.splitext(remote.shown(path))[1].lower()
            if ending in LISTS or (ending in ITEMS and not stac.is_stac(path)):
                sources += scene_list.read(path, sensor, allow_remote)
            elif ending in ITEMS:
                sources += stac.read(path, sensor, allow_remote)
            else:
                rasters[path] = rasters.get(path, False) or named
    sources += _grouped(rasters, sensor)
    _check_once(sources)
    return sources


def _walk(folder: str, sensor: Sensor | None) -> list[str]:
    """Files below a folder whose names are the sensor's."""

    def unread(error: OSError) -> None:
        raise PlanError(f"--scenes {error.filename}: the folder cannot be read ({error.strerror})")

    below = sorted(os.path.join(root, name) for root, _, names in os.walk(folder, onerror=unread) for name in names)
    if sensor is None:
        fits = [name for name in sensor_names() if any(load_sensor(name).parse(Path(file).name) for file in below)]
        hint = f"give --sensor {' or --sensor '.join(fits)}, or add /*.tif to it" if fits else "add /*.tif to it"
        raise PlanError(f"--scenes {folder!r}: a folder: {hint} (current folder: {os.getcwd()})")
    named = [check_name(file, "--scenes") for file in below if sensor.parse(Path(file).name)]
    if not named:
        raise PlanError(
            f"--scenes {folder!r}: none of the {len(below)} files below it has a name of sensor {sensor.name}"
            + (f", such as {sensor.table.example}" if sensor.table.example else "")
            + "; name the files themselves, or list them (docs/data.md, Band files)"
        )
    return named


@dataclass(frozen=True)
class _Part:
    """A file of a product."""

    path: str
    says: FileName


def _grouped(rasters: dict[str, bool], sensor: Sensor | None) -> list[Source]:
    """A source for each file with all its bands, and one for the files of each product."""
    products: dict[tuple[str, str], list[_Part]] = defaultdict(list)
    sources = []
    for path in sorted(rasters):
        name = Path(remote.shown(path)).name
        says = sensor.parse(name) if sensor else None
        if sensor and says and says.band:
            if sensor.is_stranger(name):
                raise PlanError(
                    f"--scenes {remote.shown(path)}: its name is that of another sensor, whose bands of the same "
                    f"numbers see other light than those of {sensor.name}: give it a table of its own (docs/data.md, "
                    "Sensors), or leave it out"
                )
            folder, product = sensor.product_of(Path(path))
            products[folder, says.product or product].append(_Part(path, says))
        elif not (sensor and says is None and sensor.ignores(name) and not rasters[path]):
            sources.append(_whole(path, says))
    if sensor:
        sources += [_product(parts, sensor) for parts in products.values()]
    return sources


def _whole(path: str, says: FileName | None) -> Source:
    return Source(title=remote.shown(path), path=path, file=path, date=says.date if says else "")


def _product(parts: Sequence[_Part], sensor: Sensor) -> Source:
    first = parts[0]
    folder, product = sensor.product_of(Path(first.path))
    name = product or first.says.product or Path(folder).name
    title = f"{name} ({folder})"
    chosen: dict[str, _Part] = {}
    for part in sorted(parts, key=lambda part: (part.says.metres, part.path)):  # the finest of several resolutions
        there = chosen.setdefault(part.says.band, part)
        if there is not part and there.says.metres == part.says.metres:
            raise PlanError(
                f"product {title}: two files for its band {part.says.band}: {there.path} and {part.path}; "
                "give one of them, or list the scenes (docs/data.md, Band files)"
            )
    bands = tuple(
        BandFile(
            name=band.name,
            path=chosen[band.name].path if band.name in chosen else "",
            also=(band.id, *band.also),
            wavelength_nm=band.nm,
        )
        for band in sensor.table.bands
    )
    date = first.says.date or sensor.date_beside(Path(folder))
    return Source(title=title, path=first.path, name=name, bands=bands, date=date)


def _check_once(sources: Iterable[Source]) -> None:
    """Raises PlanError for two sources that say they are one and the same."""
    counts = Counter((source.name, source.path, source.file) for source in sources)
    for (name, path, _), count in counts.items():
        if count > 1:
            raise PlanError(f"--scenes: {name or path} is named {count} times, by lists or items; keep one")
