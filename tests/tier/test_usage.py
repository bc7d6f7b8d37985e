"""Usage: what machines report of what they read, and what the planner makes of all reports together."""

from __future__ import annotations

import json
import math
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
from tests.forks import in_a_fork
from tests.support.clock import FakeClock
from tests.support.http_server import HttpFault, HttpFaultServer
from tests.support.stores import CountingStore, GateStore
from tests.tier.moved import Moved, N, ServedStore, by_loader, by_record
from torch.utils.data import DataLoader as TorchLoader

import tiercache as tc
from tiercache.errors import StoreError
from tiercache.store import LocalFolder, MemoryStore
from tiercache.testing import Fault, FaultStore
from tiercache.tier.placement import use_reports
from tiercache.tier.placement.resolver import LocationResolver
from tiercache.tier.placement.use_reports import IN_USE_S, REPORT_S, USAGE_FOLDER, ActiveReader, UseRecorder, UseReport
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
    return use_reports.read_reports(moved.store)


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
    assert begun.machine == use_reports.machine_name()
    assert [len(batch["id"]) for batch in iterator] == [16] * (N // 16)
    dataset.close()
    closed = report(moved)
    assert closed.readers == {}
    assert {name: uses for name, (_, uses) in closed.shards.items()} == dict.fromkeys(moved.keys, 1)
    assert closed.all_s >= begun.reported_s
    assert {last for last, _ in closed.shards.values()} == {closed.reported_s}


def _wait_for_reports(moved: Moved) -> bool:
    for thread in threading.enumerate():
        if thread.name == "tiercache-usage":
            for _ in range(200):
                if reports(moved):
                    return True
                thread.join(0.05)
    return bool(reports(moved))


def test_single_records_are_reported_when_the_data_set_is_closed(moved):
    moved.adopt()
    dataset = tc.Dataset(moved.store.url)
    assert dataset[0]["id"] == 0
    assert dataset[1]["id"] == 1
    assert reports(moved) == []
    dataset.close()
    assert {name: uses for name, (_, uses) in report(moved).shards.items()} == {moved.keys[0]: 1}


def test_later_uses_are_added_to_earlier_ones(moved):
    moved.adopt()
    for _ in range(3):
        dataset = tc.Dataset(moved.store.url)
        assert by_record(dataset) == ALL
        dataset.close()
    assert {name: uses for name, (_, uses) in report(moved).shards.items()} == dict.fromkeys(moved.keys, 3)


def test_where_tiers_do_not_look_after_it_nothing_is_written(moved):
    dataset = tc.Dataset(moved.store.url)
    assert by_loader(dataset) == ALL
    assert by_record(dataset) == ALL
    assert not [t for t in threading.enumerate() if t.name == "tiercache-usage"]
    dataset.close()
    assert reports(moved) == []


def test_an_opened_data_set_that_was_not_read_asks_for_no_mark_when_it_is_closed(moved):
    dataset = tc.Dataset(moved.store.url)
    before = dataset._source.leaves[0].inner.counters["requests"]
    dataset.close()
    assert dataset._source.leaves[0].inner.counters["requests"] == before


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


def test_uses_of_a_report_that_failed_are_in_the_next_one():
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
    (found,) = use_reports.read_reports(home)
    assert {name: uses for name, (_, uses) in found.shards.items()} == {"a": 2, "b": 1}
    recorder.close()
    home.delete([info.key for info in home.list()])


def test_it_reports_once_an_hour_while_it_is_read_and_not_after_it_is_closed():
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
    (found,) = use_reports.read_reports(home)
    assert found.readers == {}
    for thread in threading.enumerate():
        if thread.name == "tiercache-usage":
            thread.join(5)
    assert (clock.monotonic() - start_s) % REPORT_S == 0
    home.delete([info.key for info in home.list()])


def test_racing_processes_and_threads_lose_no_use(moved):
    moved.adopt()

    def use() -> int:
        for _ in range(3):
            dataset = tc.Dataset(moved.store.url)
            assert dataset[0]["id"] == 0
            dataset.close()
        return 0

    threads = [threading.Thread(target=lambda: in_a_fork(use)) for _ in range(2)]
    for thread in threads:
        thread.start()
    use()
    for thread in threads:
        thread.join()
    assert report(moved).shards[moved.keys[0]][1] == 9


def test_a_child_forked_while_a_report_is_written_reports_all_the_same(moved, monkeypatch):
    monkeypatch.setattr(use_reports, "LOCK_S", 0.2)
    moved.adopt()
    gated = GateStore(moved.store)
    recorder = UseRecorder(LocationResolver(gated, {}))
    recorder.note("a")
    gate = gated.stop_at("before_put", "*usage*")
    reporting = threading.Thread(target=recorder.report)
    reporting.start()

    def child() -> int:
        dataset = tc.Dataset(moved.store.url)
        assert dataset[0]["id"] == 0
        dataset.close()
        return 0 if report(moved).shards[moved.keys[0]][1] == 1 else 2

    with gate:
        gate.wait_reached()
        assert in_a_fork(child) == 0
    reporting.join()
    recorder.close()


def test_a_process_that_ends_asks_nothing_of_a_store_that_failed():
    home = CountingStore(FaultStore(MemoryStore("usage-at-exit"), [Fault("put", keys="*usage*", times=99)]))
    home.put("_tiercache/tiers.json", b"{}")
    recorder = UseRecorder(LocationResolver(home, {}))
    recorder.note("a")
    LocationResolver.placement_once(recorder._places)
    assert not recorder.report()
    before = len(home.calls)
    recorder.close_at_exit()
    assert len(home.calls) == before
    recorder.close()
    home.delete(["_tiercache/tiers.json"])


def test_a_forked_child_counts_anew(moved):
    moved.adopt()
    dataset = tc.Dataset(moved.store.url)
    assert dataset[0]["id"] == 0

    def child() -> int:
        assert dataset[N - 1]["id"] == N - 1
        dataset.close()
        assert {name: uses for name, (_, uses) in report(moved).shards.items()} == {moved.keys[-1]: 1}
        return 0

    assert in_a_fork(child) == 0
    dataset.close()
    assert {name: uses for name, (_, uses) in report(moved).shards.items()} == {moved.keys[0]: 1, moved.keys[-1]: 1}


READ_AND_END = """
import sys
import tiercache as tc
dataset = tc.Dataset(sys.argv[1])
print(sum(len(batch["id"]) for batch in tc.DataLoader(dataset, batch_size=16)))
"""


def test_a_process_that_ends_without_closing_reports_all_the_same(moved):
    moved.adopt()
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", READ_AND_END, moved.store.url],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout.strip(), done.stderr) == (str(N), "")
    found = report(moved)
    assert found.readers == {}
    assert set(found.shards) == set(moved.keys)


def test_workers_that_read_are_reported_by_who_began_the_run(moved):
    moved.adopt()
    dataset = tc.Dataset(moved.store.url, transform=_identity)
    loader = tc.DataLoader(dataset, batch_size=10, num_workers=2, multiprocessing_context="fork", collate_fn=list)
    assert [int(record["id"]) for records in loader for record in records] == ALL
    dataset.close()
    found = report(moved)
    assert found.all_s > 0
    assert found.readers == {}
    assert isinstance(loader, TorchLoader)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_shards_of_a_view_that_workers_read_are_in_use_from_the_beginning_of_the_run(moved, method):
    moved.adopt()
    n_first = sum(info.n_records for info in moved.infos[:2])
    with closing(tc.Dataset(moved.store.url)) as dataset:
        view = dataset.select(range(n_first))
        loader = tc.DataLoader(view, batch_size=10, num_workers=1, multiprocessing_context=method, collate_fn=_as_it_is)
        batches = iter(loader)
        next(batches)
        wait_for(lambda: bool(reports(moved)), 30)
        said = use_reports.merge_reports(reports(moved), pa.array(moved.keys), now_s=time.time())
        assert said.in_use.tolist() == [True, True] + [False] * (len(moved.keys) - 2)
        assert np.isfinite(said.last_use_s).tolist() == said.in_use.tolist()
        for _ in batches:
            pass


def _as_it_is(batch):
    return batch


def _identity(record):
    return record


def test_who_was_killed_is_taken_off_the_list_by_the_next_report_of_the_machine(moved):
    moved.adopt()
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True
    )
    own = use_reports._name_of(0).split("-")
    names = {
        "dead": f"{dead.stdout.strip()}-1-{own[2]}-0",
        "reused": f"{os.getpid()}-1-{own[2]}-0",
        "another container's": f"{dead.stdout.strip()}-1-99-0",
    }
    reader = ActiveReader(NOW_S, NOW_S, True)
    machine = use_reports.machine_name()
    left = UseReport(machine, NOW_S, NOW_S, dict.fromkeys(names.values(), reader), {})
    moved.store.put(use_reports.usage_key(machine), use_reports.encode(left))
    dataset = tc.Dataset(moved.store.url)
    assert dataset[0]["id"] == 0
    dataset.close()
    assert list(report(moved).readers) == [names["another container's"]]


