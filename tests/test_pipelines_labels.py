"""Training on one of several land-cover products of a dataset: data.labels."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from geokr import manifests, records  # noqa: E402
from geokr.options import AugmentOptions, DataOptions, RecordsSource  # noqa: E402
from geokr.records import RecordError  # noqa: E402
from pipelines import native  # noqa: E402
from pipelines.dataset import Dataset, open_records  # noqa: E402
from pipelines.errors import PipelineError  # noqa: E402
from pipelines.loaders import train_batches  # noqa: E402
from pipelines.reader import Reader  # noqa: E402
from tests.datasets import make_dataset  # noqa: E402
from tests.test_pipelines_reader import payloads_of, rewrite_first_shard, unusual  # noqa: E402

ALSO = {"nlcd": 6, "x": 2, "a_product_with_a_long_name": 4}


@pytest.fixture(params=["compiled", "python"], autouse=True)
def way(request, monkeypatch):
    if request.param == "python":
        monkeypatch.setattr(native, "calls", lambda: None)
    elif native.calls() is None:
        pytest.skip("google_crc32c has no C library here")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("labels") / "d", tiles=20, size=8, codec="raw", also=ALSO)


def fractions(folder, labels, split="train"):
    found = [records.decode_record(payload) for payload in payloads_of(folder, split)]
    return np.stack([record.fractions_of(labels) for record in found])


@pytest.mark.parametrize("labels", [None, "test", *ALSO])
def test_the_reader_takes_the_fractions_of_the_product_asked_for(folder, labels, monkeypatch):
    dataset = Dataset.open(folder, labels)
    expected = fractions(folder, labels if labels in ALSO else None)
    assert len(dataset.manifest.classes) == expected.shape[1] == ALSO.get(labels or "", 4)
    assert dataset.manifest.product == (labels or "test")
    np.testing.assert_allclose(dataset.manifest.train.prior, expected.mean(0, np.float64), atol=1e-6)
    monkeypatch.setattr(Reader, "_take_slowly", None)  # the fast way knows further features
    reader = Reader(dataset, dataset.train, threads=2, timeout_s=20)
    ids = np.random.default_rng(0).integers(0, 20, 50)
    assert (reader.read(ids).fractions == expected[ids]).all()
    reader.close()


def test_records_of_unusual_form(folder, tmp_path):
    copy = make_dataset(tmp_path / "d", tiles=20, size=8, codec="raw", also=ALSO)
    made = [records.decode_record(payload) for payload in payloads_of(copy)[:5]]
    rewrite_first_shard(copy, [unusual(record, order) for record, order in zip(made, (1, -1, 1, -1, 1), strict=True)])
    dataset = Dataset.open(copy, "nlcd")
    reader = Reader(dataset, dataset.train, threads=2, timeout_s=20)
    assert (reader.read(np.arange(5)).fractions == np.stack([record.also["nlcd"].fractions for record in made])).all()
    reader.close()


def test_batches_and_what_a_run_sees(folder):
    options = DataOptions(records=str(folder), labels="nlcd", loader="torch", global_batch=10, threads=1)
    dataset = open_records(options)
    expected = fractions(folder, "nlcd")
    with train_batches(dataset, options, AugmentOptions(), seed=3) as loader:
        batch = next(loader)
    rows = {tuple(row) for row in expected.tolist()}
    assert batch.fractions.shape == (10, 6)
    assert {tuple(row) for row in batch.fractions.tolist()} <= rows
    assert [entry.name for entry in dataset.manifest.classes] == [f"nlcd{k}" for k in range(6)]
    # a run knows its dataset by the manifest's hash: another product is another run
    first = open_records(options.model_copy(update={"labels": None}))
    assert manifests.dump_manifest(dataset.manifest) != manifests.dump_manifest(first.manifest)
    written = json.loads(manifests.dump_manifest(first.manifest))
    del written["digest"]  # the file has none (tests.datasets)
    assert written == json.loads((folder / manifests.MANIFEST).read_bytes())


def test_a_mixture_of_a_first_and_a_further_product(folder, tmp_path):
    """nlcd is the first product of one dataset and a further one of the other."""
    other = make_dataset(tmp_path / "o", tiles=12, size=8, codec="raw", classes=6, seed=5)
    path = other / manifests.MANIFEST
    tree = json.loads(path.read_bytes())
    tree["product"] = "nlcd"
    for entry in tree["classes"]:
        entry["name"] = entry["name"].replace("class", "nlcd")
    path.write_text(json.dumps(tree))
    both = tuple(RecordsSource(path=str(each)) for each in (folder, other))
    dataset = open_records(DataOptions(records=both, labels="nlcd"))
    reader = Reader(dataset, dataset.train, threads=2, timeout_s=20)
    expected = np.concatenate([fractions(folder, "nlcd"), fractions(other, None)])
    assert (reader.read(np.arange(32)).fractions == expected).all()
    reader.close()
    np.testing.assert_allclose(dataset.manifest.train.prior, expected.mean(0, np.float64), atol=1e-6)
    with pytest.raises(PipelineError, match="must be alike"):
        open_records(DataOptions(records=both))


def test_a_product_that_is_not_there(folder):
    words = r"data\.labels: its records hold no labels of product 'nlc' \(did you mean 'nlcd'\?\); they hold test, a_"
    with pytest.raises(RecordError, match=words):
        Dataset.open(folder, "nlc")


def test_records_that_lack_what_the_manifest_lists(tmp_path):
    plain = make_dataset(tmp_path / "p", tiles=20, size=8, codec="raw")
    path = plain / manifests.MANIFEST
    tree = json.loads(path.read_bytes())
    further = json.loads(
        (make_dataset(tmp_path / "d", tiles=20, size=8, codec="raw", also=ALSO) / manifests.MANIFEST).read_bytes()
    )
    tree["products"] = further["products"]
    for split in records.SPLITS:
        tree[split]["moments"] = further[split]["moments"]
    path.write_text(json.dumps(tree))
    dataset = Dataset.open(plain, "nlcd")
    reader = Reader(dataset, dataset.train, threads=1, timeout_s=20)
    with pytest.raises(RecordError, match=r"train-00000\.tfrecord: record 0 .*no labels of product 'nlcd'"):
        reader.read(np.arange(3))
    reader.close()
