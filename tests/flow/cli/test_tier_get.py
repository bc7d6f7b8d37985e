"""tier get on three folders of this machine: what moved comes back, and stays for the time of its hold."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from tests.flow.cli.test_tier import RULES, age, write_checkpoint
from tests.support.clock import JumpingClock

from tiercache.packer.pack import pack

DAY_S = 86400.0


@pytest.fixture
def clock():
    with JumpingClock() as clock:
        yield clock


@pytest.fixture
def root(tmp_path, monkeypatch, tiercache):
    """Three checkpoints of a run and a file, of which a run of the mover has sent all but the newest to the archive."""
    root = tmp_path / "tiers"
    for step, days in ((9, 3), (10, 2), (11, 1)):
        folder = write_checkpoint(root, step, days)
        os.utime(folder, (time.time() - days * DAY_S,) * 2)
    (root / "nvme" / "notes").mkdir()
    (root / "nvme" / "notes" / "a.txt").write_text("kept by nobody")
    age(root / "nvme" / "notes", 40)
    notes = '\n[[rules]]\nname = "notes"\nmatch = "notes/**"\nafter = "1d"\nto = "standard"\n'
    (root / "tiercache.toml").write_text(RULES + notes)
    monkeypatch.chdir(root)
    tiercache("tier", "run", "--once")
    tiercache("tier", "run", "--once")
    assert step_files(root, "nvme") == ["step-11"]
    return root


def step_files(root: Path, tier: str) -> list[str]:
    return sorted(path.name for path in (root / tier / "runs" / "a").glob("*") if any(path.iterdir()))


def test_a_recalled_checkpoint_has_its_mode_and_date_and_is_not_the_newest_of_its_run(tiercache, root):
    run = root / "nvme" / "runs" / "a"
    archived = (root / "cold/runs/a/step-9/model.bin").stat()
    (root / "cold/runs/a/step-9/model.bin").chmod(0o640)
    run_s = run.stat().st_mtime_ns
    tiercache("tier", "get", "runs/a/step-9", "--yes")
    recalled = (run / "step-9" / "model.bin").stat()
    assert (recalled.st_mtime_ns, recalled.st_mode & 0o777) == (archived.st_mtime_ns, 0o640)
    assert time.time() - recalled.st_mtime > 2 * DAY_S
    assert run.stat().st_mtime_ns == run_s
    assert max(run.glob("*/model.bin"), key=lambda path: path.stat().st_mtime).parent.name == "step-11"
    for path in (run / "step-9", root / "cold/runs/a/step-9"):
        assert time.time() - path.stat().st_mtime > 2 * DAY_S


def test_a_held_checkpoint_is_not_removed_and_every_command_says_why(tiercache, root):
    tiercache("tier", "get", "runs/a/step-9", "--yes")
    out = tiercache("ckpt", "rm", "runs/a", "--dry-run").out
    assert "would leave runs/a/step-9: held until " in out
    assert "would delete 2 checkpoints" in out
    assert "held until " in tiercache("ckpt", "ls", "runs/a/step-9").out
    assert "runs/a/step-9: left: held until " in tiercache("ckpt", "rm", "runs/a", "--yes", code=3).out
    assert step_files(root, "nvme") == ["step-9"]


def test_a_hold_of_no_time_ends_the_hold(tiercache, root):
    tiercache("tier", "get", "runs/a/*", "--yes")
    assert tiercache("tier", "get", "runs/a/step-9", "--hold", "0s", "--yes").out.endswith("there already; not held\n")
    tiercache("tier", "run", "--once")
    assert step_files(root, "nvme") == ["step-10", "step-11"]


def test_a_recall_to_another_tier_than_the_first_is_possible(tiercache, root):
    tiercache("tier", "get", "runs/a/step-9", "--to", "standard", "--yes")
    assert step_files(root, "store") == ["step-9"]
    assert "step-9" not in step_files(root, "nvme")


def test_a_tier_without_room_refuses(tiercache, root):
    rules = (root / "tiercache.toml").read_text()
    (root / "tiercache.toml").write_text(rules.replace('capacity = "2TB"', 'capacity = "6KB"'))
    done = tiercache("tier", "get", "runs/a/step-9", "--yes", "--json", code=3)
    refused = [one["reason"] for one in done.events if one["event"] == "refused"]
    assert refused == ["no room in hot: its capacity is 5.9 KiB"]
    assert step_files(root, "nvme") == ["step-11"]


def test_a_checkpoint_of_which_two_tiers_have_different_copies_is_refused(tiercache, root):
    half = root / "nvme/runs/a/step-9"
    half.mkdir()
    (half / "model.bin").write_bytes(b"torn")
    age(half, 3)
    done = tiercache("tier", "get", "runs/a/step-9", "--yes", "--json", code=3)
    assert "conflict: two tiers have different objects" in next(
        one["reason"] for one in done.events if one["event"] == "refused"
    )
    assert (half / "model.bin").read_bytes() == b"torn"


def test_shards_come_back_to_the_home_tier_where_readers_find_them(tiercache, photos, tmp_path, monkeypatch):
    root = tmp_path / "shards"
    pack(photos, root / "store" / "datasets" / "photos", shard_size=8000, block_size=3000)
    age(root, 40)
    (root / "tiercache.toml").write_text(RULES)
    monkeypatch.chdir(root)
    tiercache("tier", "run", "--once")
    tiercache("tier", "run", "--once")
    shards = sorted(path.name for path in (root / "cold").rglob("*.tcs"))
    assert shards
    assert not [*(root / "store").rglob("*.tcs")]
    tiercache("tier", "get", "datasets/photos", "--yes")
    assert sorted(path.name for path in (root / "store").rglob("*.tcs")) == shards
    shutil.rmtree(root / "cold")
    assert json.loads(tiercache("info", root / "store/datasets/photos", "--shards", "--json").out.splitlines()[-1])
    tiercache("head", root / "store/datasets/photos", "-n", "1")


def test_shards_are_not_recalled_to_a_tier_that_no_placement_leads_to(tiercache, photos, tmp_path, monkeypatch):
    root = tmp_path / "shards"
    pack(photos, root / "store" / "datasets" / "photos", shard_size=8000, block_size=3000)
    (root / "tiercache.toml").write_text(RULES)
    monkeypatch.chdir(root)
    done = tiercache("tier", "get", "datasets/**", "--to", "hot", "--yes", "--json", code=3)
    reasons = {one["reason"] for one in done.events if one["event"] == "refused"}
    what = "shards are read from standard or through the cache: recall them to standard, and warm the cache"
    assert reasons == {what}


def test_a_deletion_that_waits_when_its_checkpoint_is_recalled_is_given_up_without_an_error(tiercache, root, clock):
    rules = (root / "tiercache.toml").read_text()
    (root / "tiercache.toml").write_text(rules.replace('grace = "0s"', 'grace = "1d"'))
    write_checkpoint(root, 12, 0.5)
    assert tiercache("tier", "run", "--once", "--json").events[-1]["waiting_drops"] >= 1
    moved = sorted({*step_files(root, "nvme")} & {*step_files(root, "cold")})
    tiercache("tier", "get", f"runs/a/{moved[-1]}", "--yes")
    clock.jump(1.5 * DAY_S)
    assert tiercache("tier", "run", "--once", "--json").events[-1]["stopped"] == []
    assert moved[-1] in step_files(root, "nvme")
