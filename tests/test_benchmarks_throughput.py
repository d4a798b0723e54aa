"""The throughput benchmark runs, its report has the promised form, and its own tiles are a sound dataset."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import bench_tiles, throughput
from geokr import records
from pipelines.dataset import Dataset
from pipelines.reader import Reader
from tests.datasets import make_dataset

ROOT = Path(__file__).parents[1]


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
