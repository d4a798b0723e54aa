"""Weights files: reading them without running code, and fitting them to a backbone."""

import json
import logging
import math
import pickle
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from geokr import band_names
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


def bands_of(path: str | Path) -> tuple[str, ...]:
    """The bands that an exported backbone takes, by the card beside it; none where there is no such card."""
    try:
        card = json.loads(Path(f"{path}.json").read_bytes())
        return tuple(str(band["name"]) for band in card["bands"])
    except (OSError, ValueError, KeyError, TypeError):
        return ()


def adapt_bands(weight_OIHW: Tensor, bands: int) -> Tensor:
    """A first convolution's weights for another band count where nothing is known of the bands, by timm's rule: the
    input channels repeat in turn, scaled by the ratio of the counts; for one band they are summed."""
    have = weight_OIHW.shape[1]
    if bands == 1:
        return weight_OIHW.sum(1, keepdim=True)
    repeated = weight_OIHW.repeat(1, math.ceil(bands / have), 1, 1)[:, :bands]
    return repeated * (have / bands)


def place_bands(weight_OIHW: Tensor, places: Sequence[int | None]) -> Tensor:
    """A first convolution's weights for other bands. places: the input channel of each, None for the mean of all.

    Scaled by the ratio of the counts, so that with every channel in use a grey image gives the response it gave.
    """
    mean = weight_OIHW.mean(1)
    chosen = [mean if place is None else weight_OIHW[:, place] for place in places]
    return torch.stack(chosen, 1) * (weight_OIHW.shape[1] / len(places))


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


def load_into(
    backbone: nn.Module, state: dict[str, Tensor], where: str, given: Sequence[str] = (), wanted: Sequence[str] = ()
) -> None:
    """Copies the tensors into the backbone; a classifier among them is left out.

    given, wanted: names of the bands that the tensors and the backbone take. Where they are known, each of the first
    convolution's inputs goes to the band of its name or colour; else it is adapted where only its band count differs.
    The log says so. Raises ConfigError naming the first keys that are missing, unknown or of another shape.
    """
    wanted_state = backbone.state_dict()
    if not state.keys() & wanted_state.keys():
        state = {key.removeprefix("backbone."): tensor for key, tensor in state.items()}
    first = _first_convolution(backbone)
    if first in state and first in wanted_state and state[first].ndim == 4:
        state = {**state, first: _for_bands(state[first], wanted_state[first], where, given, wanted)}
    left_out = _head_keys(state, wanted_state)
    kept = {key: tensor for key, tensor in state.items() if key not in left_out}
    if problems := fit_error(kept, wanted_state):
        raise ConfigError(f"{where}: does not fit the backbone; {problems}. Is model.backbone the same?")
    backbone.load_state_dict({key: state[key] for key in wanted_state})


def _for_bands(have: Tensor, want: Tensor, where: str, given: Sequence[str], wanted: Sequence[str]) -> Tensor:
    """The first convolution's weights for the wanted bands; as they are where they fit, or do not by more than that."""
    if have.shape[0] != want.shape[0] or have.shape[2:] != want.shape[2:]:
        return have
    names = ", ".join(given), ", ".join(wanted)
    if len(given) == have.shape[1] and len(wanted) == want.shape[1]:
        places = [band_names.place_of(name, given) for name in wanted]
        if places == list(range(have.shape[1])):
            return have
        if any(place is not None for place in places):
            log.info("%s: its first convolution takes %s; put in place for %s", where, *names)
            return place_bands(have.float(), places)
        if have.shape == want.shape:
            log.warning("%s: its first convolution takes %s, taken in this order for %s", where, *names)
    if have.shape == want.shape:
        return have
    log.warning("%s: its first convolution takes %d bands; adapted to %d", where, have.shape[1], want.shape[1])
    return adapt_bands(have.float(), want.shape[1])
