"""Datasets of earlier schema versions stay what they were."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from geokr import manifests
from geokr.manifests import Moments
from geokr.records import RecordError
from pipelines.dataset import Dataset
from preprocess import verify_records

# Written by the last geokr that knew version 1 only; the files are in the repository.
VERSION1 = Path(__file__).parent / "version1"


def test_a_dataset_of_version_1_is_read(tmp_path):
    folder = shutil.copytree(VERSION1, tmp_path / "d")
    problems, manifest = verify_records.verify(folder, 1)
    assert not problems
    assert manifest is not None
    assert (manifest.schema_version, manifest.version, manifest.parts, manifest.train.moments) == (1, 1, (), None)
    dataset = Dataset.open(folder)
    assert (dataset.train.records, dataset.val.records) == (5, 2)


def test_its_hash_by_which_training_runs_know_it_stays():
    data = (VERSION1 / manifests.MANIFEST).read_bytes()
    assert manifests.dump_manifest(manifests.load_manifest(VERSION1)) == data
    assert hashlib.sha256(data).hexdigest()[:16] == "0685fef93583eff5"


def test_new_keys_are_written_where_they_say_something(tmp_path):
    manifest = manifests.load_manifest(VERSION1)
    moments = Moments(pixels=3, sum=(10**30, 1, 2), squares=(10**40, 2.5, 3), fractions=(1.0, 0.0, 0.5, 0.5))
    changed = manifest.model_copy(
        update={"schema_version": 2, "version": 2, "train": manifest.train.model_copy(update={"moments": moments})}
    )
    (tmp_path / manifests.MANIFEST).write_bytes(manifests.dump_manifest(changed))
    tree = json.loads((tmp_path / manifests.MANIFEST).read_bytes())
    assert {*tree} - {*json.loads((VERSION1 / manifests.MANIFEST).read_bytes())} == {"version", "digest"}
    assert manifests.load_manifest(tmp_path) == changed
    read = manifests.load_manifest(tmp_path).train.moments
    assert read is not None
    assert read.sum == (10**30, 1, 2)


@pytest.mark.parametrize("value", [0, 3, "2", 2.0, True, None, [2]])
def test_other_versions_are_refused(tmp_path, value):
    tree = json.loads((VERSION1 / manifests.MANIFEST).read_bytes())
    (tmp_path / manifests.MANIFEST).write_text(json.dumps({**tree, "schema_version": value}))
    with pytest.raises(RecordError, match="expected schema 'geokr-records' version 1 or 2"):
        manifests.load_manifest(tmp_path)


@pytest.mark.parametrize("moments", [
    {"pixels": 3, "sum": [1, 2], "squares": [1, 2, 3], "fractions": [1, 0, 0, 0]},
    {"pixels": 3, "sum": [1, 2, float("nan")], "squares": [1, 2, 3], "fractions": [1, 0, 0, 0]},
    {"pixels": 3, "sum": [1, 2, 3], "squares": [1, 2, 3], "fractions": [1, 0]},
])  # fmt: skip
def test_moments_that_cannot_be(tmp_path, moments):
    tree = json.loads((VERSION1 / manifests.MANIFEST).read_bytes())
    tree["train"]["moments"] = moments
    (tmp_path / manifests.MANIFEST).write_text(json.dumps(tree))
    with pytest.raises(RecordError, match="moments do not fit 3 bands and 4 classes"):
        manifests.load_manifest(tmp_path)
