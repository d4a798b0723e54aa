"""Images a second by stage: reading, decoding, loading, training, and all of it together.

    python benchmarks/throughput.py [--records DIR] [--stage STAGE] [--json FILE] [--picture FILE]
                                    [--config FILE] [key=value ...]

    read     bytes in random order: preadv and checksums; beside it DALI's own reader, which checks none
    decode   JPEG to pixels: DALI fed from memory, DALI's own reader and decoder, simplejpeg in threads
    loader   training batches with every augmentation, by DALI and by the plain torch loader; DALI's own reader with
             the same augmentation by DALI's operators; raw records of the same tiles
    step     forward, teacher, losses, backward, optimizer on one random batch; and steps of the published
             kind and, on a GPU, of careful eager PyTorch. --variant='key=value ...' adds a step with other options
    end2end  the same step on the loader's batches
    all      those five
    peers    other ways of loading the same tiles, with decode and loader in the same run (pip install -e .[bench])
    profile  where the step's time goes: the ten costliest operations, and a trace in the folder --trace

`--stage step --find-batch` finds the largest batch that fits instead, and its rate and memory.

Alone it makes 2,048 seeded tiles of 256 px in the user's cache folder. Cases of a stage take turns, each warmed up;
medians and spreads ((max - min) / median) of the repeats are reported, processor time (of this process and its workers)
an image, and ratios within the run. The last line is one JSON object with the ratios.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: the folder on the path must be the project's, not this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks import bench_picture, bench_report, bench_tiles
from benchmarks.bench_batch import Try, find_batch
from benchmarks.bench_cases import Case, Setting, measure
from benchmarks.bench_data import RAW, TFRECORD, batches, decode_cases, loader_cases, read_cases
from benchmarks.bench_peers import peer_cases
from benchmarks.bench_profile import profile_steps, show_profile
from benchmarks.bench_steps import PUBLISHED, TUNED, Variant, geokr_step, step_cases
from geokr.config import load, split_overrides
from geokr.options import PretrainOptions
from pipelines.dataset import Dataset
from pipelines.loaders import available_cores

STAGES = ("read", "decode", "loader", "step", "end2end")
COLUMNS = ("stage", "loader", "device", "img_per_s", "spread", "cpu_ms_per_img", "options")
# Steps of one measurement.
STEPS = {
    ("step", "cpu"): 3,
    ("step", "cuda"): 30,
    ("find-batch", "cpu"): 1,
    ("find-batch", "cuda"): 10,
    ("profile", "cpu"): 2,
    ("profile", "cuda"): 5,
}
Makers = list[Callable[[Setting, ExitStack], Iterator[Case]]]

# ----------------------------------------------------------------------------------------------- stages


def run_stages(stages: set[str], setting: Setting, variants: list[Variant]) -> list[dict[str, Any]]:
    """Results of the stages, one after the other; peers together with what they are held against."""
    makers: dict[str, Makers] = {"read": [read_cases], "decode": [decode_cases], "loader": [loader_cases]}
    makers["peers"] = [peer_cases, decode_cases, loader_cases]  # peers first: their workers fork
    results: list[dict[str, Any]] = []
    for stage, cases_of in makers.items():
        if stage in stages:
            with ExitStack() as stack:
                results += measure([case for make in cases_of for case in make(setting, stack)], setting)
    if stages & {"step", "end2end"}:
        with ExitStack() as stack:
            results += measure(list(step_cases(setting, stack, stages, variants)), setting)
    return results


def ratios_of(results: list[dict[str, Any]]) -> dict[str, float]:
    """Ratios within the run, of those pairs that were measured. ``loader`` is the faster of geokr's two."""
    rate = {(line["stage"], line["loader"]): line["img_per_s"] for line in reversed(results)}
    own = {name: rate.get(("loader", name)) for name in ("dali", "torch")}
    loader = max(filter(None, own.values()), default=None)
    end2end = next((value for (stage, _), value in rate.items() if stage == "end2end"), None)
    step, external = rate.get(("step", "synthetic")), rate.get(("decode", "dali external_source"))
    decoder = external or rate.get(("decode", "simplejpeg"))
    pairs = {
        "decode external_source/tfrecord": (
            rate.get(("decode", "dali external_source")),
            rate.get(("decode", TFRECORD)),
        ),
        "loader/decode": (loader, decoder),
        "loader dali/torch": (own["dali"], own["torch"]),
        "loader dali/tfrecord": (own["dali"], rate.get(("loader", TFRECORD))),
        "loader raw/jpeg": (rate.get(("loader", RAW)), loader),
        "step/published": (step, rate.get(("step", PUBLISHED))),
        "step/tuned eager": (step, rate.get(("step", TUNED))),
        "loader/step": (loader, step),
        "end2end/step": (end2end, step),
    }
    pairs |= {f"loader/{name}": (loader, value) for (stage, name), value in reversed(rate.items()) if stage == "peers"}
    variants = [line for line in results if (line["stage"], line["loader"]) == ("step", "synthetic")][1:]
    pairs |= {f"step {line['options']}/step": (line["img_per_s"], step) for line in variants}
    return {name: over / under for name, (over, under) in pairs.items() if over and under}


