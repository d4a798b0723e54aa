"""The record contract: what a shard holds. Shared, with geokr.manifests, by packer and readers.

A dataset is a folder:

    train-00000.tfrecord  train-00000.idx  ...  val-00000.tfrecord  val-00000.idx  ...  manifest.json

A shard is a TFRecord file: frames one after another, each

    uint64  length of the payload, little-endian
    uint32  masked CRC32C of those 8 bytes
    bytes   payload, a tf.train.Example (geokr.example)
    uint32  masked CRC32C of the payload

An index is text, DALI's own: a line ``offset size`` a frame, both counting the whole frame.
A record's number in its split, in shard order, is its record id.
"""

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import numpy as np

from geokr import example

SPLITS = ("train", "val")
DTYPES = ("uint8", "uint16", "int16", "float32")
CODECS = ("jpeg", "png", "raw", "lz4")
FRACTIONS, GRID = "fractions", "fractions_grid"

HEADER = struct.Struct("<QI")
FOOTER = struct.Struct("<I")
FRAME_OVERHEAD = HEADER.size + FOOTER.size
# No tile comes near this; a length above it is damage, and nothing is allocated for it.
MAX_PAYLOAD = 1 << 30

# What reading bytes that are none may raise.
_NO_RECORD = (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError, ZeroDivisionError)

Split = Literal["train", "val"]
Crc32c = Callable[[bytes], int]


class RecordError(ValueError):
    """A dataset, shard or record that breaks the contract; the message says where and what to do."""


# ---------------------------------------------------------------------------------------------- frames


