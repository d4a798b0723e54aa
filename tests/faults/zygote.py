"""Starts processes by forking one that has imported everything: a tenth of a second instead of five.

    python -m tests.faults.zygote MODULE ...

imports the modules, calls ``warm`` of those that have it, and reads one JSON object a line, {"call", "arguments",
"environment", "log"}. The forked process calls ``call`` ("module:function") with the arguments and ends with what it
returns, as the command would. It answers {"pid": ...} at the start and {"pid": ..., "status": ...} at the end, as
``Popen.returncode`` has it.
"""

import contextlib
import gc
import importlib
import json
import os
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
PATIENCE_S = 240.0  # longer than anything here takes on a busy machine


# ----------------------------------------------------------------------------------------------- the server


def _child(order: Mapping) -> None:
    os.setsid()
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(order["environment"])
    module, name = order["call"].split(":")
    end(lambda: getattr(importlib.import_module(module), name)(*order["arguments"]))


def end(call: Callable[[], int | None]) -> None:
    """Ends the process with what the call returns, as ``sys.exit`` would but for the interpreter's taking down of all
    that was imported, which after a fork costs more than a run here (tests/test_geokr_pretrain.py starts whole ones).
    """
    status = 1
    try:
        status = call() or 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            _say({"pid": found[0], "status": os.waitstatus_to_exitcode(found[1])})


def _say(answer: Mapping) -> None:
    os.write(1, (json.dumps(answer) + "\n").encode())


TRAINING = ("tests.faults.injections", "pipelines.loaders", "pipelines.torch_loader")


def serve(modules: Sequence[str]) -> None:
    for module in map(importlib.import_module, modules):
        if hasattr(module, "warm"):
            module.warm()

    gc.freeze()  # a collection in a child would copy every page
    _say({"ready": True})
    buffer = b""
    while True:
        if select.select([0], [], [], 0.005)[0]:
            if not (more := os.read(0, 1 << 16)):
                return
            buffer += more
        while b"\n" in buffer:
            line, buffer = buffer.split(b"\n", 1)
            pid = os.fork()
            if pid == 0:
                _child(json.loads(line))
            _say({"pid": pid})
        _reap()


# ----------------------------------------------------------------------------------------------- the client


class Child:
    """A forked process. ``log`` is a file of what it says."""

    def __init__(self, pid: int, log: Path) -> None:
        self.pid, self.log, self.status = pid, log, None
        self.ended = threading.Event()

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self, seconds: float = PATIENCE_S) -> int:
        """The exit status; what it said is shown where it does not end."""
        if not self.ended.wait(seconds):
            self.kill_all()
            raise AssertionError(f"process {self.pid} did not end in {seconds} s:\n{self.said()}")
        return self.status

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def children(self) -> list[psutil.Process]:
        """The living processes it started, by age."""
        with contextlib.suppress(psutil.NoSuchProcess):
            found = sorted(psutil.Process(self.pid).children(), key=lambda process: process.pid)
            return [process for process in found if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
        return []

    def kill_all(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)


class Zygote:
    """The server and what it has forked."""

    def __init__(self, folder: Path, modules: Sequence[str] = TRAINING) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._folder, self._count = folder, 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.zygote", *modules],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._children: dict[int, Child] = {}
        self._started: queue.Queue[Child] = queue.Queue()
        self._logs: queue.Queue[Path] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            answer = json.loads(line)
            if "status" in answer:
                child = self._children.pop(answer["pid"])
                child.status = answer["status"]
                child.ended.set()
            elif "pid" in answer:
                child = self._children[answer["pid"]] = Child(answer["pid"], self._logs.get())
                self._started.put(child)

    def start(self, call: str, *arguments: object, environment: Mapping[str, str] | None = None) -> Child:
        """Forks a process that calls ``module:function``."""
        self._count += 1
        log = self._folder / f"child-{self._count:04d}.log"
        self._logs.put(log)
        order = {"call": call, "arguments": arguments, "environment": dict(environment or {}), "log": str(log)}
        assert self._process.stdin is not None
        self._process.stdin.write((json.dumps(order) + "\n").encode())
        self._process.stdin.flush()
        return self._started.get(timeout=PATIENCE_S)

    def train(self, keys: Sequence[str], *, inject: str = "", environment: Mapping[str, str] | None = None) -> Child:
        """A training process with the command's arguments. inject: what tests.faults.injections does to it first."""
        return self.start("tests.faults.injections:train", list(keys), inject, environment=environment)

    def ranks(self, size: int, keys: Sequence[str], *, inject: str = "") -> list[Child]:
        """``size`` processes that train together over gloo, without torchrun above them."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        world = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
        each = [{**world, "MASTER_PORT": port, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]
        return [self.train(keys, inject=inject, environment=environment) for environment in each]

    def torchrun(self, size: int, restarts: int, keys: Sequence[str]) -> Child:
        """torchrun's own agent, which forks its processes."""
        return self.start("tests.faults.injections:agent", size, restarts, list(keys))

    def close(self) -> None:
        for child in list(self._children.values()):
            child.kill_all()
            for process in child.children():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def wait_until(condition, child: Child, what: str, seconds: float = PATIENCE_S):
    """Waits for a true answer, which it returns; fails if the process ends first."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if answer := condition():
            return answer
        assert not child.ended.is_set(), f"ended with {child.status} before {what}:\n{child.said()}"
        time.sleep(0.002)
    raise AssertionError(f"{what}: not in {seconds} s:\n{child.said()}")


if __name__ == "__main__":
    serve(sys.argv[1:])
