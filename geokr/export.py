"""Backbone weights out of a run: ``python -m geokr.export --run DIR --out FILE``, and back into Python.

    backbone = geokr.load_backbone("backbone.safetensors")
    features_ND = backbone(images_NCHW)      # normalised by backbone.card["input"]["mean"] and ["std"]

The weights carry timm's keys for that backbone and nothing else: they load strictly into
``timm.create_model(name, num_classes=0, in_chans=...)``, a ResNet's into torchvision with ``fc=Identity()``, a VGG's
into its features. What else there is to know stands in the cards beside them, ``FILE.json`` for programs and
``FILE.md`` for people. ``--format onnx`` and ``torch-export`` write the computation with the weights.
"""

import argparse
import copy
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from geokr import checkpoint, export_formats, fold_backbone, model_card
from geokr.checkpoint import Checkpoint
from geokr.config import ConfigError, read_yaml
from geokr.export_formats import DTYPES, GRAPHS, SUFFIXES
from geokr.landcover import load_product
from geokr.models import BackboneSpec, build_backbone
from geokr.runfolder import read_run
from geokr.together import written_together
from geokr.weights import fit_error, read_state


def card_path(weights: str | Path) -> Path:
    """Where a weights file's card lies: ``FILE.json``."""
    return Path(f"{weights}.json")


def _spec(card: dict[str, Any]) -> BackboneSpec:
    return BackboneSpec(card["backbone"]["name"], len(card["bands"]), card["backbone"]["image_size"])


def load_backbone(path: str | Path) -> nn.Module:
    """The exported backbone, in eval mode on the CPU; its ``card`` attribute holds the card.

    path: a .safetensors or .pth file that ``geokr.export`` wrote, with its card beside it. Weights that were stored in
    half precision compute in float32. Raises ConfigError if either is missing, damaged, or does not fit the other.
    """
    beside = card_path(path)
    try:
        card = json.loads(beside.read_bytes())
        spec, kept = _spec(card), card.get("weights", {})
        pairs = [(conv, norm) for conv, norm in kept.get("folded", ())]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{beside}: expected the card that geokr.export writes beside the weights ({error})"
        ) from error
    if kept.get("format") in GRAPHS:
        raise ConfigError(f"{path}: holds a computation, not weights by name; {path}.md says how it is loaded")
    backbone = fold_backbone.prepare(build_backbone(spec), pairs)
    state = read_state(path)
    if problems := fit_error(state, backbone.state_dict()):
        raise ConfigError(f"{path}: does not fit {spec.name} as its card describes it: {problems}")
    backbone.load_state_dict(state)
    backbone.card = card  # type: ignore[assignment]
    return backbone.eval()


def backbone_state(found: Checkpoint, model: str) -> dict[str, Tensor]:
    """The backbone's tensors in a checkpoint, under timm's keys. model: ``teacher`` or ``student``."""
    prefix = f"{model}/backbone."
    return {k.removeprefix(prefix): v.contiguous() for k, v in found.tensors.items() if k.startswith(prefix)}


def make_card(run: Path, found: Checkpoint, model: str) -> dict[str, Any]:
    """What a user of the weights should know, from the run's folder and its checkpoint."""
    figures = _figures(found.meta["validation"], model)
    return {
        "format": 1,
        **found.meta["card"],
        "product": {**found.meta["card"]["product"], "licence": _licence(found.meta["card"]["product"]["name"])},
        "model": model,
        "trained": {"step": found.step, "samples": found.meta["samples"]},
        "metrics": figures,
        "metrics_step": found.meta.get("validated") or None,  # None: from before checkpoints said so, or no validation
        "recipe": _recipe(run),
        "versions": found.meta["versions"],
    }


def _figures(found: Mapping[str, float], model: str) -> dict[str, float]:
    """Of the network that is exported: a validation has both, the student's with a word behind."""
    if model != "student":
        return {name: value for name, value in found.items() if not name.endswith("_student")}
    own = {name.removesuffix("_student"): value for name, value in found.items() if name.endswith("_student")}
    return {name: own.get(name, value) for name, value in found.items() if not name.endswith("_student")}


def _recipe(run: Path) -> dict[str, Any]:
    """The run's configuration without the paths of the machine that ran it."""
    tree = read_yaml(run / "config.yaml")
    tree.get("run", {}).pop("dir", None)
    for key in ("records", "label_weights", "cache_dir"):
        tree.get("data", {}).pop(key, None)
    model = tree.get("model", {})
    if model.get("init") not in ("random", "imagenet", None):
        model["init"] = Path(model["init"]).name
    return tree


def _licence(product: str) -> str | None:
    """Of a product that comes with geokr; None for one of the user's own."""
    try:
        return load_product(product).licence
    except ConfigError:
        return None


