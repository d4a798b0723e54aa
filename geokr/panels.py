"""Pictures of what the models see and say: tiles beside the histograms of target, student and teacher."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from geokr import band_names
from geokr.manifests import ClassInfo

ROWS = ("target", "student", "teacher")
COLUMNS = 2  # panels beside one another
GREY = "#5f6368"
THINNEST = 0.003  # a share below this would be less than a pixel wide
MIN_LABELLED = 0.14  # a share narrower than this has no room for its number


@dataclass(frozen=True, slots=True)
class Panel:
    """A tile, uint8 RGB [H, W, 3], and three histograms: shares [K] that sum to 1."""

    image: np.ndarray
    target: np.ndarray
    student: np.ndarray
    teacher: np.ndarray

    @property
    def divergence(self) -> float:
        """KL(target || teacher), nats."""
        known = self.target > 0
        ratio = self.target[known] / np.maximum(self.teacher[known], 1e-12)
        return float((self.target[known] * np.log(ratio)).sum())


def rgb_channels(names: Sequence[str]) -> tuple[int, int, int]:
    """Which bands to show as red, green and blue: those of that name, else the first three, else the first."""
    red, green, blue = (band_names.place_of(colour, names) for colour in band_names.RGB)
    if red is not None and green is not None and blue is not None:
        return red, green, blue
    return (0, 1, 2) if len(names) >= 3 else (0, 0, 0)


def display_images(images_NCHW: Tensor, channels: tuple[int, int, int]) -> np.ndarray:
    """uint8 RGB [N, H, W, 3] for the eye: 8-bit bands as they are, normalised ones from -2 to 2.5 deviations."""
    picked = images_NCHW[:, list(channels)].permute(0, 2, 3, 1)
    if picked.dtype != torch.uint8:
        picked = ((picked.float() + 2.0) * (255.0 / 4.5)).clamp(0, 255).to(torch.uint8)
    return picked.cpu().numpy()


def _bars(axes, panel: Panel, colours: np.ndarray) -> None:
    for row, name in enumerate(ROWS):
        shares = getattr(panel, name)
        left = 0.0
        for share, colour in zip(shares, colours, strict=True):
            if share < THINNEST:
                continue
            axes.barh(row, share, left=left, color=colour, height=0.72, edgecolor="white", linewidth=0.4)
            if share >= MIN_LABELLED:
                ink = "black" if colour @ (0.299, 0.587, 0.114) > 0.55 else "white"
                axes.text(left + share / 2, row, f"{share:.0%}", ha="center", va="center", fontsize=7, color=ink)
            left += share
    axes.set(xlim=(0, 1), ylim=(2.6, -0.6), xticks=[], yticks=range(3))
    axes.set_yticklabels(ROWS, fontsize=8)
    axes.tick_params(length=0, colors=GREY)
    axes.spines[:].set_visible(False)
    axes.text(1, -0.55, f"teacher: KL {panel.divergence:.2f}", ha="right", va="bottom", fontsize=7, color=GREY)


def draw_panels(panels: Sequence[Panel], classes: Sequence[ClassInfo], title: str) -> np.ndarray:
    """A picture, uint8 RGB [H, W, 3]: each tile with its three histograms as bars in the product's colours."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    colours = np.array([entry.rgb for entry in classes]) / 255.0
    shown = [k for k in range(len(classes)) if any(getattr(p, row)[k] >= 0.01 for p in panels for row in ROWS)]
    rows = -(-len(panels) // COLUMNS)
    legend_rows = -(-len(shown) // 5)
    height = 0.45 + 1.25 * rows + 0.1 + 0.24 * legend_rows
    figure = Figure(figsize=(9.6, height), dpi=110, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    figure.text(0.012, 1 - 0.16 / height, title, fontsize=10, va="center", weight="bold", color="#202124")
    grid = figure.add_gridspec(
        rows,
        COLUMNS * 2,
        width_ratios=[1.0, 3.1] * COLUMNS,
        left=0.012,
        right=0.985,
        top=1 - 0.42 / height,
        bottom=(0.16 + 0.24 * legend_rows) / height,
        wspace=0.28,
        hspace=0.16,
    )
    for index, panel in enumerate(panels):
        row, column = divmod(index, COLUMNS)
        picture = figure.add_subplot(grid[row, 2 * column])
        picture.imshow(panel.image, interpolation="nearest")
        picture.set_axis_off()
        _bars(figure.add_subplot(grid[row, 2 * column + 1]), panel, colours)
    handles = [
        Patch(facecolor=colours[k], edgecolor=GREY, linewidth=0.4, label=classes[k].name.replace("_", " "))
        for k in shown
    ]
    figure.legend(
        handles=handles,
        loc="lower center",
        ncols=5,
        fontsize=7.5,
        frameon=False,
        handlelength=1.1,
        handleheight=1.0,
        columnspacing=1.4,
        borderaxespad=0.15,
    )
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def write_png(picture_HWC: np.ndarray, path: Path) -> None:
    """Writes a uint8 RGB picture; makes the folder."""
    from matplotlib.image import imsave

    path.parent.mkdir(parents=True, exist_ok=True)
    imsave(path, picture_HWC)
