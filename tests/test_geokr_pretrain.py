"""The commands, from records to exported weights: what they write, how they resume, what they refuse."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch

import geokr
from geokr import export, pretrain
from geokr.checkpoint import list_checkpoints, load_latest
from geokr.config import load
from geokr.metrics import read_metrics
from geokr.options import PretrainOptions
from tests.datasets import make_dataset
from tests.test_geokr_distributed import torchrun

ROOT = Path(__file__).parents[1]
BASE = (
    "model.backbone=test_resnet", "data.global_batch=8", "data.loader=torch", "data.threads=1", "train.threads=1",
    "train.max_steps=12", "train.precision=fp32", "train.compile=off", "train.device=cpu", "log.every_steps=4",
    "log.tensorboard=false", "log.panels=0", "validation.every_steps=6", "checkpoint.every_steps=5",
)  # fmt: skip


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("records") / "d", tiles=40, val=9)


def keys(records, folder, *overrides) -> list[str]:
    """The arguments of a run; later values of a key replace earlier ones."""
    given = (f"data.records={records}", f"run.dir={folder}", *BASE, *overrides)
    return list({item.split("=")[0]: item for item in given}.values())


def run(records, folder, *overrides):
    return pretrain.main(keys(records, folder, *overrides))


@pytest.fixture(scope="module")
def whole(records, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "whole"
    assert run(records, folder, "log.tensorboard=true", "log.panels=3") == 0
    return folder


def same_tensors(a: Path, b: Path) -> bool:
    a, b = (load_latest(folder / "checkpoints") for folder in (a, b))
    return a.step == b.step and all(torch.equal(a.tensors[k], b.tensors[k]) for k in a.tensors | b.tensors)


def test_a_run_leaves_what_it_promises(whole):
    lines = read_metrics(whole / "metrics.jsonl")
    base = {"step", "samples", "loss", "loss/supervision", "loss/consistency", "lr"}
    base |= {"img_per_s", "data_wait", "save_s"}
    figures = {"val/kl", "val/kl_student", "val/kl_prior", "val/mae", "val/mae_student", "val/top1", "val/top1_student"}
    assert [line["step"] for line in lines] == [4, 6, 8, 12]
    assert set(lines[0]) == base
    assert set(lines[-1]) == set(lines[1]) == base | figures
    assert lines[-1]["samples"] == 96
    assert [line["save_s"] > 0 for line in lines] == [False, True, False, True], "on the line after a checkpoint"
    assert lines[-1]["loss/supervision"] < lines[0]["loss/supervision"]
    assert [path.name for path in list_checkpoints(whole / "checkpoints")] == ["step-00000012", "step-00000010"]
    assert load(PretrainOptions, whole / "config.yaml").train.max_steps == 12
    assert len(list((whole / "panels").glob("*.png"))) == 2


def test_tensorboard_holds_scalars_and_pictures(whole):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = events.EventAccumulator(str(whole / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    board.Reload()
    assert [event.step for event in board.Scalars("val/kl")] == [6, 12]
    assert [event.step for event in board.Scalars("loss")] == [4, 6, 8, 12]
    assert [event.step for event in board.Images("panels")] == [6, 12]


def test_a_finished_run_is_left_as_it_is(records, whole):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}
    assert run(records, whole) == 0
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()} == before


def test_a_run_that_gets_more_steps_goes_on(records, tmp_path):
    assert run(records, tmp_path, "train.max_steps=3") == 0
    assert run(records, tmp_path, "train.max_steps=5", "train.accumulate=2", "log.every_steps=1") == 0
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [3, 4, 5]


def started(records, folder, *overrides):
    command = [sys.executable, "-m", "geokr.pretrain", *keys(records, folder, *overrides)]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)


def wait_for_checkpoint(folder, step, process):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read().decode()
        found = [int(path.name[5:]) for path in list_checkpoints(folder / "checkpoints")]
        if found and max(found) >= step:
            return
        time.sleep(0.002)
    raise AssertionError("no checkpoint in time")


def test_terminated_it_saves_and_says_so_and_goes_on(records, tmp_path):
    """A preemption in the middle of a run of far more steps than it can do meanwhile."""
    long = (
        "train.max_steps=100000",
        "validation.every_steps=100000",
        "optim.schedule=constant",
        "optim.warmup=0",
        "method.consistency_ramp=0",
    )
    process = started(records, tmp_path / "stopped", *long)
    wait_for_checkpoint(tmp_path / "stopped", 5, process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors.decode()
    assert b"the same command goes on from it" in errors
    done = load_latest(tmp_path / "stopped" / "checkpoints").step
    more = (*long, f"train.max_steps={done + 3}", f"validation.every_steps={done + 3}")
    for folder in ("stopped", "straight"):
        assert run(records, tmp_path / folder, *more) == 0
    assert same_tensors(tmp_path / "stopped", tmp_path / "straight")


@pytest.mark.parametrize("before", [True, False], ids=["before the validation", "within it"])
def test_a_stop_at_a_validation_costs_neither_the_checkpoint_nor_the_figures(records, tmp_path, monkeypatch, before):
    real, calls = pretrain.validate, []

    def validate(batches, *rest):
        calls.append(len(calls))
        if len(calls) > 1:
            return real(batches, *rest)
        *models, stopped = rest
        if before:
            os.kill(os.getpid(), signal.SIGTERM)
        said = iter([False])
        return real(
            batches, *models, lambda: next(said, True) and bool(os.kill(os.getpid(), signal.SIGTERM) or stopped())
        )

    monkeypatch.setattr(pretrain, "validate", validate)
    words = ["train.max_steps=4", "validation.every_steps=2", "checkpoint.every_steps=4", "validation.batch=2"]
    assert run(records, tmp_path, *words) == 128 + signal.SIGTERM
    stopped_at = load_latest(tmp_path / "checkpoints").step
    assert stopped_at == 2
    assert not [line for line in read_metrics(tmp_path / "metrics.jsonl") if "val/kl" in line]
    assert run(records, tmp_path, *words) == 0
    seen = [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl") if "val/kl" in line]
    assert seen == [2, 4]
    assert load_latest(tmp_path / "checkpoints").meta["validated"] == 4


def stop_at_validation(monkeypatch, number):
    """A signal comes in a run's validation of this number, counted from 1 over all starts; returns their count."""
    real, calls = pretrain.validate, []

    def validate(*arguments):
        calls.append(len(calls))
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(pretrain, "validate", validate)
    return calls


