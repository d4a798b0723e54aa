"""The order of samples against a plain-Python oracle, and as properties: each record once an epoch, any world size."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.errors import PipelineError
from pipelines.order import Order, Share
from pipelines.philox import Stream, draws, philox4x32, uniform

SHARDS = st.lists(st.integers(1, 9), min_size=1, max_size=8)


def philox_oracle(key: list[int], counter: list[int]) -> list[int]:
    """Philox4x32-10 on Python integers, written from the paper's description of a round."""
    (k0, k1), (x0, x1, x2, x3) = key, counter
    for _ in range(10):
        left, right = 0xD2511F53 * x0, 0xCD9E8D57 * x2
        x0, x1, x2, x3 = right // 2**32 ^ x1 ^ k0, right % 2**32, left // 2**32 ^ x3 ^ k1, left % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [x0, x1, x2, x3]


def epoch_oracle(sizes: list[int], seed: int, epoch: int, group_records: int) -> list[list[int]]:
    """Groups of record ids of an epoch."""
    key = [seed % 2**32, seed // 2**32]

    def sort_key(stream: int, item: int) -> tuple[int, int]:
        return tuple(philox_oracle(key, [item, 0, epoch, stream << 16])[:2])

    firsts = np.cumsum([0, *sizes]).tolist()
    groups: list[list[int]] = [[]]
    for shard in sorted(range(len(sizes)), key=lambda shard: sort_key(1, shard)):
        if len(groups[-1]) >= group_records:
            groups.append([])
        groups[-1] += range(firsts[shard], firsts[shard + 1])
    if len(groups) > 1 and len(groups[-1]) < group_records:
        groups[-2:] = [groups[-2] + groups[-1]]
    return [sorted(group, key=lambda record: sort_key(2, record)) for group in groups]


def test_philox_known_answers():
    """The vectors that Random123 publishes for philox4x32-10."""
    cases = [
        ([0, 0], [0] * 4, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 2, [0xFFFFFFFF] * 4, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0xA4093822, 0x299F31D0],
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ]
    for key, counter, expected in cases:
        got = philox4x32((key[0], key[1]), np.array([counter], np.uint32))[0]
        assert " ".join(f"{word:08x}" for word in got) == expected
        assert philox_oracle(key, counter) == got.tolist()


def test_draws_depend_on_each_part_of_the_counter():
    base = draws(5, Stream.AUGMENT, 2, np.arange(4), 2)
    assert base.shape == (4, 8)
    assert len(np.unique(base)) == base.size
    others = [
        draws(6, Stream.AUGMENT, 2, np.arange(4), 2),
        draws(5 + 2**32, Stream.AUGMENT, 2, np.arange(4), 2),
        draws(5, Stream.RECORDS, 2, np.arange(4), 2),
        draws(5, Stream.AUGMENT, 3, np.arange(4), 2),
        draws(5, Stream.AUGMENT, 2, np.arange(4) + 2**32, 2),
    ]
    for other in others:
        assert not (other == base).any()
    one_each = draws(5, Stream.AUGMENT, np.array([2, 3]), np.array([1, 1]), 2)
    assert (one_each[0] == base[1]).all()
    assert (one_each[1] == others[3][1]).all()


def test_uniform_is_open_and_even():
    assert 0 < uniform(np.array([0], np.uint32))[0] < uniform(np.array([2**32 - 1], np.uint32))[0] < 1
    values = uniform(draws(0, Stream.AUGMENT, 0, np.arange(20_000)))
    counts = np.histogram(values, 16, (0, 1))[0]
    assert ((counts - 5000) ** 2 / 5000).sum() < 45  # chi-square, 15 degrees of freedom: p < 1e-4


@given(SHARDS, st.integers(0, 2**63 - 1), st.integers(1, 20), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_epoch_is_the_oracles(sizes, seed, group_records, epoch):
    order = Order(sizes, seed, group_records)
    groups = epoch_oracle(sizes, seed, epoch, group_records)
    ids, epochs = order.take(epoch * order.records, order.records)
    assert ids.tolist() == [record for group in groups for record in group]
    assert (epochs == epoch).all()
    assert all(len(group) >= min(group_records, order.records) for group in groups)


@given(SHARDS, st.integers(0, 2**63 - 1), st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_every_record_once_in_each_epoch(sizes, seed, group_records):
    order = Order(sizes, seed, group_records)
    ids, epochs = order.take(0, 4 * order.records)
    assert ids.dtype == epochs.dtype == np.int64
    for epoch in range(4):
        assert sorted(ids[epochs == epoch].tolist()) == list(range(order.records))


def test_every_record_once_with_real_groups():
    order = Order([1024] * 40 + [7], 3)
    ids, _ = order.take(0, order.records)
    assert (np.sort(ids) == np.arange(order.records)).all()
    shards = np.minimum(ids // 1024, 40)
    assert len(np.unique(shards[:16_384])) == 16  # reads stay within a group's shards
    second, _ = order.take(order.records, order.records)
    assert (second != ids).mean() > 0.99


def test_restore_at_every_position():
    sizes, seed = [5, 1, 7, 3], 11
    whole, epochs = Order(sizes, seed, 4).take(0, 80)
    for start in range(80):
        ids, at = Order(sizes, seed, 4).take(start, 80 - start)  # a new object: nothing but the position survives
        assert (ids == whole[start:]).all()
        assert (at == epochs[start:]).all()


def test_first_place_is_shared_evenly():
    order = Order([3, 5], 0, 8)
    firsts = np.bincount([order.take(epoch * 8, 1)[0][0] for epoch in range(4000)], minlength=8)
    assert ((firsts - 500) ** 2 / 500).sum() < 29.9  # 7 degrees of freedom: p < 1e-4


def test_seeds_differ():
    a, b = (Order([50], seed).take(0, 50)[0] for seed in (0, 1))
    assert (a != b).any()


@pytest.mark.parametrize(("global_batch", "worlds"), [(12, (1, 2, 3, 4)), (16, (1, 2, 4, 8))])
def test_global_batches_do_not_depend_on_world_size(global_batch, worlds):
    reference, _ = Order([9, 8, 6], 5, 10).take(100, global_batch)
    for world in worlds:
        for accumulate in (1, 2):
            if global_batch % (world * accumulate):
                continue
            seen = []
            for rank in range(world):
                share, order = Share(global_batch, rank, world, accumulate), Order([9, 8, 6], 5, 10)
                seen += [order.take(start, share.micro_batch)[0] for start in share.starts(100)]
            assert (np.concatenate(seen) == reference).all()


def test_refusals():
    with pytest.raises(PipelineError, match=r"global_batch 10 .* 4 process.*data.global_batch=8 or 12"):
        Share(10, 0, 4)
    with pytest.raises(PipelineError, match=r"data\.global_batch=8$"):
        Share(2, 0, 4, 2)
    with pytest.raises(PipelineError, match="rank 4 of 4"):
        Share(8, 4, 4)
    with pytest.raises(PipelineError, match="no training records"):
        Order([], 0)
    with pytest.raises(ValueError, match="position"):
        Order([3], 0).take(-1, 2)
