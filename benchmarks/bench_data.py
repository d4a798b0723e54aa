"""The data stages: reading, decoding, and the loaders."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks import bench_tiles
from benchmarks.bench_cases import Case, Setting
from pipelines.dataset import Dataset
from pipelines.loaders import read_threads, resolve_loader, train_batches
from pipelines.reader import Reader
from pipelines.threads import Team

BATCH = 128
TFRECORD = "dali tfrecord, no checksums"
RAW = "raw records"


def has_dali() -> bool:
    return resolve_loader("auto") == "dali"


def is_rgb_jpeg(setting: Setting) -> bool:
    return setting.dataset.manifest.tile.codec == "jpeg"


def read_cases(setting: Setting, stack: ExitStack) -> Iterator[Case]:
    dataset, batch = setting.dataset, 256
    reader = Reader(dataset, dataset.train, threads=read_threads(setting.threads), timeout_s=60)
    stack.callback(reader.close)
    rng = np.random.default_rng(0)

    def read() -> int:
        for _ in range(max(1, setting.images // batch)):
            reader.read(rng.integers(0, dataset.train.records, batch)).release()
        return max(1, setting.images // batch) * batch

    yield Case("read", "geokr", read)
    if has_dali():
        from benchmarks import bench_dali

        yield Case("read", TFRECORD, bench_dali.own_reader(setting, decode=False))


def decode_cases(setting: Setting, stack: ExitStack) -> Iterator[Case]:
    """Of JPEG records only: raw ones are not decoded."""
    if not is_rgb_jpeg(setting):
        return
    batches = _bytes_in_memory(setting)
    team = Team(setting.threads, "bench")
    stack.callback(team.close)
    if has_dali():
        from benchmarks import bench_dali

        yield Case("decode", "dali external_source", bench_dali.decoder(setting, batches))
        yield Case("decode", TFRECORD, bench_dali.own_reader(setting, decode=True))
    if setting.device.type == "cpu":
        yield Case("decode", "simplejpeg", _simplejpeg_decoder(setting, batches, team))


def _bytes_in_memory(setting: Setting) -> list[list[np.ndarray]]:
    """Four batches of encoded images."""
    dataset = setting.dataset
    reader = Reader(dataset, dataset.train, threads=4, timeout_s=60)
    held = [image.copy() for image in reader.read(np.arange(min(dataset.train.records, 4 * BATCH))).images]
    reader.close()
    return [[held[n % len(held)] for n in range(start, start + BATCH)] for start in range(0, 4 * BATCH, BATCH)]


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


def loader_cases(setting: Setting, stack: ExitStack) -> Iterator[Case]:
    """geokr's loaders; DALI's own reader with the same augmentation; and raw records of the benchmark's own tiles."""
    for name in ("dali", "torch") if has_dali() else ("torch",):
        yield _loader_case(name, setting, stack, name)
    if has_dali() and is_rgb_jpeg(setting):
        from benchmarks import bench_dali

        yield Case("loader", TFRECORD, bench_dali.own_reader(setting, decode=True, augment=True))
    if bench_tiles.is_own(setting.dataset.train.folder):
        raw = Dataset.open(bench_tiles.make_tiles(bench_tiles.RAW_TILES, "raw"))
        yield _loader_case(resolve_loader("auto"), replace(setting, dataset=raw), stack, RAW)


def _loader_case(name: str, setting: Setting, stack: ExitStack, title: str) -> Case:
    loader = batches(setting, stack, name, BATCH)
    runs = max(1, setting.images // BATCH)

    def run() -> int:
        for _ in range(runs):
            next(loader)
        return runs * BATCH

    return Case("loader", title, run, drain(setting, loader))


def batches(setting: Setting, stack: ExitStack, name: str, batch: int, *, by_colour: bool = False) -> Any:
    """geokr's own training batches by the named loader, closed with the stack."""
    data = setting.options.data.model_copy(update={"loader": name, "global_batch": batch})
    return stack.enter_context(
        train_batches(
            setting.dataset,
            data,
            setting.options.augment,
            seed=0,
            device=setting.device,
            image_size=setting.image_size,
            by_colour=by_colour,
        )
    )


def drain(setting: Setting, loader: Any) -> Callable[[], Any]:
    """Takes the batches that were prepared while other cases ran, so that none of them is counted."""
    ahead = 2 * setting.options.data.prefetch + 4  # both stages, what is in hand, DALI's queue
    return lambda: [next(loader) for _ in range(ahead)]
