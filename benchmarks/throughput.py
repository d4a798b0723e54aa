"""Images a second by stage, from bytes on disk to the trained step.

    python benchmarks/throughput.py [--records DIR] [--stage read|decode|loader|step|end2end|all] [--json FILE]

    read     bytes in random order: preadv and checksums; beside it DALI's own reader, which checks none
    decode   JPEG to pixels: DALI fed from memory, DALI's own reader and decoder, simplejpeg in threads
    loader   training batches with every augmentation, by DALI and by the plain torch loader
    step     forward, teacher, losses, backward, optimizer on one random batch; and steps of the published
             kind and of careful eager PyTorch
    end2end  the same step on the loader's batches

Alone it makes 2,048 seeded tiles of 256 px in the user's cache folder. Cases of a stage take turns, each warmed up;
medians and spreads ((max - min) / median) of the repeats are reported, and ratios within the run. The last line is
one JSON object with the ratios.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: the folder on the path must be the project's, not this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch

from benchmarks import bench_report, bench_tiles
from geokr.config import load, split_overrides
from geokr.options import PretrainOptions
from pipelines.dataset import Dataset
from pipelines.loaders import available_cores, resolve_loader, train_batches
from pipelines.reader import Reader
from pipelines.threads import Team

STAGES = ("read", "decode", "loader", "step", "end2end")
PUBLISHED, TUNED = "synthetic, published kind", "synthetic, tuned eager"


@dataclass(frozen=True, slots=True)
class Case:
    """``run`` works on some images and gives their number; ``prepare`` brings it to its steady state, untimed."""

    stage: str
    loader: str
    run: Callable[[], int]
    prepare: Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Setting:
    """What all stages share."""

    dataset: Dataset
    options: PretrainOptions
    device: torch.device
    images: int  # of a measurement of the data stages
    steps: int  # of a measurement of the steps
    repeats: int

    @property
    def threads(self) -> int:
        return self.options.data.threads or available_cores()

    @property
    def image_size(self) -> int:
        return self.options.data.image_size or self.dataset.manifest.tile.size


def measure(cases: list[Case], setting: Setting) -> list[dict[str, Any]]:
    """A line of results for each case. The cases take turns, so that a machine's moods fall on all of them."""
    rates: dict[int, list[float]] = {number: [] for number in range(len(cases))}
    for case in cases:
        case.run()  # compiles kernels, fills caches
    for _ in range(setting.repeats):
        for number, case in enumerate(cases):
            case.prepare()
            _synchronize(setting.device)
            start = time.perf_counter()
            count = case.run()
            _synchronize(setting.device)
            rates[number].append(count / (time.perf_counter() - start))
    return [
        {
            "stage": case.stage,
            "loader": case.loader,
            "device": setting.device.type,
            **bench_report.median_and_spread("img_per_s", rates[number]),
        }
        for number, case in enumerate(cases)
    ]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def nothing() -> None:
    """For cases that need no preparation."""


def has_dali() -> bool:
    return resolve_loader("auto") == "dali"


# ------------------------------------------------------------------------------------------ data stages


