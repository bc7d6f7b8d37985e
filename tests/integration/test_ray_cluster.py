"""A Ray cluster of two machines: each warms its cache, both verify, and random kills of a packing lose nothing."""

import json
import os
import random
import signal
import subprocess
import sys

import psutil
import pytest
from tests.integration import ray_functions
from tests.stress.packing import OPTIONS, SCHEMA, Target
from tests.support.http_server import HttpFaultServer

import tiercache as tc
from tiercache.waiting import SYSTEM_CLOCK, wait_for

cluster_utils = pytest.importorskip("ray.cluster_utils", reason="`make integration` has it")

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("cluster"),
]

# Ray repeats a task three times. Another death of its worker ends the packing, which the same command continues.
KILLS_OF_A_RUN = 4


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    return [tmp_path_factory.mktemp("ray") / name for name in ("a", "b")]


@pytest.fixture(scope="module")
def cluster(caches):
    """Two machines with two workers each, which outlive the drivers."""
    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # of the workers
    patch.setenv("RAY_AUTH_MODE", "disabled")
    started = cluster_utils.Cluster()
    for folder in caches:
        started.add_node(num_cpus=2, env_vars={"TIERCACHE_CACHE_DIR": str(folder)})
    patch.setenv("RAY_ADDRESS", started.address)
    yield
    started.shutdown()
    patch.undo()


@pytest.fixture
def data_set(tmp_path):
    with tc.Writer(tmp_path / "set", schema=SCHEMA, shard_size=4000, block_size=500) as writer:
        for i in range(2000):
            writer.write(ray_functions.record(i))
    return tmp_path / "set"


def command(*arguments, code=0):
    """Run the command in a process of its own, because a process can be connected to one cluster only."""
    command = [sys.executable, "-m", "tiercache.cli.app", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code, done.stderr
    return done


def events(*arguments, code=0):
    return [json.loads(line) for line in command(*arguments, "--json", code=code).stdout.splitlines()]


class TestCommand:
    def test_warm_fetches_into_the_cache_of_each_machine(self, data_set, caches):
        with HttpFaultServer(str(data_set)) as server:
            *machines, summary = events("warm", server.url, "--engine", "ray")
            assert [one["bytes_fetched"] for one in machines] == [summary["bytes"]] * 2
            assert (summary["machines"], summary["bytes_fetched"]) == (2, 2 * summary["bytes"])
            for folder in caches:
                with tc.Cache.default(path=folder) as cache:
                    assert len(cache.entries()) == summary["objects"]
            again = events("warm", server.url, "--engine", "ray")[-1]
            assert (again["bytes"], again["bytes_fetched"]) == (summary["bytes"], 0)

    def test_a_machine_that_cannot_warm_its_cache_fails_the_command(self, data_set):
        with HttpFaultServer(str(data_set)) as server:
            found = command("warm", server.url, "--engine", "ray", "--cache-size", "16KiB", code=1)
        assert "the cache has no space for" in found.stderr

    def test_verify_finds_in_tasks_what_it_finds_here(self, data_set, monkeypatch):
        monkeypatch.chdir(data_set.parent)
        assert events("verify", "set", "--engine", "ray") == events("verify", "set")
        first, second, *_ = sorted(data_set.glob("shards/*.tcs"))
        first.unlink()
        data = bytearray(second.read_bytes())
        data[300] ^= 1
        second.write_bytes(data)
        here, there = (events("verify", "set", *engine, code=4) for engine in ([], ["--engine", "ray"]))
        assert here[-1]["damaged"] == 2
        assert sorted(map(str, there)) == sorted(map(str, here))


def workers():
    """Return the processes that run a task now."""
    found = psutil.process_iter(["cmdline"])
    return [one for one in found if (one.info["cmdline"] or [""])[0].startswith("ray::_call")]


def strike(process, target, rng):
    """Kill workers of a packing at random moments, and in about half of the runs its driver; return both numbers."""

    def is_ready():
        begun = list(target.url.glob("_tiercache/packing/*/start*")) and workers()
        return begun or process.poll() is not None

    n_workers = 0
    for _ in range(KILLS_OF_A_RUN):
        assert wait_for(is_ready, 120)
        SYSTEM_CLOCK.sleep(rng.uniform(0, 0.4))
        if process.poll() is not None:
            break
        if rng.random() < 0.2:
            os.killpg(process.pid, signal.SIGKILL)
            return n_workers, 1
        if running := workers():
            rng.choice(running).kill()
            n_workers += 1
    return n_workers, 0


def kill_ray(target, n_kills, seed):
    rng = random.Random(seed)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]
    options += [f"--column={name}={kind}" for name, kind in SCHEMA.items()]
    options += ["--engine=ray", "--map=tests.integration.ray_functions:slowly"]
    command = [sys.executable, "-m", "tiercache.cli.app", "pack", str(target.source), str(target.url), *options]
    struck = {"workers": 0, "drivers": 0, "runs": 0, "failed": 0}
    while struck["workers"] + struck["drivers"] < n_kills:
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
        ) as process:
            n_workers, n_drivers = strike(process, target, rng)
            _, errors = process.communicate(timeout=120)
        struck["workers"] += n_workers
        struck["drivers"] += n_drivers
        struck["runs"] += 1
        if process.returncode not in (0, -signal.SIGKILL):
            assert b"the same command continues" in errors, errors
            struck["failed"] += 1
        target.check(finished=process.returncode == 0)
    done = subprocess.run(command, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    target.check(finished=True)
    print(struck)
    return struck


def test_a_packing_whose_workers_and_drivers_are_killed_writes_each_record_once(tmp_path):
    struck = kill_ray(Target(tmp_path), 6, seed=11)
    assert struck["workers"]


@pytest.mark.stress
@pytest.mark.timeout(3600)
def test_a_hundred_kills_of_rays_workers_and_drivers_lose_no_record_and_write_none_twice(tmp_path):
    struck = kill_ray(Target(tmp_path), 100, seed=12)
    assert struck["drivers"]
