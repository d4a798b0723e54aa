"""Mixtures: shares that are kept to the sample wherever a run begins, and many datasets read as if they were one."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geokr import manifests, pretrain
from geokr.config import ConfigError, load, to_yaml
from geokr.metrics import read_metrics
from geokr.options import AugmentOptions, DataOptions, PretrainOptions, RecordsSource
from pipelines.dataset import Dataset, open_records
from pipelines.errors import PipelineError
from pipelines.interleave import Interleaving, MixedOrder, floor_sum, whole_shares
from pipelines.loaders import train_batches, val_batches
from pipelines.mixture import lay_out
from pipelines.order import Order
from tests.datasets import make_dataset, make_images

ROOT = Path(__file__).parents[1]
HAS_DALI = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
LOADERS = ["torch", pytest.param("dali", marks=pytest.mark.skipif(not HAS_DALI, reason="DALI is not installed"))]
SHARES = st.lists(st.integers(1, 400), min_size=1, max_size=5)
STILL = AugmentOptions(dihedral=False, colour_probability=0)


# ------------------------------------------------------------------------------------------------ order


@given(st.integers(0, 40), st.integers(1, 60), st.integers(0, 300), st.integers(0, 300))
@settings(max_examples=200, deadline=None)
def test_floor_sum(count, modulus, factor, offset):
    assert floor_sum(count, modulus, factor, offset) == sum((factor * i + offset) // modulus for i in range(count))


@given(SHARES, st.integers(0, 2**63 - 1), st.integers(0, 10**15), st.integers(1, 300))
@settings(max_examples=100, deadline=None)
def test_samples_given_before_a_position_are_those_chosen(shares, seed, start, count):
    """Exactly, at any distance: nothing is replayed and nothing drifts."""
    interleaving = Interleaving(shares, seed)
    before, after = interleaving.given(start), interleaving.given(start + count)
    chosen = np.bincount(interleaving.choices(start, count), minlength=len(shares))
    assert (np.subtract(after, before) == chosen).all()
    assert sum(before) == start


@given(SHARES, st.integers(0, 2**63 - 1), st.integers(0, 10**12))
@settings(max_examples=60, deadline=None)
def test_every_stretch_holds_its_shares(shares, seed, start):
    total = sum(shares)
    interleaving = Interleaving(shares, seed)
    chosen = interleaving.choices(start, total)
    assert (np.bincount(chosen, minlength=len(shares)) == shares).all()
    counted = np.cumsum(chosen[:, None] == np.arange(len(shares)), 0)
    due = np.arange(1, total + 1)[:, None] * np.array(shares) / total
    assert np.abs(counted - due).max() <= 2 + np.log(total)  # random choice would be off by some square root


def test_a_long_run_is_within_samples_of_its_shares():
    shares = (1_234_567, 7_654_321, 90_000)
    position = 10**12 + 12345
    off = np.array(Interleaving(shares, 1).given(position)) - position * np.array(shares) / sum(shares)
    assert np.abs(off).max() < 10


def test_decimal_weights_are_taken_at_their_word():
    assert whole_shares([0.3, 0.7]) == (3, 7)
    assert whole_shares([1, 3]) == (1, 3)
    assert whole_shares([40, 60]) == (2, 3)
    assert whole_shares([1e-300, 1])[0] == 1
    third = whole_shares([1 / 3, 0.123456789])
    assert abs(third[0] / third[1] * 0.123456789 * 3 - 1) < 1e-8


def test_one_dataset_keeps_its_order():
    sizes = [5, 1, 7, 3]
    for whole, mixed in zip(Order(sizes, 9).take(3, 70), MixedOrder([sizes], (1,), 9).take(3, 70), strict=True):
        assert (whole == mixed).all()


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=2, max_size=4), st.integers(0, 2**63 - 1))
@settings(max_examples=40, deadline=None)
def test_without_weights_every_record_comes_once_an_epoch(sizes, seed):
    order = MixedOrder(sizes, whole_shares([sum(part) for part in sizes]), seed)
    for epoch in range(3):
        ids, epochs = order.take(epoch * order.records, order.records)
        assert sorted(ids.tolist()) == list(range(order.records))
        assert (epochs == epoch).all()


def test_each_dataset_goes_through_its_own_epochs():
    sizes, order = [[4, 3], [11]], MixedOrder([[4, 3], [11]], (3, 1), 5)
    ids, epochs = order.take(0, 400)
    assert (ids < 7).sum() == 300
    for low, high in ((0, 7), (7, 18)):
        mine = (ids >= low) & (ids < high)
        for epoch in range(int(epochs[mine].max())):
            assert sorted(ids[mine & (epochs == epoch)].tolist()) == list(range(low, high))
    assert (ids[ids < 7] == Order(sizes[0], 5).take(0, 300)[0]).all()


def test_twin_datasets_are_not_shuffled_alike():
    ids, _ = MixedOrder([[50], [50]], (1, 1), 0).take(0, 100)
    assert (ids[ids < 50] != ids[ids >= 50] - 50).mean() > 0.9


def test_restore_at_every_position():
    sizes, shares = [[5, 1], [7, 3, 2]], (2, 3)
    whole, epochs = MixedOrder(sizes, shares, 11).take(0, 90)
    for start in range(90):
        ids, at = MixedOrder(sizes, shares, 11).take(start, 90 - start)
        assert (ids == whole[start:]).all()
        assert (at == epochs[start:]).all()


# ---------------------------------------------------------------------------------------- configuration


def test_a_list_comes_from_yaml_and_from_overrides(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("data:\n  records: [a, {path: b, weight: 3}]\ntrain: {max_steps: 1}\n")
    expected = (RecordsSource(path="a"), RecordsSource(path="b", weight=3))
    assert load(PretrainOptions, config).data.sources == expected
    given = load(PretrainOptions, None, ["data.records=[a, {path: b, weight: 3}]", "train.max_steps=1"])
    assert given.data.sources == expected
    assert load(PretrainOptions, config, ["data.records=[c, d]"]).data.sources[1].path == "d"
    assert load(PretrainOptions, config, ["data.records=c"]).data.sources == (RecordsSource(path="c"),)
    assert DataOptions().sources == ()
    config.write_text(to_yaml(given))
    assert load(PretrainOptions, config) == given


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[]", "empty list"),
        ("3", r"data\.records: expected a folder or URL, or a list"),
        ("{path: a}", "expected a folder or URL, or a list"),
        ("[a, 3]", "item 2: expected a folder or URL"),
        ("[a, {weight: 2}]", "item 2: expected a folder or URL"),
        ("[{path: a, wieght: 2}]", r"item 1: unknown key 'wieght' \(did you mean 'weight'\?\)"),
        ("[{path: a, weight: 0}]", "item 1: weight: Input should be greater than 0; got 0"),
        ("[{path: a, weight: .inf}]", "item 1: weight: Input should be a finite number"),
        ("[a, b, a/]", "'a' stands twice"),
    ],
)
def test_lists_that_cannot_be(value, message):
    with pytest.raises(ConfigError, match=message):
        load(PretrainOptions, None, [f"data.records={value}", "train.max_steps=1"])


# ------------------------------------------------------------------------------------------- agreement


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("mixture")
    make_dataset(root / "a", tiles=40, val=7, size=24, seed=1)
    make_dataset(root / "b", tiles=20, val=3, size=24, seed=2, shard_records=20)
    make_dataset(root / "c", tiles=12, val=0, size=24, seed=3, shard_records=5)
    raw = {"size": 24, "dtype": "uint16", "codec": "raw"}
    make_dataset(root / "wide", tiles=18, val=4, bands=6, seed=4, **raw)
    make_dataset(root / "narrow", tiles=9, val=2, bands=4, seed=5, **raw)
    return root


def sources(folders, *names, weights=None):
    weights = weights or [None] * len(names)
    return tuple(
        RecordsSource(path=str(folders / name), weight=weight) for name, weight in zip(names, weights, strict=True)
    )


def mixed(folders, *names, weights=None, bands=None):
    return open_records(DataOptions(records=sources(folders, *names, weights=weights)), bands)


def altered(folders, tmp_path, change):
    """A manifest like dataset a's, in another folder, with a change."""
    tree = json.loads((folders / "a" / manifests.MANIFEST).read_text())
    change(tree)
    (tmp_path / manifests.MANIFEST).write_text(json.dumps(tree))
    return tmp_path


