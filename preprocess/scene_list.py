"""Scene lists: a YAML or JSON file that says what belongs to each scene, where no table of names fits.

    scenes:
      - id: valley_2020
        bands:
          red: B4.tif
          green: B3.tif
          nir: {path: others.tif, number: 2}
        date: 2020-06-12
      - file: andes.tif
        names: [blue, green, red, nir]
        nodata: 0

Paths are relative to the list.
"""

import os
from typing import Self

from pydantic import Field, field_validator, model_validator

from geokr.config import Options, build, read_yaml
from preprocess import remote
from preprocess.dates import find_date
from preprocess.inputs import PlanError, resolved
from preprocess.scene import BandFile, Source
from preprocess.sensor import Sensor


class ListedBand(Options):
    path: str
    number: int = Field(default=1, ge=1)


class ListedScene(Options):
    """One scene: ``file`` with all its bands (and their ``names``, if the file has none), or ``bands``."""

    id: str = ""
    file: str = ""
    names: tuple[str, ...] = ()
    bands: dict[str, str | ListedBand] = Field(default_factory=dict)
    date: str = ""
    nodata: float | None = None
    mask: str = ""

    @field_validator("date")
    @classmethod
    def _a_day(cls, value: str) -> str:
        if value and not (day := find_date(value)):
            raise ValueError(f"{value!r} is no day such as 2020-06-12")
        return day if value else ""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if bool(self.file) == bool(self.bands):
            raise ValueError("give either `file`, with all bands, or `bands`, a mapping of names to files")
        if self.names and self.bands:
            raise ValueError("`names` goes with `file`; `bands` names them itself")
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"names: one stands twice in {', '.join(self.names)}")
        return self


class SceneList(Options):
    scenes: tuple[ListedScene, ...] = Field(min_length=1)


def read(path: str, sensor: Sensor | None, allow_remote: bool) -> list[Source]:
    """The scenes of a list. A sensor adds wavelengths and other names. Raises ConfigError or PlanError."""
    if remote.is_remote(path):
        raise PlanError(f"--scenes {remote.shown(path)}: scene lists are read from this machine; copy it here first")
    listed = build(SceneList, read_yaml(path), path)
    return [_source(scene, path, number, sensor, allow_remote) for number, scene in enumerate(listed.scenes)]


def _source(scene: ListedScene, path: str, number: int, sensor: Sensor | None, allow_remote: bool) -> Source:
    where = f"{path}: scenes.{number}"

    def located(text: str) -> str:
        return resolved(text, os.path.dirname(path), where, allow_remote)

    def band(name: str, entry: str | ListedBand) -> BandFile:
        place = ListedBand(path=entry) if isinstance(entry, str) else entry
        known = sensor.band(name) if sensor else None
        also = tuple(word for word in known.words if word != name) if known else ()
        return BandFile(name, located(place.path), place.number, also, known.nm if known else None)

    bands = tuple(band(name, entry) for name, entry in scene.bands.items())
    file = located(scene.file) if scene.file else ""
    return Source(
        title=f"{scene.id} ({where})" if scene.id else remote.shown(file) or where,
        path=file or bands[0].path,
        name=scene.id or ("" if file else f"{os.path.splitext(os.path.basename(path))[0]}-{number}"),
        file=file,
        names=scene.names,
        bands=bands,
        date=scene.date,
        nodata=scene.nodata,
        mask=located(scene.mask) if scene.mask else "",
    )
