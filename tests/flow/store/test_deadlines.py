"""How long a call may last, and what is said while it does."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from tests.support.clock import FakeClock
from tests.support.http_server import HttpFault, HttpFaultServer
from tests.support.store_suite import pattern, read_ranges

from tiercache.errors import StoreError
from tiercache.model import ByteRange
from tiercache.store import CloudStore, open_store
from tiercache.store.access import CallOptions, CloudOptions
from tiercache.store.archive import S3StorageClasses
from tiercache.store.fsspec import FsspecStore
from tiercache.store.obstore import BucketFolder, to_store_error
from tiercache.store.remote import ReadSettings
from tiercache.waiting import fail_fast_if_unreachable

MIB = 1 << 20
DATA = pattern(3 * MIB)
# The server's stalls end after 60 s; a call that ends long before has not waited for that.
GATE_S = 30


@pytest.fixture
def opened(http_server):
    """Opens S3 stores of the fault server."""
    http_server.objects = {"bucket/a": DATA}
    made = []

    def build(tuning=None, **options):
        given = {"endpoint": http_server.url, "anon": True, "region": "us-east-1", **options}
        place = BucketFolder("s3", "bucket", "", "s3://bucket")
        made.append(CloudStore(place, CloudOptions.parse("s3", given), tuning))
        return made[-1]

    yield build
    http_server.release()
    for store in made:
        store.close()


CALLS = {
    "get": lambda store: store.get("a"),
    "head": lambda store: store.head("a"),
    "read_tail": lambda store: store.read_tail("a", 2 * MIB),
    "read_into": lambda store: read_ranges(store, "a", [ByteRange(0, MIB)]),
    "read_into, many": lambda store: read_ranges(store, "a", [ByteRange(0, 10), ByteRange(2 * MIB, 3 * MIB)]),
    "put": lambda store: store.put("b", b"x"),
    "put_if_absent": lambda store: store.put_if_absent("b", b"x"),
    "delete": lambda store: store.delete(["a"]),
    "list": lambda store: list(store.list()),
}


def failures(calls):
    """Make calls at once, and return the StoreError of each by its name."""

    def error_of(call):
        with pytest.raises(StoreError) as caught:
            call()
        return caught.value

    started_s = time.monotonic()
    with ThreadPoolExecutor(len(calls)) as pool:
        errors = dict(zip(calls, pool.map(error_of, calls.values()), strict=True))
    assert time.monotonic() - started_s < GATE_S
    return errors


def test_a_server_that_never_answers_ends_a_call_after_its_timeout(http_server, opened):
    pytest.importorskip("boto3")
    http_server.when(lambda method, path: HttpFault("silence"))
    archive = S3StorageClasses(opened(timeout=0.5))
    store = opened(timeout=0.5)
    errors = failures(
        {name: partial(call, store) for name, call in CALLS.items()} | {"class": lambda: archive.head("a")}
    )
    archive.close()
    for name, error in errors.items():
        assert http_server.url in str(error), name
        assert error.retryable, name


def test_a_body_that_stalls_ends_a_call_after_its_timeout(http_server, opened):
    http_server.when(lambda method, path: HttpFault("stall", n_bytes=5))
    store = opened(timeout="0.5")
    names = ("get", "read_tail", "read_into", "read_into, many")
    for name, error in failures({name: partial(CALLS[name], store) for name in names}).items():
        assert http_server.url in str(error), name


def test_a_file_system_that_never_answers_ends_a_call_after_its_timeout():
    gate = threading.Event()

    class Silent(MemoryFileSystem):
        cachable = False

        def _wait(self, *_args, **_kwargs):
            gate.wait(60)
            raise OSError("the gate is open")

        cat_file = info = find = _wait

    store = FsspecStore("/folder", "silent://folder", {}, CallOptions(timeout_s=0.3), Silent)
    names = ("get", "head", "read_into", "list")
    for name, error in failures({name: partial(CALLS[name], store) for name in names}).items():
        assert "nothing came from silent://folder for 0.3 s" in str(error), name
    assert not gate.is_set()
    gate.set()
    store.close()


def test_a_read_may_take_any_time_while_bytes_arrive(http_server, opened):
    clock = FakeClock()
    http_server.when(lambda method, path: clock.advance(40))
    store = opened(ReadSettings(clock=clock, n_requests=1, max_gap_bytes=0, max_bytes=MIB), timeout=60)
    assert read_ranges(store, "a", [ByteRange(0, 3 * MIB)]) == [DATA]


SUSPENDED = """
import sys
from tiercache.store import open_store
store = open_store(sys.argv[1], timeout=1.5)
print(len(store.get("a")), flush=True)
"""


@pytest.mark.parametrize("fault", [HttpFault("stall"), HttpFault("silence")], ids=["goes_on", "is_lost"])
def test_a_process_that_was_suspended_for_longer_than_the_timeout_goes_on(http_server, fault):
    begun = threading.Event()

    def rule(_method, _path):
        is_first = not begun.is_set()
        begun.set()
        return fault if is_first else None

    http_server.objects = {"a": DATA}
    http_server.when(rule)
    with subprocess.Popen(
        [sys.executable, "-c", SUSPENDED, http_server.url], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert begun.wait(60)
        process.send_signal(signal.SIGSTOP)
        assert not threading.Event().wait(3)  # longer than the timeout
        process.send_signal(signal.SIGCONT)
        assert not threading.Event().wait(0.3)  # the process looks at its call before the answer comes
        http_server.release()
        out, errors = process.communicate(timeout=60)
    assert (out, errors) == (f"{len(DATA)}\n", "")


def test_timeouts_of_the_http_client_are_at_most_that_of_the_call():
    options = CloudOptions.parse("s3", {"timeout": 3})
    for client in (options.for_obstore(), options.for_obstore_uploads()):
        assert client["connect_timeout"].total_seconds() == 3
        assert client["timeout"].total_seconds() >= 60, "of a request that brings bytes all the time"
    assert options.for_obstore_uploads()["read_timeout"].total_seconds() == options.stall_s == 3
    assert CloudOptions.parse("s3", {}).stall_s < CallOptions().timeout_s, "a stall is tried again"
    assert CloudOptions.parse("s3", {"timeout": 3, "read_timeout": 5}).for_obstore()["read_timeout"].seconds == 3


# Reports


# Nobody there


@pytest.fixture
def nobody():
    """The URL of a server that is gone."""
    with HttpFaultServer() as server:
        return server.url


@pytest.mark.parametrize("endpoint", ["nobody", "http://no-such-host.invalid"])
def test_a_command_fails_at_once_if_nothing_listens_at_the_endpoint(request, opened, endpoint):
    endpoint = request.getfixturevalue("nobody") if endpoint == "nobody" else endpoint
    clock = FakeClock()
    store = opened(ReadSettings(clock=clock), endpoint=endpoint)
    with fail_fast_if_unreachable(), pytest.raises(StoreError, match=f"cannot connect to {endpoint}"):
        store.get("a")
    assert clock.slept == []
    with pytest.raises(StoreError, match=f"cannot connect to {endpoint}"):
        store.get("a")
    assert len(clock.slept) > 3, "a training waits for a store that restarts"


def test_a_command_retries_an_endpoint_that_has_answered_before(http_server, opened):
    clock = FakeClock()
    store = opened(ReadSettings(clock=clock))
    with fail_fast_if_unreachable():
        store.get("a")
        http_server.__exit__()
        with pytest.raises(StoreError, match="cannot connect"):
            store.get("a")
    assert len(clock.slept) > 3


def test_an_archive_names_the_endpoint_that_it_cannot_connect_to(nobody, opened):
    pytest.importorskip("boto3")
    archive = S3StorageClasses(opened(endpoint=nobody))
    with fail_fast_if_unreachable(), pytest.raises(StoreError, match=f"cannot connect to {nobody}") as caught:
        archive.head("a")
    assert caught.value.retryable
    archive.close()


# Reasons


REASONS = {
    b"<Error><Code>ExpiredToken</Code><Message>too old</Message></Error>": "ExpiredToken: too old",
    b'{"error": {"code": 401, "status": "UNAUTHENTICATED", "message": "no"}}': "UNAUTHENTICATED: no",
    b'{"error": "invalid_grant", "error_description": "Token expired"}': "invalid_grant: Token expired",
    b"<html><body>a page</body></html>": "HTTP 400 Bad Request$",
    b"{": "HTTP 400 Bad Request: {$",
}


def test_the_reason_of_a_refusal_is_read_from_the_body(http_server):
    store = open_store(http_server.url)
    for body, reason in REASONS.items():
        http_server.next(HttpFault("status", 400, body=body))
        with pytest.raises(StoreError, match=reason):
            store.get("a")
    store.close()


def test_an_error_always_names_the_server():
    text = "Generic S3 error: HTTP error: body\n\nDebug source:\nHttpError {\n    kind: Timeout,\n}"
    error = to_store_error(RuntimeError(text), "get", "s3://b/a", "http://e")
    assert "http://e" in str(error)
    assert error.retryable
