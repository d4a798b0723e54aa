"""Rational polynomial coefficients (RPCs): how a sensor's image depends on longitude, latitude and height.

A product without a map projection carries them in a text file beside the image: ``.rpb`` (Gaofen, WorldView) in
groups of ``key = value;``, or ``.rpc`` and ``_RPC.TXT`` (Ziyuan, Ikonos) with a ``KEY: value`` a line; or in the
image's own tags.
"""

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Self

from preprocess.errors import RasterError

COEFFICIENTS = 20
MAX_BYTES = 1 << 20  # such a file has some 4 kB
SUFFIXES = (".rpb", ".RPB", ".rpc", ".RPC", "_rpc.txt", "_RPC.TXT", "_RPC.txt", "_rpc.TXT")

Twenty = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Rpc:
    """line = line_num(P, L, H) / line_den(P, L, H) * line_scale + line_off, and so for samp, the column.

    P, L, H are latitude, longitude (degrees) and height (metres above the ellipsoid), each less its offset and
    divided by its scale. Lines and columns count from the centre of the first pixel, which is 0. The 20 terms are
    those of RPC00B: 1, L, P, H, LP, LH, PH, L2, P2, H2, PLH, L3, LP2, LH2, L2P, P3, PH2, L2H, P2H, H3.
    Raises ValueError for numbers that describe no image.
    """

    line_off: float
    samp_off: float
    lat_off: float
    long_off: float
    height_off: float
    line_scale: float
    samp_scale: float
    lat_scale: float
    long_scale: float
    height_scale: float
    line_num_coeff: Twenty
    line_den_coeff: Twenty
    samp_num_coeff: Twenty
    samp_den_coeff: Twenty

    def __post_init__(self) -> None:
        for name in ("line_scale", "samp_scale", "lat_scale", "long_scale", "height_scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: expected a number above 0")
        if abs(self.lat_off) > 90 or abs(self.long_off) > 360:
            raise ValueError(f"lat_off, long_off are {self.lat_off}, {self.long_off}: no place on Earth, in degrees")
        for name in _LISTS:
            if not any(getattr(self, name)):
                raise ValueError(f"{name} holds nothing but zeros")

    @classmethod
    def from_fields(cls, texts: Mapping[str, Sequence[str]], source: str, called: Mapping[str, str]) -> Self:
        """From the text of every field, in lists. called: what the source calls a field, for errors.

        Raises RasterError that names source and field.
        """
        values: dict[str, float | Twenty] = {}
        for name in _FIELDS:
            label = called.get(name, name)
            numbers = tuple(_number(text, label, source) for text in texts.get(name, ()))
            expected = COEFFICIENTS if name in _LISTS else 1
            if not numbers:
                raise RasterError(f"{source}: its RPCs have no field {label}; get the product's file again", "rpc")
            if len(numbers) != expected:
                raise RasterError(f"{source}: its field {label} has {len(numbers)} numbers, expected {expected}", "rpc")
            values[name] = numbers if name in _LISTS else numbers[0]
        try:
            return cls(**values)  # type: ignore[arg-type]
        except ValueError as error:
            raise RasterError(f"{source}: its RPCs cannot be used: {error}", "rpc") from error


_FIELDS = tuple(field.name for field in fields(Rpc))
_LISTS = tuple(name for name in _FIELDS if name.endswith("_coeff"))


def _number(text: str, label: str, source: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise RasterError(f"{source}: its field {label} holds {text.strip()[:40]!r}, expected a number", "rpc")
    return value


def file_beside(path: str) -> str | None:
    """The file of RPCs beside an image, or None."""
    stem = os.path.splitext(path)[0]
    return next((stem + suffix for suffix in SUFFIXES if os.path.isfile(stem + suffix)), None)


def read(path: str) -> Rpc:
    """The RPCs in a file. Raises RasterError that names the field that is wrong."""
    try:
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            text = file.read(MAX_BYTES)
    except OSError as error:
        raise RasterError(f"{path}: cannot be read ({error.strerror})", "rpc") from error
    grouped = re.search(r"\blineOffset\b|\bBEGIN_GROUP\b", text, re.I)
    return _from_groups(text, path) if grouped else _from_lines(text, path)


def _group_key(name: str) -> str:
    """lineOffset of line_off, lineNumCoef of line_num_coeff."""
    first, *rest = name.replace("_off", "_offset").replace("_coeff", "_coef").split("_")
    return first + "".join(part.capitalize() for part in rest)


def _from_groups(text: str, source: str) -> Rpc:
    keys = {_group_key(name).lower(): name for name in _FIELDS}
    texts = {}
    for key, value in re.findall(r"(\w+)\s*=\s*(\([^()]*\)|[^;\n]*)", text):
        if key.lower() in keys:
            value = value.strip()
            texts[keys[key.lower()]] = value.strip("()").split(",") if value.startswith("(") else [value]
    return Rpc.from_fields(texts, source, {name: _group_key(name) for name in _FIELDS})


def _from_lines(text: str, source: str) -> Rpc:
    found = {key.upper(): value for key, value in re.findall(r"^\s*(\w+)\s*[:=]\s*(\S+)", text, re.M)}
    return from_tags(
        {
            name.upper(): " ".join(
                found[key] for i in range(1, COEFFICIENTS + 1) if (key := f"{name.upper()}_{i}") in found
            )
            if name in _LISTS
            else found.get(name.upper(), "")
            for name in _FIELDS
        },
        source,
    )


def from_tags(tags: Mapping[str, str], source: str) -> Rpc:
    """From GDAL's metadata domain RPC: LINE_OFF, LINE_NUM_COEFF (20 numbers in one text), ... Raises RasterError."""
    texts = {name: tags.get(name.upper(), "").split() for name in _FIELDS}
    texts = {name: found if name in _LISTS else found[:1] for name, found in texts.items()}  # a unit may follow
    return Rpc.from_fields(texts, source, {name: name.upper() for name in _FIELDS})
