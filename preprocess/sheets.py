"""Land-cover sheets: what their names say of year and place, and which codes of theirs mean nothing."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date

import numpy as np

from geokr.landcover import LOOKUP_OFFSET, NODATA, Legend, Product, with_colours
from preprocess import raster, sheet_headers
from preprocess.ground import EVERYWHERE, Cap, cap_of

Domain = tuple[float, float, float, float]


class LabelError(ValueError):
    """Land cover that cannot label the scenes; the message lists what was found."""


@dataclass(frozen=True, slots=True)
class LabelSheet:
    """A sheet, the year in its name, and the nominal cell in degrees that its name stands for.

    cap: a circle on the Earth that holds it: a unit vector to its middle and its radius in radians. day: what it
    shows, for products that map single scenes.
    """

    sheet: raster.Sheet
    year: int | None
    domain: Domain | None
    cap: Cap = EVERYWHERE
    day: date | None = None


def nominal_cell(product: Product, name: str) -> Domain | None:
    """(west, south, east, north) in degrees that a sheet's name stands for, or None if its name says nothing.

    GlobeLand30: UTM zone and lowest absolute latitude of a 5 degree band; zones are 6 degrees wide, beyond
    60 degrees of latitude 12. Impact Observatory: UTM zone and MGRS latitude band.
    """
    match = product.filename.match(name) if product.filename else None
    named = match.groupdict() if match else {}
    if "zone" not in named:
        return None
    zone = int(named["zone"])
    west = -180.0 + 6 * (zone - 1)
    if "hemisphere" in named and "lat" in named:
        latitude = float(named["lat"])
        width = 12.0 if latitude >= 60 else 6.0
        if named["hemisphere"] in "nN":
            return west, latitude, west + width, latitude + 5
        return west, -latitude - 5, west + width, -latitude
    if "band" in named:  # C..X without I and O, 8 degrees each from 80 S, the last one 12
        place = "CDEFGHJKLMNPQRSTUVWX".find(named["band"].upper())
        south = -80.0 + 8 * place
        return (west, south, west + 6, 84.0 if named["band"] in "xX" else south + 8) if place >= 0 else None
    return None


def sheet_year(product: Product, name: str) -> int | None:
    """The year in a sheet's name, by the product's pattern."""
    match = product.filename.match(name) if product.filename else None
    named = match.groupdict() if match else {}
    year = named.get("year") or (named.get("start") or "")[:4]
    return int(year) if year else None


def sheet_day(product: Product, name: str) -> date | None:
    """The day in the name of a sheet that maps one scene: a product's pattern gives such a start and no end."""
    match = product.filename.match(name) if product.filename else None
    named = match.groupdict() if match else {}
    if len(start := named.get("start") or "") != 8 or "end" in named:
        return None
    try:
        return date(int(start[:4]), int(start[4:6]), int(start[6:]))
    except ValueError:  # the 30th of February
        return None


def label_sheets(sheets: Sequence[raster.Sheet], product: Product, year: int | None = None) -> list[LabelSheet]:
    """Sheets with what their names say, in order of their names (then paths). year: of those whose names do not."""
    ordered = sorted(sheets, key=lambda s: (s.name, s.path))
    years = [sheet_year(product, s.name) or year for s in ordered]
    return [
        LabelSheet(s, its_year, nominal_cell(product, s.name), cap_of(s.place), sheet_day(product, s.name))
        for s, its_year in zip(ordered, years, strict=True)
    ]


# Sheets of one CRS that share so much of their ground, of what both cover, are versions of one another.
SAME_GROUND = 0.9


