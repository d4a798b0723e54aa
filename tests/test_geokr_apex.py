"""NVIDIA apex as the optimizers' backend: the real one where it is installed, else a stand-in that records calls."""

import copy
import importlib.util
import sys

import pytest
import torch
from torch import nn

from geokr import optim, state
from geokr.config import ConfigError, build
from geokr.options import OptimOptions
from geokr.train import train_step
from tests import fake_apex
from tests import geokr_toy as toy

NAMES = ["adam", "adamw", "sgd", "lamb"]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
without_apex = pytest.mark.skipif(importlib.util.find_spec("apex") is not None, reason="an apex is installed")


def options(name, implementation="apex"):
    values = {"name": name, "lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-6}
    return build(OptimOptions, {**values, "implementation": implementation}, "test")


def model(where):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        made = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
        made.append(nn.Linear(8 * 36, 5))
    return made.to(where, memory_format=torch.channels_last)


def gradients(made, step):
    """Gradients that are a function of the step alone: neither optimizer's course can move the other's."""
    drawn = torch.Generator().manual_seed(step)
    for parameter in made.parameters():
        gradient = torch.randn(parameter.shape, generator=drawn).to(parameter.device)
        parameter.grad = torch.empty_like(parameter).copy_(gradient)


def steps(made, optimizer, numbers):
    for step in numbers:
        optim.set_learning_rate(optimizer, 0.01 / step)
        optimizer.zero_grad()
        gradients(made, step)
        optimizer.step()


def start(name, implementation, where):
    made = model(where)
    return made, optim.build_optimizer(made, options(name, implementation), CUDA if implementation == "apex" else where)


def move(made, optimizer, name, implementation, where):
    """A fresh model and optimizer that go on from the state of the given ones, through a checkpoint's tensors."""
    tensors, numbers = state.optimizer_state(optimizer, made)
    tensors = {key: tensor.detach().cpu().clone() for key, tensor in tensors.items()}
    other, (second, _) = start(name, implementation, where)
    other.load_state_dict(copy.deepcopy(made.state_dict()))
    state.load_optimizer(second, other, tensors, numbers)
    return other, second


def check_parity(name, where):
    """apex against torch: six steps straight; and each going on, at step four, from what either saved."""
    ours, (reference, _) = start(name, "foreach", where)
    steps(ours, reference, range(1, 7))
    for first in ("apex", "foreach"):
        for second in ("apex", "foreach"):
            made, (optimizer, _) = start(name, first, where)
            steps(made, optimizer, range(1, 4))
            other, resumed = move(made, optimizer, name, second, where)
            steps(other, resumed, range(4, 7))
            for a, b in zip(other.parameters(), ours.parameters(), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=f"{first}, then {second}")
            if first == second:
                steps(made, optimizer, range(4, 7))
                assert all(torch.equal(a, b) for a, b in zip(made.parameters(), other.parameters(), strict=True))


@pytest.fixture
def fake(monkeypatch):
    fake_apex.install(monkeypatch)
    return fake_apex.calls


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_parity_with_the_real_apex(name):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    pytest.importorskip("amp_C", reason="NVIDIA's apex is not installed with its extensions")
    check_parity(name, CUDA)


@pytest.mark.parametrize("name", NAMES)
def test_parity_with_the_stand_in(name, fake):
    """So that the check of the real one is known to hold, and steps are found wherever an implementation keeps them."""
    check_parity(name, CPU)


@pytest.mark.parametrize(
    ("name", "called", "arguments"),
    [
        ("adam", "FusedAdam", {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "adam_w_mode": False}),
        ("adamw", "FusedAdam", {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "adam_w_mode": True}),
        ("sgd", "FusedSGD", {"lr": 0.01, "momentum": 0.9, "nesterov": True}),
        ("lamb", "FusedLAMB", {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "max_grad_norm": float("inf")}),
    ],
)
def test_what_is_asked_of_apex(name, called, arguments, fake):
    made, (optimizer, ran) = start(name, "apex", CPU)
    assert ran == f"{name}, NVIDIA apex"
    assert fake == [(called, arguments)]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 3]
    steps(made, optimizer, [1, 2])
    assert fake[1:] == [("step", {"lr": [0.01, 0.01]}), ("step", {"lr": [0.005, 0.005]})]


@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_the_method_with_apex(name, fake):
    """The loop's own calls: zero_grad, the loss scaler, the rate of each step."""
    learner = toy.learner(toy.options(f"optim.name={name}", "train.precision=fp16", "optim.warmup=0.25"))
    moved, _ = optim.build_optimizer(learner.student, options(name), CUDA)
    object.__setattr__(learner, "optimizer", moved)
    for step, batch in zip((1, 2), toy.stream(0, 8), strict=False):
        losses, _ = train_step(learner, [batch], step)
        assert torch.isfinite(losses).all()
    rates = [call["lr"][0] for kind, call in fake if kind == "step"]
    assert rates == [learner.learning_rate(1), learner.learning_rate(2)]
    assert rates[0] < rates[1]


@without_apex
@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_absent_it_says_what_to_do(name):
    for device in (CPU, CUDA):
        with pytest.raises(ConfigError, match="NVIDIA's apex from its source") as caught:
            optim.build_optimizer(model(CPU), options(name), device)
        assert "unrelated" in str(caught.value)
        assert "optim.implementation=fused" in str(caught.value)


@without_apex
@pytest.mark.parametrize("code", ["", "raise TypeError('Class advice impossible in Python3')", "print 'two'"])
def test_the_unrelated_package_is_told_apart(code, tmp_path, monkeypatch):
    for folder in ("apex", "apex-0.9.8.dev0.dist-info"):
        (tmp_path / folder).mkdir()
    (tmp_path / "apex" / "__init__.py").write_text(code + "\n")
    about = "Metadata-Version: 2.1\nName: apex\nVersion: 0.9.8.dev0\nSummary: Pyramid toolkit to add Velruse\n"
    (tmp_path / "apex-0.9.8.dev0.dist-info" / "METADATA").write_text(about)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"0\.9\.8\.dev0 \(Pyramid toolkit.*not NVIDIA's.*github\.com/NVIDIA/apex"):
        optim.build_optimizer(model(CPU), options("adamw"), CUDA)
    sys.modules.pop("apex", None)


def test_a_build_without_extensions_says_so(fake, monkeypatch):
    def without(*arguments, **keywords):
        raise RuntimeError("apex.optimizers.FusedAdam requires cuda extensions")

    monkeypatch.setattr(fake_apex.FusedAdam, "__init__", without)
    with pytest.raises(ConfigError, match=r"requires cuda extensions.*with its C\+\+ and CUDA extensions"):
        optim.build_optimizer(model(CPU), options("adamw"), CUDA)


def test_it_is_not_offered_to_cuda_graphs(fake):
    with pytest.raises(ConfigError, match=r"optim\.implementation=fused"):
        optim.build_optimizer(model(CPU), options("adamw"), CUDA, capturable=True)
