"""Class fractions of the ground under tiles.

The rule: nearest land-cover pixel at sub-pixel centres, k x k a scene pixel with
k = max(1, ceil(scene pixel size / land-cover pixel size)) per axis, so that every land-cover pixel under a tile
has its say. Sub-pixels of scene pixels without data do not count; those without land cover, and those of dropped
or ignored classes, leave the denominator.

Where sheets overlap (GlobeLand30's neighbouring UTM zones), the pixel's own longitude and latitude choose: the
sheets whose nominal cell, read from their names, holds the pixel come first, then the others by name; the first
that says anything but nodata decides.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from geokr.landcover import LOOKUP_OFFSET, NODATA, UNKNOWN, Legend
from preprocess import cell_kernels, ground, label_kernels, lattice, raster
from preprocess.cells import Cells
from preprocess.coordinates import WGS84
from preprocess.place import Place
from preprocess.sheets import Domain, LabelError, LabelSheet, lookup_of

# What is interpolated between exact points stays within this many land-cover pixels: UTM to Albers at 30 m settles at a
# point every 16 pixels. Only the surroundings of a pole need one a pixel.
MAX_ERROR = 1e-4
# Error in degrees (a centimetre) of the longitude and latitude that choose between overlapping sheets.
DOMAIN_ERROR = 1e-7
# Over a DEM both are this many times as large: a hundredth of a land-cover pixel, a metre. Ground that bends at every
# cell of the DEM would need an exact point a pixel to come nearer, and no DEM is that exact.
ROUGH = 100
# Label pixels treated at once; bounds the memory of labels and of a lattice at spacing 1.
STRIP_PIXELS = 8 << 20
# Parts a side into which a scene is cut to see how much of it a year's sheets cover.
SHARE_PARTS = 32


# --------------------------------------------------------------------------------------- pixel sizes, overlap


def subdivision(scene: Place, sheets: Sequence[LabelSheet]) -> tuple[int, int]:
    """(kx, ky): label pixels a scene pixel along its columns and rows, by the finest of the sheets.

    Sizes are compared on the ground at the scene's middle. A ratio within a hundredth of a whole number counts
    as that number, since projections stretch lengths by up to that.
    """
    middle, (sx, sy) = ground.at_middle(scene)
    kx = ky = 1
    sized = set()
    for entry in sheets:
        sheet = entry.sheet
        a, b, _, d, e, _ = sheet.grid.transform
        if (sheet.crs, a, b, d, e) in sized:  # as large on the ground there as another sheet's
            continue
        sized.add((sheet.crs, a, b, d, e))
        x, y = scene.points(sheet.crs, np.array([middle[0]]), np.array([middle[1]]))
        if not np.isfinite(x[0]):
            continue
        if sheet.geographic:
            y = np.clip(y, -ground.SIZED_LATITUDE, ground.SIZED_LATITUDE)
        column, row = sheet.grid.pixel(x, y)
        lx, ly = ground.ground_steps(sheet.place, float(column[0]), float(row[0]))
        if np.isfinite([sx, sy, lx, ly]).all() and lx > 0 and ly > 0:
            kx = max(kx, math.ceil(sx / lx - 0.01))
            ky = max(ky, math.ceil(sy / ly - 0.01))
    return kx, ky


def overlapping(scene: Place, sheets: Sequence[LabelSheet]) -> list[LabelSheet]:
    """The sheets that may lie under a scene.

    The scene's outline goes into each near sheet's CRS, never the other way: a world map's bounds mean nothing in
    UTM. Nor do points on the other side of the Earth, so sheets that are far away are left out first.
    """
    found = []
    lattices: dict[str, np.ndarray] = {}
    outline = min(16, max(8, max(scene.width, scene.height) // 64))  # parts a side
    for number in ground.near(ground.cap_of(scene, outline), [entry.cap for entry in sheets]).tolist():
        entry, sheet = sheets[number], sheets[number].sheet
        if sheet.crs not in lattices:
            lattices[sheet.crs] = lattice.points(scene, sheet.crs, sheet.geographic, *ground.regular(scene, outline))
        column, row = sheet.grid.pixel(lattices[sheet.crs][..., 0], lattices[sheet.crs][..., 1])
        if not np.isfinite(column).all() or pieces(sheet, column, row):
            found.append(entry)
    return found


def of_covering_years(scene: Place, sheets: Sequence[LabelSheet]) -> list[LabelSheet]:
    """Without the sheets of years that lie under less than half as much of a scene as those of another year: a sheet
    that only touches the scene must not decide for its year."""
    years = {entry.year for entry in sheets if entry.year is not None}
    if len(years) <= 1:
        return list(sheets)
    shares = {year: _share(scene, [entry.sheet for entry in sheets if entry.year == year]) for year in years}
    least = max(shares.values()) / 2
    return [entry for entry in sheets if entry.year is None or shares[entry.year] >= least]


def _share(scene: Place, sheets: Sequence[raster.Sheet]) -> float:
    """Of points spread over a scene, those within one of the sheets."""
    columns, rows = ground.regular(scene, SHARE_PARTS)
    within = np.zeros(columns.shape, bool)
    points: dict[str, np.ndarray] = {}
    for sheet in sheets:
        if sheet.crs not in points:
            points[sheet.crs] = lattice.points(scene, sheet.crs, sheet.geographic, columns, rows)
        column, row = sheet.grid.pixel(points[sheet.crs][..., 0], points[sheet.crs][..., 1])
        around = period(sheet)
        column = np.mod(column, around) if around else column
        within |= (column >= 0) & (column < sheet.grid.width) & (row >= 0) & (row < sheet.grid.height)
    return float(within.mean())


# ------------------------------------------------------------------------------------------------- lattices


def _in_pixels(points: np.ndarray, sheet: raster.Sheet) -> np.ndarray:
    return np.stack(sheet.grid.pixel(points[..., 0], points[..., 1]), axis=-1)


def period(sheet: raster.Sheet) -> float:
    """Columns in 360 degrees of longitude; 0 for a sheet whose columns do not come round."""
    a, b = sheet.grid.transform[:2]
    return 360.0 / abs(a) if sheet.geographic and b == 0 else 0.0


def pieces(sheet: raster.Sheet, columns: np.ndarray, rows: np.ndarray) -> list[tuple[int, int, int, int]]:
    """Windows (column, row, width, height) of a sheet that hold given pixel positions: none, one, or two where
    the positions run over the antimeridian of a map of the world."""
    around = period(sheet)
    highest, lowest = _range(rows)
    top, bottom = max(0, math.floor(highest) - 1), min(sheet.grid.height, math.ceil(lowest) + 1)
    west, east = _range(columns)
    found = []
    for turn in (-1, 0, 1) if around else (0,):
        left = max(0, math.floor(west + turn * around) - 1)
        right = min(sheet.grid.width, math.ceil(east + turn * around) + 1)
        if right > left and bottom > top:
            found.append((left, top, right - left, bottom - top))
    return found


def _range(positions: np.ndarray) -> tuple[float, float]:
    """Least and greatest of those that are known."""
    least, greatest = float(positions.min()), float(positions.max())
    return (float(np.nanmin(positions)), float(np.nanmax(positions))) if math.isnan(least) else (least, greatest)


# --------------------------------------------------------------------------------------------------- labels


def sheets_under(place: Place, sheets: Sequence[LabelSheet]) -> list[tuple[LabelSheet, np.ndarray]]:
    """The sheets under a place, each with a lattice over it of the sheet's pixel positions (see lattice.lattice)."""
    here = ground.cap_of(place, parts=4)
    lattices: dict[str, np.ndarray] = {}
    hits: list[tuple[LabelSheet, np.ndarray]] = []
    for entry in sheets:
        sheet = entry.sheet
        if ground.apart(here, entry.cap):
            continue
        if sheet.crs not in lattices:
            tolerance = _tolerance(place, [other.sheet for other in sheets if other.sheet.crs == sheet.crs])
            lattices[sheet.crs] = lattice.lattice(place, sheet.crs, sheet.geographic, tolerance)
        pixels = _in_pixels(lattices[sheet.crs], sheet)
        if np.isfinite(pixels).any() and pieces(sheet, pixels[..., 0], pixels[..., 1]):
            hits.append((entry, pixels))
    return hits


