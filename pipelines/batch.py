"""What the loaders give."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from pipelines.augment import Parameters, turn_squares
from pipelines.reader import Samples


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """N samples.

    images: [N, C, H, W], a channels-last view of NHWC memory; uint8 in the record's grey levels, or float16,
        normalised with the training mean and std, where the records are not 8-bit.
    fractions: float32 [N, K], each row sums to 1. weights: float32 [N], of the labels; in
        validation 0 marks padding, else 1.
    record_ids: int64 [N], on the host.
    squares: float32 [N, G, G, K], the fractions by squares of the image as it is turned, summing to ``fractions``; None
        where they were not asked for.
    colour_changes: float32 [N, Q], see :func:`pipelines.augment.colour_changes`; None where they were not asked for.
    """

    images: torch.Tensor
    fractions: torch.Tensor
    record_ids: np.ndarray
    weights: torch.Tensor
    squares: torch.Tensor | None = None
    colour_changes: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Which records make up a batch: ids and epochs int64 [N], weights float32 [N]."""

    ids: np.ndarray
    epochs: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    """A batch whose bytes are here, and what is to be done to them."""

    plan: Plan
    samples: Samples
    parameters: Parameters


@dataclass(frozen=True, slots=True, eq=False)
class Decoded:
    """A batch with its images. give: the images NHWC, [N, h, w, C] uint8 or float16, on the host (pinned for a GPU) or
    on the device; called once, in the thread and stream that will use them."""

    plan: Plan
    fractions: np.ndarray
    squares: np.ndarray | None
    colour_changes: np.ndarray | None
    give: Callable[[], torch.Tensor]

    @classmethod
    def of(cls, batch: Loaded, give: Callable[[], torch.Tensor]) -> "Decoded":
        """A loaded batch whose images are there; its squares are turned as the images were."""
        squares = batch.samples.squares
        turned = None if squares is None else turn_squares(squares, batch.parameters.dihedral)
        return cls(batch.plan, batch.samples.fractions, turned, batch.parameters.changes, give)

    def to(self, device: torch.device) -> Batch:
        """On the device, without waiting for the copy."""
        images = self.give().to(device, non_blocking=True).permute(0, 3, 1, 2)
        fractions, weights = _move(self.fractions, device), _move(self.plan.weights, device)
        squares = None if self.squares is None else _move(self.squares, device)
        changes = None if self.colour_changes is None else _move(self.colour_changes, device)
        return Batch(images, fractions, self.plan.ids, weights, squares, changes)


def _move(values: np.ndarray, device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
