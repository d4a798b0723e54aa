"""Datasets behind URLs: the same batches as from a folder whatever the storage does, or an error that names it."""

import errno
import gc
import hashlib
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

fsspec = pytest.importorskip("fsspec")
pytest.importorskip("aiohttp", reason="aiohttp (extra `remote`) is not installed")

from geokr import manifests, pretrain  # noqa: E402
from geokr.checkpoint import load_latest  # noqa: E402
from geokr.metrics import read_metrics  # noqa: E402
from geokr.options import AugmentOptions, DataOptions, RecordsSource  # noqa: E402
from geokr.records import RecordError  # noqa: E402
from pipelines import remote  # noqa: E402
from pipelines.cache import Cache, FileLock, default_root, lock_path  # noqa: E402
from pipelines.dataset import Dataset, open_records  # noqa: E402
from pipelines.errors import PipelineError, ReadTimeoutError, TransferError  # noqa: E402
from pipelines.loaders import train_batches, val_batches  # noqa: E402
from pipelines.order import Order  # noqa: E402
from pipelines.reader import Reader  # noqa: E402
from tests.datasets import make_dataset  # noqa: E402
from tests.faulty_server import serving  # noqa: E402

ROOT = Path(__file__).parents[1]
TRANSIENT = ["500", "503", "429", "reset", "short", "cut", "wrong", "stall"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("remote") / "data", tiles=60, val=9, size=16, shard_records=7)


@pytest.fixture
def server(folder):
    with serving(folder) as server:
        yield server


@pytest.fixture(autouse=True)
def _quick_and_clean(monkeypatch):
    """Short waits between attempts; afterwards no thread of ours is left."""
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr("pipelines.threads._JOIN_S", 1.0)
    yield
    if ours():
        gc.collect()
    deadline = time.monotonic() + 5
    while ours() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not ours()


def ours():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("geokr-")]


@pytest.fixture
def options(server, tmp_path):
    def make(**changes):
        given = {
            "records": server.url, "cache_dir": str(tmp_path / "cache"), "loader": "torch", "global_batch": 8,
            "threads": 1, "read_timeout_s": 20.0,
        }  # fmt: skip
        return DataOptions(**given | changes)

    return make


def first(data, count, **arguments):
    dataset = open_records(data)
    with train_batches(dataset, data, AugmentOptions(), **{"seed": 3, **arguments}) as loader:
        return [next(loader) for _ in range(count)]


def same(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert (batch.record_ids == other.record_ids).all()
        assert torch.equal(batch.images, other.images)
        assert torch.equal(batch.fractions, other.fractions)


@pytest.fixture(scope="module")
def local(folder):
    return first(DataOptions(records=str(folder), loader="torch", global_batch=8, threads=1), 10)


def cached(tmp_path, pattern="*.tfrecord"):
    return sorted(path for path in (tmp_path / "cache").glob(f"*/{pattern}"))


# ------------------------------------------------------------------------------------------- equality


def test_batches_are_those_of_the_folder_and_the_copies_stay(options, server, local, folder, tmp_path):
    same(first(options(), 10), local)
    assert sorted(server.shards()) == sorted(path.name for path in folder.glob("train*.tfrecord"))
    assert all(path.read_bytes() == (folder / path.name).read_bytes() for path in cached(tmp_path))
    assert not [path for path in cached(tmp_path, "*") if path.suffix in (".part", ".claim")]
    server.requests.clear()
    same(first(options(), 10), local)
    assert server.requests == ["manifest.json"]


def test_validation_comes_too(options, folder):
    for data in (options(), options(records=str(folder))):
        with val_batches(open_records(data), data, batch=4) as loader:
            batches = list(loader)
        assert [batch.record_ids.tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 8, 8, 8]]


def test_a_mixture_of_a_url_and_a_folder(options, tmp_path, folder, server):
    other = make_dataset(tmp_path / "other", tiles=20, val=2, size=16, seed=1)
    near = options(records=[{"path": str(folder), "weight": 2}, {"path": str(other), "weight": 1}])
    far = options(records=[{"path": server.url, "weight": 2}, {"path": str(other), "weight": 1}])
    same(first(far, 12), first(near, 12))


