"""Which of the fast paths a run takes: fused norms, a folded teacher, a recorded step.

Each is ``auto``, ``on`` or ``off`` in ``train``. ``auto`` takes it where it is known to pay and to work, tries it
before the run, and says so where it fails; ``on`` makes that an error.
"""

import importlib.util
import logging

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from geokr.compute import Compute, Recorded, compute
from geokr.config import ConfigError
from geokr.distributed import World
from geokr.folding import FoldedTeacher, FoldError
from geokr.models import LandCoverModel
from geokr.options import PretrainOptions

log = logging.getLogger(__name__)


def fuse_norms(options: PretrainOptions, model: LandCoverModel, world: World, *, synchronized: bool) -> bool:
    """Gives the backbone fused norms (:mod:`geokr.fused_resnet`) where the configuration says so and they work.

    Raises ConfigError where ``train.fused_norm=on`` cannot be.
    """
    choice = options.train.fused_norm
    if choice == "off":
        return False
    obstacle = _norm_obstacle(options, model, world, synchronized) or _norm_failure(world.device)
    if obstacle is None:
        from geokr.fused_resnet import fuse

        fuse(model.backbone)
        return True
    if choice == "on":
        raise ConfigError(f"train.fused_norm=on: {obstacle}; use auto or off")
    return False


def _norm_obstacle(options: PretrainOptions, model: LandCoverModel, world: World, synchronized: bool) -> str | None:
    if world.device.type != "cuda":
        return f"its kernels run on CUDA and this run is on {world.device.type}"
    if options.train.compile == "on":
        return "with train.compile=on the compiler fuses"
    if not options.train.channels_last:
        return "it needs train.channels_last=true"
    if synchronized:
        return "it takes batch statistics of one process, and model.sync_batchnorm wants those of all"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    from geokr.fused_resnet import can_fuse

    return None if can_fuse(model.backbone) else f"{options.model.backbone} is no ResNet of plain blocks"


def _norm_failure(device: torch.device) -> str | None:
    """What goes wrong when the kernels run once, if anything does; it warns of it."""
    from geokr.fused_norm import norm_relu

    norm = nn.BatchNorm2d(16, device=device)
    x = torch.randn(4, 16, 9, 9, device=device).contiguous(memory_format=torch.channels_last)
    try:
        expected = F.relu(F.batch_norm(x, None, None, training=True))
        distance = float((norm_relu(norm, x) - expected).abs().max())
    except Exception as error:
        reason = f"its kernels do not run here ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"
    else:
        if distance < 1e-3:
            return None
        reason = f"its kernels are off by {distance:.2g} here"
    log.warning("train.fused_norm: %s: going on without", reason)
    return reason


def fold_teacher(
    options: PretrainOptions, teacher: LandCoverModel, images_NCHW: Tensor, dtype: torch.dtype
) -> FoldedTeacher | None:
    """The teacher's folded form, where the configuration wants it and it gives the teacher's own logits.

    images_NCHW: some to try it with. Raises ConfigError where ``train.fold_teacher=on`` cannot be.
    """
    choice = options.train.fold_teacher
    if choice == "off" or (choice == "auto" and not any(isinstance(m, _BatchNorm) for m in teacher.modules())):
        return None
    if options.method.teacher_mode != "eval":
        if choice == "on":
            raise ConfigError(
                "train.fold_teacher=on: batch statistics cannot be folded: use method.teacher_mode=eval, or "
                "train.fold_teacher=auto"
            )
        return None
    try:
        folded = FoldedTeacher(teacher, images_NCHW, dtype)
        folded.check(images_NCHW)
    except (FoldError, RuntimeError) as error:  # the latter from a library without the fused convolution
        reason = str(error).splitlines()[0]
        if choice == "on":
            raise ConfigError(f"train.fold_teacher=on: {reason}; use auto or off") from error
        log.info("the teacher runs unfolded: %s", reason)
        return None
    return folded


def choose_compute(options: PretrainOptions, world: World, precision: str, *, changing: bool) -> Compute:
    """Steps as they come or recorded. Raises ConfigError where ``train.cuda_graph=on`` cannot be.

    precision: as :func:`geokr.precision.choose_precision` resolved it. changing: whether images' sides do.
    """
    choice = options.train.cuda_graph
    if choice == "off":
        return compute
    obstacle = _graph_obstacle(options, world, precision, changing=changing)
    if obstacle is None:
        return Recorded(required=choice == "on")
    if choice == "on":
        raise ConfigError(f"train.cuda_graph=on: {obstacle}; use auto or off")
    return compute


def _graph_obstacle(options: PretrainOptions, world: World, precision: str, *, changing: bool) -> str | None:
    if world.device.type != "cuda":
        return f"this run is on {world.device.type}"
    if world.size > 1:
        return "steps of several processes are not recorded"
    if options.train.accumulate > 1:
        return "steps of several parts (train.accumulate) are not recorded"
    if changing:
        return "images of augment.crop_probability or augment.progressive have different sides"
    if options.optim.implementation == "apex":
        return "apex's optimizers are not recorded"
    if precision == "fp16" and (options.optim.implementation != "fused" or options.optim.name == "lamb"):
        return "in fp16 this optimizer waits for the loss scaler's verdict, which a recorded step cannot"
    return None
