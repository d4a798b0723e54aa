"""A dataset for benchmarks: seeded tiles with the texture of imagery, packed through the record contract."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import simplejpeg

from geokr import manifests, records

SIZE, CLASSES, QUALITY = 256, 10, 95
SHARD_RECORDS = 512
TILES, RAW_TILES = 2048, 1024  # raw ones take 200 kB each


def cache_folder(tiles: int, codec: str = "jpeg") -> Path:
    """Where the dataset is kept between runs."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "geokr" / f"throughput-{tiles}x{SIZE}-{'' if codec == 'jpeg' else f'{codec}-'}v1"


def is_own(folder: Path) -> bool:
    """Whether the dataset is the one that the benchmark makes when it is given none."""
    return folder == cache_folder(TILES)


def make_tiles(tiles: int, codec: str = "jpeg") -> Path:
    """The dataset's folder; made where it is not there yet. codec: ``jpeg`` or ``raw``, of the same tiles."""
    folder = cache_folder(tiles, codec)
    if (folder / manifests.MANIFEST).is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    payloads, sums, priors = [], np.zeros((2, 3)), []
    for image, fractions in _images(tiles):
        pixels = image.reshape(-1, 3).astype(np.float64)
        sums += pixels.mean(0), (pixels**2).mean(0)
        priors.append(fractions)
        payloads.append(_payload(image, fractions, len(payloads), codec))
    mean = sums[0] / tiles
    std = np.sqrt(sums[1] / tiles - mean**2)
    prior = np.stack(priors).astype(np.float64).mean(0)
    figures = {"mean": mean.tolist(), "std": std.tolist(), "prior": prior.tolist()}
    held_out = tiles // 16
    train = _write(folder, "train", payloads[held_out:])
    val = _write(folder, "val", payloads[:held_out])
    manifest = _manifest({**train, **figures}, {**val, **figures}, codec)
    (folder / manifests.MANIFEST).write_bytes(
        manifests.dump_manifest(manifest)
    )  # last: a folder without it is made anew
    return folder


def _images(tiles: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(uint8 [SIZE, SIZE, 3], fractions): noise with the spectrum of scenes; eight symmetries each."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(SIZE)[:, None], np.fft.rfftfreq(SIZE)[None, :])
    frequency[0, 0] = 1.0
    done = 0
    while done < tiles:
        spectrum = np.fft.rfft2(rng.standard_normal((SIZE, SIZE, 3)), axes=(0, 1)) / frequency[:, :, None] ** 1.2
        texture = np.fft.irfft2(spectrum, (SIZE, SIZE), axes=(0, 1))
        texture = texture.mean(2, keepdims=True) + 0.4 * texture
        values = 105 + 38 * texture / texture.std() + rng.normal(0, 2, texture.shape)
        image = np.clip(values, 0, 255).astype(np.uint8)
        for symmetry in range(min(8, tiles - done)):
            turned = np.rot90(image if symmetry < 4 else image.swapaxes(0, 1), symmetry % 4)
            yield np.ascontiguousarray(turned), rng.dirichlet(np.full(CLASSES, 0.4)).astype(np.float32)
            done += 1


def _payload(image: np.ndarray, fractions: np.ndarray, number: int, codec: str) -> bytes:
    raw = codec == "raw"
    return records.encode_record(
        records.Record(
            image=image.tobytes() if raw else simplejpeg.encode_jpeg(image, quality=QUALITY, colorsubsampling="444"),
            codec=codec,
            shape=(SIZE, SIZE, 3),
            dtype="uint8",
            fractions=fractions / fractions.sum(),
            valid_fraction=1.0,
            lonlat=(0.0, 0.0),
            transform=(10.0, 0.0, 0.0, 0.0, -10.0, 0.0),
            crs="EPSG:32631",
            scene_id="texture",
            tile_id=f"texture-{number:05d}",
        )
    )


def _write(folder: Path, split: str, payloads: list[bytes]) -> dict[str, Any]:
    shards = []
    for number, start in enumerate(range(0, len(payloads), SHARD_RECORDS)):
        frames = [records.frame(payload, google_crc32c.value) for payload in payloads[start : start + SHARD_RECORDS]]
        sizes = [len(frame) for frame in frames]
        starts = np.cumsum([0, *sizes[:-1]]).tolist()
        index = "".join(f"{at} {size}\n" for at, size in zip(starts, sizes, strict=True)).encode()
        data, path = b"".join(frames), folder / f"{split}-{number:05d}.tfrecord"
        path.write_bytes(data)
        path.with_suffix(".idx").write_bytes(index)
        hashes = hashlib.sha256(data).hexdigest(), hashlib.sha256(index).hexdigest()
        shard = {"name": path.name, "records": len(frames), "bytes": len(data)}
        shards.append({**shard, "sha256": hashes[0], "index_sha256": hashes[1]})
    return {"records": len(payloads), "shards": tuple(shards)}


def _manifest(train: dict[str, Any], val: dict[str, Any], codec: str) -> manifests.Manifest:
    return manifests.Manifest.model_validate(
        {
            "product": "texture",
            "product_title": "Benchmark textures",
            "land_cover_years": (2020,),
            "land_cover_fingerprints": ("texture",),
            "classes": tuple({"name": f"class{k}", "codes": (k + 1,), "rgb": (25 * k, 90, 90)} for k in range(CLASSES)),
            "bands": tuple({"name": name, "number": n + 1} for n, name in enumerate(("red", "green", "blue"))),
            "tile": {"size": SIZE, "codec": codec, "dtype": "uint8"},
            "train": train,
            "val": val,
            "split_rule": "first sixteenth",
            "counts": {"kept": train["records"] + val["records"]},
            "scenes": (),
            "config": {},
        }
    )
