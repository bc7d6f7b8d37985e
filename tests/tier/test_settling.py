"""What waits is asked about anew: clocks, last copies, classes, disks."""

from contextlib import suppress

import pytest
from tests.tier.moving import PARTS, HookAt, Killed, World, checkpoint, moved_away

from tiercache.catalog.tiers import TierCatalog
from tiercache.store import LocalFolder
from tiercache.testing import Fault, FaultStore
from tiercache.tier.move.deletions import DeletionGuard


@pytest.fixture
def world(tmp_path):
    return World(tmp_path / "world")


# -- clocks ------------------------------------------------------------------------------------------------------------


def test_a_clock_that_was_ahead_when_grace_began_does_not_make_it_last_for_years(world):
    world.now_s += 3.2e7
    moved_away(world, "f")
    world.now_s -= 3.2e7
    assert world.settle().waiting_drops == 1
    world.later()
    assert world.settle().done == 1


def test_a_clock_that_goes_back_drops_nothing(world):
    moved_away(world, "f")
    world.now_s -= 3.2e7
    world.settle()
    assert world.where("f") == ["standard", "archive"]


# -- last copies -----------------------------------------------------------------------------------------------------


def test_a_deletion_waits_for_grace_and_is_made_if_rules_still_ask_for_it(world):
    world.put("standard", "f")
    world.put("archive", "f")
    world.apply(world.plan(world.move("f", "standard", None, action="delete")))
    world.survey = DeletionGuard(deletes=frozenset(["f"]))
    world.settle()
    assert world.where("f") == ["standard", "archive"]
    world.later()
    assert world.settle().done == 1
    assert world.where("f") == []


@pytest.mark.parametrize(
    ("survey", "why"),
    [
        (DeletionGuard(), "no rule deletes it now"),
        (DeletionGuard(deletes=frozenset(["f"]), protected=frozenset(["f"])), "newest complete checkpoint"),
        (DeletionGuard(deletes=frozenset(["f"]), in_use=frozenset(["f"])), "a machine reads it"),
    ],
)
def test_a_last_copy_that_is_wanted_by_now_stays(world, survey, why):
    world.put("standard", "f")
    world.apply(world.plan(world.move("f", "standard", None, action="delete")))
    world.later()
    world.survey = survey
    assert why in world.settle().stopped[0].reason
    assert world.where("f") == ["standard"]


def test_a_copy_that_came_since_stops_a_deletion(world):
    world.put("standard", "f")
    world.apply(world.plan(world.move("f", "standard", None, action="delete")))
    world.put("hot", "f")
    world.later()
    world.survey = DeletionGuard(deletes=frozenset(["f"]))
    assert "expected no copy there" in world.settle().stopped[0].reason
    assert world.where("f") == ["hot", "standard"]


def test_another_object_under_the_key_stops_a_deletion(world):
    world.put("standard", "f")
    world.inner["hot"].put("f", b"another")
    applied = world.apply(world.plan(world.move("f", "standard", None, action="delete")))
    assert "expected a copy of 1000 bytes, found 7" in applied.stopped[0].reason


def last_copy_may_go(world):
    """F lies in the archive alone, and its deletion waits for nothing any more."""
    moved_away(world, "f")
    world.later()
    world.settle()
    world.apply(world.plan(world.move("f", "archive", None, action="delete"), name="delete"))
    world.later()
    world.survey = DeletionGuard(deletes=frozenset(["f"]))


def test_readers_are_told_before_a_last_copy_goes(world):
    last_copy_may_go(world)
    rows = []
    with HookAt("tier_drop.unplaced", do=lambda: rows.append(world.row("f"))):
        world.settle()
    assert rows == [None]
    assert world.where("f") == []


# -- classes -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(tmp_path):
    """One bucket is standard and archive: the latter is its GLACIER class."""
    return World(tmp_path / "world", classes=True, shared=True)


def class_of(world, key):
    return world.inner["standard"].head(key).storage_class or "STANDARD"


def test_a_class_that_ends_readability_is_announced_and_waits(bucket):
    bucket.put("standard", "f")
    bucket.apply(bucket.plan(bucket.move("f", "standard", "archive", action="reclass")))
    assert class_of(bucket, "f") == "STANDARD"
    assert bucket.row("f").state == "archived"
    bucket.later()
    assert bucket.settle().done == 1
    assert class_of(bucket, "f") == "GLACIER"
    assert bucket.where("f") != []


