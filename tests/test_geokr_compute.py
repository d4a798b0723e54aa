"""The step waits for nothing, and what CUDA graphs ask of the code around them holds."""

import contextlib

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from geokr.compute import Recorded
from geokr.config import ConfigError
from geokr.distributed import World
from geokr.metrics import Window
from geokr.speedups import _graph_obstacle
from geokr.train import train_step
from tests import geokr_toy as toy

# What fetches a number from a device, whatever the code that asks for it looks like.
FETCHES = {"aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::nonzero", "aten::equal"}


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["train.precision=bf16", "train.clip_norm=1.0"],
        ["optim.name=lamb", "method.consistency=none"],
        ["optim.name=sgd", "method.teacher_mode=train", "method.teacher_schedule=published"],
        ["train.accumulate=2", "model.drop_path=0.1", "model.backbone=test_convnext"],
    ],
)
def test_a_step_fetches_nothing_from_the_device(overrides, monkeypatch):
    """All but torch's optimizers: on a CPU they read their counts, which on CUDA test_gpu.py forbids them too."""
    options = toy.options(*overrides)
    learner, window = toy.learner(options), Window(toy.CPU)
    parts = options.train.accumulate
    stream = toy.stream(0, 8, parts)
    batches = [next(stream) for _ in range(parts)]
    monkeypatch.setattr(learner.optimizer, "step", lambda: None)
    window.add(1, *train_step(learner, batches, 1))
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for step in (2, 3):
            window.add(step, *train_step(learner, batches, step))
    names = {event.key: event.count for event in found.key_averages()}
    assert "aten::convolution" in names
    assert not FETCHES & names.keys()


def test_a_recording_that_fails_is_an_error_only_where_it_was_asked_for(monkeypatch, caplog):
    class Broken:
        def __init__(self, *_: object, **__: object) -> None:
            raise RuntimeError("CUDA graphs: not here")

    for name in ("CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, Broken if name == "graph" else lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr("geokr.compute._on_a_side_stream", lambda learner, batch: "as it comes")
    stream = toy.stream(0, 8)
    for required in (False, True):
        learner, recorded = toy.learner(toy.options()), Recorded(required=required)
        assert [recorded(learner, [next(stream)]) for _ in range(3)] == ["as it comes"] * 3
        if required:
            with pytest.raises(ConfigError, match=r"train.cuda_graph=on: a step cannot be recorded here .*not here"):
                recorded(learner, [next(stream)])
        else:
            computed = recorded(learner, [next(stream)])
            assert computed.losses.shape == (3,)
            assert not recorded.works
            assert recorded(learner, [next(stream)]).skipped is None
            assert "going on without" in caplog.text


@pytest.mark.parametrize(
    ("overrides", "size", "precision", "reason"),
    [
        ([], 1, "bf16", None),
        (["optim.name=lamb"], 1, "bf16", None),
        ([], 1, "fp16", None),
        (["optim.name=lamb"], 1, "fp16", "the loss scaler's verdict"),
        (["optim.implementation=foreach"], 1, "fp16", "the loss scaler's verdict"),
        (["optim.implementation=apex"], 1, "bf16", "apex"),
        (["train.accumulate=2"], 1, "bf16", "several parts"),
        ([], 2, "bf16", "several processes"),
    ],
)
def test_what_is_not_recorded(overrides, size, precision, reason):
    chosen, world = toy.options(*overrides), World(torch.device("cuda"), size=size)
    found = _graph_obstacle(chosen, world, precision, changing=False)
    assert found is None if reason is None else found is not None and reason in found
    cropped = _graph_obstacle(chosen, world, precision, changing=True)
    assert cropped is not None
    assert ("augment.crop_probability" if reason in (None, "apex", "the loss scaler's verdict") else reason) in cropped


def test_a_recording_that_fails_leaves_the_loss_scaler_as_it_was(monkeypatch):
    """Else the step that follows would take its scaled gradients for unscaled ones."""
    keys = ["train.precision=fp16", "optim.name=sgd", "optim.implementation=foreach"]
    plain, learner = toy.learner(toy.options(*keys)), toy.learner(toy.options(*keys))
    scaler_step, calls = learner.scaler.step, []

    def stops_halfway(optimizer: torch.optim.Optimizer) -> object:
        calls.append(optimizer)
        if len(calls) == 1:  # as while recording, where it may not wait for the device
            learner.scaler.unscale_(optimizer)
            raise RuntimeError("not here")
        return scaler_step(optimizer)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr("geokr.compute._UNRECORDED", 0)
    monkeypatch.setattr(learner.scaler, "step", stops_halfway)
    for model in (learner.student, plain.student):
        model.eval()  # so that the pass that was recorded in vain leaves no trace in running statistics
    batch = next(toy.stream(0, 8))
    Recorded(required=False)(learner, [batch])
    plain.compute(plain, [batch])
    assert len(calls) == 2
    assert toy.bits(learner.student) == toy.bits(plain.student)


def test_a_recorded_step_reads_its_batch_from_fixed_places(monkeypatch):
    """A stand-in for the graph that runs the step again, as a replay does."""

    class Graph:
        def __init__(self) -> None:
            self.again = lambda: None

        def replay(self) -> None:
            self.again()

    class Recording:
        def __init__(self, graph: Graph, **_: object) -> None:
            self.graph = graph

        def __enter__(self) -> None:
            self.before = {name: value.clone() for name, value in learner.student.state_dict().items()}

        def __exit__(self, *_: object) -> None:
            learner.student.load_state_dict(self.before)  # recording executes nothing

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Recording)
    monkeypatch.setattr("geokr.compute._UNRECORDED", 0)
    learner = toy.learner(toy.options("model.condition_on_colour=true"))
    recorded, stream = Recorded(required=True), toy.stream(0, 8)
    first, second = next(stream), next(stream)
    second.weights = torch.linspace(0.5, 1.5, 8)
    recorded(learner, [first])
    seen = []
    recorded._graph.again = lambda: seen.append(recorded._places.images.clone())
    computed = recorded(learner, [second])
    assert torch.equal(seen[0], second.images)
    assert seen[0].is_contiguous(memory_format=torch.channels_last) == second.images.is_contiguous(
        memory_format=torch.channels_last
    )
    for name in ("fractions", "weights", "colour_changes"):
        assert torch.equal(getattr(recorded._places, name), getattr(second, name)), name
    assert np.array_equal(computed.ids[0], second.record_ids)
