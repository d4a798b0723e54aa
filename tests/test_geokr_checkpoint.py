"""Checkpoints: whole or not there, damage found, nothing unpickled; and the state of an optimizer through them."""

import json
import os
import pickle

import pytest
import torch
from torch import nn

from geokr import checkpoint, state
from geokr.checkpoint import Checkpoint, CheckpointError
from geokr.config import build
from geokr.optim import build_optimizer
from geokr.options import OptimOptions


def make(step, value=1.0):
    tensors = {
        "a/weight": torch.full((3, 2), value),
        "count": torch.tensor(7),
        "half": torch.ones(2, dtype=torch.bfloat16),
    }
    return Checkpoint(tensors, {"step": step, "samples": step * 8, "identity": {"x": [1, "y"]}})


def flip(path, where=-1):
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(bytes(data))


def test_what_is_saved_comes_back(tmp_path):
    saved = make(400)
    path = checkpoint.save(tmp_path, saved, keep=2)
    assert path.name == "step-00000400"
    assert (tmp_path / "latest").read_text() == "step-00000400\n"
    assert sorted(p.name for p in path.iterdir()) == ["state.json", "state.safetensors"]
    loaded = checkpoint.load_latest(tmp_path)
    assert loaded.step == 400
    assert loaded.meta["identity"] == {"x": [1, "y"]}
    assert loaded.tensors.keys() == saved.tensors.keys()
    for name, tensor in saved.tensors.items():
        assert torch.equal(loaded.tensors[name], tensor)
        assert loaded.tensors[name].dtype == tensor.dtype


@pytest.mark.parametrize("umask", [0o022, 0o007])
def test_others_may_read_what_the_umask_lets_them(tmp_path, umask):
    before = os.umask(umask)
    try:
        path = checkpoint.save(tmp_path, make(10), keep=2)
    finally:
        os.umask(before)
    assert {p.name: p.stat().st_mode & 0o777 for p in path.iterdir()} == dict.fromkeys(
        ("state.json", "state.safetensors"), 0o666 & ~umask
    )


def test_the_newest_are_kept_and_remains_removed(tmp_path):
    (tmp_path / ".tmp-step-00000001-77").mkdir(parents=True)
    for step in (10, 20, 30):
        checkpoint.save(tmp_path, make(step), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000020", "step-00000030"]


def test_an_old_one_that_cannot_be_removed_ends_nothing(tmp_path, monkeypatch, caplog):
    """As on NFS, where an open file leaves a name behind."""

    def busy(path, *more, **how):
        if str(path).endswith("step-00000001"):
            raise OSError(39, "Directory not empty")
        return rmtree(path, *more, **how)

    rmtree = checkpoint.shutil.rmtree
    monkeypatch.setattr(checkpoint.shutil, "rmtree", busy)
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, make(step), keep=1)
    assert "step-00000001: the old checkpoint cannot be removed yet" in caplog.text
    assert checkpoint.load_latest(tmp_path).step == 3
    assert not (tmp_path / "step-00000002").exists()


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
@pytest.mark.parametrize("where", [0, 40, -3])
def test_a_damaged_one_falls_back_aloud(tmp_path, caplog, name, where):
    for step in (10, 20):
        checkpoint.save(tmp_path, make(step), keep=2)
    flip(tmp_path / "step-00000020" / name, where)
    assert checkpoint.load_latest(tmp_path).step == 10
    assert "step-00000020" in caplog.text
    assert "falling back" in caplog.text


def test_a_truncated_or_missing_file_falls_back(tmp_path):
    for step in (10, 20, 30):
        checkpoint.save(tmp_path, make(step), keep=3)
    os.truncate(tmp_path / "step-00000030" / "state.safetensors", 50)
    (tmp_path / "step-00000020" / "state.json").unlink()
    assert checkpoint.load_latest(tmp_path).step == 10


def test_none_sound_is_an_error_and_none_at_all_is_not(tmp_path):
    assert checkpoint.load_latest(tmp_path / "nothing") is None
    assert checkpoint.load_latest(tmp_path) is None
    checkpoint.save(tmp_path, make(10), keep=2)
    flip(tmp_path / "step-00000010" / "state.safetensors")
    with pytest.raises(CheckpointError, match="no sound checkpoint"):
        checkpoint.load_latest(tmp_path)
    for file in (tmp_path / "step-00000010").iterdir():
        file.unlink()
    (tmp_path / "step-00000010").rmdir()
    with pytest.raises(CheckpointError, match="it is gone"):
        checkpoint.load_latest(tmp_path)


def test_a_kill_while_saving_leaves_the_one_before(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, make(10), keep=2)
    calls = []

    def killed(*arguments):
        calls.append(arguments)
        raise KeyboardInterrupt

    for place in ("safetensors.torch.save_file", "geokr.checkpoint._flush", "pathlib.Path.rename"):
        with monkeypatch.context() as patch:
            patch.setattr(place, killed)
            with pytest.raises(KeyboardInterrupt):
                checkpoint.save(tmp_path, make(20), keep=2)
        assert checkpoint.load_latest(tmp_path).step == 10
    assert len(calls) == 3
    checkpoint.save(tmp_path, make(20), keep=2)
    assert checkpoint.load_latest(tmp_path).step == 20
    assert not list(tmp_path.glob(".tmp-*"))


