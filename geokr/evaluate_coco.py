"""Images with boxes to evaluate detection on, described by COCO's JSON.

    DIR/train.json, val.json, test.json         or in DIR/annotations, also as instances_train2017.json; without test,
                                                val is the test and a fifth of train is val; without val, that fifth
    DIR/train/*.json, ...                       one in each split's folder
    DIR/anything.json                           one file alone, split by a hash of file names: 60, 20 and 20 %

Images lie where ``file_name`` says, below the JSON's folder, DIR, or DIR's images or split folders. Boxes are
[x, y, width, height] in pixels from the top left.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from geokr.config import ConfigError
from geokr.evaluate_data import LEAST, PARTS, Data, Part, names_of
from geokr.evaluate_images import check_data, form, hash_of, read, same_form

SHOWN = 5
OVER = 1.0  # pixels that a box may reach over the edge by rounding
LEAST_SIDE = 1e-2  # of a box in pixels: detectors refuse those without area


@dataclass(frozen=True, slots=True, eq=False)
class Boxes:
    """Of one image. corners: float32 [B, 4], x0 y0 x1 y1. classes: int64 [B] from 0. crowd: bool [B]."""

    corners: np.ndarray
    classes: np.ndarray
    crowd: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class Detections:
    """data: the images; their targets are shares of classes among the boxes but those of crowds, the last one for
    images without any. boxes: of each split, one an image. classes: those of boxes."""

    data: Data
    boxes: dict[str, list[Boxes]]
    classes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Listed:
    """An image of a JSON: where it lies, its boxes as (category id, corners, crowd)."""

    path: Path
    boxes: list[tuple[int, tuple[float, float, float, float], bool]]


def open_coco(path: str | Path) -> Detections:
    """Reads all JSON and every image's header. Raises ConfigError naming file and id of the first that is wrong."""
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigError(f"--data {folder}: there is no such folder")
    files = _files(folder)
    names: dict[int, str] = {}
    splits: dict[str, list[Listed]] = {}
    for split, file in files.items():
        found, splits[split] = _read(file, folder)
        for number, name in found.items():
            if names.setdefault(number, name) != name:
                raise ConfigError(f"{file}: category {number} is {name!r}, {names[number]!r} in another file")
    _check_once(files, splits)
    splits = _split(folder, splits)
    paths = [one.path for some in splits.values() for one in some]
    bands, dtype = same_form(paths)
    check_data(paths)
    numbers = _classes(folder, splits, names)
    boxes = {split: [_boxes(one, numbers) for one in some] for split, some in splits.items()}
    classes = tuple(names[number] for number in numbers)
    parts = {split: _part(splits[split], boxes[split], len(classes)) for split in PARTS}
    data = Data(str(folder), (*classes, "nothing"), True, dtype, bands, parts, names_of(paths, bands))
    return Detections(data, boxes, classes)


def _check_once(files: Mapping[str, Path], splits: Mapping[str, Sequence[Listed]]) -> None:
    """Raises ConfigError naming the first image that is listed twice, whatever path leads to it: it would be in train
    and in test, or its boxes would be objects in one copy and background in the other."""
    seen: dict[str, Path] = {}
    for split, some in splits.items():
        for one in some:
            real = os.path.realpath(one.path)
            if real in seen:
                where = "twice" if seen[real] == files[split] else f"and so does {seen[real]}"
                raise ConfigError(
                    f"{files[split]}: lists {one.path} {where}; an image stands there once, in one split, with all of "
                    "its boxes: join its entries, or remove one"
                )
            seen[real] = files[split]


