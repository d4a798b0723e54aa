"""Damage to what lies on the disk: every bit and every length of a small dataset (rows 25 to 32)."""

import contextlib
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from geokr import manifests, records
from geokr.records import RecordError
from pipelines.dataset import Dataset
from pipelines.reader import Reader
from preprocess import verify_records
from tests.datasets import make_dataset, make_images, make_records

SHARD, INDEX = "train-00000.tfrecord", "train-00000.idx"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes") / "d"
    make_dataset(folder, tiles=2, val=1, size=8, codec="raw", dtype="uint8", bands=1, shard_records=4)
    # with its digest, as the packer writes it
    manifest = manifests.load_manifest(folder)
    (folder / manifests.MANIFEST).write_bytes(manifests.dump_manifest(manifest))
    return folder


@pytest.fixture
def copy(small, tmp_path):
    return Path(shutil.copytree(small, tmp_path / "d"))


def found_by_verification(folder):
    """What verify_records says of the first shard."""
    try:
        manifest = manifests.load_manifest(folder)
        manifests.check_folder(folder, manifest)
    except RecordError as error:
        return [str(error)]
    return verify_records.verify_shard(folder, manifest.train.shards[0], manifest)[0]


def found_by_training(folder):
    """What a training run says that opens the dataset and reads every record."""
    try:
        dataset = Dataset.open(folder)
        with contextlib.closing(Reader(dataset, dataset.train, threads=1, timeout_s=20)) as reader:
            reader.read(np.arange(dataset.train.records)).release()
    except RecordError as error:
        return [str(error)]
    return []


def flip_bits(copy, name, bits, row, packing, *, neutral=lambda folder: False):
    """Flips each bit in turn; both must find it, and name the file."""
    path = copy / name
    data = path.read_bytes()
    for bit in bits:
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        packing.inject(row, f"one bit of {name.split('-')[-1].split('.')[-1]} flipped")
        if neutral(copy):
            continue
        for who, found in (("verify_records", found_by_verification(copy)), ("training", found_by_training(copy))):
            packing.right(bool(found), f"{who} does not notice bit {bit} of {name}")
            assert str(copy) in found[0], found
    path.write_bytes(data)
    return len(data) * 8


def rows(small, name=SHARD):
    """Bits of payloads, and bits of lengths and checksums, of the shard."""
    spans = manifests.open_index(small, manifests.load_manifest(small).train.shards[0])
    payload = [
        bit
        for offset, size in spans.tolist()
        for bit in range((offset + records.HEADER.size) * 8, (offset + size - records.FOOTER.size) * 8)
    ]
    return payload, sorted({*range((small / name).stat().st_size * 8)} - {*payload})


def test_some_flipped_bits(small, copy, packing):
    payload, frame = rows(small)
    flip_bits(copy, SHARD, payload[::61], 25, packing)
    flip_bits(copy, SHARD, frame[::3], 26, packing)
    flip_bits(copy, INDEX, range(0, (copy / INDEX).stat().st_size * 8, 5), 29, packing)
    assert not found_by_verification(copy)
    assert not found_by_training(copy)


@pytest.mark.slow
def test_every_flipped_bit(small, copy, packing):
    payload, frame = rows(small)
    assert len(payload) + len(frame) == (small / SHARD).stat().st_size * 8
    flip_bits(copy, SHARD, payload, 25, packing)
    flip_bits(copy, SHARD, frame, 26, packing)
    flip_bits(copy, INDEX, range((copy / INDEX).stat().st_size * 8), 29, packing)


def test_truncated_at_any_length(copy, packing):
    for name, row, step in ((SHARD, 28, 7), (INDEX, 29, 1)):
        data = (copy / name).read_bytes()
        for length in range(0, len(data), step):
            (copy / name).write_bytes(data[:length])
            packing.inject(row, f"{name.split('.')[-1]} cut short")
            for found in (found_by_verification(copy), found_by_training(copy)):
                packing.right(bool(found), f"{name} of {length} bytes is not noticed")
        (copy / name).write_bytes(data)


def test_missing_and_surplus_shards(copy, packing):
    for name in (SHARD, INDEX, "val-00000.tfrecord", "val-00000.idx"):
        (copy / name).rename(copy / "away")
        packing.inject(30, "a file missing")
        packing.right(bool(found_by_training(copy)), f"{name} is not missed")
        packing.right(bool(verify_records.verify(copy, 1)[0]), f"{name} is not missed")
        (copy / "away").rename(copy / name)
    for name in ("train-00001.tfrecord", "val-00007.tfrecord", "train-00000-copy.tfrecord", "x.tfrecord"):
        shutil.copy(copy / SHARD, copy / name)
        packing.inject(30, "a shard too many")
        packing.right(bool(found_by_training(copy)), f"{name} is not noticed")
        (copy / name).unlink()


def same_manifest(small):
    """Whether a damaged manifest still says the same, as when white space changes."""
    expected = manifests.load_manifest(small)

    def neutral(folder):
        try:
            return manifests.load_manifest(folder) == expected
        except RecordError:
            return False

    return neutral


def damage_manifest(small, copy, bits, packing):
    """Refused, or it says the same: not a digit changes unseen."""
    flip_bits(copy, manifests.MANIFEST, bits, 31, packing, neutral=same_manifest(small))


def test_some_flipped_bits_of_the_manifest(small, copy, packing):
    damage_manifest(small, copy, range(0, (small / manifests.MANIFEST).stat().st_size * 8, 97), packing)


@pytest.mark.slow
def test_every_flipped_bit_of_the_manifest(small, copy, packing):
    damage_manifest(small, copy, range((small / manifests.MANIFEST).stat().st_size * 8), packing)


def test_a_manifest_cut_short(small, copy, packing):
    data, same = (small / manifests.MANIFEST).read_bytes(), same_manifest(small)
    for length in range(0, len(data) - 1, 17):
        (copy / manifests.MANIFEST).write_bytes(data[:length])
        packing.inject(31, "the manifest cut short")
        packing.right(not same(copy) and bool(found_by_training(copy)), f"a manifest of {length} bytes is not noticed")


def fuzz(count, packing):
    """Payloads with bytes changed, removed, doubled and swapped decode to something sound or raise RecordError."""
    images, fractions = make_images(1, 8, 1, "uint8", 4, 0)
    payload = records.encode_record(make_records(images, fractions, "raw")[0])
    rng = random.Random(f"fuzz {count}")
    for _ in range(count):
        data = bytearray(payload)
        for _ in range(rng.randint(1, 5)):
            at, kind = rng.randrange(len(data)), rng.randrange(4)
            if kind == 0:
                data[at] = rng.randrange(256)
            elif kind == 1:
                del data[at : at + rng.randint(1, 30)]
            elif kind == 2:
                data[at:at] = data[at : at + rng.randint(1, 30)]
            else:
                data[at:at] = rng.randbytes(rng.randint(1, 12))
            if not data:
                break
        packing.inject(32, "a malformed protobuf")
        with contextlib.suppress(RecordError):
            record = records.decode_record(bytes(data))
            packing.right(np.isfinite(record.fractions).all() and abs(record.fractions.sum() - 1) < 1e-4, "unsound")


def test_some_malformed_protobufs(packing):
    fuzz(500, packing)


@pytest.mark.slow
def test_many_malformed_protobufs(packing):
    fuzz(50_000, packing)
