"""Triton kernels of a ResNet's stem: norm, ReLU and 3 x 3 max pooling in one pass, and images to normalised half.

The stem's first feature map is the largest of all. Pooled straight from the convolution's output it is never written
after the norm, and the backward pass finds a pixel's gradient from its at most four windows instead of scattering into
a map of zeros. Which pixel won a window is one byte; a window whose values are all cut off by the ReLU has no winner.

Pooling is by 3 x 3 windows, stride 2, padding 1. Among equal values the first in row order wins, as in torch.
N images, H x W pixels of the input, P = ceil(H / 2) x ceil(W / 2) windows, C channels; channels-last throughout.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# Triton gives its kernels arguments that Python's types do not know of.

import torch
import triton
import triton.language as tl
from torch import Tensor

from geokr.norm_kernels import Tiling, cut, finish_reduce, positive_part

_POOLING = Tiling(16, 64, 4, 65535)  # one tile a program, as far as a grid goes
_UNPOOLING = Tiling(8, 64, 4, 2112)
_NORMALISE_BLOCK = 4096


@triton.jit
def _pool_kernel(
    x_ptr,
    table_ptr,
    z_ptr,
    winner_ptr,
    M,
    H,
    W,
    HO,
    WO,
    C,
    rows,
    NORM: tl.constexpr,
    WINNER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    here = cols < C
    if NORM:
        scale = tl.load(table_ptr + 2 * C + cols, here, other=0.0)[None, :]
        shift = tl.load(table_ptr + 3 * C + cols, here, other=0.0)[None, :]
    start = tl.program_id(1) * rows
    for first in range(start, tl.minimum(start + rows, M), BLOCK_M):
        lines = first + tl.arange(0, BLOCK_M)
        inside = (lines < M)[:, None] & here[None, :]
        wo = lines % WO
        ho = (lines // WO) % HO
        n = lines // (WO * HO)
        best = tl.full((BLOCK_M, BLOCK_C), float("-inf"), tl.float32)
        winner = tl.full((BLOCK_M, BLOCK_C), 0, tl.int32)
        for tap in tl.static_range(9):
            h = 2 * ho - 1 + tap // 3
            w = 2 * wo - 1 + tap % 3
            found = ((h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None] & inside
            at = ((n.to(tl.int64) * H + h) * W + w)[:, None] * C + cols[None, :]
            value = tl.load(x_ptr + at, found, other=0.0).to(tl.float32)
            if NORM:
                value = value * scale + shift
            value = tl.where(found, value, float("-inf"))
            better = (value > best) | (value != value)  # NaN wins, as in torch
            best = tl.where(better, value, best)
            winner = tl.where(better, tap, winner)
        if NORM:
            winner = tl.where(best > 0, winner, 9)  # nobody
            best = positive_part(best)
        out = lines.to(tl.int64)[:, None] * C + cols[None, :]
        tl.store(z_ptr + out, best.to(z_ptr.dtype.element_ty), inside)
        if WINNER:
            tl.store(winner_ptr + out, winner.to(tl.uint8), inside)


@triton.jit
def _window(dz_ptr, winner_ptr, n, ho, wo, HO, WO, C, cols, inside):
    """A window's gradient and winner; nobody's outside the image."""
    found = ((ho < HO) & (wo < WO))[:, None] & inside
    at = ((n.to(tl.int64) * HO + ho) * WO + wo)[:, None] * C + cols[None, :]
    winner = tl.load(winner_ptr + at, found, other=9).to(tl.int32)
    return tl.load(dz_ptr + at, found, other=0.0).to(tl.float32), winner


@triton.jit
def _unpooled(dz_ptr, winner_ptr, n, ho, wo, HO, WO, C, cols, inside):
    """Gradients of the four input pixels (2 ho, 2 wo), (2 ho, 2 wo + 1), (2 ho + 1, 2 wo), (2 ho + 1, 2 wo + 1).

    Window (ho, wo) covers rows 2 ho - 1 .. 2 ho + 1: the first pixel is the middle of one window, the second and third
    lie in two, the last in four. The numbers are the pixel's place in each window, row by row.
    """
    a, a_winner = _window(dz_ptr, winner_ptr, n, ho, wo, HO, WO, C, cols, inside)
    b, b_winner = _window(dz_ptr, winner_ptr, n, ho, wo + 1, HO, WO, C, cols, inside)
    c, c_winner = _window(dz_ptr, winner_ptr, n, ho + 1, wo, HO, WO, C, cols, inside)
    d, d_winner = _window(dz_ptr, winner_ptr, n, ho + 1, wo + 1, HO, WO, C, cols, inside)
    g00 = tl.where(a_winner == 4, a, 0.0)
    g01 = tl.where(a_winner == 5, a, 0.0) + tl.where(b_winner == 3, b, 0.0)
    g10 = tl.where(a_winner == 7, a, 0.0) + tl.where(c_winner == 1, c, 0.0)
    g11 = tl.where(a_winner == 8, a, 0.0) + tl.where(b_winner == 6, b, 0.0)
    g11 += tl.where(c_winner == 2, c, 0.0) + tl.where(d_winner == 0, d, 0.0)
    return g00, g01, g10, g11


@triton.jit
def _pool_reduce_kernel(
    dz_ptr,
    winner_ptr,
    x_ptr,
    table_ptr,
    part_ptr,
    M,
    H,
    W,
    HO,
    WO,
    C,
    rows,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    chunk = tl.program_id(1)
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    here = cols < C
    mean = tl.load(table_ptr + cols, here, other=0.0)[None, :]
    sums = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    dots = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    start = chunk * rows
    for first in range(start, tl.minimum(start + rows, M), BLOCK_M):
        lines = first + tl.arange(0, BLOCK_M)
        inside = (lines < M)[:, None] & here[None, :]
        wo = lines % WO
        ho = (lines // WO) % HO
        n = lines // (WO * HO)
        grads = _unpooled(dz_ptr, winner_ptr, n, ho, wo, HO, WO, C, cols, inside)
        for pixel in tl.static_range(4):
            h, w = 2 * ho + pixel // 2, 2 * wo + pixel % 2
            found = ((h < H) & (w < W))[:, None] & inside
            at = ((n.to(tl.int64) * H + h) * W + w)[:, None] * C + cols[None, :]
            x = tl.load(x_ptr + at, found, other=0.0).to(tl.float32)
            g = tl.where(found, grads[pixel], 0.0)
            sums += g
            dots += g * (x - mean)
    place = part_ptr + chunk.to(tl.int64) * 2 * C + cols
    tl.store(place, tl.sum(sums, 0), here)
    tl.store(place + C, tl.sum(dots, 0), here)


@triton.jit
def _pool_grad_kernel(
    dz_ptr,
    winner_ptr,
    x_ptr,
    table_ptr,
    means_ptr,
    dx_ptr,
    M,
    H,
    W,
    HO,
    WO,
    C,
    rows,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    here = cols < C
    mean = tl.load(table_ptr + cols, here, other=0.0)[None, :]
    scale = tl.load(table_ptr + 2 * C + cols, here, other=0.0)[None, :]
    c1 = tl.load(means_ptr + cols, here, other=0.0)[None, :]
    c2 = tl.load(means_ptr + C + cols, here, other=0.0)[None, :]
    start = tl.program_id(1) * rows
    for first in range(start, tl.minimum(start + rows, M), BLOCK_M):
        lines = first + tl.arange(0, BLOCK_M)
        inside = (lines < M)[:, None] & here[None, :]
        wo = lines % WO
        ho = (lines // WO) % HO
        n = lines // (WO * HO)
        grads = _unpooled(dz_ptr, winner_ptr, n, ho, wo, HO, WO, C, cols, inside)
        for pixel in tl.static_range(4):
            h, w = 2 * ho + pixel // 2, 2 * wo + pixel % 2
            found = ((h < H) & (w < W))[:, None] & inside
            at = ((n.to(tl.int64) * H + h) * W + w)[:, None] * C + cols[None, :]
            x = tl.load(x_ptr + at, found, other=0.0).to(tl.float32)
            dx = scale * (grads[pixel] - c1 - (x - mean) * c2)
            tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), found)


@triton.jit
def _normalise_kernel(x_ptr, mean_ptr, scale_ptr, out_ptr, size, C, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    band = (at % C).to(tl.int32)
    x = tl.load(x_ptr + at, inside, other=0).to(tl.float32)
    value = (x - tl.load(mean_ptr + band)) * tl.load(scale_ptr + band)
    tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), inside)


@triton.jit
def _space_to_depth_kernel(
    x_ptr, out_ptr, M, H, W, HO, WO, C, DEPTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr
):
    lines = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    depth = tl.arange(0, BLOCK_D)
    band = depth % C
    phase = depth // C
    h = (2 * ((lines // WO) % HO) - 4)[:, None] + (phase // 2)[None, :]
    w = (2 * (lines % WO) - 4)[:, None] + (phase % 2)[None, :]
    n = (lines // (WO * HO)).to(tl.int64)[:, None]
    found = (lines < M)[:, None] & (phase < 4)[None, :] & (h >= 0) & (h < H) & (w >= 0) & (w < W)
    value = tl.load(x_ptr + ((n * H + h) * W + w) * C + band[None, :], found, other=0.0)
    inside = (lines < M)[:, None] & (depth < DEPTH)[None, :]
    tl.store(out_ptr + lines.to(tl.int64)[:, None] * DEPTH + depth[None, :], value, inside)


def _sizes(x_NHWC: Tensor) -> tuple[int, int, int, int, int, int]:
    """N, H, W, HO, WO, C."""
    N, H, W, C = x_NHWC.shape
    return N, H, W, (H + 1) // 2, (W + 1) // 2, C


def pool(x_NHWC: Tensor, table: Tensor | None, *, winners: bool) -> tuple[Tensor, Tensor | None]:
    """Pooled [N, HO, WO, C], and each window's winner, uint8 of the same shape, where asked for.

    table: of :func:`geokr.norm_kernels.moments`, to pool relu(norm(x)); None pools x itself.
    """
    N, H, W, HO, WO, C = _sizes(x_NHWC)
    z = torch.empty((N, HO, WO, C), dtype=x_NHWC.dtype, device=x_NHWC.device)
    winner = torch.empty_like(z, dtype=torch.uint8) if winners else None
    M = N * HO * WO
    plan = cut(M, C, _POOLING)
    _pool_kernel[plan.grid](
        x_NHWC, z if table is None else table, z, z if winner is None else winner, M, H, W, HO, WO, C, plan.rows,
        NORM=table is not None, WINNER=winners, **plan.how,
    )  # fmt: skip
    return z, winner


def pool_backward(dz_NHWC: Tensor, winner: Tensor, x_NHWC: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight [C], dbias [C]) of pooled relu(norm(x))."""
    N, H, W, HO, WO, C = _sizes(x_NHWC)
    plan = cut(N * HO * WO, C, _UNPOOLING)
    part = torch.empty((plan.chunks, 2, C), dtype=torch.float32, device=x_NHWC.device)
    shape = (N * HO * WO, H, W, HO, WO, C, plan.rows)
    _pool_reduce_kernel[plan.grid](dz_NHWC, winner, x_NHWC, table, part, *shape, **plan.how)
    dweight, dbias, means = finish_reduce(part, table, N * H * W)
    dx = torch.empty_like(x_NHWC)
    _pool_grad_kernel[plan.grid](dz_NHWC, winner, x_NHWC, table, means, dx, *shape, **plan.how)
    return dx, dweight, dbias


