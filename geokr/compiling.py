"""torch.compile: whether to use it, and a trial before the run, so that a missing compiler is known at once.

``auto`` compiles on CUDA only, and there only what has no fused norms (geokr/speedups.py). On a CPU it was measured and
lost. CPU seconds of a training step on one core (Zen 4 with AVX-512, torch 2.15), eager and compiled:

    ResNet-18,  64 px, 32 images, bf16    0.37   0.58 to 0.69    and 50 to 69 s to compile
    ResNet-18,  64 px, 32 images, fp32    0.59   0.78
    ResNet-50, 128 px,  8 images, bf16    0.91   1.89            and 108 s to compile

The loss is in the generated kernels for batch norm in training mode, which the hand-written ones beat.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from geokr.config import ConfigError

log = logging.getLogger(__name__)
Forward = Callable[..., Tensor]  # of images, and how their colours were changed where the head is told


def wanted(option: str, device: torch.device) -> bool:
    """Whether to try torch.compile, for ``train.compile`` on a device."""
    return option == "on" or (option == "auto" and device.type == "cuda")


def trial(forward: Forward, model: nn.Module, inputs: Sequence[Tensor]) -> None:
    """A forward pass as the run will do it, with a backward pass if the model trains; leaves the model and the
    generators of random numbers as they were."""
    buffers = [buffer.clone() for buffer in model.buffers()]
    devices = {i.device for i in inputs if i.is_cuda}
    training = any(p.requires_grad for p in model.parameters())
    with torch.random.fork_rng(devices), torch.set_grad_enabled(training):
        out = forward(*inputs)
        if out.requires_grad:
            out.float().sum().backward()
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        for buffer, old in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(old)


def compile_forward(
    option: str,
    model: nn.Module,
    inputs: Sequence[Tensor],
    autocast: Callable[[], AbstractContextManager],
    through: Callable[[Forward], Forward] = lambda forward: forward,
) -> Forward:
    """The model's forward pass, compiled for inputs of these shapes, types and memory formats.

    through: gives what the first call is made through, where torch compiles according to who calls.
    If that fails, ``auto`` gives back the model as it is and says so; ``on`` raises ConfigError.
    """
    forward = torch.compile(model)
    try:
        with autocast():
            trial(through(forward), model, inputs)
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