def check_versions(sheets: Sequence[LabelSheet]) -> None:
    """Raises LabelError for two sheets over the same ground whose names tell no year: the first one by name would
    label all scenes, whatever their date."""
    by_crs: dict[str, list[LabelSheet]] = defaultdict(list)
    for entry in sheets:
        if entry.year is None:
            by_crs[entry.sheet.crs].append(entry)
    for group in by_crs.values():
        boxes = np.array([_box(entry.sheet) for entry in group])
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        for n, box in enumerate(boxes[:-1]):
            others = boxes[n + 1 :]
            shared = np.clip(np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2]), 0, None).prod(1)
            same = np.flatnonzero(shared > SAME_GROUND * (area[n] + area[n + 1 :] - shared))
            if len(same):
                one, other = group[n].sheet.path, group[n + 1 + int(same[0])].sheet.path
                raise LabelError(
                    f"{one} and {other} cover the same ground, and their names tell no year by which a scene could "
                    "choose: give one of them, or name them as the product's publisher does (docs/data.md, Land-cover "
                    "maps), or give a table of your own whose `filename` finds the year"
                )


def _box(sheet: raster.Sheet) -> tuple[float, float, float, float]:
    """(least x, least y, greatest x, greatest y) in its CRS."""
    a, b, c, d, e, f = sheet.grid.transform
    corners = [(u * sheet.grid.width, v * sheet.grid.height) for u in (0, 1) for v in (0, 1)]
    x, y = zip(*((a * u + b * v + c, d * u + e * v + f) for u, v in corners), strict=True)
    return min(x), min(y), max(x), max(y)


def tagged_classes(sheets: Sequence[LabelSheet], product: Product) -> tuple[str, int, str] | None:
    """(path, code, class) of the first sheet whose nodata tag is the code of a class, or None."""
    names = {code: entry.name for entry in product.classes for code in entry.codes}
    for entry in sheets:
        if not entry.sheet.bands and entry.sheet.nodata in names:
            code = int(entry.sheet.nodata)
            return entry.sheet.path, code, names[code]
    return None


def with_sheet_colours(legend: Legend, product: Product, sheets: Sequence[LabelSheet]) -> Legend:
    """The legend with colours from the first sheet that has a colour table, for classes that the product gives none."""
    if not any(entry.codes[0] in product.uncoloured for entry in legend.classes):
        return legend
    colours = next((found for entry in sheets if (found := sheet_headers.read_colours(entry.sheet.path))), {})
    return with_colours(legend, product, colours)


def lookup_of(legend: Legend, sheet: raster.Sheet) -> np.ndarray:
    """The legend's lookup with the sheet's own nodata tag joined to the product's nodata codes."""
    nodata = sheet.nodata
    if nodata is None or not float(nodata).is_integer() or not -32768 <= nodata <= 65535:
        return legend.lookup
    lookup = legend.lookup.copy()
    lookup[int(nodata) + LOOKUP_OFFSET] = NODATA
    return lookup


def sheets_of_nearest_year(sheets: Sequence[LabelSheet], scene_id: str, acquired: str) -> list[LabelSheet]:
    """The sheets of one year: the only one there is, or the nearest to the scene's date (the earlier on a tie).

    Where each shows one day, the year is that of the nearest day, and nearer ones come first. Raises LabelError if
    there are several years and the scene has no date.
    """
    years = sorted({sheet.year for sheet in sheets if sheet.year is not None})
    if not acquired:
        if len(years) <= 1:
            return list(sheets)
        raise LabelError(
            f"scene {scene_id}: the land cover holds the years {', '.join(map(str, years))} and the scene has no "
            "date to choose by; give the sheets of one year, or scenes with a date in their tags or names"
        )
    day = date.fromisoformat(acquired)
    days = [abs(sheet.day - day) for sheet in sheets if sheet.day is not None]
    if days and len(days) == len(sheets):
        order = sorted(range(len(sheets)), key=days.__getitem__)
        return [sheets[n] for n in order if sheets[n].year == sheets[order[0]].year]
    if len(years) <= 1:
        return list(sheets)
    nearest = min(years, key=lambda year: (abs(date(year, 7, 1) - day), year))  # as the gap is measured
    return [sheet for sheet in sheets if sheet.year in (None, nearest)]
