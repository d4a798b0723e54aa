"""Images with masks to evaluate segmentation on.

    DIR/images/*.png, DIR/masks/*.png           pairs by name, split by its hash: 60 % train, 20 % val, 20 % test
    DIR/{train,val,test}/{images,masks}/*.png   as they are; without val, a fifth of train
    DIR/classes.yaml                            the masks' values and what they mean, as ``0: clear``; may be missing

Masks have one band of whole numbers and the size of their image. PNG and GeoTIFF are read, images in any band count.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from geokr.config import ConfigError, read_yaml
from geokr.evaluate_data import LEAST, PARTS, Data, Part, given_parts, images_below, names_of
from geokr.evaluate_images import GEO, PLAIN, check_data, form, hash_of, read, same_form

OUTSIDE = -100  # the class of pixels that count nowhere
SHOWN = 5
Pair = tuple[Path, Path]


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """data: the images; their targets are the shares of classes in the masks. masks: of a split, by number, int16
    [H, W]: classes from 0, OUTSIDE where ignored."""

    data: Data
    masks: dict[str, Callable[[Sequence[int]], list[np.ndarray]]]


def open_pairs(path: str | Path, ignored: int) -> Pairs:
    """Reads every mask and every image's header. Raises ConfigError naming the first file that does not fit."""
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigError(f"--data {folder}: there is no such folder")
    pairs = _split(folder)
    flat = [pair for part in pairs.values() for pair in part]
    bands, dtype = same_form([image for image, _ in flat])
    check_data([image for image, _ in flat])
    counts = {mask: _counts(mask, image) for image, mask in flat}
    codes, names = _classes(folder, pairs, counts, ignored)
    _check_values(folder, pairs, counts, codes, ignored)
    # an image of which nothing counts is no label to draw, and teaches nothing
    pairs = {name: [p for p in some if any(counts[p[1]].get(code) for code in codes)] for name, some in pairs.items()}
    if bare := [name for name, some in pairs.items() if not some]:
        raise ConfigError(
            f"--data {folder}: no mask of {bare[0]} has a pixel that counts, all are {ignored} (--ignore); add some"
        )
    parts = {name: _part(some, counts, codes) for name, some in pairs.items()}
    masks = {name: _mask_reader([mask for _, mask in some], codes) for name, some in pairs.items()}
    bands_of = names_of([image for image, _ in flat], bands)
    return Pairs(Data(str(folder), names, True, dtype, bands, parts, bands_of), masks)


def _split(folder: Path) -> dict[str, list[Pair]]:
    given = {} if (folder / "images").is_dir() else given_parts(folder)
    if given:
        found = {name: _pairs(given[name]) for name in PARTS if name in given}
        if "val" not in found:
            ordered = sorted(found["train"], key=lambda pair: hash_of(pair[0], folder))
            found["val"], found["train"] = ordered[::5], [pair for n, pair in enumerate(ordered) if n % 5]
            if not found["train"]:
                raise ConfigError(f"--data {folder}: train has one image only; a fifth of them is needed for val")
        return {name: found[name] for name in PARTS}
    ordered = sorted(_pairs(folder), key=lambda pair: hash_of(pair[0], folder))
    if len(ordered) < LEAST:
        raise ConfigError(f"--data {folder}: {len(ordered)} image(s); {LEAST} at least for train, val and test")
    fifth = max(1, round(len(ordered) / 5))
    return {"train": ordered[2 * fifth :], "val": ordered[fifth : 2 * fifth], "test": ordered[:fifth]}


def _pairs(folder: Path) -> list[Pair]:
    for name in ("images", "masks"):
        if not (folder / name).is_dir():
            raise ConfigError(f"{folder}: expected folders images and masks for --task segment, there is no {name}")
    images, masks = _by_name(folder / "images"), _by_name(folder / "masks")
    for have, other, what in ((images, masks, "masks"), (masks, images, "images")):
        if alone := sorted(have.keys() - other.keys()):
            raise ConfigError(
                f"{have[alone[0]]}: {folder / what} has none of that name, nor for {len(alone) - 1} more; add or remove"
            )
    return [(images[name], masks[name]) for name in sorted(images)]


