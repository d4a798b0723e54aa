"""The whole path on a real scene: Landsat 8 over Zion with NLCD 2011 below it, through the commands that users give.

The everyday test trains briefly. The campaign (`make zion`) trains the full 400 steps with three seeds and holds the
mean of ``val/kl / val/kl_prior`` to at most 0.45.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
import safetensors.torch
import timm
import torch
from rasterio.warp import transform as warp_points

import geokr
from geokr import pretrain
from geokr.export import main as export
from geokr.manifests import load_manifest
from geokr.records import decode_record
from preprocess import pack_records, shards, verify_records

ROOT = Path(__file__).resolve().parents[1]
ZION = ROOT.parent / "shared" / "data" / "zion"
SCENE, NLCD = ZION / "derived_zion_landsat8_RGBN_uint16.tif", ZION / "nlcd2011.tif"
pytestmark = pytest.mark.skipif(not SCENE.exists(), reason="the real scene is not beside this checkout")

PACK = ["tile.size=64", "tile.step=32", "split.val_fraction=0.25", "split.block_m=7680"]
TRAIN = ["--config", str(ROOT / "configs/smoke.yaml"), "model.backbone=resnet18", "data.image_size=64"]
BESIDE = ["train.threads=1", "data.threads=1"]  # another file of tests may have the other core
BATCH = "data.global_batch=64"


def pack(out: Path, seed: int, *overrides: str) -> Path:
    command = ["--scenes", str(SCENE), "--land-cover", str(NLCD), "--product", "nlcd", "--out", str(out)]
    assert pack_records.main([*command, *PACK, f"seed={seed}", *overrides]) == 0
    return out


def last_validation(run: Path) -> dict[str, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "val/kl" in line][-1]


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Path:
    return pack(tmp_path_factory.mktemp("zion") / "records", 0, "tile.bands=[1,2,3]", "workers=0")


@pytest.fixture(scope="module")
def run(records, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("zion-run") / "run"
    keys = [f"data.records={records}", f"run.dir={folder}", "run.seed=0", "train.max_steps=60", "log.panels=2"]
    # a memory of 10 steps: the teacher of so short a run would still be what it began as
    assert pretrain.main([*TRAIN, *BESIDE, "data.global_batch=32", "method.teacher_alpha=0.9", *keys]) == 0
    return folder


def every_record(folder: Path):
    manifest = load_manifest(folder)
    for shard in (*manifest.train.shards, *manifest.val.shards):
        for _, payload in shards.read_frames(folder / shard.name):
            yield decode_record(payload)


def test_every_fraction_equals_a_computation_pixel_by_pixel(records):
    """Each scene pixel's centre goes through GDAL by itself and takes the NLCD pixel it falls on."""
    manifest = load_manifest(records)
    class_of = {code: i for i, entry in enumerate(manifest.classes) for code in entry.codes}
    with rasterio.open(SCENE) as scene, rasterio.open(NLCD) as sheet:
        rows, columns = np.mgrid[: scene.height, : scene.width] + 0.5
        x, y = scene.transform * (columns.ravel(), rows.ravel())
        column, row = ~sheet.transform * tuple(np.array(v) for v in warp_points(scene.crs, sheet.crs, x, y)[:2])
        codes = sheet.read(1)
        inside = (column >= 0) & (row >= 0) & (column < sheet.width) & (row < sheet.height)
        found = np.full(len(column), sheet.nodata, np.int64)
        found[inside] = codes[row[inside].astype(int), column[inside].astype(int)]
        found = found.reshape(scene.height, scene.width)
        to_pixel = ~scene.transform
    count = 0
    for record in every_record(records):
        left, top = (round(v) for v in to_pixel * (record.transform[2], record.transform[5]))
        below = found[top : top + 64, left : left + 64].ravel()
        counted = [class_of[code] for code in below.tolist() if code in class_of]
        expected = np.bincount(counted, minlength=len(manifest.classes)) / len(counted)
        np.testing.assert_allclose(record.fractions, expected, atol=1e-6)
        assert record.valid_fraction == pytest.approx(len(counted) / 64**2, abs=1e-6)
        count += 1
    assert count == manifest.counts["kept"] > 800
    assert manifest.counts["positions"] == 1540


