"""The training steps that throughput.py compares: geokr's own, and one in the published code's manner."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from geokr.assemble import build_learner
from geokr.distributed import World
from geokr.models import BackboneSpec
from geokr.options import PretrainOptions
from geokr.records import Manifest
from geokr.train import train_step

Step = Callable[[Any], None]
# Long enough that `train.compile=auto` decides as for a real run.
STEPS = 100_000


def geokr_step(
    options: PretrainOptions, manifest: Manifest, image_size: int, device: torch.device
) -> tuple[Step, dict[str, Any]]:
    """A function that trains on one batch, and what was chosen in words."""
    train = manifest.train
    learner, chosen = build_learner(
        options,
        BackboneSpec(options.model.backbone, len(manifest.bands), image_size),
        classes=len(manifest.classes),
        mean=list(train.mean),
        std=list(train.std),
        steps=STEPS,
        world=World(device),
    )
    numbers: Iterator[int] = iter(range(1, STEPS))
    return lambda batch: void(train_step(learner, [batch], next(numbers))), chosen


def void(_: object) -> None:
    """For its argument's effect."""


def published_step(backbone: str, bands: int, classes: int, device: torch.device) -> Step:
    """Eager fp32 in NCHW, the teacher's batch norm in training mode, Adam, losses over batch and classes.

    The teacher stands still: the published one moves some thirty times in a whole run.
    """
    import timm

    student, teacher = (timm.create_model(backbone, in_chans=bands, num_classes=classes).to(device) for _ in range(2))
    optimizer = torch.optim.Adam(student.parameters(), 1e-3)

    def cross_entropy(target_NK: Tensor, logits_NK: Tensor) -> Tensor:
        return -(target_NK * logits_NK.log_softmax(1)).mean()

    def step(batch: Any) -> None:
        images_NCHW = batch.images.float().contiguous(memory_format=torch.contiguous_format) / 255
        student_NK = student(images_NCHW)
        with torch.no_grad():
            teacher_NK = teacher(images_NCHW)
        loss = cross_entropy(batch.fractions, student_NK) + cross_entropy(student_NK.softmax(1), teacher_NK)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step
