"""Recipes of pretraining compared on equal terms: same tiles, steps, batches, augmentation and first weights.

    python benchmarks/method.py --out out/method [--data zion demo DIR ...] [--recipes default reference ...]
                                [--recipe NAME key=value ...] [--seeds 3] [--steps 400] [--jobs 2]

`zion` is the Landsat scene with NLCD below it that lies in --shared, `demo` the quickstart's landscape; any other
word is a folder of records. Where they are packed here every seed holds out other blocks and draws other weights;
differences between recipes are taken seed by seed. Of each recipe the better of student and teacher counts. Its
backbone is exported and goes through geokr.evaluate: nearest neighbours and linear probes on the same records and on
those of the other datasets, with --labels percent of the labels, beside random weights and mere colours; with
--segment also a U-Net on the classes of pixels.

`default` is configs/smoke.yaml. `reference` is that with method, optimizer, normalisation and head of
configs/reference.yaml. --recipe adds one: the default with these keys changed; records are packed with squares, so it
may crop. The others are compared with the first recipe that is named. What is done already with the same settings is
not done again. Everything lands in --out: report.json, table.md, curves.png.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import bench_method_data as data_sets  # noqa: E402
from benchmarks import bench_method_report as reports  # noqa: E402
from benchmarks import bench_report  # noqa: E402
from geokr.config import ConfigError, check_keys, parse_overrides, read_yaml  # noqa: E402
from geokr.options import PretrainOptions  # noqa: E402

CONFIG = ROOT / "configs" / "smoke.yaml"
# What of configs/reference.yaml is the method; the rest is length, batch and augmentation, which are equal for all.
REFERENCE_SECTIONS = ("method", "optim")
REFERENCE_KEYS = {"model.normalisation": "published", "model.condition_on_colour": False}
BUILT_IN = ("default", "reference")
TAKEN = (*BUILT_IN, *reports.BASELINES)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def reference_keys() -> dict[str, Any]:
    """The keys by which the published recipe differs from the default."""
    tree = read_yaml(ROOT / "configs" / "reference.yaml")
    sections = {f"{name}.{key}": value for name in REFERENCE_SECTIONS for key, value in tree[name].items()}
    return sections | REFERENCE_KEYS


@dataclass(frozen=True, slots=True)
class Cell:
    """One run: a recipe on one packing of one dataset with one seed.

    keys: the run's, but for where it lies and how many threads it has. Runs of other keys, or of another
    configs/smoke.yaml, lie in other folders.
    """

    data: data_sets.Packed
    recipe: str
    keys: tuple[str, ...]
    out: Path

    @property
    def digest(self) -> str:
        recipe = hashlib.sha256(CONFIG.read_bytes()).hexdigest()
        return hashlib.sha256("\n".join((*self.keys, recipe, self.data.digest)).encode()).hexdigest()[:12]

    @property
    def folder(self) -> Path:
        return self.out / f"{self.recipe}-{self.digest}"

    @property
    def weights(self) -> Path:
        return self.folder / f"{self.recipe}.safetensors"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def lines(self) -> list[dict[str, float]]:
        """The run's validations."""
        found = [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]
        return [line for line in found if "val/kl" in line]

    @property
    def better(self) -> str:
        last = self.lines()[-1]
        return "teacher" if last["val/kl"] <= last["val/kl_student"] else "student"


