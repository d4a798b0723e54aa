"""Forward passes of folded ResNets: convolution, bias, residual sum and ReLU in one kernel where the library has one.

cuDNN has it on CUDA, oneDNN on a CPU. What the fused call cannot take runs as separate operations with the same result.
"""

from typing import Any

import torch
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn
from torch.nn import functional as F

from geokr.fused_resnet import deep_stem


def _arguments(conv: nn.Conv2d) -> tuple[Any, ...]:
    return conv.stride, conv.padding, conv.dilation, conv.groups


def conv_relu(conv: Any, x: Tensor) -> Tensor:
    """relu(conv(x))."""
    if x.is_cuda:
        return torch.cudnn_convolution_relu(x, conv.weight, conv.bias, *_arguments(conv))
    return F.relu_(conv(x))


def conv_add_relu(conv: Any, x: Tensor, residual: Tensor, bias: Tensor) -> Tensor:
    """relu(conv(x) + residual), with another bias than the convolution's own."""
    if x.is_cuda:
        return torch.cudnn_convolution_add_relu(x, conv.weight, residual, 1.0, bias, *_arguments(conv))
    return F.relu_(F.conv2d(x, conv.weight, bias, *_arguments(conv)).add_(residual))


def _stem(conv: Any, x: Tensor) -> Tensor:
    """max_pool(relu(conv(x))), windows of 3 x 3, stride 2, padding 1, without the map of winners that torch makes."""
    if isinstance(conv, nn.Sequential):  # folded norms between the convolutions are identities
        *first, conv = (layer for layer in conv if isinstance(layer, nn.Conv2d))
        for layer in first:
            x = conv_relu(layer, x)
    if not x.is_cuda or not x.is_contiguous(memory_format=torch.channels_last):
        return F.max_pool2d(conv_relu(conv, x), 3, 2, 1)
    from geokr import pool_kernels

    deep = deep_stem(conv, x)
    if deep is None:
        out = conv_relu(conv, x)
    else:
        out = torch.cudnn_convolution_relu(*deep, conv.bias, (1, 1), (0, 0), (1, 1), 1)
    out_NHWC = out.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
    return pool_kernels.pool(out_NHWC, None, winners=False)[0].permute(0, 3, 1, 2)


def _shortcut(block: Any, conv: nn.Conv2d, x: Tensor) -> tuple[Tensor, Tensor]:
    """The residual, and the bias of both: cuDNN would add a projection's bias in a pass of its own."""
    if block.downsample is None:
        return x, conv.bias  # type: ignore[return-value]
    *before, projection, _ = block.downsample
    for layer in before:
        x = layer(x)
    return F.conv2d(x, projection.weight, None, *_arguments(projection)), conv.bias + projection.bias


class FoldedBottleneck(Bottleneck):
    def forward(self: Any, x: Tensor) -> Tensor:
        out = conv_relu(self.conv2, conv_relu(self.conv1, x))
        return conv_add_relu(self.conv3, out, *_shortcut(self, self.conv3, x))


class FoldedBasicBlock(BasicBlock):
    def forward(self: Any, x: Tensor) -> Tensor:
        return conv_add_relu(self.conv2, conv_relu(self.conv1, x), *_shortcut(self, self.conv2, x))


class FoldedResNet(ResNet):
    def forward_features(self: Any, x: Tensor) -> Tensor:
        features = _stem(self.conv1, x)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            features = stage(features)
        return features


_FOLDED = {Bottleneck: FoldedBottleneck, BasicBlock: FoldedBasicBlock}


def specialise(backbone: Any) -> None:
    """Gives a ResNet all of whose norms are folded the fused calls, in place.

    Its blocks must be such as :func:`geokr.fused_resnet.can_fuse` accepts.
    """
    for stage in (backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4):
        for block in stage:
            block.__class__ = next(_FOLDED[base] for base in type(block).__mro__ if base in _FOLDED)
    backbone.__class__ = FoldedResNet
