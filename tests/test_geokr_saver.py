"""Checkpoints in the background: what is written is the moment of the call, one at a time, and no error is lost."""

import threading
import time

import pytest
import torch

from geokr import checkpoint
from geokr.checkpoint import CheckpointError, list_checkpoints, load_latest
from geokr.metrics import read_metrics
from geokr.runfolder import RunFolder
from geokr.saver import Saver, Snapshot
from tests import geokr_toy as toy
from tests.datasets import make_dataset
from tests.test_geokr_pretrain import run


class Gate:
    """Holds every checkpoint's writing up until it is opened, like a disk that hangs."""

    def __init__(self, monkeypatch) -> None:
        self.open, self.reached, self.writers, self.most = threading.Event(), threading.Event(), 0, 0
        self._save = checkpoint.save
        monkeypatch.setattr(checkpoint, "save", self)

    def __call__(self, *arguments):
        self.writers += 1
        self.most = max(self.most, self.writers)
        self.reached.set()
        assert self.open.wait(60)
        try:
            return self._save(*arguments)
        finally:
            self.writers -= 1


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("records") / "d", tiles=24, val=4)


@pytest.fixture
def gate(monkeypatch):
    return Gate(monkeypatch)


@pytest.fixture
def saver(tmp_path):
    made = Saver(tmp_path)
    yield made
    made.close()


def tensors(value: float) -> dict[str, torch.Tensor]:
    nchw = torch.full((2, 3, 4, 4), value) + torch.arange(4)
    return {
        "channels_last": nchw.to(memory_format=torch.channels_last),
        "half": torch.full((5,), value).bfloat16(),
        "count": torch.tensor(int(value)),
    }


def test_it_goes_on_at_once_and_the_checkpoint_is_of_the_moment_of_the_call(saver, gate, tmp_path):
    given = tensors(3.0)
    saver.save(given, {"step": 1}, keep=2)
    assert gate.reached.wait(60)
    saver.poll()
    for tensor in given.values():
        tensor.zero_()
    assert not list_checkpoints(tmp_path)
    gate.open.set()
    saver.wait()
    loaded = load_latest(tmp_path).tensors
    for name, tensor in tensors(3.0).items():
        assert torch.equal(loaded[name], tensor), name
        assert loaded[name].dtype == tensor.dtype


def test_one_at_a_time_and_the_wait_is_counted(saver, gate, tmp_path):
    saver.save(tensors(1.0), {"step": 1}, keep=3)
    threading.Timer(0.3, gate.open.set).start()
    begin = time.perf_counter()
    with saver.holding():
        saver.save(tensors(2.0), {"step": 2}, keep=3)
    waited = time.perf_counter() - begin
    assert waited > 0.25
    assert saver.take_held() == pytest.approx(waited, abs=0.05)
    assert saver.take_held() == 0.0
    saver.save(tensors(3.0), {"step": 3}, keep=3)
    saver.wait()
    assert gate.most == 1
    assert [float(checkpoint.load(path).tensors["half"][0]) for path in list_checkpoints(tmp_path)] == [3.0, 2.0, 1.0]


def test_memory_is_used_again():
    snapshot = Snapshot()
    first, _ = snapshot.take(tensors(1.0))
    places = {name: tensor.data_ptr() for name, tensor in first.items()}
    grown = tensors(2.0) | {"momentum": torch.ones(3)}
    second, _ = snapshot.take(grown)
    assert {name: second[name].data_ptr() for name in places} == places
    assert all(torch.equal(second[name], tensor) and second[name].is_contiguous() for name, tensor in grown.items())


def test_an_error_is_raised_once_at_the_next_poll_or_save(saver, monkeypatch, tmp_path):
    def full(*arguments):
        raise CheckpointError("no space left")

    saver.save(tensors(1.0), {"step": 1}, keep=2)
    saver.wait()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", full)
        for ask in (saver.wait, saver.poll, lambda: saver.save(tensors(3.0), {"step": 3}, keep=2)):
            saver.save(tensors(2.0), {"step": 2}, keep=2)
            deadline = time.monotonic() + 60
            while not saver._writing.done():
                assert time.monotonic() < deadline
                time.sleep(0.001)
            with pytest.raises(CheckpointError, match="no space left"):
                ask()
            saver.poll()
    assert load_latest(tmp_path).step == 1
    saver.save(tensors(4.0), {"step": 4}, keep=2)
    saver.wait()
    assert load_latest(tmp_path).step == 4


