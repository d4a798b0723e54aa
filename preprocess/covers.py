"""The land-cover products of a dataset: the one that training takes by default, and further ones beside it.

Every product labels every tile by itself, with its own classes, sheets and sub-pixels; a tile without enough of any
one of them is left out, so that each can be trained on.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date

import numpy as np

from geokr.config import ConfigError, suggestion
from geokr.landcover import Legend, Product, build_legend, load_product
from preprocess import labels, probabilities, raster, sheet_headers, sheets
from preprocess.cells import Cells
from preprocess.inputs import PlanError, find_files
from preprocess.labels import TileLabels
from preprocess.options import FurtherProduct, PackOptions, ProductOptions
from preprocess.place import Place
from preprocess.sheets import LabelSheet

# Part of a feature's name in the records, and a key of the manifest.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True, slots=True, eq=False)
class Cover:
    """A product with its sheets. name: the product's, or what ``--also`` calls it."""

    name: str
    product: Product
    legend: Legend
    sheets: tuple[LabelSheet, ...]
    options: ProductOptions

    def digest(self) -> str:
        """Identifies what the table comes to: another meaning of a code makes another dataset."""
        pattern = self.product.filename and self.product.filename.pattern
        digest = hashlib.sha256(self.legend.lookup.tobytes())
        digest.update(repr((self.product.title, self.legend.classes, pattern)).encode())
        return digest.hexdigest()[:24]

    @property
    def years(self) -> tuple[int, ...]:
        # cut tiles that bring their labels have no sheets
        years = {sheet.year for sheet in self.sheets} if self.sheets else {self.options.year}
        return tuple(sorted(year for year in years if year is not None))


@dataclass(frozen=True, slots=True, eq=False)
class SceneCover:
    """A product over one scene. subdivisions: label pixels a scene pixel (x, y). gap_years: date of the scene minus
    the middle of the land cover's year, None where either is not known."""

    name: str
    legend: Legend
    sheets: tuple[LabelSheet, ...]
    subdivisions: tuple[int, int]
    min_valid_fraction: float
    gap_years: float | None


# ---------------------------------------------------------------------------------------------------- reading


def read_covers(
    patterns: Sequence[str], product: str, also: Mapping[str, Sequence[str]], options: PackOptions
) -> tuple[Cover, ...]:
    """The product that ``--product`` names first, then those of ``--also`` in order of their names.

    also: what ``--also`` names (a product, a table, or a key of ``labels.also``) to patterns of its sheets.
    Raises PlanError, ConfigError, RasterError or LabelError.
    """
    table = load_product(product)
    allow_remote = options.scene.remote
    covers = [_read_cover(table.name, table, find_files(patterns, "--land-cover", allow_remote), options.labels)]
    known = dict(options.labels.also)
    for key, its_patterns in also.items():
        chosen = known.get(key)
        table = _load_further(key, chosen.product if isinstance(chosen, FurtherProduct) else None)
        name = table.name if key.endswith((".yaml", ".yml")) else key
        chosen = known.pop(key, None) or known.pop(name, None) or ProductOptions()
        if not _NAME.fullmatch(name):
            raise PlanError(f"--also {key}: {name!r} cannot be a name: use letters, digits, _ . and -")
        if name in (cover.name for cover in covers):
            raise PlanError(
                f"--also {key}: there is a product {name!r} already; give it a name of its own: "
                f"--also NAME ... 'labels.also={{NAME: {{product: {key}}}}}'"
            )
        covers.append(_read_cover(name, table, find_files(its_patterns, f"--also {key}", allow_remote), chosen))
    if known:
        name = sorted(known)[0]
        raise PlanError(
            f"labels.also: {name!r} is given options but no sheets{suggestion(name, also)}: add --also {name} PATTERN"
        )
    return (covers[0], *sorted(covers[1:], key=lambda cover: cover.name))