def mask_crc(crc: int) -> int:
    """TFRecord's masking: rotate right by 15 bits and add a constant, so that a CRC of CRCs stays sound."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def frame(payload: bytes, crc32c: Crc32c) -> bytes:
    """The payload with length and masked checksums around it."""
    length = struct.pack("<Q", len(payload))
    return b"".join((length, FOOTER.pack(mask_crc(crc32c(length))), payload, FOOTER.pack(mask_crc(crc32c(payload)))))


def payload_length(header: bytes, crc32c: Crc32c, where: str) -> int:
    """Length of the payload that follows a 12-byte header. Raises RecordError if its checksum fails."""
    if len(header) < HEADER.size:
        raise RecordError(f"{where}: the shard ends inside a record's header; it is cut short: pack it again")
    length, crc = HEADER.unpack(header)
    if mask_crc(crc32c(bytes(header[:8]))) != crc:
        raise RecordError(f"{where}: the length's checksum does not match: the shard is damaged, pack it again")
    if length > MAX_PAYLOAD:
        raise RecordError(f"{where}: a record of {length} bytes is beyond the format's limit of {MAX_PAYLOAD}")
    return length


def unframe(data: bytes | memoryview, crc32c: Crc32c, where: str) -> bytes:
    """The payload of exactly one frame, both checksums checked. Raises RecordError that begins with ``where``."""
    length = payload_length(bytes(data[: HEADER.size]), crc32c, where)
    if length != len(data) - FRAME_OVERHEAD:
        raise RecordError(
            f"{where}: the index says {len(data)} bytes, the record {length + FRAME_OVERHEAD}: "
            "index and shard do not belong together, pack again"
        )
    payload = bytes(data[HEADER.size : HEADER.size + length])
    (crc,) = FOOTER.unpack(data[HEADER.size + length :])
    if mask_crc(crc32c(payload)) != crc:
        raise RecordError(f"{where}: the payload's checksum does not match: the shard is damaged, pack it again")
    return payload


# --------------------------------------------------------------------------------------------- records


@dataclass(frozen=True, slots=True, eq=False)
class FurtherLabels:
    """What a further land-cover product says of a tile. fractions: float32 [its classes], sum 1. grid: as in Record."""

    fractions: np.ndarray
    valid_fraction: float
    label_gap_years: float | None = None
    grid: np.ndarray | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """One tile and what the land-cover map says of the ground under it.

    image: encoded bytes; ``jpeg`` is uint8 RGB, the others are lossless and explained in geokr.tile_codecs.
    shape: (height, width, bands). fractions: float32 [classes], sum 1. valid_fraction: share of the tile's
    ground that counted. lonlat: WGS 84 degrees of the centre. transform: pixel (column, row) to CRS as
    (a, b, c, d, e, f): x = a*column + b*row + c, y = d*column + e*row + f. crs: WKT. date: ISO or empty.
    label_gap_years: from the middle of the land cover's year to the date, where both are known. grid: float32
    [G, G, classes], the fractions by G x G squares of the tile, from its first row and column on: shares of the whole
    tile's ground that counted, sum 1; None where the dataset has none. also: labels by further products, by name.
    """

    image: bytes
    codec: str
    shape: tuple[int, int, int]
    dtype: str
    fractions: np.ndarray
    valid_fraction: float
    lonlat: tuple[float, float]
    transform: tuple[float, float, float, float, float, float]
    crs: str
    scene_id: str
    tile_id: str
    date: str = ""
    label_gap_years: float | None = None
    grid: np.ndarray | None = None
    also: Mapping[str, FurtherLabels] = field(default_factory=dict)

    def fractions_of(self, product: str | None) -> np.ndarray:
        """The fractions of a further product, or of the first where it is None. Raises KeyError."""
        return self.fractions if product is None else self.also[product].fractions


def encode_record(record: Record, image: bytes | None = None) -> bytes:
    """The record as a tf.train.Example; equal records give equal bytes. image: in place of the record's."""
    features: dict[str, example.Value] = {
        "image": record.image if image is None else image,
        "codec": record.codec.encode(),
        "shape": np.array(record.shape, np.int64),
        "dtype": record.dtype.encode(),
        "fractions": record.fractions.astype(np.float32, copy=False),
        "valid_fraction": np.array([record.valid_fraction], np.float32),
        "lonlat": np.array(record.lonlat, np.float32),
        "transform": struct.pack("<6d", *record.transform),
        "crs": record.crs.encode(),
        "scene_id": record.scene_id.encode(),
        "tile_id": record.tile_id.encode(),
    }
    if record.date:
        features["date"] = record.date.encode()
    if record.label_gap_years is not None:
        features["label_gap_years"] = np.array([record.label_gap_years], np.float32)
    if record.grid is not None:
        features[GRID] = record.grid.astype(np.float32).reshape(-1)
    for name, labels in record.also.items():
        features[f"{FRACTIONS}/{name}"] = labels.fractions.astype(np.float32)
        if labels.grid is not None:
            features[f"{GRID}/{name}"] = labels.grid.astype(np.float32).reshape(-1)
        features[f"valid_fraction/{name}"] = np.array([labels.valid_fraction], np.float32)
        if labels.label_gap_years is not None:
            features[f"label_gap_years/{name}"] = np.array([labels.label_gap_years], np.float32)
    return example.encode(features)


def fractions_feature(product: str | None, *, by_square: bool = False) -> str:
    """Name of the feature that holds the fractions of a further product, or of the first where it is None."""
    feature = GRID if by_square else FRACTIONS
    return feature if product is None else f"{feature}/{product}"


def _further(features: Mapping[str, Any]) -> dict[str, FurtherLabels]:
    names = [name.removeprefix(f"{FRACTIONS}/") for name in features if name.startswith(f"{FRACTIONS}/")]
    return {
        name: FurtherLabels(
            features[f"{FRACTIONS}/{name}"],
            float(features[f"valid_fraction/{name}"][0]),
            _number(features, f"label_gap_years/{name}"),
            _grid(features, f"{GRID}/{name}", len(features[f"{FRACTIONS}/{name}"])),
        )
        for name in names
    }


def _number(features: Mapping[str, Any], name: str) -> float | None:
    return float(features[name][0]) if name in features else None


