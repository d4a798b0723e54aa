"""Where tasks run: in the caller, in processes, on a Dask cluster; what happens when a worker dies."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from geokr.manifests import MANIFEST
from preprocess import engine
from preprocess.engine import InCaller, ProcessPool, WorkerLost, open_engine
from preprocess.workfolder import PackError
from tests.scenes import NO_QUALITY, contents, noise, pack_quietly, patches, write_raster

ROOT = Path(__file__).parents[1]
KEYS = (
    *NO_QUALITY, "tile.size=32", "tile.step=24", "tile.bands=[1,2,3]", "tile.codec=raw", "shards.records=16",
    "split.val_fraction=0.3", "split.block_m=2000", "seed=5",
)  # fmt: skip


def square(number):
    return number * number


def pid_of(number):
    return os.getpid()


def die(task):
    """Kills its process as often as the task says, counted in files."""
    folder, name, times = task
    for attempt in range(times):
        mark = Path(folder) / f"{name}-{attempt}"
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    return name


def fail(number):
    if number == 3:
        raise ValueError("three")
    return number


def test_in_the_caller():
    with InCaller() as runs:
        assert list(runs.run_all(square, range(5), str)) == [0, 1, 4, 9, 16]
    assert isinstance(open_engine(0), InCaller)


def test_nothing_to_do_starts_nothing():
    with ProcessPool(4) as runs:
        assert list(runs.run_all(square, [], str)) == []
        assert runs.pool is None


def test_one_pool_serves_all_phases_and_ends_with_them():
    with ProcessPool(1) as runs:
        first, second = (set(runs.run_all(pid_of, range(3), str)) for _ in range(2))
        assert first == second
        assert os.getpid() not in first
    with pytest.raises(ProcessLookupError):
        os.kill(first.pop(), 0)


MAIN = """
import os, sys
SEEN = [os.environ.get(name) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")]  # as NumPy does when imported
from preprocess.engine import ProcessPool

def seen(_):
    return SEEN

if __name__ == "__main__":
    with ProcessPool(1) as runs:
        assert list(runs.run_all(seen, [0], str)) == [["1", "1"]]
    assert os.environ.get("OPENBLAS_NUM_THREADS") == "7" and "OMP_NUM_THREADS" not in os.environ
"""


def test_libraries_of_a_worker_start_no_threads(tmp_path):
    """Told in time: a worker imports them with the caller's main module, first of all."""
    (tmp_path / "main.py").write_text(MAIN)
    given = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    given |= {"OPENBLAS_NUM_THREADS": "7", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, tmp_path / "main.py"], env=given, check=True, timeout=120)


def test_a_worker_that_dies_once_is_replaced(tmp_path):
    tasks = [(str(tmp_path), f"t{n}", 1 if n in (2, 5) else 0) for n in range(8)]
    with ProcessPool(1) as runs:
        assert sorted(runs.run_all(die, tasks, lambda t: t[1])) == [f"t{n}" for n in range(8)]


def test_a_task_that_kills_its_worker_twice_is_named(tmp_path):
    tasks = [(str(tmp_path), f"t{n}", 9 if n == 1 else 0) for n in range(4)]
    with ProcessPool(1) as runs, pytest.raises(WorkerLost, match=r"died twice.* while it worked on t1:.*workers=1"):
        list(runs.run_all(die, tasks, lambda t: t[1]))


def test_an_error_in_a_worker_is_the_callers():
    found = []
    with ProcessPool(1) as runs, pytest.raises(ValueError, match="three"):
        found.extend(runs.run_all(fail, range(8), str))


def test_workers_by_default_are_the_cores():
    assert 1 <= engine.default_workers() <= (os.cpu_count() or 1)


# ------------------------------------------------------------------------------------------------- a Dask cluster


