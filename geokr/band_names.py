"""What a band's name says of the light it sees, whoever wrote it: ``red``, ``B4 red``, ``Band 4 - Red``, ``nir08``."""

import re
from collections.abc import Sequence

COLOURS = ("red", "green", "blue", "nir")
RGB = COLOURS[:3]
LETTERS = {"r": "red", "g": "green", "b": "blue", "n": "nir"}
# Where their light lies, centre wavelengths in nm: Landsat, Sentinel-2, Gaofen and NAIP all fall into these.
LIGHT = {"blue": (450, 520), "green": (520, 600), "red": (620, 695), "nir": (760, 900)}
# Names that only count, as readers give them where a file names no band; Sentinel-2's and Landsat's own.
_COUNTED = re.compile(r"(?:(?:band|layer|channel|ch)[ _.-]*)?\d*")
_NUMBERED = re.compile(r"b[ _.-]?(\d+)(a?)")
_NUMBERS: dict[tuple[int, ...], tuple[int, ...] | None] = {
    (2, 3, 4): (4, 3, 2),
    (1, 2, 3): None,
}  # red, green, blue of Sentinel-2 and Landsat 8; as they stand


def words(name: str) -> list[str]:
    return re.findall("[a-z]+", name.lower())


def colour(name: str) -> str | None:
    """The one of COLOURS that a band's name says, or None: for none, for several, and for a red edge."""
    found = [word for word in words(name) if word in COLOURS]
    if not found:
        return LETTERS.get(name.strip().lower())
    return found[0] if len(found) == 1 and "edge" not in words(name) else None


def _by_light(wavelength_nm: float) -> str | None:
    return next((name for name, (low, high) in LIGHT.items() if low <= wavelength_nm < high), None)


def rgb_places(names: Sequence[str], wavelengths_nm: Sequence[float | None] = ()) -> list[int] | None:
    """Where red, green and blue lie among three bands; None where they are others.

    By names; where those are numbers, by wavelengths, if all are known, else as the numbers are most often meant.
    """
    colours = [colour(name) for name in names]
    if sorted(filter(None, colours)) == sorted(RGB):
        return [colours.index(wanted) for wanted in RGB]
    plain = [name.strip().lower() for name in names]
    numbered = [_NUMBERED.fullmatch(name) for name in plain]
    if not all(match or _COUNTED.fullmatch(name) for match, name in zip(numbered, plain, strict=True)):
        return None
    known = [nm for nm in wavelengths_nm if nm is not None]
    if known and len(known) == len(names):
        seen = [_by_light(nm) for nm in known]
        return [seen.index(wanted) for wanted in RGB] if sorted(filter(None, seen)) == sorted(RGB) else None
    if not any(numbered):
        return list(range(len(names)))
    numbers = [int(match[1]) for match in numbered if match and not match[2]]
    if len(numbers) < len(names) or (key := tuple(sorted(numbers))) not in _NUMBERS:
        return None
    order = _NUMBERS[key]
    return [numbers.index(number) for number in order] if order else list(range(len(names)))


def as_colours(names: Sequence[str]) -> tuple[str, ...]:
    """Three bands whose names are numbers, by the colours that those mostly mean; others as they are."""
    if len(names) != len(RGB) or any(colour(name) for name in names) or (places := rgb_places(names)) is None:
        return tuple(names)
    return tuple(RGB[places.index(n)] for n in range(len(RGB)))


def place_of(name: str, among: Sequence[str]) -> int | None:
    """The one of these bands that has a name, or else its colour (``red``, ``B4 red``); None where there is none."""
    if name in among:
        return among.index(name)
    found = [n for n, other in enumerate(among) if colour(name) and colour(other) == colour(name)]
    return found[0] if len(found) == 1 else None
