"""Batches of ranks: together the global sequence, whatever the number of ranks."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiercache.order import RankPlan


@st.composite
def settings(draw: st.DrawFn) -> tuple[int, int, int, bool, int]:
    """Offset, world size, batch size, drop_last, records."""
    n = draw(st.integers(0, 300))
    return draw(st.integers(0, n)), draw(st.integers(1, 9)), draw(st.integers(1, 20)), draw(st.booleans()), n


def plans(offset: int, world_size: int, batch_size: int, drop_last: bool, n: int) -> list[RankPlan]:
    return [RankPlan(offset, world_size, rank, batch_size, drop_last, n) for rank in range(world_size)]


def positions(plan: RankPlan, i: int) -> list[int]:
    return list(itertools.chain.from_iterable(range(*run) for run in plan.batch(i)))


@given(settings())
def test_batches_of_all_ranks_are_the_global_sequence_from_the_offset(how: tuple[int, int, int, bool, int]) -> None:
    offset, world_size, batch_size, drop_last, n = how
    ranks = plans(*how)
    served: list[int] = []
    for i in range(ranks[0].n_batches):
        for plan in ranks:
            is_padding = plan.padded and i == plan.n_batches - 1
            served += [] if is_padding else positions(plan, i)
        assert ranks[0].offset_after(i + 1) == offset + len(served)
    dropped = (n - offset) % (world_size * batch_size) if drop_last else 0
    assert served == list(range(offset, n - dropped))


@given(settings())
def test_every_rank_has_the_same_number_of_batches_none_empty(how: tuple[int, int, int, bool, int]) -> None:
    _, _, batch_size, _, _ = how
    ranks = plans(*how)
    assert len({plan.n_batches for plan in ranks}) == 1
    for plan in ranks:
        sizes = [len(positions(plan, i)) for i in range(plan.n_batches)]
        assert sum(sizes) == plan.n_served
        assert all(size == batch_size for size in sizes[: plan.n_full])
        assert all(0 < size <= batch_size for size in sizes)


@given(settings())
def test_the_last_global_batch_is_split_evenly_and_filled_to_one(how: tuple[int, int, int, bool, int]) -> None:
    ranks = plans(*how)
    left = ranks[0].n_left
    if left == 0:
        assert all(plan.padded == 0 for plan in ranks)
        return
    sizes = [len(positions(plan, plan.n_batches - 1)) for plan in ranks]
    assert max(sizes) - min(sizes) <= 1
    assert sum(plan.padded for plan in ranks) == max(0, len(ranks) - left)
    for plan in ranks:
        if plan.padded:
            assert positions(plan, plan.n_batches - 1) == [0]


@given(settings(), st.data())
def test_a_run_resumed_on_other_ranks_goes_on_where_the_first_stopped(
    how: tuple[int, int, int, bool, int], data: st.DataObject
) -> None:
    _, _, _, _, n = how
    first = plans(*how)[0]
    served = data.draw(st.integers(0, first.n_batches))
    offset = first.offset_after(served)
    world_size = data.draw(st.integers(1, 9))
    rest = plans(offset, world_size, data.draw(st.integers(1, 20)), False, n)
    found = [p for i in range(rest[0].n_batches) for plan in rest for p in positions(plan, i)]
    padding = sum(plan.padded for plan in rest)
    assert found[: len(found) - padding] == list(range(offset, n))


def test_a_hundred_million_batches_cost_nothing() -> None:
    plan = RankPlan(0, 64, 63, 256, True, 10**8 * 64 * 256)
    assert plan.n_batches == 10**8
    assert plan.batch(10**8 - 1) == ((plan.n_records - 256, plan.n_records),)


def test_values_out_of_range_are_refused() -> None:
    good = {"offset": 0, "world_size": 2, "rank": 1, "batch_size": 4, "drop_last": False, "n_records": 10}
    for name, value in {"offset": 11, "world_size": 0, "rank": 2, "batch_size": 0}.items():
        with pytest.raises(ValueError, match=name):
            RankPlan(**{**good, name: value})
    plan = RankPlan(**good)
    with pytest.raises(IndexError, match="batch 2 of 2"):
        plan.batch(2)
    with pytest.raises(ValueError, match="3 batches of 2"):
        plan.offset_after(3)
