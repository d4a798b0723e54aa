"""Small datasets for tests, written through geokr.records alone.

A tile is a mosaic of square cells, each of one class; its fractions are the cells' shares, and each class has
a colour of its own under some noise, so that fractions can be learned from the pixels.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import simplejpeg

from geokr import manifests, records, tile_codecs

CELLS = 4
# From the mosaic's 0..255 to each dtype's own units: (factor, offset).
UNITS = {"uint8": (1.0, 0.0), "uint16": (200.0, 900.0), "int16": (60.0, -4000.0), "float32": (0.004, -0.02)}
CRS = 'LOCAL_CS["test grid",UNIT["metre",1]]'


def make_images(tiles: int, size: int, bands: int, dtype: str, classes: int, seed: int) -> tuple[np.ndarray, ...]:
    """(images [tiles, size, size, bands] of dtype, fractions float32 [tiles, classes])."""
    rng = np.random.default_rng(seed)
    colours = rng.uniform(40, 215, (classes, bands))
    shares = rng.dirichlet(np.full(classes, 0.7), tiles)
    picks = np.stack([rng.choice(classes, (CELLS, CELLS), p=share) for share in shares])
    at = np.arange(size) * CELLS // size
    labels = picks[:, at[:, None], at[None, :]]
    values = colours[labels] + rng.normal(0, 12, (tiles, size, size, bands))
    factor, offset = UNITS[dtype]
    values = np.clip(values, 0, 255) * factor + offset
    images = values.astype(np.float32) if dtype == "float32" else np.rint(values).astype(dtype)
    counts = np.stack([np.bincount(tile.ravel(), minlength=classes) for tile in labels])
    return images, (counts / size**2).astype(np.float32)


def make_records(images: np.ndarray, fractions: np.ndarray, codec: str) -> list[records.Record]:
    """One record a tile, in order; tile ids are its numbers."""
    tiles, size, _, bands = images.shape
    dtype = str(images.dtype)
    made = []
    for number in range(tiles):
        if codec == "jpeg":
            image = simplejpeg.encode_jpeg(np.ascontiguousarray(images[number]), quality=95, colorsubsampling="444")
        else:
            image = tile_codecs.encode(images[number], codec)
        made.append(
            records.Record(
                image=image,
                codec=codec,
                shape=(size, size, bands),
                dtype=dtype,
                fractions=fractions[number],
                valid_fraction=1.0,
                lonlat=(10.0 + number * 1e-3, 50.0),
                transform=(10.0, 0.0, 5e5 + number * size * 10, 0.0, -10.0, 5.5e6),
                crs=CRS,
                scene_id="test-scene",
                tile_id=f"test-{number:05d}",
                date="2020-06-01",
            )
        )
    return made


def _also(record: records.Record, products: Mapping[str, int], seed: int) -> records.Record:
    """The record with labels by further products."""
    rng = np.random.default_rng(seed)
    drawn = {name: rng.dirichlet(np.ones(count)).astype(np.float32) for name, count in products.items()}
    labels = {name: records.FurtherLabels(values, 1.0, 0.5) for name, values in drawn.items()}
    return replace(record, also=labels)


def _classes(count: int, first: str = "class") -> tuple[dict[str, Any], ...]:
    return tuple(
        {"name": f"{first}{k}", "codes": (k + 1,), "rgb": (40 * k % 256, 255 - 30 * k % 256, 90)} for k in range(count)
    )


def write_shard(folder: Path, name: str, payloads: list[bytes]) -> manifests.Shard:
    """Writes ``name`` and its index; returns what the manifest says of them."""
    frames = [records.frame(payload, google_crc32c.value) for payload in payloads]
    data = b"".join(frames)
    starts = np.cumsum([0, *map(len, frames)])[:-1]
    index = "".join(f"{start} {len(frame)}\n" for start, frame in zip(starts, frames, strict=True)).encode()
    (folder / name).write_bytes(data)
    (folder / name).with_suffix(".idx").write_bytes(index)
    return manifests.Shard(
        name=name,
        records=len(frames),
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        index_sha256=hashlib.sha256(index).hexdigest(),
    )


def _shards(folder: Path, split: str, payloads: list[bytes], size: int) -> Iterator[manifests.Shard]:
    for number, start in enumerate(range(0, len(payloads), size)):
        yield write_shard(folder, f"{split}-{number:05d}.tfrecord", payloads[start : start + size])


def _split(folder: Path, split: str, made: list[records.Record], images: np.ndarray, size: int) -> dict[str, Any]:
    values = images.astype(np.float64)
    axes = (0, 1, 2)
    return {
        "records": len(made),
        "shards": tuple(_shards(folder, split, [records.encode_record(record) for record in made], size)),
        "mean": tuple(values.mean(axes).tolist()) if made else (0.0,) * images.shape[3],
        "std": tuple(values.std(axes).tolist()) if made else (1.0,) * images.shape[3],
        "prior": tuple(np.mean([record.fractions for record in made], 0, np.float64).tolist()) if made else (),
        **({"moments": _moments(made, values)} if made and made[0].also else {}),
    }


def _moments(made: list[records.Record], values: np.ndarray) -> dict[str, Any]:
    return {
        "pixels": values[..., 0].size,
        "sum": tuple(values.sum((0, 1, 2)).tolist()),
        "squares": tuple((values**2).sum((0, 1, 2)).tolist()),
        "fractions": tuple(np.sum([record.fractions for record in made], 0, np.float64).tolist()),
        "also": {
            name: tuple(np.sum([record.also[name].fractions for record in made], 0, np.float64).tolist())
            for name in made[0].also
        },
    }


def _by_squares(record: records.Record, grid: int, seed: int) -> records.Record:
    """The record with each class's fraction spread over its squares at random."""
    rng = np.random.default_rng([seed, 5])

    def spread(fractions: np.ndarray) -> np.ndarray:
        shares = rng.dirichlet(np.ones(grid * grid), len(fractions)).T
        return (shares * fractions).reshape(grid, grid, -1).astype(np.float32)

    also = {name: replace(labels, grid=spread(labels.fractions)) for name, labels in record.also.items()}
    return replace(record, grid=spread(record.fractions), also=also)


