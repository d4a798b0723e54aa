"""What a checkpoint costs the training: python benchmarks/checkpoints.py [--backbone NAME] [--json FILE]

Blocks of steps on one random batch take turns within one process: without a save, with one at the block's first step
written in the background, and with one that is waited for, as it would be without a thread. What a block with a save
takes longer than one without is the whole price: the snapshot, and what the writing thread takes from the steps. Ten
saves are the default for a run of any length, so the price becomes a share only with the length of a run; the table
ends with the shortest run in which ten saves take 2 % of the time.
"""

import argparse
import itertools
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from geokr.assemble import build_learner
from geokr.config import build
from geokr.distributed import World, choose_device, set_threads
from geokr.metrics import Window
from geokr.models import BackboneSpec
from geokr.options import PretrainOptions
from geokr.runfolder import RunFolder, save_checkpoint
from geokr.train import Learner, train_step

CLASSES = 14
KINDS = ("no save", "in the background", "waited for")


@dataclass
class RandomBatch:
    images: torch.Tensor
    fractions: torch.Tensor
    record_ids: np.ndarray
    weights: torch.Tensor
    squares: torch.Tensor | None = None
    colour_changes: torch.Tensor | None = None


def make_batch(batch: int, size: int, device: torch.device) -> RandomBatch:
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=device)
    fractions = torch.rand(batch, CLASSES, device=device)
    weights = torch.ones(batch, device=device)
    return RandomBatch(images, fractions / fractions.sum(1, keepdim=True), np.arange(batch), weights)


def make_learner(given: argparse.Namespace, world: World) -> Learner:
    tree: dict[str, Any] = {
        "model": {"backbone": given.backbone},
        "data": {"global_batch": given.batch},
        "train": {"max_steps": 10**6, "precision": given.precision, "compile": "off"},
    }
    spec = BackboneSpec(given.backbone, 3, given.size, 0.0)
    options = build(PretrainOptions, tree, "benchmark")
    learner, _ = build_learner(
        options, spec, classes=CLASSES, mean=[125.0] * 3, std=[60.0] * 3, steps=10**6, world=world
    )
    return learner


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Blocks:
    """Times blocks of steps, with and without a save."""

    def __init__(self, given: argparse.Namespace, folder: RunFolder, learner: Learner) -> None:
        self._folder, self._learner, self._steps = folder, learner, given.steps
        self._batch = make_batch(given.batch, given.size, learner.world.device)
        self._window, self._step = Window(learner.world), itertools.count(1)

    def time(self, kind: str) -> tuple[float, float]:
        """Seconds and CPU seconds of one block; what it has begun to write is done when it ends."""
        _wait_for(self._learner.world.device)
        begin, cpu = time.perf_counter(), time.process_time()
        for number in range(self._steps):
            step = next(self._step)
            losses, ids = train_step(self._learner, [self._batch], step)
            self._window.add(step, losses, ids)
            if number == 0 and kind != KINDS[0]:
                self._window.check()
                save_checkpoint(self._folder, self._learner, self._window, step=step, keep=2, meta={})
                if kind == KINDS[2]:
                    self._folder.settle()
        self._window.check()
        self._folder.settle()
        return time.perf_counter() - begin, time.process_time() - cpu


def measure(given: argparse.Namespace) -> dict[str, Any]:
    world = World(choose_device("auto", 0))
    threads = set_threads(given.threads, 1)
    learner = make_learner(given, world)
    with tempfile.TemporaryDirectory(dir=given.out) as out:
        folder = RunFolder(out, world)
        blocks = Blocks(given, folder, learner)
        blocks.time(KINDS[2])  # warms up; the snapshot's memory is there afterwards
        times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
        held: list[float] = []
        for _ in range(given.repeats):
            for kind in KINDS:
                before = folder.saver.held_s
                times[kind].append(blocks.time(kind))
                if kind == KINDS[1]:
                    held.append(folder.saver.held_s - before)
        size = sum(path.stat().st_size for path in Path(out).glob("checkpoints/step-*/*")) / 2
        folder.close()
    prices = {kind: np.array(times[kind]) - np.array(times[KINDS[0]]) for kind in KINDS[1:]}
    return {
        "backbone": given.backbone, "batch": given.batch, "image_size": given.size, "device": world.device.type,
        "threads": threads, "torch": torch.__version__, "checkpoint_mb": round(size / 1e6, 1),
        "step_s": float(np.median([seconds for seconds, _ in times[KINDS[0]]])) / given.steps,
        "held_s": float(np.median(held)),
        "price_s": {kind: float(np.median(values[:, 0])) for kind, values in prices.items()},
        "spread_s": {kind: [*map(float, np.quantile(values[:, 0], (0, 1)))] for kind, values in prices.items()},
        "price_cpu_s": {kind: float(np.median(values[:, 1])) for kind, values in prices.items()},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=64, help="side of the images")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--steps", type=int, default=8, help="steps in a block")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", help="folder on the disk that is to be measured (default: the temporary one)")
    parser.add_argument("--json", metavar="FILE")
    given = parser.parse_args()
    result = measure(given)
    price = result["price_s"][KINDS[1]]
    result["seconds_of_a_run_for_2_percent"] = round(10 * max(price, 0.0) / 0.02, 1)
    for key, value in result.items():
        print(f"{key:>32}  {value}")
    if given.json:
        Path(given.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
