"""The folder of a run: who may write it, what it belongs to, its checkpoints.

config.yaml    the resolved configuration of the last start
run.json       what the run is (method, model, data) and the card of its weights
metrics.jsonl, tensorboard/, panels/, checkpoints/
"""

import fcntl
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from geokr import checkpoint, state
from geokr.checkpoint import Checkpoint, write_text
from geokr.config import ConfigError, to_yaml
from geokr.distributed import World
from geokr.identity import check_identity
from geokr.metrics import REMEDY, LossError, Window
from geokr.options import PretrainOptions
from geokr.saver import Saver
from geokr.train import Learner

log = logging.getLogger(__name__)


class RunFolder:
    """A run's folder, held by one run at a time: process 0 locks it, and the lock ends with the process."""

    def __init__(self, path: str | Path, world: World) -> None:
        self.path = Path(path)
        self.world = world
        self.saver = Saver(self.checkpoints)
        self._lock = None
        if world.main:
            self._open()
        world.barrier()

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def _open(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ConfigError(f"run.dir={self.path}: cannot be written ({error}); choose another folder") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"run.dir={self.path}: another run is writing it; choose another run.dir") from error
        except OSError as error:  # storage without locks
            log.warning("%s: its storage knows no locks (%s); take care that one run writes it", self.path, error)

    def settle(self) -> None:
        """Waits, on every process, until the last checkpoint is on the disk. Raises CheckpointError if it is not."""
        with self.saver.holding():
            self.saver.wait()
            self.world.barrier()

    def close(self) -> None:
        """Lets the folder go once nothing is being written to it any more."""
        try:
            self.saver.wait()
        except Exception as error:  # another error ends the run, and this one must not take its place
            log.error("%s", error)
        self.saver.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def previous(self, resume: str, current: Mapping[str, Any]) -> Checkpoint | None:
        """The checkpoint to go on from, or None for a new run.

        Raises ConfigError if the folder belongs to another run, or ``checkpoint.resume`` forbids or misses one;
        CheckpointError if there are checkpoints but none is sound.
        """
        found = checkpoint.load_latest(self.checkpoints)
        self._agree(found)
        if found is not None and resume == "never":
            raise ConfigError(f"{self.path} has a checkpoint of step {found.step} and checkpoint.resume=never")
        if found is None and resume == "must":
            raise ConfigError(f"{self.path} has no checkpoint and checkpoint.resume=must; check run.dir")
        if found is not None:
            check_identity(found.meta["identity"], current, str(self.path))
        elif (self.path / "run.json").is_file():
            check_identity(read_run(self.path)["identity"], current, str(self.path))
        return found

    def _agree(self, found: Checkpoint | None) -> None:
        step = torch.tensor([found.step if found else -1], device=self.world.device)
        if int(self.world.minimum(step.clone())) != int(self.world.maximum(step.clone())):
            raise ConfigError(
                f"run.dir={self.path}: processes see different checkpoints there; it must be on storage that all "
                "machines share"
            )

    def begin(self, options: PretrainOptions, identity: Mapping[str, Any], card: Mapping[str, Any]) -> None:
        """Writes down what the run is (process 0)."""
        if self.world.main:
            write_text(self.path / "config.yaml", to_yaml(options))
            run = {"identity": identity, "card": card}
            write_text(self.path / "run.json", json.dumps(run, indent=1, ensure_ascii=False) + "\n")


def read_run(path: Path) -> dict[str, Any]:
    """``run.json`` of a run folder. Raises ConfigError if there is none or it is damaged."""
    file = path / "run.json"
    try:
        run = json.loads(file.read_bytes())
        assert {"identity", "card"} <= run.keys()
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path}: not a run's folder, it holds no run.json; give the run.dir of a training run"
        ) from error
    except (OSError, ValueError, AssertionError, AttributeError) as error:
        raise ConfigError(f"{file}: damaged ({error})") from error
    return run


def restore(found: Checkpoint, student: Any, teacher: Any, optimizer: Optimizer, scaler: state.Scaler) -> None:
    """Fills models, optimizer and scaler with a checkpoint's state."""
    state.load_model("student", student, found.tensors)
    state.load_model("teacher", teacher, found.tensors)
    state.load_optimizer(optimizer, student, found.tensors, found.meta["optimizer"])
    if scaler.is_enabled() and found.meta["scaler"]:
        scaler.load_state_dict(dict(found.meta["scaler"]))


def save_checkpoint(
    folder: RunFolder,
    learner: Learner,
    window: Window,
    *,
    step: int,
    keep: int,
    meta: Mapping[str, Any],
) -> None:
    """One checkpoint of the whole state: taken now, written by a thread of process 0 while training goes on.

    Raises ReplicaError if the replicas differ, LossError if a weight is not a finite number: nothing is saved then.
    Raises CheckpointError if the one before could not be written.
    """
    with folder.saver.holding():
        moments, numbers = state.optimizer_state(learner.optimizer, learner.student)
        models = state.model_tensors("student", learner.student) | state.model_tensors("teacher", learner.teacher)
        learner.world.check_replicas(list(models.values()), "a weight or running statistic")
        if not state.all_finite(models | moments):
            raise LossError(
                f"after step {step} a weight is not a finite number, though the loss was; nothing was saved. {REMEDY}"
            )
        numbers_of_window = window.state()
        if learner.world.main:
            full = {
                **meta,
                "step": step,
                "optimizer": numbers,
                "scaler": state.scaler_numbers(learner.scaler),
                "window": numbers_of_window,
            }
            folder.saver.save(models | moments, full, keep)
