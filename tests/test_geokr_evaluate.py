"""What weights are worth: probes against other computations, planted signals, and what is refused before hours go."""

import itertools
import json
import os
import re
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import rasterio
import safetensors.torch
import torch
from PIL import Image
from rasterio.enums import ColorInterp
from scipy.optimize import minimize

import geokr
from geokr import (
    evaluate,
    evaluate_data,
    evaluate_entrants,
    evaluate_features,
    evaluate_images,
    evaluate_kept,
    evaluate_metrics,
    evaluate_records,
    evaluate_training,
    export,
    finetune,
    probes,
)
from geokr.config import ConfigError
from geokr.evaluate_features import Preparation, calibrate, colours, features
from geokr.models import BackboneSpec, build_backbone
from tests.exports import other_range, short_export

SIZE = 32


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return short_export(tmp_path_factory.mktemp("made"), tiles=60, val=20)


@pytest.fixture(scope="module")
def records(made):
    return made[0]


@pytest.fixture(scope="module")
def weights(made):
    return made[1]


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(evaluate_training, "LEAST_STEPS", 1)


def images_of(kind: int, count: int, seed: int, bands: int = 3) -> np.ndarray:
    """uint8 [count, SIZE, SIZE, bands] of one mean colour: stripes down, stripes across, or noise."""
    rng = np.random.default_rng([kind, seed])
    noise = rng.normal(128, 40, (count, SIZE, SIZE, bands))
    wave = 60 * np.sign(np.sin(np.arange(SIZE) * 0.8))
    noise += (wave[None, :, None, None], wave[None, None, :, None], np.zeros(1))[kind]
    return noise.clip(0, 255).astype(np.uint8)


def write_folders(folder, names=("across", "down", "noise"), count=15):
    for kind, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for n, image in enumerate(images_of(kind, count, 0)):
            Image.fromarray(image).save(folder / name / f"{n:03}.png")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_folders(tmp_path_factory.mktemp("folders") / "d")


def command(weights, data, *more) -> int:
    return evaluate.main(["--weights", str(weights), "--data", str(data), *map(str, more)])


# ------------------------------------------------------------------------------------------------- the command


def test_every_figure_of_records(weights, records, tmp_path, capsys):
    out = tmp_path / "e.json"
    arguments = ("--baselines", "random", "colour", "--labels", 20, 100, "--seeds", 2)
    assert command(weights, records, *arguments, "--json", out, "--picture", tmp_path / "e.png") == 0
    report = json.loads(out.read_text())
    rows = {(row["weights"], row["task"], row["labels_percent"]): row for row in report["rows"]}
    assert set(rows) == {
        (name, task, percent)
        for name in ("b.safetensors", "random", "colour") for task in ("knn", "linear") for percent in (20, 100)
    }  # fmt: skip
    train = report["images"]["train"]
    assert sum(report["images"].values()) == 80
    assert 42 <= train <= 48
    for row in rows.values():
        figures = row["figures"]
        assert set(figures) == {"kl", "mae", "top1", "balanced_accuracy", "f1"}
        low, high = figures["kl"]["interval"]
        assert 0 < low <= figures["kl"]["mean"] <= high + 1e-12
        assert row["labels"] == (train if row["labels_percent"] == 100 else pytest.approx(10, abs=2))
    # tiles of cells in colours of their classes: colours alone say it all, the more of them the better
    colour = [rows["colour", "linear", percent]["figures"]["kl"]["mean"] for percent in (20, 100)]
    assert colour[1] < 0.6 * rows["random", "knn", 100]["figures"]["kl"]["mean"]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(rows)
    assert lines[2].startswith("| b.safetensors | knn | 20 %")
    width, height = Image.open(tmp_path / "e.png").size
    assert width > 1000 > height > 300


def test_all_tasks_on_folders(weights, folders, tmp_path):
    """Mean colours are equal, so only who looks at patterns can tell the classes apart."""
    arguments = ("--task", "knn", "linear", "finetune", "--labels", 100, "--seeds", 1, "--epochs", 8, "--batch", 8)
    assert command(weights, folders, *arguments, "--baselines", "colour", "--json", tmp_path / "e.json") == 0
    report = json.loads((tmp_path / "e.json").read_text())
    found = {(row["weights"], row["task"]): row["figures"]["accuracy"]["mean"] for row in report["rows"]}
    assert report["classes"] == ["across", "down", "noise"]
    assert report["images"] == {"train": 27, "val": 9, "test": 9}
    assert set(found) == {("b.safetensors", task) for task in ("knn", "linear", "finetune")} | {
        ("colour", "knn"), ("colour", "linear"),
    }  # fmt: skip
    assert found["b.safetensors", "linear"] >= 0.85


def test_other_weights_beside(weights, folders, tmp_path):
    """A plain state dict of the architecture gives the same figures as the export it came from."""
    state = safetensors.torch.load_file(weights)
    torch.save({"state_dict": state}, tmp_path / "plain.pth")
    arguments = ("--task", "linear", "--labels", 100, "--json", tmp_path / "e.json")
    assert command(weights, folders, *arguments, "--baselines", tmp_path / "plain.pth") == 0
    ours, theirs = json.loads((tmp_path / "e.json").read_text())["rows"]
    assert (theirs["weights"], theirs["figures"]) == ("plain.pth", ours["figures"])


