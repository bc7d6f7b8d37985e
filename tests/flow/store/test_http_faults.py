"""What goes wrong on the wire, scripted: HTTP and S3 through obstore against a server that misbehaves."""

from __future__ import annotations

import itertools
import threading
import time

import pytest
from tests.support.clock import FakeClock
from tests.support.http_server import HttpFault
from tests.support.store_suite import ReadSuite, pattern, read_ranges

from tiercache.errors import NotFound, ObjectChanged, StoreError
from tiercache.model import ByteRange
from tiercache.store import CloudStore, open_store
from tiercache.store.access import CloudOptions
from tiercache.store.contract import read_unpinned
from tiercache.store.obstore import BucketFolder
from tiercache.store.remote import ReadSettings, RetryPolicy
from tiercache.waiting import SYSTEM_CLOCK, wait_for

MIB = 1 << 20
DATA = pattern(3 * MIB)
WHOLE = [ByteRange(0, len(DATA))]


class TestHttpReadOnly(ReadSuite):
    @pytest.fixture
    def store(self, http_server):
        self.server = http_server
        store = open_store(f"{http_server.url}/folder")
        assert isinstance(store, CloudStore)
        yield store
        store.close()

    def raw_put(self, store, key, data):
        self.server.objects[f"folder/{key}"] = data


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def make(http_server, clock):
    """A store of the fault server whose retries take no time: http, or S3 in all but the signature."""
    made = []

    def build(cloud="http", **tuning):
        tuning = {"policy": RetryPolicy(), "clock": clock, **tuning}
        if cloud == "http":
            options = CloudOptions.parse("http", {"read_timeout": 5})
            place = BucketFolder("http", http_server.url, "", http_server.url)
        else:
            given = {"endpoint": http_server.url, "anon": True, "region": "us-east-1", "disable_bulk_delete": True}
            options = CloudOptions.parse("s3", given)
            place = BucketFolder("s3", "bucket", "", "s3://bucket")
        made.append(CloudStore(place, options, ReadSettings(**tuning)))
        return made[-1]

    yield build
    for store in made:
        store.close()


SCRIPTS = [
    [HttpFault("status", 503)],
    [HttpFault("status", 500), HttpFault("status", 429), HttpFault("status", 502)],
    [HttpFault("reset")],
    [HttpFault("reset", n_bytes=0)],
    [HttpFault("short", n_bytes=1000)],
    [HttpFault("whole")],
    [HttpFault("wrong_length")],
    [HttpFault("drop")],
    [HttpFault("reset"), HttpFault("short"), HttpFault("status", 504), HttpFault("drop")],
]


@pytest.mark.parametrize("cloud", ["http", "s3"])
def test_a_temporary_fault_is_retried(http_server, make, clock, cloud):
    http_server.objects = {"a": DATA, "bucket/a": DATA}
    store = make(cloud)
    for script in SCRIPTS:
        n_slept, n_seen = len(clock.slept), len(http_server.log)
        http_server.next(*script)
        assert read_ranges(store, "a", WHOLE) == [DATA], script
        assert len(clock.slept) - n_slept == len(script)
        assert len(http_server.log) - n_seen + sum(fault.kind == "drop" for fault in script) == len(script) + 1, script


def test_the_last_error_names_the_operation_and_the_answer(http_server, make, clock):
    http_server.objects = {"a": DATA}
    body = b"<Error><Code>SlowDown</Code><Message>Please reduce your rate</Message></Error>"
    http_server.when(lambda method, path: HttpFault("status", 503, body=body))
    with pytest.raises(StoreError, match=r"/a: read_into: HTTP 503 .*SlowDown: Please reduce") as caught:
        read_ranges(make(policy=RetryPolicy(n_attempts=4)), "a", WHOLE)
    assert caught.value.retryable
    assert caught.value.status == 503
    assert len(http_server.log) == 4
    assert len(clock.slept) == 3
    assert all(0 <= slept_s <= 0.4 for slept_s in clock.slept)


