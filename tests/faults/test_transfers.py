"""Row 49: an object store that fails at random, read by several processes' worth of readers over one small cache."""

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

pytest.importorskip("aiohttp", reason="aiohttp (extra `remote`) is not installed")

from geokr.options import DataOptions
from pipelines import remote
from pipelines.dataset import Dataset, open_records
from pipelines.order import Order
from pipelines.reader import Reader
from tests.datasets import make_dataset
from tests.faulty_server import serving

KINDS = ["500", "503", "429", "reset", "short", "cut", "wrong"]
ROUNDS, READERS, SHARE = 40, 3, 0.2


def schedule(rng: np.random.Generator, kinds: list[str], name: str) -> list[str]:
    """What happens to a file's next requests; a manifest that comes wrong is another one, so it comes right."""
    sick = rng.random(1 + int(rng.integers(40))) < SHARE
    return [str(rng.choice(kinds)) if one and name != "manifest.json" else "" for one in sick]


@pytest.mark.slow
def test_readers_over_storage_that_fails_at_random(tally, tmp_path, monkeypatch):
    """Every fifth answer is none; room for six of nine shards; the bytes of the folder in every read."""
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.01)
    folder = make_dataset(tmp_path / "data", tiles=60, val=3, size=16, shard_records=7)
    plain = Dataset.open(folder)
    reads = [Order(plain.train.shard_records, 3).take(start, 4)[0] for start in range(0, 180, 4)]
    reader = Reader(plain, plain.train, threads=1, timeout_s=20)
    expected = [[image.tobytes() for image in reader.read(ids).images] for ids in reads]
    reader.close()
    room = 6 * max(path.stat().st_size for path in folder.glob("train*.tfrecord")) / 1e9

    def read_all(url: str, cache: str) -> int:
        data = DataOptions(records=url, cache_dir=cache, cache_gb=room, read_timeout_s=20.0)
        dataset = open_records(data)
        one = Reader(dataset, dataset.train, threads=2, timeout_s=20.0, upcoming=reads, ahead=12)
        got = [[image.tobytes() for image in one.read(ids).images] for ids in reads]
        one.close()
        return sum(a != b for a, b in zip(got, expected, strict=True))

    injected: Counter[str] = Counter()
    begin = time.monotonic()
    with serving(folder) as server, ThreadPoolExecutor(READERS) as pool:
        for number in range(ROUNDS):
            rng, kinds = np.random.default_rng(number), KINDS + ["stall"] * (number % 8 == 0)
            planned = {path.name: schedule(rng, kinds, path.name) for path in sorted(folder.iterdir())}
            server.faults = {name: list(faults) for name, faults in planned.items()}
            cache = str(tmp_path / f"cache{number}")
            waiting = [pool.submit(read_all, server.url, cache) for _ in range(READERS)]
            assert [one.result(timeout=300) for one in waiting] == [0] * READERS
            for name, faults in planned.items():
                injected.update(fault for fault in faults[: len(faults) - len(server.faults[name])] if fault)
    for kind, count in injected.items():
        tally.inject(49, f"answer of the store: {kind}", count)
    print(f"{ROUNDS} rounds of {READERS} readers, {injected.total()} faults: {time.monotonic() - begin:.0f} s")
    assert injected.total() > 100
