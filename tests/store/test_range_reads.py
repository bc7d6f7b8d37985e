"""Range reads: planning of requests."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiercache.model import ByteRange
from tiercache.store.coalescing import RequestCosts
from tiercache.store.range_reads import check_spans, plan_requests

ranges = st.tuples(st.integers(0, 300), st.integers(0, 120)).map(lambda r: ByteRange(r[0], r[0] + r[1]))
costs = st.builds(RequestCosts, st.just(1.0), st.integers(1, 50), st.integers(0, 40), st.integers(1, 100))


@given(st.lists(ranges, max_size=12), costs)
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


@given(st.lists(ranges, max_size=12), costs)
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


def test_a_long_span_is_split_into_nearly_equal_requests():
    requests = plan_requests([(ByteRange(0, 17), memoryview(bytearray(17)))], RequestCosts(max_bytes=8))
    assert [r.range.n_bytes for r in requests] == [6, 6, 5]


def test_a_buffer_of_other_items_than_bytes_is_refused():
    with pytest.raises(ValueError, match="flat bytes"):
        check_spans([(ByteRange(0, 4), memoryview(bytearray(4)).cast("i"))])
