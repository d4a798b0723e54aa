"""timm's ResNets with batch norm, residual sum and ReLU fused in training: the same modules, keys and results.

Blocks change their class in place, so parameters, buffers and state dicts stay what they were; in eval mode timm's own
forward pass runs. What has squeeze-and-excitation, anti-aliasing, stochastic depth or another activation or norm is
left as it is.
"""

from typing import Any

import torch
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn
from torch.nn import functional as F

from geokr.fused_norm import fusable, norm_relu, norm_relu_pool, residual_norm


class Twice:
    """A block's output for its two readers: ``main`` for convolutions, ``skip`` for the residual sum."""

    __slots__ = ("main", "skip")

    def __init__(self, main: Tensor, skip: Tensor) -> None:
        self.main, self.skip = main, skip


def _readers(x: Tensor | Twice) -> tuple[Tensor, Tensor]:
    return (x.main, x.skip) if isinstance(x, Twice) else (x, x)


def _shortcut(block: Any, skip: Tensor) -> Tensor:
    """The residual: the input, or a strided projection of it with a norm of its own."""
    if block.downsample is None:
        return skip
    *before, norm = block.downsample
    for layer in before:
        skip = layer(skip)
    return norm_relu(norm, skip, relu=False)


class FusedBottleneck(Bottleneck):
    def forward(self: Any, x: Any) -> Any:
        if not self.training:
            return super().forward(x)
        main, skip = _readers(x)
        main = norm_relu(self.bn1, self.conv1(main))
        main = norm_relu(self.bn2, self.conv2(main))
        return Twice(*residual_norm(self.bn3, self.conv3(main), _shortcut(self, skip)))


class FusedBasicBlock(BasicBlock):
    def forward(self: Any, x: Any) -> Any:
        if not self.training:
            return super().forward(x)
        main, skip = _readers(x)
        main = norm_relu(self.bn1, self.conv1(main))
        return Twice(*residual_norm(self.bn2, self.conv2(main), _shortcut(self, skip)))


def stem_weight(weight_OC77: Tensor) -> Tensor:
    """Weights [O, C, 7, 7] of stride 2 as [O, D, 4, 4] of stride 1 over :func:`geokr.pool_kernels.space_to_depth`."""
    outputs, C = weight_OC77.shape[:2]
    even = F.pad(weight_OC77, (1, 0, 1, 0)).view(outputs, C, 4, 2, 4, 2)
    deep = even.permute(0, 3, 5, 1, 2, 4).reshape(outputs, 4 * C, 4, 4)
    return F.pad(deep, (0, 0, 0, 0, 0, -4 * C % 8)).contiguous(memory_format=torch.channels_last)


def deep_stem(conv: nn.Conv2d, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """(images, weights) of the same convolution in a form that tensor cores like; None where there is none.

    With three channels and stride 2 it runs at a tenth of their speed: cuDNN pads the channels to eight.
    """
    shape = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    if shape != ((7, 7), (2, 2), (3, 3), (1, 1), 1, "zeros") or x.requires_grad or x.shape[2] % 2 or x.shape[3] % 2:
        return None
    from geokr import pool_kernels

    x_NHWC = x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
    return pool_kernels.space_to_depth(x_NHWC).permute(0, 3, 1, 2), stem_weight(conv.weight)


def _stem(stem: Any, x: Tensor) -> Tensor:
    """The stem up to its last convolution: a single one, or several with norm and ReLU between them."""
    if isinstance(stem, nn.Sequential):
        convs: Any = stem[::3]
        norms: Any = stem[1::3]
        for conv, norm in zip(convs[:-1], norms, strict=True):
            x = norm_relu(norm, conv(x))
        return convs[-1](x)
    deep = deep_stem(stem, x)
    return stem(x) if deep is None else F.conv2d(*deep)


class FusedResNet(ResNet):
    def forward_features(self: Any, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward_features(x)
        features: Any = norm_relu_pool(self.bn1, _stem(self.conv1, x))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                features = block(features)
        return features.main


FUSED = {Bottleneck: FusedBottleneck, BasicBlock: FusedBasicBlock}


def _plain(module: Any) -> bool:
    return module is None or isinstance(module, nn.Identity)


def _fusable_block(block: Any) -> bool:
    if type(block) not in (*FUSED, *FUSED.values()):  # others lack what is asked below
        return False
    acts = [getattr(block, name, None) for name in ("act1", "act2", "act3")]
    norms = [getattr(block, name, None) for name in ("bn1", "bn2", "bn3")]
    extras = [block.se, block.drop_block if hasattr(block, "drop_block") else None, block.aa, block.drop_path]
    shortcut_norm = [] if block.downsample is None else [list(block.downsample)[-1]]
    return (
        all(type(act) is nn.ReLU for act in acts if act is not None)
        and all(fusable(norm) for norm in [*norms, *shortcut_norm] if norm is not None)
        and all(_plain(extra) for extra in extras)
    )


def _pools_by_two(pool: Any) -> bool:
    shape = (pool.kernel_size, pool.stride, pool.padding, pool.dilation) if type(pool) is nn.MaxPool2d else None
    return shape == (3, 2, 1, 1) and not pool.ceil_mode


def can_fuse(backbone: Any) -> bool:
    """Whether every batch norm of this backbone is in a place that :func:`fuse` knows."""
    return (
        type(backbone) in (ResNet, FusedResNet)
        and not backbone.grad_checkpointing
        and _fusable_stem(backbone.conv1)
        and fusable(backbone.bn1)
        and type(backbone.act1) is nn.ReLU
        and _pools_by_two(backbone.maxpool)
        and all(_fusable_block(block) for stage in _stages(backbone) for block in stage)
    )


def _fusable_stem(stem: Any) -> bool:
    if type(stem) is not nn.Sequential:
        return type(stem) is nn.Conv2d
    convs, norms, acts = stem[::3], stem[1::3], stem[2::3]
    return (
        all(type(conv) is nn.Conv2d for conv in convs)
        and all(fusable(norm) for norm in norms)
        and all(type(act) is nn.ReLU for act in acts)
        and len(convs) == len(norms) + 1 == len(acts) + 1
    )


def _stages(backbone: Any) -> list[Any]:
    return [backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4]


def fuse(backbone: Any) -> nn.Module:
    """The backbone with fused kernels in training mode, changed in place. See :func:`can_fuse`."""
    for stage in _stages(backbone):
        for block in stage:
            block.__class__ = FUSED.get(type(block), type(block))
    backbone.__class__ = FusedResNet
    return backbone
