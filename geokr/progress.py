"""What the person at the console sees, and what TensorBoard shows."""

import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

log = logging.getLogger(__name__)


def clock_text(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Console:
    """Progress of a run: a bar on a terminal, else a line of text for each line of metrics.

    Both show step, loss, images/s, share of time spent waiting for data, and time left.
    """

    def __init__(self, total: int, done: int) -> None:
        self._total, self._first = total, done
        self._begin = time.perf_counter()
        terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True) if terminal else None

    def step(self, step: int) -> None:
        """After every step; costs nothing without a terminal."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def write(self, line: Mapping[str, float]) -> None:
        """After every line of metrics, which may hold a validation and nothing else."""
        step = int(line["step"])
        if "loss" in line:
            self._trained(step, line)
        values = [f"{key.removeprefix('val/')} {value:.4f}" for key, value in line.items() if key.startswith("val/")]
        if values:
            log.info("step %d held-out blocks: %s", step, "  ".join(values))

    def _trained(self, step: int, line: Mapping[str, float]) -> None:
        parts = [f"loss {line['loss']:.4f}", f"{line['img_per_s']:.0f} img/s", f"data wait {line['data_wait']:.0%}"]
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(parts))
        else:
            done = max(1, step - self._first)
            left = (time.perf_counter() - self._begin) / done * (self._total - step)
            log.info("step %d/%d  %s  left %s", step, self._total, "  ".join(parts), clock_text(left))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class TensorBoard:
    """Scalars and panels for TensorBoard. What a stopped run wrote beyond ``resumed_step`` is hidden."""

    def __init__(self, folder: Path, resumed_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=resumed_step + 1 if resumed_step else None)

    def write(self, line: Mapping[str, float]) -> None:
        for key, value in line.items():
            if key != "step":
                self._writer.add_scalar(key, value, int(line["step"]))
        if any(key.startswith("val/") for key in line):
            self._writer.flush()

    def image(self, name: str, step: int, picture_HWC: np.ndarray) -> None:
        """picture_HWC: uint8 RGB."""
        self._writer.add_image(name, picture_HWC, step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()
