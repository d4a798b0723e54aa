"""Where the records of a batch lie in their shards, and what is read at once."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from pipelines.dataset import Split


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Records in file order, N of them, in runs of neighbours that are each read at once.

    ids, shards, offsets, sizes, places: int64 [N]; places: where each frame begins in the buffer.
    back: int64, where each record asked for is among them. edges: int64 [runs + 1], where each run begins.
    """

    ids: np.ndarray
    shards: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    places: np.ndarray
    back: np.ndarray
    edges: np.ndarray

    def parts(self, count: int) -> list[tuple[int, int]]:
        """The runs in at most ``count`` shares of about as many bytes: (first, one after the last)."""
        ends = self.places[self.edges[1:] - 1] + self.sizes[self.edges[1:] - 1]
        total = int(ends[-1]) if len(ends) else 0
        cuts = np.searchsorted(ends, [total * number // count for number in range(1, count)]) + 1
        cuts = np.unique(np.clip([0, *cuts, len(ends)], 0, len(ends))).tolist()
        return list(pairwise(cuts))


def lay_out(split: Split, ids: np.ndarray) -> Layout:
    """File order, and runs of records that follow one another in a shard, each to be read at once."""
    unique, back = np.unique(ids, return_inverse=True)  # ids count in shard order
    sizes = split.sizes[unique]
    places = np.cumsum(sizes) - sizes
    shards = split.shard_of(unique)
    breaks = np.flatnonzero((np.diff(unique) != 1) | (np.diff(shards) != 0)) + 1
    edges = np.concatenate([[0], breaks, [len(unique)]] if len(unique) else [[0]]).astype(np.int64)
    return Layout(unique, shards, split.offsets[unique], sizes, places, back, edges)
