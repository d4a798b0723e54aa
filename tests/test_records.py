"""The record contract against readers that are not ours, and against damage of every kind."""

import contextlib
import json
import re
import shutil
import struct

import crc32c as independent_crc32c
import numpy as np
import pytest
import tfrecord
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tfrecord import example_pb2

from geokr import example, manifests, records
from geokr.records import RecordError
from preprocess import shards, verify_records
from tests.datasets import make_dataset, make_images, make_records

# ------------------------------------------------------------------------------------------------- Example

names = st.text(min_size=1, max_size=8)
floats = st.lists(st.floats(width=32, allow_nan=False), max_size=5).map(lambda v: np.array(v, np.float32))
integers = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=5).map(lambda v: np.array(v, np.int64))
strings = st.lists(st.binary(max_size=300), min_size=1, max_size=3)
features = st.dictionaries(names, st.one_of(floats, integers, strings), max_size=6)


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, np.ndarray):
            assert found[name].dtype == value.dtype
            np.testing.assert_array_equal(found[name], value)
        else:
            assert found[name] == value


@given(features)
def test_protobuf_reads_what_we_write(written):
    message = example_pb2.Example()
    message.ParseFromString(example.encode(written))
    found = {}
    for name, feature in message.features.feature.items():
        kind = feature.WhichOneof("kind")
        if kind == "bytes_list":
            found[name] = list(feature.bytes_list.value)
        elif kind == "float_list":
            found[name] = np.array(feature.float_list.value, np.float32)
        else:
            found[name] = np.array(feature.int64_list.value, np.int64)
    same(found, written)
    same(example.decode(example.encode(written)), written)


@given(features)
def test_we_read_what_protobuf_writes(written):
    message = example_pb2.Example()
    for name, value in written.items():
        feature = message.features.feature[name]
        if not isinstance(value, np.ndarray):
            feature.bytes_list.value.extend(value)
        elif value.dtype == np.float32:
            feature.float_list.value.extend(value.tolist())
            feature.float_list.SetInParent()
        else:
            feature.int64_list.value.extend(value.tolist())
            feature.int64_list.SetInParent()
    same(example.decode(message.SerializeToString()), written)


@given(features, features)
def test_equal_content_gives_equal_bytes(one, two):
    assert example.encode(dict(reversed(one.items()))) == example.encode(one)
    only = frozenset(list(one)[:2])
    found = example.decode(example.encode(one), only)
    same(found, {name: one[name] for name in only})


def test_numbers_that_are_not_packed():
    """proto2 writers put each number in a field of its own."""
    entry = b"\x0d" + struct.pack("<f", 1.5) + b"\x0d" + struct.pack("<f", -2)
    feature = bytes([0x12, len(entry)]) + entry
    whole = b"\x0a\x01x" + bytes([0x12, len(feature)]) + feature
    outer = bytes([0x0A, len(whole)]) + whole
    payload = bytes([0x0A, len(outer)]) + outer
    assert example.decode(payload)["x"].tolist() == [1.5, -2]
    message = example_pb2.Example()
    message.ParseFromString(payload)
    assert list(message.features.feature["x"].float_list.value) == [1.5, -2]


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_any_bytes_are_an_example_or_an_example_error(data):
    with contextlib.suppress(example.ExampleError):
        example.decode(data)


def test_dtypes_that_an_example_cannot_hold_are_refused():
    with pytest.raises(TypeError, match="float64"):
        example.encode({"x": np.zeros(2)})


# ------------------------------------------------------------------------------------------- records, shards


def one_record(seed=0, codec="raw", dtype="uint16", bands=4):
    images, fractions = make_images(1, 16, bands, dtype, 5, seed)
    return make_records(images, fractions, codec)[0]


def equal_records(a, b):
    for name in records.Record.__slots__:
        x, y = getattr(a, name), getattr(b, name)
        if isinstance(x, np.ndarray):
            np.testing.assert_array_equal(x, y)
        elif name in ("lonlat", "valid_fraction"):
            np.testing.assert_allclose(x, y, rtol=1e-6)
        else:
            assert x == y, name


@pytest.mark.parametrize(
    ("codec", "dtype", "bands"), [("jpeg", "uint8", 3), ("raw", "uint16", 4), ("raw", "float32", 1)]
)
def test_a_record_comes_back(codec, dtype, bands):
    record = one_record(1, codec, dtype, bands)
    equal_records(records.decode_record(records.encode_record(record)), record)


@pytest.fixture
def folder(tmp_path):
    return make_dataset(tmp_path / "data", tiles=10, val=3, size=16, shard_records=4)


