"""Shares of a mixture: exact wherever one looks, found from a position and back, by whole numbers."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tiercache.order.interleaving import StreamAllocation, StreamInterleaving, apportion
from tiercache.order.mixture import exact_weight


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
    found = apportion(n, weights)
    assert sum(found) == n
    for got, weight in zip(found, weights, strict=True):
        assert abs(got - Fraction(n * weight, sum(weights))) < 1


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=6), st.integers(1, 40))
def test_streams_take_equal_numbers_of_a_part_to_one_record(totals: list[int], n_streams: int) -> None:
    deal = StreamAllocation(tuple(totals), n_streams)
    table = np.array([deal.quotas(stream) for stream in range(n_streams)])
    assert table.sum(axis=0).tolist() == totals
    assert table.sum(axis=1).tolist() == [max(0, -((s - sum(totals)) // n_streams)) for s in range(n_streams)]
    assert np.all(np.ptp(table, axis=0) <= 1)


TOTALS = st.lists(st.one_of(st.integers(0, 9), st.integers(0, 10**11)), min_size=1, max_size=7).filter(any)


@given(TOTALS, st.integers(1, 9), st.data())
def test_positions_and_draws_are_inverse_functions(totals: list[int], n_streams: int, data: st.DataObject) -> None:
    stream = data.draw(st.integers(0, min(n_streams, sum(totals)) - 1))
    shares = StreamInterleaving(StreamAllocation(tuple(totals), n_streams), stream)
    assert shares.drawn(0) == [0] * len(totals)
    assert tuple(shares.drawn(shares.n_records)) == shares.quotas
    position = data.draw(st.integers(0, shares.n_records - 1))
    before, after = shares.drawn(position), shares.drawn(position + 1)
    (part,) = np.flatnonzero(np.array(after) - before)
    assert sum(after) == sum(before) + 1 == position + 1
    assert shares.positions_of(int(part), np.array([before[part]])).tolist() == [position]
    found = shares.locate(np.array([position]))
    assert (int(found[0][0]), int(found[1][0])) == (part, before[part])


@given(TOTALS, st.integers(1, 9), st.data())
def test_offsets_by_part_equal_the_positions_one_by_one(totals: list[int], n_streams: int, data: st.DataObject) -> None:
    stream = data.draw(st.integers(0, min(n_streams, sum(totals)) - 1))
    shares = StreamInterleaving(StreamAllocation(tuple(totals), n_streams), stream)
    start = data.draw(st.integers(0, shares.n_records))
    stop = min(shares.n_records, start + data.draw(st.integers(0, 50)))
    drawn, places = shares.drawn(start), shares.offsets_by_part(start, stop)
    assert sorted(np.concatenate(places).tolist()) == list(range(stop - start))
    for part, where in enumerate(places):
        assert shares.positions_of(part, drawn[part] + np.arange(len(where))).tolist() == (where + start).tolist()


def test_offsets_of_several_chunks_equal_those_of_each_chunk() -> None:
    shares = StreamInterleaving(StreamAllocation((3 * 10**11, 10**11, 7), 2), 1)
    start, n = 10**11, (1 << 21) + 5
    whole = shares.offsets_by_part(start, start + n)
    halves = [shares.offsets_by_part(start, start + n // 2), shares.offsets_by_part(start + n // 2, start + n)]
    for part in range(3):
        assert np.array_equal(whole[part], np.concatenate([halves[0][part], halves[1][part] + n // 2]))


def test_a_stream_too_long_for_exact_arithmetic_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 4398046511104 records"):
        StreamInterleaving(StreamAllocation((2**42, 1), 1), 0)


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=8), st.integers(1, 3000))
@example([700, 200, 100], 2000)
@example([1, 2], 3000)
@example([980, 10, 10], 3000)
@example([1, 1, 2, 3, 5, 8, 13, 21], 3000)
def test_in_any_range_of_one_stream_a_part_deviates_by_less_than_five_records(weights: list[int], n: int) -> None:
    shares = StreamInterleaving(StreamAllocation(apportion(n, weights), 1), 0)
    assert worst(shares.locate(np.arange(n))[0].tolist(), shares_of(weights)) < 5


def test_two_parts_of_one_stream_deviate_by_less_than_two_records() -> None:
    for weights in ([1, 1], [1, 2], [7, 3], [999, 1]):
        shares = StreamInterleaving(StreamAllocation(apportion(3000, weights), 1), 0)
        assert worst(shares.locate(np.arange(3000))[0].tolist(), shares_of(weights)) < 2


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=8), st.integers(2, 16), st.integers(1, 2000))
@example([1, 1], 16, 1600)
@example([999, 1], 16, 1600)
@example([700, 200, 100], 8, 1000)
@example([1] * 8, 16, 1601)
def test_in_any_range_of_several_streams_a_part_deviates_by_a_few_records(
    weights: list[int], n_streams: int, n: int
) -> None:
    deal = StreamAllocation(apportion(n, weights), n_streams)
    sequence = np.empty(n, np.int64)
    for stream in range(min(n_streams, n)):
        shares = StreamInterleaving(deal, stream)
        sequence[stream::n_streams] = shares.locate(np.arange(shares.n_records))[0]
    assert np.bincount(sequence, minlength=len(weights)).tolist() == list(deal.totals)
    assert worst(sequence.tolist(), shares_of(weights)) < 5 + 2 * math.sqrt(n_streams)
