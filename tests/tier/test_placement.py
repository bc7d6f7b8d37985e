"""Placement: what it says after any changes, by any number of writers, after a crash, and when it is damaged."""

from __future__ import annotations

import json
import threading
import time

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.s3_fixtures import s3_server  # noqa: F401
from tests.support.http_server import HttpFaultServer
from tests.support.stores import CountingStore, GateStore
from tests.tier.placements import numbers, row, rows_of, stopped_at

from tiercache.errors import CommitConflict, StoreError
from tiercache.store import LocalFolder, MemoryStore, open_store
from tiercache.testing import Fault, FaultKind, FaultStore
from tiercache.tier.placement import log
from tiercache.tier.placement.log import N_KEPT, TRACKING_MARKER_KEY, PlacementRow, placement_key

# -- what it says ---------------------------------------------------------------------------------------------------

KEYS = st.sampled_from(["a", "b/c.tcs", "shards/é.tcs", "shards/0.tcs", "z", "A"])
ROWS = st.builds(
    PlacementRow,
    key=st.just("x"),
    url=st.sampled_from(["s3://cold/data", "/nvme/data", "memory://m/d"]),
    storage_class=st.sampled_from([None, "GLACIER"]),
    state=st.sampled_from(["here", "archived"]),
    n_bytes=st.integers(0, 2**62),
    crc32c=st.none() | st.integers(0, 2**32 - 1),
)
CHANGES = st.dictionaries(KEYS, st.none() | ROWS, max_size=4).map(
    lambda found: {
        key: one and PlacementRow(key, *(getattr(one, f) for f in PlacementRow.__slots__[1:]))
        for key, one in found.items()
    }
)


@settings(max_examples=40)
@given(steps=st.lists(CHANGES, max_size=14))
def test_after_any_changes_it_says_what_a_dict_would(steps):
    store, oracle = MemoryStore("placement-oracle"), {}
    store.delete([info.key for info in store.list()])
    for changes in steps:
        committed = log.commit_placement(store, changes)
        oracle = {key: one for key, one in {**oracle, **changes}.items() if one is not None}
        assert rows_of(committed) == oracle
        found = log.read_placement(store)
        assert rows_of(found) == oracle
        assert list(rows_of(found)) == sorted(oracle, key=str.encode)
        assert {key: found.find(key) for key in ("a", "shards/0.tcs", "none")} == {
            key: oracle.get(key) for key in ("a", "shards/0.tcs", "none")
        }
        wanted = pa.array(["z", "none", "a"])
        assert [None if at < 0 else found.row(int(at)) for at in found.row_numbers(wanted)] == [
            oracle.get(key) for key in wanted.to_pylist()
        ]


def test_where_there_is_no_mark_one_small_get_tells(store):
    counting = CountingStore(store)
    assert log.read_placement(counting) is None
    assert counting.calls == [("read_tail", TRACKING_MARKER_KEY)]


def test_who_may_not_list_a_bucket_is_told_that_a_mark_that_is_not_there_is_forbidden(store):
    forbidden = FaultStore(store, [Fault("read_tail", keys=TRACKING_MARKER_KEY, status=403, retryable=False)])
    assert log.read_placement(forbidden) is None
    failing = FaultStore(store, [Fault("read_tail", keys=TRACKING_MARKER_KEY, status=503)])
    with pytest.raises(StoreError, match="scripted fault"):
        log.read_placement(failing)


def test_who_may_not_list_a_bucket_finds_the_newest_though_the_next_one_is_forbidden(store):
    for n in range(3):
        log.commit_placement(store, {f"{n}": row(f"{n}")})
    keys = [log.placement_key(number) for number in range(4, 60)]
    forbidden = [Fault("read_tail", keys=key, status=403, retryable=False, times=9999) for key in keys]
    cannot_list = Fault("list", status=403, retryable=False, times=9999)
    found = log.read_placement(FaultStore(store, [*forbidden, cannot_list]))
    assert (found.number, len(found)) == (3, 3)


def test_a_placement_that_is_there_and_forbidden_is_an_error(store):
    log.commit_placement(store, {"a": row("a")})
    forbidden = Fault("read_tail", keys=log.placement_key(1), status=403, retryable=False, times=9999)
    with pytest.raises(StoreError, match="scripted fault"):
        log.read_placement(FaultStore(store, [forbidden]))


def test_a_mark_without_a_placement_says_that_nothing_lies_elsewhere(store):
    assert not log.is_tracked(store)
    log.start_tracking(store)
    log.start_tracking(store)
    assert log.is_tracked(store)
    found = log.read_placement(store)
    assert (found.number, len(found), found.find("a")) == (0, 0, None)


def test_changes_that_are_there_already_make_no_new_number(store):
    first = log.commit_placement(store, {"a": row("a"), "b": None})
    assert log.commit_placement(store, {"a": row("a"), "gone": None}).number == first.number == 1


