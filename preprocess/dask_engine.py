"""Tasks on a running Dask cluster (``--scheduler ADDRESS``).

Nothing of the dataset's safety rests on Dask: a task names files, writes them under temporary names of its own and
renames them, so a task that Dask runs twice, or again on another machine, writes the same bytes.
"""

import hashlib
import importlib
import os
import socket
import sys
import time
import uuid
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import CancelledError, Executor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

from geokr import __version__
from preprocess.engine import Describe, Function, OverExecutor, Task
from preprocess.workfolder import PackError

# Who computes, decodes and encodes: other versions may give other bytes.
LIBRARIES = ("numpy", "numba", "rasterio", "simplejpeg")
CONNECT_S = 30


class DaskCluster(OverExecutor):
    """A running cluster: ``tcp://host:port``, or the path of a scheduler file that its machines share.

    Raises PackError if the scheduler does not answer, has no workers, or if workers run another version, do not see
    ``out`` or the inputs: before anything is packed. Workers that join later are asked before their first task.
    """

    remedy = "most often memory is short; give each worker more (--memory-limit), or start fewer on a machine"

    def __init__(self, address: str, out: Path, inputs: Sequence[str]) -> None:
        try:
            from distributed import Client, KilledWorker
        except ImportError as error:
            raise PackError("--scheduler needs Dask: pip install -e '.[cluster]' in geokr's folder") from error
        where: dict[str, Any] = {"scheduler_file": address} if os.path.isfile(address) else {"address": address}
        try:
            self.client: Any = Client(**where, timeout=CONNECT_S, set_as_default=False)
        except (OSError, TimeoutError, ValueError) as error:
            raise PackError(
                f"--scheduler {address}: no Dask scheduler answers there within {CONNECT_S} s ({error}); "
                "start one with `dask scheduler` and workers with `dask worker ADDRESS`"
            ) from error
        # the scheduler itself has given such a task to several workers before (allowed-failures), perhaps for no fault
        # of its own: where machines come and go, it happens to any
        self.fatal = (KilledWorker,)
        self.address, self._room, self._room_until = address, 0, 0.0
        # not pure: equal tasks are not to be answered from a result of an earlier run
        self._pool: Executor = self.client.get_executor(pure=False)
        try:
            self._probe(address, out, inputs)
        except BaseException:
            self.client.close()
            raise

    def _probe(self, address: str, out: Path, inputs: Sequence[str]) -> None:
        """Asks every worker whether it runs this version and sees the same files."""
        try:
            self.client.wait_for_workers(1, timeout=CONNECT_S)
        except TimeoutError as error:
            raise PackError(f"--scheduler {address}: it has no workers; start some with `dask worker`") from error
        token = out / ".work" / f"seen-{uuid.uuid4().hex}"  # stays as long as workers may join; goes with .work
        token.parent.mkdir(parents=True, exist_ok=True)
        token.touch()
        here = [path for path in inputs if os.path.isfile(path)]  # not URLs
        self.look = Look(str(token.resolve()), tuple(here), _look(str(token.resolve()), here), out)
        answers: Any = self.client.run(_look, self.look.token, here, on_error="return")
        for worker, answer in answers.items():
            fault = _fault(answer, self.look.expected, out)
            if fault:
                raise PackError(f"--scheduler {address}: worker {worker}: {fault}")

    def executor(self) -> Executor:
        return self._pool

    def room(self) -> int:
        if time.monotonic() > self._room_until:  # workers come and go
            self._room = 3 * max(1, sum(self.client.ncores().values()))
            self._room_until = time.monotonic() + 5
        return self._room

    def run_all(self, function: Function, tasks: Sequence[Task], describe: Describe) -> Generator[Any, None, None]:
        try:
            yield from super().run_all(_Looking(function, self.look), tasks, describe)
        except CancelledError as error:
            raise PackError(
                f"--scheduler {self.address}: the scheduler went away; start it again: the same command goes "
                "on from here"
            ) from error
        except ImportError as error:
            raise PackError(f"--scheduler {self.address}: a worker cannot import what it needs ({error})") from error

    def __enter__(self) -> "DaskCluster":
        return self

    def __exit__(self, *error: object) -> None:
        self.client.close()


@dataclass(frozen=True, slots=True)
class Look:
    """What a worker is to see. expected: what the caller sees."""

    token: str
    inputs: tuple[str, ...]
    expected: Mapping[str, Any]
    out: Path


class _Looking:
    """A function that looks around its process before its first task there."""

    done: ClassVar[set[str]] = set()

    def __init__(self, function: Function, look: Look) -> None:
        self.function, self.look = function, look

    def __call__(self, task: Task) -> Any:
        if self.look.token not in self.done:
            if fault := _fault(_look(self.look.token, self.look.inputs), self.look.expected, self.look.out):
                raise PackError(f"worker on {socket.gethostname()}: {fault}")
            self.done.add(self.look.token)
        return self.function(task)


def _look(token: str, inputs: Sequence[str]) -> dict[str, Any]:
    """What a process sees."""
    return {
        "version": __version__,
        "code": _code(),
        "libraries": {name: metadata.version(name) for name in LIBRARIES},
        "python": ".".join(map(str, sys.version_info[:2])),
        "host": socket.gethostname(),
        "sees_out": os.path.exists(token),
        "missing": [path for path in inputs if not os.access(path, os.R_OK)][:3],
        "writes": os.access(os.path.dirname(token), os.W_OK),
    }


def _code() -> str:
    """Hash of the code that packs: two versions may carry one number."""
    digest = hashlib.sha256()
    for package in ("geokr", "preprocess"):
        folder = Path(importlib.import_module(package).__path__[0])
        for path in sorted(folder.rglob("*.py")):
            digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()


def _fault(answer: Any, expected: Mapping[str, Any], out: Path) -> str:
    if not isinstance(answer, dict):
        return f"cannot run geokr ({answer}); install the same version there, with the extra `cluster`"
    for key, name in (("version", "geokr"), ("python", "Python")):
        if answer[key] != expected[key]:
            return f"runs {name} {answer[key]}, here is {expected[key]}; use the same on both"
    if answer["code"] != expected["code"]:
        return f"runs geokr {answer['version']} with other code; install the same there and start the worker again"
    for name, version in expected["libraries"].items():
        if answer["libraries"][name] != version:
            return f"has {name} {answer['libraries'][name]}, here is {version}; bytes depend on it: use the same"
    if not answer["sees_out"] or not answer["writes"]:
        what = "does not see" if not answer["sees_out"] else "cannot write to"
        return f"({answer['host']}) {what} --out {out.resolve()}; it must lie on storage that all machines share"
    if answer["missing"]:
        return f"({answer['host']}) cannot read {', '.join(answer['missing'])}; inputs must lie on shared storage"
    return ""
