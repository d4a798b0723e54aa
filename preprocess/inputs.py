"""From what a user names on the command line to files, and from files to scene ids."""

import glob
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from preprocess import remote


class PlanError(ValueError):
    """Inputs that cannot become a dataset; the message names file or key and the remedy."""


def find_files(patterns: Sequence[str], what: str, allow_remote: bool = False) -> list[str]:
    """Files that match globs, or stand in text lists (``@list.txt``, a path a line), sorted, without doubles.

    Raises PlanError for a pattern that matches nothing.
    """
    return sorted({path for pattern in patterns for path in matches(pattern, what, allow_remote)[0]})


RENAME = "rename it (where it is Chinese: convmv -f gbk -t utf8 --notest FILE)"


def check_name(path: str, what: str, remedy: str = RENAME) -> str:
    """The path, if it is UTF-8: GDAL, Arrow and the manifest take no other. Raises PlanError that shows the bytes.

    Archives from Chinese systems hold names in GBK, which unzip and tar leave as they are.
    """
    try:
        path.encode()
    except UnicodeEncodeError:
        parts = Path(path).parts
        depth = next(n for n, part in enumerate(parts) if not _is_unicode(part))
        first = Path(*parts[: depth + 1])
        raise PlanError(f"{what} {printable(str(first))}: its name is not UTF-8; {remedy}") from None
    return path


def printable(text: str) -> str:
    """A name or an argument that any file can hold: bytes that are not UTF-8 become escapes such as ``\\xb6``."""
    return os.fsencode(text).decode(errors="backslashreplace")


def _is_unicode(text: str) -> bool:
    """Whether a name had no bytes for which Python puts surrogates."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def matches(pattern: str, what: str, allow_remote: bool, folders: bool = False) -> tuple[list[str], bool]:
    """(absolute paths and URLs that a pattern stands for, whether it names them itself and is no glob).

    folders: whether those that match are wanted too. Raises PlanError if there is none, or if a name is not UTF-8.
    """
    found, named = _matches(pattern, what, allow_remote, folders)
    for path in found:
        check_name(path, what)
    return found, named


def _matches(pattern: str, what: str, allow_remote: bool, folders: bool) -> tuple[list[str], bool]:
    if pattern.startswith("@"):
        return _listed(pattern[1:], what, allow_remote), True
    if remote.is_remote(pattern):
        return [checked_url(pattern, what, allow_remote)], True
    wanted = os.path.exists if folders else os.path.isfile
    # a file whose name holds brackets is no pattern
    if wanted(pattern):
        return [os.path.abspath(pattern)], True
    found = sorted(os.path.abspath(path) for path in glob.iglob(pattern, recursive=True) if wanted(path))
    if not found:
        hint = "a folder: add /*.tif to it" if os.path.isdir(pattern) else "nothing matches"
        raise PlanError(f"{what} {pattern!r}: {hint} (current folder: {os.getcwd()})")
    return found, False


def checked_url(url: str, what: str, allow_remote: bool) -> str:
    """The URL, if such are to be read and can be. Raises PlanError."""
    try:
        remote.virtual_path(url)
    except ValueError as error:
        raise PlanError(f"{what} {error}") from error
    if not allow_remote:
        raise PlanError(
            f"{what} {remote.shown(url)}: is not on this machine: give scene.remote=true to read it over the network, "
            "or copy it here first"
        )
    return url


def resolved(path: str, folder: str, where: str, allow_remote: bool) -> str:
    """A path or URL that stands in a list, relative to the list's folder (which may be a URL). Raises PlanError.

    Whether a local file exists shows when it is opened.
    """
    if not remote.is_remote(path) and remote.is_remote(folder) and not os.path.isabs(path):
        path = f"{folder.rstrip('/')}/{path.removeprefix('./')}"
    return checked_url(path, where, allow_remote) if remote.is_remote(path) else os.path.abspath(Path(folder) / path)


def _listed(path: str, what: str, allow_remote: bool) -> list[str]:
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"{what} @{path}: cannot be read as a text with a path a line ({error})") from error
    base = str(Path(path).resolve().parent)
    listed = [resolved(line, base, f"{what} @{path}:", allow_remote) for line in lines if line and line[0] != "#"]
    if missing := [file for file in listed if not remote.is_remote(file) and not os.path.exists(file)]:
        raise PlanError(f"{what} @{path}: {len(missing)} of its files do not exist, the first is {missing[0]}")
    return listed


def scene_ids(wanted: Sequence[tuple[str, str]]) -> list[str]:
    """An id for each (path, name): the name, with as many folders of the path before it as make it unique.

    Without a name it is the file's without ending. Names in one folder that differ in nothing but the ending keep it.
    """
    paths = [remote.shown(path) for path, _ in wanted]
    bare = Counter(os.path.splitext(path)[0] for path, (_, name) in zip(paths, wanted, strict=True) if not name)
    names = [
        name or (Path(path).name if bare[os.path.splitext(path)[0]] > 1 else Path(path).stem)
        for path, (_, name) in zip(paths, wanted, strict=True)
    ]
    ids, depth = list(names), 0
    while len(set(ids)) < len(ids):
        depth += 1
        counts = Counter(ids)
        ids = [
            "/".join((*Path(path).parts[-1 - depth : -1], name)) if counts[old] > 1 else old
            for path, name, old in zip(paths, names, ids, strict=True)
        ]
        if depth > 256:  # one file, wanted twice under one name
            raise PlanError(f"--scenes: two scenes are called {next(i for i, n in Counter(ids).items() if n > 1)!r}")
    return ids


def held_ids(wanted: Mapping[str, str], have: Mapping[str, str]) -> dict[str, str]:
    """Which of a command's scenes a dataset has: id in the command to id in the dataset. Both: id to fingerprint.

    How many folders an id begins with depends on what else a command names. So a scene is known also where the one id
    is the end of the other, after a ``/``; each scene of the dataset once.
    """
    found = {name: name for name, fingerprint in wanted.items() if have.get(name) == fingerprint}
    free: dict[str, list[str]] = {}
    for name, fingerprint in have.items():
        if name not in wanted:  # else it is there under its own id, or another file has taken that
            free.setdefault(fingerprint, []).append(name)
    for name, fingerprint in wanted.items():
        others = free.get(fingerprint, []) if name not in found else []
        other = next((one for one in others if one.endswith(f"/{name}") or name.endswith(f"/{one}")), None)
        if other is not None:
            found[name] = other
            others.remove(other)
    return found
