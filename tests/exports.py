"""A short run and the backbone that it exports, for tests of what becomes of weights."""

import json
import shutil
from pathlib import Path

from geokr import export, pretrain
from tests.datasets import make_dataset
from tests.test_geokr_pretrain import keys


def short_run(folder: Path, tiles: int = 24, val: int = 8) -> tuple[Path, Path]:
    """(records, the folder of a run of two steps on them) in ``folder``."""
    records = make_dataset(folder / "d", tiles=tiles, val=val)
    assert pretrain.main(keys(records, folder / "run", "train.max_steps=2")) == 0
    return records, folder / "run"


def short_export(folder: Path, tiles: int = 24, val: int = 8) -> tuple[Path, Path]:
    """(records, the weights of a run of two steps on them)."""
    records, run = short_run(folder, tiles, val)
    export.export(run, folder / "b.safetensors")
    return records, folder / "b.safetensors"


def other_range(weights: Path, folder: Path) -> Path:
    """The same weights in ``folder``, with a card that says they were trained on darker images of more contrast."""
    for ending in ("", ".json"):
        shutil.copy(f"{weights}{ending}", folder / f"other.safetensors{ending}")
    path = folder / "other.safetensors.json"
    about = json.loads(path.read_text())
    about["input"] |= {"mean": [40.0, 60.0, 20.0], "std": [200.0, 150.0, 300.0]}
    path.write_text(json.dumps(about))
    return folder / "other.safetensors"
