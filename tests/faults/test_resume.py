"""Rows 40 and 41: stopped at every step and resumed, once, twice and always, in as many processes as come to hand."""

import os
import signal

import numpy as np
import pytest

from geokr import pretrain
from geokr.recorder import Recorder
from tests.faults.runs import STEPS, arguments, equal_bits, finish, losses, saved_step
from tests.test_pipelines_loaders import HAS_DALI

EPOCH = 5  # steps


@pytest.fixture
def train(records, monkeypatch):
    """Runs in this process, stopped by SIGTERM after a step where one is given."""

    def run(folder, *overrides: str, stop: int | None = None) -> None:
        with monkeypatch.context() as patch:
            tick = Recorder.tick

            def tick_and_stop(self, step: int) -> None:
                tick(self, step)
                if step == stop:
                    os.kill(os.getpid(), signal.SIGTERM)

            patch.setattr(Recorder, "tick", tick_and_stop)
            status = pretrain.main(arguments(records, folder, *overrides))
        assert status == (0 if stop is None else 128 + signal.SIGTERM)
        assert saved_step(folder) == (stop or STEPS)

    return run


@pytest.fixture(scope="module")
def whole(records, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert pretrain.main(arguments(records, folder)) == 0
    return folder


def at_every_step(everyday: set[int]):
    """Every step of two epochs; those not asked for every day belong to the campaign."""
    return [pytest.param(n, marks=[] if n in everyday else pytest.mark.slow) for n in range(1, STEPS)]


@pytest.mark.parametrize("stop", at_every_step({EPOCH}))
def test_stopped_after_a_step_and_resumed(train, whole, tally, tmp_path, stop):
    train(tmp_path, stop=stop)
    train(tmp_path)
    tally.inject(41, "stopped after a step")
    tally.resumed(equal_bits(tmp_path, whole))


@pytest.mark.parametrize("first", at_every_step({EPOCH - 1})[:-1])
def test_and_stopped_again(train, whole, tally, tmp_path, first):
    seconds = range(first + 1, STEPS) if first != EPOCH - 1 else (EPOCH,)
    for second in seconds:
        folder = tmp_path / str(second)
        train(folder, stop=first)
        train(folder, stop=second)
        train(folder)
        tally.inject(41, "stopped after a step", 2)
        tally.resumed(equal_bits(folder, whole), 2)


def test_stopped_after_every_step(train, whole, tally, tmp_path):
    for stop in range(1, STEPS):
        train(tmp_path, stop=stop)
    train(tmp_path)
    tally.inject(41, "stopped after a step", STEPS - 1)
    tally.resumed(equal_bits(tmp_path, whole), STEPS - 1)


VARIANTS = {
    "bf16": ("train.precision=bf16",),
    "fp16": ("train.precision=fp16",),
    "parts": ("train.accumulate=2", "train.clip_norm=0.5"),
    "lamb": ("optim.name=lamb",),
    "sgd": ("optim.name=sgd", "optim.lr=0.05"),
    "published teacher": (
        "method.teacher_mode=train",
        "method.teacher_schedule=published",
        "method.teacher_ramp=false",
    ),
    "dali": ("data.loader=dali",),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_whatever_the_method_and_precision(train, tally, tmp_path, name):
    if name == "dali" and not HAS_DALI:
        pytest.skip("DALI is not installed")
    overrides = VARIANTS[name]
    train(tmp_path / "whole", *overrides)
    for stop in (1, EPOCH - 1, EPOCH, EPOCH + 2):
        train(tmp_path / str(stop), *overrides, stop=stop)
        train(tmp_path / str(stop), *overrides)
        tally.inject(41, "stopped after a step")
        tally.resumed(equal_bits(tmp_path / str(stop), tmp_path / "whole"))


def batches_seen(folder) -> dict[int, list[int]]:
    """Record ids of each step's batch, in ascending order, over all processes."""
    seen: dict[int, list[int]] = {}
    for path in folder.iterdir():
        seen.setdefault(int(path.name.split("-")[0]), []).extend(map(int, path.read_text().split()))
    return {step: sorted(ids) for step, ids in seen.items()}


SIZES = [
    (1, 2, 4),
    pytest.param((4, 2, 1), marks=pytest.mark.slow),
    pytest.param((2, 1, 4, 1, 2), marks=pytest.mark.slow),
    pytest.param((4, 1, 2, 4, 2, 1), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_another_number_of_processes_sees_the_same_batches(zygote, records, tally, tmp_path, sizes):
    """The same ids in every step as one process sees, and a loss curve equal within rounding."""
    for name in ("alone", "several"):
        (tmp_path / name).mkdir()
    steps = 2 * len(sizes) + 1

    def run(size: int, folder: str, last: int) -> None:
        given = arguments(records, tmp_path / f"run-{folder}", f"train.max_steps={last}", "model.drop_path=0")
        finish(zygote.ranks(size, given, inject=f"note_records:{tmp_path / folder}"))

    run(1, "alone", steps)
    for number, size in enumerate(sizes, start=1):
        run(size, "several", steps if number == len(sizes) else 2 * number)
        tally.inject(40, "resumed with another number of processes", int(number > 1))
    alone, several = batches_seen(tmp_path / "alone"), batches_seen(tmp_path / "several")
    tally.right(several == alone, "the batches differ")
    assert len(alone) == steps
    assert all(len(ids) == 8 for ids in alone.values())
    np.testing.assert_allclose(losses(tmp_path / "run-several"), losses(tmp_path / "run-alone"), rtol=5e-3, atol=5e-4)
