"""Containers and Kubernetes: no engine runs here, so what they would run is taken out of the files and tried."""

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from torch.distributed import run as torch_run

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
DOCKERFILE = (LAUNCH / "docker" / "Dockerfile").read_text()

# Fields of kubeflow.org/v1 PyTorchJob (pkg/apis/kubeflow.org/v1 of kubeflow/training-operator).
FIELDS = {
    "spec": {"runPolicy", "elasticPolicy", "pytorchReplicaSpecs", "nprocPerNode"},
    "runPolicy": {
        "cleanPodPolicy", "ttlSecondsAfterFinished", "activeDeadlineSeconds", "backoffLimit", "schedulingPolicy",
    },
    "elasticPolicy": {
        "minReplicas", "maxReplicas", "rdzvBackend", "rdzvPort", "rdzvHost", "rdzvId", "rdzvConf", "standalone",
        "nProcPerNode", "maxRestarts", "metrics",
    },
    "replica": {"replicas", "restartPolicy", "template"},
}  # fmt: skip


@pytest.fixture(scope="module")
def job():
    claim, job = yaml.safe_load_all((LAUNCH / "kubernetes" / "pytorchjob.yaml").read_text())
    assert claim["kind"] == "PersistentVolumeClaim"
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    return job


@pytest.fixture(scope="module")
def pod(job):
    return job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]


def test_the_job_has_the_operators_fields(job):
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    spec = job["spec"]
    assert set(spec) <= FIELDS["spec"]
    assert set(spec["runPolicy"]) <= FIELDS["runPolicy"]
    assert spec["runPolicy"]["cleanPodPolicy"] in ("All", "Running", "None")
    elastic = spec["elasticPolicy"]
    assert set(elastic) <= FIELDS["elasticPolicy"]
    assert elastic["rdzvBackend"] == "c10d"
    assert isinstance(spec["nprocPerNode"], str)
    assert set(spec["pytorchReplicaSpecs"]) == {"Worker"}, "an elastic job has no master"
    worker = spec["pytorchReplicaSpecs"]["Worker"]
    assert set(worker) <= FIELDS["replica"]
    assert worker["restartPolicy"] in ("Always", "OnFailure", "Never", "ExitCode")
    assert elastic["minReplicas"] <= worker["replicas"] <= elastic["maxReplicas"]


