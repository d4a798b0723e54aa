"""Rows 36 to 38: killed at every change that saving makes to the disk, and every byte of a checkpoint damaged."""

import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from geokr import checkpoint
from geokr.checkpoint import CheckpointError, list_checkpoints, load, load_latest
from tests.faults.injections import toy_checkpoint

HERE = "tests.faults.injections:"


def is_sound(found: checkpoint.Checkpoint) -> bool:
    """Whether it is, in every bit, the checkpoint that was made for its step."""
    made = toy_checkpoint(found.step)
    same = all(torch.equal(found.tensors[name], tensor) for name, tensor in made.tensors.items())
    return same and found.tensors.keys() == made.tensors.keys() and made.meta.items() <= found.meta.items()


def check_after_kill(folder: Path, tally) -> int:
    """The step that a resume goes on from; and the next save leaves no remains."""
    found = load_latest(folder)
    tally.right(is_sound(found), f"step {found.step} is not what was saved")
    checkpoint.save(folder, toy_checkpoint(40), keep=2)
    assert load_latest(folder).step == 40
    assert len(list_checkpoints(folder)) == 2
    assert not list(folder.glob(".*"))
    return found.step


@pytest.fixture
def two_before(tmp_path) -> Path:
    for step in (10, 20):
        checkpoint.save(tmp_path / "c", toy_checkpoint(step), keep=2)
    return tmp_path / "c"


def test_killed_before_every_change_to_the_disk(zygote, tally, two_before, tmp_path):
    """The checkpoint before counts until the new one is renamed, and from then on the new one."""
    calls = zygote.start(HERE + "save_and_die", str(shutil.copytree(two_before, tmp_path / "whole")), 30, 0).wait()
    assert calls > 20, "changes to the disk were not seen"
    steps = []
    for call in range(1, calls + 1):
        folder = shutil.copytree(two_before, tmp_path / str(call))
        assert zygote.start(HERE + "save_and_die", str(folder), 30, call).wait() == -signal.SIGKILL
        tally.inject(36, "SIGKILL before a change that saving makes to the disk")
        steps.append(check_after_kill(folder, tally))
    assert steps == sorted(steps)
    assert set(steps) == {20, 30}


def _strace(arguments: list[str], pid: int, log: Path) -> subprocess.Popen:
    return subprocess.Popen(["strace", "-f", "-p", str(pid), "-o", str(log), *arguments], stderr=subprocess.DEVNULL)


def _traced_save(zygote, folder: Path, log: Path, *arguments: str) -> int:
    """Runs a save under strace; its exit status."""
    child = zygote.start(HERE + "save_when_told", str(folder), 30)
    status = Path(f"/proc/{child.pid}/status")
    deadline = time.monotonic() + 60
    while "T (stopped)" not in status.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.002)
    tracer = _strace(list(arguments), child.pid, log)
    while "TracerPid:\t0" in status.read_text():
        if tracer.poll() is not None:
            child.kill_all()
            pytest.skip("this machine lets no process trace another")
        time.sleep(0.002)
    child.send(signal.SIGCONT)
    result = child.wait()
    tracer.wait(60)
    return result


CHANGES = "openat,write,pwrite64,writev,ftruncate,fallocate,fsync,mkdir,rename,renameat,renameat2,unlink,unlinkat,rmdir"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_killed_at_every_system_call_that_changes_the_disk(zygote, tally, two_before, tmp_path):
    """The same seen from the kernel: what the tensors' writer and Python's files do is all there."""
    log = tmp_path / "log"
    assert _traced_save(zygote, shutil.copytree(two_before, tmp_path / "whole"), log, "-e", f"trace={CHANGES}") == 0
    made = Counter(line.split("(")[0].split()[-1] for line in log.read_text().splitlines() if "(" in line)
    assert made["fsync"] >= 6
    assert sum(made[name] for name in ("write", "pwrite64", "writev")) >= 3
    steps = set()
    for name, times in made.items():
        if name not in CHANGES.split(","):
            continue
        for number in range(1, times + 1):
            folder = shutil.copytree(two_before, tmp_path / f"{name}-{number}")
            injected = f"inject={name}:signal=SIGKILL:when={number}"
            status = _traced_save(zygote, folder, log, "-e", f"trace={name}", "-e", injected)
            assert status in (-signal.SIGKILL, 0), status  # 0: the call came after the save, as the process ended
            tally.inject(36, "SIGKILL at a system call of saving", int(status != 0))
            steps.add(check_after_kill(folder, tally))
    assert steps == {20, 30}


