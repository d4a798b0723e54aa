"""Two machines, for real: torchrun's rendezvous over a cable that can be pulled, processes frozen and killed.

The everyday suite trains over the cable once; ``-m slow`` does the harm, and prints a line of JSON for each fault.
Rows 33 and 35 of the fault table: the same weights after a kill, an error on both machines within the collective
timeout plus 30 s otherwise, and no process left.
"""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from geokr.checkpoint import list_checkpoints
from tests.faults.conftest import Tally
from tests.faults.hosts import Pair, two_hosts, why_not
from tests.test_geokr_distributed import torchrun
from tests.test_geokr_pretrain import keys, same_tensors

REASON = why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
TIMEOUT_S = 20.0
LONG = (
    "train.max_steps=100000",
    "validation.every_steps=100000",
    "optim.schedule=constant",
    "optim.warmup=0",
    "method.consistency_ramp=0",
)
FAULTY = (*LONG, f"train.collective_timeout_s={TIMEOUT_S:g}", "checkpoint.every_steps=5")
FINITE = ("train.max_steps=200", "validation.every_steps=200", "checkpoint.every_steps=5")


@pytest.fixture(scope="module")
def straight(records, tmp_path_factory):
    """The finite run on one machine, undisturbed."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    done = torchrun(2, "-m", "geokr.pretrain", *keys(records, folder, *FINITE))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def pair():
    with two_hosts() as made:
        yield made


def wait_for(condition: Callable[[], object], pair: Pair, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, pair.logs()
        assert all(host.process.poll() is None for host in pair.hosts), pair.logs()
        time.sleep(0.01)


def saved(folder: Path) -> int:
    """The step of the newest checkpoint, 0 where there is none."""
    return max((int(path.name[5:]) for path in list_checkpoints(folder / "checkpoints")), default=0)


def report(tally: Tally, row: int, fault: str, **figures: object) -> None:
    tally.inject(row, fault)
    print(json.dumps({"row": row, "fault": fault, "injections": 1, **figures}))


def test_two_machines_train_to_the_weights_of_one(records, pair, tmp_path):
    pair.start(tmp_path, keys(records, tmp_path / "two"))
    assert [status for status, _ in pair.wait(240)] == [0, 0], pair.logs()
    assert pair.left() == []
    done = torchrun(2, "-m", "geokr.pretrain", *keys(records, tmp_path / "one"))
    assert done.returncode == 0, done.stderr
    assert same_tensors(tmp_path / "two", tmp_path / "one")


def end_in_error(pair: Pair, tally: Tally, fault: str) -> None:
    """Both machines end with an error in time and leave nothing running."""
    limit = TIMEOUT_S + 30
    ended = pair.wait(limit)
    assert all(status not in (0, 143) for status, _ in ended), pair.logs()
    assert pair.left() == []
    report(tally, 35, fault, ended_s=[round(seconds, 1) for _, seconds in ended], limit_s=limit, orphans=0)


@pytest.mark.slow
@pytest.mark.parametrize("restarts", [0, 2])
def test_a_pulled_cable(records, pair, tally, tmp_path, restarts):
    pair.start(tmp_path, keys(records, tmp_path / "run", *FAULTY), f"--restarts={restarts}", "--silence=10")
    wait_for(lambda: saved(tmp_path / "run"), pair)
    pair.hosts[1].pull_the_cable()
    end_in_error(pair, tally, f"pulled cable, {restarts} restarts allowed")
    assert "has not been heard of for 10 s" in pair.logs()


@pytest.mark.slow
@pytest.mark.parametrize("host", [0, 1])
def test_a_frozen_process(records, pair, tally, tmp_path, host):
    pair.start(tmp_path, keys(records, tmp_path / "run", *FAULTY))
    wait_for(lambda: saved(tmp_path / "run"), pair)
    os.kill(pair.hosts[host].worker, signal.SIGSTOP)
    end_in_error(pair, tally, f"frozen process on machine {host}")
    assert "Timed out" in pair.logs()


@pytest.mark.slow
@pytest.mark.parametrize("host", [0, 1])
def test_a_killed_process_is_replaced(records, straight, pair, tally, tmp_path, host):
    pair.start(tmp_path, keys(records, tmp_path / "run", *FINITE), "--restarts=2")
    wait_for(lambda: saved(tmp_path / "run"), pair)
    worker, before = pair.hosts[host].worker, time.monotonic()
    os.kill(worker, signal.SIGKILL)
    step = saved(tmp_path / "run")
    wait_for(lambda: saved(tmp_path / "run") > step + 5, pair)
    recovery = time.monotonic() - before
    assert [status for status, _ in pair.wait(300)] == [0, 0], pair.logs()
    assert "resuming" in pair.logs()
    tally.recovery_s.append(recovery)
    tally.resumed(same_tensors(tmp_path / "run", straight))
    report(tally, 33, f"killed process on machine {host}", recovery_s=round(recovery, 1), same_weights=True)


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "host"), [("agent", 0), ("agent", 1), ("supervisor", 0), ("supervisor", 1)])
def test_a_killed_launcher_ends_both_machines_and_the_same_command_goes_on(
    records, straight, pair, tally, tmp_path, victim, host
):
    limited = (*FINITE, f"train.collective_timeout_s={TIMEOUT_S:g}")
    pair.start(tmp_path, keys(records, tmp_path / "run", *limited))
    wait_for(lambda: saved(tmp_path / "run"), pair)
    os.kill(getattr(pair.hosts[host], victim), signal.SIGKILL)
    limit = TIMEOUT_S + 30
    ended = pair.wait(limit)
    assert all(status != 0 for status, _ in ended), pair.logs()
    wait_for_end = time.monotonic() + limit - max(seconds for _, seconds in ended)
    while pair.left():  # a killed supervisor's torchrun still writes its checkpoint
        assert time.monotonic() < wait_for_end, pair.logs()
        time.sleep(0.02)
    before = time.monotonic()
    step = saved(tmp_path / "run")
    pair.start(tmp_path, keys(records, tmp_path / "run", *limited))
    wait_for(lambda: saved(tmp_path / "run") > step, pair)
    recovery = time.monotonic() - before
    assert [status for status, _ in pair.wait(300)] == [0, 0], pair.logs()
    tally.recovery_s.append(recovery)
    tally.resumed(same_tensors(tmp_path / "run", straight))
    report(
        tally,
        35,
        f"killed {'torchrun' if victim == 'agent' else victim} on machine {host}",
        ended_s=[round(seconds, 1) for _, seconds in ended],
        limit_s=limit,
        orphans=0,
        recovery_s=round(recovery, 1),
        same_weights=True,
    )
