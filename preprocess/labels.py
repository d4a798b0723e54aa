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
from preprocess.blocks import EARTH_RADIUS_M
from preprocess.grid import Grid

WGS84 = "EPSG:4326"

# Bilinear interpolation of exact points at this spacing, halved until its error is below MAX_ERROR land-cover
# pixels: UTM to Albers at 30 m settles at 16. Only the surroundings of a pole need spacing 1.
SPACING = 64
MAX_ERROR = 1e-4
# Where a CRS ends, a lattice is refined to this spacing; what then still touches the end has no label. Without an
# end to it, the fine lattice would ask for many points that fail, and each failure is slow.
EDGE_SPACING = 8
# Error in degrees (a centimetre) of the longitude and latitude that choose between overlapping sheets.
DOMAIN_ERROR = 1e-7
# Label pixels treated at once; bounds the memory of labels and of a lattice at spacing 1.
STRIP_PIXELS = 4 << 20
# A degree of longitude shrinks to nothing at a pole; a geographic map's pixels are sized as if no nearer than this.
SIZED_LATITUDE = 85.0

Domain = tuple[float, float, float, float]
Cap = tuple[float, float, float, float]
EVERYWHERE: Cap = (0.0, 0.0, 1.0, math.pi)


class LabelError(ValueError):
    """Land cover that cannot label the scenes; the message lists what was found."""


@dataclass(frozen=True, slots=True)
class LabelSheet:
    """A sheet, the year in its name, and the nominal cell in degrees that its name stands for.

    cap: a circle on the Earth that holds it: a unit vector to its middle and its radius in radians.
    """

    sheet: raster.Sheet
    year: int | None
    domain: Domain | None
    cap: Cap = EVERYWHERE


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
        place = "CDEFGHJKLMNPQRSTUVWX".find(named["band"])
        south = -80.0 + 8 * place
        return (west, south, west + 6, 84.0 if named["band"] == "X" else south + 8) if place >= 0 else None
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
    return [
        LabelSheet(s, sheet_year(product, s.name), nominal_cell(product, s.name), cap_of(s.grid, s.crs))
        for s in ordered
    ]


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


def _on_sphere(lon: np.ndarray, lat: np.ndarray) -> np.ndarray:
    """Unit vectors [..., 3] of degrees."""
    lon, lat = np.radians(lon), np.radians(lat)
    return np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], axis=-1)


def cap_of(grid: Grid, crs: str, parts: int = 16) -> Cap:
    """A circle on the Earth that holds a grid; the whole Earth where its CRS cannot express all of its ground."""
    points = _on_sphere(*raster.transform_points(crs, WGS84, *grid.xy(*_regular(grid, parts))))
    middle = points.mean(axis=(0, 1))
    length = float(np.linalg.norm(middle))
    if not length > 0.1:  # not a number, or points all around
        return EVERYWHERE
    middle = middle / length
    between = max(float(np.linalg.norm(np.diff(points, axis=axis), axis=-1).max()) for axis in (0, 1))
    reach = float(np.arccos(np.clip(points @ middle, -1, 1)).max())
    # no ground of the grid is farther from all points than their neighbours are; chords are under twice an arc / pi
    return float(middle[0]), float(middle[1]), float(middle[2]), min(math.pi, reach + between * math.pi / 2 + 1e-6)


def apart(a: Cap, b: Cap) -> bool:
    """Whether two caps certainly share no ground."""
    cosine = a[0] * b[0] + a[1] * b[1] + a[2] * b[2]
    return math.acos(max(-1.0, min(1.0, cosine))) > a[3] + b[3]


def ground_steps(grid: Grid, crs: str, column: float, row: float) -> tuple[float, float]:
    """Length in metres on the ground of one pixel along columns and along rows, at a pixel position."""
    columns = np.array([column - 0.5, column + 0.5, column, column])
    rows = np.array([row, row, row - 0.5, row + 0.5])
    ends = _on_sphere(*raster.transform_points(crs, WGS84, *grid.xy(columns, rows)))
    # chords, which for pixels are as long as arcs; unlike differences of longitude they hold at a pole
    return float(np.linalg.norm(ends[1] - ends[0])) * EARTH_RADIUS_M, float(
        np.linalg.norm(ends[3] - ends[2])
    ) * EARTH_RADIUS_M


def middle_of(grid: Grid, crs: str) -> tuple[float, float]:
    """(column, row) of a grid's middle, or of the nearest place to it whose pixel lies on the Earth."""
    columns, rows = _regular(grid, 16)
    known = np.ones(columns.shape, bool)
    for dx, dy in ((-0.5, 0), (0.5, 0), (0, -0.5), (0, 0.5)):
        known &= np.isfinite(raster.transform_points(crs, WGS84, *grid.xy(columns + dx, rows + dy))[0])
    away = np.where(known, np.hypot(columns - grid.width / 2, rows - grid.height / 2), np.inf)
    nearest = int(away.argmin())
    return float(columns.flat[nearest]), float(rows.flat[nearest])


