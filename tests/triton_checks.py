"""The Triton kernels and the fused ResNets against torch in float64.

Not collected by itself: test_geokr_fused.py runs this file with TRITON_INTERPRET=1, which must be set before Triton is
imported, and test_gpu.py on a GPU.
"""

import copy
import os

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from geokr import fused_norm, norm_kernels, pool_kernels
from geokr.fused_resnet import can_fuse, deep_stem, fuse

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
SHAPES = [(3, 16, 7, 5), (2, 24, 9, 9), (1, 136, 6, 4)]


def images(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)
    return made.contiguous(memory_format=torch.channels_last)


def norm_of(channels: int, seed: int = 1) -> nn.BatchNorm2d:
    torch.manual_seed(seed)
    norm = nn.BatchNorm2d(channels)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias, 0, 0.5)
    return norm.to(DEVICE)


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.detach(), expected.detach()
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))


def check(pairs, tolerance: float = 2e-6) -> None:
    for number, (found, expected) in enumerate(pairs):
        assert distance(found, expected) < tolerance, number


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("relu", [True, False])
def test_norm_and_relu(shape, relu):
    norm = norm_of(shape[1])
    plain = copy.deepcopy(norm).double()
    x = images(*shape).requires_grad_()
    wide = x.detach().double().requires_grad_()
    out = fused_norm.norm_relu(norm, x, relu=relu)
    expected = F.relu(plain(wide)) if relu else plain(wide)
    weights = images(*shape, seed=2)
    (out * weights).sum().backward()
    (expected * weights.double()).sum().backward()
    grads = [(x.grad, wide.grad), (norm.weight.grad, plain.weight.grad), (norm.bias.grad, plain.bias.grad)]
    check([(out, expected), (norm.running_mean, plain.running_mean), (norm.running_var, plain.running_var), *grads])
    assert int(norm.num_batches_tracked) == 1
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("readers", ["both", "main", "skip"])
def test_residual_and_its_two_readers(shape, readers):
    norm = norm_of(shape[1])
    plain = copy.deepcopy(norm).double()
    x, residual = images(*shape).requires_grad_(), images(*shape, seed=3).requires_grad_()
    wide, wide_residual = (t.detach().double().requires_grad_() for t in (x, residual))
    main, skip = fused_norm.residual_norm(norm, x, residual)
    expected = F.relu(plain(wide) + wide_residual)
    check([(main, expected), (skip, expected)])
    loss, wide_loss = 0, 0
    for name, out, seed in (("main", main, 4), ("skip", skip, 5)):
        if readers in (name, "both"):
            weights = images(*shape, seed=seed)
            loss, wide_loss = loss + (out * weights).sum(), wide_loss + (expected * weights.double()).sum()
    loss.backward()
    wide_loss.backward()
    check([(x.grad, wide.grad), (residual.grad, wide_residual.grad)])
    check([(norm.weight.grad, plain.weight.grad), (norm.bias.grad, plain.bias.grad)])


def test_nothing_cancels_far_from_zero():
    norm = norm_of(16)
    x = images(4, 16, 8, 8) + 3000.0
    table = norm_kernels.moments(x.permute(0, 2, 3, 1).reshape(-1, 16), norm.weight, norm.bias, None, 0.1, 1e-5)
    mean, var = x.double().mean((0, 2, 3)), x.double().var((0, 2, 3), correction=0)
    assert distance(table[norm_kernels.MEAN], mean) < 1e-7
    assert distance(table[norm_kernels.RSTD] ** -2, var) < 1e-4


def test_many_chunks_and_a_partial_last_one(monkeypatch):
    monkeypatch.setattr(norm_kernels, "REDUCING", norm_kernels.Tiling(2, 8, 1, 400))
    norm = norm_of(8)
    x = images(5, 8, 9, 7)
    plan = norm_kernels.cut(5 * 9 * 7, 8, norm_kernels.REDUCING)
    assert plan.chunks > norm_kernels._FINISH_P
    assert plan.rows * plan.chunks > 5 * 9 * 7
    check([(fused_norm.norm_relu(norm, x), F.relu(F.batch_norm(x, None, None, norm.weight, norm.bias, training=True)))])