def test_the_last_error_says_how_long_was_tried_and_which_setting_limits_it(http_server, make, clock):
    http_server.when(lambda method, path: HttpFault("status", 503))
    started_s = clock.monotonic()
    with pytest.raises(StoreError, match=r"HTTP 503 .*; gave up after ([0-9]+) attempts in [0-9]+ s; ") as caught:
        make().get("a")
    assert f"gave up after {len(http_server.log)} attempts in {clock.monotonic() - started_s:.0f} s" in str(
        caught.value
    )
    assert str(caught.value).endswith("; the storage option timeout=60 limits the seconds without a byte")


def test_a_server_without_ranges_is_not_asked_until_the_timeout(http_server, make):
    http_server.objects = {"a": DATA}
    http_server.when(lambda method, path: HttpFault("whole"))
    with pytest.raises(StoreError, match="it may not support range requests"):
        read_ranges(make(), "a", [ByteRange(1, 10)])
    assert len(http_server.log) == 4


def test_a_permanent_refusal_is_not_retried(http_server, make):
    store = make()
    for number, status in enumerate((400, 401, 403, 405), start=1):
        http_server.next(HttpFault("status", status))
        with pytest.raises(StoreError) as caught:
            store.get("a")
        assert (caught.value.retryable, caught.value.status) == (False, status)
        assert len(http_server.log) == number


def test_an_object_replaced_between_two_ranges_is_an_error(http_server, make):
    http_server.objects = {"a": DATA}
    store = make(max_gap_bytes=0, max_bytes=MIB)
    http_server.next(None, HttpFault("replace"))
    with pytest.raises(ObjectChanged) as caught:
        read_ranges(store, "a", WHOLE)
    assert not caught.value.retryable


def test_read_tail_is_one_request(http_server, make):
    http_server.objects = {"a": DATA}
    make().read_tail("a", 64)
    assert [(seen.method, seen.range) for seen in http_server.log] == [("GET", "bytes=-64")]


def _wait_for_workers():
    for thread in threading.enumerate():
        if thread.name.startswith("tiercache-store"):
            thread.join(10)


@pytest.mark.parametrize("how", ["deadline", "cancel"])
def test_a_stalled_read_ends_in_time_and_nothing_is_written_after_it(http_server, make, how):
    http_server.objects = {"a": DATA}
    http_server.when(lambda method, path: HttpFault("stall", n_bytes=2 * MIB + 5))
    store = open_store(http_server.url)
    buffer = bytearray(len(DATA))
    cancel = threading.Event()
    timer = threading.Timer(0.3, cancel.set)
    timer.start()
    started_s = time.monotonic()
    with pytest.raises(StoreError) as caught:
        store.read_into(
            "a",
            [(WHOLE[0], memoryview(buffer))],
            deadline_s=0.3 if how == "deadline" else None,
            cancel=cancel if how == "cancel" else None,
        )
    assert time.monotonic() - started_s < 3
    assert caught.value.retryable
    seen = bytes(buffer)
    assert seen != DATA
    timer.join()
    http_server.release()
    store.close()
    _wait_for_workers()
    assert bytes(buffer) == seen


def test_a_conditional_put_with_a_lost_answer_is_not_repeated(http_server, make):
    store = make("s3")
    http_server.next(HttpFault("lost_answer"))
    with pytest.raises(StoreError) as caught:
        store.put_if_absent("a", b"mine")
    assert caught.value.maybe_done
    assert http_server.objects == {"bucket/a": b"mine"}
    assert [seen.method for seen in http_server.log] == ["PUT"]


def test_a_conditional_put_is_repeated_if_the_server_did_not_execute_it(http_server, make):
    store = make("s3")
    for key, code in {"a": "ConditionalRequestConflict", "b": "OperationAborted"}.items():
        conflict = f"<Error><Code>{code}</Code></Error>".encode()
        http_server.next(HttpFault("status", 503), HttpFault("status", 409, body=conflict))
        assert store.put_if_absent(key, b"mine") is True
        http_server.next(HttpFault("status", 409, body=conflict))
        assert store.put_if_absent(key, b"mine") is False
        assert http_server.objects[f"bucket/{key}"] == b"mine"


