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
from datetime import date

import numpy as np

from geokr.landcover import LOOKUP_OFFSET, NODATA, UNKNOWN, Legend, Product
from preprocess import kernels, raster
from preprocess.blocks import METRES_A_DEGREE
from preprocess.grid import Grid

WGS84 = "EPSG:4326"

# Bilinear interpolation of exact points at this spacing, halved until its error is below MAX_ERROR land-cover
# pixels: UTM to Albers at 30 m stays near 0.003 at 64. Only the surroundings of a pole need spacing 1.
SPACING = 64
MAX_ERROR = 0.002
# Label pixels treated at once; bounds the memory of a lattice at spacing 1.
STRIP_PIXELS = 4 << 20

Domain = tuple[float, float, float, float]


class LabelError(ValueError):
    """Land cover that cannot label the scenes; the message lists what was found."""


@dataclass(frozen=True, slots=True)
class LabelSheet:
    """A sheet, the year in its name, and the nominal cell in degrees that its name stands for."""

    sheet: raster.Sheet
    year: int | None
    domain: Domain | None


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
        south = -80.0 + 8 * "CDEFGHJKLMNPQRSTUVWX".index(named["band"])
        return west, south, west + 6, 84.0 if named["band"] == "X" else south + 8
    return None


def sheet_year(product: Product, name: str) -> int | None:
    """The year in a sheet's name, by the product's pattern."""
    match = product.filename.match(name) if product.filename else None
    named = match.groupdict() if match else {}
    year = named.get("year") or (named.get("start") or "")[:4]
    return int(year) if year else None


def label_sheets(sheets: Sequence[raster.Sheet], product: Product) -> list[LabelSheet]:
    """Sheets with what their names say, in order of their names (then paths)."""
    ordered = sorted(sheets, key=lambda s: (s.name, s.path))
    return [LabelSheet(sheet, sheet_year(product, sheet.name), nominal_cell(product, sheet.name)) for sheet in ordered]


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

    Raises LabelError if there are several and the scene has no date.
    """
    years = sorted({sheet.year for sheet in sheets if sheet.year is not None})
    if len(years) <= 1:
        return list(sheets)
    if not acquired:
        raise LabelError(
            f"scene {scene_id}: the land cover holds the years {', '.join(map(str, years))} and the scene has no "
            "date to choose by; give the sheets of one year, or scenes with a date in their tags or names"
        )
    day = date.fromisoformat(acquired)
    when = day.year + (day.timetuple().tm_yday - 1) / 365.25
    nearest = min(years, key=lambda year: (abs(year + 0.5 - when), year))
    return [sheet for sheet in sheets if sheet.year in (None, nearest)]


# --------------------------------------------------------------------------------------- pixel sizes, overlap


def ground_steps(grid: Grid, crs: str, column: float, row: float) -> tuple[float, float]:
    """Length in metres on the ground of one pixel along columns and along rows, at a pixel position."""
    columns = np.array([column - 0.5, column + 0.5, column, column])
    rows = np.array([row, row, row - 0.5, row + 0.5])
    lon, lat = raster.transform_points(crs, WGS84, *grid.xy(columns, rows))
    turn = np.cos(np.radians(lat.mean()))

    def length(i: int, j: int) -> float:
        east = ((lon[j] - lon[i] + 180) % 360 - 180) * turn
        return float(math.hypot(east, lat[j] - lat[i]) * METRES_A_DEGREE)

    return length(0, 1), length(2, 3)


def subdivision(scene: Grid, crs: str, sheets: Sequence[LabelSheet]) -> tuple[int, int]:
    """(kx, ky): label pixels a scene pixel along its columns and rows, by the finest of the sheets.

    Sizes are compared on the ground at the scene's centre. A ratio within a hundredth of a whole number counts
    as that number, since projections stretch lengths by up to that.
    """
    sx, sy = ground_steps(scene, crs, scene.width / 2, scene.height / 2)
    kx = ky = 1
    centre_x, centre_y = scene.xy(scene.width / 2, scene.height / 2)
    for entry in sheets:
        sheet = entry.sheet
        x, y = raster.transform_points(crs, sheet.crs, np.array([centre_x]), np.array([centre_y]))
        if not np.isfinite(x[0]):
            continue
        column, row = sheet.grid.pixel(x, y)
        lx, ly = ground_steps(sheet.grid, sheet.crs, float(column[0]), float(row[0]))
        if np.isfinite([lx, ly]).all() and lx > 0 and ly > 0:
            kx = max(kx, math.ceil(sx / lx - 0.01))
            ky = max(ky, math.ceil(sy / ly - 0.01))
    return kx, ky


def overlapping(scene: Grid, crs: str, sheets: Sequence[LabelSheet]) -> list[LabelSheet]:
    """The sheets that may lie under a scene.

    The scene's outline goes into each sheet's CRS, never the other way: a world map's bounds mean nothing in UTM.
    """
    found = []
    lattices: dict[str, np.ndarray] = {}
    for entry in sheets:
        sheet = entry.sheet
        if sheet.crs not in lattices:
            lattices[sheet.crs] = _points(scene, crs, sheet.crs, sheet.geographic, *_regular(scene, 16))
        column, row = sheet.grid.pixel(lattices[sheet.crs][..., 0], lattices[sheet.crs][..., 1])
        if np.isfinite(column).any() and any(_pieces(sheet, column, row)):
            found.append(entry)
    return found


def _regular(grid: Grid, parts: int) -> tuple[np.ndarray, np.ndarray]:
    columns, rows = np.meshgrid(np.linspace(0, grid.width, parts + 1), np.linspace(0, grid.height, parts + 1))
    return columns, rows


# ------------------------------------------------------------------------------------------------- lattices


def _points(grid: Grid, crs: str, target: str, geographic: bool, columns: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Exact target coordinates [..., 2] of pixel positions; longitudes lie within 180 degrees of one another's
    middle, so that nothing jumps at the antimeridian."""
    x, y = raster.transform_points(crs, target, *grid.xy(columns, rows))
    if geographic and np.isfinite(x).any():
        # the circular mean: the middle of the points on whichever side of the antimeridian
        angles = np.radians(x[np.isfinite(x)])
        middle = np.degrees(np.arctan2(np.sin(angles).mean(), np.cos(angles).mean()))
        x = middle + (x - middle + 180) % 360 - 180
    return np.stack([x, y], axis=-1)


