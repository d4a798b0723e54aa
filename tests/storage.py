"""Storage that misbehaves, for both ways in which the reader reads: in Python, and in compiled code."""

import ctypes
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pipelines import native

Preadv = Callable[[int, list[Any], int], int]
_PREAD = ctypes.CFUNCTYPE(ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64)
_KEPT: list[Any] = []  # threads that hang may still be in them


def replace_preadv(function: Preadv, setattr: Callable[[Any, str, Any], None] = setattr) -> None:
    """``function`` in place of os.preadv, and in place of the C library's pread in the reader's compiled code."""

    def pread(handle: int, pointer: int, count: int, offset: int) -> int:
        try:
            return function(handle, [memoryview((ctypes.c_char * count).from_address(pointer)).cast("B")], offset)
        except OSError:
            return -1

    setattr(os, "preadv", function)
    if (calls := native.calls()) is not None:
        _KEPT.append(_PREAD(pread))
        changed = replace(calls, pread=native.address(_KEPT[-1]))
        setattr(native, "calls", lambda: changed)
