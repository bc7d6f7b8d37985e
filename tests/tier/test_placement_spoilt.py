"""Placements that are spoilt while they are written, that rot later, and that are read wrongly: which of them count."""

from __future__ import annotations

import json
import threading

import pytest
from tests.support.stores import CountingStore, GateStore
from tests.tier.placements import numbers, row, rows_of, stopped_at

from tiercache.errors import CorruptShard, StoreError
from tiercache.testing import Fault, FaultStore
from tiercache.testing.faults import WrapperStore
from tiercache.tier.placement import log
from tiercache.tier.placement.log import N_KEPT, TRACKING_MARKER_KEY, placement_key


class Spoiling(WrapperStore):
    """Of the first n placements that are put half arrives."""

    def __init__(self, inner, n):
        super().__init__(inner)
        self.n_left = n

    def put_if_absent(self, key, data):
        if key.endswith(".arrow") and self.n_left:
            self.n_left -= 1
            data = data[: len(data) // 2]
        return super().put_if_absent(key, data)


def spoil(store, number: int) -> None:
    data = store.get(placement_key(number))
    store.put(placement_key(number), data.replace(b"s3://", b"s3:/0"))


@pytest.mark.parametrize("n_before", [0, 1, 5])
@pytest.mark.parametrize("n_spoilt", [1, 3])
def test_what_is_spoilt_while_it_is_written_is_noticed_and_written_under_the_next_number(store, n_before, n_spoilt):
    for n in range(n_before):
        log.commit_placement(store, {f"{n}": row(f"{n}")})
    assert log.commit_placement(Spoiling(store, n_spoilt), {"a": row("a")}).number == n_before + n_spoilt + 1
    found = log.read_placement(store)
    assert set(rows_of(found)) == {"a", *map(str, range(n_before))}
    assert log.earlier_placements(store, found) == ()


@pytest.mark.parametrize("n_before", [0, 1, N_KEPT + 3])
def test_one_that_was_spoilt_and_never_read_back_counts_for_nothing_and_is_stepped_over(store, n_before):
    for n in range(n_before):
        log.commit_placement(store, {"a": row("a", n_bytes=n)})
    log.start_tracking(store)
    known = log.read_placement(store)
    for n in range(2):
        stopped_at(
            "tier_placement.written",
            lambda n=n: log.commit_placement(Spoiling(store, 1), {"b": row("b", n_bytes=n)}),
        )
    assert rows_of(log.read_placement(store)) == rows_of(log.find_newest_placement(store, known)) == rows_of(known)
    again = log.commit_placement(store, {"a": known.find("a")})
    assert (again.number, numbers(store)[-1]) == (n_before, n_before + 2)
    assert log.commit_placement(store, {"c": row("c")}).number == n_before + 3
    assert rows_of(log.read_placement(store)) == {**rows_of(known), "c": row("c")}


def test_places_of_before_are_found_past_one_that_is_damaged(store):
    log.commit_placement(store, {"a": row("a", "s3://first/d")})
    log.commit_placement(store, {"a": row("a", "s3://second/d")})
    newest = log.commit_placement(store, {"a": row("a", "s3://third/d")})
    spoil(store, 2)
    assert [one.find("a").url for one in log.earlier_placements(store, newest)] == ["s3://first/d"]


@pytest.mark.parametrize("verb", ["read_tail", "list"])
def test_what_was_put_and_cannot_be_looked_at_again_may_have_been_done(store, verb):
    log.commit_placement(store, {"a": row("a")})
    keys = placement_key(2) if verb == "read_tail" else "*"
    faulty = FaultStore(store, [Fault(verb, nth=2, keys=keys)])
    with pytest.raises(StoreError, match="scripted fault") as failed:
        log.commit_placement(faulty, {"b": row("b")})
    assert failed.value.maybe_done
    assert log.read_placement(store).find("b") == row("b")
    assert log.commit_placement(faulty, {"b": row("b")}).number == 2


@pytest.mark.parametrize("mark", [log.encode_mark(2), log.encode_mark(7), b"{}", b"", None])
def test_one_that_rots_later_or_may_have_been_read_back_is_corrupt_for_readers_and_writers(store, mark):
    for n in range(2):
        log.commit_placement(store, {"a": row("a", n_bytes=n)})
    spoil(store, 2)
    store.delete([TRACKING_MARKER_KEY])
    if mark is not None:
        store.put(TRACKING_MARKER_KEY, mark)
    with pytest.raises(CorruptShard, match=placement_key(2)):
        log.find_newest_placement(store)
    with pytest.raises(CorruptShard, match=placement_key(2)):
        log.commit_placement(store, {"b": row("b")})
    with pytest.raises(CorruptShard, match=placement_key(2)):
        log.read_placement(store)  # if there was no mark, there is one by now
    assert numbers(store) == [1, 2]


def test_where_nothing_is_left_that_could_be_read_instead_it_is_corrupt(store):
    for n in range(3):
        log.commit_placement(store, {"a": row("a", n_bytes=n)})
    store.put(TRACKING_MARKER_KEY, log.encode_mark(0))
    store.delete([placement_key(1), placement_key(2)])
    spoil(store, 3)
    with pytest.raises(CorruptShard, match=placement_key(3)):
        log.read_placement(store)


class Misread(WrapperStore):
    """A placement that is read wrongly n times, from the first or a later time on."""

    def __init__(self, inner, key, n, nth=1):
        super().__init__(inner)
        self._wrong, self._key, self._n = range(nth, nth + n), key, 0

    def read_tail(self, key, n_bytes):
        data, info = super().read_tail(key, n_bytes)
        self._n += key == self._key
        wrong = key == self._key and self._n in self._wrong
        return (data.replace(b"s3://", b"s3:/0") if wrong else data), info


def test_what_is_read_wrongly_once_is_read_again(store):
    log.commit_placement(store, {"a": row("a")})
    assert rows_of(log.read_placement(Misread(store, placement_key(1), 1))) == {"a": row("a")}
    with pytest.raises(CorruptShard):
        log.read_placement(Misread(store, placement_key(1), 2))
    assert log.commit_placement(Misread(store, placement_key(2), 1, nth=2), {"b": row("b")}).number == 2
    assert numbers(store) == [1, 2]


@pytest.mark.parametrize("point", ["before_put", "after_put"])
def test_who_steps_over_one_that_was_whole_and_its_writer_see_each_other(store, point):
    log.commit_placement(store, {"a": row("a")})
    gated = GateStore(store)
    gate = gated.stop_at(point, TRACKING_MARKER_KEY)
    done = []
    writer = threading.Thread(target=lambda: done.append(log.commit_placement(gated, {"b": row("b")})))
    writer.start()
    with gate:
        gate.wait_reached()  # 2 is there, and was read back
        if point == "before_put":  # the mark does not say so yet: it is stepped over, and its writer finds that
            stepping = log.commit_placement(Misread(store, placement_key(2), 4), {"x": row("x")})
            assert (stepping.number, set(rows_of(stepping))) == (3, {"a", "x"})
        else:
            with pytest.raises(CorruptShard):
                log.commit_placement(Misread(store, placement_key(2), 4), {"x": row("x")})
            log.commit_placement(store, {"x": row("x")})
    writer.join()
    assert set(rows_of(log.read_placement(store))) == {"a", "b", "x"}


def test_who_steps_over_one_that_its_writer_marks_meanwhile_takes_his_own_back(store):
    log.commit_placement(store, {"a": row("a")})
    stopped_at("tier_placement.written", lambda: log.commit_placement(store, {"b": row("b")}))
    gated = GateStore(Misread(store, placement_key(2), 2))
    gate = gated.stop_at("after_put_if_absent", placement_key(3))
    stepping = threading.Thread(target=lambda: log.commit_placement(gated, {"x": row("x")}))
    stepping.start()
    with gate:
        gate.wait_reached()
        assert set(rows_of(log.read_placement(store))) == {"a", "x"}
        store.put(TRACKING_MARKER_KEY, log.encode_mark(2))  # its writer, who has listed before 3 was there
    stepping.join()
    assert set(rows_of(log.read_placement(store))) == {"a", "b", "x"}


def test_a_mark_that_was_lost_says_of_all_that_is_there_that_it_was_read_back(store):
    for n in range(3):
        log.commit_placement(store, {"a": row("a", n_bytes=n)})
    store.delete([TRACKING_MARKER_KEY])
    log.start_tracking(store)
    assert json.loads(store.get(TRACKING_MARKER_KEY))["placement"] == 3
    store.delete([TRACKING_MARKER_KEY])
    log.start_tracking(FaultStore(store, [Fault("list", status=403, retryable=False, times=99)]))
    assert "placement" not in json.loads(store.get(TRACKING_MARKER_KEY))
    spoil(store, 3)
    with pytest.raises(CorruptShard, match=placement_key(3)):
        log.read_placement(store)


def test_a_reader_of_a_spoilt_one_goes_on_where_others_have_written_meanwhile(store):
    log.commit_placement(store, {"a": row("a")})
    stopped_at("tier_placement.written", lambda: log.commit_placement(Spoiling(store, 1), {"b": row("b")}))

    class Slow(WrapperStore):
        n_marks = 0

        def read_tail(self, key, n_bytes):
            self.n_marks += key == TRACKING_MARKER_KEY
            if key == TRACKING_MARKER_KEY and self.n_marks == 2:  # it has read 2, and that there is no 3
                log.commit_placement(store, {"c": row("c")})
            return super().read_tail(key, n_bytes)

    assert set(rows_of(log.read_placement(Slow(store)))) == {"a", "c"}


def test_who_knows_one_before_a_spoilt_one_asks_for_no_more_than_the_next(store):
    log.commit_placement(store, {"a": row("a")})
    stopped_at("tier_placement.written", lambda: log.commit_placement(Spoiling(store, 1), {"b": row("b")}))
    known = log.read_placement(store)
    counting = CountingStore(store)
    assert log.find_newest_placement(counting, known) is known
    assert counting.calls == [("list", log.PLACEMENT_FOLDER), ("read_tail", placement_key(3))]


def test_a_mark_that_is_spoilt_while_it_is_written_is_written_again(store):
    class SpoilingMarks(WrapperStore):
        n_left = 1

        def put(self, key, data):
            self.n_left -= 1
            return super().put(key, b"{" if self.n_left >= 0 else data)

    faulty = SpoilingMarks(store)
    log.commit_placement(faulty, {"a": row("a")})
    assert json.loads(store.get(TRACKING_MARKER_KEY))["placement"] == 1
    faulty.n_left = 99
    with pytest.raises(StoreError, match="expected the marker to say 2 after") as failed:
        log.commit_placement(faulty, {"b": row("b")})
    assert (failed.value.retryable, failed.value.maybe_done) == (True, True)
