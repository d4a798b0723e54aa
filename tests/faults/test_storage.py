"""Rows 44 and 45: storage that hangs, and shards that do not go evenly into processes."""

import re
import time

import pytest

from geokr.metrics import read_metrics
from tests.datasets import make_dataset
from tests.faults.runs import arguments, equal_bits, finish, losses, saved_step

LOADERS = ["torch", pytest.param("dali", marks=pytest.mark.slow)]


@pytest.mark.parametrize("loader", LOADERS)
def test_storage_that_hangs_for_one_of_two_processes(zygote, records, tally, tmp_path, loader):
    """An error with the shard's name after data.read_timeout_s; the other process ends too; the run goes on later."""
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    short = ("train.max_steps=20", "data.read_timeout_s=1", "train.collective_timeout_s=20", f"data.loader={loader}")
    ranks = zygote.ranks(2, arguments(records, tmp_path / "a", *short), inject="stall:5/1,slow_steps:0.05")
    begin = time.monotonic()
    assert [child.wait() for child in ranks] == [1, 1]
    tally.inject(44, "storage stops answering one of two processes")
    assert time.monotonic() - begin < 60
    first, second = (child.said() for child in ranks)
    assert re.search(r"error: .*train-0000\d\.tfrecord: no answer from storage", second), second
    assert "error: another process ended or did not answer" in first
    assert "Traceback" not in first + second
    assert saved_step(tmp_path / "a") >= 4
    for folder in ("a", "b"):
        finish(zygote.ranks(2, arguments(records, tmp_path / folder, *short)))
    tally.resumed(equal_bits(tmp_path / "a", tmp_path / "b"))


@pytest.mark.slow
def test_a_full_disk_ends_every_process(zygote, records, tally, tmp_path):
    """The thread's error reaches the loop of process 0, which says so; the other says that it is gone."""
    given = arguments(records, tmp_path)
    ranks = zygote.ranks(2, given, inject="full_disk:8")
    assert [child.wait() for child in ranks] == [1, 1]
    tally.inject(6, "no room for a checkpoint of two processes")
    first, second = (child.said() for child in ranks)
    assert "step-00000008: cannot be written" in first
    assert "make room" in first
    assert "error: another process ended" in second
    assert "Traceback" not in first + second
    assert saved_step(tmp_path) == 4
    finish(zygote.ranks(2, given))
    finish(zygote.ranks(2, arguments(records, tmp_path / "straight")))
    tally.resumed(equal_bits(tmp_path, tmp_path / "straight"))


SHARDS = {"one shard": 100, "uneven shards": 15, "a shard a record": 1}


@pytest.mark.parametrize(
    "shards", ["one shard", *(pytest.param(name, marks=pytest.mark.slow) for name in list(SHARDS)[1:])]
)
def test_shards_that_do_not_go_into_the_processes(zygote, tally, tmp_path, shards):
    """Two processes and a validation of an odd number of tiles: as many steps in both, the figures of one process."""
    data = make_dataset(tmp_path / "d", tiles=37, val=5, shard_records=SHARDS[shards])
    run = ("validation.every_steps=6", "train.max_steps=6", "model.drop_path=0", "validation.batch=2")
    for size in (1, 2):
        finish(zygote.ranks(size, arguments(data, tmp_path / str(size), *run)))
    tally.inject(45, f"two processes, {shards}")
    one, two = (losses(tmp_path / str(size)) for size in (1, 2))
    assert [line[0] for line in one] == [line[0] for line in two] == [1, 2, 3, 4, 5, 6]
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=5e-3, abs=5e-4)
    figures = [read_metrics(tmp_path / str(size) / "metrics.jsonl")[-1] for size in (1, 2)]
    for key in ("val/kl", "val/kl_student", "val/mae", "val/kl_prior"):
        assert figures[0][key] == pytest.approx(figures[1][key], rel=5e-3), key
