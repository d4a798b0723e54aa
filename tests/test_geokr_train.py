"""The step against the method written out by hand, and the loop: resume, stop, NaN, precision, accumulation."""

import copy
import itertools
import math
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from geokr import runfolder
from geokr.checkpoint import list_checkpoints, load_latest
from geokr.distributed import Stopper
from geokr.metrics import LossError
from geokr.runfolder import RunFolder, save_checkpoint
from geokr.train import Plan, fit, train_step
from tests import geokr_toy as toy


def test_a_step_is_the_method_written_out():
    """Two steps of SGD with a teacher, against autograd on copies with nothing of the loop's in it."""
    chosen = toy.options("optim.name=sgd", "optim.momentum=0", "optim.lr=0.1", "optim.warmup=0", "optim.weight_decay=0")
    learner = toy.learner(chosen, steps=8)
    student, teacher = copy.deepcopy(learner.student), copy.deepcopy(learner.teacher)
    for step, batch in enumerate(itertools.islice(toy.stream(0, 8), 2), start=1):
        losses, ids = train_step(learner, [batch], step)
        images = (batch.images.float() - 125.0) / 60.0
        log_p = F.log_softmax(student(images), 1)
        with torch.no_grad():
            q = F.softmax(teacher(images), 1)
        supervision = F.kl_div(log_p, batch.fractions, reduction="batchmean")
        consistency = F.kl_div(log_p, q, reduction="batchmean")
        weight = 0.5 * math.exp(-5 * (1 - step / (0.4 * 8)) ** 2)  # both steps are in the ramp
        loss = supervision + weight * consistency
        gradients = torch.autograd.grad(loss, list(student.parameters()))
        rate = learner.learning_rate(step)
        with torch.no_grad():
            for parameter, gradient in zip(student.parameters(), gradients, strict=True):
                parameter -= rate * gradient
            alpha = (1 + step) / (10 + step)
            for mine, theirs in zip(teacher.state_dict().values(), student.state_dict().values(), strict=True):
                new = alpha * mine + (1 - alpha) * theirs if mine.is_floating_point() else theirs
                mine.copy_(new)
        np.testing.assert_allclose(losses.numpy(), [loss.item(), supervision.item(), consistency.item()], rtol=1e-5)
        assert ids[0].tolist() == batch.record_ids.tolist()
    for mine, theirs in ((learner.student, student), (learner.teacher, teacher)):
        for key, value in mine.state_dict().items():
            torch.testing.assert_close(value, theirs.state_dict()[key], rtol=1e-4, atol=1e-5, msg=key)


def test_without_consistency_the_teacher_averages_and_sees_nothing():
    chosen = toy.options("method.consistency=none", "optim.name=sgd", "optim.warmup=0")
    learner = replace(toy.learner(chosen), teacher_forward=lambda images: pytest.fail("the teacher was asked"))
    plain = toy.learner(toy.options("method.consistency_weight=0", "optim.name=sgd", "optim.warmup=0"))
    for step, batch in enumerate(itertools.islice(toy.stream(0, 8), 3), start=1):
        losses, _ = train_step(learner, [batch], step)
        expected, _ = train_step(plain, [batch], step)
        assert losses[2] == 0
        np.testing.assert_allclose(losses[:2].numpy(), expected[:2].numpy(), rtol=1e-6)
    for name in ("student", "teacher"):
        for mine, theirs in zip(getattr(learner, name).parameters(), getattr(plain, name).parameters(), strict=True):
            torch.testing.assert_close(mine, theirs)


