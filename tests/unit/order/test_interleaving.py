"""Shares of a mixture: exact wherever one looks, found from a position and back, by whole numbers."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tiercache.order.mixture import StreamAllocation, apportion, exact_weight, interleave


def worst(sequence: list[int], shares: list[Fraction]) -> float:
    """The most by which a part's count in any stretch differs from its share of the stretch."""
    numbers = np.array(sequence)
    found = 0.0
    for part, share in enumerate(shares):
        off = np.concatenate([[0], np.cumsum(numbers == part)]) - float(share) * np.arange(len(numbers) + 1)
        found = max(found, float(off.max() - off.min()))
    return found


def shares_of(weights: list) -> list[Fraction]:
    exact = [exact_weight(weight) for weight in weights]
    return [weight / sum(exact) for weight in exact]


@given(st.integers(0, 10**13), st.lists(st.integers(1, 10**9), min_size=1, max_size=9))
def test_shares_of_an_epoch_are_exact_to_one_record(n: int, weights: list[int]) -> None:
    found = apportion(n, weights, [0] * len(weights))
    assert sum(found) == n
    for got, weight in zip(found, weights, strict=True):
        assert abs(got - Fraction(n * weight, sum(weights))) < 1


TOTALS = st.lists(st.one_of(st.integers(0, 9), st.integers(0, 10**11)), min_size=1, max_size=7).filter(any)


@given(TOTALS, st.integers(1, 9), st.data())
def test_positions_draws_and_offsets_by_part_agree(totals: list[int], n_streams: int, data: st.DataObject) -> None:
    stream = data.draw(st.integers(0, min(n_streams, sum(totals)) - 1))
    shares = interleave(StreamAllocation(tuple(totals), n_streams), stream)
    assert shares.drawn(0) == [0] * len(totals)
    assert tuple(shares.drawn(shares.n_records)) == shares.quotas
    start = data.draw(st.integers(0, shares.n_records))
    stop = min(shares.n_records, start + data.draw(st.integers(1, 50)))
    drawn, places = shares.drawn(start), shares.offsets_by_part(start, stop)
    assert sorted(np.concatenate(places).tolist()) == list(range(stop - start))
    parts, draws = shares.locate(np.arange(start, stop))
    for part, where in enumerate(places):
        assert shares.positions_of(part, drawn[part] + np.arange(len(where))).tolist() == (where + start).tolist()
        assert np.flatnonzero(parts == part).tolist() == where.tolist()
        assert draws[where].tolist() == list(range(drawn[part], drawn[part] + len(where)))
        assert shares.drawn(stop)[part] == drawn[part] + len(where)