def test_put_and_delete_are_repeated(http_server, make):
    store = make("s3")
    http_server.next(HttpFault("lost_answer"), None)
    assert store.put("a", b"x").n_bytes == 1
    http_server.next(HttpFault("lost_answer"), HttpFault("status", 500), None)
    store.delete(["a"])
    assert http_server.objects == {}


def test_a_listing_over_plain_http_is_refused_at_once(http_server, make):
    with pytest.raises(StoreError, match="list: HTTP 501") as caught:
        list(make().list())
    assert not caught.value.retryable


def test_a_missing_bucket_is_named(http_server, make):
    http_server.next(HttpFault("status", 404, body=b"<Error><Code>NoSuchBucket</Code></Error>"))
    with pytest.raises(NotFound, match="no such bucket"):
        make("s3").get("a")
    http_server.next(HttpFault("status", 404, body=b"<Error><Code>NoSuchBucket</Code></Error>"))
    with pytest.raises(NotFound, match="no such bucket"):
        list(make("s3").list())


def test_an_operation_that_http_lacks_is_reported(make):
    with pytest.raises(StoreError, match="not supported") as caught:
        make().put_if_absent("a", b"x")
    assert not caught.value.retryable


def test_no_error_contains_secrets_of_the_url(http_server):
    url = http_server.url.replace("http://", "http://user:s3cret@")
    store = open_store(url)
    http_server.when(lambda method, path: HttpFault("status", 403))
    with pytest.raises(StoreError) as caught:
        store.get("a")
    http_server.__exit__()
    with pytest.raises(StoreError) as gone:
        store.read_into("a", [(ByteRange(0, 1), memoryview(bytearray(1)))], deadline_s=0.2)
    shown = "".join(map(repr, (store, store.url, store.client))) + str(caught.value) + str(gone.value)
    assert "s3cret" not in shown
    assert "user" not in shown
    store.close()


def test_closing_a_store_ends_its_retries(http_server, make):
    """Else who reads ahead for nobody would ask a server that is gone for half a minute."""
    http_server.objects = {"a": DATA}
    http_server.when(lambda method, path: HttpFault("status", 503))
    tuning = {"policy": RetryPolicy(n_attempts=99, first_s=60.0, longest_s=60.0), "clock": SYSTEM_CLOCK}
    store, errors = make(**tuning), []
    ranges = [ByteRange(0, 10), ByteRange(len(DATA) - 10, len(DATA))]

    def read():
        try:
            read_ranges(store, "a", ranges)
        except StoreError as error:
            errors.append(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    wait_for(lambda: len(http_server.log) >= len(ranges), 10)
    store.close()
    thread.join(10)
    assert not thread.is_alive()
    assert errors[0].retryable
    http_server.when(lambda method, path: None)
    assert read_ranges(store, "a", WHOLE) == [DATA]


def test_bytes_with_checksums_can_be_read_from_replicas_with_different_etags(http_server, make):
    """Nginx builds the ETag of a file from its time: the same object has another ETag on each replica."""
    http_server.objects = {"a": DATA}
    numbers = itertools.count()
    http_server.when(lambda method, path: HttpFault("etag") if next(numbers) % 2 else None)
    store = make(max_gap_bytes=0, max_bytes=MIB)
    ranges = [ByteRange(0, 10), ByteRange(MIB, 2 * MIB), ByteRange(5, len(DATA))]
    with pytest.raises(ObjectChanged):
        read_ranges(store, "a", ranges)
    buffers = [bytearray(wanted.n_bytes) for wanted in ranges]
    store = make()
    read_unpinned(store, "a", [(wanted, memoryview(buffer)) for wanted, buffer in zip(ranges, buffers, strict=True)])
    assert buffers == [DATA[wanted.start : wanted.end] for wanted in ranges]