def run_find_batch(setting: Setting, limit_gb: float | None, words: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The result line of the largest batch, and what was found."""

    def say(tried: Try) -> None:
        print(f"batch {tried.batch}: {tried.failure or f'{tried.rate:.1f} images/s, {tried.peak_bytes / 1e9:.1f} GB'}")

    best = find_batch(setting, round(limit_gb * 1e9) if limit_gb else None, say)
    found = {"batch": best.batch, "peak_gb": round(best.peak_bytes / 1e9, 2), "chosen": best.chosen}
    print(f"largest batch {best.batch}, peak memory {found['peak_gb']} GB: {best.chosen}")
    line = {"stage": "step", "loader": "synthetic, largest batch", "device": setting.device.type}
    rate = bench_report.median_and_spread("img_per_s", best.rates)
    return [{**line, **rate, "options": f"{words} data.global_batch={best.batch}".strip()}], found


def run_profile(setting: Setting, folder: Path) -> dict[str, Any]:
    """Prints the costliest operations; what goes into the report."""
    step, chosen = geokr_step(setting.options, setting.dataset, setting.image_size, setting.device)
    with ExitStack() as stack:
        random = batches(setting, stack, "synthetic", setting.options.data.global_batch)
        for _ in range(2):  # compiles, searches for the best convolutions
            step(next(random))
        found = profile_steps(lambda: step(next(random)), setting.steps, setting.device, folder)
    print(f"geokr's step: {chosen}")
    show_profile(found)
    return {"trace": str(found.trace), "step_ms": found.step_ms, "busy": found.busy, "costliest": found.costliest}


# ---------------------------------------------------------------------------------------- command line


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--records", type=Path, help="a dataset; without it 2,048 tiles are made")
    parser.add_argument("--stage", choices=(*STAGES, "all", "peers", "profile"), default="all")
    parser.add_argument("--config", type=Path, help="a pretraining configuration; key=value overrides may follow")
    parser.add_argument("--json", type=Path, help="write the whole report there")
    parser.add_argument("--picture", type=Path, help="draw the results there (PNG)")
    parser.add_argument("--images", type=int, default=2048, help="images of a measurement of the data stages")
    parser.add_argument("--steps", type=int, help="steps of a measurement (default: 1 to 3 on a CPU, 5 to 30 on a GPU)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--variant", action="append", default=[], help="--variant='key=value ...': one more step")
    parser.add_argument("--find-batch", action="store_true", help="with --stage step: the largest batch that fits")
    parser.add_argument("--memory-gb", type=float, help="with --find-batch on a CPU: memory the process may take")
    parser.add_argument("--trace", type=Path, default=Path("out/profile"), help="folder of --stage profile's trace")
    return parser


def with_defaults(config: Path | None, overrides: list[str], device: torch.device) -> list[str]:
    """The overrides, after those that a benchmark need not be told."""
    given = {override.split("=", 1)[0] for override in overrides}
    defaults = []
    if "data.global_batch" not in given:
        defaults.append("data.global_batch=256" if device.type == "cuda" else "data.global_batch=16")
    if config is None and not given & {"train.epochs", "train.max_steps"}:
        defaults.append("train.epochs=1")
    return [*defaults, *overrides]


def _variants(arguments: argparse.Namespace, overrides: list[str], device: torch.device) -> list[Variant]:
    """The run's own options first; each variant's on top of them."""
    found = []
    for extra in ["", *arguments.variant]:
        keys = {override.split("=", 1)[0] for override in extra.split()}
        kept = [override for override in overrides if override.split("=", 1)[0] not in keys]
        own = with_defaults(arguments.config, [*kept, *extra.split()], device)
        words = " ".join(override for override in own if not override.startswith("train.epochs="))
        found.append((words, load(PretrainOptions, arguments.config, own)))
    return found


def main() -> None:
    others, overrides = split_overrides(sys.argv[1:])
    parser = _parser()
    arguments = parser.parse_args(others)
    if arguments.find_batch and arguments.stage != "step":
        parser.error("--find-batch goes with --stage step")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(available_cores())
    else:
        torch.backends.cudnn.benchmark = True  # as in a run
    folder = arguments.records or bench_tiles.make_tiles(bench_tiles.TILES)
    variants = _variants(arguments, overrides, device)
    kind = "find-batch" if arguments.find_batch else "profile" if arguments.stage == "profile" else "step"
    steps = arguments.steps or STEPS[kind, device.type]
    setting = Setting(Dataset.open(folder), variants[0][1], device, arguments.images, steps, arguments.repeats)
    results, extra = _run(arguments, setting, variants)
    about = {"about": _about(setting, variants[0][0])}
    report = bench_report.tree(results, ratios_of(results), **about, **extra)
    bench_report.show(report, COLUMNS, arguments.json)
    if arguments.picture is not None and results:
        bench_picture.draw(report, arguments.picture)


def _run(
    arguments: argparse.Namespace, setting: Setting, variants: list[Variant]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Result lines, and what else goes into the report."""
    if arguments.find_batch:
        results, found = run_find_batch(setting, arguments.memory_gb, variants[0][0])
        return results, {"largest_batch": found}
    if arguments.stage == "profile":
        return [], {"profile": run_profile(setting, arguments.trace)}
    stages: set[str] = set(STAGES) if arguments.stage == "all" else {arguments.stage}
    return run_stages(stages, setting, variants), {}


def _about(setting: Setting, words: str) -> dict[str, Any]:
    manifest = setting.dataset.manifest
    size = sum(shard.bytes for shard in manifest.train.shards) / manifest.train.records
    return {
        "tile": manifest.tile.model_dump(),
        "record_bytes": round(size),
        "image_size": setting.image_size,
        "batch": setting.options.data.global_batch,
        "threads": setting.threads,
        "options": words,
    }


if __name__ == "__main__":
    main()
