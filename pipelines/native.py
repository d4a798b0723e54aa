"""Addresses of two C functions for compiled kernels: ``pread``, and the CRC32C inside google_crc32c.

Addresses go to kernels as arguments: they differ from process to process, and kernels are cached on disk.
"""

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Any

# The published check value of CRC-32C: that of the digits 1 to 9.
_CHECK_DATA, _CHECK_VALUE = b"123456789", 0xE3069283


@dataclass(frozen=True, slots=True)
class Calls:
    """pread: ssize_t (int, void *, size_t, off_t). crc32c: uint32_t (uint8_t *, size_t)."""

    pread: int
    crc32c: int


@cache
def calls() -> Calls | None:
    """The two addresses; None where google_crc32c came without its C library, or numbers have other widths."""
    if ctypes.sizeof(ctypes.c_void_p) != 8 or ctypes.sizeof(ctypes.c_long) != 8:  # off_t is a long there
        return None
    try:
        from google_crc32c import _crc32c  # type: ignore[attr-defined]

        pread = ctypes.CDLL(None).pread
        # The extension itself does not hold the function; the search goes on in the library that it was linked to,
        # wherever the wheel or a distribution put that.
        crc32c = ctypes.CDLL(_crc32c.__file__).crc32c_value
    except (ImportError, OSError, AttributeError, TypeError):
        return None
    crc32c.argtypes, crc32c.restype = [ctypes.c_char_p, ctypes.c_size_t], ctypes.c_uint32
    if crc32c(_CHECK_DATA, len(_CHECK_DATA)) != _CHECK_VALUE:
        return None
    return Calls(address(pread), address(crc32c))


def address(function: Any) -> int:
    """Where a C function begins; ctypes never unloads a library that it loaded."""
    return ctypes.cast(function, ctypes.c_void_p).value or 0


__all__ = ["Calls", "address", "calls"]
