"""The head that is told how colours were changed: what it is told, what that does, and what a run leaves behind."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from geokr import export, panels
from geokr.assemble import build_learner
from geokr.config import ConfigError
from geokr.crops import crop
from geokr.folding import FoldedTeacher
from geokr.identity import check_identity
from geokr.models import BackboneSpec, build_model
from geokr.options import AugmentOptions, DataOptions
from geokr.recorder import Recorder
from geokr.sizes import shrunk
from geokr.teacher import make_teacher
from geokr.train import train_step
from geokr.weights import load_into
from pipelines.augment import BandFacts, change_count, colour_changes, draw, identity
from pipelines.dataset import open_records
from pipelines.loaders import train_batches
from tests import geokr_toy as toy
from tests.datasets import make_dataset
from tests.test_geokr_pretrain import run, same_tensors
from tests.test_pipelines_loaders import LOADERS

TOLD = "model.condition_on_colour=true"
MEAN, STD = (110.0, 90.0, 70.0, 150.0), (40.0, 30.0, 25.0, 60.0)
RGB = BandFacts("uint8", (0, 1, 2), MEAN[:3], STD[:3])
FACTS = {
    "rgb": RGB,
    "bgr": BandFacts("uint8", (2, 1, 0), MEAN[:3], STD[:3]),
    "three of four": BandFacts("uint8", (3, 0, 1), MEAN, STD),
    "all of four": BandFacts("uint16", (0, 1, 2, 3), MEAN, STD),
    "two of four": BandFacts("float32", (2, 0), MEAN, STD),
    "far from 0": BandFacts("uint16", (1, 0), (30_000.0, 9_000.0), (500.0, 700.0)),
}


@pytest.mark.parametrize("name", FACTS)
def test_the_numbers_say_what_happens_to_normalised_bands(name):
    facts = FACTS[name]
    count = 20
    colour = draw(AugmentOptions(), facts, 5, np.zeros(count, np.int64), np.arange(count)).colour
    found = colour_changes(colour, facts)
    assert found.shape == (count, change_count(facts))
    assert found.dtype == np.float32
    pixels = np.random.default_rng(1).normal(facts.mean, facts.std, (50, len(facts.mean)))
    mean, std = facts.normalisation()
    before = (pixels[:, list(facts.bands)] - mean) / std
    bands = len(facts.bands)
    for matrix, numbers in zip(colour.astype(np.float64), found.astype(np.float64), strict=True):
        after = (pixels @ matrix[:, :-1].T + matrix[:, -1] - mean) / std
        gains, offsets = numbers[:-bands], numbers[-bands:]
        gains = gains.reshape(bands, bands) if facts.is_rgb else np.diag(gains)
        np.testing.assert_allclose(before + before @ gains.T + offsets, after, atol=5e-5)
    assert np.abs(found).max() > 0.01


@pytest.mark.parametrize("name", FACTS)
def test_zeros_where_nothing_is_changed(name):
    facts = FACTS[name]
    np.testing.assert_allclose(colour_changes(identity(3, facts).colour, facts), 0.0, atol=1e-6)


@pytest.mark.parametrize("dtype", ["uint8", "int16"])
def test_nothing_is_said_of_a_constant_band(dtype):
    facts = BandFacts(dtype, (0, 1, 2), (100.0, 255.0, 90.0), (30.0, 0.0, 20.0))
    colour = draw(AugmentOptions(), facts, 5, np.zeros(20, np.int64), np.arange(20)).colour
    found = colour_changes(colour, facts)
    gains, offsets = found[:, :-3], found[:, -3:]
    assert not offsets[:, 1].any()
    if dtype == "uint8":
        gains = gains.reshape(-1, 3, 3)
        assert not gains[:, 1].any()
        assert not gains[:, :, 1].any()
    else:
        assert not gains[:, 1].any()
    assert 0.01 < np.abs(found).max() < 10


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("kind", ["jpeg", "uint16"])
def test_loaders_give_them(tmp_path, loader, kind):
    form = {"codec": "jpeg"} if kind == "jpeg" else {"codec": "raw", "dtype": "uint16", "bands": 4}
    folder = make_dataset(tmp_path / "d", tiles=40, val=8, **form)
    options = DataOptions(records=str(folder), loader=loader, global_batch=16, threads=1)
    dataset = open_records(options)
    augmentation = AugmentOptions(colour_probability=0.7)
    with train_batches(dataset, options, augmentation, seed=3, by_colour=True) as batches:
        batch = next(batches)
    with train_batches(dataset, options, augmentation, seed=3) as batches:
        plain = next(batches)
    assert plain.colour_changes is None
    assert torch.equal(batch.images, plain.images)
    facts = dataset.band_facts()
    drawn = draw(augmentation, facts, 3, np.zeros(16, np.int64), batch.record_ids)
    np.testing.assert_array_equal(batch.colour_changes.numpy(), colour_changes(drawn.colour, facts))
    unchanged = (batch.colour_changes.abs() < 1e-6).all(1)
    assert 0 < int(unchanged.sum()) < 16


# ---------------------------------------------------------------------------------------------------- the model


def told_model(name="test_resnet", seed=0):
    return build_model(BackboneSpec(name, 3, 32), 4, seed, changes=12)


def trained_a_little(model):
    """With a condition that does something, as after some steps."""
    with torch.no_grad():
        model.condition.modulate.weight.normal_(0, 0.1)
    return model


def test_it_begins_as_a_head_that_is_told_nothing():
    images, changes = torch.randn(3, 3, 32, 32), torch.randn(3, 12)
    model, plain = told_model().eval(), build_model(BackboneSpec("test_resnet", 3, 32), 4, 0).eval()
    assert torch.equal(model(images, changes), plain(images))
    assert {k: v for k, v in model.state_dict().items() if not k.startswith("condition.")}.keys() == (
        plain.state_dict().keys()
    )
    trained_a_little(model)
    assert torch.equal(model(images), plain(images))
    assert torch.equal(model(images, torch.zeros(3, 12)), plain(images))
    assert not torch.allclose(model(images, changes), plain(images))


def test_what_it_computes():
    model = trained_a_little(told_model()).eval()
    images, changes = torch.randn(3, 3, 32, 32), torch.randn(3, 12)
    features = model.backbone(images)
    modulation = changes @ model.condition.modulate.weight.T
    half = features.shape[1]
    expected = model.head(features * (1 + modulation[:, :half]) + modulation[:, half:])
    torch.testing.assert_close(model(images, changes), expected)


def test_the_folded_teacher_is_told_too():
    teacher = trained_a_little(told_model()).eval().requires_grad_(False)
    images, changes = torch.randn(4, 3, 32, 32), torch.randn(4, 12)
    folded = FoldedTeacher(teacher, images, torch.float32)
    torch.testing.assert_close(folded(images, changes), teacher(images, changes), rtol=1e-4, atol=1e-5)
    trained_a_little(teacher)
    folded.refold()
    torch.testing.assert_close(folded(images, changes), teacher(images, changes), rtol=1e-4, atol=1e-5)


def test_a_teacher_with_a_head_of_its_own_keeps_the_condition():
    student = trained_a_little(told_model())
    teacher = make_teacher(student, toy.options("method.teacher_init=random").method, 0)
    assert torch.equal(teacher.condition.modulate.weight, student.condition.modulate.weight)


def test_crops_and_growing_images_keep_the_numbers():
    batch = toy.make_batch(np.arange(8))
    batch.squares = torch.full((8, 2, 2, toy.CLASSES), 1 / (4 * toy.CLASSES))
    assert crop(batch, 0, 1, 1).colour_changes is batch.colour_changes
    assert shrunk(batch, 16).colour_changes is batch.colour_changes


def test_a_step_trains_the_condition_and_moves_the_teachers():
    learner = toy.learner(toy.options(TOLD))
    for step in (1, 2, 3):
        train_step(learner, [toy.make_batch(np.arange(8 * step, 8 * step + 8))], step)
    own, teachers = learner.student.condition.modulate.weight.detach(), learner.teacher.condition.modulate.weight
    assert 0 < float(teachers.abs().max()) < float(own.abs().max())


def test_the_teacher_is_told_what_the_student_is():
    learner, heard = toy.learner(toy.options(TOLD)), []

    def teacher(images, changes):
        heard.append(changes)
        return learner.teacher(images, changes)

    batch = toy.make_batch(np.arange(8))
    train_step(replace(learner, teacher_forward=teacher), [batch], 1)
    assert torch.equal(heard[0], batch.colour_changes)


def test_panels_show_what_the_models_say_when_told(monkeypatch, tmp_path):
    learner, drawn, batch = toy.learner(toy.options(TOLD)), [], toy.make_batch(np.arange(8))
    for model in (learner.student, learner.teacher):
        trained_a_little(model).eval()
    monkeypatch.setattr(panels, "draw_panels", lambda found, *_: drawn.extend(found))
    monkeypatch.setattr(panels, "write_png", lambda *_: None)
    made = SimpleNamespace(band_names=("red", "green", "blue"), manifest=SimpleNamespace(classes=()))
    recorder = object.__new__(Recorder)
    recorder._count, recorder._facts, recorder._folder, recorder._board = 3, made, tmp_path, None
    recorder.panel(learner, 1, batch)
    images = learner.normalise(batch.images)
    for name in ("student", "teacher"):
        with torch.no_grad():
            expected = getattr(learner, name).eval()(images, batch.colour_changes).softmax(1)[:3].numpy()
        np.testing.assert_allclose([getattr(panel, name) for panel in drawn], expected, atol=1e-5)


@pytest.mark.parametrize("decays", ["false", "true"])
def test_lamb_moves_it_as_fast_as_adam(decays):
    """It begins at 0, where a trust ratio would hold it for a thousand steps."""
    sizes = {}
    for name in ("adamw", "lamb"):
        learner = toy.learner(toy.options(TOLD, f"optim.name={name}", f"optim.decay_norm_bias={decays}"), steps=40)
        for step in range(1, 21):
            train_step(learner, [toy.make_batch(np.arange(8 * step, 8 * step + 8) % 40)], step)
        sizes[name] = float(learner.student.condition.modulate.weight.detach().norm())
    assert sizes["lamb"] > 0.5 * sizes["adamw"] > 0


def test_a_whole_model_gives_its_backbone():
    backbone = build_model(BackboneSpec("test_resnet", 3, 32), 4, 1).backbone
    whole = trained_a_little(told_model())
    load_into(backbone, whole.state_dict(), "whole.pth")
    assert toy.bits(backbone) == toy.bits(whole.backbone)


def test_the_number_of_changes_must_be_known():
    spec = BackboneSpec("test_resnet", 3, 32)
    with pytest.raises(ValueError, match="needs the number of changes"):
        build_learner(toy.options(TOLD), spec, classes=4, mean=[1.0] * 3, std=[1.0] * 3, steps=8, world=toy.CPU)


def test_parts_of_a_batch_make_the_same_step():
    """Without batch norm's statistics over parts: a network that has none."""
    keys = (TOLD, "model.backbone=test_vit", "optim.name=sgd", "optim.warmup=0")
    whole, parts = (toy.learner(toy.options(*keys, f"train.accumulate={n}")) for n in (1, 2))
    train_step(whole, [toy.make_batch(np.arange(8))], 1)
    train_step(parts, [toy.make_batch(np.arange(n, n + 4)) for n in (0, 4)], 1)
    torch.testing.assert_close(
        whole.student.condition.modulate.weight, parts.student.condition.modulate.weight, rtol=1e-4, atol=1e-7
    )
    assert float(whole.student.condition.modulate.weight.detach().abs().max()) > 0


