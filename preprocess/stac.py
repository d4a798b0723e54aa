"""Scenes as STAC describes them: items, item collections, catalogs and collections, as JSON files (pystac).

An item is a scene. Its bands are those of its raster assets: called by the asset's key, and by the names that its
metadata give (``eo:bands``, or ``bands`` since STAC 1.1). Paths are relative to the item, as STAC has it.
"""

import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from preprocess import remote
from preprocess.dates import find_date
from preprocess.inputs import PlanError, resolved
from preprocess.scene import BandFile, Source
from preprocess.sensor import Sensor

TYPES = {"Feature", "FeatureCollection", "Catalog", "Collection"}
# Assets that show a scene or lie beside it, by role. An asset that names no role counts as data.
NO_DATA = {"thumbnail", "overview", "visual", "metadata", "date", "mask", "cloud", "snow-ice", "land-water"}
NO_DATA |= {"water-mask", "saturation", "cloud-shadow", "reflectance-offset"}
# Classification bands that the common collections carry, by key.
MASKS = {"scl": "scl", "SCL": "scl", "qa_pixel": "qa_pixel", "QA_PIXEL": "qa_pixel"}  # assets, and what they hold
ENDINGS = (".tif", ".tiff", ".jp2", ".cog")
MEDIA = ("image/tiff", "image/jp2", "image/vnd.stac.geotiff")


def is_stac(path: str) -> bool:
    """Whether a JSON file is STAC. A URL is taken for it: scene lists lie on this machine."""
    if remote.is_remote(path):
        return True
    try:
        tree = json.loads(Path(path).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(tree, dict) and tree.get("type") in TYPES


def read(path: str, sensor: Sensor | None, allow_remote: bool) -> list[Source]:
    """The items that a STAC file holds or links to. Raises PlanError."""
    import pystac
    from pystac.stac_io import DefaultStacIO

    class Io(DefaultStacIO):
        """Reads nothing over the network unless asked to."""

        def read_text_from_href(self, href: str) -> str:
            if remote.is_remote(href) and not href.startswith("file://"):
                return _fetched(resolved(href, "", f"{remote.shown(path)}: links to", allow_remote), super())
            return super().read_text_from_href(href)

    io = Io()
    try:
        tree = io.read_json(path)
        items = list(_items(tree, path, io, pystac))
    except PlanError:
        raise
    except Exception as error:  # pystac and what it calls raise whatever they like over damaged files
        if isinstance(error.__cause__, PlanError):  # wrapped by pystac
            raise error.__cause__ from None
        raise PlanError(f"{remote.shown(path)}: cannot be read as STAC ({type(error).__name__}: {error})") from error
    if not items:
        raise PlanError(f"{remote.shown(path)}: holds no STAC item and links to none")
    return [_source(item, path, sensor, allow_remote) for item in items]


def _fetched(url: str, io: Any) -> str:
    """A file behind a URL, tried again a few times."""
    for wait in (0.5, 2.0, 8.0):
        try:
            return io.read_text_from_href(url)
        except Exception as error:
            if "404" in str(error) or "403" in str(error):
                raise
            time.sleep(wait)
    return io.read_text_from_href(url)


def _items(tree: dict[str, Any], path: str, io: Any, pystac: Any) -> Iterator[Any]:
    kind = tree.get("type")
    if kind == "FeatureCollection":
        for feature in tree.get("features", []):
            yield pystac.Item.from_dict(feature, preserve_dict=False)
    elif kind == "Feature":
        yield pystac.Item.from_dict(tree, href=path, preserve_dict=False)
    else:
        reader = pystac.Collection if kind == "Collection" else pystac.Catalog
        yield from reader.from_file(path, stac_io=io).get_items(recursive=True)


def _source(item: Any, path: str, sensor: Sensor | None, allow_remote: bool) -> Source:
    own = item.get_self_href() or path
    title = f"{item.id} ({remote.shown(own)})"
    folder = own.rpartition("/")[0] or "."
    bands: list[tuple[str, BandFile]] = []
    wide: list[tuple[str, BandFile]] = []  # of assets with several bands
    for key, asset in item.assets.items():
        if not _is_raster(asset):
            continue
        href, fault = _resolved(asset.href, folder, f"{title}: asset {key!r}:", allow_remote)
        described = asset.extra_fields.get("bands") or asset.extra_fields.get("eo:bands") or [{}]
        several = len(described) > 1
        for number, band in enumerate(described, 1):
            of = f"{key}.{number}" if several else key
            (wide if several else bands).append((of, _band(of, href, fault, number, band, sensor)))
    # a picture's red counts only where no asset is the red band itself
    taken = {word for _, band in bands for word in (band.name, *band.also)}
    bands += [(key, band) for key, band in wide if not taken & {band.name, *band.also}]
    if not bands:
        listed = ", ".join(f"{key} ({asset.media_type or 'no type'})" for key, asset in item.assets.items()) or "none"
        raise PlanError(f"{title}: no asset is a GeoTIFF or JPEG 2000 with data; its assets: {listed}")
    mask = next((key for key in MASKS if key in item.assets), "")
    masked = _resolved(item.assets[mask].href, folder, f"{title}: mask:", allow_remote) if mask else ("", "")
    properties = item.properties
    day = properties.get("datetime") or properties.get("start_datetime") or ""
    return Source(
        title=title,
        path=bands[0][1].path,
        name=item.id,
        bands=_distinct(bands),
        date=find_date(str(day)[:10]),
        mask=masked[0],
        mask_kind=MASKS.get(mask, ""),
        mask_fault=masked[1],
    )


def _resolved(href: str, folder: str, where: str, allow_remote: bool) -> tuple[str, str]:
    """(path or URL, why it cannot be opened): items name many files, and only what is chosen has to be there."""
    local = _local(href)
    try:
        return resolved(local, folder, where, allow_remote), ""
    except PlanError as error:
        return local, str(error)


def _local(href: str) -> str:
    """A file URL as a path; others as they are."""
    return unquote(urlsplit(href).path) if href.lower().startswith("file://") else href


def _is_raster(asset: Any) -> bool:
    if NO_DATA & set(asset.roles or ()):
        return False
    if asset.media_type:
        return asset.media_type.split(";")[0].strip().lower() in MEDIA
    return remote.shown(asset.href).lower().endswith(ENDINGS)


def _band(key: str, href: str, fault: str, number: int, described: dict[str, Any], sensor: Sensor | None) -> BandFile:
    """A band under its best name (the sensor's, the common one, the key) and all the others it has."""
    common = described.get("eo:common_name") or described.get("common_name")
    words = [word for word in (key, common, described.get("name")) if isinstance(word, str) and word]
    known = next((band for word in words if sensor and (band := sensor.band(word))), None)
    name = known.name if known else common if isinstance(common, str) and common else key
    also = dict.fromkeys([*words, *(known.words if known else ())])
    micrometres = described.get("eo:center_wavelength") or described.get("center_wavelength")
    nm = round(float(micrometres) * 1000, 3) if isinstance(micrometres, int | float) else None
    others = tuple(word for word in also if word != name)
    return BandFile(name, href, number, others, nm or (known and known.nm), fault)


def _distinct(bands: list[tuple[str, BandFile]]) -> tuple[BandFile, ...]:
    """Bands that share a name (``rededge``, one band in two formats) go by their keys; one whose key it is keeps it."""
    counts = Counter(band.name for _, band in bands)
    return tuple(
        replace(band, name=key, also=(band.name, *(word for word in band.also if word != key)))
        if counts[band.name] > 1 and key != band.name
        else band
        for key, band in bands
    )
