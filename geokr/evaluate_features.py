"""Images to features: once for each backbone, kept in memory. And what colours alone say of an image."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.nn.modules.batchnorm import _BatchNorm

from geokr.config import ConfigError
from geokr.evaluate_data import Part
from geokr.evaluate_images import without_data

PERCENTILES = (5, 25, 50, 75, 95)


class Preparation:
    """Images [H, W, C] to what a backbone takes: float32 [N, C, S, S], chosen bands, normalised, resized to a side S.

    Pixels without data in any of those bands (of masked arrays) become 0, the mean.
    mean, std: one a band of the backbone. side: 0 to leave images as large as they are. bands: which of an image's,
    from 0, in the backbone's order.
    """

    def __init__(self, mean: list[float], std: list[float], side: int, bands: tuple[int, ...]) -> None:
        self._plain = mean, std, bands
        self.mean = torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1)
        self.std = torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1)
        self.side, self.bands = side, list(bands)

    def as_large(self) -> "Preparation":
        """The same without resizing: where pixels are what is asked about."""
        mean, std, bands = self._plain
        return Preparation(mean, std, 0, bands)

    def __call__(self, images: list[np.ndarray]) -> Tensor:
        return torch.cat([self._one(image) for image in images])

    def _one(self, image_HWC: np.ndarray) -> Tensor:
        chosen = image_HWC[..., self.bands]
        values = np.ma.getdata(chosen).transpose(2, 0, 1)
        pixels = torch.from_numpy(np.ascontiguousarray(values, np.float32))[None]
        pixels = (pixels - self.mean) / self.std
        if isinstance(chosen, np.ma.MaskedArray):
            pixels[..., torch.from_numpy(without_data(chosen))] = 0
        if self.side and pixels.shape[2:] != (self.side, self.side):
            pixels = interpolate(pixels, (self.side, self.side), mode="bilinear", antialias=True, align_corners=False)
        return pixels


@dataclass(frozen=True, slots=True, eq=False)
class Entrant:
    """Weights to compare, and how images are made ready for them. backbone: None for colours alone."""

    name: str
    backbone: nn.Module | None
    prepare: Preparation


def batches(part: Part, prepare: Preparation, size: int) -> Iterator[Tensor]:
    for first in range(0, len(part), size):
        images = part.read(range(first, min(first + size, len(part))))
        yield prepare(images).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def features(backbone: nn.Module, part: Part, prepare: Preparation, device: torch.device, size: int = 64) -> np.ndarray:
    """Features float32 [N, D]. Raises ConfigError for NaN or infinity, naming the first such image."""
    backbone = backbone.eval().to(device).to(memory_format=torch.channels_last)
    found = [backbone(images.to(device)).float().cpu().numpy() for images in batches(part, prepare, size)]
    features_ND = np.concatenate(found)
    bad = np.flatnonzero(~np.isfinite(features_ND).all(1))
    if len(bad):
        raise ConfigError(
            f"{part.names[bad[0]]}: the backbone gives NaN or infinity for it and {len(bad) - 1} more images; are the "
            "weights sound, and the images in the range that the card says?"
        )
    return features_ND


@torch.no_grad()
def calibrate(backbone: nn.Module, part: Part, prepare: Preparation, device: torch.device, count: int = 512) -> None:
    """Statistics of batch norms from images, for weights that have seen none: a cumulative mean over ``count``."""
    norms = [module for module in backbone.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    some = part.some(np.linspace(0, len(part) - 1, min(count, len(part))).astype(np.int64))
    backbone.to(device).train()
    for images in batches(some, prepare, 64) if norms else ():
        if len(images) > 1:
            backbone(images.to(device))
    for norm, momentum in zip(norms, momenta, strict=True):  # who trains these weights on follows them as others'
        norm.momentum = momentum
    backbone.eval()


def colours(part: Part, bands: tuple[int, ...]) -> np.ndarray:
    """Mean, deviation and percentiles of each band, float32 [N, 7 * C], of pixels with data: what needs no backbone."""
    found = []
    for n, name in enumerate(part.names):
        image = part.read([n])[0][..., list(bands)]
        pixels = np.ma.getdata(image)[~without_data(image)].astype(np.float32)
        if not len(pixels):
            raise ConfigError(f"{name}: no pixel has data in bands {', '.join(str(b + 1) for b in bands)}; take it out")
        parts = (pixels.mean(0)[None], pixels.std(0)[None], np.percentile(pixels, PERCENTILES, axis=0))
        found.append(np.concatenate(parts).ravel())
    return np.array(found, np.float32)
