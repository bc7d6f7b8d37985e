"""The order of an epoch: every record once, from wherever one starts, cut where the rule says."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiercache.order import BlockTable, EpochOrder, Layout, OrderOptions, Window


@dataclass
class Shards:
    """Shards as lists of (records, raw bytes) of their blocks. footers: the shards whose blocks were asked for."""

    blocks: list[list[tuple[int, int]]]
    stored_bytes: list[int]
    footers: list[int] = field(default_factory=list)

    @property
    def layout(self) -> Layout:
        records = np.array([sum(r for r, _ in shard) for shard in self.blocks], np.int64)
        return Layout(records, np.array(self.stored_bytes, np.int64), self._footers)

    def _footers(self, shards: list[int]) -> list[BlockTable]:
        self.footers += shards
        tables = [np.array(self.blocks[shard], np.int64).reshape(-1, 2) for shard in shards]
        return [BlockTable(table[:, 0], table[:, 1]) for table in tables]

    @property
    def first_record(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.layout.records)]).astype(np.int64)

    def records_of(self, window: Window, lo: int, hi: int) -> list[int]:
        """Data-set indices of the records at positions [lo, hi) of the window."""
        block, row = window.rows(lo, hi)
        starts = [
            int(self.first_record[shard]) + sum(r for r, _ in self.blocks[shard][:number])
            for shard, number in zip(window.shards, window.blocks, strict=True)
        ]
        return [starts[b] + int(r) for b, r in zip(block, row, strict=True)]

    def read(self, order: EpochOrder, position: int = 0) -> list[int]:
        """Data-set indices of all records from a position to the end of the epoch."""
        found: list[int] = []
        for window in order.windows(position):
            lo = max(position - window.start, 0)
            found += self.records_of(window, lo, window.stop - window.start)
        return found


def uniform(n_shards: int, n_blocks: int, records: int, raw_bytes: int) -> Shards:
    """Equal shards of equal blocks, stored as they are."""
    return Shards([[(records, raw_bytes)] * n_blocks] * n_shards, [n_blocks * raw_bytes] * n_shards)


BLOCKS = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 100)), max_size=8)
SIZES = st.one_of(st.none(), st.integers(1, 1200))


@st.composite
def shards(draw: st.DrawFn) -> Shards:
    """Any shards: none, empty ones, empty blocks, blocks larger than any window."""
    blocks = draw(st.lists(BLOCKS, max_size=10))
    return Shards(blocks, [draw(st.integers(0, 500)) for _ in blocks])


@st.composite
def options(draw: st.DrawFn) -> OrderOptions:
    return OrderOptions(draw(st.integers(-(2**70), 2**70)), draw(st.booleans()), draw(SIZES), draw(SIZES))


def greedy(sizes: list[int], limit_bytes: int | None, first_limits: tuple[int, ...] = ()) -> list[int]:
    """Ends of runs, item by item: the rule in its plainest form."""
    ends: list[int] = []
    total = held = 0
    for i, size in enumerate(sizes):
        limit = first_limits[len(ends)] if len(ends) < len(first_limits) else limit_bytes
        if held and limit is not None and total + size > limit:
            ends.append(i)
            total = held = 0
        total, held = total + size, held + 1
    return [*ends, len(sizes)] if sizes else []


@given(shards(), options(), st.integers(0, 2**40))
def test_an_epoch_is_every_record_once(data: Shards, how: OrderOptions, epoch: int) -> None:
    order = EpochOrder(data.layout, how, epoch)
    found = data.read(order)
    assert order.n_records == len(found)
    assert sorted(found) == list(range(order.n_records))


@given(shards(), options())
def test_without_shuffle_position_p_is_record_p(data: Shards, how: OrderOptions) -> None:
    order = EpochOrder(data.layout, replace(how, shuffle=False), 5)
    assert data.read(order) == list(range(order.n_records))


@given(shards(), options(), st.data())
def test_the_order_is_the_same_from_wherever_one_starts(data: Shards, how: OrderOptions, draw: st.DataObject) -> None:
    whole = data.read(EpochOrder(data.layout, how, 3))
    position = draw.draw(st.integers(0, len(whole)))
    assert data.read(EpochOrder(data.layout, how, 3), position) == whole[position:]


@given(shards(), options(), st.data())
def test_any_run_of_rows_is_a_part_of_its_window(data: Shards, how: OrderOptions, draw: st.DataObject) -> None:
    for window in EpochOrder(data.layout, how, 0).windows(0):
        n = window.stop - window.start
        lo = draw.draw(st.integers(0, n))
        hi = draw.draw(st.integers(lo, n))
        assert data.records_of(window, lo, hi) == data.records_of(window, 0, n)[lo:hi]


@given(shards(), options())
def test_every_position_leads_to_the_window_that_holds_it(data: Shards, how: OrderOptions) -> None:
    order = EpochOrder(data.layout, how, 0)
    stop = 0
    for window in order.windows(0):
        assert window.start == stop
        stop = window.stop
        for position in {window.start, (window.start + stop) // 2, stop - 1}:
            found = order.window_at(position)
            assert (found.start, found.stop, found.key) == (window.start, window.stop, window.key)
    assert stop == order.n_records


@given(shards(), options())
def test_groups_are_as_many_whole_shards_as_fit(data: Shards, how: OrderOptions) -> None:
    order = EpochOrder(data.layout, how, 1)
    in_order = order.shards_ahead(0, None).tolist()
    assert sorted(in_order) == np.flatnonzero(data.layout.records).tolist()
    ends = greedy([data.stored_bytes[shard] for shard in in_order], how.group_bytes)
    expected = [set(in_order[a:b]) for a, b in zip([0, *ends], ends, strict=False)]
    groups: dict[int, set[int]] = {}
    for window in order.windows(0):
        groups.setdefault(window.group, set()).update(window.shards.tolist())
    assert list(groups.values()) == expected


@given(shards(), options())
def test_windows_are_as_many_whole_blocks_as_fit(data: Shards, how: OrderOptions) -> None:
    windows = list(EpochOrder(data.layout, how, 1).windows(0))
    sizes: dict[int, list[list[int]]] = {}
    for window in windows:
        raw_bytes = [data.blocks[s][b][1] for s, b in zip(window.shards, window.blocks, strict=True)]
        assert window.raw_bytes == sum(raw_bytes)
        sizes.setdefault(window.group, []).append(raw_bytes)
    limit = how.window_bytes
    for group, runs in sizes.items():
        flat = [size for run in runs for size in run]
        plain = greedy(flat, limit)
        ramped = greedy(flat, limit, tuple(limit // 2**i for i in range(6, 0, -1))) if limit and group == 0 else plain
        ends = np.cumsum([len(run) for run in runs]).tolist()
        assert ends in (plain, ramped)
        if len(sizes) == 1 and limit and sum(data.stored_bytes):
            assert ends == (ramped if sum(flat) >= 8 * limit else plain)


def test_a_stream_of_eight_windows_starts_with_small_ones_and_a_shorter_one_does_not() -> None:
    how = OrderOptions(1, True, None, 6400)
    long, short = uniform(8, 64, 10, 100), uniform(7, 64, 10, 100)
    found = [window.raw_bytes for window in EpochOrder(long.layout, how, 0).windows(0)]
    assert found == [100, 200, 400, 800, 1600, 3200, *[6400] * 7, 100]
    assert [window.raw_bytes for window in EpochOrder(short.layout, how, 0).windows(0)] == [6400] * 7


def test_later_groups_do_not_start_with_small_windows() -> None:
    data = uniform(16, 64, 10, 100)
    windows = list(EpochOrder(data.layout, OrderOptions(1, True, 2 * 6400, 6400), 0).windows(0))
    assert [w.raw_bytes for w in windows if w.group == 0] == [100, 200, 400, 800, 1600, 3200, 6400, 100]
    assert [w.raw_bytes for w in windows if w.group > 0] == [6400] * 14


@given(shards(), options(), st.data())
def test_only_the_footers_of_the_current_group_are_read(data: Shards, how: OrderOptions, draw: st.DataObject) -> None:
    order = EpochOrder(data.layout, how, 0)
    if order.n_records == 0:
        return
    order.shards_ahead(0, None)
    assert data.footers == []
    window = order.window_at(draw.draw(st.integers(0, order.n_records - 1)))
    in_group = {s for w in EpochOrder(data.layout, how, 0).windows(0) if w.group == window.group for s in w.shards}
    data.footers.clear()
    EpochOrder(data.layout, how, 0).window_at(window.start)
    assert sorted(data.footers) == sorted(in_group)


def test_the_window_that_was_asked_for_last_is_kept() -> None:
    order = EpochOrder(uniform(12, 4, 5, 100).layout, OrderOptions(1, True, 1000, 300), 0)
    assert order.window_at(16) is order.window_at(17)


def test_reading_an_epoch_through_asks_for_every_footer_once() -> None:
    data = uniform(12, 4, 5, 100)
    data.read(EpochOrder(data.layout, OrderOptions(1, True, 1000, 300), 0))
    assert sorted(data.footers) == list(range(12))


def test_epochs_and_seeds_give_different_orders_and_equal_ones_the_same() -> None:
    data = uniform(6, 5, 20, 100)
    how = OrderOptions(7, True, 1000, 300)
    orders = [
        tuple(data.read(EpochOrder(data.layout, replace(how, seed=seed), epoch)))
        for seed, epoch in [(7, 0), (7, 1), (8, 0), (-7, 0), (7 + 2**64, 0), (7, 2**64)]
    ]
    assert len(set(orders)) == len(orders)
    assert tuple(data.read(EpochOrder(data.layout, how, 0))) == orders[0]


def test_the_order_stays_the_same_for_ever() -> None:
    # Written once: runs in progress resume by this order, so a change here breaks users.
    data = uniform(3, 2, 2, 100)
    assert data.read(EpochOrder(data.layout, OrderOptions(7, True, 400, 300), 2)) == [
        0,
        1,
        2,
        4,
        5,
        3,
        6,
        7,
        10,
        8,
        11,
        9,
    ]
    assert data.read(EpochOrder(data.layout, OrderOptions(7, True, None, None), 0)) == [
        4,
        3,
        5,
        10,
        7,
        0,
        11,
        9,
        8,
        1,
        6,
        2,
    ]


def test_all_at_once_mixes_as_well_as_a_shuffle_and_default_windows_mix_blocks_of_many_shards() -> None:
    data = uniform(40, 10, 25, 1000)
    whole = data.read(EpochOrder(data.layout, OrderOptions(3, True, None, None), 0))
    assert abs(np.corrcoef(whole, np.arange(len(whole)))[0, 1]) < 0.05
    windows = list(EpochOrder(data.layout, OrderOptions(3, True, 200_000, 20_000), 0).windows(0))
    full = [w for w in windows if w.raw_bytes == 20_000]
    assert np.mean([len(set(w.shards.tolist())) for w in full]) > 9


def test_shards_ahead_are_those_of_the_coming_windows_in_order() -> None:
    data = uniform(10, 4, 5, 100)
    order = EpochOrder(data.layout, OrderOptions(1, True, 800, 100), 4)
    every = order.shards_ahead(0, None).tolist()
    assert sorted(every) == list(range(10))
    assert order.shards_ahead(40, None).tolist() == every[2:]
    assert order.shards_ahead(45, 401).tolist() == every[2:4]
    assert order.shards_ahead(45, 0).tolist() == every[2:3]
    assert order.shards_ahead(200, None).tolist() == []
    plain = EpochOrder(data.layout, OrderOptions(1, False, 800, 100), 4)
    assert plain.shards_ahead(45, 800).tolist() == [2, 3]


def test_ten_billion_records_cost_what_their_shards_cost() -> None:
    footer = BlockTable(np.full(10, 10**6), np.full(10, 1 << 20))
    layout = Layout(np.full(1000, 10**7), np.full(1000, 10 << 20), lambda shards: [footer] * len(shards))
    window = EpochOrder(layout, OrderOptions(1, True, None, None), 0).window_at(9_999_999_999)
    assert (window.start, window.stop) == (0, 10**10)
    block, row = window.rows(10**10 - 1000, 10**10)
    assert len(set(zip(block.tolist(), row.tolist(), strict=True))) == 1000


def test_a_position_outside_the_epoch_is_refused() -> None:
    data = uniform(1, 1, 5, 10)
    order = EpochOrder(data.layout, OrderOptions(1, True, None, None), 0)
    for position in (-1, 5):
        with pytest.raises(ValueError, match="outside an epoch of 5 records"):
            order.window_at(position)
    for position in (-1, 6):
        with pytest.raises(ValueError, match="outside an epoch of 5 records"):
            order.shards_ahead(position, None)
    with pytest.raises(ValueError, match="not inside"):
        order.window_at(0).rows(0, 6)


def test_a_footer_that_differs_from_the_version_is_refused_by_name() -> None:
    layout = Layout(
        np.array([5, 6]), np.array([1, 1]), lambda shards: [BlockTable(np.array([5]), np.array([1]))] * len(shards)
    )
    with pytest.raises(ValueError, match="shard 1: its footer holds 5 records, the version 6"):
        EpochOrder(layout, OrderOptions(1, True, None, None), 0).window_at(0)


def test_options_and_tables_that_cannot_be_are_refused() -> None:
    for wrong in ({"group_bytes": 0}, {"window_bytes": -1}, {"streams": 2}, {"placement": "loose"}):
        with pytest.raises(ValueError, match=r"must be|streams="):
            replace(OrderOptions(1, True, 10, 10), **wrong)
    with pytest.raises(ValueError, match="must be 0 or more"):
        BlockTable(np.array([-1]), np.array([1]))
    with pytest.raises(ValueError, match="2 shards have records"):
        Layout(np.array([1, 2]), np.array([1]), lambda _: BlockTable(np.array([1]), np.array([1])))
    with pytest.raises(ValueError, match="one row of integers"):
        BlockTable(np.array([1.5]), np.array([1]))
    with pytest.raises(ValueError, match="an epoch is 0 or more"):
        EpochOrder(uniform(1, 1, 1, 1).layout, OrderOptions(1, True, 10, 10), -1)