def label_grid(place: Place, sheets: Sequence[LabelSheet], legend: Legend) -> np.ndarray:
    """Label of every pixel of a place, uint8 [height, width]: class index, IGNORED, or NODATA.

    Raises LabelError listing codes that the product does not have, or for a sheet that cannot be read.
    """
    labels = np.full((place.height, place.width), NODATA, np.uint8)
    hits = sheets_under(place, sheets)
    if len(hits) > 1 and any(entry.domain is not None for entry, _ in hits):
        error = DOMAIN_ERROR * (1 if place.smooth else ROUGH)
        lonlat = lattice.lattice(place, WGS84, True, (error, error))
        for entry, pixels in hits:
            if not label_kernels.any_are(labels, NODATA):
                return labels
            if entry.domain is not None:
                _gather(labels, entry, pixels, legend, lonlat, entry.domain)
    for entry, pixels in hits:
        if not label_kernels.any_are(labels, NODATA):
            return labels
        _gather(labels, entry, pixels, legend, None, None)
    return labels


def _tolerance(place: Place, sheets: Sequence[raster.Sheet]) -> tuple[float, float]:
    """MAX_ERROR of the finest sheet's pixel, in units of the CRS, along x and y."""
    transforms = [sheet.grid.transform for sheet in sheets]
    x = min(max(abs(t[0]), abs(t[1])) for t in transforms)
    y = min(max(abs(t[3]), abs(t[4])) for t in transforms)
    error = MAX_ERROR * (1 if place.smooth else ROUGH)
    return error * x, error * y


