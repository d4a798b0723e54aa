"""What segmentation and detection share: a row of the report for each entrant, figures over seeds, intervals.

Images keep their own resolution here. N images, C bands, H x W pixels.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np

from geokr import evaluate_metrics
from geokr.config import ConfigError
from geokr.evaluate_data import Data, Part
from geokr.evaluate_features import Entrant
from geokr.evaluate_kept import Kept

MEMORY = 4 << 30  # bytes of decoded images that are kept


class Outcome(Protocol):
    """What one training gave on the test images."""

    def values(self, ids: np.ndarray | None = None) -> dict[str, float]:
        """Figures over the images of these numbers, which may repeat; of all images without."""
        ...

    def by_class(self) -> dict[str, np.ndarray]:
        """Figures of each class, NaN where there is none."""
        ...


class Task(Protocol):
    """A dense task."""

    @property
    def data(self) -> Data:
        """Its images; targets are the shares of classes in each, which labels are drawn by."""
        ...

    @property
    def resamples(self) -> int:
        """Draws of a bootstrap."""
        ...

    def check(self, entrant: Entrant) -> None:
        """Raises ConfigError where its weights are not those of the task's architecture."""
        ...

    def run(self, entrant: Entrant, train: np.ndarray, val: np.ndarray, seed: int) -> Outcome:
        """Trained on these images of train, chosen by these of val. Without a backbone: colours alone."""
        ...


def rows(
    task: Task,
    kind: str,
    entrants: Sequence[Entrant],
    labels: Sequence[float],
    seeds: int,
    say: Callable[[str], None],
    finished: Kept,
) -> list[dict[str, Any]]:
    """A row of the report for every entrant and share of labels, those in ``finished`` as they are. Raises ConfigError
    where one of the entrants does not fit, before the first is trained."""

    def made(entrant: Entrant, percent: float) -> dict[str, Any]:
        outcomes, counts = [], []
        for seed in range(seeds):
            say(f"{entrant.name}: {kind}, {percent:g} % of the labels, seed {seed}")
            some = [evaluate_metrics.subset(task.data.parts[p].labels, percent, seed) for p in ("train", "val")]
            outcomes.append(task.run(entrant, some[0], some[1], seed))
            counts.append(len(some[0]))
        return {
            "weights": entrant.name,
            "task": kind,
            "labels_percent": percent,
            "labels": round(float(np.mean(counts))),
            "seeds": seeds,
            "figures": over_seeds(outcomes, len(task.data.parts["test"]), task.resamples),
            "classes": _by_class(outcomes, task.data.classes),
        }

    for entrant in entrants:
        task.check(entrant)
    every = [(entrant, percent) for entrant in entrants for percent in labels]
    return [finished.row(one.name, kind, percent, partial(made, one, percent)) for one, percent in every]


def over_seeds(outcomes: Sequence[Outcome], count: int, resamples: int) -> dict[str, dict[str, Any]]:
    """name: mean and deviation over seeds, and a 95 % bootstrap interval of that mean over test images."""
    plain = [outcome.values() for outcome in outcomes]
    rng = np.random.default_rng(0)
    draws: dict[str, list[float]] = {name: [] for name in plain[0]}
    for _ in range(resamples):
        ids = rng.integers(0, count, count)
        drawn = [outcome.values(ids) for outcome in outcomes]
        for name, values in draws.items():
            values.append(float(np.mean([one[name] for one in drawn])))
    found: dict[str, dict[str, Any]] = {}
    for name, values in draws.items():
        low, high = np.nanpercentile(values, (2.5, 97.5))
        spread = evaluate_metrics.spread([one[name] for one in plain])
        found[name] = {**spread, "interval": (float(low), float(high))}
    return found


def _by_class(outcomes: Sequence[Outcome], classes: Sequence[str]) -> dict[str, dict[str, float | None]]:
    found = [outcome.by_class() for outcome in outcomes]
    means = {name: np.mean([one[name] for one in found], axis=0) for name in found[0]}
    return {
        label: {name: float(values[k]) if np.isfinite(values[k]) else None for name, values in means.items()}
        for k, label in enumerate(classes[: len(next(iter(means.values())))])  # not detection's class for empty images
    }


class Room:
    """What is left of MEMORY, for several readers together."""

    def __init__(self) -> None:
        self.free = MEMORY


def kept(read: Callable[[Sequence[int]], list[np.ndarray]], room: Room) -> Callable[[Sequence[int]], list[np.ndarray]]:
    """The same reader, with what it read kept in memory while there is room."""
    memory: dict[int, np.ndarray] = {}

    def one(n: int) -> np.ndarray:
        if n in memory:
            return memory[n]
        image = read([n])[0]
        size = image.nbytes + np.ma.getmask(image).nbytes  # a mask, where the file says what has no data
        if size <= room.free:
            memory[n] = image
            room.free -= size
        return image

    def read_kept(numbers: Sequence[int]) -> list[np.ndarray]:
        return [one(n) for n in numbers]

    return read_kept


def check_images(names: Sequence[str], read: Callable[[Sequence[int]], list[np.ndarray]]) -> None:
    """Reads every image, so that one that is cut short shows before training. Raises ConfigError naming one with NaN
    or infinity, and what ``read`` raises."""
    for n, name in enumerate(names):
        image = read([n])[0]
        if image.dtype.kind == "f" and not np.isfinite(image).all():
            bad = int((~np.isfinite(image)).sum())
            raise ConfigError(f"{name}: NaN or infinity in {bad} values; fill them, or take the image out")


def middle(part: Part, side: int) -> Part:
    """The same images, only their middles of this side: what batch norms are calibrated with. Smaller ones are
    continued by their edges."""

    def read(numbers: Sequence[int]) -> list[np.ndarray]:
        return [_middle(image, side) for image in part.read(numbers)]

    return Part(part.names, part.targets, read)


def _middle(image_HWC: np.ndarray, side: int) -> np.ndarray:
    top, left = (max(0, (length - side) // 2) for length in image_HWC.shape[:2])
    cut = image_HWC[top : top + side, left : left + side]
    lacking = [(0, side - length) for length in cut.shape[:2]]
    return np.pad(cut, (*lacking, (0, 0)), mode="edge") if any(end for _, end in lacking) else cut
