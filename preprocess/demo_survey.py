"""The demo landscape on the pixels of a raster: what the painter of scenes and the maker of sheets both start from.

Shape letters: H rows from north to south, W columns. Rasters here have pixels of 10 m; a raster in any projection
finds its place in the world through :class:`Frame`.
"""

from dataclasses import dataclass

import numpy as np

from preprocess.demo_backdrop import Backdrop, make_backdrop
from preprocess.demo_materials import CLASS_OF
from preprocess.demo_noise import jit
from preprocess.demo_surface import surface

PIXEL_M = 10.0
# World coordinates are exact at one pixel in 64 and bilinear between: good to 1 cm for one UTM zone in its neighbour.
NODE_PIXELS = 64


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """A raster's place in the world. rows, columns: its size in pixels of 10 m.

    nodes: float64 [ny, nx, 2], world x and y in metres at every 64th pixel corner, the first of them 64 pixels
    above and left of the raster's own corner, the last at least 64 beyond its end.
    """

    rows: int
    columns: int
    nodes: np.ndarray

    def backdrop(self, key: np.uint64) -> Backdrop:
        """The slow fields below the raster."""
        west, south = self.nodes.min(axis=(0, 1))
        east, north = self.nodes.max(axis=(0, 1))
        return make_backdrop(key, float(west), float(south), float(east), float(north))


@dataclass(frozen=True, slots=True, eq=False)
class Ground:
    """Covers of a window. first, second: uint8 [H, W], materials. share: float32 [H, W], of the second.
    tone: float32 [H, W], a factor on brightness. height: float32 [H, W], metres."""

    first: np.ndarray
    second: np.ndarray
    share: np.ndarray
    tone: np.ndarray
    height: np.ndarray


def node_places(pixels: int) -> np.ndarray:
    """Where nodes stand along a side of so many pixels, in pixels from the raster's corner."""
    return np.arange(-1, pixels // NODE_PIXELS + 3, dtype=np.float64) * NODE_PIXELS


@jit
def place(nodes, row, column):
    """World (x, y) at a place in pixels; (0, 0) is the raster's corner."""
    v, u = row / NODE_PIXELS + 1.0, column / NODE_PIXELS + 1.0
    j, i = int(v), int(u)
    v, u = v - j, u - i
    a, b, c, d = (1.0 - v) * (1.0 - u), (1.0 - v) * u, v * (1.0 - u), v * u
    x = a * nodes[j, i, 0] + b * nodes[j, i + 1, 0] + c * nodes[j + 1, i, 0] + d * nodes[j + 1, i + 1, 0]
    y = a * nodes[j, i, 1] + b * nodes[j, i + 1, 1] + c * nodes[j + 1, i, 1] + d * nodes[j + 1, i + 1, 1]
    return x, y


@jit
def _survey(key, fields, west, south, nodes, row, column, season, epoch, first, second, share, tone, height):
    rows, columns = first.shape
    for r in range(rows):
        for c in range(columns):
            x, y = place(nodes, row + r + 0.5, column + c + 0.5)
            one, two, part, factor, metres = surface(key, fields, west, south, x, y, season, epoch)
            first[r, c], second[r, c], share[r, c], tone[r, c] = one, two, part, factor
            height[r, c] = metres


def survey(
    backdrop: Backdrop, frame: Frame, row: int, column: int, shape: tuple[int, int], season: float, epoch: int
) -> Ground:
    """The ground of a window that begins at (row, column), which may lie up to 64 pixels outside the raster."""
    first, second = np.empty(shape, np.uint8), np.empty(shape, np.uint8)
    share, tone, height = (np.empty(shape, np.float32) for _ in range(3))
    _survey(
        backdrop.key, backdrop.fields, backdrop.west, backdrop.south, frame.nodes,
        row, column, season, epoch, first, second, share, tone, height,
    )  # fmt: skip
    return Ground(first, second, share, tone, height)


def classes(ground: Ground) -> np.ndarray:
    """GlobeLand30 codes, uint8 [H, W]: the class of the material that has the larger share."""
    return CLASS_OF[np.where(ground.share > 0.5, ground.second, ground.first)]
