"""Says what a quickstart did: its figures, and where records, run, TensorBoard folder and weights lie.

    python launch/summary.py FOLDER

FOLDER holds records/, run/ and backbone.safetensors.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: the folder on the path must be the project's, not this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from geokr.manifests import Manifest, load_manifest
from geokr.records import RecordError


class SummaryError(ValueError):
    """A folder that holds no finished quickstart."""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl. Raises SummaryError if it is missing or damaged."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise SummaryError(f"{path}: cannot be read ({error}): run bash launch/quickstart.sh again") from error


def last_validation(metrics: Sequence[dict[str, Any]], path: Path) -> dict[str, Any]:
    """The last line that has validation figures."""
    for line in reversed(metrics):
        if "val/kl" in line:
            return line
    raise SummaryError(f"{path}: no validation in it yet: run bash launch/quickstart.sh again")


def rows(folder: Path, manifest: Manifest, metrics: Sequence[dict[str, Any]], seconds: int | None) -> list[tuple]:
    """(what, value) pairs; a pair of None is an empty line."""
    python = os.path.relpath(sys.executable)
    run, last = folder / "run", last_validation(metrics, folder / "run" / "metrics.jsonl")
    rates = [line["img_per_s"] for line in metrics if line.get("img_per_s")]
    card = json.loads((folder / "backbone.safetensors.json").read_text(encoding="utf-8"))
    found = [
        ("tiles", f"{manifest.train.records} to train on, {manifest.val.records} held out in blocks of their own"),
        ("classes", f"{len(manifest.classes)} of {manifest.product_title}"),
        ("trained", f"{card['backbone']['name']}, {last['step']} steps, {last['samples']} images"),
        ("images/s", f"{statistics.median(rates):.0f} (median)" if rates else "not measured"),
        (None, None),
        ("val/kl", f"{last['val/kl']:.4f}  KL(land cover || teacher) on the held-out tiles"),
        ("val/kl_student", f"{last['val/kl_student']:.4f}  the student's"),
        ("val/kl_prior", f"{last['val/kl_prior']:.4f}  of the training tiles' mean histogram: what no learning gives"),
        ("ratio", f"{last['val/kl'] / last['val/kl_prior']:.2f}    1 is no learning, 0 a perfect guess of the map"),
        (None, None),
        ("records", folder / "records"),
        ("run", run),
        ("TensorBoard", f"{run / 'tensorboard'}  ({python} -m tensorboard.main --logdir {run / 'tensorboard'})"),
        ("weights", folder / "backbone.safetensors"),
        ("card", f"{folder / 'backbone.safetensors.md'}  (for programs: .json)"),
        ("worth", f"{folder / 'evaluation.png'}  (figures: evaluation.json)"),
    ]
    if seconds is not None:
        found.insert(4, ("took", f"{seconds} s without the install"))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="summary.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=int, help="how long it took")
    chosen = parser.parse_args(arguments)
    try:
        metrics = read_metrics(chosen.folder / "run" / "metrics.jsonl")
        lines = rows(chosen.folder, load_manifest(chosen.folder / "records"), metrics, chosen.seconds)
    except (SummaryError, RecordError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for what, value in lines:
        print(f"{what:<16}{value}" if what else "")
    print("\nnext: your own scenes, after '. .venv/bin/activate': README.md has the commands, docs/data.md the data")
    return 0


if __name__ == "__main__":
    sys.exit(main())
