"""A scene's files opened: the bands they hold, brought to one grid, and what planning needs to know of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from preprocess import bands, coordinates, fingerprints, remote, scene_headers
from preprocess.alignment import Alignment, align
from preprocess.bands import NamedBand
from preprocess.dates import find_date
from preprocess.errors import RasterError
from preprocess.georeference import PLAIN, Placement
from preprocess.inputs import PlanError
from preprocess.options import PackOptions
from preprocess.place import AffinePlace
from preprocess.raster import SCENE_DTYPES, Layer, Scene
from preprocess.scene_headers import Header
from preprocess.sensor import Sensor


@dataclass(frozen=True, slots=True)
class BandFile:
    """Where a band lies: ``number``, from 1, of a file; the path is empty if the product has no file for it.

    also: other names by which it may be chosen. fault: why its file cannot be opened, if that shows beforehand: an
    error only for a band that is chosen.
    """

    name: str
    path: str
    number: int = 1
    also: tuple[str, ...] = ()
    wavelength_nm: float | None = None
    fault: str = ""


@dataclass(frozen=True, slots=True)
class Source:
    """A scene before its files are opened: either one ``file`` with all its bands, or ``bands``.

    title: what messages call it. path: its first file, which tells scenes of one name apart. name: the id it wants to
    have; empty for the file's. names: of the file's bands, where a list gives them. date: ISO or empty.
    nodata: for files that name none. mask: a mask beside the scene, or empty. mask_kind: what it holds, as
    ``mask.kind`` says it, where that is known. mask_fault: as a band's, an error only where masks are used.
    """

    title: str
    path: str
    name: str = ""
    file: str = ""
    names: tuple[str, ...] = ()
    bands: tuple[BandFile, ...] = ()
    date: str = ""
    nodata: float | None = None
    mask: str = ""
    mask_kind: str = ""
    mask_fault: str = ""


def open_scene(
    source: Source,
    scene_id: str,
    options: PackOptions,
    sensor: Sensor | None,
    placement: Placement = PLAIN,
    identify: bool = True,
) -> Scene:
    """A scene's headers read. Raises RasterError for files that cannot be used, PlanError for bands that are not there.

    Of a scene with several files only those of the chosen bands are opened; the finest of them gives the grid.
    identify: whether the fingerprint is needed, for which parts of the files are read; without, it is empty.
    """
    headers: dict[str, Header] = {}

    def header(path: str) -> Header:
        if path not in headers:
            headers[path] = scene_headers.read_header(path, placement, identify)
            _check_dtype(headers[path], headers[next(iter(headers))])
        return headers[path]

    if source.file:
        named = bands.named_bands(header(source.file), source.names, sensor, source.title)
        layers = [Layer(source.file, number, False) for number in range(1, len(named) + 1)]
        found: list[Layer | None] = list(layers)
    else:
        named = [NamedBand(band.name, band.also, band.wavelength_nm) for band in source.bands]
        # the first three of several files mean nothing: without names it is an error
        wanted = bands.COLOURS if options.tile.bands == "rgb" else options.tile.bands
        chosen = bands.band_numbers(wanted, named, source.title)
        found = [
            _layer(band, source, header) if number in chosen else None for number, band in enumerate(source.bands, 1)
        ]
    return _assembled(source, scene_id, options, sensor, headers, named, found)


def _layer(band: BandFile, source: Source, header: Callable[[str], Header]) -> Layer:
    if band.fault:
        raise PlanError(band.fault)
    if not band.path:
        there = [
            f"{other.name} ({other.also[0]})" if other.also else other.name for other in source.bands if other.path
        ]
        identity = f" ({band.also[0]})" if band.also else ""
        raise RasterError(
            f"{source.title}: has no file for band {band.name}{identity}; it has {', '.join(there)}", "band_missing"
        )
    count = header(band.path).count
    if band.number > count:
        raise PlanError(
            f"{source.title}: band {band.name}: {remote.shown(band.path)} has no band {band.number}, {count} at most"
        )
    return Layer(band.path, band.number, False)


def _has_alpha(header: Header, path: str, named: Sequence[BandFile]) -> bool:
    """Whether a file of a scene's several has an alpha band that is not called otherwise by the scene."""
    taken = {band.number for band in named if band.path == path and bands.ALPHA not in (band.name, *band.also)}
    names = enumerate(bands.own_names(header), 1)
    return any(name == bands.ALPHA and number not in taken for number, name in names)


def _check_dtype(header: Header, first: Header) -> None:
    dtypes = {*header.dtypes, *first.dtypes}
    if len(dtypes) != 1 or not dtypes <= set(SCENE_DTYPES):
        files = " and ".join(dict.fromkeys(remote.shown(each.path) for each in (first, header)))
        raise RasterError(
            f"{files}: bands of {', '.join(sorted(dtypes))}; expected one of {', '.join(SCENE_DTYPES)} for all: "
            "convert with gdal_translate -ot",
            "dtype",
        )


