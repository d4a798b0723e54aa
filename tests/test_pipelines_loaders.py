"""Whole loaders: the same batches whatever the loader, world size, threads or restart; clean ends and named errors."""

import gc
import importlib.util
import json
import os
import threading
import time

import numpy as np
import pytest
import simplejpeg
import torch

from geokr import manifests, records
from geokr.options import AugmentOptions, DataOptions
from geokr.records import RecordError
from pipelines import augment, loaders
from pipelines.dataset import Dataset
from pipelines.errors import PipelineError, ReadTimeoutError
from pipelines.loaders import train_batches, val_batches
from pipelines.order import Order
from pipelines.torch_loader import decode_tile
from pipelines.transform import Transform
from tests.datasets import make_dataset
from tests.storage import replace_preadv
from tests.test_pipelines_reader import payloads_of, replaced, rewrite_first_shard

HAS_DALI = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
LOADERS = ["torch", pytest.param("dali", marks=pytest.mark.skipif(not HAS_DALI, reason="DALI is not installed"))]
KINDS = {
    "jpeg": {},
    "raw": {"bands": 3, "codec": "raw"},
    "uint16": {"bands": 5, "dtype": "uint16", "codec": "raw"},
    "int16": {"bands": 1, "dtype": "int16", "codec": "raw"},
    "float32": {"bands": 4, "dtype": "float32", "codec": "raw"},
    "png": {"codec": "png"},
    "png16": {"bands": 4, "dtype": "uint16", "codec": "png"},
    "lz4": {"codec": "lz4"},
    "lz4-int16": {"bands": 5, "dtype": "int16", "codec": "lz4"},
    "lz4-float32": {"bands": 2, "dtype": "float32", "codec": "lz4"},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("loaders")
    return {name: make_dataset(root / name, size=24, val=7, **kind) for name, kind in KINDS.items()}


@pytest.fixture(scope="module")
def jpegs(folders):
    return Dataset.open(folders["jpeg"])


@pytest.fixture(autouse=True)
def _no_threads_are_left():
    yield
    gc.collect()
    deadline = time.monotonic() + 5
    while ours() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not ours()


def ours():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("geokr-")]


def options(loader="torch", **changes):
    return DataOptions(**{"loader": loader, "global_batch": 12, "threads": 2, **changes})


def first(dataset, count, data=None, augmentation=None, **arguments):
    with train_batches(
        dataset, data or options(), augmentation or AugmentOptions(), **{"seed": 3, **arguments}
    ) as loader:
        return [next(loader) for _ in range(count)]


def same(batch, other):
    assert (batch.record_ids == other.record_ids).all()
    assert torch.equal(batch.fractions, other.fractions)
    assert torch.equal(batch.images, other.images)
    assert torch.equal(batch.weights, other.weights)


def joined(batches):
    return (
        np.concatenate([batch.record_ids for batch in batches]),
        torch.cat([batch.images for batch in batches]),
        torch.cat([batch.fractions for batch in batches]),
    )


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("image_size", [None, 17])
def test_batches_are_records_through_the_kernels(loader, kind, image_size, folders):
    """Against the plain way: read a record, decode it alone, draw its parameters alone, apply them."""
    dataset = Dataset.open(folders[kind])
    plain = [records.decode_record(payload) for payload in payloads_of(folders[kind])]
    facts = dataset.band_facts()
    transform = Transform(24, image_size or 24, facts)
    ids, epochs = Order(dataset.train.shard_records, 3).take(0, 48)
    expected = transform.allocate(48)
    for n, record_id in enumerate(ids):
        record = plain[record_id]
        tile = decode_tile(np.frombuffer(record.image, np.uint8), record.codec, record.shape, record.dtype, str)
        one = augment.draw(AugmentOptions(), facts, 3, epochs[n : n + 1], ids[n : n + 1])
        transform(tile, one, 0, expected[n].numpy())
    batches = first(dataset, 4, options(loader), image_size=image_size)
    got_ids, images, fractions = joined(batches)
    assert (got_ids == ids).all()
    assert torch.equal(images, expected.permute(0, 3, 1, 2))
    assert (fractions.numpy() == np.stack([plain[record_id].fractions for record_id in ids])).all()
    for batch in batches:
        assert batch.images.dtype == (torch.uint8 if facts.dtype == "uint8" else torch.float16)
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert batch.fractions.dtype == batch.weights.dtype == torch.float32
        assert (batch.weights == 1).all()
        if facts.dtype != "uint8":
            assert torch.isfinite(batch.images).all()
            assert abs(batch.images.float().mean()) < 0.5  # normalised by the training statistics


