"""What depends on the step alone: the learning rate, and which steps do periodic work.

Steps count from 1, as people and logs do: step 1 is the first optimizer step, step ``total`` the last.
"""

import math
from dataclasses import dataclass

from geokr.options import MethodOptions, OptimOptions


def due(step: int, every: int, total: int) -> bool:
    """Whether periodic work happens after this step: at multiples of ``every``, and always at the last step."""
    return step % every == 0 or step == total


@dataclass(frozen=True, slots=True)
class LearningRate:
    """The learning rate at a step of ``total``: a linear rise from 0, then the chosen course."""

    options: OptimOptions
    total: int

    @property
    def warmup_steps(self) -> int:
        return round(self.options.warmup * self.total)

    def __call__(self, step: int) -> float:
        """Rate of the optimizer step ``step`` (1..total)."""
        done = step - 1
        if done < self.warmup_steps:
            return self.options.lr * step / self.warmup_steps
        return self.options.lr * self._course(done)

    def _course(self, done: int) -> float:
        if self.options.schedule == "constant":
            return 1.0
        if self.options.schedule == "step":
            return self.options.gamma ** (done * self.options.drops // self.total)
        progress = (done - self.warmup_steps) / (self.total - self.warmup_steps)
        low = self.options.final_lr
        return low + (1.0 - low) * 0.5 * (1.0 + math.cos(math.pi * progress))


@dataclass(frozen=True, slots=True)
class ConsistencyWeight:
    """The consistency loss's weight at a step of ``total``.

    While x, the part of the ramp that is done, is below 1: exp(-5 (1 - x)^2) of the whole (Laine and Aila, 2017; so in
    Tarvainen and Valpola's mean teacher, 2017).
    """

    options: MethodOptions
    total: int

    def __call__(self, step: int) -> float:
        ramp = self.options.consistency_ramp * self.total
        left = 1.0 - step / ramp if step < ramp else 0.0
        return self.options.consistency_weight * math.exp(-5.0 * left * left)


def steps_of_epochs(epochs: float, records: int, global_batch: int) -> int:
    """Optimizer steps that see ``epochs`` passes over ``records`` samples, rounded up."""
    return max(1, math.ceil(epochs * records / global_batch - 1e-9))
