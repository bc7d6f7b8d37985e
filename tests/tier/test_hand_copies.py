"""Copies that somebody made by hand are held, and what was written anew is not."""

from dataclasses import replace

import pytest
from tests.tier.moving import PARTS, World, checkpoint, content, moved_away

from tiercache.tier.holds import put_hold, read_holds
from tiercache.tier.move.deletions import DeletionFacts

DAY_S = 86_400.0


@pytest.fixture
def world(tmp_path):
    return World(tmp_path / "world")


def gone_to_archive(world, key="f"):
    """Move a file from home to the archive, until its source is deleted."""
    moved_away(world, key)
    world.later()
    world.run_due_deletions()
    assert world.where(key) == ["archive"]


def hold_of(world, path):
    return read_holds(world.inner["standard"], world.now_s).of(path)


@pytest.mark.parametrize("action", ["move", "drop"])
def test_a_copy_that_was_put_back_by_hand_is_held(world, action):
    gone_to_archive(world)
    world.put("standard", "f")
    applied = world.apply(world.plan(world.move("f", "standard", "archive", action=action), name="again"))
    assert ([one.path for one in applied.held], applied.n_made, applied.stopped) == (["f"], 0, ())
    assert hold_of(world, "f").until_s == world.now_s + 7 * DAY_S
    world.later()
    world.run_due_deletions()
    assert world.where("f") == ["standard", "archive"]


def test_the_rules_apply_again_when_the_hold_has_ended(world):
    gone_to_archive(world)
    world.put("standard", "f")
    world.apply(world.plan(world.move("f", "standard", "archive"), name="again"))
    world.later(8 * DAY_S)
    applied = world.apply(world.plan(world.move("f", "standard", "archive"), name="later"))
    assert (applied.n_made, applied.held) == (1, ())
    world.later()
    world.run_due_deletions()
    assert world.where("f") == ["archive"]


def test_a_deletion_of_last_copies_spares_a_group_with_a_copy_that_was_put_back(world):
    gone_to_archive(world)
    world.put("standard", "f")
    world.facts = DeletionFacts(deletes=frozenset(["f"]))
    applied = world.apply(world.plan(world.move("f", "standard", None, action="delete"), name="again"))
    assert [one.path for one in applied.held] == ["f"]
    world.later()
    world.run_due_deletions()
    assert world.where("f") == ["standard", "archive"]


def test_a_checkpoint_that_was_put_back_is_held_as_a_whole(world):
    world.apply(checkpoint(world))
    world.later()
    world.run_due_deletions()
    world.put("standard", *PARTS)
    move = world.move("ck/step-1", "standard", "archive", keys=PARTS, kind="checkpoint")
    assert [one.path for one in world.apply(world.plan(move, name="again")).held] == ["ck/step-1"]


def test_other_bytes_under_the_same_name_are_not_held(world):
    gone_to_archive(world)
    world.inner["standard"].put("f", content("f")[::-1])
    move = world.move("f", "standard", "archive")
    move = replace(move, objects=(move.objects[0]._replace(crc32c=None),))
    assert world.apply(world.plan(move, name="again")).held == ()
    assert hold_of(world, "f") is None


def test_an_original_that_waits_for_its_deletion_is_not_taken_for_a_copy_made_by_hand(world):
    plan, _ = moved_away(world, "f")
    applied = world.apply(world.plan(world.move("f", "standard", "archive", action="drop"), name="again"))
    assert (applied.held, applied.n_made) == ((), 1)
    assert world.apply(plan).held == ()


def test_without_a_time_for_holds_nothing_is_held(world):
    path = world.root / "tiercache.toml"
    path.write_text(path.read_text().replace("[tiering]", '[tiering]\nhold = "0s"'))
    gone_to_archive(world)
    world.put("standard", "f")
    assert world.apply(world.plan(world.move("f", "standard", "archive"), name="again")).held == ()


def test_a_hold_that_is_made_during_the_grace_period_keeps_the_source(world):
    moved_away(world, "f")
    put_hold(world.inner["standard"], ["f"], until_s=world.now_s + 9 * DAY_S, now_s=world.now_s, why="recalled")
    world.later()
    assert "expected no hold, found it held until" in world.run_due_deletions().stopped[0].reason
    assert world.where("f") == ["standard", "archive"]
    assert world.row("f") is None, "readers are led to the source again"


def test_a_hold_lets_a_group_move_to_a_faster_tier(world):
    gone_to_archive(world)
    put_hold(world.inner["standard"], ["f"], until_s=world.now_s + 9 * DAY_S, now_s=world.now_s, why="recalled")
    applied = world.apply(world.plan(world.move("f", "archive", "standard", action="move"), name="back"))
    assert (applied.n_made, applied.stopped) == (1, ())