def test_no_ground_is_in_both_splits(records):
    manifest = load_manifest(records)
    sides = np.zeros((2, 1428, 1128), bool)
    with rasterio.open(SCENE) as scene:
        to_pixel = ~scene.transform
    for side, split in enumerate((manifest.train, manifest.val)):
        for shard in split.shards:
            for _, payload in shards.read_frames(records / shard.name):
                transform = decode_record(payload).transform
                left, top = (round(v) for v in to_pixel * (transform[2], transform[5]))
                sides[side, top : top + 64, left : left + 64] = True
    assert sides[0].any()
    assert sides[1].any()
    assert not (sides[0] & sides[1]).any()


def test_it_verifies(records, capsys):
    assert verify_records.main([str(records)]) == 0


def test_a_short_run_learns(run):
    figures = last_validation(run)
    assert figures["step"] == 60
    assert figures["val/kl_student"] < 0.7 * figures["val/kl_prior"]
    assert figures["val/kl"] < 0.75 * figures["val/kl_prior"]


def test_the_exported_backbone_is_the_runs_teacher(run, tmp_path):
    out = tmp_path / "backbone.safetensors"
    assert export(["--run", str(run), "--out", str(out)]) == 0
    state = safetensors.torch.load_file(out)
    plain = timm.create_model("resnet18", num_classes=0)
    plain.load_state_dict(state, strict=True)
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    saved = {}
    for file in newest.glob("*.safetensors"):
        saved.update(safetensors.torch.load_file(file))
    for key, value in state.items():
        assert torch.equal(saved[f"teacher/backbone.{key}"], value), key
    images = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(images), geokr.load_backbone(out)(images), rtol=0, atol=0)


def test_four_bands_as_they_are(tmp_path):
    raw = ["tile.codec=raw", "stretch.mode=none", "tile.bands=[1,2,3,4]"]
    records = pack(tmp_path / "records", 0, *raw, "workers=0")
    assert load_manifest(records).tile.dtype == "uint16"
    with rasterio.open(SCENE) as scene:
        pixels, to_pixel = scene.read(), ~scene.transform
    for number, record in enumerate(every_record(records)):
        if number % 25 == 0:
            left, top = (round(v) for v in to_pixel * (record.transform[2], record.transform[5]))
            tile = np.frombuffer(record.image, "<u2").reshape(record.shape)
            np.testing.assert_array_equal(tile, pixels[:, top : top + 64, left : left + 64].transpose(1, 2, 0))
    keys = [f"data.records={records}", f"run.dir={tmp_path / 'run'}", "train.max_steps=4", "log.panels=2"]
    assert pretrain.main([*TRAIN, *BESIDE, "data.global_batch=32", *keys]) == 0
    assert np.isfinite(last_validation(tmp_path / "run")["val/kl"])


@pytest.mark.slow
def test_three_seeds_of_the_full_length(tmp_path):
    ratios = []
    for seed in (0, 1, 2):
        records = pack(tmp_path / f"records{seed}", seed, "tile.bands=[1,2,3]")
        folder = tmp_path / f"run{seed}"
        command = [sys.executable, "-m", "geokr.pretrain", *TRAIN, BATCH, "train.max_steps=400", f"run.seed={seed}"]
        subprocess.run([*command, f"data.records={records}", f"run.dir={folder}"], check=True, cwd=ROOT)
        figures = last_validation(folder)
        ratios.append(figures["val/kl"] / figures["val/kl_prior"])
    print("val/kl / val/kl_prior:", [round(ratio, 3) for ratio in ratios])
    assert statistics.mean(ratios) <= 0.45
