"""Weights of labels: made from what records say of themselves, read with care, and what they do to the loss."""

import re
import shutil

import numpy as np
import pytest
import torch

from geokr import losses, manifests
from geokr.manifests import shard_marks
from geokr.options import AugmentOptions, DataOptions, RecordsSource
from geokr.train import train_step
from pipelines.dataset import open_records
from pipelines.errors import PipelineError
from pipelines.label_weights import read_label_weights
from pipelines.loaders import train_batches
from preprocess import weigh_records
from preprocess.weigh_records import Columns, WeighError, matched
from tests.datasets import make_dataset
from tests.geokr_toy import CLASSES, ToyBatch, learner, make_batch, options
from tests.scenes import read_records
from tests.test_geokr_pretrain import run, same_tensors
from tests.test_pipelines_loaders import LOADERS
from tests.test_preprocess_products import several  # noqa: F401 - a fixture

# ------------------------------------------------------------------------------------------------------- losses


def test_losses_count_each_image_by_its_weight():
    rng = np.random.default_rng(0)
    logits, target = rng.normal(size=(6, 4)), rng.dirichlet(np.full(4, 0.3), 6)
    target[2] = (0, 1, 0, 0)
    weights = rng.uniform(0, 3, 6)
    log_student = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    entropy = np.where(target > 0, target * np.log(np.where(target > 0, target, 1)), 0).sum(1)
    each = entropy - (target * log_student).sum(1)
    given = (torch.from_numpy(logits), torch.from_numpy(target), torch.from_numpy(weights))
    assert losses.kl_supervision(*given).item() == pytest.approx((weights * each).mean(), rel=1e-12)
    published = -(weights[:, None] * target * log_student).mean()
    assert losses.published_supervision(*given).item() == pytest.approx(published, rel=1e-12)


@pytest.mark.parametrize("supervision", ["kl", "published"])
def test_labels_of_weight_0_teach_nothing(supervision):
    batch = make_batch(np.arange(8))
    weights = torch.tensor([2.0, 0, 1, 0, 1.5, 0, 0, 3.5])
    other = batch.fractions.clone()
    other[weights == 0] = torch.eye(CLASSES)[torch.arange(4) % CLASSES]
    found = []
    for fractions in (batch.fractions, other):
        one = learner(options(f"method.supervision={supervision}"))
        train_step(one, [ToyBatch(batch.images, fractions, batch.record_ids, weights)], 1)
        found.append([parameter.detach().clone() for parameter in one.student.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    one = learner(options(f"method.supervision={supervision}"))
    train_step(one, [ToyBatch(batch.images, other, batch.record_ids, torch.ones(8))], 1)
    assert not all(torch.equal(a, b) for a, b in zip(found[0], one.student.parameters(), strict=True))


# -------------------------------------------------------------------------------------------------------- files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("weights") / "d", tiles=70, val=8, codec="raw")


def saved(path, values, shards=None):
    with open(path, "wb") as file:
        if path.suffix == ".npy":
            np.save(file, values)
        else:
            np.savez(file, weights=values, **({} if shards is None else {"shards": np.array(shards)}))
    return str(path)


def of(folder, path):
    data = DataOptions(records=str(folder), label_weights=path)
    return read_label_weights(data.sources, open_records(data).train)


@pytest.mark.parametrize("form", ["npy", "npz", "npz with shards"])
def test_files_are_read_and_have_a_mean_of_1(folder, tmp_path, form):
    values = np.random.default_rng(0).uniform(0, 9, 70)
    marks = shard_marks(manifests.load_manifest(folder).train.shards) if form.endswith("shards") else None
    found = of(folder, saved(tmp_path / f"w.{form[:3]}", values, marks))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, values / values.mean(), rtol=1e-6)
    assert of(folder, None) is None


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.ones(69), "holds 69 numbers, .*d has 70 training records"),
        (np.ones((70, 1)), "holds 70 x 1 numbers"),
        (np.zeros(70), "all weights are 0"),
        (np.full(70, np.nan), "finite numbers of 0 or more"),
        (np.arange(70) - 1.0, "finite numbers of 0 or more"),
        (np.array(["a"] * 70), "finite numbers of 0 or more"),
    ],
)
def test_numbers_that_cannot_be(folder, tmp_path, values, said):
    with pytest.raises(PipelineError, match=said):
        of(folder, saved(tmp_path / "w.npz", values))