def test_the_published_step_has_a_teacher_with_batch_statistics_that_hardly_moves():
    chosen = toy.options(
        "method.supervision=published", "method.consistency=published", "method.consistency_weight=1",
        "method.teacher_init=random", "method.teacher_mode=train", "method.teacher_alpha=0.95",
        "method.teacher_ramp=false", "method.teacher_schedule=published", "method.teacher_buffers=false",
    )  # fmt: skip
    learner = toy.learner(chosen)
    assert learner.teacher.training
    start = [p.clone() for p in learner.teacher.parameters()]
    batches = list(itertools.islice(toy.stream(0, 8), 3))
    train_step(learner, [batches[0]], 1)
    moved = [p.clone() for p in learner.teacher.parameters()]
    for now, before, theirs in zip(moved, start, learner.student.parameters(), strict=True):
        torch.testing.assert_close(now, 0.95 * before + 0.05 * theirs)
    for step in (2, 3):
        train_step(learner, [batches[step - 1]], step)
    assert all(torch.equal(now, p) for now, p in zip(moved, learner.teacher.parameters(), strict=True))
    assert int(learner.teacher.backbone.bn1.num_batches_tracked) == 3


def test_parts_of_a_batch_add_up_to_the_batch():
    """Without batch norm a step in four parts is the step at once."""
    chosen = ("model.backbone=test_vit", "optim.name=sgd", "optim.lr=0.05", "optim.warmup=0")
    whole = toy.learner(toy.options(*chosen))
    parts = toy.learner(toy.options(*chosen, "train.accumulate=4"))
    for step in (1, 2):
        a, _ = train_step(whole, itertools.islice(toy.stream(step - 1, 8), 1), step)
        b, ids = train_step(parts, itertools.islice(toy.stream(step - 1, 8, parts=4), 4), step)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        assert [len(part) for part in ids] == [2, 2, 2, 2]
    for x, y in zip(whole.student.parameters(), parts.student.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-5)


def test_clipping_bounds_the_step():
    chosen = ("optim.name=sgd", "optim.momentum=0", "optim.weight_decay=0", "optim.lr=1", "optim.warmup=0")
    learner = toy.learner(toy.options(*chosen, "train.clip_norm=0.01"))
    before = [p.clone() for p in learner.student.parameters()]
    train_step(learner, itertools.islice(toy.stream(0, 8), 1), 1)
    moved = torch.cat([(a - b).flatten() for a, b in zip(learner.student.parameters(), before, strict=True)])
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_and_keeps_its_state_in_float32(precision):
    learner = toy.learner(toy.options(f"train.precision={precision}"))
    exact = toy.learner(toy.options())
    for step, batch in enumerate(itertools.islice(toy.stream(0, 8), 3), start=1):
        half, _ = train_step(learner, [batch], step)
        full, _ = train_step(exact, [batch], step)
        torch.testing.assert_close(half, full, rtol=0.05, atol=0.02)
    assert {t.dtype for t in learner.student.state_dict().values()} <= {torch.float32, torch.int64}
    assert learner.scaler.is_enabled() == (precision == "fp16")


def test_an_fp16_overflow_skips_the_step_and_leaves_the_teacher():
    learner = toy.learner(toy.options("train.precision=fp16"))
    batches = list(itertools.islice(toy.stream(0, 8), 3))
    train_step(learner, [batches[0]], 1)
    learner.scaler.update(2.0**60)  # gradients of the next step overflow
    student, teacher = (copy.deepcopy(dict(m.named_parameters())) for m in (learner.student, learner.teacher))
    statistics = copy.deepcopy(dict(learner.teacher.named_buffers()))
    train_step(learner, [batches[1]], 2)
    assert learner.scaler.get_scale() == 2.0**59
    for before, model in ((student, learner.student), (teacher, learner.teacher)):
        assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    for name, buffer in learner.teacher.named_buffers():
        if buffer.is_floating_point():
            assert torch.equal(statistics[name], buffer)
    learner.scaler.update(2.0**8)
    train_step(learner, [batches[2]], 3)
    assert not torch.equal(student["head.weight"], learner.student.head.weight)


PLAN = Plan(steps=8, global_batch=8, log_every=3, validate_every=4, checkpoint_every=3)


