"""A rank's plan against its batches, record by record: in use when it is read, by a clock of stored bytes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.mixture_oracle import Mixed, mixtures
from tests.support.order_oracle import uniform
from tests.unit.load.test_pieces import Case, cases

from tiercache.load import epoch as module
from tiercache.load.epoch import OrderShare, ReadClock, find_shard_uses, make_reading_plan
from tiercache.model import NEVER
from tiercache.order.epoch_order import EpochOrder
from tiercache.order.rank_plan import RankPlan
from tiercache.order.window import OrderOptions


def share_of(order, rank_plan: RankPlan, epoch: int = 0) -> OrderShare:
    return OrderShare(order, rank_plan, 1, epoch)


def read_by(share: OrderShare, start: int) -> list[tuple[int, int]]:
    """(position, shard) of each record that the rank is served from a position on, without padding."""
    found = []
    for row in range(share.rank_plan.n_served - share.rank_plan.n_padding):
        position = int(share.rank_plan.positions_between(row, row + 1)[0])
        if position >= start and position % share.order.n_streams in share.rank_plan.streams:
            found.append((position, share.locate(position)[0]))
    return found


def check_in_use(share: OrderShare, start: int, n_shards: int) -> None:
    uses = find_shard_uses(share, start, n_shards)
    for position, shard in read_by(share, start):
        assert uses.begins[shard] <= position < uses.ends[shard]
    assert (uses.begins[uses.shards] >= start).all()
    clocks = uses.clock.at(np.arange(start, share.rank_plan.n_records + 1))
    assert clocks[0] == 0
    assert (np.diff(clocks) >= 0).all()
    assert clocks[-1] == uses.clock.total


@given(cases(), st.integers(0, 40))
def test_shards_are_in_use_in_the_plan_when_a_rank_reads_them(case: Case, offset: int):
    offset = min(offset, case.data.n_records)
    for rank_plan in case.plans(offset):
        check_in_use(share_of(case.order, rank_plan), offset, len(case.data.blocks))


@given(mixtures(), st.integers(0, 2), st.integers(1, 3), st.integers(1, 5))
def test_shards_of_a_mixture_are_in_use_in_the_plan_when_a_rank_reads_them(mixed: Mixed, epoch, world_size, batch_size):
    order = mixed.order(epoch)
    for rank in range(world_size):
        rank_plan = RankPlan(0, world_size, rank, batch_size, False, order.n_records, order.n_streams)
        check_in_use(share_of(order, rank_plan), 0, len(mixed.joined.blocks))


@given(cases(), st.integers(0, 3), st.integers(0, 40))
def test_a_shard_is_read_then_when_the_next_epochs_first_use_of_it_comes(case: Case, n_later: int, offset: int):
    offset, n_shards = min(offset, case.data.n_records), len(case.data.blocks)
    for rank_plan in case.plans(offset):
        share = share_of(case.order, rank_plan)
        orders = [EpochOrder(case.data.dataset_sizes, case.how, case.epoch + 1 + i) for i in range(n_later)]
        later = [share_of(order, replace(rank_plan, offset=0)) for order in orders]
        uses = find_shard_uses(share, offset, n_shards)
        plan = make_reading_plan("me", uses, later, n_shards + 1)
        assert plan.owner == "me"
        assert (np.diff(plan.shards) > 0).all()
        then, passed = dict.fromkeys(range(n_shards), NEVER), uses.clock.total
        for found in (find_shard_uses(one, 0, n_shards) for one in later):
            for shard in found.shards.tolist():
                then[shard] = min(then[shard], passed + int(found.clock.at(found.begins[[shard]])[0]))
            passed += found.clock.total
        columns = plan.shards, plan.first, plan.last, plan.first_later
        rows = zip(*(column.tolist() for column in columns), strict=True)
        for shard, first, last, again in rows:
            assert then.pop(shard) == again
            if uses.ends[shard]:
                assert 0 <= first <= last <= uses.clock.total
            else:
                assert first == last == NEVER != again
        assert set(then.values()) <= {NEVER}
        assert set(uses.shards.tolist()).isdisjoint(then)


@given(
    st.lists(st.tuples(st.integers(0, 99), st.integers(1, 50), st.integers(0, 10**15)), max_size=12), st.integers(0, 50)
)
def test_the_clock_equals_the_stored_bytes_of_the_groups_read(groups, position):
    begins = np.array([begin for begin, _, _ in groups], np.int64)
    ends = begins + np.array([length for _, length, _ in groups], np.int64)
    n_bytes = np.array([size for _, _, size in groups], np.int64)
    clock = ReadClock(0, begins, ends, n_bytes)
    done = np.clip((position - begins) / np.maximum(ends - begins, 1), 0, 1)
    expected = float((n_bytes * done).sum())
    assert clock.at(np.array([position]))[0] == pytest.approx(expected, rel=1e-9, abs=2)
    assert clock.total == pytest.approx(float(n_bytes.sum()), rel=1e-9, abs=2)


def plans_of(placement, streams: int, world_size: int, n_later: int, n_shards: int = 64, max_shards: int = 1 << 21):
    """Rank 0's plan, and how many later epochs were looked at."""
    data, looked = uniform(n_shards, 2, 5, 100), []
    how = OrderOptions(3, True, 1000, 100, streams, placement)
    orders = [EpochOrder(data.dataset_sizes, how, epoch) for epoch in range(n_later + 1)]
    rank_plan = RankPlan(0, world_size, 0, 4, False, data.n_records, streams)

    def later():
        for epoch, order in enumerate(orders[1:], start=1):
            looked.append(epoch)
            yield share_of(order, rank_plan, epoch)

    first = share_of(orders[0], rank_plan)
    plan = make_reading_plan("me", find_shard_uses(first, 0, n_shards), later(), n_shards, max_shards)
    assert data.footers == []
    return plan, len(looked)


def test_one_later_epoch_is_examined_if_a_rank_reads_all_shards():
    plan, n_looked = plans_of("global", 1, 1, 5)
    assert n_looked == 1
    assert (plan.first_later >= 64 * 200).all()
    assert (plan.first_later < 2 * 64 * 200).all()


def test_later_epochs_are_examined_until_no_new_shard_appears():
    plan, n_looked = plans_of("sticky", 4, 4, 9)
    assert n_looked == 1 + module.EPOCHS_WITHOUT_NEWS
    assert 16 <= len(plan.shards) <= 17  # a stream's share, one shard of which may be cut in two
    plan, n_looked = plans_of("global", 4, 4, 64)
    assert 5 < n_looked < 64
    assert len(plan.shards) > 60
    assert (plan.first == NEVER).any()
    assert (plan.first_later != NEVER).all()


@pytest.mark.parametrize(("epochs", "max_shards"), [(3, 1 << 21), (64, 3 * (64 + 1024))])
def test_the_number_of_examined_epochs_is_limited(monkeypatch, epochs, max_shards):
    monkeypatch.setattr(module, "MAX_EPOCHS_AHEAD", epochs)
    plan, n_looked = plans_of("global", 16, 16, 64, max_shards=max_shards)
    assert n_looked == 3
    assert (plan.first_later[plan.first != NEVER] == NEVER).any()
