"""A network trained on a few labelled images to the weights that do best on val, for every task that trains one."""

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from geokr.config import ConfigError

RATE, HEAD_RATE, DECAY = 1e-4, 5e-4, 0.05  # of the backbone, of the new layers, weight decay of both
WARMUP = 0.1  # of the steps
LEAST_STEPS = 200  # of a training: with few labels an epoch is a step, and thirty steps teach nothing new
CHECKS = 8  # looks at val on the way
CLIP = 5.0  # norm of the gradient: detectors' first steps are steep


def steps_of(images: int, batch: int, epochs: int) -> int:
    return max(LEAST_STEPS, epochs * math.ceil(images / batch))


def fit(
    model: nn.Module,
    backbone: nn.Module,
    steps: int,
    loss_of: Callable[[int], Tensor],
    score: Callable[[], float],
    name: str,
) -> None:
    """Trains to the weights with the best score, by AdamW with a cosine schedule.

    backbone: the part of the model that has weights already and moves more slowly. loss_of: a step's number to its
    loss. Raises ConfigError where the loss is no number.
    """
    old = {id(parameter) for parameter in backbone.parameters()}
    new = [parameter for parameter in model.parameters() if id(parameter) not in old]
    groups = [{"params": list(backbone.parameters()), "lr": RATE}, {"params": new, "lr": HEAD_RATE}]
    optimizer = torch.optim.AdamW(groups, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step / steps))
    looks = {round(steps * (look + 1) / CHECKS) for look in range(CHECKS)}
    best: tuple[float, Mapping[str, Tensor]] = (-math.inf, {})
    for step in range(steps):
        loss = loss_of(step)
        if not math.isfinite(float(loss.detach())):
            raise ConfigError(f"{name}: the loss became {float(loss.detach())} in step {step}; are the weights sound?")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        if step + 1 in looks:
            model.eval()
            found = score()
            found = -math.inf if math.isnan(found) else found  # where val has nothing to find; then the last weights
            if found >= best[0]:
                best = found, {key: value.detach().clone() for key, value in model.state_dict().items()}
            model.train()
    model.load_state_dict(best[1])
    model.eval()


def _rate(share: float) -> float:
    """Share of the learning rate at a share of the steps."""
    return share / WARMUP if share < WARMUP else 0.5 * (1 + math.cos(math.pi * (share - WARMUP) / (1 - WARMUP)))


def turns(rng: np.random.Generator) -> tuple[bool, bool, bool]:
    """One of the eight turns and reflections: (transposed, then flipped left to right, then upside down)."""
    transposed, flipped, upside = rng.integers(2, size=3).astype(bool).tolist()
    return transposed, flipped, upside


def turned(image: Tensor, turn: tuple[bool, bool, bool]) -> Tensor:
    """[..., H, W] so turned."""
    image = image.transpose(-1, -2) if turn[0] else image
    return image.flip([dim for dim, flip in ((-1, turn[1]), (-2, turn[2])) if flip])
