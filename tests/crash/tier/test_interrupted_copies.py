"""Copies that are interrupted, or that fail: the next run finishes them or removes their parts, whatever it plans."""

import os
import subprocess
from contextlib import contextmanager

import pytest
from tests.support.tier_folders import FILES, Folders, content
from tests.support.tier_moves import HookAt, Killed
from typer.testing import CliRunner

from tiercache.cli.app import app
from tiercache.tier.inventory import take_inventory
from tiercache.tier.journal import TierCatalog
from tiercache.tier.mover import DONE, PARTLY, catalog_path
from tiercache.tier.stores import Stores, put_hold

# Points at which a copy is in the journal, and not made.
POINTS = (
    *("tier_move.begun", "tier_move.intended", "tier_transfer.published", "tier_move.object"),
    *("tier_move.parts_copied", "tier_move.copied", "tier_move.recorded", "tier_move.looked", "tier_move.placed"),
)
KEPT = {10: "hot", 9: "standard", 8: "standard", 7: "standard"}


@pytest.fixture
def folders(tmp_path):
    return Folders(tmp_path)


def second_generation(folders):
    """Let a first run complete, and save three further checkpoints."""
    folders.save(*range(1, 8))
    assert folders.run().exit_code == DONE
    folders.save(8, 9, 10)


def interrupt(folders, point, nth=1):
    with HookAt(point, nth) as hook, pytest.raises(Killed):
        folders.run()
    assert hook.hit


def check_at_rest(folders, steps=range(1, 11), kept=KEPT):
    assert {step: folders.lies(step) for step in steps} == {step: [kept.get(step, "archive")] for step in steps}
    assert len(folders.found()) == len(FILES) * len(steps), "no file has a name that nobody gave it"


def begun(folders):
    file = folders.file
    with TierCatalog(catalog_path(file)) as catalog:
        return catalog.open_moves(file.home_tier.url, "begun")


@pytest.mark.parametrize("point", POINTS)
def test_after_an_interrupted_second_run_every_checkpoint_lies_whole_where_the_rules_say(folders, point):
    second_generation(folders)
    interrupt(folders, point)
    assert folders.run().exit_code == DONE
    check_at_rest(folders)
    assert folders.run().exit_code == DONE
    check_at_rest(folders)
    assert not begun(folders)


def test_a_part_of_a_copy_counts_as_no_checkpoint(folders):
    folders.save(1, 2)
    interrupt(folders, "tier_move.parts_copied")
    assert folders.lies(1) == ["hot", "a part in standard"]
    (folders.root / "hot/run/step-1").rename(folders.root / "elsewhere")  # only the part is left
    file = folders.file
    with Stores(file) as stores, TierCatalog(catalog_path(file)) as catalog:
        snapshot = take_inventory(file, stores, catalog, now_s=2e9).snapshot
    paths = snapshot.paths.to_pylist()
    assert not snapshot.complete[paths.index("run/step-1")]
    assert snapshot.complete[paths.index("run/step-2")]


@pytest.mark.parametrize("point", ["", "tier_move.withdrawing", "tier_move.withdrawn", "tier_run.withdrawn"])
@pytest.mark.parametrize("by", ["pin", "hold"])
def test_a_copy_of_what_is_pinned_or_held_since_leaves_no_part(folders, point, by):
    folders.save(1, 2)
    interrupt(folders, "tier_move.parts_copied")
    keep(folders, by)
    if point:
        interrupt(folders, point)
    report = folders.run()
    assert folders.lies(1) == ["hot"]
    assert by == "pin" or report.exit_code == DONE


def keep(folders, by):
    """Let nobody move step 1 from now on."""
    if by == "pin":
        folders.write_rules(folders.rules + '[[pins]]\nmatch = "run/step-1/**"\n')
        return
    with Stores(folders.file) as stores:
        put_hold(stores.store("standard"), ["run/step-1"], until_s=9e9, now_s=1.0, why="recalled")


