"""Datasets for the comparison of recipes: packed once a seed, with other blocks held out for each."""

import argparse
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from geokr.config import ConfigError
from geokr.manifests import MANIFEST

ZION_KEYS = (
    "tile.size=64",
    "tile.step=32",
    "split.val_fraction=0.25",
    "split.block_m=7680",
    "tile.bands=[1,2,3]",
    "labels.grid=8",
)
DEMO_KEYS = ("tile.size=128", "tile.step=64", "split.val_fraction=0.25", "split.block_m=5120", "labels.grid=8")
NO_CLASS = 255


@dataclass(frozen=True, slots=True)
class Packed:
    """Records, and the pattern of the land-cover sheets below them; none where the records were given.
    digest: of the manifest."""

    name: str
    seed: int
    records: Path
    sheets: str = ""

    @property
    def digest(self) -> str:
        return hashlib.sha256((self.records / MANIFEST).read_bytes()).hexdigest()


def pack(name: str, seed: int, chosen: argparse.Namespace) -> Packed:
    """The records of a dataset for a seed; made where they are not there. Raises ConfigError where they cannot be."""
    if name == "zion":
        return _zion(seed, chosen.out, chosen.shared / "data" / "zion")
    if name == "demo":
        return _demo(seed, chosen.out)
    folder = Path(name)
    if not (folder / MANIFEST).exists():
        raise ConfigError(f"--data {name}: expected zion, demo, or a folder of records")
    return Packed(folder.absolute().name, seed, folder.absolute())


def _zion(seed: int, out: Path, zion: Path) -> Packed:
    scene, sheet = zion / "derived_zion_landsat8_RGBN_uint16.tif", zion / "nlcd2011.tif"
    if not scene.exists():
        raise ConfigError(f"--shared: there is no {scene}; leave zion out of --data")
    records = out / "zion" / f"seed{seed}" / "records"
    _pack(str(scene), str(sheet), "nlcd", records, [*ZION_KEYS, f"seed={seed}"])
    return Packed("zion", seed, records, str(sheet))


def _demo(seed: int, out: Path) -> Packed:
    from preprocess import make_demo

    demo, records = out / "demo" / "landscape", out / "demo" / f"seed{seed}" / "records"
    if make_demo.main(["--out", str(demo)]):
        raise ConfigError(f"{demo}: the demo could not be made")
    config = str(Path(__file__).parents[1] / "configs" / "pack_globeland30.yaml")
    keys = ["--config", config, *DEMO_KEYS, "tile.bands=[red,green,blue]", f"seed={seed}"]
    sheets = str(demo / "landcover" / "*.tif")
    _pack(str(demo / "scenes" / "*.tif"), sheets, "globeland30", records, keys)
    return Packed("demo", seed, records, sheets)


def _pack(scenes: str, sheets: str, product: str, out: Path, keys: list[str]) -> None:
    from preprocess import pack_records

    out.parent.mkdir(parents=True, exist_ok=True)
    words = ["--scenes", scenes, "--land-cover", sheets, "--product", product, "--out", str(out)]
    if pack_records.main([*words, *keys]):
        raise ConfigError(f"{out}: could not be packed")


def segment_pairs(packed: Packed) -> Path:
    """Tiles with the class of every pixel, for geokr.evaluate --task segment: train, val and test as images and masks.

    Held-out tiles are the test. Classes that train or test has not count nowhere. Raises ConfigError for records whose
    land cover is not known.
    """
    from geokr import tile_codecs
    from geokr.manifests import load_manifest
    from geokr.records import decode_record
    from preprocess import covers, gdal_files, labels
    from preprocess.grid import Grid
    from preprocess.options import PackOptions
    from preprocess.place import AffinePlace
    from preprocess.shards import read_frames

    if not packed.sheets:
        raise ConfigError(f"{packed.records}: --segment needs the land cover, which records do not hold")
    folder = packed.records.parent / "pairs"
    if (folder / "classes.yaml").exists():
        return folder
    manifest = load_manifest(packed.records)
    options = PackOptions.model_validate({"labels": manifest.config["labels"] | {"also": {}}})
    (cover,) = covers.read_covers([packed.sheets], manifest.config["product"], {}, options)
    masks, found = {}, {"train": set[int](), "val": set[int](), "test": set[int]()}
    for split, shards in (("train", manifest.train.shards), ("test", manifest.val.shards)):
        for n, (_, payload) in enumerate(pair for shard in shards for pair in read_frames(packed.records / shard.name)):
            record = decode_record(payload)
            image = tile_codecs.decode(np.frombuffer(record.image, np.uint8), record.codec, record.shape, record.dtype)
            place = AffinePlace(Grid(image.shape[1], image.shape[0], record.transform), record.crs)
            with gdal_files.environment():
                mask = labels.label_grid(place, cover.sheets, cover.legend)
            part = "val" if split == "train" and n % 5 == 0 else split
            _write(folder / part / "images" / f"{split}-{n:05}.png", image)
            masks[folder / part / "masks" / f"{split}-{n:05}.png"] = mask
            found[part] |= set(np.unique(mask).tolist())
    known = found["train"] & found["test"] & set(range(len(manifest.classes)))
    for path, mask in masks.items():
        _write(path, np.where(np.isin(mask, sorted(known)), mask, NO_CLASS).astype(np.uint8))
    names = [f"{number}: {entry.name}" for number, entry in enumerate(manifest.classes) if number in known]
    (folder / "classes.yaml").write_text("\n".join(names) + "\n")
    return folder


def _write(path: Path, pixels: np.ndarray) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
