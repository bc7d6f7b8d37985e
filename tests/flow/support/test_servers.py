"""The servers that tests and the demo use."""

from __future__ import annotations

import http.client
import os
import socket
import urllib.error
import urllib.request

import pytest
from tests.support.http_server import HttpFault, HttpFaultServer, RandomFaults

from tiercache.demo.s3_server import S3Server, free_ports, weed_binary
from tiercache.store import open_store


@pytest.fixture
def server():
    with HttpFaultServer({"a b": b"0123456789"}) as server:
        yield server


def ask(server, path="/a%20b", method="GET", body=None, **header):
    request = urllib.request.Request(
        server.url + path, body, {name.replace("_", "-"): value for name, value in header.items()}, method=method
    )
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=5) as answer:
            return answer.status, answer.read(), dict(answer.headers)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(), dict(error.headers)


def test_the_http_server_serves_ranges(server):
    for asked, status, body in (
        ("bytes=2-4", 206, b"234"),
        ("bytes=7-", 206, b"789"),
        ("bytes=-3", 206, b"789"),
        ("bytes=8-20", 206, b"89"),
        ("bytes=10-11", 416, b""),
        ("bytes=-0", 416, b""),
        ("lines=1-2", 200, b"0123456789"),
    ):
        assert ask(server, Range=asked)[:2] == (status, body), asked


def test_the_http_server_serves_objects_heads_and_conditions(server):
    status, body, header = ask(server)
    assert (status, body, header["ETag"]) == (200, b"0123456789", server.etag("a b"))
    assert ask(server, method="HEAD")[:2] == (200, b"")
    assert ask(server, "/none")[0] == 404
    assert ask(server, If_Match=header["ETag"])[0] == 200
    assert ask(server, If_Match='"other"')[0] == 412
    assert ask(server, "/new", "PUT", b"x", If_None_Match="*")[0] == 200
    assert ask(server, "/new", "PUT", b"y", If_None_Match="*")[0] == 412
    assert server.objects["new"] == b"x"
    assert ask(server, "/new", "DELETE")[0] == 204
    assert "new" not in server.objects
    assert [seen.status for seen in server.log] == [200, 200, 404, 200, 412, 200, 412, 204]
    assert server.n_bytes_sent == 20 + len(b"no such object") + len(b"changed")


def test_scripted_faults_apply_in_order_then_by_rule(server):
    server.when(lambda method, path: HttpFault("status", 404) if path == "/gone" else None)
    server.next(HttpFault("status", 418, body=b"teapot", header=(("Retry-After", "1"),)), None)
    status, body, header = ask(server)
    assert (status, body, header["Retry-After"]) == (418, b"teapot", "1")
    assert ask(server)[0] == 200
    assert ask(server, "/gone")[0] == 404


BROKEN = (ConnectionResetError, http.client.IncompleteRead, urllib.error.URLError)


def test_the_http_server_can_break_a_connection(server):
    for fault in (
        HttpFault("reset"),
        HttpFault("short", n_bytes=3),
        HttpFault("drop"),
        HttpFault("silence", pause_s=0.01),
    ):
        server.next(fault)
        with pytest.raises(BROKEN):
            ask(server)
        assert ask(server)[0] == 200


def test_the_http_server_can_answer_wrongly(server):
    server.next(HttpFault("wrong_length", n_bytes=2))
    status, body, header = ask(server, Range="bytes=2-7")
    assert (status, body, header["Content-Range"]) == (206, b"2345", "bytes 2-5/10")
    server.next(HttpFault("wrong_bytes"), HttpFault("etag"), HttpFault("drip", n_bytes=4, pause_s=0.001))
    status, body, header = ask(server)
    assert (status, header["ETag"]) == (200, server.etag("a b"))
    assert sorted(ours ^ sent for ours, sent in zip(b"0123456789", body, strict=True)) == [0] * 9 + [1]
    status, body, header = ask(server)
    assert (status, body) == (200, b"0123456789")
    assert header["ETag"] != server.etag("a b")
    assert ask(server)[:2] == (200, b"0123456789")
    server.next(HttpFault("whole"), HttpFault("replace"), HttpFault("replace", body=b"new"))
    assert ask(server, Range="bytes=0-1")[:2] == (200, b"0123456789")
    assert ask(server, Range="bytes=0-1")[:2] == (206, b"98")
    assert ask(server)[1] == b"new"


