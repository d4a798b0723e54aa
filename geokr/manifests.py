"""A dataset's folder: its manifest, the indexes of its shards, and what may lie beside them (see geokr.records)."""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, ValidationError, model_serializer

from geokr.config import suggestion
from geokr.records import FRAME_OVERHEAD, SPLITS, RecordError, Split

SCHEMA = "geokr-records"
SCHEMA_VERSION = 2
# Version 1 lacks the keys that are marked `added`; it reads as if they had their defaults.
READABLE_VERSIONS = (1, 2)
MANIFEST = "manifest.json"
WORK = ".work"  # an unfinished packing run's folder
EARLIER_MANIFEST = re.compile(r"manifest-v[0-9]+\.json")  # kept when scenes are added to a dataset
GROWING = ".work/growing.json"  # {"version": the one that is being made}, while scenes are added to a dataset


def added(default: Any, **constraints: Any) -> Any:
    """A manifest's key that version 1 did not know. It is written only where it differs from its default, so that
    a manifest of version 1 is written again as it was read: a training run knows its dataset by that hash."""
    return Field(default=default, json_schema_extra={"added": True}, **constraints)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_serializer(mode="wrap")
    def _without_defaults(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        tree = write(self)
        for name, key in type(self).model_fields.items():
            extra = key.json_schema_extra
            if isinstance(extra, dict) and extra.get("added") and getattr(self, name) == key.default:
                tree.pop(name, None)
        return tree


SHARD_NAME = r"(train|val)-([0-9]{5,})\.tfrecord"


class Shard(_Part):
    """A shard file and the index beside it (same name, ``.idx``)."""

    name: str = Field(pattern=f"^{SHARD_NAME}$")
    records: int = Field(gt=0)
    bytes: int = Field(gt=0)
    sha256: str
    index_sha256: str

    @property
    def index_name(self) -> str:
        return self.name.removesuffix(".tfrecord") + ".idx"


class Moments(_Part):
    """What a split's statistics are made from, so that those of more tiles can be made from both: number of pixels,
    sum and sum of squares of each band (whole numbers of any size where the dtype is an integer), and the sum of each
    class's fractions over the tiles. also: those sums for further products, by name."""

    pixels: int = Field(ge=0)
    sum: tuple[int | float, ...]
    squares: tuple[int | float, ...]
    fractions: tuple[float, ...]
    also: dict[str, tuple[float, ...]] = added({})


class SplitInfo(_Part):
    """One split. mean, std: per band, in the record's own units, over all pixels of its tiles, from integer sums
    where the dtype is an integer. prior: mean of its tiles' fractions."""

    records: int
    shards: tuple[Shard, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    prior: tuple[float, ...]
    moments: Moments | None = added(None)


class ClassInfo(_Part):
    name: str
    codes: tuple[int, ...]
    rgb: tuple[int, int, int]


class ProductInfo(_Part):
    """A further land-cover product of the records; its classes are in the order of ``fractions/NAME``."""

    product: str
    product_title: str
    land_cover_years: tuple[int, ...]
    land_cover_fingerprints: tuple[str, ...]
    classes: tuple[ClassInfo, ...]


class Band(_Part):
    """A band of the tiles: its name, its 1-based number in the scene, its centre wavelength where known."""

    name: str
    number: int
    wavelength_nm: float | None = None


class Tile(_Part):
    """Form of every tile: side in pixels, codec, dtype. grid: squares along its side that have fractions of their own,
    0 for none."""

    size: int
    codec: Literal["jpeg", "png", "raw", "lz4"]
    dtype: Literal["uint8", "uint16", "int16", "float32"]
    grid: int = added(0, ge=0)


class SceneForm(_Part):
    """What all scenes have in common before they are stretched: their dtype, and the number of bands of those that are
    one file each, 0 where none is."""

    dtype: str
    bands: int = added(0, ge=0)


class SceneInfo(_Part):
    """A scene that went in: what identifies its bytes, and the stretch limits that were used on it. label_gap_years:
    from the middle of the land cover's year to its date, by product, where both are known."""

    scene_id: str
    fingerprint: str
    date: str
    stretch_limits: tuple[tuple[float, float], ...] | None
    kept: int
    label_gap_years: dict[str, float] = added({})


class DamagedScene(_Part):
    """A scene that opened but could not be read through: what identified its bytes then, and its tile positions, which
    stand in ``counts`` as rejected."""

    fingerprint: str
    positions: int = Field(ge=0)


class Part(_Part):
    """What one run of the packer added: so many scenes and shards after those of the parts before it, and which of
    ``land_cover_fingerprints`` it was labelled by (numbers from 0)."""

    scenes: int = Field(ge=0)
    train_shards: int = Field(ge=0)
    val_shards: int = Field(ge=0)
    land_cover: tuple[int, ...]


class Manifest(_Part):
    """``manifest.json``. ``config`` is the packing configuration without paths, workers or hosts.

    version counts the runs that added to the dataset; parts says what each of them did, from version 2 on. left_out:
    scenes that could not be used, by id, with the reason, and the first of the cut tiles that could not, by tile id.
    damaged: those scenes of left_out that opened, by id. products: land-cover products beside the first, by name.
    """

    schema_name: Literal["geokr-records"] = Field(alias="schema", default="geokr-records")
    schema_version: Literal[1, 2] = SCHEMA_VERSION
    version: int = added(1, ge=1)
    parts: tuple[Part, ...] = added(())
    left_out: dict[str, str] = added({})
    damaged: dict[str, DamagedScene] = added({})
    digest: str = added("")
    products: dict[str, ProductInfo] = added({})
    product: str
    product_title: str
    land_cover_years: tuple[int, ...]
    land_cover_fingerprints: tuple[str, ...]
    classes: tuple[ClassInfo, ...]
    bands: tuple[Band, ...]
    tile: Tile
    scene_form: SceneForm | None = added(None)
    train: SplitInfo
    val: SplitInfo
    split_rule: str
    counts: dict[str, int]
    scenes: tuple[SceneInfo, ...]
    config: dict[str, Any]

    def split(self, name: Split) -> SplitInfo:
        return self.train if name == "train" else self.val


def labelled_by(manifest: Manifest, labels: str | None, where: str) -> tuple[Manifest, str | None]:
    """(the manifest as if it knew one product only, that product where it is a further one): what training with
    ``data.labels`` sees. None stands for the first product. Raises RecordError that lists the products there are."""
    if labels is None or labels == manifest.product:
        return manifest, None
    if labels not in manifest.products:
        names = [manifest.product, *manifest.products]
        raise RecordError(
            f"{where}: data.labels: its records hold no labels of product {labels!r}{suggestion(labels, names)}; "
            f"they hold {', '.join(names)}"
        )
    splits = {name: _split_labelled_by(manifest.split(name), labels) for name in SPLITS}
    chosen = {name: getattr(manifest.products[labels], name) for name in ProductInfo.model_fields}
    return manifest.model_copy(update={"products": {}, **chosen, **splits}), labels


def _split_labelled_by(part: SplitInfo, labels: str) -> SplitInfo:
    if part.moments is None:  # it holds no tiles
        return part
    sums = part.moments.also[labels]
    moments = part.moments.model_copy(update={"fractions": sums, "also": {}})
    return part.model_copy(update={"prior": tuple(value / sum(sums) for value in sums), "moments": moments})


def dump_manifest(manifest: Manifest) -> bytes:
    """JSON, sorted and indented, ending in a newline; equal manifests give equal bytes."""
    tree = manifest.model_dump(mode="json", by_alias=True, exclude={"digest"})
    if manifest.schema_version > 1:
        tree["digest"] = hashlib.sha256(_json(tree)).hexdigest()
    return _json(tree)


def _json(tree: Mapping[str, Any]) -> bytes:
    return (json.dumps(tree, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def folder_of(path: str | Path) -> Path:
    """The folder of a dataset that is named by itself, or by a manifest that it has grown beyond."""
    path = Path(path)
    return path.parent if EARLIER_MANIFEST.fullmatch(path.name) else path


def load_manifest(folder: str | Path) -> Manifest:
    """Reads ``folder/manifest.json``, or the earlier manifest that is named (see :func:`folder_of`).

    Raises RecordError if it is missing, damaged, or of another version.
    """
    path = Path(folder) if EARLIER_MANIFEST.fullmatch(Path(folder).name) else Path(folder) / MANIFEST
    if not path.is_file():
        reason = "there is no such folder" if not Path(folder).is_dir() else f"it holds no {MANIFEST}"
        if (Path(folder) / WORK / "plan.json").exists():  # without it that run has failed for good
            reason += ", but an unfinished packing run: give its command again to finish it"
        raise RecordError(
            f"{folder}: not a dataset: {reason}. Make one with python preprocess/pack_records.py --out {folder} ..."
        )
    try:
        tree = json.loads(path.read_bytes())
        found = (tree["schema"], tree["schema_version"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RecordError(f"{path}: damaged or not a geokr manifest ({error}); pack again") from error
    if found[0] != SCHEMA or type(found[1]) is not int or found[1] not in READABLE_VERSIONS:
        raise RecordError(
            f"{path}: expected schema {SCHEMA!r} version {' or '.join(map(str, READABLE_VERSIONS))}, got {found[0]!r} "
            f"version {found[1]!r}; pack again with this version of geokr, or use the version that made it"
        )
    try:
        manifest = Manifest.model_validate(tree)
    except ValidationError as error:
        item = error.errors()[0]
        key = ".".join(str(part) for part in item["loc"])
        raise RecordError(f"{path}: {key}: {item['msg']}; the manifest is damaged, pack again") from error
    for name in SPLITS:
        if fault := _split_fault(manifest, name):
            raise RecordError(f"{path}: {name}: {fault}; the manifest is damaged, pack again")
    if manifest.digest and json.loads(dump_manifest(manifest)).get("digest") != manifest.digest:
        raise RecordError(f"{path}: its digest is another: it is damaged or was changed; pack again")
    return manifest.model_copy(update={"digest": ""})  # it has done its work: what is made of the manifest has another


def _split_fault(manifest: Manifest, name: Split) -> str:
    """What does not fit together in a split, or an empty string."""
    part = manifest.split(name)
    names = [shard.name for shard in part.shards]
    if part.records != sum(shard.records for shard in part.shards):
        return "records does not equal the sum over its shards"
    if len(set(names)) != len(names):
        return "lists a shard twice"
    if not all(shard.startswith(f"{name}-") for shard in names):
        return "lists another split's shards"
    statistics = ((part.mean, manifest.bands), (part.std, manifest.bands), (part.prior, manifest.classes))
    if part.records and not all(len(v) == len(of) and np.isfinite(v).all() for v, of in statistics):
        return f"its statistics do not fit {len(manifest.bands)} bands and {len(manifest.classes)} classes"
    if moments := part.moments:
        of = ((moments.sum, manifest.bands), (moments.squares, manifest.bands), (moments.fractions, manifest.classes))
        also = [(moments.also.get(product, ()), info.classes) for product, info in manifest.products.items()]
        if not all(len(values) == len(those) and _finite(values) for values, those in (*of, *also)):
            return f"its moments do not fit {len(manifest.bands)} bands and {len(manifest.classes)} classes"
    return ""


def _finite(values: tuple[int | float, ...]) -> bool:
    return all(isinstance(value, int) or math.isfinite(value) for value in values)


def read_index(text: str, where: str) -> np.ndarray:
    """A DALI text index as int64 [records, 2]: offset and size of each frame. Checks that frames follow closely."""
    try:
        spans = np.array([line.split() for line in text.splitlines()], np.int64).reshape(-1, 2)
    except (ValueError, OverflowError) as error:
        raise RecordError(f"{where}: expected two whole numbers a line ({error})") from error
    ends = np.cumsum(spans[:, 1])
    if len(spans) and (spans[0, 0] != 0 or (spans[1:, 0] != ends[:-1]).any() or (spans[:, 1] < FRAME_OVERHEAD).any()):
        raise RecordError(f"{where}: the records it lists do not follow one another; it is damaged, pack again")
    return spans


def open_index(folder: str | Path, shard: Shard) -> np.ndarray:
    """The shard's spans, int64 [records, 2], after checking sizes, counts and the index's hash (not the payloads).

    Raises RecordError: missing or truncated shard, another index, a symbolic link in place of a file.
    """
    path, index_path = folder_of(folder) / shard.name, folder_of(folder) / shard.index_name
    for file in (path, index_path):
        if file.is_symlink() or not file.is_file():
            raise RecordError(f"{file}: missing (or not a plain file) though the manifest lists it; pack again")
    size = path.stat().st_size
    if size != shard.bytes:
        raise RecordError(f"{path}: {size} bytes, the manifest says {shard.bytes}: cut short or changed; pack again")
    return load_index(folder, shard)


def load_index(folder: str | Path, shard: Shard) -> np.ndarray:
    """As :func:`open_index`, for a shard that itself need not be there."""
    index_path = folder_of(folder) / shard.index_name
    data = index_path.read_bytes()
    if hashlib.sha256(data).hexdigest() != shard.index_sha256:
        raise RecordError(f"{index_path}: its hash is not the manifest's: damaged or changed; pack again")
    spans = read_index(data.decode("ascii", "replace"), str(index_path))
    if len(spans) != shard.records or int(spans[:, 1].sum()) != shard.bytes:
        raise RecordError(
            f"{index_path}: lists {len(spans)} records of {spans[:, 1].sum()} bytes, "
            f"the manifest says {shard.records} of {shard.bytes}; pack again"
        )
    return spans


def check_folder(folder: str | Path, manifest: Manifest) -> None:
    """Raises RecordError if the folder holds a shard that the manifest does not list.

    Shards of a later version are none of this one's business: of one that is being made (the packer says so in
    ``.work``), or that the folder's manifest has moved on to.
    """
    folder = folder_of(folder)
    listed = _listed(manifest)
    surplus = [path for path in sorted(folder.glob("*.tfrecord")) if path.name not in listed]
    if not surplus:
        return
    later: set[str] = set()
    if (folder / GROWING).is_file():
        later = {path.name for path in surplus if is_later(path.name, manifest)}
    if {path.name for path in surplus} - later and (folder / MANIFEST).is_file():
        newest = load_manifest(folder)
        later |= _listed(newest) if newest.version > manifest.version else set()
    for path in surplus:
        if path.name not in later:
            raise RecordError(f"{path}: a shard that the manifest does not list; remove it or pack again")


def shard_digests(shards: Sequence[Shard]) -> dict[str, str]:
    """What tells these very shards from others: the beginning of the hash of each, by name."""
    return {shard.name: shard.sha256[:16] for shard in shards}


def is_later(name: str, manifest: Manifest) -> bool:
    """Whether a file is named like a shard behind all those of its split."""
    match = re.fullmatch(SHARD_NAME, name)
    if not match:
        return False
    listed = manifest.split(cast(Split, match[1])).shards
    return int(match[2]) > max((int(shard.name[len(match[1]) + 1 : -len(".tfrecord")]) for shard in listed), default=-1)


def _listed(manifest: Manifest) -> set[str]:
    return {shard.name for name in SPLITS for shard in manifest.split(name).shards}