def normalise(x_NHWC: Tensor, mean_C: Tensor, scale_C: Tensor, dtype: torch.dtype) -> Tensor:
    """(x - mean) * scale in float32, stored as dtype. x: uint8 or floating point, contiguous; mean, scale: float32."""
    out = torch.empty_like(x_NHWC, dtype=dtype)
    size = x_NHWC.numel()
    _normalise_kernel[(triton.cdiv(size, _NORMALISE_BLOCK),)](
        x_NHWC, mean_C, scale_C, out, size, x_NHWC.shape[-1], BLOCK=_NORMALISE_BLOCK, num_warps=8
    )
    return out


def space_to_depth(x_NHWC: Tensor) -> Tensor:
    """Four pixels as one: [N, H, W, C] to [N, H / 2 + 3, W / 2 + 3, D] with D = 4 C rounded up to whole eights.

    Channel (2 p + q) C + c of pixel (y, x) is channel c of pixel (2 (y - 2) + p, 2 (x - 2) + q); zeros outside. With
    weights of :func:`geokr.fused_resnet.stem_weight` a convolution of 4 x 4 on this, stride 1, without padding, is the
    one of 7 x 7 on the image, stride 2, padding 3. H and W are even.
    """
    N, H, W, C = x_NHWC.shape
    HO, WO, depth = H // 2 + 3, W // 2 + 3, 8 * triton.cdiv(4 * C, 8)
    out = torch.empty((N, HO, WO, depth), dtype=x_NHWC.dtype, device=x_NHWC.device)
    M, block_d = N * HO * WO, triton.next_power_of_2(depth)
    block_m = max(1, _NORMALISE_BLOCK // block_d)
    _space_to_depth_kernel[(triton.cdiv(M, block_m),)](
        x_NHWC, out, M, H, W, HO, WO, C, DEPTH=depth, BLOCK_M=block_m, BLOCK_D=block_d, num_warps=8
    )
    return out
