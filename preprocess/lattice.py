"""Exact coordinates in another CRS at the nodes of a lattice, so close that interpolation between them is as good."""

from functools import lru_cache

import numpy as np

from preprocess.place import Place

# Bilinear interpolation of exact points at this spacing, halved until its error is below MAX_ERROR land-cover
# pixels: UTM to Albers at 30 m settles at 16. Only the surroundings of a pole need spacing 1.
SPACING = 64
# Where cubics may stand for most of the points (see CUBIC_SHARE), the first ones lie so many times as far apart, if as
# many cells along each side as cubics need remain.
WIDER = (4, 2)
CUBIC_CELLS = 4

# Where a CRS ends, a lattice is refined to this spacing; what then still touches the end has no label. Without an
# end to it, the fine lattice would ask for many points that fail, and each failure is slow.
EDGE_SPACING = 8

# Where the ground runs smoothly, cubics through exact points give the finer lattice instead of more exact points, if
# they are this share of the tolerance off at most.
CUBIC_SHARE = 0.01

# Positions of at most so many nodes are kept for the next place of the same size, such as the next tile.
KEPT_NODES = 1024


def points(place: Place, target: str, geographic: bool, columns: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Exact target coordinates [..., 2] of pixel positions [P, Q]; longitudes run on over the antimeridian."""
    x, y = place.points(target, columns, rows)
    known = np.isfinite(x)
    if geographic and known.all():
        if x.max() - x.min() >= 180:  # else it would change nothing
            x = np.unwrap(np.unwrap(x, period=360, axis=1), period=360, axis=0)
        x = x - 360 * np.round(x.mean() / 360)
    elif geographic and known.any():
        # around the circular mean: the middle of the points on whichever side of the antimeridian
        angles = np.radians(x[known])
        middle = np.degrees(np.arctan2(np.sin(angles).mean(), np.cos(angles).mean()))
        x = middle + (x - middle + 180) % 360 - 180
    return np.stack([x, y], axis=-1)


def lattice(place: Place, target: str, geographic: bool, tolerance: tuple[float, float]) -> np.ndarray:
    """Coordinates in another CRS at nodes over a place, float64 [rows, columns, 2].

    The nodes lie evenly from the centre of the first pixel to that of the last, so close that what is interpolated
    bilinearly between them stays within ``tolerance`` (units of the target, per axis); at worst on every pixel.
    The error is measured in the middle of the cells and of their sides against the points of the next finer lattice,
    which is the one returned: exact ones, or as good (see CUBIC_SHARE). In the middle alone it would not show:
    coordinates of one conformal projection in another are harmonic, and there the two curvatures cancel.
    """
    across, down = _cells(place)
    coarse = _nodes(place, target, geographic, across, down)
    while (spacing := max((place.width - 1) / across, (place.height - 1) / down) / 2) > 1:
        across, down = 2 * across, 2 * down
        fine = _by_cubics(coarse, tolerance) if place.smooth else None
        if fine is None:
            fine = _nodes(place, target, geographic, across, down)
        between = _halfway(coarse)
        error = np.abs(between - fine)
        if geographic:  # the two lattices may lie a whole turn apart
            error[..., 0] = np.abs((between[..., 0] - fine[..., 0] + 180) % 360 - 180)
        settled = (error[..., 0] <= tolerance[0]) & (error[..., 1] <= tolerance[1])
        lost = np.isnan(between).any(-1) & (np.isnan(fine).any(-1) | (spacing <= EDGE_SPACING))
        if (settled | lost).all():
            return fine
        coarse = fine
    return _nodes(place, target, geographic, max(1, place.width - 1), max(1, place.height - 1))


def _cells(place: Place) -> tuple[int, int]:
    """Cells across and down of the first lattice."""
    for spacing in (SPACING * times for times in WIDER if place.smooth):
        across, down = (-(-(pixels - 1) // spacing) for pixels in (place.width, place.height))
        if min(across, down) >= CUBIC_CELLS:
            return across, down
    return max(1, -(-(place.width - 1) // SPACING)), max(1, -(-(place.height - 1) // SPACING))


def _nodes(place: Place, target: str, geographic: bool, across: int, down: int) -> np.ndarray:
    few = across * down <= KEPT_NODES
    return points(place, target, geographic, *(_kept if few else _positions)(place.width, place.height, across, down))


def _positions(width: int, height: int, across: int, down: int) -> tuple[np.ndarray, np.ndarray]:
    columns = 0.5 + np.arange(across + 1) * ((width - 1) / across)
    rows = 0.5 + np.arange(down + 1) * ((height - 1) / down)
    columns, rows = np.meshgrid(columns, rows)
    columns.flags.writeable = rows.flags.writeable = False
    return columns, rows


_kept = lru_cache(maxsize=64)(_positions)


def _halfway(nodes: np.ndarray) -> np.ndarray:
    """A lattice with the bilinear values in the middle of sides and cells put between."""
    finer = np.empty((2 * nodes.shape[0] - 1, 2 * nodes.shape[1] - 1, 2))
    finer[::2, ::2] = nodes
    finer[1::2, ::2] = (nodes[:-1] + nodes[1:]) / 2
    finer[:, 1::2] = (finer[:, :-2:2] + finer[:, 2::2]) / 2
    return finer


def _by_cubics(nodes: np.ndarray, tolerance: tuple[float, float]) -> np.ndarray | None:
    """The lattice with points put between by cubics through four neighbours, or None where that is not close enough.

    A cubic is off by at most 5/128 of the fourth difference halfway between two points (the outermost; 3/128 within).
    """
    if min(nodes.shape[:2]) <= CUBIC_CELLS:
        return None
    limit = CUBIC_SHARE * np.array(tolerance) * 128 / 5
    if not all((np.abs(np.diff(nodes, 4, axis=axis)) <= limit).all() for axis in (0, 1)):  # NaN is not
        return None
    finer = np.empty((2 * nodes.shape[0] - 1, 2 * nodes.shape[1] - 1, 2))
    finer[::2, ::2] = nodes
    finer[1::2, ::2] = _cubic_middles(nodes)
    finer[:, 1::2] = _cubic_middles(finer[:, ::2].swapaxes(0, 1)).swapaxes(0, 1)
    return finer


def _cubic_middles(nodes: np.ndarray) -> np.ndarray:
    """Values halfway between neighbours along the first axis."""
    middles = np.empty((len(nodes) - 1, *nodes.shape[1:]))
    middles[1:-1] = (9 * (nodes[1:-2] + nodes[2:-1]) - (nodes[:-3] + nodes[3:])) / 16
    for end, a, b, c, d in ((0, 0, 1, 2, 3), (-1, -1, -2, -3, -4)):
        middles[end] = (5 * nodes[a] + 15 * nodes[b] - 5 * nodes[c] + nodes[d]) / 16
    return middles
