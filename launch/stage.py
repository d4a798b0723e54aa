"""Copies a run's records to a disk of this machine, every byte checked, before training reads them.

    python launch/stage.py --to DIR [--config FILE] [key=value ...]

Each dataset of data.records goes to DIR/NAME, NAME from the hash of its manifest, so that runs share what they have in
common and another version of a dataset is another folder. Files are hashed as they are copied and appear whole; a copy
that is there is not made again, and two processes do not make it at the same time. URLs are left alone: the run stages
those itself (data.cache_dir). Prints the override that makes a run read the copies. It loads no torch.
"""

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the folder on the path must be the project's, not this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from geokr.config import load, split_overrides
from geokr.manifests import MANIFEST, Manifest, check_folder, folder_of, load_manifest
from geokr.options import PretrainOptions
from geokr.records import SPLITS

_PIECE = 1 << 22
_THREADS = 4  # network storage gives one reader a fraction of what it gives several
_ATTEMPTS = 2


class StageError(ValueError):
    """Records that cannot be copied."""


def files_of(manifest: Manifest) -> dict[str, tuple[str, int | None]]:
    """Each file's name: its SHA-256, and its size where the manifest says it."""
    found: dict[str, tuple[str, int | None]] = {}
    for split in SPLITS:
        for shard in manifest.split(split).shards:
            found[shard.name] = shard.sha256, shard.bytes
            found[shard.index_name] = shard.index_sha256, None
    return found


def _copy(source: Path, target: Path) -> str:
    """Copies one file and returns its SHA-256; the target is flushed to the disk."""
    digest = hashlib.sha256()
    with source.open("rb") as reader, target.open("wb") as writer:
        while piece := reader.read(_PIECE):
            digest.update(piece)
            writer.write(piece)
        writer.flush()
        os.fsync(writer.fileno())
    return digest.hexdigest()


def _is_there(target: Path, expected: str, size: int | None) -> bool:
    """Whether the file is whole, by its size, or its hash where the manifest gives none: disks of nodes are swept."""
    if not target.is_file():
        return False
    return target.stat().st_size == size if size is not None else _hash(target.read_bytes()) == expected


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _bring(source: Path, target: Path, expected: str, size: int | None) -> None:
    """Copies one file under its name, unless it is there. Raises StageError if its hash stays wrong."""
    if _is_there(target, expected, size):
        return
    temporary = target.with_name(f".{target.name}.part")
    for _ in range(_ATTEMPTS):
        if _copy(source, temporary) == expected:
            temporary.replace(target)
            return
    temporary.unlink()
    raise StageError(f"{source}: its hash is not the manifest's: damaged or changed; pack again")


def _check_room(manifest: Manifest, folder: Path) -> None:
    wanted = files_of(manifest).items()
    missing = sum(size for name, (digest, size) in wanted if size and not _is_there(folder / name, digest, size))
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise StageError(
            f"{folder}: {missing / 1e9:.1f} GB of records do not fit its {free / 1e9:.1f} GB: choose another folder, "
            "or train from where they are"
        )


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Only one process stages into this folder at a time; the lock ends with the process."""
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def stage(source: Path, to: Path) -> Path:
    """The copy of a dataset in a folder of ``to``, made where it is not there yet, and made good where files of it are
    gone. source: its folder, or a manifest that it has grown beyond.

    Raises StageError, and RecordError where the source is no sound dataset.
    """
    while True:  # the dataset may grow meanwhile: what is read, what names the copy and what ends in it are one
        said = _manifest_bytes(source)
        manifest = load_manifest(source)
        if _manifest_bytes(source) == said:
            break
    check_folder(source, manifest)
    folder = to / _hash(said)[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            _check_room(manifest, folder)
            _bring_all(folder_of(source), folder, manifest)
            if not (folder / MANIFEST).exists():  # last: a folder with a manifest was whole once
                temporary = folder / f".{MANIFEST}.part"
                with temporary.open("wb") as writer:
                    writer.write(said)
                    writer.flush()
                    os.fsync(writer.fileno())
                temporary.replace(folder / MANIFEST)
    except OSError as error:
        raise StageError(f"{source} cannot be copied to {folder} ({error}); make room or access") from error
    return folder


def _manifest_bytes(source: Path) -> bytes:
    """Of the dataset's manifest; nothing where there is none, which reading it explains."""
    file = source / MANIFEST if folder_of(source) == source else source
    return file.read_bytes() if file.is_file() else b""


def _bring_all(source: Path, folder: Path, manifest: Manifest) -> None:
    with ThreadPoolExecutor(_THREADS) as pool:
        jobs = [
            pool.submit(_bring, source / name, folder / name, digest, size)
            for name, (digest, size) in files_of(manifest).items()
        ]
        for job in jobs:
            job.result()


def _expanded(to: Path) -> Path:
    """A folder whose name holds variables that each machine has its own value of, such as a job's own disk."""
    found = os.path.expandvars(to)
    if "$" in found:
        raise StageError(f"{to}: the environment of {os.uname().nodename} has no such variable; name a folder")
    return Path(found)


def override(arguments: Sequence[str], to: Path) -> list[str]:
    """Stages what a run's arguments name, and returns the override for the copies; nothing to stage gives none.

    to: variables in it are this machine's. Raises ConfigError, RecordError or StageError.
    """
    to = _expanded(to)
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--config")
    others, overrides = split_overrides(arguments)
    data = load(PretrainOptions, parser.parse_args(others).config, overrides).data
    if not data.sources:
        return []
    entries = []
    for source in data.sources:
        local = "://" not in source.path or source.path.startswith("file://")
        path = str(stage(Path(source.folder), to)) if local else source.path
        entries.append(source.model_dump() | {"path": path})
    whole = entries[0]["path"] if isinstance(data.records, str) else entries
    return [f"data.records={json.dumps(whole)}"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="stage.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--to", type=Path, required=True, metavar="DIR")
    chosen, rest = parser.parse_known_args(arguments)
    try:
        for line in override(rest, chosen.to):
            print(line)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