def test_a_reader_without_a_plan_fetches_what_it_is_asked_for(options, folder, server):
    dataset, plain = open_records(options()), Dataset.open(folder)
    reader, other = (Reader(data, data.train, threads=2, timeout_s=20) for data in (dataset, plain))
    got, expected = (r.read(np.array([8, 50, 9])) for r in (reader, other))
    assert [image.tobytes() for image in got.images] == [image.tobytes() for image in expected.images]
    assert sorted(server.shards()) == ["train-00001.tfrecord", "train-00007.tfrecord"]
    reader.close()
    other.close()


def test_a_folder_costs_nothing(folder):
    dataset = Dataset.open(folder)
    reader = Reader(dataset, dataset.train, threads=1, timeout_s=5)
    assert reader._stager is None
    reader.close()


# --------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("fault", TRANSIENT)
def test_storage_that_fails_now_and_then_changes_nothing(fault, options, server, local):
    """Every file fails twice; a stalled transfer is given up and begun anew."""
    names = [path.name for path in server.folder.iterdir() if not (fault in ("cut", "wrong") and "mani" in path.name)]
    server.faults = {name: [fault, fault] for name in names[:: 4 if fault == "stall" else 1]}
    server.faults |= {"train-00003.tfrecord": [fault, fault]}
    same(first(options(read_timeout_s=2.0 if fault == "stall" else 20.0), 10), local)
    assert server.requests.count("train-00003.tfrecord") == 3


@pytest.mark.parametrize(
    ("fault", "error", "attempts", "message"),
    [
        ("500", TransferError, 6, r"HTTP status 500 \(6 attempts\): check the storage"),
        ("reset", TransferError, 6, r"\(6 attempts\): check the storage"),
        ("short", TransferError, 6, r"\(6 attempts\): check the storage"),
        ("cut", TransferError, 6, r"\d+ bytes came, the manifest says \d+ \(6 attempts\): upload the folder again"),
        ("wrong", TransferError, 6, r"\(SHA-256\) \(6 attempts\): upload the folder again"),
        ("404", TransferError, 1, r"there is no such file: data\.records must be the URL of the folder"),
        ("403", TransferError, 1, r"HTTP status 403: check the credentials"),
        ("stall", ReadTimeoutError, 4, r"no answer from storage for 1 s while it was fetched to .*read_timeout_s is 1"),
    ],
)
def test_storage_that_fails_for_good_is_named(fault, error, attempts, message, options, server):
    server.faults = {"train-00004.tfrecord": fault}
    started = time.monotonic()
    with pytest.raises(error, match=rf"^{server.url}/train-00004\.tfrecord.*" + message):
        first(options(read_timeout_s=1.0 if fault == "stall" else 20.0), 10)
    assert time.monotonic() - started < 10
    assert server.requests.count("train-00004.tfrecord") <= 2 * attempts  # ahead of its need, and then


@pytest.mark.parametrize("name", ["manifest.json", "train-00002.idx"])
def test_opening_names_what_does_not_come(name, options, server):
    server.faults = {name: "503"}
    with pytest.raises(TransferError, match=rf"{server.url}/{name}: HTTP status 503 \(6 attempts\)"):
        open_records(options())
    server.faults = {name: "404"}
    with pytest.raises(TransferError, match=rf"{server.url}/{name}: there is no such file"):
        open_records(options())


def test_no_server_at_all(tmp_path):
    started = time.monotonic()
    with pytest.raises(TransferError, match=r"^http://127\.0\.0\.1:1/d/manifest\.json: .*\(6 attempts\)"):
        open_records(DataOptions(records="http://127.0.0.1:1/d", cache_dir=str(tmp_path)))
    assert time.monotonic() - started < 10


def test_a_failure_waits_for_the_batch_that_needs_it(options, server, folder, local):
    """What a run saw before it stopped does not depend on how far ahead shards are fetched."""
    split = Dataset.open(folder).train
    ids, _ = Order(split.shard_records, 3).take(0, 60)
    shards = split.shard_of(ids)
    bad = max(range(9), key=lambda shard: int(np.flatnonzero(shards == shard)[0]))
    before = int(np.flatnonzero(shards == bad)[0]) // 8
    server.faults = {f"train-{bad:05d}.tfrecord": "404"}
    data = options()
    with train_batches(open_records(data), data, AugmentOptions(), seed=3) as loader:
        same([next(loader) for _ in range(before)], local[:before])
        with pytest.raises(TransferError, match=f"train-{bad:05d}"):
            next(loader)


