"""A tier whose disk is not mounted is told from one that is empty, and nothing is deleted on what cannot be seen."""

import json
import sqlite3
from contextlib import closing

import pytest
from tests.support.clock import JumpingClock
from tests.tier.test_run import DAY_S, RULES, Tiers

from tiercache.catalog.tiers import TierCatalog
from tiercache.store import LocalFolder
from tiercache.testing import Fault, FaultStore
from tiercache.tier.move.mover import DONE, PARTLY, Mover, catalog_path, run_once
from tiercache.tier.move.transfer import Transfer
from tiercache.tier.stores import MARKER_KEY, Stores, ensure_marker, unavailable_reason


@pytest.fixture
def clock():
    with JumpingClock() as clock:
        yield clock


@pytest.fixture
def tiers(tmp_path):
    """What a rule deletes by age lies in two tiers."""
    tiers = Tiers(tmp_path)
    tiers.write("standard", "scratch/a")
    tiers.write("archive", "scratch/a")
    tiers.write("hot", "other")
    return tiers


def unmount(tiers, tier):
    (tiers.root / tier).rename(tiers.root / f"{tier}-away")
    (tiers.root / tier).mkdir()


def mount(tiers, tier):
    away = tiers.root / f"{tier}-away"
    (tiers.root / tier).rmdir()
    away.rename(tiers.root / tier)


def mark_of(tiers, tier):
    path = tiers.root / tier / MARKER_KEY
    return path.read_text().strip() if path.exists() else None


# -- deletions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", ["hot", "archive"])
def test_no_last_copy_is_planned_for_deletion_while_a_tier_is_missing_and_the_plan_says_so(tiers, clock, tier):
    tiers.run()
    unmount(tiers, tier)
    clock.jump(6 * DAY_S)
    report = tiers.run()
    assert [move for move in report.plan.moves if move.action == "delete"] == []
    reasons = [one.reason for one in report.plan.refusals if one.path == "scratch/a"]
    assert [f"while tier {tier} cannot be seen: {tiers.root / tier}/{MARKER_KEY}: expected " in r for r in reasons] == [
        True
    ]


@pytest.mark.parametrize("tier", ["hot", "archive"])
def test_a_deletion_whose_grace_is_over_waits_until_the_tier_is_back(tiers, clock, tier):
    clock.jump(6 * DAY_S)
    assert tiers.run().applied.done == 1
    unmount(tiers, tier)
    clock.jump(DAY_S + 1)
    report = tiers.run()
    assert (report.settled.done, report.settled.waiting_drops, report.exit_code) == (0, 1, PARTLY)
    assert tiers.keys("standard") == ["scratch/a"]
    mount(tiers, tier)
    report = tiers.run()
    assert (report.settled.done, report.exit_code) == (1, DONE)
    assert (tiers.keys("standard"), tiers.keys("archive")) == ([], [])


def test_a_plan_of_before_deletes_nothing_while_a_tier_is_missing(tiers, clock):
    """The plan was made, the disk went, and then it is applied."""
    tiers.run()
    clock.jump(6 * DAY_S)
    plan = tiers.run(dry_run=True).plan
    assert [move.action for move in plan.moves] == ["delete"]
    unmount(tiers, "archive")
    stopped = apply(tiers, plan).stopped
    assert ["nothing is deleted while tier archive cannot be seen" in one.reason for one in stopped] == [True]


def test_a_source_that_is_missing_is_not_taken_for_one_that_was_dropped(tmp_path, clock):
    tiers = Tiers(tmp_path)
    for step in (1, 2):
        tiers.write("standard", f"ck/run/step-{step}.pt", b"%d" % step)
    tiers.write_rules()
    move_hot = RULES.replace("keep_standard", "keep_hot")
    path = tmp_path / "tiercache.toml"
    path.write_text(path.read_text().replace(RULES, move_hot))
    for step in (1, 2):
        tiers.write("hot", f"ck/run/step-{step}.pt", b"%d" % step)
        (tmp_path / "standard" / f"ck/run/step-{step}.pt").unlink()
    clock.jump(2 * DAY_S)
    assert tiers.run().settled.waiting_drops == 1
    unmount(tiers, "hot")
    clock.jump(DAY_S + 1)
    report = tiers.run()
    assert (report.settled.done, report.settled.waiting_drops) == (0, 1)
    mount(tiers, "hot")
    assert tiers.run().settled.done == 1
    assert tiers.keys("hot") == ["ck/run/step-2.pt"]


def test_nothing_is_planned_to_go_to_a_tier_that_is_missing(tmp_path, clock):
    tiers = Tiers(tmp_path)
    tiers.write("archive", "seen")
    tiers.run()
    unmount(tiers, "archive")
    for step in (1, 2):
        tiers.write("standard", f"ck/run/step-{step}.pt", b"%d" % step)
    clock.jump(2 * DAY_S)
    report = tiers.run()
    assert not report.plan.moves
    assert ["nothing goes to tier archive" in one.reason for one in report.plan.refusals] == [True]


