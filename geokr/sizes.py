"""Images that grow with the run: small ones first, which cost less, whole ones last.

Fractions do not change when the whole tile is shrunk. The last part of a run, at a falling learning rate, sees the size
that the backbone will be used at.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from geokr.batch import Batch, Changed

# Up to which share of the steps images have which share of their side; then they are whole.
COURSE = ((0.4, 0.5), (0.7, 0.75))


@dataclass(frozen=True, slots=True)
class Sizes:
    """The side of a step's images. side: of whole images in pixels. steps: of the run."""

    side: int
    steps: int

    @property
    def sides(self) -> list[int]:
        """Those that are smaller than whole, the first one first."""
        return [round(share * self.side) for _, share in COURSE]

    def at(self, step: int) -> int:
        """The side in pixels at a step, counted from 1."""
        for (until, _), side in zip(COURSE, self.sides, strict=True):
            if step <= min(round(until * self.steps), self.steps - 1):  # the last step's are whole in any run
                return side
        return self.side

    def __call__(self, batches: Iterable[Batch], step: int) -> Iterator[Batch]:
        """The micro-batches of a step, shrunk."""
        side = self.at(step)
        for batch in batches:
            yield batch if side == batch.images.shape[-1] else shrunk(batch, side)


def shrunk(batch: Batch, side: int) -> Changed:
    """The same batch with whole images of a smaller side."""
    images = _shrink(batch.images, side).contiguous(memory_format=torch.channels_last)
    return Changed(images, batch.fractions, batch.squares, batch.record_ids, batch.weights, batch.colour_changes)


def _shrink(images_NCHW: Tensor, side: int) -> Tensor:
    """By areas where the side divides, else bilinearly over as wide a support; 8-bit images stay 8-bit."""
    values = images_NCHW.float()
    if images_NCHW.shape[-1] % side == 0:
        found = F.avg_pool2d(values, images_NCHW.shape[-1] // side)
    else:
        found = F.interpolate(values, size=(side, side), mode="bilinear", antialias=True)
    return found.round_().to(images_NCHW.dtype) if images_NCHW.dtype == torch.uint8 else found.to(images_NCHW.dtype)
