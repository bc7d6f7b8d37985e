"""The servers that tests and the demo use."""

from __future__ import annotations

import os
import socket
import urllib.error
import urllib.request

import pytest
from tests.support.http_server import HttpFault, HttpFaultServer, RandomFaults
from tests.support.s3_server import S3Server, free_ports


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
    assert os.getpgid(s3_server._process.pid) == s3_server._process.pid != os.getpgid(0)
    assert 0 < free_ports(4) < 55_536


def test_a_server_that_ends_at_once_is_an_error_with_its_log(tmp_path, monkeypatch):
    server = S3Server(tmp_path, kind="moto")
    monkeypatch.setattr(server, "_moto_command", lambda: ["sh", "-c", "echo it broke; exit 3"])
    with pytest.raises(RuntimeError, match="it broke"):
        server.start()
