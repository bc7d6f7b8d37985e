"""Groups: at every position of a stream the shard that has its record is in use, and no shard for longer than said."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.mixture_oracle import Mixed, mixtures
from tests.support.order_oracle import Shards, options, shards

from tiercache.order import mixture as part_module
from tiercache.order.epoch_order import EpochOrder
from tiercache.order.explicit import ExplicitOrder
from tiercache.order.mixture import MixtureOrder
from tiercache.order.window import OrderOptions, Section, ShardGroups


def shards_at(order, stream: int) -> list[int]:
    """The shard of each position of a stream, from its windows."""
    found: list[int] = []
    while len(found) < order.stream_records(stream):
        stretch: Section = order.section_at(stream, len(found))
        of_block = np.concatenate([window.shards for window in stretch.windows])
        block, _ = stretch.rows(len(found) - stretch.start, stretch.stop - stretch.start)
        found += of_block[block].tolist()
    return found


def check(groups: ShardGroups, records: list[int]) -> None:
    """Every record's shard is in use at its position; no group is empty or outside the stream."""
    at: list[set[int]] = [set() for _ in records]
    for start, stop, members in groups:
        assert 0 <= start < stop <= len(records)
        for position in range(start, stop):
            at[position] |= set(members.tolist())
    assert all(shard in in_use for shard, in_use in zip(records, at, strict=True))


@given(shards(), options(max_streams=4), st.integers(0, 3))
def test_shards_are_in_use_over_their_group_or_without_shuffle_over_their_own_records(
    data: Shards, how: OrderOptions, epoch: int
):
    order = EpochOrder(data.dataset_sizes, how, epoch)
    n_read = 0
    for stream in range(order.n_streams):
        groups = order.groups(stream)
        assert data.footers == []  # asked for below only
        n_read += int(groups.stored_bytes.sum())
        records = shards_at(EpochOrder(data.dataset_sizes, how, epoch), stream)
        data.footers.clear()
        check(groups, records)
        if how.shuffle:
            bounds: dict[int, tuple[int, int]] = {}
            for window in EpochOrder(data.dataset_sizes, how, epoch).windows(stream):
                start, _ = bounds.get(window.group, (window.start, 0))
                bounds[window.group] = start, window.stop
            assert list(bounds.values()) == list(zip(groups.starts.tolist(), groups.stops.tolist(), strict=True))
            data.footers.clear()
        else:
            for start, stop, (shard,) in groups:
                assert set(records[start:stop]) == {shard}
    filled = sum(b for blocks, b in zip(data.blocks, data.stored_bytes, strict=True) if any(r for r, _ in blocks))
    assert filled - len(data.blocks) * order.n_streams <= n_read <= filled


@given(st.data())
def test_shards_of_an_explicit_order_are_in_use_from_their_first_record_to_their_last(draw):
    data = draw.draw(shards())
    if not data.n_records:
        return
    numbers = np.array(draw.draw(st.lists(st.integers(0, data.n_records - 1), max_size=40)), np.int64)
    order = ExplicitOrder(data.dataset_sizes, numbers, draw.draw(st.one_of(st.none(), st.integers(1, 500))))
    records = shards_at(order, 0)
    groups = order.groups(0)
    check(groups, records)
    assert sorted(groups.shards.tolist()) == sorted(set(records))
    assert groups.starts.tolist() == sorted(groups.starts.tolist())
    for start, stop, (shard,) in groups:
        assert records[start] == records[stop - 1] == shard
        assert shard not in records[:start] + records[stop:]


@given(mixtures(), st.integers(0, 3), st.sampled_from([0, part_module.MAX_TURNS]))
def test_shards_of_a_mixture_are_in_use_where_a_part_draws_from_their_group(mixed: Mixed, epoch: int, max_turns: int):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(part_module, "MAX_TURNS", max_turns)  # 0: a part that restarts often is in use throughout
        order: MixtureOrder = mixed.order(epoch)
        for stream in range(order.n_streams):
            check(order.groups(stream), shards_at(order, stream))


def test_a_missing_stream_is_refused():
    data = Shards([[(3, 10)]], [10])
    order = EpochOrder(data.dataset_sizes, OrderOptions(1, True, None, None), 0)
    with pytest.raises(ValueError, match="there is no stream 1: the order has 1"):
        order.groups(1)
    with pytest.raises(ValueError, match="stream 1"):
        ExplicitOrder(data.dataset_sizes, np.arange(3), None).groups(1)
