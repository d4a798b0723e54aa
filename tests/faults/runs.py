"""Small training runs for the fault tests, and what they are compared by."""

import random
from pathlib import Path

import torch

from geokr.checkpoint import load_latest
from geokr.metrics import read_metrics
from tests.faults.zygote import Child
from tests.test_geokr_pretrain import keys

# No validation, pictures or schedule that would depend on the length of a run; stochastic depth, so that random
# numbers matter; a checkpoint now and then, so that most kills cost some steps.
QUIET = (
    "validation.every_steps=100000", "log.every_steps=1", "optim.schedule=constant", "optim.warmup=0",
    "method.consistency_ramp=0",
    "model.drop_path=0.2", "checkpoint.every_steps=4",
)  # fmt: skip
# Two epochs and two steps of five steps each.
STEPS = 12


def arguments(records: Path, folder: Path, *overrides: str) -> list[str]:
    return keys(records, folder, *QUIET, f"train.max_steps={STEPS}", *overrides)


def saved(folder: Path) -> dict[str, torch.Tensor]:
    """The newest checkpoint's tensors: both models and the optimizer."""
    found = load_latest(folder / "checkpoints")
    assert found is not None
    return dict(found.tensors)


def saved_step(folder: Path) -> int:
    found = load_latest(folder / "checkpoints")
    return found.step if found else 0


def equal_bits(a: Path, b: Path) -> bool:
    """Whether two runs' newest checkpoints are of one step and hold the same bits, and their lines the same losses."""
    left, right = saved(a), saved(b)
    same = left.keys() == right.keys() and all(
        left[name].contiguous().view(-1).view(torch.uint8).equal(right[name].contiguous().view(-1).view(torch.uint8))
        for name in left
    )
    return saved_step(a) == saved_step(b) and same and losses(a) == losses(b)


def losses(folder: Path) -> list[tuple[int, float, float]]:
    lines = read_metrics(folder / "metrics.jsonl")
    return [(line["step"], line["loss/supervision"], line["loss/consistency"]) for line in lines]


def last_step(folder: Path) -> int:
    """The last step that the metrics speak of; 0 before the first."""
    try:
        lines = read_metrics(folder / "metrics.jsonl")
    except OSError:
        return 0
    return lines[-1]["step"] if lines else 0


def finish(children: list[Child]) -> None:
    for child in children:
        assert child.wait() == 0, child.said()


def seeded(name: str) -> random.Random:
    return random.Random(f"faults {name}")
