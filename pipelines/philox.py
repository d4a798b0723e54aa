"""Random numbers as a pure function of (seed, counter): Philox4x32-10, vectorised over counters.

A counter-based generator has no state, so every draw can be repeated anywhere, in any order, on any process.
It is written out here, instead of taken from numpy.random, because NumPy may change what its distributions make
of the bits from one version to the next, and a run must resume with the same samples.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

import enum

import numpy as np

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


class Stream(enum.IntEnum):
    """What a draw is for; it is part of the counter, so that no two uses share their numbers."""

    SHARDS = 1
    RECORDS = 2
    AUGMENT = 3
    SYNTHETIC = 4
    MIXTURE = 5


def philox4x32(key: tuple[int, int], counter_N4: np.ndarray) -> np.ndarray:
    """Philox4x32-10: two 32-bit key words and uint32 counters [N, 4] to uint32 [N, 4]."""
    c0, c1, c2, c3 = (counter_N4[:, word].astype(np.uint64) for word in range(4))
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> _SHIFT) ^ c1 ^ np.uint64(k0),
            product1 & _LOW,
            (product0 >> _SHIFT) ^ c3 ^ np.uint64(k1),
            product0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], 1).astype(np.uint32)


def draws(seed: int, stream: Stream, epochs: np.ndarray | int, items: np.ndarray, blocks: int = 1) -> np.ndarray:
    """uint32 [N, 4 * blocks] for N items (record or shard numbers) of given epochs (one, or one an item)."""
    items = np.asarray(items, np.uint64)
    counter = np.empty((blocks, len(items), 4), np.uint32)
    counter[:, :, 0] = (items & _LOW).astype(np.uint32)
    counter[:, :, 1] = (items >> _SHIFT).astype(np.uint32)
    counter[:, :, 2] = np.asarray(epochs, np.int64).astype(np.uint32)
    counter[:, :, 3] = (np.arange(blocks) + (int(stream) << 16))[:, None]
    bits = philox4x32((seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF), counter.reshape(-1, 4))
    return bits.reshape(blocks, len(items), 4).transpose(1, 0, 2).reshape(len(items), 4 * blocks)


def uniform(bits: np.ndarray) -> np.ndarray:
    """uint32 to float64 in the open interval (0, 1), each value in the middle of its cell."""
    return (bits.astype(np.float64) + 0.5) * 2.0**-32


def shuffled(seed: int, stream: Stream, epoch: int, items: np.ndarray) -> np.ndarray:
    """The items in random order: sorted by 64 random bits each. Equal bits, one pair in 2^64, keep their order."""
    bits = draws(seed, stream, epoch, items).astype(np.uint64)
    return items[np.argsort(bits[:, 0] << _SHIFT | bits[:, 1], kind="stable")]
