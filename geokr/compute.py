"""Forward pass, losses, backward pass and optimizer of one step: as they come, or recorded once and replayed.

A CUDA graph starts the thousand kernels of a step with one call, so that the processor's pace no longer matters; with
small batches it is what limits the step. The first steps run as they come, which lets libraries choose their kernels,
then one is recorded. A recorded step reads its batch, its learning rate and its random seed from fixed places.
"""

import logging
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from geokr.batch import Batch
from geokr.config import ConfigError

if TYPE_CHECKING:
    from geokr.train import Learner

log = logging.getLogger(__name__)
# Steps before the recording: libraries compare kernels in the first, optimizer and loss scaler fill their state.
_UNRECORDED = 3


@dataclass(frozen=True, slots=True)
class Computed:
    """What a step leaves behind.

    losses: means of loss, supervision and consistency, float32 [3], of this process, on the device; a recorded step
    overwrites them the next time. skipped: 1 where the loss scaler skipped the optimizer's step, None where it never
    does. ids: record ids of each micro-batch.
    """

    losses: Tensor
    skipped: Tensor | None
    ids: list[np.ndarray]


class Compute(Protocol):
    """Gradients of one batch and the optimizer's step."""

    def __call__(self, learner: "Learner", batches: Iterable[Batch]) -> Computed: ...


class Beside:
    """Runs a forward pass on a stream of its own, so that its kernels fill the gaps between others'. Without a GPU it
    just runs."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @torch.no_grad()
    def start(self, forward: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """The result, which nobody may read before ``join``. ``inputs`` must live until then."""
        if self._stream is None:
            return forward(*inputs)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            return forward(*inputs)

    def join(self) -> None:
        """What follows in the current stream waits for the pass."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)


def _gradient_exchange(learner: "Learner", last: bool) -> AbstractContextManager:
    """Processes exchange gradients in the last micro-batch of a step only."""
    wrapped = isinstance(learner.student_forward, DistributedDataParallel)
    return learner.student_forward.no_sync() if wrapped and not last else nullcontext()  # type: ignore[union-attr]


def compute(learner: "Learner", batches: Iterable[Batch]) -> Computed:
    """``accumulate`` micro-batches as they come. Nothing in it waits for the device."""
    learner.optimizer.zero_grad()  # to None, which apex's takes no argument for
    sums = torch.zeros(3, device=learner.world.device)
    ids = []
    for index, batch in enumerate(batches, start=1):
        ids.append(batch.record_ids)
        with _gradient_exchange(learner, last=index == learner.accumulate):
            student_NK, teacher_NK = _forward(learner, *learner.inputs(batch))
            loss = supervision = learner.supervision(student_NK, batch.fractions, batch.weights)
            consistency = torch.zeros_like(supervision)
            if learner.consistency is not None and teacher_NK is not None:
                consistency = learner.consistency(student_NK, teacher_NK)
                loss = supervision + learner.consistency_weight * consistency
            learner.scaler.scale(loss / learner.accumulate).backward()
        sums += torch.stack([loss, supervision, consistency]).detach()
    assert len(ids) == learner.accumulate, "training batches never end"
    return Computed(sums / learner.accumulate, _optimize(learner), ids)


def _forward(learner: "Learner", *inputs: Tensor) -> tuple[Tensor, Tensor | None]:
    """Logits of the student, and of the teacher where the loss asks for them."""
    with learner.autocast():
        if learner.consistency is None:
            return learner.student_forward(*inputs), None
        teacher_NK = learner.beside.start(learner.teacher_forward, *inputs)
        student_NK = learner.student_forward(*inputs)
    learner.beside.join()
    return student_NK, teacher_NK


def _optimize(learner: "Learner") -> Tensor | None:
    """The optimizer's step. Returns 1 on the device where the loss scaler skipped it, None where it never does."""
    scaler, optimizer = learner.scaler, learner.optimizer
    if learner.clip_norm < float("inf"):
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(learner.student.parameters(), learner.clip_norm)
    if not scaler.is_enabled():
        optimizer.step()
        return None
    before = scaler._scale.clone()  # type: ignore[union-attr]  # get_scale() would wait for the device
    scaler.step(optimizer)
    scaler.update()
    return (scaler._scale < before).float()  # type: ignore[operator]


@dataclass(slots=True)
class _Places:
    """Where a recorded step reads its batch."""

    images: Tensor
    fractions: Tensor
    record_ids: np.ndarray
    weights: Tensor
    colour_changes: Tensor | None
    squares: Tensor | None = None


class Recorded:
    """Steps of one micro-batch as a CUDA graph, on one process.

    Raises ConfigError with ``required`` if a step cannot be recorded; else it says so and goes on without.
    """

    def __init__(self, *, required: bool) -> None:
        self._required = required
        self._done = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._places: _Places | None = None
        self._computed: Computed | None = None
        self.works = True
        """False once recording has failed."""

    def __call__(self, learner: "Learner", batches: Iterable[Batch]) -> Computed:
        if not self.works:
            return compute(learner, batches)
        (batch,) = batches
        if self._done < _UNRECORDED:
            self._done += 1
            return _on_a_side_stream(learner, batch)
        if self._graph is None and not self._record(learner, batch):
            return compute(learner, [batch])
        return self._replay(batch)

    def _record(self, learner: "Learner", batch: Batch) -> bool:
        images = torch.empty_like(batch.images)  # keeps the memory format
        fractions, weights = torch.empty_like(batch.fractions), torch.empty_like(batch.weights)
        changes = None if batch.colour_changes is None else torch.empty_like(batch.colour_changes)
        self._places = _Places(images, fractions, batch.record_ids, weights, changes)
        graph = torch.cuda.CUDAGraph()
        learner.optimizer.zero_grad()  # gradients of earlier steps lie in other memory
        try:
            # thread_local: the loader's threads go on with work of their own meanwhile
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._computed = compute(learner, [self._places])
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            if self._required:
                raise ConfigError(
                    f"train.cuda_graph=on: a step cannot be recorded here ({reason}); use auto or off"
                ) from error
            log.warning("a step cannot be recorded as a CUDA graph here (%s): going on without", reason)
            torch.cuda.synchronize()
            if learner.scaler.is_enabled():  # it may take the next gradients for unscaled already
                learner.scaler._per_optimizer_states.clear()
            self.works = False
            self._places = None
            return False
        self._graph = graph
        return True

    def _replay(self, batch: Batch) -> Computed:
        assert self._graph is not None
        assert self._places is not None
        assert self._computed is not None
        self._places.images.copy_(batch.images, non_blocking=True)
        self._places.fractions.copy_(batch.fractions, non_blocking=True)
        self._places.weights.copy_(batch.weights, non_blocking=True)
        if self._places.colour_changes is not None:
            assert batch.colour_changes is not None
            self._places.colour_changes.copy_(batch.colour_changes, non_blocking=True)
        self._graph.replay()
        return Computed(self._computed.losses, self._computed.skipped, [batch.record_ids])


def _on_a_side_stream(learner: "Learner", batch: Batch) -> Computed:
    """A step as it comes, on a stream that is not the default one: recording allows no other."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        computed = compute(learner, [batch])
    torch.cuda.current_stream().wait_stream(stream)
    return computed
