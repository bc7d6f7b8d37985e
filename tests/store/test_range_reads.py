"""Range reads: planning of requests, and their execution by the threads of a store."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiercache.errors import StoreError
from tiercache.model import ByteRange
from tiercache.store.range_reads import RequestSizes, check_spans, plan_requests, read_requests, worker_pool
from tiercache.store.retry import CallLimit
from tiercache.waiting import SYSTEM_CLOCK

ranges = st.tuples(st.integers(0, 300), st.integers(0, 120)).map(lambda r: ByteRange(r[0], r[0] + r[1]))
sizes = st.builds(RequestSizes, st.integers(0, 40), st.integers(1, 100))


@given(st.lists(ranges, max_size=12), sizes)
def test_every_byte_of_every_span_has_one_target(wanted, sizes):
    data = bytes(i * 7 % 251 for i in range(500))
    buffers = [bytearray(r.n_bytes) for r in wanted]
    writes = 0
    for request in plan_requests([(r, memoryview(b)) for r, b in zip(wanted, buffers, strict=True)], sizes):
        answer = data[request.range.start : request.range.end]
        for offset, buffer in request.targets:
            buffer[:] = answer[offset : offset + buffer.nbytes]
            writes += buffer.nbytes
    assert [bytes(b) for b in buffers] == [data[r.start : r.end] for r in wanted]
    assert writes == sum(r.n_bytes for r in wanted)


@given(st.lists(ranges, max_size=12), sizes)
def test_requests_are_bounded_and_include_only_small_gaps(wanted, sizes):
    requests = plan_requests([(r, memoryview(bytearray(r.n_bytes))) for r in wanted], sizes)
    for request in requests:
        used = sum(buffer.nbytes for _, buffer in request.targets)
        assert 0 < request.range.n_bytes <= sizes.part_bytes
        assert request.range.n_bytes - used <= sizes.gap_bytes * (len(request.targets) - 1)
        ends = [offset + buffer.nbytes for offset, buffer in request.targets]
        assert request.targets[0][0] == 0
        assert ends[-1] == request.range.n_bytes
        assert all(end <= offset for end, (offset, _) in zip(ends, request.targets[1:], strict=False))
    assert [r.range.start for r in requests] == sorted(r.range.start for r in requests)


def test_a_long_span_is_split_into_nearly_equal_requests():
    requests = plan_requests([(ByteRange(0, 17), memoryview(bytearray(17)))], RequestSizes(0, 8))
    assert [r.range.n_bytes for r in requests] == [6, 6, 5]


def test_a_buffer_of_other_items_than_bytes_is_refused():
    with pytest.raises(ValueError, match="flat bytes"):
        check_spans([(ByteRange(0, 4), memoryview(bytearray(4)).cast("i"))])


@pytest.mark.parametrize("deadline_s", [None, 1000.0])
def test_closing_a_store_ends_calls_that_wait_for_threads(deadline_s):
    pool, gate, begun, errors = worker_pool(1), threading.Event(), threading.Event(), []

    def read_one(request, landing):
        begun.set()
        assert gate.wait(30)

    def call():
        try:
            read_requests([1, 2, 3], read_one, pool, CallLimit("s3://bucket", "get", deadline_s, clock=SYSTEM_CLOCK))
        except StoreError as error:
            errors.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    assert begun.wait(30)  # one is under way, the others wait
    pool.drop()
    thread.join(10)
    gate.set()
    assert not thread.is_alive()
    assert "closed during" in str(errors[0])
    assert errors[0].retryable


def test_closing_a_store_between_two_requests_ends_the_call():
    pool, begun = worker_pool(1), []

    class Requests(list):
        def __iter__(self):
            yield self[0]
            pool.drop()
            yield from self[1:]

    def read_one(request, landing):
        begun.append(request)

    with pytest.raises(StoreError, match="closed during"):
        read_requests(Requests([1, 2, 3]), read_one, pool, CallLimit("s3://bucket", "get", None, clock=SYSTEM_CLOCK))
    assert not {2, 3} & set(begun)
