"""Optimizers: LAMB against NumPy in float64, implementations against each other, groups, fallbacks."""

import numpy as np
import pytest
import timm
import torch
from torch import nn

from geokr import optim as geokr_optim
from geokr.config import ConfigError, build
from geokr.lamb import Lamb
from geokr.options import OptimOptions

CPU = torch.device("cpu")


def options(**values):
    return build(OptimOptions, values, "test")


def lamb_oracle(weights, gradients, lr, betas, eps, decay):
    """LAMB as its paper writes it, float64, for one tensor; the norm ratio only where weights decay."""
    m, v, w = np.zeros_like(weights), np.zeros_like(weights), weights.copy()
    for t, g in enumerate(gradients, start=1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        u = m / (1 - betas[0] ** t) / (np.sqrt(v / (1 - betas[1] ** t)) + eps) + decay * w
        norms = np.linalg.norm(w), np.linalg.norm(u)
        trust = norms[0] / norms[1] if decay and all(norms) else 1.0
        w = w - lr * trust * u
    return w


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lamb_against_numpy(decay):
    rng = np.random.default_rng(0)
    starts = [rng.normal(size=(5, 3)), rng.normal(size=7), np.zeros((2, 2))]
    gradients = [[rng.normal(size=start.shape) for _ in range(6)] for start in starts]
    weights = [nn.Parameter(torch.tensor(start)) for start in starts]
    lamb = Lamb(weights, lr=0.05, betas=(0.8, 0.95), eps=1e-6, weight_decay=decay)
    for step in range(6):
        for weight, own in zip(weights, gradients, strict=True):
            weight.grad = torch.tensor(own[step])
        lamb.step()
    for weight, start, own in zip(weights, starts, gradients, strict=True):
        expected = lamb_oracle(start, own, 0.05, (0.8, 0.95), 1e-6, decay)
        np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=1e-10, atol=1e-12)


def test_lamb_passes_over_parameters_without_gradient_and_counts_each_ones_steps():
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    lamb = Lamb([a, b], lr=0.1, weight_decay=0.0)
    a.grad = torch.ones(3)
    lamb.step()
    assert torch.equal(b.detach(), torch.ones(3))
    b.grad = torch.ones(3)
    a.grad = None
    lamb.step()
    assert torch.allclose(a, b)


def small():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)
        )


def train(choice, steps=4):
    model = small()
    optimizer, ran = geokr_optim.build_optimizer(model, choice, CPU)
    rng = torch.Generator().manual_seed(1)
    for step in range(steps):
        geokr_optim.set_learning_rate(optimizer, 0.01 * (step + 1))
        optimizer.zero_grad()
        model(torch.randn(2, 3, 8, 8, generator=rng)).square().mean().backward()
        optimizer.step()
    return model, ran


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "lamb"])
def test_implementations_agree(name):
    fused, said = train(options(name=name, implementation="fused"))
    foreach, _ = train(options(name=name, implementation="foreach"))
    assert said == (f"{name}, fused" if name != "lamb" else "lamb, foreach")
    for a, b in zip(fused.parameters(), foreach.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_norms_and_biases_do_not_decay_unless_asked():
    model = small()
    decayed, plain = geokr_optim.parameter_groups(model, options(weight_decay=0.3))
    assert [p.ndim for p in decayed["params"]] == [4, 2]
    assert decayed["weight_decay"] == 0.3
    assert plain["weight_decay"] == 0.0
    assert len(plain["params"]) == 3
    (everything,) = geokr_optim.parameter_groups(model, options(decay_norm_bias=True))
    assert len(everything["params"]) == 5


def test_what_the_backbone_excepts_does_not_decay():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = timm.create_model("test_vit", num_classes=0, img_size=32)

    model = Model()
    plain = geokr_optim.parameter_groups(model, options())[1]["params"]
    assert any(p is model.backbone.pos_embed for p in plain)


def test_fused_falls_back_aloud(monkeypatch, caplog):
    real = torch.optim.AdamW

    def without_fused(groups, **how):
        if how.get("fused"):
            raise RuntimeError("no fused kernel on this device")
        return real(groups, **how)

    monkeypatch.setattr(torch.optim, "AdamW", without_fused)
    _, ran = geokr_optim.build_optimizer(small(), options(name="adamw"), CPU)
    assert ran == "adamw, foreach"
    assert "falling back to foreach" in caplog.text


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_apex_without_apex_says_what_to_do(name):
    for device in (CPU, torch.device("cuda")):
        with pytest.raises(ConfigError, match="NVIDIA's apex from its source") as caught:
            geokr_optim.build_optimizer(small(), options(name=name, implementation="apex"), device)
        assert "unrelated" in str(caught.value)