@pytest.mark.parametrize("shape", [(2, 16, 8, 8), (2, 8, 7, 9), (1, 72, 5, 6)])
def test_stem_norm_relu_pool(shape):
    norm = norm_of(shape[1])
    plain = copy.deepcopy(norm).double()
    x = images(*shape).requires_grad_()
    wide = x.detach().double().requires_grad_()
    out = fused_norm.norm_relu_pool(norm, x)
    expected = F.max_pool2d(F.relu(plain(wide)), 3, 2, 1)
    weights = images(*expected.shape, seed=2)
    (out * weights).sum().backward()
    (expected * weights.double()).sum().backward()
    grads = [(x.grad, wide.grad), (norm.weight.grad, plain.weight.grad), (norm.bias.grad, plain.bias.grad)]
    check([(out, expected), (norm.running_var, plain.running_var), *grads])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_a_number_stays_so(bad):
    """A ReLU or a maximum that made it 0 would hide a broken run from its loss."""
    x, residual = images(2, 16, 6, 6), images(2, 16, 6, 6, seed=3)
    x[1, 3, 2, 2] = bad
    outs = [fused_norm.norm_relu(norm_of(16), x), fused_norm.norm_relu_pool(norm_of(16), x)]
    outs.append(fused_norm.residual_norm(norm_of(16), x, residual)[0])
    for out in outs:
        assert out[:, 3].isnan().all()
        assert out[:, :3].isfinite().all()
    pooled, _ = pool_kernels.pool(images(1, 8, 4, 4).fill_(float("nan")).permute(0, 2, 3, 1), None, winners=False)
    assert pooled.isnan().all()


@pytest.mark.parametrize("size", [(8, 8), (7, 9)])
def test_pooling_alone(size):
    x = images(2, 16, *size)
    z_NHWC, winner = pool_kernels.pool(x.permute(0, 2, 3, 1), None, winners=False)
    assert winner is None
    torch.testing.assert_close(z_NHWC.permute(0, 3, 1, 2), F.max_pool2d(x, 3, 2, 1), rtol=0, atol=0)


@pytest.mark.parametrize("bands", [1, 3, 4, 5])
def test_four_pixels_as_one(bands):
    torch.manual_seed(0)
    conv = nn.Conv2d(bands, 8, 7, 2, 3, bias=False).to(DEVICE)
    x = images(2, bands, 12, 18)
    deep = deep_stem(conv, x)
    assert deep is not None
    assert deep[0].shape[1] % 8 == 0
    with torch.backends.cudnn.flags(enabled=False):  # TF32 would blur it
        check([(F.conv2d(*deep), F.conv2d(x.double(), conv.weight.double(), None, 2, 3))], 1e-6)
    assert deep_stem(conv, images(2, bands, 11, 18)) is None  # odd: no four pixels
    assert deep_stem(nn.Conv2d(bands, 8, 3, 2, 1), x) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_normalising(dtype):
    x = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 9, 7, 3), np.uint8)).to(DEVICE)
    mean, std = torch.tensor([100.0, 90.0, 120.0], device=DEVICE), torch.tensor([40.0, 55.0, 60.0], device=DEVICE)
    found = pool_kernels.normalise(x, mean, 1 / std, dtype)
    expected = (x.double() - mean.double()) / std.double()
    check([(found, expected)], {torch.float16: 5e-4, torch.bfloat16: 4e-3, torch.float32: 1e-6}[dtype])
    assert found.dtype == dtype


@pytest.mark.parametrize("name", ["test_resnet", *(["resnet18", "resnet50"] if DEVICE == "cuda" else [])])
def test_a_fused_resnet_is_the_plain_one(name):
    """Logits, gradients and running statistics, in training mode; in eval mode timm's own forward pass runs."""
    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=4).to(DEVICE).to(memory_format=torch.channels_last)
    assert can_fuse(plain)
    fused, wide = fuse(copy.deepcopy(plain)), copy.deepcopy(plain).double()
    assert list(fused.state_dict()) == list(plain.state_dict())
    size = 64 if DEVICE == "cuda" else 32
    x, weights = images(2, 3, size, size), torch.arange(8.0, device=DEVICE).view(2, 4)
    results = []
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False, deterministic=True, benchmark=False):
        for model, batch in ((fused, x), (plain, x), (wide, x.double())):
            out = model(batch)
            (out * weights.to(out)).sum().backward()
            results.append([out, *(p.grad for p in model.parameters()), *model.buffers()])
    for found, alike, expected in zip(*results, strict=True):
        assert distance(found, expected) < max(20 * distance(alike, expected), 1e-5)
    fused.eval(), wide.eval()
    assert distance(fused(x), wide(x.double())) < 1e-3


@pytest.mark.parametrize("name", ["seresnet50", "resnet50_gn" if timm.is_model("resnet50_gn") else "resnetv2_50"])
def test_what_has_more_is_left_alone(name):
    assert not can_fuse(timm.create_model(name))