# -- marks ------------------------------------------------------------------------------------------------------------


def test_a_tier_that_only_sends_gets_a_mark_at_the_first_run(tiers):
    tiers.run()
    assert mark_of(tiers, "hot") is not None


def test_a_tier_in_which_nothing_lies_gets_none_until_something_does(tmp_path):
    """It may be a disk that is not mounted, and the mark would be of the wrong one."""
    tiers = Tiers(tmp_path)
    tiers.write("standard", "x")
    (tmp_path / "hot").mkdir()
    tiers.run()
    assert mark_of(tiers, "hot") is None
    tiers.write("hot", "x")
    tiers.run()
    assert mark_of(tiers, "hot") is not None


def test_a_mark_that_another_machine_has_written_is_taken(tiers):
    tiers.write("hot", MARKER_KEY, b"theirs\n")
    tiers.run()
    with TierCatalog(catalog_path(tiers.file)) as catalog:
        assert catalog.mark(str(tiers.root / "hot")) == "theirs"


def test_a_dry_run_and_a_plan_write_no_mark(tiers):
    tiers.run(dry_run=True)
    assert [mark_of(tiers, name) for name in ("hot", "standard", "archive")] == [None, None, None]


def test_a_source_that_cannot_be_written_has_no_mark_and_is_moved_from(tiers):
    file = tiers.file
    store = FaultStore(LocalFolder(tiers.root / "hot"), [Fault("put_if_absent", retryable=False)])
    with TierCatalog(catalog_path(file), {tier.name: tier.url for tier in file.tiers}) as catalog:
        assert ensure_marker(file.tier("hot"), store, catalog, gets=False) == ""
        assert catalog.mark("hot") is None


def test_a_tier_without_a_mark_that_had_copies_and_is_empty_is_missing(tiers):
    """As an earlier release has left it, or a disk that cannot be written."""
    tiers.run()
    file = tiers.file
    with closing(sqlite3.connect(catalog_path(file))) as db, db:
        db.execute("DELETE FROM marks")
        copy = str(tiers.root / "hot"), "other", 100, "e", 5, "", None, 1
        db.execute("INSERT INTO copies VALUES (?, ?, ?, ?, ?, ?, ?, ?)", copy)
    unmount(tiers, "hot")
    with (
        TierCatalog(catalog_path(file), {tier.name: tier.url for tier in file.tiers}) as catalog,
        Stores(file) as stores,
    ):
        for gets in (True, False):
            assert "hot is empty, although it held copies" in ensure_marker(
                file.tier("hot"), stores.store("hot"), catalog, gets=gets
            )
        (tiers.root / "hot" / "_tiercache").mkdir()
        (tiers.root / "hot" / MARKER_KEY).write_text("it is this one")
        assert unavailable_reason(file.tier("hot"), stores.store("hot"), catalog) == ""


def test_the_summary_of_a_run_stays_json_while_a_tier_is_missing(tiers, clock):
    tiers.run()
    unmount(tiers, "archive")
    clock.jump(6 * DAY_S)
    report = run_once(tiers.file)
    summary = json.loads(json.dumps(report.to_json()))
    assert (summary["refused"], summary["unseen"], summary["exit_code"]) == (1, ["archive"], PARTLY)


def test_a_run_ends_with_done_again_when_the_tier_is_back_or_its_mark_is_written_into_a_new_disk(tiers):
    tiers.run()
    mark = mark_of(tiers, "hot")
    unmount(tiers, "hot")
    assert [tiers.run(dry_run=dry).exit_code for dry in (True, False)] == [PARTLY, PARTLY]
    mount(tiers, "hot")
    assert tiers.run().exit_code == DONE
    unmount(tiers, "hot")
    tiers.write("hot", MARKER_KEY, mark.encode())
    assert tiers.run().exit_code == DONE


def test_a_tier_that_has_never_held_anything_is_not_missed(tmp_path):
    tiers = Tiers(tmp_path)
    tiers.write("standard", "x")
    (tmp_path / "hot").mkdir()  # and there is no folder of archive
    for dry_run in (True, False, False):
        report = tiers.run(dry_run=dry_run)
        assert (report.unseen, report.exit_code) == ({}, DONE)


def test_home_is_missed_too(tiers):
    tiers.run()
    unmount(tiers, "standard")
    for dry_run in (True, False):
        report = tiers.run(dry_run=dry_run)
        assert (list(report.unseen), report.exit_code) == (["standard"], PARTLY)


def apply(tiers, plan):
    file = tiers.file
    places = {tier.name: tier.url for tier in file.tiers}
    with TierCatalog(catalog_path(file), places) as catalog, Stores(file) as stores, Transfer(stores) as transfer:
        return Mover(file, stores, catalog, transfer).apply(plan)