def make_dataset(
    folder: Path,
    *,
    tiles: int = 40,
    size: int = 32,
    bands: int = 3,
    dtype: str = "uint8",
    codec: str = "jpeg",
    classes: int = 4,
    shard_records: int = 16,
    val: int = 8,
    seed: int = 0,
    also: Mapping[str, int] | None = None,
    grid: int = 0,
) -> Path:
    """A dataset of ``tiles`` training and ``val`` validation records in ``folder``, which it makes; returns it.

    also: further products, name to number of classes; their fractions are noise. grid: squares a side that have
    fractions of their own, which are noise but for their sums.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    images, fractions = make_images(tiles + val, size, bands, dtype, classes, seed)
    made = [
        _also(record, also or {}, seed + number) for number, record in enumerate(make_records(images, fractions, codec))
    ]
    made = [_by_squares(record, grid, seed + number) for number, record in enumerate(made)] if grid else made
    names = ("red", "green", "blue", *(f"band{number}" for number in range(4, bands + 1)))[:bands]
    manifest = manifests.Manifest.model_validate(
        {
            "product": "test",
            "product_title": "Test classes",
            "land_cover_years": (2020,),
            "land_cover_fingerprints": ("test",),
            "classes": _classes(classes),
            "products": {
                name: {
                    "product": name,
                    "product_title": f"Product {name}",
                    "land_cover_years": (2021,),
                    "land_cover_fingerprints": (name,),
                    "classes": _classes(count, name),
                }
                for name, count in (also or {}).items()
            },
            "bands": tuple({"name": name, "number": number + 1} for number, name in enumerate(names)),
            "tile": {"size": size, "codec": codec, "dtype": dtype} | ({"grid": grid} if grid else {}),
            "train": _split(folder, "train", made[:tiles], images[:tiles], shard_records),
            "val": _split(folder, "val", made[tiles:], images[tiles:], shard_records),
            "split_rule": "first tiles train, last tiles validate",
            "counts": {"kept": tiles + val},
            "scenes": (
                {
                    "scene_id": "test-scene",
                    "fingerprint": "test",
                    "date": "2020-06-01",
                    "stretch_limits": None,
                    "kept": tiles + val,
                },
            ),
            "config": {},
        }
    )
    # without its digest, so that tests can edit it to something that cannot be for another reason
    tree = json.loads(manifests.dump_manifest(manifest))
    del tree["digest"]
    (folder / manifests.MANIFEST).write_text(json.dumps(tree, indent=1, sort_keys=True) + "\n")
    return folder
