"""Scenes that opened but could not be read through."""

from preprocess.plan import Plan
from preprocess.workfolder import PackError


class Damaged:
    """Scenes that opened but could not be read through. Raises PackError when they become too many."""

    def __init__(self, plan: Plan) -> None:
        self.scenes: dict[str, str] = {}
        self.before = len(plan.rejected)
        self.total = len(plan.tasks) + self.before
        self.allowed = plan.options.max_bad_fraction

    def add(self, scene_id: str, message: str) -> None:
        self.scenes[scene_id] = message
        if len(self.scenes) + self.before > self.allowed * self.total:
            raise PackError(
                f"{len(self.scenes) + self.before} of {self.total} scenes cannot be used "
                f"(max_bad_fraction={self.allowed:g}):\n" + "\n".join(f"  {line}" for line in self.scenes.values())
            )
