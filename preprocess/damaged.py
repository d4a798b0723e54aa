"""Scenes that opened but could not be read through, and cut tiles that cannot be used."""

from typing import Any

from preprocess.plan import Plan
from preprocess.workfolder import FutileError

MOST_TILES = 20  # of the cut tiles that cannot be used, how many are named


class Damaged:
    """Scenes that opened but could not be read through. Raises FutileError when they become too many.

    scenes: id to message. reasons: id to the reason's key. asked: the plan of all that the command names, whose scenes
    they are counted among.
    """

    def __init__(self, asked: Plan) -> None:
        self.scenes: dict[str, str] = {}
        self.reasons: dict[str, str] = {}
        self.before = len(asked.rejected)
        self.total = len(asked.tasks) + self.before
        self.allowed = asked.options.max_bad_fraction

    def add(self, scene_id: str, message: str, reason: str = "unreadable") -> None:
        self.scenes[scene_id], self.reasons[scene_id] = message, reason
        if len(self.scenes) + self.before > self.allowed * self.total:
            raise FutileError(
                f"{len(self.scenes) + self.before} of {self.total} scenes cannot be used "
                f"(max_bad_fraction={self.allowed:g}):\n" + "\n".join(f"  {line}" for line in self.scenes.values())
            )


class BadTiles:
    """Files among cut tiles that cannot be used. Raises FutileError when they become too many."""

    def __init__(self, plan: Plan) -> None:
        self.count, self.total, self.allowed = 0, plan.tiles, plan.options.max_bad_fraction
        self.messages: list[str] = []

    def add(self, commit: dict[str, Any]) -> None:
        """commit: of a task, of whatever kind."""
        if not commit.get("bad"):
            return
        self.count += commit["rejected"]["unreadable"]
        self.messages += commit["bad"][: MOST_TILES - len(self.messages)]
        if self.count > self.allowed * self.total:
            raise FutileError(
                f"{self.count} of {self.total} tiles cannot be used (max_bad_fraction={self.allowed:g}):\n"
                + "\n".join(f"  {line}" for line in self.messages)
            )


def named_tiles(commits: list[dict[str, Any]]) -> dict[str, tuple[str, str]]:
    """The first cut tiles that cannot be used, in the order of their names: tile id to (reason's key, message).

    commits: of all tasks, in order of their numbers. Those that an earlier version left in ``.work`` name none.
    """
    found = (
        (tile_id, (reason, message))
        for commit in commits
        for (tile_id, reason), message in zip(commit.get("bad_tiles", ()), commit.get("bad", ()), strict=False)
    )
    return dict(list(found)[:MOST_TILES])
