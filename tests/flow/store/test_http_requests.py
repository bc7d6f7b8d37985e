"""What a store sends when requests hang, break or are throttled: over HTTP and S3, against a server that misbehaves."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support.clock import FakeClock
from tests.support.http_server import HttpFault
from tests.support.store_suite import pattern, read_ranges

from tiercache.errors import ObjectChanged, StoreError
from tiercache.model import ByteRange
from tiercache.store import CloudStore
from tiercache.store.access import CloudOptions
from tiercache.store.obstore import BucketFolder
from tiercache.store.remote import ReadSettings
from tiercache.waiting import SYSTEM_CLOCK, wait_for

MIB = 1 << 20
DATA = pattern(3 * MIB)
WHOLE = [ByteRange(0, len(DATA))]


@pytest.fixture
def make(http_server):
    """A store of the fault server: S3 in all but the signature."""
    http_server.objects = {"bucket/a": DATA, "a": DATA}
    made = []

    def build(clock=None, **options):
        given = {"endpoint": http_server.url, "anon": True, "region": "us-east-1", **options}
        reading = ReadSettings(clock=FakeClock() if clock is None else clock)
        made.append(
            CloudStore(BucketFolder("s3", "bucket", "", "s3://bucket"), CloudOptions.parse("s3", given), reading)
        )
        return made[-1]

    yield build
    http_server.release()
    for store in made:
        store.close()


REQUESTS_AT_EXIT = """
import atexit, sys
from tiercache.model import ByteRange
from tiercache.store import open_store

def read():
    buffers = [memoryview(bytearray(1 << 20)) for _ in range(3)]
    spans = [(ByteRange(n << 20, (n + 1) << 20), buffer) for n, buffer in enumerate(buffers)]
    store.read_into("a", spans, if_match=store.head("a").etag)
    sys.stdout.buffer.write(b"".join(buffers))
    sys.stdout.flush()

