"""Files that mean something only together, as weights and their cards: all of them are written, or none."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_together(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """Where to write files of the same names meanwhile; at the end of the block they are renamed to ``paths``.

    paths: in one folder, which exists; the last is the one without which the others are not read. It is taken away
    before the first is replaced and comes last, so that not even a killed process leaves it beside another's files.
    Where the block raises, what was there before stays; where a file cannot be renamed, none that was is left.
    Raises OSError.
    """
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=paths[0].parent, ignore_cleanup_errors=True) as folder:
        sources = [Path(folder) / path.name for path in paths]
        yield sources
        for source in sources:
            with source.open("rb") as file:
                os.fsync(file.fileno())
        paths[-1].unlink(missing_ok=True)
        placed: list[Path] = []
        try:
            for source, path in zip(sources, paths, strict=True):
                source.replace(path)
                placed.append(path)
        except BaseException:
            for path in placed:
                path.unlink(missing_ok=True)
            raise
