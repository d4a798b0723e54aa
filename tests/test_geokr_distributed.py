"""Several processes. What needs them runs in geokr_ranks.py under torchrun, on gloo."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from geokr import distributed
from geokr.config import ConfigError
from geokr.distributed import Stopper, World, choose_device, set_threads, world_from

ROOT = Path(__file__).parents[1]


def torchrun(processes: int, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([*command, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)


def test_collectives_batch_norm_gradients_and_stopping_over_two_processes():
    done = torchrun(2, "tests/geokr_ranks.py", "2")
    assert done.returncode == 0, done.stderr
    assert "all checks passed" in done.stdout


def test_one_process_needs_no_group():
    with world_from({}, "cpu", 60.0) as world:
        assert (world.rank, world.size, world.main) == (0, 1, True)
        assert not torch.distributed.is_initialized()
        tensor = torch.arange(3.0)
        assert world.sum(tensor) is tensor
        assert torch.equal(world.mean(tensor), torch.arange(3.0))
        world.barrier()
        world.check_replicas([tensor], "nothing")


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto", 0) == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"train\.device=auto"):
        choose_device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto", 1) == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match="has 2 GPU"):
        choose_device("auto", 2)
    assert choose_device("cpu", 5) == torch.device("cpu")


def test_threads_are_a_share_of_the_cores(monkeypatch):
    before = torch.get_num_threads()
    try:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
        assert set_threads(None, 3) == torch.get_num_threads() == 2
        assert set_threads(None, 8) == 1
        assert set_threads(1, 1) == torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_a_world_writes_from_its_first_process_only():
    assert World(torch.device("cpu"), rank=0, size=4).main
    assert not World(torch.device("cpu"), rank=3, size=4).main


def test_a_signal_passed_on_twice_is_one_and_a_later_ctrl_c_is_impatience(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(distributed.time, "monotonic", lambda: clock[0])
    stopper = Stopper(World(torch.device("cpu")))
    with stopper.listening():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # the terminal's, then torchrun's
        signal.raise_signal(signal.SIGTERM)
        clock[0] += 5.0
        signal.raise_signal(signal.SIGTERM)  # the scheduler's reminder
        assert stopper.signal == signal.SIGINT
        assert stopper.poll()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_processes_meet_under_one_name_on_all_machines(monkeypatch):
    """Machines that restart together may have counted different numbers of restarts."""
    made = torch.distributed.HashStore()
    monkeypatch.setattr(distributed, "rendezvous", lambda url, timeout: iter([(made, 0, 2)]))
    for count in ("0", "1"):
        own = {"TORCHELASTIC_USE_AGENT_STORE": "False", "TORCHELASTIC_RESTART_COUNT": count}
        distributed._store(own, 1.0).set(f"own {count}", "x")
        distributed._store({**own, "TORCHELASTIC_USE_AGENT_STORE": "True"}, 1.0).set("shared", count)
    assert made.check(["own 0"])
    assert made.check(["own 1"])
    assert not made.check(["shared"])
    assert [made.get(f"geokr/{count}/shared") for count in (0, 1)] == [b"0", b"1"]
