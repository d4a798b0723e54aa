"""Batch norms of a finished backbone folded into the convolutions before them: fewer operations, the same features.

For weights that will not be trained any further. The folded keys are no longer timm's: a convolution has a bias and its
norm is gone, so :func:`geokr.load_backbone` loads them, by the pairs that the card lists. See geokr.folding for the
teacher, which is folded anew at every step.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from geokr import folding
from geokr.config import ConfigError

Pair = tuple[str, str]  # names of a convolution and of the norm behind it
TOLERANCE = 1e-4  # of the features' size; folding is done in float64 and rounded once


def fold(backbone: nn.Module, images_NCHW: Tensor, name: str) -> tuple[nn.Module, list[Pair]]:
    """A folded copy of a backbone in eval mode, and what was folded.

    images_NCHW: as the backbone takes them; a forward pass shows which norm follows which convolution. name: the
    backbone's. Raises ConfigError where there is no batch norm, one that does not follow a convolution of its own, or
    features that are not the backbone's.
    """
    backbone = backbone.eval()
    norms = sum(isinstance(module, _BatchNorm) for module in backbone.modules())
    pairs = folding.find_pairs(backbone, images_NCHW)
    if not norms:
        raise ConfigError(f"--fold-bn: {name} has no batch norm to fold; leave the option out")
    if len(pairs) < norms:
        raise ConfigError(
            f"--fold-bn: {norms - len(pairs)} of {norms} batch norms of {name} do not follow a convolution of their "
            "own; leave the option out"
        )
    folded = prepare(copy.deepcopy(backbone), pairs)
    for conv, norm in pairs:
        _fold_into(folded.get_submodule(conv), backbone.get_submodule(conv), backbone.get_submodule(norm))
    with torch.no_grad():
        plain_ND, folded_ND = backbone(images_NCHW), folded(images_NCHW)
    distance = float((folded_ND - plain_ND).norm() / plain_ND.norm())
    if not distance < TOLERANCE:
        raise ConfigError(f"--fold-bn: {name} gives features that are off by {distance:.2g} of their size when folded")
    return folded, pairs


def prepare(backbone: nn.Module, pairs: Sequence[Pair]) -> nn.Module:
    """The same backbone with places for folded weights, which are still to be filled. Raises ConfigError for names
    that it does not have."""
    try:
        for conv, norm in pairs:
            module: Any = backbone.get_submodule(conv)
            if module.bias is None:
                module.bias = nn.Parameter(module.weight.new_zeros(module.out_channels))
            backbone.set_submodule(norm, folding.without(backbone.get_submodule(norm)))
    except AttributeError as error:
        raise ConfigError(f"the card lists a folded norm that the backbone does not have: {error}") from error
    return backbone


@torch.no_grad()
def _fold_into(folded: Any, conv: Any, norm: Any) -> None:
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    offset = norm.bias.double() - norm.running_mean.double() * scale
    if conv.bias is not None:
        offset += conv.bias.double() * scale
    folded.weight.copy_(conv.weight.double() * scale.view(-1, 1, 1, 1))
    folded.bias.copy_(offset)
