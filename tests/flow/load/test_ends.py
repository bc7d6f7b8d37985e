"""The end of a process while a store hangs or trickles: it does not wait for requests that nobody needs."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from tests.support.http_server import HttpFault, HttpFaultServer

import tiercache as tc
from tiercache.waiting import wait_for

# A hanging request ends by the client's own limits after 20 s, and a trickling one after 300 s.
END_S = 15.0
FAULTS = {"hangs": HttpFault("silence"), "trickles": HttpFault("drip", n_bytes=100, pause_s=0.1)}
COMMAND = [sys.executable, "-m", "tiercache.cli.app"]


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """A data set of 40 shards of 128 KiB, by path."""
    root = tmp_path_factory.mktemp("ends")
    with tc.Writer(root / "data", schema={"x": tc.Tensor("uint8", (1024,))}, shard_size="128KiB") as writer:
        writer.write_batch({"x": np.random.default_rng(1).integers(0, 256, (40 * 127, 1024), np.uint8)})
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(params=FAULTS)
def server(request, objects):
    """A server that answers the requests for shards as `fault` says once `n_good` of them were served."""
    with HttpFaultServer(objects) as server:
        server.n_good = 0

        def rule(_method, path):
            if not path.endswith(".tcs"):
                return None
            server.n_good -= 1
            return None if server.n_good >= 0 else FAULTS[request.param]

        server.when(rule)
        yield server
        server.release()


def run_until(server, command, n_requests):
    """Start a process, and return it once it waits for so many requests for shards that go wrong."""
    n_begun = server.n_good
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert wait_for(lambda: server.n_good <= -n_requests or process.poll() is not None, 60), n_begun
    # Python hears a signal late that comes just before its main thread begins to wait.
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    return process


def check_end(process, begun_s):
    out, errors = process.communicate(timeout=120)
    ended_s = time.monotonic() - begun_s
    assert ended_s < END_S, f"the process ended {ended_s:.1f} s later"
    return out, errors


LOADER = """
import sys, tempfile
import tiercache as tc
cache = tc.Cache(tempfile.mkdtemp(), size="100MB") if sys.argv[2] == "cached" else False
dataset = tc.Dataset(sys.argv[1] + "/data", cache=cache)
options = tc.LoaderOptions(seed=1, shuffle_group_bytes="1MiB", shuffle_window_bytes="256KiB")
iterator = iter(tc.DataLoader(dataset, batch_size=32, shuffle=True, options=options))
try:
    print(len(next(iterator)["x"]), flush=True)
    sys.stdin.readline()
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.mark.parametrize("cached", ["cached", "uncached"])
def test_a_process_that_leaves_an_epoch_ends_although_requests_run(server, cached):
    server.n_good = 20  # the footers of a shuffle group, and the blocks of some shards
    process = subprocess.Popen(
        [sys.executable, "-c", LOADER, server.url, cached],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "32\n", process.communicate()
    assert wait_for(lambda: server.n_good < 0, 60), "no request hangs"
    begun_s = time.monotonic()
    assert check_end(process, begun_s) == ("", "")
    assert process.returncode == 0


@pytest.mark.parametrize("cached", ["cached", "uncached"])
def test_ctrl_c_ends_a_loader_that_waits_for_a_store(server, cached):
    process = run_until(server, [sys.executable, "-c", LOADER, server.url, cached], 1)
    begun_s = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert check_end(process, begun_s) == ("interrupted\n", "")


@pytest.mark.parametrize("columns", [[], ["--columns", "x"]], ids=["whole", "columns"])
def test_ctrl_c_ends_warm_although_the_store_does_not_answer(server, tmp_path, columns):
    cache = ["--cache", str(tmp_path / "cache"), "--cache-size", "100MB"]
    process = run_until(server, [*COMMAND, "warm", f"{server.url}/data", *cache, *columns], 4)
    begun_s = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, errors = check_end(process, begun_s)
    assert (process.returncode, out) == (130, "")
    assert "tiercache: interrupted: fetched shards stay in the cache" in errors
