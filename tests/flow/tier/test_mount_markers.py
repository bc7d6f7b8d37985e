"""A tier whose disk is not mounted is unavailable, not empty: nothing is deleted or moved on account of it."""

import sqlite3
from contextlib import closing

import pytest
from tests.flow.tier.test_run_once import DAY_S, RULES, Tiers
from tests.support.faults import Fault, FaultStore

from tiercache.store import LocalFolder
from tiercache.tier import mover
from tiercache.tier.journal import TierCatalog
from tiercache.tier.mover import DONE, PARTLY, catalog_path, open_mover
from tiercache.tier.moves import apply_plan
from tiercache.tier.stores import MOUNT_MARKER_KEY, Stores, ensure_mount_marker, unavailable_reason


@pytest.fixture
def tiers(tmp_path):
    """Objects that a rule deletes by age, in two tiers."""
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


def planned(tiers):
    file = tiers.file
    with (
        Stores(file) as stores,
        TierCatalog(catalog_path(file), {tier.name: tier.url for tier in file.tiers}) as catalog,
    ):
        return mover._plan(file, stores, catalog, confirmed=False)[0].plan


def mark_of(tiers, tier):
    path = tiers.root / tier / MOUNT_MARKER_KEY
    return path.read_text().strip() if path.exists() else None


# -- deletions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", ["hot", "archive"])
def test_a_due_deletion_waits_until_the_unavailable_tier_is_back(tiers, clock, tier):
    clock.jump(6 * DAY_S)
    assert tiers.run().applied.n_made == 1
    unmount(tiers, tier)
    clock.jump(DAY_S + 1)
    report = tiers.run()
    assert (report.deletions.n_made, report.deletions.waiting_drops, report.exit_code) == (0, 1, PARTLY)
    assert tiers.keys("standard") == ["scratch/a"]
    mount(tiers, tier)
    report = tiers.run()
    assert (report.deletions.n_made, report.exit_code) == (1, DONE)
    assert (tiers.keys("standard"), tiers.keys("archive")) == ([], [])


def test_an_older_plan_deletes_nothing_while_a_tier_is_unavailable(tiers, clock):
    """The disk is unmounted between plan and apply."""
    tiers.run()
    clock.jump(6 * DAY_S)
    plan = planned(tiers)
    assert [move.action for move in plan.moves] == ["delete"]
    unmount(tiers, "archive")
    stopped = apply(tiers, plan).stopped
    assert ["nothing is deleted while tier archive cannot be seen" in one.reason for one in stopped] == [True]


def test_an_unavailable_source_is_not_taken_for_a_deleted_one(tmp_path, clock):
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
    assert tiers.run().deletions.waiting_drops == 1
    unmount(tiers, "hot")
    clock.jump(DAY_S + 1)
    report = tiers.run()
    assert (report.deletions.n_made, report.deletions.waiting_drops) == (0, 1)
    mount(tiers, "hot")
    assert tiers.run().deletions.n_made == 1
    assert tiers.keys("hot") == ["ck/run/step-2.pt"]


# -- marks ------------------------------------------------------------------------------------------------------------


def test_an_empty_tier_gets_no_marker(tmp_path):
    """It may be the mount point of an unmounted disk, and the marker would identify the wrong disk."""
    tiers = Tiers(tmp_path)
    tiers.write("standard", "x")
    (tmp_path / "hot").mkdir()
    tiers.run()
    assert mark_of(tiers, "hot") is None
    tiers.write("hot", "x")
    tiers.run()
    assert mark_of(tiers, "hot") is not None


def test_a_plan_writes_no_marker(tiers):
    planned(tiers)
    assert [mark_of(tiers, name) for name in ("hot", "standard", "archive")] == [None, None, None]


def test_a_read_only_source_has_no_marker_and_is_moved_from(tiers):
    file = tiers.file
    store = FaultStore(LocalFolder(tiers.root / "hot"), [Fault("put_if_absent", retryable=False)])
    with TierCatalog(catalog_path(file), {tier.name: tier.url for tier in file.tiers}) as catalog:
        assert ensure_mount_marker(file.tier("hot"), store, catalog, gets=False) == ""
        assert catalog.mount_marker("hot") is None


def test_an_empty_tier_without_a_marker_that_held_copies_is_unavailable(tiers):
    """An earlier release wrote no marker, and a read-only disk has none."""
    tiers.run()
    file = tiers.file
    with closing(sqlite3.connect(catalog_path(file))) as db, db:
        db.execute("DELETE FROM marks")
        copy = str(tiers.root / "hot"), "other", 100, "e", 5, None, 1
        db.execute("INSERT INTO copies VALUES (?, ?, ?, ?, ?, ?, ?)", copy)
    unmount(tiers, "hot")
    with (
        TierCatalog(catalog_path(file), {tier.name: tier.url for tier in file.tiers}) as catalog,
        Stores(file) as stores,
    ):
        for gets in (True, False):
            assert "hot is empty, although it held copies" in ensure_mount_marker(
                file.tier("hot"), stores.store("hot"), catalog, gets=gets
            )
        (tiers.root / "hot" / "_tiercache").mkdir()
        (tiers.root / "hot" / MOUNT_MARKER_KEY).write_text("it is this one")
        assert unavailable_reason(file.tier("hot"), stores.store("hot"), catalog) == ""


def apply(tiers, plan):
    file = tiers.file
    places = {tier.name: tier.url for tier in file.tiers}
    with (
        TierCatalog(catalog_path(file), places) as catalog,
        Stores(file) as stores,
        open_mover(file, stores, catalog) as context,
    ):
        return apply_plan(context, plan)
