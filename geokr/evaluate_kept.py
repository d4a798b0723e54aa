"""Rows of an evaluation that was cut short, kept in ``FILE.part`` beside the ``--json FILE`` that they go into.

The first line says what decides all rows, as a hash; a line follows for each finished row. The next run takes the rows
where its own hash is that one, and begins anew where anything differs.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from geokr.config import ConfigError
from geokr.evaluate_images import GEO, PLAIN

ENDINGS = (*PLAIN, *GEO, ".json", ".yaml", ".tfrecord", ".idx")  # of what figures may depend on in a folder of data

Row = dict[str, Any]
Key = tuple[str, str, float]


def part_of(path: Path) -> Path:
    """Where the rows of an unfinished report are kept."""
    return path.with_name(f"{path.name}.part")


class Kept:
    """Rows by weights, task and percent of the labels. Without a path nothing is kept."""

    def __init__(
        self, path: Path | None, decides: Mapping[str, Any] | None = None, say: Callable[[str], None] = print
    ) -> None:
        """path: of the report. decides: what decides the rows, as JSON has it. Raises ConfigError if the file cannot be
        written, before hours are spent."""
        self.path, self.say = path and part_of(path), say
        self.rows: dict[Key, Row] = {}
        if self.path is None:
            return
        head = json.dumps({"decided_by": hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()})
        lines = _lines(self.path)
        if lines and lines[0] == head:
            self.rows = {_key(row): row for row in map(json.loads, lines[1:])}
            if self.rows:
                say(f"{self.path}: {len(self.rows)} finished row(s) of a run that was cut short are taken over")
        elif lines:
            say(f"{self.path}: is of other weights, data, settings or versions; everything is computed anew")
        try:  # also without what a cut left of a last line
            self.path.write_text("\n".join([head, *map(json.dumps, self.rows.values()), ""]), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--json {path}: {self.path} beside it cannot be written ({error.strerror})") from error

    def has(self, weights: str, task: str, percent: float) -> bool:
        return (weights, task, percent) in self.rows

    def row(self, weights: str, task: str, percent: float, make: Callable[[], Row]) -> Row:
        """The row that is there, or the one that is made, which is then kept. Its weights, task and labels_percent are
        those that are given here."""
        if self.has(weights, task, percent):
            return self.rows[weights, task, percent]
        made = make()
        if self.path is not None:
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(made) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:  # a full disk ends no training that goes well
                self.say(f"{self.path}: cannot be written ({error.strerror}); a run that is cut short begins anew")
        return made


def _key(row: Row) -> Key:
    return row["weights"], row["task"], row["labels_percent"]


def _lines(path: Path) -> list[str]:
    """Whole lines of JSON, up to the first that is none."""
    try:
        found = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    for n, line in enumerate(found):
        try:
            json.loads(line)
        except ValueError:
            return found[:n]
    return found


# --------------------------------------------------------------------------------------------- what decides rows


def hashes(names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of weights and of the cards beside them, by path; words that name no file are left out."""
    found = {}
    for name in names:
        for path in (Path(name), Path(f"{name}.json")):
            if path.is_file():
                with path.open("rb") as file:
                    found[str(path)] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def listing(folder: str, outputs: Iterable[Path | None]) -> str:
    """A hash of the paths, sizes and times of change of a folder's files, but for those that the command writes."""
    written = {path.absolute() for path in outputs if path is not None}
    digest = hashlib.sha256(os.path.abspath(folder).encode(errors="surrogateescape"))
    for path in sorted(_files(folder)):
        if path.absolute() not in written:
            status = path.stat()
            digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _files(folder: str) -> Iterator[Path]:
    """Of the endings that count, below a folder and the folders that links in it lead to."""
    seen: set[tuple[int, int]] = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        status = os.stat(root)
        if (status.st_dev, status.st_ino) in seen:  # a link to a folder above it
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        yield from (
            path
            for name in names
            if name.lower().endswith(ENDINGS) and not name.startswith(".") and (path := Path(root, name)).is_file()
        )