def test_an_export_has_its_own_normalisation_whoever_it_is_compared_with(weights, records, tmp_path):
    other, found = other_range(weights, tmp_path), {}
    tasks = ("--task", "linear", "finetune", "--labels", 100, "--seeds", 1, "--epochs", 1, "--batch", 8)
    for first, second in ((weights, other), (other, weights)):
        out = tmp_path / "e.json"
        assert command(first, records, *tasks, "--baselines", second, "--json", out) == 0
        rows = json.loads(out.read_text())["rows"]
        found[first] = {(row["weights"], row["task"]): row["figures"] for row in rows}
    assert found[weights] == found[other]
    assert len(found[weights]) == 4
    assert found[weights]["b.safetensors", "linear"] != found[weights]["other.safetensors", "linear"]


class CutError(Exception):
    """As a killed process: nobody catches it."""


def cut_after(monkeypatch, count):
    """Finetuning by lot, cut before one more than ``count``; a list of the names that were trained."""
    trained = []

    def by_lot(backbone, train, val, test, *_, seed, name, **more):
        if len(trained) == count:
            raise CutError
        trained.append(name)
        rng = np.random.default_rng([seed, len(train), more["batch"]])
        return rng.dirichlet(np.ones(test.targets.shape[1]), len(test))

    monkeypatch.setattr(finetune, "finetune", by_lot)
    monkeypatch.setattr(evaluate_features, "calibrate", lambda *_: None)
    monkeypatch.setattr(evaluate_features, "features", lambda backbone, part, *_: np.zeros((len(part), 2)))
    return trained


def test_a_run_that_was_cut_goes_on_from_its_finished_rows(weights, folders, tmp_path, capsys, monkeypatch):
    out, picture, own = tmp_path / "data/e.json", tmp_path / "data/e.png", tmp_path / "w.safetensors"
    data = shutil.copytree(folders, tmp_path / "data")  # the report lies among the images, and is none of them
    for ending in ("", ".json"):
        shutil.copy(f"{weights}{ending}", f"{own}{ending}")
    tasks = ("--task", "finetune", "--labels", 50, 100, "--seeds", 2, "--epochs", 1, "--batch", 8)
    arguments = (*tasks, "--baselines", "random", "--json", out, "--picture", picture)
    part = tmp_path / "data/e.json.part"

    def cut(count):
        with monkeypatch.context() as patch:
            cut_after(patch, count)
            with pytest.raises(CutError):
                command(own, data, *arguments)

    def gone_on():
        """(names that were trained, what was said)"""
        with monkeypatch.context() as patch:
            trained = cut_after(patch, 99)
            capsys.readouterr()
            assert command(own, data, *arguments) == 0
        assert not part.exists()
        return trained, capsys.readouterr().err

    assert len(gone_on()[0]) == 8
    whole = out.read_text()
    cut(5)  # in the middle of the third row
    cut(0)  # which keeps what the first left
    with part.open("a") as file:
        file.write('{"weights": "ran')
    trained, said = gone_on()
    assert trained == ["random"] * 4
    assert f"{part}: 2 finished row(s)" in said
    assert "w.safetensors: features" not in said
    assert out.read_text() == whole

    cut(5)
    arguments = (*arguments, "--batch", 4)
    trained, said = gone_on()
    assert len(trained) == 8
    assert f"{part}: is of other weights, data, settings or versions" in said


def test_what_decides_rows(weights, folders, tmp_path):
    data = shutil.copytree(folders, tmp_path / "data")
    for ending in ("", ".json"):
        shutil.copy(f"{weights}{ending}", tmp_path / f"w.safetensors{ending}")
    (data / "again").symlink_to(data)  # a loop
    outputs = (data / "e.json", data / "e.png", None)

    def now():
        found = evaluate_kept.hashes([str(tmp_path / "w.safetensors"), "random"])
        assert [Path(path).name for path in found] == ["w.safetensors", "w.safetensors.json"]
        return found, evaluate_kept.listing(str(data), outputs)

    states = [now()]
    for path in (*outputs[:2], data / "log.txt", data / ".DS_Store"):
        path.touch()
    assert now() == states[0]
    for change in (
        lambda: os.utime(data / "noise/001.png", ns=(0, 0)),
        lambda: (data / "noise/more.png").touch(),
        lambda: (data / "noise/002.png").write_bytes(b"0"),
        lambda: (data / "classes.yaml").touch(),
        lambda: (tmp_path / "w.safetensors.json").write_text("{}"),
        lambda: (tmp_path / "w.safetensors").write_bytes(b"0"),
    ):
        change()
        states.append(now())
    assert all(one != other for one, other in itertools.pairwise(states))


def test_rows_that_cannot_be_kept_are_said_before_anything_is_computed(weights, folders, tmp_path, capsys):
    (tmp_path / "e.json.part").mkdir()
    assert command(weights, folders, "--json", tmp_path / "e.json") == 1
    said = capsys.readouterr().err
    assert re.search(r"error: --json .*e\.json: .*e\.json\.part beside it cannot be written \(Is a directory\)", said)
    assert "features" not in said


# ----------------------------------------------------------------------------------------------------- probes


def clusters(count, classes=4, width=10, noise=0.7, seed=0):
    rng = np.random.default_rng(seed)
    middles = np.random.default_rng(99).normal(size=(classes, width))
    labels = rng.integers(0, classes, count)
    return (middles[labels] + noise * rng.normal(size=(count, width))).astype(np.float32), np.eye(classes)[labels]