@pytest.mark.parametrize("loader", LOADERS)
def test_unaugmented_images_are_the_decoded_tiles(loader, jpegs, folders):
    still = AugmentOptions(dihedral=False, colour_probability=0)
    batch = first(jpegs, 1, options(loader), still)[0]
    plain = [records.decode_record(payload) for payload in payloads_of(folders["jpeg"])]
    for image, record_id in zip(batch.images, batch.record_ids, strict=True):
        assert (image.permute(1, 2, 0).numpy() == simplejpeg.decode_jpeg(plain[record_id].image)).all()


@pytest.mark.skipif(not HAS_DALI, reason="DALI is not installed")
def test_auto_takes_dali_where_it_is(jpegs, monkeypatch):
    assert loaders.resolve_loader("auto") == "dali"
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "nvidia" in name else find_spec(name))
    assert loaders.resolve_loader("auto") == "torch"
    with pytest.raises(PipelineError, match=r"DALI is not installed.*data\.loader=torch"):
        train_batches(jpegs, options("dali"), AugmentOptions(), seed=0)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(("world", "accumulate"), [(1, 3), (2, 1), (3, 2), (4, 1)])
def test_global_batches_are_the_same_at_every_world_size(loader, world, accumulate, jpegs):
    whole = joined(first(jpegs, 4, options(loader)))
    seen = [
        first(jpegs, 4 * accumulate, options(loader), rank=rank, world_size=world, accumulate=accumulate)
        for rank in range(world)
    ]
    assert len(seen[0][0].record_ids) == 12 // (world * accumulate)
    order = [
        batch
        for step in range(4)
        for rank in range(world)
        for batch in seen[rank][step * accumulate : (step + 1) * accumulate]
    ]
    for got, expected in zip(joined(order), whole, strict=True):
        assert (np.asarray(got) == np.asarray(expected)).all()


@pytest.mark.parametrize("loader", LOADERS)
def test_restore_at_every_step(loader, jpegs):
    whole = first(jpegs, 7, options(loader))
    for step in range(7):
        tail = first(jpegs, 7 - step, options(loader), start_sample=12 * step)
        for batch, expected in zip(tail, whole[step:], strict=True):
            same(batch, expected)


def test_restore_at_every_sample(jpegs):
    whole, _, _ = joined(first(jpegs, 8))
    for start in range(48):
        ids, _, _ = joined(first(jpegs, 2, start_sample=start))
        assert (ids == whole[start : start + 24]).all()


@pytest.mark.parametrize("loader", LOADERS)
def test_threads_and_prefetch_change_nothing(loader, jpegs):
    reference = first(jpegs, 5, options(loader, threads=1, prefetch=1))
    for threads, prefetch in ((3, 1), (2, 4)):
        for batch, expected in zip(
            first(jpegs, 5, options(loader, threads=threads, prefetch=prefetch)), reference, strict=True
        ):
            same(batch, expected)


def test_epochs_and_seeds_augment_anew(jpegs):
    a, b = first(jpegs, 1)[0], first(jpegs, 1, seed=4)[0]
    assert (a.record_ids != b.record_ids).any()
    whole = joined(first(jpegs, 8))
    twice = [np.flatnonzero(whole[0] == record_id) for record_id in range(40)]
    pairs = [places for places in twice if len(places) > 1]
    assert len(pairs) > 30
    assert sum(torch.equal(whole[1][places[0]], whole[1][places[1]]) for places in pairs) < 4


def test_chosen_bands(folders):
    dataset = Dataset.open(folders["uint16"])
    still = AugmentOptions(dihedral=False, colour_probability=0)
    whole = first(dataset, 1, augmentation=still)[0].images
    part = first(dataset, 1, augmentation=still, bands=(4, 1))[0].images
    assert part.shape == (12, 2, 24, 24)
    assert torch.equal(part, whole[:, [4, 1]])
    jpeg = Dataset.open(folders["jpeg"])
    bgr = first(jpeg, 1, augmentation=still, bands=(2, 1, 0))[0].images
    assert torch.equal(bgr, first(jpeg, 1, augmentation=still)[0].images.flip(1))


