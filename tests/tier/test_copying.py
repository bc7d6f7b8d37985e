"""Copies that are made again, or of which another tier has a good one: what is good stays, and grace is its own."""

from dataclasses import replace

import pytest
from tests.tier.bucket import flipped, read_object, write_object
from tests.tier.moving import GRACE_S, PARTS, HookAt, Killed, World, content, moved_away


@pytest.fixture
def world(tmp_path):
    return World(tmp_path / "world")


def unsummed(move):
    """The same, of objects whose checksums nobody knows."""
    return replace(move, objects=tuple(one._replace(crc32c=None) for one in move.objects))


def test_a_copy_that_another_tier_gave_is_not_replaced_by_what_has_rotted(world):
    """1. hot rots; the archive gets the home tier's. 2. Who removes that relies on it. 3. hot looks written anew."""
    world.put("standard", "f")
    world.apply(world.plan(world.move("f", "standard", "hot", action="copy"), name="up"))
    world.inner["hot"].put("f", content("other"))
    assert world.apply(world.plan(world.move("f", "hot", "archive"), name="down")).stopped == ()
    world.inner["standard"].delete(["f"])
    applied = world.apply(world.plan(unsummed(world.move("f", "hot", "archive")), name="again"))
    assert "it is not overwritten" in applied.stopped[0].reason
    assert world.where("f") == ["archive"]


@pytest.mark.parametrize("keys", [("f",), PARTS])
def test_a_source_that_has_rotted_replaces_no_archived_copy_in_a_store_without_checksums(tmp_path, keys):
    """The mover was killed when the server had copied it: the ETag is all that anybody knows of it."""
    world = World(tmp_path / "world", classes=True)
    for name in ("standard", "archive"):
        world.inner[name].says_sums = False
    world.put("standard", *keys)
    path = keys[0].rpartition("/")[0] or keys[0]
    move = unsummed(world.move(path, "standard", "archive", keys=keys, kind="checkpoint" if len(keys) > 1 else "file"))
    with HookAt("tier_move.copied"), pytest.raises(Killed):
        world.apply(world.plan(move, name="1"))
    file = world.inner["standard"]._path(keys[0])
    about, data = read_object(file)
    write_object(file, about, flipped(data))
    assert world.apply(world.plan(move, name="2")).stopped == ()
    world.later()
    assert world.settle().done == 1
    assert all(world.where(key) == ["archive"] for key in keys)


@pytest.mark.parametrize("point", ["tier_move.object", "tier_move.copied", "tier_move.recorded"])
def test_a_copy_made_again_with_the_etag_of_the_lost_one_has_a_grace_of_its_own(tmp_path, point):
    """ETags are made of bytes: the books, which know the lost one, know the new one too before it is recorded."""
    world = World(tmp_path / "world", classes=True, cold_class="STANDARD_IA")
    moved_away(world, "f")
    world.later(GRACE_S / 2)
    world.inner["archive"].delete(["f"])
    with HookAt(point), pytest.raises(Killed):
        world.apply(world.plan(world.move("f", "standard", "archive"), name="tomorrow"))
    world.apply(world.plan(world.move("f", "standard", "archive"), name="again"))
    world.later(GRACE_S / 2 + 1)
    assert world.settle().waiting_drops == 1
    assert world.where("f") == ["standard", "archive"]
    world.later(GRACE_S / 2)
    assert world.settle().done == 1
