"""Use reports: what machines report of their reads, and what the planner makes of all reports together."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.clock import FakeClock
from tests.support.faults import Fault, FaultStore
from tests.support.forks import in_a_fork
from tests.support.http_server import HttpFault, HttpFaultServer
from tests.support.moved_shards import Moved, N, ServedStore, by_loader, by_record
from tests.support.stores import CountingStore

import tiercache as tc
from tiercache.store import LocalFolder, MemoryStore, uses
from tiercache.store.placement import LocationResolver
from tiercache.store.uses import (
    IN_USE_S,
    REPORT_S,
    USAGE_FOLDER,
    ActiveReader,
    UseRecorder,
    UseReport,
)
from tiercache.waiting import wait_for

ALL = list(range(N))
DAY_S = 86400.0
NOW_S = 1_800_000_000.0


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "data"
    Moved(folder, LocalFolder(folder))
    return folder


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TIERCACHE_STATE_DIR", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.fixture
def moved(packed, tmp_path) -> Moved:
    return Moved(packed, LocalFolder(tmp_path / "home"))


def reports(moved: Moved) -> list[UseReport]:
    return uses.read_reports(moved.store)


def report(moved: Moved) -> UseReport:
    (found,) = reports(moved)
    return found


# -- who reports what -----------------------------------------------------------------------------------------------


def test_a_run_reports_while_it_reads_and_when_it_is_closed(moved):
    moved.adopt()
    dataset = tc.Dataset(moved.store.url)
    iterator = iter(tc.DataLoader(dataset, batch_size=16))
    assert _wait_for_reports(moved)
    begun = report(moved)
    assert [reader.reads_all for reader in begun.readers.values()] == [True]
    assert begun.machine == uses.machine_name()
    assert [len(batch["id"]) for batch in iterator] == [16] * (N // 16)
    dataset.close()
    closed = report(moved)
    assert closed.readers == {}
    assert set(closed.shards) == set(moved.keys)
    assert closed.all_s >= begun.reported_s
    assert set(closed.shards.values()) == {closed.reported_s}


def _wait_for_reports(moved: Moved) -> bool:
    for thread in threading.enumerate():
        if thread.name == "tiercache-usage":
            for _ in range(200):
                if reports(moved):
                    return True
                thread.join(0.05)
    return bool(reports(moved))


def test_a_store_that_cannot_be_written_is_read_without_reports(packed):
    objects = {f"home/{info.key}": LocalFolder(packed).get(info.key) for info in LocalFolder(packed).list()}
    with HttpFaultServer(objects) as server:
        moved = Moved(None, ServedStore(server, "home"))
        moved.adopt()
        server.when(lambda method, path: _refused() if method == "PUT" else None)
        dataset = tc.Dataset(f"{server.url}/home", cache=False)
        assert by_loader(dataset) == ALL
        dataset.close()
        moved.store.forget()
        assert not [key for key in server.objects if USAGE_FOLDER in key]


def _refused() -> HttpFault:
    return HttpFault("status", 403, body=b"read only")


def test_uses_of_a_failed_report_are_in_the_next_one():
    home = MemoryStore("usage-failed")
    faulty = FaultStore(home, [Fault("put", keys="*usage*", times=2)])
    home.put("_tiercache/tiers.json", b"{}")
    recorder = UseRecorder(LocationResolver(faulty, {}))
    recorder.note("a")
    assert not recorder.report()
    recorder.note("a")
    assert not recorder.report()
    recorder.note("b")
    assert recorder.report()
    (found,) = uses.read_reports(home)
    assert set(found.shards) == {"a", "b"}
    recorder.close()
    home.delete([info.key for info in home.list()])


def test_a_data_set_is_reported_hourly_until_it_is_closed():
    home = CountingStore(MemoryStore("usage-hourly"))
    home.put("_tiercache/tiers.json", b"{}")
    clock = FakeClock()
    start_s = clock.monotonic()
    places = LocationResolver(home, {})
    recorder = UseRecorder(places, clock=clock, now_s=lambda: NOW_S + clock.monotonic())
    places.placement_once()
    recorder.note("a")
    recorder.begin(())
    for _ in range(400):
        if home.n_calls("put", "*usage*") >= 5:
            break
        threading.Event().wait(0.01)
    recorder.close()
    assert home.n_calls("put", "*usage*") >= 5
    (found,) = uses.read_reports(home)
    assert found.readers == {}
    for thread in threading.enumerate():
        if thread.name == "tiercache-usage":
            thread.join(5)
    assert (clock.monotonic() - start_s) % REPORT_S == 0
    home.delete([info.key for info in home.list()])


def test_racing_processes_and_threads_lose_no_use(moved):
    moved.adopt()

    def use(index: int) -> int:
        dataset = tc.Dataset(moved.store.url)
        assert dataset[index]["id"] == index
        dataset.close()
        return 0

    indices = (0, N // 2, N - 1)
    threads = [threading.Thread(target=in_a_fork, args=(lambda index=index: use(index),)) for index in indices[1:]]
    for thread in threads:
        thread.start()
    use(0)
    for thread in threads:
        thread.join()
    assert len(report(moved).shards) == 3


def test_a_process_that_ends_makes_no_request_to_a_failed_store():
    home = CountingStore(FaultStore(MemoryStore("usage-at-exit"), [Fault("put", keys="*usage*", times=99)]))
    home.put("_tiercache/tiers.json", b"{}")
    recorder = UseRecorder(LocationResolver(home, {}))
    recorder.note("a")
    LocationResolver.placement_once(recorder._resolver)
    assert not recorder.report()
    before = len(home.calls)
    recorder.close_at_exit()
    assert len(home.calls) == before
    recorder.close()
    home.delete(["_tiercache/tiers.json"])


READ_AND_END_OPEN = """
import sys
import tiercache as tc
dataset = tc.Dataset(sys.argv[1])
batches = iter(tc.DataLoader(dataset, batch_size=16))
assert len(next(batches)["id"]) == 16
"""


@pytest.mark.s3
def test_a_data_set_in_s3_that_is_open_when_python_ends_is_reported_as_not_in_use(packed, s3_server):
    home = s3_server.store("open-at-the-end")
    moved = Moved(packed, home)
    moved.adopt()
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", READ_AND_END_OPEN, home.url],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **s3_server.environment},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    found = report(moved)
    assert found.readers == {}
    assert moved.keys[0] in found.shards
    home.close()


def test_shards_of_a_view_that_workers_read_are_in_use_from_the_beginning_of_the_run(moved):
    moved.adopt()
    n_first = sum(info.n_records for info in moved.infos[:2])
    with closing(tc.Dataset(moved.store.url)) as dataset:
        view = dataset.select(range(n_first))
        loader = tc.DataLoader(view, batch_size=10, num_workers=1, multiprocessing_context="fork", collate_fn=_as_it_is)
        batches = iter(loader)
        next(batches)
        wait_for(lambda: bool(reports(moved)), 30)
        said = uses.merge_reports(reports(moved), pa.array(moved.keys), now_s=time.time())
        assert said.in_use.tolist() == [True, True] + [False] * (len(moved.keys) - 2)
        assert np.isfinite(said.last_use_s).tolist() == said.in_use.tolist()
        for _ in batches:
            pass
        del batches
        # Beside other load, a spawned worker needs longer to end than the loader waits for it.
        assert wait_for(lambda: not multiprocessing.active_children(), 60)


def _as_it_is(batch):
    return batch


def test_a_killed_reader_is_removed_by_the_next_report_of_its_machine(moved):
    moved.adopt()
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True
    )
    own = uses._name_of(0).split("-")
    names = {
        "dead": f"{dead.stdout.strip()}-1-{own[2]}-0",
        "reused": f"{os.getpid()}-1-{own[2]}-0",
        "another container's": f"{dead.stdout.strip()}-1-99-0",
    }
    reader = ActiveReader(NOW_S, NOW_S, True)
    machine = uses.machine_name()
    left = UseReport(machine, NOW_S, NOW_S, dict.fromkeys(names.values(), reader), {})
    moved.store.put(uses.usage_key(machine), uses.encode(left))
    dataset = tc.Dataset(moved.store.url)
    assert dataset[0]["id"] == 0
    dataset.close()
    assert list(report(moved).readers) == [names["another container's"]]


def test_reports_are_written_without_a_state_folder(moved, monkeypatch):
    monkeypatch.setenv("TIERCACHE_STATE_DIR", "/proc/nowhere")
    moved.adopt()
    dataset = tc.Dataset(moved.store.url)
    assert by_record(dataset) == ALL
    dataset.close()
    assert set(report(moved).shards) == set(moved.keys)


# -- what the planner makes of it -----------------------------------------------------------------------------------

NAMES = pa.array(["a", "b", "c"])


UNREADABLE = [
    *(b"", b"{}", b'{"version": 2}', b"[1]", b'{"version": 1, "readers": 3}', b"[" * 200_000),
    uses.encode(UseReport("m", math.nan)),
    uses.encode(UseReport("m", NOW_S, 0, {"r": ActiveReader(NOW_S, math.inf)})),
    uses.encode(UseReport("m", NOW_S)).replace(b'"all_s":0.0', b'"all_s":1' + b"0" * 400),
]


def test_an_unreadable_report_counts_as_overdue():
    store = MemoryStore("usage-unreadable")
    for n, text in enumerate(UNREADABLE):
        store.put(uses.usage_key(f"m{n}"), text)
    found = uses.read_reports(store)
    assert len(found) == len(UNREADABLE)
    now_s = max(info.modified_s for info in store.list()) + 10
    for one in found:
        assert uses.merge_reports([one], NAMES, now_s=now_s).unreported
    store.delete([info.key for info in store.list()])


TIMES = st.floats(NOW_S - 10 * DAY_S, NOW_S)
REPORTS = st.builds(
    UseReport,
    machine=st.just("m"),
    reported_s=TIMES,
    all_s=st.just(0.0) | TIMES,
    readers=st.dictionaries(st.text(max_size=3), st.builds(ActiveReader, TIMES, TIMES, st.booleans()), max_size=2),
    shards=st.dictionaries(st.sampled_from("abcd"), TIMES),
)


@given(st.lists(REPORTS, max_size=4))
def test_merging_reports_equals_a_plain_loop(found):
    said = uses.merge_reports(found, NAMES, now_s=NOW_S)
    for at, name in enumerate(NAMES.to_pylist()):
        times = [r.all_s for r in found if r.all_s] + [r.shards[name] for r in found if name in r.shards]
        assert max(times, default=math.nan) == pytest.approx(said.last_use_s[at], nan_ok=True)
        in_use = False
        for one in found:
            for reader in one.readers.values():
                is_heard = NOW_S - reader.reported_s <= IN_USE_S
                in_use |= is_heard and (reader.reads_all or (name in one.shards and one.shards[name] >= reader.since_s))
        assert in_use == said.in_use[at]
    late = [r for one in found for r in one.readers.values() if IN_USE_S < NOW_S - r.reported_s <= 7 * DAY_S]
    assert said.unreported == bool(late)


@given(REPORTS)
def test_a_report_is_decoded_as_it_was_encoded(one):
    assert uses.decode(uses.encode(one), "m") == one
    json.loads(uses.encode(one))


@pytest.mark.parametrize("behind_s", [-DAY_S, 30, 8 * DAY_S, 5 * 365 * DAY_S])
def test_shards_of_a_machine_with_a_late_clock_are_in_use(behind_s):
    store = MemoryStore("usage-late-clock")
    store.delete([info.key for info in store.list()])
    machine_s = time.time() - behind_s
    readers = {"r": ActiveReader(machine_s - 3600, machine_s)}
    store.put(uses.usage_key("m"), uses.encode(UseReport("m", machine_s, 0.0, readers, {"a": machine_s - 60})))
    (info,) = store.list()
    said = uses.merge_reports(uses.read_reports(store), NAMES, now_s=info.modified_s)
    assert said.in_use.tolist() == [True, False, False]
    assert said.last_use_s[0] == pytest.approx((info.modified_s if behind_s > 60 else machine_s) - 60, abs=1e-3)
