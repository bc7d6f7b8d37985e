"""Local copies are read back from disk before their sources are deleted."""

from dataclasses import replace

import pytest
from tests.support.tier_moves import PARTS, HookAt, Killed, World, checkpoint, content, moved_away

from tiercache.errors import StoreError
from tiercache.store import LocalFolder
from tiercache.tier.context import BatchLimits


class Disk(LocalFolder):
    """A folder on a bad disk. fails: Reads fail. rotten: Keys of which a bit is flipped on the disk."""

    fails = False

    def __init__(self, root):
        super().__init__(root)
        self.rotten = set()

    def read_into(self, key, spans, **how):
        if self.fails:
            raise StoreError("read_into: Input/output error", url=f"{self.url}/{key}", retryable=True)
        super().read_into(key, spans, **how)
        for span, buffer in spans:
            if key in self.rotten and span.start == 0:
                buffer[0] ^= 1

    def read_tail(self, key, n_bytes):
        data, info = super().read_tail(key, n_bytes)
        return (bytes([data[0] ^ 1]) + data[1:] if key in self.rotten else data), info

    def get(self, key):
        return self.read_tail(key, 1 << 30)[0]

    def put(self, key, data):
        self.rotten.discard(key)
        return super().put(key, data)

    def create(self, key, **how):
        self.rotten.discard(key)
        return super().create(key, **how)


@pytest.fixture
def world(tmp_path):
    """The archive is a local folder."""
    world = World(tmp_path / "world")
    text = (world.root / "tiercache.toml").read_text()
    (world.root / "tiercache.toml").write_text(text.replace(world.url("archive"), str(tmp_path / "disk")))
    world.inner["archive"] = world.faulty["archive"] = Disk(tmp_path / "disk")
    return world


def rot(world, key):
    """Flip a bit on the disk: name, size and dates stay."""
    world.inner["archive"].rotten.add(key)


def test_a_copy_that_became_corrupt_keeps_its_source_and_the_placement_is_reverted(world):
    moved_away(world, "f")
    rot(world, "f")
    world.later()
    assert "on its disk: what it was made from stays" in world.run_due_deletions().stopped[0].reason
    assert (world.where("f"), world.row("f"), world.journal()) == (["standard"], None, {1: "cancelled"})


def test_one_corrupt_object_keeps_the_whole_group_and_is_made_again(world):
    world.apply(checkpoint(world))
    rot(world, PARTS[1])
    world.later()
    assert world.run_due_deletions().n_made == 0
    assert all("standard" in world.where(key) for key in PARTS)
    move = world.move("ck/step-1", "standard", "archive", keys=PARTS, kind="checkpoint")
    assert world.apply(world.plan(move, name="again")).stopped == ()
    world.later()
    world.run_due_deletions()
    assert all(world.where(key) == ["archive"] for key in PARTS)


def test_a_damaged_copy_of_which_the_source_was_written_again_is_a_conflict(world):
    moved_away(world, "f")
    rot(world, "f")
    world.later()
    world.run_due_deletions()
    world.inner["standard"].put("f", b"x" * len(content("f")))
    move = world.move("f", "standard", "archive")
    move = replace(move, objects=tuple(one._replace(crc32c=None) for one in move.objects))
    assert "conflict" in world.apply(world.plan(move, name="again")).stopped[0].reason
    assert world.keys("archive") == ["f"]


def test_a_copy_that_becomes_corrupt_during_the_deletion_keeps_the_rest_of_the_source(world):
    world.apply(checkpoint(world))
    world.later()
    with pytest.raises(Killed), HookAt("tier_drop.unmade"):
        world.run_due_deletions()
    left = world.keys("standard")
    rot(world, left[0])
    assert world.run_due_deletions().waiting_drops == 1
    assert (world.keys("standard"), world.journal()) == (left, {1: "dropping"})
    assert world.inner["standard"].get(left[0]) == content(left[0])


def test_a_copy_that_cannot_be_read_twice_is_not_trusted_and_the_placement_is_reverted(world):
    moved_away(world, "f")
    world.later()
    world.inner["archive"].fails = True
    world.run_due_deletions()
    assert world.row("f") is not None
    assert "Input/output error" in world.run_due_deletions().stopped[0].reason
    assert (world.row("f"), world.journal()) == (None, {1: "cancelled"})
    applied = world.apply(replace(world.plan(world.move("f", "standard", "archive")), id="again"))
    assert "Input/output error" in applied.stopped[0].reason
    assert world.row("f") is None


def test_readers_of_a_corrupt_copy_are_redirected_to_a_source_that_is_not_home(world):
    world.put("hot", "f")
    world.apply(world.plan(world.move("f", "hot", "archive")))
    assert world.row("f").url == str(world.inner["archive"].root)
    rot(world, "f")
    world.later()
    world.run_due_deletions()
    assert (world.row("f").url, world.where("f")) == (world.url("hot"), ["hot"])


def test_readers_are_not_redirected_to_a_source_that_changed(world):
    world.put("hot", "f")
    world.apply(world.plan(world.move("f", "hot", "archive")))
    world.inner["hot"].put("f", b"anew")
    world.later()
    assert world.run_due_deletions().stopped
    assert world.row("f").url == str(world.inner["archive"].root)


def test_the_deletion_facts_are_taken_again_if_reading_back_took_long(world, monkeypatch):
    monkeypatch.setattr("tiercache.tier.deletions._BATCH_LIMITS", BatchLimits(64, 1000, 1500))
    monkeypatch.setattr("tiercache.tier.deletions._FACTS_MAX_AGE_S", -1.0)
    monkeypatch.setattr("tiercache.tier.deletions.take_deletion_facts", lambda *_: world.facts)
    moved_away(world, "f", "g")
    world.later()

    def begins_to_read():
        world.facts = replace(world.facts, in_use=frozenset({"g"}))

    with HookAt("tier_drop.ended", do=begins_to_read):
        settled = world.run_due_deletions()
    assert (settled.n_made, settled.waiting_drops) == (1, 1)
    assert "found that a machine reads it" in settled.stopped[0].reason
