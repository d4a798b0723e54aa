"""Cloud masks that lie beside scenes: where they are, what their values mean, and which pixels they speak against.

A masked pixel keeps its value and its label (the ground is there), but a tile with too many of them is left out, and
stretch limits come from the others. A mask may have a resolution, a grid and a CRS of its own: a scene pixel takes
the mask pixel under its centre. Ground that the mask does not reach counts as masked.
"""

import glob
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from geokr.config import suggestion
from geokr.landcover import LOOKUP_OFFSET, LOOKUP_SIZE, LandCoverClass, Legend
from preprocess import labels, raster, sheet_headers
from preprocess.errors import RasterError
from preprocess.inputs import PlanError, check_name
from preprocess.options import MaskOptions
from preprocess.place import Place
from preprocess.raster import Scene
from preprocess.sheets import LabelError, LabelSheet

CLEAR, MASKED = 0, 1
ENDINGS = (".tif", ".tiff", ".jp2")

Bits = tuple[int, int]  # (first bit, how many)


@dataclass(frozen=True, slots=True)
class Kind:
    """A sort of mask. patterns: where it lies, from the scene's folder on. reject: the classes rejected by default.

    values: class name to value, for masks that hold one class a pixel. fields: class name to (bits, numbers they must
    hold), for masks of bits.
    """

    patterns: tuple[str, ...] = ()
    reject: tuple[str, ...] = ()
    values: Mapping[str, int] | None = None
    fields: Mapping[str, tuple[Bits, tuple[int, ...]]] | None = None


def _flag(bit: int) -> tuple[Bits, tuple[int, ...]]:
    return (bit, 1), (1,)


_SCL = (
    "nodata", "saturated", "dark", "cloud_shadow", "vegetation", "bare", "water", "unclassified",
    "cloud_medium", "cloud_high", "cirrus", "snow",
)  # fmt: skip
# Sentinel-2 Level-2A scene classification; Landsat's pixel quality of Collection 2, of Collection 1 Level-2
# (pixel_qa) and of Collection 1 Level-1 (BQA), by the products' guides.
KINDS = {
    "scl": Kind(
        ("{base}_SCL_20m.*", "{base}_SCL*.*", "../R20m/{base}_SCL_20m.*", "SCL.*", "scl.*"),
        ("nodata", "saturated", "cloud_shadow", "cloud_medium", "cloud_high", "cirrus"),
        values={name: value for value, name in enumerate(_SCL)},
    ),
    "qa_pixel": Kind(
        ("{base}_QA_PIXEL.*", "QA_PIXEL.*", "qa_pixel.*"),
        ("nodata", "dilated_cloud", "cirrus", "cloud", "cloud_shadow"),
        fields={
            "nodata": _flag(0),
            "dilated_cloud": _flag(1),
            "cirrus": _flag(2),
            "cloud": _flag(3),
            "cloud_shadow": _flag(4),
            "snow": _flag(5),
            "water": _flag(7),
            "cloud_medium": ((8, 2), (2, 3)),
        },
    ),
    "pixel_qa": Kind(
        ("{base}_pixel_qa.*",),
        ("nodata", "cloud", "cloud_shadow", "cirrus"),
        fields={
            "nodata": _flag(0),
            "water": _flag(2),
            "cloud_shadow": _flag(3),
            "snow": _flag(4),
            "cloud": _flag(5),
            "cloud_medium": ((6, 2), (2, 3)),
            "cirrus": ((8, 2), (3,)),
        },
    ),
    "bqa": Kind(
        ("{base}_BQA.*",),
        ("nodata", "cloud", "cloud_shadow", "cirrus"),
        fields={
            "nodata": _flag(0),
            "saturated": ((2, 2), (1, 2, 3)),
            "cloud": _flag(4),
            "cloud_medium": ((5, 2), (2, 3)),
            "cloud_shadow": ((7, 2), (3,)),
            "snow": ((9, 2), (3,)),
            "cirrus": ((11, 2), (3,)),
        },
    ),
    "values": Kind(),
    "bits": Kind(),
}