def test_parts_beside_a_source_that_was_written_again_are_a_conflict_and_stay(folders):
    folders.save(1, 2)
    interrupt(folders, "tier_move.parts_copied")
    for name in FILES:
        folders.write("hot", f"run/step-1/{name}", content(f"run/step-1/{name}") + b"again", days=0.5)
    before = folders.found()
    for _ in range(2):
        report = folders.run()
        assert folders.found() == before
    assert [one.path for one in report.plan.refusals if one.reason.startswith("conflict")] == ["run/step-1"]


@pytest.mark.parametrize("size", ["other", "the same"])
def test_a_copy_that_a_second_machine_has_finished_stays_if_a_job_writes_the_name_again(folders, size):
    folders.save(1, 2)
    interrupt(folders, "tier_move.parts_copied")
    # Another machine, with a catalog of its own, finishes the move.
    (folders.root / "state").rename(folders.root / "first")
    assert folders.run().exit_code == DONE
    assert folders.lies(1) == ["standard"]
    (folders.root / "state").rename(folders.root / "second")
    (folders.root / "first").rename(folders.root / "state")
    for name in FILES:
        data = content(f"run/step-1/{name}")[::-1]
        folders.write("hot", f"run/step-1/{name}", data if size == "the same" else data + b"more", days=0.1)
    for _ in range(2):
        folders.run()
    assert folders.lies(1)[1:] == ["standard"]


# -- deletions that were interrupted -----------------------------------------------------------------------------------


@pytest.fixture
def half_dropped(folders):
    """Step 1 is whole in standard; a run was killed when it had deleted some of its objects from hot."""
    folders.save(1, 2)
    interrupt(folders, "tier_drop.unmade")
    assert folders.lies(1) == ["a part in hot", "standard"]
    return folders


@pytest.mark.parametrize("change", ["rules", "pin", "hold", "chmod"])
def test_a_deletion_that_was_begun_is_finished_whatever_is_wanted_then(half_dropped, change):
    folders = half_dropped
    if change == "rules":
        folders.write_rules('[[rules]]\nmatch = "**"\nkeep_hot = { last = 5 }\nkeep_standard = { last = 5 }\n')
    elif change == "chmod":
        for file in (folders.root / "hot/run/step-1").iterdir():
            file.chmod(0o600)
    else:
        keep(folders, change)
    assert folders.run().exit_code == DONE
    assert folders.lies(1) == ["standard"]


def test_a_recall_finishes_a_deletion_that_was_begun_and_brings_the_checkpoint_back(half_dropped):
    rules = str(half_dropped.root / "tiercache.toml")
    done = CliRunner().invoke(app, ["tier", "get", "run/step-1", "--yes", "--rules", rules])
    assert done.exit_code == 0, done.output
    assert half_dropped.lies(1) == ["hot", "standard"]


def test_a_checkpoint_that_was_removed_after_an_interrupted_deletion_is_not_lost(half_dropped):
    rules = str(half_dropped.root / "tiercache.toml")
    done = CliRunner().invoke(app, ["ckpt", "rm", "run/step-1", "--yes", "--rules", rules])
    assert done.exit_code == 0, done.output
    report = half_dropped.run()
    assert report.exit_code == DONE
    assert half_dropped.lies(1) == []


@pytest.mark.parametrize("point", ["tier_drop.unplaced", "tier_drop.unmade"])
def test_a_removal_that_was_interrupted_is_completed_by_the_same_command(folders, point):
    folders.save(1, 2)
    folders.run()
    command = ["ckpt", "rm", "run/step-1", "--yes", "--rules", str(folders.root / "tiercache.toml")]
    with HookAt(point) as hook, pytest.raises(Killed):
        app(command, standalone_mode=False)
    assert hook.hit
    n_left = len(list((folders.root / "standard/run/step-1").iterdir()))
    assert (n_left == len(FILES)) == (point == "tier_drop.unplaced")
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert folders.lies(1) == []


def test_parts_whose_source_is_gone_stay_and_are_named(folders):
    folders.save(1, 2)
    interrupt(folders, "tier_move.parts_copied")
    for name in FILES:
        (folders.root / "hot/run/step-1" / name).unlink()
    report = folders.run()
    assert report.exit_code == PARTLY
    (stopped,) = report.stopped
    assert "run/step-1" in stopped.path
    assert "2 of 3 objects" in stopped.reason
    assert folders.lies(1) == ["a part in standard"]


