"""Stores that ignore the condition of a put: commits are refused there, unless one process writes at a time."""

from __future__ import annotations

import pickle
from urllib.parse import unquote, urlsplit

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from tests.support.http_server import HttpFault

import tiercache as tc
from tiercache.errors import CommitConflict, StoreError
from tiercache.store import open_store
from tiercache.store.access import CallOptions
from tiercache.store.fsspec import FsspecStore
from tiercache.store.numbered_log import NumberedLog

SCHEMA = {"id": "int64"}


def options(server, **more):
    return {"endpoint": server.url, "region": "us-east-1", "anon": True, "disable_bulk_delete": True, **more}


def write(url, given, mode="create", first=0):
    with tc.Writer(url, schema=SCHEMA, mode=mode, storage_options=given) as writer:
        writer.write_batch({"id": [first, first + 1]})


def ignore_conditions(_method, _path):
    return HttpFault("unconditional")


def refuse_conditions(method, _path):
    return HttpFault("status", 501, body=b"<Error><Code>NotImplemented</Code></Error>") if method == "PUT" else None


@pytest.mark.parametrize("rule", [ignore_conditions, refuse_conditions])
def test_a_writer_is_refused_before_it_writes_where_the_store_lacks_conditional_puts(http_server, rule):
    http_server.when(rule)
    with pytest.raises(StoreError, match="single_writer") as caught:
        write("s3://bucket/data", options(http_server))
    assert not caught.value.retryable
    assert http_server.objects == {}, "nothing is left of the test of the store"


def test_a_single_writer_may_commit_there_and_still_replaces_nothing(http_server):
    http_server.when(ignore_conditions)
    given = options(http_server, single_writer=True)
    write("s3://bucket/data", given)
    with pytest.raises(CommitConflict):
        write("s3://bucket/data", given)
    write("s3://bucket/data", given, mode="append", first=2)
    dataset = tc.Dataset("s3://bucket/data", cache=False, storage_options=given)
    assert [record["id"] for record in dataset] == [0, 1, 2, 3]
    dataset.close()
    assert not any(seen.headers.get("if-none-match") for seen in http_server.log)


def test_the_second_of_two_puts_of_a_single_writer_is_refused(http_server):
    http_server.when(ignore_conditions)
    store = open_store("s3://bucket", **options(http_server, single_writer="yes"))
    store = pickle.loads(pickle.dumps(store))
    assert store.put_if_absent("a", b"1")
    assert not store.put_if_absent("a", b"2")
    with store.create("a") as upload:
        upload.put_part(0, b"3")
        assert upload.complete(if_absent=True) is None
    assert http_server.objects == {"bucket/a": b"1"}
    store.close()


def test_a_store_is_tested_once_in_a_process_and_nothing_is_left_of_it(http_server):
    store = open_store("s3://bucket", **options(http_server))
    log = NumberedLog(store, "log/")
    for number in (1, 2):
        assert log.put(number, b"x")
    assert not log.put(2, b"y")
    methods = [(seen.method, seen.status) for seen in http_server.log]
    assert methods[:4] == [("PUT", 200), ("PUT", 412), ("DELETE", 204), ("PUT", 200)]
    assert len(methods) == 7, "the two further puts and the reading back"
    assert sorted(key.rpartition("/")[2] for key in http_server.objects) == [f"{n:020d}" for n in (1, 2)]
    store.close()


def test_a_test_whose_answer_is_lost_goes_on(http_server):
    store = open_store("s3://bucket", **options(http_server))
    http_server.next(HttpFault("lost_answer"))
    store.require_conditional_put()
    assert [seen.method for seen in http_server.log] == ["PUT", "PUT", "DELETE"]
    store.close()


def test_a_test_whose_answers_are_all_lost_decides_nothing(http_server):
    store = open_store("s3://bucket", **options(http_server))
    http_server.next(HttpFault("lost_answer"), HttpFault("drop"))
    with pytest.raises(StoreError, match="answer was lost") as caught:
        store.require_conditional_put()
    assert caught.value.retryable
    store.require_conditional_put()
    store.close()


def test_an_error_of_the_test_that_says_nothing_about_conditions_is_raised_as_it_is(http_server):
    http_server.when(lambda method, path: HttpFault("status", 403))
    store = open_store("s3://bucket", **options(http_server))
    with pytest.raises(StoreError, match="403") as caught:
        store.require_conditional_put()
    assert "single_writer" not in str(caught.value)
    store.close()


SERVERS = [
    ("s3://b", {"region": "eu-north-1"}, True),
    ("s3://b", {"endpoint": "https://b.s3.eu-north-1.amazonaws.com"}, True),
    ("gs://b", {}, True),
    ("az://b", {"account_name": "a"}, True),
    ("s3://b", {"endpoint": "https://minio.example"}, False),
    ("s3://b", {"endpoint": "https://amazonaws.com.example"}, False),
    ("gs://b", {"base_url": "http://localhost:1"}, False),
    ("http://localhost:1", {}, False),
]


def test_only_servers_that_are_not_the_clouds_own_are_tested():
    for url, given, known in SERVERS:
        store = open_store(url, **given)
        assert store.knows_conditional_put == known, (url, given)
        if known:
            store.require_conditional_put()
            assert store.counters.snapshot()["requests"] == 0
        store.close()


@pytest.mark.parametrize("ignores", [True, False])
def test_a_file_system_that_ignores_create_is_refused(ignores):
    class Ignoring(MemoryFileSystem):
        cachable, store, pseudo_dirs = False, {}, [""]

        def pipe_file(self, path, value, mode="overwrite", **_options):
            super().pipe_file(path, value, mode="overwrite" if ignores else mode)

    store = FsspecStore("/folder", "ignoring://folder", {}, make=Ignoring)
    if ignores:
        with pytest.raises(StoreError, match="single_writer"):
            NumberedLog(store, "log/").put(1, b"x")
    else:
        assert NumberedLog(store, "log/").put(1, b"x")
    store.close()
    single = FsspecStore("/folder", "ignoring://folder", {}, CallOptions(is_single_writer=True), Ignoring)
    assert NumberedLog(single, "log/").put(2, b"x")
    single.close()


def test_googles_client_sends_the_condition_of_google(http_server):
    def admit(path, headers):
        exists = unquote(urlsplit(path).path).lstrip("/") in http_server.objects
        return HttpFault("status", 412) if exists and headers.get("x-goog-if-generation-match") == "0" else None

    http_server.admit(admit)
    store = open_store("gs://bucket", base_url=http_server.url, bearer_token="t")
    assert store.put_if_absent("a", b"1")
    assert not store.put_if_absent("a", b"2")
    store.require_conditional_put()
    assert http_server.objects == {"bucket/a": b"1"}
    store.close()
