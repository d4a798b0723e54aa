"""Several processes: who this one is, and the few collective operations the run needs.

Rank and world size come from torchrun's variables, which only the composition root reads. With one process every
operation returns at once and no process group exists, so that the same code serves one process and many.
"""

# pyright: reportPrivateImportUsage=false
# torch.distributed does not list Store, PrefixStore and rendezvous among its exports, though its documentation does.

import contextlib
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store  # torch.distributed has both, untyped
from torch.distributed.rendezvous import rendezvous

from geokr.config import ConfigError


class ReplicaError(RuntimeError):
    """Processes that should hold the same weights do not."""


def lost_others(error: BaseException) -> bool:
    """Whether an error says that another process ended or did not answer in time."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


@dataclass(frozen=True, slots=True)
class World:
    """This process among the run's processes, and the device it computes on."""

    device: torch.device
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def main(self) -> bool:
        """Whether this process writes the run's files."""
        return self.rank == 0

    def barrier(self) -> None:
        if self.size > 1:
            self.sum(torch.zeros(1, device=self.device))

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def mean(self, tensor: Tensor) -> Tensor:
        """Mean over all processes, in place."""
        return self.sum(tensor).div_(self.size) if self.size > 1 else tensor

    def minimum(self, tensor: Tensor) -> Tensor:
        """Smallest value over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MIN)
        return tensor

    def maximum(self, tensor: Tensor) -> Tensor:
        """Largest value over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def average_buffers(self, *modules: nn.Module) -> None:
        """Makes floating-point buffers (running statistics) the mean over all processes, in one operation."""
        if self.size == 1:
            return
        buffers = [buffer for module in modules for buffer in module.buffers() if buffer.is_floating_point()]
        if not buffers:
            return
        flat = self.mean(torch.cat([buffer.reshape(-1).float() for buffer in buffers]))
        for buffer, part in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
            buffer.copy_(part.view_as(buffer))

    def check_replicas(self, tensors: Sequence[Tensor], what: str) -> None:
        """Raises ReplicaError if any tensor's bits differ between processes (a sum over them does)."""
        if self.size == 1 or not tensors:
            return
        sums = torch.stack([_bits(tensor).sum(dtype=torch.int64) for tensor in tensors])
        low, high = self.minimum(torch.stack([sums, -sums]))  # one operation for both: the largest is -min(-x)
        if not torch.equal(low, -high):
            raise ReplicaError(
                f"{what} differs between processes: the replicas have drifted apart, which hardware faults and "
                "mixed library versions can cause. Start again from the last checkpoint."
            )


def _bits(tensor: Tensor) -> Tensor:
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().contiguous().view(-1).view(whole)


def choose_device(name: str, local_rank: int) -> torch.device:
    """The device for ``train.device``. Raises ConfigError where a GPU was asked for and there is none."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and count == 0):
        return torch.device("cpu")
    if count == 0:
        raise ConfigError("train.device=cuda: no usable CUDA device here; check nvidia-smi, or use train.device=auto")
    if local_rank >= count:
        raise ConfigError(
            f"this machine runs process {local_rank + 1} but has {count} GPU(s): start at most {count} processes "
            "a machine, or use train.device=cpu"
        )
    return torch.device("cuda", local_rank)


def _store(environment: Mapping[str, str], timeout_s: float) -> Store:
    """Where processes find each other: a store of their own, or torchrun's under another name for each restart.

    torchrun's store outlives a restart: without the name the new processes read the addresses of the dead ones, and
    fail to connect or wait until the timeout (seen with torch 2.15, --standalone, one of two processes killed). A store
    of their own, as the launchers ask for, is new each time and must not be named so: each machine counts restarts for
    itself, and one that only follows another's counts none, so two machines would wait under two names.
    """
    store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return store
    return PrefixStore(f"geokr/{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


@contextlib.contextmanager
def world_from(environment: Mapping[str, str], device: str, timeout_s: float) -> Iterator[World]:
    """The world that torchrun's variables describe, its process group open inside the block."""
    size, rank = int(environment.get("WORLD_SIZE", 1)), int(environment.get("RANK", 0))
    local_rank = int(environment.get("LOCAL_RANK", 0))
    local_size = int(environment.get("LOCAL_WORLD_SIZE", size))
    chosen = choose_device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        torch.backends.cudnn.benchmark = True  # shapes never change in a run, so the search pays once
    world = World(chosen, rank, size, local_rank, local_size)
    if size == 1:
        yield world
        return
    dist.init_process_group(
        "nccl" if chosen.type == "cuda" else "gloo",
        store=_store(environment, timeout_s),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout_s),
        device_id=chosen if chosen.type == "cuda" else None,
    )
    try:
        yield world
    finally:
        dist.destroy_process_group()


def set_threads(threads: int | None, local_size: int) -> int:
    """Sets torch's CPU threads: the given number, or this process's share of the cores it may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    chosen = threads or max(1, cores // local_size)
    torch.set_num_threads(chosen)
    return chosen


_IMPATIENT_S = 1.0  # after a signal, a Ctrl-C later than this is a person who does not want to wait


class Stopper:
    """A request to stop (SIGTERM, Ctrl-C), on which all processes agree at a step boundary.

    The handler sets a flag and no more. ``poll`` once a step says whether to stop after it. With several processes
    the flags meet in an operation on the CPU that runs beside the next step, so nobody waits for it: the answer is
    one step old and the same everywhere. A Ctrl-C that comes a second or more after the first signal raises
    KeyboardInterrupt at once; the same signal sooner, or SIGTERM again, is a launcher passing on what the terminal or
    the scheduler has sent already.
    """

    def __init__(self, world: World, timeout_s: float = 600.0) -> None:
        self.signal: int = 0
        self._since = 0.0
        self._world = world
        self._group: dist.ProcessGroup | None = None
        self._pending: tuple[dist.Work, Tensor] | None = None
        if world.size > 1:
            group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
            assert isinstance(group, dist.ProcessGroup)
            self._group = group

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.signal:
            self.signal, self._since = number, now
        elif number == signal.SIGINT and now - self._since > _IMPATIENT_S:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def listening(self) -> Iterator["Stopper"]:
        """Handles SIGTERM and SIGINT inside the block (main thread only)."""
        old = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def poll(self) -> bool:
        """Whether all processes stop now; ``signal`` then holds the signal's number on each of them."""
        if self._group is None:
            return self.signal != 0
        stop = self.settle()
        if not stop:
            flag = torch.tensor([self.signal], dtype=torch.int32)
            work = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group, async_op=True)
            assert work is not None
            self._pending = (work, flag)
        return stop

    def agree(self) -> None:
        """Returns once every process knows of a signal that one of them at least has had."""
        while not self.poll():
            continue

    def settle(self) -> bool:
        """Waits for the operation under way, if any; whether it said to stop."""
        if self._pending is None:
            return False
        work, flag = self._pending
        self._pending = None
        work.wait()
        agreed = int(flag.item())
        self.signal = agreed or self.signal
        return agreed != 0