@pytest.mark.parametrize("penalty", [1e-3, 1e-1])
@pytest.mark.parametrize("soft", [False, True])
def test_the_linear_probe_is_the_minimum(penalty, soft):
    """Against SciPy's minimum of the same function, written down once more."""
    x_ND, targets_NK = clusters(120)
    if soft:
        targets_NK = np.random.default_rng(1).dirichlet(np.ones(4), 120)
    z = (x_ND - x_ND.mean(0)) / x_ND.std(0)

    def loss(flat):
        weight, bias = flat[:40].reshape(10, 4), flat[40:]
        logits = z @ weight + bias
        log = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        return -(targets_NK * log).sum(1).mean() + penalty / 2 * (weight**2).sum()

    best = minimize(loss, np.zeros(44), method="L-BFGS-B", options={"maxfun": 10**6, "maxiter": 5000, "ftol": 1e-14})
    logits = z @ best.x[:40].reshape(10, 4) + best.x[40:]
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(probes.Linear(x_ND, targets_NK).fit(penalty)(x_ND), expected, atol=2e-3)


def test_neighbours_vote_by_their_similarity():
    train, test = np.array([[1, 0], [0, 2], [1, 1]], np.float64), np.array([[3, 0.1]], np.float64)
    targets = np.eye(3)
    near = probes.neighbours(train, test, 3)
    found = probes.votes(targets, near, 2)
    similar = (train / np.linalg.norm(train, axis=1)[:, None]) @ (test[0] / np.linalg.norm(test))
    votes = np.exp(similar / probes.TEMPERATURE) * [1, 0, 1]
    np.testing.assert_allclose(found[0], votes / votes.sum(), rtol=1e-9)
    np.testing.assert_array_equal(near[0], [[0, 2, 1]])
    np.testing.assert_array_equal(probes.votes(targets, probes.neighbours(train, test, 99), 99).argmax(1), [0])


def test_neighbours_of_blocks_are_those_of_all(monkeypatch):
    train, test = clusters(80)[0], clusters(30, seed=1)[0]
    whole = probes.neighbours(train, test, 7)
    monkeypatch.setattr(probes, "BLOCK", 4)
    for one, other in zip(whole, probes.neighbours(train, test, 7), strict=True):
        np.testing.assert_allclose(one, other)
    similar = (train / np.linalg.norm(train, axis=1)[:, None]) @ (test / np.linalg.norm(test, axis=1)[:, None]).T
    np.testing.assert_array_equal(whole[0], np.argsort(-similar.T, axis=1)[:, :7])


def test_settings_are_chosen_on_val_and_never_on_test():
    train, val, (test_ND, test_NK) = clusters(60), clusters(60, seed=1), clusters(200, seed=2)
    for best in (probes.best_knn, probes.best_linear):
        found, chosen = best(train, val, test_ND)
        assert (found.argmax(1) == test_NK.argmax(1)).mean() > 0.9
        assert best(train, val, test_ND[::-1])[1] == chosen
        shuffled = val[0], np.roll(val[1], 1, axis=1)
        assert best(train, shuffled, test_ND)[1] != chosen
    found, chosen = probes.best_network(train, val, test_ND, seed=0)
    assert (found.argmax(1) == test_NK.argmax(1)).mean() > 0.9


# ---------------------------------------------------------------------------------------------------- figures


def test_figures_by_hand():
    targets, found = np.eye(3)[[0, 0, 0, 1]], np.eye(3)[[0, 0, 1, 1]] * 0.9 + 0.1 / 3
    assert evaluate_metrics.per_image(targets, found, soft=False)["accuracy"].tolist() == [1, 1, 0, 1]
    figures = evaluate_metrics.by_class(targets, found)
    assert figures["balanced_accuracy"] == pytest.approx((2 / 3 + 1) / 2)
    assert figures["f1"] == pytest.approx((2 * 2 / 5 + 2 * 1 / 3) / 2)
    shares, said = np.array([[0.5, 0.5, 0]]), np.array([[0.25, 0.5, 0.25]])
    soft = evaluate_metrics.per_image(shares, said, soft=True)
    assert soft["kl"][0] == pytest.approx(0.5 * np.log(2))
    assert soft["mae"][0] == pytest.approx(0.5 / 3)


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    hits = 0
    for n in range(200):
        low, high = evaluate_metrics.interval((rng.random(60) < 0.7).astype(float), seed=n)
        hits += low <= 0.7 <= high
    assert 0.89 <= hits / 200 <= 0.99


def test_few_labels_are_drawn_from_every_class():
    labels = np.repeat([0, 1, 2], [500, 40, 3])
    one, other = evaluate_metrics.subset(labels, 5, 0), evaluate_metrics.subset(labels, 5, 1)
    assert np.bincount(labels[one]).tolist() == [25, 2, 1]
    assert not np.array_equal(one, other)
    assert evaluate_metrics.subset(labels, 100, 3).tolist() == list(range(543))


def test_spread_over_seeds():
    figures = [{"accuracy": np.array([1.0, 0.0])}, {"accuracy": np.array([1.0, 1.0])}]
    found = evaluate_metrics.over_seeds(figures, [{"f1": 0.5}, {"f1": 0.7}])
    assert found["accuracy"]["mean"] == 0.75
    assert found["accuracy"]["std"] == pytest.approx(np.std([0.5, 1.0], ddof=1))
    assert found["f1"]["mean"] == pytest.approx(0.6)


# --------------------------------------------------------------------------------------------------- features


def prepared(side=SIZE, bands=(0, 1, 2)):
    return Preparation([100.0, 110.0, 120.0], [10.0, 20.0, 30.0], side, bands)


