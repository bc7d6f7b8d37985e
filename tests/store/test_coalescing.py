"""Coalescing of ranges: the cheapest set of requests, compared with a search over all sets."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiercache.model import ByteRange
from tiercache.store.coalescing import RequestCosts, cheapest_ranges

ranges = st.tuples(st.integers(0, 40), st.integers(0, 15)).map(lambda r: ByteRange(r[0], r[0] + r[1]))
all_costs = st.builds(
    RequestCosts,
    request_s=st.integers(0, 9).map(float),
    bytes_per_s=st.sampled_from([0.5, 1.0, 3.0]),
    max_gap_bytes=st.integers(0, 12),
    max_bytes=st.integers(1, 20),
)


def cost_s(found: list[ByteRange], costs: RequestCosts) -> float:
    return sum(costs.request_s + one.n_bytes / costs.bytes_per_s for one in found)


def least_cost_s(wanted: list[ByteRange], costs: RequestCosts) -> float:
    """Return the least cost of all sets of requests that read no gap longer than allowed."""
    is_wanted = [False] * 64
    for one in wanted:
        is_wanted[one.start : one.end] = [True] * one.n_bytes

    @cache
    def from_byte(at: int) -> float:
        while at < len(is_wanted) and not is_wanted[at]:
            at += 1
        if at == len(is_wanted):
            return 0.0
        choices, gap = [], 0
        for end in range(at + 1, min(at + costs.max_bytes, len(is_wanted)) + 1):
            gap = 0 if is_wanted[end - 1] else gap + 1
            if gap > costs.max_gap_bytes:
                break
            choices.append(costs.request_s + (end - at) / costs.bytes_per_s + from_byte(end))
        return min(choices)

    return from_byte(0)


@given(st.lists(ranges, max_size=8), all_costs)
def test_no_set_of_requests_is_cheaper(wanted, costs):
    assert cost_s(cheapest_ranges(wanted, costs), costs) == pytest.approx(least_cost_s(wanted, costs))


@given(st.lists(ranges, max_size=8), all_costs)
def test_the_ranges_cover_every_wanted_byte_and_are_bounded_ordered_and_disjoint(wanted, costs):
    found = cheapest_ranges(wanted, costs)
    wanted_bytes = {at for one in wanted for at in range(one.start, one.end)}
    assert wanted_bytes <= {at for one in found for at in range(one.start, one.end)}
    assert all(0 < one.n_bytes <= costs.max_bytes for one in found)
    assert all(before.end <= after.start for before, after in pairwise(found))
    for one in found:
        assert {one.start, one.end - 1} <= wanted_bytes
        gap = 0
        for at in range(one.start, one.end):
            gap = 0 if at in wanted_bytes else gap + 1
            assert gap <= costs.max_gap_bytes


@given(st.lists(ranges, max_size=8), all_costs)
def test_ranges_that_are_the_cheapest_stay_as_they_are(wanted, costs):
    found = cheapest_ranges(wanted, costs)
    assert cost_s(cheapest_ranges(found, costs), costs) == pytest.approx(cost_s(found, costs))


def test_a_gap_is_read_only_if_it_costs_less_than_a_request():
    costs = RequestCosts(request_s=0.01, bytes_per_s=1000.0, max_gap_bytes=100, max_bytes=100)
    assert cheapest_ranges([ByteRange(0, 5), ByteRange(14, 20)], costs) == [ByteRange(0, 20)]
    assert cheapest_ranges([ByteRange(0, 5), ByteRange(15, 20)], costs) == [ByteRange(0, 5), ByteRange(15, 20)]


def test_the_longest_gaps_separate_the_requests_of_a_long_cluster():
    costs = RequestCosts(request_s=1.0, bytes_per_s=1000.0, max_gap_bytes=100, max_bytes=80)
    wanted = [ByteRange(0, 10), ByteRange(15, 30), ByteRange(70, 75), ByteRange(76, 90)]
    assert cheapest_ranges(wanted, costs) == [ByteRange(0, 30), ByteRange(70, 90)]


def test_a_long_range_is_split_into_nearly_equal_requests():
    parts = cheapest_ranges([ByteRange(3, 20)], RequestCosts(max_bytes=8))
    assert parts == [ByteRange(3, 9), ByteRange(9, 15), ByteRange(15, 20)]


def test_small_chunks_that_lie_together_need_one_request():
    labels = [ByteRange(i * 78, i * 78 + 78) for i in range(0, 1433, 2)]
    assert len(cheapest_ranges(labels, RequestCosts())) == 1
