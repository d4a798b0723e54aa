"""Workers of a Dask cluster die while they pack (row 9): killed outright, and by Dask's own chaos."""

import contextlib
import os
import signal
import threading
import time

import pytest

from geokr import manifests
from tests.faults.packing import files, seeded
from tests.scenes import NO_QUALITY, noise, pack_quietly, patches, write_raster
from tests.test_preprocess_engine import Cluster

pytest.importorskip("distributed")

KEYS = (
    *NO_QUALITY, "tile.size=32", "tile.step=16", "tile.codec=raw", "shards.records=32", "split.val_fraction=0.3",
    "split.block_m=2000", "seed=5", "workers=0",
)  # fmt: skip


@pytest.fixture
def cluster(tmp_path_factory):
    """A scheduler and two workers under nannies, which start a dead one again. One for each test: a plugin of Dask's
    goes on killing, and nannies do not follow a worker that ended by itself."""
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        made.client().close()
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    scenes = [
        write_raster(folder / f"s{n}.tif", noise(n, (3, 400, 420), "uint16", 1, 4000), (30, 0, x, 0, -30, 5.2e6))
        for n, x in enumerate((4e5, 405000, 410000, 415000))
    ]
    cover = write_raster(
        folder / "cover.tif", patches(3, 500, 1000, [10, 20, 30, 50, 80], 5), (30, 0, 399000, 0, -30, 5201000)
    )
    pack_quietly(scenes, [cover], "worldcover", folder / "here", *KEYS)
    return scenes, cover, files(folder / "here")


def pack(cluster, world, out):
    """On the cluster, in this process."""
    from preprocess.dask_engine import DaskCluster

    scenes, cover, _ = world
    every = [str(path) for path in (*scenes, cover)]
    return pack_quietly(
        scenes, [cover], "worldcover", out, *KEYS,
        open_engine=lambda: DaskCluster(str(cluster.file), out, every),
    )  # fmt: skip


def tries(cluster, world, out, most=5):
    """The same command again where the run gives up, as it may when one task has lost two workers. Whether it ended."""
    from preprocess.engine import WorkerLost
    from preprocess.workfolder import PackError

    for _ in range(most):
        with contextlib.suppress(WorkerLost, PackError):
            pack(cluster, world, out)
            return True
    return False


def pack_to_the_end(cluster, world, out, packing):
    assert tries(cluster, world, out)
    packing.resumed(files(out) == world[2])


@pytest.mark.slow
def test_workers_killed(cluster, world, tmp_path, packing):
    rng, done = seeded("cluster"), threading.Event()

    def killer():
        with cluster.client() as client:
            while not done.wait(rng.uniform(0.5, 3)):
                if len(client.nthreads()) < 2:
                    continue  # the last one's successor is still starting
                pids = list(client.run(os.getpid, on_error="ignore").values())
                if pids:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(rng.choice(pids), signal.SIGKILL)
                        packing.inject(9, "SIGKILL of a cluster's worker")

    thread = threading.Thread(target=killer)
    thread.start()
    try:
        begin, number = time.monotonic(), 0
        while time.monotonic() - begin < 60:
            pack_to_the_end(cluster, world, tmp_path / f"out{number}", packing)
            number += 1
    finally:
        done.set()
        thread.join()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sys.exit", "segfault"])
def test_dasks_own_chaos(cluster, world, tmp_path, packing, mode):
    from distributed.chaos import KillWorker

    with cluster.client() as client:
        client.register_plugin(KillWorker(delay="20 s", mode=mode), name=f"chaos {mode}")
        begin = time.monotonic()
        number = 0
        whole = True
        while whole and time.monotonic() - begin < 40:
            out = tmp_path / f"out{number}"
            whole = tries(cluster, world, out)
            packing.inject(9, f"a run under distributed.chaos.KillWorker, {mode}")
            if not whole:  # nannies do not follow a worker that ended by itself: another cluster goes on
                (tmp_path / "other").mkdir()
                other = Cluster(tmp_path / "other")
                try:
                    assert tries(other, world, out)
                finally:
                    other.stop()
            packing.resumed(files(out) == world[2])
            number += 1
        with contextlib.suppress(Exception):
            client.unregister_worker_plugin(f"chaos {mode}")


@pytest.mark.slow
def test_all_workers_go_and_others_come(cluster, world, tmp_path, packing):
    """Both at once, in the middle; the nannies start others, and the run waits for them."""
    out = tmp_path / "out"
    thread = threading.Thread(target=pack_to_the_end, args=(cluster, world, out, packing))
    thread.start()
    while not list(out.glob(".work/run-*/spill/*.json")) and thread.is_alive():
        time.sleep(0.01)
    with cluster.client() as client:
        for pid in client.run(os.getpid, on_error="ignore").values():
            os.kill(pid, signal.SIGKILL)
            packing.inject(9, "SIGKILL of all of a cluster's workers")
    thread.join(120)
    assert not thread.is_alive()
    assert (out / manifests.MANIFEST).exists()