class Session:
    """A run over toy batches in a folder, as the composition root would do it."""

    def __init__(self, folder, *overrides: str) -> None:
        self.lines: list[dict] = []
        self.validated = 0
        chosen = toy.options("model.drop_path=0.3", *overrides)
        self.folder = RunFolder(folder, toy.CPU)
        found = self.folder.previous("auto", {"who": 1})
        restore = None if found is None else lambda *parts: runfolder.restore(found, *parts)
        self.start = found.step if found else 0
        self.learner = toy.learner(chosen, restore=restore)
        self.window = toy.window()
        if found:
            self.window.restore(found.meta["window"])

    def run(self, stop_after: int | None = None, batches=None) -> bool:
        def save(step, window):
            save_checkpoint(self.folder, self.learner, window, step=step, keep=2, meta={"identity": {"who": 1}})

        def validate():
            self.validated += 1
            return {"val/kl": float(self.validated)}

        def tick(step):
            if step == stop_after:
                os.kill(os.getpid(), signal.SIGTERM)

        stopper = Stopper(toy.CPU)
        hooks = toy.hooks(save=save, validate=validate, tick=tick, record=self.lines.append)
        stream = batches or toy.stream(self.start, 8)
        try:
            with stopper.listening():
                return fit(self.learner, stream, PLAN, hooks, stopper, self.window, self.start)
        finally:
            self.folder.close()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    session = Session(tmp_path_factory.mktemp("whole"))
    assert session.run()
    return session


@pytest.mark.parametrize("stop", range(1, 8))
def test_stopped_anywhere_and_resumed_gives_the_same_bits(tmp_path, undisturbed, stop):
    first = Session(tmp_path)
    assert not first.run(stop_after=stop)
    again = Session(tmp_path)
    assert again.start == stop
    assert again.run()
    for name in ("student", "teacher"):
        assert toy.bits(getattr(again.learner, name)) == toy.bits(getattr(undisturbed.learner, name)), name
    kept = {"step", "samples", "lr", "loss", "loss/supervision", "loss/consistency"}
    lines = [{key: line[key] for key in kept} for line in first.lines + again.lines]
    assert lines == [{key: line[key] for key in kept} for line in undisturbed.lines]


def test_resumed_after_every_step_gives_the_same_bits(tmp_path, undisturbed):
    for stop in range(1, 8):
        assert not Session(tmp_path).run(stop_after=stop)
    last = Session(tmp_path)
    assert last.run()
    assert toy.bits(last.learner.teacher) == toy.bits(undisturbed.learner.teacher)


def test_lines_validation_and_checkpoints_come_when_due(undisturbed):
    assert [line["step"] for line in undisturbed.lines] == [3, 4, 6, 8]
    assert [line["step"] for line in undisturbed.lines if "val/kl" in line] == [4, 8]
    base = {"step", "samples", "loss", "loss/supervision", "loss/consistency", "lr", "img_per_s", "data_wait"}
    assert set(undisturbed.lines[0]) == base
    assert undisturbed.lines[-1]["samples"] == 64
    kept = [path.name for path in list_checkpoints(undisturbed.folder.checkpoints)]
    assert kept == ["step-00000008", "step-00000006"]


def test_it_learns(undisturbed):
    assert undisturbed.lines[-1]["loss/supervision"] < 0.7 * undisturbed.lines[0]["loss/supervision"]


def poisoned(step):
    for number, batch in enumerate(toy.stream(0, 8), start=1):
        if number == step:
            batch.fractions = batch.fractions.clone()
            batch.fractions[3, 1] = float("nan")
        yield batch


def test_a_loss_that_is_no_number_stops_with_its_records_and_keeps_the_last_checkpoint(tmp_path):
    session = Session(tmp_path)
    with pytest.raises(LossError) as caught:
        session.run(batches=poisoned(5))
    assert "step 5" in str(caught.value)
    assert "records 32 33 34 35 36 37 38 39" in str(caught.value)
    assert load_latest(tmp_path / "checkpoints").step == 3
    assert max(line["step"] for line in session.lines) == 4


def test_a_weight_that_is_no_number_is_not_saved(tmp_path):
    session = Session(tmp_path)
    with torch.no_grad():
        session.learner.teacher.head.bias[0] = float("inf")
    with pytest.raises(LossError, match="nothing was saved"):
        save_checkpoint(session.folder, session.learner, session.window, step=1, keep=2, meta={})
    session.folder.close()
    assert not list_checkpoints(tmp_path / "checkpoints")
