"""Rows 33 to 35: processes killed, terminated and frozen at random moments of a run.

The moments come from seeds, the machine's own timing adds to them. Every run is compared with an undisturbed one of
the same number of processes: final weights and optimizer in every bit, every step's losses.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.faults.runs import arguments, equal_bits, finish, last_step, saved_step, seeded
from tests.faults.zygote import PATIENCE_S, ROOT, Child, wait_until

TOTAL = 30
LONG = (f"train.max_steps={TOTAL}",)
KILLS = 50


@pytest.fixture(scope="module")
def undisturbed(zygote, records, tmp_path_factory):
    """The folder of an undisturbed run of so many processes."""
    made: dict[int, Path] = {}

    def folder(size: int) -> Path:
        if size not in made:
            path = tmp_path_factory.mktemp("undisturbed") / str(size)
            finish(zygote.ranks(size, arguments(records, path, *LONG)))
            made[size] = path
        return made[size]

    return folder


# --------------------------------------------------------------------------------- row 33: one rank is killed


START = "M parameters)"  # what a run says first


def _inode(folder: Path) -> int:
    """Of the metrics' file, which every start writes anew."""
    path = folder / "metrics.jsonl"
    return path.stat().st_ino if path.exists() else 0


def _went_on(folder: Path, agent: Child) -> bool:
    """Whether a step has been done since the last start."""
    resumed = re.findall(r"after step (\d+)", agent.said().rsplit(START, 1)[1])
    return last_step(folder) > int(resumed[0] if resumed else 0)


def kill_ranks(agent: Child, folder: Path, steps: list[int], pick, tally) -> int:
    """Kills a worker of torchrun's agent when the run has come to each of the steps; how often it could."""
    for done, step in enumerate(steps):
        with contextlib.suppress(AssertionError):  # the run may end before
            wait_until(lambda step=step: last_step(folder) >= step, agent, f"step {step}")
        time.sleep(pick.uniform(0, 0.03))
        workers = agent.children()
        if agent.ended.is_set() or len(workers) < 2:
            return done
        starts, old, begin = agent.said().count(START), _inode(folder), time.monotonic()
        pick.choice(workers).kill()
        tally.inject(33, "SIGKILL of one of two processes under torchrun")
        with contextlib.suppress(AssertionError):
            wait_until(lambda n=starts: agent.said().count(START) > n, agent, "the restart")
            wait_until(lambda old=old: _inode(folder) != old and _went_on(folder, agent), agent, "a step after it")
            tally.recovery_s.append(time.monotonic() - begin)
    return len(steps)


def kill_campaign(zygote, records, undisturbed, tally, tmp_path, kills: int, each: int) -> None:
    pick, done, run = seeded("kill"), 0, 0
    while done < kills:
        run += 1
        assert run < 3 * kills, "too few of the kills came in time"
        folder, wanted = tmp_path / str(run), min(each, kills - done)
        steps = sorted(pick.sample(range(1, TOTAL - 1), wanted))
        agent = zygote.torchrun(2, wanted, arguments(records, folder, *LONG, "checkpoint.every_steps=3"))
        killed = kill_ranks(agent, folder, steps, pick, tally)
        assert agent.wait() == 0, agent.said()
        tally.resumed(equal_bits(folder, undisturbed(2)), killed)
        done += killed


def test_a_killed_process_costs_a_restart_and_no_bit(zygote, records, undisturbed, tally, tmp_path):
    kill_campaign(zygote, records, undisturbed, tally, tmp_path, kills=1, each=1)


@pytest.mark.parametrize("run", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 8))])
def test_killed_while_a_checkpoint_is_being_written(zygote, records, undisturbed, tally, tmp_path, run):
    """The training is steps ahead of the disk when it is killed: it goes on from the checkpoint before."""
    given, pick = arguments(records, tmp_path, *LONG), seeded(f"writing {run}")
    child = zygote.train(given, inject="slow_flush:0.2,slow_steps:0.02")
    checkpoints = tmp_path / "checkpoints"
    wait_until(lambda: list(checkpoints.glob(".tmp-step-00000008-*")), child, "the second checkpoint's writing")
    time.sleep(pick.uniform(0, 0.3))
    child.send(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    tally.inject(36, "SIGKILL of a training process while its checkpoint is being written")
    assert list(checkpoints.glob(".tmp-*")), "killed too late"
    assert saved_step(tmp_path) == 4
    finish([zygote.train(given)])
    assert not list(checkpoints.glob(".tmp-*"))
    tally.resumed(equal_bits(tmp_path, undisturbed(1)))


@pytest.mark.slow
def test_one_process_killed_at_fifty_random_steps(zygote, records, undisturbed, tally, tmp_path):
    kill_campaign(zygote, records, undisturbed, tally, tmp_path, kills=KILLS, each=5)


def trainers(pid: int) -> list[psutil.Process]:
    """The training processes below a launcher, torchrun itself left out."""
    lines = [(child, child.cmdline()) for child in psutil.Process(pid).children(recursive=True)]
    return [child for child, line in lines if "geokr.pretrain" in line and "torch.distributed.run" not in line]


@pytest.mark.slow
def test_under_the_launcher_itself(records, undisturbed, tally, tmp_path):
    """launch/pretrain_8gpu.sh, its processes started as users start them."""
    pick, folder = seeded("launcher"), tmp_path / "run"
    given = arguments(records, folder, *LONG, "checkpoint.every_steps=3")
    environment = {**os.environ, "PYTHON": sys.executable, "NGPU": "2", "RESTARTS": "3", "OMP_NUM_THREADS": "1"}
    config = tmp_path / "empty.yaml"
    config.write_text("train: {device: cpu}\n")
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            ["bash", "launch/pretrain_8gpu.sh", "--config", str(config), *given],
            cwd=ROOT,
            env=environment,
            stderr=log,
            stdout=log,
        )
        for number, step in enumerate((3, 12, 20), start=1):
            deadline = time.monotonic() + PATIENCE_S
            while last_step(folder) < step:
                assert process.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.002)
            pick.choice(trainers(process.pid)).kill()
            tally.inject(33, "SIGKILL of one of two processes under launch/pretrain_8gpu.sh")
            while (tmp_path / "log").read_text().count(START) <= number:
                assert process.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.01)
        assert process.wait(PATIENCE_S) == 0, (tmp_path / "log").read_text()
    tally.resumed(equal_bits(folder, undisturbed(2)), 3)


