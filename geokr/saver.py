"""Checkpoints written beside the training: the loop takes a snapshot and goes on, a thread writes it to the disk.

The snapshot lies in host memory that later snapshots use again: as much as one checkpoint, in process 0 alone. From
a GPU the copies go into pinned memory in the order of the GPU's own work, so that the loop waits for none of them and
later steps cannot change what is copied; a copy on the GPU would be quicker, but a run that fills the GPU's memory has
no room for one.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from geokr import checkpoint
from geokr.checkpoint import Checkpoint


class Snapshot:
    """Copies of tensors in host memory, which the next snapshot overwrites."""

    def __init__(self) -> None:
        self._copies: dict[str, Tensor] = {}

    def take(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Callable[[], None]]:
        """Contiguous copies by name, and a function that waits until they are complete."""
        self._copies = {name: self._place(name, tensor) for name, tensor in tensors.items()}
        devices = {tensor.device for tensor in tensors.values() if tensor.is_cuda}
        for name, tensor in tensors.items():
            self._copies[name].copy_(tensor, non_blocking=True)
        events = [torch.cuda.current_stream(device).record_event() for device in devices]

        def wait() -> None:
            for event in events:
                event.synchronize()

        return self._copies, wait

    def _place(self, name: str, tensor: Tensor) -> Tensor:
        old = self._copies.get(name)
        if old is not None and old.shape == tensor.shape and old.dtype == tensor.dtype:
            return old
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)


class Saver:
    """Writes the checkpoints of one folder in a thread, never two at once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._snapshot = Snapshot()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[Path] | None = None
        self.held_s = 0.0
        """Seconds for which saving has held the training up: checks, snapshots, and waiting for the disk."""
        self._told_s = 0.0

    @contextlib.contextmanager
    def holding(self) -> Iterator[None]:
        """Adds the time inside the block to ``held_s``."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.held_s += time.perf_counter() - begin

    def take_held(self) -> float:
        """What has been added to ``held_s`` since the last call."""
        new, self._told_s = self.held_s - self._told_s, self.held_s
        return new

    def save(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], keep: int) -> None:
        """Takes a snapshot, which a thread writes. Waits first for the one before to be written.

        Raises what :meth:`wait` raises: then nothing of this one is written.
        """
        self.wait()
        copies, complete = self._snapshot.take(tensors)

        def write() -> Path:
            complete()
            return checkpoint.save(self._folder, Checkpoint(copies, meta), keep)

        self._writing = self._thread.submit(write)

    def poll(self) -> None:
        """Raises CheckpointError if the last checkpoint could not be written; waits for nothing."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Waits until nothing is being written. Raises CheckpointError, once, if the last could not be written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Ends the thread, after what it is writing."""
        self._thread.shutdown()