# ------------------------------------------------------------------------------------------------ what values mean


def mask_legend(options: MaskOptions) -> Legend:
    """Which values speak against a pixel, as a legend of two classes, CLEAR and MASKED.

    Raises PlanError for a class that this kind of mask does not have.
    """
    assert options.kind is not None
    return _legend(options.kind, KINDS[options.kind].reject if options.reject is None else options.reject)


@lru_cache(maxsize=8)
def _legend(name: str, rejected: tuple[int | str, ...]) -> Legend:
    codes = np.arange(LOOKUP_SIZE) - LOOKUP_OFFSET
    masked = np.zeros(LOOKUP_SIZE, bool)
    for entry in rejected:
        masked |= _meant(codes, entry, name, KINDS[name])
    classes = (LandCoverClass("clear", (), (0, 0, 0)), LandCoverClass("masked", (), (255, 255, 255)))
    return Legend("mask", classes, np.where(masked, MASKED, CLEAR).astype(np.uint8))


def _meant(codes: np.ndarray, entry: int | str, name: str, kind: Kind) -> np.ndarray:
    """Whether each code is what an entry of mask.reject means."""
    if isinstance(entry, int):
        if name in ("values", "scl"):
            return codes == entry
        if not 0 <= entry < 16:
            raise PlanError(f"mask.reject: {entry} is no bit of a mask of 16 bits: use 0 to 15")
        return (codes >> entry) & 1 == 1
    known = [*(kind.values or {}), *(kind.fields or {})]
    if entry not in known:
        those = f"it has {', '.join(known)}, and takes numbers" if known else "it takes numbers"
        hint = suggestion(entry, known)
        raise PlanError(f"mask.reject: a mask of kind {name!r} has no class {entry!r}{hint}; {those}")
    if kind.values is not None:
        return codes == kind.values[entry]
    assert kind.fields is not None
    (first, count), numbers = kind.fields[entry]
    return np.isin((codes >> first) & ((1 << count) - 1), numbers)


# ---------------------------------------------------------------------------------------------- where masks are

# What a file of one band adds to the name of its scene: _B02_10m, _B4, _SR_B5, _TCI_10m, _sr_band3.
_BAND_PART = re.compile(r"_(TCI|VISUAL|visual|(SR_|ST_)?B\d{1,2}A?|sr_band\d+)?(_?\d{2}m)?$")


def _bases(scene: Scene) -> list[str]:
    """Names that the files of a scene may begin with: its file's, that without the band, its id."""
    stem = Path(scene.file).stem
    found = [stem, _BAND_PART.sub("", stem), scene.scene_id.rsplit("/", 1)[-1]]
    return list(dict.fromkeys(name for name in found if name))


def _patterns(scene: Scene, options: MaskOptions, tiles: str) -> Iterator[str]:
    """Globs of the places to look at, in order. tiles: the folder of tiles that are cut already, or empty."""
    assert options.kind is not None
    folder = os.path.dirname(scene.file)
    for pattern in (options.pattern,) if options.pattern is not None else KINDS[options.kind].patterns:
        start, names = folder, {"folder": folder, "stem": Path(scene.file).stem, "scene": scene.scene_id}
        if "{path}" in pattern:  # tells tiles of several subfolders apart, so it cannot start from each one's own
            if not tiles:
                raise PlanError(
                    f"mask.pattern={pattern}: {{path}} is the place of a tile of --tiles in their folder; for scenes "
                    "use {stem} or {folder}"
                )
            start, names["path"] = tiles, os.path.splitext(os.path.relpath(scene.file, tiles))[0]
        for base in _bases(scene):
            filled = pattern
            for name, value in {**names, "base": base}.items():
                filled = filled.replace("{" + name + "}", glob.escape(value))
            yield os.path.normpath(os.path.join(glob.escape(start), filled))


