"""The launchers: what they check before anything starts, what they pass on, and how they make the environment.

A stand-in for Python notes what it is asked to install or to train, and hands everything else to the real one.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from geokr import config
from geokr.landcover import build_legend, load_product
from geokr.manifests import Manifest, dump_manifest
from launch import preflight
from preprocess.options import PackOptions
from tests.datasets import make_dataset

ROOT = Path(__file__).parents[1]
SCRIPTS = [*sorted((ROOT / "launch").glob("*.sh")), *(ROOT / "launch").glob("*.sbatch"), ROOT / ".ci" / "run"]

STAND_IN = """#!/usr/bin/env bash
case "$*" in
  "-m pip"*--version*) exit 0 ;;
  "-m pip"*)
    echo "pip $*" >>"$NOTES"
    echo "Installing collected packages: a, b"
    sleep "${PIP_SECONDS:-0}"
    exit "${PIP_STATUS:-0}"
    ;;
  "-m venv"*)
    for folder; do :; done
    echo "venv $*" >>"$NOTES"
    rm -rf "$folder" && mkdir -p "$folder/bin" && cp "$0" "$folder/bin/python"
    exit 0
    ;;
  "-m pytest"* | "-m torch.distributed.run"* | "-m geokr."* | preprocess/*)
    printf '%s\\n' "OMP=${OMP_NUM_THREADS:-}" "$@" >>"$NOTES"
    echo "own store: ${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-no}"
    echo done
    [[ -z "${FAIL_AT:-}" || "$*" != *"$FAIL_AT"* ]] || exit 7
    exit "${STATUS:-0}"
    ;;
  *device_count*) echo "${GPUS:-0} ${CORES:-2}"; exit 0 ;;
  *"import ensurepip"*) [ -z "${NO_ENSUREPIP:-}" ]; exit ;;
esac
exec REAL "$@"
"""


@pytest.fixture
def machine(tmp_path):
    """Runs a launcher with the stand-in as PYTHON; ``.notes`` is what it was asked to do."""
    return Machine(tmp_path)


class Machine:
    def __init__(self, folder: Path) -> None:
        self.folder, self.notes_file = folder, folder / "notes"
        (folder / "bin").mkdir()
        self.python = folder / "bin" / "python3"
        self.python.write_text(STAND_IN.replace("REAL", sys.executable))
        self.python.chmod(0o755)
        self.notes_file.touch()

    @property
    def notes(self) -> list[str]:
        return self.notes_file.read_text().splitlines()

    def environment(self, **variables: str) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if k not in {"PYTHON", "NGPU", "OMP_NUM_THREADS", "RESTARTS"}}
        return {**kept, "NOTES": str(self.notes_file), **variables}

    def run(self, script: Path, *arguments: str, cwd: Path | None = None, **variables: str):
        variables.setdefault("PYTHON", str(self.python))
        return subprocess.run(
            ["bash", str(script), *arguments],
            cwd=cwd or self.folder,
            env=self.environment(**variables),
            capture_output=True,
            text=True,
            timeout=60,
            stdin=subprocess.DEVNULL,
        )

    def pretrain(self, *arguments: str, **variables: str):
        return self.run(ROOT / "launch" / "pretrain_8gpu.sh", *arguments, **variables)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    make_dataset(folder, tiles=8, val=4)
    return folder


# ------------------------------------------------------------------------------------------- all scripts


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_bash_understands_it(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text()
    if script.name != "_env.sh":
        assert text.startswith("#!/usr/bin/env bash\n")
        assert os.access(script, os.X_OK)
    if script.suffix == ".sh" and script.name != "_env.sh":
        assert "\nset -euo pipefail\n" in text


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_shellcheck_finds_nothing(script):
    subprocess.run(["shellcheck", "-x", "-s", "bash", str(script)], check=True, cwd=ROOT)


def test_ci_calls_exactly_the_test_launcher():
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert lines[-1].endswith("exec bash launch/test.sh")


# ------------------------------------------------------------------------------------------ pretrain_8gpu


def test_without_records_it_says_within_seconds_how_to_make_them():
    begin = time.monotonic()
    done = subprocess.run(
        ["bash", "launch/pretrain_8gpu.sh"],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert time.monotonic() - begin < 5
    assert done.returncode == 1
    assert "no records" in done.stderr
    assert "python preprocess/pack_records.py --scenes" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_check_loads_neither_torch_nor_gdal(records):
    code = (
        "import runpy, sys; sys.argv = ['preflight.py', 'data.records=' + sys.argv[1], 'train.max_steps=1']\n"
        "try:\n    runpy.run_path('launch/preflight.py', run_name='__main__')\n"
        "except SystemExit as end:\n    assert end.code == 0, end.code\n"
        "print([name for name in ('torch', 'rasterio', 'timm') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(records)], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_mixtures_are_checked_by_the_labels_that_the_run_takes(tmp_path):
    """A product that one dataset has first and the other among further ones."""
    one = make_dataset(tmp_path / "a", tiles=8, val=4, also={"nlcd": 6})
    tree = json.loads((one / "manifest.json").read_bytes())
    problem = preflight.problem(None, [f"data.records=[{one}]", "data.labels=nlcd", "train.max_steps=1"])
    assert problem is None
    problem = preflight.problem(None, [f"data.records=[{one}]", "data.labels=corine", "train.max_steps=1"])
    assert "no labels of product 'corine'" in problem
    other = make_dataset(tmp_path / "b", tiles=8, val=4, classes=6)
    second = json.loads((other / "manifest.json").read_bytes())
    for key in ("product", "product_title", "classes"):
        if key in tree["products"]["nlcd"]:
            second[key] = tree["products"]["nlcd"][key]
    second["product"] = "nlcd"
    (other / "manifest.json").write_bytes(dump_manifest(Manifest.model_validate(second)))
    both = [f"data.records=[{one},{other}]", "train.max_steps=1"]
    assert preflight.problem(None, [*both, "data.labels=nlcd"]) is None
    assert "product" in preflight.problem(None, both)


def test_records_that_are_not_there_or_damaged_are_named(machine, tmp_path):
    done = machine.pretrain(f"data.records={tmp_path}/gone")
    assert (done.returncode, machine.notes) == (1, [])
    assert f"{tmp_path}/gone: not a dataset" in done.stderr
    assert f"--out {tmp_path}/gone" in done.stderr
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "manifest.json").write_text("{")
    done = machine.pretrain(f"data.records={tmp_path}/bad")
    assert done.returncode == 1
    assert "manifest.json: damaged" in done.stderr
    assert "--scenes" not in done.stderr


def test_a_mistyped_key_is_found_before_any_process_starts(machine, records):
    done = machine.pretrain(f"data.records={records}", "optim.learning_rate=1")
    assert (done.returncode, machine.notes) == (1, [])
    assert "unknown key" in done.stderr


def test_without_a_gpu_it_says_so_and_trains_on_the_cpu(machine, records):
    done = machine.pretrain(f"data.records={records}", "model.bands=[red, green]", "a b.yaml", CORES="6")
    assert done.returncode == 2  # the parser of arguments, not torchrun
    done = machine.pretrain(f"data.records={records}", "model.bands=[red, green]", CORES="6")
    assert done.returncode == 0
    assert "own store: 1" in done.stdout  # without it a restart finds the addresses of dead processes
    assert "no GPU here: training on the CPU with 6 process(es) over gloo" in done.stderr
    assert "cannot be cut into more equal parts: training with 4 process(es)" in done.stderr
    assert machine.notes == [
        "OMP=1",
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "4",
        "--max-restarts",
        "1",
        "-m",
        "geokr.pretrain",
        "--config",
        str(ROOT / "configs" / "geokr_resnet50.yaml"),
        f"data.records={records}",
        "model.bands=[red, green]",
    ]


@pytest.mark.parametrize(
    ("variables", "processes", "omp", "word"),
    [
        ({"NGPU": "2"}, "2", "3", "no GPU here"),
        ({"GPUS": "8"}, "8", "1", ""),
        ({"GPUS": "4", "CORES": "64"}, "4", "16", "4 GPU(s) here: training with 4"),
        ({"GPUS": "8", "NGPU": "2", "OMP_NUM_THREADS": "5"}, "2", "5", ""),
    ],
)
def test_how_many_processes_and_threads(machine, records, variables, processes, omp, word):
    done = machine.pretrain(f"data.records={records}", **{"CORES": "6", **variables})
    assert machine.notes[5] == processes
    assert machine.notes[0] == f"OMP={omp}"
    assert (word in done.stderr) if word else done.stderr == ""


def test_as_many_processes_as_can_share_a_batch(machine, records):
    for gpus, batch, processes in (("6", 1024, "4"), ("6", 96, "6"), ("7", 1022, "7"), ("5", 1023, "3")):
        done = machine.pretrain(f"data.records={records}", f"data.global_batch={batch}", GPUS=gpus)
        assert done.returncode == 0, done.stderr
        assert machine.notes[-1 - 2 - 8 :][machine.notes[-11:].index("--nproc-per-node") + 1] == processes
    done = machine.pretrain(f"data.records={records}", NGPU="3", GPUS="8")
    assert done.returncode == 1
    assert "NGPU=3: data.global_batch cannot be cut into as many parts; NGPU=2 could" in done.stderr


def test_how_many_can_share_a_batch_of_a_wrong_configuration(capsys):
    assert preflight.main(["--fit", "8", "data.global_batch=none"]) == 1
    assert "data.global_batch" in capsys.readouterr().err


def test_more_processes_than_gpus_is_an_error(machine, records):
    done = machine.pretrain(f"data.records={records}", NGPU="3", GPUS="2")
    assert (done.returncode, machine.notes) == (1, [])
    assert "NGPU=3, but this machine shows 2 GPU(s)" in done.stderr


@pytest.mark.parametrize("value", ["0", "two", "-1", "1.5", ""])
def test_a_number_of_processes_that_is_none(machine, records, value):
    done = machine.pretrain(f"data.records={records}", NGPU=value)
    if value == "":
        assert done.returncode == 0
    else:
        assert (done.returncode, machine.notes) == (1, [])
        assert f"NGPU='{value}'" in done.stderr


@pytest.mark.parametrize("form", ["two words", "one word"])
def test_a_configuration_of_ones_own_is_passed_on(machine, records, tmp_path, form):
    mine = tmp_path / "my own.yaml"
    mine.write_text(f"data: {{records: {records}}}\ntrain: {{epochs: 1}}\n")
    given = ["--config", str(mine)] if form == "two words" else [f"--config={mine}"]
    done = machine.pretrain(*given, "run.dir=x", RESTARTS="4")
    assert done.returncode == 0, done.stderr
    assert machine.notes[-1 - len(given) :] == [*given, "run.dir=x"]
    assert machine.notes[7] == "4"


def test_the_exit_status_is_that_of_the_run(machine, records):
    assert machine.pretrain(f"data.records={records}", STATUS="143").returncode == 143


def test_relative_paths_mean_the_callers_folder(machine, records):
    (machine.folder / "here").symlink_to(records)
    assert machine.pretrain("data.records=here").returncode == 0


# ------------------------------------------------------------------------------------------------ PYTHON


def test_a_python_that_does_not_run_is_named(machine, tmp_path):
    done = machine.pretrain(PYTHON="/nowhere/python")
    assert done.returncode == 1
    assert "'/nowhere/python' is not a Python of version 3.11 or newer that runs" in done.stderr
    old = tmp_path / "old"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    assert machine.run(ROOT / "launch" / "test.sh", PYTHON=str(old)).returncode == 1


@pytest.mark.parametrize("python", ["bin/python3", "./bin/python3", "../machine/bin/python3"])
def test_a_python_named_from_where_the_user_is(tmp_path, python):
    """The launchers go to other folders, where it is none."""
    (tmp_path / "machine").mkdir()
    machine = Machine(tmp_path / "machine")
    done = machine.run(ROOT / "launch" / "test.sh", PYTHON=python)
    assert (done.returncode, machine.notes[1:3]) == (0, ["-m", "pytest"]), done.stderr


def test_a_python_without_the_packages_is_told_what_it_lacks(machine, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    done = machine.run(ROOT / "launch" / "test.sh", PYTHON=str(tmp_path / "bare" / "bin" / "python"))
    assert done.returncode == 1
    assert "missing: numpy, pydantic" in done.stderr
    assert "-m pip install -e" in done.stderr
    assert machine.notes == []


def test_the_test_launcher_hands_arguments_and_status_to_pytest(machine):
    done = machine.run(ROOT / "launch" / "test.sh", "-k", "a or b", "-x", STATUS="5")
    assert done.returncode == 5
    cores = min(4, len(os.sched_getaffinity(0)))
    beside = ["--dist", "loadfile", "--no-loadscope-reorder"]
    threads = "OMP=1" if cores > 1 else "OMP="
    assert machine.notes == [threads, "-m", "pytest", "-n", str(cores), *beside, "-k", "a or b", "-x"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [(["-n3"], []), (["-n0"], []), (["--pdb"], ["-n0"]), (["-s"], ["-n0"]), (["--dist", "load"], [])],
)
def test_the_test_launcher_leaves_processes_to_whoever_names_them(machine, given, expected):
    assert machine.run(ROOT / "launch" / "test.sh", *given).returncode == 0
    assert machine.notes[3:] == [*expected, "--dist", "loadfile", "--no-loadscope-reorder", *given]
    alone = {"-n0"} & {*given, *expected} or len(os.sched_getaffinity(0)) == 1
    assert machine.notes[0] == ("OMP=" if alone else "OMP=1")


# ---------------------------------------------------------------------------------------- the environment


@pytest.fixture
def checkout(machine):
    """A copy of the launchers, with an environment that the stand-in makes; the extra `pack` stands for all."""
    home = machine.folder / "check out"
    (home / "launch").mkdir(parents=True)
    shutil.copy(ROOT / "launch" / "_env.sh", home / "launch")
    shutil.copy(ROOT / "pyproject.toml", home)
    shutil.copytree(ROOT / "geokr", home / "geokr")
    script = home / "launch" / "go.sh"
    script.write_text('set -euo pipefail\nsource "$(dirname "$0")/_env.sh"\ngeokr_env pack\necho "PY=$PY"\n')

    def go(**variables: str):
        path = f"{machine.folder / 'bin'}:{os.environ['PATH']}"
        return machine.run(script, PYTHON="", PATH=path, **variables)

    go.home, go.script = home, script
    return go


def kinds(machine: Machine) -> list[str]:
    return [line.split()[0] for line in machine.notes]


def test_it_is_made_once_and_again_when_the_project_changes(checkout, machine):
    first = checkout()
    assert first.returncode == 0, first.stderr
    assert first.stdout.strip() == f"PY={checkout.home}/.venv/bin/python"
    assert kinds(machine) == ["venv", "pip"]
    assert machine.notes[1].endswith(f"-e {checkout.home}[pack]")
    assert "making .venv with Python 3" in first.stderr
    assert "unpacking 2 packages" in first.stderr
    again = checkout()
    assert (again.returncode, again.stderr, len(machine.notes)) == (0, "", 2)
    with (checkout.home / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    assert checkout().returncode == 0
    assert kinds(machine) == ["venv", "pip", "pip"]


def test_an_install_cut_short_is_repaired(checkout, machine):
    command = ["bash", str(checkout.script)]
    env = machine.environment(PATH=f"{machine.folder / 'bin'}:{os.environ['PATH']}", PIP_SECONDS="30")
    running = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 20
    while "pip" not in kinds(machine) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(running.pid, 9)
    running.wait()
    done = checkout()
    assert done.returncode == 0, done.stderr
    assert "cut short: beginning afresh" in done.stderr
    assert kinds(machine) == ["venv", "pip", "venv", "pip"]
    assert checkout().stderr == ""


def test_an_install_that_fails_says_so_and_the_next_run_tries_again(checkout, machine):
    done = checkout(PIP_STATUS="3")
    assert done.returncode == 1
    assert "pip could not install geokr[pack]" in done.stderr
    assert "Installing collected packages" in done.stderr  # the end of pip's own words
    done = checkout()
    assert done.returncode == 0
    assert kinds(machine) == ["venv", "pip", "pip"]  # nothing was half-written: .venv stays


@pytest.mark.skipif(shutil.which("flock") is None, reason="flock is not installed")
def test_two_at_once_install_once(checkout, machine):
    env = machine.environment(PATH=f"{machine.folder / 'bin'}:{os.environ['PATH']}", PIP_SECONDS="2")
    both = [subprocess.Popen(["bash", str(checkout.script)], env=env, stderr=subprocess.PIPE) for _ in range(2)]
    words = [process.communicate()[1].decode() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert kinds(machine) == ["venv", "pip"]
    assert sum("another run is installing; waiting for it" in text for text in words) == 1


def test_without_ensurepip_pip_is_brought_in(checkout, machine):
    assert checkout(NO_ENSUREPIP="1").returncode == 0
    assert kinds(machine) == ["venv", "pip", "pip"]
    assert "--without-pip" in machine.notes[0]
    assert "--target" in machine.notes[1]
    assert machine.notes[1].endswith(" pip")


def test_an_environment_that_does_not_load_is_not_called_ready(checkout, machine):
    (checkout.home / "rasterio.py").write_text("raise ImportError('half of a file')\n")
    done = checkout()
    assert done.returncode == 1
    assert "half of a file" in done.stderr
    assert "does not load" in done.stderr
    (checkout.home / "rasterio.py").unlink()
    assert checkout().returncode == 0


# --------------------------------------------------------------------------------------------- quickstart


def test_quickstart_goes_through_every_step_in_order(machine):
    done = machine.run(ROOT / "launch" / "quickstart.sh", cwd=machine.folder, OUT=str(machine.folder / "my out"))
    out = str(machine.folder / "my out")
    assert [line for line in machine.notes if line.startswith(("preprocess/", "geokr."))] == [
        "preprocess/make_demo.py",
        "preprocess/pack_records.py",
        "preprocess/verify_records.py",
        "geokr.pretrain",
        "geokr.export",
        "geokr.evaluate",
    ]
    assert f"{out}/demo/landcover/*.tif" in machine.notes
    assert f"data.records={out}/records" in machine.notes
    assert done.returncode == 1  # nothing was trained, and the summary says so
    assert "metrics.jsonl: cannot be read" in done.stderr


@pytest.mark.parametrize(
    "step", ["make_demo", "pack_records", "verify_records", "geokr.pretrain", "geokr.export", "geokr.evaluate"]
)
def test_quickstart_stops_where_a_step_fails(machine, step):
    done = machine.run(ROOT / "launch" / "quickstart.sh", OUT=str(machine.folder / "out"), FAIL_AT=step)
    assert done.returncode == 7
    assert step in " ".join(machine.notes[machine.notes.index("OMP=") :])
    assert "what came out" not in done.stderr


def test_quickstart_takes_no_arguments(machine):
    assert machine.run(ROOT / "launch" / "quickstart.sh", "--help").returncode == 0
    done = machine.run(ROOT / "launch" / "quickstart.sh", "train.max_steps=3")
    assert done.returncode == 1
    assert "takes no arguments" in done.stderr
    assert machine.notes == []


def test_the_summary_reads_the_runs_own_figures(records, tmp_path):
    (tmp_path / "records").symlink_to(records)
    (tmp_path / "run").mkdir()
    figures = {"val/kl": 0.25, "val/kl_student": 0.2, "val/kl_prior": 1.0}
    lines = [
        {"step": 10, "samples": 640, "img_per_s": 100.0},
        {"step": 20, "samples": 1280, "img_per_s": 300.0, **figures, "val/kl": 0.5},
        {"step": 30, "samples": 1920, "img_per_s": 200.0, **figures},
    ]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "backbone.safetensors.json").write_text('{"backbone": {"name": "resnet18"}}')
    command = [sys.executable, str(ROOT / "launch" / "summary.py"), str(tmp_path), "--seconds", "77"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for words in (
        "resnet18, 30 steps, 1920 images",
        "200 (median)",
        "0.2500",
        "0.25 ",
        "77 s",
        "8 to train on, 4 held",
    ):
        assert words in said
    assert str(tmp_path / "run" / "tensorboard") in said
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps(lines[0]) + "\n")
    failed = subprocess.run(command, capture_output=True, text=True)
    assert failed.returncode == 1
    assert "no validation in it yet" in failed.stderr


# ------------------------------------------------------------------------------------------------ recipes


@pytest.mark.parametrize("product", ["globeland30", "worldcover", "nlcd"])
def test_packing_recipes_are_valid_and_say_what_they_are_for(product):
    path = ROOT / "configs" / f"pack_{product}.yaml"
    options = config.load(PackOptions, path)
    legend = build_legend(load_product(product), drop=options.labels.drop)
    assert len(legend.classes) >= 10
    head = path.read_text().split("\ntile:")[0]
    assert all(line.startswith("#") for line in head.strip().splitlines())
    for word in ("For:", "Run:", "Map:", "Expect:", "Change:", f"--config configs/{path.name}"):
        assert word in head


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("target", ["lint", "test", "faults", "bench", "docs"])
def test_make_targets_name_files_that_exist(target):
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True)
    named = [word for word in done.stdout.split() if word.endswith((".py", ".sh"))]
    assert named or target in ("lint", "faults")
    assert all((ROOT / word).is_file() for word in named), named