def test_a_copy_that_is_complete_and_not_recorded_is_not_made_again(folders):
    folders.save(1, 2)
    interrupt(folders, "tier_move.copied")
    inodes = {name: (folders.root / "standard/run/step-1" / name).stat().st_ino for name in FILES}
    report = folders.run()
    assert report.resumed.n_made == 1
    assert {name: (folders.root / "standard/run/step-1" / name).stat().st_ino for name in FILES} == inodes
    assert folders.lies(1) == ["standard"]


def test_a_complete_copy_whose_source_is_gone_is_the_checkpoint_whatever_the_rules_are_then(folders):
    folders.save(1, 2)
    interrupt(folders, "tier_move.copied")
    for name in FILES:
        (folders.root / "hot/run/step-1" / name).unlink()
    folders.write_rules('[[rules]]\nmatch = "**"\nkeep_hot = { last = 5 }\nkeep_standard = { last = 5 }\n')
    assert folders.run().exit_code == DONE
    assert not begun(folders)
    assert folders.lies(1) == ["standard"]


def test_an_object_that_a_user_wrote_under_a_name_that_a_killed_run_meant_to_copy_is_kept(folders):
    folders.save(1, 2)
    interrupt(folders, "tier_move.intended")
    name = f"run/step-1/{FILES[0]}"
    theirs = content(name)[::-1]
    folders.write("standard", name, theirs)
    folders.write("hot", name, content(name) + b"again", days=0.1)
    for _ in range(2):
        folders.run()
    assert (folders.root / "standard" / name).read_bytes() == theirs
    assert (folders.root / "hot" / name).read_bytes() == content(name) + b"again"


# -- groups that fail ------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip("only root mounts file systems")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_small_destination_takes_the_groups_that_fit_and_no_part_of_the_others(folders, small_disk):
    (folders.root / "archive").rmdir()
    (folders.root / "archive").symlink_to(small_disk)
    folders.write_rules('[[rules]]\nmatch = "**"\nkeep_hot = { last = 1 }\nthen = "archive"\n')
    for step in range(1, 9):
        for name in FILES:
            folders.write("hot", f"run/step-{step}/{name}", os.urandom(100_000), days=30.0 - step)
    report = folders.run()
    assert report.exit_code == PARTLY
    where = {step: {tuple(folders.found()[f"run/step-{step}/{name}"]) for name in FILES} for step in range(1, 9)}
    assert all(len(tiers) == 1 and len(next(iter(tiers))) == 1 for tiers in where.values()), (
        "each lies whole in one tier"
    )
    moved = [step for step, tiers in where.items() if tiers == {("archive",)}]
    assert len(moved) == 3, "of 1 MiB, three times 300 kB fit"
    assert {stopped.path for stopped in report.stopped} == {
        f"run/step-{step}" for step in range(1, 8) if step not in moved
    }
    assert all("expected room" in stopped.reason for stopped in report.stopped)


@contextmanager
def immutable(folder):
    """Let nobody write into a folder, not even root."""
    if subprocess.run(["chattr", "+i", str(folder)], capture_output=True).returncode:
        pytest.skip("this user or file system cannot make a folder immutable")
    try:
        yield
    finally:
        subprocess.run(["chattr", "-i", str(folder)], check=True)


def test_a_group_that_cannot_be_written_stops_only_itself(folders):
    folders.save(1, 2, 3)
    (folders.root / "standard/run/step-1").mkdir(parents=True)
    with immutable(folders.root / "standard/run/step-1"):
        report = folders.run()
    assert [stopped.path for stopped in report.stopped] == ["run/step-1"]
    assert (folders.lies(1), folders.lies(2)) == (["hot"], ["standard"])
    assert folders.run().exit_code == DONE
    assert folders.lies(1) == ["standard"]


def test_a_source_that_cannot_be_deleted_does_not_stop_the_deletion_of_others(folders):
    folders.save(1, 2, 3)
    with immutable(folders.root / "hot/run/step-1"):
        report = folders.run()
    assert [stopped.path for stopped in report.stopped] == ["run/step-1"]
    assert folders.lies(2) == ["standard"]
    assert folders.run().exit_code == DONE
    assert folders.lies(1) == ["standard"]