def test_storage_that_was_away_while_nobody_needed_it(options, tmp_path):
    """An outage during the look-ahead is over when its shard's turn comes."""
    singles = make_dataset(tmp_path / "data", tiles=60, val=0, size=8, shard_records=1)
    late = int(Order([1] * 60, 3).take(59, 1)[0][0])
    name = f"train-{late:05d}.tfrecord"
    with serving(singles) as other:
        other.faults = {name: ["500"] * 6}
        data = options(records=other.url, global_batch=4, prefetch=1)
        with train_batches(open_records(data), data, AugmentOptions(), seed=3) as loader:
            deadline = time.monotonic() + 20
            while other.requests.count(name) < 6 and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.1)
            got = [next(loader) for _ in range(15)]
        assert other.requests.count(name) == 7
    same(got, first(options(records=str(singles), global_batch=4), 15))


def test_a_full_disk_is_not_tried_again(options, monkeypatch):
    def full(*_):
        calls.append(1)
        raise OSError(errno.ENOSPC, "No space left on device")

    calls: list[int] = []
    monkeypatch.setattr(remote.Store, "_transfer", full)
    with pytest.raises(TransferError, match=r"No space left on device: make room, set data\.cache_gb"):
        open_records(options())
    assert len(calls) == 1


def test_a_cache_that_cannot_be_written(options, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TransferError, match=r"^data\.cache_dir=.*file/cache cannot be written"):
        open_records(options(cache_dir=str(tmp_path / "file" / "cache")))


def test_closing_does_not_wait_for_transfers(options, server):
    server.faults = {"*": "stall", "manifest.json": []} | {path.name: [] for path in server.folder.glob("*.idx")}
    data = options()
    loader = train_batches(open_records(data), data, AugmentOptions(), seed=3)
    deadline = time.monotonic() + 5
    while not server.shards() and time.monotonic() < deadline:
        time.sleep(0.01)
    started = time.monotonic()
    loader.close()
    assert time.monotonic() - started < 2
    assert not ours()


# ---------------------------------------------------------------------------------------- order, shares


def test_shards_come_in_the_order_in_which_they_are_needed(options, server, folder, monkeypatch):
    monkeypatch.setattr("pipelines.staging.TRANSFERS", 1)
    first(options(), 10)
    split = Dataset.open(folder).train
    ids, _ = Order(split.shard_records, 3).take(0, 60)
    batches = [np.unique(split.shard_of(ids[at : at + 8])) for at in range(0, 60, 8)]
    expected = list(dict.fromkeys(f"train-{shard:05d}.tfrecord" for batch in batches for shard in batch))
    assert server.shards() == expected


def test_no_further_ahead_than_it_should(options, server, tmp_path, monkeypatch):
    """Shards of one record: at most the batches in the window, those read ahead and the next one."""
    singles = make_dataset(tmp_path / "data", tiles=60, val=0, size=8, shard_records=1)
    monkeypatch.setattr("pipelines.loaders._STAGE_AHEAD", 3 * 4)
    with serving(singles) as other:
        data = options(records=other.url, global_batch=4, prefetch=1)
        with train_batches(open_records(data), data, AugmentOptions(), seed=3) as loader:
            next(loader)
            time.sleep(0.4)
            assert 5 * 4 <= len(other.shards()) <= 8 * 4


def test_a_rank_fetches_the_shards_of_its_own_samples(options, server, folder, monkeypatch):
    monkeypatch.setattr("pipelines.loaders._STAGE_AHEAD", 8)
    split = Dataset.open(folder).train
    batches = first(options(), 2, rank=5, world_size=8)
    assert all(len(batch.record_ids) == 1 for batch in batches)
    stream = Order(split.shard_records, 3).take(0, 80)[0][5::8]
    allowed = {f"train-{shard:05d}.tfrecord" for shard in split.shard_of(stream)}
    assert len(server.shards()) < 9
    assert set(server.shards()) <= allowed


# ------------------------------------------------------------------------------------- several processes

