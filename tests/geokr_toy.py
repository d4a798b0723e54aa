"""A learner on made-up images in memory, so that the loop can be tested without records."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from geokr.assemble import build_learner
from geokr.config import load
from geokr.distributed import World
from geokr.metrics import Window
from geokr.models import BackboneSpec
from geokr.options import PretrainOptions
from geokr.train import Hooks, Learner

CLASSES, SIZE, CHANGES = 4, 32, 12
CPU = World(torch.device("cpu"))


@dataclass
class ToyBatch:
    images: torch.Tensor
    fractions: torch.Tensor
    record_ids: np.ndarray
    weights: torch.Tensor
    squares: torch.Tensor | None = None
    colour_changes: torch.Tensor | None = None


def make_batch(ids: np.ndarray, bands: int = 3) -> ToyBatch:
    """Images whose colour says which fractions they have, and numbers for changes of colour; a function of the ids
    alone."""
    images, fractions, changes = [], [], []
    colours = np.random.default_rng(99).uniform(30, 220, (CLASSES, bands))
    for number in ids:
        rng = np.random.default_rng(int(number))
        share = rng.dirichlet(np.full(CLASSES, 0.5))
        labels = rng.choice(CLASSES, (SIZE, SIZE), p=share)
        images.append(np.clip(colours[labels] + rng.normal(0, 9, (SIZE, SIZE, bands)), 0, 255).astype(np.uint8))
        fractions.append(np.bincount(labels.ravel(), minlength=CLASSES) / SIZE**2)
        changes.append(rng.normal(0, 0.3, CHANGES))
    return ToyBatch(
        torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2),
        torch.from_numpy(np.stack(fractions).astype(np.float32)),
        np.asarray(ids, np.int64),
        torch.ones(len(ids)),
        colour_changes=torch.from_numpy(np.stack(changes).astype(np.float32)),
    )


def stream(start_step: int, batch: int, parts: int = 1, records: int = 40):
    """Endless micro-batches from after ``start_step`` steps of ``batch`` samples."""
    position = start_step * batch
    while True:
        for _ in range(parts):
            yield make_batch(np.arange(position, position + batch // parts) % records)
            position += batch // parts


def options(*overrides: str) -> PretrainOptions:
    given = ["model.backbone=test_resnet", "data.global_batch=8", "train.precision=fp32", "train.compile=off"]
    if not any(override.startswith("train.epochs") for override in overrides):
        given.append("train.max_steps=8")
    keys = {override.split("=")[0] for override in overrides}
    return load(PretrainOptions, None, [*(item for item in given if item.split("=")[0] not in keys), *overrides])


def learner(chosen: PretrainOptions, steps: int = 8, world: World = CPU, restore: Any = None) -> Learner:
    spec = BackboneSpec(chosen.model.backbone, 3, SIZE, chosen.model.drop_path)
    made, _ = build_learner(
        chosen,
        spec,
        classes=CLASSES,
        mean=[125.0] * 3,
        std=[60.0] * 3,
        steps=steps,
        world=world,
        changes=CHANGES,
        restore=restore,
    )
    return made


def hooks(**given: Any) -> Hooks:
    nothing = {
        "tick": lambda step: None,
        "record": lambda line: None,
        "validate": dict,
        "panel": lambda step, batch: None,
        "save": lambda step, window: None,
    }
    return Hooks(**{**nothing, **given})


def window() -> Window:
    return Window(CPU)


def bits(model: torch.nn.Module) -> dict[str, bytes]:
    """Every tensor's bytes, buffers too."""
    return {name: tensor.contiguous().numpy().tobytes() for name, tensor in model.state_dict().items()}
