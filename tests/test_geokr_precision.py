"""`auto` is what the device computes in; what it only acts out is used on demand, and said."""

import pytest
import torch

from geokr import precision
from geokr.assemble import build_learner
from tests import geokr_toy as toy

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("option", "device", "able", "chosen"),
    [
        ("auto", CPU, True, "bf16"),
        ("auto", CPU, False, "fp32"),
        ("auto", CUDA, True, "bf16"),
        ("auto", CUDA, False, "fp16"),
        ("bf16", CPU, False, "bf16"),
        ("fp32", CUDA, True, "fp32"),
        ("fp16", CUDA, True, "fp16"),
    ],
)
def test_what_is_chosen(option, device, able, chosen, monkeypatch, caplog):
    monkeypatch.setattr(precision, "computes_in_bf16", lambda device: able)
    assert precision.choose_precision(option, device) == chosen
    assert ("no bf16 arithmetic" in caplog.text) == (option == "bf16" and not able)


def test_a_learner_follows():
    options = toy.options("train.precision=auto")
    spec = toy.BackboneSpec(options.model.backbone, 3, toy.SIZE)
    learner, chosen = build_learner(options, spec, classes=4, mean=[1.0] * 3, std=[1.0] * 3, steps=8, world=toy.CPU)
    expected = "bf16" if precision.computes_in_bf16(CPU) else "fp32"
    assert chosen["precision"] == expected
    with learner.autocast():
        assert torch.is_autocast_enabled("cpu") == (expected == "bf16")


def test_a_cpu_without_avx512_has_none():
    if torch.backends.cpu.get_cpu_capability() != "AVX2":
        pytest.skip("this CPU has more than AVX2, or is of another kind")
    assert not precision.computes_in_bf16(CPU)