def cell_of(data: data_sets.Packed, recipe: str, keys: Mapping[str, Any], chosen: argparse.Namespace) -> Cell:
    given = {
        "run.seed": data.seed,
        "train.max_steps": chosen.steps,
        "validation.every_steps": -(-chosen.steps // 8),
        "checkpoint.every_steps": -(-chosen.steps // 4),
        "data.image_size": chosen.image_size,
        "model.backbone": chosen.backbone,
        "log.panels": 0,
        **keys,
    }
    words = (f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in given.items())
    return Cell(data, recipe, tuple(words), chosen.out / data.name / f"seed{data.seed}")


def command(words: Sequence[str], log: Path, threads: int) -> None:
    """Runs it, its words going to ``log``. Raises ConfigError with the end of them if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with open(log, "w") as output:
        done = subprocess.run(
            [sys.executable, *words], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
    if done.returncode:
        said = log.read_text().strip().splitlines()[-3:]
        raise ConfigError(f"{' '.join(words[:3])} ended with {done.returncode}; {log}: " + " ".join(said))


def train(cell: Cell, threads: int) -> None:
    """The run and its export, unless they are there."""
    if cell.weights.exists():
        return
    cell.folder.mkdir(parents=True, exist_ok=True)
    where = [f"data.records={cell.data.records}", f"run.dir={cell.run}"]
    beside = [f"train.threads={threads}", f"data.threads={threads}"]
    config = ["--config", str(CONFIG)]
    command(["-m", "geokr.pretrain", *config, *where, *cell.keys, *beside], cell.folder / "pretrain.log", threads)
    out = ["--out", str(cell.weights), "--model", cell.better]
    command(["-m", "geokr.export", "--run", str(cell.run), *out], cell.folder / "export.log", threads)
    shutil.rmtree(cell.run / "checkpoints")  # the weights are exported; a run keeps 0.2 GB otherwise


def evaluate(
    cells: Sequence[Cell], other: data_sets.Packed, tasks: Sequence[str], labels: Sequence[float], threads: int
) -> list[dict[str, Any]]:
    """Rows of geokr.evaluate for all recipes of a packing and seed on ``other``, kept in a file by the weights."""
    words = ["--task", *tasks, "--labels", *(f"{percent:g}" for percent in labels)]
    words += ["--seeds", "1", "--epochs", "1"] if tasks == ["segment"] else ["--seeds", "3"]
    what = "\n".join([*words, *(cell.digest for cell in cells), other.digest])
    out = cells[0].out / f"on-{other.name}-{tasks[-1]}-{hashlib.sha256(what.encode()).hexdigest()[:12]}.json"
    if not out.exists():
        where = data_sets.segment_pairs(other) if tasks == ["segment"] else other.records
        beside = [*reports.BASELINES, *(str(cell.weights) for cell in cells[1:])]
        given = ["--weights", str(cells[0].weights), "--data", str(where), "--baselines", *beside]
        command(["-m", "geokr.evaluate", *given, *words, "--json", str(out)], out.with_suffix(".log"), threads)
    return json.loads(out.read_text())["rows"]


def compare(chosen: argparse.Namespace, recipes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Everything, in the order data, seed, recipe; the report."""
    threads = max(1, chosen.threads // chosen.jobs)
    if len({Path(name).name for name in chosen.data}) < len(chosen.data):
        raise ConfigError(f"--data {' '.join(chosen.data)}: two have the same name, by which their runs are kept")
    packed = [data_sets.pack(name, seed, chosen) for name in chosen.data for seed in range(chosen.seeds)]
    groups = [[cell_of(one, name, keys, chosen) for name, keys in recipes.items()] for one in packed]

    def run(cell: Cell) -> None:
        train(cell, threads)
        last = cell.lines()[-1]
        print(
            f"{cell.data.name}, seed {cell.data.seed}, {cell.recipe}: {cell.better} {reports.best(last):.4f}",
            flush=True,
        )

    with ThreadPoolExecutor(chosen.jobs) as pool:
        list(pool.map(run, (cell for group in groups for cell in group)))
        studies = [
            (group, other, tasks, labels)
            for group in groups
            for other in packed
            if other.seed == group[0].data.seed
            for tasks, labels in (
                [(["knn", "linear"], chosen.labels)]
                + ([(["segment"], [100.0])] if chosen.segment and other is group[0].data else [])
            )
        ]
        rows = list(pool.map(lambda study: evaluate(study[0], study[1], study[2], study[3], threads), studies))
    results = [reports.trained(cell.data.name, cell.data.seed, cell.recipe, cell.lines()) for g in groups for cell in g]
    evaluated = [
        {"pretrained_on": group[0].data.name, "data": other.name, "seed": other.seed, **reports.evaluated(row)}
        for (group, other, _, _), found in zip(studies, rows, strict=True)
        for row in found
    ]
    settings = {
        "steps": chosen.steps,
        "backbone": chosen.backbone,
        "image_size": chosen.image_size,
        "seeds": chosen.seeds,
    }
    return {
        "machine": bench_report.machine(),
        "versions": bench_report.versions(),
        "settings": settings,
        "recipes": {name: dict(keys) for name, keys in recipes.items()},
        "trained": results,
        "evaluated": evaluated,
    }


def recipes_of(names: Sequence[str], added: Sequence[Sequence[str]]) -> dict[str, dict[str, Any]]:
    """The keys of every recipe. Raises ConfigError for a name or a key that cannot be."""
    own = {words[0]: parse_overrides(words[1:]) for words in added}
    if len(own) < len(list(added)):
        raise ConfigError("--recipe: two have the same name")
    for name, keys in own.items():
        if name in TAKEN or not NAME.fullmatch(name):
            raise ConfigError(f"--recipe {name}: a name of letters, digits, _ and -, and none of {', '.join(TAKEN)}")
        for key in keys:
            tree: dict[str, Any] = {}
            node = tree
            *sections, leaf = key.split(".")
            for section in sections:
                node = node.setdefault(section, {})
            node[leaf] = keys[key]
            check_keys(PretrainOptions, tree, f"--recipe {name}")
    known = {"default": {}, "reference": reference_keys(), **own}
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"--recipes {unknown[0]}: expected {', '.join(known)}; --recipe NAME key=value adds one")
    return {name: known[name] for name in dict.fromkeys([*names, *own])}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/method"))
    parser.add_argument("--data", nargs="+", default=["zion", "demo"])
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared", help="folder that holds data/zion")
    parser.add_argument("--recipes", nargs="+", default=list(BUILT_IN))
    parser.add_argument("--recipe", nargs="+", action="append", default=[], metavar=("NAME", "KEY=VALUE"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--labels", nargs="+", type=float, default=[5, 100], metavar="PERCENT")
    parser.add_argument("--segment", action="store_true", help="also a U-Net on the classes of pixels; takes long")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=bench_report.machine()["cores"], help="of all of them together")
    chosen = parser.parse_args(arguments)
    chosen.out = chosen.out.absolute()
    try:
        report = compare(chosen, recipes_of(chosen.recipes, chosen.recipe))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    (chosen.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    text = reports.tables(report)
    (chosen.out / "table.md").write_text(text)
    print(text)
    reports.picture(report, chosen.out / "curves.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