def test_storage_that_cannot_be_written_is_named_and_loses_nothing(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, make(10), keep=2)

    def full(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    for place in ("safetensors.torch.save_file", "pathlib.Path.write_text"):
        with monkeypatch.context() as patch:
            patch.setattr(place, full)
            with pytest.raises(CheckpointError, match=r"step-00000020: cannot be written.*No space left"):
                checkpoint.save(tmp_path, make(20), keep=2)
        assert checkpoint.load_latest(tmp_path).step == 10
        assert not list(tmp_path.glob(".tmp-*"))


def test_a_kill_before_latest_moves_still_finds_the_new_one(tmp_path):
    checkpoint.save(tmp_path, make(10), keep=2)
    checkpoint.save(tmp_path, make(20), keep=2)
    (tmp_path / "latest").write_text("step-00000010\n")
    assert checkpoint.load_latest(tmp_path).step == 20


def test_a_step_that_is_done_again_replaces_the_damaged_one(tmp_path):
    checkpoint.save(tmp_path, make(10), keep=2)
    flip(tmp_path / "step-00000010" / "state.json", 30)
    checkpoint.save(tmp_path, make(10, value=5.0), keep=2)
    assert checkpoint.load_latest(tmp_path).tensors["a/weight"][0, 0] == 5.0


def test_damaged_ones_of_later_steps_do_not_count_among_those_kept(tmp_path):
    """A run that went back behind two damaged checkpoints must not prune its own new one as the oldest."""
    for step in (10, 20, 30):
        checkpoint.save(tmp_path, make(step), keep=3)
    for step in (20, 30):
        flip(tmp_path / f"step-000000{step}" / "state.safetensors")
    assert checkpoint.load_latest(tmp_path).step == 10
    for step in (12, 14, 16):
        checkpoint.save(tmp_path, make(step), keep=2)
        assert checkpoint.load_latest(tmp_path).step == step
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["step-00000016", "step-00000014"]


def test_a_pickle_in_a_checkpoints_place_is_not_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    path = checkpoint.save(tmp_path / "c", make(10), keep=2)
    for name in ("state.safetensors", "state.json"):
        (path / name).write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError):
        checkpoint.load_latest(tmp_path / "c")
    assert not (tmp_path / "executed").exists()


def test_another_format_is_refused_by_name(tmp_path):
    path = checkpoint.save(tmp_path, make(10), keep=2)
    meta = json.loads((path / "state.json").read_text())
    meta["format"] = 99
    meta["digest"] = checkpoint._digest(meta)
    (path / "state.json").write_text(json.dumps(meta))
    with pytest.raises(CheckpointError, match="format 99"):
        checkpoint.load_latest(tmp_path)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "lamb"])
def test_an_optimizer_goes_on_as_if_it_had_not_stopped(tmp_path, name):
    def fresh():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
        model.to(memory_format=torch.channels_last)
        return model, build_optimizer(model, build(OptimOptions, {"name": name}, "test"), torch.device("cpu"))[0]

    def steps(model, optimizer, numbers):
        for number in numbers:
            torch.manual_seed(number)
            optimizer.zero_grad()
            model(torch.randn(2, 3, 4, 4)).square().sum().backward()
            optimizer.step()

    model, optimizer = fresh()
    steps(model, optimizer, range(6))
    other, first = fresh()
    steps(other, first, range(3))
    tensors, numbers = state.optimizer_state(first, other)
    tensors |= state.model_tensors("model", other)
    checkpoint.save(tmp_path, Checkpoint(tensors, {"step": 3, "optimizer": numbers}), keep=2)
    loaded = checkpoint.load_latest(tmp_path)
    again, second = fresh()
    state.load_model("model", again, loaded.tensors)
    state.load_optimizer(second, again, loaded.tensors, loaded.meta["optimizer"])
    steps(again, second, range(3, 6))
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    kinds = {"exp_avg", "exp_avg_sq", "step"} if name != "sgd" else {"momentum_buffer"}
    assert {key.split("/")[1] for key in tensors if key.startswith("optimizer/")} == kinds


def test_a_state_of_another_model_is_an_error():
    tensors = state.model_tensors("student", nn.Linear(3, 2))
    with pytest.raises(CheckpointError, match="does not fit"):
        state.load_model("student", nn.Linear(4, 2), tensors)


def test_finite_or_not():
    good = {"a": torch.ones(2), "n": torch.tensor(3)}
    assert state.all_finite(good)
    assert not state.all_finite(good | {"b": torch.tensor([1.0, float("nan")])})
    assert not state.all_finite(good | {"b": torch.tensor(float("inf"))})
    assert state.all_finite({})
    huge = torch.full((8,), 3e38)
    assert not huge.sum().isfinite()
    assert state.all_finite({"sums to more than float32 holds": huge, "c": torch.full((9,), 6e4).half()})
    assert not state.all_finite({"a": huge, "b": torch.tensor([1.0, -float("inf"), float("inf")])})
