"""The order of samples: a pure function of (seed, position).

The stream of samples is the concatenation of epoch permutations. An epoch permutes the shards, cuts them into
groups of consecutive shards with at least GROUP_RECORDS records, and permutes the records within each group: reads
stay within some shards at a time, and a loader's whole state is one integer, the samples consumed.
Positions, epochs and record ids count from 0.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipelines.errors import PipelineError
from pipelines.philox import Stream, shuffled

# Records in a group: enough that a shard's neighbours rarely meet in a batch, few enough that some gigabytes of
# page cache hold a group.
GROUP_RECORDS = 16_384
_CACHED = 3  # a batch that straddles two epochs, and the group before


@dataclass(frozen=True, slots=True)
class _Epoch:
    """Shards in the epoch's order; group g holds shards[cuts[g]:cuts[g + 1]] at positions starts[g]:starts[g + 1]."""

    shards: np.ndarray
    cuts: np.ndarray
    starts: np.ndarray


class Order:
    """Record ids by position in the stream, for shards of the given sizes."""

    def __init__(self, shard_records: Sequence[int], seed: int, group_records: int = GROUP_RECORDS):
        self._sizes = np.asarray(shard_records, np.int64)
        if not len(self._sizes) or (self._sizes <= 0).any():
            raise PipelineError("no training records: expected shards of one record or more; pack scenes first")
        self._first_ids = np.concatenate([[0], np.cumsum(self._sizes)])
        self._seed, self._group_records = seed, group_records
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._groups: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    @property
    def records(self) -> int:
        """Records in an epoch."""
        return int(self._first_ids[-1])

    def take(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(record ids, epochs), int64 [count] each, of the stream's positions start .. start + count - 1."""
        if start < 0 or count < 0:
            raise ValueError(f"expected a position and a count of 0 or more, got {start} and {count}")
        ids, epochs = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        at, end = start, start + count
        while at < end:
            epoch, offset = divmod(at, self.records)
            part = self._within_epoch(epoch, offset, end - at)
            ids.append(part)
            epochs.append(np.full(len(part), epoch, np.int64))
            at += len(part)
        return np.concatenate(ids), np.concatenate(epochs)

    def _within_epoch(self, epoch: int, offset: int, most: int) -> np.ndarray:
        """Record ids from an offset in an epoch to the end of its group, at most ``most``."""
        starts = self._epoch(epoch).starts
        group = int(np.searchsorted(starts, offset, "right")) - 1
        inside = offset - int(starts[group])
        return self._group(epoch, group)[inside : inside + most]

    def _epoch(self, epoch: int) -> _Epoch:
        return _cached(self._epochs, epoch, lambda: self._make_epoch(epoch))

    def _make_epoch(self, epoch: int) -> _Epoch:
        shards = shuffled(self._seed, Stream.SHARDS, epoch, np.arange(len(self._sizes)))
        ends = np.cumsum(self._sizes[shards])
        cuts, starts = [0], [0]
        while True:
            cut = int(np.searchsorted(ends, starts[-1] + self._group_records)) + 1
            # A rest too small for a group of its own joins the last group.
            if cut > len(ends) or ends[-1] - ends[cut - 1] < self._group_records:
                break
            cuts.append(cut)
            starts.append(int(ends[cut - 1]))
        return _Epoch(shards, np.array([*cuts, len(shards)]), np.array([*starts, int(ends[-1])]))

    def _group(self, epoch: int, group: int) -> np.ndarray:
        return _cached(self._groups, (epoch, group), lambda: self._make_group(epoch, group))

    def _make_group(self, epoch: int, group: int) -> np.ndarray:
        plan = self._epoch(epoch)
        members = plan.shards[plan.cuts[group] : plan.cuts[group + 1]]
        spans = [(int(self._first_ids[s]), int(self._first_ids[s + 1])) for s in members]
        ids = np.concatenate([np.arange(*span) for span in spans])
        return shuffled(self._seed, Stream.RECORDS, epoch, ids)


def _cached(cache, key, make):
    """The cached value of a key, or a new one that may push out the oldest."""
    if key not in cache:
        cache[key] = make()
        while len(cache) > _CACHED:
            cache.popitem(last=False)
    cache.move_to_end(key)
    return cache[key]


@dataclass(frozen=True, slots=True)
class Share:
    """What one process sees of each global batch: contiguous slices, one a micro-batch.

    The global batches [P, P + global_batch) are the same for every world size and accumulation.
    """

    global_batch: int
    rank: int
    world_size: int
    accumulate: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size or self.accumulate < 1:
            raise PipelineError(f"rank {self.rank} of {self.world_size} processes cannot be")
        parts = self.world_size * self.accumulate
        if self.global_batch % parts:
            below, above = self.global_batch // parts * parts, -(-self.global_batch // parts) * parts
            fitting = f"{below} or {above}" if below else f"{above}"
            raise PipelineError(
                f"data.global_batch {self.global_batch} does not divide into {self.world_size} process(es) x "
                f"train.accumulate {self.accumulate}: set data.global_batch={fitting}"
            )

    @property
    def micro_batch(self) -> int:
        """Samples in a micro-batch of this process."""
        return self.global_batch // (self.world_size * self.accumulate)

    def starts(self, position: int) -> list[int]:
        """First positions of this process's micro-batches in the global batch that begins at ``position``."""
        first = position + self.rank * self.accumulate * self.micro_batch
        return [first + part * self.micro_batch for part in range(self.accumulate)]
