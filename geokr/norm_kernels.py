"""Triton kernels of batch norm in training mode with what follows it: residual sum and ReLU, forward and backward.

ResNets are bound by memory traffic, and most of it is around batch norm. Here a batch norm reads its input twice and
writes its output once, the residual sum and the ReLU ride along, and the backward pass takes the two gradients that
reach a block's output without adding them up in memory first. Which outputs were positive is kept as bits.

    moments   partial mean and squared deviations of x      1 read
    apply     z = relu(scale x + shift [+ residual])        1 read [+ 1], 1 write [+ bits]
    reduce    partial sums of g and g (x - mean)            2 reads [+ 1] [, 1 write of g]
    grad      dx = scale (g - c1 - (x - mean) c2)           2 reads, 1 write

Tensors are seen as matrices [M, C]: M = N H W pixels, channels-last, half or float; all arithmetic is float32.
Reductions go over the pixels backwards and the rest forwards: what the kernel before touched last is still cached.
Partial results are combined in a fixed order, so a run repeats bit for bit. Variance is taken about a value of the
chunk itself and chunks are combined by Chan, Golub and LeVeque's formula (1979), so nothing cancels where the mean is
far from zero.

Under TRITON_INTERPRET=1 the kernels run on the CPU; so the tests check them without a GPU.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# Triton gives its kernels arguments that Python's types do not know of.

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows of the affine table [4, C] that the forward pass leaves for the backward pass.
MEAN, RSTD, SCALE, SHIFT = range(4)
_FINISH_P, _FINISH_C = 128, 8  # lines of partial results and channels that are combined at once


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a kernel goes over [M, C]: programs of ``warps`` warps, about ``programs`` in all, a tile at a time."""

    block_m: int
    block_c: int
    warps: int
    programs: int


# Of the tilings tried on an H200 those with which a whole step was fastest: sixteen elements a thread, in runs of 16
# bytes of half precision. Reductions take fewer programs, because each leaves a line of partial results.
REDUCING = Tiling(32, 64, 4, 1056)
POINTWISE = Tiling(32, 128, 8, 4224)


@dataclass(frozen=True, slots=True)
class Cut:
    """How [M, C] is cut: ``chunks`` of ``rows`` rows each, ``columns`` blocks of ``block_c`` channels."""

    rows: int
    chunks: int
    columns: int
    block_m: int
    block_c: int
    warps: int

    @property
    def grid(self) -> tuple[int, int]:
        """Columns first: programs that run at once read whole rows."""
        return self.columns, self.chunks

    @property
    def how(self) -> dict[str, int]:
        return {"BLOCK_M": self.block_m, "BLOCK_C": self.block_c, "num_warps": self.warps}


