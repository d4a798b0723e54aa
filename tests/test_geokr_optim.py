"""Optimizers: LAMB against NumPy in float64, implementations against each other, groups, fallbacks."""

import numpy as np
import pytest
import timm
import torch
from timm.optim import lamb as timm_lamb
from torch import nn

from geokr import optim as geokr_optim
from geokr.config import build
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


def pair(shapes=((6, 4, 3, 3), (5, 7), (6,), (5,))):
    """The same parameters twice, those of one axis in a group without weight decay."""
    drawn = torch.Generator().manual_seed(5)
    starts = [torch.randn(shape, generator=drawn) for shape in shapes]
    made = []
    for _ in range(2):
        weights = [nn.Parameter(start.clone()) for start in starts]
        decayed = {"params": [w for w in weights if w.ndim > 1], "weight_decay": 0.1}
        made.append((weights, [decayed, {"params": [w for w in weights if w.ndim == 1], "weight_decay": 0.0}]))
    return made


def drive(weights, optimizer, steps, lr=0.02):
    for step in steps:
        drawn = torch.Generator().manual_seed(step)
        geokr_optim.set_learning_rate(optimizer, lr / step)
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=drawn)
        optimizer.step()


def test_lamb_against_timms():
    """In float32, with groups and a rate that changes."""
    (ours, groups), (theirs, reference) = pair()
    drive(ours, Lamb(groups, eps=1e-6), range(1, 9))
    drive(theirs, timm_lamb.Lamb(reference, eps=1e-6, max_grad_norm=None), range(1, 9))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-6)


def test_lamb_for_a_cuda_graph_is_lamb():
    """Counts and rate in tensors: the same steps, and states that load into each other."""
    (ours, groups), (theirs, reference) = pair()
    device = Lamb(groups, lr=torch.tensor(0.5), capturable=True)
    host = Lamb(reference, lr=0.5)
    drive(ours, device, range(1, 5))
    drive(theirs, host, range(1, 5))
    assert len({id(device.state[weight]["step"]) for weight in ours[:2]}) == 1
    assert device.state[ours[0]]["step"].dtype == torch.float32
    saved, theirs_saved = device.state_dict()["state"], host.state_dict()["state"]
    device.load_state_dict({**device.state_dict(), "state": theirs_saved})
    host.load_state_dict({**host.state_dict(), "state": saved})
    drive(ours, device, range(5, 8))
    drive(theirs, host, range(5, 8))
    assert float(device.state[ours[0]]["step"]) == host.state[theirs[0]]["step"] == 7.0
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "lamb"])
def test_a_rate_on_the_device_is_filled_in_place(name):
    """What a CUDA graph reads must stay where it is; the steps are those of a rate on the host."""
    made = []
    for capturable in (True, False):
        model = small()
        optimizer, _ = geokr_optim.build_optimizer(model, options(name=name), CPU, capturable=capturable)
        rates = [group["lr"] for group in optimizer.param_groups]
        drive(list(model.parameters()), optimizer, range(1, 5))
        if capturable:
            now = [group["lr"] for group in optimizer.param_groups]
            assert all(isinstance(a, torch.Tensor) and a is b for a, b in zip(rates, now, strict=True))
        assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.005, 0.005])
        made.append(model)
    for a, b in zip(made[0].parameters(), made[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "waits"), [("adamw", False), ("adam", False), ("sgd", False), ("lamb", True)])
def test_who_waits_for_the_device_to_know_of_an_overflow(name, waits, monkeypatch):
    """torch's fused kernels take the scaler's verdict as a tensor; others have it read on the host each step."""
    read = []
    whole = torch.amp.GradScaler._maybe_opt_step
    monkeypatch.setattr(torch.amp.GradScaler, "_maybe_opt_step", lambda *a, **k: read.append(1) or whole(*a, **k))
    model = small()
    optimizer, _ = geokr_optim.build_optimizer(model, options(name=name), CPU)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = [p.detach().clone() for p in model.parameters()]
    for poison in (True, False):
        scaler.scale(model(torch.ones(2, 3, 8, 8)).square().sum()).backward()
        if poison:
            next(model.parameters()).grad[0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        moved = [not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]
        assert any(moved) != poison
        optimizer.zero_grad()
    assert bool(read) == waits
    assert scaler.get_scale() == 2.0


def test_momentum_is_sound_after_a_first_step_that_was_skipped(monkeypatch):
    """torch's fused SGD takes memory as it finds it for momentum, and fills it in no skipped step."""
    real = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: real(*a, **k).fill_(float("nan")))
    models = small(), small()
    for model, skips in zip(models, (1, 0), strict=True):
        optimizer, _ = geokr_optim.build_optimizer(model, options(name="sgd"), CPU)
        scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
        for step in range(3 + skips):
            scaler.scale(model(torch.ones(2, 3, 8, 8)).square().sum()).backward()
            if step < skips:
                next(model.parameters()).grad[0] = float("inf")
            model[1].reset_running_stats()
            scaler.step(optimizer)
            scaler.update(1.0)
            optimizer.zero_grad()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)