def subdivision(scene: Grid, crs: str, sheets: Sequence[LabelSheet]) -> tuple[int, int]:
    """(kx, ky): label pixels a scene pixel along its columns and rows, by the finest of the sheets.

    Sizes are compared on the ground at the scene's middle. A ratio within a hundredth of a whole number counts
    as that number, since projections stretch lengths by up to that.
    """
    middle = middle_of(scene, crs)
    sx, sy = ground_steps(scene, crs, *middle)
    kx = ky = 1
    centre_x, centre_y = scene.xy(*middle)
    for entry in sheets:
        sheet = entry.sheet
        x, y = raster.transform_points(crs, sheet.crs, np.array([centre_x]), np.array([centre_y]))
        if not np.isfinite(x[0]):
            continue
        if sheet.geographic:
            y = np.clip(y, -SIZED_LATITUDE, SIZED_LATITUDE)
        column, row = sheet.grid.pixel(x, y)
        lx, ly = ground_steps(sheet.grid, sheet.crs, float(column[0]), float(row[0]))
        if np.isfinite([sx, sy, lx, ly]).all() and lx > 0 and ly > 0:
            kx = max(kx, math.ceil(sx / lx - 0.01))
            ky = max(ky, math.ceil(sy / ly - 0.01))
    return kx, ky


def overlapping(scene: Grid, crs: str, sheets: Sequence[LabelSheet]) -> list[LabelSheet]:
    """The sheets that may lie under a scene.

    The scene's outline goes into each near sheet's CRS, never the other way: a world map's bounds mean nothing in
    UTM. Nor do points on the other side of the Earth, so sheets that are far away are left out first.
    """
    found = []
    lattices: dict[str, np.ndarray] = {}
    here = cap_of(scene, crs)
    for entry in sheets:
        sheet = entry.sheet
        if apart(here, entry.cap):
            continue
        if sheet.crs not in lattices:
            lattices[sheet.crs] = _points(scene, crs, sheet.crs, sheet.geographic, *_regular(scene, 16))
        column, row = sheet.grid.pixel(lattices[sheet.crs][..., 0], lattices[sheet.crs][..., 1])
        if not np.isfinite(column).all() or _pieces(sheet, column, row):
            found.append(entry)
    return found


def _regular(grid: Grid, parts: int) -> tuple[np.ndarray, np.ndarray]:
    columns, rows = np.meshgrid(np.linspace(0, grid.width, parts + 1), np.linspace(0, grid.height, parts + 1))
    return columns, rows


# ------------------------------------------------------------------------------------------------- lattices


