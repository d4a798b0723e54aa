"""Rows 42, 43, 46 and 50: losses that are no numbers, overflow on one rank, too little memory, replicas that drift."""

import re

import pytest

from geokr import pretrain
from geokr.checkpoint import load_latest
from geokr.state import all_finite
from tests.faults.runs import arguments, equal_bits, finish, last_step, saved, saved_step


def named_records(message: str) -> list[int]:
    return [int(number) for number in re.findall(r"records ((?:\d+ ?)+)", message)[0].split()]


# ------------------------------------------------------------------------------------- row 42: not a number


@pytest.mark.parametrize("every", [1, 3])
def test_a_learning_rate_that_is_far_too_high(records, tally, tmp_path, capsys, every):
    """It ends with the batch's records, or with a weight that is no number; what was saved before stays sound."""
    given = arguments(records, tmp_path, "optim.name=sgd", "optim.lr=1e25", f"checkpoint.every_steps={every}")
    assert pretrain.main(given) == 1
    message = capsys.readouterr().err
    tally.inject(42, "weights driven to infinity by the learning rate")
    assert "not a finite number" in message
    if "the loss of step" in message:
        assert len(named_records(message)) == 8
    found = load_latest(tmp_path / "checkpoints")
    assert found is None or all_finite(found.tensors)


@pytest.mark.parametrize("step", [pytest.param(3, marks=pytest.mark.slow), 4, pytest.param(5, marks=pytest.mark.slow)])
def test_a_loss_on_one_of_two_processes(zygote, records, tally, tmp_path, step):
    """Both stop; the one whose loss it was names its four records, the other says whose they are."""
    (tmp_path / "ids").mkdir()
    ranks = zygote.ranks(
        2,
        arguments(records, tmp_path, "data.loader=torch", "log.every_steps=2", "checkpoint.every_steps=2"),
        inject=f"bad_loss:{step}/1,note_records:{tmp_path / 'ids'}",
    )
    assert [child.wait() for child in ranks] == [1, 1]
    tally.inject(42, "a loss of one of two processes is not a number")
    first, second = (child.said() for child in ranks)
    assert f"the loss of step {step} is not a finite number, in records" in second
    assert f"the loss of step {step} is not a finite number, in another process" in first
    seen = [int(number) for number in (tmp_path / "ids" / f"{step}-1").read_text().split()]
    assert named_records(second) == seen
    assert len(seen) == 4
    assert saved_step(tmp_path) == 2 * ((step - 1) // 2)
    assert all_finite(saved(tmp_path))


# ----------------------------------------------------------------------------------- row 43: fp16 overflows


def states(folder, step: int) -> list[list[float]]:
    """Loss scale and models' bits before a step: [scale, student, its weights, teacher, its weights] a process."""
    return [[float(x) for x in path.read_text().split()] for path in sorted(folder.glob(f"{step}-*"))]


def test_an_overflow_on_one_of_two_processes(zygote, records, tally, tmp_path):
    """Both skip the step and halve the scale, the teacher stays; scale and all come back on resume."""
    (tmp_path / "notes").mkdir()
    run = ("train.precision=fp16", "optim.lr=1e-4", "train.max_steps=8", "checkpoint.every_steps=5")
    given = arguments(records, tmp_path / "run", *run)
    inject = f"overflow:4/1,note_scaler:{tmp_path / 'notes'}"
    finish(zygote.ranks(2, given, inject=inject))
    tally.inject(43, "a gradient of one of two processes overflows")
    before, after, later = (states(tmp_path / "notes", step) for step in (4, 5, 6))
    for rank in (0, 1):
        assert after[rank][0] == before[rank][0] / 2
        assert after[rank][2] == before[rank][2], "the student moved"
        assert after[rank][4] == before[rank][4], "the teacher moved"
        assert after[rank][3] == before[rank][3], "the teacher's statistics moved"
        assert later[rank][2] != after[rank][2]
        assert later[rank][4] != after[rank][4]
    assert before[0][2:] == before[1][2:]
    assert later[0][2:] == later[1][2:]
    found = load_latest(tmp_path / "run" / "checkpoints")
    assert found is not None
    assert found.meta["scaler"]["scale"] == after[0][0]
    assert found.meta["scaler"]["_growth_tracker"] == 4
    resumed = tmp_path / "resumed"
    finish(zygote.ranks(2, arguments(records, resumed, *run, "train.max_steps=5"), inject=inject))
    finish(zygote.ranks(2, arguments(records, resumed, *run)))
    tally.resumed(equal_bits(resumed, tmp_path / "run"))


# ------------------------------------------------------------------------------------- row 46: out of memory


def test_a_batch_that_does_not_fit(zygote, records, tally, tmp_path):
    """A real limit on the address space, and the remedy it names tried."""
    big = ("data.global_batch=4096", "train.max_steps=2")  # more than a gigabyte of activations
    child = zygote.train(arguments(records, tmp_path, *big), inject="limit_memory:700")
    status, message = child.wait(), child.said()
    tally.inject(46, "no memory for the batch")
    assert status == 1, message
    assert "Traceback" not in message
    assert "4096 images at once in each process do not fit the memory: try train.accumulate=2" in message


def test_a_validation_that_does_not_fit(records, tally, tmp_path, monkeypatch, capsys):
    def full(*arguments, **keywords):
        raise MemoryError("Unable to allocate 3.00 GiB")

    monkeypatch.setattr(pretrain, "validate", full)
    assert pretrain.main(arguments(records, tmp_path, "validation.batch=6")) == 1
    tally.inject(46, "no memory for the validation")
    assert "validation.batch=6 images at once do not fit the memory: try validation.batch=3" in capsys.readouterr().err


# ------------------------------------------------------------------------------------- row 50: replicas drift


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_one_bit_of_one_weight_of_one_process(zygote, records, tally, tmp_path, rank):
    """Found at the next checkpoint, which is not written; the one before is what a restart goes on from."""
    ranks = zygote.ranks(2, arguments(records, tmp_path), inject=f"drift:6/{rank}")
    assert [child.wait() for child in ranks] == [1, 1]
    tally.inject(50, "a bit of one process's weights flipped")
    for child in ranks:
        assert "the replicas have drifted apart" in child.said()
        assert "Traceback" not in child.said()
    assert saved_step(tmp_path) == 4
    assert last_step(tmp_path) == 8


# ------------------------------------------------------------------------------------ nobody waits for a disk


@pytest.mark.slow
def test_no_other_process_waits_for_the_disk_of_the_first(zygote, records, tally, tmp_path):
    (tmp_path / "times").mkdir()
    given = arguments(records, tmp_path / "run", "checkpoint.every_steps=3", "train.max_steps=6")
    finish(zygote.ranks(2, given, inject=f"slow_disk:3,note_saves:{tmp_path / 'times'}"))
    held = {path.name: float(path.read_text()) for path in (tmp_path / "times").iterdir()}
    assert held["3-0"] < 2, "process 0 does not wait for what its thread writes"
    assert held["3-1"] < 2
    assert held["6-1"] < 2
    assert saved_step(tmp_path / "run") == 6
