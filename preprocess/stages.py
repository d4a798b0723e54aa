"""Where packing's time goes: seconds of each stage, kept by whoever does the work, added up by the driver.

The figures travel in the commits of ``.work`` and never reach the dataset, which is a function of its inputs alone.
"""

import time
from collections.abc import Mapping, Sequence

# Stages in the order of the work, and what each is. Hooks may add others.
STAGES = {
    "sample": "reading and sampling a scene for its stretch limits",
    "read": "reading pixels and finding which hold data",
    "stretch": "stretching to 8 bits",
    "judge": "quality rules",
    "mask": "reading the mask beside the scene",
    "label": "reading land cover and counting it under tiles",
    "place": "footprints, split, what a record says of its tile",
    "examples": "pictures of rejected tiles for the report",
    "statistics": "sums for the dataset's mean and deviation",
    "encode": "pixels to the codec's bytes",
    "record": "records to frames with checksums",
    "spill": "writing frames to the spill file",
    "gather": "reading frames back, checking and hashing them, writing shards",
    "footprints": "a shard's rows of tiles.parquet",
}

# Stage to (CPU seconds, seconds that passed): where the second is much larger, it waits for a disk or for cores.
Times = Mapping[str, Sequence[float]]


class Clock:
    """Time of one task by stage: ``with clock("read"): ...``.

    Stages may lie in one another; each is charged with what is not inside another. CPU time is this thread's.
    """

    __slots__ = ("_cpu", "_inside", "_next", "_wall", "times")

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = {}
        self._inside: list[list[float]] = []
        self._cpu = self._wall = 0.0

    def __call__(self, stage: str) -> "Clock":
        self._next = self.times.setdefault(stage, [0.0, 0.0])
        return self

    def __enter__(self) -> None:
        self._charge()
        self._inside.append(self._next)

    def __exit__(self, *error: object) -> None:
        self._charge()
        self._inside.pop()

    def _charge(self) -> None:
        cpu, wall = time.thread_time(), time.perf_counter()
        if self._inside:
            stage = self._inside[-1]
            stage[0] += cpu - self._cpu
            stage[1] += wall - self._wall
        self._cpu, self._wall = cpu, wall


def add(total: dict[str, list[float]], times: Times) -> None:
    """Adds a task's times to a run's."""
    for stage, (cpu, wall) in times.items():
        spent = total.setdefault(stage, [0.0, 0.0])
        spent[0] += cpu
        spent[1] += wall


def in_order(total: Times) -> dict[str, tuple[float, float]]:
    """The same in the order of the work: stage to (CPU seconds, seconds that passed)."""
    names = [*(name for name in STAGES if name in total), *(name for name in total if name not in STAGES)]
    return {name: (total[name][0], total[name][1]) for name in names}