class Cluster:
    """A scheduler and two workers, processes of their own as on a cluster."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "scheduler.json"
        common = {**os.environ, "DASK_DISTRIBUTED__WORKER__DAEMON": "True", "PYTHONPATH": str(ROOT)}
        start = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--no-dashboard", "--host", "127.0.0.1"]
        worker = [sys.executable, "-m", "distributed.cli.dask_worker", "--nthreads", "1", "--nworkers", "1"]
        worker += ["--no-dashboard", "--local-directory", str(folder), "--scheduler-file", str(self.file)]
        log = open(folder / "log", "w")  # noqa: SIM115 - closed with the processes
        self.processes = [
            subprocess.Popen(command, cwd=folder, env=common, stdout=log, stderr=log)
            for command in ([*start, "--port", "0", "--scheduler-file", str(self.file)], worker, worker)
        ]
        log.close()

    def client(self):
        from distributed import Client

        deadline = time.monotonic() + 60
        while not self.file.exists():
            assert time.monotonic() < deadline, (self.file.parent / "log").read_text()
            time.sleep(0.1)
        client = Client(scheduler_file=str(self.file), timeout=60, set_as_default=False)
        client.wait_for_workers(2, timeout=60)
        return client

    def stop(self) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    pytest.importorskip("distributed")
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        made.client().close()
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    pixels = noise(1, (4, 400, 420), "uint16", 1, 4000)
    cover = patches(3, 500, 500, [10, 20, 30, 50, 80], 5)
    return (
        write_raster(folder / "a.tif", pixels, (30, 0, 4e5, 0, -30, 5.2e6)),
        write_raster(folder / "cover.tif", cover, (30, 0, 399000, 0, -30, 5201000)),
    )


def arguments(scene, out, *more):
    return [
        "--scenes", str(scene[0]), "--land-cover", str(scene[1]), "--product", "worldcover", "--out", str(out),
        *KEYS, *more,
    ]  # fmt: skip


def test_a_cluster_packs_the_same_bytes(cluster, scene, tmp_path):
    from preprocess import pack_records

    pack_quietly([scene[0]], [scene[1]], "worldcover", tmp_path / "here", *KEYS, "workers=0")
    assert pack_records.main(arguments(scene, tmp_path / "there", "--scheduler", str(cluster.file))) == 0
    assert contents(tmp_path / "there")[MANIFEST] == contents(tmp_path / "here")[MANIFEST]
    shards = {name: data for name, data in contents(tmp_path / "here").items() if name.endswith((".tfrecord", ".idx"))}
    assert shards.items() <= contents(tmp_path / "there").items()


def test_an_error_on_a_worker_is_the_callers_and_what_waits_is_called_off(cluster, tmp_path):
    from preprocess.dask_engine import DaskCluster

    with DaskCluster(str(cluster.file), tmp_path, []) as runs:
        with pytest.raises(ValueError, match="three"):
            list(runs.run_all(fail, range(40), str))
        assert sorted(runs.run_all(square, range(4), str)) == [0, 1, 4, 9]


def test_workers_that_do_not_see_the_folder_are_an_error(cluster, tmp_path, monkeypatch):
    from preprocess import dask_engine

    real = dask_engine._look
    monkeypatch.setattr(dask_engine, "_look", Elsewhere(real))
    with pytest.raises(PackError, match=r"does not see --out .*share"):
        dask_engine.DaskCluster(str(cluster.file), tmp_path, [])


class Elsewhere:
    """A look from a machine that has another disk."""

    def __init__(self, real) -> None:
        self.real = real

    def __call__(self, token, inputs):
        return self.real(token + "-of-another-disk", inputs)


def test_another_version_and_missing_inputs_are_named(tmp_path):
    from preprocess.dask_engine import _fault, _look

    (tmp_path / "token").touch()
    here = _look(str(tmp_path / "token"), [])
    seen = _look(str(tmp_path / "token"), [str(tmp_path / "no.tif")])
    assert "cannot read" in _fault(seen, here, tmp_path)
    assert "no.tif" in _fault(seen, here, tmp_path)
    assert _fault(here, here, tmp_path) == ""
    assert "geokr 0.0.1" in _fault({**here, "version": "0.0.1"}, here, tmp_path)
    assert "Python 3.8" in _fault({**here, "python": "3.8"}, here, tmp_path)
    assert "other code" in _fault({**here, "code": "1"}, here, tmp_path)
    assert "numpy 1.0" in _fault({**here, "libraries": {**here["libraries"], "numpy": "1.0"}}, here, tmp_path)
    assert "cannot run geokr" in _fault(ModuleNotFoundError("geokr"), here, tmp_path)


def test_a_worker_that_joins_later_is_asked_before_its_first_task(tmp_path):
    from preprocess.dask_engine import Look, _look, _Looking

    token = tmp_path / "token"
    look = Look(str(token), (), _look(str(token), []), tmp_path)
    with pytest.raises(PackError, match="does not see --out"):
        _Looking(square, look)(3)
    token.touch()
    assert _Looking(square, look)(3) == 9


def exhaust(task):
    """Runs out of memory as often as the task says, counted in files."""
    folder, name, times = task
    for attempt in range(times):
        mark = Path(folder) / f"{name}-{attempt}"
        if not mark.exists():
            mark.touch()
            raise MemoryError
    return name


@pytest.mark.parametrize("opened", [ProcessPool, InCaller])
def test_no_memory_left(tmp_path, opened):
    """Given again once where others may have taken it; then an error that names the task."""
    tasks = [(str(tmp_path), f"t{n}", 9 if n == 2 else 0) for n in range(4)]
    with opened(*([1] if opened is ProcessPool else [])) as runs, pytest.raises(WorkerLost, match=r"memory.*t2"):
        list(runs.run_all(exhaust, tasks, lambda t: t[1]))
    assert (tmp_path / "t2-1").exists() == (opened is ProcessPool)
    if opened is ProcessPool:
        once = [(str(tmp_path), f"o{n}", n % 2) for n in range(4)]
        with ProcessPool(1) as runs:
            assert sorted(runs.run_all(exhaust, once, lambda t: t[1])) == ["o0", "o1", "o2", "o3"]


def test_neighbours_of_a_task_that_kills_are_not_blamed(tmp_path):
    """Two tasks that each kill one worker, in flight together: the deaths of one do not count for the other."""
    tasks = [(str(tmp_path), f"t{n}", 1) for n in range(2)]
    with ProcessPool(1) as runs:
        assert sorted(runs.run_all(die, tasks, lambda t: t[1])) == ["t0", "t1"]


def test_no_scheduler_answers(tmp_path, monkeypatch):
    from preprocess import dask_engine

    monkeypatch.setattr(dask_engine, "CONNECT_S", 1)
    with pytest.raises(PackError, match="no Dask scheduler answers there"):
        dask_engine.DaskCluster("tcp://127.0.0.1:1", tmp_path, [])
