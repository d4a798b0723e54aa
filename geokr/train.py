"""The method: one training step, and the loop around it.

N images, C bands, H x W pixels, K classes. A step sees ``global_batch`` images over all processes and micro-batches.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from geokr.batch import Batch
from geokr.compiling import Forward
from geokr.compute import Beside, Compute
from geokr.crops import Crops
from geokr.distributed import Stopper, World
from geokr.losses import Loss, Supervision
from geokr.metrics import Clock, Window
from geokr.models import LandCoverModel
from geokr.optim import set_learning_rate
from geokr.schedules import ConsistencyWeight, LearningRate, due
from geokr.sizes import Sizes
from geokr.state import Scaler
from geokr.teacher import TeacherRule, TeacherUpdate

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Learner:
    """What learns and how, every choice made. ``student_forward`` and ``teacher_forward`` are the models as the
    step calls them (compiled, wrapped for several processes); ``student`` and ``teacher`` are the models themselves.
    """

    student: LandCoverModel
    teacher: LandCoverModel
    student_forward: Forward
    teacher_forward: Forward
    normalise: Callable[[Tensor], Tensor]
    autocast: Callable[[], AbstractContextManager]
    supervision: Supervision
    consistency: Loss | None  # None: the teacher is an average of the students and nothing more
    consistency_weight: Tensor  # of the step at hand, 0-dimensional on the device, where a recorded step reads it
    consistency_course: ConsistencyWeight
    optimizer: torch.optim.Optimizer
    scaler: Scaler
    learning_rate: LearningRate
    clip_norm: float  # infinite where gradients are not clipped
    rule: TeacherRule
    update_teacher: TeacherUpdate
    world: World
    seed: int
    accumulate: int
    crops: Crops | None
    sizes: Sizes | None
    compute: Compute
    beside: Beside
    local_statistics: bool
    """Whether batch norm's running statistics differ between processes and have to be averaged."""

    @property
    def by_colour(self) -> bool:
        """Whether the head is told how colours were changed."""
        return self.student.condition is not None

    def inputs(self, batch: Batch, first: int | None = None) -> tuple[Tensor, ...]:
        """What the models are called with in training; of the ``first`` images, or of all."""
        images_NCHW = self.normalise(batch.images[:first])
        if not self.by_colour:
            return (images_NCHW,)
        assert batch.colour_changes is not None, "the loader was not asked for them"
        return images_NCHW, batch.colour_changes[:first]


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of a step's dropout and stochastic depth: a function of run, step and process, so no state is kept."""
    state = np.random.SeedSequence([seed, step, rank]).generate_state(2, np.uint32)
    return int(state[0]) << 31 | int(state[1]) >> 1


def train_step(learner: Learner, batches: Iterable[Batch], step: int) -> tuple[Tensor, list[np.ndarray]]:
    """One optimizer step over ``accumulate`` micro-batches, and the teacher's move after it.

    Returns the means of loss, supervision and consistency (float32 [3], this process's, on the device, good until the
    next step) and the record ids of each micro-batch. Nothing in it waits for the device.
    """
    torch.manual_seed(step_seed(learner.seed, step, learner.world.rank))
    set_learning_rate(learner.optimizer, learner.learning_rate(step))
    learner.consistency_weight.fill_(learner.consistency_course(step))
    for change in (learner.sizes, learner.crops):
        batches = change(batches, step) if change is not None else batches
    computed = learner.compute(learner, batches)
    if learner.local_statistics:
        _share_statistics(learner)
    _move_teacher(learner, step, computed.skipped)
    return computed.losses, computed.ids


def _move_teacher(learner: Learner, step: int, skipped: Tensor | None) -> None:
    alpha = learner.rule.alpha(step)
    if alpha is not None:
        learner.update_teacher(alpha, skipped)


def _share_statistics(learner: Learner) -> None:
    """Running statistics of all processes become their mean: of the student, and of a teacher that has its own.

    After every step, whether the teacher moves or not: were they averaged for a checkpoint, those of a run that was
    stopped would be rounded where an undisturbed run's are not.
    """
    own = learner.teacher.training
    learner.world.average_buffers(*([learner.student, learner.teacher] if own else [learner.student]))


@dataclass(frozen=True, slots=True)
class Plan:
    """How long a run is and when periodic work happens, in optimizer steps."""

    steps: int
    global_batch: int
    log_every: int
    validate_every: int
    checkpoint_every: int


@dataclass(frozen=True, slots=True)
class Hooks:
    """What the loop calls besides the step.

    tick: after each step, with its number. record: with a line of metrics. validate: gives the ``val/*`` figures.
    panel: with the step and its last batch, where pictures are wanted. save: with the step, its last validation
    and the window. Every process calls all of them, in the same steps.
    """

    tick: Callable[[int], None]
    record: Callable[[dict[str, float]], None]
    validate: Callable[[], dict[str, float] | None]
    panel: Callable[[int, Batch], None]
    save: Callable[[int, Window], None]


def fit(
    learner: Learner,
    batches: Iterator[Batch],
    plan: Plan,
    hooks: Hooks,
    stopper: Stopper,
    window: Window,
    start: int = 0,
) -> bool:
    """Trains from after step ``start`` to the last step; False if a signal left something of that undone.

    Lines of metrics, validation and checkpoints happen at their intervals and at the last step; a stop writes a
    checkpoint, and a validation gives way to it (its figures are then None), the last one too. Raises LossError if a
    loss is not finite: at the next line of metrics, validation or checkpoint, and before anything of it is saved.
    """
    clock = Clock()
    stream = _Remember(clock.waiting(batches))
    for step in range(start + 1, plan.steps + 1):
        losses, ids = train_step(learner, islice(stream, learner.accumulate), step)
        window.add(step, losses, ids)
        clock.add(plan.global_batch)
        hooks.tick(step)
        stop = stopper.poll()
        validating = due(step, plan.validate_every, plan.steps)
        saving = stop or due(step, plan.checkpoint_every, plan.steps)
        logging_now = validating or due(step, plan.log_every, plan.steps)
        gave_way = False
        if not (saving or logging_now):
            continue
        window.check()
        if logging_now:
            line = {"step": step, "samples": step * plan.global_batch, **window.flush(), **clock.flush()}
            line["lr"] = learner.learning_rate(step)
            if validating and (figures := hooks.validate()) is not None:
                line |= figures
                hooks.panel(step, stream.last)
            elif validating:  # a stop came meanwhile, on one process at least
                stopper.agree()
                stop = saving = gave_way = True
            hooks.record(line)
        if saving:
            hooks.save(step, window)
        if validating or saving:
            clock.restart()
        if stop:
            return step == plan.steps and not gave_way
    stopper.settle()
    return True


class _Remember:
    """An iterator that keeps its last item."""

    last: Batch

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches = batches

    def __iter__(self) -> "_Remember":
        return self

    def __next__(self) -> Batch:
        self.last = next(self._batches)
        return self.last
