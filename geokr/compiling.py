"""torch.compile: whether to use it, and a trial before the run, so that a missing compiler is known at once."""

import logging
import os
import shutil
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from geokr.config import ConfigError

log = logging.getLogger(__name__)
Forward = Callable[[Tensor], Tensor]

# On a CPU compiling costs about this many seconds, and saves about this share of an eager step. CPU_FLOPS is what an
# eager step reaches on a core. See docs for the measurements.
CPU_COMPILE_S = 90.0
CPU_SAVING = 0.2
CPU_FLOPS = 4e10


def forward_flops(model: nn.Module, image_CHW: tuple[int, int, int]) -> int:
    """Floating-point operations of one image's forward pass, counted in a dry run."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *image_CHW, device=device))
    model.train(was_training)
    return counter.get_total_flops()


def cpp_compiler() -> str | None:
    """The C++ compiler that torch would call, or None."""
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")


def worth_compiling(flops: float, cores: int) -> bool:
    """On a CPU: whether the time saved over ``flops`` operations (a whole run's, in this process) is above twice
    what compiling costs. A function of the configuration alone, so that a resumed run decides alike."""
    return CPU_SAVING * flops / (CPU_FLOPS * cores) > 2 * CPU_COMPILE_S


def wanted(option: str, device: torch.device, run_flops: Callable[[], float]) -> bool:
    """Whether to try torch.compile. ``run_flops``: operations of the whole run in this process, asked only where
    they decide."""
    if option != "auto":
        return option == "on"
    if device.type == "cuda":
        return True
    return cpp_compiler() is not None and worth_compiling(run_flops(), torch.get_num_threads())


def _trial(forward: Forward, model: nn.Module, images_NCHW: Tensor) -> None:
    """A forward pass as the run will do it, with a backward pass if the model trains; leaves the model as it was."""
    buffers = [buffer.clone() for buffer in model.buffers()]
    with torch.set_grad_enabled(any(p.requires_grad for p in model.parameters())):
        out = forward(images_NCHW)
        if out.requires_grad:
            out.float().sum().backward()
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        for buffer, old in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(old)


def compile_forward(option: str, model: nn.Module, images_NCHW: Tensor, autocast: Callable) -> Forward:
    """The model's forward pass, compiled for images of this shape, type and memory format.

    If that fails, ``auto`` gives back the model as it is and says so; ``on`` raises ConfigError.
    """
    forward = torch.compile(model)
    try:
        with autocast():
            _trial(forward, model, images_NCHW)
    except Exception as error:
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if option == "on":
            raise ConfigError(
                f"train.compile=on: torch.compile does not work here ({reason}); use auto or off"
            ) from error
        log.warning("torch.compile does not work here (%s): going on without it", reason)
        torch._dynamo.reset()
        return model
    return forward
