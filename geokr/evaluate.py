"""What a backbone is worth on someone's task: ``python -m geokr.evaluate --weights FILE --data DIR``.

    --task knn linear      on fixed features (the default); finetune trains the backbone too; segment trains it with a
                           decoder on images with masks, detect as a detector on images with boxes
    --labels 1 5 10 100    percent of the training labels that are used: how far few of them go
    --baselines random imagenet colour FILE ...
                           the same with random weights, timm's ImageNet weights, no backbone at all but the mean,
                           deviation and percentiles of each band, or other weights of the same architecture

Data is a folder a class (geokr.evaluate_data), or records that geokr packed (then shares are predicted, and the
figures are KL and errors of shares); for segment pairs of images and masks (geokr.evaluate_pairs), for detect images
with COCO's JSON (geokr.evaluate_coco). Everything is run with ``--seeds`` draws of the labels; the table gives mean and
deviation over them, and a 95 % bootstrap interval over test images. docs/evaluation.md has more of it.
"""

import argparse
import dataclasses
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import geokr
from geokr import (
    card,
    evaluate_coco,
    evaluate_dense,
    evaluate_detect,
    evaluate_entrants,
    evaluate_features,
    evaluate_kept,
    evaluate_metrics,
    evaluate_pairs,
    evaluate_records,
    evaluate_report,
    evaluate_segment,
    finetune,
    probes,
)
from geokr.checkpoint import write_text
from geokr.config import ConfigError
from geokr.evaluate_data import Data, open_folders
from geokr.evaluate_features import Entrant
from geokr.evaluate_kept import Kept
from geokr.manifests import MANIFEST

TASKS = ("knn", "linear", "finetune")
DENSE = ("segment", "detect")  # with data of their own
BATCH = {"finetune": 32, "segment": 16, "detect": 4}


@dataclass(frozen=True, slots=True, eq=False)
class Study:
    """What all entrants go through alike."""

    data: Data
    device: torch.device
    labels: tuple[float, ...]
    seeds: int
    epochs: int
    batch: int
    say: Callable[[str], None]

    def of(self, entrant: Entrant, tasks: Sequence[str], kept: Kept) -> list[dict[str, Any]]:
        """A row for each task and share of labels."""
        # on colours there is nothing to finetune but the network, which is there already
        tasks = [task for task in tasks if entrant.backbone is not None or task != "finetune"]
        wanted = [(task, percent) for task in tasks for percent in self.labels]
        known = {} if all(kept.has(entrant.name, *one) for one in wanted) else self._known(entrant)

        def made(task: str, percent: float) -> dict[str, Any]:
            self.say(f"{entrant.name}: {task}, {percent:g} % of the labels")
            return {"weights": entrant.name, "task": task, **self._run(entrant, task, percent, known)}

        return [kept.row(entrant.name, *one, partial(made, *one)) for one in wanted]

    def _known(self, entrant: Entrant) -> dict[str, np.ndarray]:
        """Features of each part's images."""
        self.say(f"{entrant.name}: features")
        known = {name: self._features(entrant, name) for name in ("train", "val", "test")}
        if entrant.backbone is None:  # means, deviations and percentiles have scales of their own
            mean, deviation = known["train"].mean(0), np.maximum(known["train"].std(0), 1e-6)
            known = {name: (features - mean) / deviation for name, features in known.items()}
        return known

    def _features(self, entrant: Entrant, name: str) -> np.ndarray:
        part = self.data.parts[name]
        if entrant.backbone is None:
            return evaluate_features.colours(part, tuple(entrant.prepare.bands))
        return evaluate_features.features(entrant.backbone, part, entrant.prepare, self.device)

    def _run(self, entrant: Entrant, task: str, percent: float, known: dict[str, np.ndarray]) -> dict[str, Any]:
        train, val, test = (self.data.parts[name] for name in ("train", "val", "test"))
        figures, extra, chosen, counts = [], [], [], []
        # all labels are the same for every seed: where no weights are drawn either, one says it all
        once = percent >= 100 and task != "finetune" and entrant.backbone is not None
        for seed in range(1 if once else self.seeds):
            some = evaluate_metrics.subset(train.labels, percent, seed)
            held = evaluate_metrics.subset(val.labels, percent, seed)  # who has few labels has few to choose by
            fit, choose = (known["train"][some], train.targets[some]), (known["val"][held], val.targets[held])
            if task == "finetune":
                assert entrant.backbone is not None
                parts = train.some(some), val.some(held), test
                how = {"epochs": self.epochs, "batch": self.batch, "seed": seed, "name": entrant.name}
                found, best = finetune.finetune(entrant.backbone, *parts, entrant.prepare, self.device, **how), {}
            elif task == "knn":
                found, best = probes.best_knn(fit, choose, known["test"])
            elif entrant.backbone is None:
                found, best = probes.best_network(fit, choose, known["test"], seed)
            else:
                found, best = probes.best_linear(fit, choose, known["test"])
            figures.append(evaluate_metrics.per_image(test.targets, found, soft=self.data.soft))
            extra.append(evaluate_metrics.by_class(test.targets, found))
            chosen.append(best)
            counts.append(len(some))
        return {
            "labels_percent": percent,
            "labels": round(float(np.mean(counts))),
            "seeds": len(figures),
            "chosen": chosen,
            "figures": evaluate_metrics.over_seeds(figures, extra, test.groups),
        }