def test_images_are_normalised_reordered_and_resized():
    image = images_of(2, 1, 0, 4)[0]
    found = prepared(bands=(2, 0, 3))([image])[0].numpy()
    expected = (image[..., [2, 0, 3]].astype(np.float64) - [100, 110, 120]) / [10, 20, 30]
    np.testing.assert_allclose(found, expected.transpose(2, 0, 1), rtol=1e-5, atol=1e-5)
    flat = np.full((50, 40, 3), 110, np.uint8)
    assert prepared()([flat]).shape == (1, 3, SIZE, SIZE)
    assert prepared()([flat])[0, 1].abs().max() == 0


def test_features_of_batches_are_those_of_single_images(folders):
    part = evaluate_data.open_folders(folders).parts["test"]
    backbone = build_backbone(BackboneSpec("test_resnet", 3, SIZE)).eval()
    together = features(backbone, part, prepared(), torch.device("cpu"), size=4)
    with torch.no_grad():
        for n in (0, 5, len(part) - 1):
            alone = backbone(prepared()(part.read([n])))[0].numpy()
            np.testing.assert_allclose(together[n], alone, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        backbone.conv1[0].weight.fill_(float("nan"))
    with pytest.raises(ConfigError, match=r"\.png: the backbone gives NaN or infinity for it and 8 more images"):
        features(backbone, part, prepared(), torch.device("cpu"))


def test_statistics_of_random_weights_come_from_the_images(folders):
    """After it the first norm's output has mean 0 and deviation 1 over the images."""
    part = evaluate_data.open_folders(folders).parts["train"]
    backbone = build_backbone(BackboneSpec("resnet18", 3, SIZE))
    calibrate(backbone, part, prepared(), torch.device("cpu"))
    seen = []
    backbone.bn1.register_forward_hook(lambda module, inputs, output: seen.append(output.clone()))
    with torch.no_grad():
        backbone.bn1.act = torch.nn.Identity()
        backbone(prepared()(part.read(range(len(part)))))
    assert seen[0].mean((0, 2, 3)).abs().max() < 0.01
    assert (seen[0].std((0, 2, 3)) - 1).abs().max() < 0.02


def test_colours_of_an_image(folders):
    part = evaluate_data.open_folders(folders).parts["test"]
    pixels = part.read([3])[0][..., [2, 0]].reshape(-1, 2).astype(np.float64)
    expected = [*pixels.mean(0), *pixels.std(0), *np.percentile(pixels, (5, 25, 50, 75, 95), axis=0).ravel()]
    np.testing.assert_allclose(colours(part, (2, 0))[3], expected, rtol=1e-5)


def test_records_are_split_by_their_blocks(records):
    data = evaluate_records.open_records(records)
    counts = {name: len(part) for name, part in data.parts.items()}
    assert counts["train"] + counts["val"] == 60
    assert 12 <= counts["val"] <= 18
    assert counts["test"] == 20
    names = [name for part in data.parts.values() for name in part.names]
    assert len(set(names)) == 80
    assert all("val-" in name for name in data.parts["test"].names)
    np.testing.assert_allclose(data.parts["train"].targets.sum(1), 1)
    assert data.parts["val"].read([1])[0].shape == (SIZE, SIZE, 3)


def test_val_is_ground_of_its_own():
    rng = np.random.default_rng(0)
    places = np.stack([rng.uniform(0, 4, 4000), rng.uniform(-0.17, 0.17, 4000)], 1)
    held = evaluate_records.held_out(places, 20_000.0)
    assert 800 <= held.sum() <= 1200
    number = evaluate_records.cells(places, 20_000.0)
    assert not set(number[held]) & set(number[~held])
    side = 20_000 / 111_195  # near the equator cells are squares of degrees
    known = np.unique(np.floor(places / side), axis=0, return_inverse=True)[1].ravel()
    assert len(set(zip(known.tolist(), number.tolist(), strict=True))) == number.max() + 1 == known.max() + 1
    few = np.repeat([[8.0, 48.0], [8.5, 48.0]], 50, axis=0)  # two places: neither is a fifth
    assert evaluate_records.held_out(few, 20_000.0).sum() == 20
    north = evaluate_records.cells(np.array([[0.0, 85.0], [1.0, 85.0], [3.0, 85.0]]), 20_000.0)  # 10 and 29 km
    assert north[0] == north[1] != north[2]


def test_images_of_a_group_are_drawn_together():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(20), 50)
    values = rng.normal(0, 1, 20)[groups] + rng.normal(0, 0.01, 1000)
    alone, together = (np.diff(evaluate_metrics.interval(values, g))[0] for g in (None, groups))
    assert together > 4 * alone
    each = evaluate_metrics.interval(values, np.arange(1000))
    np.testing.assert_allclose(each, evaluate_metrics.interval(values))


def test_balanced_figures_are_over_the_classes_of_the_test():
    truth, said = np.eye(4)[[0, 0, 1, 1]], np.eye(4)[[0, 0, 1, 3]]
    found = evaluate_metrics.by_class(truth, said)
    assert found["balanced_accuracy"] == pytest.approx((1 + 0.5) / 2)
    assert found["f1"] == pytest.approx((1 + 2 / 3) / 2)


def test_calibration_leaves_norms_as_others_have_them(folders):
    part = evaluate_data.open_folders(folders).parts["train"]
    backbone = build_backbone(BackboneSpec("test_resnet", 3, SIZE))
    calibrate(backbone, part, prepared(), torch.device("cpu"))
    momenta = {m.momentum for m in backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)}
    assert momenta == {0.1}