def test_a_long_body_has_more_bytes_than_its_header_announces(server):
    server.next(HttpFault("long", n_bytes=3))
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=5) as connection:
        connection.sendall(b"GET /a%20b HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        head, _, body = b"".join(iter(lambda: connection.recv(65536), b"")).partition(b"\r\n\r\n")
    assert b"Content-Length: 10" in head
    assert body == b"0123456789\0\0\0"


def test_a_stall_lasts_until_it_is_released(server):
    server.next(HttpFault("stall", n_bytes=4))
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=5)
    connection.request("GET", "/a%20b")
    answer = connection.getresponse()
    assert answer.read(4) == b"0123"
    server.release()
    assert answer.read() == b"456789"
    connection.close()


def test_a_folder_and_a_store_are_served_and_written(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a").write_bytes(b"0123456789")
    for objects in (tmp_path, open_store(tmp_path)):
        with HttpFaultServer(objects) as server:
            assert ask(server, "/in/a", Range="bytes=2-4")[:2] == (206, b"234")
            assert ask(server, "/../a")[0] == 404
            assert ask(server, "/in/b", "PUT", b"x", If_None_Match="*")[0] == 200
            assert ask(server, "/in/b", "PUT", b"y", If_None_Match="*")[0] == 412
            server.next(HttpFault("replace", body=b"new"))
            assert ask(server, "/in/b")[1] == b"new"
            assert ask(server, "/in/b", "DELETE")[0] == 204
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["a"]


def test_a_bucket_can_be_listed():
    with HttpFaultServer({"bucket/x/b&c": b"1", "bucket/x/a": b"22", "bucket/y": b"", "other/x/d": b""}) as server:
        store = open_store("s3://bucket/x", endpoint=server.url, anon=True, region="us-east-1")
        assert sorted((info.key, info.n_bytes) for info in store.list()) == [("a", 2), ("b&c", 1)]
        assert list(store.list("none/")) == []
        store.close()


def test_random_faults_follow_from_the_seed_and_the_number_of_the_request():
    kinds = [HttpFault("reset"), HttpFault("drip")]

    def drawn(seed, **more):
        rule = RandomFaults(kinds, 0.2, seed=seed, **more)
        return [rule("GET", "/a") for _ in range(1000)], rule

    first, rule = drawn(1)
    assert drawn(1)[0] == first != drawn(2)[0]
    assert (rule.n_requests, rule.n_faults) == (1000, sum(fault is not None for fault in first))
    assert 120 < rule.n_faults < 280
    assert {None, *kinds} == set(first)
    assert drawn(1, keys=lambda key: key == "b")[0] == [None] * 1000


@pytest.mark.s3
def test_the_s3_server_runs_in_its_own_process_group_and_on_free_ports(s3_server):
    assert s3_server.kind == "seaweedfs" if weed_binary() else "moto"
    assert s3_server.is_running
    assert os.getpgid(s3_server._process.pid) == s3_server._process.pid != os.getpgid(0)
    assert 0 < free_ports(4) < 55_536


def test_a_server_that_ends_at_once_is_an_error_with_its_log(tmp_path, monkeypatch):
    server = S3Server(tmp_path, kind="moto")
    monkeypatch.setattr(server, "_moto_command", lambda: ["sh", "-c", "echo it broke; exit 3"])
    with pytest.raises(RuntimeError, match="it broke"):
        server.start()
