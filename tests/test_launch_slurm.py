"""launch/pretrain_slurm.sbatch and launch/node.py, under commands that stand for Slurm's.

The fast tests put a small script in torchrun's place; the slow one trains.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from geokr.checkpoint import list_checkpoints
from geokr.config import parse_overrides, split_overrides
from geokr.manifests import Manifest, check_folder, dump_manifest, load_manifest
from launch import node, stage
from tests.datasets import make_dataset
from tests.test_geokr_distributed import torchrun
from tests.test_geokr_pretrain import keys, same_tensors
from tests.test_launch_lifeline import free_port

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Slurm runs on Linux")

# torch.distributed.run in small: notes what it got; KIND says how its training goes.
TORCHRUN = """
import json, os, signal, sys, time
notes, kind = os.environ["NOTES"], os.environ["KIND"]
names = ("GLOO_SOCKET_IFNAME", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "OMP_NUM_THREADS", "SLURM_NODEID")
with open(notes, "a") as file:
    file.write(json.dumps([sys.argv[1:], {name: os.environ.get(name) for name in names}]) + "\\n")
stop = []
signal.signal(signal.SIGTERM, lambda number, frame: stop.append(number))
open(f"{notes}.up-{os.getpid()}", "w").close()
if kind == "fails" and os.environ["SLURM_NODEID"] == "1":
    sys.exit(1)
if kind == "fails" and "geokr-4242-0-1" in " ".join(sys.argv):
    sys.exit(1)
while kind != "good" and (not stop or kind == "stubborn") and "-1-0" not in " ".join(sys.argv):
    time.sleep(0.02)