def validated_steps(folder) -> list[int]:
    lines = read_metrics(folder / "metrics.jsonl")
    assert len({line["step"] for line in lines}) == len(lines), "no step twice"
    return [line["step"] for line in lines if "val/kl" in line]


def test_a_stop_at_the_last_validation_leaves_it_to_the_next_start(records, whole, tmp_path, monkeypatch):
    calls = stop_at_validation(monkeypatch, 2)
    assert run(records, tmp_path) == 128 + signal.SIGTERM
    found = load_latest(tmp_path / "checkpoints")
    assert (found.step, found.meta["validated"]) == (12, 6)
    assert validated_steps(tmp_path) == [6]
    stop_at_validation(monkeypatch, 1)
    assert run(records, tmp_path) == 128 + signal.SIGTERM, "another stop in the same validation"
    assert validated_steps(tmp_path) == [6]
    assert run(records, tmp_path) == 0
    assert validated_steps(tmp_path) == [6, 12]
    mine, undisturbed = (load_latest(folder / "checkpoints").meta for folder in (tmp_path, whole))
    assert (mine["validated"], mine["validation"]) == (12, undisturbed["validation"])
    assert set(read_metrics(whole / "metrics.jsonl")[-1]) == set(read_metrics(tmp_path / "metrics.jsonl")[-1])
    assert same_tensors(tmp_path, whole)
    assert len(calls) == 4
    assert run(records, tmp_path) == 0
    assert len(calls) == 4, "finished: nothing is left to do"


def test_a_run_shortened_to_where_it_was_stopped_is_validated(records, tmp_path, monkeypatch):
    stop_at_validation(monkeypatch, 1)
    assert run(records, tmp_path) == 128 + signal.SIGTERM
    assert run(records, tmp_path, "train.max_steps=6") == 0
    assert load_latest(tmp_path / "checkpoints").meta["validated"] == 6
    assert validated_steps(tmp_path) == [6]


