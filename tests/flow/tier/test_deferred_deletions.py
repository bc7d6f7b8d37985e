"""Deletions after the grace period: clocks, last copies, storage classes, unmounted disks, pins, cancelled moves."""

from contextlib import suppress

import pytest
from tests.support.faults import Fault
from tests.support.tier_moves import HookAt, Killed, World, moved_away

from tiercache.tier.deletions import DeletionFacts
from tiercache.tier.journal import TierCatalog

# -- clocks ------------------------------------------------------------------------------------------------------------


def test_a_clock_that_was_ahead_does_not_prolong_the_grace_period(world):
    world.now_s += 3.2e7
    moved_away(world, "f")
    world.now_s -= 3.2e7
    assert world.run_due_deletions().waiting_drops == 1
    world.later()
    assert world.run_due_deletions().n_made == 1


# -- last copies -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        (DeletionFacts(), "no rule deletes it now"),
        (DeletionFacts(deletes=frozenset(["f"]), protected=frozenset(["f"])), "newest complete checkpoint"),
        (DeletionFacts(deletes=frozenset(["f"]), in_use=frozenset(["f"])), "a machine reads it"),
    ],
)
def test_a_last_copy_stays_if_no_rule_deletes_it_now_or_it_is_needed(world, facts, reason):
    world.put("standard", "f")
    world.apply(world.plan(world.move("f", "standard", None, action="delete")))
    world.later()
    world.facts = facts
    assert reason in world.run_due_deletions().stopped[0].reason
    assert world.where("f") == ["standard"]


def test_a_new_copy_stops_the_deletion_of_a_last_copy(world):
    world.put("standard", "f")
    world.apply(world.plan(world.move("f", "standard", None, action="delete")))
    world.put("hot", "f")
    world.later()
    world.facts = DeletionFacts(deletes=frozenset(["f"]))
    assert "expected no copy there" in world.run_due_deletions().stopped[0].reason
    assert world.where("f") == ["hot", "standard"]


def test_another_object_under_the_key_stops_a_deletion(world):
    world.put("standard", "f")
    world.inner["hot"].put("f", b"another")
    applied = world.apply(world.plan(world.move("f", "standard", None, action="delete")))
    assert "expected a copy of 1000 bytes, found 7" in applied.stopped[0].reason


def last_copy_may_go(world):
    """Put f into the archive only, with a deletion that is due."""
    moved_away(world, "f")
    world.later()
    world.run_due_deletions()
    world.apply(world.plan(world.move("f", "archive", None, action="delete"), name="delete"))
    world.later()
    world.facts = DeletionFacts(deletes=frozenset(["f"]))


def test_the_placement_row_is_removed_before_a_last_copy(world):
    last_copy_may_go(world)
    rows = []
    with HookAt("tier_drop.unplaced", do=lambda: rows.append(world.row("f"))):
        world.run_due_deletions()
    assert rows == [None]
    assert world.where("f") == []


# -- classes -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(tmp_path):
    """One bucket is standard and archive: the archive is its GLACIER class."""
    return World(tmp_path / "world", classes=True, shared=True)


def class_of(world, key):
    return world.inner["standard"].head(key).storage_class or "STANDARD"


def test_a_change_to_an_archive_class_is_announced_and_waits(bucket):
    bucket.put("standard", "f")
    bucket.apply(bucket.plan(bucket.move("f", "standard", "archive", action="reclass")))
    assert class_of(bucket, "f") == "STANDARD"
    assert bucket.row("f").state == "archived"
    bucket.later()
    assert bucket.run_due_deletions().n_made == 1
    assert class_of(bucket, "f") == "GLACIER"
    assert bucket.where("f") != []


def test_the_newest_checkpoint_keeps_its_readable_copy(tmp_path):
    world = World(tmp_path / "world", classes=True)
    moved_away(world, "f")
    world.later()
    world.facts = DeletionFacts(protected=frozenset(["f"]))
    assert world.run_due_deletions().stopped == ()
    assert "stays where it can be read" in world.note()
    assert world.where("f") == ["standard", "archive"]


def test_a_copying_move_within_one_location_is_refused(bucket):
    bucket.put("standard", "f")
    applied = bucket.apply(bucket.plan(bucket.move("f", "standard", "archive")))
    assert "expected two locations, found" in applied.stopped[0].reason


# -- disks -----------------------------------------------------------------------------------------------------------


def test_deletions_that_rely_on_each_others_sources_are_not_made_together(world):
    """Each row alone is correct, however both came into the journal."""
    world.put("hot", "f")
    world.apply(world.plan(world.move("f", "hot", "archive", action="copy"), name="copy"))
    world.apply(world.plan(world.move("f", "hot", "archive", action="drop"), name="down"))
    with TierCatalog(world.catalog_path) as catalog:
        down = catalog.of_plan("down")[1]
        world.apply(world.plan(world.move("f", "archive", "hot", action="drop"), name="up"))
        catalog.write([down])
    world.later()
    world.run_due_deletions()
    world.run_due_deletions()
    assert len(world.where("f")) == 1