def test_a_class_that_can_be_read_is_given_at_once(tmp_path):
    world = World(tmp_path / "world", classes=True, shared=True, cold_class="STANDARD_IA")
    world.put("standard", "f")
    applied = world.apply(world.plan(world.move("f", "standard", "archive", action="reclass")))
    assert (applied.done, applied.waiting_drops) == (1, 0)
    assert class_of(world, "f") == "STANDARD_IA"
    assert world.row("f") is None


def test_the_newest_checkpoint_stays_readable(bucket):
    bucket.put("standard", "f")
    bucket.apply(bucket.plan(bucket.move("f", "standard", "archive", action="reclass")))
    bucket.later()
    bucket.survey = DeletionGuard(protected=frozenset(["f"]))
    assert "stays where it can be read" in bucket.settle().stopped[0].reason
    assert class_of(bucket, "f") == "STANDARD"
    assert bucket.row("f") is None


def test_the_newest_checkpoint_keeps_its_readable_copy(tmp_path):
    world = World(tmp_path / "world", classes=True)
    moved_away(world, "f")
    world.later()
    world.survey = DeletionGuard(protected=frozenset(["f"]))
    assert "stays where it can be read" in world.settle().stopped[0].reason
    assert world.where("f") == ["standard", "archive"]


def test_a_move_within_one_bucket_is_no_copy_and_no_drop(bucket):
    bucket.put("standard", "f")
    applied = bucket.apply(bucket.plan(bucket.move("f", "standard", "archive")))
    assert "expected two locations, found" in applied.stopped[0].reason


# -- disks -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(world, tmp_path):
    """The archive is a folder, that a disk is mounted on."""
    text = (world.root / "tiercache.toml").read_text()
    (world.root / "tiercache.toml").write_text(text.replace(world.url("archive"), str(tmp_path / "disk")))
    world.inner["archive"] = LocalFolder(tmp_path / "disk")
    world.faulty["archive"] = FaultStore(world.inner["archive"])
    return tmp_path / "disk"


def test_a_disk_that_is_not_mounted_gets_no_copies(world, disk, tmp_path):
    world.put("standard", "f", "g")
    assert world.apply(world.plan(world.move("f", "standard", "archive"), name="1")).stopped == ()
    disk.rename(tmp_path / "unmounted")
    disk.mkdir()
    applied = world.apply(world.plan(world.move("g", "standard", "archive"), name="2"))
    assert "is the disk of tier archive mounted?" in applied.stopped[0].reason
    assert list(disk.iterdir()) == []


def test_a_disk_that_is_not_mounted_when_grace_is_over_drops_nothing(world, disk, tmp_path):
    world.put("standard", "f")
    world.apply(world.plan(world.move("f", "standard", "archive")))
    disk.rename(tmp_path / "unmounted")
    world.later()
    assert "found none" in world.settle().stopped[0].reason
    assert world.where("f") == ["standard"]


def test_moves_that_count_on_each_others_sources_are_not_made_together(world):
    """However such rows came into the journal: each is right alone."""
    world.put("hot", "f")
    world.apply(world.plan(world.move("f", "hot", "archive", action="copy"), name="copy"))
    world.apply(world.plan(world.move("f", "hot", "archive", action="drop"), name="down"))
    with TierCatalog(world.catalog_path) as catalog:
        down = catalog.of_plan("down")[1]
        world.apply(world.plan(world.move("f", "archive", "hot", action="drop"), name="up"))
        catalog.write([down])
    world.later()
    world.settle()
    world.settle()
    assert len(world.where("f")) == 1


@pytest.mark.parametrize("what", ["a move", "a deletion"])
def test_a_source_that_is_written_while_it_is_about_to_be_dropped_stays(world, what):
    world.put("standard", "f")
    action, dst = ("move", "archive") if what == "a move" else ("delete", None)
    world.apply(world.plan(world.move("f", "standard", dst, action=action)))
    world.survey = DeletionGuard(deletes=frozenset(["f"]))
    world.later()
    with HookAt("tier_drop.journaled", do=lambda: world.inner["standard"].put("f", b"written now")) as hook:
        settled = world.settle()
    assert hook.hit
    assert "expected 1000 bytes, found 11" in settled.stopped[0].reason
    assert world.inner["standard"].get("f") == b"written now"
    assert world.row("f") is None
    assert world.journal() == {1: "cancelled"}


def test_a_source_that_cannot_be_looked_at_again_is_dropped_another_time(world):
    world.put("standard", "f")
    world.apply(world.plan(world.move("f", "standard", "archive")))
    world.later()
    with HookAt("tier_drop.journaled", do=lambda: world.fail("standard", Fault("head"))):
        assert world.settle().waiting_drops == 1
    assert world.where("f") == ["standard", "archive"]
    assert world.settle().done == 1


