"""What only a GPU runs: ``make gpu``. Everything here skips without one.

GEOKR_GPU_TESTS=cpu runs what can be run on a CPU instead, to try the tests themselves.
"""

import copy
import gc
import os
from datetime import timedelta

import numpy as np
import psutil
import pytest
import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from geokr import pretrain
from geokr.checkpoint import list_checkpoints, load_latest
from geokr.config import load
from geokr.distributed import World
from geokr.folding import FoldedTeacher
from geokr.metrics import Window, read_metrics
from geokr.options import AugmentOptions, DataOptions
from geokr.train import train_step
from pipelines.dataset import Dataset
from pipelines.loaders import resolve_loader, train_batches
from tests import geokr_toy as toy
from tests.datasets import make_dataset
from tests.test_geokr_folding import teacher_of

ON_CPU = os.environ.get("GEOKR_GPU_TESTS") == "cpu"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (torch.cuda.is_available() or ON_CPU), reason="no CUDA device here"),
]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
needs_dali = pytest.mark.skipif(resolve_loader("auto") != "dali", reason="DALI is not installed")
DEVICE = torch.device("cpu" if ON_CPU else "cuda:0")
FAST = ["train.fused_norm=on", "train.fold_teacher=on", "train.cuda_graph=on"]
PLAIN = ["train.fused_norm=off", "train.fold_teacher=off", "train.cuda_graph=off"]
if ON_CPU:
    FAST = ["train.fold_teacher=on"]