def test_colours_that_few_images_do_not_tell_apart_do_not_blow_up():
    rng = np.random.default_rng(0)
    train, targets = rng.normal(0, 1, (4, 3)), np.eye(2)[[0, 1, 0, 1]]
    train[:, 0] = [3, -3, 3, -3]
    train[:, 2] = 0.7  # the same by chance
    test = np.stack([np.tile([3.0, -3.0], 50), rng.normal(0, 1, 100), rng.normal(0.7, 1, 100)], 1)
    found, _ = probes.best_network((train, targets), (train, targets), test, 0)
    assert (found.argmax(1) == np.tile([0, 1], 50)).mean() > 0.75


def test_bands_go_by_their_names(weights, tmp_path):
    """A card's bands among those of records, in another order; and an export that wants another order."""
    about = geokr.load_backbone(weights).card
    names = [band["name"] for band in about["bands"]]
    data = evaluate_data.Data.__new__(evaluate_data.Data)
    values = {"path": "d", "bands": 4, "dtype": "uint8", "names": ("nir", *reversed(names))}
    for key, value in values.items():
        object.__setattr__(data, key, value)
    assert evaluate_entrants.preparation("w", about, data, None).bands == [3, 2, 1]
    assert evaluate_entrants.preparation("w", about, data, [1, 2, 3]).bands == [0, 1, 2]
    object.__setattr__(data, "names", ("B2 blue", "B3 green", "B4 red", "B5 red edge"))
    assert evaluate_entrants.preparation("w", about, data, None).bands == [2, 1, 0]
    object.__setattr__(data, "names", ("a", "b", "c", "d"))
    with pytest.raises(ConfigError, match=f"has bands a, b, c, d, w takes {', '.join(names)}; say which is {names[0]}"):
        evaluate_entrants.preparation("w", about, data, None)
    object.__setattr__(data, "names", ())
    other = {**about, "bands": about["bands"][::-1]}
    assert evaluate_entrants._bands_of("o", other, ("w", about), data, [4, 2, 1]) == [1, 2, 4]
    assert evaluate_entrants._bands_of("o", other, ("w", about), data, None) == [3, 2, 1]
    strange = {**about, "bands": [{"name": "x"}]}
    with pytest.raises(ConfigError, match="nothing says which of the images' bands"):
        evaluate_entrants._bands_of("o", strange, ("w", about), data, None)