def test_without_a_state_folder_it_is_reported_too(moved, monkeypatch):
    monkeypatch.setenv("TIERCACHE_STATE_DIR", "/proc/nowhere")
    moved.adopt()
    dataset = tc.Dataset(moved.store.url)
    assert by_record(dataset) == ALL
    dataset.close()
    assert set(report(moved).shards) == set(moved.keys)


# -- what the planner makes of it -----------------------------------------------------------------------------------

NAMES = pa.array(["a", "b", "c"])


def merged(*found: UseReport, silence_s: float = 7 * DAY_S) -> use_reports.ShardUse:
    return use_reports.merge_reports(found, NAMES, now_s=NOW_S, silence_s=silence_s)


def test_of_nothing_nothing_is_known():
    found = merged()
    assert np.isnan(found.last_use_s).all()
    assert found.uses.tolist() == [0, 0, 0]
    assert not found.in_use.any()
    assert not found.unreported


@pytest.mark.parametrize(
    ("heard_s", "is_in_use", "is_unreported"),
    [
        (0, True, False),
        (IN_USE_S - 1, True, False),
        (IN_USE_S + 1, False, True),
        (6.9 * DAY_S, False, True),
        (7.1 * DAY_S, False, False),
    ],
)
def test_a_reader_is_in_use_then_unreported_then_gone(heard_s, is_in_use, is_unreported):
    at_s = NOW_S - heard_s
    found = merged(UseReport("m", at_s, at_s, {"r": ActiveReader(at_s - 60, at_s, reads_all=True)}, {}))
    assert found.in_use.tolist() == [is_in_use] * 3
    assert found.unreported is is_unreported