def cut(M: int, C: int, tiling: Tiling) -> Cut:
    """Chunks of whole tiles."""
    block_c = min(tiling.block_c, triton.next_power_of_2(C))
    columns = triton.cdiv(C, block_c)
    rows = tiling.block_m * triton.cdiv(triton.cdiv(M, tiling.block_m), max(1, tiling.programs // columns))
    return Cut(rows, triton.cdiv(M, rows), columns, tiling.block_m, block_c, tiling.warps)


@triton.jit
def positive_part(value):
    """max(value, 0), and NaN where it is NaN: tl.maximum would give 0, and a broken run would go on in silence."""
    return tl.where(value <= 0, 0.0, value)


@triton.jit
def _moments_kernel(x_ptr, part_ptr, M, C, rows, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    chunk = tl.num_programs(1) - 1 - tl.program_id(1)
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    here = cols < C
    start = chunk * rows
    stop = tl.minimum(start + rows, M)
    origin = tl.load(x_ptr + start.to(tl.int64) * C + cols, here, other=0.0).to(tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for first in range(start, stop, BLOCK_M):
        lines = first + tl.arange(0, BLOCK_M)
        inside = (lines < stop)[:, None] & here[None, :]
        at = lines.to(tl.int64)[:, None] * C + cols[None, :]
        x = tl.load(x_ptr + at, inside, other=0.0).to(tl.float32)
        off = tl.where(inside, x - origin[None, :], 0.0)
        sums += off
        squares += off * off
    count = (stop - start).to(tl.float32)
    total = tl.sum(sums, 0)
    m2 = tl.sum(squares, 0) - total * total / count
    place = part_ptr + chunk.to(tl.int64) * 2 * C + cols
    tl.store(place, origin + total / count, here)
    tl.store(place + C, positive_part(m2), here)


@triton.jit
def _finish_moments_kernel(
    part_ptr,
    weight_ptr,
    bias_ptr,
    running_mean_ptr,
    running_var_ptr,
    batches_ptr,
    table_ptr,
    M,
    C,
    rows,
    chunks,
    momentum,
    eps,
    TRACK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    here = cols < C
    origin = tl.load(part_ptr + cols, here, other=0.0)
    sums = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for first in range(0, chunks, BLOCK_P):
        chunk = first + tl.arange(0, BLOCK_P)
        inside = (chunk < chunks)[:, None] & here[None, :]
        place = part_ptr + chunk.to(tl.int64)[:, None] * 2 * C + cols[None, :]
        count = tl.maximum(tl.minimum(M - chunk * rows, rows), 0).to(tl.float32)
        off = tl.where(inside, tl.load(place, inside, other=0.0) - origin[None, :], 0.0)
        sums += count[:, None] * off
        squares += count[:, None] * off * off + tl.load(place + C, inside, other=0.0)
    total = tl.sum(sums, 0)
    size = M.to(tl.float32)
    mean = origin + total / size
    m2 = positive_part(tl.sum(squares, 0) - total * total / size)
    rstd = 1.0 / tl.sqrt(m2 / size + eps)
    scale = tl.load(weight_ptr + cols, here, other=0.0) * rstd
    tl.store(table_ptr + cols, mean, here)
    tl.store(table_ptr + C + cols, rstd, here)
    tl.store(table_ptr + 2 * C + cols, scale, here)
    tl.store(table_ptr + 3 * C + cols, tl.load(bias_ptr + cols, here, other=0.0) - mean * scale, here)
    if TRACK:
        old_mean = tl.load(running_mean_ptr + cols, here, other=0.0)
        old_var = tl.load(running_var_ptr + cols, here, other=0.0)
        var = m2 / tl.maximum(size - 1.0, 1.0)
        tl.store(running_mean_ptr + cols, old_mean + momentum * (mean - old_mean), here)
        tl.store(running_var_ptr + cols, old_var + momentum * (var - old_var), here)
        if tl.program_id(0) == 0:
            tl.store(batches_ptr, tl.load(batches_ptr) + 1)


@triton.jit
def _apply_kernel(
    x_ptr,
    residual_ptr,
    table_ptr,
    z_ptr,
    bits_ptr,
    M,
    C,
    rows,
    RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    here = cols < C
    scale = tl.load(table_ptr + 2 * C + cols, here, other=0.0)[None, :]
    shift = tl.load(table_ptr + 3 * C + cols, here, other=0.0)[None, :]
    start = tl.program_id(1) * rows
    for first in range(start, tl.minimum(start + rows, M), BLOCK_M):
        lines = first + tl.arange(0, BLOCK_M)
        inside = (lines < M)[:, None] & here[None, :]
        at = lines.to(tl.int64)[:, None] * C + cols[None, :]
        z = tl.load(x_ptr + at, inside, other=0.0).to(tl.float32) * scale + shift
        if RESIDUAL:
            z += tl.load(residual_ptr + at, inside, other=0.0).to(tl.float32)
        if RELU:
            if BITS:
                _store_bits(bits_ptr, z > 0, lines, tl.program_id(0), M, C, BLOCK_M, BLOCK_C)
            z = positive_part(z)
        tl.store(z_ptr + at, z.to(z_ptr.dtype.element_ty), inside)


@triton.jit
def _store_bits(bits_ptr, positive, lines, column, M, C, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """A tile of truth values, eight channels a byte, the first in the lowest bit."""
    bits = tl.reshape(positive.to(tl.int32), (BLOCK_M, BLOCK_C // 8, 8))
    packed = tl.sum(bits << tl.arange(0, 8)[None, None, :], 2).to(tl.uint8)
    cols = column * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8)
    inside = (lines < M)[:, None] & (cols < C // 8)[None, :]
    tl.store(bits_ptr + lines.to(tl.int64)[:, None] * (C // 8) + cols[None, :], packed, inside)


@triton.jit
def _load_bits(bits_ptr, lines, column, M, C, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    cols = column * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8)
    inside = (lines < M)[:, None] & (cols < C // 8)[None, :]
    packed = tl.load(bits_ptr + lines.to(tl.int64)[:, None] * (C // 8) + cols[None, :], inside, other=0).to(tl.int32)
    bits = (packed[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(bits, (BLOCK_M, BLOCK_C)) != 0


@triton.jit
def _reduce_kernel(
    dz_ptr,
    dz2_ptr,
    x_ptr,
    bits_ptr,
    table_ptr,
    part_ptr,
    g_ptr,
    M,
    C,
    rows,
    SECOND: tl.constexpr,
    RELU: tl.constexpr,
    BITS: tl.constexpr,
    STORE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    chunk = tl.num_programs(1) - 1 - tl.program_id(1)
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    here = cols < C
    mean = tl.load(table_ptr + cols, here, other=0.0)[None, :]
    scale = tl.load(table_ptr + 2 * C + cols, here, other=0.0)[None, :]
    shift = tl.load(table_ptr + 3 * C + cols, here, other=0.0)[None, :]
    sums = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    dots = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    start = chunk * rows
    for first in range(start, tl.minimum(start + rows, M), BLOCK_M):
        lines = first + tl.arange(0, BLOCK_M)
        inside = (lines < M)[:, None] & here[None, :]
        at = lines.to(tl.int64)[:, None] * C + cols[None, :]
        x = tl.load(x_ptr + at, inside, other=0.0).to(tl.float32)
        g = tl.load(dz_ptr + at, inside, other=0.0).to(tl.float32)
        if SECOND:
            g += tl.load(dz2_ptr + at, inside, other=0.0).to(tl.float32)
        if RELU:
            if BITS:
                g = tl.where(_load_bits(bits_ptr, lines, tl.program_id(0), M, C, BLOCK_M, BLOCK_C), g, 0.0)
            else:
                g = tl.where(x * scale + shift > 0, g, 0.0)
        if STORE:
            g = g.to(g_ptr.dtype.element_ty)  # sums are of what is stored
            tl.store(g_ptr + at, g, inside)
            g = g.to(tl.float32)
        sums += g
        dots += g * (x - mean)  # rows outside: g is 0
    place = part_ptr + chunk.to(tl.int64) * 2 * C + cols
    tl.store(place, tl.sum(sums, 0), here)
    tl.store(place + C, tl.sum(dots, 0), here)


@triton.jit
def _finish_reduce_kernel(
    part_ptr,
    table_ptr,
    dweight_ptr,
    dbias_ptr,
    means_ptr,
    M,
    C,
    chunks,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    here = cols < C
    sums = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    dots = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for first in range(0, chunks, BLOCK_P):
        chunk = first + tl.arange(0, BLOCK_P)
        inside = (chunk < chunks)[:, None] & here[None, :]
        place = part_ptr + chunk.to(tl.int64)[:, None] * 2 * C + cols[None, :]
        sums += tl.load(place, inside, other=0.0)
        dots += tl.load(place + C, inside, other=0.0)
    total, dot = tl.sum(sums, 0), tl.sum(dots, 0)
    rstd = tl.load(table_ptr + C + cols, here, other=0.0)
    size = M.to(tl.float32)
    tl.store(dbias_ptr + cols, total, here)
    tl.store(dweight_ptr + cols, dot * rstd, here)
    tl.store(means_ptr + cols, total / size, here)
    tl.store(means_ptr + C + cols, dot * rstd * rstd / size, here)


@triton.jit
def _grad_kernel(
    g_ptr,
    x_ptr,
    table_ptr,
    means_ptr,
    dx_ptr,
    M,
    C,
    rows,
    MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    here = cols < C
    mean = tl.load(table_ptr + cols, here, other=0.0)[None, :]
    scale = tl.load(table_ptr + 2 * C + cols, here, other=0.0)[None, :]
    shift = tl.load(table_ptr + 3 * C + cols, here, other=0.0)[None, :]
    c1 = tl.load(means_ptr + cols, here, other=0.0)[None, :]
    c2 = tl.load(means_ptr + C + cols, here, other=0.0)[None, :]
    start = tl.program_id(1) * rows
    for first in range(start, tl.minimum(start + rows, M), BLOCK_M):
        lines = first + tl.arange(0, BLOCK_M)
        inside = (lines < M)[:, None] & here[None, :]
        at = lines.to(tl.int64)[:, None] * C + cols[None, :]
        x = tl.load(x_ptr + at, inside, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + at, inside, other=0.0).to(tl.float32)
        if MASKED:
            g = tl.where(x * scale + shift > 0, g, 0.0)
        dx = scale * (g - c1 - (x - mean) * c2)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), inside)


def moments(
    x_MC: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    running: tuple[Tensor, Tensor, Tensor] | None,
    momentum: float,
    eps: float,
) -> Tensor:
    """Batch statistics as the table float32 [4, C]: mean, 1/std, scale, shift (rows MEAN, RSTD, SCALE, SHIFT).

    running: running_mean, running_var (float32 [C]) and num_batches_tracked, which move in place; None leaves them.
    """
    M, C = x_MC.shape
    plan = cut(M, C, REDUCING)
    part = torch.empty((plan.chunks, 2, C), dtype=torch.float32, device=x_MC.device)
    table = torch.empty((4, C), dtype=torch.float32, device=x_MC.device)
    _moments_kernel[plan.grid](x_MC, part, M, C, plan.rows, **plan.how)
    mean, var, batches = running if running is not None else (part, part, part)
    _finish_moments_kernel[(triton.cdiv(C, _FINISH_C),)](
        part, weight_C, bias_C, mean, var, batches, table, M, C, plan.rows, plan.chunks, momentum, eps,
        TRACK=running is not None, BLOCK_P=_FINISH_P, BLOCK_C=_FINISH_C, num_warps=4,
    )  # fmt: skip
    return table


def apply(
    x_MC: Tensor, table: Tensor, z_MC: Tensor, residual_MC: Tensor | None, bits: Tensor | None, *, relu: bool
) -> None:
    """z = relu(scale x + shift + residual). bits: uint8 [M, C / 8], set where z is positive; None keeps none."""
    M, C = x_MC.shape
    plan = cut(M, C, POINTWISE)
    _apply_kernel[plan.grid](
        x_MC, x_MC if residual_MC is None else residual_MC, table, z_MC, z_MC if bits is None else bits,
        M, C, plan.rows, RESIDUAL=residual_MC is not None, RELU=relu, BITS=bits is not None, **plan.how,
    )  # fmt: skip


def reduce(
    dz_MC: Tensor,
    dz2_MC: Tensor | None,
    x_MC: Tensor,
    table: Tensor,
    bits: Tensor | None,
    g_MC: Tensor | None,
    *,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dweight [C], dbias [C], means float32 [2, C]) from one or two gradients of z.

    g_MC: takes the gradient after the ReLU; None keeps none. bits: from ``apply``; None with ``relu`` finds the ReLU's
    sign again from x, which is possible where there was no residual.
    """
    M, C = x_MC.shape
    plan = cut(M, C, REDUCING)
    part = torch.empty((plan.chunks, 2, C), dtype=torch.float32, device=x_MC.device)
    _reduce_kernel[plan.grid](
        dz_MC, dz_MC if dz2_MC is None else dz2_MC, x_MC, x_MC if bits is None else bits, table, part,
        x_MC if g_MC is None else g_MC, M, C, plan.rows,
        SECOND=dz2_MC is not None, RELU=relu, BITS=bits is not None, STORE=g_MC is not None,
        **plan.how,
    )  # fmt: skip
    return finish_reduce(part, table, M)


def finish_reduce(part: Tensor, table: Tensor, M: int) -> tuple[Tensor, Tensor, Tensor]:
    """(dweight [C], dbias [C], means float32 [2, C]) from partial sums [chunks, 2, C] over M pixels in all."""
    chunks, _, C = part.shape
    dweight, dbias = torch.empty((2, C), dtype=torch.float32, device=part.device).unbind()
    means = torch.empty((2, C), dtype=torch.float32, device=part.device)
    _finish_reduce_kernel[(triton.cdiv(C, _FINISH_C),)](
        part, table, dweight, dbias, means, M, C, chunks, BLOCK_P=_FINISH_P, BLOCK_C=_FINISH_C, num_warps=4
    )
    return dweight, dbias, means


def grad(g_MC: Tensor, x_MC: Tensor, table: Tensor, means: Tensor, dx_MC: Tensor, *, masked: bool) -> None:
    """dx of the normalisation. masked: g is the gradient before the ReLU, whose sign is found again from x."""
    M, C = x_MC.shape
    plan = cut(M, C, POINTWISE)
    _grad_kernel[plan.grid](
        g_MC, x_MC, table, means, dx_MC, M, C, plan.rows,
        MASKED=masked, **plan.how,
    )  # fmt: skip
