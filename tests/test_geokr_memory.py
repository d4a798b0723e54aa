"""What a run says whose batch does not fit the memory."""

import re

import pytest
import torch

from geokr.config import build
from geokr.memory import advice, out_of_memory, validation_advice
from geokr.options import PretrainOptions


def options(batch: int, parts: int = 1) -> PretrainOptions:
    tree = {"data": {"global_batch": batch}, "train": {"accumulate": parts, "max_steps": 1}}
    return build(PretrainOptions, tree, "test")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("memory"), False),
    ],
)
def test_how_it_shows(error, expected):
    assert out_of_memory(error) == expected


@pytest.mark.parametrize(
    ("batch", "parts", "world", "said"),
    [
        (256, 1, 1, "256 images at once in each process do not fit the memory: try train.accumulate=2, which is 128"),
        (256, 2, 4, "32 images at once in each process do not fit the memory: try train.accumulate=4, which is 16"),
        (96, 1, 4, "24 images.*train.accumulate=2, which is 12"),
        (36, 1, 4, "9 images.*train.accumulate=3, which is 3 images"),
        (28, 1, 4, "7 images.*try data.global_batch=12 "),
        (8, 1, 4, "2 images.*smaller data.image_size or model.backbone"),
    ],
)
def test_what_is_proposed_can_be_run(batch, parts, world, said):
    message = advice(options(batch, parts), world, MemoryError())
    assert re.search(said, message), message
    assert message.endswith("(MemoryError)")
    for key, value in re.findall(r"(train\.accumulate|data\.global_batch)=(\d+)", message):
        chosen = {"train.accumulate": parts, "data.global_batch": batch, key: int(value)}
        assert chosen["data.global_batch"] % (world * chosen["train.accumulate"]) == 0


def test_of_the_validation():
    error = torch.OutOfMemoryError("CUDA out of memory.\nMore")
    assert validation_advice(256, error).endswith("try validation.batch=128 (CUDA out of memory.)")
    assert "smaller data.image_size" in validation_advice(1, error)