def test_a_validation_made_up_for_is_not_repeated_by_a_start_that_ends_early(records, tmp_path, monkeypatch):
    calls = stop_at_validation(monkeypatch, 1)
    words = ["train.max_steps=9", "checkpoint.every_steps=9"]
    assert run(records, tmp_path, *words) == 128 + signal.SIGTERM
    with monkeypatch.context() as context:
        context.setattr(pretrain, "fit", lambda *arguments: os.stat("/nowhere"))
        assert run(records, tmp_path, *words) == 1
        assert run(records, tmp_path, *words) == 1
    assert len(calls) == 2
    assert run(records, tmp_path, *words) == 0
    assert len(calls) == 3
    assert validated_steps(tmp_path) == [6, 9]


def test_two_processes_train_as_one(records, whole, tmp_path):
    """The same keys under torchrun: the same batches, a loss curve equal within rounding, replicas equal in bits
    (which every checkpoint checks)."""
    done = torchrun(2, "-m", "geokr.pretrain", *keys(records, tmp_path))
    assert done.returncode == 0, done.stderr
    assert "2 process(es) on cpu" in done.stderr
    assert "batch norm over all processes" in done.stderr
    one, two = read_metrics(whole / "metrics.jsonl"), read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for a, b in zip(one, two, strict=True):
        for key in set(a) - {"img_per_s", "data_wait", "save_s"}:
            assert a[key] == pytest.approx(b[key], rel=2e-3, abs=1e-4), (a["step"], key)
    assert run(records, tmp_path, "train.max_steps=14") == 0, "goes on with another number of processes"


REFUSED = {
    "model.bands=[red,ultra]": "no band 'ultra'.*it has red, green, blue",
    "data.image_size=64": "larger than the dataset's tiles of 32 px",
    "data.global_batch=9 train.accumulate=2": "9 cannot be cut.*use 8 or 10",
    "data.records=null": "data.records is not set.*pack_records.py",
    "data.records=/nowhere": "/nowhere.*not a dataset.*pack_records.py",
    "data.records=tests": "tests: not a dataset",
    "model.backbone=resnet5o": "did you mean 'resnet50'",
    "model.init=nothing.safetensors": "no such weights file",
    "run.dir=/proc/run": "cannot be written",
    "optim.implementation=apex": "NVIDIA's apex",
    "method.teacher_buffers=false": "method.teacher_mode=train",
    "checkpoint.resume=must": "has no checkpoint",
    "train.max_step=3": "did you mean 'train.max_steps'",
    "optim.lr=1e-3x": "optim.lr",
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_what_cannot_be_is_explained_and_nothing_is_written(records, tmp_path, capsys, overrides):
    assert run(records, tmp_path / "r", *overrides.split()) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert "Traceback" not in message
    assert re.search(REFUSED[overrides], message), message
    assert not list(tmp_path.rglob("checkpoints"))


@pytest.mark.parametrize("last", [True, False], ids=["NHWC", "NCHW"])
@pytest.mark.parametrize("changed", ["augment.crop_probability=0", "augment.progressive=true"])
def test_convolutions_see_the_memory_format_that_was_asked_for(records, tmp_path, monkeypatch, last, changed):
    seen = []

    def watch(conv, inputs):
        image_NCHW = inputs[0]
        one = len(image_NCHW) == 1  # by which the number of features is found before there is a layout
        if not one and image_NCHW.shape[1] > 1 and image_NCHW.shape[2] > 1:  # else both formats are the same
            seen.append(image_NCHW.is_contiguous(memory_format=torch.channels_last))

    with torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, inputs: watch(module, inputs) if isinstance(module, torch.nn.Conv2d) else None
    ):
        assert run(records, tmp_path, "train.max_steps=2", "log.panels=2", changed, f"train.channels_last={last}") == 0
    assert len(seen) > 20
    assert set(seen) == {last}


