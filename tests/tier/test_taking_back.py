"""Moves that are not finished: readers go back to where they were; what cannot be asked about stops no other."""

import pytest
from tests.tier.moving import World

from tiercache.testing import Fault
from tiercache.tier.move.deletions import DeletionGuard


@pytest.fixture
def world(tmp_path):
    return World(tmp_path / "world")


VERSION, SHARD = "data/_tiercache/versions/1", "data/s1"


def waiting(world, action):
    """A shard that goes, or is deleted, and a file that goes; grace is over. Somebody writes the shard anew."""
    world.put("standard", VERSION, SHARD, "f")
    moves = [
        world.move(SHARD, "standard", None if action == "delete" else "archive", action=action, kind="shard"),
        world.move("f", "standard", "archive", number=2),
    ]
    assert world.apply(world.plan(*moves)).stopped == ()
    world.survey = DeletionGuard(deletes=frozenset([SHARD]))
    world.inner["standard"].put(SHARD, b"anew")
    world.later()


@pytest.mark.parametrize("action", ["move", "delete"])
def test_a_shard_whose_data_set_is_gone_keeps_no_other_move_from_being_finished(world, action):
    waiting(world, action)
    world.inner["standard"].delete([VERSION])
    assert world.settle().done == 1
    assert world.journal() == {1: "cancelled", 2: "done"}
    assert world.inner["standard"].get(SHARD) == b"anew"


def test_a_shard_whose_readers_cannot_be_asked_about_waits_and_others_are_finished(world):
    waiting(world, "move")
    world.fail("standard", Fault("list", keys="data/_tiercache/versions/"))
    settled = world.settle()
    assert "_tiercache/versions" in settled.stopped[0].reason
    assert world.journal() == {1: "waiting", 2: "done"}
    world.settle()
    assert world.journal() == {1: "cancelled", 2: "done"}


def test_readers_are_told_nothing_of_a_deletion_that_never_began(world):
    world.put("hot", "f")
    world.apply(world.plan(world.move("f", "hot", None, action="delete")))
    world.later()
    assert "no rule deletes it" in world.settle().stopped[0].reason
    assert world.row("f") is None
