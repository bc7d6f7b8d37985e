"""Range reads: the set of requests, compared with a search over all sets, and the targets of their bytes."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiercache.model import ByteRange
from tiercache.store.contract import check_spans, covering_ranges, plan_requests

ranges = st.tuples(st.integers(0, 40), st.integers(0, 15)).map(lambda r: ByteRange(r[0], r[0] + r[1]))
limits = st.tuples(st.integers(0, 12), st.integers(1, 20))


def least_number(wanted: list[ByteRange], max_gap_bytes: int, max_bytes: int) -> int:
    """Return the least number of requests that read no gap longer than allowed, by a search over all sets."""
    is_wanted = [False] * 64
    for one in wanted:
        is_wanted[one.start : one.end] = [True] * one.n_bytes

    @cache
    def from_byte(at: int) -> int:
        while at < len(is_wanted) and not is_wanted[at]:
            at += 1
        if at == len(is_wanted):
            return 0
        choices, gap = [], 0
        for end in range(at + 1, min(at + max_bytes, len(is_wanted)) + 1):
            gap = 0 if is_wanted[end - 1] else gap + 1
            if gap > max_gap_bytes:
                break
            choices.append(1 + from_byte(end))
        return min(choices)

    return from_byte(0)


@given(st.lists(ranges, max_size=8), limits)
def test_the_fewest_ranges_cover_every_wanted_byte_and_are_bounded_ordered_and_disjoint(wanted, limits):
    max_gap_bytes, max_bytes = limits
    found = covering_ranges(wanted, *limits)
    assert len(found) == least_number(wanted, *limits)
    wanted_bytes = {at for one in wanted for at in range(one.start, one.end)}
    assert wanted_bytes <= {at for one in found for at in range(one.start, one.end)}
    assert all(0 < one.n_bytes <= max_bytes for one in found)
    assert all(before.end <= after.start for before, after in pairwise(found))
    for one in found:
        assert {one.start, one.end - 1} <= wanted_bytes
        gap = 0
        for at in range(one.start, one.end):
            gap = 0 if at in wanted_bytes else gap + 1
            assert gap <= max_gap_bytes


def test_a_long_range_is_split_into_nearly_equal_requests():
    parts = covering_ranges([ByteRange(3, 20)], max_bytes=8)
    assert parts == [ByteRange(3, 9), ByteRange(9, 15), ByteRange(15, 20)]


def test_small_chunks_that_lie_together_need_one_request():
    labels = [ByteRange(i * 78, i * 78 + 78) for i in range(0, 1433, 2)]
    assert len(covering_ranges(labels)) == 1


spans = st.tuples(st.integers(0, 300), st.integers(0, 120)).map(lambda r: ByteRange(r[0], r[0] + r[1]))
span_limits = st.tuples(st.integers(0, 40), st.integers(1, 100))


@given(st.lists(spans, max_size=12), span_limits)
def test_every_byte_of_every_span_has_one_target(wanted, limits):
    data = bytes(i * 7 % 251 for i in range(500))
    buffers = [bytearray(r.n_bytes) for r in wanted]
    writes = 0
    for request in plan_requests([(r, memoryview(b)) for r, b in zip(wanted, buffers, strict=True)], *limits):
        answer = data[request.range.start : request.range.end]
        for offset, buffer in request.targets:
            buffer[:] = answer[offset : offset + buffer.nbytes]
            writes += buffer.nbytes
    assert [bytes(b) for b in buffers] == [data[r.start : r.end] for r in wanted]
    assert writes == sum(r.n_bytes for r in wanted)


@given(st.lists(spans, max_size=12), span_limits)
def test_requests_are_bounded_and_include_only_small_gaps(wanted, limits):
    requests = plan_requests([(r, memoryview(bytearray(r.n_bytes))) for r in wanted], *limits)
    for request in requests:
        used = sum(buffer.nbytes for _, buffer in request.targets)
        assert 0 < request.range.n_bytes <= limits[1]
        assert request.range.n_bytes - used <= limits[0] * (len(request.targets) - 1)
        ends = [offset + buffer.nbytes for offset, buffer in request.targets]
        assert request.targets[0][0] == 0
        assert ends[-1] == request.range.n_bytes
        assert all(end <= offset for end, (offset, _) in zip(ends, request.targets[1:], strict=False))
    assert [r.range.start for r in requests] == sorted(r.range.start for r in requests)


def test_a_buffer_of_other_items_than_bytes_is_refused():
    with pytest.raises(ValueError, match="flat bytes"):
        check_spans([(ByteRange(0, 4), memoryview(bytearray(4)).cast("i"))])
