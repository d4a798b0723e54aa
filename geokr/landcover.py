"""Land-cover products: which codes a map holds, what they mean, and how they become classes.

A product is one YAML table (``geokr/products/NAME.yaml`` or a user's own). A :class:`Legend` is what a
dataset is made with: the product's classes after merging and dropping, and a lookup from raster code to class.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

import numpy as np

from geokr.config import ConfigError, parse_yaml, read_yaml, suggestion

# Values of Legend.lookup beside class indices 0..K-1. Codes are uint8 rasters at present, indices fit easily.
NODATA = 255  # nothing known here: does not count, and another sheet may fill it
IGNORED = 254  # known, but outside the classes (dropped or ignored): leaves the denominator
UNKNOWN = 253  # a code the product does not have: an error
MAX_CLASSES = 253


@dataclass(frozen=True, slots=True)
class LandCoverClass:
    """One class of a dataset: its name, the raster codes that count as it, and its colour (0..255 each)."""

    name: str
    codes: tuple[int, ...]
    rgb: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Product:
    """A land-cover product's table.

    nodata: codes that say nothing. ignore: codes with a meaning that never trains (sea, clouds).
    filename: a pattern for its sheets' names with named groups, or None. uncoloured: codes of classes for which the
    table has no colour, so that a sheet's own may stand. probability_bands: classes in the order of the bands of a
    sheet that holds their probabilities; empty where there are no such sheets.
    """

    name: str
    title: str
    classes: tuple[LandCoverClass, ...]
    nodata: frozenset[int]
    ignore: frozenset[int]
    filename: re.Pattern[str] | None
    groups: Mapping[str, tuple[int, ...]]
    licence: str | None
    uncoloured: frozenset[int] = frozenset()
    probability_bands: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Legend:
    """The classes a dataset trains on. ``lookup[code + 32768]`` is a class index, NODATA, IGNORED or UNKNOWN.

    lookup: uint8 of 98,304 entries, so that int16 and uint16 rasters (-32768..65535) index it too.
    band_classes: a class index, IGNORED or NODATA for each probability band of the product.
    """

    product: str
    classes: tuple[LandCoverClass, ...]
    lookup: np.ndarray
    band_classes: tuple[int, ...] = ()


LOOKUP_OFFSET = 32768
LOOKUP_SIZE = 32768 + 65536


def product_names() -> list[str]:
    """The products whose tables come with the package."""
    folder = resources.files("geokr.products")
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_product(name_or_path: str) -> Product:
    """A packaged product by name, or a user's table by path (anything ending in .yaml or .yml).

    Raises ConfigError for an unknown name (listing the known ones) or a table that lacks something.
    """
    if name_or_path.endswith((".yaml", ".yml")):
        return _parse_product(read_yaml(name_or_path), name_or_path)
    if name_or_path not in product_names():
        raise ConfigError(
            f"product {name_or_path!r} is not known{suggestion(name_or_path, product_names())}: "
            f"use one of {', '.join(product_names())}, or the path of a YAML table of your own"
        )
    entry = resources.files("geokr.products") / f"{name_or_path}.yaml"
    return _parse_product(parse_yaml(entry.read_text(encoding="utf-8"), str(entry)), str(entry))


def _parse_product(table: dict[str, Any], where: str) -> Product:
    for key in ("name", "nodata", "ignore"):
        if key not in table:
            raise ConfigError(f"{where}: the product table lacks {key!r}")
    try:
        classes = _corine_classes(table) if "raster_order" in table else _plain_classes(table, where)
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{where}: raster_order: lacks what CORINE's table has: {error!r}") from error
    if len(classes) > MAX_CLASSES:
        raise ConfigError(f"{where}: {len(classes)} classes, at most {MAX_CLASSES} are possible")
    seen: dict[int, str] = {}
    for entry in classes:
        for code in entry.codes:
            if code in seen:
                raise ConfigError(f"{where}: code {code} belongs to both {seen[code]!r} and {entry.name!r}")
            seen[code] = entry.name
    try:
        pattern = re.compile(table["filename"], re.IGNORECASE) if table.get("filename") else None
    except (re.error, TypeError) as error:
        raise ConfigError(f"{where}: filename is not a regular expression: {error}") from error
    return Product(
        name=str(table["name"]),
        title=str(table.get("title", table["name"])),
        classes=tuple(classes),
        nodata=frozenset(_codes(table["nodata"], "nodata", where)),
        ignore=frozenset(_codes(table["ignore"], "ignore", where)),
        filename=pattern,
        groups=_groups(table.get("groups") or {}, seen, where),
        licence=table.get("licence"),
        uncoloured=_uncoloured(table),
        probability_bands=_probability_bands(table.get("probability_bands") or [], [c.name for c in classes], where),
    )


def _uncoloured(table: Mapping[str, Any]) -> frozenset[int]:
    entries = table.get("classes") or {}
    return frozenset(code for own, entry in entries.items() if "rgb" not in entry for code in _all_codes(own, entry))


def _all_codes(code: int, entry: Mapping[str, Any]) -> tuple[int, ...]:
    return code, *entry.get("also", ())


def _probability_bands(bands: Any, names: list[str], where: str) -> tuple[str, ...]:
    if not isinstance(bands, list) or len(set(map(str, bands))) != len(bands):
        raise ConfigError(f"{where}: probability_bands: expected a list of class names, each once, got {bands!r}")
    if strangers := [band for band in bands if band not in names]:
        raise ConfigError(f"{where}: probability_bands: no class is called {strangers[0]!r}")
    return tuple(bands)


def _codes(values: Any, key: str, where: str) -> tuple[int, ...]:
    """A list of raster codes."""
    lowest, highest = -LOOKUP_OFFSET, LOOKUP_SIZE - LOOKUP_OFFSET - 1
    if not isinstance(values, list) or not all(type(code) is int and lowest <= code <= highest for code in values):
        raise ConfigError(f"{where}: {key}: expected a list of whole numbers {lowest}..{highest}, got {values!r}")
    return tuple(values)


def _groups(groups: Any, known: Mapping[int, str], where: str) -> dict[str, tuple[int, ...]]:
    if not isinstance(groups, dict):
        raise ConfigError(f"{where}: groups: expected a mapping of names to lists of codes, got {groups!r}")
    parsed = {str(name): _codes(codes, f"groups: {name}", where) for name, codes in groups.items()}
    for name, codes in parsed.items():
        if strangers := [code for code in codes if code not in known]:
            raise ConfigError(f"{where}: groups: {name}: no class has the code {strangers[0]}")
    return parsed


def _plain_classes(table: dict[str, Any], where: str) -> list[LandCoverClass]:
    entries = table.get("classes")
    if not isinstance(entries, dict) or not entries:
        raise ConfigError(f"{where}: expected `classes:`, a mapping of raster codes to {{name: ..., rgb: [...]}}")
    classes = []
    for index, (code, entry) in enumerate(entries.items()):
        if type(code) is not int or not isinstance(entry, dict) or "name" not in entry:
            raise ConfigError(f"{where}: classes: entry {code!r} needs a whole number as its code and a name")
        codes = _codes([code, *_codes(entry.get("also", []), f"classes: {code}: also", where)], "classes", where)
        classes.append(LandCoverClass(str(entry["name"]), codes, _colour(entry.get("rgb"), index, where)))
    return classes


def _corine_classes(table: dict[str, Any]) -> list[LandCoverClass]:
    """CORINE: three-digit codes grouped by their first digit; rasters hold either them or their rank 1..44."""
    order: list[int] = table["raster_order"]
    classes = []
    for digit, entry in table["groups_by_first_digit"].items():
        members = [code for code in order if code // 100 == digit]
        ranks = [order.index(code) + 1 for code in members]
        classes.append(LandCoverClass(entry["name"], (*ranks, *members), tuple(entry["rgb"])))
    return classes


def _colour(rgb: Any, index: int, where: str) -> tuple[int, int, int]:
    if rgb is None:  # a product without colours: hues a golden angle apart stay distinct
        import colorsys

        r, g, b = colorsys.hsv_to_rgb((index * 0.381966) % 1.0, 0.55, 0.85)
        return round(r * 255), round(g * 255), round(b * 255)
    if not (isinstance(rgb, list) and len(rgb) == 3 and all(type(v) is int and 0 <= v <= 255 for v in rgb)):
        raise ConfigError(f"{where}: rgb {rgb!r} is not three whole numbers from 0 to 255")
    return rgb[0], rgb[1], rgb[2]


def build_legend(
    product: Product,
    merge: Mapping[str, list[str]] | None = None,
    drop: tuple[str, ...] = (),
) -> Legend:
    """The product's classes after merging and dropping, in table order, and their lookup.

    merge: new class name to the names of the classes it swallows; the first of them gives place and colour.
    drop: class names that leave histogram and denominator, as the product's ignored codes do.
    A sheet's own nodata tag joins the table's nodata codes when the sheet is read; it wins over the table.
    Raises ConfigError for class names the product does not have, or if nothing is left.
    """
    merge = merge or {}
    names = [entry.name for entry in product.classes]
    for name in [*drop, *(member for members in merge.values() for member in members)]:
        if name not in names:
            raise ConfigError(
                f"labels: product {product.name!r} has no class {name!r}{suggestion(name, names)}; "
                f"its classes are {', '.join(names)}"
            )
    target = {member: new for new, members in merge.items() for member in members}
    if sum(len(members) for members in merge.values()) != len(target) or set(target) & set(drop):
        raise ConfigError("labels: a class stands in more than one of labels.merge and labels.drop; keep one")
    merged: dict[str, LandCoverClass] = {}
    outside: set[int] = set(product.ignore)
    for entry in product.classes:
        codes = tuple(code for code in entry.codes if code not in product.ignore and code not in product.nodata)
        if entry.name in drop:
            outside.update(codes)
            continue
        if not codes:
            continue
        name = target.get(entry.name, entry.name)
        old = merged.get(name)
        merged[name] = LandCoverClass(name, (*old.codes, *codes) if old else codes, old.rgb if old else entry.rgb)
    if not merged:
        raise ConfigError(f"labels: no class of product {product.name!r} is left after labels.drop")
    lookup = np.full(LOOKUP_SIZE, UNKNOWN, np.uint8)
    for index, entry in enumerate(merged.values()):
        lookup[np.array(entry.codes) + LOOKUP_OFFSET] = index
    lookup[np.array(sorted(outside), np.int64) + LOOKUP_OFFSET] = IGNORED
    lookup[np.array(sorted(product.nodata), np.int64) + LOOKUP_OFFSET] = NODATA
    first_code = {entry.name: entry.codes[0] for entry in product.classes}
    bands = tuple(int(lookup[first_code[name] + LOOKUP_OFFSET]) for name in product.probability_bands)
    return Legend(product.name, tuple(merged.values()), lookup, bands)


def with_colours(legend: Legend, product: Product, colours: Mapping[int, tuple[int, int, int]]) -> Legend:
    """The legend with a sheet's own colours (by code) for classes that the product's table gives none."""
    classes = []
    for entry in legend.classes:
        own = [colours[code] for code in entry.codes if code in colours]
        classes.append(replace(entry, rgb=own[0]) if own and entry.codes[0] in product.uncoloured else entry)
    return replace(legend, classes=tuple(classes))
