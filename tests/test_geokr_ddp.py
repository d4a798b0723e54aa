"""DistributedDataParallel by choice. What needs processes is in geokr_ddp_ranks.py; two of them run it in
test_geokr_distributed.py, with everything else that two processes check."""

import logging

import pytest
import torch

from geokr import ddp
from geokr.config import ConfigError
from geokr.distributed import World
from geokr.identity import identity
from tests import geokr_toy as toy
from tests.test_geokr_distributed import torchrun


@pytest.mark.slow
def test_four_processes():
    done = torchrun(4, "tests/geokr_ddp_ranks.py", "4")
    assert done.returncode == 0, done.stderr
    assert "all checks passed" in done.stdout


def test_three_processes_that_go_on_repeat_the_bits():
    done = torchrun(3, "tests/geokr_ddp_ranks.py", "3")
    assert done.returncode == 0, done.stderr
    assert "all checks passed" in done.stdout


def test_one_process_is_not_wrapped_and_says_what_has_no_effect(caplog):
    model = torch.nn.Linear(2, 2)
    train = toy.options("train.ddp_compression=bf16").train
    with caplog.at_level(logging.INFO, "geokr.ddp"):
        assert ddp.wrap(model, World(torch.device("cpu")), train, steps=10) is model
    assert "train.ddp_compression=bf16: one process sends no gradients" in caplog.text


@pytest.mark.parametrize(("steps", "start"), [(5, 2), (80, 8), (9_990, 999), (400_000, 1000)])
def test_powersgd_begins_with_whole_gradients(steps, start):
    assert ddp.powersgd_start(steps) == start


def test_powersgd_and_a_loss_scale_do_not_go_together():
    with pytest.raises(ConfigError, match=r"train\.precision=bf16"):
        toy.options("train.ddp_compression=powersgd", "train.precision=fp16")
    toy.options("train.ddp_compression=fp16", "train.precision=fp16")


def test_rounding_may_change_between_stop_and_resume_but_leaving_out_may_not():
    def who(*overrides):
        return identity(toy.options(*overrides), image_size=32, bands=("red",), dataset="d")

    assert who() == who("train.ddp_compression=bf16") == who("train.ddp_bucket_mb=5")
    assert who() != who("train.ddp_compression=powersgd")
