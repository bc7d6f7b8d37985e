"""Range reads: the set of requests, compared with a search over all sets, and where their bytes land."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiercache.model import ByteRange
from tiercache.store.contract import RequestCosts, cheapest_ranges, check_spans, plan_requests

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
def test_the_cheapest_set_of_requests_saves_less_than_the_splits_of_long_clusters_cost(wanted, costs):
    found = cheapest_ranges(wanted, costs)
    least_s = least_cost_s(wanted, costs)
    n_splits = sum(before.end + costs.gap_bytes >= after.start for before, after in pairwise(found))
    assert least_s - 1e-6 <= cost_s(found, costs) <= least_s + n_splits * costs.request_s + 1e-6


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


def test_a_gap_is_read_only_if_it_costs_less_than_a_request():
    costs = RequestCosts(request_s=0.01, bytes_per_s=1000.0, max_gap_bytes=100, max_bytes=100)
    assert cheapest_ranges([ByteRange(0, 5), ByteRange(14, 20)], costs) == [ByteRange(0, 20)]
    assert cheapest_ranges([ByteRange(0, 5), ByteRange(15, 20)], costs) == [ByteRange(0, 5), ByteRange(15, 20)]


def test_a_long_range_is_split_into_nearly_equal_requests():
    parts = cheapest_ranges([ByteRange(3, 20)], RequestCosts(max_bytes=8))
    assert parts == [ByteRange(3, 9), ByteRange(9, 15), ByteRange(15, 20)]


def test_small_chunks_that_lie_together_need_one_request():
    labels = [ByteRange(i * 78, i * 78 + 78) for i in range(0, 1433, 2)]
    assert len(cheapest_ranges(labels, RequestCosts())) == 1


spans = st.tuples(st.integers(0, 300), st.integers(0, 120)).map(lambda r: ByteRange(r[0], r[0] + r[1]))
span_costs = st.builds(RequestCosts, st.just(1.0), st.integers(1, 50), st.integers(0, 40), st.integers(1, 100))


@given(st.lists(spans, max_size=12), span_costs)
def test_every_byte_of_every_span_has_one_target(wanted, costs):
    data = bytes(i * 7 % 251 for i in range(500))
    buffers = [bytearray(r.n_bytes) for r in wanted]
    writes = 0
    for request in plan_requests([(r, memoryview(b)) for r, b in zip(wanted, buffers, strict=True)], costs):
        answer = data[request.range.start : request.range.end]
        for offset, buffer in request.targets:
            buffer[:] = answer[offset : offset + buffer.nbytes]
            writes += buffer.nbytes
    assert [bytes(b) for b in buffers] == [data[r.start : r.end] for r in wanted]
    assert writes == sum(r.n_bytes for r in wanted)


@given(st.lists(spans, max_size=12), span_costs)
def test_requests_are_bounded_and_include_only_small_gaps(wanted, costs):
    requests = plan_requests([(r, memoryview(bytearray(r.n_bytes))) for r in wanted], costs)
    for request in requests:
        used = sum(buffer.nbytes for _, buffer in request.targets)
        assert 0 < request.range.n_bytes <= costs.max_bytes
        assert request.range.n_bytes - used <= costs.gap_bytes * (len(request.targets) - 1)
        ends = [offset + buffer.nbytes for offset, buffer in request.targets]
        assert request.targets[0][0] == 0
        assert ends[-1] == request.range.n_bytes
        assert all(end <= offset for end, (offset, _) in zip(ends, request.targets[1:], strict=False))
    assert [r.range.start for r in requests] == sorted(r.range.start for r in requests)


def test_a_buffer_of_other_items_than_bytes_is_refused():
    with pytest.raises(ValueError, match="flat bytes"):
        check_spans([(ByteRange(0, 4), memoryview(bytearray(4)).cast("i"))])