CHANGES = {
    "product": (lambda tree: tree.update(product="nlcd"), "product: .*a has test, .* has nlcd"),
    "class names": (
        lambda tree: tree["classes"][1].update(name="sea"),
        r"classes: .*a has \[class0, class1, class2, class3\], .* has \[class0, sea, class2",
    ),
    "class order": (lambda tree: tree["classes"].reverse(), r"classes: .* has \[class3, class2"),
    "class codes": (
        lambda tree: tree["classes"][1].update(codes=[2, 9]),
        r"codes of class 'class1': .*a has \[2\], .* has \[2, 9\]",
    ),
    "size": (lambda tree: tree["tile"].update(size=32), r"tile\.size: .*a has 24, .* has 32"),
    "codec": (lambda tree: tree["tile"].update(codec="raw"), r"tile\.codec: .*a has jpeg, .* has raw"),
    "dtype": (lambda tree: tree["tile"].update(dtype="int16"), r"tile\.dtype: .*a has uint8, .* has int16"),
    "bands": (
        lambda tree: tree["bands"].reverse(),
        r"bands: .*a has \[red, green, blue\], .* has \[blue, green, red\]; model\.bands",
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_datasets_that_differ_are_named_with_the_field(case, folders, tmp_path):
    change, message = CHANGES[case]
    other = altered(folders, tmp_path, change)
    given = (RecordsSource(path=str(folders / "a")), RecordsSource(path=str(other)))
    there = [manifests.load_manifest(source.folder) for source in given]
    with pytest.raises(PipelineError, match=message) as error:
        lay_out(given, there, None)
    assert str(tmp_path) in str(error.value)
    assert len(str(error.value).splitlines()) == 3  # that field and no other
    command = [sys.executable, "launch/preflight.py", f"data.records=[{given[0].path}, {tmp_path}]"]
    if case == "class names":  # the launcher's check sees it too, before any process starts
        done = subprocess.run([*command, "train.max_steps=1"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1
        assert "has [class0, sea, class2" in done.stderr


def test_bands_must_be_in_every_dataset(folders):
    with pytest.raises(PipelineError, match=r"narrow has \[red, .*band4\], but no \[band6\], which model\.bands names"):
        mixed(folders, "wide", "narrow", bands=("red", "band6"))
    with pytest.raises(PipelineError, match=r"wide has \[red.*band6\], .*narrow has .*model\.bands=\[\.\.\.\] could"):
        mixed(folders, "wide", "narrow")


def test_weights_for_all_or_none(folders, tmp_path):
    with pytest.raises(PipelineError, match=r"b without a weight beside others"):
        mixed(folders, "a", "b", weights=[2, None])
    make_dataset(tmp_path / "none", tiles=0, val=3, size=24)
    with pytest.raises(PipelineError, match="none has no training records"):
        open_records(DataOptions(records=[str(folders / "a"), str(tmp_path / "none")]))


# ------------------------------------------------------------------------------------------ statistics


@pytest.mark.parametrize("weights", [None, [1.0, 3.0]])
def test_statistics_are_those_of_all_pixels(weights, folders):
    """Against NumPy over the pixels of both: each counted as often as its dataset is drawn."""
    manifest = mixed(folders, "wide", "narrow", weights=weights, bands=("blue", "red")).manifest
    images = [
        make_images(tiles + val, 24, bands, "uint16", 4, seed)[0][:tiles, ..., [2, 0]].reshape(-1, 2).astype(float)
        for tiles, val, bands, seed in ((18, 4, 6, 4), (9, 2, 4, 5))
    ]
    share = weights or [len(part) for part in images]
    every = np.concatenate(images)
    each = np.concatenate([np.full(len(p), s / len(p)) for p, s in zip(images, share, strict=True)])
    mean = np.average(every, axis=0, weights=each)
    std = np.sqrt(np.average((every - mean) ** 2, axis=0, weights=each))
    np.testing.assert_allclose(manifest.train.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(manifest.train.std, std, rtol=1e-12)
    priors = [manifests.load_manifest(folders / name).train.prior for name in ("wide", "narrow")]
    np.testing.assert_allclose(manifest.train.prior, np.average(priors, axis=0, weights=share), rtol=1e-12)
    assert [band.name for band in manifest.bands] == ["blue", "red"]
    assert (manifest.train.records, manifest.val.records) == (27, 6)


# --------------------------------------------------------------------------------------------- batches


def options(loader="torch", **changes):
    return DataOptions(**{"loader": loader, "global_batch": 12, "threads": 1, **changes})


def first(dataset, count, data=None, augmentation=None, **arguments):
    given = {"seed": 3, **arguments}
    with train_batches(dataset, data or options(), augmentation or AugmentOptions(), **given) as loader:
        return [next(loader) for _ in range(count)]


def joined(batches):
    ids = np.concatenate([batch.record_ids for batch in batches])
    return ids, torch.cat([batch.images for batch in batches]), torch.cat([batch.fractions for batch in batches])


def alone(dataset, **arguments):
    """Every training image and fraction of a dataset by record id, unaugmented."""
    count = dataset.train.records
    ids, images, fractions = joined(first(dataset, 1, options(global_batch=count), STILL, **arguments))
    back = np.argsort(ids)
    return images[back], fractions[back]


@pytest.mark.parametrize("loader", LOADERS)
def test_batches_are_the_datasets_own_records(loader, folders):
    dataset = mixed(folders, "a", "b", "c", weights=[1, 1, 2])
    images, fractions = map(
        torch.cat, zip(*(alone(Dataset.open(folders / name)) for name in ("a", "b", "c")), strict=True)
    )
    ids, got, got_fractions = joined(first(dataset, 4, options(loader), STILL))
    assert torch.equal(got, images[ids])
    assert torch.equal(got_fractions, fractions[ids])
    assert np.bincount(np.searchsorted([40, 60], ids, "right")).tolist() == [12, 12, 24]


def test_raw_records_with_other_bands_give_the_models_bands(folders):
    dataset = mixed(folders, "wide", "narrow", bands=("band4", "red"))
    ids, images, _ = joined(first(dataset, 3, augmentation=STILL))
    mean, std = (np.array(values) for values in (dataset.manifest.train.mean, dataset.manifest.train.std))
    wide, narrow = (
        make_images(count, 24, bands, "uint16", 4, seed)[0][..., [3, 0]]
        for count, bands, seed in ((22, 6, 4), (11, 4, 5))
    )
    expected = (np.concatenate([wide[:18], narrow[:9]])[ids] - mean) / std
    np.testing.assert_allclose(images.permute(0, 2, 3, 1).numpy(), expected, atol=4e-3)


@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (3, 2), (4, 3)])
def test_global_batches_are_the_same_at_every_world_size(world, accumulate, folders):
    dataset = mixed(folders, "a", "b", "c", weights=[5, 1, 1])
    whole = joined(first(dataset, 3))
    seen = [first(dataset, 3 * accumulate, rank=rank, world_size=world, accumulate=accumulate) for rank in range(world)]
    steps = [part for step in range(3) for rank in seen for part in rank[step * accumulate : (step + 1) * accumulate]]
    for got, expected in zip(joined(steps), whole, strict=True):
        assert (np.asarray(got) == np.asarray(expected)).all()


def test_restore_at_every_sample(folders):
    dataset = mixed(folders, "a", "b", weights=[1, 2])
    whole, pixels, _ = joined(first(dataset, 5))
    for start in range(0, 36, 5):
        ids, images, _ = joined(first(dataset, 2, start_sample=start))
        assert (ids == whole[start : start + 24]).all()
        assert torch.equal(images, pixels[start : start + 24])


def validated(dataset, world=1, **arguments):
    seen, counts = [], []
    for rank in range(world):
        with val_batches(dataset, options(), batch=2, rank=rank, world_size=world, **arguments) as loader:
            batches = list(loader)
        counts.append([len(batch.record_ids) for batch in batches])
        seen += [i for batch in batches for i in batch.record_ids[batch.weights.numpy() > 0].tolist()]
    assert all(count == counts[0] for count in counts)
    return sorted(seen)


def test_validation_sees_the_records_of_all_datasets(folders):
    dataset = mixed(folders, "a", "c", "b")
    assert dataset.val.records == 10
    assert validated(dataset) == validated(dataset, 3) == list(range(10))
    assert validated(dataset, max_samples=5) == [0, 1, 2, 3, 7]  # 3.5 of a's seven, 1.5 of b's three
    assert validated(dataset, 2, max_samples=1) == [0]


def test_a_records_place_names_its_own_shard(folders):
    dataset = mixed(folders, "a", "b")
    assert dataset.train.where(40).startswith(f"{folders / 'b'}/train-00000.tfrecord: record 0 at byte 0")
    assert str(folders / "a") in dataset.train.where(39)


@pytest.mark.parametrize(("tiles", "shard_records"), [(5, 5), (23, 11)])
def test_more_ranks_than_shards_and_uneven_shards(tiles, shard_records, tmp_path):
    """Every rank takes the same number of equal batches, in training and in validation, and none waits for another."""
    dataset = Dataset.open(make_dataset(tmp_path / "few", tiles=tiles, val=1, size=8, shard_records=shard_records))
    assert len(dataset.train.shards) < 8
    ids = []
    for rank in range(8):
        batches = first(dataset, 5, options(global_batch=16), rank=rank, world_size=8)
        assert [len(batch.record_ids) for batch in batches] == [2] * 5
        ids.append([batch.record_ids for batch in batches])
    stream = np.array(ids).transpose(1, 0, 2).reshape(-1)
    assert (stream == Order(dataset.train.shard_records, 3).take(0, 80)[0]).all()
    assert validated(dataset, 8) == [0]


# ----------------------------------------------------------------------------------------------- a run

RUN = (
    "model.backbone=test_resnet", "data.global_batch=8", "data.loader=torch", "data.threads=1", "train.threads=1",
    "train.precision=fp32", "train.compile=off", "train.device=cpu", "log.tensorboard=false", "log.panels=0",
)  # fmt: skip


def test_one_dataset_under_two_names(folders, tmp_path):
    """Each record would come twice an epoch, and each held-out tile count twice."""
    (tmp_path / "link").symlink_to(folders / "a")
    options = DataOptions.model_validate({"records": [str(folders / "a"), str(tmp_path / "link")]})
    with pytest.raises(PipelineError, match=r"link are the same dataset: name it once, with a larger weight"):
        open_records(options)


def test_a_run_over_a_mixture(folders, tmp_path, capsys):
    listed = f"data.records=[{{path: {folders / 'a'}, weight: 1}}, {{path: {folders / 'b'}, weight: 4}}]"
    arguments = [listed, f"run.dir={tmp_path}", *RUN]
    assert pretrain.main([*arguments, "train.epochs=0.5"]) == 0
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert last["samples"] == 32  # half of 60 records, in whole batches
    assert np.isfinite(last["val/kl"])
    messages = capsys.readouterr().err
    assert f"20 % of the samples from {folders / 'a'}" in messages
    assert "60 training and 10 held-out tiles" in messages
    assert pretrain.main([*arguments, "train.epochs=0.75"]) == 0  # goes on
    other = listed.replace("weight: 4", "weight: 3")
    assert pretrain.main([other, *arguments[1:], "train.epochs=1"]) == 1
    assert "data.dataset" in capsys.readouterr().err
