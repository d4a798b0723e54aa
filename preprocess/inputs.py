"""From what a user names on the command line to files, and from files to scene ids."""

import glob
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path


class PlanError(ValueError):
    """Inputs that cannot become a dataset; the message names file or key and the remedy."""


def find_files(patterns: Sequence[str], what: str) -> list[str]:
    """Files that match globs, or stand in text lists (``@list.txt``, a path a line), sorted, without doubles.

    Raises PlanError for a pattern that matches nothing.
    """
    found: set[str] = set()
    for pattern in patterns:
        if pattern.startswith("@"):
            found.update(_listed(pattern[1:], what))
            continue
        # a file whose name holds brackets is no pattern
        matches = (
            [pattern] if os.path.isfile(pattern) else list(filter(os.path.isfile, glob.iglob(pattern, recursive=True)))
        )
        if not matches:
            hint = "a folder: add /*.tif to it" if os.path.isdir(pattern) else "nothing matches"
            raise PlanError(f"{what} {pattern!r}: {hint} (current folder: {os.getcwd()})")
        found.update(os.path.abspath(path) for path in matches)
    return sorted(found)


def _listed(path: str, what: str) -> list[str]:
    try:
        lines = [line.strip() for line in Path(path).read_text().splitlines()]
    except OSError as error:
        raise PlanError(f"{what} @{path}: the list cannot be read ({error})") from error
    base = Path(path).resolve().parent
    listed = [os.path.abspath(base / line) for line in lines if line and not line.startswith("#")]
    if missing := [file for file in listed if not os.path.isfile(file)]:
        raise PlanError(f"{what} @{path}: {len(missing)} of its files do not exist, the first is {missing[0]}")
    return listed


def scene_ids(paths: Sequence[str]) -> dict[str, str]:
    """Path to scene id: the file's name without ending, with as many folders before it as make it unique.

    Names in one folder that differ in nothing but the ending keep it.
    """
    bare = Counter(os.path.splitext(path)[0] for path in paths)
    names = {path: Path(path).name if bare[os.path.splitext(path)[0]] > 1 else Path(path).stem for path in paths}
    ids, depth = dict(names), 0
    while len(set(ids.values())) < len(ids):
        depth += 1
        counts = Counter(ids.values())
        for path, name in ids.items():
            if counts[name] > 1:
                ids[path] = "/".join((*Path(path).parts[-1 - depth : -1], names[path]))
    return ids
