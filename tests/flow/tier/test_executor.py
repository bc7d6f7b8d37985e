"""Applying a plan: copies, checks of sources and destinations, placements, grace periods, pins."""

from dataclasses import replace

import pytest
from tests.support.disk_bucket import flipped, read_object, write_object
from tests.support.faults import Fault
from tests.support.tier_moves import GRACE_S, PARTS, HookAt, Killed, World, checkpoint, content, moved_away

from tiercache.store import placement_log
from tiercache.tier.deletions import DeletionFacts
from tiercache.tier.moves import apply_plan

# -- the straight way ------------------------------------------------------------------------------------------------


def test_a_move_copies_commits_the_placement_and_keeps_its_source_until_grace_is_over(world):
    _, applied = moved_away(world, "f")
    assert (applied.n_made, applied.stopped, applied.waiting_drops, applied.n_bytes) == (1, (), 1, 1000)
    assert world.where("f") == ["standard", "archive"]
    assert world.row("f").url == world.url("archive")
    world.later(GRACE_S - 1)
    assert world.run_due_deletions().waiting_drops == 1
    assert world.where("f") == ["standard", "archive"]
    world.later(2)
    settled = world.run_due_deletions()
    assert (settled.n_made, settled.stopped, settled.waiting_drops, settled.n_bytes) == (1, (), 0, 1000)
    assert world.where("f") == ["archive"]


def test_a_drop_without_a_verified_copy_is_stopped(world):
    world.put("standard", "f")
    world.put("archive", "f")
    applied = world.apply(world.plan(world.move("f", "standard", "archive", action="drop")))
    assert "found one that nobody has verified" in applied.stopped[0].reason


def test_a_temporary_stop_does_not_restart_the_grace_period(world):
    moved_away(world, "f")
    drop = world.move("f", "standard", "archive", action="drop")
    for name, faults in (("1", 1), ("2", 1), ("3", 0)):
        world.later(GRACE_S / 4)
        with HookAt("tier_move.looked", do=lambda: world.fail("archive", *[Fault("head", nth=1)] * faults)):  # noqa: B023
            assert len(world.apply(world.plan(drop, name=name)).stopped) == faults
    world.later(GRACE_S / 4 + 1)
    assert world.run_due_deletions().n_made == 1


# -- groups ----------------------------------------------------------------------------------------------------------


def test_a_checkpoint_that_grew_since_it_was_copied_is_not_deleted(world):
    world.apply(checkpoint(world))
    world.put("standard", "ck/step-1/c")
    world.later()
    settled = world.run_due_deletions()
    assert "found 'ck/step-1/c' beside them" in settled.stopped[0].reason
    assert world.keys("standard") == sorted([*PARTS, "ck/step-1/c"])


# -- a changed world --------------------------------------------------------------------------------------------------


def test_readers_are_not_redirected_from_a_source_that_changed_during_the_copy(world):
    world.put("standard", "f")
    plan = world.plan(world.move("f", "standard", "archive"))
    with HookAt("tier_move.recorded", do=lambda: world.inner["standard"].put("f", content("f")[::-1])):
        applied = world.apply(plan)
    assert "expected ETag" in applied.stopped[0].reason
    assert world.row("f") is None


def test_a_source_that_changes_while_the_placement_is_committed_stays_and_the_placement_is_reverted(world):
    world.put("standard", "f")
    plan = world.plan(world.move("f", "standard", "archive"))
    with HookAt("tier_move.looked", do=lambda: world.inner["standard"].put("f", content("f")[::-1])):
        world.apply(plan)
    world.later()
    assert "expected ETag" in world.run_due_deletions().stopped[0].reason
    assert world.inner["standard"].get("f") == content("f")[::-1]
    assert world.row("f") is None


@pytest.mark.parametrize("harm", ["gone", "other bytes", "other size"])
def test_a_source_stays_if_its_copy_is_no_longer_the_verified_one(world, harm):
    moved_away(world, "f")
    if harm == "gone":
        world.inner["archive"].delete(["f"])
    else:
        world.inner["archive"].put("f", content("f")[::-1] if harm == "other bytes" else b"")
    world.later()
    assert len(world.run_due_deletions().stopped) == 1
    assert world.where("f") == ["standard"]
    assert world.row("f") is None


def test_another_object_at_the_destination_is_never_overwritten(world):
    world.put("standard", "f")
    world.inner["archive"].put("f", b"somebody's")
    applied = world.apply(world.plan(world.move("f", "standard", "archive")))
    assert "it is not overwritten" in applied.stopped[0].reason
    assert world.inner["archive"].get("f") == b"somebody's"