def test_imagenet_weights_see_images_as_imagenet_did(weights):
    about = geokr.load_backbone(weights).card
    backbone = build_backbone(BackboneSpec("resnet18", 3, SIZE))
    plain = Preparation([1.0, 2, 3], [4.0, 5, 6], SIZE, (0, 1, 2))
    bands = [{"name": name} for name in ("blue", "green", "red")]
    found = evaluate_entrants._as_imagenet(backbone, {**about, "bands": bands}, plain)
    np.testing.assert_allclose(found.mean.ravel(), np.array([0.485, 0.456, 0.406]) * 255, rtol=1e-6)
    np.testing.assert_allclose(found.std.ravel(), np.array([0.229, 0.224, 0.225]) * 255, rtol=1e-6)
    red = np.zeros((SIZE, SIZE, 3), np.uint8)
    red[..., 2] = 255  # the images' bands are blue, green, red
    seen = found([red])[0].mean((1, 2))
    np.testing.assert_allclose(seen, [(1 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225], rtol=1e-5)
    other = {**about, "bands": [{"name": name} for name in ("nir", "green", "red")]}
    assert evaluate_entrants._as_imagenet(backbone, other, plain) is plain


def test_pictures_are_red_green_and_blue_whatever_the_export_takes(weights, folders):
    data = evaluate_data.open_folders(folders)
    assert data.names == ("red", "green", "blue")
    about = geokr.load_backbone(weights).card
    bgr = {**about, "bands": [{"name": name} for name in ("B2 blue", "B3 green", "B4 red")]}
    assert list(evaluate_entrants.preparation("w", bgr, data, None).bands) == [2, 1, 0]
    nameless = {**about, "bands": [{"name": f"band_{n}"} for n in (1, 2, 3)]}
    assert list(evaluate_entrants.preparation("w", nameless, data, None).bands) == [0, 1, 2]


def test_what_systems_leave_in_folders_is_no_image(folders, tmp_path):
    shutil.copytree(folders, tmp_path / "d")
    before = {name: len(part) for name, part in evaluate_data.open_folders(tmp_path / "d").parts.items()}
    one = next((tmp_path / "d").rglob("*.png"))
    for name in (".ipynb_checkpoints/x.png", "__MACOSX/x.png"):
        (one.parent / name).parent.mkdir()
        shutil.copy(one, one.parent / name)
    shutil.copy(one, one.with_name(f"._{one.name}"))
    (tmp_path / "d" / "__MACOSX").mkdir()
    assert {name: len(part) for name, part in evaluate_data.open_folders(tmp_path / "d").parts.items()} == before


def test_linked_folders_are_entered_once(folders, tmp_path):
    shutil.copytree(folders, tmp_path / "d")
    before = {path.name for path in evaluate_data.images_below(tmp_path / "d/across")}
    (tmp_path / "more").mkdir()
    for n in range(4):
        shutil.copy(next((folders / "across").glob("*.png")), tmp_path / f"more/more{n}.png")
    (tmp_path / "more/back").symlink_to(tmp_path / "d/across")
    for name in ("linked", "linked again"):
        (tmp_path / "d/across" / name).symlink_to(tmp_path / "more")
    (tmp_path / "d/across/.hidden").symlink_to(tmp_path / "d/down")
    found = evaluate_data.images_below(tmp_path / "d/across")
    assert sorted(path.name for path in found) == sorted(before | {f"more{n}.png" for n in range(4)})
    assert {path.parent.name for path in found} == {"across", "linked"}
    data = evaluate_data.open_folders(tmp_path / "d")
    assert sum(len(part) for part in data.parts.values()) == 3 * 15 + 4


@pytest.mark.parametrize("names", [("val", "validation"), ("Train", "train")])
def test_a_split_under_two_names(names, weights, folders, tmp_path, capsys):
    for part in {"train", "test", *names}:
        (tmp_path / "d" / part).mkdir(parents=True, exist_ok=True)
        shutil.copytree(folders, tmp_path / "d" / part, dirs_exist_ok=True)
    assert command(weights, tmp_path / "d") == 1
    assert f"{names[0]} and {names[1]} are both {names[0].lower()}; put them into one" in capsys.readouterr().err


def test_weights_of_one_name_are_told_apart(weights, folders, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for end in ("", ".json"):
            shutil.copy(f"{weights}{end}", tmp_path / name / f"{weights.name}{end}")
    first, second = (tmp_path / name / weights.name for name in ("a", "b"))
    out = tmp_path / "e.json"
    assert command(first, folders, "--task", "knn", "--labels", 100, "--baselines", second, "--json", out) == 0
    report = json.loads(out.read_text())
    assert [row["weights"] for row in report["rows"]] == [str(first), str(second)]
    assert report["settings"]["weights"] == str(first)
    assert report["settings"]["batch"] is None


def test_folders_that_are_split_without_a_test(weights, folders, tmp_path, capsys):
    for part in ("train", "valid"):
        shutil.copytree(folders, tmp_path / "d" / part)
    assert command(weights, tmp_path / "d") == 1
    assert "is split into train and valid and has no test" in capsys.readouterr().err
    shutil.copytree(folders, tmp_path / "d" / "Test")
    data = evaluate_data.open_folders(tmp_path / "d")
    assert {name: len(part) for name, part in data.parts.items()} == {"train": 45, "val": 45, "test": 45}
    shutil.rmtree(tmp_path / "d" / "valid")
    data = evaluate_data.open_folders(tmp_path / "d")
    assert np.bincount(data.parts["val"].labels).tolist() == [3, 3, 3]


def test_pngs_of_other_depths(tmp_path):
    def png(path, depth, colour, rows, width):
        chunk = lambda name, data: (  # noqa: E731
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )
        head = struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0)
        pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
        body = chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)

    png(tmp_path / "mask.png", 2, 0, [bytes([0b00011011])], 4)
    assert evaluate_images.read(tmp_path / "mask.png", mask=True)[0, :, 0].tolist() == [0, 1, 2, 3]
    png(tmp_path / "mask4.png", 4, 0, [bytes([0x05, 0xAF])], 4)
    assert evaluate_images.read(tmp_path / "mask4.png", mask=True)[0, :, 0].tolist() == [0, 5, 10, 15]
    png(tmp_path / "one.png", 1, 0, [bytes([0b01100000])], 4)
    assert evaluate_images.read(tmp_path / "one.png", mask=True)[0, :, 0].tolist() == [0, 1, 1, 0]
    white = evaluate_images.read(tmp_path / "one.png")
    assert white[0, :, 0].tolist() == [0, 255, 255, 0]  # of an image, as 2 and 4 bits are spread
    assert white.dtype == np.uint8
    png(tmp_path / "deep.png", 16, 2, [struct.pack(">3H", 300, 2000, 10000)], 1)
    with pytest.raises(ConfigError, match="colours of 16 bits in a PNG"):
        evaluate_images.form(tmp_path / "deep.png")
    png(tmp_path / "grey.png", 16, 0, [struct.pack(">2H", 300, 2000)], 2)
    assert evaluate_images.read(tmp_path / "grey.png")[0, :, 0].tolist() == [300, 2000]


def test_weights_without_their_norms_are_not_finetuned(weights, folders, tmp_path, capsys):
    export.export(weights.parent / "run", tmp_path / "folded.safetensors", fold_bn=True)
    assert command(tmp_path / "folded.safetensors", folders, "--task", "knn", "finetune") == 1
    said = capsys.readouterr().err
    assert "features" not in said  # nothing was computed before
    assert "folded.safetensors: its batch norms are folded into its convolutions, which is for inference alone" in said
    finetune.check(geokr.load_backbone(weights), "w")
    finetune.check(build_backbone(BackboneSpec("resnet18", 3, SIZE)), "w")  # of a state dict, without a card


def test_finetuning_moves_the_copy_alone(folders):
    data = evaluate_data.open_folders(folders)
    backbone = build_backbone(BackboneSpec("test_resnet", 3, SIZE))
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    how = {"epochs": 2, "batch": 8, "seed": 0, "name": "b"}
    runs = [finetune.finetune(backbone, *data.parts.values(), prepared(), torch.device("cpu"), **how) for _ in range(2)]
    np.testing.assert_array_equal(*runs)
    assert runs[0].shape == (9, 3)
    np.testing.assert_allclose(runs[0].sum(1), 1)
    assert all(torch.equal(before[key], value) for key, value in backbone.state_dict().items())


