"""What the training loop asks of a batch, whoever made it."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor


class Batch(Protocol):
    """Images and targets on the device where the step runs."""

    @property
    def images(self) -> Tensor:
        """[N, C, H, W], NHWC in memory: uint8, or floating-point and normalised already."""
        ...

    @property
    def fractions(self) -> Tensor:
        """float32 [N, K], each row sums to 1."""
        ...

    @property
    def squares(self) -> Tensor | None:
        """float32 [N, G, G, K], the fractions by squares of the image; None where they were not asked for."""
        ...

    @property
    def colour_changes(self) -> Tensor | None:
        """float32 [N, Q], how each image's colours were changed, 0 where they were not; None where not asked for."""
        ...

    @property
    def record_ids(self) -> np.ndarray:
        """int64 [N], on the host."""
        ...

    @property
    def weights(self) -> Tensor:
        """float32 [N]: of the labels, their mean over the training records 1; in validation 1, or 0 for padding."""
        ...


@dataclass(frozen=True, slots=True)
class Changed:
    """A batch made of another one; see :class:`Batch`."""

    images: Tensor
    fractions: Tensor
    squares: Tensor | None
    record_ids: np.ndarray
    weights: Tensor
    colour_changes: Tensor | None
