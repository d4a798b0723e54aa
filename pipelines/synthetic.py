"""One random batch, made once on the device and given again and again: the step's own speed, without any data."""

from collections.abc import Iterator

import numpy as np
import torch

from pipelines.batch import Batch


def random_batch(
    *,
    count: int,
    bands: int,
    image_size: int,
    classes: int,
    device: torch.device,
    seed: int,
    uint8: bool,
    squares: int = 0,
    changes: int = 0,
) -> Batch:
    """Random images (uint8, or standard normal half) and fractions, of the form the other loaders give.

    squares: along a side, that share the fractions evenly; 0 for none. changes: numbers that say how colours were
    changed, random ones; 0 for none.
    """
    generator = torch.Generator().manual_seed(seed % 2**63)
    shape = (count, image_size, image_size, bands)
    if uint8:
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    else:
        images = torch.randn(shape, generator=generator).half()
    fractions = torch.rand((count, classes), generator=generator) + 1e-3
    fractions /= fractions.sum(1, keepdim=True)
    weights = torch.ones(count)
    return Batch(
        images.to(device).permute(0, 3, 1, 2),
        fractions.to(device),
        np.arange(count, dtype=np.int64),
        weights.to(device),
        fractions[:, None, None].expand(-1, squares, squares, -1).div(squares**2).to(device) if squares else None,
        torch.randn((count, changes), generator=generator).to(device) if changes else None,
    )


def repeat(batch: Batch) -> Iterator[Batch]:
    """The same batch for ever."""
    while True:
        yield batch