def test_of_a_reader_of_some_only_what_it_opened_since_it_began_is_in_use():
    reader = ActiveReader(NOW_S - 100, NOW_S - 10)
    found = merged(UseReport("m", NOW_S - 10, 0, {"r": reader}, {"a": (NOW_S - 50, 4), "b": (NOW_S - 150, 2)}))
    assert found.in_use.tolist() == [True, False, False]
    assert found.uses.tolist() == [4, 2, 0]


def test_a_report_that_cannot_be_read_is_of_a_machine_that_has_not_reported():
    store = MemoryStore("usage-unreadable")
    for n, text in enumerate([b"", b"{}", b'{"version": 2}', b"[1]", b'{"version": 1, "readers": 3}']):
        store.put(use_reports.usage_key(f"m{n}"), text)
    found = use_reports.read_reports(store)
    assert len(found) == 5
    now_s = max(info.modified_s for info in store.list()) + 10
    for one in found:
        assert use_reports.merge_reports([one], NAMES, now_s=now_s).unreported
    store.delete([info.key for info in store.list()])


LYING = {
    "nested": b"[" * 200_000,
    "no time": use_reports.encode(UseReport("m", math.nan)),
    "no end": use_reports.encode(UseReport("m", NOW_S, 0, {"r": ActiveReader(NOW_S, math.inf)})),
    "no count": use_reports.encode(UseReport("m", NOW_S)).replace(b'"shards":{}', b'"shards":{"a":[1,1e999]}'),
    "a count of many": use_reports.encode(UseReport("m", NOW_S, shards={"a": (NOW_S, 10**30)})),
    "fewer than none": use_reports.encode(UseReport("m", NOW_S, shards={"a": (NOW_S, -3)})),
    "a time of many digits": use_reports.encode(UseReport("m", NOW_S)).replace(
        b'"all_s":0.0', b'"all_s":1' + b"0" * 400
    ),
}