def _files(folder: Path) -> dict[str, Path]:
    """Split to its JSON; one file alone is called ``all``."""
    places = [folder, folder / "annotations", *(folder / name for name in (*PARTS, "valid"))]
    found = [path for place in places for path in sorted(place.glob("*.json"))]
    if not found:
        raise ConfigError(f"--data {folder}: --task detect expects COCO's JSON there, or in its folder annotations")
    if len(found) == 1:
        return {"all": found[0]}
    files: dict[str, Path] = {}
    for path in found:
        split = _split_name(path.parent.name if path.parent.name in (*PARTS, "valid") else path.stem)
        if split is None:
            raise ConfigError(f"{path}: is it train, val or test? Say so in its name, or remove it")
        if split in files:
            raise ConfigError(f"{path}: {files[split]} is {split}, too; keep one of them")
        files[split] = path
    if "train" not in files:
        raise ConfigError(f"--data {folder}: no JSON of train beside {', '.join(p.name for p in files.values())}")
    return files


def _split_name(text: str) -> str | None:
    words = "".join(c if c.isalpha() else " " for c in text.lower()).split()
    found = {{"valid": "val", "validation": "val"}.get(word, word) for word in words} & set(PARTS)
    return found.pop() if len(found) == 1 else None


def _split(folder: Path, splits: dict[str, list[Listed]]) -> dict[str, list[Listed]]:
    ordered = sorted(splits.get("all") or splits["train"], key=lambda one: hash_of(one.path, folder))
    if "all" in splits:
        if len(ordered) < LEAST:
            raise ConfigError(f"--data {folder}: {len(ordered)} image(s); {LEAST} at least for train, val and test")
        fifth = max(1, round(len(ordered) / 5))
        return {"train": ordered[2 * fifth :], "val": ordered[fifth : 2 * fifth], "test": ordered[:fifth]}
    test = splits.get("test") or splits["val"]
    if "test" in splits and "val" in splits:
        return {"train": splits["train"], "val": splits["val"], "test": test}
    if len(ordered) < 2:
        raise ConfigError(f"--data {folder}: train has one image only; a fifth of them is needed for val")
    return {"train": [one for n, one in enumerate(ordered) if n % 5], "val": ordered[::5], "test": test}


# -------------------------------------------------------------------------------------------------- one file


def _read(file: Path, folder: Path) -> tuple[dict[int, str], list[Listed]]:
    """(category id to name, images with their boxes)."""
    try:
        tree = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: is no JSON ({error})") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(tree, dict) or not isinstance(tree.get(key), list):
            raise ConfigError(
                f"{file}: has no list {key!r}, as COCO's format has; its test sets without boxes do not do"
            )
    names = {_number(file, "categories", one, "id"): str(one.get("name", one["id"])) for one in tree["categories"]}
    listed: dict[int, Listed] = {}
    places = _places(file, folder)
    sizes: dict[int, tuple[int, int]] = {}
    for one in tree["images"]:
        number = _number(file, "images", one, "id")
        if number in listed:
            raise ConfigError(f"{file}: image id {number} stands there twice; ids are for one image each")
        listed[number] = Listed(_find(file, places, number, one), [])
        sizes[number] = _size(file, number, one, listed[number].path)
    if not listed:
        raise ConfigError(f"{file}: lists no image")
    for one in tree["annotations"]:
        _add(file, one, listed, sizes, names)
    return names, list(listed.values())


def _number(file: Path, what: str, one: Any, key: str) -> int:
    value = one.get(key) if isinstance(one, dict) else None
    if not isinstance(value, int):
        raise ConfigError(f"{file}: {what}: an entry has {key} {value!r}; expected a whole number")
    return value


def _places(file: Path, folder: Path) -> list[Path]:
    """Folders in which a JSON's images may lie."""
    places = [file.parent, folder, folder / "images"]
    for above in (folder, folder / "images"):  # train2017 for instances_train2017.json
        inside = sorted(p for p in above.iterdir() if p.is_dir()) if above.is_dir() else []
        places += [p for p in inside if file.stem.endswith(p.name) or p.name == _split_name(file.stem)]
    return places


def _find(file: Path, places: Sequence[Path], number: int, one: Mapping[str, Any]) -> Path:
    name = one.get("file_name")
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{file}: image {number} has file_name {name!r}; expected a path")
    for place in places:
        if (place / name).is_file():
            return place / name
    there = ", ".join(str(place) for place in dict.fromkeys(places))
    raise ConfigError(f"{file}: image {number}: there is no file {name} in {there}; put it there or remove the entry")