@pytest.mark.parametrize("point", ["tier_drop.checked", "tier_drop.journaled"])
@pytest.mark.parametrize("harm", ["removed", "written anew"])
def test_a_copy_that_goes_while_other_copies_are_read_keeps_its_source(world, point, harm):
    moved_away(world, "f")
    world.later()
    archive = world.inner["archive"]
    with HookAt(point, do=lambda: archive.delete(["f"]) if harm == "removed" else archive.put("f", b"theirs")) as hook:
        settled = world.settle()
    assert hook.hit
    assert settled.done == 0
    assert f"{world.url('archive')}/f" in settled.stopped[0].reason
    assert "standard" in world.where("f")


def test_what_makes_a_checkpoint_whole_is_deleted_first_also_where_another_tier_has_not_got_it(world):
    world.put("hot", *PARTS)
    world.put("standard", *PARTS[:-1])
    plan = world.plan(world.move("ck/step-1", "hot", None, action="delete", keys=PARTS, kind="checkpoint"))
    world.survey = DeletionGuard(deletes=frozenset(["ck/step-1"]))
    world.apply(plan)
    world.later()
    seen = []
    with HookAt("tier_drop.unmade", do=lambda: seen.append(world.keys("hot"))):
        settled = world.settle()
    assert settled.done == 1
    assert PARTS[-1] not in seen[0]
    assert seen[0] != []
    assert world.keys("hot") == world.keys("standard") == []


# -- pins --------------------------------------------------------------------------------------------------------------

PIN = '[[pins]]\nmatch = "f"\nwhy = "the paper"\n'


@pytest.mark.parametrize("point", ["tier_drop.checked", "tier_drop.journaled", "tier_drop.looked_again"])
@pytest.mark.parametrize("action", ["move", "delete", "reclass"])
def test_a_pin_that_comes_while_things_are_looked_at_holds(tmp_path, point, action):
    """Copies may be read for hours before their sources go."""
    world = World(tmp_path / "world", classes=action == "reclass", shared=action == "reclass")
    world.put("standard", "f")
    world.apply(world.plan(world.move("f", "standard", None if action == "delete" else "archive", action=action)))
    world.survey = DeletionGuard(deletes=frozenset(["f"]))
    world.later()
    with HookAt(point, do=lambda: world.write_rules(PIN)) as hook:
        settled = world.settle()
    assert hook.hit
    assert "the paper" in settled.stopped[0].reason
    assert "standard" in world.where("f")
    assert (world.inner["standard"].head("f").storage_class or "STANDARD") == "STANDARD"
    assert world.row("f") is None
    assert world.journal() == {1: "cancelled"}


def test_a_rule_file_that_cannot_be_read_by_now_drops_nothing(world):
    moved_away(world, "f")
    world.later()
    with HookAt("tier_drop.journaled", do=lambda: (world.root / "tiercache.toml").write_text("[[pins")):
        settled = world.settle()
    assert "expected to read the pins anew" in settled.stopped[0].reason
    assert world.where("f") == ["standard", "archive"]
    world.write_rules()
    assert world.settle().done == 1


def test_a_pin_that_is_missing_from_the_file_by_now_holds_for_the_run_that_began_with_it(world):
    """Who writes a file in two halves has written one without pins, in between, that can be read."""
    moved_away(world, "f")
    world.later()
    world.write_rules(PIN)
    with world.opened() as context:
        world.write_rules()
        settled = world.settle(context)
    assert "the paper" in settled.stopped[0].reason
    assert world.where("f") == ["standard", "archive"]


def test_half_of_a_checkpoint_that_is_pinned_then_is_kept_and_finished_when_it_is_pinned_no_more(world):
    """What is gone of it is gone: dst has all of it, and it is not forgotten."""
    world.apply(checkpoint(world))
    world.later()
    with HookAt("tier_drop.unmade"), pytest.raises(Killed):
        world.settle()
    world.write_rules('[[pins]]\nmatch = "ck/step-1"\n')
    assert world.settle().waiting_drops == 1
    assert world.where(PARTS[0]) == ["standard", "archive"]
    world.write_rules()
    assert world.settle().done == 1
    assert world.where(PARTS[0]) == ["archive"]


@pytest.mark.parametrize("is_killed", [False, True])
def test_readers_find_again_what_was_pinned_when_they_were_told_that_it_goes(world, is_killed):
    last_copy_may_go(world)

    def come():
        world.write_rules(PIN)
        if is_killed:
            raise Killed

    with HookAt("tier_drop.unplaced", do=come), suppress(Killed):
        world.settle()
    world.settle()
    assert world.where("f") == ["archive"]
    assert world.row("f").url == world.url("archive")
