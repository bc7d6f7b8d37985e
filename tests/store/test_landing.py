"""Requests side by side: what a closed store does to those that no thread has taken yet."""

from __future__ import annotations

import threading

import pytest

from tiercache.errors import StoreError
from tiercache.store.range_reads import read_requests, worker_pool
from tiercache.store.retry import CallLimit
from tiercache.waiting import SYSTEM_CLOCK


@pytest.mark.parametrize("deadline_s", [None, 1000.0])
def test_a_call_whose_requests_wait_for_threads_ends_when_the_store_is_closed(deadline_s):
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


def test_a_store_that_is_closed_between_two_requests_ends_the_call_and_leaves_no_thread():
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
