"""The wire format of ``tf.train.Example``, written and read without TensorFlow or protobuf.

An Example is a map from a name to a list of bytes, float32 or int64:

    Example  { Features features = 1; }
    Features { map<string, Feature> feature = 1; }        a map entry is { string key = 1; Feature value = 2; }
    Feature  { oneof { BytesList = 1; FloatList = 2; Int64List = 3; } }   each { repeated value = 1; }

Numbers are written packed, keys in sorted order, so that equal content gives equal bytes. The reader accepts
any field order, packed or not, and raises ExampleError for bytes that are no Example.
Source: tensorflow/core/example/{example,feature}.proto and the protocol buffers encoding guide.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np

Value = bytes | Sequence[bytes] | np.ndarray
_VARINT, _I64, _LEN, _I32 = 0, 1, 2, 5
SHORT = 4096  # bytes


class ExampleError(ValueError):
    """Bytes that are not a well-formed Example."""


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _length(parts: list[bytes]) -> int:
    return sum(map(len, parts))


def _field(number: int, parts: list[bytes]) -> list[bytes]:
    """A field of bytes, in parts: an image is copied once, when all of an Example is joined."""
    return [bytes([number << 3 | _LEN]) + _varint(_length(parts)), *parts]


def _feature(value: Value) -> list[bytes]:
    if isinstance(value, np.ndarray):
        if value.dtype == np.float32:
            return _field(2, _field(1, [value.astype("<f4").tobytes()]))
        if value.dtype == np.int64:
            packed = b"".join(_varint(number & (1 << 64) - 1) for number in value.tolist())
            return _field(3, _field(1, [packed]))
        raise TypeError(f"an Example holds float32 and int64 arrays, not {value.dtype}")
    items = [value] if isinstance(value, bytes) else value
    return _field(1, [part for item in items for part in _field(1, [item])])


def encode(features: Mapping[str, Value]) -> bytes:
    """Serialises features: bytes, a list of bytes, or a 1-D float32 or int64 array each."""
    entries: list[bytes] = []
    for name in sorted(features):
        value = features[name]
        entries += (
            [_short_entry(name, value)] if isinstance(value, bytes) and len(value) < SHORT else _entry(name, value)
        )
    return b"".join(_field(1, entries))


def _entry(name: str, value: Value) -> list[bytes]:
    return _field(1, [*_field(1, [name.encode()]), *_field(2, _feature(value))])


@lru_cache(maxsize=256)
def _short_entry(name: str, value: bytes) -> bytes:
    """Most of a record's texts are those of the record before."""
    return b"".join(_entry(name, value))


def _read_varint(data: memoryview, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & (1 << 64) - 1, at
        shift += 7
    raise ExampleError(f"a number runs over its end at byte {at}")


def _next(data: memoryview, at: int, end: int) -> tuple[int, int, int, int]:
    """The field at ``at``: (number, wire type, start of its content, end of its content)."""
    tag, at = _read_varint(data, at, end)
    number, wire = tag >> 3, tag & 7
    if wire == _VARINT:
        start = at
        _, at = _read_varint(data, at, end)
        return number, wire, start, at
    if wire == _LEN:
        size, at = _read_varint(data, at, end)
    elif wire in (_I64, _I32):
        size = 8 if wire == _I64 else 4
    else:
        raise ExampleError(f"wire type {wire} at byte {at} is none of an Example's")
    if number == 0 or size > end - at:
        raise ExampleError(f"a field of {size} bytes at byte {at} runs over its end at {end}")
    return number, wire, at, at + size


def _floats(data: memoryview, at: int, end: int) -> np.ndarray:
    parts = []
    while at < end:
        number, wire, start, at = _next(data, at, end)
        if number != 1 or wire not in (_LEN, _I32) or (at - start) % 4:
            raise ExampleError(f"a float list holds something else at byte {start}")
        parts.append(np.frombuffer(data[start:at], "<f4"))
    return np.concatenate(parts).astype(np.float32) if parts else np.zeros(0, np.float32)


def _integers(data: memoryview, at: int, end: int) -> np.ndarray:
    values = []
    while at < end:
        number, wire, start, at = _next(data, at, end)
        if number != 1 or wire not in (_LEN, _VARINT):
            raise ExampleError(f"an integer list holds something else at byte {start}")
        while start < at:
            value, start = _read_varint(data, start, at)
            values.append(value - (1 << 64) if value >> 63 else value)
    return np.array(values, np.int64)


def _strings(data: memoryview, at: int, end: int) -> list[bytes]:
    items = []
    while at < end:
        number, wire, start, at = _next(data, at, end)
        if number != 1 or wire != _LEN:
            raise ExampleError(f"a bytes list holds something else at byte {start}")
        items.append(bytes(data[start:at]))
    return items


_KINDS = {1: _strings, 2: _floats, 3: _integers}


def decode(payload: bytes | memoryview, only: frozenset[str] | None = None) -> dict[str, list[bytes] | np.ndarray]:
    """Parses an Example: name to list of bytes, float32 array or int64 array.

    only: names wanted; the others are stepped over without being copied. Raises ExampleError.
    """
    data = memoryview(payload)
    features: dict[str, list[bytes] | np.ndarray] = {}
    at, end = 0, len(data)
    while at < end:
        number, wire, start, at = _next(data, at, end)
        if number != 1 or wire != _LEN:
            raise ExampleError(f"field {number} at byte {start} is none of an Example's")
        while start < at:
            number, wire, entry, start = _next(data, start, at)
            if number != 1 or wire != _LEN:
                raise ExampleError(f"field {number} at byte {entry} is none of a feature map's")
            _read_entry(data, entry, start, features, only)
    return features


def _read_entry(
    data: memoryview, at: int, end: int, features: dict[str, list[bytes] | np.ndarray], only: frozenset[str] | None
) -> None:
    name, body = "", (at, at)
    while at < end:
        number, wire, start, at = _next(data, at, end)
        if wire != _LEN or number not in (1, 2):
            raise ExampleError(f"field {number} at byte {start} is none of a map entry's")
        if number == 1:
            try:
                name = str(data[start:at], "utf-8")
            except UnicodeDecodeError as error:
                raise ExampleError(f"a feature's name at byte {start} is not UTF-8") from error
        else:
            body = (start, at)
    if only is not None and name not in only:
        return
    at, end = body
    while at < end:
        number, wire, start, at = _next(data, at, end)
        if wire != _LEN or number not in _KINDS:
            raise ExampleError(f"feature {name!r} is of no known kind at byte {start}")
        features[name] = _KINDS[number](data, start, at)


__all__ = ["ExampleError", "Value", "decode", "encode"]
