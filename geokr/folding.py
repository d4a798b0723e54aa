"""The teacher as an inference network: each batch norm folded into the convolution before it.

In eval mode a batch norm is a factor and an offset for each channel, so it can be multiplied into the weights once
instead of being applied to every pixel. The teacher itself stays what it is, in float32; its folded form is a copy in
the precision of the forward pass, filled anew from the teacher whenever that has moved:

    weight' = weight * gamma / sqrt(var + eps)        bias' = beta + (bias - mean) * gamma / sqrt(var + eps)

Which norm follows which convolution is found by watching one forward pass, and the result is compared with the
teacher's own before it is used.
"""

# pyright: reportPrivateImportUsage=false
# torch exports its multi-tensor operations under private names; its own optimizers use them so.

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from geokr import folded_resnet
from geokr.fused_resnet import can_fuse

# Relative distance of folded and plain logits that rounding to half precision can explain; a norm folded into the wrong
# convolution moves them by their own size.
TOLERANCE = 0.05


class FoldError(ValueError):
    """A teacher whose norms cannot all be folded."""


@dataclass(frozen=True, slots=True)
class _Pair:
    """A convolution and the norm behind it in the teacher, and the copy's convolution that stands for both."""

    conv: Any  # nn.Conv2d
    norm: Any  # a batch norm
    folded: Any  # nn.Conv2d


def find_pairs(model: nn.Module, images_NCHW: Tensor) -> list[tuple[str, str]]:
    """Names (convolution, norm) of each norm whose input is the output of a convolution that nothing else reads in.

    Watches a forward pass; a module that runs twice, or a norm without running statistics, makes no pair.
    """
    seen: dict[int, tuple[str, Tensor]] = {}  # the outputs are kept, so that no id is used twice
    runs: dict[str, int] = {}
    pairs: dict[str, str] = {}
    handles = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            runs[name] = runs.get(name, 0) + 1
            if isinstance(module, nn.Conv2d):
                seen[id(output)] = (name, output)
            elif id(inputs[0]) in seen and module.track_running_stats:
                pairs[name] = seen[id(inputs[0])][0]

        return hook

    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, _BatchNorm)):
            handles.append(module.register_forward_hook(watch(name)))
    try:
        with torch.no_grad():
            model(images_NCHW)
    finally:
        for handle in handles:
            handle.remove()
    norms: dict[str, list[str]] = {}
    for norm, conv in pairs.items():
        norms.setdefault(conv, []).append(norm)
    return [(conv, own[0]) for conv, own in norms.items() if len(own) == 1 and runs[conv] == runs[own[0]] == 1]


def without(norm: Any) -> nn.Module:
    """What stays of a folded norm: nothing, or the activation that timm's norm carries, synchronised or not."""
    kept: list[Any] = [getattr(norm, name) for name in ("drop", "act") if hasattr(norm, name)]
    return nn.Sequential(*kept) if kept else nn.Identity()


class FoldedTeacher(nn.Module):
    """The folded copy of a teacher in eval mode; called like it: images [N, C, H, W], and how their colours
    were changed where its head is told, to logits float32 [N, K].

    teacher: backbone and head. dtype: of the backbone's weights and activations; the head stays float32.
    Raises FoldError if it has norms that cannot be folded.
    """

    def __init__(self, teacher: Any, images_NCHW: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        pairs = find_pairs(teacher, images_NCHW)
        self._check_norms(teacher, len(pairs))
        self.model = copy.deepcopy(teacher).eval().requires_grad_(False)
        self._pairs: list[_Pair] = []
        parts: dict[str, Any] = dict(teacher.named_modules())
        for conv, norm in pairs:
            folded: Any = self.model.get_submodule(conv)
            channels = folded.out_channels
            folded.bias = nn.Parameter(folded.weight.new_zeros(channels), requires_grad=False)
            self._pairs.append(_Pair(parts[conv], parts[norm], folded))
            self.model.set_submodule(norm, without(self.model.get_submodule(norm)))
        if can_fuse(teacher.backbone):
            folded_resnet.specialise(self.model.backbone)
        self.model.backbone.to(dtype)
        in_pairs = {id(p) for pair in self._pairs for module in (pair.conv, pair.norm) for p in module.parameters()}
        in_pairs |= {id(b) for pair in self._pairs for b in pair.norm.buffers()}
        own = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        theirs = dict(teacher.named_parameters()) | dict(teacher.named_buffers())
        rest = [(own[name], tensor) for name, tensor in theirs.items() if id(tensor) not in in_pairs]
        self._own, self._theirs = [pair[0].detach() for pair in rest], [pair[1].detach() for pair in rest]
        self._dtype, self._teacher = dtype, [teacher]  # in a list: its weights are not this module's
        self.refold()

    @staticmethod
    def _check_norms(teacher: nn.Module, pairs: int) -> None:
        norms = sum(isinstance(module, _BatchNorm) for module in teacher.modules())
        if pairs < norms:
            raise FoldError(f"{norms - pairs} of {norms} batch norms do not follow a convolution of their own")
        others = {type(m).__name__ for m in teacher.modules() if isinstance(m, (nn.LayerNorm, nn.GroupNorm))}
        if others or not norms:
            raise FoldError(f"it has {' and '.join(sorted(others)) or 'no batch norm'}, which cannot be folded")

    @torch.no_grad()
    def check(self, images_NCHW: Tensor) -> None:
        """Raises FoldError if the logits are not the teacher's."""
        plain_NK, folded_NK = self._teacher[0](images_NCHW.float()), self(images_NCHW)
        distance = float((folded_NK - plain_NK).norm() / plain_NK.norm())
        if not distance < TOLERANCE:
            raise FoldError(f"folded it gives logits that are off by {distance:.2g} of their size")

    @property
    def pairs(self) -> int:
        """Norms that are folded."""
        return len(self._pairs)

    @torch.no_grad()
    def refold(self) -> None:
        """Takes the teacher's weights and statistics over, folded in float32 and rounded once."""
        if self._pairs:
            self._fold()
        if self._own:
            torch._foreach_copy_(self._own, self._theirs)

    def _fold(self) -> None:
        norms = [pair.norm for pair in self._pairs]
        scales = list(torch._foreach_add([n.running_var for n in norms], [n.eps for n in norms]))
        torch._foreach_sqrt_(scales)
        torch._foreach_reciprocal_(scales)
        torch._foreach_mul_(scales, [n.weight.detach() for n in norms])
        offsets = list(torch._foreach_mul([n.running_mean for n in norms], scales))
        torch._foreach_neg_(offsets)
        torch._foreach_add_(offsets, [n.bias.detach() for n in norms])
        for pair, scale, offset in zip(self._pairs, scales, offsets, strict=True):
            torch.mul(pair.conv.weight, scale.view(-1, 1, 1, 1), out=pair.folded.weight.data)
            if pair.conv.bias is not None:
                offset.addcmul_(pair.conv.bias, scale)
        torch._foreach_copy_([pair.folded.bias.data for pair in self._pairs], offsets)

    def forward(self, images_NCHW: Tensor, changes_NQ: Tensor | None = None) -> Tensor:
        with torch.autocast(images_NCHW.device.type, enabled=False):
            return self.model.classify(self.model.backbone(images_NCHW.to(self._dtype)), changes_NQ)
