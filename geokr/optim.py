"""Optimizers by name, in the implementation that was asked for or the nearest one that runs here."""

import importlib
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from geokr.config import ConfigError
from geokr.lamb import Lamb
from geokr.options import OptimOptions

log = logging.getLogger(__name__)

APEX_CLASSES = {"adam": "FusedAdam", "adamw": "FusedAdam", "sgd": "FusedSGD", "lamb": "FusedLAMB"}


def parameter_groups(model: nn.Module, options: OptimOptions) -> list[dict[str, Any]]:
    """Parameters with and without weight decay.

    Without: norms' parameters and biases (all that have one axis or none), and what the backbone itself excepts
    (position embeddings, class tokens). ``optim.decay_norm_bias`` puts all into one group.
    """
    backbone = getattr(model, "backbone", model)
    listed = getattr(backbone, "no_weight_decay", set)()
    excepted = {f"backbone.{name}" for name in listed} | set(listed)
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        free = (parameter.ndim <= 1 or name in excepted) and not options.decay_norm_bias
        (plain if free else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": options.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _torch_factory(options: OptimOptions) -> Callable[..., torch.optim.Optimizer]:
    moments = {"lr": options.lr, "betas": options.betas, "eps": options.eps}
    if options.name == "adamw":
        return lambda groups, **how: torch.optim.AdamW(groups, **moments, **how)
    if options.name == "adam":
        return lambda groups, **how: torch.optim.Adam(groups, **moments, **how)
    nesterov = options.momentum > 0
    return lambda groups, **how: torch.optim.SGD(
        groups, lr=options.lr, momentum=options.momentum, nesterov=nesterov, **how
    )


def _apex(groups: list[dict[str, Any]], options: OptimOptions, device: torch.device) -> torch.optim.Optimizer:
    remedy = (
        "build NVIDIA's apex from its source repository against this torch and CUDA (with --cpp_ext and --cuda_ext); "
        "the package named apex on PyPI is unrelated. Or use optim.implementation=fused"
    )
    if device.type != "cuda":
        raise ConfigError(f"optim.implementation=apex: it runs on CUDA only and this run is on {device.type}: {remedy}")
    try:
        factory = getattr(importlib.import_module("apex.optimizers"), APEX_CLASSES[options.name])
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"optim.implementation=apex: apex.optimizers cannot be imported ({error}): {remedy}"
        ) from error
    if options.name == "sgd":
        return factory(groups, lr=options.lr, momentum=options.momentum, nesterov=options.momentum > 0)
    moments = {"lr": options.lr, "betas": options.betas, "eps": options.eps}
    if options.name == "lamb":  # clipping is train.clip_norm's business, for every optimizer alike
        return factory(groups, **moments, adam_w_mode=True, max_grad_norm=float("inf"))
    return factory(groups, **moments, adam_w_mode=options.name == "adamw")


def build_optimizer(model: nn.Module, options: OptimOptions, device: torch.device) -> tuple[torch.optim.Optimizer, str]:
    """The optimizer over the model's parameters, and the words that say which implementation it is.

    ``fused`` falls back to ``foreach`` where torch has no fused kernel, and the log says so. The learning rate is a
    number in the parameter groups: setting it each step costs no wait for the device.
    Raises ConfigError where ``apex`` was asked for and is not there.
    """
    groups = parameter_groups(model, options)
    if options.implementation == "apex":
        return _apex(groups, options, device), f"{options.name}, NVIDIA apex"
    if options.name == "lamb":
        if options.implementation == "fused":
            log.info("optim.implementation=fused: torch has no fused LAMB; the foreach one of geokr runs")
        return Lamb(groups, options.lr, options.betas, options.eps), "lamb, foreach"
    factory = _torch_factory(options)
    if options.implementation == "fused":
        try:
            return factory(groups, fused=True), f"{options.name}, fused"
        except (RuntimeError, ValueError) as error:
            log.warning("optim.implementation=fused does not run here (%s): falling back to foreach", error)
    return factory(groups, foreach=True), f"{options.name}, foreach"


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The rate of the next step, for every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