def _size(file: Path, number: int, one: Mapping[str, Any], path: Path) -> tuple[int, int]:
    """(height, width) of the file, which is what the JSON must say, if it does."""
    _, _, height, width = form(path)
    said = one.get("height", height), one.get("width", width)
    if said != (height, width):
        raise ConfigError(
            f"{file}: image {number} is {said[1]} x {said[0]} there, {path} has {width} x {height}: its boxes are of "
            "another size"
        )
    return height, width


def _add(
    file: Path, one: Any, listed: Mapping[int, Listed], sizes: Mapping[int, tuple[int, int]], names: Mapping[int, str]
) -> None:
    image, category = _number(file, "annotations", one, "image_id"), _number(file, "annotations", one, "category_id")
    where = f"{file}: annotation {one.get('id')}"
    if image not in listed:
        raise ConfigError(f"{where}: there is no image {image}; remove it, or add the image")
    if category not in names:
        raise ConfigError(f"{where}: there is no category {category}, only {', '.join(map(str, sorted(names)))}")
    box = one.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(v, int | float) for v in box):
        raise ConfigError(f"{where}: bbox {box!r}; expected [x, y, width, height]")
    x, y, width, height = box
    if not all(map(math.isfinite, box)) or width <= 0 or height <= 0:
        raise ConfigError(f"{where}: bbox {box!r} has no area; remove it or correct it")
    rows, columns = sizes[image]
    if min(x, y) < -OVER or x + width > columns + OVER or y + height > rows + OVER:
        raise ConfigError(
            f"{where}: bbox {box!r} reaches out of image {image} of {columns} x {rows}; boxes are "
            "[x, y, width, height] in pixels"
        )
    corners = (max(x, 0.0), max(y, 0.0), min(x + width, columns), min(y + height, rows))
    if corners[2] - corners[0] < LEAST_SIDE or corners[3] - corners[1] < LEAST_SIDE:
        raise ConfigError(f"{where}: bbox {box!r} has no area within image {image}; remove it or correct it")
    listed[image].boxes.append((category, corners, bool(one.get("iscrowd", 0))))


# ----------------------------------------------------------------------------------------------- what is in them


def _classes(folder: Path, splits: Mapping[str, Sequence[Listed]], names: Mapping[int, str]) -> list[int]:
    """Category ids that have boxes, which train and test must both have; the others are left out."""
    there = {
        split: {category for one in some for category, _, crowd in one.boxes if not crowd}
        for split, some in splits.items()
    }
    found = sorted(set.union(*there.values()))
    if not found:
        raise ConfigError(f"--data {folder}: no image has a box")
    for split in ("train", "test"):
        if lacking := [names[number] for number in found if number not in there[split]]:
            raise ConfigError(
                f"--data {folder}: {split} has no box of {', '.join(lacking[:SHOWN])}; give a JSON for each of train, "
                "val and test, each with all classes, or remove that class"
            )
    return found


def _boxes(one: Listed, numbers: Sequence[int]) -> Boxes:
    # a crowd of a class that is left out says nothing
    chosen = [box for box in one.boxes if box[0] in numbers]
    return Boxes(
        np.array([corners for _, corners, _ in chosen], np.float32).reshape(-1, 4),
        np.array([numbers.index(category) for category, _, _ in chosen], np.int64),
        np.array([crowd for _, _, crowd in chosen], bool),
    )


def _part(some: Sequence[Listed], boxes: Sequence[Boxes], classes: int) -> Part:
    """The images, with shares of classes among the boxes that teach: a crowd's are no objects."""
    shares = np.zeros((len(some), classes + 1))
    for n, one in enumerate(boxes):
        alone = one.classes[~one.crowd]
        np.add.at(shares[n], alone if len(alone) else [classes], 1)
    shares /= shares.sum(1, keepdims=True)
    paths = [one.path for one in some]
    return Part([str(path) for path in paths], shares, lambda numbers: [read(paths[n]) for n in numbers])
