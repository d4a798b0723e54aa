"""Small georeferenced rasters for tests, packing them in this process, and labels computed another way.

The second way shares nothing with preprocess.labels: every sub-pixel centre goes through rasterio.warp.transform by
itself, codes are looked up in a dictionary made from the product's YAML, and sheets are chosen from their names.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import yaml
from affine import Affine
from rasterio.warp import transform as warp_points

from geokr import config, manifests, records
from geokr.manifests import Manifest
from geokr.records import Record
from preprocess import pack_records, shards
from preprocess.options import PackOptions
from preprocess.pack import pack
from preprocess.plan import make_plan
from preprocess.raster import Scene
from preprocess.scene import Source, open_scene
from preprocess.workfolder import EXTRAS

SHARED = Path(__file__).resolve().parents[2] / "shared"
ZION = SHARED / "data/zion/derived_zion_landsat8_RGBN_uint16.tif"
NLCD = SHARED / "data/zion/nlcd2011.tif"
WORLD = SHARED / "data/glcnmo-world/glcnmo2008_cover20_0p333deg.tif"
WORLDCOVER = SHARED / "data/worldcover-n00e006/ESA_WorldCover_10m_2021_v200_N00E006_Map.tif"
needs_shared = pytest.mark.skipif(not ZION.exists(), reason="the real scenes are not beside this checkout")

NO_QUALITY = (
    "quality.min_brightest=null",
    "quality.max_dark_fraction=null",
    "quality.min_contrast=null",
    "quality.max_bright_fraction=null",
)
# every tile is kept, and its pixels are the scene's
RAW = (*NO_QUALITY, "split.val_fraction=0", "tile.codec=raw", "stretch.mode=none", "tile.bands=null", "workers=0")
UTM31 = "EPSG:32631"


def write_raster(
    path: Path,
    pixels: np.ndarray,
    transform: Affine | tuple[float, ...],
    crs: str | None = UTM31,
    *,
    tags: dict[str, str] | None = None,
    names: Sequence[str] = (),
    **profile: Any,
) -> Path:
    """Writes pixels [H, W] or [C, H, W] as a GeoTIFF; returns its path."""
    pixels = pixels[None] if pixels.ndim == 2 else pixels
    count, height, width = pixels.shape
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(
        path, "w", driver="GTiff", width=width, height=height, count=count, dtype=pixels.dtype, crs=crs,
        transform=transform if isinstance(transform, Affine) else Affine(*transform), **profile,
    ) as file:  # fmt: skip
        file.write(pixels)
        if tags:
            file.update_tags(**tags)
        for number, name in enumerate(names, 1):
            file.set_band_description(number, name)
    return path


def noise(seed: int, shape: tuple[int, ...], dtype: str = "uint8", low: int = 1, high: int = 255) -> np.ndarray:
    """Pixels that no quality rule minds."""
    return np.random.default_rng(seed).integers(low, high, shape).astype(dtype)


def patches(seed: int, height: int, width: int, codes: Sequence[int], side: int = 3) -> np.ndarray:
    """A land-cover map of patches of a few pixels, uint8 [height, width]."""
    rng = np.random.default_rng(seed)
    coarse = rng.choice(codes, (-(-height // side) + 1, -(-width // side) + 1))
    return np.repeat(np.repeat(coarse, side, 0), side, 1)[:height, :width].astype(np.uint8)


def pack_quietly(
    scenes: Sequence[Path | str],
    sheets: Sequence[Path | str],
    product: str,
    out: Path,
    *overrides: str,
    also: Mapping[str, Sequence[str]] | None = None,
    **keywords: Any,
):
    """Packs in this process without a console; returns preprocess.pack.Packed. Of equal keys the last counts.

    also: further products. keywords: preprocess.pack.pack's.
    """
    last = {override.split("=")[0]: override for override in overrides}
    options = config.load(PackOptions, None, last.values())
    plan = make_plan([str(p) for p in scenes], [str(p) for p in sheets], product, options, also)
    return pack(plan, out, lambda phase, done, total: None, **keywords)


def scene_at(path: Path | str, scene_id: str = "scene") -> Scene:
    """A file with all its bands as planning sees it, with the default options."""
    return open_scene(Source(title=str(path), path=str(path), file=str(path)), scene_id, PackOptions(), None)


def command(scenes: Sequence[Path | str], sheets: Sequence[Path | str], product: str, out: Path, *rest: str) -> int:
    """The command line in this process; its exit status."""
    return pack_records.main(
        [
            "--scenes",
            *map(str, scenes),
            "--land-cover",
            *map(str, sheets),
            "--product",
            product,
            "--out",
            str(out),
            *rest,
        ]
    )


def read_records(folder: Path, manifest: Manifest | None = None) -> Iterator[tuple[str, Record]]:
    """(split, record) of every record, in order."""
    manifest = manifest or manifests.load_manifest(folder)
    for name in records.SPLITS:
        for shard in manifest.split(name).shards:
            for _, payload in shards.read_frames(folder / shard.name):
                yield name, records.decode_record(payload)


def pixels_of(record: Record) -> np.ndarray:
    """[H, W, C] of a raw record."""
    return np.frombuffer(record.image, np.dtype(record.dtype).newbyteorder("<")).reshape(record.shape)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its path in it, but for what the contract leaves out (tiles.parquet, report.html)."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in EXTRAS]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# ------------------------------------------------------------------------------------------- labels, another way


class OtherWay:
    """Class fractions of tiles from (path, transform, crs) alone, sub-pixel by sub-pixel."""

    def __init__(self, product: str, sheets: Sequence[Path], drop: Sequence[str] = (), merge: dict | None = None):
        table = yaml.safe_load(Path(product).read_text() if product.endswith(".yaml") else packaged(product))
        self.nodata, self.ignored = set(table["nodata"]), set(table["ignore"])
        self.class_of: dict[int, str] = {}
        into = {member: new for new, members in (merge or {}).items() for member in members}
        for code, entry in table["classes"].items():
            for each in (code, *entry.get("also", [])):
                self.class_of[each] = "" if entry["name"] in drop else into.get(entry["name"], entry["name"])
        self.sheets = []
        for path in sorted(sheets, key=lambda p: p.name):
            with rasterio.open(path) as file:
                self.sheets.append((path.name, file.read(1), file.transform, file.crs, file.nodata))

    def labels(self, transform: Sequence[float], crs: str, size: int, kx: int, ky: int) -> np.ndarray:
        """Class names [size * ky, size * kx]; None where nothing is known, '' where it does not count."""
        columns = (np.arange(size * kx) + 0.5) / kx
        rows = (np.arange(size * ky) + 0.5) / ky
        columns, rows = np.meshgrid(columns, rows)
        a, b, c, d, e, f = transform
        return self.labels_at(a * columns + b * rows + c, d * columns + e * rows + f, crs)

    def labels_at(self, x: np.ndarray, y: np.ndarray, crs: str) -> np.ndarray:
        """Class names of points of any shape in a CRS."""
        lon, lat = warp_points(crs, "EPSG:4326", x.ravel(), y.ravel())[:2]
        per_sheet = [self._codes(sheet, crs, x.ravel(), y.ravel()) for sheet in self.sheets]
        found = np.empty(x.size, object)
        for i in range(x.size):
            order = sorted(range(len(self.sheets)), key=lambda s: not is_at_home(self.sheets[s][0], lon[i], lat[i]))
            found[i] = next((self._name(per_sheet[s][i]) for s in order if per_sheet[s][i] is not None), None)
        return found.reshape(x.shape)

    def _name(self, code: int) -> str:
        return "" if code in self.ignored else self.class_of[code]

    def _codes(self, sheet: tuple, crs: str, x: np.ndarray, y: np.ndarray) -> list[int | None]:
        _, codes, transform, sheet_crs, nodata = sheet
        sx, sy = warp_points(crs, sheet_crs, x, y)[:2]
        a, b, c, d, e, f = tuple(~transform)[:6]
        sx, sy = np.array(sx), np.array(sy)
        columns, rows = a * sx + b * sy + c, d * sx + e * sy + f
        if sheet_crs.is_geographic:
            columns = columns % (360 / transform.a)
        found: list[int | None] = []
        for column, row in zip(columns, rows, strict=True):
            inside = 0 <= column < codes.shape[1] and 0 <= row < codes.shape[0]
            code = int(codes[math.floor(row), math.floor(column)]) if inside else None
            found.append(None if code is None or code in self.nodata or code == nodata else code)
        return found

    def fractions(
        self, names: Sequence[str], transform: Sequence[float], crs: str, size: int, kx: int, ky: int, valid: np.ndarray
    ) -> tuple[np.ndarray, float]:
        """(fractions in the order of ``names``, share of sub-pixels that counted). valid: bool [size, size]."""
        found = self.labels(transform, crs, size, kx, ky)
        return shares(names, found[np.repeat(np.repeat(valid, ky, 0), kx, 1)], size * size * kx * ky)


def shares(names: Sequence[str], labels: np.ndarray, of: int) -> tuple[np.ndarray, float]:
    """(fractions in the order of ``names``, share of ``of`` that counted) of labels."""
    counts = np.array([np.sum(labels == name) for name in names], np.float64)
    return counts / max(counts.sum(), 1), counts.sum() / of


def packaged(product: str) -> str:
    """The YAML of a product that comes with the package."""
    import geokr.products

    return (Path(next(iter(geokr.products.__path__))) / f"{product}.yaml").read_text()


def is_at_home(name: str, lon: float, lat: float) -> bool:
    """Whether a GlobeLand30 sheet's name stands for a place: its 6 degree zone and 5 degree band."""
    match = re.match(r"([nNsS])(\d\d)_(\d\d)_", name)
    if not match:
        return False
    zone, band = int(match[2]), int(match[3])
    wide = 12 if band >= 60 else 6
    west = 6 * zone - 186
    lat = lat if match[1] in "nN" else -lat
    return (lon - west) % 360 < wide and band <= lat < band + 5


def check_labels(
    folder: Path,
    other: OtherWay,
    kx: int,
    ky: int,
    *,
    valid: Callable[[Record], np.ndarray] | None = None,
    limit: int = 12,
    exactly: bool = True,
) -> int:
    """Compares up to ``limit`` records spread over a dataset with the other way; returns how many."""
    manifest = manifests.load_manifest(folder)
    names = [entry.name for entry in manifest.classes]
    every = [record for _, record in read_records(folder, manifest)]
    chosen = every[:: max(1, len(every) // limit)]
    for record in chosen:
        size = record.shape[0]
        mask = np.ones((size, size), bool) if valid is None else valid(record)
        fractions, share = other.fractions(names, record.transform, record.crs, size, kx, ky, mask)
        atol = 1e-6 if exactly else 1e-3
        np.testing.assert_allclose(record.fractions, fractions, atol=atol, err_msg=record.tile_id)
        np.testing.assert_allclose(record.valid_fraction, share, atol=atol, err_msg=record.tile_id)
    return len(chosen)
