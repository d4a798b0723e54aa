"""A batch that does not fit the memory: how that shows, and what to try instead."""

import torch

from geokr.options import PretrainOptions

_SIGNS = ("can't allocate memory", "ALLOC_FAILED", "std::bad_alloc")  # torch on a CPU, cuDNN and cuBLAS, oneDNN


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on whichever device."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(sign in str(error) for sign in _SIGNS)


def advice(options: PretrainOptions, world_size: int, error: BaseException) -> str:
    """What to change in a run whose training batch did not fit."""
    whole, parts = options.data.global_batch, options.train.accumulate
    at_once = whole // (world_size * parts)
    smaller = next((n for n in range(at_once // 2, 1, -1) if whole % (world_size * n) == 0), None)
    if smaller is not None:
        remedy = f"train.accumulate={whole // (world_size * smaller)}, which is {smaller} images at once"
    elif at_once > 2:
        remedy = f"data.global_batch={at_once // 2 * world_size * parts}"
    else:
        remedy = "a smaller data.image_size or model.backbone"
    return f"{at_once} images at once in each process do not fit the memory: try {remedy} ({_first_line(error)})"


def validation_advice(batch: int, error: BaseException) -> str:
    """What to change in a run whose validation did not fit."""
    remedy = f"validation.batch={batch // 2}" if batch > 1 else "a smaller data.image_size"
    return f"validation.batch={batch} images at once do not fit the memory: try {remedy} ({_first_line(error)})"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
