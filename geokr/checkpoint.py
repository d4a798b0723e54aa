"""Checkpoints: folders that are whole or not there, checked when read, and read without running code.

    checkpoints/step-00000400/state.safetensors   every tensor, by name
    checkpoints/step-00000400/state.json          step, samples, numbers, identity, versions, hashes
    checkpoints/latest                            the newest folder's name, for people and scripts

A checkpoint is written into a temporary folder, flushed to the disk and renamed, so that a process killed while
saving leaves the one before. ``state.json`` holds the SHA-256 of the tensors' file and of itself.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

log = logging.getLogger(__name__)

TENSORS, NUMBERS, LATEST = "state.safetensors", "state.json", "latest"
FORMAT = 1
_NAME = re.compile(r"^step-(\d{8,})$")


class CheckpointError(ValueError):
    """A checkpoint that is damaged, or a run without a sound one."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a checkpoint holds. tensors: on the CPU. meta: JSON values; ``step`` and ``samples`` among them."""

    tensors: Mapping[str, Tensor]
    meta: Mapping[str, Any]

    @property
    def step(self) -> int:
        return int(self.meta["step"])


def _flush(path: Path) -> None:
    """Forces a file's or folder's bytes to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(meta: Mapping[str, Any]) -> str:
    """SHA-256 of the meta data without its own digest."""
    rest = {key: value for key, value in meta.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def write_text(path: Path, text: str) -> None:
    """Writes a file that is either the old one or the new one, whatever happens meanwhile."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _flush(path.parent)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file with the permissions of any new file here: safetensors 0.8 makes it for its owner alone.

    They are taken from an empty file in its place, since asking for the umask means changing it under other threads.
    """
    path.unlink(missing_ok=True)
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    safetensors.torch.save_file(dict(tensors), path, metadata)
    if stat.S_IMODE(path.stat().st_mode) != mode:
        with contextlib.suppress(OSError):  # of file systems without permissions: the tensors are written
            path.chmod(mode)


def save(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Writes ``folder/step-...``, moves ``latest``, keeps it and the ``keep - 1`` before it. Returns its path.

    Checkpoints of later steps go too: they are damaged ones that the run went back behind, and must not count.
    Raises CheckpointError if it cannot be written; those before it stay.
    """
    final = folder / f"step-{checkpoint.step:08d}"
    temporary = folder / f".tmp-{final.name}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(temporary, checkpoint)
        if final.exists():  # a damaged one that the run went back behind
            shutil.rmtree(final)
        temporary.rename(final)
        _flush(folder)
        write_text(folder / LATEST, final.name + "\n")
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"{final}: cannot be written ({error}); make room or access, then resume from the checkpoint before it"
        ) from error
    found = list_checkpoints(folder)
    newest = found.index(final)
    for old in found[:newest] + found[newest + keep :]:
        try:
            shutil.rmtree(old)
        except OSError as error:  # as on NFS, where somebody reads it; the new one is sound
            log.warning("%s: the old checkpoint cannot be removed yet (%s)", old, error)
    for rest in folder.glob(".tmp-*"):
        shutil.rmtree(rest, ignore_errors=True)
    return final


def _write(folder: Path, checkpoint: Checkpoint) -> None:
    """Both files, flushed to the disk, in a new folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    tensors = {name: tensor.contiguous() for name, tensor in checkpoint.tensors.items()}
    write_tensors(folder / TENSORS, tensors)
    meta = {**checkpoint.meta, "format": FORMAT, "sha256": _sha256(folder / TENSORS)}
    (folder / NUMBERS).write_text(json.dumps({**meta, "digest": _digest(meta)}, indent=1) + "\n", encoding="utf-8")
    for path in (folder / TENSORS, folder / NUMBERS, folder):
        _flush(path)


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first, sound or not."""
    if not folder.is_dir():
        return []
    named = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.match(path.name)) and path.is_dir()]
    return [path for _, path in sorted(named, reverse=True)]


def load(path: Path) -> Checkpoint:
    """One checkpoint, its hashes checked. Raises CheckpointError naming file and fault."""
    try:
        meta = json.loads((path / NUMBERS).read_bytes())
        if not isinstance(meta, dict) or meta.get("digest") != _digest(meta):
            raise CheckpointError(f"{path / NUMBERS}: its hash does not match: it is damaged")
        if meta["format"] != FORMAT:
            raise CheckpointError(f"{path / NUMBERS}: format {meta['format']}, this version of geokr reads {FORMAT}")
        if _sha256(path / TENSORS) != meta["sha256"]:
            raise CheckpointError(f"{path / TENSORS}: its hash does not match: it is damaged")
        return Checkpoint(safetensors.torch.load_file(path / TENSORS), meta)
    except (OSError, ValueError, KeyError, RecursionError, SafetensorError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: cannot be read ({type(error).__name__}: {error})") from error


def load_latest(folder: Path) -> Checkpoint | None:
    """The newest sound checkpoint, or None if there has never been one. A damaged one is passed over, aloud.

    Raises CheckpointError if there are checkpoints but none is sound: a run never starts again in silence.
    """
    faults = []
    for path in list_checkpoints(folder):
        try:
            checkpoint = load(path)
        except CheckpointError as error:
            faults.append(str(error))
            log.warning("%s; falling back to the checkpoint before it", error)
            continue
        if faults:
            log.warning("resuming from %s, step %d", path, checkpoint.step)
        return checkpoint
    if faults or (folder / LATEST).exists():
        listed = "; ".join(faults) or f"{folder / LATEST} names one, but it is gone"
        raise CheckpointError(
            f"{folder}: no sound checkpoint ({listed}). Restore one, or start again with another run.dir"
        )
    return None
