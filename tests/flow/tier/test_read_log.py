"""Files that are read through a cache of this machine count as used for the rules of tiers."""

import os
import subprocess
import sys
import time

import fsspec
import pytest
from tests.support.tier_moves import World, moved_away

import tiercache as tc
from tiercache.store import uses as read_log
from tiercache.tier.deletions import DeletionFacts, deletion_facts_of
from tiercache.tier.inventory import take_inventory
from tiercache.tier.journal import TierCatalog
from tiercache.tier.policy import decide
from tiercache.tier.rules import load_rule_file
from tiercache.tier.snapshot import Decisions
from tiercache.tier.stores import Stores

DAY_S = 86_400.0
KEYS = ("data/a.bin", "data/b.bin")
RULE = '[[rules]]\nmatch = "**"\nidle = "30d"\nto = "archive"\n'


class Tiers:
    """Two folders; the files of the first were written 40 days ago."""

    def __init__(self, root, cache):
        self.root, self.cache = root, cache
        for key in KEYS:
            self.write(key)
        self.write_rules(RULE)

    def write(self, key, days=40):
        path = self.root / "store" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(key.encode() * 100)
        os.utime(path, (time.time() - days * DAY_S,) * 2)

    def write_rules(self, rules):
        tiers = "".join(
            f'[tiers.{name}]\nurl = "{self.root / folder}"\n'
            for name, folder in (("standard", "store"), ("archive", "cold"))
        )
        (self.root / "tiercache.toml").write_text(f'state_dir = "{self.root / "state"}"\n{tiers}{rules}')

    def decide(self):
        """Return the paths of moves, and the reasons of refusals by path."""
        file = load_rule_file(self.root / "tiercache.toml")
        with Stores(file) as stores, TierCatalog(self.root / "state" / "tiers.sqlite") as catalog:
            snapshot = take_inventory(file, stores, catalog, now_s=time.time()).snapshot
            found = decide(snapshot, file, file.prices, capacity_bytes=[None, None])
        self.snapshot = snapshot
        paths = snapshot.paths.to_pylist()
        refusals = zip(found.refusals.group.tolist(), found.refusals.reason.tolist(), strict=True)
        return [paths[group] for group in found.moves.group.tolist()], {paths[group]: why for group, why in refusals}

    def unused(self):
        """Return the paths without a known use: a plan refuses to move them."""
        moves, refused = self.decide()
        assert moves == []
        assert all("its use is not known" in why for why in refused.values())
        return sorted(refused)


@pytest.fixture
def tiers(tmp_path):
    with tc.Cache(tmp_path / "cache", size="16MiB", min_free="0") as cache:
        yield Tiers(tmp_path, cache)
        kind = fsspec.get_filesystem_class("tiercache")
        for fs in kind._cache.values():
            fs.close()
        kind.clear_instance_cache()


def shift_clock(monkeypatch, days):
    now_s = time.time() + days * DAY_S
    monkeypatch.setattr(read_log.time, "time", lambda: now_s)


def read_by_fsspec(tiers, key):
    url = f"tiercache::file://{tiers.root}/store/{key}"
    with fsspec.open(url, "rb", tiercache={"cache": tiers.cache}) as file:
        assert file.read() == key.encode() * 100


@pytest.mark.parametrize("verb", ["cat_file", "cat", "cat_ranges", "get_file"])
def test_every_way_to_read_through_tiercache_counts_as_a_use(tiers, tmp_path, verb):
    fs = fsspec.filesystem("tiercache", target_protocol="file", cache=tiers.cache)
    path = str(tiers.root / "store" / KEYS[0])
    how = {"cat_ranges": ([path], 0, 2), "get_file": (path, str(tmp_path / "out"))}
    getattr(fs, verb)(*how.get(verb, (path,)))
    assert tiers.unused() == [KEYS[1]]


def test_reads_of_a_killed_process_count_as_use(tiers):
    code = (
        "import fsspec, os, signal\n"
        f"fsspec.open('tiercache::file://{tiers.root}/store/{KEYS[0]}', 'rb').open().read()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    assert tiers.unused() == [KEYS[1]]


def test_full_logs_are_compacted_without_losing_uses(tiers, monkeypatch, tmp_path):
    monkeypatch.setenv("TIERCACHE_STATE_DIR", str(tmp_path / "own"))
    monkeypatch.setattr(read_log, "_LOG_BYTES", 200)
    for number in range(30):
        read_log.record_use(f"s3://bucket/{number % 5}-{number}")
    folder = tmp_path / "own" / read_log.FOLDER
    n_logs = len(list(folder.iterdir()))
    assert n_logs > 2
    before = read_log.read_uses()
    shift_clock(monkeypatch, 1)
    assert read_log.read_uses() == before
    assert len(list(folder.iterdir())) < n_logs
    assert read_log.read_uses() == before
    assert len(before) == 30


def test_an_unusable_state_folder_does_not_disturb_readers(tiers, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("TIERCACHE_STATE_DIR", str(tmp_path / "file"))
    read_by_fsspec(tiers, KEYS[0])
    assert tiers.unused() == sorted(KEYS)


def test_a_truncated_line_of_the_log_is_ignored(monkeypatch, tmp_path):
    monkeypatch.setenv("TIERCACHE_STATE_DIR", str(tmp_path))
    read_log.record_use("s3://bucket/torn-test")
    path = next((tmp_path / read_log.FOLDER).iterdir())
    with path.open("a") as file:
        file.write('[1.0, "s3://buck\n{}\n[null, 3, 4]\n[5]\n')
    assert list(read_log.read_uses()) == ["s3://bucket/torn-test"]


@pytest.mark.parametrize(("rule", "goes"), [('idle = "1d"', False), ('after = "1d"', True)])
def test_a_file_that_is_read_during_the_grace_period_is_not_deleted(tmp_path, rule, goes):
    world = World(tmp_path / "world", rules=f'[[rules]]\nname = "cold"\nmatch = "**"\nto = "archive"\n{rule}\n')
    moved_away(world, "f")
    world.facts = DeletionFacts(used_s={"f": world.now_s + 60})
    world.later()
    assert world.run_due_deletions().n_made == goes
    assert world.where("f") == (["archive"] if goes else ["standard", "archive"])


def test_the_deletion_guard_knows_reads_through_a_cache(tiers):
    read_by_fsspec(tiers, KEYS[0])
    tiers.decide()
    assert list(deletion_facts_of(tiers.snapshot, Decisions()).used_s) == [KEYS[0]]
