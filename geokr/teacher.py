"""The teacher: a slow average of the student, how it starts and when it moves.

At a move every parameter becomes ``alpha * teacher + (1 - alpha) * student``, and so does every floating-point
buffer (batch norm's running statistics) unless ``method.teacher_buffers`` is false; whole-number buffers are copied.
"""

# pyright: reportPrivateImportUsage=false
# torch exports its multi-tensor operations under private names; its own optimizers use them so.

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn

from geokr.models import LandCoverModel, seeded
from geokr.options import MethodOptions

# The published code moves its teacher when this many images have been seen; after the last of these, whenever a
# multiple of PUBLISHED_PERIOD has. At batch 8 that gives steps 1, 1001, 21001, 41001, 61001, 122001, ..., at batch
# 16 steps 1, 501, 10501, 20501, 30501, 61001, ...: the two known sequences are one function of the images seen.
PUBLISHED_FIRST = (0, 8_000, 168_000, 328_000)
PUBLISHED_PERIOD = 488_000


def published_moves(samples: int) -> int:
    """Moves that are due once ``samples`` images have been seen, the one before the first image included."""
    first = sum(samples >= milestone for milestone in PUBLISHED_FIRST)
    return first + samples // PUBLISHED_PERIOD


@dataclass(frozen=True, slots=True)
class TeacherRule:
    """When the teacher moves and how far: a pure function of the step (counted from 1)."""

    options: MethodOptions
    global_batch: int

    def moves(self, step: int) -> int:
        """Moves that have happened once ``step`` is done."""
        if step < 1:
            return 0
        if self.options.teacher_schedule == "every_step":
            return step
        return published_moves((step - 1) * self.global_batch)

    def alpha(self, step: int) -> float | None:
        """The share of itself that the teacher keeps after this step; None if it stays as it is."""
        t = self.moves(step)
        if t == self.moves(step - 1):
            return None
        ramp = (1.0 + t) / (10.0 + t) if self.options.teacher_ramp else 1.0
        return min(self.options.teacher_alpha, ramp)


def make_teacher(student: LandCoverModel, options: MethodOptions, seed: int) -> LandCoverModel:
    """The teacher at step 0: the student's copy without gradients; ``random`` gives it a head of its own."""
    teacher = copy.deepcopy(student).requires_grad_(False)
    for module in teacher.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.0
    if options.teacher_init == "random":
        with seeded(seed + 1):
            teacher.head.reset_parameters()
    return teacher.train(options.teacher_mode == "train")


class TeacherUpdate:
    """Moves a teacher towards a student, in one launch for all floating-point tensors.

    The lists are taken once: the tensors must stay the same objects (loading a state in place keeps them).
    ``then`` is called after each move.
    """

    def __init__(
        self, teacher: nn.Module, student: nn.Module, *, buffers: bool, then: Callable[[], None] = lambda: None
    ) -> None:
        self._then = then
        pairs: list[tuple[Tensor, Tensor]] = list(zip(teacher.parameters(), student.parameters(), strict=True))
        self._whole: list[tuple[Tensor, Tensor]] = []
        if buffers:
            for pair in zip(teacher.buffers(), student.buffers(), strict=True):
                (pairs if pair[0].is_floating_point() else self._whole).append(pair)
        self._teacher = [pair[0].detach() for pair in pairs]
        self._student = [pair[1].detach() for pair in pairs]

    @torch.no_grad()
    def __call__(self, alpha: float, skipped: Tensor | None = None) -> None:
        """One move. ``skipped``: scalar that is 1 where the optimizer skipped its step (fp16 overflow), so that
        the teacher stays unmoved without asking the device; None where steps are never skipped."""
        if skipped is None:
            torch._foreach_lerp_(self._teacher, self._student, 1.0 - alpha)
        else:
            distance = torch._foreach_sub(self._student, self._teacher)
            torch._foreach_mul_(distance, (1.0 - alpha) * (1.0 - skipped))
            torch._foreach_add_(self._teacher, distance)
        if self._whole:
            torch._foreach_copy_([pair[0] for pair in self._whole], [pair[1] for pair in self._whole])
        self._then()