# ----------------------------------------------------------------------------------------- validation


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize(("batch", "most"), [(3, None), (1, None), (100, None), (2, 5)])
def test_validation_sees_every_record_once(loader, world, batch, most, jpegs, folders):
    plain = [records.decode_record(payload) for payload in payloads_of(folders["jpeg"], "val")]
    seen, shapes = [], []
    for rank in range(world):
        with val_batches(jpegs, options(loader), batch=batch, max_samples=most, rank=rank, world_size=world) as loader_:
            batches = list(loader_)
        shapes.append([tuple(item.images.shape) for item in batches])
        for item in batches:
            assert len(item.record_ids) <= batch
            for n in np.flatnonzero(item.weights.numpy()):
                seen.append(int(item.record_ids[n]))
                expected = simplejpeg.decode_jpeg(plain[seen[-1]].image)
                assert (item.images[n].permute(1, 2, 0).numpy() == expected).all()
    assert sorted(seen) == list(range(most or 7))
    assert all(shape == shapes[0] for shape in shapes)


def test_validation_without_records_says_so(tmp_path):
    dataset = Dataset.open(make_dataset(tmp_path / "none", tiles=4, size=8, val=0))
    with pytest.raises(PipelineError, match=r"no validation records: pack with split\.val_fraction"):
        val_batches(dataset, options(), batch=4)


def test_validation_is_real_with_the_synthetic_loader(jpegs):
    with val_batches(jpegs, options("synthetic"), batch=7) as loader:
        (batch,) = list(loader)
    assert batch.record_ids.tolist() == list(range(7))


# ----------------------------------------------------------------------------------------- synthetic


@pytest.mark.parametrize(("kind", "dtype"), [("jpeg", torch.uint8), ("uint16", torch.float16)])
def test_synthetic(kind, dtype, folders):
    dataset = Dataset.open(folders[kind])
    a, b = first(dataset, 2, options("synthetic"), world_size=2, rank=1, image_size=16)
    assert a is b
    assert a.images.shape == (6, len(dataset.manifest.bands), 16, 16)
    assert a.images.dtype == dtype
    assert a.images.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(a.fractions.sum(1), torch.ones(6))


# ------------------------------------------------------------------------------------ ends and errors


@pytest.mark.parametrize("loader", LOADERS)
def test_closing_early_ends_every_thread(loader, jpegs):
    one = train_batches(jpegs, options(loader), AugmentOptions(), seed=0)
    next(one)
    started = time.monotonic()
    one.close()
    one.close()
    assert not ours()
    assert time.monotonic() - started < 2
    with pytest.raises(StopIteration):
        next(one)
    never_asked = train_batches(jpegs, options(loader), AugmentOptions(), seed=0)
    never_asked.close()
    assert not ours()


@pytest.mark.parametrize("loader", LOADERS)
def test_a_loader_that_is_dropped_ends_too(loader, jpegs):
    next(train_batches(jpegs, options(loader), AugmentOptions(), seed=0))  # the autouse fixture waits for the threads


def test_nothing_is_prepared_beyond_the_prefetch(jpegs, monkeypatch):
    taken = []
    take = Order.take
    monkeypatch.setattr(Order, "take", lambda self, start, count: taken.append(start) or take(self, start, count))
    with train_batches(jpegs, options(prefetch=2), AugmentOptions(), seed=0) as loader:
        next(loader)
        time.sleep(0.3)
        # One given, two decoded and one waiting with them, two read and one waiting with them.
        assert 3 <= len(taken) <= 7


def replace_image(folder, number, image):
    payloads = payloads_of(folder)[:16]
    payloads[number] = records.encode_record(replaced(records.decode_record(payloads[number]), image=image))
    rewrite_first_shard(folder, payloads)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("case", ["noise", "cut", "size"])
