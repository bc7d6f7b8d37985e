"""What the processes of a machine share about a store: slots of requests, bandwidth and back-off."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from tiercache import config
from tiercache.store.machine_limits import MachineLimits, StoreLimits


@pytest.fixture(autouse=True)
def runtime(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "tiercache"


@pytest.fixture
def opened():
    made = []

    def build(name="a store", **limits):
        made.append(MachineLimits(name, StoreLimits(**limits)))
        return made[-1]

    yield build
    for limits in made:
        limits.close()


HOLDER = """
import sys
from tiercache.store.machine_limits import MachineLimits, StoreLimits
limits = MachineLimits("a store", StoreLimits(max_requests=3))
print(limits.take_slot() is not None, limits.take_slot() is not None, flush=True)
sys.stdin.read()
"""


def test_slots_are_shared_by_processes_and_freed_when_one_is_killed(opened, tmp_path):
    limits = opened(max_requests=3)
    environment = os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as holder:
        assert holder.stdout.readline() == "True True\n"
        slot = limits.take_slot()
        assert slot is not None
        assert limits.take_slot() is None
        holder.kill()
        holder.wait()
        assert {limits.take_slot(), limits.take_slot(), slot} == {0, 1, 2}
        limits.give_back_slot(slot)
        assert limits.take_slot() == slot


def test_a_back_off_holds_for_all_processes_and_for_no_other_store(opened):
    first, second, other = opened(), opened(), opened("another store")
    first.throttled(100.0, was_answered=False)
    assert second.backoff_left_s(100.0) == pytest.approx(0.05)
    assert other.backoff_left_s(100.0) == 0
    assert second.backoff_left_s(200.0) == 0


def test_a_bandwidth_is_shared(opened):
    first, second = opened(max_bytes_per_s=1e6), opened(max_bytes_per_s=1e6)
    now_s = time.monotonic()
    assert first.charge(1_000_000, now_s) == pytest.approx(0.9)
    assert second.charge(1_000_000, now_s) == pytest.approx(1.9)
    assert opened().charge(1_000_000, now_s) == 0, "of a process without a limit"


def test_a_forked_child_holds_no_slot_of_its_parent(opened):
    limits = opened(max_requests=1)
    assert limits.take_slot() == 0
    start, go_on = os.pipe(), os.pipe()
    pid = os.fork()
    if not pid:
        os.write(start[1], b"x")
        os.read(go_on[0], 1)
        os._exit(0)
    os.read(start[0], 1)
    limits.close()  # as if the parent had ended
    assert opened(max_requests=1).take_slot() == 0
    os.write(go_on[1], b"x")
    os.waitpid(pid, 0)
    for fd in (*start, *go_on):
        os.close(fd)


@pytest.mark.parametrize("obstacle", ["a file", "a link"])
def test_without_the_shared_file_a_process_keeps_the_limits_for_itself(opened, runtime, tmp_path, obstacle):
    if obstacle == "a file":
        runtime.write_bytes(b"")
    else:
        opened().throttled(100.0, was_answered=False)
        (path,) = runtime.iterdir()
        path.unlink()
        path.symlink_to(tmp_path / "elsewhere")
    limits = opened(max_requests=1, max_bytes_per_s=1e6)
    assert (limits.take_slot(), limits.take_slot()) == (0, None)
    limits.throttled(100.0, was_answered=False)
    assert limits.backoff_left_s(100.0) > 0
    assert limits.charge(1_000_000, 100.0) == pytest.approx(0.9)
    assert not (tmp_path / "elsewhere").exists()


def test_a_truncated_file_does_no_harm(opened, runtime):
    limits = opened(max_bytes_per_s=1e6)
    limits.throttled(100.0, was_answered=False)
    (path,) = runtime.iterdir()
    path.write_bytes(b"x")
    assert limits.backoff_left_s(100.0) >= 0
    assert limits.charge(1_000_000, 100.0) >= 0


def test_the_folder_is_private_to_the_user(opened, runtime):
    opened().throttled(100.0, was_answered=False)
    assert runtime.stat().st_mode & 0o777 == 0o700
    assert config.runtime_folder() == runtime


def test_a_closed_file_is_opened_again_when_it_is_needed(opened):
    first, second = opened(max_requests=1), opened(max_requests=1)
    slot = first.take_slot()
    assert second.take_slot() is None
    first.close()
    assert second.take_slot() == slot == 0
    first.give_back_slot(slot)
    assert first.take_slot() is None, "it is the other's"