def _load_further(key: str, product: str | None) -> Product:
    try:
        return load_product(product or key)
    except ConfigError as error:
        if product is not None:
            raise ConfigError(f"labels.also: {key}: {error}") from error
        hint = (
            "" if key.endswith((".yaml", ".yml")) else f". A name of its own: 'labels.also={{{key}: {{product: ...}}}}'"
        )
        raise ConfigError(f"--also {key}: {error}{hint}") from error


def _read_cover(name: str, table: Product, paths: Sequence[str], options: ProductOptions) -> Cover:
    legend = make_legend(table, options)
    read = [sheet_headers.read_sheet(path, table.probability_bands) for path in paths]
    soft = [sheet for sheet in read if sheet.bands]
    if soft and len(soft) < len(read):
        hard = next(sheet for sheet in read if not sheet.bands)
        raise PlanError(
            f"product {name!r}: {soft[0].path} holds probabilities but {hard.path} codes; give one or the other"
        )
    placed = sheets.label_sheets(read, table, options.year)
    sheets.check_versions(placed)
    return Cover(name, table, sheets.with_sheet_colours(legend, table, placed), tuple(placed), options)


def warnings(products: Sequence[Cover]) -> list[str]:
    """What is allowed about the sheets but may not be meant."""
    found = ((cover, sheets.tagged_classes(cover.sheets, cover.product)) for cover in products)
    return [
        f"{tagged[0]}: its nodata tag, {tagged[1]}, is the code of {tagged[2]!r} in product {cover.name!r}: that class "
        "will count as ground without land cover. If the tag is wrong, take it away: gdal_edit.py -unsetnodata"
        for cover, tagged in found
        if tagged
    ]


def make_legend(product: Product, options: ProductOptions) -> Legend:
    """The dataset's classes by ``labels.groups``, ``labels.merge`` and ``labels.drop``. Raises ConfigError."""
    merge = {name: list(members) for name, members in options.merge.items()}
    if options.groups:
        if not product.groups:
            raise PlanError(f"labels.groups: the table of product {product.name!r} defines no groups")
        names = {code: entry.name for entry in product.classes for code in entry.codes}
        merge = {**{group: [names[code] for code in codes] for group, codes in product.groups.items()}, **merge}
    return build_legend(product, merge, options.drop)


# ------------------------------------------------------------------------------------------------- over a scene


def whole(cover: Cover) -> SceneCover:
    """All its sheets, to be narrowed to those over a scene or a tile."""
    return SceneCover(cover.name, cover.legend, cover.sheets, (1, 1), cover.options.min_valid_fraction, None)


def narrowed(cover: SceneCover, scene: raster.Scene, name: str) -> SceneCover:
    """The sheets under a scene, of the year nearest to it of those that cover it. name: the scene's in messages.

    Raises LabelError.
    """
    under = labels.of_covering_years(scene.place, labels.overlapping(scene.place, cover.sheets))
    under = sheets.sheets_of_nearest_year(under, name, scene.date)
    subdivisions = labels.subdivision(scene.place, under)
    return replace(cover, sheets=tuple(under), subdivisions=subdivisions, gap_years=_gap_years(scene.date, under))


def _gap_years(acquired: str, under: Sequence[LabelSheet]) -> float | None:
    """None where not all sheets are known to be of one year."""
    years = {sheet.year for sheet in under}
    return gap_years(acquired, years.pop()) if len(years) == 1 else None


def gap_years(acquired: str, year: int | None) -> float | None:
    """Years from the middle (1 July) of the land cover's year to the day of acquisition; positive where the map is
    older than the picture. None where one of the two is not known."""
    if not acquired or year is None:
        return None
    return (date.fromisoformat(acquired) - date(year, 7, 1)).days / 365.25


def tile_labels(
    cover: SceneCover, window: Place, valid_HW: np.ndarray, cells: Cells, size: int, parts: int
) -> TileLabels:
    """Labels of the tiles of a chunk (see :func:`preprocess.labels.tile_labels`). Raises LabelError."""
    soft = any(entry.sheet.bands for entry in cover.sheets)
    count = probabilities.tile_labels if soft else labels.tile_labels
    return count(window, cover.sheets, cover.subdivisions, valid_HW, cells, size, cover.legend, parts)
