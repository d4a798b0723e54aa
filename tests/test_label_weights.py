"""Weights of labels: made from what records say of themselves, read with care, and what they do to the loss."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from affine import Affine

from geokr import landcover, losses, manifests
from geokr.manifests import shard_digests
from geokr.options import AugmentOptions, DataOptions, RecordsSource
from geokr.train import train_step
from launch.preflight import problem
from pipelines.dataset import open_records
from pipelines.errors import PipelineError
from pipelines.label_weights import check_label_weights, read_label_weights
from pipelines.loaders import train_batches
from preprocess import weigh_records
from preprocess.weigh_records import Columns, WeighError, left_over, matched
from tests.datasets import make_dataset
from tests.geokr_toy import CLASSES, ToyBatch, learner, make_batch, options
from tests.scenes import RAW, command, noise, patches, read_records, write_raster
from tests.test_geokr_pretrain import run, same_tensors
from tests.test_pipelines_loaders import LOADERS
from tests.test_preprocess_products import several  # noqa: F401 - a fixture

DATA_MD = Path(__file__).parents[1] / "docs" / "data.md"

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


def test_parts_of_a_step_need_not_know_of_one_another():
    """Weights are scaled over the dataset, not over a batch: the mean over parts and processes is the whole's."""
    generator = torch.Generator().manual_seed(0)
    logits, target = torch.randn(8, 4, generator=generator), torch.rand(8, 4, generator=generator)
    weights = torch.tensor([3.0, 2, 4, 1, 0, 0, 0.1, 0.2])
    for loss in losses.SUPERVISION.values():
        parts = [loss(logits[at], target[at], weights[at]) for at in (slice(0, 4), slice(4, 8))]
        torch.testing.assert_close(sum(parts) / 2, loss(logits, target, weights))


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
    held = shard_digests(manifests.load_manifest(folder).train.shards)
    marks = [f"{name} {digest}" for name, digest in held.items()]
    found = of(folder, saved(tmp_path / f"w.{form[:3]}", values, marks if form.endswith("shards") else None))
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
    np.savez_compressed(tmp_path / "squeezed.npz", weights=np.arange(70.0))
    squeezed = bytearray((tmp_path / "squeezed.npz").read_bytes())
    squeezed[60:90] = b"?" * 30
    (tmp_path / "squeezed.npz").write_bytes(squeezed)
    np.save(tmp_path / "objects.npy", np.array([{}] * 70))
    whole = (tmp_path / "other.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    for name in ("text.npz", "empty.npz", "other.npz", "objects.npy", "cut.npz", "squeezed.npz"):
        with pytest.raises(PipelineError, match=f"{name}: holds no weights of labels"):
            of(folder, str(tmp_path / name))
    with pytest.raises(PipelineError, match="was made for other records"):
        of(folder, saved(tmp_path / "w.npz", np.ones(70), ["train-00000.tfrecord 0123456789abcdef"]))
    assert run(folder, tmp_path / "run", f"data.label_weights={tmp_path}/none.npz") == 1
    assert "there is no such file" in capsys.readouterr().err
    assert run(folder, tmp_path / "run", f"data.records=[{folder}]", "data.label_weights=w.npz") == 1
    assert "is for one dataset" in capsys.readouterr().err


def test_preflight_looks_at_the_file(folder, tmp_path):
    keys = [f"data.records={folder}", "train.max_steps=1"]
    assert problem(None, [*keys, f"data.label_weights={saved(tmp_path / 'w.npy', np.ones(70))}"]) is None
    assert "holds 3 numbers" in problem(None, [*keys, f"data.label_weights={saved(tmp_path / 'v.npy', np.ones(3))}"])
    listed = f"data.records=[{{path: {folder}, label_weights: {tmp_path}/none.npz}}]"
    assert "there is no such file" in problem(None, [listed, "train.max_steps=1"])
    assert "no records to train on" in problem(None, ["train.max_steps=1", "data.label_weights=w.npz"])


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


@pytest.fixture(scope="module")
def dated(several, tmp_path_factory):  # noqa: F811
    """The same with tiles of both scenes for training."""
    _, sheets, scenes, arguments, options = several
    keys = [key for key in options if not key.startswith("split.")]
    out = tmp_path_factory.mktemp("dated") / "out"
    assert command(scenes, sheets["globeland30"], "globeland30", out, *arguments, *keys, "split.val_fraction=0") == 0
    return out


def expected(folder, words, labels="globeland30"):
    """The weights by another way: record by record, in words of the rules."""
    manifest = manifests.load_manifest(folder)
    names = [entry.name for entry in manifest.classes]
    other = [entry.name for entry in manifest.products["again"].classes]
    found = []
    for split, record in read_records(folder):
        if split != "train":
            continue
        weight, known = 1.0, record if labels == "globeland30" else record.also[labels]
        if "--agreement" in words:
            a = dict(zip(names, record.fractions.tolist(), strict=True))
            b = dict(zip(other, record.also["again"].fractions.tolist(), strict=True))
            a["woods"] = a.pop("forest") + a.pop("shrubland")  # again has both as green
            b["woods"] = b.pop("green")
            shared = set(a) & set(b)
            a["rest"], b["rest"] = (sum(v for k, v in one.items() if k not in shared) for one in (a, b))
            weight *= np.exp(-3 * sum(abs(a[k] - b[k]) for k in {*shared, "rest"}) / 2)
        if "--valid" in words:
            weight *= known.valid_fraction
        if "--gap" in words and known.label_gap_years is not None:
            weight *= 2.0 ** -(abs(known.label_gap_years) / 0.5)
        found.append(weight)
    return np.array(found)


@pytest.mark.parametrize("table", ["there", "missing"])
@pytest.mark.parametrize(
    "words",
    [
        ("--agreement", "again", "--same", "forest=green", "shrubland=green", "--sharpness", "3"),
        ("--valid",),
        ("--gap", "0.5"),
        (
            "--agreement",
            "again",
            "--same",
            "forest=green",
            "shrubland=green",
            "--sharpness",
            "3",
            "--valid",
            "--gap",
            "0.5",
        ),
    ],
)
def test_weights_by_each_rule(dated, tmp_path, words, table, capsys):
    folder = dated
    if table == "missing":
        folder = shutil.copytree(folder, tmp_path / "d")
        (folder / "tiles.parquet").unlink()
    assert weigh(folder, tmp_path / "new/w.npz", *words) == 0
    found = np.load(tmp_path / "new/w.npz")["weights"]
    np.testing.assert_allclose(found, expected(folder, words), rtol=1e-5)
    assert found.min() < 1
    assert len(set(found.tolist())) > 1
    said = capsys.readouterr().out
    assert f"{len(found)} training records" in said
    assert "data.label_weights=" in said
    read = of(folder, str(tmp_path / "new/w.npz"))
    np.testing.assert_allclose(read, found / found.mean(), rtol=1e-5)


def test_weights_for_a_further_product(dated, tmp_path, capsys):
    assert weigh(dated, tmp_path / "w.npz", "--labels", "worldcover", "--valid", "--gap", "0.5") == 0
    assert f"data.records={dated} data.labels=worldcover data.label_weights=" in capsys.readouterr().out
    found = np.load(tmp_path / "w.npz")["weights"]
    np.testing.assert_allclose(found, expected(dated, ("--valid", "--gap"), "worldcover"), rtol=1e-5)
    ((source,), data) = sources(dated, tmp_path / "w.npz", "worldcover")
    np.testing.assert_allclose(read_label_weights([source], open_records(data).train), found / found.mean(), rtol=1e-5)
    check_label_weights(source, manifests.load_manifest(dated), "worldcover")
    for labels in (None, "globeland30", "again"):
        ((source,), data) = sources(dated, tmp_path / "w.npz", labels)
        with pytest.raises(PipelineError, match="was made for the labels of worldcover, the run trains on those of"):
            read_label_weights([source], open_records(data).train)
        with pytest.raises(PipelineError, match=r"weigh_records\.py --labels"):
            check_label_weights(source, manifests.load_manifest(dated), labels)
    assert weigh(dated, tmp_path / "v.npz", "--labels", "globeland30", "--valid") == 0
    assert "data.labels" not in capsys.readouterr().out  # it is the first
    ((source,), data) = sources(dated, tmp_path / "v.npz", "globeland30")
    assert read_label_weights([source], open_records(data).train) is not None


def sources(folder, path, labels):
    data = DataOptions(records=str(folder), label_weights=str(path), labels=labels)
    return data.sources, data


def test_agreement_from_the_other_side(dated, tmp_path):
    """Two products are as far apart whichever of them is the label."""
    found = []
    for labels, other in (("globeland30", "again"), ("again", "globeland30")):
        same = ("forest=green", "shrubland=green") if labels == "globeland30" else ("green=forest", "green=shrubland")
        words = ("--labels", labels, "--agreement", other, "--same", *same)
        assert weigh(dated, tmp_path / f"{labels}.npz", *words) == 0
        found.append(np.load(tmp_path / f"{labels}.npz")["weights"])
    np.testing.assert_allclose(*found, rtol=1e-5)


def test_records_that_have_grown(tmp_path):
    """A run that began before goes on with the earlier manifest; its weights can be made again for that."""
    scenes = [
        write_raster(
            tmp_path / f"{name}_2020081{n}.tif", noise(n, (128, 128)), Affine(10, 0, 5e5 + 2e3 * n, 0, -10, 5e6)
        )
        for n, name in enumerate("ab")
    ]
    cover = write_raster(tmp_path / "c.tif", patches(2, 80, 200, [10, 30]), (30, 0, 499_000, 0, -30, 5_001_000))
    keys = (*RAW, "tile.size=32", "tile.step=32", "labels.year=2019")
    out, words = tmp_path / "out", ("--gap", "2")
    assert command(scenes[:1], [cover], "worldcover", out, *keys) == 0
    assert weigh(out, tmp_path / "one.npz", *words) == 0
    assert command(scenes, [cover], "worldcover", out, "--append", *keys) == 0
    with pytest.raises(PipelineError, match=r"made for other records than .* holds now.*manifest-v1\.json"):
        of(out, str(tmp_path / "one.npz"))
    earlier = out / "manifest-v1.json"
    first = of(earlier, str(tmp_path / "one.npz"))
    assert weigh(earlier, tmp_path / "again.npz", *words) == 0
    np.testing.assert_array_equal(of(earlier, str(tmp_path / "again.npz")), first)
    assert weigh(out, tmp_path / "both.npz", *words) == 0
    assert len(of(out, str(tmp_path / "both.npz"))) == manifests.load_manifest(out).train.records > len(first)
    (out / "tiles.parquet").unlink()
    assert weigh(earlier, tmp_path / "read.npz", *words) == 0
    np.testing.assert_allclose(of(earlier, str(tmp_path / "read.npz")), first, rtol=1e-6)
    assert weigh(out, out / "w.npz", *words) == 1  # the packer would take it for something else's


def test_the_documented_pairs_are_classes_of_the_products():
    text = DATA_MD.read_text().replace("\\\n", " ")
    said = re.search(r"weigh_records\.py out/records --agreement worldcover +--same (.*) --out", text)
    pairs = said[1].split()
    products = [landcover.load_product(name) for name in ("globeland30", "worldcover")]
    legends = [landcover.build_legend(product) for product in products]
    columns = [Columns("v", "g", {entry.name: entry.name for entry in legend.classes}) for legend in legends]
    found = matched(*columns, weigh_records.pairs_of(pairs))
    assert [left_over(columns[side], side, found) for side in (0, 1)] == [[], []]


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
        (("--agreement", "again", "--sharpness", "inf"), "expected a number above 0"),
        (("--agreement", "again", "--sharpness", "1e9"), "all weights are 0"),
    ],
)
def test_what_cannot_be_weighed(several, tmp_path, capsys, words, said):  # noqa: F811
    assert weigh(several[0], tmp_path / "w.npz", *words) == 1
    assert re.search(said, capsys.readouterr().err.replace("\n", " "))
    assert not (tmp_path / "w.npz").exists()


