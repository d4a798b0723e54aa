"""Identifying rasters cheaply: by a part of their bytes and what their headers came to."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from preprocess import remote


def fingerprint(digests: Sequence[str], header: tuple[Any, ...]) -> str:
    """Identifies a raster cheaply by :func:`digest` of its files and what their headers came to.

    header: what was read, which may come from files beside it (a world file, an .aux.xml) as well.
    """
    combined = hashlib.sha256(repr((tuple(digests), *header)).encode()).hexdigest()[:24]
    return f"{sum(int(digest.partition('-')[0]) for digest in digests)}-{combined}"


def digest(path: str) -> str:
    """A file's size and a hash of its first and last 256 KiB. A mask beside it counts with its bytes."""
    size = Path(path).stat().st_size
    hashed = hashlib.sha256(repr(size).encode())
    for file in (path, f"{path}.msk"):
        if os.path.isfile(file):
            with open(file, "rb") as content:
                hashed.update(content.read(256 << 10))
                content.seek(max(0, os.path.getsize(file) - (256 << 10)))
                hashed.update(content.read())
    return f"{size}-{hashed.hexdigest()[:24]}"


def _remote_digest(dataset: Any) -> str:
    """As :func:`digest` for a file behind a URL, from what costs few requests: its form, where its blocks lie and how
    large they are, which compression makes a matter of the pixels, and the first and the last block itself."""
    blocks = list(dataset.block_windows(1))
    hashed = hashlib.sha256(repr((dataset.profile, dataset.tags(), len(blocks))).encode())
    for (row, column), _ in blocks[:: max(1, len(blocks) // 64)]:
        for what in ("BLOCK_OFFSET", "BLOCK_SIZE"):
            hashed.update(repr(dataset.get_tag_item(f"{what}_{column}_{row}", "TIFF", bidx=1)).encode())
    for _, window in (blocks[0], blocks[-1]):
        hashed.update(dataset.read(window=window).tobytes())
    return f"0-{hashed.hexdigest()[:24]}"


def digest_of(dataset: Any, path: str) -> str:
    """Of an open file, local or behind a URL."""
    return _remote_digest(dataset) if remote.is_remote(path) else digest(path)
