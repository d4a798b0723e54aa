"""From a configuration to a learner: every choice is made here, before the loop."""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from geokr import band_names, losses
from geokr.batchnorm import synchronize_batchnorm
from geokr.compiling import Forward, compile_forward, trial, wanted
from geokr.compute import Beside, Recorded
from geokr.config import ConfigError
from geokr.crops import Crops
from geokr.ddp import for_trial, wrap
from geokr.distributed import World
from geokr.folding import FoldedTeacher
from geokr.identity import crops_are_off
from geokr.models import BackboneSpec, LandCoverModel, Normalise, build_backbone, build_model, feature_count
from geokr.optim import build_optimizer
from geokr.options import PretrainOptions
from geokr.precision import choose_precision
from geokr.schedules import ConsistencyWeight, LearningRate
from geokr.sizes import Sizes
from geokr.speedups import choose_compute, fold_teacher, fuse_norms
from geokr.state import Scaler
from geokr.teacher import TeacherRule, TeacherUpdate, make_teacher
from geokr.train import Learner
from geokr.weights import bands_of, load_into, read_state

log = logging.getLogger(__name__)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SYNC_BELOW = 64  # images a process sees at once, under which batch statistics are too noisy to leave alone


def images_at_once(global_batch: int, world_size: int, accumulate: int) -> int:
    """Images of a micro-batch in one process. Raises ConfigError if the batch cannot be cut evenly."""
    parts = world_size * accumulate
    each, rest = divmod(global_batch, parts)
    if rest or not each:
        near = sorted({max(1, each) * parts, (each + 1) * parts})
        raise ConfigError(
            f"data.global_batch={global_batch} cannot be cut into {world_size} process(es) x {accumulate} part(s) "
            f"(train.accumulate): use {' or '.join(map(str, near))}, or other numbers of them"
        )
    return each


def build_student(
    options: PretrainOptions,
    spec: BackboneSpec,
    classes: int,
    changes: int,
    *,
    fresh: bool,
    bands: Sequence[str] = (),
) -> LandCoverModel:
    """The student on the CPU, its weights as ``model.init`` says; a run that resumes brings its own (not fresh).

    bands: names of its bands, by which those of a weights file, or ImageNet's red, green and blue, are put in place.
    """
    init = options.model.init if fresh else "random"
    told = changes if options.model.condition_on_colour else 0
    if options.model.condition_on_colour and not told:
        raise ValueError("model.condition_on_colour=true needs the number of changes")
    student = build_model(spec, classes, options.run.seed, pretrained=init == "imagenet", changes=told)
    if init == "imagenet":
        bands = band_names.as_colours(bands)
        if {band_names.colour(name) for name in bands} & set(band_names.RGB):
            of_rgb = replace(spec, bands=len(band_names.RGB))
            source = student.backbone if spec == of_rgb else build_backbone(of_rgb, pretrained=True)
            load_into(student.backbone, source.state_dict(), "model.init=imagenet", band_names.RGB, bands)
    elif init != "random":
        load_into(student.backbone, read_state(init), init, bands_of(init), bands)
    return student


def _crops(
    options: PretrainOptions, spec: BackboneSpec, model: LandCoverModel, squares: int, steps: int
) -> Crops | None:
    """How batches are cropped, where they are. Raises ConfigError where squares or backbone do not allow what was asked
    for."""
    chosen = options.augment.crop_probability
    if not chosen or crops_are_off(options):
        return None
    try:
        crops = Crops(options.augment, options.run.seed, spec.image_size, squares, steps)
        _check_sides(crops.sides, f"augment.crop_probability={chosen}", spec, model)
    except ConfigError as error:
        if chosen != "auto":
            raise
        log.info("images stay whole: %s", error)
        return None
    return crops if crops.last else None


def _sizes(options: PretrainOptions, spec: BackboneSpec, model: LandCoverModel, steps: int) -> Sizes | None:
    """How images grow, where they do. Raises ConfigError where backbone or crops do not allow it."""
    if not options.augment.progressive:
        return None
    if options.augment.crop_probability not in (0, "auto"):
        raise ConfigError(
            f"augment.progressive=true and augment.crop_probability={options.augment.crop_probability}: images are "
            "either shrunk or cropped; set one of them to false or 0"
        )
    sizes = Sizes(spec.image_size, steps)
    _check_sides(sizes.sides, "augment.progressive=true", spec, model)
    return sizes


