"""Crops of training images with exact labels: whole squares of the tile, whose fractions the records hold.

All images of a step are cropped alike, to one side and at one place, without a change of scale; the side differs from
step to step. Cropping falsifies the fractions of a tile, so nothing is cropped where squares are not known.
Smaller images also cost less.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from geokr.batch import Batch, Changed
from geokr.config import ConfigError
from geokr.options import AugmentOptions

AUTO = 0.5  # augment.crop_probability=auto
_SALT = 7703  # of the draws, so that they are none of step_seed's
# Share of the tile's labelled ground under which a crop knows nothing of its own: its labels are the whole tile's then.
_LITTLE = 1e-3


@dataclass(frozen=True, slots=True)
class Crops:
    """Where a step's images are cropped: a function of seed and step, so that every process, and every part of a step,
    crops alike, however many there are.

    side: of the images in pixels. squares: G, along an image's side. steps: of the run. Raises ConfigError if they do
    not fit.
    """

    options: AugmentOptions
    seed: int
    side: int
    squares: int
    steps: int

    def __post_init__(self) -> None:
        asked = f"augment.crop_probability={self.options.crop_probability}"
        if not self.squares:
            raise ConfigError(
                f"{asked}: the records of the run do not say where in their tiles classes lie, by one number of "
                "squares: pack them with labels.grid=8, or set augment.crop_probability=0"
            )
        if self.side % self.squares:
            fits = max(self.squares, self.side // self.squares * self.squares)
            raise ConfigError(
                f"{asked}: images of {self.side} px cannot be cut along the records' {self.squares} x {self.squares} "
                f"squares (labels.grid); use data.image_size={fits}"
            )
        if self._fewest >= self.squares:
            raise ConfigError(
                f"{asked}: augment.crop_min={self.options.crop_min:g} of {self.squares} squares leaves no crop smaller "
                "than the image; use a smaller one, or pack with a larger labels.grid"
            )

    @property
    def probability(self) -> float:
        chosen = self.options.crop_probability
        return AUTO if chosen == "auto" else chosen

    @property
    def last(self) -> int:
        """The last step whose images may be cropped."""
        return round(self.options.crop_until * self.steps)

    @property
    def sides(self) -> list[int]:
        """Sides of crops in pixels."""
        return [number * (self.side // self.squares) for number in range(self._fewest, self.squares)]

    @property
    def _fewest(self) -> int:
        return max(1, math.ceil(self.options.crop_min * self.squares - 1e-9))  # 0.3 of 10 is 3.0000000000000004

    def window(self, step: int) -> tuple[int, int, int]:
        """(row, column, side) in squares; all of them where the images stay whole."""
        rng = np.random.default_rng([_SALT, self.seed, step])
        if step > self.last or rng.random() >= self.probability:
            return 0, 0, self.squares
        side = int(rng.integers(self._fewest, self.squares))
        row, column = rng.integers(0, self.squares - side + 1, 2).tolist()
        return row, column, side

    def __call__(self, batches: Iterable[Batch], step: int) -> Iterator[Batch]:
        """The micro-batches of a step, cropped."""
        row, column, side = self.window(step)
        for batch in batches:
            yield batch if side == self.squares else crop(batch, row, column, side)


def crop(batch: Batch, row: int, column: int, side: int) -> Changed:
    """``side`` x ``side`` squares of every image, from this one on, with the fractions of classes in them."""
    squares_NGGK = batch.squares
    assert squares_NGGK is not None, "the loader was not asked for squares"
    pixels = batch.images.shape[-1] // squares_NGGK.shape[1]
    top, left, length = row * pixels, column * pixels, side * pixels
    images = batch.images[:, :, top : top + length, left : left + length]
    inside = squares_NGGK[:, row : row + side, column : column + side]
    shares = inside.sum((1, 2))
    shares = torch.where(shares.sum(1, keepdim=True) < _LITTLE, batch.fractions, shares)
    return Changed(
        images.contiguous(memory_format=torch.channels_last),
        shares / shares.sum(1, keepdim=True),
        inside,
        batch.record_ids,
        batch.weights,
        batch.colour_changes,
    )