def test_a_missing_gpu_is_explained(records, tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert run(records, tmp_path, "train.device=cuda") == 1
    assert "train.device=auto" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("method.supervision=published",), "method.supervision: 'kl' -> 'published'"),
        (("model.backbone=test_vit",), "model.backbone: 'test_resnet' -> 'test_vit'"),
        (("data.global_batch=16",), "data.global_batch: 8 -> 16"),
        (("run.seed=1",), "run.seed: 0 -> 1"),
        (("train.max_steps=11",), "has done 12 steps, the configuration asks for 11"),
        (("checkpoint.resume=never",), "checkpoint.resume=never"),
    ],
)
def test_a_folder_of_another_run_is_refused_and_kept(records, whole, capsys, overrides, message):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}
    assert run(records, whole, *overrides) == 1
    assert message in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()} == before


def test_a_run_on_synthetic_images_says_so_and_stays_one(records, tmp_path, capsys):
    assert run(records, tmp_path, "data.loader=synthetic", "train.max_steps=2") == 0
    said = capsys.readouterr().err
    assert said.count("data.loader=synthetic trains on one random batch") == 2
    assert "geokr.export" not in said
    assert run(records, tmp_path, "train.max_steps=4") == 1
    assert "data.loader: 'synthetic' -> None" in capsys.readouterr().err
    assert run(records, tmp_path, "data.loader=synthetic", "train.max_steps=3") == 0


def test_what_is_advised_against_a_loss_that_is_no_number_can_be_done(records, tmp_path, capsys):
    wild = ("optim.name=sgd", "optim.lr=3e3", "optim.warmup=0.9", "checkpoint.every_steps=2", "log.every_steps=1")
    assert run(records, tmp_path / "a", *wild) == 1
    message = capsys.readouterr().err
    assert "not a finite number" in message
    for advice in ("train.precision=bf16 or fp32 can be tried in this run", "another run: give it a new run.dir"):
        assert advice in message
    assert run(records, tmp_path / "a", *wild, "train.precision=bf16") in (0, 1)
    assert "belongs to a run with another" not in capsys.readouterr().err
    for milder in ("optim.lr=1e-3", "train.clip_norm=1"):
        assert run(records, tmp_path / "a", *wild, milder) == 1
        assert "belongs to a run with another" in capsys.readouterr().err
    assert run(records, tmp_path / "b", *wild, "optim.lr=1e-3", "train.max_steps=2") == 0


@pytest.mark.parametrize(("chosen", "warned"), [("lamb", True), ("adamw", False)])
def test_lamb_without_decay_is_said_to_be_adam(records, tmp_path, capsys, chosen, warned):
    keys = (f"optim.name={chosen}", "optim.weight_decay=0", "train.max_steps=1")
    assert run(records, tmp_path, *keys) == 0
    assert capsys.readouterr().err.count("optim.weight_decay=0 is Adam") == warned


def test_other_records_are_refused(whole, tmp_path, capsys):
    other = make_dataset(tmp_path / "other", tiles=40, val=9, seed=1)
    assert run(other, whole) == 1
    assert "data.dataset" in capsys.readouterr().err


