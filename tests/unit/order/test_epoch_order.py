"""The order of an epoch: every record once, from wherever one starts, cut where the rule says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.order_oracle import (
    Shards,
    greedy,
    options,
    read,
    records_of,
    sequence,
    shards,
    stream_windows,
    uniform,
)

from tiercache.order.epoch_order import MAX_GROUP_SHARDS, EpochOrder
from tiercache.order.window import BlockSizes, DatasetSizes, OrderOptions, cut_by_size


def numbers(data: Shards, order: EpochOrder) -> list[int]:
    """The epoch as data-set indices."""
    index = {record: i for i, record in enumerate(data.all_records())}
    return [index[record] for record in read(order)]


@given(shards(), options(), st.integers(0, 9))
def test_an_epoch_equals_the_brute_force_reference(data: Shards, how: OrderOptions, epoch: int) -> None:
    found = read(EpochOrder(data.dataset_sizes, how, epoch))
    assert sorted(found) == data.all_records()
    assert found == sequence(data, how, epoch)


@given(shards(), options())
def test_windows_equal_the_brute_force_reference(data: Shards, how: OrderOptions) -> None:
    order = EpochOrder(data.dataset_sizes, how, 2)
    for stream in range(order.n_streams):
        windows = list(order.windows(stream))
        expected = stream_windows(data, how, 2, stream)
        assert [window.group for window in windows] == [group for group, _ in expected]
        assert [records_of((w,), *w.rows(0, w.stop - w.start)) for w in windows] == [run for _, run in expected]
        for window in windows:
            sizes = [data.blocks[s][b][1] for s, b in zip(window.shards, window.blocks, strict=True)]
            assert window.block_bytes.tolist() == sizes
            assert window.raw_bytes == sum(sizes)


@given(shards(), options())
def test_every_position_leads_to_the_window_that_holds_it(data: Shards, how: OrderOptions) -> None:
    order = EpochOrder(data.dataset_sizes, how, 0)
    for stream in range(order.n_streams):
        stop = 0
        for window in order.windows(stream):
            assert (window.stream, window.start) == (stream, stop)
            stop = window.stop
            for position in {window.start, (window.start + stop) // 2, stop - 1}:
                found = order.section_at(stream, position)
                assert (found.start, found.stop, found.key) == (window.start, window.stop, window.key)
                assert found.windows == (found,)
        assert stop == order.stream_records(stream) == len(range(stream, order.n_records, order.n_streams))


def test_a_group_has_a_maximum_number_of_shards() -> None:
    data = uniform(3 * MAX_GROUP_SHARDS // 2, 1, 2, 10)
    for group_bytes, sizes in ((1 << 40, [MAX_GROUP_SHARDS, MAX_GROUP_SHARDS // 2]), (None, [len(data.blocks)])):
        data.footers.clear()
        order = EpochOrder(data.dataset_sizes, OrderOptions(1, True, group_bytes, None), 0)
        order.section_at(0, 0)
        assert len(data.footers) == sizes[0]
        assert [len(window.shards) for window in order.windows(0)] == sizes


@given(
    st.lists(st.integers(0, 50), max_size=30),
    st.one_of(st.none(), st.integers(1, 200)),
    st.integers(1, 9),
)
def test_runs_hold_as_many_items_as_fit_both_limits(sizes: list[int], limit: int | None, most: int) -> None:
    found = cut_by_size(np.array(sizes, np.int64), limit, max_items=most).tolist()
    if limit is None:
        assert found == ([0, len(sizes)] if sizes else [0])
        return
    ends: list[int] = []
    rest = sizes
    while rest:  # greedily: one run by bytes, cut at `most`
        length = min(greedy(rest, limit)[0], most)
        ends.append(length + (ends[-1] if ends else 0))
        rest = rest[length:]
    assert found == [0, *ends]


@given(shards(), options(), st.data())
def test_only_the_footers_of_the_current_group_are_read(data: Shards, how: OrderOptions, draw: st.DataObject) -> None:
    order = EpochOrder(data.dataset_sizes, how, 0)
    if order.n_records == 0:
        return
    position = draw.draw(st.integers(0, order.n_records - 1))
    stream, at = position % order.n_streams, position // order.n_streams
    for every in range(order.n_streams):
        order.shards_ahead(every, 0, None)
    assert data.footers == []
    group = order.section_at(stream, at).group
    read_footers = sorted(data.footers)
    windows = EpochOrder(data.dataset_sizes, how, 0).windows(stream)
    assert read_footers == sorted({int(s) for w in windows if w.group == group for s in w.shards})


@pytest.mark.parametrize("n_streams", [1, 3])
def test_an_epoch_reads_each_footer_once_per_stream(n_streams: int) -> None:
    data = uniform(12, 4, 5, 100)
    read(EpochOrder(data.dataset_sizes, OrderOptions(1, True, 1000, 300, n_streams), 0))
    assert sorted(data.footers) == list(range(12))  # 12 shards in 3 streams: none is cut


def test_the_order_equals_the_stored_golden_values() -> None:
    # Written once: runs in progress resume by this order, so a change here breaks users.
    data = uniform(3, 2, 2, 100)
    one = EpochOrder(data.dataset_sizes, OrderOptions(7, True, 400, 300), 2)
    assert numbers(data, one) == [4, 5, 6, 0, 1, 7, 2, 3, 10, 8, 11, 9]
    whole = EpochOrder(data.dataset_sizes, OrderOptions(7, True, None, None), 0)
    assert numbers(data, whole) == [4, 3, 5, 10, 7, 0, 11, 9, 8, 1, 6, 2]


def test_the_order_of_streams_equals_the_stored_golden_values() -> None:
    # Written once, as above.
    data = Shards([[(3, 100), (2, 100)], [(4, 50)], [(1, 10), (1, 10), (1, 10)]], [200, 50, 30])
    found = {
        (placement, epoch): numbers(data, EpochOrder(data.dataset_sizes, how, epoch))
        for placement in ("sticky", "global")
        for how in (OrderOptions(7, True, 200, 150, 3, placement),)
        for epoch in (0, 3)
    }
    assert found == {
        ("sticky", 0): [7, 11, 4, 5, 0, 3, 8, 9, 1, 6, 10, 2],
        ("sticky", 3): [8, 9, 4, 7, 10, 3, 6, 0, 2, 5, 11, 1],
        ("global", 0): [7, 3, 4, 5, 2, 11, 8, 0, 9, 6, 1, 10],
        ("global", 3): [9, 7, 4, 5, 0, 3, 11, 8, 2, 10, 6, 1],
    }


@given(shards(), options())
def test_shards_ahead_of_a_stream_are_those_of_its_windows(data: Shards, how: OrderOptions) -> None:
    order = EpochOrder(data.dataset_sizes, how, 1)
    for stream in range(order.n_streams):
        windows = list(order.windows(stream))
        for window in windows[:3]:
            ahead = order.shards_ahead(stream, window.start, None).tolist()
            assert len(ahead) == len(set(ahead))
            rest = {int(shard) for w in windows if w.start >= window.start for shard in w.shards}
            assert rest <= set(ahead)
            first = order.shards_ahead(stream, window.start, 50).tolist()
            assert first
            assert first == ahead[: len(first)]
        assert order.shards_ahead(stream, order.stream_records(stream), None).tolist() == []


def test_the_cost_of_an_order_grows_with_shards_and_not_with_records() -> None:
    footer = BlockSizes(np.full(10, 10**6), np.full(10, 1 << 20))
    dataset_sizes = DatasetSizes(np.full(1000, 10**7), np.full(1000, 10 << 20), lambda shards: [footer] * len(shards))
    window = EpochOrder(dataset_sizes, OrderOptions(1, True, None, None), 0).section_at(0, 9_999_999_999)
    assert (window.start, window.stop) == (0, 10**10)
    block, row = window.rows(10**10 - 1000, 10**10)
    assert len(set(zip(block.tolist(), row.tolist(), strict=True))) == 1000


def test_a_position_outside_the_stream_is_refused() -> None:
    order = EpochOrder(uniform(1, 1, 5, 10).dataset_sizes, OrderOptions(1, True, None, None, streams=2), 0)
    for position in (-1, 2):
        with pytest.raises(ValueError, match="outside stream 1 of 2 records"):
            order.section_at(1, position)
    for position in (-1, 4):
        with pytest.raises(ValueError, match="outside stream 0 of 3 records"):
            order.shards_ahead(0, position, None)
    for stream in (-1, 2):
        with pytest.raises(ValueError, match="the order has 2"):
            order.section_at(stream, 0)
    with pytest.raises(ValueError, match="not inside"):
        order.section_at(0, 0).rows(0, 6)


def test_a_footer_with_another_record_count_than_the_version_is_an_error() -> None:
    dataset_sizes = DatasetSizes(
        np.array([5, 6]), np.array([1, 1]), lambda shards: [BlockSizes(np.array([5]), np.array([1]))] * len(shards)
    )
    with pytest.raises(ValueError, match="shard 1: its footer holds 5 records, but the version lists 6"):
        EpochOrder(dataset_sizes, OrderOptions(1, True, None, None), 0).section_at(0, 0)


def test_invalid_options_and_tables_are_refused() -> None:
    for wrong in ({"group_bytes": 0}, {"window_bytes": -1}, {"streams": 0}, {"streams": 2**17}, {"placement": "loose"}):
        with pytest.raises(ValueError, match="must be"):
            replace(OrderOptions(1, True, 10, 10), **wrong)
    with pytest.raises(ValueError, match="must be 0 or more"):
        BlockSizes(np.array([-1]), np.array([1]))
    with pytest.raises(ValueError, match="records has 2 shards"):
        DatasetSizes(np.array([1, 2]), np.array([1]), lambda _: BlockSizes(np.array([1]), np.array([1])))
    with pytest.raises(ValueError, match="one-dimensional integer array"):
        BlockSizes(np.array([1.5]), np.array([1]))
    with pytest.raises(ValueError, match="epoch must be 0 or more"):
        EpochOrder(uniform(1, 1, 1, 1).dataset_sizes, OrderOptions(1, True, 10, 10), -1)
