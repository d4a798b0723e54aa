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


def _field(number: int, length: int) -> bytes:
    """What stands before a field of so many bytes."""
    return bytes([number << 3 | _LEN]) + _varint(length)


def _head(name: str, kind: int, length: int) -> bytes:
    """All of a feature's entry that stands before its one value of so many bytes.

    kind: 1 for bytes, 2 for packed floats, 3 for packed integers.
    """
    value = _field(1, length)
    feature = _field(kind, len(value) + length) + value
    key = _field(1, len(name.encode())) + name.encode()
    entry = key + _field(2, len(feature) + length) + feature
    return _field(1, len(entry) + length) + entry


_cached_head = lru_cache(maxsize=1024)(_head)  # most of a record's values are as long as those of the record before


@lru_cache(maxsize=256)
def _packed_integers(values: bytes) -> bytes:
    return b"".join(_varint(number) for number in np.frombuffer(values, np.uint64).tolist())


def _content(value: bytes | np.ndarray) -> tuple[int, bytes]:
    """(kind, bytes) of what one value holds."""
    if isinstance(value, bytes):
        return 1, value
    if value.dtype == np.float32:
        return 2, value.astype("<f4", copy=False).tobytes()
    if value.dtype == np.int64:
        return 3, _packed_integers(value.tobytes())
    raise TypeError(f"an Example holds float32 and int64 arrays, not {value.dtype}")


def _listed(name: str, items: Sequence[bytes]) -> bytes:
    """The entry of a feature of any number of values of bytes."""
    values = b"".join(part for item in items for part in (_field(1, len(item)), item))
    feature = _field(1, len(values)) + values
    key = _field(1, len(name.encode())) + name.encode()
    entry = key + _field(2, len(feature)) + feature
    return _field(1, len(entry)) + entry


def encode(features: Mapping[str, Value]) -> bytes:
    """Serialises features: bytes, a list of bytes, or a 1-D float32 or int64 array each."""
    parts = [b""]
    for name in sorted(features):
        value = features[name]
        if not isinstance(value, bytes | np.ndarray):
            parts.append(_listed(name, value))
            continue
        kind, content = _content(value)
        head = _cached_head if len(content) < SHORT else _head
        parts += (head(name, kind, len(content)), content)  # an image is copied once, when all is joined
    parts[0] = _field(1, sum(map(len, parts)))
    return b"".join(parts)


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
