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

from tiercache.waiting import wait_for

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
PROGRAM = (sys.executable, "-m", "tiercache.cli.app", "serve")


def test_the_configuration_for_another_nginx_names_folder_socket_and_token(tiercache, tmp_path):
    where = ["--socket", tmp_path / "s", "--cache", tmp_path / "cache", "--port", 81]
    done = tiercache("serve", "--print-config", *where, "--token", "0123456789")
    assert done.out.startswith("server {\n    listen 0.0.0.0:81;\n")
    for part in (f'root "{tmp_path}/cache";', f'"http://unix:{tmp_path}/s"', '"Bearer 0123456789"'):
        assert part in done.out


def test_the_configured_token_is_demanded(tiercache, tmp_path, monkeypatch):
    monkeypatch.setenv("TIERCACHE_PEERS_TOKEN", "token-of-the-job")
    done = tiercache("serve", "--print-config", "--socket", tmp_path / "s", "--cache", tmp_path / "cache", "--json")
    assert '"Bearer token-of-the-job"' in done.events[0]["nginx"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--print-config"], "needs --socket"),
        ([], "at least one DATASET"),
        (["--token", "a b", "s3://bucket/x"], "a token of peers is 8 to 512"),
        (["--tls-cert", "cert.pem", "s3://bucket/x"], "--tls-cert and --tls-key"),
    ],
)
def test_incomplete_requests_are_errors_that_say_what_is_missing(tiercache, tmp_path, arguments, message):
    assert message in tiercache("serve", "--cache", tmp_path / "cache", *arguments, code=2).err


@pytest.mark.parametrize("socket_only", [True, False])
def test_serve_runs_until_it_is_told_to_stop(tmp_path, socket_only):
    if not socket_only and NGINX is None:
        pytest.skip("nginx is not installed (package nginx-light)")
    port = free_port()
    where = ["--socket", tmp_path / "s"] if socket_only else ["--address", "127.0.0.1", "--port", port]
    command = [*PROGRAM, "--json", "--cache", tmp_path / "cache", *where, tmp_path / "ds"]
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True) as process:
        started = json.loads(process.stdout.readline())
        assert started["event"] == "serving"
        if socket_only:
            assert (tmp_path / "s").is_socket()
        else:
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
                    f"http://127.0.0.1:{port}/x", timeout=30
                )
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert not (tmp_path / "s").exists()


@pytest.mark.skipif(NGINX is None, reason="nginx is not installed (package nginx-light)")
def test_nginx_ends_when_serve_is_killed(tmp_path):
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
        tmp_path / "ds",
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
