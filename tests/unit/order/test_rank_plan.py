"""Batches of ranks: together the global sequence, whatever the number of ranks and streams."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.order_oracle import Ranks, batches

from tiercache.order.rank_plan import RankPlan

MANY = max(100, settings.default.max_examples)
SamplerBatch = tuple[int, Ranks, int, int]  # offset, ranks, records, streams


@st.composite
def drawn(draw: st.DrawFn) -> SamplerBatch:
    """Any share of any epoch; every second one with streams that divide the global batch."""
    n = draw(st.integers(0, 300))
    ranks = Ranks(draw(st.integers(1, 9)), draw(st.integers(1, 20)), draw(st.booleans()))
    size = ranks.world_size * ranks.batch_size
    divisors = [s for s in range(1, size + 1) if size % s == 0]
    return draw(st.integers(0, n)), ranks, n, draw(st.one_of(st.sampled_from(divisors), st.integers(1, 12)))


def plans(how: SamplerBatch) -> list[RankPlan]:
    offset, ranks, n, n_streams = how
    shared = (ranks.batch_size, ranks.drop_last, n, n_streams)
    return [RankPlan(offset, ranks.world_size, rank, *shared) for rank in range(ranks.world_size)]


def positions(plan: RankPlan) -> list[list[int]]:
    return [plan.positions(i).tolist() for i in range(plan.n_batches)]


@settings(max_examples=MANY)
@given(drawn())
def test_ranks_take_what_the_brute_force_reference_says(how: SamplerBatch) -> None:
    offset, ranks, n, n_streams = how
    for plan, expected in zip(plans(how), batches(ranks, n_streams, offset, n), strict=True):
        found = positions(plan)
        assert found[: plan.n_batches - plan.n_padding] == [batch for batch in expected if batch]
        assert plan.n_padding == int(expected[-1:] == [[]])


@given(drawn())
def test_the_last_global_batch_is_split_evenly_and_filled_to_one_from_the_rank_s_first_stream(
    how: SamplerBatch,
) -> None:
    _, _, n, _ = how
    shares = plans(how)
    left = shares[0].n_left
    sizes = [len(positions(plan)[-1]) for plan in shares] if left else []
    assert not sizes or max(sizes) - min(sizes) <= 1
    assert sum(plan.n_padding for plan in shares) == (max(0, len(shares) - left) if left else 0)
    for plan in shares:
        assert sum(map(len, positions(plan))) == plan.n_served
        if plan.n_padding:
            filled = [stream for stream in plan.streams if stream < n]
            assert positions(plan)[-1] == [filled[0] if filled else 0]


@settings(max_examples=MANY)
@given(drawn())
def test_fills_first_gives_the_remaining_records_to_the_first_ranks(how: SamplerBatch) -> None:
    even = plans(how)
    filled = [replace(plan, fills_first=True) for plan in even]
    left = even[0].n_left
    assert [plan.n_batches for plan in filled] == [plan.n_batches for plan in even]
    assert [positions(plan)[: plan.n_full] for plan in filled] == [positions(plan)[: plan.n_full] for plan in even]
    if left:
        longest = max(len(positions(plan)[-1]) for plan in even)
        last = [[] if plan.n_padding else positions(plan)[-1] for plan in filled]
        assert sorted(itertools.chain(*last)) == sorted(
            itertools.chain(*(positions(plan)[-1] for plan in even if not plan.n_padding))
        )
        shares = [len(share) for share in last]
        n_whole = left // longest
        assert shares == [longest] * n_whole + [left % longest] * (n_whole < len(shares)) + [0] * (
            len(shares) - n_whole - 1
        )
    for plan in (*even, *filled):
        assert len(positions(plan)) == plan.n_batches
        assert all(positions(plan))
        own = set(itertools.chain(*positions(plan)[: plan.n_batches - plan.n_padding]))
        assert plan.owns(np.arange(how[2])).tolist() == [p in own for p in range(how[2])]


@given(drawn(), st.data())
def test_any_range_of_rows_equals_that_part_of_the_concatenated_batches(how: SamplerBatch, data: st.DataObject) -> None:
    for plan in plans(how):
        every = list(itertools.chain(*positions(plan)))
        start = data.draw(st.integers(0, len(every)))
        stop = data.draw(st.integers(start, len(every)))
        assert plan.positions_between(start, stop).tolist() == every[start:stop]


def test_a_plan_of_a_hundred_million_batches_takes_no_memory() -> None:
    plan = RankPlan(0, 64, 63, 256, True, 10**8 * 64 * 256, n_streams=64)
    assert plan.n_batches == 10**8
    assert plan.positions(10**8 - 1).tolist() == list(range(plan.n_records - 64 * 256 + 63, plan.n_records, 64))


def test_values_out_of_range_are_refused() -> None:
    good = {"offset": 0, "world_size": 2, "rank": 1, "batch_size": 4, "drop_last": False, "n_records": 10}
    for name, value in {"offset": 11, "world_size": 0, "rank": 2, "batch_size": 0, "n_streams": 0}.items():
        with pytest.raises(ValueError, match=name):
            RankPlan(**{**good, name: value})
    plan = RankPlan(**good)
    with pytest.raises(IndexError, match="there is no batch 2: the rank has 2"):
        plan.positions(2)
    with pytest.raises(IndexError, match=r"rows \[0, 6\) .* 5 rows"):
        plan.positions_between(0, 6)
    with pytest.raises(ValueError, match="n_batches is 3, but the rank has 2"):
        plan.offset_after(3)


@settings(max_examples=MANY)
@given(drawn(), st.integers(0, 300), st.integers(0, 300))
def test_rows_that_follow_one_another_are_a_range_and_the_same_positions(
    how: SamplerBatch, start: int, length: int
) -> None:
    for plan in plans(how):
        start = min(start, plan.n_served)
        stop = min(start + length, plan.n_served)
        found, run = plan.range_or_positions(start, stop), plan.range_between(start, stop)
        positions = plan.positions_between(start, stop).tolist()
        assert list(found) == positions
        assert isinstance(found, range) == (plan.world_size == 1 or run is not None)
        steps = {after - before for before, after in itertools.pairwise(positions)}
        follow = steps <= {plan.n_streams} and len(plan.streams) == 1
        is_full = plan.world_size == 1 or stop <= plan.n_full * plan.batch_size
        assert (run is not None) == (bool(positions) and follow and is_full)
        assert run is None or list(run) == positions
