"""A whole backbone trained on a few labelled images, with a linear layer on its features."""

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from geokr.config import ConfigError
from geokr.evaluate_data import Part
from geokr.evaluate_features import Preparation, batches
from geokr.evaluate_training import fit, steps_of, turned, turns
from geokr.models import seeded


def check(backbone: nn.Module, name: str) -> None:
    """Raises ConfigError for an export without its batch norms: it trains worse than the same weights with theirs, so
    that a comparison would say something of --fold-bn. name: the weights', for the message."""
    card: Any = getattr(backbone, "card", {})
    if card.get("weights", {}).get("folded"):
        raise ConfigError(
            f"{name}: its batch norms are folded into its convolutions, which is for inference alone; for finetune "
            "export it without --fold-bn, or leave finetune out of --task"
        )


def finetune(
    backbone: nn.Module,
    train: Part,
    val: Part,
    test: Part,
    prepare: Preparation,
    device: torch.device,
    *,
    epochs: int,
    batch: int,
    seed: int,
    name: str,
) -> np.ndarray:
    """Probabilities float64 [N, K] of the test images, by the weights that do best on val; name: the weights', for
    messages. The backbone is copied, so that the next run begins from the same ones."""
    rng = np.random.default_rng(seed)
    with seeded(seed):
        with torch.no_grad():
            width = copy.deepcopy(backbone).eval().to(device)(next(batches(val, prepare, 1)).to(device)).shape[1]
        model = nn.Sequential(copy.deepcopy(backbone), nn.Linear(width, train.targets.shape[1]))
        model = model.to(device).to(memory_format=torch.channels_last).train()

        def loss_of(step: int) -> Tensor:
            ids = rng.choice(len(train), batch)
            images = prepare(train.read(ids.tolist()))
            images = torch.stack([turned(image, turns(rng)) for image in images])
            logits = model(images.to(device, memory_format=torch.channels_last))
            return -(torch.from_numpy(train.targets[ids]).to(device) * logits.double().log_softmax(1)).sum(1).mean()

        def score() -> float:
            held = np.maximum(_probabilities(model, val, prepare, device), 1e-12)
            return float((val.targets * np.log(held)).sum(1).mean())

        fit(model, model[0], steps_of(len(train), batch, epochs), loss_of, score, name)
    return _probabilities(model, test, prepare, device)


@torch.no_grad()
def _probabilities(model: nn.Module, part: Part, prepare: Preparation, device: torch.device) -> np.ndarray:
    found = [model(images.to(device)).double().softmax(1).cpu().numpy() for images in batches(part, prepare, 64)]
    return np.concatenate(found)
