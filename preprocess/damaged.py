"""Scenes that opened but could not be read through, and cut tiles that cannot be used."""

from typing import Any

from preprocess.plan import Plan
from preprocess.workfolder import FutileError


class Damaged:
    """Scenes that opened but could not be read through. Raises FutileError when they become too many."""

    def __init__(self, plan: Plan) -> None:
        self.scenes: dict[str, str] = {}
        self.before = len(plan.rejected)
        self.total = len(plan.tasks) + self.before
        self.allowed = plan.options.max_bad_fraction

    def add(self, scene_id: str, message: str) -> None:
        self.scenes[scene_id] = message
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
        self.messages += commit["bad"][: 20 - len(self.messages)]
        if self.count > self.allowed * self.total:
            raise FutileError(
                f"{self.count} of {self.total} tiles cannot be used (max_bad_fraction={self.allowed:g}):\n"
                + "\n".join(f"  {line}" for line in self.messages)
            )