sys.exit(1 if stop else 0)
"""


class Cluster:
    def __init__(self, folder: Path) -> None:
        self.folder, self.notes_file = folder, folder / "notes"
        (folder / "bin").mkdir()
        for name in ("srun", "scontrol", "squeue", "sbatch"):
            script = folder / "bin" / name
            script.write_text(
                f"#!/usr/bin/env -S {sys.executable} -S\n{(ROOT / 'tests' / 'fake_slurm.py').read_text()}"
            )
            script.chmod(0o755)
        (folder / "fake" / "torch" / "distributed").mkdir(parents=True)
        for name in ("__init__.py", "distributed/__init__.py"):
            (folder / "fake" / "torch" / name).touch()
        (folder / "fake" / "torch" / "distributed" / "run.py").write_text(TORCHRUN)
        make_dataset(folder / "records", tiles=8, val=4)

    def environment(self, real: bool = False, **variables: str) -> dict[str, str]:
        kept = {name: v for name, v in os.environ.items() if not name.startswith("SLURM_") and name != "NGPU"}
        made = {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "FAKE_SLURM": str(self.folder),
            "SLURM_JOB_NODELIST": "127.0.0.1,127.0.0.2",
            "SLURM_NNODES": "2",
            "GEOKR_ROOT": str(ROOT),
            "NOTES": str(self.notes_file),
            "PORT": str(20000 + os.getpid() % 10000),
            "NGPU": "1",
        }
        if not real:
            made["PYTHONPATH"] = str(self.folder / "fake")
        return {**kept, **made, **variables}

    def submit(self, *arguments: str, **variables: str) -> subprocess.Popen:
        return subprocess.Popen(
            [str(self.folder / "bin" / "sbatch"), str(ROOT / "launch" / "pretrain_slurm.sbatch"), *arguments],
            cwd=self.folder,
            env=self.environment(**variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments: str, **variables: str) -> tuple[int, str]:
        job = self.submit(f"data.records={self.folder}/records", *arguments, **variables)
        said, _ = job.communicate(timeout=180)
        return job.returncode, said

    @property
    def log(self) -> list[str]:
        return (self.folder / "log").read_text().splitlines()

    @property
    def notes(self) -> list[tuple[list[str], dict[str, str]]]:
        return sorted(json.loads(line) for line in self.notes_file.read_text().splitlines())

    def wait_for(self, job: subprocess.Popen, condition, seconds: float = 30.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert job.poll() is None, job.stdout.read()
            assert time.monotonic() < end
            time.sleep(0.02)

    def running(self) -> bool:
        return len(list(self.folder.glob("notes.up-*"))) >= 2

    def signal_job(self, number: int) -> None:
        """To the batch script only, as --signal=B: asks."""
        os.kill(int((self.folder / "job.pid").read_text()), number)


@pytest.fixture
def cluster(tmp_path):
    return Cluster(tmp_path)


def test_every_node_runs_one_torchrun_that_meets_the_others(cluster):
    status, said = cluster.run("run.dir=a b", KIND="good", SLURM_CPUS_PER_TASK="6")
    assert status == 0, said
    port = int(cluster.environment()["PORT"])
    for rank, (arguments, variables) in enumerate(sorted(cluster.notes, key=lambda note: note[1]["SLURM_NODEID"])):
        assert arguments == [
            "--nnodes=2",
            "--nproc-per-node=1",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint=127.0.0.1:{port}",
            "--rdzv-id=geokr-4242-0-0",
            f"--rdzv-conf=is_host={1 - rank}",
            "--local-addr=127.0.0.1",
            "--max-restarts=0",
            "-m",
            "geokr.pretrain",
            "--config",
            str(ROOT / "configs" / "geokr_resnet50.yaml"),
            f"data.records={cluster.folder}/records",
            "run.dir=a b",
        ]
        assert variables["GLOO_SOCKET_IFNAME"] == "lo"
        assert variables["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert "--cpus-per-task=6" in cluster.log[0]
    assert (cluster.folder / "slurm-4242" / "start0-train0-node1.log").exists()
    assert len(cluster.notes) == 2


def test_a_warning_ends_in_the_queue_and_the_next_start_meets_elsewhere(cluster):
    job = cluster.submit(f"data.records={cluster.folder}/records", KIND="long")
    cluster.wait_for(job, cluster.running)
    cluster.signal_job(signal.SIGUSR1)
    said, _ = job.communicate(timeout=180)
    assert job.returncode == 0, said
    assert [line for line in cluster.log if not line.startswith("srun")] == [
        "scontrol requeue 4242",
        "ended 143",
        "ended 0",
    ]
    assert "the time is nearly over" in said
    assert "going back into the queue" in said
    ids = {word for arguments, _ in cluster.notes for word in arguments if "rdzv-id" in word or "endpoint" in word}
    assert len(ids) == 4
    assert "--rdzv-id=geokr-4242-1-0" in ids


def test_a_cancelled_job_does_not_come_back(cluster):
    job = cluster.submit(f"data.records={cluster.folder}/records", KIND="long")
    cluster.wait_for(job, cluster.running)
    cluster.signal_job(signal.SIGTERM)
    said, _ = job.communicate(timeout=180)
    assert job.returncode == 143, said
    assert not (cluster.folder / "requeued").exists()


@pytest.mark.parametrize(("state", "status", "comes_back"), [("RUNNING", 0, True), ("COMPLETING", 143, False)])
def test_tasks_told_to_stop_without_the_script(cluster, state, status, comes_back):
    """Preemption with notice leaves the job running; after scancel it is ending."""
    (cluster.folder / "state").write_text(state)
    job = cluster.submit(f"data.records={cluster.folder}/records", KIND="long")
    cluster.wait_for(job, cluster.running)
    os.kill(int((cluster.folder / "srun.pid").read_text()), signal.SIGUSR1)
    said, _ = job.communicate(timeout=180)
    assert job.returncode == status, said
    assert ("scontrol requeue 4242" in cluster.log) == comes_back


@pytest.mark.parametrize("late", [None, 0, 1], ids=["together", "first-node-late", "second-node-late"])
def test_an_error_on_one_node_ends_the_other_and_training_starts_again_once(cluster, late):
    begin = time.monotonic()
    slow = {} if late is None else {f"FAKE_PREFIX_{late}": """sh -c 'sleep 2; exec "$@"' --"""}
    status, said = cluster.run(KIND="fails", **slow)
    assert status == 1
    assert time.monotonic() - begin < 50
    assert "starting again from the last checkpoint" in said
    assert "training failed (status 1): see slurm-4242" in said
    ids = {word for arguments, _ in cluster.notes for word in arguments if "rdzv-id" in word}
    assert ids == {"--rdzv-id=geokr-4242-0-0", "--rdzv-id=geokr-4242-0-1"}
    log = (cluster.folder / "slurm-4242" / "start0-train0-node0.log").read_text()
    assert "machine 1 (127.0.0.1) has ended with an error" in log


def test_records_are_staged_on_every_node_and_read_there(cluster, tmp_path, capsys):
    status, said = cluster.run(KIND="good", STAGE_DIR=str(tmp_path / "fast disk"))
    assert status == 0, said
    (copy,) = (tmp_path / "fast disk").iterdir()
    for arguments, _ in cluster.notes:
        assert arguments[-1] == f'data.records="{copy}"'
        _, overrides = split_overrides(arguments[arguments.index("geokr.pretrain") + 1 :])
        assert parse_overrides(overrides)["data.records"] == str(copy)  # once, which training insists on
    assert {path.name for path in copy.iterdir()} - {".lock"} == {p.name for p in (tmp_path / "records").iterdir()}
    shard = tmp_path / "records" / "train-00000.tfrecord"
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    assert stage.main(["--to", str(tmp_path / "other"), f"data.records={tmp_path}/records", "train.max_steps=1"]) == 1
    assert f"{shard}: its hash is not the manifest's" in capsys.readouterr().err
    assert not list((tmp_path / "other").glob("*/manifest.json"))


def test_variables_in_the_staging_folder_are_each_nodes_own(cluster, tmp_path):
    disks = {f"FAKE_PREFIX_{n}": f"env NODE_DISK={tmp_path}/disk{n}" for n in (0, 1)}
    status, said = cluster.run(KIND="good", STAGE_DIR="$NODE_DISK/records", **disks)
    assert status == 0, said
    found = {variables["SLURM_NODEID"]: arguments[-1] for arguments, variables in cluster.notes}
    for n in ("0", "1"):
        (copy,) = (tmp_path / f"disk{n}" / "records").iterdir()
        assert found[n] == f'data.records="{copy}"'
    assert not list(cluster.folder.glob("*$*"))
    status, said = cluster.run(KIND="good", STAGE_DIR="$NO_SUCH_DISK/records")
    assert (status, "could not be copied" in said) == (1, True)
    logs = [path.read_text() for path in (cluster.folder / "slurm-4242").glob("*stage*")]
    assert any("has no such variable" in log for log in logs)


def test_what_does_not_end_in_time_is_killed(cluster):
    job = cluster.submit(f"data.records={cluster.folder}/records", KIND="stubborn", GRACE="1")
    cluster.wait_for(job, cluster.running)
    begin = time.monotonic()
    cluster.signal_job(signal.SIGUSR1)
    job.communicate(timeout=90)
    assert time.monotonic() - begin < 60  # and not after the 100 s of the default


def test_records_that_cannot_be_staged_end_the_job(cluster):
    (cluster.folder / "file").touch()
    status, said = cluster.run(KIND="good", STAGE_DIR=str(cluster.folder / "file"))
    assert status == 1
    assert "could not be copied: see slurm-4242" in said
    assert not cluster.notes_file.exists()


def test_what_is_wrong_is_said_before_any_step(cluster):
    status, said = cluster.run("optim.learning_rate=1", KIND="good")
    assert status == 1
    assert "unknown key" in said
    status, said = cluster.run(KIND="good", RESTARTS="often")
    assert (status, "RESTARTS='often'" in said) == (1, True)
    status, said = cluster.run(KIND="good", GRACE="long")
    assert (status, "GRACE='long'" in said) == (1, True)
    assert not [line for line in cluster.log if line.startswith("srun")]
    script = ROOT / "launch" / "pretrain_slurm.sbatch"
    done = subprocess.run(["bash", str(script)], env=cluster.environment(), capture_output=True, text=True)
    assert done.returncode == 1
    assert "sbatch launch/pretrain_slurm.sbatch" in done.stderr


# ------------------------------------------------------------------------------------- its parts alone


def test_staging_mixtures_and_urls(tmp_path):
    a, b = (make_dataset(tmp_path / name, tiles=8, val=0, seed=seed) for seed, name in enumerate("ab"))
    given = f'data.records=[{{path: {a}, weight: 2, label_weights: w.npz}}, "file://{b}"]'
    (line,) = stage.override([given, "train.max_steps=1"], tmp_path / "to")
    entries = json.loads(line.removeprefix("data.records="))
    assert [entry["weight"] for entry in entries] == [2.0, None]
    assert [entry["label_weights"] for entry in entries] == ["w.npz", None]
    assert len({entry["path"] for entry in entries}) == 2
    for entry, source in zip(entries, (a, b), strict=True):
        assert (Path(entry["path"]) / "manifest.json").read_bytes() == (source / "manifest.json").read_bytes()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "to").rglob("*.tfrecord")}
    assert stage.override([given, "train.max_steps=1"], tmp_path / "to") == [line]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert stage.override(["train.max_steps=1"], tmp_path / "to") == []


def test_a_copy_that_the_node_has_swept_is_made_good(tmp_path):
    source = make_dataset(tmp_path / "d", tiles=40, val=8)
    copy = stage.stage(source, tmp_path / "to")
    for lost in (copy / "train-00000.tfrecord", copy / "train-00001.idx", copy / "val-00000.tfrecord"):
        lost.unlink()
    cut = copy / "train-00001.tfrecord"
    cut.write_bytes(cut.read_bytes()[:100])
    (copy / "val-00000.idx").write_text("0 1\n")
    kept = (copy / "train-00002.tfrecord").stat().st_mtime_ns
    assert stage.stage(source, tmp_path / "to") == copy
    for path in source.iterdir():
        assert (copy / path.name).read_bytes() == path.read_bytes(), path.name
    assert (copy / "train-00002.tfrecord").stat().st_mtime_ns == kept


def test_a_manifest_that_the_dataset_has_grown_beyond_is_staged_as_it_was(tmp_path):
    source = make_dataset(tmp_path / "d", tiles=40, val=8)
    earlier = source / "manifest-v1.json"
    earlier.write_bytes((source / "manifest.json").read_bytes())
    tree = json.loads(earlier.read_bytes())
    grown = Manifest.model_validate({**tree, "version": 2})
    (source / "manifest.json").write_bytes(dump_manifest(grown))
    (line,) = stage.override([f"data.records={earlier}", "train.max_steps=1"], tmp_path / "to")
    copy = Path(json.loads(line.removeprefix("data.records=")))
    assert (copy / "manifest.json").read_bytes() == earlier.read_bytes()
    check_folder(copy, load_manifest(copy))
    assert stage.stage(source, tmp_path / "to") != copy


def test_an_interrupted_copy_goes_on_and_a_full_disk_is_named(tmp_path, monkeypatch):
    source = make_dataset(tmp_path / "d", tiles=40, val=0)
    copy = stage.stage(source, tmp_path / "to")
    (copy / "manifest.json").unlink()
    (copy / "train-00001.tfrecord").unlink()
    (copy / ".train-00001.tfrecord.part").write_bytes(b"half")
    kept = (copy / "train-00000.tfrecord").stat().st_mtime_ns
    assert stage.stage(source, tmp_path / "to") == copy
    assert (copy / "train-00001.tfrecord").read_bytes() == (source / "train-00001.tfrecord").read_bytes()
    assert (copy / "train-00000.tfrecord").stat().st_mtime_ns == kept
    monkeypatch.setattr(stage.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(stage.StageError, match="do not fit its"):
        stage.stage(source, tmp_path / "small")


@pytest.fixture
def two_nodes(cluster, tmp_path):
    """Two machines that stage for themselves, each into a folder whose lock the test may hold."""
    port, made = str(free_port()), []

    def start(**stages):
        for rank in (0, 1):
            to = stages.get(f"to{rank}", tmp_path / f"disk{rank}")
            words = ["--nodes", "127.0.0.1,127.0.0.2", "--rank", str(rank), "--port", port, "--stage", str(to)]
            run = ["--", f"data.records={tmp_path}/records", "train.max_steps=1"]
            made.append(subprocess.Popen(
                [sys.executable, str(ROOT / "launch" / "node.py"), *words, *run],
                env=cluster.environment(KIND="good"), stderr=subprocess.PIPE, text=True,
            ))  # fmt: skip
        return made

    yield start
    for process in made:
        process.kill()
        process.communicate()


@contextlib.contextmanager
def held(tmp_path, rank):
    name = hashlib.sha256((tmp_path / "records" / "manifest.json").read_bytes()).hexdigest()[:16]
    folder = tmp_path / f"disk{rank}" / name
    folder.mkdir(parents=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


@pytest.mark.parametrize("slow", [0, 1])
def test_machines_that_stage_at_different_speeds_start_together(cluster, two_nodes, tmp_path, slow):
    """torchrun waits a minute for the first machine, which is not long where records are copied."""
    with held(tmp_path, slow):
        nodes = two_nodes()
        other = tmp_path / f"disk{1 - slow}"
        end = time.monotonic() + 60
        while not list(other.glob("*/manifest.json")):
            assert time.monotonic() < end
            time.sleep(0.05)
        time.sleep(1.5)
        assert not cluster.notes_file.exists()
        assert [node.poll() for node in nodes] == [None, None]
    said = [node.communicate(timeout=60)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert sorted(arguments[-1] for arguments, _ in cluster.notes) == sorted(
        f'data.records="{next((tmp_path / f"disk{rank}").iterdir())}"' for rank in (0, 1)
    )


@pytest.mark.parametrize("failing", [0, 1])
def test_a_machine_that_cannot_stage_ends_the_others(cluster, two_nodes, tmp_path, failing):
    (tmp_path / "file").touch()
    with held(tmp_path, 1 - failing):  # the other one is in the middle of it
        nodes = two_nodes(**{f"to{failing}": tmp_path / "file"})
        said = [node.communicate(timeout=60)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [1, 1], said
    assert "make room or access" in said[failing]
    assert "has ended with an error" in said[1 - failing]
    assert not cluster.notes_file.exists()


@pytest.mark.parametrize(
    ("sent", "status"),
    [(signal.SIGUSR1, 143), (signal.SIGTERM, 143), (signal.SIGINT, 130)],
    ids=lambda value: str(value),
)
def test_a_signal_ends_a_machine_that_is_copying(cluster, tmp_path, sent, status):
    """With more shards left to copy than threads, each of which would take a minute."""
    slow = "stage._copy = lambda source, target: (os.write(1, b'copying\\n'), time.sleep(60))"
    words = ["--nodes=127.0.0.1,127.0.0.2", "--rank=0", f"--port={free_port()}", f"--stage={tmp_path}/disk", "--"]
    words += [f"data.records={tmp_path}/records", "train.max_steps=1"]
    code = f"import os, time; from launch import node, stage; {slow}; node.leave(node.main({words!r}))"
    node_process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=cluster.environment(KIND="good"), stdout=subprocess.PIPE, text=True
    )
    assert node_process.stdout.readline() == "copying\n"
    node_process.send_signal(sent)
    assert node_process.wait(timeout=30) == status
    node_process.stdout.close()


def test_what_a_node_refuses(capsys):
    cases = {
        ("--nodes=a,b", "--rank=2"): "expected 0 to 1",
        ("--nodes=127.0.0.1,name.that.is.none.invalid", "--rank=0"): "no machine that 127.0.0.1 can reach",
    }
    for arguments, message in cases.items():
        assert node.main([*arguments, "--", "train.max_steps=1"]) == 1
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="NGPU='x'"):
        node.count_processes("x")


def test_processes_a_node_runs(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3,GPU-7")
    assert node.count_processes(None) == 3
    assert node.count_processes("2") == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert node.count_processes(None) == 1


# ------------------------------------------------------------------------------------------- for real


@pytest.mark.slow
def test_preempted_and_requeued_it_ends_with_the_same_weights(cluster, tmp_path):
    records = make_dataset(tmp_path / "d", tiles=40, val=9)
    last = ("train.max_steps=300", "checkpoint.every_steps=20", "validation.every_steps=300")
    job = cluster.submit(*keys(records, tmp_path / "cut", *last), real=True, OMP_NUM_THREADS="1")
    begun = tmp_path / "cut" / "checkpoints"
    cluster.wait_for(job, lambda: bool(list_checkpoints(begun)), 120)
    cluster.signal_job(signal.SIGUSR1)
    said, _ = job.communicate(timeout=300)
    assert job.returncode == 0, said
    assert cluster.log.count("scontrol requeue 4242") == 1
    first, second = (
        "".join(path.read_text() for path in (tmp_path / "slurm-4242").glob(f"start{n}-train0-node*.log"))
        for n in (0, 1)
    )  # whichever node process 0 was on
    assert "stopped by signal 15; a checkpoint is written" in first
    assert "resuming" in second
    done = torchrun(2, "-m", "geokr.pretrain", *keys(records, tmp_path / "straight", *last))
    assert done.returncode == 0, done.stderr
    assert same_tensors(tmp_path / "cut", tmp_path / "straight")


@pytest.mark.parametrize("where", ["GEOKR_ROOT", "SLURM_SUBMIT_DIR"])
def test_a_folder_that_is_not_the_projects_is_named(tmp_path, where):
    """Slurm runs a copy from its spool; a wrong name must not start another checkout's code."""
    script = tmp_path / "spool" / "slurm_script"
    script.parent.mkdir()
    shutil.copy(ROOT / "launch" / "pretrain_slurm.sbatch", script)
    kept = {name: v for name, v in os.environ.items() if not name.startswith(("SLURM_", "GEOKR_"))}
    others = {"SLURM_SUBMIT_DIR": str(ROOT)} if where == "GEOKR_ROOT" else {}
    environment = {**kept, **others, where: str(tmp_path)}
    done = subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "is not geokr's folder: call sbatch from it, or set GEOKR_ROOT to it" in done.stderr
