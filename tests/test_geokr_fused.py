"""Fused norms: the kernels under Triton's interpreter, and when a run takes them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.models.resnet import ResNet

from geokr.assemble import build_learner
from geokr.config import ConfigError
from geokr.distributed import World
from geokr.fused_resnet import can_fuse
from geokr.speedups import _norm_obstacle
from tests import geokr_toy as toy

ROOT = Path(__file__).parents[1]


def test_the_kernels_under_the_interpreter():
    """tests/triton_checks.py in a process of its own: the interpreter is chosen when Triton is imported."""
    pytest.importorskip("triton", reason="Triton comes with torch for CUDA")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/triton_checks.py"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout or "[100%]" in done.stdout


def test_a_cpu_runs_without_and_on_says_why():
    assert toy.learner(toy.options()).student.backbone.__class__.__name__ == "ResNet"
    with pytest.raises(ConfigError, match=r"train.fused_norm=on: its kernels run on CUDA and this run is on cpu"):
        toy.learner(toy.options("train.fused_norm=on"))
    with pytest.raises(ConfigError, match=r"train.cuda_graph=on: this run is on cpu"):
        toy.learner(toy.options("train.cuda_graph=on"))


@pytest.mark.parametrize(
    ("overrides", "synchronized", "reason"),
    [
        (["train.compile=on"], False, "the compiler fuses"),
        (["train.channels_last=false"], False, "channels_last=true"),
        ([], True, "batch statistics of one process"),
        (["model.backbone=test_vit"], False, "test_vit is no ResNet"),
    ],
)
def test_what_stands_in_the_way(overrides, synchronized, reason):
    options = toy.options("train.compile=auto", *[o for o in overrides if not o.startswith("train.compile")])
    options = toy.options(*overrides) if overrides == ["train.compile=on"] else options
    student = toy.learner(toy.options(*[o for o in overrides if o.startswith("model")])).student
    obstacle = _norm_obstacle(options, student, World(torch.device("cuda")), synchronized)
    if obstacle == "Triton is not installed":
        pytest.skip(obstacle)
    assert obstacle is not None
    assert reason in obstacle


@pytest.mark.parametrize("name", ["res2net50_14w_8s", "skresnet18", "resnest14d"])
def test_relatives_of_a_resnet_run_without(name):
    """timm builds them as its ResNet, of other blocks."""
    backbone = timm.create_model(name, num_classes=0)
    assert type(backbone) is ResNet
    assert not can_fuse(backbone)


def test_what_was_chosen_is_said():
    options = toy.options()
    spec = toy.BackboneSpec(options.model.backbone, 3, toy.SIZE)
    _, chosen = build_learner(options, spec, classes=4, mean=[1.0] * 3, std=[1.0] * 3, steps=8, world=toy.CPU)
    said = {key: chosen[key] for key in ("compiled", "fused_norm", "folded_teacher", "cuda_graph")}
    assert said == {"compiled": False, "fused_norm": False, "folded_teacher": True, "cuda_graph": False}
