"""Tasks on a running Dask cluster (``--scheduler ADDRESS``).

Nothing of the dataset's safety rests on Dask: a task names files, writes them under temporary names of its own and
renames them, so a task that Dask runs twice, or again on another machine, writes the same bytes.
"""

import os
import socket
import sys
import uuid
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from geokr import __version__
from preprocess.engine import WorkerLost, drain, lost
from preprocess.workfolder import PackError

CONNECT_S = 30


class DaskCluster:
    """A running cluster: ``tcp://host:port``, or the path of a scheduler file that its machines share.

    Raises PackError if the scheduler does not answer, has no workers, or if workers run another version, do not see
    ``out`` or the inputs: before anything is packed.
    """

    def __init__(self, address: str, out: Path, inputs: Sequence[str]) -> None:
        try:
            from distributed import Client
        except ImportError as error:
            raise PackError("--scheduler needs Dask: pip install 'geokr[cluster]'") from error
        where: dict[str, Any] = {"scheduler_file": address} if os.path.isfile(address) else {"address": address}
        try:
            self.client: Any = Client(**where, timeout=CONNECT_S, set_as_default=False)
        except (OSError, TimeoutError, ValueError) as error:
            raise PackError(
                f"--scheduler {address}: no Dask scheduler answers there within {CONNECT_S} s ({error}); "
                "start one with `dask scheduler` and workers with `dask worker ADDRESS`"
            ) from error
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
        token = out / ".work" / f"seen-{uuid.uuid4().hex}"
        token.parent.mkdir(parents=True, exist_ok=True)
        token.touch()
        here = [path for path in inputs if os.path.isfile(path)]  # not URLs
        try:
            answers = self.client.run(_look, str(token.resolve()), here, on_error="return")
        finally:
            token.unlink()
        for worker, answer in answers.items():
            fault = _fault(answer, out)
            if fault:
                raise PackError(f"--scheduler {address}: worker {worker}: {fault}")

    def run_all(
        self, function: Callable[[Any], Any], tasks: Sequence[Any], describe: Callable[[Any], str]
    ) -> Generator[Any, None, None]:
        from distributed import KilledWorker

        # not pure: equal tasks are not to be answered from a result of an earlier run
        pool = self.client.get_executor(pure=False, retries=0)
        cores = max(1, sum(self.client.ncores().values()))
        pending: dict[Future[Any], Any] = {}
        try:
            yield from drain(pool, function, deque(tasks), pending, 3 * cores)
        except KilledWorker as error:  # the scheduler has given the task to other workers before (allowed-failures)
            dead = [future for future in pending if future.done() and not future.cancelled() and future.exception()]
            raise WorkerLost(lost("of the cluster", {describe(pending[future]) for future in dead})) from error
        finally:
            for future in pending:
                future.cancel()

    def __enter__(self) -> "DaskCluster":
        return self

    def __exit__(self, *error: object) -> None:
        self.client.close()


def _look(token: str, inputs: list[str]) -> dict[str, Any]:
    """What a worker sees. Runs there."""
    return {
        "version": __version__,
        "python": ".".join(map(str, sys.version_info[:2])),
        "host": socket.gethostname(),
        "sees_out": os.path.exists(token),
        "missing": [path for path in inputs if not os.access(path, os.R_OK)][:3],
        "writes": os.access(os.path.dirname(token), os.W_OK),
    }


def _fault(answer: Any, out: Path) -> str:
    if not isinstance(answer, dict):
        return f"cannot run geokr ({answer}); install the same version there: pip install 'geokr[cluster]'"
    if answer["version"] != __version__:
        return f"runs geokr {answer['version']}, here is {__version__}; install the same version on both"
    here = ".".join(map(str, sys.version_info[:2]))
    if answer["python"] != here:
        return f"runs Python {answer['python']}, here is {here}; use the same on both"
    if not answer["sees_out"] or not answer["writes"]:
        what = "does not see" if not answer["sees_out"] else "cannot write to"
        return f"({answer['host']}) {what} --out {out.resolve()}; it must lie on storage that all machines share"
    if answer["missing"]:
        return f"({answer['host']}) cannot read {', '.join(answer['missing'])}; inputs must lie on shared storage"
    return ""
