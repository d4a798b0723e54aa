"""NVIDIA apex's optimizers, where apex is installed.

What this relies on was read in apex's own files (apex/optimizers/fused_adam.py, fused_lamb.py, fused_sgd.py):

- FusedAdam(params, lr, bias_correction, betas, eps, adam_w_mode, weight_decay, ...), without weight decay of its own;
- FusedLAMB(params, lr, bias_correction, betas, eps, weight_decay, amsgrad, adam_w_mode, grad_averaging, ...,
  max_grad_norm=1.0), which clips all gradients together unless told otherwise;
- FusedSGD(params, lr, momentum, dampening, weight_decay, nesterov, ...);
- Adam and LAMB count steps in their parameter groups, under ``step``, and not in the parameters' state;
- their ``zero_grad`` takes no argument, and sets gradients to None.
"""

import importlib
import importlib.metadata
from typing import Any

import torch

from geokr.config import ConfigError
from geokr.options import OptimOptions

CLASSES = {"adam": "FusedAdam", "adamw": "FusedAdam", "sgd": "FusedSGD", "lamb": "FusedLAMB"}
REMEDY = (
    "build NVIDIA's apex from its source with its C++ and CUDA extensions, against this torch and CUDA "
    "(https://github.com/NVIDIA/apex#installation; the package named apex on PyPI is unrelated), "
    "or use optim.implementation=fused"
)


def counts_in_groups(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer keeps its step counts in its groups, as apex's do."""
    return type(optimizer).__module__.partition(".")[0] == "apex"


def _installed() -> str:
    """Words about a distribution named apex that does not hold what is needed; empty where there is none."""
    try:
        about = importlib.metadata.metadata("apex")
    except importlib.metadata.PackageNotFoundError:
        return ""
    return f" An apex is installed, {about['Version']} ({about['Summary']}): not NVIDIA's, or not whole."


def _class(name: str) -> Any:
    try:
        return getattr(importlib.import_module("apex.optimizers"), CLASSES[name])
    except Exception as error:  # the unrelated package fails in ways of its own, with TypeError and SyntaxError too
        raise ConfigError(
            f"optim.implementation=apex: apex.optimizers.{CLASSES[name]} cannot be imported "
            f"({type(error).__name__}: {error}).{_installed()} Remedy: {REMEDY}"
        ) from error


def _arguments(options: OptimOptions) -> dict[str, Any]:
    if options.name == "sgd":
        return {"lr": options.lr, "momentum": options.momentum, "nesterov": options.momentum > 0}
    moments = {"lr": options.lr, "betas": options.betas, "eps": options.eps}
    if options.name == "lamb":  # clipping is train.clip_norm's business, for every optimizer alike
        return {**moments, "adam_w_mode": True, "max_grad_norm": float("inf")}
    return {**moments, "adam_w_mode": options.name == "adamw"}


def build_apex(
    groups: list[dict[str, Any]], options: OptimOptions, device: torch.device, *, capturable: bool
) -> torch.optim.Optimizer:
    """apex's optimizer over parameter groups. Raises ConfigError, with the remedy, where it cannot be had."""
    if device.type != "cuda":
        raise ConfigError(
            f"optim.implementation=apex: it runs on CUDA only and this run is on {device.type}. Remedy: {REMEDY}"
        )
    if capturable:
        raise ConfigError(
            "optim.implementation=apex: its LAMB and SGD cannot be part of a CUDA graph; use optim.implementation=fused"
        )
    factory = _class(options.name)
    try:
        return factory(groups, **_arguments(options))
    except RuntimeError as error:  # a build without extensions
        raise ConfigError(f"optim.implementation=apex: {error}. Remedy: {REMEDY}") from error