def damaged_is_found(path: Path, step: int, tally) -> bool:
    """Whether loading finds the damage; fails if it gives anything but an error or the very same state."""
    try:
        found = load(path)
    except CheckpointError:
        return True
    tally.right(found.step == step and is_sound(found), "damage was read as a checkpoint")
    return False


@pytest.mark.parametrize(
    "masks", [(0x01,), pytest.param((0x02, 0x04, 0x08, 0x10, 0x20, 0x40, 0x80, 0xFF), marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", [checkpoint.TENSORS, checkpoint.NUMBERS])
def test_every_byte_flipped(tally, tmp_path, name, masks):
    path = checkpoint.save(tmp_path, toy_checkpoint(10), keep=2)
    data = (path / name).read_bytes()
    found = 0
    for where in range(len(data)):
        for mask in masks:
            (path / name).write_bytes(data[:where] + bytes([data[where] ^ mask]) + data[where + 1 :])
            found += damaged_is_found(path, 10, tally)
    tried = len(data) * len(masks)
    tally.inject(37, "byte of a checkpoint flipped", tried)
    assert found > 0.8 * tried, f"{found} of {tried}"
    if name == checkpoint.TENSORS:
        assert found == tried
    (path / name).write_bytes(data)
    assert is_sound(load(path))


def test_cut_at_every_length_or_gone(tally, tmp_path):
    for name in (checkpoint.TENSORS, checkpoint.NUMBERS):
        path = checkpoint.save(tmp_path, toy_checkpoint(10), keep=2)
        data = (path / name).read_bytes()
        for length in range(len(data)):
            (path / name).write_bytes(data[:length])
            assert damaged_is_found(path, 10, tally) or data[length:].isspace(), (name, length)
        (path / name).unlink()
        assert damaged_is_found(path, 10, tally)
        tally.inject(37, "file of a checkpoint cut short", len(data) + 1)


def test_files_of_two_checkpoints_do_not_pass_as_one(tally, tmp_path):
    a, b = (checkpoint.save(tmp_path / str(step), toy_checkpoint(step), keep=2) for step in (10, 20))
    shutil.copy(b / checkpoint.TENSORS, a / checkpoint.TENSORS)
    tally.inject(37, "tensors of another checkpoint")
    assert damaged_is_found(a, 10, tally)


def test_the_pointer_for_people_is_never_trusted(tally, two_before):
    """``latest`` damaged, dangling, or pointing out of the folder: resuming looks at the folders themselves."""
    for text in ("", "step-00000010\n", "step-99999999\n", "../../etc\n", "\x00" * 9):
        (two_before / checkpoint.LATEST).write_text(text)
        assert load_latest(two_before).step == 20
        tally.inject(37, "pointer to the latest checkpoint damaged")
    (two_before / checkpoint.LATEST).unlink()
    assert load_latest(two_before).step == 20


def test_all_damaged_is_an_error_and_never_a_start_from_scratch(tally, two_before):
    for path in list_checkpoints(two_before):
        os.truncate(path / checkpoint.TENSORS, 30)
    tally.inject(38, "every checkpoint damaged")
    with pytest.raises(CheckpointError, match=r"no sound checkpoint.*another run\.dir"):
        load_latest(two_before)
    for path in list_checkpoints(two_before):
        shutil.rmtree(path)
    tally.inject(38, "every checkpoint gone")
    with pytest.raises(CheckpointError, match="it is gone"):
        load_latest(two_before)
