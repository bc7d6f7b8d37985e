"""Moves lose nothing when the catalog is lost, a process is killed, a store fails, or two movers run."""

from contextlib import suppress
from dataclasses import replace

import pytest
from tests.stress.kills import points_where
from tests.support.clock import FakeClock
from tests.support.faults import Fault, FaultKind
from tests.support.tier_moves import PARTS, HookAt, Killed, World, checkpoint, moved_away

from tiercache.errors import CommitConflict, StoreError
from tiercache.tier.deletions import DeletionFacts
from tiercache.tier.lock import LockRecord, TierLock
from tiercache.tier.mover import finish_copies


@pytest.fixture
def world(tmp_path):
    return World(tmp_path / "world")


# -- lost books ------------------------------------------------------------------------------------------------------


def test_a_lost_catalog_costs_work_but_no_data(world):
    plan, _ = moved_away(world, "f")
    world.lose_catalog()
    world.later()
    assert world.run_due_deletions().waiting_drops == 0
    applied = world.apply(plan)
    assert (applied.n_made, applied.n_bytes, applied.waiting_drops) == (1, 0, 1)
    world.later()
    world.run_due_deletions()
    assert world.where("f") == ["archive"]
    world.lose_catalog()
    assert world.apply(plan).n_made == 1


def test_an_old_catalog_does_not_delete_a_copy_that_was_moved_back(world):
    moved_away(world, "f")
    old = world.catalog_path.read_bytes()
    world.later()
    world.run_due_deletions()
    world.apply(world.plan(world.move("f", "archive", "standard"), name="back"))
    world.later()
    world.run_due_deletions()
    assert world.where("f") == ["standard"]
    world.catalog_path.write_bytes(old)
    world.run_due_deletions()
    assert world.where("f") == ["standard"]


def test_an_old_catalog_does_not_delete_the_newer_of_two_copies(world):
    """The copy in the archive exists, and home has the same bytes, rewritten."""
    moved_away(world, "f")
    old = world.catalog_path.read_bytes()
    world.later()
    world.run_due_deletions()
    world.apply(world.plan(world.move("f", "archive", "standard"), name="back"))
    world.catalog_path.write_bytes(old)
    world.later()
    assert len(world.run_due_deletions().stopped) == 1
    assert "standard" in world.where("f")


# -- killed, at every point -------------------------------------------------------------------------------------------


def a_day(world):
    """Make all kinds of moves, from the first to the last step."""
    world.apply(world.day_plan)
    world.later()
    world.run_due_deletions()


def prepared(tmp_path, name):
    world = World(tmp_path / name, classes=True)
    world.put("standard", "f", "old", *PARTS)
    world.put("hot", "g")
    world.day_plan = world.plan(
        world.move("f", "standard", "archive", number=1),
        world.move("ck/step-1", "standard", "archive", keys=PARTS, kind="checkpoint", number=2),
        world.move("g", "hot", "standard", number=3),
        world.move("old", "standard", None, action="delete", number=4),
    )
    world.facts = DeletionFacts(deletes=frozenset(["old"]))
    return world


def check_nothing_is_lost(world):
    for key in ("f", "g", *PARTS):
        assert world.where(key), key
    for tier in ("standard", "archive"):
        found = [key for key in world.keys(tier) if key.startswith("ck/")]
        assert PARTS[-1] not in found or len(found) == len(PARTS), f"{tier} looks whole: {found}"
    row = world.row("f")
    place = "standard" if row is None else "archive"
    assert place in world.where("f"), "readers are led to where it is not"


def check_all_is_done(world):
    assert world.where("f") == ["archive"]
    assert world.where("g") == ["standard"]
    assert [world.where(key) for key in PARTS] == [["archive"]] * 3
    assert world.keys("standard") == ["g"]
    assert world.keys("hot") == []


ELSEWHERE = {  # points that such a day does not reach, and the tests that strike there
    "test_interrupted_copies.py": {"tier_move.withdrawing", "tier_move.withdrawn", "tier_run.withdrawn"},
    "test_a_change_of_class": {"tier_move.class_changed"},
    "test_tier_get_archive.py": {"tier_recall.held"},
    "test_run_once.py": {f"tier_run.{name}" for name in ("applied", "finished", "planned", "tracked")},
}


@pytest.mark.parametrize("point", ["tier_move.class_changed", "tier_move.reclassed"])
def test_a_change_of_class_that_was_interrupted_is_completed(tmp_path, point):
    world = World(tmp_path / "world", classes=True, shared=True, cold_class="STANDARD_IA")
    world.put("standard", "f")
    plan = world.plan(world.move("f", "standard", "archive", action="reclass"))
    with HookAt(point) as hook, pytest.raises(Killed):
        world.apply(plan)
    assert hook.hit
    assert world.where("f") != []
    world.apply(world.plan(world.move("f", "standard", "archive", action="reclass"), name="again"))
    assert world.inner["standard"].head("f").storage_class == "STANDARD_IA"
    assert world.where("f") != []


