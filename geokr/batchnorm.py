"""Batch norm over all processes, on any backend.

torch's own SyncBatchNorm runs on CUDA only. On a CPU the batch norm modules get another class in place, so that
parameters, buffers and the keys of a state dict stay what they were.

Statistics are combined from each process's mean, sum of squared deviations and count (Chan, Golub and LeVeque,
"Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979), which is sound where a sum of
squares cancels. All processes combine in rank order, in float64, so all get the same bits.
"""

from typing import Any

import torch
from timm.layers.norm_act import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm


def _wide(x: Tensor) -> Tensor:
    """At least float32: half precision is for convolutions, not for statistics."""
    return x if x.dtype == torch.float64 else x.float()


def _moments(x: Tensor) -> tuple[Tensor, Tensor, int]:
    """Mean and biased variance over all processes, [C], at least float32, and the count of values a channel.

    x: [N, C, ...], any floating-point type.
    """
    axes = [0, *range(2, x.ndim)]
    var, mean = torch.var_mean(_wide(x), axes, correction=0)
    count = x.numel() // x.shape[1]
    local = torch.cat([mean.double(), var.double() * count, mean.new_tensor([count], dtype=torch.float64)])
    gathered = [torch.empty_like(local) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, local)
    channels = x.shape[1]
    parts = torch.stack(gathered)
    means, squares, counts = parts[:, :channels], parts[:, channels:-1], parts[:, -1:]
    total = counts.sum()
    mean64 = (means * counts).sum(0) / total
    squares64 = squares.sum(0) + (counts * (means - mean64) ** 2).sum(0)
    return mean64.to(mean.dtype), (squares64 / total).to(mean.dtype), int(total.item())


def _per_channel(values_C: Tensor, like: Tensor) -> Tensor:
    return values_C.view(1, -1, *[1] * (like.ndim - 2))


class _SyncedNorm(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) * weight + bias, where mean and var are functions of every process's x.

    weight and bias have gradients of their own: left to autograd, those of an image of 1 x 1 pixels are views of the
    gradient of the output, and micro-batches add up in memory that several parameters share.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_C: Tensor | None, bias_C: Tensor | None, mean_C: Tensor, rstd_C: Tensor, count: int
    ) -> Tensor:
        normalised = (_wide(x) - _per_channel(mean_C, x)) * _per_channel(rstd_C, x)
        ctx.save_for_backward(normalised, weight_C, rstd_C)
        ctx.count, ctx.dtype = count, x.dtype
        if weight_C is None or bias_C is None:
            return normalised.to(x.dtype)
        return (normalised * _per_channel(weight_C, x) + _per_channel(bias_C, x)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """dx = weight rstd (g - mean(g) - normalised mean(g normalised)), both means over all processes."""
        normalised, weight_C, rstd_C = ctx.saved_tensors
        grad = _wide(grads[0])
        axes = [0, *range(2, grad.ndim)]
        dbias_C, dweight_C = grad.sum(axes), (grad * normalised).sum(axes)
        sums = torch.stack([dbias_C, dweight_C])
        dist.all_reduce(sums)
        mean_grad, mean_dot = (_per_channel(values, grad) for values in sums / ctx.count)
        scale_C = rstd_C if weight_C is None else rstd_C * weight_C
        dx = ((grad - mean_grad - normalised * mean_dot) * _per_channel(scale_C, grad)).to(ctx.dtype)
        affine = (None, None) if weight_C is None else (dweight_C, dbias_C)
        return dx, *affine, None, None, None


class SyncedMixin:
    """Replaces the forward pass of a batch norm in training mode; in eval mode the class's own runs."""

    @torch.compiler.disable
    def _synced(self: Any, x: Tensor) -> Tensor:
        mean, var, count = _moments(x.detach())
        if self.track_running_stats:
            self.num_batches_tracked.add_(1)
            momentum = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
            self.running_var.lerp_((var * (count / max(1, count - 1))).to(self.running_var.dtype), momentum)
        return _SyncedNorm.apply(x, self.weight, self.bias, mean, torch.rsqrt(var + self.eps), count)

    def forward(self: Any, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)  # type: ignore[misc]
        x = self._synced(x)
        # timm's batch norm carries what follows it
        return self.act(self.drop(x)) if self._carries_activation else x


_CLASSES: dict[type, type] = {}


def _synced_class(original: type) -> type:
    if original not in _CLASSES:
        _CLASSES[original] = type(
            f"Synced{original.__name__}",
            (SyncedMixin, original),
            {"_carries_activation": issubclass(original, BatchNormAct2d)},
        )
    return _CLASSES[original]


def synchronize_batchnorm(model: nn.Module, device_type: str) -> nn.Module:
    """The model with every batch norm taking its statistics over all processes.

    On CUDA torch's SyncBatchNorm takes the modules' places; elsewhere they change their class. Do this before
    an optimizer, a teacher or a wrapper holds the model. A process group must exist.
    """
    if device_type == "cuda":
        return convert_sync_batchnorm(model)
    for module in model.modules():
        if isinstance(module, _BatchNorm) and not isinstance(module, SyncedMixin):
            module.__class__ = _synced_class(type(module))
    return model
