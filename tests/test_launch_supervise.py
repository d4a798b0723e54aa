"""launch/supervise.py: signals reach what trains, nothing outlives the launcher. Small scripts stand for torchrun."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import supervise

ROOT = Path(__file__).parents[1]
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="orphans are found with Linux's prctl")

# A torchrun in small: starts workers in sessions of their own, passes SIGTERM on, ends with status 1 after it.
AGENT = """
import os, signal, subprocess, sys, time
folder, kind, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
workers = [subprocess.Popen([sys.executable, "-c", WORKER, folder, kind], start_new_session=True) for _ in range(count)]
open(folder + "/agent", "w").write(str(os.getpid()))
def stop(number, frame):
    if kind == "deaf":
        return
    for worker in workers:
        worker.send_signal(number)
    for worker in workers:
        worker.wait()
    sys.exit(1)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
if kind == "dies":
    time.sleep(0.5)
    os._exit(9)
if kind == "stuck":
    workers[0].kill()
    time.sleep(60)
while any(worker.poll() is None for worker in workers) or kind == "deaf":
    time.sleep(0.02)
sys.exit(max((abs(worker.returncode) for worker in workers), default=0))
"""
WORKER = """
import os, signal, sys, time
folder, kind = sys.argv[1:]
seen = []
signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
open(f"{folder}/worker-{os.getpid()}", "w").close()
while not seen or kind == "deaf":
    if kind == "short":
        sys.exit(3)
    time.sleep(0.02)
time.sleep(0.4)
open(f"{folder}/checkpoint-{os.getpid()}", "w").write(f"{seen[0]} {signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN}")
sys.exit(143)
"""
SCRIPT = f"WORKER = {WORKER!r}\n{AGENT}"


def start(folder: Path, kind: str, count: int, *options: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "launch" / "supervise.py"), *options, "--", sys.executable, "-c", SCRIPT]
    process = subprocess.Popen([*command, str(folder), kind, str(count)], stderr=subprocess.PIPE, text=True)
    if kind not in ("short", "dies"):
        wait_for(lambda: (folder / "agent").exists() and len(list(folder.glob("worker-*"))) == count, process)
    return process


def wait_for(condition, process, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.02)


def pids(folder: Path) -> list[int]:
    return [int(path.name.split("-")[1]) for path in folder.glob("worker-*")]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return (
        Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
        if os.path.exists(f"/proc/{pid}/stat")
        else True
    )


def no_orphans(folder: Path) -> bool:
    every = [*pids(folder), *([int((folder / "agent").read_text())] if (folder / "agent").exists() else [])]
    return not any(alive(pid) for pid in every)


def test_the_status_is_the_commands(tmp_path):
    process = start(tmp_path, "short", 2)
    assert process.wait(30) == 3
    assert subprocess.run([sys.executable, "launch/supervise.py", "--", "true"], cwd=ROOT).returncode == 0
    assert subprocess.run([sys.executable, "launch/supervise.py"], cwd=ROOT, capture_output=True).returncode == 2


@pytest.mark.parametrize(
    ("sent", "received", "status"),
    [
        (signal.SIGTERM, signal.SIGTERM, 143),
        (signal.SIGUSR1, signal.SIGTERM, 143),
        (signal.SIGHUP, signal.SIGTERM, 143),
        (signal.SIGINT, signal.SIGINT, 130),
    ],
)
def test_a_signal_becomes_a_checkpoint_of_every_process(tmp_path, sent, received, status):
    process = start(tmp_path, "ordinary", 2)
    process.send_signal(sent)
    assert process.wait(30) == status, process.stderr.read()
    notes = [path.read_text() for path in tmp_path.glob("checkpoint-*")]
    assert notes == [f"{int(received)} True"] * 2
    assert no_orphans(tmp_path)


def test_a_warning_sent_to_every_process_does_no_harm(tmp_path):
    """Schedulers signal all processes of a step, not its first one only."""
    process = start(tmp_path, "ordinary", 2)
    for pid in [*(child.pid for child in supervise.descendants(process.pid)), process.pid]:
        os.kill(pid, signal.SIGUSR1)
    assert process.wait(30) == 143
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2


@linux
def test_a_launcher_that_dies_of_a_second_sigterm_does_not_cost_the_checkpoint(tmp_path):
    process = start(tmp_path, "ordinary", 2)
    agent = int((tmp_path / "agent").read_text())
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    os.kill(agent, signal.SIGKILL)
    assert process.wait(30) == 143
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2
    assert no_orphans(tmp_path)


def test_what_does_not_listen_is_killed_when_its_time_is_over(tmp_path):
    process = start(tmp_path, "deaf", 2, "--grace", "1")
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    assert 0.9 < time.monotonic() - begin < 8
    assert "killing what is left" in process.stderr.read()
    assert no_orphans(tmp_path)


@linux
@pytest.mark.parametrize("how", ["exits", "killed"])
def test_a_launcher_that_dies_leaves_no_orphans(tmp_path, how):
    process = start(tmp_path, "dies" if how == "exits" else "ordinary", 2)
    if how == "killed":
        os.kill(int((tmp_path / "agent").read_text()), signal.SIGKILL)
    assert process.wait(30) == (9 if how == "exits" else 137)
    assert no_orphans(tmp_path)
    assert "left behind" in process.stderr.read()


@linux
def test_killed_itself_it_takes_the_rest_with_it(tmp_path):
    process = start(tmp_path, "ordinary", 2)
    process.kill()
    process.wait()
    end = time.monotonic() + 20
    while not no_orphans(tmp_path):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2


def test_a_launcher_that_does_not_notice_the_end_of_its_processes_is_ended(tmp_path):
    (tmp_path / "short.py").write_text(
        "import sys; from launch import supervise; supervise.STUCK_S = 1.0;sys.exit(supervise.main())"
    )
    command = [
        sys.executable,
        str(tmp_path / "short.py"),
        "--",
        sys.executable,
        "-c",
        SCRIPT,
        str(tmp_path),
        "stuck",
        "2",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert "has not noticed for 1 s: it is stuck" in done.stderr
    assert no_orphans(tmp_path)


def test_processes_are_found_without_proc(monkeypatch):
    child = subprocess.Popen(["sleep", "20"])
    try:
        by_ps = supervise._from_ps()
        if not by_ps:
            pytest.skip("ps is not installed")
        assert any(process.pid == child.pid and process.parent == os.getpid() for process in by_ps)
        monkeypatch.setattr(supervise.os.path, "exists", lambda path: False)
        assert child.pid in [process.pid for process in supervise.descendants(os.getpid())]
    finally:
        child.kill()
        child.wait()
