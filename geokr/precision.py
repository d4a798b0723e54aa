"""In which type a run computes: ``train.precision`` on a device."""

import logging

import torch

log = logging.getLogger(__name__)


def computes_in_bf16(device: torch.device) -> bool:
    """Whether the device has bf16 arithmetic of its own, and does not act it out in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def choose_precision(option: str, device: torch.device) -> str:
    """``fp32``, ``bf16`` or ``fp16``. ``auto``: bf16 where the device has it, else fp16 on a GPU, fp32 on a CPU.

    On a CPU without bf16 arithmetic (x86 before AVX-512) asking for it costs a factor of ten, and is said.
    """
    able = computes_in_bf16(device)
    if option == "auto":
        return "bf16" if able else "fp16" if device.type == "cuda" else "fp32"
    if option == "bf16" and not able:
        log.warning(
            "train.precision=bf16: this %s has no bf16 arithmetic, so it will be slow; take train.precision=auto",
            "GPU" if device.type == "cuda" else "CPU",
        )
    return option
