"""What is made of a finished dataset for people to look at: tiles.parquet.

The dataset is whole before any of it begins and stays so whatever fails here; the same command makes what is missing.
"""

from collections.abc import Mapping
from pathlib import Path

from geokr.records import Manifest, RecordError
from preprocess import tile_table
from preprocess.pack import Progress


class Finishing:
    """Makes what belongs beside a dataset, once. warnings: what could not be made, and why."""

    def __init__(self, out: Path, progress: Progress) -> None:
        self.out, self.progress = out, progress
        self.tried = False
        self.warnings: list[str] = []

    def with_work(self, manifest: Manifest, work: Path, stages: Mapping[str, tuple[float, float]]) -> None:
        """While ``.work`` is there, from what gathering left in it."""
        # the shards hold it now, and what is still to be written may need the room
        for frames in (work / "spill").glob("*.frames"):
            frames.unlink()
        self._make(manifest, work / tile_table.PARTS, work)

    def afterwards(self, manifest: Manifest) -> None:
        """What an older dataset lacks, from its shards."""
        if not self.tried:
            self._make(manifest, self.out / "no parts", None)

    def _make(self, manifest: Manifest, parts: Path, scratch: Path | None) -> None:
        self.tried = True
        try:
            if not tile_table.is_current(self.out, manifest):
                tile_table.write(self.out, manifest, parts, scratch, self._table_progress)
        except (OSError, RecordError) as error:
            self.warnings.append(
                f"{tile_table.NAME} could not be made ({error}); the dataset is whole, and the same command tries again"
            )

    def _table_progress(self, done: int, total: int) -> None:
        self.progress("footprints", done, total)
