"""What is done to a training process before it starts: called in the forked process, never in the test's own.

``train(arguments, "name:value,name:value")`` applies each and then runs the command.
"""

import errno
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from geokr import checkpoint, pretrain, runfolder
from geokr import train as training
from tests.storage import replace_preadv


def train(arguments: Sequence[str], inject: str) -> int:
    for item in filter(None, inject.split(",")):
        name, _, value = item.partition(":")
        INJECTIONS[name](value)
    return pretrain.main(arguments)


def agent(size: int, restarts: int, arguments: Sequence[str]) -> None:
    """torchrun's agent, as ``--standalone --nproc-per-node size --max-restarts restarts`` starts it."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=size,
        run_id=str(os.getpid()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=restarts,
        start_method="fork",
    )
    elastic_launch(config, _worker)(list(arguments))


def _worker(arguments: Sequence[str]) -> None:
    """What the agent forks; it wants functions to return."""
    if status := pretrain.main(arguments):
        os._exit(status)


# ------------------------------------------------------------------------------------------- training


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


def _before_step(act: Callable[[training.Learner, int], None]) -> None:
    """Calls ``act`` with learner and step before each step."""
    step_itself = training.train_step

    def step_with(learner: training.Learner, batches, step: int):
        act(learner, step)
        return step_itself(learner, batches, step)

    training.train_step = step_with


def note_records(folder: str) -> None:
    """Writes the record ids that each step sees: FOLDER/STEP-RANK."""
    step_itself = training.train_step

    def noting(learner: training.Learner, batches, step: int):
        losses, ids = step_itself(learner, batches, step)
        numbers = " ".join(str(number) for part in ids for number in part)
        (Path(folder) / f"{step}-{learner.world.rank}").write_text(numbers)
        return losses, ids

    training.train_step = noting


def drift(at: str) -> None:
    """STEP/RANK: one bit of one weight of one process changes."""
    when, who = map(int, at.split("/"))

    def act(learner: training.Learner, step: int) -> None:
        if (step, _rank()) == (when, who):
            with torch.no_grad():
                learner.student.head.bias.view(torch.int32)[0] ^= 1

    _before_step(act)


def overflow(at: str) -> None:
    """STEP/RANK: one gradient of one process becomes infinite before the processes exchange them."""
    when, who = map(int, at.split("/"))
    now = {"step": 0}

    def act(learner: training.Learner, step: int) -> None:
        if not now["step"] and _rank() == who:
            learner.student.head.weight.register_hook(
                lambda gradient: gradient + float("inf") if now["step"] == when else gradient
            )
        now["step"] = step

    _before_step(act)


def bad_loss(at: str) -> None:
    """STEP/RANK: the loss of one process is not a number."""
    when, who = map(int, at.split("/"))

    def act(learner: training.Learner, step: int) -> None:
        if (step, _rank()) == (when, who):
            with torch.no_grad():
                learner.student.head.bias[0] = float("nan")

    _before_step(act)


def note_scaler(folder: str) -> None:
    """Writes scale and the sums of the models' bits before each step: FOLDER/STEP-RANK."""

    def act(learner: training.Learner, step: int) -> None:
        parts = [learner.scaler.get_scale()]
        for model in (learner.student, learner.teacher):
            floating = [t for t in model.state_dict().values() if t.is_floating_point()]
            parts += [sum(int(t.contiguous().view(torch.int32).sum(dtype=torch.int64)) for t in floating)]
            parts += [sum(int(p.contiguous().view(torch.int32).sum(dtype=torch.int64)) for p in model.parameters())]
        (Path(folder) / f"{step}-{_rank()}").write_text(" ".join(map(str, parts)))

    _before_step(act)


def slow_steps(seconds: str) -> None:
    _before_step(lambda learner, step: time.sleep(float(seconds)))


def slow_disk(seconds: str) -> None:
    """Every checkpoint takes longer to write."""
    save = checkpoint.save

    def slow(*arguments):
        time.sleep(float(seconds))
        return save(*arguments)

    checkpoint.save = slow


def slow_flush(seconds: str) -> None:
    """Every file of a checkpoint takes longer to reach the disk: what is written lies there under its first name."""
    flush = checkpoint._flush

    def slow(path: Path) -> None:
        time.sleep(float(seconds))
        flush(path)

    checkpoint._flush = slow