def test_a_training_whose_val_says_nothing_ends_with_its_last_weights(monkeypatch):
    """Average precision is no number where no image of val has a box."""
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))
    seen = []

    def loss_of(step):
        seen.append([parameter.detach().clone() for parameter in model.parameters()])
        return model(torch.ones(1, 1)).square().sum()

    evaluate_training.fit(model, model[0], 8, loss_of, lambda: float("nan"), "b")
    assert len(seen) == 8
    assert not any(torch.equal(a, b) for a, b in zip(seen[-1], model.parameters(), strict=True))
    with pytest.raises(ConfigError, match="b: the loss became nan in step 0"):
        evaluate_training.fit(model, model[0], 8, lambda step: loss_of(step) * float("nan"), lambda: 0.0, "b")


def test_the_best_weights_on_val_are_kept():
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))
    scores, states = iter([0.1, 0.9, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0]), []

    def score():
        states.append({key: value.clone() for key, value in model.state_dict().items()})
        return next(scores)

    evaluate_training.fit(model, model[0], 16, lambda step: model(torch.ones(1, 1)).square().sum(), score, "b")
    assert len(states) == evaluate_training.CHECKS
    assert all(torch.equal(value, states[1][key]) for key, value in model.state_dict().items())


# ------------------------------------------------------------------------------------------------- other data


def test_folders_that_are_split_already_and_geotiffs_of_any_bands(tmp_path):
    for part, count in (("train", 10), ("test", 2)):
        for kind, name in enumerate(("a", "b")):
            (tmp_path / part / name).mkdir(parents=True)
            for n, image in enumerate(images_of(kind, count, 1, 5)):
                with rasterio.open(
                    tmp_path / part / name / f"{n}.tif", "w", driver="GTiff", width=SIZE, height=SIZE, count=5,
                    dtype="uint8", crs="EPSG:32631", transform=rasterio.Affine(10, 0, 4e5, 0, -10, 5e6),
                ) as file:  # fmt: skip
                    file.write(image.transpose(2, 0, 1))
    data = evaluate_data.open_folders(tmp_path)
    assert {name: len(part) for name, part in data.parts.items()} == {"train": 16, "val": 4, "test": 4}
    assert (data.bands, data.dtype, data.soft) == (5, "uint8", False)
    np.testing.assert_array_equal(data.parts["test"].read([2])[0], images_of(1, 2, 1, 5)[0])
    assert not set(data.parts["train"].names) & set(data.parts["val"].names)


