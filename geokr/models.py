"""Student and teacher: any timm backbone with any number of bands, and a linear head over the classes.

N images, C bands, H x W pixels, K classes, D features, Q numbers that say how an image's colours were changed.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.models.vgg import VGG
from torch import Tensor, nn

from geokr.config import ConfigError, suggestion


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draws inside the block come from this seed; the generators outside it go on as before."""
    with torch.random.fork_rng():
        torch.manual_seed(seed % 2**63)
        yield


@dataclass(frozen=True, slots=True)
class BackboneSpec:
    """What it takes to build a backbone: timm's name, bands, image side, stochastic depth."""

    name: str
    bands: int
    image_size: int
    drop_path: float = 0.0

    def arguments(self) -> dict[str, Any]:
        """Arguments of timm.create_model, for features without a classifier."""
        arguments: dict[str, Any] = {"num_classes": 0, "in_chans": self.bands}
        config = timm.get_pretrained_cfg(self.name)
        if config is not None and config.fixed_input_size:
            arguments["img_size"] = self.image_size
        return arguments


class ColourCondition(nn.Module):
    """Features [N, D] scaled and moved, each by a linear function of how the image's colours were changed [N, Q].

    Feature-wise linear modulation (Perez et al., "FiLM: Visual Reasoning with a General Conditioning Layer", AAAI 2018)
    without a constant part: where nothing was changed, and at the start, it does nothing.
    """

    def __init__(self, changes: int, features: int) -> None:
        super().__init__()
        self.modulate = nn.Linear(changes, 2 * features, bias=False)
        nn.init.zeros_(self.modulate.weight)

    def forward(self, features_ND: Tensor, changes_NQ: Tensor) -> Tensor:
        scale_ND, offset_ND = self.modulate(changes_NQ).chunk(2, dim=1)
        return torch.addcmul(features_ND + offset_ND, features_ND, scale_ND)


class LandCoverModel(nn.Module):
    """Normalised images [N, C, H, W] to class logits [N, K], float32.

    changes: Q, with which the head is told how colours were changed (:class:`ColourCondition`); 0 for a head that is
    not. Without the numbers, as in validation, images are taken to be unchanged.

    The head runs in float32 under any autocast: its cost is nothing beside the backbone's, and logits rounded
    to 8 bits would round the losses too.
    """

    def __init__(self, backbone: nn.Module, features: int, classes: int, changes: int = 0) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(features, classes)
        self.condition = ColourCondition(changes, features) if changes else None

    def forward(self, images_NCHW: Tensor, changes_NQ: Tensor | None = None) -> Tensor:
        return self.classify(self.backbone(images_NCHW), changes_NQ)

    def classify(self, features_ND: Tensor, changes_NQ: Tensor | None = None) -> Tensor:
        """Logits of pooled features."""
        with torch.autocast(features_ND.device.type, enabled=False):
            features_ND = features_ND.float()
            if self.condition is not None and changes_NQ is not None:
                features_ND = self.condition(features_ND, changes_NQ)
            return self.head(features_ND)


def check_backbone_name(name: str) -> None:
    """Raises ConfigError with the nearest name if timm has no such architecture."""
    if not timm.is_model(name):
        raise ConfigError(
            f"model.backbone={name!r}: timm {timm.__version__} has no such architecture"
            f"{suggestion(name, timm.list_models())}; timm.list_models() lists them"
        )


def build_backbone(spec: BackboneSpec, *, pretrained: bool = False) -> nn.Module:
    """The backbone that maps images [N, C, H, W] to pooled features [N, D], in training mode.

    A VGG keeps its convolutions and global average pooling, without the two fully connected layers.
    ``pretrained`` takes timm's weights, the first convolution adapted by timm to other band counts.
    Raises ConfigError for an unknown name, arguments the architecture does not take, or weights that
    cannot be had.
    """
    check_backbone_name(spec.name)
    depth: dict[str, Any] = {"drop_path_rate": spec.drop_path} if spec.drop_path else {}
    try:
        backbone = timm.create_model(spec.name, pretrained=pretrained, **spec.arguments(), **depth)
    except Exception as error:
        raise _build_error(spec, pretrained, error) from error
    if isinstance(backbone, VGG):
        backbone.pre_logits = nn.Identity()
    return backbone