SCRIPT = """
import sys, hashlib
from geokr.options import DataOptions
from pipelines.dataset import open_records
from pipelines.order import Order
from pipelines.reader import Reader
split = (dataset := open_records(DataOptions(records=sys.argv[1], cache_dir=sys.argv[2]))).train
reads = [Order(split.shard_records, 3).take(start, 8)[0] for start in range(0, 80, 8)]
reader = Reader(dataset, split, threads=2, timeout_s=60, upcoming=reads, ahead=10)
digest = hashlib.sha256()
for ids in reads:
    for image in reader.read(ids).images:
        digest.update(image)
print(digest.hexdigest())
"""


def process(server, tmp_path):
    command = [sys.executable, "-c", SCRIPT, server.url, str(tmp_path / "cache")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_processes_share_what_they_fetch(server, tmp_path):
    both = [process(server, tmp_path) for _ in range(2)]
    answers = {one.communicate(timeout=120)[0] for one in both}
    assert [one.returncode for one in both] == [0, 0]
    assert len(answers) == 1
    assert len(server.shards()) == len(set(server.shards())) == 9
    assert all(server.requests.count(path.name) == 1 for path in server.folder.glob("*.idx"))


def test_a_process_killed_while_it_fetches_leaves_no_lock(options, server, tmp_path, local):
    server.faults = {f"train-{shard:05d}.tfrecord": ["stall"] for shard in range(9)}
    dying = process(server, tmp_path)
    deadline = time.monotonic() + 60
    while len(cached(tmp_path, "*.tfrecord.part")) < 4 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(dying.pid, signal.SIGKILL)
    dying.communicate()
    assert len(cached(tmp_path, "*.tfrecord.part")) == len(cached(tmp_path, "*.claim")) == 4
    server.faults.clear()
    same(first(options(cache_gb=1.0), 10), local)
    assert not cached(tmp_path, "*.part")
    assert not cached(tmp_path, "*.claim")


def test_a_process_that_holds_a_shard_and_does_not_move_is_named(options, tmp_path, folder, local):
    """As one that is stopped (SIGSTOP) while it fetches."""
    dataset = open_records(options())
    lock = FileLock(lock_path(dataset.train.path(2)))
    assert lock.alone()
    with pytest.raises(ReadTimeoutError, match=r"train-00002\.tfrecord .*: no answer from storage for 1 s"):
        first(options(read_timeout_s=0.6), 10)
    timer = threading.Timer(0.5, lock.release)
    timer.start()
    same(first(options(), 10), local)


# ----------------------------------------------------------------------------------------- the cache


def bytes_of(folder, count):
    return count * max(path.stat().st_size for path in folder.glob("train*.tfrecord"))


def test_a_small_cache_gives_the_same_batches_within_its_limit(options, server, folder, local, tmp_path, monkeypatch):
    """Room for five of nine shards, of which a batch of two samples needs two at most; two epochs."""
    limit = bytes_of(folder, 5)
    used: list[int] = []

    def measure():
        guard = FileLock(tmp_path / "cache" / "lock")  # nothing is claimed or removed meanwhile
        while not guard.alone():
            time.sleep(0.001)
        claims = {path.name.rsplit(".", 2)[0]: int(path.name.rsplit(".", 2)[1]) for path in cached(tmp_path, "*.claim")}
        here = [path.stat().st_size for path in cached(tmp_path) if path.name not in claims]
        guard.release()
        used.append(sum(claims.values()) + sum(here))

    server.watch = measure
    data = options(cache_gb=limit / 1e9, global_batch=2)
    same(first(data, 60), first(options(records=str(folder), global_batch=2), 60))
    assert limit * 0.7 < max(used) <= limit
    assert len(server.shards()) > 9  # some had to come again


def test_room_for_two_groups_is_enough_to_fetch_each_shard_once(options, tmp_path, monkeypatch):
    """Groups of four shards, room for eight: shards needed later do not take the room of those needed first."""
    monkeypatch.setattr(Order.__init__, "__defaults__", (16,))
    monkeypatch.setattr("pipelines.loaders._STAGE_AHEAD", 64)
    many = make_dataset(tmp_path / "data", tiles=160, val=0, size=8, shard_records=4)
    with serving(many) as other:
        first(options(records=other.url, global_batch=2, cache_gb=bytes_of(many, 8) / 1e9), 80)
        fetched = other.shards()
    assert len(set(fetched)) == 40
    assert len(set(fetched[:40])) >= 39  # those that follow are the next epoch's


def test_the_oldest_go_first_and_held_ones_never(server, tmp_path, folder):
    cache = Cache(tmp_path / "cache", 3_000)
    home = cache.root / "other"
    home.mkdir()
    for number in range(3):
        (home / f"train-{number:05d}.tfrecord").write_bytes(b"x" * 1000)
        os.utime(home / f"train-{number:05d}.tfrecord", (number, number))
    held = FileLock(lock_path(home / "train-00000.tfrecord"))
    assert held.together()
    claim = cache.claim(home / "train-00007.tfrecord", 900, threading.Event())
    assert claim is not None
    assert [path.name for path in sorted(home.glob("*.tfrecord"))] == ["train-00000.tfrecord", "train-00002.tfrecord"]
    alive = FileLock(lock_path(home / "train-00007.tfrecord"))
    assert alive.alone()
    assert cache.claim(home / "train-00008.tfrecord", 1500, threading.Event()) is None  # 1000 held, 900 claimed
    alive.release()
    assert (
        cache.claim(home / "train-00008.tfrecord", 1500, threading.Event()) is not None
    )  # that claim was a dead one's
    held.release()


def test_a_cache_too_small_for_a_batch(options, folder):
    with pytest.raises(PipelineError, match=r"data\.cache_gb=.* is too small: a batch comes from \d shards .*Set data"):
        first(options(cache_gb=bytes_of(folder, 1) / 1e9), 3)


def test_what_others_hold_does_not_stop_a_reader(options, server, folder, local, tmp_path):
    """All of the limit is held by another process: what is needed now comes in spite of it."""
    limit = bytes_of(folder, 8)
    home = tmp_path / "cache" / "other"
    home.mkdir(parents=True)
    (home / "train-00000.tfrecord").write_bytes(b"x" * limit)
    held = FileLock(lock_path(home / "train-00000.tfrecord"))
    assert held.together()
    same(first(options(cache_gb=limit / 1e9), 10), local)
    assert (home / "train-00000.tfrecord").exists()
    held.release()


def test_copies_that_are_not_whole_are_fetched_again(options, server, local, tmp_path):
    first(options(), 10)
    paths = {path.name: path for path in cached(tmp_path)}
    os.truncate(paths["train-00000.tfrecord"], 100)
    outside = tmp_path / "outside"
    outside.write_bytes(paths["train-00001.tfrecord"].read_bytes())
    paths["train-00001.tfrecord"].unlink()
    paths["train-00001.tfrecord"].symlink_to(outside)
    paths["train-00002.tfrecord"].unlink()
    paths["train-00000.tfrecord"].with_name("train-00003.idx").write_text("0 1\n")
    server.requests.clear()
    same(first(options(), 10), local)
    assert sorted(server.shards()) == [f"train-{number:05d}.tfrecord" for number in range(3)]
    assert "train-00003.idx" in server.requests
    assert not paths["train-00001.tfrecord"].is_symlink()


def damage(path):
    """A bit of every record's first bytes, in place: the file keeps its size."""
    data = bytearray(path.read_bytes())
    at = 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        data[at + 12 + 40] ^= 1
        at += 16 + length
    with path.open("r+b") as file:
        file.write(data)


@pytest.mark.parametrize("loader", [{}, {"threads": 4}])
def test_a_damaged_copy_is_fetched_again(loader, options, server, local, tmp_path, caplog):
    first(options(), 10)
    for path in cached(tmp_path)[1:3]:
        damage(path)
    server.requests.clear()
    same(first(options(**loader), 10), local)
    assert sorted(server.shards()) == sorted(path.name for path in cached(tmp_path)[1:3])  # each once
    assert f"{cached(tmp_path)[1].name} (copy: " in caplog.text
    server.requests.clear()
    same(first(options(), 10), local)
    assert not server.shards()


def test_a_copy_damaged_while_it_is_read(options, local, tmp_path, caplog):
    """The reader has the old file open, and goes on with the new one."""
    data = options(prefetch=1)
    with train_batches(open_records(data), data, AugmentOptions(), seed=3) as loader:
        got = [next(loader)]
        for path in cached(tmp_path):
            damage(path)
        got += [next(loader) for _ in range(9)]
        deleted = [name for name in open_files() if "tfrecord" in name and "(deleted)" in name]
    same(got, local)
    assert not deleted  # what it had open would keep the old copies' room on the disk
    again = [record.getMessage() for record in caplog.records if "was fetched again" in record.getMessage()]
    assert len(again) == len({text.split(" (copy: ")[0] for text in again}) > 0  # each once


def open_files():
    return [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if os.path.lexists(link)]


def test_a_damaged_copy_that_other_processes_read(options, server, local, tmp_path):
    """Each of them holds it, and may wait for this one before it lets go."""
    first(options(), 10)
    path = cached(tmp_path)[2]
    damage(path)
    lock = FileLock(lock_path(path))
    assert lock.together()
    server.requests.clear()
    with path.open("rb") as theirs:
        same(first(options(read_timeout_s=2.0), 10), local)
        assert theirs.read() != path.read_bytes()
    assert server.shards() == [path.name]
    lock.release()
    assert not list(path.parent.glob("*.part"))


def test_a_damaged_copy_that_cannot_be_fetched_again(options, server, tmp_path):
    first(options(), 10)
    path = cached(tmp_path)[4]
    damage(path)
    server.faults = {path.name: "404"}
    with pytest.raises(TransferError, match=path.name):
        first(options(), 10)


def test_damage_that_another_copy_has_too_is_named_with_its_url(options, tmp_path):
    """Packed so: the hash is the manifest's."""
    folder = make_dataset(tmp_path / "data", tiles=20, val=4, size=16, shard_records=7)
    path = folder / "train-00001.tfrecord"
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    damage(path)
    manifest = (folder / "manifest.json").read_text()
    after = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(manifest.replace(before, after))
    with serving(folder) as server, pytest.raises(RecordError) as caught:
        first(options(records=server.url), 10)
    (copy,) = cached(tmp_path, path.name)
    assert str(caught.value).startswith(f"{server.url}/{path.name} (copy: {copy}): record ")
    assert server.requests.count(path.name) == 2


def test_a_copy_removed_while_training_is_fetched_again(options, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.reader._OPEN_FILES", 1)
    data = options(prefetch=1)
    with train_batches(open_records(data), data, AugmentOptions(), seed=3) as loader:
        got = [next(loader)]
        for path in cached(tmp_path):
            path.unlink()
        got += [next(loader) for _ in range(9)]
    same(got, first(options(records=str(folder)), 10))


def test_another_dataset_at_the_same_url_gets_a_folder_of_its_own(options, server, tmp_path):
    first(options(), 1)
    other = make_dataset(tmp_path / "other", tiles=20, val=2, size=16, seed=8)
    server.folder = other
    same(first(options(), 5), first(options(records=str(other)), 5))
    assert len(list((tmp_path / "cache").glob("data-*"))) == 2


@pytest.mark.parametrize("name", ["../train-00000.tfrecord", "/etc/train-00000.tfrecord", "a/train-00000.tfrecord"])
def test_names_that_lead_elsewhere_are_refused(name, options, server, tmp_path, folder):
    tree = json.loads((folder / manifests.MANIFEST).read_text())
    tree["train"]["shards"][0]["name"] = name
    server.folder = tmp_path / "served"
    server.folder.mkdir()
    (server.folder / manifests.MANIFEST).write_text(json.dumps(tree))
    with pytest.raises(RecordError, match=rf"{server.url}: .*train\.shards\.0\.name"):
        open_records(options())
    assert server.requests == ["manifest.json"]


def test_where_copies_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_root() == tmp_path / "geokr" / "records"
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setenv("HOME", "/home/nobody")
    assert default_root() == Path("/home/nobody/.cache/geokr/records")


# -------------------------------------------------------------------------------------- URLs and errors


def test_secrets_of_a_url_are_not_shown(options, server, local):
    source = RecordsSource(path="https://user:secret@host:1/a/b?token=secret")
    assert source.shown == "https://host:1/a/b"
    same(first(options(records=server.url + "?token=secret"), 10), local)
    server.faults = {"manifest.json": "403"}
    with pytest.raises(TransferError) as error:
        open_records(options(records=server.url + "?token=secret"))
    assert "secret" not in str(error.value)


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(PipelineError, match=r"data\.records=gs://bucket/d: gs:// needs gcsfs: pip install gcsfs"):
        open_records(DataOptions(records="gs://bucket/d", cache_dir=str(tmp_path)))
    with pytest.raises(PipelineError, match=r"data\.records=nosuch://x/d: .*expected a folder, s3://"):
        open_records(DataOptions(records="nosuch://x/d", cache_dir=str(tmp_path)))


def test_the_launchers_check_looks_at_the_manifest(server, folder):
    from launch.preflight import problem

    assert problem(None, [f"data.records={server.url}", "train.max_steps=1"]) is None
    assert problem(None, [f"data.records=[{server.url}, {folder}]", "train.max_steps=1"]) is None
    assert server.requests == ["manifest.json"] * 2
    server.faults = {"*": "404"}
    assert "there is no such file" in str(problem(None, [f"data.records={server.url}", "train.max_steps=1"]))


# ------------------------------------------------------------------------------------------------- S3


@pytest.fixture(scope="module")
def bucket(folder):
    pytest.importorskip("s3fs", reason="s3fs (extra `remote`) is not installed")
    moto = pytest.importorskip("moto.server", reason="moto's S3 server (extra `dev`) is not installed")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {"endpoint_url": f"http://{host}:{port}", "key": "testing", "secret": "testing"}
    files = fsspec.filesystem("s3", **settings, skip_instance_cache=True)
    files.mkdir("tiles")
    files.put(str(folder), "tiles/europe", recursive=True)
    yield settings
    server.stop()


def test_s3(bucket, options, local, tmp_path, monkeypatch):
    monkeypatch.setitem(fsspec.config.conf, "s3", bucket)
    data = options(records="s3://tiles/europe")
    same(first(data, 10), local)
    assert len(cached(tmp_path)) == 9
    with pytest.raises(TransferError, match=r"s3://tiles/asia/manifest\.json: there is no such file"):
        open_records(options(records="s3://tiles/asia"))


def test_s3_with_its_settings_in_the_environment(bucket):
    """The endpoint as users of other S3-compatible stores give it; the launcher's check needs no torch."""
    names = {"FSSPEC_S3_ENDPOINT_URL": bucket["endpoint_url"]}
    names |= {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}
    for path, status, said in (("europe", 0, ""), ("asia", 1, "s3://tiles/asia/manifest.json: there is no such file")):
        command = [sys.executable, "launch/preflight.py", f"data.records=s3://tiles/{path}", "train.max_steps=1"]
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, **names}, capture_output=True, text=True)
        assert (done.returncode, said in done.stderr) == (status, True), done.stderr