@pytest.mark.parametrize("text", LYING.values(), ids=LYING.keys())
def test_a_report_that_cannot_be_true_keeps_the_data_where_it_is_and_stops_no_reader(moved, text):
    moved.adopt()
    moved.store.put(use_reports.usage_key("other"), text)
    moved.store.put(use_reports.usage_key(use_reports.machine_name()), text)
    said = use_reports.merge_reports(reports(moved), pa.array(moved.keys), now_s=time.time() + 10)
    assert said.unreported
    with closing(tc.Dataset(moved.store.url)) as dataset:
        assert by_loader(dataset) == ALL
    assert len(
        use_reports.decode(moved.store.get(use_reports.usage_key(use_reports.machine_name())), "m").shards
    ) == len(moved.keys)


def test_a_reader_of_a_name_that_is_no_processs_stops_no_report(moved):
    moved.adopt()
    mine = f"-{use_reports.pid_namespace()}-0"
    names = [f"\u00b2-1{mine}", f"{'9' * 5000}-1{mine}"]
    readers = {name: ActiveReader(NOW_S, NOW_S) for name in names}
    moved.store.put(
        use_reports.usage_key(use_reports.machine_name()), use_reports.encode(UseReport("m", NOW_S, readers=readers))
    )
    with closing(tc.Dataset(moved.store.url)) as dataset:
        assert by_loader(dataset) == ALL
    assert set(report(moved).shards) == set(moved.keys)


TIMES = st.floats(NOW_S - 10 * DAY_S, NOW_S)
REPORTS = st.builds(
    UseReport,
    machine=st.just("m"),
    reported_s=TIMES,
    all_s=st.just(0.0) | TIMES,
    readers=st.dictionaries(st.text(max_size=3), st.builds(ActiveReader, TIMES, TIMES, st.booleans()), max_size=2),
    shards=st.dictionaries(st.sampled_from("abcd"), st.tuples(TIMES, st.integers(0, 99))),
)


@given(st.lists(REPORTS, max_size=4))
def test_merging_says_what_going_through_all_reports_one_by_one_says(found):
    said = use_reports.merge_reports(found, NAMES, now_s=NOW_S, silence_s=DAY_S)
    for at, name in enumerate(NAMES.to_pylist()):
        times = [r.all_s for r in found if r.all_s] + [r.shards[name][0] for r in found if name in r.shards]
        assert max(times, default=math.nan) == pytest.approx(said.last_use_s[at], nan_ok=True)
        assert sum(r.shards[name][1] for r in found if name in r.shards) == said.uses[at]
        in_use = False
        for one in found:
            for reader in one.readers.values():
                is_heard = NOW_S - reader.reported_s <= IN_USE_S
                in_use |= is_heard and (
                    reader.reads_all or (name in one.shards and one.shards[name][0] >= reader.since_s)
                )
        assert in_use == said.in_use[at]
    late = [r for one in found for r in one.readers.values() if IN_USE_S < NOW_S - r.reported_s <= DAY_S]
    assert said.unreported == bool(late)


@given(REPORTS)
def test_a_report_is_read_as_it_was_written(one):
    assert use_reports.decode(use_reports.encode(one), "m") == one
    json.loads(use_reports.encode(one))


def test_what_no_store_gives_is_no_report():
    store = FaultStore(MemoryStore("usage-fails"), [Fault("list")])
    with pytest.raises(StoreError):
        use_reports.read_reports(store)