def hues(count, seed):
    """Plain images of two classes that only hue tells apart, their hues turned at random, and what was done to them."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    colours = np.array([[180.0, 90, 90], [60.0, 150, 150]])[labels]  # equally bright, opposite on the circle of hues
    facts = BandFacts("uint8", (0, 1, 2), (120.0, 120, 120), (60.0, 60, 60))
    turns = AugmentOptions(hue=(-0.5, 0.5), brightness=(1, 1), contrast=(1, 1), saturation=(1, 1))
    drawn = draw(turns, facts, seed, np.zeros(count, np.int64), np.arange(count)).colour
    seen = np.einsum("nij,nj->ni", drawn[:, :, :3], colours) + drawn[:, :, 3]
    images = torch.from_numpy((seen - 120) / 60).float()[:, :, None, None].expand(-1, -1, 32, 32)
    return images, torch.from_numpy(labels), torch.from_numpy(colour_changes(drawn, facts))


@pytest.mark.parametrize("told", [False, True])
def test_what_hue_says_is_learned_only_by_a_head_that_is_told(told):
    torch.manual_seed(0)
    model = build_model(BackboneSpec("test_resnet", 3, 32), 2, 0, changes=12 if told else 0)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(120):
        images, labels, changes = hues(32, step)
        loss = torch.nn.functional.cross_entropy(model(images, changes), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    images, labels, changes = hues(256, 10_000)
    with torch.no_grad():
        right = float((model.eval()(images, changes).argmax(1) == labels).float().mean())
    assert right > 0.9 if told else right < 0.65


# ------------------------------------------------------------------------------------------------------ the run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("colour") / "d", tiles=48, val=8)


def test_a_run_is_stopped_and_goes_on_to_the_same_weights(folder, tmp_path):
    keys = (TOLD, "log.panels=2", "validation.every_steps=2")
    assert run(folder, tmp_path / "one", *keys, "train.max_steps=4") == 0
    assert run(folder, tmp_path / "two", *keys, "train.max_steps=4", "checkpoint.every_steps=2") == 0
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "step-00000004")
    assert run(folder, tmp_path / "two", *keys, "train.max_steps=4") == 0
    assert same_tensors(tmp_path / "one", tmp_path / "two")
    assert run(folder, tmp_path / "plain", "train.max_steps=4") == 0
    assert not same_tensors(tmp_path / "one", tmp_path / "plain")
    assert run(folder, tmp_path / "one", "train.max_steps=5") == 1


def test_the_export_holds_the_backbone_alone(folder, tmp_path):
    keys = ("train.max_steps=2",)
    for name, told in (("told", "true"), ("plain", "false")):
        assert run(folder, tmp_path / name, *keys, f"model.condition_on_colour={told}") == 0
        export.export(tmp_path / name, tmp_path / f"{name}.safetensors")
    assert load_file(tmp_path / "told.safetensors").keys() == load_file(tmp_path / "plain.safetensors").keys()


def test_some_bands_in_another_order(tmp_path, capsys):
    four = make_dataset(tmp_path / "d", tiles=48, val=8, bands=4, codec="raw")
    assert run(four, tmp_path / "run", TOLD, "train.max_steps=2", "model.bands=[band4,red]") == 0
    assert "the head is told how colours were changed" in capsys.readouterr().err
    assert run(four, tmp_path / "two", TOLD, "train.max_steps=1", "augment.colour_probability=0") == 0
    assert "leaves nothing to tell" in capsys.readouterr().err


def test_synthetic_batches_have_the_numbers(folder, tmp_path):
    assert run(folder, tmp_path / "run", TOLD, "data.loader=synthetic", "train.max_steps=2") == 0


def test_runs_of_versions_that_did_not_know_it_go_on():
    def tree(**model):
        return {"augment": {}, "model": {"backbone": "resnet18", **model}}

    check_identity(tree(), tree(condition_on_colour=False), "run")
    with pytest.raises(ConfigError, match=r"model\.condition_on_colour"):
        check_identity(tree(), tree(condition_on_colour=True), "run")