def test_another_package_reads_the_shards(folder):
    """Every frame through the tfrecord package; masked checksums by the crc32c package."""
    manifest = manifests.load_manifest(folder)
    seen = 0
    for shard in (*manifest.train.shards, *manifest.val.shards):
        path = folder / shard.name
        ours = [records.decode_record(payload) for _, payload in shards.read_frames(path)]
        theirs = list(tfrecord.tfrecord_loader(str(path), None))
        by_index = list(tfrecord.tfrecord_loader(str(path), str(folder / shard.index_name), shard=(0, 1)))
        assert len(ours) == len(theirs) == len(by_index) == shard.records
        for mine, their, indexed in zip(ours, theirs, by_index, strict=True):
            assert mine.image == bytes(their["image"]) == bytes(indexed["image"])
            np.testing.assert_array_equal(mine.fractions, their["fractions"])
            assert bytes(their["transform"]) == np.array(mine.transform, "<f8").tobytes()
            seen += 1
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            for start, size in ((at, 8), (at + 12, length)):
                crc = independent_crc32c.crc32c(data[start : start + size])
                masked = (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF
                assert struct.unpack_from("<I", data, start + size) == (masked,)
            at += length + 16
    assert seen == 13


def test_dali_reads_the_shards(folder):
    fn = pytest.importorskip("nvidia.dali.fn")
    from nvidia.dali import pipeline_def
    from nvidia.dali import tfrecord as tfrec

    manifest = manifests.load_manifest(folder)
    parts = manifest.train.shards

    @pipeline_def(batch_size=5, num_threads=1, device_id=None)
    def pipe():
        found = fn.readers.tfrecord(
            path=[str(folder / shard.name) for shard in parts],
            index_path=[str(folder / shard.index_name) for shard in parts],
            features={
                "image": tfrec.FixedLenFeature((), tfrec.string, ""),
                "fractions": tfrec.VarLenFeature(tfrec.float32, 0.0),
                "shape": tfrec.VarLenFeature(tfrec.int64, 0),
            },
        )
        return fn.decoders.image(found["image"]), found["fractions"], found["shape"]

    import simplejpeg

    pipeline = pipe()
    pipeline.build()
    images, fractions, shapes = [], [], []
    for _ in range(2):
        a, b, c = pipeline.run()
        images += [np.array(t) for t in a]
        fractions += [np.array(t) for t in b]
        shapes += [np.array(t) for t in c]
    ours = [records.decode_record(p) for shard in parts for _, p in shards.read_frames(folder / shard.name)]
    assert len(ours) == len(images) == 10
    for record, image, share, shape in zip(ours, images, fractions, shapes, strict=True):
        np.testing.assert_array_equal(share, record.fractions)
        assert tuple(shape) == record.shape
        np.testing.assert_array_equal(image, simplejpeg.decode_jpeg(record.image, "RGB"))


def test_frames_match_a_known_vector():
    """RFC 3720's CRC-32C of 32 zero bytes is 0x8a9136aa."""
    assert shards.crc32c(bytes(32)) == 0x8A9136AA == independent_crc32c.crc32c(bytes(32))
    data = records.frame(bytes(32), shards.crc32c)
    assert data[:8] == struct.pack("<Q", 32)
    assert records.unframe(data, shards.crc32c, "here") == bytes(32)


# -------------------------------------------------------------------------------------------------- damage


def refusal(function, *arguments):
    """The message of the RecordError that a call raises; empty if it raises none."""
    try:
        function(*arguments)
    except RecordError as error:
        return str(error)
    return ""


def test_every_flipped_bit_is_found(tmp_path):
    """All bits of a small shard: read_frames or the record check refuses, and says where."""
    folder = make_dataset(tmp_path / "d", tiles=2, val=1, size=8, codec="raw", dtype="uint8", bands=1, shard_records=4)
    path = folder / "train-00000.tfrecord"
    data, missed = path.read_bytes(), []
    spans = manifests.open_index(folder, manifests.load_manifest(folder).train.shards[0])
    spoiled = folder / "spoiled"
    for bit in range(len(data) * 8):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        for offset, size in spans.tolist():
            if offset <= bit // 8 < offset + size:
                message = refusal(
                    records.unframe, bytes(changed[offset : offset + size]), shards.crc32c, f"at {offset}"
                )
                if not message.startswith(f"at {offset}: "):
                    missed.append(bit)
        if bit % 97 == 0:  # the same through the file
            spoiled.write_bytes(changed)
            with pytest.raises(RecordError, match=r"spoiled: record \d+ at byte \d+"):
                list(shards.read_frames(spoiled))
    assert not missed
    assert len(data) > 800


def test_a_flipped_bit_is_reported_by_the_command(folder, capsys):
    assert verify_records.main([str(folder), "--workers", "1"]) == 0
    path = folder / "train-00001.tfrecord"
    spans = manifests.open_index(folder, manifests.load_manifest(folder).train.shards[1])
    data = bytearray(path.read_bytes())
    data[int(spans[2, 0]) + 100] ^= 4
    path.write_bytes(data)
    capsys.readouterr()
    assert verify_records.main([str(folder), "--workers", "1"]) == 1
    said = capsys.readouterr().err
    assert f"train-00001.tfrecord: record 2 at byte {spans[2, 0]}" in said
    assert "checksum" in said


def edit(folder, change):
    path = folder / manifests.MANIFEST
    tree = json.loads(path.read_bytes())
    change(tree)
    path.write_text(json.dumps(tree))


def rewrite(folder, name, payloads):
    """Replaces a shard with other, sound frames, hashes and all."""
    from tests.datasets import write_shard

    made = write_shard(folder, name, payloads).model_dump()
    edit(folder, lambda tree: tree["train"]["shards"].__setitem__(0, made))


def payloads_of(folder, name):
    return [payload for _, payload in shards.read_frames(folder / name)]


FIRST = "train-00000.tfrecord"
DAMAGE = {
    "truncated": (lambda f: (f / FIRST).write_bytes((f / FIRST).read_bytes()[:-5]), "cut short"),
    "longer": (lambda f: (f / FIRST).write_bytes((f / FIRST).read_bytes() + b"x"), "bytes, the manifest says"),
    "missing": (lambda f: (f / FIRST).unlink(), "missing"),
    "extra": (lambda f: shutil.copy(f / FIRST, f / "train-00007.tfrecord"), "does not list"),
    "no index": (lambda f: (f / "train-00000.idx").unlink(), r"train-00000\.idx: missing"),
    "another index": (lambda f: shutil.copy(f / "train-00001.idx", f / "train-00000.idx"), "hash is not"),
    "a link": (
        lambda f: ((f / FIRST).rename(f / "x"), (f / FIRST).symlink_to(f / "x")),
        "not a plain file",
    ),
    "other version": (lambda f: edit(f, lambda t: t.update(schema_version=3)), "version 1 or 2, got .* version 3"),
    "other schema": (lambda f: edit(f, lambda t: t.update(schema="tiles")), "expected schema 'geokr-records'"),
    "path up": (lambda f: edit(f, lambda t: t["train"]["shards"][0].update(name="../../etc/x.tfrecord")), "name"),
    "absolute": (lambda f: edit(f, lambda t: t["train"]["shards"][0].update(name="/train-00000.tfrecord")), "name"),
    "newline": (lambda f: edit(f, lambda t: t["train"]["shards"][0].update(name=FIRST + "\n")), "name"),
    "count": (lambda f: edit(f, lambda t: t["train"]["shards"][0].update(records=5)), "sum over its shards"),
    "negative": (lambda f: edit(f, lambda t: t["train"]["shards"][0].update(records=-1)), "greater than 0"),
    "unknown key": (lambda f: edit(f, lambda t: t.update(more=1)), "more"),
    "not a number": (lambda f: edit(f, lambda t: t["train"].update(mean=[float("nan")] * 3)), "do not fit"),
    "priors": (lambda f: edit(f, lambda t: t["train"].update(prior=[1.0])), "do not fit"),
    "leak": (
        lambda f: edit(f, lambda t: t["train"]["shards"].__setitem__(-1, {**t["val"]["shards"][0], "records": 2})),
        "another split",
    ),
    "empty": (lambda f: (f / manifests.MANIFEST).write_bytes(b""), "damaged"),
    "no manifest": (lambda f: (f / manifests.MANIFEST).unlink(), "not a dataset"),
    "same tile twice": (
        lambda f: rewrite(f, FIRST, payloads_of(f, FIRST)[:3] + payloads_of(f, FIRST)[:1]),
        "1 tiles stand in it twice",
    ),
    "reordered": (
        lambda f: (
            hashes := json.loads((f / manifests.MANIFEST).read_bytes())["train"]["shards"][0]["sha256"],
            rewrite(f, FIRST, payloads_of(f, FIRST)[::-1]),
            edit(f, lambda t: t["train"]["shards"][0].update(sha256=hashes)),
        ),
        "replaced or reordered",
    ),
    "no image": (lambda f: rewrite(f, FIRST, [example.encode({"x": b""})] * 4), "not a geokr record"),
    "other tile": (
        lambda f: rewrite(f, FIRST, [records.encode_record(one_record(n, "raw", "uint8", 3)) for n in range(4)]),
        "the manifest says",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_found(folder, case, capsys):
    assert verify_records.main([str(folder), "--workers", "1"]) == 0
    spoil, message = DAMAGE[case]
    spoil(folder)
    problems, _ = verify_records.verify(folder, 1)
    assert any(re.search(message, problem) for problem in problems), problems
    assert verify_records.main([str(folder), "--workers", "1"]) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_verification_in_processes_says_the_same(folder):
    (folder / "train-00001.tfrecord").write_bytes(b"nothing")
    assert verify_records.verify(folder, 2) == verify_records.verify(folder, 1)


def test_no_such_folder(tmp_path):
    with pytest.raises(RecordError, match="there is no such folder"):
        manifests.load_manifest(tmp_path / "nowhere")
    (tmp_path / "begun/.work").mkdir(parents=True)
    with pytest.raises(RecordError, match=r"holds no manifest\.json\. Make one"):  # a run that failed for good
        manifests.load_manifest(tmp_path / "begun")
    (tmp_path / "begun/.work/plan.json").touch()
    with pytest.raises(RecordError, match="unfinished packing run"):
        manifests.load_manifest(tmp_path / "begun")


# ------------------------------------------------------------------------------------------------- fuzzing

json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=5,
)


def leaves(tree, path=()):
    yield path
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from leaves(value, (*path, key))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("fuzz") / "d", tiles=2, val=1, size=8)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_manifest_with_anything_in_place_of_anything(small, tmp_path, data):
    tree = json.loads((small / manifests.MANIFEST).read_bytes())
    path = data.draw(st.sampled_from([p for p in leaves(tree) if p]))
    node = tree
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = data.draw(json_values)
    (tmp_path / manifests.MANIFEST).write_text(json.dumps(tree))
    with contextlib.suppress(RecordError):
        manifest = manifests.load_manifest(tmp_path)
        for name in records.SPLITS:
            for shard in manifest.split(name).shards:
                manifests.open_index(small, shard)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=60))
