"""What makes a run the same run: the part of the configuration that a resumed run must not change."""

from collections.abc import Mapping
from typing import Any

from geokr.config import ConfigError, differences
from geokr.options import PretrainOptions

# Decides results no more than rounding does, or says how to run and not what.
FREE = {"optim": {"implementation"}, "model": {"init", "sync_batchnorm"}}


def crops_are_off(options: PretrainOptions) -> bool:
    """Whether ``augment.crop_probability=auto`` gives way to a graph that was asked for, which allows one size only."""
    return options.augment.crop_probability == "auto" and options.train.cuda_graph == "on"


def identity(
    options: PretrainOptions, *, image_size: int, bands: tuple[str, ...], dataset: str, label_weights: str | None = None
) -> dict[str, Any]:
    """Method, model and data of a run as nested plain values.

    dataset: hash of its manifest. label_weights: hash of the labels' weights, None without any. Paths, threads,
    logging, precision, the world's size and the length of the run are left out: they may change between a stop and a
    resume. So may the loader, unless its images are synthetic.
    """
    tree = options.model_dump(mode="json")
    sections = {
        name: {key: value for key, value in tree[name].items() if key not in FREE.get(name, set())}
        for name in ("augment", "model", "method", "optim")
    }
    sections["model"]["bands"] = list(bands)
    if crops_are_off(options):
        sections["augment"]["crop_probability"] = 0.0
    data = {"image_size": image_size, "global_batch": options.data.global_batch, "dataset": dataset}
    if options.data.loader == "synthetic":  # the others read the same images
        data["loader"] = "synthetic"
    if label_weights is not None:
        data["label_weights"] = label_weights
    train: dict[str, Any] = {"clip_norm": options.train.clip_norm}
    if options.train.ddp_compression == "powersgd":  # the others round; this one leaves out
        train["ddp_compression"] = "powersgd"
    return {"run": {"seed": options.run.seed}, "data": data, **sections, "train": train}


def _in_full(tree: Mapping[str, Any]) -> dict[str, Any]:
    """An identity as this version would have written it: what its run did not do decides nothing, and what an earlier
    version did not know was as it is here."""
    augment = dict(tree.get("augment", {}))
    if not augment.get("crop_probability"):
        augment = {key: value for key, value in augment.items() if not key.startswith("crop_")}
    else:
        augment.setdefault("crop_until", 1.0)
    augment.setdefault("progressive", False)
    model = {"condition_on_colour": False, **tree.get("model", {})}
    return {**tree, "augment": augment, "model": model}


def check_identity(found: Mapping[str, Any], current: Mapping[str, Any], where: str) -> None:
    """Raises ConfigError with every difference between a run folder's identity and this run's."""
    lines = differences(_in_full(found), _in_full(current))
    if lines:
        listed = "\n  ".join(lines)
        grown = (
            "\nIf the dataset has grown since (pack_records.py --append), data.records=FOLDER/manifest-v1.json (or a "
            "later one of those) goes on with what it was."
            if any(line.startswith("data.dataset:") for line in lines)
            else ""
        )
        raise ConfigError(
            f"{where} belongs to a run with another method, model or data:\n  {listed}\n"
            f"Give its configuration again to go on, or another run.dir to begin anew.{grown}"
        )
