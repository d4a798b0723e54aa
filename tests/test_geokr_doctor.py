"""python -m geokr.doctor: what it finds, on this machine and on machines made up for it."""

import functools
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from geokr import doctor
from geokr.checks import data, finding, machine, software, storage
from geokr.checks.finding import TrialError, trial
from geokr.checks.software import Driver
from tests.datasets import make_dataset

ROOT = Path(__file__).parents[1]
GPU = {"version": "2.14", "cuda": "13.0", "gpus": [{"name": "H200", "error": 0.01}], "nccl": "2.30"}
BLIND = {**GPU, "gpus": []}
NEW, OLD = Driver("580.95.05", ("H200, 141 GiB",)), Driver("550.54.15", ("A100, 40 GiB",))


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("records") / "d", tiles=40, val=9)


@pytest.fixture
def quick(monkeypatch):
    """The trials that load torch or DALI, answered at once."""
    answers = {
        software._TORCH: {**GPU, "gpus": [], "cuda": None},
        software._REDUCE: {"backend": "gloo"},
        software._COMPILE: {"device": "cpu"},
        software._DALI: {"version": "2.4.0"},
        data._CHECKPOINTS: {"checkpoints": []},
    }

    def answer(code, timeout_s, *arguments):
        if isinstance(answers[code], Exception):
            raise answers[code]
        return answers[code]

    monkeypatch.setattr(software, "trial", answer)
    monkeypatch.setattr(data, "trial", answer)
    monkeypatch.setattr(software, "read_driver", lambda: Driver(None))
    monkeypatch.setattr(software, "has_card", lambda: False)
    return answers


def test_a_sound_machine(quick, records, tmp_path, capsys):
    arguments = ["--records", str(records), "--run", str(tmp_path / "run"), "--json", str(tmp_path / "a" / "b.json")]
    assert doctor.main(arguments) == 0
    said = capsys.readouterr().out
    assert "0 failure(s)" in said
    assert "49 read, checksums right" in said
    written = json.loads((tmp_path / "a" / "b.json").read_text())
    assert written["ok"]
    names = [entry["check"] for entry in written["findings"]]
    assert {"cores", "memory", "driver", "torch", "collectives", "compiler", "DALI", f"records {records}"} <= set(names)
    assert f"disk of {tmp_path}/run" in names
    assert not (tmp_path / "run").exists(), "it looks and leaves nothing"