# ----------------------------------------------------------------------------- row 34: all are terminated


def terminate(children: list[Child], folder: Path, pick) -> bool:
    """SIGTERM to every process at a random moment of the run; whether it came before the end.

    Asserts that all end with 143 after one step and with a checkpoint of it.
    """
    step = pick.randrange(1, TOTAL - 3)
    wait_until(lambda: last_step(folder) >= step, children[0], f"step {step}")
    time.sleep(pick.uniform(0, 0.05))
    before = last_step(folder)
    for child in pick.sample(children, len(children)):
        child.send(signal.SIGTERM)
        time.sleep(pick.choice((0.0, 0.002)))
    statuses = [child.wait() for child in children]
    if statuses == [0] * len(children):
        return False
    assert statuses == [143] * len(children), "\n".join(child.said() for child in children)
    assert "the same command goes on from it" in children[0].said()
    assert saved_step(folder) == last_step(folder) >= before
    return True


def term_campaign(zygote, records, undisturbed, tally, tmp_path, stops: int, size: int) -> None:
    pick, done, run = seeded(f"term {size}"), 0, 0
    while done < stops:
        run += 1
        assert run < 3 * stops, "too few of the signals came in time"
        folder = tmp_path / str(run)
        given = arguments(records, folder, *LONG)
        stopped = terminate(zygote.ranks(size, given), folder, pick)
        finish(zygote.ranks(size, given))
        if stopped:
            tally.inject(34, f"SIGTERM of a run of {size} process(es)")
            tally.resumed(equal_bits(folder, undisturbed(size)))
            done += 1


def test_a_terminated_run_saves_and_goes_on(zygote, records, undisturbed, tally, tmp_path):
    term_campaign(zygote, records, undisturbed, tally, tmp_path, stops=1, size=2)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_terminated_at_fifty_random_moments(zygote, records, undisturbed, tally, tmp_path, size):
    term_campaign(zygote, records, undisturbed, tally, tmp_path, stops=KILLS // 2, size=size)


@pytest.mark.slow
def test_terminated_while_the_disk_is_slow(zygote, records, undisturbed, tally, tmp_path):
    """The signal comes while a checkpoint is being written: it is finished, and one of the moment follows."""
    pick = seeded("slow disk")
    for number in range(5):
        folder = tmp_path / str(number)
        given = arguments(records, folder, *LONG)
        child = zygote.train(given, inject="slow_disk:0.5")
        wait_until(lambda folder=folder: last_step(folder) >= 4, child, "the first checkpoint")
        time.sleep(pick.uniform(0, 0.4))
        child.send(signal.SIGTERM)
        assert child.wait() == 143, child.said()
        assert saved_step(folder) == last_step(folder)
        finish([zygote.train(given)])
        tally.inject(34, "SIGTERM while a checkpoint is being written")
        tally.resumed(equal_bits(folder, undisturbed(1)))


@pytest.mark.slow
@pytest.mark.parametrize(("second", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 1)])
def test_a_second_signal(zygote, records, undisturbed, tally, tmp_path, second, status):
    """SIGTERM again changes nothing; Ctrl-C after a second ends the run at once. Neither costs anything saved."""
    given = arguments(records, tmp_path, *LONG, "checkpoint.every_steps=1")
    child = zygote.train(given, inject="slow_steps:3")
    wait_until(lambda: last_step(tmp_path) >= 1, child, "a step")
    child.send(signal.SIGTERM)
    time.sleep(1.3)
    child.send(second)
    assert child.wait() == status, child.said()
    assert saved_step(tmp_path) == (2 if second == signal.SIGTERM else 1)
    finish([zygote.train(given)])
    tally.inject(34, f"{second.name} after SIGTERM")
    tally.resumed(equal_bits(tmp_path, undisturbed(1)))


# --------------------------------------------------------------------------------- row 35: one rank freezes


@pytest.mark.slow
def test_a_frozen_process_ends_the_others_in_time(zygote, records, undisturbed, tally, tmp_path):
    """Nobody waits longer than train.collective_timeout_s and 30 s for a process that is stopped."""
    given = arguments(records, tmp_path, *LONG, "train.collective_timeout_s=5")
    ranks = zygote.ranks(2, given, inject="slow_steps:0.05")
    wait_until(lambda: last_step(tmp_path) >= 3, ranks[0], "a step")
    ranks[1].send(signal.SIGSTOP)
    begin = time.monotonic()
    tally.inject(35, "one of two processes frozen")
    assert ranks[0].wait(60) == 1, ranks[0].said()
    assert time.monotonic() - begin < 5 + 30
    ranks[1].send(signal.SIGCONT)
    assert ranks[1].wait(60) == 1, ranks[1].said()
    finish(zygote.ranks(2, arguments(records, tmp_path, *LONG)))
    tally.resumed(equal_bits(tmp_path, undisturbed(2)))
