"""How fast a disk, or memory, takes bytes: the limit for tiles that are stored as they are."""

import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bench_pack_inputs import Inputs

MEMORY = Path("/dev/shm")  # a folder in memory on Linux
PIECE = 8 << 20


def write_alone(inputs: Inputs, out: Path, size: int) -> dict[str, Any]:
    """One file of ``size`` bytes in the same folder, written in order by one process and brought to the disk."""
    out.mkdir(parents=True)
    piece = np.random.default_rng(0).bytes(PIECE)
    start, cpu = time.perf_counter(), time.process_time()
    with open(out / "bytes", "wb", buffering=0) as file:
        left = size
        while left:
            left -= file.write(piece[: min(left, PIECE)])
        os.fsync(file.fileno())
    return {"bytes": size, "seconds": time.perf_counter() - start, "cpu_s": time.process_time() - cpu}


def memory_folder(needed: int) -> Path | None:
    """A folder in memory that has room for so many bytes, or None."""
    if not os.access(MEMORY, os.W_OK):
        return None
    there = os.statvfs(MEMORY)
    return MEMORY if there.f_bavail * there.f_frsize > needed else None
