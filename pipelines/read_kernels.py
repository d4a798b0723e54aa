"""What a thread does with its share of a batch in one call without the GIL: bytes, checksums, features.

Nothing here raises or explains: what is not in order is marked, and Python looks at it again, slowly, to say what it
is. Every position is inside the buffer: those of frames come from the index, whose sums the reader has allocated,
and those of features from :func:`pipelines.parse.walk`, which checks each step.
"""

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from geokr.records import FOOTER, FRAME_OVERHEAD, HEADER
from pipelines.parse import CODEC, DTYPE, FRACTIONS, IMAGE, KINDS, SHAPE, walk

_compiled = numba.njit(nogil=True, cache=True)
_HEAD, _FOOT, _OVERHEAD, _LENGTH = HEADER.size, FOOTER.size, FRAME_OVERHEAD, 8
_INT, _WORD, _BYTES = ir.IntType(32), ir.IntType(64), ir.IntType(8).as_pointer()


@intrinsic
def _pread(typingctx, function, handle, pointer, count, offset):  # type: ignore[no-untyped-def]
    """pread at an address: bytes read, 0 at the end of the file, -1 for any error."""

    def build(context, builder, signature, arguments):
        function, handle, pointer, count, offset = arguments
        kind = ir.FunctionType(_WORD, [_INT, _BYTES, _WORD, _WORD])
        callee = builder.inttoptr(function, kind.as_pointer())
        return builder.call(callee, [builder.trunc(handle, _INT), builder.inttoptr(pointer, _BYTES), count, offset])

    return types.int64(types.int64, types.int64, types.int64, types.int64, types.int64), build


@intrinsic
def _crc32c(typingctx, function, pointer, count):  # type: ignore[no-untyped-def]
    """CRC32C, by the function at an address, of ``count`` bytes at another, as a number of 0 or more."""

    def build(context, builder, signature, arguments):
        function, pointer, count = arguments
        callee = builder.inttoptr(function, ir.FunctionType(_INT, [_BYTES, _WORD]).as_pointer())
        return builder.zext(builder.call(callee, [builder.inttoptr(pointer, _BYTES), count]), _WORD)

    return types.int64(types.int64, types.int64, types.int64), build


@_compiled
def _fill(pread, handle, buffer, first, end, offset):
    """Reads buffer[first:end] from a file's ``offset`` on; False where that fails, for whatever reason."""
    pointer = np.int64(buffer.ctypes.data)
    while first < end:
        got = _pread(pread, handle, pointer + first, end - first, offset)  # type: ignore[call-arg]
        if got <= 0:
            return False
        first += got
        offset += got
    return True


@_compiled
def _number(data, at, count):
    """Little-endian number of so many bytes."""
    value = np.int64(0)
    for i in range(count):
        value |= np.int64(data[at + i]) << (8 * i)
    return value


@_compiled
def _masked(crc):
    """As :func:`geokr.records.mask_crc`."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


@_compiled
def _is_sound(crc32c, buffer, start, size):
    """Whether length and both checksums of a frame are right."""
    pointer, body = np.int64(buffer.ctypes.data) + start, size - _OVERHEAD
    if _number(buffer, start, _LENGTH) != body:
        return False
    length_crc = _crc32c(crc32c, pointer, np.int64(_LENGTH))  # type: ignore[call-arg]
    if _masked(length_crc) != _number(buffer, start + _LENGTH, 4):
        return False
    crc = _crc32c(crc32c, pointer + _HEAD, body)  # type: ignore[call-arg]
    return _masked(crc) == _number(buffer, start + size - _FOOT, 4)


@_compiled
def _same(data, start, end, content, length):
    same = end - start == length
    for i in range(length if same else 0):
        same &= data[start + i] == content[i]
    return same


@_compiled
def _is_finite(data, start, end):
    """Whether no little-endian float32 among these bytes is NaN or infinity, which have an exponent of ones."""
    odd = False
    for at in range(start, end - 3, 4):
        odd |= (data[at + 3] & 0x7F) == 0x7F and data[at + 2] >= 0x80
    return not odd


@_compiled
def _take(buffer, start, size, names, name_ends, contents, lengths, floats, spans, fractions):
    """Finds a record's features and stores its fractions; False where it is not of the expected form."""
    if not walk(buffer, start + _HEAD, start + size - _FOOT, names, name_ends, KINDS, spans):
        return False
    for number in (CODEC, DTYPE, SHAPE):
        if not _same(buffer, spans[number, 0], spans[number, 1], contents[number], lengths[number]):
            return False
    if spans[FRACTIONS, 1] - spans[FRACTIONS, 0] != lengths[FRACTIONS]:
        return False
    if lengths[IMAGE] >= 0 and spans[IMAGE, 1] - spans[IMAGE, 0] != lengths[IMAGE]:
        return False
    for i in range(lengths[FRACTIONS]):
        fractions[i] = buffer[spans[FRACTIONS, 0] + i]
    return not floats or _is_finite(buffer, spans[IMAGE, 0], spans[IMAGE, 1])


@_compiled
def take_records(start, stop, frames, buffer, expected, results):
    """Features of the records from ``start`` to ``stop``, which are in the buffer. Tuples as in :func:`read_runs`."""
    _, _, places, sizes = frames
    forms, names, name_ends, contents, lengths, floats = expected
    spans, fractions, taken = results
    for n in range(start, stop):
        form = forms[n]
        taken[n] = _take(
            buffer, places[n], sizes[n], names[form], name_ends[form], contents[form], lengths[form], floats,
            spans[n], fractions[n],
        )  # fmt: skip


@_compiled
def read_runs(pread, crc32c, low, high, handles, frames, buffer, expected, results, hand, sound):
    """Reads the runs of neighbouring records from ``low`` to ``high``, checks their frames, and takes their features.

    pread, crc32c: addresses (pipelines.native). handles: int64 [runs], of open files (-1: none).
    frames: (edges int64 [runs + 1], where each run begins among the N records; offsets, places, sizes int64 [N], of
    each frame in its file and in the buffer). expected: (forms int64 [N]; names uint8 [F, bytes], name_ends int64
    [F, 6], contents uint8 [F, 5, bytes] and lengths int64 [F, 5], as in pipelines.forms; floats bool, images are
    float32).
    Fills hand: int64 [1], the run in hand, for whoever watches. sound: bool [runs]. results, unless a run is not
    sound: (spans int64 [N, 5, 2]; fractions uint8 [N, bytes]; taken bool [N], whether a record is of its form).
    Returns how many runs are not sound.
    """
    edges, offsets, places, sizes = frames
    unsound = 0
    for run in range(low, high):
        hand[0] = run
        start, last = edges[run], edges[run + 1] - 1
        end = places[last] + sizes[last]
        fine = handles[run] >= 0 and _fill(pread, handles[run], buffer, places[start], end, offsets[start])
        for n in range(start, last + 1):
            fine = fine and _is_sound(crc32c, buffer, places[n], sizes[n])
        sound[run] = fine
        unsound += not fine
    hand[0] = -1
    if unsound == 0:
        take_records(edges[low], edges[high], frames, buffer, expected, results)
    return unsound