def test_a_pin_stops_a_move_and_a_waiting_deletion(world):
    plan, _ = moved_away(world, "f")
    pin = '[[pins]]\nmatch = "f"\nwhy = "the paper"\n'
    world.write_rules(pin)
    world.later()
    assert world.run_due_deletions().stopped == ()
    assert "the paper" in world.note()
    assert world.where("f") == ["standard", "archive"]
    assert world.row("f") is None
    assert "the paper" in world.apply(world.plan(*plan.moves, name="again")).stopped[0].reason


def test_nothing_is_moved_if_the_rule_file_cannot_be_read_any_more(world):
    world.put("standard", "f")
    plan = world.plan(world.move("f", "standard", "archive"))
    with world.opened() as context:
        (world.root / "tiercache.toml").write_text("[[pins")
        assert "expected to read the pins anew" in apply_plan(context, plan).stopped[0].reason
    assert world.where("f") == ["standard"]


def test_a_changed_rule_file_must_still_ask_for_the_deletion(world):
    moved_away(world, "f", "g")
    world.write_rules("# changed")
    world.facts = DeletionFacts(asked=frozenset([("g", "standard")]))
    world.later()
    assert world.run_due_deletions().stopped == ()
    assert world.journal() == {1: "cancelled", 2: "done"}
    assert world.where("f") == ["standard", "archive"]
    assert world.where("g") == ["archive"]


def test_a_move_stops_if_the_rule_file_changed_the_url_of_its_tier(world):
    world.put("standard", "f")
    plan = world.plan(world.move("f", "standard", "archive"))
    text = (world.root / "tiercache.toml").read_text()
    (world.root / "tiercache.toml").write_text(text.replace(f'"{world.url("archive")}"', '"memory://elsewhere"'))
    assert "plan anew" in world.apply(plan).stopped[0].reason


def test_a_deletion_is_cancelled_if_the_url_of_its_tier_changed(world):
    moved_away(world, "f")
    world.later()
    text = (world.root / "tiercache.toml").read_text()
    (world.root / "tiercache.toml").write_text(text.replace(f'"{world.url("archive")}"', '"memory://elsewhere"'))
    assert "in the rule file" in world.run_due_deletions().stopped[0].reason
    assert world.where("f") == ["standard", "archive"]


def test_a_placement_that_leads_home_stops_a_deletion_at_home(world):
    moved_away(world, "f")
    placement_log.commit_placement(world.inner["standard"], {"f": None})
    world.later()
    assert "expected placement to lead to" in world.run_due_deletions().stopped[0].reason
    assert world.where("f") == ["standard", "archive"]


def test_two_tiers_that_are_one_folder_lose_no_data(world):
    """By a link, a mount, or two names of one bucket: the two copies are one."""
    world.put("standard", "f")
    world.faulty["archive"] = world.faulty["standard"]
    applied = world.apply(world.plan(world.move("f", "standard", "archive")))
    world.later()
    stopped = [*applied.stopped, *world.run_due_deletions().stopped]
    assert "are one: a drop would delete both" in stopped[0].reason
    assert world.where("f") != []


def test_the_placement_does_not_redirect_from_a_home_that_has_the_object(world):
    world.put("hot", "f")
    world.put("standard", "f")
    world.apply(world.plan(world.move("f", "hot", "archive")))
    assert world.row("f") is None
    world.later()
    assert world.run_due_deletions().n_made == 1
    assert world.where("f") == ["standard", "archive"]


@pytest.mark.parametrize("keys", [("f",), PARTS])
def test_an_unverified_archived_copy_is_not_replaced_by_a_corrupt_source(tmp_path, keys):
    """The mover was killed after the copy: it may be the last good one, and the group looks complete."""
    world = World(tmp_path / "world", classes=True)
    world.put("standard", *keys)
    path = keys[0].rpartition("/")[0] or keys[0]
    move = world.move(path, "standard", "archive", keys=keys, kind="checkpoint" if len(keys) > 1 else "file")
    move = replace(move, objects=tuple(one._replace(crc32c=None) for one in move.objects))
    with HookAt("tier_move.copied"), pytest.raises(Killed):
        world.apply(world.plan(move, name="1"))
    file = world.inner["standard"]._path(keys[0])
    about, data = read_object(file)
    write_object(file, about, flipped(data))
    assert "it is not overwritten" in world.apply(world.plan(move, name="2")).stopped[0].reason
    assert world.where(keys[0]) == ["archive"]


def test_a_copy_whose_source_a_user_removed_is_not_replaced(world):
    moved_away(world, "f")
    world.inner["standard"].delete(["f"])
    world.later()
    assert world.run_due_deletions().n_made == 1
    world.inner["standard"].put("f", b"anew")
    move = world.move("f", "standard", "archive")
    move = replace(move, objects=tuple(one._replace(crc32c=None) for one in move.objects))
    assert "it is not overwritten" in world.apply(world.plan(move, name="2")).stopped[0].reason
    assert world.where("f") == ["archive"]
