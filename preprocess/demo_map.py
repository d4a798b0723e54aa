"""The demo's land-cover map: the world as GlobeLand30 would draw it, with the faults that real maps have.

It is some years old, lies a few metres off, shows the majority over 30 m and nothing smaller than a few pixels, and
is wrong in patches. Sheets of neighbouring zones come from the same world but are generalised and mistaken each in
its own way, so where they overlap they disagree in a few per cent of the pixels.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from preprocess.demo_backdrop import Backdrop
from preprocess.demo_noise import cell, chance, jit
from preprocess.demo_survey import Frame, classes, place, survey
from preprocess.demo_town import MAP_EPOCH

SHEET_PIXELS = 3  # a pixel of the sheet is 3 x 3 of the survey's
STRIP_ROWS = 40
# The map's own misplacement in metres, east and north, and how much further each zone's sheet may be off.
OFFSET_M, ZONE_OFFSET_M = (14.0, -11.0), 3.0
PATCH_M, SHARED_MISTAKES, ZONE_MISTAKES = 240.0, 0.022, 0.005
_SHIFT, _MISTAKE, _ZONE_MISTAKE = range(1000, 1060, 20)

# What each code is mistaken for: crops and grass for each other, woods for shrub, ...; the others never are.
_MISTAKEN_FOR = np.arange(256, dtype=np.uint8)
_MISTAKEN_FOR[[10, 20, 30, 40, 50, 80, 90]] = 30, 40, 10, 30, 30, 10, 30


@jit
def _majority(fine, codes, votes):
    """uint8 [3H, 3W] to the commonest code of each 3 x 3 and how many of the nine have it; the first one wins."""
    rows, columns = codes.shape
    counts = np.zeros(256, np.int64)
    for r in range(rows):
        for c in range(columns):
            best = 0
            for i in range(9):
                code = fine[3 * r + i // 3, 3 * c + i % 3]
                counts[code] += 1
                if counts[code] > best:
                    best = counts[code]
                    codes[r, c] = code
            votes[r, c] = best
            for i in range(9):
                counts[fine[3 * r + i // 3, 3 * c + i % 3]] = 0


@jit
def _generalise(codes, votes, smooth):
    """Gives pixels that few neighbours or few of their own nine points support to the neighbourhood's majority."""
    rows, columns = codes.shape
    counts = np.zeros(256, np.int64)
    for r in range(rows):
        for c in range(columns):
            own = codes[r, c]
            best, winner = 0, own
            for i in range(max(r - 1, 0), min(r + 2, rows)):
                for j in range(max(c - 1, 0), min(c + 2, columns)):
                    counts[codes[i, j]] += votes[i, j]
                    if counts[codes[i, j]] > best:
                        best, winner = counts[codes[i, j]], codes[i, j]
            weak = counts[own] < 20 or votes[r, c] < 5
            smooth[r, c] = winner if weak else own
            counts[:] = 0


@jit
def _finish(key, zone, nodes, lonlat, bounds, mistaken, codes):
    """In place: patches of mistakes, and 0 outside the sheet. bounds: its west, east, south, north in degrees."""
    west, east, south, north = bounds
    rows, columns = codes.shape
    for r in range(rows):
        for c in range(columns):
            lon, lat = place(lonlat, 3.0 * r + 1.5, 3.0 * c + 1.5)
            if lon < west or lon > east or lat < south or lat > north:
                codes[r, c] = 0
                continue
            x, y = place(nodes, 3.0 * r + 1.5, 3.0 * c + 1.5)
            i, j, _ = cell(key, _MISTAKE, x / PATCH_M, y / PATCH_M)
            shared = chance(key, _MISTAKE + 1, i, j) < SHARED_MISTAKES
            if shared or chance(key, _ZONE_MISTAKE + zone, i, j) < ZONE_MISTAKES:
                codes[r, c] = mistaken[codes[r, c]]


def misplaced(key: np.uint64, zone: int, frame: Frame) -> Frame:
    """The frame as the map's makers thought it lay."""
    east = OFFSET_M[0] + ZONE_OFFSET_M * (2.0 * chance(key, _SHIFT, zone, 0) - 1.0)
    north = OFFSET_M[1] + ZONE_OFFSET_M * (2.0 * chance(key, _SHIFT, zone, 1) - 1.0)
    return Frame(frame.rows, frame.columns, frame.nodes + np.array([east, north]))


def draw_sheet(
    key: np.uint64,
    zone: int,
    frame: Frame,
    lonlat_nodes: np.ndarray,
    bounds: tuple[float, float, float, float],
    threads: int,
) -> np.ndarray:
    """A sheet as GlobeLand30 codes, uint8 [rows / 3, columns / 3]; 0 outside its bounds.

    frame: of the sheet in pixels of 10 m, rows and columns multiples of 3. lonlat_nodes: float64 [ny, nx, 2], degrees
    at the frame's nodes. bounds: west, east, south, north in degrees. The result does not depend on ``threads``.
    """
    placed = misplaced(key, zone, frame)
    backdrop = placed.backdrop(key)
    codes = np.empty((frame.rows // SHEET_PIXELS, frame.columns // SHEET_PIXELS), np.uint8)
    votes = np.empty_like(codes)

    def draw(first: int) -> None:
        part = slice(first, first + STRIP_ROWS)
        _majority(_strip(backdrop, placed, first, len(codes[part])), codes[part], votes[part])

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(draw, range(0, len(codes), STRIP_ROWS)))
    smooth = np.empty_like(codes)
    _generalise(codes, votes, smooth)
    _finish(key, zone, frame.nodes, lonlat_nodes, bounds, _MISTAKEN_FOR, smooth)
    return smooth


def _strip(backdrop: Backdrop, frame: Frame, first: int, rows: int) -> np.ndarray:
    shape = (SHEET_PIXELS * rows, frame.columns)
    return classes(survey(backdrop, frame, SHEET_PIXELS * first, 0, shape, 0.5, MAP_EPOCH))
