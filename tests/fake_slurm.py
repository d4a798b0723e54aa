"""Slurm's commands as far as launch/pretrain_slurm.sbatch uses them; tests put links named srun, ... on the PATH.

It does what is awkward about the real one: srun hands SIGUSR1 to every process of a task, not its first only, and at
SIGTERM kills the tasks; the batch script runs as a copy in another folder; a requeued job starts again from its top.
FAKE_SLURM is its folder: log (a line a command), requeued, state. FAKE_PREFIX_N is put before node N's command.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(os.environ.get("FAKE_SLURM", "."))


def note(*words: str) -> None:
    with (FOLDER / "log").open("a") as log:
        log.write(shlex.join(words) + "\n")


def tree(pid: int) -> list[int]:
    """A process and all under it."""
    try:
        tasks = Path(f"/proc/{pid}/task").iterdir()
        children = " ".join((task / "children").read_text() for task in tasks).split()
    except OSError:
        return [pid]
    return [pid, *(found for child in children for found in tree(int(child)))]


def srun(arguments: list[str]) -> int:
    options = [word for word in arguments if word.startswith("--")][: _first_word(arguments)]
    command = arguments[_first_word(arguments) :]
    given = dict(option.removeprefix("--").partition("=")[::2] for option in options)
    note("srun", *options)
    tasks = []
    for node in range(int(given["nodes"])):
        prefix = shlex.split(os.environ.get(f"FAKE_PREFIX_{node}", ""))
        with open(given["output"].replace("%n", str(node)), "w") as output:
            environment = {**os.environ, "SLURM_NODEID": str(node), "SLURM_PROCID": str(node)}
            tasks.append(subprocess.Popen([*prefix, *command], env=environment, stdout=output, stderr=output))

    def to_all(number: int) -> None:
        for task in tasks:
            for pid in tree(task.pid):
                try:
                    os.kill(pid, number)
                except ProcessLookupError:
                    continue

    signal.signal(signal.SIGUSR1, lambda number, frame: to_all(number))
    signal.signal(signal.SIGTERM, lambda number, frame: to_all(signal.SIGKILL))
    (FOLDER / "srun.pid").write_text(str(os.getpid()))
    while any(task.poll() is None for task in tasks):
        time.sleep(0.02)
    return max(task.returncode if task.returncode >= 0 else 128 - task.returncode for task in tasks)


def _first_word(arguments: list[str]) -> int:
    return next(n for n, word in enumerate(arguments) if not word.startswith("--"))


def scontrol(arguments: list[str]) -> int:
    if arguments[:2] == ["show", "hostnames"]:
        print(arguments[2].replace(",", "\n"))
        return 0
    note("scontrol", *arguments)
    assert arguments[0] == "requeue"
    (FOLDER / "requeued").touch()
    return int(os.environ.get("FAKE_REQUEUE_STATUS", "0"))


def squeue(arguments: list[str]) -> int:
    print((FOLDER / "state").read_text() if (FOLDER / "state").exists() else "RUNNING")
    return 0


def sbatch(arguments: list[str]) -> int:
    """Runs the job to its end, again after each requeue; the job's exit status."""
    spool = FOLDER / "spool" / "slurm_script"
    spool.parent.mkdir(exist_ok=True)
    shutil.copy(arguments[0], spool)
    count = 0
    while True:
        (FOLDER / "requeued").unlink(missing_ok=True)
        environment = {**os.environ, "SLURM_JOB_ID": "4242", "SLURM_SUBMIT_DIR": os.getcwd()}
        if count:
            environment["SLURM_RESTART_COUNT"] = str(count)
        job = subprocess.Popen(["bash", str(spool), *arguments[1:]], env=environment)
        (FOLDER / "job.pid").write_text(str(job.pid))
        status = job.wait()
        note("ended", str(status))
        count += 1
        if not (FOLDER / "requeued").exists():
            return status


if __name__ == "__main__":
    name = Path(sys.argv[0]).name
    sys.exit({"srun": srun, "scontrol": scontrol, "squeue": squeue, "sbatch": sbatch}[name](sys.argv[1:]))
