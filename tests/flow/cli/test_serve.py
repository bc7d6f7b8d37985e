"""The verb serve."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from contextlib import closing

import pytest
from tests.support.peer_machines import free_port

import tiercache as tc
from tiercache.waiting import wait_for

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
PROGRAM = (sys.executable, "-m", "tiercache.cli.app", "serve")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "at least one DATASET"),
        (["--token", "a b", "s3://bucket/x"], "a token of peers is 8 to 512"),
        (["--tls-cert", "cert.pem", "s3://bucket/x"], "--tls-cert and --tls-key"),
    ],
)
def test_incomplete_requests_are_errors_that_say_what_is_missing(tiercache, tmp_path, arguments, message):
    assert message in tiercache("serve", "--cache", tmp_path / "cache", *arguments, code=2).err


def test_a_data_set_that_does_not_exist_is_an_error_at_the_start(tiercache, tmp_path, data_set):
    found = tiercache("serve", "--cache", tmp_path / "cache", data_set, tmp_path / "absent", code=1)
    assert str(tmp_path / "absent") in found.err
    assert "serving" not in found.out


@pytest.fixture
def data_set(tmp_path):
    with tc.Writer(tmp_path / "ds", schema={"id": "int64"}) as writer:
        writer.write({"id": 0})
    return tmp_path / "ds"


@pytest.mark.skipif(NGINX is None, reason="nginx is not installed (package nginx-light)")
def test_serve_demands_the_configured_token_and_runs_until_it_is_told_to_stop(tmp_path, monkeypatch, data_set):
    monkeypatch.setenv("TIERCACHE_PEERS_TOKEN", "token-of-the-job")
    port = free_port()
    where = ["--cache", tmp_path / "cache", "--address", "127.0.0.1", "--port", port]
    command = [*PROGRAM, "--json", *where, data_set]
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True) as process:
        assert json.loads(process.stdout.readline())["event"] == "serving"
        for token, status in (("token-of-the-job", 404), ("another-token", 401)):
            request = urllib.request.Request(f"http://127.0.0.1:{port}/x", headers={"Authorization": f"Bearer {token}"})
            with pytest.raises(urllib.error.HTTPError, match=str(status)):
                urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


@pytest.mark.skipif(NGINX is None, reason="nginx is not installed (package nginx-light)")
def test_nginx_ends_when_serve_is_killed(tmp_path, data_set):
    port = free_port()
    command = [
        *PROGRAM,
        "--json",
        "--cache",
        tmp_path / "cache",
        "--address",
        "127.0.0.1",
        "--port",
        port,
        data_set,
    ]
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True) as process:
        assert json.loads(process.stdout.readline())["event"] == "serving"
        process.kill()
    assert wait_for(lambda: is_refused(port), 30)


def is_refused(port):
    try:
        with closing(socket.create_connection(("127.0.0.1", port), 5)):
            return False
    except ConnectionRefusedError:
        return True