def _points(grid: Grid, crs: str, target: str, geographic: bool, columns: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Exact target coordinates [..., 2] of pixel positions [P, Q]; longitudes run on over the antimeridian."""
    x, y = raster.transform_points(crs, target, *grid.xy(columns, rows))
    known = np.isfinite(x)
    if geographic and known.all():
        x = np.unwrap(np.unwrap(x, period=360, axis=1), period=360, axis=0)
        x = x - 360 * np.round(x.mean() / 360)
    elif geographic and known.any():
        # around the circular mean: the middle of the points on whichever side of the antimeridian
        angles = np.radians(x[known])
        middle = np.degrees(np.arctan2(np.sin(angles).mean(), np.cos(angles).mean()))
        x = middle + (x - middle + 180) % 360 - 180
    return np.stack([x, y], axis=-1)


def lattice(grid: Grid, crs: str, target: str, geographic: bool, tolerance: tuple[float, float]) -> np.ndarray:
    """Exact coordinates in another CRS at nodes of a grid, float64 [rows, columns, 2].

    The nodes lie evenly from the centre of the first pixel to that of the last, so close that what is interpolated
    bilinearly between them stays within ``tolerance`` (units of the target, per axis); at worst on every pixel.
    The error is measured in the middle of the cells and of their sides against the exact points of the next finer
    lattice, which is the one returned. In the middle alone it would not show: coordinates of one conformal
    projection in another are harmonic, and there the two curvatures cancel.
    """
    across, down = _cells(grid.width), _cells(grid.height)
    coarse = _nodes(grid, crs, target, geographic, across, down)
    while (spacing := max((grid.width - 1) / across, (grid.height - 1) / down) / 2) > 1:
        across, down = 2 * across, 2 * down
        fine = _nodes(grid, crs, target, geographic, across, down)
        between = _halfway(coarse)
        error = np.abs(between - fine)
        if geographic:  # the two lattices may lie a whole turn apart
            error[..., 0] = np.abs((between[..., 0] - fine[..., 0] + 180) % 360 - 180)
        settled = (error[..., 0] <= tolerance[0]) & (error[..., 1] <= tolerance[1])
        lost = np.isnan(between).any(-1) & (np.isnan(fine).any(-1) | (spacing <= EDGE_SPACING))
        if (settled | lost).all():
            return fine
        coarse = fine
    return _nodes(grid, crs, target, geographic, max(1, grid.width - 1), max(1, grid.height - 1))


def _cells(pixels: int) -> int:
    return max(1, -(-(pixels - 1) // SPACING))


def _nodes(grid: Grid, crs: str, target: str, geographic: bool, across: int, down: int) -> np.ndarray:
    columns = 0.5 + np.arange(across + 1) * ((grid.width - 1) / across)
    rows = 0.5 + np.arange(down + 1) * ((grid.height - 1) / down)
    return _points(grid, crs, target, geographic, *np.meshgrid(columns, rows))


def _halfway(nodes: np.ndarray) -> np.ndarray:
    """A lattice with the bilinear values in the middle of sides and cells put between."""
    finer = np.empty((2 * nodes.shape[0] - 1, 2 * nodes.shape[1] - 1, 2))
    finer[::2, ::2] = nodes
    finer[1::2, ::2] = (nodes[:-1] + nodes[1:]) / 2
    finer[:, 1::2] = (finer[:, :-2:2] + finer[:, 2::2]) / 2
    return finer


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

    Raises LabelError listing codes that the product does not have, or for a sheet that cannot be read.
    """
    labels = np.full((grid.height, grid.width), NODATA, np.uint8)
    place = cap_of(grid, crs, parts=4)
    lattices: dict[str, np.ndarray] = {}
    hits: list[tuple[LabelSheet, np.ndarray]] = []
    for entry in sheets:
        sheet = entry.sheet
        if apart(place, entry.cap):
            continue
        if sheet.crs not in lattices:
            tolerance = _tolerance([other.sheet for other in sheets if other.sheet.crs == sheet.crs])
            lattices[sheet.crs] = lattice(grid, crs, sheet.crs, sheet.geographic, tolerance)
        pixels = _in_pixels(lattices[sheet.crs], sheet)
        if np.isfinite(pixels).any() and _pieces(sheet, pixels[..., 0], pixels[..., 1]):
            hits.append((entry, pixels))
    if len(hits) > 1 and any(entry.domain is not None for entry, _ in hits):
        lonlat = lattice(grid, crs, WGS84, True, (DOMAIN_ERROR, DOMAIN_ERROR))
        for entry, pixels in hits:
            if entry.domain is not None:
                _gather(labels, entry, pixels, legend, lonlat, entry.domain)
    for entry, pixels in hits:
        _gather(labels, entry, pixels, legend, None, None)
    return labels


def _tolerance(sheets: Sequence[raster.Sheet]) -> tuple[float, float]:
    """MAX_ERROR of the finest sheet's pixel, in units of the CRS, along x and y."""
    transforms = [sheet.grid.transform for sheet in sheets]
    x = min(max(abs(t[0]), abs(t[1])) for t in transforms)
    y = min(max(abs(t[3]), abs(t[4])) for t in transforms)
    return MAX_ERROR * x, MAX_ERROR * y


def _gather(
    labels: np.ndarray,
    entry: LabelSheet,
    pixels: np.ndarray,
    legend: Legend,
    lonlat: np.ndarray | None,
    domain: Domain | None,
) -> None:
    if not (labels == NODATA).any():
        return
    lookup = lookup_of(legend, entry.sheet)
    for window in _pieces(entry.sheet, pixels[..., 0], pixels[..., 1]):
        try:
            codes = raster.read_codes(entry.sheet, window)
        except raster.RasterError as error:  # not the scene's fault, so never a reason to leave the scene out
            raise LabelError(str(error)) from error
        kernels.gather_labels(
            labels, NODATA, pixels, codes, lookup, LOOKUP_OFFSET, np.array(window[:2], np.float64),
            _period(entry.sheet), pixels if lonlat is None else lonlat,
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
    counts = np.zeros((len(origins_T2), 256), np.int64)
    strip = max(1, STRIP_PIXELS // (window.width * kx * ky))
    for top in range(0, window.height, strip):
        part = window.window(0, top, window.width, min(strip, window.height - top))
        labels = label_grid(part.subdivided(kx, ky), crs, sheets, legend)
        kernels.add_tile_histograms(counts, labels, valid_HW, origins_T2, size, kx, ky, top)
    counted = counts[:, : len(legend.classes)]
    total = counted.sum(axis=1)
    fractions = counted / np.maximum(total, 1)[:, None]
    return TileLabels(fractions, total / (size * size * kx * ky))