def test_a_run_killed_at_any_point_loses_nothing_and_the_next_run_finishes(tmp_path):
    with HookAt() as all_of_them:
        a_day(prepared(tmp_path, "whole"))
    points = points_where(lambda name: name.startswith("tier_"))
    assert {*points} == {*all_of_them.reached} & {*points} | set().union(*ELSEWHERE.values()), "a point has no test"
    wanted = [name for name in all_of_them.reached if name.startswith("tier_")]
    strikes = sorted({(name, wanted.count(name)) for name in wanted})  # stress: at any time that it is reached
    assert len(strikes) > 20
    for number, (name, nth) in enumerate(strikes):
        world = prepared(tmp_path, f"w{number}")
        with HookAt(name, nth) as hook, pytest.raises(Killed):
            a_day(world)
        assert hook.hit
        check_nothing_is_lost(world)
        a_day(world)
        check_nothing_is_lost(world)
        world.later()
        a_day(world)
        check_all_is_done(world)


def test_readers_are_led_to_no_copy_that_was_withdrawn_because_its_source_was_written_again(world):
    world.put("standard", "f")
    with HookAt("tier_move.placed"), pytest.raises(Killed):
        world.apply(world.plan(world.move("f", "standard", "archive")))
    world.inner["standard"].put("f", b"written again")
    with world.opened() as context:
        (stopped,) = finish_copies(context).stopped
    assert "expected 1000 bytes, found 13" in stopped.reason
    row = world.row("f")
    assert row is None or "archive" in world.where("f")


@pytest.mark.parametrize("tier", ["standard", "archive"])
def test_what_somebody_changes_while_an_interrupted_copy_is_withdrawn_stays(world, tier):
    plan = checkpoint(world)
    with HookAt("tier_move.parts_copied"), pytest.raises(Killed):
        world.apply(plan)
    world.write_rules("# other rules")
    change = HookAt("tier_move.withdrawing", do=lambda: world.inner[tier].put(PARTS[0], b"written again"))
    with change, world.opened() as context:
        (stopped,) = finish_copies(context).stopped
    assert change.hit
    assert "changed while an interrupted copy was compared" in stopped.reason
    assert world.inner[tier].get(PARTS[0]) == b"written again"
    assert PARTS[1] in world.keys("archive")


@pytest.mark.parametrize("kind", [FaultKind.ERROR, FaultKind.LOST_RESPONSE])
@pytest.mark.parametrize(
    "verb", ["head", "read_tail", "put", "put_if_absent", "read_into", "complete", "delete", "list"]
)
def test_a_store_that_fails_at_any_call_loses_nothing(tmp_path, verb, kind):
    for nth, tier in ((1, "standard"), (2, "archive"), (4, "standard")):
        world = prepared(tmp_path, f"{tier}{nth}")
        world.fail(tier, Fault(verb, nth=nth, times=2, kind=kind))
        for _ in range(3):
            with suppress(StoreError):
                a_day(world)
            check_nothing_is_lost(world)
        check_all_is_done(world)


# -- two processes ----------------------------------------------------------------------------------------------------


def test_a_second_mover_is_refused(world):
    world.put("standard", "f")
    plan = world.plan(world.move("f", "standard", "archive"))
    with TierLock(world.inner["standard"]), pytest.raises(CommitConflict, match="expected to be alone"):
        world.apply(plan)
    assert world.apply(plan).n_made == 1


@pytest.mark.parametrize("point", ["tier_drop.checked", "tier_drop.journaled", "tier_lock.announced"])
def test_a_process_that_lost_its_lock_deletes_nothing(world, point):
    moved_away(world, "f")
    world.later()
    steal = HookAt(point, do=lambda: world.inner["standard"].put(f"_tiercache/tier.lock/{99:020d}", b"{}"))
    with steal, pytest.raises(CommitConflict, match="lost"):
        world.run_due_deletions()
    assert world.where("f") == ["standard", "archive"]


def test_a_copy_that_a_sleeping_process_may_delete_is_not_relied_on(world):
    """1. Z may delete the copy in the archive, and sleeps. 2. We move from home to the archive. 3. Z wakes up."""
    moved_away(world, "f")
    world.later()
    sleeper = replace(
        LockRecord.of_this_process(), boot="another", renewed_s=0.0, dropping=((world.url("archive"), "f"),)
    )
    world.inner["standard"].put(f"_tiercache/tier.lock/{7:020d}", sleeper.encode())
    with (
        TierLock(world.inner["standard"], lifetime_s=1.0, clock=FakeClock()) as lock,
        world.opened(lock=lock) as context,
    ):
        settled = world.run_due_deletions(context)
    assert "may still delete this copy" in settled.stopped[0].reason
    assert world.where("f") == ["standard", "archive"]