def test_files_that_cannot_be(folder, tmp_path, capsys):
    with pytest.raises(PipelineError, match="there is no such file"):
        of(folder, str(tmp_path / "none.npz"))
    (tmp_path / "text.npz").write_text("weights")
    (tmp_path / "empty.npz").write_bytes(b"")
    np.savez(tmp_path / "other.npz", values=np.ones(70))
    np.save(tmp_path / "objects.npy", np.array([{}] * 70))
    whole = (tmp_path / "other.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    for name in ("text.npz", "empty.npz", "other.npz", "objects.npy", "cut.npz"):
        with pytest.raises(PipelineError, match=f"{name}: holds no weights of labels"):
            of(folder, str(tmp_path / name))
    with pytest.raises(PipelineError, match="was made for other records"):
        of(folder, saved(tmp_path / "w.npz", np.ones(70), ["train-00000.tfrecord 0123456789abcdef"]))
    assert run(folder, tmp_path / "run", f"data.label_weights={tmp_path}/none.npz") == 1
    assert "there is no such file" in capsys.readouterr().err
    assert run(folder, tmp_path / "run", f"data.records=[{folder}]", "data.label_weights=w.npz") == 1
    assert "is for one dataset" in capsys.readouterr().err


def test_of_a_mixture(folder, tmp_path):
    other = make_dataset(tmp_path / "e", tiles=30, val=4, codec="raw", seed=5)
    values = np.random.default_rng(1).uniform(0, 1, 30)
    path = saved(tmp_path / "w.npy", values)
    sources = (RecordsSource(path=str(folder)), RecordsSource(path=str(other), label_weights=path))
    data = DataOptions(records=sources)
    found = read_label_weights(data.sources, open_records(data).train)
    np.testing.assert_allclose(found, [*np.ones(70), *(values / values.mean())], rtol=1e-6)


@pytest.mark.parametrize("loader", LOADERS)
def test_batches_have_their_records_weights(folder, loader):
    data = DataOptions(records=str(folder), loader=loader, global_batch=32, threads=1)
    weights = np.random.default_rng(2).uniform(0, 2, 70).astype(np.float32)
    with train_batches(open_records(data), data, AugmentOptions(), seed=0, label_weights=weights) as batches:
        for _ in range(5):
            batch = next(batches)
            np.testing.assert_array_equal(batch.weights.numpy(), weights[batch.record_ids])


def test_runs_with_weights(folder, tmp_path, capsys):
    keys = ("train.max_steps=4", "checkpoint.every_steps=2")
    path = saved(tmp_path / "w.npy", np.random.default_rng(3).uniform(0, 1, 70))
    assert run(folder, tmp_path / "none", *keys) == 0
    assert (
        run(folder, tmp_path / "equal", *keys, f"data.label_weights={saved(tmp_path / 'e.npy', np.full(70, 3))}") == 0
    )
    assert run(folder, tmp_path / "own", *keys, f"data.label_weights={path}") == 0
    assert same_tensors(tmp_path / "none", tmp_path / "equal")
    assert not same_tensors(tmp_path / "none", tmp_path / "own")
    capsys.readouterr()
    assert run(folder, tmp_path / "own", "train.max_steps=6") == 1  # forgotten on the way
    assert "data.label_weights" in capsys.readouterr().err
    shutil.move(path, tmp_path / "moved.npy")
    assert run(folder, tmp_path / "own", "train.max_steps=6", f"data.label_weights={tmp_path}/moved.npy") == 0


# ------------------------------------------------------------------------------------------------------- making


def weigh(folder, out, *words):
    return weigh_records.main([str(folder), "--out", str(out), *words])


def expected(folder, words):
    """The weights by another way: record by record, in words of the rules."""
    manifest = manifests.load_manifest(folder)
    names = [entry.name for entry in manifest.classes]
    other = [entry.name for entry in manifest.products["again"].classes]
    found = []
    for split, record in read_records(folder):
        if split != "train":
            continue
        weight = 1.0
        if "--agreement" in words:
            a, b = dict(zip(names, record.fractions.tolist(), strict=True)), record.also["again"].fractions.tolist()
            b = dict(zip(other, b, strict=True))
            pairs = {name: name for name in names if name in other} | {"forest": "green"}
            apart = sum(abs(a[x] - b[y]) for x, y in pairs.items())
            left = [
                sum(v for k, v in a.items() if k not in pairs),
                sum(v for k, v in b.items() if k not in pairs.values()),
            ]
            weight *= np.exp(-3 * (apart + abs(left[0] - left[1])) / 2)
        if "--valid" in words:
            weight *= record.valid_fraction
        if "--gap" in words and record.label_gap_years is not None:
            weight *= 2.0 ** -(abs(record.label_gap_years) / 0.5)
        found.append(weight)
    return np.array(found)


@pytest.mark.parametrize("table", ["there", "missing"])
@pytest.mark.parametrize(
    "words",
    [
        ("--agreement", "again", "--same", "forest=green", "--sharpness", "3"),
        ("--valid",),
        ("--gap", "0.5"),
        ("--agreement", "again", "--same", "forest=green", "--sharpness", "3", "--valid", "--gap", "0.5"),
    ],
)
def test_weights_by_each_rule(several, tmp_path, words, table, capsys):  # noqa: F811
    folder = several[0]
    if table == "missing":
        folder = shutil.copytree(folder, tmp_path / "d")
        (folder / "tiles.parquet").unlink()
    assert weigh(folder, tmp_path / "new/w.npz", *words) == 0
    found = np.load(tmp_path / "new/w.npz")["weights"]
    np.testing.assert_allclose(found, expected(folder, words), rtol=1e-5)
    assert found.min() < 1
    assert len(set(found.tolist())) > (words[0] != "--gap")  # all training tiles are of one scene
    said = capsys.readouterr().out
    assert f"{len(found)} training records" in said
    assert "data.label_weights=" in said
    read = of(folder, str(tmp_path / "new/w.npz"))
    np.testing.assert_allclose(read, found / found.mean(), rtol=1e-5)


def test_weights_for_a_further_product(several, tmp_path):  # noqa: F811
    folder = several[0]
    assert weigh(folder, tmp_path / "w.npz", "--labels", "worldcover", "--valid") == 0
    valid = [record.also["worldcover"].valid_fraction for split, record in read_records(folder) if split == "train"]
    np.testing.assert_allclose(np.load(tmp_path / "w.npz")["weights"], valid, rtol=1e-6)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "nothing to weigh by"),
        (
            ("--agreement", "worldcver"),
            "no product 'worldcver'.*did you mean 'worldcover'.*they hold globeland30, again",
        ),
        (("--agreement", "globeland30"), "is the label itself"),
        (("--agreement", "again", "--same", "forest"), "expected A=B"),
        (("--agreement", "again", "--same", "forest=gren"), "there is no class 'gren'.*did you mean 'green'"),
        (("--agreement", "again", "--same", "woods=green"), "there is no class 'woods'"),
        (("--labels", "nlcd", "--valid"), "no product 'nlcd'"),
        (("--gap", "0"), "expected a number of years above 0"),
        (("--agreement", "again", "--sharpness", "-1"), "expected a number above 0"),
    ],
)
def test_what_cannot_be_weighed(several, tmp_path, capsys, words, said):  # noqa: F811
    assert weigh(several[0], tmp_path / "w.npz", *words) == 1
    assert re.search(said, capsys.readouterr().err.replace("\n", " "))
    assert not (tmp_path / "w.npz").exists()


def test_products_without_a_class_in_common():
    label, other = Columns("v", "g", {"forest": "forest"}), Columns("w", "h", {"trees": "x_trees", "water": "x_water"})
    with pytest.raises(WeighError, match=r"no class of forest has a namesake in trees, water: .*--same A=B"):
        matched(label, other, {})
    assert matched(label, other, {"forest": "trees"}) == (("forest", "x_trees"),)
