"""A name that is written again while its older copy lies in another tier: the older copy gets a date in its name."""

import json
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.tier.moving import HookAt, Killed
from tests.tier.world import World as BucketWorld
from tests.tier.world import content

from tiercache.store import open_store
from tiercache.tier.move.mover import run_once
from tiercache.tier.placement import log
from tiercache.tier.rules import load_rule_file

DAY_S = 86_400.0
DATED = re.compile(r"[.][0-9]{8}T[0-9]{6}Z")
RULES = """
[tiers.hot]
url = "hot"
[tiers.standard]
url = "home"
[tiers.archive]
url = "cold"

[[rules]]
name = "runs"
match = "**"
keep_hot = { last = 1 }
then = "archive"
after = "0s"

[tiering]
grace = "0s"
state_dir = "state"
"""
CHECKPOINT = {"__0_0.distcp": 300, "__1_0.distcp": 300, ".metadata": 50}


@dataclass
class Folders:
    """Three tiers, which are folders."""

    root: Path

    def write(self, tier, path, content, days, sizes=None):
        """Write a file, or a folder of files of these sizes, of so many days ago."""
        for name, n_bytes in (sizes or {"": 400}).items():
            file = self.root / tier / path / name if name else self.root / tier / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes((content * n_bytes)[:n_bytes])
            os.utime(file, (time.time() - days * DAY_S,) * 2)

    def run(self):
        return run_once(load_rule_file(self.root / "tiercache.toml"))

    def found(self, tier):
        """Return the first byte of each object in a tier, with DATE in place of a date."""
        paths = (path for path in (self.root / tier).rglob("*") if path.is_file() and "_tiercache" not in path.parts)
        return {
            DATED.sub(".DATE", path.relative_to(self.root / tier).as_posix()): path.read_bytes()[:1].decode()
            for path in paths
        }

    def placement(self):
        rows = log.read_placement(open_store(str(self.root / "home"))).rows.to_pylist()
        return {DATED.sub(".DATE", row["key"]): Path(row["url"]).name for row in rows}


@pytest.fixture
def folders(tmp_path):
    (tmp_path / "tiercache.toml").write_text(RULES)
    return Folders(tmp_path)


def archive_first(folders, name="step_100.pt", sizes=None):
    """Archive a checkpoint of 9 days ago; then write the name again, and a later checkpoint."""
    newest = "step_900.pt" if name.endswith(".pt") else "step-900"
    folders.write("hot", f"run/{name}", b"a", 9, sizes)
    folders.write("hot", f"run/{newest}", b"n", 5, sizes)
    assert folders.run().exit_code == 0
    assert set(folders.found("cold").values()) == {"a"}
    folders.write("hot", f"run/{name}", b"b", 3, sizes)
    folders.write("hot", f"run/{newest}", b"N", 1, sizes)


def test_the_newer_file_gets_the_name_and_the_older_file_a_date(folders):
    archive_first(folders)
    report = folders.run()
    assert (report.exit_code, report.stopped) == (0, ())
    assert folders.found("cold") == {"run/step_100.pt": "b", "run/step_100.DATE.pt": "a"}
    assert folders.found("hot") == {"run/step_900.pt": "N"}


def test_the_date_is_that_of_the_first_writing(folders):
    archive_first(folders)
    written_s = time.time() - 9 * DAY_S
    folders.run()
    (name,) = (path.name for path in (folders.root / "cold/run").iterdir() if DATED.search(path.name))
    day = time.strftime("%Y%m%dT%H%M", time.gmtime(written_s))
    earlier = time.strftime("%Y%m%dT%H%M", time.gmtime(written_s - 60))
    assert name.split(".")[1][:13] in (day, earlier)