def _gather(
    labels: np.ndarray,
    entry: LabelSheet,
    pixels: np.ndarray,
    legend: Legend,
    lonlat: np.ndarray | None,
    domain: Domain | None,
) -> None:
    lookup = lookup_of(legend, entry.sheet)
    for window in pieces(entry.sheet, pixels[..., 0], pixels[..., 1]):
        try:
            codes = raster.read_codes(entry.sheet, window)
        except raster.RasterError as error:  # not the scene's fault, so never a reason to leave the scene out
            raise LabelError(str(error)) from error
        classes = label_kernels.translate(codes, lookup, LOOKUP_OFFSET)
        label_kernels.gather_labels(
            labels, NODATA, pixels, classes,
            np.array(window[:2], np.float64), period(entry.sheet), pixels if lonlat is None else lonlat,
            np.array(domain or (0, 0, 0, 0), np.float64), domain is not None,
        )  # fmt: skip
        if label_kernels.any_are(classes, UNKNOWN) and label_kernels.any_are(labels, UNKNOWN):
            _raise_unknown(entry, lookup, codes)


def _raise_unknown(entry: LabelSheet, lookup: np.ndarray, codes: np.ndarray) -> None:
    values, counts = np.unique(codes, return_counts=True)
    unknown = lookup[values.astype(np.int64) + LOOKUP_OFFSET] == UNKNOWN
    listed = ", ".join(f"{v} ({c} pixels)" for v, c in zip(values[unknown], counts[unknown], strict=True))
    raise LabelError(
        f"{entry.sheet.path}: holds codes that the product does not have: {listed}. "
        "Is it the right --product? A product of your own is a YAML table; see docs/data.md"
    )


@dataclass(frozen=True, slots=True, eq=False)
class TileLabels:
    """fractions: float64 [tiles, classes], sum 1 (all 0 where nothing counts). valid_fraction: float64 [tiles].
    grid: float32 [tiles, G, G, classes], where in the tile they lie, sum 1 over all squares; None where not asked for.
    """

    fractions: np.ndarray
    valid_fraction: np.ndarray
    grid: np.ndarray | None = None


def tile_labels(
    window: Place,
    sheets: Sequence[LabelSheet],
    subdivisions: tuple[int, int],
    valid_HW: np.ndarray,
    cells: Cells,
    size: int,
    legend: Legend,
    parts: int = 0,
) -> TileLabels:
    """Labels of the tiles of a chunk.

    window: the chunk's place. valid_HW: uint8, 1 where the scene has data, else 0. cells: of its tiles. size: a tile's
    side. parts: squares along it that are counted by themselves, too; 0 for none. Raises LabelError.
    """
    kx, ky = subdivisions
    parted = cells.parted(size, parts) if parts else None
    cells = parted.cells if parted else cells
    counts = cells.zeros(len(legend.classes), np.int64)
    strip = max(1, STRIP_PIXELS // (window.width * kx * ky))
    for top in range(0, window.height, strip):
        part = window.window(0, top, window.width, min(strip, window.height - top))
        labels = label_grid(part.subdivided(kx, ky), sheets, legend)
        cell_kernels.leave_out(labels, valid_HW, NODATA, kx, ky, top)
        cell_kernels.label_counts(counts, labels, cells.down.spans, cells.across.spans, kx, ky, top)
    return normalised(parted.tiles(counts) if parted else cells.tiles(counts), size * size * kx * ky)


def normalised(counted: np.ndarray, everything: int) -> TileLabels:
    """Shares of what was counted under each tile, [tiles, classes], or under each square of it, [tiles, G, G, classes].

    everything: how much there would be in a tile if all of it counted.
    """
    by_tile = counted if counted.ndim == 2 else counted.sum(axis=(1, 2))
    total = by_tile.sum(axis=1)
    scale = np.divide(1.0, total, out=np.zeros(len(total)), where=total > 0)
    grid = None if counted.ndim == 2 else (counted * scale[:, None, None, None]).astype(np.float32)
    fractions = np.divide(by_tile, total[:, None], out=np.zeros(by_tile.shape), where=total[:, None] > 0)
    return TileLabels(fractions, total / everything, grid)
