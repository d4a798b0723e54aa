"""The order of samples of a mixture of datasets: still a pure function of (seed, position).

The datasets hold consecutive parts [S_d, S_d+1) of a circle of W whole numbers, as long as their shares. Position p
takes its sample from the dataset whose part holds (p * m + phase) mod W, with m near W over the golden ratio and
prime to W. So W consecutive positions take exactly its share from each dataset, wherever they begin; any fewer or
more are as near to it as a golden-ratio sequence comes (some samples, however far the run goes); and how many
samples a dataset gave before position p is a sum over a line's whole parts, found in about log W operations:
there is nothing to replay. Each dataset then goes through epochs of its own.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

import numpy as np

from pipelines.order import Order
from pipelines.philox import Stream, draws

# Decimal weights become whole shares exactly while their sum stays below this, so that products fit 64 bits; longer
# ones are rounded to _ROUNDED parts, which is one sample in four thousand million.
_LARGEST, _ROUNDED = 2**38, 2**32
_GOLDEN = (math.sqrt(5) - 1) / 2
# Multipliers looked at on either side of the golden section: among them there always is a good one.
_CANDIDATES = 32
# Sets the seeds of the datasets of a mixture apart; the first one's stays, and odd multiples never meet mod 2^64.
_SEED_STEP = 0x9E3779B97F4A7C15


def whole_shares(weights: Sequence[float]) -> tuple[int, ...]:
    """Weights as whole numbers without a common divisor, as exact as the decimals they are written with."""
    exact = [Fraction(repr(float(weight))) for weight in weights]
    denominator = math.lcm(*(part.denominator for part in exact))
    shares = [int(part * denominator) for part in exact]
    divisor = math.gcd(*shares)
    shares = [share // divisor for share in shares]
    if sum(shares) <= _LARGEST:
        return tuple(shares)
    total = sum(exact)
    return tuple(max(1, round(part / total * _ROUNDED)) for part in exact)


def floor_sum(count: int, modulus: int, factor: int, offset: int) -> int:
    """Sum over i < count of floor((factor * i + offset) / modulus); all of them 0 or more, the modulus above 0.

    As in Euclid's algorithm: whole parts are taken out, then the axes change places.
    """
    total = 0
    while count:
        total += (count - 1) * count // 2 * (factor // modulus) + count * (offset // modulus)
        factor, offset = factor % modulus, offset % modulus
        top = factor * count + offset
        if top < modulus:
            break
        count, offset = divmod(top, modulus)
        modulus, factor = factor, modulus
    return total


def _quotients(numerator: int, denominator: int) -> int:
    """Sum of the continued fraction's terms: the smaller, the more evenly multiples of the ratio are spread."""
    total = 0
    while denominator:
        total += numerator // denominator
        numerator, denominator = denominator, numerator % denominator
    return total


def _multiplier(total: int) -> int:
    near = round(total * _GOLDEN)
    found = [
        m for m in range(max(1, near - _CANDIDATES), near + _CANDIDATES + 1) if m < total and math.gcd(m, total) == 1
    ]
    return min(found, key=lambda m: (_quotients(m, total), m), default=1)


class Interleaving:
    """Which dataset each position takes its sample from. shares: whole numbers of 1 or more, one a dataset."""

    def __init__(self, shares: Sequence[int], seed: int):
        self._edges = np.cumsum([0, *shares])
        self._total = int(self._edges[-1])
        self._factor = _multiplier(self._total)
        bits = draws(seed, Stream.MIXTURE, 0, np.zeros(1))[0]
        self._phase = (int(bits[0]) << 32 | int(bits[1])) % self._total

    def choices(self, start: int, count: int) -> np.ndarray:
        """Dataset numbers of the positions start .. start + count - 1, int64 [count]."""
        first = (start * self._factor + self._phase) % self._total
        points = (first + np.arange(count) * self._factor) % self._total
        return np.searchsorted(self._edges, points, "right") - 1

    def given(self, position: int) -> list[int]:
        """How many samples each dataset gave before a position."""
        below = [self._below(position, int(edge)) for edge in self._edges]
        return [above - under for under, above in pairwise(below)]

    def _below(self, position: int, edge: int) -> int:
        """Positions before this one whose point lies below an edge: x mod W < e adds floor(x/W) - floor((x-e)/W)."""
        total, factor, phase = self._total, self._factor, self._phase
        shifted = floor_sum(position, total, factor, phase + total - edge)
        return floor_sum(position, total, factor, phase) - shifted + position


class MixedOrder:
    """Record ids by position in the stream of a mixture; ids count through the datasets one after another."""

    def __init__(self, shard_records: Sequence[Sequence[int]], shares: Sequence[int], seed: int):
        self._interleaving = Interleaving(shares, seed)
        self._orders = [
            Order(sizes, (seed + number * _SEED_STEP) % 2**64) for number, sizes in enumerate(shard_records)
        ]
        self._first_ids = np.cumsum([0, *(order.records for order in self._orders)])

    @property
    def records(self) -> int:
        """Records of all datasets together: what an epoch of the mixture counts."""
        return int(self._first_ids[-1])

    def take(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(record ids, epochs of their datasets), int64 [count] each, of positions start .. start + count - 1."""
        if start < 0 or count < 0:
            raise ValueError(f"expected a position and a count of 0 or more, got {start} and {count}")
        choices = self._interleaving.choices(start, count)
        ids, epochs = np.empty(count, np.int64), np.empty(count, np.int64)
        for number, before in enumerate(self._interleaving.given(start)):
            mine = choices == number
            own, epochs[mine] = self._orders[number].take(before, int(mine.sum()))
            ids[mine] = own + self._first_ids[number]
        return ids, epochs