def full_disk(step: str) -> None:
    """There is no room for the checkpoint of a step."""
    save_file = checkpoint.safetensors.torch.save_file

    def full(tensors, path: Path, *metadata) -> None:
        if f"{int(step):08d}" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path, *metadata)

    checkpoint.safetensors.torch.save_file = full


def note_saves(folder: str) -> None:
    """Writes for how long each save held this process up: FOLDER/STEP-RANK."""
    save = runfolder.save_checkpoint

    def noting(*arguments, step: int, **keywords):
        begin = time.perf_counter()
        save(*arguments, step=step, **keywords)
        (Path(folder) / f"{step}-{_rank()}").write_text(str(time.perf_counter() - begin))

    pretrain.save_checkpoint = noting


def stall(at: str) -> None:
    """STEP/RANK: from that step on the storage answers one process no more."""
    when, who = map(int, at.split("/"))
    preadv, forever = os.preadv, threading.Event()
    now = {"step": 0}

    def hanging(*arguments):
        if now["step"] >= when and _rank() == who:
            forever.wait()
        return preadv(*arguments)

    replace_preadv(hanging)
    _before_step(lambda learner, step: now.update(step=step))


def limit_memory(megabytes: str) -> None:
    """No more memory than it has now and this much."""
    import resource

    import psutil

    most = psutil.Process().memory_info().vms + int(megabytes) * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


INJECTIONS: dict[str, Callable[[str], None]] = {
    "note_records": note_records,
    "note_scaler": note_scaler,
    "note_saves": note_saves,
    "drift": drift,
    "overflow": overflow,
    "bad_loss": bad_loss,
    "slow_steps": slow_steps,
    "slow_disk": slow_disk,
    "slow_flush": slow_flush,
    "full_disk": full_disk,
    "limit_memory": limit_memory,
    "stall": stall,
}


# ------------------------------------------------------------------------------------------ checkpoints


def toy_checkpoint(step: int) -> checkpoint.Checkpoint:
    """A small checkpoint, a function of the step."""
    generator = torch.Generator().manual_seed(step)
    tensors = {
        "student/weight": torch.randn(4, 3, generator=generator),
        "student/count": torch.tensor(step),
        "teacher/half": torch.randn(3, generator=generator).bfloat16(),
    }
    return checkpoint.Checkpoint(tensors, {"step": step, "samples": step * 8, "identity": {"x": [1, "y"]}})


# Calls that change files, as Python's auditing names them; fsync and the bytes of the tensors' file are added below.
AUDITED = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}


def save_and_die(folder: str, step: int, call: int) -> int:
    """Saves a checkpoint and is killed just before its ``call``-th change to the disk. Returns the changes it made."""
    counter = itertools.count(1)

    def change() -> None:
        if next(counter) == call:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, arguments: tuple) -> None:
        if event in AUDITED and (event != "open" or _writes(arguments)):
            change()

    fsync, save_file = os.fsync, checkpoint.safetensors.torch.save_file

    def counted_fsync(handle: int) -> None:
        change()
        fsync(handle)

    def in_pieces(tensors, path: Path, *metadata) -> None:
        whole = path.with_name("whole")
        save_file(tensors, whole, *metadata)
        data = whole.read_bytes()
        os.unlink(whole)
        with path.open("wb", 0) as file:
            for begin in range(0, len(data), 64):
                change()
                file.write(data[begin : begin + 64])

    os.fsync, checkpoint.safetensors.torch.save_file = counted_fsync, in_pieces
    sys.addaudithook(audit)
    checkpoint.save(Path(folder), toy_checkpoint(step), keep=2)
    return min(255, next(counter) - 1)


def _writes(arguments: tuple) -> bool:
    return bool(arguments[2] & (os.O_WRONLY | os.O_RDWR)) if isinstance(arguments[2], int) else False


def save_when_told(folder: str, step: int) -> None:
    """Stops itself, and saves a checkpoint once it is sent SIGCONT."""
    os.kill(os.getpid(), signal.SIGSTOP)
    checkpoint.save(Path(folder), toy_checkpoint(step), keep=2)
