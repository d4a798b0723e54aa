"""From a decoded tile to the model's image on the CPU: the kernels, set up once for a dataset and an image size.

Legend of shapes: N images, H = W side of the tile, h = w side of the image, I bands of the record, C of the model.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from pipelines import kernels, kernels_rgb
from pipelines.augment import BandFacts, Parameters
from pipelines.errors import PipelineError
from pipelines.resize import AreaTaps, area_taps

# Largest finite half. Normalised values come nowhere near it; a wild value stays finite and the sign stays right.
HALF_LIMIT = 65504.0


@dataclass(frozen=True, eq=False)
class Transform:
    """Dihedral, colour, area resize, rounding or normalisation (see pipelines.augment for the order).

    tile_size: H. image_size: h. facts: dtype, bands, statistics.
    """

    tile_size: int
    image_size: int
    facts: BandFacts

    def __post_init__(self) -> None:
        if self.image_size > self.tile_size:
            raise PipelineError(
                f"data.image_size {self.image_size} is larger than the records' tiles of {self.tile_size} pixels: "
                f"set data.image_size={self.tile_size} or less, or pack larger tiles (tile.size)"
            )

    @property
    def is_bytes(self) -> bool:
        """Whether images are uint8; else they are normalised and half."""
        return self.facts.dtype == "uint8"

    @property
    def out_dtype(self) -> torch.dtype:
        return torch.uint8 if self.is_bytes else torch.float16

    @cached_property
    def taps(self) -> AreaTaps | None:
        """Of the area resize, where there is one."""
        return None if self.image_size == self.tile_size else area_taps(self.tile_size, self.image_size)

    @cached_property
    def _normalisation(self) -> tuple[np.ndarray, np.ndarray]:
        """float32 (scale, offset) [C]."""
        mean, std = self.facts.normalisation()
        return (1 / std).astype(np.float32), (-mean / std).astype(np.float32)

    def allocate(self, count: int, pinned: bool = False) -> torch.Tensor:
        """Room for images [N, h, w, C]."""
        size = (count, self.image_size, self.image_size, len(self.facts.bands))
        return torch.empty(size, dtype=self.out_dtype, pin_memory=pinned)

    def __call__(self, image_HWI: np.ndarray, parameters: Parameters, n: int, out_hwC: np.ndarray) -> None:
        """Writes the n-th image of a batch: one tile in the record's dtype into uint8 or float16."""
        if self.is_bytes:
            self._run(image_HWI, parameters, n, out_hwC)
            return
        image_hwC = np.empty(out_hwC.shape, np.float32)
        self._run(image_HWI, parameters, n, image_hwC)
        kernels.normalise(image_hwC, *self._normalisation, np.float32(HALF_LIMIT), out_hwC.view(np.uint16))

    def _run(self, image_HWI: np.ndarray, parameters: Parameters, n: int, out_hwC: np.ndarray) -> None:
        low, high = (np.float32(limit) for limit in self.facts.limits())
        dihedral, matrix = int(parameters.dihedral[n]), parameters.colour[n]
        if self.taps is None and self.is_bytes and matrix.shape == (3, 4):
            kernels_rgb.augment_rgb(image_HWI, dihedral, matrix, out_hwC)
        elif self.taps is None:
            kernels.augment(image_HWI, dihedral, matrix, low, high, self.is_bytes, out_hwC)
        else:
            first, weights = self.taps.first, self.taps.weights
            kernels.augment_resize(image_HWI, dihedral, matrix, low, high, first, weights, self.is_bytes, out_hwC)
