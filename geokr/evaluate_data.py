"""Labelled images to evaluate a backbone on, in a folder a class; see geokr.evaluate_records for packed ones.

    DIR/CLASS/*.png                     split by a hash of the names: 60 % train, 20 % val, 20 % test of each class
    DIR/{train,val,test}/CLASS/*.png    as they are; without val, a fifth of train

N images, C bands, H x W pixels, K classes.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from geokr.config import ConfigError, suggestion
from geokr.evaluate_images import GEO, PLAIN, check_data, hash_of, read, same_form

PARTS = ("train", "val", "test")
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}  # folders by that name
LEAST = 3  # images of a class that is split by names: one for each part
LEFT = (".", "__MACOSX")  # how names begin of what systems and editors leave
SHOWN = 5


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Images and what they show. read: numbers of images to [H, W, C] each. targets: float64 [N, K], rows of sum 1.

    names: one an image, for messages. groups: int64 [N], a number for images that are no independent samples of what
    there is, as tiles that overlap; None where each stands for itself.
    """

    names: Sequence[str]
    targets: np.ndarray
    read: Callable[[Sequence[int]], list[np.ndarray]]
    groups: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.names)

    @property
    def labels(self) -> np.ndarray:
        """The class of each image, or the one with the largest share; int64 [N]."""
        return self.targets.argmax(1)

    def some(self, ids: np.ndarray) -> "Part":
        """The images of these numbers, in that order."""
        return Part([self.names[int(i)] for i in ids], self.targets[ids], lambda n: self.read([int(ids[i]) for i in n]))


@dataclass(frozen=True, slots=True, eq=False)
class Data:
    """What there is to evaluate on. soft: whether targets are shares of several classes. dtype, bands: of images.
    names: of the bands, where they are known."""

    path: str
    classes: tuple[str, ...]
    soft: bool
    dtype: str
    bands: int
    parts: dict[str, Part] = field(default_factory=dict)
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in PARTS:
            counts = np.bincount(self.parts[name].labels, minlength=len(self.classes))
            if not self.soft and (counts == 0).any():
                lacking = [self.classes[k] for k in np.flatnonzero(counts == 0)[:SHOWN].tolist()]
                raise ConfigError(f"--data {self.path}: {name} has no image of {', '.join(lacking)}")
            if not len(self.parts[name]):
                raise ConfigError(f"--data {self.path}: {name} holds no image")


def open_folders(path: str | Path) -> Data:
    """Finds out which of the forms a folder has. Raises ConfigError saying what is wrong with it; no pixel is decoded
    for that but those of files that say where they have no data."""
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigError(f"--data {folder}: there is no such folder")
    given = given_parts(folder)
    return _given(folder, given) if given else _folders(folder)


def given_parts(folder: Path) -> dict[str, Path]:
    """The folders of a split that a user has made, by part; none where the folder is not split. Raises ConfigError
    where it is and lacks train or test, or has one of them under two names."""
    named = sorted(below for below in folder.iterdir() if below.name.lower() in SPLITS)
    if not all(below.is_dir() for below in named):
        return {}
    given: dict[str, Path] = {}
    for below in named:
        if (first := given.setdefault(SPLITS[below.name.lower()], below)) != below:
            raise ConfigError(
                f"--data {folder}: {first.name} and {below.name} are both {SPLITS[below.name.lower()]}; put them into "
                "one folder, or rename the one that is something else"
            )
    if given and (lacking := [name for name in ("train", "test") if name not in given]):
        raise ConfigError(
            f"--data {folder}: is split into {' and '.join(sorted(below.name for below in given.values()))} and has no "
            f"{lacking[0]}; add it, or rename what is to be it"
        )
    return given


# ----------------------------------------------------------------------------------------------- folders a class