def _assembled(
    source: Source,
    scene_id: str,
    options: PackOptions,
    sensor: Sensor | None,
    headers: dict[str, Header],
    named: Sequence[NamedBand],
    found: Sequence[Layer | None],
) -> Scene:
    if source.file:
        alpha = {source.file} if any(band.name == bands.ALPHA for band in named) else set()
    else:
        alpha = {path for path, header in headers.items() if _has_alpha(header, path, source.bands)}
    masked = {path: header.masked or path in alpha for path, header in headers.items()}
    reference = min(headers.values(), key=_pixel_area) if len(headers) > 1 else next(iter(headers.values()))
    layers = []
    for layer in found:
        if layer is not None and headers[layer.path] is not reference:
            layer = replace(layer, alignment=_alignment(reference, headers[layer.path], options, source.title))
        layers.append(layer and replace(layer, masked=masked[layer.path]))
    size = reference.place.width, reference.place.height
    parted = any(layer and layer.alignment and not layer.alignment.covers(*size) for layer in layers)
    values = [_nodata(layer, headers, source, options, sensor) for layer in layers]
    date = source.date or next((h.tag_date for h in headers.values() if h.tag_date), "")
    date = date or find_date(source.name or Path(remote.shown(source.path)).stem)
    date = date or next((h.processed for h in headers.values() if h.processed), "")
    any_masked = any(masked.values()) or parted
    names = tuple(band.name for band in named)
    ground = [(header.path is reference.path, *header.placed) for _, header in sorted(headers.items())]
    digests = [header.digest for _, header in sorted(headers.items())]
    chosen = [layer and (layer.number, layer.alignment) for layer in layers]
    return Scene(
        path=source.title,
        scene_id=scene_id,
        place=reference.place,
        dtype=reference.dtypes[0],
        band_names=names,
        wavelengths_nm=tuple(band.wavelength_nm for band in named),
        nodata=tuple(values),
        masked=any_masked,
        date=date,
        fingerprint=fingerprints.fingerprint(digests, (ground, names, values, chosen, any_masked, date))
        if all(digests)
        else "",
        layers=tuple(layers),
        aliases=tuple(band.also for band in named),
        mask_path=_mask_path(source, options),
    )


def _mask_path(source: Source, options: PackOptions) -> str:
    """The mask that the source names, unless it is of another kind than the one wanted, or cannot be opened where
    mask.pattern says of another."""
    kind = options.mask.kind
    if kind is not None and source.mask_kind not in ("", kind):
        return ""
    if kind is not None and source.mask_fault:
        if options.mask.pattern is None:
            raise PlanError(source.mask_fault)
        return ""
    return source.mask


def _nodata(
    layer: Layer | None, headers: dict[str, Header], source: Source, options: PackOptions, sensor: Sensor | None
) -> float | None:
    """The value that means no data in a band: the file's, else the scene's, the user's, the sensor's.

    None where a mask or alpha band says which pixels hold data, whatever their values.
    """
    if layer is None or layer.masked:
        return None
    of_sensor = sensor.table.nodata if sensor else None
    candidates = (headers[layer.path].nodata[layer.number - 1], source.nodata, options.scene.nodata, of_sensor)
    return next((value for value in candidates if value is not None), None)


def _pixel_area(header: Header) -> float:
    """In units of its CRS, without what rounding makes of it; 0 for a place by a model, which aligns with none."""
    if not isinstance(header.place, AffinePlace):
        return 0.0
    a, b, _, d, e, _ = header.place.grid.transform
    return float(f"{abs(a * e - b * d):.9g}")  # degrees make small numbers: 0.5 m squared is 2e-11


def _alignment(reference: Header, header: Header, options: PackOptions, title: str) -> Alignment | None:
    one, other = reference.place, header.place
    files = f"{remote.shown(reference.path)} and {remote.shown(header.path)}"
    if one == other:
        return None
    if (
        not isinstance(one, AffinePlace)
        or not isinstance(other, AffinePlace)
        or not coordinates.same_crs(one.crs, other.crs)
    ):
        apart = "different coordinate systems, or RPCs or control points place them apart"
        raise RasterError(
            f"{title}: its bands lie in {apart}: {files}; warp them to one (gdalwarp -t_srs)",
            "grids",
        )
    try:
        return align(one.grid, other.grid, options.scene.resampling)
    except ValueError as error:
        raise RasterError(
            f"{title}: the grids of {files} do not align: {error}; warp them to one first", "grids"
        ) from error
