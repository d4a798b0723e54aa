"""A stand-in for apex.optimizers that records how it is called.

Signatures, where step counts are kept, and what zero_grad takes are as published in NVIDIA/apex: fused_adam.py,
fused_lamb.py, fused_sgd.py. The arithmetic is written out one parameter at a time, on any device.
"""

import math
import sys
from types import ModuleType

import torch

calls: list[tuple[str, dict]] = []


class _Fused(torch.optim.Optimizer):
    def zero_grad(self):  # no set_to_none
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    @torch.no_grad()
    def step(self, closure=None):
        calls.append(("step", {"lr": [group["lr"] for group in self.param_groups]}))
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                if p.grad is not None:
                    self._one(group, p)

    def _moments(self, group, p, gradient):
        state, (b1, b2), t = self.state[p], group["betas"], group["step"]
        if len(state) == 0:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        state["exp_avg"].mul_(b1).add_(gradient, alpha=1 - b1)
        state["exp_avg_sq"].mul_(b2).add_(gradient * gradient, alpha=1 - b2)
        return state["exp_avg"] / (1 - b1**t) / ((state["exp_avg_sq"] / (1 - b2**t)).sqrt() + group["eps"])


class FusedAdam(_Fused):
    def __init__(
        self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True, weight_decay=0.0,
        amsgrad=False, set_grad_none=True, capturable=False, master_weights=False,
    ):  # fmt: skip
        calls.append(("FusedAdam", {"lr": lr, "betas": betas, "eps": eps, "adam_w_mode": adam_w_mode}))
        assert (amsgrad, capturable, master_weights) == (False, False, False)
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.adam_w_mode = adam_w_mode

    def _one(self, group, p):
        decay = group["weight_decay"] * p
        update = self._moments(group, p, p.grad if self.adam_w_mode else p.grad + decay)
        p -= group["lr"] * (update + decay if self.adam_w_mode else update)


class FusedLAMB(_Fused):
    def __init__(
        self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01, amsgrad=False,
        adam_w_mode=True, grad_averaging=True, set_grad_none=True, max_grad_norm=1.0, use_nvlamb=False,
    ):  # fmt: skip
        calls.append(("FusedLAMB", {"lr": lr, "betas": betas, "eps": eps, "max_grad_norm": max_grad_norm}))
        assert adam_w_mode
        assert grad_averaging
        assert math.isinf(max_grad_norm), "gradients would be clipped"
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def _one(self, group, p):
        update = self._moments(group, p, p.grad) + group["weight_decay"] * p
        norms = float(p.norm()), float(update.norm())
        trust = norms[0] / norms[1] if group["weight_decay"] and all(norms) else 1.0
        p -= group["lr"] * trust * update


class FusedSGD(torch.optim.Optimizer):
    def __init__(
        self, params, lr, momentum=0, dampening=0, weight_decay=0, nesterov=False, wd_after_momentum=False,
        materialize_master_grads=True, set_grad_none=False,
    ):  # fmt: skip
        calls.append(("FusedSGD", {"lr": lr, "momentum": momentum, "nesterov": nesterov}))
        names = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        super().__init__(params, names)

    @torch.no_grad()
    def step(self, closure=None):
        calls.append(("step", {"lr": [group["lr"] for group in self.param_groups]}))
        for group in self.param_groups:
            for p in group["params"]:
                gradient, state = p.grad + group["weight_decay"] * p, self.state[p]
                if "momentum_buffer" in state:
                    state["momentum_buffer"].mul_(group["momentum"]).add_(gradient)
                else:
                    state["momentum_buffer"] = gradient.clone()
                nesterov = gradient + group["momentum"] * state["momentum_buffer"]
                p -= group["lr"] * (nesterov if group["nesterov"] else state["momentum_buffer"])


def install(patch) -> None:
    """Puts the stand-in in apex's place for as long as the monkeypatch holds."""
    package, module = ModuleType("apex"), ModuleType("apex.optimizers")
    package.optimizers = module
    for made in (FusedAdam, FusedLAMB, FusedSGD):
        patch.setattr(made, "__module__", f"apex.optimizers.{made.__name__}")
        setattr(module, made.__name__, made)
    patch.setitem(sys.modules, "apex", package)
    patch.setitem(sys.modules, "apex.optimizers", module)
    calls.clear()