def _given(folder: Path, given: dict[str, Path]) -> Data:
    files = {name: _files(given[name]) for name in PARTS if name in given}
    classes = sorted(files["train"])
    for name, found in files.items():
        if unknown := sorted(set(found) - set(classes)):
            raise ConfigError(
                f"--data {folder}: {name} has a class {unknown[0]!r} that train lacks{suggestion(unknown[0], classes)}"
            )
    pairs = {name: [(p, k) for k, c in enumerate(classes) for p in found.get(c, [])] for name, found in files.items()}
    if "val" not in pairs:
        ordered = sorted(pairs["train"], key=lambda pair: (pair[1], hash_of(pair[0], folder)))  # class by class
        first = {k: next(n for n, pair in enumerate(ordered) if pair[1] == k) for _, k in ordered}
        pairs["val"] = [pair for n, pair in enumerate(ordered) if (n - first[pair[1]]) % 5 == 0]
        pairs["train"] = [pair for n, pair in enumerate(ordered) if (n - first[pair[1]]) % 5]
    return _data(folder, classes, pairs)


def _folders(folder: Path) -> Data:
    files = _files(folder)
    classes = sorted(files)
    pairs: dict[str, list[tuple[Path, int]]] = {name: [] for name in PARTS}
    for k, name in enumerate(classes):
        ordered = sorted(files[name], key=lambda path: hash_of(path, folder))
        if len(ordered) < LEAST:
            raise ConfigError(
                f"--data {folder}: class {name!r} has {len(ordered)} image(s); at least {LEAST} are needed to split "
                "them into train, val and test, or give those as folders above the classes"
            )
        fifth = max(1, round(len(ordered) / 5))
        pairs["test"] += [(path, k) for path in ordered[:fifth]]
        pairs["val"] += [(path, k) for path in ordered[fifth : 2 * fifth]]
        pairs["train"] += [(path, k) for path in ordered[2 * fifth :]]
    return _data(folder, classes, pairs)


def images_below(folder: Path) -> list[Path]:
    """All images, but for what systems and editors leave: hidden files and folders, and __MACOSX.

    Links to folders are entered, but no folder twice: two of them may lead to the same one, or back up.
    """
    found, entered = [], set()
    for place, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in entered:
            folders.clear()
            continue
        entered.add(real)
        inside = [name for name in folders if not name.startswith(LEFT)]
        folders[:] = sorted(inside, key=lambda name, at=place: (os.path.islink(os.path.join(at, name)), name))
        found += [Path(place, name) for name in files if not name.startswith(LEFT)]
    return sorted(path for path in found if path.suffix.lower() in PLAIN + GEO)


def _files(folder: Path) -> dict[str, list[Path]]:
    """Class to its images."""
    found = {
        below.name: images_below(below)
        for below in sorted(folder.iterdir())
        if below.is_dir() and not below.name.startswith(LEFT)
    }
    if len(found) < 2:
        raise ConfigError(f"{folder}: expected a folder for each of two classes or more, or records with manifest.json")
    if empty := [name for name, files in found.items() if not files]:
        raise ConfigError(f"{folder / empty[0]}: holds no image ({', '.join(PLAIN + GEO)})")
    return found


def _data(folder: Path, classes: Sequence[str], pairs: dict[str, list[tuple[Path, int]]]) -> Data:
    paths = [path for some in pairs.values() for path, _ in some]
    bands, dtype = same_form(paths)
    check_data(paths)
    eye = np.eye(len(classes))
    parts = {
        name: Part([str(path) for path, _ in some], eye[[k for _, k in some]], _reader([path for path, _ in some]))
        for name, some in pairs.items()
    }
    return Data(str(folder), tuple(classes), False, dtype, bands, parts, names_of(paths, bands))


def names_of(paths: Sequence[Path], bands: int) -> tuple[str, ...]:
    """Of the bands, where the files are pictures of three: those of GeoTIFFs may be in any order."""
    pictures = bands == 3 and all(path.suffix.lower() in PLAIN for path in paths)
    return ("red", "green", "blue") if pictures else ()


def _reader(paths: Sequence[Path]) -> Callable[[Sequence[int]], list[np.ndarray]]:
    return lambda numbers: [read(paths[n]) for n in numbers]