def read_cases(setting: Setting, stack: ExitStack) -> Iterator[Case]:
    dataset, batch = setting.dataset, 256
    reader = Reader(dataset, dataset.train, threads=4, timeout_s=60)
    stack.callback(reader.close)
    rng = np.random.default_rng(0)

    def read() -> int:
        for _ in range(setting.images // batch):
            reader.read(rng.integers(0, dataset.train.records, batch)).release()
        return setting.images // batch * batch

    yield Case("read", "geokr", read, nothing)
    if has_dali():
        yield Case("read", "dali tfrecord, no checksums", _dali_reader(setting, decode=False), nothing)


def decode_cases(setting: Setting, stack: ExitStack) -> Iterator[Case]:
    """Of JPEG records only: raw ones are not decoded."""
    dataset, batch = setting.dataset, 128
    if dataset.manifest.tile.codec != "jpeg":
        return
    reader = Reader(dataset, dataset.train, threads=4, timeout_s=60)
    stack.callback(reader.close)
    held = reader.read(np.arange(min(dataset.train.records, 512))).images
    batches = [[held[n % len(held)] for n in range(start, start + batch)] for start in range(0, 4 * batch, batch)]
    team = Team(setting.threads, "bench")
    stack.callback(team.close)
    if has_dali():
        yield Case("decode", "dali external_source", _dali_decoder(setting, batches), nothing)
        yield Case("decode", "dali tfrecord, no checksums", _dali_reader(setting, decode=True), nothing)
    if setting.device.type == "cpu":
        yield Case("decode", "simplejpeg", _simplejpeg_decoder(setting, batches, team), nothing)


def _simplejpeg_decoder(setting: Setting, batches: list[list[np.ndarray]], team: Team) -> Callable[[], int]:
    import simplejpeg

    def decode(images: list[np.ndarray]) -> None:
        for data in images:
            simplejpeg.decode_jpeg(data, colorspace="RGB")

    def run() -> int:
        rounds = max(1, setting.images // sum(map(len, batches)))
        for _ in range(rounds):
            for images in batches:
                team.map(decode, [images[start : start + 4] for start in range(0, len(images), 4)])
        return rounds * sum(map(len, batches))

    return run


def _dali_decoder(setting: Setting, batches: list[list[np.ndarray]]) -> Callable[[], int]:
    """DALI's decoder on bytes that lie in memory."""
    from itertools import cycle

    from pipelines import dali

    source = cycle(batches)
    pipeline = dali.build(
        lambda: (next(source),),
        count=len(batches[0]),
        shape=setting.dataset.tile_shape,
        codec="jpeg",
        transform=None,
        threads=setting.threads,
        device_id=_device_id(setting.device),
        depth=2,
    )
    return _dali_runs(pipeline, len(batches[0]), setting)


def _dali_reader(setting: Setting, *, decode: bool) -> Callable[[], int]:
    """DALI's own reader of the same shards, shuffled its own way."""
    from nvidia.dali import fn, tfrecord, types
    from nvidia.dali.pipeline import Pipeline

    split, batch, device_id = setting.dataset.train, 128, _device_id(setting.device)
    paths = [str(split.folder / shard.name) for shard in split.shards]
    pipeline = Pipeline(batch_size=batch, num_threads=setting.threads, device_id=device_id, prefetch_queue_depth=2)
    with pipeline:
        features: Any = fn.readers.tfrecord(
            path=paths,
            index_path=[str(split.folder / shard.index_name) for shard in split.shards],
            features={"image": tfrecord.FixedLenFeature([], tfrecord.string, "")},
            random_shuffle=True,
            initial_fill=256,
        )
        images = features["image"]
        if decode:
            backend = "cpu" if device_id is None else "mixed"
            images = fn.decoders.image(images, device=backend, output_type=types.DALIImageType.RGB)
        pipeline.set_outputs(images)
    pipeline.build()
    return _dali_runs(pipeline, batch, setting)


def _dali_runs(pipeline: Any, batch: int, setting: Setting) -> Callable[[], int]:
    def run() -> int:
        for _ in range(max(1, setting.images // batch)):
            pipeline.run()
        return max(1, setting.images // batch) * batch

    return run


def _device_id(device: torch.device) -> int | None:
    return None if device.type == "cpu" else device.index or 0


def loader_cases(setting: Setting, stack: ExitStack) -> Iterator[Case]:
    batch = min(256, setting.images)
    for name in ("dali", "torch") if has_dali() else ("torch",):
        batches = _batches(setting, stack, name, batch)

        def run(batches: Any = batches) -> int:
            for _ in range(max(1, setting.images // batch)):
                next(batches)
            return max(1, setting.images // batch) * batch

        yield Case("loader", name, run, _drain(setting, batches))


def _batches(setting: Setting, stack: ExitStack, name: str, batch: int) -> Any:
    data = setting.options.data.model_copy(update={"loader": name, "global_batch": batch})
    return stack.enter_context(
        train_batches(
            setting.dataset,
            data,
            setting.options.augment,
            seed=0,
            device=setting.device,
            image_size=setting.image_size,
        )
    )


def _drain(setting: Setting, batches: Any) -> Callable[[], Any]:
    """Takes the batches that were prepared while other cases ran, so that none of them is counted."""
    ahead = 2 * setting.options.data.prefetch + 4  # both stages, what is in hand, DALI's queue
    return lambda: [next(batches) for _ in range(ahead)]


# ------------------------------------------------------------------------------------------------ steps


def step_cases(setting: Setting, stack: ExitStack, stages: set[str]) -> Iterator[Case]:
    """Steps on one random batch and, for end2end, on the loader's."""
    from benchmarks.bench_steps import geokr_step, published_step, tuned_eager_step

    manifest, batch = setting.dataset.manifest, setting.options.data.global_batch
    step, chosen = geokr_step(setting.options, manifest, setting.image_size, setting.device)
    print(f"geokr's step: {chosen}")
    random = _batches(setting, stack, "synthetic", batch)

    def steps(step: Callable[[Any], None], batches: Any) -> Callable[[], int]:
        def run() -> int:
            for _ in range(setting.steps):
                step(next(batches))
            return setting.steps * batch

        return run

    yield Case("step", "synthetic", steps(step, random), nothing)
    if "step" in stages:
        backbone, sizes = setting.options.model.backbone, (len(manifest.bands), len(manifest.classes))
        yield Case("step", PUBLISHED, steps(published_step(backbone, *sizes, setting.device), random), nothing)
        tuned = tuned_eager_step(backbone, *sizes, setting.device, setting.options.train.precision)
        yield Case("step", TUNED, steps(tuned, random), nothing)
    if "end2end" in stages:
        name = resolve_loader(setting.options.data.loader)
        batches = _batches(setting, stack, name, batch)
        yield Case("end2end", name, steps(step, batches), _drain(setting, batches))


# ----------------------------------------------------------------------------------------------- report


def ratios_of(results: list[dict[str, Any]]) -> dict[str, float]:
    """Ratios within the run, of those pairs that were measured."""
    rate = {(line["stage"], line["loader"]): line["img_per_s"] for line in results}
    loaders = {name: value for (stage, name), value in rate.items() if stage == "loader"}
    end2end = [value for (stage, _), value in rate.items() if stage == "end2end"]
    best = max(loaders.values(), default=None)
    decoder = rate.get(("decode", "dali external_source")) or rate.get(("decode", "simplejpeg"))
    step, tfrecord = rate.get(("step", "synthetic")), rate.get(("decode", "dali tfrecord, no checksums"))
    pairs = {
        "decode external_source/tfrecord": (rate.get(("decode", "dali external_source")), tfrecord),
        "loader/decode": (best, decoder),
        "loader dali/torch": (loaders.get("dali"), loaders.get("torch")),
        "step/published": (step, rate.get(("step", PUBLISHED))),
        "step/tuned eager": (step, rate.get(("step", TUNED))),
        "loader/step": (best, step),
        "end2end/step": (end2end[0] if end2end else None, step),
    }
    return {name: over / under for name, (over, under) in pairs.items() if over and under}


def run_stages(stages: set[str], setting: Setting) -> list[dict[str, Any]]:
    """Results of the stages, one after the other."""
    results: list[dict[str, Any]] = []
    for stage, cases_of in (("read", read_cases), ("decode", decode_cases), ("loader", loader_cases)):
        if stage in stages:
            with ExitStack() as stack:
                results += measure(list(cases_of(setting, stack)), setting)
    if stages & {"step", "end2end"}:
        with ExitStack() as stack:
            results += measure(list(step_cases(setting, stack, stages)), setting)
    return results


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--records", type=Path, help="a dataset; without it 2,048 tiles are made")
    parser.add_argument("--stage", choices=(*STAGES, "all"), default="all")
    parser.add_argument("--config", type=Path, help="a pretraining configuration; key=value overrides may follow")
    parser.add_argument("--json", type=Path, help="write the whole report there")
    parser.add_argument("--images", type=int, default=2048, help="images of a measurement of the data stages")
    parser.add_argument("--steps", type=int, help="steps of a measurement (default: 3 on a CPU, 30 on a GPU)")
    parser.add_argument("--repeats", type=int, default=5)
    return parser


def _options(config: Path | None, overrides: list[str], device: torch.device) -> PretrainOptions:
    """The configuration, with defaults for what a benchmark need not be told."""
    given = {override.split("=", 1)[0] for override in overrides}
    defaults = []
    if "data.global_batch" not in given:
        defaults.append("data.global_batch=256" if device.type == "cuda" else "data.global_batch=16")
    if config is None and not given & {"train.epochs", "train.max_steps"}:
        defaults.append("train.epochs=1")
    return load(PretrainOptions, config, [*defaults, *overrides])


def main() -> None:
    others, overrides = split_overrides(sys.argv[1:])
    arguments = _parser().parse_args(others)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(available_cores())
    folder = arguments.records or bench_tiles.make_tiles(2048)
    setting = Setting(
        Dataset.open(folder),
        _options(arguments.config, overrides, device),
        device,
        arguments.images,
        arguments.steps or (30 if device.type == "cuda" else 3),
        arguments.repeats,
    )
    stages: set[str] = set(STAGES) if arguments.stage == "all" else {arguments.stage}
    results = run_stages(stages, setting)
    manifest = setting.dataset.manifest
    size = sum(shard.bytes for shard in manifest.train.shards) / manifest.train.records
    about = {"tile": manifest.tile.model_dump(), "record_bytes": round(size), "image_size": setting.image_size}
    about |= {"batch": setting.options.data.global_batch, "threads": setting.threads}
    report = bench_report.tree(results, ratios_of(results), about=about)
    bench_report.show(report, ("stage", "loader", "device", "img_per_s", "spread"), arguments.json)


if __name__ == "__main__":
    main()
