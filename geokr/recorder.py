"""Where a run's numbers and pictures go: console, ``metrics.jsonl``, TensorBoard, PNG files."""

from collections.abc import Mapping
from pathlib import Path

import torch

from geokr import panels
from geokr.batch import Batch
from geokr.facts import Facts
from geokr.metrics import MetricsFile, Sink
from geokr.options import LogOptions
from geokr.progress import Console, TensorBoard
from geokr.train import Learner


class Recorder:
    """Console, ``metrics.jsonl``, TensorBoard, PNG files. Only process 0 (``main``) writes anything."""

    def __init__(self, log: LogOptions, folder: Path, facts: Facts, start: int, *, main: bool) -> None:
        self._facts, self._folder, self._count = facts, folder, log.panels if main else 0
        self._console = Console(facts.steps, start) if main else None
        self._board = TensorBoard(folder / "tensorboard", start) if main and log.tensorboard else None
        self._file = MetricsFile(folder / "metrics.jsonl", start) if main else None
        self._sinks: list[Sink] = [s for s in (self._file, self._console, self._board) if s is not None]
        self.validation: dict[str, float] = {}
        """The last validation's figures."""
        self.validated = 0
        """The step after which they were taken."""

    def tick(self, step: int) -> None:
        if self._console is not None:
            self._console.step(step)

    def record(self, line: Mapping[str, float]) -> None:
        found = {key: value for key, value in line.items() if key.startswith("val/")}
        if found:
            self.validation, self.validated = found, int(line["step"])
        for sink in self._sinks:
            sink.write(line)

    def written_figures(self, step: int) -> dict[str, float]:
        """A validation's figures that ``metrics.jsonl`` already has of this step, its last; process 0 alone knows."""
        line = self._file.last if self._file is not None else {}
        return {key: line[key] for key in line if key.startswith("val/")} if line.get("step") == step else {}

    @torch.no_grad()
    def panel(self, learner: Learner, step: int, batch: Batch) -> None:
        """Draws the first tiles of a training batch beside target, student and teacher, both in eval mode."""
        if not self._count:
            return
        images_NCHW, inputs = batch.images[: self._count], learner.inputs(batch, self._count)
        shares = []
        for model in (learner.student, learner.teacher):
            training = model.training
            model.eval()  # a teacher in training mode would move its statistics, in this process alone
            try:
                with learner.autocast():
                    shares.append(model(*inputs).softmax(1).cpu().numpy())
            finally:
                model.train(training)
        pictures = panels.display_images(images_NCHW, panels.rgb_channels(self._facts.band_names))
        targets = batch.fractions[: self._count].cpu().numpy()
        drawn = panels.draw_panels(
            [panels.Panel(*parts) for parts in zip(pictures, targets, *shares, strict=True)],
            self._facts.manifest.classes,
            f"Step {step}: augmented training tiles and their land cover",
        )
        panels.write_png(drawn, self._folder / "panels" / f"step-{step:08d}.png")
        if self._board is not None:
            self._board.image("panels", step, drawn)

    def close(self) -> None:
        for part in (self._console, self._board):
            if part is not None:
                part.close()
