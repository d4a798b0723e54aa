"""Which bands of the scenes make a tile, and in what type."""

from collections.abc import Sequence

from geokr.config import suggestion
from geokr.records import Band
from preprocess.inputs import PlanError
from preprocess.options import PackOptions
from preprocess.raster import Scene


def check_alike(scenes: Sequence[Scene]) -> None:
    first = scenes[0]
    for scene in scenes[1:]:
        for what, a, b in (
            ("bands", len(first.band_names), len(scene.band_names)),
            ("dtype", first.dtype, scene.dtype),
        ):
            if a != b:
                raise PlanError(
                    f"mixed scenes: {first.path} has {what} {a}, {scene.path} has {b}; pack them as separate datasets"
                )


def choose_bands(scene: Scene, options: PackOptions) -> tuple[Band, ...]:
    available = scene.band_names
    wanted = options.tile.bands
    if wanted is None:
        wanted = tuple(i + 1 for i, name in enumerate(available) if name != "alpha")
    numbers = []
    for band in wanted:
        if isinstance(band, str) and band not in available:
            raise PlanError(
                f"tile.bands: no band {band!r} in {scene.path}{suggestion(band, available)}; "
                f"it has {', '.join(available)}"
            )
        number = available.index(band) + 1 if isinstance(band, str) else band
        if not 1 <= number <= len(available):
            raise PlanError(f"tile.bands: no band {number} in {scene.path}, which has 1 to {len(available)}")
        numbers.append(number)
    if len(set(numbers)) != len(numbers):
        raise PlanError(f"tile.bands: a band stands twice in {list(wanted)}")
    return tuple(Band(name=available[n - 1], number=n, wavelength_nm=scene.wavelengths_nm[n - 1]) for n in numbers)


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
    if options.tile.codec == "jpeg" and (dtype != "uint8" or bands != 3):
        raise PlanError(
            f"tile.codec=jpeg holds 3 bands of 8 bits; here tiles have {bands} of {dtype} "
            f"(scenes of {scene.dtype}, stretch.mode={options.stretch.mode}): use tile.codec=raw, or stretch to 8 bits"
        )
    pairs = len(options.stretch.limits or ())
    if pairs not in (0, 1, bands):
        raise PlanError(f"stretch.limits has {pairs} pairs for {bands} bands: give one pair, or one a band")
    return dtype