@dataclass(frozen=True, slots=True)
class Lattice:
    """Exact coordinates in another CRS at every ``spacing``-th corner of a grid, float64 [rows, columns, 2]."""

    points: np.ndarray
    spacing: int


def lattice(grid: Grid, crs: str, target: str, geographic: bool, tolerance: tuple[float, float]) -> Lattice:
    """A lattice whose bilinear interpolation stays within ``tolerance`` (units of the target, per axis).

    The error is measured at the cells' centres, where it is largest, against exact points.
    """
    spacing = SPACING
    while True:
        columns = np.arange(-(-grid.width // spacing) + 1) * spacing
        rows = np.arange(-(-grid.height // spacing) + 1) * spacing
        points = _points(grid, crs, target, geographic, *np.meshgrid(columns, rows))
        if spacing == 1:
            return Lattice(points, spacing)
        between = (points[1:, 1:] + points[1:, :-1] + points[:-1, 1:] + points[:-1, :-1]) / 4
        exact = _points(
            grid, crs, target, geographic, *np.meshgrid(columns[:-1] + spacing / 2, rows[:-1] + spacing / 2)
        )
        error = np.abs(between - exact)
        settled = (error[..., 0] <= tolerance[0]) & (error[..., 1] <= tolerance[1])
        lost = np.isnan(between).any(-1) & np.isnan(exact).any(-1)
        if (settled | lost).all():
            return Lattice(points, spacing)
        spacing //= 2


def _in_pixels(points: np.ndarray, sheet: raster.Sheet) -> np.ndarray:
    return np.stack(sheet.grid.pixel(points[..., 0], points[..., 1]), axis=-1)


def _period(sheet: raster.Sheet) -> float:
    """Columns in 360 degrees of longitude; 0 for a sheet whose columns do not come round."""
    a, b = sheet.grid.transform[:2]
    return 360.0 / abs(a) if sheet.geographic and b == 0 else 0.0


def _pieces(sheet: raster.Sheet, columns: np.ndarray, rows: np.ndarray) -> list[tuple[int, int, int, int]]:
    """Windows (column, row, width, height) of a sheet that hold given pixel positions: none, one, or two where
    the positions run over the antimeridian of a map of the world."""
    period = _period(sheet)
    top = max(0, math.floor(np.nanmin(rows)) - 1)
    bottom = min(sheet.grid.height, math.ceil(np.nanmax(rows)) + 1)
    pieces = []
    for turn in (-1, 0, 1) if period else (0,):
        left = max(0, math.floor(np.nanmin(columns) + turn * period) - 1)
        right = min(sheet.grid.width, math.ceil(np.nanmax(columns) + turn * period) + 1)
        if right > left and bottom > top:
            pieces.append((left, top, right - left, bottom - top))
    return pieces


# --------------------------------------------------------------------------------------------------- labels


def label_grid(grid: Grid, crs: str, sheets: Sequence[LabelSheet], legend: Legend) -> np.ndarray:
    """Label of every pixel of a grid, uint8 [height, width]: class index, IGNORED, or NODATA.

    Raises LabelError listing codes that the product does not have.
    """
    labels = np.full((grid.height, grid.width), NODATA, np.uint8)
    strip = max(1, STRIP_PIXELS // grid.width)
    for top in range(0, grid.height, strip):
        height = min(strip, grid.height - top)
        _label_strip(labels[top : top + height], grid.window(0, top, grid.width, height), crs, sheets, legend)
    return labels


def _label_strip(labels: np.ndarray, grid: Grid, crs: str, sheets: Sequence[LabelSheet], legend: Legend) -> None:
    lattices: dict[str, Lattice] = {}
    hits: list[tuple[LabelSheet, Lattice, np.ndarray]] = []
    for entry in sheets:
        sheet = entry.sheet
        if sheet.crs not in lattices:
            tolerance = _tolerance([other.sheet for other in sheets if other.sheet.crs == sheet.crs])
            lattices[sheet.crs] = lattice(grid, crs, sheet.crs, sheet.geographic, tolerance)
        here = lattices[sheet.crs]
        pixels = _in_pixels(here.points, sheet)
        if np.isfinite(pixels).any() and _pieces(sheet, pixels[..., 0], pixels[..., 1]):
            hits.append((entry, here, pixels))
    choosing = len(hits) > 1 and any(entry.domain is not None for entry, _, _ in hits)
    if choosing:
        for entry, here, pixels in hits:
            if entry.domain is not None:
                _gather(labels, entry, here, pixels, grid, crs, legend, entry.domain)
    for entry, here, pixels in hits:
        _gather(labels, entry, here, pixels, grid, crs, legend, None)


def _tolerance(sheets: Sequence[raster.Sheet]) -> tuple[float, float]:
    """MAX_ERROR of the finest sheet's pixel, in units of the CRS, along x and y."""
    transforms = [sheet.grid.transform for sheet in sheets]
    x = min(max(abs(t[0]), abs(t[1])) for t in transforms)
    y = min(max(abs(t[3]), abs(t[4])) for t in transforms)
    return MAX_ERROR * x, MAX_ERROR * y


def _gather(
    labels: np.ndarray,
    entry: LabelSheet,
    here: Lattice,
    pixels: np.ndarray,
    grid: Grid,
    crs: str,
    legend: Legend,
    domain: Domain | None,
) -> None:
    if not (labels == NODATA).any():
        return
    if domain is not None:
        rows, columns = here.points.shape[:2]
        positions = np.meshgrid(np.arange(columns) * here.spacing, np.arange(rows) * here.spacing)
        lonlat = _points(grid, crs, WGS84, True, *positions)
    else:
        lonlat = np.zeros((1, 1, 2))
    lookup = lookup_of(legend, entry.sheet)
    for window in _pieces(entry.sheet, pixels[..., 0], pixels[..., 1]):
        codes = raster.read_codes(entry.sheet, window)
        kernels.gather_labels(
            labels, NODATA, pixels, here.spacing, codes, lookup, LOOKUP_OFFSET,
            np.array(window[:2], np.float64), _period(entry.sheet), lonlat,
            np.array(domain or (0, 0, 0, 0), np.float64), domain is not None,
        )  # fmt: skip
        if (labels == UNKNOWN).any():
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
    """fractions: float64 [tiles, classes], sum 1 (all 0 where nothing counts). valid_fraction: float64 [tiles]."""

    fractions: np.ndarray
    valid_fraction: np.ndarray


def tile_labels(
    window: Grid,
    crs: str,
    sheets: Sequence[LabelSheet],
    subdivisions: tuple[int, int],
    valid_HW: np.ndarray,
    origins_T2: np.ndarray,
    size: int,
    legend: Legend,
) -> TileLabels:
    """Labels of the tiles of a chunk.

    window: the chunk's grid. valid_HW: uint8, 0 where the scene has no data. origins_T2: int64 first (column, row)
    of each tile in the window. Raises LabelError.
    """
    kx, ky = subdivisions
    labels = label_grid(window.subdivided(kx, ky), crs, sheets, legend)
    counts = kernels.tile_histograms(labels, valid_HW, origins_T2, size, kx, ky)
    counted = counts[:, : len(legend.classes)]
    total = counted.sum(axis=1)
    fractions = counted / np.maximum(total, 1)[:, None]
    return TileLabels(fractions, total / (size * size * kx * ky))
