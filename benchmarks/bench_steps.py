"""The training steps that throughput.py compares: geokr's own, one in the published code's manner, and the one that a
careful user of eager PyTorch writes.

N images, C bands, H x W pixels, K classes.
"""

# pyright: reportPrivateImportUsage=false
# torch exports its multi-tensor operations under private names.

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench_cases import Case, Setting, nothing
from benchmarks.bench_data import batches, drain
from geokr import losses
from geokr.assemble import DTYPES, build_learner
from geokr.distributed import World
from geokr.models import BackboneSpec
from geokr.options import PretrainOptions
from geokr.precision import choose_precision
from geokr.train import train_step
from pipelines.augment import change_count
from pipelines.dataset import Dataset
from pipelines.loaders import resolve_loader

Step = Callable[[Any], None]
PUBLISHED, TUNED = "synthetic, published kind", "synthetic, tuned eager"
# Long enough that `train.compile=auto` decides as for a real run.
STEPS = 100_000


def geokr_step(
    options: PretrainOptions, dataset: Dataset, image_size: int, device: torch.device
) -> tuple[Step, dict[str, Any]]:
    """A function that trains on one batch, and what was chosen in words."""
    manifest, train = dataset.manifest, dataset.manifest.train
    learner, chosen = build_learner(
        options,
        BackboneSpec(options.model.backbone, len(manifest.bands), image_size),
        classes=len(manifest.classes),
        mean=list(train.mean),
        std=list(train.std),
        steps=STEPS,
        world=World(device),
        changes=change_count(dataset.band_facts()),
    )
    numbers: Iterator[int] = iter(range(1, STEPS))
    return lambda batch: void(train_step(learner, [batch], next(numbers))), chosen


def void(_: object) -> None:
    """For its argument's effect."""


def published_step(backbone: str, bands: int, classes: int, device: torch.device) -> Step:
    """Eager fp32 in NCHW, the teacher's batch norm in training mode, Adam, losses over batch and classes.

    The teacher stands still: the published one moves some thirty times in a whole run.
    """
    import timm

    student, teacher = (timm.create_model(backbone, in_chans=bands, num_classes=classes).to(device) for _ in range(2))
    optimizer = torch.optim.Adam(student.parameters(), 1e-3)

    def cross_entropy(target_NK: Tensor, logits_NK: Tensor) -> Tensor:
        return -(target_NK * logits_NK.log_softmax(1)).mean()

    def step(batch: Any) -> None:
        images_NCHW = batch.images.float().contiguous(memory_format=torch.contiguous_format) / 255
        student_NK = student(images_NCHW)
        with torch.no_grad():
            teacher_NK = teacher(images_NCHW)
        loss = cross_entropy(batch.fractions, student_NK) + cross_entropy(student_NK.softmax(1), teacher_NK)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


# Grey levels of photographs, as torchvision's models take them; the cost of normalising does not depend on them.
_MEAN, _SCALE = 117.0, 1 / 58.0
# Share of itself that the peer's teacher keeps at each step, and its share of the consistency loss: geokr's defaults.
_ALPHA, _CONSISTENCY = 0.996, 0.5


def tuned_eager_step(backbone: str, bands: int, classes: int, device: torch.device, precision: str) -> Step:
    """The same method as a careful user writes it without a compiler: what geokr's step is held against on a GPU.

    Channels-last, autocast to ``precision`` (fp32, bf16 or fp16, the last with a gradient scaler), fused AdamW, cuDNN's
    search, nothing that waits for the device; a teacher in training mode whose parameters follow by EMA at each step
    in multi-tensor launches.
    """
    import timm

    def model() -> torch.nn.Module:
        made = timm.create_model(backbone, in_chans=bands, num_classes=classes)
        return made.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    student, teacher = model(), model().requires_grad_(False)
    teacher.load_state_dict(student.state_dict())
    pairs = [parameter.detach() for parameter in teacher.parameters()], [p.detach() for p in student.parameters()]
    optimizer = torch.optim.AdamW(student.parameters(), 1e-3, weight_decay=0.05, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    dtype = DTYPES.get(precision)

    def step(batch: Any) -> None:
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=True):
            images_NCHW = batch.images.float().sub_(_MEAN).mul_(_SCALE)
            with torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
                student_NK = student(images_NCHW)
                with torch.no_grad():
                    teacher_NK = teacher(images_NCHW)
            supervision = losses.kl_supervision(student_NK.float(), batch.fractions, batch.weights)
            consistency = losses.kl_consistency(student_NK.float(), teacher_NK.float())
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(supervision + _CONSISTENCY * consistency).backward()
            scaler.step(optimizer)
            scaler.update()
            with torch.no_grad():
                torch._foreach_lerp_(*pairs, 1 - _ALPHA)

    return step


Variant = tuple[str, PretrainOptions]


def step_cases(setting: Setting, stack: ExitStack, stages: set[str], variants: list[Variant]) -> Iterator[Case]:
    """Steps on one random batch and, for end2end, on the loader's. The first variant is the run's own options."""
    manifest, count = setting.dataset.manifest, setting.options.data.global_batch
    told = any(options.model.condition_on_colour for _, options in variants)
    random = batches(setting, stack, "synthetic", count, by_colour=told)

    def case(stage: str, loader: str, step: Step, source: Any, options: str = "") -> Case:
        prepare = nothing if source is random else drain(setting, source)
        return Case(stage, loader, lambda: _run(step, source, setting.steps, count), prepare, options)

    own = [geokr_step(options, setting.dataset, setting.image_size, setting.device) for _, options in variants]
    for (words, _), (step, chosen) in zip(variants, own, strict=True):
        print(f"geokr's step ({words or 'defaults'}): {chosen}")
        yield case("step", "synthetic", step, random, words)
    if "step" in stages:
        backbone, sizes = setting.options.model.backbone, (len(manifest.bands), len(manifest.classes))
        yield case("step", PUBLISHED, published_step(backbone, *sizes, setting.device), random)
        if setting.device.type == "cuda":  # on a CPU its autocast may be slower than none, and takes minutes
            precision = choose_precision(setting.options.train.precision, setting.device)
            tuned = tuned_eager_step(backbone, *sizes, setting.device, precision)
            yield case("step", TUNED, tuned, random)
    if "end2end" in stages:
        name = resolve_loader(setting.options.data.loader)
        yield case("end2end", name, own[0][0], batches(setting, stack, name, count, by_colour=told), variants[0][0])


def _run(step: Step, source: Any, steps: int, count: int) -> int:
    for _ in range(steps):
        step(next(source))
    return steps * count
