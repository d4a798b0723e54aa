"""A packer that is killed, stopped, doubled, or whose workers die (rows 1 to 4 and 9)."""

import contextlib
import shutil
import signal
import time

import psutil
import pytest

from tests.faults.packing import files, make_jobs, seeded


@pytest.fixture(scope="module")
def jobs(packers, tmp_path_factory):
    return make_jobs(packers, tmp_path_factory.mktemp("jobs"))


def kill_before(job, out, change, packing):
    child = job.run(job.fresh(out), f"die_before:{change}/tmp/none")
    assert child.wait() == -signal.SIGKILL, child.said()
    packing.inject(1, f"SIGKILL before a change to the disk ({job.name})")
    packing.right(job.sound(out), "what a killed packer left is not sound")
    job.finish(out, packing)


@pytest.mark.parametrize("name", ["new", "append"])
def test_killed_before_some_changes(jobs, tmp_path, packing, name):
    job = jobs[name]
    chosen = seeded(name).sample(range(1, job.changes + 1), 5)
    for change in [*chosen, job.changes]:
        kill_before(job, tmp_path / f"out{change}", change, packing)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["new", "append"])
def test_killed_before_every_change(jobs, tmp_path, packing, name):
    for change in range(1, jobs[name].changes + 1):
        kill_before(jobs[name], tmp_path / f"out{change}", change, packing)


def kill_at_random(job, out, rng, packing):
    """Up to three times, then to the end."""
    job.fresh(out)
    for _ in range(rng.randint(1, 3)):
        child = job.run(out)
        if not child.ended.wait(rng.uniform(0, 1.1 * job.seconds)):
            child.send(signal.SIGKILL)
            child.wait()
            packing.inject(1, f"SIGKILL at a random moment ({job.name})")
            packing.right(job.sound(out), "what a killed packer left is not sound")
    job.finish(out, packing)


def test_killed_at_random_moments(jobs, tmp_path, packing):
    rng = seeded("random")
    before = packing.injected.total()
    for number in range(4):
        kill_at_random(jobs["new" if number % 2 else "append"], tmp_path / f"out{number}", rng, packing)
    assert packing.injected.total() > before


@pytest.mark.slow
def test_killed_at_many_random_moments(jobs, tmp_path, packing):
    rng = seeded("many")
    before = packing.injected.total()
    number = 0
    while packing.injected.total() < before + 200:
        kill_at_random(jobs["new" if number % 2 else "append"], tmp_path / f"out{number}", rng, packing)
        number += 1


def stop(job, out, number, status, rng, packing):
    while (child := job.run(out)).ended.wait(rng.uniform(0.1, 0.9) * job.seconds):
        shutil.rmtree(out)  # it was faster than that
    child.send(number)
    packing.inject(2, f"{signal.Signals(number).name} at a random moment")
    begin = time.monotonic()
    # 0 where it had ended in the meantime; the signal's own where it came before the command had taken it over
    assert child.wait() in (status, 0, -number), child.said()
    assert time.monotonic() - begin < 30
    assert "Traceback" not in child.said()
    packing.right(job.sound(out), "what a stopped packer left is not sound")
    job.finish(out, packing)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stopped(jobs, tmp_path, packing, number, status):
    stop(jobs["new"], tmp_path / "out", number, status, seeded(f"stop {status}"), packing)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stopped_at_many_moments(jobs, tmp_path, packing, number, status):
    rng = seeded(f"stops {status}")
    for time_ in range(25):
        stop(jobs["new"], tmp_path / f"out{time_}", number, status, rng, packing)


def two_at_once(job, out, rng, packing):
    job.fresh(out)
    first = job.run(out)
    time.sleep(rng.uniform(0, job.seconds))
    second = job.run(out)
    statuses = first.wait(), second.wait()
    packing.inject(3, f"a second packer beside the first ({job.name})")
    assert 0 in statuses, (first.said(), second.said())
    for child, status in zip((first, second), statuses, strict=True):
        assert status == 0 or (status == 1 and "another process is packing into it" in child.said()), child.said()
    packing.resumed(files(out) == job.expected)


def test_two_packers(jobs, tmp_path, packing):
    two_at_once(jobs["new"], tmp_path / "out", seeded("two"), packing)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["new", "append"])
def test_two_packers_many_times(jobs, tmp_path, packing, name):
    rng = seeded(f"twos {name}")
    for number in range(15):
        two_at_once(jobs[name], tmp_path / f"out{number}", rng, packing)


def test_the_lock_of_a_dead_packer(jobs, tmp_path, packing):
    """Killed while it holds the lock; its .work/lock is still there."""
    job, out = jobs["new"], tmp_path / "out"
    child = job.run(out)
    while not (out / ".work/plan.json").exists():
        assert not child.ended.is_set()
        time.sleep(0.001)
    child.send(signal.SIGKILL)
    child.wait()
    assert (out / ".work/lock").exists()
    packing.inject(4, "SIGKILL of the lock's owner")
    job.finish(out, packing)


def kill_workers(job, out, times, rng, packing):
    """A run with two processes loses some of them; it replaces them and ends well."""
    child = job.run(out, "", "workers=2")
    for _ in range(times):
        deadline = time.monotonic() + 60
        while not (workers := child.children()) and not child.ended.is_set():
            assert time.monotonic() < deadline, child.said()
            time.sleep(0.01)
        child.ended.wait(rng.uniform(0, 1))
        if workers and not child.ended.is_set():
            with contextlib.suppress(psutil.NoSuchProcess):  # it fell with the one that was killed before
                rng.choice(workers).kill()
                packing.inject(9, "SIGKILL of a worker")
    assert child.wait() == 0, child.said()
    packing.resumed(files(out) == job.expected)


@pytest.mark.slow
def test_workers_die(jobs, tmp_path, packing):
    rng = seeded("workers")
    for number in range(10):
        kill_workers(jobs["new"], tmp_path / f"out{number}", 2, rng, packing)