def _check_sides(sides: Sequence[int], asked: str, spec: BackboneSpec, model: LandCoverModel) -> None:
    """Raises ConfigError where the backbone does not take images of these sides."""
    for side in sides:
        try:
            feature_count(model.backbone, replace(spec, image_size=side))
        except ConfigError as error:
            key = asked.partition("=")[0]
            remedy = "0, a larger augment.crop_min" if key.endswith("crop_probability") else "false"
            raise ConfigError(
                f"{asked}: model.backbone={spec.name!r} does not take images of {side} px "
                f"({error.__cause__ or error}): use {key}={remedy}, or another backbone"
            ) from error


def _autocast(precision: str, device: torch.device) -> Callable[[], AbstractContextManager]:
    dtype = DTYPES.get(precision)
    return partial(torch.autocast, device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def _check_teacher(options: PretrainOptions, model: nn.Module) -> None:
    method = options.method
    if method.teacher_mode == "eval" and not method.teacher_buffers and _has_batchnorm(model):
        raise ConfigError(
            "method.teacher_buffers=false leaves an eval-mode teacher with the batch statistics of step 0: "
            "use true, or method.teacher_mode=train"
        )
    if method.consistency == "none" and not method.teacher_buffers and _has_batchnorm(model):
        raise ConfigError(
            "method.teacher_buffers=false with method.consistency=none leaves a teacher that sees no images with the "
            "batch statistics of step 0: use method.teacher_buffers=true"
        )


def _has_batchnorm(model: nn.Module) -> bool:
    return any(isinstance(module, _BatchNorm) for module in model.modules())


def _synchronize(options: PretrainOptions, world: World, at_once: int) -> bool:
    choice = options.model.sync_batchnorm
    return world.size > 1 and (choice == "on" or (choice == "auto" and at_once < SYNC_BELOW))


def _images(
    options: PretrainOptions, spec: BackboneSpec, device: torch.device, at_once: int, count: int | None
) -> torch.Tensor:
    """Some images of the run's form and memory format, to try things with; as many as a step sees where ``count`` is
    None."""
    shape = (count or at_once, spec.bands, spec.image_size, spec.image_size)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    return images.contiguous(memory_format=_layout(options))


def _layout(options: PretrainOptions) -> torch.memory_format:
    """Memory format of images and convolutions. It has to be said of both: cuDNN and oneDNN run a convolution
    channels-last where one of its two inputs is."""
    return torch.channels_last if options.train.channels_last else torch.contiguous_format


def _inputs(student: LandCoverModel, images_NCHW: torch.Tensor) -> list[torch.Tensor]:
    """What the student is called with in training: images, and unchanged colours where its head is told of those."""
    if student.condition is None:
        return [images_NCHW]
    changes_NQ = torch.zeros(len(images_NCHW), student.condition.modulate.in_features, device=images_NCHW.device)
    return [images_NCHW, changes_NQ]


def _rehearsal(
    student: LandCoverModel,
    images: Callable[[], torch.Tensor],
    dtype: torch.dtype,
    autocast: Callable[[], AbstractContextManager],
) -> Callable[[Forward], None]:
    """A forward and a backward pass with some images of this type, which leave no trace."""

    def rehearse(forward: Forward) -> None:
        with autocast():
            trial(forward, student, _inputs(student, images().to(dtype)))

    return rehearse


@dataclass(frozen=True, slots=True)
class _Passes:
    """How student and teacher run forward. folded: the teacher's folded form, where it runs in that."""

    student: Forward
    teacher: Forward
    folded: FoldedTeacher | None


def _passes(
    options: PretrainOptions,
    world: World,
    pair: tuple[LandCoverModel, LandCoverModel],
    images: Callable[[int | None], torch.Tensor],
    dtype: torch.dtype,
    autocast: Callable[[], AbstractContextManager],
    *,
    fused: bool,
) -> _Passes:
    """The forward passes, folded and compiled where the configuration says so and it works.

    images: so many images of the run's form to try it with; None for those of a step. A teacher that no loss asks is
    neither folded nor compiled.
    """
    student, teacher = pair
    asked = losses.CONSISTENCY[options.method.consistency] is not None
    folded = fold_teacher(options, teacher, images(2), dtype) if asked else None
    runs = folded or teacher
    if fused or not wanted(options.train.compile, world.device):
        return _Passes(student, runs, folded)
    how = options.train.compile
    through = partial(for_trial, world=world, options=options.train)
    inputs = _inputs(student, images(None))
    compiled = compile_forward(how, student, inputs, autocast, through)
    return _Passes(compiled, compile_forward(how, runs, inputs, autocast) if asked else runs, folded)


def _pair(
    options: PretrainOptions, student: LandCoverModel, world: World, synchronized: bool
) -> tuple[LandCoverModel, LandCoverModel]:
    """Student and teacher on the device, in the memory format and with the batch norm of the run."""
    student.to(world.device).to(memory_format=_layout(options))  # type: ignore[call-overload]
    _check_teacher(options, student)
    if synchronized:
        student.backbone = synchronize_batchnorm(student.backbone, world.device.type)
    return student, make_teacher(student, options.method, options.run.seed)


def build_learner(
    options: PretrainOptions,
    spec: BackboneSpec,
    *,
    classes: int,
    mean: list[float],
    std: list[float],
    steps: int,
    world: World,
    squares: int = 0,
    changes: int = 0,
    bands: Sequence[str] = (),
    restore: Callable[[LandCoverModel, LandCoverModel, torch.optim.Optimizer, Scaler], None] | None = None,
) -> tuple[Learner, dict[str, Any]]:
    """The learner, and what was chosen in words.

    squares: along a tile's side, whose fractions the records hold, 0 for none. changes: Q, the numbers that say how an
    image's colours were changed, needed where the head is told. bands: names of the images' bands, for ``model.init``.
    restore: fills models, optimizer and scaler with a checkpoint's state, in place of ``model.init``.
    Raises ConfigError for whatever in the configuration cannot be.
    """
    at_once = images_at_once(options.data.global_batch, world.size, options.train.accumulate)
    synchronized = _synchronize(options, world, at_once)
    student = build_student(options, spec, classes, changes, fresh=restore is None, bands=bands)
    sizes = _sizes(options, spec, student, steps)
    crops = None if sizes else _crops(options, spec, student, squares, steps)
    student, teacher = _pair(options, student, world, synchronized)
    fused = fuse_norms(options, student, world, synchronized=synchronized)
    precision = choose_precision(options.train.precision, world.device)
    run_step = choose_compute(options, world, precision, changing=crops is not None or sizes is not None)
    optimizer, ran = build_optimizer(student, options.optim, world.device, capturable=isinstance(run_step, Recorded))
    scaler = Scaler(world.device.type, enabled=precision == "fp16")
    if restore is not None:
        restore(student, teacher, optimizer, scaler)
    autocast = _autocast(precision, world.device)
    dtype = DTYPES.get(precision, torch.float32)
    some_images = partial(_images, options, spec, world.device, at_once)
    passes = _passes(options, world, (student, teacher), some_images, dtype, autocast, fused=fused)
    few = 2 if passes.student is student else None  # what is compiled takes as many images as a step
    given = dtype if fused else torch.float32  # of normalised images
    rehearse = _rehearsal(student, partial(some_images, few), given, autocast)
    refold = passes.folded.refold if passes.folded is not None else _nothing
    learner = Learner(
        student=student,
        teacher=teacher,
        student_forward=wrap(passes.student, world, options.train, steps, rehearse),
        teacher_forward=passes.teacher,
        normalise=Normalise(mean, std, world.device, given if fused else None, _layout(options)),
        autocast=autocast,
        supervision=losses.SUPERVISION[options.method.supervision],
        consistency=losses.CONSISTENCY[options.method.consistency],
        consistency_weight=torch.zeros((), device=world.device),
        consistency_course=ConsistencyWeight(options.method, steps),
        optimizer=optimizer,
        scaler=scaler,
        learning_rate=LearningRate(options.optim, steps),
        clip_norm=options.train.clip_norm or float("inf"),
        rule=TeacherRule(options.method, options.data.global_batch),
        update_teacher=TeacherUpdate(teacher, student, buffers=options.method.teacher_buffers, then=refold),
        world=world,
        seed=options.run.seed,
        accumulate=options.train.accumulate,
        crops=crops,
        sizes=sizes,
        compute=run_step,
        beside=Beside(world.device),
        local_statistics=world.size > 1 and not synchronized and _has_batchnorm(student),
    )
    chosen = {
        "optimizer": ran,
        "synchronized": synchronized,
        "at_once": at_once,
        "fused_norm": fused,
        "precision": precision,
    }
    chosen |= {"compiled": passes.student is not student, "folded_teacher": passes.folded is not None}
    return learner, chosen | {"cuda_graph": isinstance(run_step, Recorded)}


def _nothing() -> None:
    """What follows the move of a teacher that has no folded form."""