def test_a_jpeg_that_does_not_decode_is_named(loader, case, tmp_path):
    """Its checksum is right: it was packed like that."""
    folder = make_dataset(tmp_path / "data", tiles=16, size=24, val=4)
    image = records.decode_record(payloads_of(folder)[5]).image
    other = simplejpeg.encode_jpeg(np.zeros((16, 24, 3), np.uint8))
    replace_image(folder, 5, {"noise": b"\x01" * 500, "cut": image[: len(image) // 8], "size": other}[case])
    with (
        train_batches(Dataset.open(folder), options(loader, global_batch=4), AugmentOptions(), seed=0) as batches,
        pytest.raises(RecordError, match=r"train-00000\.tfrecord: record 5 at byte \d+: .* not decode as jpeg"),
    ):
        [next(batches) for _ in range(8)]


@pytest.mark.parametrize("loader", LOADERS)
def test_damage_stops_training_at_the_record(loader, tmp_path):
    folder = make_dataset(tmp_path / "data", tiles=16, size=24, val=4)
    dataset = Dataset.open(folder)
    path = folder / "train-00000.tfrecord"
    data = bytearray(path.read_bytes())
    data[int(dataset.train.offsets[9]) + 300] ^= 1
    path.write_bytes(data)
    before = int(np.flatnonzero(Order(dataset.train.shard_records, 0).take(0, 16)[0] == 9)[0]) // 4
    with train_batches(dataset, options(loader, global_batch=4), AugmentOptions(), seed=0) as batches:
        for _ in range(before):
            next(batches)  # the batches before it are sound
        with pytest.raises(RecordError, match=r"train-00000\.tfrecord: record 9 at byte \d+: the payload's checksum"):
            next(batches)


@pytest.mark.parametrize("loader", LOADERS)
def test_storage_that_hangs_stops_training(loader, jpegs, monkeypatch):
    release, preadv = threading.Event(), os.preadv
    monkeypatch.setattr("pipelines.threads._JOIN_S", 0.3)
    with train_batches(jpegs, options(loader, read_timeout_s=0.4), AugmentOptions(), seed=0) as batches:
        next(batches)
        replace_preadv(lambda *a: release.wait(20) and preadv(*a), monkeypatch.setattr)
        started = time.monotonic()
        with pytest.raises(ReadTimeoutError, match=r"train-0000\d\.tfrecord: no answer from storage"):
            [next(batches) for _ in range(20)]
        waited = time.monotonic() - started
        release.set()
    assert 0.3 < waited < 8


@pytest.mark.parametrize(
    ("arguments", "data", "message"),
    [
        ({"world_size": 5}, {}, r"data\.global_batch=10 or 15"),
        ({"accumulate": 8}, {}, r"train\.accumulate 8: set data\.global_batch=8 or 16"),
        (
            {"image_size": 48},
            {},
            r"image_size 48 is larger than the records' tiles of 24 pixels: set data\.image_size=24",
        ),
        ({"bands": (0, 3)}, {}, "the records hold 3 bands"),
        ({"rank": 2, "world_size": 2}, {}, "rank 2 of 2"),
    ],
)
def test_what_cannot_be_is_refused_before_a_thread_starts(arguments, data, message, jpegs):
    with pytest.raises(PipelineError, match=message):
        train_batches(jpegs, options(**data), AugmentOptions(), seed=0, **arguments)
    assert not ours()


def test_threads_are_a_share_of_the_cores(jpegs, monkeypatch):
    monkeypatch.setattr(loaders, "available_cores", lambda: 8)
    seen = []
    monkeypatch.setattr(loaders, "Team", lambda threads, name: seen.append(threads) or Team(1, name))
    from pipelines.threads import Team

    for arguments in ({}, {"world_size": 4}, {"world_size": 4, "local_ranks": 2}):
        train_batches(jpegs, options(threads=None), AugmentOptions(), seed=0, **arguments).close()
    train_batches(jpegs, options(threads=5), AugmentOptions(), seed=0).close()
    assert seen == [8, 2, 4, 5]


def test_the_helpers_fractions_can_be_learned(folders):
    """Tests of training build on that: mean colours tell the fractions far better than the mean histogram does."""
    dataset = Dataset.open(folders["jpeg"])
    _, images, fractions = joined(first(dataset, 4, augmentation=AugmentOptions(colour_probability=0)))
    features = torch.cat([images.float().flatten(2).mean(2), images.float().flatten(2).std(2), torch.ones(48, 1)], 1)
    solved = torch.linalg.lstsq(features, fractions).solution
    residual = (features @ solved - fractions).pow(2).mean() / fractions.var(0).mean()
    assert residual < 0.5
    assert json.loads((folders["jpeg"] / manifests.MANIFEST).read_text())["tile"]["codec"] == "jpeg"


@pytest.mark.parametrize(("decoding", "reading"), [(1, 4), (2, 4), (8, 4), (12, 6), (16, 8), (128, 8)])
def test_reading_follows_the_cores_within_limits(decoding, reading):
    assert loaders.read_threads(decoding) == reading