def find_mask(scene: Scene, options: MaskOptions, tiles: str = "") -> str | None:
    """The path of the mask that a scene list or an item names, else of one that lies beside a scene, or None.

    tiles: the folder that a tile of --tiles lies under. Raises PlanError where several fit.
    """
    if scene.mask_path:
        return scene.mask_path
    for pattern in dict.fromkeys(_patterns(scene, options, tiles)):
        found = [path for path in sorted(glob.glob(pattern)) if path.lower().endswith(ENDINGS) and path != scene.file]
        if len(found) > 1:
            raise PlanError(
                f"{scene.path}: {len(found)} files could be its mask ({', '.join(found[:3])}): "
                "set mask.pattern so that one fits"
            )
        if found:
            return check_name(found[0], "mask.pattern:")
    return None


def with_mask(scene: Scene, options: MaskOptions, tiles: str = "") -> Scene:
    """The scene with its mask, whose fingerprint joins its own; as it is if ``mask.kind`` is not set.

    tiles: as for :func:`find_mask`. Raises PlanError for a mask that is missing (unless ``mask.required`` is false) or
    lies elsewhere, RasterError for one that cannot be read.
    """
    if options.kind is None:
        return scene
    mask_legend(options)  # a wrong class is an error whether or not a mask is found
    path = find_mask(scene, options, tiles)
    if path is None:
        if not options.required:
            return scene
        tried = ", ".join(dict.fromkeys(_patterns(scene, options, tiles)))
        if not tried:
            raise PlanError(_nowhere(scene, options))
        raise PlanError(
            f"{scene.path}: no mask of kind {options.kind!r} beside it (looked for {tried}): set mask.pattern, or "
            "mask.required=false to take such scenes as they are"
        )
    # every value of a mask speaks for itself: a tag that calls 0, "no cloud", no data would make all of it unknown
    sheet = replace(sheet_headers.read_sheet(path), nodata=None)
    if not labels.overlapping(scene.place, [LabelSheet(sheet, None, None)]):
        raise PlanError(f"{scene.path}: its mask {path} lies somewhere else; is it that of another scene?")
    return replace(scene, mask=sheet, fingerprint=f"{scene.fingerprint}+{sheet.fingerprint}")


def _nowhere(scene: Scene, options: MaskOptions) -> str:
    return (
        f"{scene.path}: names no mask, and masks of mask.kind={options.kind} have no usual names: set mask.pattern to "
        "where they are, or name the scene's own in a scene list (docs/data.md, Band files)"
    )


def check_some(scenes: Sequence[Scene], options: MaskOptions) -> None:
    """Raises PlanError where no scene has a mask because nothing says where masks are. With ``mask.required=false``
    all would go by unmasked."""
    if options.kind is None or options.pattern is not None or KINDS[options.kind].patterns:
        return
    if scenes and not any(scene.mask for scene in scenes):
        raise PlanError(_nowhere(scenes[0], options))


# ----------------------------------------------------------------------------------------------------- pixels


def masked_pixels(mask: raster.Sheet, place: Place, options: MaskOptions) -> np.ndarray:
    """uint8 [height, width]: 1 where the mask speaks against a pixel of a place, or does not reach it.

    Raises RasterError for a mask that turns out to be damaged.
    """
    legend, entry = mask_legend(options), (LabelSheet(mask, None, None),)
    rows = max(1, labels.STRIP_PIXELS // place.width)
    masked = np.empty((place.height, place.width), np.uint8)
    for top in range(0, place.height, rows):
        part = place.window(0, top, place.width, min(rows, place.height - top))
        try:
            masked[top : top + rows] = labels.label_grid(part, entry, legend) != CLEAR
        except LabelError as error:  # a mask belongs to its scene, as a land-cover sheet does not
            raise RasterError(str(error)) from error
    return masked
