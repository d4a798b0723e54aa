"""What the fault tests share: small records, the forking server, and the tally that `make faults` writes as JSON."""

import collections
import json
import os
import platform
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.datasets import make_dataset
from tests.faults.zygote import Zygote


@pytest.fixture(scope="session")
def records(tmp_path_factory) -> Path:
    """40 training tiles: five steps of eight an epoch."""
    return make_dataset(tmp_path_factory.mktemp("records") / "d", tiles=40, val=9)


@pytest.fixture(scope="session")
def packers(tmp_path_factory):
    """Forks packing processes."""
    if not hasattr(os, "fork"):
        pytest.skip("no fork here")
    server = Zygote(tmp_path_factory.mktemp("packing-logs"), ["tests.faults.pack_injections"])
    yield server
    server.close()


@pytest.fixture(scope="session")
def zygote(tmp_path_factory):
    if not hasattr(os, "fork"):
        pytest.skip("no fork here")
    server = Zygote(tmp_path_factory.mktemp("logs"))
    yield server
    server.close()


class Tally:
    """Counts for docs/reliability.md. what: what its results are compared in."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.begin = time.time()
        self.injected: collections.Counter[str] = collections.Counter()
        self.resumes: list[bool] = []
        self.recovery_s: list[float] = []
        self.silent = 0
        self.failed: list[str] = []

    def inject(self, row: int | str, what: str, count: int = 1) -> None:
        self.injected[f"{row} {what}"] += count

    def resumed(self, equal: bool, count: int = 1) -> None:
        """count runs, cut short and begun again, that ended with what an undisturbed one has, bit for bit, or not."""
        self.resumes += [equal] * count
        self.right(equal, f"the {self.what} differ from those of an undisturbed run")

    def right(self, result: bool, what: str) -> None:
        """A result that was given without an error; false is a silent wrong result."""
        self.silent += not result
        assert result, what

    def report(self) -> dict:
        report = {
            "date": time.strftime("%Y-%m-%d", time.gmtime(self.begin)),
            "seconds": round(time.time() - self.begin),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
            "torch": torch.__version__,
            "injections": sum(self.injected.values()),
            "by_row": dict(sorted(self.injected.items(), key=lambda item: (int(item[0].split()[0]), item[0]))),
            "silent_wrong_results": self.silent,
            "failed_tests": self.failed,
            "bitwise_equal_resumes": f"{self.resumes.count(True)} of {len(self.resumes)}",
        }
        if self.recovery_s:
            p50, p95 = np.percentile(self.recovery_s, [50, 95])
            report["recovery_s"] = {"n": len(self.recovery_s), "p50": round(p50, 2), "p95": round(p95, 2)}
        return report


TALLY, PACKING = Tally("weights"), Tally("files")


@pytest.fixture
def tally() -> Tally:
    """Of training's faults."""
    return TALLY


@pytest.fixture
def packing() -> Tally:
    """Of packing's faults."""
    return PACKING


def pytest_runtest_logreport(report) -> None:
    if report.failed and "tests/faults/" in report.nodeid:
        (PACKING if "test_packing" in report.nodeid else TALLY).failed.append(report.nodeid)


def pytest_sessionfinish(session) -> None:
    """GEOKR_FAULTS_JSON: the file for training's figures; those of packing go beside it."""
    if path := os.environ.get("GEOKR_FAULTS_JSON"):
        for tally, file in ((TALLY, Path(path)), (PACKING, Path(path).with_name("packing.json"))):
            if tally.injected:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(tally.report(), indent=1) + "\n")
