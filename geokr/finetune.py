"""A whole backbone trained on a few labelled images, with a linear layer on its features."""

import copy
import math

import numpy as np
import torch
from torch import Tensor, nn

from geokr.evaluate_data import Part
from geokr.evaluate_features import Preparation, batches

RATE, HEAD_RATE, DECAY = 1e-4, 1e-3, 0.05  # of the backbone, of the new layer, weight decay of both
WARMUP = 0.1  # of the steps


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
) -> tuple[np.ndarray, dict[str, float]]:
    """Probabilities float64 [N, K] of the test images by the epoch that does best on val, and which one that was.

    AdamW with a cosine schedule; the eight turns and reflections of an image, for from above there is no up. The
    backbone is copied, so that the next run begins from the same weights.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        width = copy.deepcopy(backbone).eval().to(device)(next(batches(val, prepare, 1)).to(device)).shape[1]
    model = nn.Sequential(copy.deepcopy(backbone), nn.Linear(width, train.targets.shape[1]))
    model = model.to(device).to(memory_format=torch.channels_last)
    groups = [{"params": model[0].parameters(), "lr": RATE}, {"params": model[1].parameters(), "lr": HEAD_RATE}]
    optimizer = torch.optim.AdamW(groups, weight_decay=DECAY)
    each = max(1, len(train) // batch)  # steps an epoch; the last images wait for another order
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step / (each * epochs)))
    best = (np.inf, np.zeros(0), 0)
    for epoch in range(1, epochs + 1):
        model.train()
        order = rng.permutation(len(train))
        for first in range(0, each * batch, batch):
            ids = order[first : first + batch]
            images, targets = prepare(train.read(ids.tolist())), torch.from_numpy(train.targets[ids]).to(device)
            logits = model(_turned(images, rng).to(device, memory_format=torch.channels_last))
            loss = -(targets * logits.double().log_softmax(1)).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        held = _probabilities(model, val, prepare, device)
        score = float(-(val.targets * np.log(np.maximum(held, 1e-12))).sum(1).mean())
        if score < best[0]:
            best = score, _probabilities(model, test, prepare, device), epoch
    return best[1], {"epoch": best[2]}


def _rate(share: float) -> float:
    return share / WARMUP if share < WARMUP else 0.5 * (1 + math.cos(math.pi * (share - WARMUP) / (1 - WARMUP)))


def _turned(images_NCHW: Tensor, rng: np.random.Generator) -> Tensor:
    images = []
    for image_CHW in images_NCHW:
        turned = torch.rot90(image_CHW, int(rng.integers(4)), (1, 2))
        images.append(turned.flip(2) if rng.integers(2) else turned)
    return torch.stack(images)


@torch.no_grad()
def _probabilities(model: nn.Module, part: Part, prepare: Preparation, device: torch.device) -> np.ndarray:
    model.eval()
    found = [model(images.to(device)).double().softmax(1).cpu().numpy() for images in batches(part, prepare, 64)]
    return np.concatenate(found)
