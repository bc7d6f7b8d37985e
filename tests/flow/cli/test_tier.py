"""tier check, plan, apply, run and ls on three folders of this machine."""

import json
import os
import re
import time
from contextlib import closing
from pathlib import Path

import pytest

from tiercache.packer.pack import pack
from tiercache.store import open_store
from tiercache.tier.lock import TierLock
from tiercache.tier.rules import load_rule_file

RULES = """
state_dir = "state"
[tiers.hot]
url = "nvme"
capacity = "2TB"

[tiers.standard]
url = "store"
prices = { store_gb_month = 0.02 }

[tiers.archive]
url = "cold"
prices = { store_gb_month = 0.004 }

[[rules]]
name = "cold data"
match = "datasets/**"
after = "30d"
to = "archive"

[[rules]]
name = "runs"
match = "runs/**"
keep_hot = { last = 1 }
then = "archive"
after = "0s"

[tiering]
grace = "0s"
"""
DAY_S = 86400.0


def age(folder: Path, days: float) -> None:
    """As if all of it had been written so long ago."""
    for path in folder.rglob("*"):
        if path.is_file():
            os.utime(path, (time.time() - days * DAY_S,) * 2)


def write_checkpoint(root: Path, step: int, days: float) -> Path:
    folder = root / "nvme" / "runs" / "a" / f"step-{step}"
    folder.mkdir(parents=True)
    (folder / "model.bin").write_bytes(bytes([step % 251]) * 5000)
    age(folder, days)
    return folder


@pytest.fixture
def root(photos, tmp_path, monkeypatch):
    """The tiers: a data set that was written 40 days ago, in standard; three checkpoints of one run, in hot."""
    root = tmp_path / "tiers"
    pack(photos, root / "store" / "datasets" / "photos", shard_size=8000, block_size=3000)
    age(root, 40)
    for step, days in ((9, 3), (10, 2), (11, 1)):
        write_checkpoint(root, step, days)
    (root / "tiercache.toml").write_text(RULES)
    (root / "cold").mkdir()
    monkeypatch.chdir(root)
    return root


def shards(root: Path, tier: str) -> list[str]:
    return sorted(path.name for path in (root / tier).rglob("*.tcs"))


def steps(root: Path, tier: str) -> list[str]:
    return sorted(path.parent.name for path in (root / tier).rglob("model.bin"))


MISSPELT = 'keep_hot = { best = "val_los:1" }'


def score_checkpoints(root: Path) -> None:
    """Give the three checkpoints metrics, as if they had been written two years ago."""
    for step in (9, 10, 11):
        folder = root / "nvme" / "runs" / "a" / f"step-{step}"
        (folder / "metrics.json").write_text(json.dumps({"val_loss": step, "accuracy": 0.5}))
        age(folder, 700 + 20 - step)


class TestMetrics:
    @pytest.mark.parametrize("verb", ["check", "plan"])
    def test_a_metric_that_no_checkpoint_of_a_run_has_is_reported_and_nothing_is_deleted(self, tiercache, root, verb):
        score_checkpoints(root)
        rules = RULES.replace("keep_hot = { last = 1 }", f'{MISSPELT}\ndelete_after = "365d"')
        (root / "tiercache.toml").write_text(rules)
        (warning,) = [e for e in tiercache("tier", verb, "--json").events if e["event"] == "rule_warning"]
        assert (warning["kind"], warning["rule"]) == ("no_metric", "runs")
        assert warning["text"] == (
            "runs: no checkpoint of runs/a/step-* has the metric 'val_los', so that keep_hot keeps all 3 of them and "
            "none is deleted"
        )
        assert f"warning: {warning['text']}" in tiercache("tier", verb).out.splitlines()


class TestCheck:
    def test_check_prints_the_tiers_and_what_rules_match(self, tiercache, root):
        *rows, summary = tiercache("tier", "check", "--json").events
        tiers = [row for row in rows if row["event"] == "tier"]
        assert [(t["tier"], t["home"], t["reached"]) for t in tiers] == [
            ("hot", False, True),
            ("standard", True, True),
            ("archive", False, True),
        ]
        rules = {row["rule"]: row for row in rows if row["event"] == "rule"}
        assert rules["cold data"]["shards"] == len(shards(root, "store")) > 1
        assert (rules["runs"]["checkpoints"], rules["runs"]["n_bytes"]) == (3, 15000)
        assert rules["(no rule)"]["files"] == 0
        assert summary == {
            "event": "summary",
            "rules_file": str(root / "tiercache.toml"),
            "tiers": 3,
            "rules": 2,
            "pins": 0,
            "not_reached": 0,
        }

    def test_an_unreachable_tier_is_reported_and_exits_with_1(self, tiercache, root):
        (root / "cold").rmdir()
        (root / "cold").write_text("a file, where a folder should be")
        done = tiercache("tier", "check", "--json", code=1)
        tiers = {event["tier"]: event for event in done.events if event["event"] == "tier"}
        assert [tiers[name]["reached"] for name in ("hot", "standard", "archive")] == [True, True, False]
        assert tiers["archive"]["answer"] == f"{root}/cold: not a folder"
        assert [event for event in done.events if event["event"] == "rule"] == []
        assert done.events[-1]["not_reached"] == 1

    @pytest.mark.parametrize("folder_stays", [True, False])
    def test_a_vanished_tier_exits_check_with_1_and_run_with_3(self, tiercache, root, folder_stays):
        tiercache("tier", "run", "--once")
        (root / "cold").rename(root / "away")
        if folder_stays:
            (root / "cold").mkdir()
        for _ in range(2):  # each night again
            done = tiercache("tier", "check", "--json", code=1)
            tiers = {event["tier"]: event["reached"] for event in done.events if event["event"] == "tier"}
            assert tiers == {"hot": True, "standard": True, "archive": False}
            assert done.events[-1]["not_reached"] == 1
            summary = tiercache("tier", "run", "--once", "--json", code=3).events[-1]
            assert (summary["unseen"], summary["exit_code"]) == (["archive"], 3)
        if folder_stays:
            (root / "cold").rmdir()
        (root / "away").rename(root / "cold")
        assert tiercache("tier", "check", "--json").events[-1]["not_reached"] == 0
        assert tiercache("tier", "run", "--once", "--json").events[-1]["unseen"] == []

    def test_a_file_name_that_is_not_utf8_is_left_alone(self, tiercache, root):
        (root / "nvme" / "runs" / os.fsdecode(b"caf\xe9.txt")).write_bytes(b"from an old archive")
        assert (
            "note: 1 object left alone, names that are not valid keys: runs/caf\\udce9.txt\n"
            in tiercache("tier", "check").out
        )
        assert tiercache("tier", "run", "--once", "--json").events[-1]["stopped"] == []
        assert steps(root, "cold") == ["step-10", "step-9"]


class TestApply:
    @pytest.fixture
    def plan(self, tiercache, root):
        tiercache("tier", "plan", "--out", "plan.jsonl")
        return root / "plan.jsonl"

    def test_data_sets_in_the_plan_are_tracked(self, tiercache, root):
        """Also where it moves nothing of them yet: whose use nobody counts would wait for ever."""
        (root / "tiercache.toml").write_text(RULES.replace('after = "30d"', 'idle = "30d"'))
        tiercache("tier", "plan", "--out", "plan.jsonl")
        mark = root / "store/datasets/photos/_tiercache/tiers.json"
        tiercache("tier", "apply", "plan.jsonl", "--dry-run")
        assert not mark.exists()
        done = tiercache("tier", "apply", "plan.jsonl", "--yes", "--json").events[-1]
        assert (done["adopted"], mark.exists(), shards(root, "cold")) == (["datasets/photos"], True, [])
        again = tiercache("tier", "apply", "plan.jsonl", "--yes", "--json").events[-1]
        assert again["adopted"] == []

    def test_a_move_whose_objects_have_changed_is_stopped_and_the_others_are_made(self, tiercache, root, plan):
        (root / "nvme/runs/a/step-9/model.bin").write_bytes(b"another")
        done = tiercache("tier", "apply", plan, "--yes", "--json", code=3)
        stopped = [event for event in done.events if event["event"] == "stopped"]
        assert [event["path"] for event in stopped] == ["runs/a/step-9"]
        assert "expected 5000 bytes, found 7" in stopped[0]["reason"]
        assert done.events[-1]["done"] == done.events[-1]["n_moves"] - 1
        assert steps(root, "cold") == ["step-10"]

    def test_without_a_terminal_apply_needs_yes(self, tiercache, root, plan):
        assert tiercache("tier", "apply", plan, code=2).err.endswith("not a terminal; give --yes\n")
        assert not any((root / "cold").iterdir())


class TestLs:
    def test_ls_lists_groups_with_their_tiers(self, tiercache, root):
        *rows, summary = tiercache("tier", "ls", "--json").events
        runs = [row for row in rows if row["kind"] == "checkpoint"]
        assert [row["path"] for row in runs] == [f"runs/a/step-{step}" for step in (9, 10, 11)], "as people order them"
        assert [copy["tier"] for copy in runs[0]["copies"]] == ["hot"]
        assert summary["groups"] == len(rows)
        assert summary["tiers"]["standard"]["dollars_month"] > 0


class TestRun:
    def test_run_fails_while_another_mover_holds_the_lock(self, tiercache, root):
        with closing(open_store(str(root / "store"))) as store, TierLock(store):
            done = tiercache("tier", "run", "--once", code=1)
        assert "is moving things between these tiers" in done.err
        assert not any((root / "cold").iterdir())


class TestInit:
    def test_the_rule_file_works_as_it_is(self, tiercache, root):
        out = root / "rules.toml"
        for folder in ("nvme", "s3://b/train"):
            tiercache("tier", "init", folder, "--out", out)
            found = load_rule_file(out)
            assert (len(found.tiers), len(found.rules)) == (1, 1)
            commented = re.sub(r"^# (?=\[|[a-z_]+ = )", "", out.read_text(), flags=re.M)
            out.write_text(commented.replace('"80%"', '"80GB"'))
            found = load_rule_file(out)
            assert (len(found.tiers), len(found.rules), len(found.pins)) == (3 if folder == "nvme" else 2, 2, 1)
            out.unlink()

    def test_an_existing_rule_file_is_not_overwritten(self, tiercache, root):
        assert "File exists" in tiercache("tier", "init", "nvme", code=1).err
        assert (root / "tiercache.toml").read_text() == RULES


class TestDataSetsOutsideTheHome:
    """A data set in the hot tier: readers follow moves only of data sets in the home tier, standard."""

    @pytest.fixture
    def hot(self, photos, root):
        pack(photos, root / "nvme" / "datasets" / "digits", shard_size=8000, block_size=3000)
        age(root / "nvme", 40)
        rule = '[[rules]]\nmatch = "datasets/digits/**"\nafter = "1d"\nto = "archive"\n'
        (root / "tiercache.toml").write_text(RULES.replace("[[rules]]", rule + "[[rules]]", 1))
        return root / "nvme" / "datasets" / "digits"

    def test_the_plan_refuses_its_moves_and_runs_go_on(self, tiercache, root, hot):
        files = sorted(path for path in root.rglob("*.tcs") if hot in path.parents)
        for _ in range(2):
            tiercache("tier", "run", "--once")
            assert sorted(path for path in root.rglob("*.tcs") if "digits" in path.parts) == files
        out = tiercache("tier", "plan").out
        assert "its data set lies in tier hot" in out