def test_products_without_a_class_in_common():
    label, other = Columns("v", "g", {"forest": "forest"}), Columns("w", "h", {"trees": "x_trees", "water": "x_water"})
    with pytest.raises(WeighError, match=r"no class of forest has a namesake in trees, water: .*--same A=B"):
        matched(label, other, [])
    assert matched(label, other, [("forest", "trees")]) == ((("forest",), ("x_trees",)),)


def test_pairs_that_share_a_class_are_one():
    label = Columns("v", "g", {name: name for name in ("forest", "shrub", "water", "ice", "sea")})
    other = Columns("w", "h", {name: f"x_{name}" for name in ("trees", "bush", "water", "snow")})
    same = [("forest", "trees"), ("shrub", "trees"), ("shrub", "bush"), ("sea", "water")]
    found = {tuple(map(frozenset, pair)) for pair in matched(label, other, same)}
    woods = frozenset({"forest", "shrub"}), frozenset({"x_trees", "x_bush"})
    assert found == {woods, (frozenset({"sea"}), frozenset({"x_water"}))}  # water was given to the sea
    both = {tuple(map(frozenset, pair)) for pair in matched(label, other, [*same, ("water", "water")])}
    assert both == {woods, (frozenset({"sea", "water"}), frozenset({"x_water"}))}