def test_a_manifest_of_any_bytes(tmp_path, data):
    (tmp_path / manifests.MANIFEST).write_bytes(data)
    with pytest.raises(RecordError):
        manifests.load_manifest(tmp_path)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"schema": ' + "9" * 10_000 + "}", "\ufeff{}", '{"a": 1e999}', "null"]
)
def test_manifests_made_to_hurt(tmp_path, text):
    (tmp_path / manifests.MANIFEST).write_text(text)
    with pytest.raises(RecordError):
        manifests.load_manifest(tmp_path)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_payloads_with_damage_decode_or_raise_record_error(data):
    payload = bytearray(records.encode_record(one_record(0, "raw", "uint8", 1)))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(payload) - 1))
        if data.draw(st.booleans()):
            payload[at] = data.draw(st.integers(0, 255))
        else:
            del payload[at : at + data.draw(st.integers(1, 20))]
    message = refusal(records.decode_record, bytes(payload))
    assert not message or message.startswith("record: ")


ANY_FEATURE = st.one_of(floats, integers, strings, st.just(np.array([np.inf, np.nan], np.float32)))


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(sorted(f for f in records.Record.__slots__)), value=ANY_FEATURE)
def test_features_of_another_kind(name, value):
    whole = dict(example.decode(records.encode_record(one_record(0, "raw", "uint8", 1))))
    whole[name] = value
    try:
        record = records.decode_record(example.encode(whole))
    except RecordError:
        return
    assert isinstance(record.image, bytes)
    assert np.isfinite([*record.transform, *record.lonlat, record.valid_fraction, *record.fractions]).all()


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="0123456789 -\n.x", max_size=40))
def test_an_index_of_any_text(text):
    with contextlib.suppress(RecordError):
        spans = manifests.read_index(text, "here")
        assert spans.shape[1] == 2
        assert (spans[:, 1] >= records.FRAME_OVERHEAD).all()


def test_a_huge_length_allocates_nothing(tmp_path):
    length = struct.pack("<Q", 1 << 60)
    crc = records.mask_crc(shards.crc32c(length))
    (tmp_path / "x").write_bytes(length + struct.pack("<I", crc) + b"abc")
    with pytest.raises(RecordError, match=r"record 0 at byte 0.*beyond the format's limit"):
        list(shards.read_frames(tmp_path / "x"))
