"""The whole state of a training run as named tensors and numbers, and back.

Nothing else is needed to go on: the learning rate and the teacher's rule are functions of the step, the order of
samples and their augmentation functions of seed and position, and the generators behind dropout are seeded afresh
at each step from (seed, step, rank).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from geokr.apex_optim import counts_in_groups
from geokr.checkpoint import CheckpointError

Scaler = torch.amp.GradScaler


def optimizer_state(optimizer: Optimizer, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors ``optimizer/KIND/PARAMETER`` and numbers of an optimizer over the model's parameters.

    numbers: step counts that some optimizers (apex) keep in their groups.
    """
    tensors = {}
    for name, parameter in model.named_parameters():
        for kind, value in optimizer.state.get(parameter, {}).items():
            if value is not None:  # SGD's momentum before its first step
                tensors[f"optimizer/{kind}/{name}"] = torch.as_tensor(value).detach()
    return tensors, {"group_steps": [int(group.get("step", 0)) for group in optimizer.param_groups]}


def load_optimizer(
    optimizer: Optimizer, model: nn.Module, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]
) -> None:
    """The reverse of :func:`optimizer_state`; hyperparameters stay those of the configuration."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("optimizer/"):
            _, kind, name = key.split("/", 2)
            by_name.setdefault(name, {})[kind] = tensor
    tree = optimizer.state_dict()
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    tree["state"] = {i: by_name[names[p]] for i, p in enumerate(order) if names[p] in by_name}
    for group, steps in zip(tree["param_groups"], numbers["group_steps"], strict=True):
        states = [tree["state"][i] for i in group["params"] if i in tree["state"]]
        _place_steps(group, states, steps, in_group=counts_in_groups(optimizer))
    optimizer.load_state_dict(tree)
    for parameter in order:  # kernels want moments laid out as their weights, channels-last for convolutions
        for kind, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.ndim > 0:
                optimizer.state[parameter][kind] = torch.empty_like(parameter).copy_(value)


def _place_steps(group: dict[str, Any], states: list[dict[str, Tensor]], steps: int, *, in_group: bool) -> None:
    """Puts a group's step counts where the optimizer keeps them, wherever the one that saved them did.

    steps: of the group, 0 where its parameters counted, or nothing did (SGD).
    """
    if in_group:
        found = [int(state.pop("step")) for state in states if "step" in state]
        if count := max([steps, *found]):
            group["step"] = count
    elif steps:
        for state in states:
            state["step"] = torch.tensor(float(steps))


def model_tensors(prefix: str, model: nn.Module) -> dict[str, Tensor]:
    """The model's state with ``prefix/`` before each name."""
    return {f"{prefix}/{name}": tensor.detach() for name, tensor in model.state_dict().items()}


def load_model(prefix: str, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copies ``prefix/...`` into the model, in place. Raises CheckpointError if names or shapes do not fit."""
    own = {key.removeprefix(f"{prefix}/"): value for key, value in tensors.items() if key.startswith(f"{prefix}/")}
    try:
        model.load_state_dict(own)
    except RuntimeError as error:
        raise CheckpointError(f"the checkpoint's {prefix} does not fit the model: {error}") from error


def scaler_numbers(scaler: Scaler) -> dict[str, Any]:
    """The loss scaler's numbers; empty where it is disabled."""
    return dict(scaler.state_dict())


def all_finite(tensors: Mapping[str, Tensor]) -> bool:
    """Whether every floating-point tensor holds only finite numbers; one wait for each device.

    A sum is finite only if all its terms are, and costs a twentieth of looking at each. Finite terms can add up to
    more than a number holds: then each is looked at after all.
    """
    floating = [tensor for tensor in tensors.values() if tensor.is_floating_point()]
    sums: dict[torch.device, list[Tensor]] = {}
    for tensor in floating:
        sums.setdefault(tensor.device, []).append(tensor.sum(dtype=torch.float32))
    if all(bool(torch.stack(found).isfinite().all()) for found in sums.values()):
        return True
    return all(bool(torch.isfinite(tensor).all()) for tensor in floating)
