"""LAMB with multi-tensor operations.

You, Li, Reddi and others, "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", 2020,
algorithm 2, with Adam's bias correction:

    m = b1 m + (1 - b1) g          v = b2 v + (1 - b2) g^2
    u = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) + decay * w
    w = w - lr * trust * u         trust = |w| / |u|, or 1 where either norm is 0

Parameters without weight decay (norms, biases) take trust 1, as in NVIDIA's FusedLAMB and timm's Lamb, which this
agrees with when neither clips gradients.

On a GPU every line of a step is one launch for all parameters of a group, but for the trust ratios' multiplication,
which is one a decaying tensor: 54 for a ResNet-50.
"""

# pyright: reportPrivateImportUsage=false
# torch exports its multi-tensor operations under private names; its own optimizers use them so.

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class Lamb(torch.optim.Optimizer):
    """LAMB. State of a parameter: ``exp_avg``, ``exp_avg_sq``, and ``step``.

    ``lr``: a number, or a tensor of one number on the weights' device. ``step`` counts a parameter's steps, a number
    on the host. ``capturable`` keeps it on the device instead, one for all parameters of a group, so that a CUDA graph
    can hold the step; every parameter of a group must have a gradient then.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        capturable: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "capturable": capturable}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step for every parameter that has a gradient. Returns the closure's loss, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            self._begin(group, weights)
            for count, members in self._count(group, weights):
                self._update(group, members, count)
        return loss

    def _begin(self, group: dict[str, Any], weights: list[Tensor]) -> None:
        for weight in weights:
            if not self.state[weight]:
                zeros = torch.zeros_like(weight, memory_format=torch.preserve_format)
                count = torch.zeros((), device=weight.device) if group["capturable"] else 0.0
                self.state[weight] = {"step": count, "exp_avg": zeros, "exp_avg_sq": zeros.clone()}

    def _count(self, group: dict[str, Any], weights: list[Tensor]) -> list[tuple[Any, list[Tensor]]]:
        """Counts this step. Returns the parameters by their counts: one list, unless some missed steps."""
        states = [self.state[weight] for weight in weights]
        if group["capturable"] and states:
            count = torch.as_tensor(states[0]["step"], dtype=torch.float32, device=weights[0].device)
            for state in states:  # each has its own at first and after loading
                state["step"] = count
            count += 1
            return [(count, weights)]
        members: dict[float, list[Tensor]] = {}
        for weight, state in zip(weights, states, strict=True):
            state["step"] = float(state["step"]) + 1.0  # a tensor after loading
            members.setdefault(state["step"], []).append(weight)
        return list(members.items())

    def _update(self, group: dict[str, Any], weights: list[Tensor], count: float | Tensor) -> None:
        """count: steps of all these weights, with this one."""
        beta1, beta2 = group["betas"]
        lr, decay = group["lr"], group["weight_decay"]
        grads = [weight.grad for weight in weights if weight.grad is not None]
        means = [self.state[weight]["exp_avg"] for weight in weights]
        squares = [self.state[weight]["exp_avg_sq"] for weight in weights]
        torch._foreach_lerp_(means, grads, 1.0 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1.0 - beta2)
        # m / c1 / (sqrt(v / c2) + eps) = m / (sqrt(v) + eps sqrt(c2)) * sqrt(c2) / c1
        root = _correction(beta2, count) ** 0.5
        denominators = torch._foreach_sqrt(squares)
        torch._foreach_add_(denominators, group["eps"] * root)
        updates = list(torch._foreach_div(means, denominators))
        scale = root / _correction(beta1, count)
        torch._foreach_mul_(updates, scale if decay else lr * scale)
        if decay:
            torch._foreach_add_(updates, weights, alpha=decay)
            torch._foreach_mul_(updates, list((lr * _trust(weights, updates)).unbind()))
        torch._foreach_sub_(weights, updates)


def _correction(beta: float, count: float | Tensor) -> Any:
    """1 - beta^count. On the device in float64 between, because 1 - 0.999 has but four digits in float32."""
    if isinstance(count, Tensor):
        return (1.0 - beta ** count.double()).to(count.dtype)
    return 1.0 - beta**count


def _trust(weights: list[Tensor], updates: list[Tensor]) -> Tensor:
    """|w| / |u| of each pair, 1 where either is 0; one number a pair, on the weights' device."""
    w = torch.stack(torch._foreach_norm(weights))
    u = torch.stack(torch._foreach_norm(updates))
    return torch.where((w > 0) & (u > 0), w / u, torch.ones_like(w))