def test_offsets_of_several_chunks_equal_those_of_each_chunk() -> None:
    shares = interleave(StreamAllocation((3 * 10**11, 10**11, 7), 2), 1)
    start, n = 10**11, (1 << 21) + 5
    whole = shares.offsets_by_part(start, start + n)
    halves = [shares.offsets_by_part(start, start + n // 2), shares.offsets_by_part(start + n // 2, start + n)]
    for part in range(3):
        assert np.array_equal(whole[part], np.concatenate([halves[0][part], halves[1][part] + n // 2]))


def test_a_stream_too_long_for_exact_arithmetic_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 4398046511104 records"):
        interleave(StreamAllocation((2**42, 1), 1), 0)


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=8), st.integers(1, 16), st.integers(1, 3000))
@example([700, 200, 100], 1, 2000)
@example([980, 10, 10], 1, 3000)
@example([1, 1, 2, 3, 5, 8, 13, 21], 1, 3000)
@example([1, 1], 16, 1600)
@example([999, 1], 16, 1600)
@example([700, 200, 100], 8, 1000)
@example([1] * 8, 16, 1601)
def test_in_any_range_a_part_deviates_by_a_few_records(weights: list[int], n_streams: int, n: int) -> None:
    deal = StreamAllocation(apportion(n, weights, [0] * len(weights)), n_streams)
    sequence = sequence_of(deal)
    assert np.bincount(sequence, minlength=len(weights)).tolist() == list(deal.totals)
    assert worst(sequence.tolist(), shares_of(weights)) < 5 + (2 * math.sqrt(n_streams) if n_streams > 1 else 0)


def schedules(n_parts: int, longest: int = 400) -> st.SearchStrategy[list[tuple[int, tuple[int, ...]]]]:
    """Numbers of positions and weights that hold for them. A part may pause, at the start and the end too."""
    weights = st.lists(st.integers(0, 9), min_size=n_parts, max_size=n_parts).map(tuple).filter(any)
    return st.lists(st.tuples(st.integers(1, longest), weights), min_size=1, max_size=6)


def without_pauses(schedule: list[tuple[int, tuple[int, ...]]]) -> list[tuple[int, tuple[int, ...]]]:
    """A schedule in which a part has weight 0 only before its first use and after its last one."""
    found = [list(weights) for _, weights in schedule]
    for part in range(len(found[0])):
        used = [number for number, weights in enumerate(found) if weights[part]]
        for number in range(used[0], used[-1]) if used else ():
            found[number][part] = found[number][part] or 1
    return [(n, tuple(weights)) for (n, _), weights in zip(schedule, found, strict=True)]


def scheduled(schedule: list[tuple[int, tuple[int, ...]]], n_streams: int) -> StreamAllocation:
    n_parts = len(schedule[0][1])
    shares, exact, steps = (0,) * n_parts, [Fraction(0)] * n_parts, []
    for n, weights in schedule:
        more = apportion(n, weights, [due - share for due, share in zip(exact, shares, strict=True)])
        exact = [due + n * Fraction(weight, sum(weights)) for due, weight in zip(exact, weights, strict=True)]
        shares = tuple(share + n_more for share, n_more in zip(shares, more, strict=True))
        steps.append(shares)
    return StreamAllocation(steps[-1], n_streams, tuple(steps[:-1]))


def sequence_of(allocation: StreamAllocation) -> np.ndarray:
    """The part of each position of an epoch."""
    sequence = np.full(sum(allocation.totals), -1)
    for stream in range(min(allocation.n_streams, len(sequence))):
        shares = interleave(allocation, stream)
        sequence[stream :: allocation.n_streams] = shares.locate(np.arange(shares.n_records))[0]
    return sequence


def deviation(sequence: np.ndarray, schedule: list[tuple[int, tuple[int, ...]]]) -> float:
    """The most by which the count of a part in a prefix differs from the sum of its weights' shares."""
    found = 0.0
    for part in range(len(schedule[0][1])):
        shares = np.concatenate([np.full(n, weights[part] / sum(weights)) for n, weights in schedule])
        found = max(found, float(np.abs(np.cumsum(sequence == part) - np.cumsum(shares)).max()))
    return found


SCHEDULES = st.integers(1, 5).flatmap(schedules)


@given(SCHEDULES)
def test_shares_before_each_change_are_exact_to_one_record_if_no_part_pauses(
    schedule: list[tuple[int, tuple[int, ...]]],
) -> None:
    schedule = [(n, tuple(weight or 1 for weight in weights)) for n, weights in schedule]
    schedule = [(n + 10 * sum(weights), weights) for n, weights in schedule]  # so that a record that is owed fits
    allocation = scheduled(schedule, 1)
    exact = [Fraction(0)] * len(allocation.totals)
    for (n, weights), shares in zip(schedule, (*allocation.changes, allocation.totals), strict=True):
        exact = [due + n * Fraction(weight, sum(weights)) for due, weight in zip(exact, weights, strict=True)]
        assert sum(shares) == sum(exact)
        assert all(abs(share - due) < 1 for share, due in zip(shares, exact, strict=True))


@given(SCHEDULES, st.integers(1, 16))
def test_streams_of_a_schedule_take_each_record_once(schedule: list, n_streams: int) -> None:
    allocation = scheduled(schedule, n_streams)
    constant = StreamAllocation(allocation.totals, n_streams)
    n_records = sum(allocation.totals)
    table = np.array([allocation.quotas_by_change(stream) for stream in range(n_streams)])
    assert np.all(np.diff(table, axis=1, prepend=0) >= 0)
    assert table[:, -1].tolist() == [list(allocation.quotas(stream)) for stream in range(n_streams)]
    assert np.all(np.ptp(table[:, -1], axis=0) <= 1)
    assert table[:, -1].sum(axis=0).tolist() == list(allocation.totals)
    ends = np.cumsum([n for n, _ in schedule])
    for number, end in enumerate(ends.tolist()):
        expected = [max(0, -((stream - end) // n_streams)) for stream in range(n_streams)]
        assert table[:, number].sum(axis=1).tolist() == expected
    for stream in range(n_streams):
        turns = allocation.turns(stream)
        assert [
            max(0, -((turn - total) // n_streams)) for turn, total in zip(turns, constant.totals, strict=True)
        ] == list(allocation.quotas(stream))
    assert n_records == ends[-1]


@given(SCHEDULES, st.integers(1, 9), st.data())
def test_positions_and_draws_of_a_schedule_are_inverse_functions(
    schedule: list, n_streams: int, data: st.DataObject
) -> None:
    allocation = scheduled(schedule, n_streams)
    stream = data.draw(st.integers(0, min(n_streams, sum(allocation.totals)) - 1))
    shares = interleave(allocation, stream)
    assert shares.drawn(0) == [0] * len(shares.quotas)
    assert tuple(shares.drawn(shares.n_records)) == shares.quotas
    parts, draws = shares.locate(np.arange(shares.n_records))
    counts = [0] * len(shares.quotas)
    for position, (part, draw) in enumerate(zip(parts.tolist(), draws.tolist(), strict=True)):
        assert shares.drawn(position) == counts
        assert draw == counts[part]
        counts[part] += 1
    for part, quota in enumerate(shares.quotas):
        assert shares.positions_of(part, np.arange(quota)).tolist() == np.flatnonzero(parts == part).tolist()
    start = data.draw(st.integers(0, shares.n_records))
    stop = data.draw(st.integers(start, shares.n_records))
    for part, places in enumerate(shares.offsets_by_part(start, stop)):
        assert places.tolist() == np.flatnonzero(parts[start:stop] == part).tolist()


@given(SCHEDULES, st.integers(1, 16))
def test_every_prefix_of_a_schedule_holds_each_part_s_share(schedule: list, n_streams: int) -> None:
    schedule = without_pauses(schedule)
    sequence = sequence_of(scheduled(schedule, n_streams))
    assert deviation(sequence, schedule) < 5 + 2 * math.sqrt(n_streams)


def served_at_weight_0(schedule: list[tuple[int, tuple[int, ...]]], n_streams: int) -> int:
    """The records of parts that are served while the weight of the part is 0."""
    sequence, end, found = sequence_of(scheduled(schedule, n_streams)), 0, 0
    for n, weights in schedule:
        served = np.bincount(sequence[end : end + n], minlength=len(weights))
        found += sum(count for count, weight in zip(served.tolist(), weights, strict=True) if weight == 0)
        end += n
    return found


@given(SCHEDULES, st.integers(1, 16))
def test_a_part_is_not_served_before_its_first_use_and_after_its_last_one(schedule: list, n_streams: int) -> None:
    # Shorter stretches may have no place for a record in the stream that must take it.
    schedule = [(n + n_streams * len(weights), weights) for n, weights in without_pauses(schedule)]
    assert served_at_weight_0(schedule, n_streams) == 0