def test_a_run_from_s3_is_a_run_from_the_folder(bucket, folder, tmp_path, monkeypatch):
    """Bit by bit, validation and a resume included."""
    monkeypatch.setitem(fsspec.config.conf, "s3", bucket)
    base = [
        "model.backbone=test_resnet", "data.global_batch=8", "data.loader=torch", "data.threads=1", "train.threads=1",
        "train.precision=fp32", "train.compile=off", "train.device=cpu", "log.panels=0", "log.tensorboard=false",
        f"data.cache_dir={tmp_path / 'cache'}", "optim.schedule=constant", "optim.warmup=0",
        "method.consistency_ramp=0",
    ]  # fmt: skip
    far, near = (f"run.dir={tmp_path / name}" for name in ("far", "near"))
    for steps in (2, 4):
        assert pretrain.main(["data.records=s3://tiles/europe", far, *base, f"train.max_steps={steps}"]) == 0
        assert pretrain.main([f"data.records={folder}", near, *base, f"train.max_steps={steps}"]) == 0
    states = [load_latest(tmp_path / name / "checkpoints") for name in ("far", "near")]
    assert states[0].step == states[1].step == 4
    assert all(torch.equal(states[0].tensors[key], states[1].tensors[key]) for key in states[0].tensors)
    figures = [read_metrics(tmp_path / name / "metrics.jsonl")[-1]["val/kl"] for name in ("far", "near")]
    assert figures[0] == figures[1]
    assert pretrain.main([f"data.records={folder}", far, *base, "train.max_steps=5"]) == 0  # moved, the same run