@pytest.mark.parametrize("what", ["a move", "a deletion"])
def test_a_source_that_is_written_just_before_its_deletion_stays(world, what):
    world.put("standard", "f")
    action, dst = ("move", "archive") if what == "a move" else ("delete", None)
    world.apply(world.plan(world.move("f", "standard", dst, action=action)))
    world.facts = DeletionFacts(deletes=frozenset(["f"]))
    world.later()
    with HookAt("tier_drop.journaled", do=lambda: world.inner["standard"].put("f", b"written now")) as hook:
        settled = world.run_due_deletions()
    assert hook.hit
    assert "expected 1000 bytes, found 11" in settled.stopped[0].reason
    assert world.inner["standard"].get("f") == b"written now"
    assert world.row("f") is None
    assert world.journal() == {1: "cancelled"}


def test_a_source_that_cannot_be_checked_again_is_deleted_by_a_later_run(world):
    world.put("standard", "f")
    world.apply(world.plan(world.move("f", "standard", "archive")))
    world.later()
    with HookAt("tier_drop.journaled", do=lambda: world.fail("standard", Fault("head"))):
        assert world.run_due_deletions().waiting_drops == 1
    assert world.where("f") == ["standard", "archive"]
    assert world.run_due_deletions().n_made == 1


# -- pins --------------------------------------------------------------------------------------------------------------

PIN = '[[pins]]\nmatch = "f"\nwhy = "the paper"\n'


@pytest.mark.parametrize("point", ["tier_drop.checked", "tier_drop.journaled", "tier_drop.looked_again"])
@pytest.mark.parametrize("action", ["move", "delete", "reclass"])
def test_a_pin_that_is_added_during_the_checks_counts(tmp_path, point, action):
    """Reading copies back may take hours."""
    world = World(tmp_path / "world", classes=action == "reclass", shared=action == "reclass")
    world.put("standard", "f")
    world.apply(world.plan(world.move("f", "standard", None if action == "delete" else "archive", action=action)))
    world.facts = DeletionFacts(deletes=frozenset(["f"]))
    world.later()
    with HookAt(point, do=lambda: world.write_rules(PIN)) as hook:
        settled = world.run_due_deletions()
    assert hook.hit
    assert settled.stopped == (), "what somebody pins has not failed"
    assert "the paper" in world.note()
    assert "standard" in world.where("f")
    assert (world.inner["standard"].head("f").storage_class or "STANDARD") == "STANDARD"
    assert world.row("f") is None
    assert world.journal() == {1: "cancelled"}


def test_nothing_is_deleted_if_the_rule_file_cannot_be_read_any_more(world):
    moved_away(world, "f")
    world.later()
    with HookAt("tier_drop.journaled", do=lambda: (world.root / "tiercache.toml").write_text("[[pins")):
        settled = world.run_due_deletions()
    assert "expected to read the pins anew" in settled.stopped[0].reason
    assert world.where("f") == ["standard", "archive"]
    world.write_rules()
    assert world.run_due_deletions().n_made == 1


@pytest.mark.parametrize("is_killed", [False, True])
def test_a_pin_after_the_placement_row_was_removed_brings_the_row_back(world, is_killed):
    last_copy_may_go(world)

    def come():
        world.write_rules(PIN)
        if is_killed:
            raise Killed

    with HookAt("tier_drop.unplaced", do=come), suppress(Killed):
        world.run_due_deletions()
    world.run_due_deletions()
    assert world.where("f") == ["archive"]
    assert world.row("f").url == world.url("archive")


# -- moves that are not finished -----------------------------------------------------------------------------------


VERSION, SHARD = "data/_tiercache/versions/1", "data/s1"


def waiting(world, action):
    """A shard that is moved or deleted, and a file that is moved, both due. The shard has been rewritten."""
    world.put("standard", VERSION, SHARD, "f")
    moves = [
        world.move(SHARD, "standard", None if action == "delete" else "archive", action=action, kind="shard"),
        world.move("f", "standard", "archive", number=2),
    ]
    assert world.apply(world.plan(*moves)).stopped == ()
    world.facts = DeletionFacts(deletes=frozenset([SHARD]))
    world.inner["standard"].put(SHARD, b"anew")
    world.later()


@pytest.mark.parametrize("action", ["move", "delete"])
def test_a_shard_without_a_data_set_does_not_stop_other_moves(world, action):
    waiting(world, action)
    world.inner["standard"].delete([VERSION])
    assert world.run_due_deletions().n_made == 1
    assert world.journal() == {1: "cancelled", 2: "done"}
    assert world.inner["standard"].get(SHARD) == b"anew"


def test_a_shard_whose_data_set_cannot_be_queried_waits_and_other_moves_finish(world):
    waiting(world, "move")
    world.fail("standard", Fault("list", keys="data/_tiercache/versions/"))
    settled = world.run_due_deletions()
    assert "_tiercache/versions" in settled.stopped[0].reason
    assert world.journal() == {1: "waiting", 2: "done"}
    world.run_due_deletions()
    assert world.journal() == {1: "cancelled", 2: "done"}
