"""A scheduler's run, with all real parts: what is planned, made, settled and reported."""

import json
from pathlib import Path

import numpy as np
import pytest
from tests.tier.moving import HookAt, Killed

import tiercache as tc
from tiercache.errors import CommitConflict
from tiercache.store import LocalFolder
from tiercache.testing import JumpingClock
from tiercache.tier import placement
from tiercache.tier.lock import TierLock
from tiercache.tier.run import DONE, PARTLY, catalog_path, run_once
from tiercache.tierfile import load_tiers

DAY_S = 86_400.0
RULES = """
[[rules]]
name = "data"
match = "data/**"
kind = "shard"
age = "1d"
to = "archive"

[[rules]]
match = "ck/**"
keep_standard = { last = 1 }
then = "archive"
after = "1d"

[[rules]]
match = "scratch/**"
delete_after = "5d"
"""


class Tiers:
    """Three folders and a rule file."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write_rules()

    def write_rules(self, more: str = "") -> None:
        names = ("hot", "standard", "archive")
        text = "".join(f'[tiers.{name}]\nrole = "{name}"\nurl = "{self.root / name}"\n' for name in names)
        text += RULES + more + f'\n[tiering]\nstate_dir = "{self.root / "state"}"\n'
        (self.root / "tiercache.toml").write_text(text)

    @property
    def file(self):
        return load_tiers(self.root / "tiercache.toml")

    def write(self, tier, key, data=b"x" * 100):
        path = self.root / tier / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def keys(self, tier, under=""):
        return sorted(info.key for info in LocalFolder(self.root / tier).list(under) if "_tiercache/" not in info.key)

    def run(self, **options):
        return run_once(self.file, **options)


@pytest.fixture
def tiers(tmp_path):
    return Tiers(tmp_path)


@pytest.fixture
def clock():
    with JumpingClock() as clock:
        yield clock


def checkpoints(tiers, *steps):
    for step in steps:
        for name in ("__0_0.distcp", ".metadata"):
            tiers.write("standard", f"ck/run/step-{step}/{name}", f"{step} {name}".encode())


def write_data(tiers):
    values = np.arange(4000, dtype=np.int64)
    url = str(tiers.root / "standard" / "data")
    with tc.Writer(url, schema={"x": "int64"}, shard_size="8KiB", block_size="4KiB", compression="none") as writer:
        writer.write_batch({"x": values})
    return url, values


def records(url):
    return np.concatenate([batch["x"].to_numpy() for batch in tc.Dataset(url, cache=False).to_arrow(batch_size=1024)])


def test_old_checkpoints_go_to_the_archive_and_the_newest_stays(tiers, clock):
    checkpoints(tiers, 1, 2, 10)
    clock.jump(2 * DAY_S)
    report = tiers.run()
    assert (report.applied.done, report.settled.waiting_drops, report.exit_code) == (2, 2, DONE)
    assert len(tiers.keys("standard")) == 6
    clock.jump(DAY_S + 1)
    report = tiers.run()
    assert (report.settled.done, report.stopped) == (2, ())
    assert tiers.keys("standard") == ["ck/run/step-10/.metadata", "ck/run/step-10/__0_0.distcp"]
    assert len(tiers.keys("archive")) == 4


def test_a_run_when_all_is_done_does_nothing(tiers, clock):
    checkpoints(tiers, 1, 2)
    clock.jump(2 * DAY_S)
    tiers.run()
    clock.jump(2 * DAY_S)
    tiers.run()
    report = tiers.run()
    assert (report.plan.moves, report.settled.done, report.settled.waiting_drops) == ((), 0, 0)


def test_readers_find_the_shards_of_a_cold_data_set(tiers, clock):
    url, values = write_data(tiers)
    clock.jump(2 * DAY_S)
    report = tiers.run()
    assert report.adopted == ("data",)
    assert placement.is_adopted(LocalFolder(url))
    clock.jump(DAY_S + 1)
    report = tiers.run()
    assert report.stopped == ()
    assert tiers.keys("standard", "data") == []
    assert np.array_equal(records(url), values)


def test_last_copies_go_when_grace_is_over_and_rules_still_say_so(tiers, clock):
    tiers.write("standard", "scratch/a")
    tiers.write("standard", "scratch/b")
    clock.jump(6 * DAY_S)
    tiers.run()
    assert tiers.keys("standard") == ["scratch/a", "scratch/b"]
    tiers.write_rules('[[pins]]\nmatch = "scratch/b"\n')
    clock.jump(DAY_S + 1)
    report = tiers.run()
    assert [one.path for one in report.stopped] == ["scratch/b"]
    assert report.exit_code == PARTLY
    assert tiers.keys("standard") == ["scratch/b"]


def test_a_checkpoint_that_became_the_newest_is_not_archived_away(tmp_path, clock):
    """1. step-1 is planned for deletion, step-2 is newer. 2. Somebody deletes step-2. 3. Grace of step-1 is over."""
    tiers = Tiers(tmp_path)
    text = (tmp_path / "tiercache.toml").read_text().replace('match = "scratch/**"', 'match = "run/**"')
    (tmp_path / "tiercache.toml").write_text(text)
    tiers.write("standard", "run/step-1.pt", b"one")
    tiers.write("standard", "run/step-2.pt", b"two")
    clock.jump(6 * DAY_S)
    assert tiers.run().applied.done == 1
    (tmp_path / "standard" / "run" / "step-2.pt").unlink()
    clock.jump(DAY_S + 1)
    report = tiers.run()
    assert tiers.keys("standard") == ["run/step-1.pt"]
    assert report.stopped != ()


def test_a_dry_run_changes_nothing(tiers, clock):
    checkpoints(tiers, 1, 2)
    write_data(tiers)
    clock.jump(2 * DAY_S)
    before = sorted(path for path in tiers.root.rglob("*") if path.is_file())
    report = tiers.run(dry_run=True)
    assert len(report.plan.moves) > 0
    assert report.to_json()["dry_run"] is True
    assert sorted(p for p in tiers.root.rglob("*") if p.is_file() and "state" not in p.parts) == before


def test_its_report_is_json_that_a_machine_reads(tiers, clock):
    checkpoints(tiers, 1, 2)
    clock.jump(2 * DAY_S)
    facts = json.loads(json.dumps(tiers.run().to_json()))
    assert (facts["done"], facts["waiting_drops"], facts["stopped"], facts["exit_code"]) == (1, 1, [], 0)
    assert facts["before"]["standard"]["n_objects"] == 4


def test_a_second_run_at_once_says_who_is_at_work(tiers):
    with TierLock(LocalFolder(tiers.root / "standard"), renew_s=None), pytest.raises(CommitConflict, match="alone"):
        tiers.run()


def test_a_run_finishes_what_an_earlier_one_left_half_deleted_before_it_plans(tiers, clock):
    checkpoints(tiers, 1, 2)
    clock.jump(2 * DAY_S)
    tiers.run()
    clock.jump(DAY_S + 1)
    with HookAt("tier_drop.unmade"), pytest.raises(Killed):
        tiers.run()
    assert "ck/run/step-1/__0_0.distcp" in tiers.keys("standard")
    left = []
    with HookAt("tier_run.finished", do=lambda: left.extend(tiers.keys("standard"))):
        report = tiers.run()
    assert [key for key in left if "step-1" in key] == []
    assert report.settled.done == 1


@pytest.mark.parametrize(
    "point", ["tier_run.finished", "tier_run.planned", "tier_run.adopted", "tier_run.applied", "tier_placement.written"]
)
def test_a_run_that_was_killed_is_made_good_by_the_next(tiers, clock, point):
    checkpoints(tiers, 1, 2)
    url, values = write_data(tiers)
    clock.jump(2 * DAY_S)
    with HookAt(point) as hook, pytest.raises(Killed):
        tiers.run()
    assert hook.hit
    for _ in range(3):
        assert np.array_equal(records(url), values)
        tiers.run()
        clock.jump(DAY_S + 1)
    assert [key for key in tiers.keys("standard") if "step-2" not in key] == []


def test_the_books_lie_in_the_state_folder(tiers):
    tiers.run()
    assert catalog_path(tiers.file) == tiers.root / "state" / "tiers.sqlite"
    assert catalog_path(tiers.file).exists()