@pytest.fixture(autouse=True)
def exact_convolutions():
    """float32 is float32, as the comparisons take it; nothing of a test's memory is left to the next."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False):
        yield
    gc.collect()
    torch.cuda.empty_cache()


def learner_of(*overrides: str):
    given = ["model.backbone=resnet18", "data.global_batch=32", "optim.lr=2e-3", "optim.warmup=0"]
    keys = {override.split("=")[0] for override in overrides}
    kept = [item for item in given if item.split("=")[0] not in keys]
    return toy.learner(toy.options(*kept, *overrides), steps=40, world=World(DEVICE))


def batches_of(count: int, size: int = 32) -> list[toy.ToyBatch]:
    stream = toy.stream(0, size, records=200)
    return [on_device(next(stream)) for _ in range(count)]


def on_device(batch: toy.ToyBatch) -> toy.ToyBatch:
    """With weights of labels that differ from batch to batch, which a recorded step must take over."""
    weights = torch.from_numpy(0.5 + batch.record_ids % 3 / 2).float()
    moved = (batch.images.to(DEVICE), batch.fractions.to(DEVICE), batch.record_ids, weights.to(DEVICE))
    return toy.ToyBatch(*moved, colour_changes=batch.colour_changes.to(DEVICE))


def losses_of(learner, batches, begin: int = 1) -> torch.Tensor:
    steps = enumerate(batches, begin)
    return torch.stack([train_step(learner, [batch], step)[0].clone() for step, batch in steps]).cpu()


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    size = expected.double().norm().clamp_min(1e-12)  # gradients may be zero, as behind a norm that starts at zero
    return float((found.double() - expected.double()).norm() / size)


# ------------------------------------------------------------------------------------------------ the step


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 2e-3), ("bf16", 0.05), ("fp16", 0.05)])
@pytest.mark.parametrize("told", ["false", "true"])
def test_every_fast_path_keeps_the_loss_curve(precision, tolerance, told):
    """Fused norms, folded teacher and CUDA graph against plain eager, same seed, 16 steps."""
    batches, keys = batches_of(16), (f"train.precision={precision}", f"model.condition_on_colour={told}")
    fast, plain = (learner_of(*keys, *paths) for paths in (FAST, PLAIN))
    if told == "true":  # at the size of features, so that a recorded step that kept old numbers would stand out
        for model in (fast.student, fast.teacher, plain.student, plain.teacher):
            values = model.condition.modulate.weight.data
            values.copy_(torch.randn(values.shape, generator=torch.Generator().manual_seed(0)))
    found, expected = losses_of(fast, batches), losses_of(plain, batches)
    assert distance(found[:, 0], expected[:, 0]) < tolerance
    assert found[-4:, 0].mean() < 0.7 * found[:4, 0].mean()


@needs_cuda
@pytest.mark.parametrize("path", ["fused_norm", "fold_teacher", "cuda_graph"])
def test_each_by_itself(path):
    batches = batches_of(10)
    one = [f"train.{path}=on", *(item for item in PLAIN if path not in item)]
    found, expected = (losses_of(learner_of("train.precision=fp32", *how), batches) for how in (one, PLAIN))
    assert distance(found[:, 0], expected[:, 0]) < 2e-3


@needs_cuda
@pytest.mark.parametrize("graph", ["on", "off"])
@pytest.mark.parametrize("overrides", [["train.precision=bf16", "train.clip_norm=1.0"], ["train.precision=fp16"]])
def test_a_step_does_not_wait_for_the_device(graph, overrides):
    learner, window = learner_of(f"train.cuda_graph={graph}", *overrides), Window(World(DEVICE))
    batches = batches_of(9)
    losses_of(learner, batches[:5])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
            for step, batch in enumerate(batches[5:8], 6):
                window.add(step, *train_step(learner, [batch], step))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    names = {event.key: event.count for event in found.key_averages()}
    waits = {n: c for n, c in names.items() if n in ("cudaStreamSynchronize", "cudaEventSynchronize") or "DtoH" in n}
    assert not waits
    assert names.get("cudaDeviceSynchronize", 0) <= 1  # the profiler's own, at its end
    if graph == "on":
        assert names.get("cudaGraphLaunch", 0) == 3
        assert names.get("cudaLaunchKernel", 0) < 300  # the teacher's move and little else


@needs_cuda
def test_an_overflow_is_skipped_inside_a_graph():
    learner = learner_of("train.precision=fp16", *FAST)
    batches = batches_of(8)
    losses_of(learner, batches[:6])
    student, teacher = (copy.deepcopy(model.state_dict()) for model in (learner.student, learner.teacher))
    learner.scaler._scale.fill_(2.0**60)
    losses_of(learner, batches[6:7], 7)
    assert float(learner.scaler._scale) == 2.0**59
    parameters = dict(learner.student.named_parameters())
    assert all(torch.equal(parameters[name], student[name]) for name in parameters)
    moved = [n for n, t in learner.teacher.state_dict().items() if t.ndim and not torch.equal(t, teacher[n])]
    assert not moved
    learner.scaler._scale.fill_(2.0**10)
    losses_of(learner, batches[7:8], 8)
    assert not torch.equal(learner.student.head.weight, student["head.weight"])


@pytest.mark.parametrize("name", ["resnet18", "resnet50d", "vgg11_bn", "regnetx_002"])
def test_the_folded_teacher(name):
    teacher, images = teacher_of(name, 64)
    teacher, images = teacher.to(DEVICE), images.to(DEVICE)
    teacher.to(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = teacher(images)
        assert distance(FoldedTeacher(teacher, images, torch.float32)(images), expected) < 1e-4
        for dtype, bound in ((torch.float16, 0.01), (torch.bfloat16, 0.05)):
            assert distance(FoldedTeacher(teacher, images, dtype)(images), expected) < bound


@needs_cuda
def test_a_compiled_step():
    """Where norms are not fused, torch.compile is what `auto` takes; a recorded compiled step is the eager one."""
    batches = batches_of(6)
    overrides = ["model.backbone=test_vit", "data.image_size=32", "train.precision=fp32"]
    compiled = losses_of(learner_of(*overrides, "train.compile=on", "train.cuda_graph=on"), batches)
    eager = losses_of(learner_of(*overrides, "train.compile=off", "train.cuda_graph=off"), batches)
    assert distance(compiled[:, 0], eager[:, 0]) < 5e-3


@needs_cuda
def test_gradients_through_nccl():
    """DistributedDataParallel over NCCL around fused norms, in a world of one: the same gradients."""
    store = dist.HashStore()
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, timeout=timedelta(seconds=60), device_id=DEVICE)
    try:
        learner = learner_of("train.precision=fp32", *FAST[:2])
        alone = copy.deepcopy(learner.student)
        wrapped = DistributedDataParallel(learner.student, device_ids=[0], gradient_as_bucket_view=True)
        batch = batches_of(1)[0]
        images = learner.normalise(batch.images)
        for model in (wrapped, alone):
            model(images).square().sum().backward()
        for a, b in zip(learner.student.parameters(), alone.parameters(), strict=True):
            assert distance(a.grad, b.grad) < 1e-3
    finally:
        dist.destroy_process_group()


# --------------------------------------------------------------------------------------------- the loader


def _epochs(dataset: Dataset, loader: str, device: torch.device, augment: AugmentOptions, size: int | None):
    options = DataOptions(loader=loader, global_batch=16, threads=4)
    how = {"seed": 3, "device": device, "image_size": size}
    with train_batches(dataset, options, augment, **how) as batches:
        for _ in range(4):
            batch = next(batches)
            yield batch.record_ids, batch.fractions.cpu(), batch.images.float().cpu()


@needs_dali
@pytest.mark.parametrize("augmented", [False, True])
@pytest.mark.parametrize(
    ("codec", "dtype", "bands", "size"),
    [
        ("jpeg", "uint8", 3, None),
        ("jpeg", "uint8", 3, 40),
        ("raw", "uint8", 3, None),
        ("raw", "uint8", 5, 40),
        ("raw", "uint16", 4, None),
        ("raw", "float32", 2, 40),
        ("png", "uint16", 4, None),
        ("lz4", "uint8", 3, None),
        ("lz4", "uint16", 4, None),
        ("lz4", "int16", 3, 40),
        ("lz4", "float32", 2, None),
    ],
)
def test_dali_on_the_device_gives_the_same_batches(codec, dtype, bands, size, augmented, tmp_path):
    """The graph on the GPU against the kernels on the CPU. JPEG decoders may differ by some grey levels."""
    dataset = Dataset.open(make_dataset(tmp_path / "d", tiles=48, size=64, bands=bands, dtype=dtype, codec=codec))
    off = {"dihedral": False, "colour_probability": 0.0}
    augment = AugmentOptions() if augmented else AugmentOptions(**off)
    pairs = zip(
        _epochs(dataset, "dali", DEVICE, augment, size),
        _epochs(dataset, "torch", torch.device("cpu"), augment, size),
        strict=True,
    )
    for found, expected in pairs:
        assert np.array_equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
        assert found[2].shape == expected[2].shape
        off_by = (found[2] - expected[2]).abs()
        if dtype == "uint8":
            assert float(off_by.mean()) < (1.0 if codec == "jpeg" else 0.1)
            assert float(off_by.max()) <= (16 if codec == "jpeg" else 1)
        else:
            assert float(off_by.max()) < 0.02


@needs_dali
def test_memory_stays_flat_over_2000_steps(tmp_path):
    dataset = Dataset.open(make_dataset(tmp_path / "d", tiles=256, size=64, codec="jpeg", shard_records=64))
    learner = learner_of("train.precision=bf16", *FAST)
    options, steps = DataOptions(loader="dali", global_batch=32, threads=8), 40 if ON_CPU else 2000
    marks = []
    with train_batches(dataset, options, AugmentOptions(), seed=0, device=DEVICE, image_size=32) as batches:
        for step in range(1, steps + 1):
            train_step(learner, [next(batches)], step)
            if step in (steps // 4, steps):
                used = 0 if ON_CPU else torch.cuda.mem_get_info()[1] - torch.cuda.mem_get_info()[0]
                marks.append((used, psutil.Process().memory_info().rss))
    assert marks[1][0] - marks[0][0] <= 32 << 20
    assert marks[1][1] - marks[0][1] <= 128 << 20


# ---------------------------------------------------------------------------------------------- whole runs


def test_a_run_with_everything_and_its_resume(tmp_path, caplog):
    """python -m geokr.pretrain as users run it, with DALI; stopped halfway it ends near the undisturbed run."""
    records = make_dataset(tmp_path / "d", tiles=96, size=64, val=16)
    keys = [
        "model.backbone=resnet18", "data.global_batch=32", "train.max_steps=12", "log.every_steps=3", "log.panels=2",
        "validation.every_steps=6", "checkpoint.every_steps=6", f"data.records={records}", "train.compile=off",
        f"train.device={DEVICE.type}",
    ]  # fmt: skip
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert pretrain.main([*keys, f"run.dir={whole}"]) == 0
    assert pretrain.main([*keys, f"run.dir={resumed}"]) == 0
    newest = list_checkpoints(resumed / "checkpoints")[0]
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()
    assert pretrain.main([*keys, f"run.dir={resumed}"]) == 0
    lines = read_metrics(whole / "metrics.jsonl")
    assert lines[-1]["step"] == 12
    assert 0 < lines[-1]["val/kl"] < 10
    a, b = (load_latest(folder / "checkpoints") for folder in (whole, resumed))
    assert a is not None
    assert b is not None
    assert a.step == b.step == 12
    assert a.tensors.keys() == b.tensors.keys()
    worst = max(distance(b.tensors[n], t) for n, t in a.tensors.items() if n.startswith("student") and t.ndim > 1)
    assert worst < 0.1
    assert load(pretrain.PretrainOptions, whole / "config.yaml").train.cuda_graph == "auto"
