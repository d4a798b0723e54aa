"""Panels change nothing of what is trained."""

from types import SimpleNamespace

import numpy as np
import pytest

from geokr import panels
from geokr.recorder import Recorder
from tests import geokr_toy as toy


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_panels_leave_both_models_as_they_were(monkeypatch, tmp_path, mode):
    """Else a teacher in training mode would move its statistics, on the process that draws alone."""
    learner, drawn = toy.learner(toy.options(f"method.teacher_mode={mode}")), []
    before = [toy.bits(model) for model in (learner.student, learner.teacher)]
    monkeypatch.setattr(panels, "draw_panels", lambda found, *_: drawn.extend(found))
    monkeypatch.setattr(panels, "write_png", lambda *_: None)
    facts = SimpleNamespace(band_names=("red", "green", "blue"), manifest=SimpleNamespace(classes=()))
    recorder = object.__new__(Recorder)
    recorder._count, recorder._facts, recorder._folder, recorder._board = 3, facts, tmp_path, None
    recorder.panel(learner, 1, toy.make_batch(np.arange(8)))
    assert len(drawn) == 3
    assert [toy.bits(model) for model in (learner.student, learner.teacher)] == before
    assert learner.student.training
    assert learner.teacher.training == (mode == "train")


def test_the_step_of_the_last_validation_is_known(tmp_path):
    """A checkpoint may be later than the figures that it carries."""
    recorder = object.__new__(Recorder)
    recorder._sinks, recorder.validation, recorder.validated = [], {}, 0
    for line in ({"step": 2, "loss": 1.0}, {"step": 4, "val/kl": 0.5}, {"step": 6, "loss": 1.0}):
        recorder.record(line)
    assert (recorder.validation, recorder.validated) == ({"val/kl": 0.5}, 4)