def _build_error(spec: BackboneSpec, pretrained: bool, error: Exception) -> ConfigError:
    reason = f"{type(error).__name__}: {(str(error).splitlines() or ['no reason given'])[0]}"
    if pretrained:
        return ConfigError(
            f"model.init=imagenet: timm's weights for {spec.name!r} cannot be had ({reason}). Without a network, "
            "fetch them elsewhere and give their path as model.init, or use model.init=random"
        )
    depth = "; model.drop_path is not for every architecture" if spec.drop_path else ""
    return ConfigError(
        f"model.backbone={spec.name!r}: timm cannot build it for {spec.bands} bands at {spec.image_size} px "
        f"({reason}){depth}"
    )


def feature_count(backbone: nn.Module, spec: BackboneSpec) -> int:
    """Features D the backbone gives, found by a dry run. Raises ConfigError if an image of that size does not fit."""
    was_training = backbone.training
    backbone.eval()
    try:
        with torch.no_grad():
            shape = tuple(backbone(torch.zeros(1, spec.bands, spec.image_size, spec.image_size)).shape)
    except Exception as error:
        raise ConfigError(
            f"model.backbone={spec.name!r} does not take images of {spec.image_size} px "
            f"({type(error).__name__}: {error}); choose another data.image_size or backbone"
        ) from error
    finally:
        backbone.train(was_training)
    if len(shape) != 2:
        raise ConfigError(
            f"model.backbone={spec.name!r} gives features of shape {shape[1:]} an image, not a vector; "
            "choose an architecture with pooling"
        )
    return shape[1]


def build_model(
    spec: BackboneSpec, classes: int, seed: int, *, pretrained: bool = False, changes: int = 0
) -> LandCoverModel:
    """Backbone and head, their random weights a function of the seed alone. See :func:`build_backbone`."""
    with seeded(seed):
        backbone = build_backbone(spec, pretrained=pretrained)
        return LandCoverModel(backbone, feature_count(backbone, spec), classes, changes)


class Normalise:
    """Images as the loader gives them to what the model takes, on their device.

    uint8 [N, C, H, W] becomes (x - mean) / std, float32; floating-point images come normalised already.
    mean, std: per band, in grey levels. half: the type to give instead of float32, in one pass over the pixels; for
    channels-last images on CUDA where Triton is. layout: memory format of what it gives; as they come if none is said,
    which is channels-last of training's loaders.
    """

    def __init__(
        self,
        mean: list[float],
        std: list[float],
        device: torch.device,
        half: torch.dtype | None = None,
        layout: torch.memory_format = torch.preserve_format,
    ) -> None:
        self._mean = torch.tensor(mean, dtype=torch.float32, device=device).view(1, -1, 1, 1)
        self._scale = 1.0 / torch.tensor(std, dtype=torch.float32, device=device).view(1, -1, 1, 1)
        self._half, self._layout = half, layout

    def __call__(self, images_NCHW: Tensor) -> Tensor:
        return self._normalised(images_NCHW).to(memory_format=self._layout)

    def _normalised(self, images_NCHW: Tensor) -> Tensor:
        if images_NCHW.dtype != torch.uint8:
            return images_NCHW.to(self._half or torch.float32)
        if self._half is not None:
            return self._in_one_pass(images_NCHW, self._half)
        return images_NCHW.float().sub_(self._mean).mul_(self._scale)

    def _in_one_pass(self, images_NCHW: Tensor, dtype: torch.dtype) -> Tensor:
        from geokr import pool_kernels

        images_NHWC = images_NCHW.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
        return pool_kernels.normalise(images_NHWC, self._mean, self._scale, dtype).permute(0, 3, 1, 2)
