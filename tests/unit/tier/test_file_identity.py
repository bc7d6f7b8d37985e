"""A local source that changed keeps its new bytes, also where its size and its mtime are what they were."""

import os

import pytest
from tests.support.tier_moves import HookAt, World, content

from tiercache.store import LocalFolder


@pytest.fixture
def world(tmp_path):
    """Home is a folder."""
    world = World(tmp_path / "world")
    text = (world.root / "tiercache.toml").read_text()
    (world.root / "tiercache.toml").write_text(text.replace(world.url("standard"), str(tmp_path / "disk")))
    world.inner["standard"] = world.faulty["standard"] = LocalFolder(tmp_path / "disk")
    return world


def write_unseen(world, key):
    """Write other bytes into a file, and restore its size and its dates as far as a program can."""
    path = world.inner["standard"].root / key
    before = path.stat()
    with path.open("r+b") as file:
        file.write(new_content(key))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)


def new_content(key):
    return bytes(reversed(content(key)))


def moves(world, key="f"):
    world.put("standard", key)
    return world.plan(world.move(key, "standard", "archive"))


@pytest.mark.parametrize("point", ["tier_transfer.published", "tier_move.object", "tier_move.recorded"])
def test_a_source_that_changed_during_its_copy_is_not_deleted(world, point):
    plan = moves(world)
    with HookAt(point, do=lambda: write_unseen(world, "f")) as hook:
        world.apply(plan)
    assert hook.hit
    world.later()
    assert world.run_due_deletions().n_made == 0
    assert world.inner["standard"].get("f") == new_content("f")


@pytest.mark.parametrize("point", ["tier_drop.checked", "tier_drop.looked_again", "tier_drop.decided"])
def test_a_source_that_changed_while_it_was_about_to_be_deleted_stays(world, point):
    plan = moves(world)
    world.apply(plan)
    world.later()
    with HookAt(point, do=lambda: write_unseen(world, "f")) as hook:
        settled = world.run_due_deletions()
    assert hook.hit
    assert (settled.n_made, len(settled.stopped)) == (0, 1)
    world.run_due_deletions()
    assert world.inner["standard"].get("f") == new_content("f")