def test_the_last_ten_are_kept(store):
    for n in range(3 * N_KEPT):
        log.commit_placement(store, {"a": row("a", n_bytes=n)})
    assert numbers(store) == list(range(2 * N_KEPT + 1, 3 * N_KEPT + 1))
    assert log.read_placement(store).find("a").n_bytes == 3 * N_KEPT - 1


def test_a_row_without_a_url_or_with_an_unknown_state_or_a_negative_size_is_refused():
    for wrong in ({"url": ""}, {"state": "gone"}, {"n_bytes": -1}):
        with pytest.raises(ValueError, match="a row needs a URL"):
            PlacementRow(**{"key": "a", "url": "u", **wrong})
    with pytest.raises(ValueError, match="not a valid key"):
        PlacementRow("../a", "u")


# -- hints ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "hint", [b"", b"not json", b"[]", b'{"placement": -4}', b'{"placement": "7"}', b'{"placement": 99}']
)
def test_a_hint_that_leads_nowhere_is_no_error(store, hint):
    for n in range(4):
        log.commit_placement(store, {"a": row("a", n_bytes=n)})
    store.put(TRACKING_MARKER_KEY, hint)
    assert log.read_placement(store).number == 4


@pytest.mark.parametrize("hint", [1, 2, 3, 17])
def test_an_old_hint_leads_to_the_newest(store, hint):
    for n in range(2 * N_KEPT):
        log.commit_placement(store, {"a": row("a", n_bytes=n)})
    store.put(TRACKING_MARKER_KEY, log.encode_mark(hint))
    assert log.read_placement(store).number == 2 * N_KEPT


def test_where_nothing_can_be_listed_numbers_that_were_forgotten_are_stepped_over():
    memory = MemoryStore("placement-listless")
    for n in range(2 * N_KEPT):
        log.commit_placement(memory, {"a": row("a", n_bytes=n)})
    memory.put(TRACKING_MARKER_KEY, log.encode_mark(3))
    objects = {info.key: memory.get(info.key) for info in memory.list()}
    with HttpFaultServer(objects) as server:
        http = open_store(server.url)
        assert log.read_placement(http).number == 2 * N_KEPT
        http.close()
    memory.delete(objects)


def test_the_mark_says_since_when_whatever_is_committed_after_it(store):
    before_s = int(time.time())
    log.start_tracking(store)
    since_s = log.tracked_since_s(store)
    assert before_s <= since_s <= time.time()
    store.put(TRACKING_MARKER_KEY, log.encode_mark(0, since_s - 1000))
    for n in range(2):
        log.commit_placement(store, {"a": row("a", n_bytes=n)})
    assert log.tracked_since_s(store) == since_s - 1000


@pytest.mark.parametrize("mark", [b"", b"[]", b'{"since": "x"}', b'{"since": true}'])
def test_a_mark_that_says_no_time_is_a_mark_all_the_same(store, mark):
    store.put(TRACKING_MARKER_KEY, mark)
    assert (log.is_tracked(store), log.tracked_since_s(store)) == (True, None)


def test_what_was_missed_is_searched_for_though_the_mark_is_gone(store):
    log.commit_placement(store, {"a": row("a")})
    store.delete([TRACKING_MARKER_KEY])
    assert log.read_placement(store) is None
    assert log.find_newest_placement(store).find("a") == row("a")


def test_who_knows_the_newest_lists_and_asks_for_the_next_only(store):
    known = log.commit_placement(store, {"a": row("a")})
    counting = CountingStore(store)
    assert log.find_newest_placement(counting, known) is known
    assert counting.calls == [("list", log.PLACEMENT_FOLDER), ("read_tail", placement_key(2))]


def test_what_was_missed_is_found_past_any_number_of_newer_ones_though_hints_fail(store):
    known = log.commit_placement(store, {"a": row("a")})
    for n in range(3 * N_KEPT):
        log.commit_placement(store, {"a": row("a", n_bytes=n)})
    store.put(TRACKING_MARKER_KEY, log.encode_mark(1))
    assert log.find_newest_placement(store, known).number == 3 * N_KEPT + 1


def test_a_writer_that_slept_while_its_number_was_used_and_removed_loses_nothing(store):
    log.commit_placement(store, {"a": row("a")})
    gated = GateStore(store)
    gate = gated.stop_at("before_put_if_absent", placement_key(2))
    late = threading.Thread(target=lambda: log.commit_placement(gated, {"late": row("late")}))
    late.start()
    with gate:
        gate.wait_reached()
        for n in range(2 * N_KEPT):
            log.commit_placement(store, {f"early/{n}": row(f"early/{n}")})
        assert 2 not in numbers(store)
    late.join()
    found = log.read_placement(store)
    assert found.find("late") == row("late")
    assert len(found) == 2 * N_KEPT + 2
    assert 2 not in numbers(store)


