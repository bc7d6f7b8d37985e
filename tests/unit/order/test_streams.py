"""Streams: equal parts of the shards that are read side by side, each mixed by itself."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from tests.support.order_oracle import Shards, options, read, shards, uniform

from tiercache.order.epoch_order import EpochOrder
from tiercache.order.window import OrderOptions


def of_stream(order: EpochOrder, stream: int) -> list[tuple[int, int, int]]:
    """Records of one stream in order."""
    return read(order)[stream :: order.n_streams]


def blocks_of(order: EpochOrder, stream: int) -> set[tuple[int, int]]:
    return {
        (int(shard), int(block))
        for window in order.windows(stream)
        for shard, block in zip(window.shards, window.blocks, strict=True)
    }


@given(shards(), options())
def test_a_block_is_in_two_streams_only_where_the_cut_falls_inside_it(data: Shards, how: OrderOptions) -> None:
    order = EpochOrder(data.dataset_sizes, how, 0)
    readers = [blocks_of(order, stream) for stream in range(order.n_streams)]
    n_filled = sum(records > 0 for shard in data.blocks for records, _ in shard)
    assert sum(map(len, readers)) - n_filled <= order.n_streams - 1
    assert len(set().union(*readers)) == n_filled


@given(shards(), st.integers(0, 2**64), st.integers(2, 5))
def test_a_sticky_stream_has_the_same_records_in_every_epoch(data: Shards, seed: int, n_streams: int) -> None:
    how = OrderOptions(seed, True, 300, 100, n_streams)
    epochs = [EpochOrder(data.dataset_sizes, how, epoch) for epoch in (0, 1, 7)]
    for stream in range(n_streams):
        assert len({tuple(sorted(of_stream(order, stream))) for order in epochs}) == 1


def test_a_global_stream_has_other_records_in_another_epoch_and_a_sticky_one_another_order() -> None:
    data = uniform(32, 2, 3, 100)
    sticky = OrderOptions(5, True, 800, 300, streams=4)
    for how in (sticky, replace(sticky, placement="global")):
        first, second = (of_stream(EpochOrder(data.dataset_sizes, how, epoch), 1) for epoch in (0, 1))
        assert first != second
        assert (sorted(first) == sorted(second)) == (how.placement == "sticky")


def test_the_order_of_streams_equals_the_stored_golden_values() -> None:
    # Written once: runs in progress resume by this order, so a change here breaks users.
    data = Shards([[(3, 100), (2, 100)], [(4, 50)], [(1, 10), (1, 10), (1, 10)]], [200, 50, 30])
    index = {record: i for i, record in enumerate(data.all_records())}
    found = {}
    for placement in ("sticky", "global"):
        for epoch in (0, 3):
            order = EpochOrder(data.dataset_sizes, OrderOptions(7, True, 200, 150, 3, placement), epoch)
            found[placement, epoch] = [index[record] for record in read(order)]
    assert found == {
        ("sticky", 0): [7, 11, 4, 5, 0, 3, 8, 9, 1, 6, 10, 2],
        ("sticky", 3): [8, 9, 4, 7, 10, 3, 6, 0, 2, 5, 11, 1],
        ("global", 0): [7, 3, 4, 5, 2, 11, 8, 0, 9, 6, 1, 10],
        ("global", 3): [9, 7, 4, 5, 0, 3, 11, 8, 2, 10, 6, 1],
    }