def test_two_runs_do_not_share_a_folder(records, tmp_path, capsys):
    import fcntl

    (tmp_path / ".lock").touch()
    with (tmp_path / ".lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert run(records, tmp_path) == 1
    assert "another run is writing it" in capsys.readouterr().err


def test_no_sound_checkpoint_stops_the_run(records, tmp_path, capsys):
    assert run(records, tmp_path, "train.max_steps=2") == 0
    for path in list_checkpoints(tmp_path / "checkpoints"):
        (path / "state.json").write_text("{}")
    assert run(records, tmp_path, "train.max_steps=4") == 1
    assert "no sound checkpoint" in capsys.readouterr().err


def test_one_class_is_nothing_to_learn(tmp_path, capsys):
    records = make_dataset(tmp_path / "d", tiles=20, val=4, classes=1)
    assert run(records, tmp_path / "r") == 1
    message = capsys.readouterr().err
    assert re.search(r"one class only \(class0\).*labels.merge or labels.drop.*pack again", message), message
    assert not (tmp_path / "r").exists()


def test_more_bands_of_more_bits_train_and_without_held_out_blocks_too(tmp_path):
    records = make_dataset(tmp_path / "d", tiles=24, val=0, bands=4, dtype="uint16", codec="raw")
    assert run(records, tmp_path / "r", "train.max_steps=3", "log.panels=2", "data.image_size=16") == 0
    card = json.loads(export.export(tmp_path / "r", tmp_path / "b.safetensors").read_text())
    assert [band["name"] for band in card["bands"]] == ["red", "green", "blue", "band4"]
    assert card["input"]["dtype"] == "uint16"
    assert card["input"]["mean"][0] > 1000
    assert geokr.load_backbone(tmp_path / "b.safetensors")(torch.zeros(1, 4, 16, 16)).shape[0] == 1


def test_chosen_bands_in_a_chosen_order(tmp_path):
    records = make_dataset(tmp_path / "d", tiles=24, bands=4, dtype="uint16", codec="raw")
    assert run(records, tmp_path / "r", "train.max_steps=2", "model.bands=[band4,red]") == 0
    card = json.loads(export.export(tmp_path / "r", tmp_path / "b.pth").read_text())
    manifest = json.loads((records / "manifest.json").read_text())
    assert card["input"]["mean"] == [manifest["train"]["mean"][3], manifest["train"]["mean"][0]]


# --------------------------------------------------------------------------------------------- export


@pytest.mark.parametrize("name", ["b.safetensors", "b.pth"])
@pytest.mark.parametrize("model", ["teacher", "student"])
def test_exported_weights_give_the_runs_own_features(whole, tmp_path, name, model):
    assert export.main(["--run", str(whole), "--out", str(tmp_path / name), "--model", model]) == 0
    backbone = geokr.load_backbone(tmp_path / name)
    assert not backbone.training
    tensors = load_latest(whole / "checkpoints").tensors
    fresh = timm.create_model("test_resnet", num_classes=0).eval()
    prefix = f"{model}/backbone."
    fresh.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(backbone(images), fresh(images))
    card = backbone.card
    assert card["model"] == model
    assert card["trained"] == {"step": 12, "samples": 96}
    last = read_metrics(whole / "metrics.jsonl")[-1]
    assert card["metrics"]["val/kl"] == last["val/kl" if model == "teacher" else "val/kl_student"]
    assert card["metrics"]["val/top1"] == last["val/top1" if model == "teacher" else "val/top1_student"]
    assert not [name for name in card["metrics"] if name.endswith("_student")]
    assert [entry["name"] for entry in card["classes"]] == ["class0", "class1", "class2", "class3"]
    assert card["versions"]["torch"] == torch.__version__
    assert str(whole) not in json.dumps(card), "no paths of the machine"
    assert timm.create_model(card["backbone"]["name"], **card["backbone"]["timm_arguments"]).load_state_dict(
        safetensors.torch.load_file(tmp_path / name) if name.endswith("safetensors") else torch.load(tmp_path / name)
    )


def test_exported_weights_start_another_run(records, whole, tmp_path):
    out = tmp_path / "b.safetensors"
    export.export(whole, out)
    assert run(records, tmp_path / "r", f"model.init={out}", "train.max_steps=1", "optim.lr=1e-12") == 0
    started = load_latest(tmp_path / "r" / "checkpoints").tensors
    weights = safetensors.torch.load_file(out)
    np.testing.assert_allclose(started["student/backbone.conv1.0.weight"], weights["conv1.0.weight"], atol=1e-6)


def test_export_explains_what_it_cannot_do(whole, tmp_path, capsys, monkeypatch):
    cases = [
        (["--run", str(tmp_path), "--out", "x.safetensors"], "not a run's folder"),
        (["--run", str(whole), "--out", "x.bin"], "expected a name ending in"),
        (["--run", str(whole), "--out", "/proc/x.safetensors"], "cannot be written"),
    ]
    monkeypatch.setattr(export.export_formats, "ONNX_MODULES", ("onnx_that_is_not_there",))
    cases.append((["--run", str(whole), "--out", str(tmp_path / "x.onnx")], "pip install -e '.[onnx]'"))
    for arguments, message in cases:
        assert export.main(arguments) == 1
        assert message in capsys.readouterr().err
    (tmp_path / "lonely.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="expected the card"):
        geokr.load_backbone(tmp_path / "lonely.safetensors")