def test_a_checkpoint_folder_is_renamed_as_a_whole(folders):
    archive_first(folders, "step-100", CHECKPOINT)
    assert folders.run().exit_code == 0
    cold = {f"run/step-100/{name}": "b" for name in CHECKPOINT}
    assert folders.found("cold") == cold | {f"run/step-100.DATE/{name}": "a" for name in CHECKPOINT}
    assert list((folders.root / "hot/run").iterdir()) == [folders.root / "hot/run/step-900"]


def test_an_older_checkpoint_keeps_its_name_until_the_newer_one_is_complete(folders):
    archive_first(folders, "step-100", CHECKPOINT)
    (folders.root / "hot/run/step-100/.metadata").unlink()
    folders.run()
    assert folders.found("cold") == {f"run/step-100/{name}": "a" for name in CHECKPOINT}
    assert folders.found("hot")["run/step-100/__0_0.distcp"] == "b"
    folders.write("hot", "run/step-100", b"b", 3, {".metadata": 50})
    assert folders.run().exit_code == 0
    cold = {f"run/step-100/{name}": "b" for name in CHECKPOINT}
    assert folders.found("cold") == cold | {f"run/step-100.DATE/{name}": "a" for name in CHECKPOINT}


def test_the_objects_of_one_bucket_are_one_copy_whatever_their_classes(tmp_path):
    """A checkpoint of which some objects have the class of the archive is not torn when others are written again."""
    world = BucketWorld(tmp_path, "one_warm")
    groups = {group.name: group for group in world.groups}
    old = groups["checkpoints/run/step-10"]
    with world.entered():
        for key in old.keys:
            world.write("hot", key, content(key, 0, 700))
        for key in (*old.keys[1:], *groups["checkpoints/run/step-20"].keys, *groups["checkpoints/run/step-30"].keys):
            world.write("home", key, content(key, 0, 700))
        world.days_pass(3.0)
        world.run_once()
        assert world.picture()["home"][old.keys[0]].storage_class == "STANDARD_IA"
        world.write("home", old.keys[1], content(old.keys[1], 1, 900))
        world.days_pass(0.5)
        world.run_once()
        assert {*old.keys} <= world.picture()["home"].keys()


def test_readers_of_the_old_name_are_led_to_the_newer_file(folders):
    archive_first(folders)
    folders.run()
    assert folders.placement() == {"run/step_100.pt": "cold", "run/step_100.DATE.pt": "cold"}


def test_files_of_another_size_are_renamed_without_being_read(folders):
    folders.write("hot", "run/step_100.pt", b"a", 9)
    folders.write("hot", "run/step_900.pt", b"n", 5)
    folders.run()
    folders.write("hot", "run/step_100.pt", b"b", 3, {"": 500})
    folders.write("hot", "run/step_900.pt", b"N", 1)
    folders.run()
    assert folders.found("cold") == {"run/step_100.pt": "b", "run/step_100.DATE.pt": "a"}


def test_a_file_with_equal_bytes_was_put_back_by_hand_so_that_nothing_is_renamed_and_it_is_held(folders):
    archive_first(folders)
    folders.write("hot", "run/step_100.pt", b"a", 3)
    report = folders.run()
    assert (report.exit_code, [one.path for one in report.applied.held]) == (0, ["run/step_100.pt"])
    report = folders.run()
    assert (report.exit_code, report.applied.held, report.plan.refusals[0].path) == (0, (), "run/step_100.pt")
    assert folders.found("cold") == {"run/step_100.pt": "a"}
    assert folders.found("hot")["run/step_100.pt"] == "a"


def test_the_plan_shows_the_rename_with_the_reason(folders):
    archive_first(folders)
    report = run_once(load_rule_file(folders.root / "tiercache.toml"), dry_run=True)
    (move,) = [move for move in report.plan.moves if move.action == "rename"]
    assert DATED.sub(".DATE", move.path) == "run/step_100.DATE.pt"
    assert (move.src, [obj.key for obj in move.objects]) == ("archive", ["run/step_100.pt"])
    assert move.reason.startswith("run/step_100.pt was written again")
    assert report.plan.after["archive"].n_objects == 2