def _by_name(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in images_below(folder):
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in found:
            raise ConfigError(f"{path}: {found[name].name} has the same name but for the suffix; keep one of them")
        found[name] = path
    if not found:
        raise ConfigError(f"{folder}: holds no image ({', '.join(PLAIN + GEO)})")
    return found


def _counts(mask: Path, image: Path) -> dict[int, int]:
    """Value to its pixels."""
    bands, dtype, height, width = form(mask, mask=True)
    if bands != 1 or not np.issubdtype(np.dtype(dtype), np.integer):
        raise ConfigError(f"{mask}: {bands} band(s) of {dtype}; expected a mask of one band of whole numbers")
    size = form(image)[2:]
    if (height, width) != size:
        raise ConfigError(f"{mask}: {height} x {width} pixels, {image} has {size[0]} x {size[1]}")
    values, counts = np.unique(read(mask, mask=True), return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


def _classes(
    folder: Path, pairs: dict[str, list[Pair]], counts: dict[Path, dict[int, int]], ignored: int
) -> tuple[list[int], tuple[str, ...]]:
    """The values that are classes, and their names."""
    table = folder / "classes.yaml"
    if table.exists():
        named: dict[Any, Any] = read_yaml(table)
        if bad := [key for key, name in named.items() if not isinstance(key, int) or not isinstance(name, str)]:
            raise ConfigError(f"{table}: {bad[0]}: expected a mask's value and a name, as 1: cloud")
        if ignored in named:
            raise ConfigError(
                f"{table}: names the value {ignored}, {named[ignored]!r}, which --ignore {ignored} leaves out: say "
                "--ignore -1, or another value, or take it out of the table"
            )
    else:
        named = {value: str(value) for _, mask in pairs["train"] for value in counts[mask]}
    codes = sorted(value for value in named if value != ignored)
    if len(codes) < 2:
        raise ConfigError(
            f"--data {folder}: two classes at least are needed, its masks of train have {len(codes)} beside the "
            f"ignored {ignored}; if that is a class, say --ignore -1"
        )
    return codes, tuple(named[code] for code in codes)


def _check_values(
    folder: Path,
    pairs: dict[str, list[Pair]],
    counts: dict[Path, dict[int, int]],
    codes: Sequence[int],
    ignored: int,
) -> None:
    known = "classes.yaml" if (folder / "classes.yaml").exists() else "the masks of train"
    for mask, found in counts.items():
        if unknown := sorted(found.keys() - {*codes, ignored}):
            raise ConfigError(
                f"{mask}: value {unknown[0]} in {found[unknown[0]]} pixels is none of {known} "
                f"({', '.join(map(str, codes[: 2 * SHOWN]))}); correct it, or ignore it with --ignore {unknown[0]}"
            )
    for name in ("train", "test"):
        there = {value for _, mask in pairs[name] for value in counts[mask]}
        if lacking := [code for code in codes if code not in there]:
            raise ConfigError(
                f"--data {folder}: no mask of {name} has the value {', '.join(map(str, lacking[:SHOWN]))}; give the "
                "split as folders train, val and test, each with all classes"
            )


def _part(pairs: Sequence[Pair], counts: dict[Path, dict[int, int]], codes: Sequence[int]) -> Part:
    shares = np.array([[counts[mask].get(code, 0) for code in codes] for _, mask in pairs], np.float64)
    shares /= np.maximum(shares.sum(1, keepdims=True), 1)
    images = [image for image, _ in pairs]
    return Part([str(image) for image in images], shares, lambda numbers: [read(images[n]) for n in numbers])


def _mask_reader(paths: Sequence[Path], codes: Sequence[int]) -> Callable[[Sequence[int]], list[np.ndarray]]:
    return lambda numbers: [_numbered(read(paths[n], mask=True)[..., 0], codes) for n in numbers]


def _numbered(values_HW: np.ndarray, codes: Sequence[int]) -> np.ndarray:
    """Values of a mask to classes from 0, OUTSIDE where they are none; int16."""
    found = np.minimum(np.searchsorted(codes, values_HW), len(codes) - 1)
    return np.where(np.asarray(codes)[found] == values_HW, found, OUTSIDE).astype(np.int16)
