"""What bands are called, which of them make a tile, and in what type."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from geokr import tile_codecs
from geokr.config import suggestion
from geokr.manifests import Band, SceneForm
from preprocess.inputs import PlanError
from preprocess.options import PackOptions
from preprocess.raster import Scene
from preprocess.scene_headers import Header
from preprocess.sensor import Sensor, SensorBand

ALPHA = "alpha"
COLOURS = ("red", "green", "blue")


@dataclass(frozen=True, slots=True)
class NamedBand:
    """also: other names by which it may be chosen."""

    name: str
    also: tuple[str, ...] = ()
    wavelength_nm: float | None = None


# ---------------------------------------------------------------------------------------------------- names


def named_bands(header: Header, names: Sequence[str], sensor: Sensor | None, title: str) -> list[NamedBand]:
    """What the bands of one file are called: by a list, by the sensor, by the file itself (descriptions, colours).

    An alpha band is called so, whatever else: it is no band to train on. Raises PlanError where names or the sensor do
    not fit the file.
    """
    pictured = [i for i, colour in enumerate(header.colours) if colour != ALPHA]
    if names:
        return _fitted(names, header, pictured, title)
    own = own_names(header)
    if sensor is None:
        return [NamedBand(name, (), header.wavelengths_nm[i]) for i, name in enumerate(own)]
    means = sensor.described(header.descriptions)
    layout = sensor.layout(len(pictured))
    if layout is None and (layout := sensor.layout(header.count)):
        pictured = list(range(header.count))  # a writer took the fourth of four bands for alpha, as GDAL does
    by_place = dict(zip(pictured, layout, strict=True)) if layout else {}
    if any(means) and not _agree(header, means, by_place):
        # bands in an order of their own, or others among them, such as a mask: by what the file says of each
        named = zip(means, own, header.wavelengths_nm, strict=True)
        return [_of_sensor(band) if band else NamedBand(name, (), nm) for band, name, nm in named]
    if layout is None:
        layouts = "; ".join(f"{len(layout)}: {', '.join(layout)}" for layout in sensor.table.layouts) or "none"
        raise PlanError(
            f"{title}: has {len(pictured)} bands, which fits no layout of sensor {sensor.name} ({layouts}); name its "
            "bands in the file or in a scene list, or give a sensor table of your own (docs/data.md, Sensors)"
        )
    return [_of_sensor(by_place[i]) if i in by_place else NamedBand(ALPHA) for i in range(header.count)]


def _agree(header: Header, means: Sequence[SensorBand | None], layout: Mapping[int, SensorBand]) -> bool:
    """Whether the layout says the same of every band that the file describes."""
    described = [i for i, text in enumerate(header.descriptions) if text and text.lower() != ALPHA]
    return all(i in layout and (band := means[i]) is not None and band.name == layout[i].name for i in described)


def _of_sensor(band: SensorBand) -> NamedBand:
    return NamedBand(band.name, (band.id, *band.also), band.nm)


def _fitted(names: Sequence[str], header: Header, pictured: Sequence[int], title: str) -> list[NamedBand]:
    places = pictured if len(names) == len(pictured) else range(header.count)
    if len(names) != len(places):
        raise PlanError(f"{title}: {len(names)} names ({', '.join(names)}) for a file of {header.count} bands")
    by_place = dict(zip(places, names, strict=True))
    return [NamedBand(by_place.get(i, ALPHA), (), header.wavelengths_nm[i]) for i in range(header.count)]


def own_names(header: Header) -> list[str]:
    """Descriptions, else colours (red, green, ...), else band_N; made unique. A described band is no alpha: programs
    tag the fourth of four as that by default."""
    names: list[str] = []
    for number, (text, colour) in enumerate(zip(header.descriptions, header.colours, strict=True), 1):
        name = text or (colour if colour in (*COLOURS, ALPHA) else "")
        names.append(name if name and name not in names else f"band_{number}")
    return names


# --------------------------------------------------------------------------------------------------- choice


def band_numbers(wanted: Sequence[int | str] | str | None, available: Sequence[NamedBand], title: str) -> list[int]:
    """1-based numbers of the bands that ``tile.bands`` asks for. Raises PlanError for one that is not there."""
    if wanted is None:
        return [i for i, band in enumerate(available, 1) if band.name != ALPHA]
    if isinstance(wanted, str):
        by_name = [_number(colour, available) for colour in COLOURS]
        wanted = [number for number in by_name if number] if all(by_name) else (1, 2, 3)
    numbers = []
    for band in wanted:
        number = band if isinstance(band, int) else _number(band, available)
        if number is None:
            words = [word for each in available for word in (each.name, *each.also)]
            listed = ", ".join(f"{each.name} ({each.also[0]})" if each.also else each.name for each in available)
            raise PlanError(f"tile.bands: no band {band!r} in {title}{suggestion(str(band), words)}; it has {listed}")
        if not 1 <= number <= len(available):
            raise PlanError(f"tile.bands: no band {number} in {title}, which has 1 to {len(available)}")
        numbers.append(number)
    if len(set(numbers)) != len(numbers):
        raise PlanError(f"tile.bands: a band stands twice in {list(wanted)}")
    return numbers


def _number(word: str, available: Sequence[NamedBand]) -> int | None:
    """The band of a name: its own, else one of its other names in any case, else the one whose name holds the word
    (``red`` in ``B4 red``, never in ``red edge``)."""
    plain = word.lower()
    ways = (
        lambda band: band.name == word,
        lambda band: plain in (each.lower() for each in (band.name, *band.also)),
        lambda band: plain in (parts := re.findall(r"[a-z]+|[0-9]+", band.name.lower())) and "edge" not in parts,
    )
    for way in ways:
        found = [number for number, band in enumerate(available, 1) if way(band)]
        if len(found) == 1:
            return found[0]
    return None


def named_of(scene: Scene) -> list[NamedBand]:
    """The bands of a scene as they are called."""
    return [NamedBand(*each) for each in zip(scene.band_names, scene.aliases, scene.wavelengths_nm, strict=True)]


def choose_bands(scene: Scene, options: PackOptions) -> tuple[Band, ...]:
    """The bands of a tile, in order. Raises PlanError for one that is not there."""
    available = named_of(scene)
    numbers = band_numbers(options.tile.bands, available, scene.path)
    return tuple(
        Band(name=available[n - 1].name, number=n, wavelength_nm=available[n - 1].wavelength_nm) for n in numbers
    )


def warnings(scene: Scene, options: PackOptions) -> list[str]:
    """What is allowed about a scene's bands but may not be meant."""
    known = named_of(scene)
    if options.tile.bands != "rgb" or all(_number(colour, known) for colour in COLOURS):
        return []
    return [
        f"{scene.path}: nothing says which of its bands are red, green and blue, so tiles take the first three "
        f"({', '.join(scene.band_names[:3])}) in this order. Gaofen, for one, stores blue first. Give --sensor, or "
        "tile.bands=[3,2,1], or tile.bands=[1,2,3] if it is right so"
    ]


