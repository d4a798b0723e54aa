"""The student over several processes: torch's DistributedDataParallel, and how its gradients travel.

Gradients are averaged in buckets while the backward pass still runs, once an optimizer step: micro-batches before
the last one of a step exchange nothing (``no_sync`` in geokr/train.py).

``train.ddp_compression`` sends them in fewer bytes:

    bf16, fp16   half of them; the sum is rounded to 8 or 11 bits
    powersgd     matrices as products of rank 2 with what was left out added to the next step's gradient (Vogels,
                 Karimireddy and Jaggi, "PowerSGD: Practical Low-Rank Gradient Compression", 2019)
"""

# pyright: reportPrivateImportUsage=false
# torch.distributed does not list GradBucket among its exports, though its documentation does.

import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook, fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from geokr.compiling import Forward
from geokr.distributed import World
from geokr.options import TrainOptions

log = logging.getLogger(__name__)

HALVES = {"bf16": bf16_compress_hook, "fp16": fp16_compress_hook}
RANK = 2  # torch's documentation suggests 1 to 4
# Buffers are averaged where that is due (geokr/train.py), not sent in each forward pass; torch 2.13 renamed the choice.
_PARAMETERS = inspect.signature(DistributedDataParallel.__init__).parameters
SENDS_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _PARAMETERS else "broadcast_buffers"
LONGEST_START = 1000  # steps; torch's default


class _Matrices:
    """A bucket whose gradients can be viewed as matrices: channels-last ones with their axes in memory order."""

    def __init__(self, bucket: dist.GradBucket) -> None:
        self.buffer, self.index, self.is_last = bucket.buffer, bucket.index, bucket.is_last
        self._gradients = bucket.gradients()

    def gradients(self) -> list[Tensor]:
        return [g if g.is_contiguous() else g.permute(0, *range(2, g.ndim), 1) for g in self._gradients]


def _powersgd(state: PowerSGDState, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    future = powerSGD_hook(state, _Matrices(bucket))  # type: ignore[arg-type]
    if bucket.buffer().device.type == "cpu":
        # its callbacks wait, in one of gloo's two threads, for operations that need the other: two buckets at a
        # time would wait for ever
        future.wait()
    return future


def powersgd_start(steps: int) -> int:
    """Steps with whole gradients before the first compressed one: a tenth of the run, as torch's documentation
    advises, but no more than 1,000 and no fewer than the 2 that the rebuilding of buckets needs."""
    return max(2, min(LONGEST_START, steps // 10))


def _compress(wrapped: DistributedDataParallel, choice: str, steps: int, world: World) -> None:
    if choice in HALVES:
        wrapped.register_comm_hook(dist.group.WORLD, HALVES[choice])
    if choice == "powersgd":
        start = powersgd_start(steps)
        state = PowerSGDState(dist.group.WORLD, matrix_approximation_rank=RANK, start_powerSGD_iter=start)
        wrapped.register_comm_hook(state, _powersgd)
        if world.main:
            log.warning(
                "train.ddp_compression=powersgd: what it leaves out of gradients is not part of checkpoints. A resumed "
                "run sends whole gradients for %d steps again, so it does not repeat the bits of an undisturbed one",
                start,
            )


def _choices(world: World) -> dict[str, Any]:
    choices: dict[str, Any] = {SENDS_BUFFERS: False, "gradient_as_bucket_view": True}
    if world.device.type == "cuda":
        choices["device_ids"] = [world.device.index]
    return choices


def for_trial(forward: Forward, world: World, options: TrainOptions) -> Forward:
    """A compiled student as its first call, the one that compiles it, has to be made.

    torch cuts a compiled graph where buckets end if it is compiled inside DistributedDataParallel: gradients of the
    last layers then travel while those of the first are computed. Compiled outside, all come at its end, and
    nothing overlaps. Exchanges nothing here.
    """
    if world.size == 1:
        return forward
    assert isinstance(forward, nn.Module)
    smallest = dist._DEFAULT_FIRST_BUCKET_BYTES / 2**20  # the cutting asserts this
    size = None if options.ddp_bucket_mb is None else max(smallest, options.ddp_bucket_mb)
    wrapped = DistributedDataParallel(forward, **_choices(world), bucket_cap_mb=size)  # type: ignore[arg-type]

    def call(*inputs: Tensor) -> Tensor:
        with wrapped.no_sync():
            return wrapped(*inputs)

    return call


def wrap(
    forward: Forward,
    world: World,
    options: TrainOptions,
    steps: int,
    rehearse: Callable[[Forward], None] = lambda forward: None,
) -> Forward:
    """The student's forward pass, its gradients averaged over processes; as it is where there is only one.

    steps: of the whole run. rehearse: makes a forward and a backward pass and leaves no trace in the model. torch puts
    gradients into other buckets after the first backward passes, in the order in which those gave them, and where in a
    bucket a gradient lies decides the order in which three processes or more are added up. Without rehearsals the first
    steps of a resumed run would add in another order than the same steps of an undisturbed one. A process group must
    exist where there are several processes.
    """
    if world.size == 1:
        if options.ddp_compression != "none":
            log.info("train.ddp_compression=%s: one process sends no gradients", options.ddp_compression)
        return forward
    assert isinstance(forward, nn.Module)
    wrapped = DistributedDataParallel(
        forward,
        **_choices(world),
        bucket_cap_mb=options.ddp_bucket_mb,  # type: ignore[arg-type]  # fractions of a MB are fine
        static_graph=options.accumulate == 1,  # a first step without exchange cannot record a static graph's order
    )
    for _ in range(2):  # of a static graph torch counts the gradients first, and takes their order from the next pass
        rehearse(wrapped)  # before there is a hook, whose state it would change
    _compress(wrapped, options.ddp_compression, steps, world)
    return wrapped