def _grid(features: Mapping[str, Any], name: str, classes: int) -> np.ndarray | None:
    if name not in features:
        return None
    values = features[name]
    side = math.isqrt(len(values) // classes)
    return values.reshape(side, side, classes)


def _text(features: Mapping[str, Any], name: str) -> str:
    return features[name][0].decode()


def decode_record(payload: bytes, where: str = "record") -> Record:
    """The whole record. Raises RecordError if a feature is missing, of another kind, or makes no sense."""
    try:
        features = cast(Mapping[str, Any], example.decode(payload))
        record = Record(
            image=features["image"][0],
            codec=_text(features, "codec"),
            shape=tuple(int(n) for n in features["shape"]),  # type: ignore[arg-type]
            dtype=_text(features, "dtype"),
            fractions=features["fractions"],
            valid_fraction=float(features["valid_fraction"][0]),
            lonlat=tuple(float(x) for x in features["lonlat"]),  # type: ignore[arg-type]
            transform=tuple(np.frombuffer(features["transform"][0], "<f8").tolist()),  # type: ignore[arg-type]
            crs=_text(features, "crs"),
            scene_id=_text(features, "scene_id"),
            tile_id=_text(features, "tile_id"),
            date=_text(features, "date") if "date" in features else "",
            label_gap_years=_number(features, "label_gap_years"),
            grid=_grid(features, GRID, len(features["fractions"])),
            also=_further(features),
        )
    except (example.ExampleError, *_NO_RECORD) as error:
        raise RecordError(f"{where}: not a geokr record ({type(error).__name__}: {error})") from error
    _check_record(record, where)
    return record


def _check_record(record: Record, where: str) -> None:
    checks = {
        "image": isinstance(record.image, bytes),
        "codec": record.codec in CODECS,
        "dtype": record.dtype in DTYPES,
        "shape": len(record.shape) == 3 and all(0 < n <= 1 << 20 for n in record.shape),
        "fractions": _are_fractions(record.fractions),
        "valid_fraction": 0 < record.valid_fraction <= 1.0001,
        "lonlat": len(record.lonlat) == 2 and bool(np.isfinite(record.lonlat).all()),
        "transform": len(record.transform) == 6 and bool(np.isfinite(record.transform).all()),
    }
    for name, fine in checks.items():
        if not fine:
            raise RecordError(f"{where}: feature {name!r} holds {getattr(record, name)!r:.200}, which cannot be")
    for name, labels in record.also.items():
        if not (_are_fractions(labels.fractions) and 0 < labels.valid_fraction <= 1.0001 and _fits(labels)):
            raise RecordError(f"{where}: labels of product {name!r} cannot be: {labels!r:.200}")
    if not _fits(record):
        raise RecordError(f"{where}: feature {GRID!r} does not add up to the tile's fractions")
    for gap in (record.label_gap_years, *(labels.label_gap_years for labels in record.also.values())):
        if gap is not None and not np.isfinite(gap):
            raise RecordError(f"{where}: feature 'label_gap_years' holds {gap}, which cannot be")
    if record.codec == "raw":
        expected = int(np.prod(record.shape, dtype=np.int64)) * np.dtype(record.dtype).itemsize
        if len(record.image) != expected:
            raise RecordError(f"{where}: feature 'image' holds {len(record.image)} bytes, its shape needs {expected}")


def _fits(labels: Record | FurtherLabels) -> bool:
    """Whether the squares' fractions add up to the tile's."""
    if labels.grid is None:
        return True
    sums = labels.grid.sum((0, 1), dtype=np.float64)
    return bool((labels.grid >= 0).all() and (abs(sums - labels.fractions) < 1e-4).all())


def _are_fractions(values: Any) -> bool:
    return (
        isinstance(values, np.ndarray)
        and values.dtype == np.float32
        and bool(np.isfinite(values).all() and (values >= 0).all() and abs(values.sum() - 1) < 1e-4)
    )
