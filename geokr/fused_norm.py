"""Batch norm, residual sum and ReLU as one operation with its own backward pass, on :mod:`geokr.norm_kernels`.

A block's output goes two ways: into the next block's first convolution and past it as the residual. ``residual_norm``
therefore returns it twice, so that the two gradients reach the kernels apart and nothing adds them up in memory.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from geokr import norm_kernels, pool_kernels


def _matrix(x_NCHW: Tensor) -> Tensor:
    """The channels-last pixels as rows [M, C], without a copy."""
    return x_NCHW.permute(0, 2, 3, 1).reshape(-1, x_NCHW.shape[1])


def _channels_last(x_NCHW: Tensor) -> Tensor:
    return x_NCHW.contiguous(memory_format=torch.channels_last)


class _FusedNorm(torch.autograd.Function):
    """z = relu(bn(x) + residual), given once, or twice with a residual."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor | None,
        running: tuple[Tensor, Tensor, Tensor] | None,
        momentum: float,
        eps: float,
        relu: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        x = _channels_last(x)
        x_MC = _matrix(x)
        table = norm_kernels.moments(x_MC, weight, bias, running, momentum, eps)
        z = torch.empty_like(x)
        bits, residual_MC = None, None
        if residual is not None:
            residual_MC = _matrix(_channels_last(residual.to(x.dtype)))
            bits = torch.empty((x_MC.shape[0], x_MC.shape[1] // 8), dtype=torch.uint8, device=x.device)
        norm_kernels.apply(x_MC, table, _matrix(z), residual_MC, bits, relu=relu)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, table, bits)
        ctx.relu, ctx.residual = relu, residual is not None
        return (z, z.view_as(z)) if residual is not None else z

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, table, bits = ctx.saved_tensors
        given = [_matrix(_channels_last(grad.to(x.dtype))) for grad in grads if grad is not None]
        if not given:
            return (None,) * 8
        x_MC = _matrix(x)
        dx = torch.empty_like(x)
        g = torch.empty_like(x) if ctx.residual else None
        g_MC = None if g is None else _matrix(g)
        second = given[1] if len(given) > 1 else None
        dweight, dbias, means = norm_kernels.reduce(given[0], second, x_MC, table, bits, g_MC, relu=ctx.relu)
        masked = ctx.relu and g_MC is None
        norm_kernels.grad(given[0] if g_MC is None else g_MC, x_MC, table, means, _matrix(dx), masked=masked)
        return dx, dweight, dbias, g, None, None, None, None


class _FusedStem(torch.autograd.Function):
    """max_pool(relu(bn(x))), windows of 3 x 3, stride 2, padding 1."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running: tuple[Tensor, Tensor, Tensor] | None,
        momentum: float,
        eps: float,
    ) -> Tensor:
        x = _channels_last(x)
        table = norm_kernels.moments(_matrix(x), weight, bias, running, momentum, eps)
        z_NHWC, winner = pool_kernels.pool(x.permute(0, 2, 3, 1), table, winners=True)
        ctx.save_for_backward(x, table, winner)
        return z_NHWC.permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, table, winner = ctx.saved_tensors
        dz_NHWC = _channels_last(grads[0].to(x.dtype)).permute(0, 2, 3, 1)
        dx_NHWC, dweight, dbias = pool_kernels.pool_backward(dz_NHWC, winner, x.permute(0, 2, 3, 1), table)
        return dx_NHWC.permute(0, 3, 1, 2), dweight, dbias, None, None, None


def _running(norm: _BatchNorm) -> tuple[Tensor, Tensor, Tensor] | None:
    mean, var, batches = norm.running_mean, norm.running_var, norm.num_batches_tracked
    return None if mean is None or var is None or batches is None else (mean, var, batches)


def norm_relu(norm: _BatchNorm, x: Tensor, *, relu: bool = True) -> Tensor:
    """relu(norm(x)) of x [N, C, H, W], batch statistics taken and running ones moved as in training mode."""
    return _FusedNorm.apply(x, norm.weight, norm.bias, None, _running(norm), norm.momentum, norm.eps, relu)


def norm_relu_pool(norm: _BatchNorm, x: Tensor) -> Tensor:
    """max_pool(relu(norm(x))) with windows of 3 x 3, stride 2, padding 1; else as :func:`norm_relu`."""
    return _FusedStem.apply(x, norm.weight, norm.bias, _running(norm), norm.momentum, norm.eps)


def residual_norm(norm: _BatchNorm, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """relu(norm(x) + residual), twice: for the next convolution, and for the next residual sum."""
    return _FusedNorm.apply(x, norm.weight, norm.bias, residual, _running(norm), norm.momentum, norm.eps, True)


def fusable(norm: nn.Module) -> bool:
    """Whether the kernels do what this module does in training mode."""
    return (
        type(norm) is nn.BatchNorm2d
        and norm.affine
        and norm.track_running_stats
        and norm.momentum is not None
        and norm.num_features % 8 == 0
    )