def test_the_pod_fits_together(job, pod):
    (container,) = pod["containers"]
    assert container["name"] == "pytorch"
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
    assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
    mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
    assert mounts["shm"]["mountPath"] == "/dev/shm"
    assert mounts["records"]["readOnly"]
    (port,) = container["ports"]
    assert (port["name"], port["containerPort"]) == ("pytorchjob-port", job["spec"]["elasticPolicy"]["rdzvPort"])
    grace = int(re.search(r"--grace (\d+)", container["args"][0])[1])
    assert grace < pod["terminationGracePeriodSeconds"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 8


@pytest.mark.parametrize(("name", "is_host"), [("geokr-worker-0", True), ("geokr-worker-1", False)])
def test_torchrun_understands_what_a_pod_runs(job, pod, tmp_path, monkeypatch, name, is_host):
    (tmp_path / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "python").chmod(0o755)
    (container,) = pod["containers"]
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOSTNAME": name, "POD_IP": "10.0.0.7"}
    done = subprocess.run(
        [*container["command"], *container["args"]], env=environment, capture_output=True, text=True, check=True
    )
    words = done.stdout.splitlines()
    assert words[:4] == ["launch/supervise.py", "--grace", "100", "--"]
    assert words[4:7] == ["python", "-m", "torch.distributed.run"]
    elastic = job["spec"]["elasticPolicy"]
    operator = {
        "PET_NNODES": f"{elastic['minReplicas']}:{elastic['maxReplicas']}",
        "PET_RDZV_ENDPOINT": f"geokr-worker-0:{elastic['rdzvPort']}",
        "PET_RDZV_BACKEND": "c10d",
        "PET_RDZV_ID": elastic["rdzvId"],
        "PET_MAX_RESTARTS": str(elastic["maxRestarts"]),
    }
    for variable, value in operator.items():
        monkeypatch.setenv(variable, value)
    read = torch_run.parse_args(words[7:])
    assert (read.nnodes, read.rdzv_backend, read.rdzv_endpoint) == ("2:2", "c10d", "geokr-worker-0:29400")
    assert (read.rdzv_id, read.rdzv_conf) == ("geokr", f"is_host={int(is_host)}")
    assert (int(read.max_restarts), read.local_addr, read.nproc_per_node) == (10, "10.0.0.7", "gpu")
    assert (read.module, read.training_script) == (True, "geokr.pretrain")
    assert read.training_script_args[:2] == ["--config", "configs/geokr_resnet50.yaml"]


def test_the_images_install_extras_that_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert re.search(r"^ARG EXTRA=(\S+)", DOCKERFILE, re.M)[1] in extras
    definition = (LAUNCH / "apptainer" / "geokr.def").read_text()
    for text in (DOCKERFILE, definition):
        assert "python:3.12-slim" in text
        for name in re.findall(r"(?:EXTRA|extra)=([a-z0-9-]+)", text):
            assert name in extras
        assert "remote" in extras
    for name, other in (("train", "cuda120"), ("train-cuda12", "cuda130")):
        assert not any(other in requirement for requirement in extras[name])
        assert "geokr[train-base]" in extras[name]


def test_what_the_dockerfile_copies_and_starts_is_there():
    copied = [line.split()[1:-1] for line in DOCKERFILE.splitlines() if line.startswith("COPY")]
    assert all((ROOT / name).exists() for names in copied for name in names)
    folders = re.search(r"mkdir -p (.*) \\", DOCKERFILE)[1].split()
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    wanted = {"configs" if name == "geokr.configs" else name.replace(".", "/") for name in packages}
    assert {folder for folder in wanted if not any(other.startswith(folder + "/") for other in wanted)} <= set(folders)
    for command in re.findall(r"(?:bash|python -m) (launch/\S+|geokr\.\w+)", DOCKERFILE):
        assert (ROOT / (command if "/" in command else command.replace(".", "/") + ".py")).exists()


def test_python_in_the_image(tmp_path):
    (tmp_path / "apptainer").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "apptainer").chmod(0o755)
    script = LAUNCH / "apptainer" / "python"
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    run = [str(script), "-c", "print(1)"]
    done = subprocess.run(run, env={**environment, "BIND": "/data"}, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "exec", "--nv", "--bind", f"{ROOT},/data", f"{ROOT}/geokr.sif", "python", "-c", "print(1)",
    ]  # fmt: skip
    done = subprocess.run(run, env={**environment, "SIF": "/images/a.sif"}, capture_output=True, text=True, check=True)
    assert "/images/a.sif" in done.stdout.splitlines()
    own = {**environment, "SLURM_TMPDIR": "/local/7", "BIND": "/data,$SLURM_TMPDIR,${SLURM_TMPDIR}/x:/x"}
    done = subprocess.run(run, env=own, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[3] == f"{ROOT},/data,/local/7,/local/7/x:/x"
    del own["SLURM_TMPDIR"]
    done = subprocess.run(run, env=own, capture_output=True, text=True)
    assert (done.returncode, "SLURM_TMPDIR is not set on this machine" in done.stderr) == (1, True)


def test_images_are_made_of_what_they_need_alone():
    """A folder that is worked in holds gigabytes of records and runs."""
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    definition = (LAUNCH / "apptainer" / "geokr.def").read_text()
    files = [line.split() for line in re.search(r"%files\n((?: .*\n)+)", definition)[1].splitlines()]
    assert all(to == f"/geokr/{name}" and (ROOT / name).exists() for name, to in files)
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {"configs" if name == "geokr.configs" else name.split(".")[0] for name in packages}
    assert (
        {name for name, _ in files}
        == allowed
        == {*folders, *["pyproject.toml", "setup.py", "README.md", "LICENSE", "launch"]}
    )
