"""Backbone weights out of a run: ``python -m geokr.export --run DIR --out FILE``, and back into Python.

    backbone = geokr.load_backbone("backbone.safetensors")
    features_ND = backbone(images_NCHW)      # normalised by backbone.card["input"]["mean"] and ["std"]

The weights carry timm's keys for that backbone and nothing else: they load strictly into
``timm.create_model(name, num_classes=0, in_chans=...)``, a ResNet's into torchvision with ``fc=Identity()``, a VGG's
into its features. What else there is to know stands in the card beside them, ``FILE.json``.
"""

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from geokr import checkpoint
from geokr.checkpoint import Checkpoint, write_text
from geokr.config import ConfigError, read_yaml
from geokr.models import BackboneSpec, build_backbone
from geokr.runfolder import read_run
from geokr.weights import read_state

SUFFIXES = {".safetensors": "safetensors", ".pth": "torch", ".pt": "torch", ".onnx": "onnx"}
ONNX_MODULES = ("onnx", "onnxscript")


def card_path(weights: str | Path) -> Path:
    """Where a weights file's card lies: ``FILE.json``."""
    return Path(f"{weights}.json")


def _spec(card: dict[str, Any]) -> BackboneSpec:
    return BackboneSpec(card["backbone"]["name"], len(card["bands"]), card["backbone"]["image_size"])


def load_backbone(path: str | Path) -> nn.Module:
    """The exported backbone, in eval mode on the CPU; its ``card`` attribute holds the card.

    path: a .safetensors or .pth file that ``geokr.export`` wrote, with its card beside it.
    Raises ConfigError if either is missing, damaged, or does not fit the other.
    """
    beside = card_path(path)
    try:
        card = json.loads(beside.read_bytes())
        spec = _spec(card)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{beside}: expected the card that geokr.export writes beside the weights ({error})"
        ) from error
    backbone = build_backbone(spec)
    try:
        backbone.load_state_dict(read_state(path))
    except RuntimeError as error:
        raise ConfigError(f"{path}: does not fit {spec.name} as its card describes it: {error}") from error
    backbone.card = card  # type: ignore[assignment]
    return backbone.eval()


def backbone_state(found: Checkpoint, model: str) -> dict[str, Tensor]:
    """The backbone's tensors in a checkpoint, under timm's keys. model: ``teacher`` or ``student``."""
    prefix = f"{model}/backbone."
    return {k.removeprefix(prefix): v.contiguous() for k, v in found.tensors.items() if k.startswith(prefix)}


def make_card(run: Path, found: Checkpoint, model: str) -> dict[str, Any]:
    """What a user of the weights should know, from the run's folder and its checkpoint."""
    figures = dict(found.meta["validation"])
    return {
        "format": 1,
        **found.meta["card"],
        "model": model,
        "trained": {"step": found.step, "samples": found.meta["samples"]},
        "metrics": figures,
        "recipe": _recipe(run),
        "versions": found.meta["versions"],
    }


def _recipe(run: Path) -> dict[str, Any]:
    """The run's configuration without the paths of the machine that ran it."""
    tree = read_yaml(run / "config.yaml")
    tree.get("run", {}).pop("dir", None)
    tree.get("data", {}).pop("records", None)
    model = tree.get("model", {})
    if model.get("init") not in ("random", "imagenet", None):
        model["init"] = Path(model["init"]).name
    return tree


def _write_onnx(path: Path, spec: BackboneSpec, state: dict[str, Tensor]) -> None:
    missing = [name for name in ONNX_MODULES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"--format onnx needs {' and '.join(missing)}: pip install 'geokr[onnx]'")
    backbone = build_backbone(spec)
    backbone.load_state_dict(state)
    images = torch.zeros(2, spec.bands, spec.image_size, spec.image_size)
    torch.onnx.export(
        backbone.eval(),
        (images,),
        str(path),
        input_names=["images"],
        output_names=["features"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        external_data=False,
        verbose=False,
    )


def export(run: str | Path, out: str | Path, form: str | None = None, model: str = "teacher") -> Path:
    """Writes the backbone of a run's newest sound checkpoint to ``out`` and its card to ``out.json``.

    form: ``safetensors``, ``torch`` or ``onnx``; None to go by the file's suffix. Returns the card's path.
    Raises ConfigError if there is nothing to export or it cannot be written, CheckpointError if it is damaged.
    """
    run, out = Path(run), Path(out)
    form = form or SUFFIXES.get(out.suffix)
    if form is None:
        raise ConfigError(f"--out {out}: expected a name ending in {', '.join(SUFFIXES)}, or give --format")
    read_run(run)
    found = checkpoint.load_latest(run / "checkpoints")
    if found is None:
        raise ConfigError(f"{run}: no checkpoint yet; let the run go on until its first one")
    card, state = make_card(run, found, model), backbone_state(found, model)
    spec = _spec(card)
    build_backbone(spec).load_state_dict(state)  # strictly: whoever loads it will do the same
    temporary = out.with_name(f".tmp-{out.name}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if form == "safetensors":
            safetensors.torch.save_file(state, temporary, {"format": "pt"})
        elif form == "torch":
            torch.save(state, temporary)
        else:
            _write_onnx(temporary, spec, state)
        temporary.replace(out)
        write_text(card_path(out), json.dumps(card, indent=1, ensure_ascii=False) + "\n")
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"--out {out}: cannot be written ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)
    return card_path(out)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m geokr.export", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", required=True, metavar="DIR", help="run.dir of a training run")
    parser.add_argument("--out", required=True, metavar="FILE", help="weights file; the card goes to FILE.json")
    parser.add_argument("--format", choices=sorted(set(SUFFIXES.values())), help="default: by the file's suffix")
    parser.add_argument("--model", choices=("teacher", "student"), default="teacher")
    parsed = parser.parse_args(arguments)
    try:
        card = export(parsed.run, parsed.out, parsed.format, parsed.model)
    except ValueError as error:
        if os.environ.get("GEOKR_TRACEBACK") == "1":
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{parsed.out}: the {parsed.model}'s backbone; {card} says how to use it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