def test_a_folder_is_let_go_only_when_nothing_is_written_to_it(tmp_path, gate, caplog):
    folder = RunFolder(tmp_path, toy.CPU)
    folder.saver.save(tensors(1.0), {"step": 1}, keep=2)
    threading.Timer(0.2, gate.open.set).start()
    folder.close()
    assert load_latest(folder.checkpoints).step == 1
    RunFolder(tmp_path, toy.CPU).close()  # the lock is free
    assert not caplog.records


def test_an_error_at_the_end_is_told_where_another_one_ends_the_run(tmp_path, monkeypatch, caplog):
    def full(*arguments):
        raise CheckpointError("no space left")

    monkeypatch.setattr(checkpoint, "save", full)
    folder = RunFolder(tmp_path, toy.CPU)
    folder.saver.save(tensors(1.0), {"step": 1}, keep=2)
    folder.close()
    assert "no space left" in caplog.text


def test_a_full_disk_stops_the_run_at_the_next_step_and_the_checkpoint_before_stays(
    records,
    tmp_path,
    monkeypatch,
    capsys,
):
    save = checkpoint.safetensors.torch.save_file

    def full(given, path, *metadata):
        if "step-00000006" in str(path):
            raise OSError(28, "No space left on device")
        save(given, path, *metadata)

    monkeypatch.setattr(checkpoint.safetensors.torch, "save_file", full)
    each = ("checkpoint.every_steps=3", "log.every_steps=1", "train.max_steps=40")
    assert run(records, tmp_path, *each) == 1
    message = capsys.readouterr().err
    assert "step-00000006: cannot be written" in message
    assert "make room" in message
    assert load_latest(tmp_path / "checkpoints").step == 3
    assert 6 <= read_metrics(tmp_path / "metrics.jsonl")[-1]["step"] <= 9, "no later than at the next checkpoint"
    monkeypatch.undo()
    assert run(records, tmp_path, *each, "train.max_steps=7") == 0, "goes on once there is room"


def test_a_run_ends_only_with_its_last_checkpoint_on_the_disk(records, tmp_path, monkeypatch, caplog):
    save = checkpoint.save

    def slow(*arguments):
        time.sleep(0.4)
        return save(*arguments)

    monkeypatch.setattr(checkpoint, "save", slow)
    assert run(records, tmp_path, "train.max_steps=3") == 0
    assert load_latest(tmp_path / "checkpoints").step == 3


def test_a_full_disk_at_the_last_checkpoint_is_an_error(records, tmp_path, monkeypatch, capsys):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.safetensors.torch, "save_file", full)
    assert run(records, tmp_path, "train.max_steps=2") == 1
    assert "step-00000002: cannot be written" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_from_a_gpu_later_steps_do_not_change_what_is_saved(tmp_path):
    saver = Saver(tmp_path)
    weights = {f"w{i}": torch.randn(1024, 1024, 2, 2, device="cuda") for i in range(16)}
    weights["w0"] = weights["w0"].to(memory_format=torch.channels_last)
    before = {name: tensor.cpu() for name, tensor in weights.items()}
    busy = torch.randn(4096, 4096, device="cuda")
    for step in (1, 2):
        for _ in range(20):
            busy = torch.tanh(busy @ busy)  # the GPU is behind, so that every copy is still to be made
        begin = time.perf_counter()
        saver.save(weights, {"step": step}, keep=2)
        took = time.perf_counter() - begin
        for tensor in weights.values():
            tensor.add_(1.0)
        saver.wait()
        loaded = load_latest(tmp_path).tensors
        for name, tensor in before.items():
            torch.testing.assert_close(loaded[name], tensor + (step - 1), rtol=0, atol=0 if step == 1 else 1e-6)
    assert took < 0.1, "the second snapshot, into memory that is there, waited for the GPU"
    saver.close()
