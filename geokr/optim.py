"""Optimizers by name, in the implementation that was asked for or the nearest one that runs here."""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from geokr.apex_optim import build_apex
from geokr.lamb import Lamb
from geokr.options import OptimOptions

log = logging.getLogger(__name__)


def parameter_groups(model: nn.Module, options: OptimOptions) -> list[dict[str, Any]]:
    """Parameters with and without weight decay.

    Without: norms' parameters and biases (all that have one axis or none), and what the backbone itself excepts
    (position embeddings, class tokens). ``optim.decay_norm_bias`` puts all into one group, but for the layer that tells
    the head of colours: it begins at 0, where LAMB's trust ratio, which decaying parameters take, would hold it.
    """
    backbone = getattr(model, "backbone", model)
    listed = getattr(backbone, "no_weight_decay", set)()
    excepted = {f"backbone.{name}" for name in listed} | set(listed)
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        free = (parameter.ndim <= 1 or name in excepted) and not options.decay_norm_bias
        free = free or name.startswith("condition.")
        (plain if free else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": options.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _torch(
    groups: list[dict[str, Any]], options: OptimOptions, lr: float | Tensor, capturable: bool, **how: bool
) -> torch.optim.Optimizer:
    if options.name == "sgd":  # its fused kernel reads the rate on the device; it keeps no count
        nesterov = options.momentum > 0
        optimizer = torch.optim.SGD(groups, lr=lr, momentum=options.momentum, nesterov=nesterov, **how)
        return _with_momentum(optimizer) if nesterov else optimizer
    factory = torch.optim.AdamW if options.name == "adamw" else torch.optim.Adam
    return factory(groups, lr=lr, betas=options.betas, eps=options.eps, capturable=capturable, **how)


def _with_momentum(optimizer: torch.optim.SGD) -> torch.optim.SGD:
    """Momentum from 0, which a first step makes the gradient, as it would without.

    Left to torch (2.14), the fused kernel's is uninitialised memory after a first step that the loss scaler skipped.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def build_optimizer(
    model: nn.Module, options: OptimOptions, device: torch.device, *, capturable: bool = False
) -> tuple[torch.optim.Optimizer, str]:
    """The optimizer over the model's parameters, and the words that say which implementation it is.

    ``fused`` falls back to ``foreach`` where torch has no fused kernel, and the log says so. With a loss scaler the
    fused kernels read on the device whether to skip a step; the others wait for the device to know.
    ``capturable``: for steps inside a CUDA graph. Counts and learning rate are then on the device.
    Raises ConfigError where ``apex`` was asked for and is not there.
    """
    groups = parameter_groups(model, options)
    if options.implementation == "apex":
        return build_apex(groups, options, device, capturable=capturable), f"{options.name}, NVIDIA apex"
    lr = torch.tensor(options.lr, device=device) if capturable else options.lr
    if options.name == "lamb":
        if options.implementation == "fused":
            log.info("optim.implementation=fused: torch has no fused LAMB; the foreach one of geokr runs")
        return Lamb(groups, lr, options.betas, options.eps, capturable=capturable), "lamb, foreach"
    if options.implementation == "fused":
        try:
            return _torch(groups, options, lr, capturable, fused=True), f"{options.name}, fused"
        except (RuntimeError, ValueError) as error:
            log.warning("optim.implementation=fused does not run here (%s): falling back to foreach", error)
    return _torch(groups, options, lr, capturable, foreach=True), f"{options.name}, foreach"


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The rate of the next step, for every group: a number, or filled into the tensor a CUDA graph reads.

    Neither waits for the device.
    """
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
