"""LAMB with multi-tensor operations.

You, Li, Reddi and others, "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", 2020,
algorithm 2, with Adam's bias correction:

    m = b1 m + (1 - b1) g          v = b2 v + (1 - b2) g^2
    u = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) + decay * w
    w = w - lr * trust * u         trust = |w| / |u|, or 1 where either norm is 0

Parameters without weight decay (norms, biases) take trust 1, as in NVIDIA's FusedLAMB and timm's Lamb, which this
agrees with when neither clips gradients.
"""

# pyright: reportPrivateImportUsage=false
# torch exports its multi-tensor operations under private names; its own optimizers use them so.

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class Lamb(torch.optim.Optimizer):
    """LAMB. State of a parameter: ``exp_avg``, ``exp_avg_sq``, and ``step``, a float32 scalar on the CPU."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step for every parameter that has a gradient. Returns the closure's loss, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if weights:
                self._step_group(group, weights)
        return loss

    def _step_group(self, group: dict[str, Any], weights: list[Tensor]) -> None:
        for weight in weights:
            if not self.state[weight]:
                zeros = torch.zeros_like(weight, memory_format=torch.preserve_format)
                self.state[weight] = {"step": torch.tensor(0.0), "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
        states = [self.state[weight] for weight in weights]
        for state in states:
            state["step"] += 1
        beta1, beta2 = group["betas"]
        steps = [float(state["step"]) for state in states]  # on the CPU: no wait for a device
        grads = [weight.grad for weight in weights if weight.grad is not None]
        means = [state["exp_avg"] for state in states]
        squares = [state["exp_avg_sq"] for state in states]
        torch._foreach_lerp_(means, grads, 1.0 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1.0 - beta2)
        denominators = torch._foreach_div(squares, [1.0 - beta2**t for t in steps])
        torch._foreach_sqrt_(denominators)
        torch._foreach_add_(denominators, group["eps"])
        updates = list(torch._foreach_div(means, [1.0 - beta1**t for t in steps]))
        torch._foreach_div_(updates, denominators)
        if group["weight_decay"] != 0:
            torch._foreach_add_(updates, weights, alpha=group["weight_decay"])
            torch._foreach_mul_(updates, _trust(weights, updates))
        torch._foreach_add_(weights, updates, alpha=-group["lr"])


def _trust(weights: list[Tensor], updates: list[Tensor]) -> list[Tensor]:
    """|w| / |u| of each pair, 1 where either is 0; scalars on the weights' device."""
    w = torch.stack(torch._foreach_norm(weights))
    u = torch.stack(torch._foreach_norm(updates))
    return list(torch.where((w > 0) & (u > 0), w / u, torch.ones_like(w)).unbind())