# Sentinel-2's products from processing baseline 04.00 on hold values that are 1,000 greater; the name says which it is.
_BASELINE = re.compile(r"S2[A-D]_MSIL\w+_N(\d{4})_")
_OFFSET_FROM = 400


def offset_warnings(scenes: Sequence[Scene], options: PackOptions) -> list[str]:
    """Of scenes whose values, kept as they are or stretched alike, do not mean the same."""
    if options.stretch.mode not in ("limits", "none"):
        return []
    found = [
        (int(match[1]), scene) for scene in scenes if (match := _BASELINE.search(f"{scene.scene_id} {scene.path}"))
    ]
    older = next((scene for baseline, scene in found if baseline < _OFFSET_FROM), None)
    newer = next((scene for baseline, scene in found if baseline >= _OFFSET_FROM), None)
    if older is None or newer is None:
        return []
    return [
        f"stretch.mode={options.stretch.mode}: {newer.path} is of a processing baseline that adds 1,000 to all values, "
        f"{older.path} of one that does not; pack them apart, or get all of one baseline"
    ]


# -------------------------------------------------------------------------------------------- several scenes


def check_alike(scenes: Sequence[Scene]) -> None:
    """Raises PlanError where scenes differ in dtype, or scenes of one file each in their number of bands."""
    first, whole = scenes[0], _whole(scenes)
    for scene in scenes[1:]:
        if first.dtype != scene.dtype:
            raise PlanError(_mixed("dtype", first, first.dtype, scene, scene.dtype))
    for scene in whole[1:]:
        counts = len(whole[0].band_names), len(scene.band_names)
        if counts[0] != counts[1]:
            raise PlanError(_mixed("bands", whole[0], counts[0], scene, counts[1]))


def form_of(scenes: Sequence[Scene]) -> SceneForm:
    """What :func:`check_alike` compares, of scenes that are alike."""
    return SceneForm(dtype=scenes[0].dtype, bands=next((len(scene.band_names) for scene in _whole(scenes)), 0))


def _whole(scenes: Sequence[Scene]) -> list[Scene]:
    """Those that are one file each."""
    return [scene for scene in scenes if len({layer and layer.path for layer in scene.layers}) == 1]


def _mixed(what: str, one: Scene, a: object, other: Scene, b: object) -> str:
    return f"mixed scenes: {one.path} has {what} {a}, {other.path} has {b}; pack them as separate datasets"


def check_band_names(scenes: Sequence[Scene], bands: Sequence[Band], options: PackOptions) -> None:
    """Bands chosen by number must carry the same names in every scene: band 1 must not be red here, blue there."""
    for scene in scenes[1:]:
        names = [band.name for band in choose_bands(scene, options)]
        if names != [band.name for band in bands]:
            raise PlanError(
                f"tile.bands: means {', '.join(band.name for band in bands)} in {scenes[0].path} but "
                f"{', '.join(names)} in {scene.path}; choose bands by name, or pack them as separate datasets"
            )


def tile_dtype(scene: Scene, bands: int, options: PackOptions) -> str:
    dtype = scene.dtype if options.stretch.mode == "none" else "uint8"
    if problem := tile_codecs.unfit(options.tile.codec, bands, dtype):
        raise PlanError(
            f"tile.codec: {problem}, or stretch to 8 bits "
            f"(scenes of {scene.dtype}, stretch.mode={options.stretch.mode})"
        )
    pairs = len(options.stretch.limits or ())
    if pairs not in (0, 1, bands):
        raise PlanError(f"stretch.limits has {pairs} pairs for {bands} bands: give one pair, or one a band")
    return dtype
