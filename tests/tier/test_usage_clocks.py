"""Machines whose clocks are wrong are readers all the same: the store says when they reported."""

from dataclasses import replace

import pyarrow as pa
import pytest
from tests.support.stores import CountingStore

from tiercache.store import MemoryStore
from tiercache.testing import WrapperStore
from tiercache.tier.placement import use_reports
from tiercache.tier.placement.use_reports import (
    IN_USE_S,
    ActiveReader,
    UseReport,
    merge_reports,
    read_reports,
    usage_key,
)

NAMES = pa.array(["a", "b"])
DAY_S = 86_400.0
NOW_S = 1_800_000_000.0


class Dated(WrapperStore):
    """Says when its objects were written; None: it does not know."""

    def __init__(self, inner, dated_s):
        super().__init__(inner)
        self.dated_s = dated_s

    def list(self, prefix=""):
        return (replace(info, modified_s=self.dated_s) for info in super().list(prefix))


@pytest.fixture
def store(request):
    store = MemoryStore(f"clocks-{request.node.name}")
    yield store
    store.delete([info.key for info in store.list()])


def reported(store, machine_s, *, store_s, reads_all=False):
    """What a machine whose clock says machine_s has reported, as the planner reads it; it began an hour before."""
    reader = ActiveReader(machine_s - 3600, machine_s, reads_all)
    report = UseReport("m", machine_s, machine_s if reads_all else 0.0, {"r": reader}, {"a": (machine_s - 60, 3)})
    store.put(usage_key("m"), use_reports.encode(report))
    (found,) = read_reports(Dated(store, store_s))
    return found


@pytest.mark.parametrize("behind_s", [8 * DAY_S, 5 * 365 * DAY_S, NOW_S - 1000])
def test_what_a_machine_reads_whose_clock_is_far_behind_is_in_use(store, behind_s):
    said = merge_reports([reported(store, NOW_S - 100 - behind_s, store_s=NOW_S - 100)], NAMES, now_s=NOW_S)
    assert said.in_use.tolist() == [True, False]
    assert said.last_use_s[0] == NOW_S - 160


def test_one_that_has_not_reported_for_hours_is_waited_for_by_the_stores_clock(store):
    heard_s = NOW_S - IN_USE_S - 100
    assert merge_reports([reported(store, 1000.0, store_s=heard_s)], NAMES, now_s=NOW_S).unreported


def test_one_that_the_store_has_not_heard_within_silence_is_gone(store):
    said = merge_reports([reported(store, 1000.0, store_s=NOW_S - 8 * DAY_S)], NAMES, now_s=NOW_S)
    assert (said.unreported, said.in_use.any()) == (False, False)


def test_a_run_over_all_shards_is_dated_by_the_stores_clock(store):
    said = merge_reports([reported(store, 1000.0, store_s=NOW_S, reads_all=True)], NAMES, now_s=NOW_S)
    assert said.last_use_s.tolist() == [NOW_S, NOW_S]


@pytest.mark.parametrize("store_s", [None, NOW_S - 20 * DAY_S, NOW_S + 30])
def test_times_are_as_reported_where_the_store_says_none_an_earlier_one_or_nearly_the_same(store, store_s):
    said = reported(store, NOW_S, store_s=store_s)
    assert (said.reported_s, said.readers["r"].since_s, said.shards["a"]) == (NOW_S, NOW_S - 3600, (NOW_S - 60, 3))


def test_a_report_that_is_longer_than_any_is_not_read_and_is_of_a_machine_that_has_not_reported(store, monkeypatch):
    reported(store, NOW_S - 100, store_s=NOW_S - 100)
    monkeypatch.setattr(use_reports, "_MOST_BYTES", 10)
    counting = CountingStore(Dated(store, NOW_S - 100))
    assert merge_reports(read_reports(counting), NAMES, now_s=NOW_S).unreported
    assert counting.n_calls("get") == 0


def test_a_report_of_a_time_before_there_was_any_is_put_no_later_than_the_store_says(store):
    found = reported(store, -1e300, store_s=NOW_S)
    assert merge_reports([found], NAMES, now_s=NOW_S).last_use_s[0] <= NOW_S
