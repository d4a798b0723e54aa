"""What is made of a finished dataset for people to look at: tiles.parquet and report.html.

The dataset is whole before any of it begins and stays so whatever fails here; the same command makes what is missing.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from geokr.manifests import Manifest
from geokr.records import RecordError
from preprocess import engine, report_page, report_pictures, shards, stages, tile_table, workfolder
from preprocess.errors import RasterError
from preprocess.phases import Progress
from preprocess.plan import Plan
from preprocess.report_page import Run


class Finishing:
    """Makes what belongs beside a dataset, once. warnings: what could not be made, and why. command: for the report."""

    def __init__(self, plan: Plan, out: Path, progress: Progress, command: Sequence[str]) -> None:
        self.plan, self.out, self.progress, self.command = plan, out, progress, command
        self.start = time.monotonic()
        self.tried = False
        self.warnings: list[str] = []

    def with_work(
        self, manifest: Manifest, work: Path, spent: Mapping[str, tuple[float, float]], part: Manifest | None
    ) -> None:
        """While ``.work`` is there, from what scanning and gathering left in it. part: what this run made."""
        workers = engine.default_workers() if self.plan.options.workers is None else self.plan.options.workers
        seconds = time.monotonic() - self.start if spent else None  # of this run, where it is the one that packed
        if not spent:  # an earlier run packed, and was cut short after the manifest
            spent = _stages_of(work)
        positions = part.counts["positions"] if part is not None else _positions_of(work)
        examples = report_pictures.examples(work / "spill")
        run = Run(self.command, seconds, workers, spent, positions, examples)
        # the shards hold it now, and what is still to be written may need the room
        for frames in (work / "spill").glob("*.frames"):
            frames.unlink()
        self._make(manifest, work / tile_table.PARTS, work, run)

    def afterwards(self, manifest: Manifest) -> None:
        """What an older dataset lacks, from its shards."""
        if not self.tried:
            self._make(manifest, self.out / "no parts", None, Run(self.command))

    def _make(self, manifest: Manifest, parts: Path, scratch: Path | None, run: Run) -> None:
        self.tried = True
        report = self.out / report_page.NAME
        stale = scratch is not None or not report.exists()
        if not tile_table.is_current(self.out, manifest):
            stale = self._try(
                tile_table.NAME, lambda: tile_table.write(self.out, manifest, parts, scratch, self._table_progress)
            )
        if stale and tile_table.is_current(self.out, manifest):
            self._try(report_page.NAME, lambda: self._write_report(report, manifest, scratch, run))

    def _write_report(self, path: Path, manifest: Manifest, scratch: Path | None, run: Run) -> None:
        self.progress("report", 0, 1)
        content = report_page.page(self.out, manifest, self.plan.sheets, self.plan.legend, run)
        shards.write_whole(path, content, scratch)
        self.progress("report", 1, 1)

    def _try(self, name: str, make: Callable[[], None]) -> bool:
        try:
            make()
        except (OSError, RecordError, RasterError) as error:
            self.warnings.append(
                f"{name} could not be made ({error}); the dataset is whole, and the same command tries again"
            )
            return False
        return True

    def _table_progress(self, done: int, total: int) -> None:
        self.progress("footprints", done, total)


def _stages_of(work: Path) -> Mapping[str, tuple[float, float]]:
    """Where time went, from the commits of ``.work``."""
    total: dict[str, list[float]] = {}
    for path in (*work.glob("limits-*.json"), *work.glob("spill/*.json"), *work.glob("shards/*.json")):
        stages.add(total, (workfolder.read_commit(path) or {}).get("stages", {}))
    return stages.in_order(total)


def _positions_of(work: Path) -> int:
    """How many tile positions were looked at, from the commits of ``.work``."""
    found = (workfolder.read_commit(path) or {} for path in work.glob("spill/*.json"))
    return sum(commit.get("kept", 0) + sum(commit.get("rejected", {}).values()) for commit in found)
