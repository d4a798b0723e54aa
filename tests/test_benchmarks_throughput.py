"""The throughput benchmark runs, its report has the promised form, and its own tiles are a sound dataset."""

import gzip
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest
import timm
import torch
from torch.autograd import DeviceType

from benchmarks import (
    bench_batch,
    bench_cases,
    bench_data,
    bench_peers,
    bench_profile,
    bench_steps,
    bench_tiles,
    throughput,
)
from benchmarks.bench_batch import Try
from benchmarks.bench_cases import Setting
from geokr import manifests
from geokr.config import load
from geokr.losses import kl_supervision
from geokr.options import PretrainOptions, TrainOptions
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
    (folder / manifests.MANIFEST).unlink()
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
        return kl_supervision(student(images), batch.fractions, batch.weights).item()

    before = loss()
    step(batch)
    for first, moved, target in zip(start, teacher.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(moved, first.lerp(target, 0.004))
    for _ in range(30):
        step(batch)
    assert loss() < before / 2


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the command in this process: the report, and what it printed."""
    threads = torch.get_num_threads()

    def run(*arguments, codec="jpeg"):
        folder = make_dataset(tmp_path / "data", codec=codec)
        command = ["throughput.py", "--records", str(folder), "--json", str(tmp_path / "report.json")]
        command += ["--images", "256", "--repeats", "2", "data.threads=1", *arguments]
        monkeypatch.setattr(sys, "argv", command)
        throughput.main()
        out = capsys.readouterr().out
        report = json.loads((tmp_path / "report.json").read_text())
        assert json.loads(out.splitlines()[-1]) == {"ratios": report["ratios"]}
        assert {"machine", "versions", "results", "ratios"} <= set(report)
        return report, out

    yield run
    torch.set_num_threads(threads)


def test_it_runs_as_a_file(tmp_path):
    folder = make_dataset(tmp_path / "data")
    command = [sys.executable, "benchmarks/throughput.py", "--records", str(folder), "--stage", "read"]
    command += ["--images", "256", "--repeats", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=True)
    assert "geokr" in done.stdout
    assert set(json.loads(done.stdout.splitlines()[-1])) == {"ratios"}


TINY_STEP = ("--steps", "1", "model.backbone=test_resnet", "data.global_batch=4", "data.image_size=32")


@pytest.mark.parametrize(("codec", "stage"), [("jpeg", "decode"), ("jpeg", "loader"), ("raw", "loader")])
def test_the_report(codec, stage, run, tmp_path):
    picture = tmp_path / "pictures" / "rates.png"
    report, _ = run("--stage", stage, "--picture", str(picture), codec=codec)
    loaders = {line["loader"] for line in report["results"]}
    assert loaders & {"torch", "simplejpeg"}
    assert ("dali tfrecord, no checksums" in loaders) == (codec == "jpeg" and bench_data.has_dali())
    for line in report["results"]:
        assert set(line) == {"stage", "loader", "device", "img_per_s", "spread", "cpu_ms_per_img", "options"}
        assert line["stage"] == stage
        assert line["img_per_s"] > 0
        assert line["cpu_ms_per_img"] >= 0
    height, width, _ = matplotlib.image.imread(picture).shape
    assert height > 100
    assert width > 500


def test_steps_with_other_options_in_the_same_run(run):
    variant = "train.precision=fp32 method.teacher_mode=train"
    report, out = run("--stage", "step", f"--variant={variant}", *TINY_STEP, "train.precision=bf16")
    own, other, published = report["results"]
    assert "train.precision=bf16" in own["options"]
    assert other["options"].endswith(variant)
    assert "train.precision=bf16" not in other["options"]
    assert published["loader"] == "synthetic, published kind"
    assert set(report["ratios"]) == {"step/published", f"step {other['options']}/step"}
    assert out.count("geokr's step") == 2


def make_setting(tmp_path, *overrides):
    options = load(PretrainOptions, None, ["train.max_steps=1", *TINY_STEP[2:], *overrides])
    return Setting(Dataset.open(make_dataset(tmp_path / "data")), options, CPU, 8, 1, 2)


def test_a_try_is_held_to_its_memory(tmp_path):
    setting = make_setting(tmp_path)
    small = bench_batch.run_steps(setting, 4)
    assert (small.failure, len(small.rates)) == ("", 2)
    assert 0.05e9 < small.peak_bytes < 3 * 2**30
    large = bench_batch.try_in_process(setting, 200_000, 3 * 2**30)  # images alone take 2.4 GB as float32
    assert large.failure
    assert large.short_of_memory


def test_the_report_of_the_largest_batch(tmp_path, monkeypatch, capsys):
    def fake(setting, batch, limit_bytes):
        assert limit_bytes == 2_000_000_000
        too_large = Try(batch, "out of memory", short_of_memory=True)
        return Try(batch, rates=(90.0, 100.0, 104.0), peak_bytes=10**9, chosen="so") if batch <= 11 else too_large

    monkeypatch.setattr(bench_batch, "try_in_process", fake)
    results, found = throughput.run_find_batch(make_setting(tmp_path), 2.0, "train.compile=off")
    assert found == {"batch": 11, "peak_gb": 1.0, "chosen": "so"}
    (line,) = results
    assert (line["img_per_s"], line["spread"]) == (100.0, 0.14)
    assert line["options"] == "train.compile=off data.global_batch=11"
    assert "batch 16: out of memory" in capsys.readouterr().out


def test_the_profile(run, tmp_path):
    report, out = run("--stage", "profile", "--trace", str(tmp_path / "trace"), *TINY_STEP, "train.precision=fp32")
    found = report["profile"]
    with gzip.open(found["trace"], "rt") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {line["operation"] for line in found["costliest"]} <= names
    shares = [line["share"] for line in found["costliest"]]
    assert len(shares) == 10
    assert shares == sorted(shares, reverse=True)
    assert 0.3 < sum(shares) <= 1
    assert any("convolution" in line["operation"] for line in found["costliest"])
    assert all(line["operation"] in out for line in found["costliest"])


def test_kernels_count_on_a_gpu_and_operations_on_a_cpu():
    def event(device_type, marked=False):
        return SimpleNamespace(
            device_type=device_type,
            is_user_annotation=marked,
            self_device_time_total=3000.0,
            self_cpu_time_total=2000.0,
        )

    kernel, operation = event(DeviceType.CUDA), event(DeviceType.CPU)
    assert bench_profile.counts(kernel, True)
    assert bench_profile.own_ms(kernel, True) == 3
    assert bench_profile.counts(operation, False)
    assert bench_profile.own_ms(operation, False) == 2
    assert not bench_profile.counts(operation, True)
    assert not bench_profile.counts(kernel, False)
    assert not bench_profile.counts(event(DeviceType.CUDA, marked=True), True)


@pytest.mark.parametrize("limit", [2, 3, 16, 17, 100, 1000, 1023])
@pytest.mark.parametrize("start", [2, 16, 256, 5000])
def test_the_search_ends_at_the_largest_batch(limit, start):
    tried = []

    def attempt(batch):
        tried.append(batch)
        return Try(batch) if batch <= limit else Try(batch, "out of memory", short_of_memory=True)

    found = bench_batch.largest(attempt, start).batch
    assert found <= limit <= found + max(1, found * bench_batch.RESOLUTION)
    assert len(tried) == len(set(tried)) < 20


def test_the_search_says_what_stops_it():
    with pytest.raises(RuntimeError, match="a step with 16 images does not run: odd"):
        bench_batch.largest(lambda batch: Try(batch, "odd"), 16)
    with pytest.raises(RuntimeError, match="a step with 2 images does not run: out of memory"):
        bench_batch.largest(lambda batch: Try(batch, "out of memory", short_of_memory=True), 16)


def test_ratios_are_of_what_was_measured():
    def line(stage, loader, rate, options=""):
        return {"stage": stage, "loader": loader, "img_per_s": rate, "options": options}

    results = [
        line("decode", "dali external_source", 4000.0),
        line("loader", "dali", 3000.0),
        line("loader", "torch", 2000.0),
        line("loader", "dali tfrecord, no checksums", 1500.0),
        line("loader", "raw records", 9000.0),
        line("peers", "published", 400.0),
        line("step", "synthetic", 10.0),
        line("step", "synthetic", 15.0, "train.compile=on"),
        line("step", "synthetic, published kind", 4.0),
        line("end2end", "dali", 9.0),
    ]
    expected = {"loader/decode": 0.75, "loader dali/torch": 1.5, "step/published": 2.5, "loader/step": 300.0}
    expected |= {"loader dali/tfrecord": 2.0, "loader raw/jpeg": 3.0, "loader/published": 7.5}
    expected |= {"end2end/step": 0.9, "step train.compile=on/step": 1.5}
    assert throughput.ratios_of(results) == expected
    assert throughput.ratios_of(results[2:3]) == {}


def make_place(tmp_path, count=24):
    dataset = Dataset.open(make_dataset(tmp_path / "data"))
    options = PretrainOptions(train=TrainOptions(max_steps=1))
    setting = Setting(dataset, options, CPU, count, 1, 1)
    place = bench_peers.Place(tmp_path / "peers", count, 1, 8, options.augment)
    place.folder.mkdir()
    bench_peers.copy_jpegs(setting, place)
    return place


@pytest.mark.parametrize(("name", "package", "make"), bench_peers.PEERS)
def test_peers_give_every_tile_with_its_fractions(name, package, make, tmp_path):
    if package is not None:
        pytest.importorskip(package)
    place = make_place(tmp_path)
    expected = {json.dumps(json.loads(place.file(n, "json").read_text())) for n in range(place.count)}
    batches, found = bench_peers.endless(make(place)), set()
    for _ in range(place.count // place.batch):
        images, fractions = next(batches)
        assert sorted(images.shape)[:2] == [3, 8]
        assert images.dtype == (torch.float32 if name == "published" else torch.uint8)
        assert images.float().std() > (0.01 if name == "published" else 1)
        found |= {json.dumps(row) for row in fractions.tolist()}
    assert found == expected


def test_processor_time_counts_workers(tmp_path):
    loader = torch.utils.data.DataLoader(Spinning(), None, num_workers=1, multiprocessing_context="fork")
    own, before = time.process_time(), bench_cases.cpu_seconds()
    batches = iter(loader)
    spent = next(batches)
    whole = bench_cases.cpu_seconds() - before
    assert whole - (time.process_time() - own) > 0.8 * spent  # the worker still runs
    del batches
    assert bench_cases.cpu_seconds() - before > 0.8 * spent  # it has ended


class Spinning(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, number):
        while time.process_time() < 0.4:
            pass
        return time.process_time()
