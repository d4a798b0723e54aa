"""A tile's histogram of classes from a JSON file: ``{"10": 5321, "20": 212, ...}``.

Keys are the product's codes or its names of classes; values are counts of pixels, in whatever unit, or shares of the
tile, of which what is missing to 1 is not known.
"""

import json
import math
from pathlib import Path

import numpy as np

from geokr.landcover import IGNORED, LOOKUP_OFFSET, LOOKUP_SIZE, NODATA, UNKNOWN, Legend
from preprocess.labels import TileLabels
from preprocess.sheets import LabelError

ROUNDING = 1e-3  # by which shares may miss 1 for how they were written
LARGEST = 1e300  # so that sums are finite too


def read_histogram(path: str, legend: Legend, codes: dict[str, int]) -> TileLabels:
    """One tile's labels. codes: class names to codes. Raises LabelError that names file and key."""
    counts, entries = np.zeros(256), _entries(path)
    for key, value in entries:
        label = legend.lookup[_code(key, codes, path) + LOOKUP_OFFSET]
        if label == UNKNOWN:
            raise LabelError(
                f"{path}: key {key!r}: the product {legend.product!r} has no such class; is it the right --product?"
            )
        counts[label] += value
    classes = len(legend.classes)
    total = counts[:classes].sum()
    everything = total + counts[IGNORED] + counts[NODATA]
    if any(0 < value < 1 for _, value in entries) and everything < 1 - ROUNDING:
        everything = 1.0
    fractions = counts[:classes] / (total or 1.0)
    return TileLabels(fractions[None], np.array([total / everything if everything else 0.0]))


def _entries(path: str) -> list[tuple[str, float]]:
    try:
        tree = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise LabelError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(tree, dict):
        raise LabelError(f"{path}: expected an object of class codes and counts, got {type(tree).__name__}")
    for key, value in tree.items():
        known = isinstance(value, int | float) and not isinstance(value, bool)
        if not known or not 0 <= value <= LARGEST:  # not so for NaN
            raise LabelError(f"{path}: key {key!r}: expected a count or a share, 0 or more, got {str(value)[:80]}")
    return [(key, float(value)) for key, value in tree.items()]


def _code(key: str, codes: dict[str, int], path: str) -> int:
    if key in codes:
        return codes[key]
    try:
        code = float(key)
    except ValueError:
        code = math.nan
    if not code.is_integer() or not 0 <= code + LOOKUP_OFFSET < LOOKUP_SIZE:
        raise LabelError(f"{path}: key {key!r}: is neither a class code nor a class of {', '.join(codes)}")
    return int(code)
