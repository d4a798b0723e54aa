"""Sensors: what their bands are called, in which order files hold them, and how files and folders are named.

A sensor is one YAML table (``preprocess/sensors/NAME.yaml`` or a user's own).
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from geokr.config import ConfigError, Options, build, parse_yaml, read_yaml, suggestion

# Named groups that patterns of file names may have.
GROUPS = {"product", "band", "metres", "date", "year", "day"}


class SensorBand(Options):
    """A band: its name in the dataset, the maker's identifier, its centre wavelength, and other names for it."""

    name: str
    id: str
    nm: float | None = Field(default=None, gt=0)
    also: tuple[str, ...] = ()

    @property
    def words(self) -> tuple[str, ...]:
        return (self.name, self.id, *self.also)


class Metadata(Options):
    """A text file beside the bands that holds the day of acquisition: patterns of its name, and of the day in it."""

    file: str
    date: str

    @field_validator("file", "date")
    @classmethod
    def _patterns(cls, value: str) -> str:
        _compiled(value)
        return value


class SensorTable(Options):
    """A sensor's YAML table, checked."""

    name: str
    title: str = ""
    bands: tuple[SensorBand, ...] = Field(min_length=1)
    layouts: tuple[tuple[str, ...], ...] = ()
    nodata: float | None = None
    example: str = ""
    band_files: tuple[str, ...] = ()
    scene_files: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    strangers: tuple[str, ...] = ()
    product_folder: str | None = None
    subfolder: str | None = None
    metadata: Metadata | None = None

    @field_validator("band_files", "scene_files", "ignore", "strangers", "product_folder", "subfolder")
    @classmethod
    def _patterns(cls, value: tuple[str, ...] | str | None) -> tuple[str, ...] | str | None:
        for text in (value,) if isinstance(value, str) else value or ():
            _compiled(text)
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        words = [word for band in self.bands for word in {_plain(word) for word in band.words}]
        if twice := {word for word in words if words.count(word) > 1}:
            raise ValueError(f"two bands share the name {min(twice)!r}")
        for layout in self.layouts:
            if unknown := [name for name in layout if name not in {band.name for band in self.bands}]:
                raise ValueError(f"layouts: {unknown[0]!r} is the name of no band")
        sizes = [len(layout) for layout in self.layouts]
        if len(set(sizes)) != len(sizes):
            raise ValueError("layouts: two have the same number of bands, so the number cannot tell them apart")
        for pattern in self.band_files:
            if "band" not in re.compile(pattern).groupindex:
                raise ValueError(f"band_files: {pattern!r} has no group (?P<band>...)")
        if self.metadata is not None and "date" not in _compiled(self.metadata.date).groupindex:
            raise ValueError("metadata.date has no group (?P<date>...)")
        return self


def _compiled(text: str) -> re.Pattern[str]:
    try:
        pattern = re.compile(text, re.IGNORECASE)
    except re.error as error:
        raise ValueError(f"{text!r} is not a regular expression: {error}") from error
    if unknown := set(pattern.groupindex) - GROUPS:
        raise ValueError(f"{text!r}: unknown group {min(unknown)!r}; known are {', '.join(sorted(GROUPS))}")
    return pattern


@dataclass(frozen=True)
class FileName:
    """What a file's name says. band: empty for a file with all bands. metres: 0 where the name does not say.

    date: ISO or empty. product: empty where the name holds the band and no more.
    """

    product: str
    band: str
    metres: int
    date: str