@pytest.mark.parametrize("pin", ["run/step_100*", "run/step_100.pt"])
def test_a_pinned_older_copy_keeps_its_name_and_the_newer_one_stays_where_it_is(folders, pin):
    archive_first(folders)
    with (folders.root / "tiercache.toml").open("a") as file:
        file.write(f"\n[[pins]]\nmatch = {json.dumps(pin)}\n")
    folders.run()
    assert folders.found("cold") == {"run/step_100.pt": "a"}
    assert folders.found("hot") == {"run/step_900.pt": "N", "run/step_100.pt": "b"}


def test_a_pin_of_a_name_holds_its_older_copies_too(folders):
    archive_first(folders)
    folders.run()
    rules = (folders.root / "tiercache.toml").read_text().replace('after = "0s"', 'after = "0s"\ndelete_after = "1d"')
    (folders.root / "tiercache.toml").write_text(rules + '\n[[pins]]\nmatch = "run/step_100.pt"\n')
    folders.run()
    assert folders.found("cold") == {"run/step_100.pt": "b", "run/step_100.DATE.pt": "a"}


def test_a_file_that_is_no_checkpoint_is_renamed_too(folders):
    rules = RULES.replace('keep_hot = { last = 1 }\nthen = "archive"\nafter = "0s"', 'to = "archive"\nage = "1d"')
    (folders.root / "tiercache.toml").write_text(rules)
    folders.write("hot", "data/a.bin", b"a", 9)
    folders.run()
    folders.write("hot", "data/a.bin", b"b", 3)
    assert folders.run().exit_code == 0
    assert folders.found("cold") == {"data/a.bin": "b", "data/a.DATE.bin": "a"}


def test_a_colder_copy_that_looks_newer_without_the_catalog_blocks_its_group_and_renames_nothing(folders):
    """The date of a copy whose catalog is lost is the date of its move."""
    archive_first(folders)
    for path in (folders.root / "state").iterdir():
        path.unlink()
    folders.write("hot", "run/step_100.pt", b"b", 3, {"": 500})
    folders.run()
    assert folders.found("cold") == {"run/step_100.pt": "a"}
    assert folders.found("hot") == {"run/step_900.pt": "N", "run/step_100.pt": "b"}


POINTS = ("begun", "object", "placed", "checked", "unmade", "deleted")


@pytest.mark.parametrize("point", POINTS)
def test_a_rename_that_is_killed_at_any_point_is_finished_by_the_next_run(folders, point):
    archive_first(folders, "step-100", CHECKPOINT)
    with HookAt(f"tier_rename.{point}") as hook, pytest.raises(Killed):
        folders.run()
    assert hook.hit
    assert folders.run().exit_code == 0
    assert folders.run().exit_code == 0
    cold = {f"run/step-100/{name}": "b" for name in CHECKPOINT}
    assert folders.found("cold") == cold | {f"run/step-100.DATE/{name}": "a" for name in CHECKPOINT}


def test_an_older_copy_that_changes_during_its_rename_is_not_deleted(folders):
    archive_first(folders)
    with HookAt("tier_rename.placed", do=lambda: folders.write("cold", "run/step_100.pt", b"c", 0)):
        report = folders.run()
    assert any("it was written again during its rename" in one.reason for one in report.stopped)
    assert folders.found("cold") == {"run/step_100.pt": "c"}


def test_a_replaced_older_copy_keeps_its_name_and_the_copy_of_its_former_bytes_its_date(folders):
    """A file that a rename(2) replaced during our rename is another file: nothing of either is lost."""

    def replace():
        folders.write("cold", "run/other", b"c", 0)
        (folders.root / "cold/run/other").rename(folders.root / "cold/run/step_100.pt")

    archive_first(folders)
    with HookAt("tier_rename.placed", do=replace):
        folders.run()
    assert folders.found("cold") == {"run/step_100.pt": "c", "run/step_100.DATE.pt": "a"}