@pytest.mark.slow
def test_this_machine_for_real(records, tmp_path):
    command = [sys.executable, "-m", "geokr.doctor", "--records", str(records), "--run", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "torch.compile works" in done.stdout
    assert "decodes on the CPU" in done.stdout


def test_without_torch_and_dali_it_says_so(quick, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(software, "find_spec", lambda name: None)
    monkeypatch.setattr(software, "_installed", lambda name: False)
    monkeypatch.setattr(software.platform, "system", lambda: "Linux")
    assert doctor.main(["--run", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "FAILURE torch: not installed" in said
    assert "FAILURE packages: missing: torch, torchvision" in said
    assert "WARNING DALI: not installed" in said
    assert "pip install nvidia-dali-cuda130" in said


def test_it_starts_without_loading_torch():
    code = "import sys, geokr.doctor; print([m for m in ('torch', 'nvidia', 'pipelines', 'numba') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---------------------------------------------------------------------------------------------- software


@pytest.mark.parametrize(
    ("driver", "facts", "state", "words"),
    [
        (NEW, GPU, "ok", "H200"),
        (OLD, BLIND, "failure", "needs a driver of 580 or newer; here is 550.54.15"),
        (OLD, {**BLIND, "cuda": "12.8"}, "failure", "CUDA_VISIBLE_DEVICES"),
        (NEW, {**BLIND, "cuda": None}, "failure", "GPUs are not used"),
        (NEW, {**GPU, "gpus": [{"name": "H200", "error": 3.0}]}, "failure", "products are wrong on H200"),
        (NEW, {**GPU, "gpus": [{"name": "H200", "error": float("nan")}]}, "failure", "products are wrong"),
        (Driver(None), {**BLIND, "cuda": None}, "ok", "built for the CPU"),
        (NEW, "ImportError: libcudart.so.13", "failure", "does not load"),
    ],
)
def test_torch_and_driver_must_fit(driver, facts, state, words):
    found = software.check_torch(driver, facts)
    assert found.state == state
    assert words in f"{found.found} {found.means} {found.remedy}"


def test_what_the_driver_says(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert software.read_driver() == Driver(None)
    script = tmp_path / "nvidia-smi"
    rows = "570.86.10, NVIDIA H100 80GB HBM3, 81559, 4\n570.86.10, NVIDIA H100 80GB HBM3, 81559, 70000\n"
    script.write_text(f"#!/bin/sh\nprintf '{rows}'\n")
    script.chmod(0o755)
    driver = software.read_driver()
    assert (driver.version, driver.branch, len(driver.gpus)) == ("570.86.10", 570, 2)
    assert driver.busy == ("GPU 1 (70000 MiB)",)
    assert software.check_driver(driver, True).state == "warning"
    script.write_text("#!/bin/sh\necho '580.95.05, NVIDIA GB10, [N/A], [N/A]'\n")
    assert software.read_driver() == Driver("580.95.05", ("NVIDIA GB10, memory of the machine",))
    script.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed: no communication with the driver'; exit 9\n")
    found = software.check_driver(software.read_driver(), True)
    assert (found.state, "no communication" in found.found) == ("failure", True)
    assert software.check_driver(Driver(None), True).state == "failure"
    assert software.check_driver(Driver(None), False).state == "ok"


def test_a_card_without_a_driver_is_seen(tmp_path):
    for name, vendor, kind in (("a", "0x8086", "0x030000"), ("b", "0x10de", "0x040300")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(vendor + "\n")
        (tmp_path / name / "class").write_text(kind + "\n")
    assert not software.has_card(tmp_path)
    (tmp_path / "b" / "class").write_text("0x030200\n")
    assert software.has_card(tmp_path)


def test_what_fails_in_a_trial_is_told(quick):
    quick[software._REDUCE] = quick[software._COMPILE] = quick[software._DALI] = TrialError("it broke")
    assert software.check_reduce(GPU).state == "failure"
    assert software.check_compile(True).state == "warning"
    assert "slower" in software.check_compile(True).means
    found = software.check_dali(NEW, True)
    assert (found.state, "it broke" in found.found) in {("failure", True), ("warning", False)}  # where it is installed


def test_trials_that_crash_hang_or_talk(monkeypatch):
    assert trial("import json; print('noise'); print(json.dumps({'a': 1}))", 30) == {"a": 1}
    with pytest.raises(TrialError, match="no end after"):
        trial("import time; time.sleep(60)", 0.5)
    with pytest.raises(TrialError, match="signal 11"):
        trial("import os; os.kill(os.getpid(), 11)", 30)
    with pytest.raises(TrialError, match="ValueError: why"):
        trial("raise ValueError('why')", 30)
    with pytest.raises(TrialError, match="unexpected answer"):
        trial("pass", 30)


def test_the_tiny_picture_is_what_it_says():
    image = pytest.importorskip("simplejpeg").decode_jpeg(software.base64.b64decode(software.TINY_JPEG), "RGB")
    assert image.shape == (16, 16, 3)
    assert abs(image.astype(int) - (200, 120, 40)).max() <= 6


# ----------------------------------------------------------------------------------------------- machine


def test_limits_of_a_container(monkeypatch):
    limits = {"cpu.max": "150000 100000", "memory.max": str(4 << 30)}
    monkeypatch.setattr(machine, "cgroup_values", lambda name, old: ["max", limits[name]])
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert machine.cpu_quota() == 1.5
    found = machine.check_cores()
    assert (found.state, "data.threads=1" in found.remedy) == ("warning", True)
    found = machine.check_memory()
    assert (found.state, "4.0 GiB (limit" in found.found) == ("warning", True)
    limits.update({"cpu.max": "max 100000", "memory.max": "max"})
    assert (machine.cpu_quota(), machine.memory_limit()) == (None, None)
    assert machine.check_cores().state == "ok"
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert "--cpus-per-task" in machine.check_cores().remedy


def test_cgroup_files_of_both_versions(tmp_path):
    """A job's limit often stands in a group above that of its processes."""
    own = tmp_path / "own"
    own.write_text("5:cpu,cpuacct:/job/step\n0::/job/step\n")
    names = ("cpu.max", "cpu/cpu.cfs_quota_us")
    assert machine.cgroup_values(*names, tmp_path, own) == []
    for folder, file, text in (
        ("cpu", "cpu.cfs_quota_us", "-1"),
        ("cpu/job/step", "cpu.cfs_quota_us", "200000"),
        ("job/step", "cpu.max", "max 100000"),
        ("job", "cpu.max", "150000 100000"),
        ("other", "cpu.max", "1000 100000"),
    ):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / file).write_text(f"{text}\n")
    assert machine.cgroup_values(*names, tmp_path, own) == ["max 100000", "150000 100000", "200000", "-1"]
    assert machine.cgroup_values("memory.max", "memory/none", tmp_path, tmp_path / "nowhere") == []
    (tmp_path / "memory.max").write_text("7\n")
    assert machine.cgroup_values("memory.max", "memory/none", tmp_path, tmp_path / "nowhere") == ["7"]


def test_small_shared_memory_few_files_and_a_name_that_means_itself(monkeypatch, tmp_path):
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: type("Usage", (), {"total": 64 << 20})())
    found = machine.check_shm(str(tmp_path))
    assert (found.state, "--shm-size" in found.remedy) == ("warning", True)
    assert machine.check_shm(str(tmp_path / "none")).state == "ok"
    monkeypatch.setattr(machine.resource, "getrlimit", lambda which: (256, 4096))
    assert machine.check_open_files().state == "warning"
    monkeypatch.setattr(machine.socket, "getaddrinfo", lambda *a, **k: [(0, 0, 0, "", ("127.0.1.1", 0))])
    assert "GLOO_SOCKET_IFNAME" in machine.check_network().remedy
    monkeypatch.setattr(machine.socket, "getaddrinfo", lambda *a, **k: [(0, 0, 0, "", ("10.1.2.3", 0))])
    assert machine.check_network().state == "ok"


# ----------------------------------------------------------------------------------- storage, data, runs


def test_a_disk_is_measured_and_left_as_it_was(tmp_path, monkeypatch):
    (found,) = storage.check_disk(tmp_path / "not" / "yet")
    assert found.state in ("ok", "warning")
    assert "MB/s" in found.found
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(storage, "measure", lambda folder: (20e6, 500e6))
    monkeypatch.setattr(storage, "_has_locks", lambda folder: False)
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10**9})())
    assert [entry.state for entry in storage.check_disk(tmp_path)] == ["warning"] * 3
    (found,) = storage.check_disk(Path("/proc/run")) if not os.access("/proc", os.W_OK) else [None]
    assert found is None or found.state == "failure"


def test_a_disk_that_takes_nothing(monkeypatch, tmp_path):
    def refuse(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "measure", refuse)
    (found,) = storage.check_disk(tmp_path)
    assert (found.state, "No space left" in found.found) == ("failure", True)


def test_damaged_records_are_named(tmp_path):
    folder = make_dataset(tmp_path / "d", tiles=40, val=9)
    assert data.check_records(folder).state == "ok"
    shard = folder / "train-00001.tfrecord"
    whole = bytearray(shard.read_bytes())
    whole[len(whole) // 2] ^= 4
    shard.write_bytes(whole)
    found = data.check_records(folder)
    assert (found.state, "train-00001.tfrecord: record at byte" in found.found) == ("failure", True)
    shard.write_bytes(whole[:-10])
    assert "cut short" in data.check_records(folder).found
    assert "not a dataset" in data.check_records(tmp_path / "none").found


def test_records_behind_a_url(tmp_path):
    pytest.importorskip("aiohttp", reason="aiohttp (extra `remote`) is not installed")
    folder = make_dataset(tmp_path / "d", tiles=40, val=9)
    handler = functools.partial(QuietHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/d"
        found = doctor.check_remote(url)
        assert (found.state, "sound" in found.found) == ("ok", True), found
        found = doctor.check_remote(url.replace("//", "//me:secret@") + "?sig=secret")
        assert "secret" not in found.check
        earlier = folder / "manifest-v1.json"
        earlier.write_bytes((folder / "manifest.json").read_bytes())
        assert data.check_records(earlier).state == "ok"
        shard = folder / "train-00002.tfrecord"  # the smallest
        shard.write_bytes(shard.read_bytes()[:-1] + b"?")
        assert doctor.check_remote(url).state == "failure"
        (folder / "manifest.json").unlink()
        assert doctor.check_remote(url).state == "failure"
        server.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


def test_the_sample_is_spread_over_all_shards(tmp_path):
    folder = make_dataset(tmp_path / "d", tiles=64, val=0, shard_records=16)
    shards = data.manifests.load_manifest(folder).train.shards
    crc32c = data._crc32c()
    number, size, seconds = data.sample_shards(folder, shards, 8, crc32c)
    assert number == 8
    assert 0 < size < sum(shard.bytes for shard in shards) / 4
    assert seconds > 0


def test_records_without_a_checksum_library(records, monkeypatch):
    monkeypatch.setattr(data, "find_spec", lambda name: None)
    found = data.check_records(records)
    assert (found.state, "google-crc32c" in found.remedy) == ("warning", True)


def test_checkpoints_of_a_run(quick, tmp_path):
    assert data.check_run(tmp_path).found == "no checkpoint yet"
    (tmp_path / "checkpoints").mkdir()
    assert data.check_run(tmp_path).state == "ok"
    good, bad = ["step-00000010", 10, ""], ["step-00000020", 0, "state.safetensors: damaged"]
    for found, state, words in (
        ([bad, good], "warning", "step 10"),
        ([bad], "failure", "cannot go on"),
        ([good], "ok", "newest of step 10"),
    ):
        quick[data._CHECKPOINTS] = {"checkpoints": found}
        line = data.check_run(tmp_path)
        assert line.state == state
        assert words in f"{line.found} {line.means}"


def test_lines_fit_a_terminal():
    long = finding.failure("a check", "found " * 60, "means " * 60, "do " * 90)
    lines = doctor.lines_of(long, colour=False)
    assert max(map(len, lines)) <= 118
    assert lines[0].startswith("FAILURE a check: found")
    assert doctor.lines_of(finding.ok("a", "b"), colour=True) == ["\033[32mok      \033[0ma: b"]