@dataclass(frozen=True)
class Sensor:
    """A sensor's table and what can be asked of it."""

    table: SensorTable

    @property
    def name(self) -> str:
        return self.table.name

    @cached_property
    def digest(self) -> str:
        """Identifies what the table comes to: other names, orders or patterns may make another dataset."""
        table = self.table.model_dump_json(exclude={"title", "example", "strangers"})
        return hashlib.sha256(table.encode()).hexdigest()[:24]

    @cached_property
    def _by_word(self) -> Mapping[str, SensorBand]:
        return {_plain(word): band for band in self.table.bands for word in band.words}

    @cached_property
    def _patterns(self) -> Mapping[str, Sequence[re.Pattern[str]]]:
        table = self.table
        kinds = {
            "band": table.band_files,
            "scene": table.scene_files,
            "ignore": table.ignore,
            "strangers": table.strangers,
        }
        return {kind: [_compiled(text) for text in texts] for kind, texts in kinds.items()}

    def band(self, word: str) -> SensorBand | None:
        """The band of a name or an identifier; case and leading zeros (B04, b4) do not matter."""
        return self._by_word.get(_plain(word))

    def layout(self, count: int) -> tuple[SensorBand, ...] | None:
        """What a file of ``count`` bands holds, or None."""
        names = next((names for names in self.table.layouts if len(names) == count), None)
        by_name = {band.name: band for band in self.table.bands}
        return None if names is None else tuple(by_name[name] for name in names)

    def described(self, descriptions: Sequence[str]) -> list[SensorBand | None]:
        """The band that each of a file's own descriptions means (``red``, ``B4``, ``B4 red``); None where it is none,
        or several. Two descriptions of one band mean it neither time."""
        found: list[SensorBand | None] = []
        for text in descriptions:
            whole = self.band(text)
            words = [whole] if whole else [self.band(word) for word in re.findall(r"[A-Za-z0-9]+", text)]
            means = {band.name: band for band in words if band}
            found.append(next(iter(means.values())) if len(means) == 1 else None)
        names = [band.name for band in found if band]
        return [band if band and names.count(band.name) == 1 else None for band in found]

    def parse(self, file_name: str) -> FileName | None:
        """What a name says by the first pattern that it matches whole; None for one of no band or scene.

        Names to be ignored are neither, whatever else they match: masks of a band are called by it.
        """
        if self.ignores(file_name):
            return None
        for kind in ("band", "scene"):
            for pattern in self._patterns[kind]:
                match = pattern.fullmatch(file_name)
                if match and (kind == "scene" or self.band(match["band"])):
                    named = match.groupdict()
                    band = self.band(named["band"]) if kind == "band" else None
                    metres = int(named.get("metres") or 0)
                    return FileName(named.get("product") or "", band.name if band else "", metres, _day(named))
        return None

    def ignores(self, file_name: str) -> bool:
        """Whether a name is that of a mask, preview or the like, which comes with the bands but holds none."""
        return any(pattern.fullmatch(file_name) for pattern in self._patterns["ignore"])

    def is_stranger(self, file_name: str) -> bool:
        """Whether a name is that of another sensor's product, whose bands of the same numbers see other light."""
        return any(pattern.fullmatch(file_name) for pattern in self._patterns["strangers"])

    def product_of(self, path: Path) -> tuple[str, str]:
        """(folder, name) of the product that a file belongs to by the folders above it; the name may be empty."""
        if self.table.product_folder:
            for folder in path.parents:
                if match := _compiled(self.table.product_folder).fullmatch(folder.name):
                    return str(folder), match.groupdict().get("product") or folder.name
        folder = path.parent
        while self.table.subfolder and _compiled(self.table.subfolder).fullmatch(folder.name):
            folder = folder.parent
        return str(folder), ""

    def date_beside(self, folder: Path) -> str:
        """The day in a metadata file of a product's folder, ISO, or empty."""
        if self.table.metadata is None or not folder.is_dir():
            return ""
        for file in sorted(folder.iterdir()):
            if re.fullmatch(self.table.metadata.file, file.name, re.IGNORECASE) and file.is_file():
                match = re.search(self.table.metadata.date, file.read_text(errors="replace")[:1_000_000])
                return match["date"] if match else ""
        return ""


def _plain(word: str) -> str:
    return re.sub(r"(?<![0-9])0+(?=[0-9])", "", word.strip().lower())


def _day(named: Mapping[str, str | None]) -> str:
    """ISO day from the groups ``date`` (eight digits) or ``year`` and ``day`` (of the year); empty if there is none."""
    try:
        if text := named.get("date"):
            return date(int(text[:4]), int(text[4:6]), int(text[6:8])).isoformat()
        if named.get("year") and named.get("day"):
            return (date(int(named["year"] or 0), 1, 1) + timedelta(int(named["day"] or 0) - 1)).isoformat()
    except ValueError:  # the digits are no day
        pass
    return ""


def sensor_names() -> list[str]:
    """The sensors whose tables come with the package."""
    folder = resources.files("preprocess.sensors")
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_sensor(name_or_path: str) -> Sensor:
    """A packaged sensor by name, or a user's table by path (anything ending in .yaml or .yml). Raises ConfigError."""
    if name_or_path.endswith((".yaml", ".yml")):
        return _parsed(read_yaml(name_or_path), name_or_path)
    if name_or_path not in sensor_names():
        raise ConfigError(
            f"--sensor {name_or_path!r} is not known{suggestion(name_or_path, sensor_names())}: "
            f"use one of {', '.join(sensor_names())}, or the path of a YAML table of your own (docs/data.md)"
        )
    entry = resources.files("preprocess.sensors") / f"{name_or_path}.yaml"
    return _parsed(parse_yaml(entry.read_text(encoding="utf-8"), str(entry)), str(entry))


def _parsed(tree: dict[str, Any], where: str) -> Sensor:
    return Sensor(build(SensorTable, tree, where))
