"""torch.compile: the rule, the trial that leaves no trace, and falling back."""

import contextlib

import pytest
import torch
from torch import nn

from geokr import compiling
from geokr.config import ConfigError
from tests import geokr_toy as toy

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))


def test_the_rule():
    assert [compiling.wanted(option, CPU) for option in ("auto", "on", "off")] == [False, True, False]
    assert [compiling.wanted(option, CUDA) for option in ("auto", "on", "off")] == [True, True, False]


def test_a_compiled_step_is_the_eager_one_and_the_trial_leaves_no_trace():
    """Needs a C++ compiler; without one this is what ``auto`` falls back from."""
    compiled_model, eager = small(), small()
    before = toy.bits(compiled_model)
    images = torch.randn(4, 3, 8, 8)
    forward = compiling.compile_forward("auto", compiled_model, [images], contextlib.nullcontext)
    if forward is compiled_model:
        pytest.skip("torch.compile does not work on this machine")
    assert toy.bits(compiled_model) == before
    assert all(parameter.grad is None for parameter in compiled_model.parameters())
    for model, call in ((compiled_model, forward), (eager, eager)):
        call(images).square().sum().backward()
        assert model[0].weight.grad is not None
    for a, b in zip(compiled_model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4)
    for a, b in zip(compiled_model.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_without_a_compiler_auto_goes_on_aloud_and_on_is_an_error(monkeypatch, caplog):
    def broken(model):
        def call(images):
            raise RuntimeError("InvalidCxxCompiler: no working C++ compiler found")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    model, images = small(), torch.randn(2, 3, 8, 8)
    assert compiling.compile_forward("auto", model, [images], contextlib.nullcontext) is model
    assert "going on without it" in caplog.text
    with pytest.raises(ConfigError, match="no working C\\+\\+ compiler"):
        compiling.compile_forward("on", model, [images], contextlib.nullcontext)
