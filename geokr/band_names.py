"""What a band's name says of the light it sees, whoever wrote it: ``red``, ``B4 red``, ``Band 4 - Red``, ``nir08``."""

import re
from collections.abc import Sequence

COLOURS = ("red", "green", "blue", "nir")
# Words of bands that are none of red, green and blue.
OTHERS = {"nir", "swir", "lwir", "tir", "edge", "rededge", "coastal", "aerosol", "cirrus", "pan", "yellow", "vv", "vh"}
OTHERS |= {"hh", "hv", "ndvi", "thermal", "water", "mask"}


def words(name: str) -> list[str]:
    return re.findall("[a-z]+", name.lower())


def colour(name: str) -> str | None:
    """The one of COLOURS that a band's name says, or None: for none, for several, and for a red edge."""
    found = [word for word in words(name) if word in COLOURS]
    return found[0] if len(found) == 1 and "edge" not in words(name) else None


def rgb_places(names: list[str]) -> list[int] | None:
    """Where red, green and blue lie among three bands; as they stand where the names say nothing; None for others."""
    colours = [colour(name) for name in names]
    if sorted(filter(None, colours)) == ["blue", "green", "red"]:
        return [colours.index(wanted) for wanted in ("red", "green", "blue")]
    says = any(colours) or any(word in OTHERS for name in names for word in words(name))
    return None if says else list(range(len(names)))


def place_of(name: str, among: Sequence[str]) -> int | None:
    """The one of these bands that has a name, or else its colour (``red``, ``B4 red``); None where there is none."""
    if name in among:
        return among.index(name)
    found = [n for n, other in enumerate(among) if colour(name) and colour(other) == colour(name)]
    return found[0] if len(found) == 1 else None