def write_geotiff(path, image_HWC, nodata=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width, count = image_HWC.shape
    with rasterio.open(
        path, "w", driver="GTiff", width=width, height=height, count=count, dtype=image_HWC.dtype, nodata=nodata,
        crs="EPSG:32631", transform=rasterio.Affine(10, 0, 4e5, 0, -10, 5e6),
    ) as file:  # fmt: skip
        file.write(image_HWC.transpose(2, 0, 1))


@pytest.mark.parametrize("nodata", [-9999.0, np.nan])
def test_pixels_without_data_become_the_mean(nodata, tmp_path):
    rng = np.random.default_rng(0)
    images = {}
    for name in ("a", "b"):
        for n in range(3):
            image = rng.normal(0.3, 0.1, (SIZE, SIZE, 3)).astype(np.float32)
            image[: 4 + n] = nodata
            write_geotiff(tmp_path / name / f"{n}.tif", image, nodata)
            images[str(tmp_path / name / f"{n}.tif")] = image
    part = evaluate_data.open_folders(tmp_path).parts["test"]
    mean, std = [0.2, 0.3, 0.4], [0.1, 0.2, 0.3]
    for n, name in enumerate(part.names):
        image = images[name].astype(np.float64)
        rows = 4 + int(name[-5])
        (read,) = part.read([n])
        for cut in (slice(0, SIZE), slice(2, 20)):  # as segmentation cuts
            found = Preparation(mean, std, 0, (2, 1, 0))([read[cut]])[0].numpy()
            expected = (image[cut, :, ::-1] - mean) / std
            expected[: rows - cut.start] = 0
            np.testing.assert_allclose(found, expected.transpose(2, 0, 1), atol=1e-5)
        assert Preparation(mean, std, SIZE // 2, (0, 1, 2))([read]).abs().max() < 10
        assert 0.25 < np.pad(read, 1).max() < 1, "what has lost its mask is within range, too"
    pixels = images[part.names[0]][4 + int(part.names[0][-5]) :].reshape(-1, 3).astype(np.float64)
    expected = (pixels.mean(0)[None], pixels.std(0)[None], np.percentile(pixels, (5, 25, 50, 75, 95), axis=0))
    np.testing.assert_allclose(colours(part, (0, 1, 2))[0], np.concatenate(expected).ravel(), rtol=1e-5)


def test_one_bands_nodata_value_is_dark_water_and_one_bands_nan_is_not(tmp_path):
    image = np.full((4, 4, 3), 50, np.uint8)
    image[0, 0], image[1, 1, 2] = 0, 0
    write_geotiff(tmp_path / "dark.tif", image, 0)
    read = evaluate_images.read(tmp_path / "dark.tif")
    assert read[1, 1].data.tolist() == [50, 50, 0]
    assert np.argwhere(evaluate_images.without_data(read)).tolist() == [[0, 0]]
    assert np.argwhere(evaluate_images.without_data(read[..., [2]])).tolist() == [[0, 0], [1, 1]]  # with --bands 3
    image = image.astype(np.float32)
    image[1, 1, 2] = np.nan
    write_geotiff(tmp_path / "nan.tif", image, np.nan)
    read = evaluate_images.read(tmp_path / "nan.tif")
    assert np.argwhere(evaluate_images.without_data(read[..., :2])).tolist() == [[1, 1]]
    assert np.isfinite(np.asarray(read)).all()
    write_geotiff(tmp_path / "silent.tif", image)
    assert np.isnan(evaluate_images.read(tmp_path / "silent.tif")).sum() == 1  # nobody said that it may be there
    mask = np.arange(16, dtype=np.uint8).reshape(4, 4, 1)
    write_geotiff(tmp_path / "mask.tif", mask, 0)
    found = evaluate_images.read(tmp_path / "mask.tif", mask=True)
    assert type(found) is np.ndarray
    np.testing.assert_array_equal(found, mask)


def test_an_alpha_band_says_where_there_is_data(tmp_path):
    image = np.full((4, 4, 4), 50, np.uint8)
    image[..., 3] = 255
    image[0] = 0
    colours = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha]
    write_geotiff(tmp_path / "a.tif", image)
    with rasterio.open(tmp_path / "a.tif", "r+") as file:
        file.colorinterp = colours
    read = evaluate_images.read(tmp_path / "a.tif")
    assert evaluate_images.without_data(read).sum() == 4
    assert (np.asarray(read)[..., :3] == 50).all()  # for whoever leaves the mask behind
    image[..., 3] = 0
    write_geotiff(tmp_path / "b.tif", image)
    with rasterio.open(tmp_path / "b.tif", "r+") as file:
        file.colorinterp = colours
    with pytest.raises(ConfigError, match=r"b\.tif: by its nodata value or mask none of its pixels has data"):
        evaluate_images.check_data([tmp_path / "a.tif", tmp_path / "b.tif"])


def test_an_image_without_any_data_is_refused(weights, tmp_path, capsys):
    for name in ("a", "b"):
        for n in range(3):
            write_geotiff(tmp_path / name / f"{n}.tif", np.full((SIZE, SIZE, 3), 100 * n, np.uint8), 0)
    assert command(weights, tmp_path) == 1
    said = capsys.readouterr().err
    assert f"{tmp_path / 'a/0.tif'}: by its nodata value or mask none of its pixels has data, as of 1 more" in said
    assert "features" not in said


def test_what_is_refused_before_anything_is_computed(weights, folders, tmp_path, capsys):
    def refused(message, *more, data=folders):
        assert command(weights, data, *more) == 1
        said = capsys.readouterr().err
        assert message in said, said
        assert "features" not in said

    refused("there is no such folder", data=tmp_path / "nothing")
    refused("expected a folder for each of two classes or more", data=tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(folders, copy)
    (copy / "empty").mkdir()
    refused(f"{copy / 'empty'}: holds no image", data=copy)
    (copy / "empty/one.png").write_bytes(b"no image")
    refused("class 'empty' has 1 image(s); at least 3 are needed", data=copy)
    for name in ("two", "three"):
        (copy / f"empty/{name}.png").write_bytes(b"no image")
    refused("is no image that can be read", data=copy)
    for name in ("one", "two", "three"):
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(copy / f"empty/{name}.png")
    refused("1 band(s) of uint8, ", data=copy)
    shutil.rmtree(copy / "empty")
    for part in ("train", "test"):
        shutil.copytree(folders, tmp_path / "given" / part)
    shutil.rmtree(tmp_path / "given/test/noise")
    refused("test has no image of noise", data=tmp_path / "given")
    (tmp_path / "given/test/down").rename(tmp_path / "given/test/dwon")
    refused("test has a class 'dwon' that train lacks", data=tmp_path / "given")
    refused("expected 3 numbers from 1 to 3, for red, green, blue", "--bands", 1, 2, 4)
    refused("--labels 0: expected percent", "--labels", 0)
    refused("--seeds 0: expected 1 or more", "--seeds", 0)
    refused("--device mars: is none that torch knows", "--device", "mars")
    refused("--device cuda:7: this machine has", "--device", "cuda:7")
    refused("there is no folder", "--json", tmp_path / "no/where.json")
    state = safetensors.torch.load_file(weights)
    state.pop("conv1.0.weight")
    safetensors.torch.save_file(state, tmp_path / "part.safetensors")
    refused("part.safetensors: does not fit the backbone; keys 1 missing: conv1.0.weight",
            "--baselines", tmp_path / "part.safetensors")  # fmt: skip


def test_imagenet_weights_that_cannot_be_had(weights, folders, capsys, monkeypatch):
    def nothing(spec, *, pretrained=False):
        if pretrained:
            raise ConfigError("model.init=imagenet: ...") from OSError("no network")
        return build_backbone(spec)

    monkeypatch.setattr(evaluate_entrants, "build_backbone", nothing)
    assert command(weights, folders, "--baselines", "imagenet") == 1
    said = capsys.readouterr().err
    assert "--baselines imagenet: timm's weights for 'test_resnet' cannot be had (no network)" in said
    assert "model.init" not in said


def test_images_of_another_depth_or_with_other_bands(weights, tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for n in range(3):
            Image.fromarray(np.full((8, 8), 1000 + n, np.uint16)).save(tmp_path / name / f"{n}.png")
    assert command(weights, tmp_path) == 1
    assert "images of 1 band(s), " in capsys.readouterr().err
    assert command(weights, tmp_path, "--bands", 1, 1, 1) == 1
    assert "images of uint16, " in capsys.readouterr().err
