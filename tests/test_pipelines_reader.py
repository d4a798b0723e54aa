"""Opening and reading datasets: the same records as other readers see, and every fault named instead of passed on."""

import errno
import hashlib
import json
import os
import shutil
import struct
import threading
import time

import google_crc32c
import numpy as np
import pytest

from geokr import example, manifests, records
from geokr.records import RecordError
from pipelines import native, parse
from pipelines.dataset import Dataset
from pipelines.errors import ReadTimeoutError
from pipelines.layout import lay_out
from pipelines.reader import Reader
from tests.datasets import make_dataset, write_shard
from tests.storage import replace_preadv


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data") / "jpeg")


@pytest.fixture(scope="module")
def raws(tmp_path_factory):
    return make_dataset(
        tmp_path_factory.mktemp("data") / "raw",
        tiles=12,
        size=8,
        bands=4,
        dtype="float32",
        codec="raw",
        shard_records=5,
    )


@pytest.fixture
def copy(raws, tmp_path):
    shutil.copytree(raws, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture(params=["compiled", "python"])
def way(request, monkeypatch):
    """Both ways of reading: the second is all that is left where google_crc32c has no C library."""
    if request.param == "python":
        monkeypatch.setattr(native, "calls", lambda: None)
    elif native.calls() is None:
        pytest.skip("google_crc32c has no C library here")
    return request.param


def payloads_of(folder, split="train"):
    """Every payload, by the plain way: index by index, frame by frame."""
    manifest = manifests.load_manifest(folder)
    found = []
    for shard in manifest.split(split).shards:
        data = (folder / shard.name).read_bytes()
        for offset, size in manifests.open_index(folder, shard):
            found.append(records.unframe(data[offset : offset + size], google_crc32c.value, "test"))
    return found


def opened(folder, split="train", **options):
    dataset = Dataset.open(folder)
    return Reader(dataset, getattr(dataset, split), **{"threads": 2, "timeout_s": 20, **options})


def rewrite_first_shard(folder, payloads, **changes):
    """Other payloads in the first training shard, with manifest and index that fit them."""
    shard = write_shard(folder, "train-00000.tfrecord", payloads)
    path = folder / manifests.MANIFEST
    tree = json.loads(path.read_bytes())
    tree["train"]["records"] += shard.records - tree["train"]["shards"][0]["records"]
    tree["train"]["shards"][0] = shard.model_dump()
    path.write_text(json.dumps(tree | changes))


def edit_manifest(folder, change):
    path = folder / manifests.MANIFEST
    tree = json.loads(path.read_bytes())
    change(tree)
    path.write_text(json.dumps(tree))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("fixture", ["jpegs", "raws"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_reads_what_the_contract_reads(fixture, split, request):
    folder = request.getfixturevalue(fixture)
    expected = [records.decode_record(payload) for payload in payloads_of(folder, split)]
    reader = opened(folder, split)
    ids = np.random.default_rng(0).integers(0, len(expected), 50)  # any order, some more than once
    for _ in range(2):  # the second time into the first one's memory
        samples = reader.read(ids)
        assert (samples.ids == ids).all()
        for n, record_id in enumerate(ids):
            assert samples.images[n].tobytes() == expected[record_id].image
            assert (samples.fractions[n] == expected[record_id].fractions).all()
        memory = samples._buffer
        samples.release()
        assert reader.read(ids)._buffer is memory
    assert reader.read(np.zeros(0, np.int64)).images == []
    reader.close()


def test_record_ids_outside_the_split_are_refused(raws):
    reader = opened(raws)
    for bad in (-1, 12):
        with pytest.raises(IndexError, match=r"0\.\.11 of split 'train'"):
            reader.read(np.array([0, bad]))
    reader.close()


@pytest.mark.usefixtures("way")
def test_neighbours_are_read_at_once_and_short_reads_go_on(raws, monkeypatch):
    calls, preadv = [], os.preadv

    def stingy(handle, buffers, offset):
        calls.append(offset)
        return preadv(handle, [buffers[0][:700]], offset)

    reader = opened(raws, threads=1)
    whole = [image.tobytes() for image in reader.read(np.arange(12)).images]
    replace_preadv(lambda *a: calls.append(a[2]) or preadv(*a), monkeypatch.setattr)
    reader.read(np.array([7, 3, 2, 6, 8]))
    assert len(calls) == 2  # 2, 3 in the first shard; 6, 7, 8 in the second
    replace_preadv(stingy, monkeypatch.setattr)
    assert [image.tobytes() for image in reader.read(np.arange(12)).images] == whole
    reader.close()


@pytest.mark.usefixtures("way")
def test_more_shards_than_open_files(tmp_path, monkeypatch):
    folder = make_dataset(tmp_path / "many", tiles=20, size=8, bands=1, codec="raw", shard_records=1, val=0)
    monkeypatch.setattr("pipelines.reader._OPEN_FILES", 3)
    reader = opened(folder)
    expected = [records.decode_record(payload).image for payload in payloads_of(folder)]
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    for _ in range(3):
        assert [image.tobytes() for image in reader.read(np.arange(20)).images] == expected
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) <= before + 4
    reader.close()


# --------------------------------------------------------------------------------------------- damage


@pytest.mark.usefixtures("way")
def test_every_flipped_byte_of_a_record_is_found(copy):
    reader = opened(copy)
    path, split = copy / "train-00001.tfrecord", Dataset.open(copy).train
    offset, size = int(split.offsets[6]), int(split.sizes[6])
    data = bytearray(path.read_bytes())
    for at in range(offset, offset + size):
        data[at] ^= 0x10
        with path.open("r+b") as file:
            file.seek(at)
            file.write(data[at : at + 1])
        with pytest.raises(RecordError, match=rf"train-00001\.tfrecord: record 1 at byte {offset}: ") as error:
            reader.read(np.array([5, 6, 7]))
        assert "pack it again" in str(error.value)
        data[at] ^= 0x10
        with path.open("r+b") as file:
            file.seek(at)
            file.write(data[at : at + 1])
    reader.read(np.array([5, 6, 7]))
    reader.close()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("value", [0, 2**31, 2**63])
def test_a_false_length_allocates_nothing(copy, value):
    path = copy / "train-00000.tfrecord"
    data = bytearray(path.read_bytes())
    header = struct.pack("<Q", value)
    data[:12] = header + struct.pack("<I", records.mask_crc(google_crc32c.value(header)))
    path.write_bytes(data)
    reader = opened(copy)
    with pytest.raises(RecordError, match=r"train-00000\.tfrecord: record 0 at byte 0"):
        reader.read(np.arange(3))
    reader.close()


@pytest.mark.usefixtures("way")
def test_cut_short_after_opening(copy):
    reader = opened(copy)
    os.truncate(copy / "train-00000.tfrecord", 1000)
    with pytest.raises(RecordError, match=r"train-00000\.tfrecord: ends at byte 1000: it was cut short"):
        reader.read(np.arange(5))
    reader.close()


@pytest.mark.usefixtures("way")
def test_an_io_error_names_the_record(copy, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, "Input/output error")

    reader = opened(copy)
    replace_preadv(broken, monkeypatch.setattr)
    with pytest.raises(
        RecordError, match=r"train-00001\.tfrecord: record 2 at byte \d+: cannot be read .*Input/output"
    ):
        reader.read(np.array([7]))
    reader.close()


@pytest.mark.usefixtures("way")
def test_storage_that_hangs_is_given_up(copy):
    shard = copy / "train-00001.tfrecord"
    reader = opened(copy, timeout_s=0.4)
    reader.read(np.array([0]))
    shard.unlink()
    os.mkfifo(shard)  # opening it waits for a writer that never comes
    started = time.monotonic()
    with pytest.raises(
        ReadTimeoutError, match=r"train-00001\.tfrecord: no answer from storage .*read_timeout_s is 0\.4"
    ):
        reader.read(np.array([0, 6]))
    assert 0.4 < time.monotonic() - started < 3
    os.close(os.open(shard, os.O_RDWR | os.O_NONBLOCK))  # lets the waiting thread go
    reader.close()


def test_a_read_that_hangs_names_the_run_in_hand(copy, monkeypatch, way):
    """One thread's share goes over two shards; storage stops at the second one's first byte."""
    release, preadv = threading.Event(), os.preadv
    reader = opened(copy, threads=1, timeout_s=0.4)
    replace_preadv(lambda *a: (a[2] > 0 or release.wait(20)) and preadv(*a), monkeypatch.setattr)
    started = time.monotonic()
    with pytest.raises(ReadTimeoutError, match=r"train-00001\.tfrecord: no answer from storage for \d+ s"):
        reader.read(np.array([2, 4, 5, 7]))
    assert 0.4 < time.monotonic() - started < 3
    release.set()
    reader.close()


# --------------------------------------------------------------------------------- compiled and in Python


def both_ways(reader, ids, monkeypatch):
    """What a read gives, or its error, once in compiled code and once in Python."""
    found = []
    for change in (lambda: None, lambda: monkeypatch.setattr(native, "calls", lambda: None)):
        with monkeypatch.context():
            change()
            try:
                samples = reader.read(ids)
            except RecordError as error:
                found.append(str(error))
            else:
                found.append(([image.tobytes() for image in samples.images], samples.fractions.tobytes()))
                samples.release()
        monkeypatch.undo()
    return found


needs_compiled = pytest.mark.skipif(native.calls() is None, reason="google_crc32c has no C library here")


@needs_compiled
@pytest.mark.parametrize("shape", [{}, {"codec": "raw", "bands": 5, "dtype": "int16", "classes": 9}])
@pytest.mark.parametrize("threads", [1, 3, 8])
def test_both_ways_give_the_same_bits(shape, threads, tmp_path, monkeypatch):
    folder = make_dataset(tmp_path / "data", tiles=60, size=16, shard_records=7, **shape)
    reader, rng = opened(folder, threads=threads), np.random.default_rng(threads)
    for _ in range(30):
        ids = rng.integers(0, 60, rng.integers(0, 70))
        compiled, python = both_ways(reader, ids, monkeypatch)
        assert compiled == python
        assert len(compiled[0]) == len(ids)
    reader.close()


@needs_compiled
def test_sound_records_never_take_the_slow_way(raws, monkeypatch):
    reader = opened(raws)
    monkeypatch.setattr(Reader, "_read_run", None)
    monkeypatch.setattr(Reader, "_take_slowly", None)
    assert len(reader.read(np.arange(12)).images) == 12
    reader.close()


@needs_compiled
def test_both_ways_find_every_flipped_byte_of_a_shard(tmp_path, monkeypatch):
    folder = make_dataset(tmp_path / "data", tiles=2, size=2, bands=1, codec="raw", classes=1, val=0)
    path, reader = folder / "train-00000.tfrecord", opened(folder)
    sound = path.read_bytes()
    with path.open("r+b", buffering=0) as file:
        for at in range(len(sound)):
            os.pwrite(file.fileno(), bytes([sound[at] ^ 1 << at % 8]), at)
            compiled, python = both_ways(reader, np.arange(2), monkeypatch)
            os.pwrite(file.fileno(), sound[at : at + 1], at)
            assert compiled == python
            assert "pack it again" in compiled or "pack again" in compiled
    assert len(reader.read(np.arange(2)).images) == 2
    reader.close()


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_damage_under_right_checksums_is_named_or_harmless(tmp_path, dtype):
    """Each byte of a payload changed and the checksum made anew, as a faulty packer would."""
    folder = make_dataset(tmp_path / "data", tiles=1, size=2, bands=1, dtype=dtype, codec="raw", classes=2, val=0)
    (payload,) = payloads_of(folder)
    path, reader = folder / "train-00000.tfrecord", opened(folder)
    wanted, sound, said = frozenset({"codec", "dtype", "fractions", "image", "shape"}), 0, []
    for at in range(len(payload)):
        changed = payload[:at] + bytes([payload[at] ^ 1 << at % 8]) + payload[at + 1 :]
        path.write_bytes(records.frame(changed, google_crc32c.value))
        try:
            samples = reader.read(np.zeros(1, np.int64))
        except RecordError as error:
            said.append(str(error))
            continue
        sound += 1
        try:
            features = example.decode(changed, wanted)  # what else is in it, training does not need
        except example.ExampleError as error:
            assert "name" in str(error)  # noqa: PT017 - of a feature that is not needed either
            continue
        assert features["codec"] == [b"raw"]
        assert features["dtype"] == [dtype.encode()]
        assert features["shape"].tolist() == [2, 2, 1]
        assert samples.images[0].tobytes() == features["image"][0]
        assert np.isfinite(np.frombuffer(features["image"][0], dtype)).all()
        assert (samples.fractions[0] == features["fractions"]).all()
    assert sound > 100
    assert len(said) > 100
    assert all(message.startswith(f"{path}: record 0 at byte 0: ") for message in said)
    reader.close()


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_shares_take_every_run_once(raws, count):
    split, rng = Dataset.open(raws).train, np.random.default_rng(count)
    for size in range(14):
        layout = lay_out(split, rng.integers(0, 12, size))
        runs = len(layout.edges) - 1
        parts = layout.parts(count)
        assert [run for low, high in parts for run in range(low, high)] == list(range(runs))
        assert len(parts) <= count
        assert all(low < high for low, high in parts)


# -------------------------------------------------------------------------------------------- opening


def cut(folder):
    os.truncate(folder / "train-00002.tfrecord", 50)


def add_shard(folder):
    shutil.copy(folder / "train-00000.tfrecord", folder / "train-00009.tfrecord")


def double_index_line(folder):
    index = folder / "train-00000.idx"
    lines = index.read_text().splitlines(keepends=True)
    index.write_text("".join([lines[0], *lines]))


def link(folder):
    path = folder / "train-00000.tfrecord"
    path.rename(folder / "elsewhere")
    path.symlink_to(folder / "elsewhere")


def outside(folder):
    edit_manifest(folder, lambda tree: tree["train"]["shards"][0].update(name="../train-00000.tfrecord"))


def twice(folder):
    edit_manifest(folder, lambda tree: tree["train"]["shards"].__setitem__(1, tree["train"]["shards"][0]))


def as_jpeg(folder):
    edit_manifest(folder, lambda tree: tree["tile"].update(codec="jpeg"))


def fewer_means(folder):
    edit_manifest(folder, lambda tree: tree["train"].update(mean=[1.0]))


OPENING = {
    "no manifest": (lambda folder: (folder / manifests.MANIFEST).unlink(), "not a dataset"),
    "missing shard": (lambda folder: (folder / "train-00001.tfrecord").unlink(), r"train-00001\.tfrecord: missing"),
    "missing index": (lambda folder: (folder / "val-00000.idx").unlink(), r"val-00000\.idx: missing"),
    "cut short": (cut, r"train-00002\.tfrecord: 50 bytes, the manifest says"),
    "surplus shard": (add_shard, r"train-00009\.tfrecord: a shard that the manifest does not list"),
    "index line twice": (double_index_line, r"train-00000\.idx: its hash is not the manifest's"),
    "link": (link, r"train-00000\.tfrecord: missing \(or not a plain file\)"),
    "path outside": (outside, r"manifest\.json: train\.shards\.0\.name"),
    "listed twice": (twice, "lists a shard twice"),
    "four bands of jpeg": (as_jpeg, "jpeg holds 3 bands of uint8, not 4 of float32"),
    "statistics": (fewer_means, "statistics do not fit 4 bands"),
}


@pytest.mark.parametrize("case", OPENING)
def test_opening_refuses(case, copy):
    spoil, message = OPENING[case]
    spoil(copy)
    with pytest.raises(RecordError, match=message):
        Dataset.open(copy)


# -------------------------------------------------------------------------------------------- payloads


def tag(number, payload):
    assert len(payload) < 128 * 128
    size = bytes([len(payload)]) if len(payload) < 128 else bytes([len(payload) & 127 | 128, len(payload) >> 7])
    return bytes([number << 3 | 2]) + size + payload


def entry(name, kind, values):
    return tag(1, tag(1, name) + tag(2, tag(kind, values)))


def unusual(record, order=1, **other):
    """A sound Example that no fast path expects: fractions not packed, features in another order."""
    fractions = b"".join(b"\x0d" + struct.pack("<f", value) for value in record.fractions)
    features = example.decode(records.encode_record(record))
    parts = [entry(b"fractions", 2, fractions)]
    for name, value in features.items():
        if name == "fractions":
            continue
        if isinstance(value, list):
            parts.append(entry(name.encode(), 1, tag(1, other.get(name, value[0]))))
        elif value.dtype == np.float32:
            parts.append(entry(name.encode(), 2, tag(1, value.astype("<f4").tobytes())))
        else:
            parts.append(entry(name.encode(), 3, tag(1, parse.packed(tuple(other.get(name, value.tolist()))))))
    return tag(1, b"".join(parts[::order]))


@pytest.mark.usefixtures("way")
def test_sound_records_of_unusual_form_are_read(copy):
    made = [records.decode_record(payload) for payload in payloads_of(copy)[:5]]
    rewrite_first_shard(copy, [unusual(record, order) for record, order in zip(made, (1, -1, 1, -1, 1), strict=True)])
    reader = opened(copy)
    samples = reader.read(np.arange(7))
    for n, record in enumerate(made):
        assert samples.images[n].tobytes() == record.image
        assert (samples.fractions[n] == record.fractions).all()
    reader.close()


BAD = {
    "empty": (lambda record: b"", "not a geokr record"),
    "text": (lambda record: b"not an example", "not a geokr record"),
    "another dtype": (lambda record: unusual(record, dtype=b"int16"), "feature 'image' holds 1024 bytes"),
    "another shape": (lambda record: unusual(record, shape=[8, 16, 2]), r"the manifest says .*\(8, 8, 4\)"),
    "short image": (lambda record: unusual(record, image=record.image[:-4]), "feature 'image' holds 1020 bytes"),
    "codec": (lambda record: unusual(record, codec=b"webp"), "feature 'codec' holds 'webp'"),
}


@pytest.mark.parametrize("case", BAD)
def test_payloads_that_are_no_such_record(case, copy):
    make, message = BAD[case]
    payloads = payloads_of(copy)[:5]
    payloads[3] = make(records.decode_record(payloads[3]))
    rewrite_first_shard(copy, payloads)
    reader = opened(copy)
    reader.read(np.array([0, 1, 2, 4]))
    with pytest.raises(RecordError, match=r"train-00000\.tfrecord: record 3 at byte \d+: .*" + message):
        reader.read(np.arange(5))
    reader.close()


def replaced(record, **changes):
    values = {name: getattr(record, name) for name in record.__dataclass_fields__}
    return records.Record(**{**values, **changes})


@pytest.mark.parametrize("bad", [[0.5, 0.6, 0, 0], [1.5, -0.5, 0, 0], [np.nan, 1, 0, 0], [0.2, 0.2, 0.2, 0.2, 0.2]])
def test_fractions_that_cannot_be(copy, bad):
    payloads = payloads_of(copy)[:5]
    record = records.decode_record(payloads[2])
    payloads[2] = records.encode_record(replaced(record, fractions=np.array(bad, np.float32)))
    rewrite_first_shard(copy, payloads)
    reader = opened(copy)
    with pytest.raises(RecordError, match=r"train-00000\.tfrecord: record 2 at byte \d+"):
        reader.read(np.arange(5))
    reader.close()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_never_get_out(copy, bad):
    payloads = payloads_of(copy)[:5]
    record = records.decode_record(payloads[1])
    values = np.frombuffer(record.image, "<f4").copy()
    values[77] = bad
    payloads[1] = records.encode_record(replaced(record, image=values.tobytes()))
    rewrite_first_shard(copy, payloads)
    reader = opened(copy)
    with pytest.raises(RecordError, match=r"record 1 at byte \d+: feature 'image' holds NaN or infinity"):
        reader.read(np.arange(5))
    reader.close()


def test_the_fast_walk_agrees_with_the_reference_on_damaged_bytes():
    """Whatever the fast walk takes for canonical, the reference reads as the same values."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, 40, dtype=np.uint8).tobytes()
    features = {
        "codec": b"raw",
        "crs": b"c",
        "dtype": b"uint8",
        "fractions": np.array([0.25, 0.75], np.float32),
        "image": image,
        "shape": np.array([200, 5, 1], np.int64),
    }
    sound = np.frombuffer(example.encode(features), np.uint8)
    accepted = refused = 0
    for _ in range(4000):
        data = sound.copy()
        for at in rng.integers(0, len(data), rng.integers(1, 4)):
            data[at] = rng.integers(0, 256) if rng.random() < 0.5 else data[at] ^ 1 << rng.integers(0, 8)
        data = data[: rng.integers(1, len(data))].copy() if rng.random() < 0.2 else data
        spans, fine = parse.find_features(data, np.array([[0, len(data)]]))
        if not fine[0]:
            refused += 1
            continue
        accepted += 1
        values = [data[start:end].tobytes() for start, end in spans[0]]
        try:
            expected = example.decode(data.tobytes(), frozenset(features))
        except example.ExampleError:
            continue  # damage inside packed numbers or names: compared with what is expected, or decoded, later
        assert values[parse.IMAGE] == expected["image"][0]
        assert values[parse.CODEC] == expected["codec"][0]
        assert values[parse.DTYPE] == expected["dtype"][0]
        assert values[parse.FRACTIONS] == expected["fractions"].tobytes()
    assert accepted > 500  # damage to values alone
    assert refused > 1000  # damage to the structure
    spans, fine = parse.find_features(sound, np.array([[0, len(sound)]]))
    assert fine[0]
    assert sound[slice(*spans[0, parse.SHAPE])].tobytes() == parse.packed((200, 5, 1)) == b"\xc8\x01\x05\x01"


def test_a_last_feature_that_runs_over_the_payload_by_one_byte():
    """Every inner length is one too large, the outermost is right: the byte after the payload is another record's."""
    parts = [entry(b"codec", 1, tag(1, b"raw")), entry(b"dtype", 1, tag(1, b"uint8"))]
    parts += [entry(b"fractions", 2, tag(1, b"\0\0\x80\x3f")), entry(b"image", 1, tag(1, b"pixels"))]
    body = b"".join([*parts, entry(b"shape", 3, tag(1, b"\x01\x01\x06\x07"))])
    whole, cut = tag(1, body), tag(1, body[:-1])
    assert parse.find_features(np.frombuffer(whole, np.uint8), np.array([[0, len(whole)]]))[1][0]
    data = np.frombuffer(cut + b"\x07", np.uint8)
    assert not parse.find_features(data, np.array([[0, len(cut)]]))[1][0]


def test_random_bytes_do_no_harm():
    rng = np.random.default_rng(1)
    for _ in range(500):
        data = rng.integers(0, 256, 200, dtype=np.uint8)
        data[0] = 0x0A
        _, fine = parse.find_features(data, np.array([[0, 200], [50, 50], [10, 190]]))
        assert not fine.any()
    with pytest.raises(ValueError, match="outside the buffer"):
        parse.find_features(data, np.array([[0, 201]]))


def test_dali_reads_the_same_shards(jpegs):
    dali = pytest.importorskip("nvidia.dali")
    from nvidia.dali import fn, tfrecord

    manifest = manifests.load_manifest(jpegs)
    paths = [str(jpegs / shard.name) for shard in manifest.train.shards]
    pipeline = dali.pipeline.Pipeline(batch_size=manifest.train.records, num_threads=1, device_id=None)
    with pipeline:
        features = fn.readers.tfrecord(
            path=paths,
            index_path=[path.replace(".tfrecord", ".idx") for path in paths],
            features={
                "image": tfrecord.FixedLenFeature((), tfrecord.string, ""),
                "fractions": tfrecord.VarLenFeature(tfrecord.float32, 0.0),
            },
        )
        pipeline.set_outputs(features["image"], features["fractions"])
    pipeline.build()
    images, fractions = pipeline.run()
    reader = opened(jpegs)
    samples = reader.read(np.arange(manifest.train.records))
    for n in range(manifest.train.records):
        assert images.at(n).tobytes() == samples.images[n].tobytes()
        assert (fractions.at(n) == samples.fractions[n]).all()
    reader.close()


def test_manifest_hashes_are_the_files(raws):
    """The helper's manifest is a true one: otherwise the tests above would pass for the wrong reason."""
    manifest = manifests.load_manifest(raws)
    for shard in (*manifest.train.shards, *manifest.val.shards):
        assert hashlib.sha256((raws / shard.name).read_bytes()).hexdigest() == shard.sha256