def export(
    run: str | Path,
    out: str | Path,
    form: str | None = None,
    model: str = "teacher",
    *,
    dtype: str = "float32",
    fold_bn: bool = False,
) -> Path:
    """Writes the backbone of a run's newest sound checkpoint to ``out``, and its cards to ``out.json`` and ``out.md``.

    form: ``safetensors``, ``torch``, ``onnx`` or ``torch-export``, as the file's suffix says it, too. dtype: of the
    weights, and of the computation where that is written. fold_bn: batch norms folded into the convolutions before
    them. Returns the JSON card's path.

    Raises ConfigError if there is nothing to export, it cannot be written or does not give the backbone's features,
    CheckpointError if it is damaged.
    """
    run, out = Path(run), Path(out)
    form = _format_of(out, form)
    export_formats.check(form, dtype)
    read_run(run)
    found = checkpoint.load_latest(run / "checkpoints")
    if found is None:
        raise ConfigError(f"{run}: no checkpoint yet; let the run go on until its first one")
    card = make_card(run, found, model)
    spec = _spec(card)
    backbone = build_backbone(spec)
    backbone.load_state_dict(backbone_state(found, model))  # strictly: whoever loads it will do the same
    images_NCHW = torch.randn(
        2, spec.bands, spec.image_size, spec.image_size, generator=torch.Generator().manual_seed(0)
    )
    pairs: list[fold_backbone.Pair] = []
    if fold_bn:
        backbone, pairs = fold_backbone.fold(backbone, images_NCHW, spec.name)
    card["weights"] = {"format": form, "dtype": dtype, "folded": pairs}
    state = export_formats.rounded(backbone.state_dict(), dtype)
    card["weights"] |= _difference(backbone.eval(), state, images_NCHW) if dtype != "float32" else {}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with written_together(_files(out)) as (weights, page, about):
            if form in GRAPHS:
                card["weights"] |= export_formats.write_graph(weights, backbone, images_NCHW, form, dtype)
            else:
                export_formats.write_state(weights, {k: v.contiguous() for k, v in state.items()}, form)
            page.write_text(model_card.markdown(card, out), encoding="utf-8")
            about.write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except (OSError, RuntimeError, SafetensorError) as error:  # RuntimeError: torch's own writer, of a full disk
        raise ConfigError(f"--out {out}: cannot be written ({error})") from error
    return card_path(out)


def _files(out: Path) -> list[Path]:
    """All that is written for these weights: they, the page, the card."""
    return [out, Path(f"{out}.md"), card_path(out)]


def _format_of(out: Path, form: str | None) -> str:
    """The format of a file of that name, by which those who load it tell it, too. form: the one that was asked for.

    Raises ConfigError where the name says none or another, and where it is a folder's.
    """
    said = SUFFIXES.get(out.suffix)
    if said is None:
        endings = [suffix for suffix, name in SUFFIXES.items() if form in (None, name)]
        raise ConfigError(
            f"--out {out}: expected a name ending in {' or '.join(endings)}: whoever loads the file goes by that"
        )
    if form not in (None, said):
        raise ConfigError(f"--out {out}: its ending says {said}, --format {form}; give one of them")
    for path in _files(out):
        if path.is_dir():
            raise ConfigError(f"--out {out}: {path} is a folder; give another name, or remove it")
    return said


def _difference(backbone: nn.Module, state: dict[str, Tensor], images_NCHW: Tensor) -> dict[str, float]:
    """What rounding the weights does to the features of random images, all computed in float32."""
    rounded = copy.deepcopy(backbone)
    rounded.load_state_dict(state)
    with torch.no_grad():
        plain_ND, rounded_ND = backbone(images_NCHW), rounded(images_NCHW)
    return {
        "largest_difference": float((rounded_ND - plain_ND).abs().max()),
        "largest_feature": float(plain_ND.abs().max()),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m geokr.export", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", required=True, metavar="DIR", help="run.dir of a training run")
    parser.add_argument("--out", required=True, metavar="FILE", help="weights file; cards go to FILE.json and FILE.md")
    parser.add_argument("--format", choices=sorted(set(SUFFIXES.values())), help="what the file's suffix says, too")
    parser.add_argument("--model", choices=("teacher", "student"), default="teacher")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="of the weights; default: float32")
    parser.add_argument("--fold-bn", action="store_true", help="fold batch norms into the convolutions before them")
    parsed = parser.parse_args(arguments)
    try:
        card = export(parsed.run, parsed.out, parsed.format, parsed.model, dtype=parsed.dtype, fold_bn=parsed.fold_bn)
    except ValueError as error:
        if os.environ.get("GEOKR_TRACEBACK") == "1":
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{parsed.out}: the {parsed.model}'s backbone; {card} and {parsed.out}.md say how to use it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
