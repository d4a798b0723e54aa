"""The throughput benchmark runs, its report has the promised form, and its own tiles are a sound dataset."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from benchmarks import bench_steps, bench_tiles, throughput
from geokr import records
from geokr.losses import kl_supervision
from pipelines.dataset import Dataset
from pipelines.reader import Reader
from pipelines.synthetic import random_batch
from tests.datasets import make_dataset

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def test_its_own_tiles_are_a_sound_dataset(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = bench_tiles.make_tiles(20)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    dataset = Dataset.open(folder)
    assert (dataset.train.records, dataset.val.records) == (19, 1)
    reader = Reader(dataset, dataset.train, threads=1, timeout_s=10)
    samples = reader.read(np.arange(19))
    assert len({image.tobytes() for image in samples.images}) == 19
    reader.close()
    assert bench_tiles.make_tiles(20) == folder  # kept
    (folder / records.MANIFEST).unlink()
    bench_tiles.make_tiles(20)  # made anew, the same
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_tuned_eager_step_learns(precision):
    batch = random_batch(count=8, bands=3, image_size=32, classes=5, device=CPU, seed=0, uint8=True)
    models, make = [], timm.create_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "create_model", lambda *args, **more: models.append(make(*args, **more)) or models[-1])
        step = bench_steps.tuned_eager_step("test_resnet", 3, 5, CPU, precision)
    student, teacher = models
    start = [p.detach().clone() for p in teacher.parameters()]

    def loss():
        images = (batch.images.float() - 117) / 58
        return kl_supervision(student(images), batch.fractions).item()

    before = loss()
    step(batch)
    for first, moved, target in zip(start, teacher.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(moved, first.lerp(target, 0.004))
    for _ in range(30):
        step(batch)
    assert loss() < before / 2


@pytest.mark.parametrize(("codec", "stage"), [("jpeg", "decode"), ("raw", "loader")])
def test_the_report(codec, stage, tmp_path):
    folder = make_dataset(tmp_path / "data", codec=codec)
    command = [sys.executable, "benchmarks/throughput.py", "--records", str(folder), "--stage", stage]
    command += ["--images", "256", "--repeats", "2", "--json", str(tmp_path / "report.json"), "data.threads=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    report = json.loads((tmp_path / "report.json").read_text())
    assert json.loads(done.stdout.splitlines()[-1]) == {"ratios": report["ratios"]}
    assert {"machine", "versions", "results", "ratios"} <= set(report)
    loaders = {line["loader"] for line in report["results"]}
    assert loaders & {"torch", "simplejpeg"}
    for line in report["results"]:
        assert set(line) == {"stage", "loader", "device", "img_per_s", "spread"}
        assert line["stage"] == stage
        assert line["img_per_s"] > 0


def test_ratios_are_of_what_was_measured():
    def line(stage, loader, rate):
        return {"stage": stage, "loader": loader, "img_per_s": rate}

    results = [
        line("decode", "dali external_source", 4000.0),
        line("loader", "dali", 3000.0),
        line("loader", "torch", 2000.0),
        line("step", "synthetic", 10.0),
        line("step", "synthetic, published kind", 4.0),
        line("end2end", "dali", 9.0),
    ]
    expected = {"loader/decode": 0.75, "loader dali/torch": 1.5, "step/published": 2.5, "loader/step": 300.0}
    assert throughput.ratios_of(results) == {**expected, "end2end/step": 0.9}
    assert throughput.ratios_of(results[2:3]) == {}