def evaluate(chosen: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """The report as a tree. Raises ConfigError, before hours are spent, for what cannot be compared."""
    device = _device(chosen.device)
    is_packed = (Path(chosen.data) / MANIFEST).exists()
    if chosen.task[0] in DENSE:
        if is_packed:
            raise ConfigError(f"--data {chosen.data}: records hold shares of classes, for the tasks {', '.join(TASKS)}")
        return _dense(chosen, device, say)
    data = evaluate_records.open_records(chosen.data) if is_packed else open_folders(chosen.data)
    found = evaluate_entrants.entrants(chosen.weights, chosen.baselines, data, chosen.bands, device, large=False)
    for entrant in found:
        if "finetune" in chosen.task and entrant.backbone is not None:
            finetune.check(entrant.backbone, entrant.name)
    batch = chosen.batch or BATCH["finetune"]
    study = Study(data, device, tuple(chosen.labels), chosen.seeds, chosen.epochs, batch, say)
    kept = _kept(chosen, say)
    rows = [row for entrant in found for row in study.of(entrant, chosen.task, kept)]
    return _report(chosen, data, rows)


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise ConfigError(f"--device {text}: is none that torch knows; expected cpu, cuda or cuda:1") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {text}: this machine has {torch.cuda.device_count()} GPU(s) that torch can use")
    return device


def _dense(chosen: argparse.Namespace, device: torch.device, say: Callable[[str], None]) -> dict[str, Any]:
    kind = chosen.task[0]
    about: dict[str, Any] = geokr.load_backbone(chosen.weights).card  # type: ignore[assignment]
    spec = evaluate_entrants.spec_of(about)
    shared = {"spec": spec, "device": device, "epochs": chosen.epochs, "batch": chosen.batch or BATCH[kind]}
    say(f"{chosen.data}: every file is checked")
    if kind == "segment":
        pairs = evaluate_pairs.open_pairs(chosen.data, chosen.ignore)
        evaluate_entrants.preparation(
            Path(chosen.weights).name, about, pairs.data, chosen.bands
        )  # before every image is read
        crop = evaluate_segment.crop_side(chosen.crop or spec.image_size)
        task = evaluate_segment.Segment(pairs, decoder=chosen.decoder, crop=crop, **shared)
    else:
        found = evaluate_coco.open_coco(chosen.data)
        evaluate_entrants.preparation(Path(chosen.weights).name, about, found.data, chosen.bands)
        task = evaluate_detect.Detect(found, kind=chosen.detector, **shared)
    baselines = [name for name in chosen.baselines if kind == "segment" or name != evaluate_entrants.COLOUR]
    middles = {name: evaluate_dense.middle(part, spec.image_size) for name, part in task.data.parts.items()}
    data = dataclasses.replace(task.data, parts=middles)
    compared = evaluate_entrants.entrants(chosen.weights, baselines, data, chosen.bands, device, large=True)
    kept = _kept(chosen, say)
    return _report(chosen, task.data, evaluate_dense.rows(task, kind, compared, chosen.labels, chosen.seeds, say, kept))


def _kept(chosen: argparse.Namespace, say: Callable[[str], None]) -> Kept:
    """Rows of the same command that was cut short."""
    if chosen.json is None:
        return Kept(None)
    about, outputs = _about(chosen), (chosen.json, chosen.picture)
    decides = {
        "task": chosen.task,
        "files": evaluate_kept.hashes((chosen.weights, *chosen.baselines)),
        "data": evaluate_kept.listing(chosen.data, outputs),
        "device": about["machine"]["device"],
        "settings": about["settings"],
        "versions": about["versions"],
    }
    return Kept(chosen.json, decides, say)


def _report(chosen: argparse.Namespace, data: Data, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "data": data.path,
        "classes": list(data.classes),
        "images": {name: len(part) for name, part in data.parts.items()},
        **_about(chosen),
        "rows": rows,
    }


def _about(chosen: argparse.Namespace) -> dict[str, Any]:
    """What was asked for, and what computes it."""
    kind = chosen.task[-1]
    settings = {
        name: getattr(chosen, name) for name in ("weights", "baselines", "labels", "seeds", "epochs", "bands", "device")
    }
    trained = [name for name in chosen.task if name in BATCH]
    settings["batch"] = (chosen.batch or BATCH[trained[0]]) if trained else None
    own = {"segment": ("decoder", "crop", "ignore"), "detect": ("detector",)}.get(kind, ())
    return {
        "settings": settings | {name: getattr(chosen, name) for name in own},
        "machine": {"device": _device_name(chosen.device), "platform": platform.platform(), "cores": os.cpu_count()},
        "versions": card.versions("torchmetrics", "segmentation-models-pytorch", "pycocotools"),
    }


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m geokr.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--weights", required=True, metavar="FILE", help="what geokr.export wrote")
    made.add_argument("--data", required=True, metavar="DIR")
    made.add_argument("--task", nargs="+", choices=TASKS + DENSE, default=["knn", "linear"])
    made.add_argument("--baselines", nargs="+", default=["random", evaluate_entrants.COLOUR], metavar="NAME")
    made.add_argument("--labels", nargs="+", type=float, default=[1, 5, 10, 100], metavar="PERCENT")
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--bands", nargs="+", type=int, help="of the images, from 1, in the order of the card's")
    made.add_argument("--epochs", type=int, default=30, help="of finetune, segment and detect")
    made.add_argument("--batch", type=int, help="of finetune (default 32), segment (16) or detect (4)")
    made.add_argument("--decoder", default="unet", help="of segment: any that segmentation-models-pytorch has")
    made.add_argument("--crop", type=int, help="of segment: side in pixels; default: of the images of pretraining")
    made.add_argument("--ignore", type=int, default=255, help="of segment: a value in masks that counts nowhere")
    made.add_argument("--detector", choices=evaluate_detect.DETECTORS, default=evaluate_detect.DETECTORS[0])
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--json", type=Path, metavar="FILE", help="every figure; cut short, it goes on from FILE.part")
    made.add_argument("--picture", type=Path, metavar="FILE", help="PNG: figures over the share of labels")
    return made


def _check(chosen: argparse.Namespace) -> None:
    if bad := [percent for percent in chosen.labels if not 0 < percent <= 100]:
        raise ConfigError(f"--labels {bad[0]:g}: expected percent, above 0 and up to 100")
    for name in ("seeds", "epochs", "batch", "crop"):
        if (value := getattr(chosen, name)) is not None and value < 1:
            raise ConfigError(f"--{name} {value}: expected 1 or more")
    if len(chosen.task) > 1 and (alone := [task for task in chosen.task if task in DENSE]):
        raise ConfigError(f"--task {alone[0]} has data of its own: ask for it alone")
    for path in (chosen.json, chosen.picture):
        if path is not None and not path.absolute().parent.is_dir():
            raise ConfigError(f"{path}: there is no folder {path.absolute().parent} to write it to")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    chosen = parser().parse_args(arguments)
    chosen.labels = sorted(set(chosen.labels))
    try:
        _check(chosen)
        report = evaluate(chosen, lambda text: print(text, file=sys.stderr, flush=True))
        print(evaluate_report.table(report))
        if chosen.json:
            write_text(chosen.json, json.dumps(report, indent=1) + "\n")
        if chosen.picture:
            evaluate_report.picture(report, chosen.picture)
        if chosen.json:
            evaluate_kept.part_of(chosen.json).unlink(missing_ok=True)
    except ValueError as error:
        if os.environ.get("GEOKR_TRACEBACK") == "1":
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