store = open_store(sys.argv[1])
atexit.register(read)
"""


def test_a_store_can_be_read_while_python_ends(http_server):
    http_server.objects = {"a": DATA}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", REQUESTS_AT_EXIT, http_server.url], capture_output=True, check=False
    )
    assert (done.returncode, done.stderr.decode()) == (0, "")
    assert done.stdout == DATA


@pytest.mark.parametrize("end", ["cancel", "close"])
def test_the_end_of_a_read_closes_its_connection_although_the_body_trickles(http_server, make, end):
    cancel, store = threading.Event(), make()

    def rule(_method, _path):
        (cancel.set if end == "cancel" else store.close)()  # the request has come
        return HttpFault("drip", n_bytes=100, pause_s=0.1)

    http_server.when(rule)
    with pytest.raises(StoreError, match="cancelled" if end == "cancel" else "closed during the call"):
        store.read_into("a", [(ByteRange(0, MIB), memoryview(bytearray(MIB)))], cancel=cancel)
    assert wait_for(lambda: not http_server.n_connections, 30), "the client has not closed the connection"


@pytest.mark.parametrize("kind", ["reset", "short"])
def test_after_a_broken_body_the_rest_is_requested(http_server, make, kind):
    http_server.next(HttpFault(kind, n_bytes=2 * MIB + 5))
    store = make()
    assert read_ranges(store, "a", WHOLE) == [DATA]
    first, second = (seen.range for seen in http_server.log)
    assert first == f"bytes=0-{len(DATA) - 1}"
    start = int(second.removeprefix("bytes=").partition("-")[0])
    # A reset may discard bytes that had arrived.
    assert (MIB if kind == "short" else 0) <= start <= 2 * MIB + 5
    assert second.endswith(f"-{len(DATA) - 1}")
    assert http_server.log[1].if_match is not None, "of the same version"
    assert store.counters["retries"] == 1


@given(st.lists(st.tuples(st.integers(0, 80), st.integers(1, 400)), min_size=1, max_size=6))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_pieces_of_a_range_come_in_order_whatever_gaps_lie_between_the_ranges(http_server, make, sizes):
    """The store reads short gaps between ranges, and must not split a range between two requests."""
    http_server.next(HttpFault("reset", n_bytes=600_000), HttpFault("short", n_bytes=3), HttpFault("status", 503))
    ranges, at = [], 0
    for gap, length in sizes:
        start = at + gap * 1024
        at = start + length * 1024
        if at <= len(DATA):
            ranges.append(ByteRange(start, at))
    received = {one.start: b"" for one in ranges}
    lock = threading.Lock()

    def receive(offset, data):
        with lock:
            start = max(start for start in received if start <= offset)
            assert offset == start + len(received[start])
            received[start] += bytes(data)

    make().read_pieces("a", ranges, receive)
    assert received == {one.start: DATA[one.start : one.end] for one in ranges}


def test_a_body_that_breaks_again_and_again_arrives_in_the_end(http_server, make):
    http_server.when(lambda method, path: HttpFault("short", n_bytes=MIB + 70_000))
    clock = FakeClock()
    assert read_ranges(make(clock), "a", WHOLE) == [DATA]
    assert len(http_server.log) <= 6
    assert all(slept_s <= 0.1 for slept_s in clock.slept), "each attempt made progress"


def test_the_rest_of_a_replaced_object_is_never_joined_to_the_old_beginning(http_server, make):
    http_server.next(HttpFault("reset", n_bytes=2 * MIB), HttpFault("replace"))
    with pytest.raises(ObjectChanged):
        read_ranges(make(), "a", WHOLE)


def test_a_request_that_hangs_is_hedged(http_server, make):
    store = make(SYSTEM_CLOCK)
    calls = {
        "head": lambda: store.head("a").n_bytes == len(DATA),
        "get": lambda: store.get("a") == DATA,
        "read_tail": lambda: store.read_tail("a", 100)[0] == DATA[-100:],
        "read_into": lambda: read_ranges(store, "a", [ByteRange(0, 1000)]) == [DATA[:1000]],
    }
    for name, call in calls.items():
        before = store.counters["hedges"] + store.counters["retries"]
        for _ in range(30):
            store.read_tail("a", 10)
        http_server.next(HttpFault("silence"))
        assert call(), name  # long before the server's stall or the client's timeout ends
        # On a loaded machine, an earlier request may have been late and have used the hedge.
        assert store.counters["hedges"] + store.counters["retries"] > before, name


def test_a_body_that_stalls_is_hedged_and_its_rest_is_requested(http_server, make):
    store = make(SYSTEM_CLOCK)
    for _ in range(30):
        read_ranges(store, "a", WHOLE)
    n_before = len(http_server.log)
    http_server.next(HttpFault("stall", n_bytes=2 * MIB + 300_000))
    assert read_ranges(store, "a", WHOLE) == [DATA]
    rest = [seen for seen in http_server.log[n_before:] if not seen.range.startswith("bytes=0-")]
    assert rest
    assert all(seen.n_bytes < 2 * MIB for seen in rest)


def test_throttled_requests_are_counted_and_repeated(http_server, make):
    clock = FakeClock()
    store = make(clock)
    http_server.next(
        *[HttpFault("status", 503, body=b"<Error><Code>SlowDown</Code></Error>")] * 3, HttpFault("status", 429)
    )
    assert store.get("a") == DATA
    counters = store.counters.snapshot()
    assert (counters["throttled"], counters["retries"], counters["requests"]) == (4, 4, 5)
    assert len(clock.slept) == 4


def test_an_error_of_the_receiver_ends_the_read_and_is_no_error_of_the_store(http_server, make):
    def receive(offset, data):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left") as caught:
        make().read_pieces("a", WHOLE, receive)
    assert not isinstance(caught.value, StoreError)
    assert len(http_server.log) == 1, "it is not repeated"
