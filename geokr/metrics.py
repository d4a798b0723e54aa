"""Numbers of a run: sums on the device, time on the clock, and the lines of ``metrics.jsonl``."""

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from geokr.checkpoint import write_text
from geokr.distributed import World

T = TypeVar("T")
LOSSES = ("loss", "loss/supervision", "loss/consistency")
# geokr/identity.py says what a run may change when it goes on.
REMEDY = (
    "train.precision=bf16 or fp32 can be tried in this run; a lower optim.lr or train.clip_norm make another run: give "
    "it a new run.dir, to begin anew or with model.init=FILE, which python -m geokr.export makes of the last checkpoint"
)


class LossError(ValueError):
    """A loss that is not a number; the message names the step and the records of its batch."""


class Window:
    """Losses since the last line of metrics: added up on the device, fetched only when a line is written.

    It also remembers the first step whose loss was not finite, on the device, and which records every step since
    the last check saw, so that the run need not wait for the device each step to name them.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._none = torch.tensor(2**62, device=world.device)
        self._first_bad = self._none.clone()
        self._ids: dict[int, list[np.ndarray]] = {}
        self.sums = torch.zeros(len(LOSSES), dtype=torch.float64, device=world.device)
        self.count = 0

    def add(self, step: int, losses: Tensor, ids: list[np.ndarray]) -> None:
        """Takes a step's losses, float [3] on the device, and its record ids, one array a micro-batch."""
        self.sums += losses
        self.count += 1
        here = torch.full_like(self._none, step)
        bad = ~torch.isfinite(losses).all()
        self._first_bad = torch.minimum(self._first_bad, torch.where(bad, here, self._none))
        self._ids[step] = ids

    def check(self) -> None:
        """Raises LossError on every process if any loss since the last check was not finite on any of them."""
        mine = int(self._first_bad)
        first = int(self._world.minimum(self._first_bad.clone()))
        if first == int(self._none):
            self._ids.clear()
            return
        where = "another process, which names its records"
        if mine == first:
            where = f"records {' '.join(str(i) for i in np.concatenate(self._ids[first]).tolist())}"
        raise LossError(
            f"the loss of step {first} is not a finite number, in {where}. The last checkpoint is from before it. "
            f"Look at those records. {REMEDY}"
        )

    def state(self) -> dict[str, Any]:
        """Sums and count for a checkpoint, the same on every process."""
        return {"sums": self._world.mean(self.sums.clone()).tolist(), "count": self.count}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state, on any number of processes.

        What all have together is put into the first: shares of it in each would be added up and divided in other
        roundings than those of a run that was not stopped.
        """
        share = self._world.size if self._world.main else 0
        self.sums.copy_(torch.tensor(state["sums"], dtype=torch.float64) * share)
        self.count = int(state["count"])

    def flush(self) -> dict[str, float]:
        """Means over steps and processes since the last flush, by name."""
        means = (self._world.mean(self.sums.clone()) / max(1, self.count)).tolist()
        self.sums.zero_()
        self.count = 0
        return dict(zip(LOSSES, means, strict=True))


class Clock:
    """Time spent on steps, and the part of it spent waiting for data. Validation and saving do not count."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self._waited = 0.0
        self._images = 0

    def waiting(self, batches: Iterator[T]) -> Iterator[T]:
        """The same batches, the time until each comes noted."""
        while True:
            begin = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._waited += time.perf_counter() - begin
            yield batch

    def add(self, images: int) -> None:
        self._images += images

    def flush(self) -> dict[str, float]:
        """``img_per_s`` and ``data_wait`` since the last flush; starts anew."""
        spent = max(time.perf_counter() - self._begin, 1e-9)
        numbers = {"img_per_s": self._images / spent, "data_wait": min(1.0, self._waited / spent)}
        self.restart()
        return numbers

    def restart(self) -> None:
        """Forgets the time since the last flush."""
        self._begin, self._waited, self._images = time.perf_counter(), 0.0, 0


class Sink(Protocol):
    """Something that takes a line of metrics."""

    def write(self, line: Mapping[str, float]) -> None: ...


class MetricsFile:
    """``metrics.jsonl``: one JSON object a line, no step twice.

    Lines beyond the step a run resumes from, and a last line that was cut short, are dropped on opening. What comes
    later of the step of the last line is added to that line.
    """

    def __init__(self, path: Path, resumed_step: int) -> None:
        self._path = path
        self._rewrite(line for line in read_metrics(path) if line["step"] <= resumed_step)

    def write(self, line: Mapping[str, float]) -> None:
        if line["step"] == self.last.get("step"):
            self._file.close()
            self._rewrite([*read_metrics(self._path), line])
            return
        self.last = dict(line)
        self._file.write(json.dumps(self.last) + "\n")
        self._file.flush()

    def _rewrite(self, lines: Iterable[Mapping[str, float]]) -> None:
        """Writes the file anew, one line a step: of two that say the same of a step the first one counts."""
        by_step: dict[float, dict[str, float]] = {}
        for line in lines:
            by_step[line["step"]] = {**line, **by_step.get(line["step"], {})}
        write_text(self._path, "".join(json.dumps(line) + "\n" for line in by_step.values()))
        self.last = next(reversed(by_step.values()), {})
        """The last line; empty where there is none."""
        self._file = self._path.open("a", encoding="utf-8")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file; an empty list where there is none."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines
