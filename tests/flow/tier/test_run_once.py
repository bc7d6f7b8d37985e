"""Runs for a scheduler, with all real parts: plan, moves, deletions and report."""

from pathlib import Path

import numpy as np
import pytest
from tests.support.tier_moves import HookAt, Killed

import tiercache as tc
from tiercache.store import LocalFolder
from tiercache.tier.mover import run_once
from tiercache.tier.rules import load_rule_file

DAY_S = 86_400.0
RULES = """
[[rules]]
name = "data"
match = "data/**"
after = "1d"
to = "archive"

[[rules]]
match = "ck/**"
keep_standard = { last = 1 }
then = "archive"
after = "1d"

[[rules]]
match = "scratch/**"
delete_after = "5d"
max_delete = "100%"
"""


class Tiers:
    """Three folders and a rule file."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write_rules()

    def write_rules(self, more: str = "") -> None:
        names = ("hot", "standard", "archive")
        text = f'state_dir = "{self.root / "state"}"\n'
        text += "".join(f'[tiers.{name}]\nurl = "{self.root / name}"\n' for name in names)
        text += RULES + more
        (self.root / "tiercache.toml").write_text(text)

    @property
    def file(self):
        return load_rule_file(self.root / "tiercache.toml")

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


def test_a_checkpoint_that_became_the_newest_is_not_archived_away(tmp_path, clock):
    """1. step-1 waits for its deletion. 2. A user deletes step-2. 3. The grace period of step-1 ends."""
    tiers = Tiers(tmp_path)
    text = (tmp_path / "tiercache.toml").read_text().replace('match = "scratch/**"', 'match = "run/**"')
    (tmp_path / "tiercache.toml").write_text(text)
    tiers.write("standard", "run/step-1.pt", b"one")
    tiers.write("standard", "run/step-2.pt", b"two")
    clock.jump(6 * DAY_S)
    assert tiers.run().applied.n_made == 1
    (tmp_path / "standard" / "run" / "step-2.pt").unlink()
    clock.jump(DAY_S + 1)
    report = tiers.run()
    assert tiers.keys("standard") == ["run/step-1.pt"]
    assert report.stopped != ()


@pytest.mark.parametrize(
    "point", ["tier_run.finished", "tier_run.planned", "tier_run.tracked", "tier_run.applied", "tier_placement.written"]
)
def test_the_next_run_completes_a_killed_run(tiers, clock, point):
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


# -- folders and links ------------------------------------------------------------------------------------------------


def run_twice(tiers, clock):
    """Run now, and again when the grace period is over."""
    clock.jump(2 * DAY_S)
    first = tiers.run()
    clock.jump(DAY_S + 1)
    return first, tiers.run()


def test_a_checkpoint_that_left_a_local_tier_leaves_no_empty_folder(tiers, clock):
    """Orbax and Trainer list folders, and would resume from an empty one."""
    rules = tiers.root / "tiercache.toml"
    rules.write_text(rules.read_text().replace('match = "ck/**"', 'match = "ck/**"\ncheckpoint = "{step}/"'))
    for step in (100, 200):
        for name in ("_CHECKPOINT_METADATA", "default/manifest.ocdbt", "default/d/1", "metrics/metrics"):
            tiers.write("standard", f"ck/run/{step}/{name}")
    (tiers.root / "standard/ck/run/100/default/array_metadatas").mkdir()
    run_twice(tiers, clock)
    assert [path.name for path in (tiers.root / "standard/ck/run").iterdir()] == ["200"]
    assert len(tiers.keys("archive", "ck/run/100/")) == 4


def test_a_folder_that_is_not_empty_stays(tiers, clock):
    checkpoints(tiers, 1, 2)
    (tiers.root / "standard/ck/run/step-1/more").symlink_to("nowhere")
    (tiers.root / "standard/ck/run/step-1/empty").mkdir()
    run_twice(tiers, clock)
    assert [path.name for path in (tiers.root / "standard/ck/run/step-1").iterdir()] == ["more"]


@pytest.mark.parametrize("target", ["step-1", "step-1/__0_0.distcp"])
def test_what_a_symbolic_link_points_to_is_not_moved_until_the_link_leads_elsewhere(tiers, clock, target):
    """Lightning's last.ckpt, with save_last="link"."""
    checkpoints(tiers, 1, 2, 3)
    link = tiers.root / "standard/ck/run/last.ckpt"
    link.symlink_to(target)
    first, _ = run_twice(tiers, clock)
    assert tiers.keys("standard", "ck/run/step-1/") != []
    assert tiers.keys("standard", "ck/run/step-2/") == []
    assert ["symbolic link ck/run/last.ckpt" in one.reason for one in first.plan.refusals if "step-1" in one.path] == [
        True
    ]
    link.unlink()
    link.symlink_to("step-3")
    run_twice(tiers, clock)
    assert tiers.keys("standard", "ck/run/step-1/") == []
    assert len(tiers.keys("archive", "ck/run/step-1/")) > 0


def test_a_checkpoint_with_a_link_in_its_folder_is_not_moved(tiers, clock):
    checkpoints(tiers, 1, 2)
    tiers.write("standard", "ck/base.bin", b"base")
    (tiers.root / "standard/ck/run/step-1/base").symlink_to("../../base.bin")
    run_twice(tiers, clock)
    assert (tiers.root / "standard/ck/run/step-1/base").read_bytes() == b"base"
    assert tiers.keys("archive", "ck/run/step-1/") == []


def test_a_link_that_is_made_during_the_grace_period_keeps_its_target(tiers, clock):
    checkpoints(tiers, 1, 2)
    clock.jump(2 * DAY_S)
    tiers.run()
    link = tiers.root / "standard/ck/run/last.ckpt"
    link.symlink_to("step-1/__0_0.distcp")
    clock.jump(DAY_S + 1)
    (stopped,) = tiers.run().deletions.stopped
    assert "expected no symbolic link to it, found ck/run/last.ckpt" in stopped.reason
    assert link.exists()


def test_a_full_tier_keeps_the_targets_of_symbolic_links(tiers, clock):
    path = tiers.root / "tiercache.toml"
    path.write_text(path.read_text().replace("[tiers.hot]\n", '[tiers.hot]\ncapacity = "250"\n'))
    for name in ("a", "b", "c"):
        tiers.write("hot", f"x/{name}")
    (tiers.root / "hot/x/link").symlink_to("a")
    run_twice(tiers, clock)
    assert "x/a" in tiers.keys("hot")
    assert len(tiers.keys("hot")) < 3
