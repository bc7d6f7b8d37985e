"""The rig notices a mover that is broken: each way to lose something is laid into it, and the oracle says so."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest.mock import patch

import pytest
from tests.tier.bucket import Died
from tests.tier.jobs import fill, write
from tests.tier.world import World

from tiercache import crash_points
from tiercache.tier.move import executor
from tiercache.tier.move.checks import MoveContext
from tiercache.tier.move.deletions import DeferredDeletions
from tiercache.tier.move.executor import CopyMaker
from tiercache.tier.plan import policy

# -- trials: each yields what the oracle finds, step by step -----------------------------------------------------------


def step(world: World, work: Callable[[], object], dies_at: str = "") -> list[str]:
    """What is wrong after some work of the library, which dies at a point."""

    def die(name: str) -> None:
        if name == dies_at:
            world.script.dead = True
            raise Died

    world.begin_job()
    before = crash_points.set_hook(die)
    try:
        work()
    except Died:
        pass
    finally:
        crash_points.set_hook(before)
        world.script.dead = False
    return world.look()


def waited(world: World) -> list[str]:
    """All is copied, and grace is over."""
    fill(world)
    found = step(world, world.run_once)
    world.days_pass(1.5)
    return found


def copy_is_lost(world: World) -> list[str]:
    found = waited(world)
    world.remove("cold", "files/a.bin")
    return found + step(world, world.settle)


def copy_is_spoilt(world: World) -> list[str]:
    found = waited(world)
    world.rot("cold", "files/a.bin")
    return found + step(world, world.settle)


def source_is_new(world: World) -> list[str]:
    found = waited(world)
    write(world, "hot", "files/a.bin", version=1)
    return found + step(world, world.settle)


def map_parallel(world: World) -> list[str]:
    fill(world)
    return step(world, world.run_once)


def other_is_there(world: World) -> list[str]:
    """Somebody has written another object under the same name where the first one is to go."""
    fill(world)
    plan = world.plan()
    world.write("cold", "files/a.bin", b"another one of my own")
    return step(world, lambda: world.apply(plan))


def pinned_since(world: World) -> list[str]:
    found = waited(world)
    world.pin("checkpoints/run/step-20")
    return found + step(world, world.settle)


def pinned_meanwhile(world: World) -> list[str]:
    """Somebody pins it when pins were asked for already, and its copy is just being looked at."""
    found = waited(world)

    def pin(verb: str, key: str) -> None:
        if (verb, key) == ("head", "files/a.bin"):
            world.script.on_call = None
            world.pin("files/a.bin")

    world.script.on_call = pin
    return found + step(world, world.settle)


def dies_in_mid_drop(world: World) -> list[str]:
    return waited(world) + step(world, world.settle, "tier_drop.unmade")


def dies_in_mid_copy(world: World) -> list[str]:
    fill(world)
    return step(world, world.run_once, "tier_move.parts_copied")


def copy_is_flipped(world: World) -> list[str]:
    """A bit turns on the way to the archive."""
    fill(world)
    world.script.faults = [["copy_from", 1, "flip"]]
    found = step(world, world.run_once)
    world.days_pass(1.5)
    return found + step(world, world.settle)


# -- mutants -----------------------------------------------------------------------------------------------------------


@contextmanager
def target_not_checked() -> Iterator[None]:
    """What was verified once is there for ever."""
    with patch.object(MoveContext, "unconfirmed_move_reason", lambda self, row, there: ""):
        yield


@contextmanager
def source_not_checked() -> Iterator[None]:
    """What was to be dropped is dropped, whatever it is by now."""
    with patch.object(MoveContext, "change_reason", lambda self, tier, info, one: ""):
        yield


@contextmanager
def grace_forgotten() -> Iterator[None]:
    """A source goes as soon as there is a copy."""
    really = DeferredDeletions._due

    def due(self):
        really(self)
        return list(self._catalog.open_moves(self._file.home.url, "waiting", "dropping"))

    with patch.object(DeferredDeletions, "_due", due):
        yield


@contextmanager
def class_not_announced() -> Iterator[None]:
    """A class in which nothing can be read is a class like others."""
    with patch.object(executor, "ends_readability", lambda context, row: False):
        yield


@contextmanager
def target_overwritten() -> Iterator[None]:
    """Whatever lies where a copy goes is written over."""
    with patch.object(CopyMaker, "_is_there", lambda self, job, one, info: False):
        yield


@contextmanager
def pins_not_asked() -> Iterator[None]:
    """What was pinned since is dropped: neither the mover nor the plan that it makes anew asks."""
    with (
        patch.object(MoveContext, "pin_reasons", lambda self, rows, now_s: {}),
        patch.object(policy, "reject_protected", lambda view, wishes, refused: wishes),
    ):
        yield


@contextmanager
def pins_asked_too_early() -> Iterator[None]:
    """Who pins something while copies are looked at is not heard."""
    with patch.object(DeferredDeletions, "_heed_pins", lambda self, due: None):
        yield


@contextmanager
def dropped_in_any_order() -> Iterator[None]:
    """The object that makes a checkpoint whole goes last."""
    really = DeferredDeletions._drop

    def drop(self, due):
        return really(self, [turned(one) for one in due])

    def turned(one):
        return replace(one, row=replace(one.row, objects=one.row.objects[::-1]))

    with patch.object(DeferredDeletions, "_drop", drop):
        yield


@contextmanager
def copied_in_any_order() -> Iterator[None]:
    """The object that makes a checkpoint whole comes first."""
    really = CopyMaker.copy

    def copy(self, jobs):
        for job in jobs:
            job.row = replace(job.row, objects=job.row.objects[::-1])
        return really(self, jobs)

    with patch.object(CopyMaker, "copy", copy):
        yield


@contextmanager
def copies_not_verified() -> Iterator[None]:
    """What the server answers is believed, and what lies there is not looked at again."""
    with (
        patch("tiercache.tier.move.transfer._is_proven", lambda *anything: True),
        patch("tiercache.tier.move.transfer.Transfer.checksum_of", lambda self, name, info: 0),
        patch.object(MoveContext, "unconfirmed_reason", lambda self, *anything: ""),
    ):
        yield


@contextmanager
def copies_not_proven() -> Iterator[None]:
    """A file is what it was as long as it looks like that."""
    with patch("tiercache.tier.move.transfer.Transfer.needs_disk_check", lambda self, name: False):
        yield


@dataclass(frozen=True)
class Case:
    """A mutant, the trial that must notice it, and a word of what the oracle says."""

    mutant: Callable
    trial: Callable[[World], list[str]]
    says: str
    shape: str = "places"


CASES = (
    Case(target_not_checked, copy_is_lost, "lie nowhere any more"),
    Case(target_not_checked, copy_is_spoilt, "lie nowhere any more"),
    Case(source_not_checked, source_is_new, "lie nowhere any more"),
    Case(grace_forgotten, map_parallel, "grace is"),
    Case(class_not_announced, map_parallel, "became unreadable", "one_bucket"),
    Case(target_overwritten, other_is_there, "lie nowhere any more"),
    Case(pins_not_asked, pinned_since, "is pinned, and gone"),
    Case(pins_asked_too_early, pinned_meanwhile, "is pinned, and gone"),
    Case(dropped_in_any_order, dies_in_mid_drop, "looks complete and lacks"),
    Case(copied_in_any_order, dies_in_mid_copy, "looks complete and lacks"),
    Case(copies_not_verified, copy_is_flipped, "that nobody wrote"),
    Case(copies_not_proven, copy_is_spoilt, "lie nowhere any more", "local"),
)


def found(case: Case, root, *, broken: bool) -> str:
    root.mkdir()
    world = World(root, case.shape, jobs=1)
    with world.entered():
        if not broken:
            return "; ".join(case.trial(world))
        with case.mutant():
            return "; ".join(case.trial(world))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.mutant.__name__}-{case.trial.__name__}")
def test_a_mover_that_is_broken_is_found_out_and_one_that_is_whole_is_not(tmp_path, case):
    assert case.says in found(case, tmp_path / "broken", broken=True)
    assert found(case, tmp_path / "whole", broken=False) == ""
