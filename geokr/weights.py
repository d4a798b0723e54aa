"""Weights files: reading them without running code, and fitting them to a backbone."""

import logging
import math
import pickle
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from geokr.config import ConfigError

log = logging.getLogger(__name__)
SHOWN = 5  # keys that a message names before it only counts


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a .pth or .pt file (weights only: nothing in it is executed).

    Raises ConfigError if there is no such file, or it is damaged, or holds something else than named tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such weights file; expected random, imagenet or a file's path")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        log.warning("%s: a pickle file; read with weights_only, so that nothing in it runs. Prefer .safetensors", path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise ConfigError(f"{path}: not a weights file, or damaged ({first})") from error
    for key in ("state_dict", "model"):  # what trainers commonly wrap weights in
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ConfigError(f"{path}: expected a mapping of names to tensors; save model.state_dict()")
    return loaded


def adapt_bands(weight_OIHW: Tensor, bands: int) -> Tensor:
    """A first convolution's weights for another band count, by timm's rule.

    The input channels repeat in turn and are scaled so that a grey image gives the response it gave; for one band
    they are summed.
    """
    have = weight_OIHW.shape[1]
    if bands == 1:
        return weight_OIHW.sum(1, keepdim=True)
    repeated = weight_OIHW.repeat(1, math.ceil(bands / have), 1, 1)[:, :bands]
    return repeated * (have / bands)


def _first_convolution(backbone: nn.Module) -> str | None:
    return next((f"{name}.weight" for name, m in backbone.named_modules() if isinstance(m, nn.Conv2d)), None)


def _head_keys(state: dict[str, Tensor], wanted: dict[str, Tensor]) -> set[str]:
    """Keys of a classifier, which a backbone has no place for."""
    heads = ("fc.", "head.", "condition.", "classifier.", "pre_logits.")
    return {key for key in state if key not in wanted and key.startswith(heads)}


def fit_error(state: dict[str, Tensor], wanted: dict[str, Tensor]) -> str:
    """The first keys that differ between tensors that are given and those that are wanted; empty if they fit."""
    problems = {
        "missing": sorted(wanted.keys() - state.keys()),
        "unknown": sorted(state.keys() - wanted.keys()),
        "of another shape": [
            f"{key} {tuple(state[key].shape)} instead of {tuple(wanted[key].shape)}"
            for key in wanted
            if key in state and state[key].shape != wanted[key].shape
        ],
    }
    found = [f"{len(keys)} {what}: {', '.join(keys[:SHOWN])}" for what, keys in problems.items() if keys]
    return f"keys {'; '.join(found)}" if found else ""


def load_into(backbone: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Copies the tensors into the backbone; a classifier among them is left out.

    The first convolution is adapted where only its band count differs, and the log says so.
    Raises ConfigError naming the first keys that are missing, unknown or of another shape.
    """
    wanted = backbone.state_dict()
    if not state.keys() & wanted.keys():
        state = {key.removeprefix("backbone."): tensor for key, tensor in state.items()}
    first = _first_convolution(backbone)
    if first in state and state[first].ndim == 4 and state[first].shape != wanted[first].shape:
        same = state[first].shape[0] == wanted[first].shape[0] and state[first].shape[2:] == wanted[first].shape[2:]
        if same:
            have, bands = state[first].shape[1], wanted[first].shape[1]
            log.warning("%s: its first convolution takes %d bands; adapted to %d", where, have, bands)
            state = {**state, first: adapt_bands(state[first].float(), bands)}
    left_out = _head_keys(state, wanted)
    given = {key: tensor for key, tensor in state.items() if key not in left_out}
    if problems := fit_error(given, wanted):
        raise ConfigError(f"{where}: does not fit the backbone; {problems}. Is model.backbone the same?")
    backbone.load_state_dict({key: state[key] for key in wanted})