def test_numbers_that_vanish_between_listing_and_reading_are_looked_for_anew(store):
    for n in range(3):
        log.commit_placement(store, {"a": row("a", n_bytes=n)})

    class Rushing(CountingStore):
        def list(self, prefix=""):
            found = list(super().list(prefix))
            if self.n_calls("list") == 1:
                for n in range(2 * N_KEPT):
                    log.commit_placement(store, {"a": row("a", n_bytes=100 + n)})
            return iter(found)

    store.put(TRACKING_MARKER_KEY, b"{}")
    store.delete([placement_key(1)])
    assert log.read_placement(Rushing(store)).number == 2 * N_KEPT + 3


# -- racing, and failing in between ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["memory", "local", pytest.param("s3", marks=pytest.mark.s3)])
def test_of_racing_writers_none_is_lost(kind, tmp_path, request):
    home = {
        "memory": lambda: MemoryStore(f"race-{tmp_path.name}"),
        "local": lambda: LocalFolder(tmp_path),
        "s3": lambda: request.getfixturevalue("s3_server").store(f"race-{tmp_path.name}"),
    }[kind]()
    n_threads, n_each = (4, 6) if kind != "s3" else (3, 4)
    failures: list[BaseException] = []

    def write(number: int) -> None:
        try:
            for i in range(n_each):
                log.commit_placement(home, {f"{number}/{i}": row(f"{number}/{i}"), f"{number}/{i - 1}": None})
        except BaseException as error:  # noqa: BLE001 -- a thread's top
            failures.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(n_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    found = log.read_placement(home)
    assert set(rows_of(found)) == {f"{number}/{n_each - 1}" for number in range(n_threads)}
    assert found.number == n_threads * n_each
    home.close()


def test_who_loses_a_number_merges_his_changes_into_the_winners(store):
    gated = GateStore(store)
    gate = gated.stop_at("before_put_if_absent", placement_key(1))
    late = threading.Thread(target=lambda: log.commit_placement(gated, {"late": row("late")}))
    late.start()
    with gate:
        gate.wait_reached()
        log.commit_placement(store, {"early": row("early")})
    late.join()
    assert set(rows_of(log.read_placement(store))) == {"early", "late"}


@pytest.mark.parametrize("point", ["tier_placement.written", "tier_placement.hinted"])
@pytest.mark.parametrize("n_before", [0, N_KEPT + 3])
def test_a_commit_that_stops_at_any_point_is_done_by_its_repetition(store, point, n_before):
    for n in range(n_before):
        log.commit_placement(store, {"a": row("a", n_bytes=n)})

    stopped_at(point, lambda: log.commit_placement(store, {"b": row("b")}))
    assert log.read_placement(store).find("b") == row("b")
    assert log.commit_placement(store, {"b": row("b")}).number == n_before + 1
    assert log.commit_placement(store, {"c": row("c")}).number == n_before + 2


def test_an_answer_that_was_lost_is_settled_by_reading_back(store):
    faulty = FaultStore(store, [Fault("put_if_absent", keys="*.arrow", kind=FaultKind.LOST_RESPONSE)])
    assert log.commit_placement(faulty, {"a": row("a")}).number == 1
    assert faulty.faulted_calls == [("put_if_absent", placement_key(1))]


def test_a_put_that_did_nothing_is_an_error(store):
    faulty = FaultStore(store, [Fault("put_if_absent", keys="*.arrow")])
    with pytest.raises(StoreError, match="scripted fault"):
        log.commit_placement(faulty, {"a": row("a")})
    assert numbers(store) == []


def test_a_deletion_that_fails_fails_no_commit(store):
    faulty = FaultStore(store, [Fault("delete", times=99)])
    for n in range(N_KEPT + 2):
        log.commit_placement(faulty, {"a": row("a", n_bytes=n)})
    assert log.read_placement(store).find("a").n_bytes == N_KEPT + 1
    assert numbers(store) == list(range(1, N_KEPT + 3))


def test_a_commit_that_cannot_write_the_marker_is_done_and_found(store):
    log.start_tracking(store)
    faulty = FaultStore(store, [Fault("put", keys=TRACKING_MARKER_KEY)])
    assert log.commit_placement(faulty, {"a": row("a")}).number == 1
    assert json.loads(store.get(TRACKING_MARKER_KEY))["placement"] == 0
    assert log.read_placement(store).find("a") == row("a")
    log.commit_placement(store, {"b": row("b")})
    assert json.loads(store.get(TRACKING_MARKER_KEY))["placement"] == 2


def test_a_crowd_that_always_wins_is_a_conflict(store, monkeypatch):
    monkeypatch.setattr(log, "MAX_REBASES", 3)

    class Crowd(FaultStore):
        def put_if_absent(self, key, data):
            if key.endswith(".arrow"):
                log.commit_placement(store, {"n": row("n", n_bytes=int(key[-26:-6]))})
            return super().put_if_absent(key, data)

    with pytest.raises(CommitConflict, match="3 others changed the placement first"):
        log.commit_placement(Crowd(store), {"a": row("a")})
