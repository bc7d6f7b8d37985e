"""Disturbed runs of the mover: lost or corrupt copies, pins and writes during a run, a process that dies."""

from collections.abc import Callable

import pytest
from tests.tier.bucket import Died
from tests.tier.jobs import INTERRUPTED, fill, interrupted, new_source, unwanted_copy, write
from tests.tier.world import World, content

from tiercache import crash_points

# Each disturbance yields what the oracle finds, step by step.


def step(world: World, work: Callable[[], object], dies_at: str = "") -> list[str]:
    """Return what the oracle finds after some work, during which the process may die at a crash point."""

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
    """Copy everything, and let the grace period pass."""
    fill(world)
    found = step(world, world.run_once)
    world.days_pass(1.5)
    return found


def copy_is_lost(world: World) -> list[str]:
    found = waited(world)
    world.remove("cold", "files/a.bin")
    return found + step(world, world.run_due_deletions)


def copy_is_spoilt(world: World) -> list[str]:
    found = waited(world)
    world.rot("cold", "files/a.bin")
    return found + step(world, world.run_due_deletions)


def source_is_new(world: World) -> list[str]:
    found = waited(world)
    write(world, "hot", "files/a.bin", version=1)
    return found + step(world, world.run_due_deletions)


def undisturbed(world: World) -> list[str]:
    fill(world)
    return step(world, world.run_once)


def other_is_there(world: World) -> list[str]:
    """Another object has the key at the destination."""
    fill(world)
    plan = world.plan()
    world.write("cold", "files/a.bin", b"another one of my own")
    return step(world, lambda: world.apply(plan))


def pinned_since(world: World) -> list[str]:
    found = waited(world)
    world.pin("checkpoints/run/step-20")
    return found + step(world, world.run_due_deletions)


def pinned_meanwhile(world: World) -> list[str]:
    """A pin is added after the first check of pins, while the copy is checked."""
    found = waited(world)

    def pin(verb: str, key: str) -> None:
        if (verb, key) == ("head", "files/a.bin"):
            world.script.on_call = None
            world.pin("files/a.bin")

    world.script.on_call = pin
    return found + step(world, world.run_due_deletions)


def replaced_meanwhile(place: str) -> Callable[[World], list[str]]:
    """Somebody writes an object anew in a place while its source is deleted: too late for any check of the mover.

    Only what he writes into the place that keeps the object must stay.
    """

    def disturb(world: World) -> list[str]:
        found, key = waited(world), "checkpoints/run/step-20/__1_0.distcp"
        new = content(key, 1, 700)

        def write_anew(verb: str, called_key: str) -> None:
            if (verb, called_key) == ("delete", key):
                world.script.on_call = None
                found.extend(world.look())
                world.write(place, key, new)

        def note_batch(name: str) -> None:
            if name in ("tier_drop.decided", "tier_drop.reclassed"):
                found.extend(world.look())
                world.oracle.decides(is_decided=name == "tier_drop.decided")

        world.script.on_call = write_anew
        world.begin_job()
        before = crash_points.set_hook(note_batch)
        try:
            world.run_due_deletions()
        finally:
            crash_points.set_hook(before)
        assert world.script.on_call is None
        assert key not in world.picture()["hot"]
        assert (world.picture()["home"][key].data == new) == (place == "home")
        return found + world.look() + step(world, world.run_once)

    disturb.__name__ = f"replaced_meanwhile_in_{place}"
    return disturb


def dies_in_mid_drop(world: World) -> list[str]:
    return waited(world) + step(world, world.run_due_deletions, "tier_drop.unmade")


def dies_in_mid_copy(world: World) -> list[str]:
    fill(world)
    return step(world, world.run_once, "tier_move.parts_copied")


def next_run(prepare: Callable[[World], None]) -> Callable[[World], list[str]]:
    """The next run after an interrupted copy leaves no part of it, and the runs after it do what the rules want."""

    def disturb(world: World) -> list[str]:
        prepare(world)
        found = step(world, world.run_once) + world.oracle.at_rest(world.picture())
        world.days_pass(1.5)
        # The parts beside a source that was written again are a conflict, which nothing touches.
        is_conflict = prepare is new_source
        found += step(world, world.run_once) + world.oracle.at_rest(world.picture())
        picture = world.picture()
        places = [name for name in picture if {*INTERRUPTED} & picture[name].keys()]
        assert places == (["hot", "home"] if is_conflict else ["home"])
        return found

    disturb.__name__ = f"next_run_after_{prepare.__name__}"
    return disturb


def copy_is_flipped(world: World) -> list[str]:
    """A bit flips on the way to the archive."""
    fill(world)
    world.script.faults = [["copy_from", 1, "flip"]]
    found = step(world, world.run_once)
    world.days_pass(1.5)
    return found + step(world, world.run_due_deletions)


CASES = (
    (copy_is_lost, "places"),
    (copy_is_spoilt, "places"),
    (copy_is_spoilt, "local"),
    (source_is_new, "places"),
    (undisturbed, "one_bucket"),
    (other_is_there, "places"),
    (pinned_since, "places"),
    (pinned_meanwhile, "places"),
    (replaced_meanwhile("home"), "places"),
    (replaced_meanwhile("hot"), "places"),
    (dies_in_mid_drop, "places"),
    (dies_in_mid_copy, "places"),
    (next_run(interrupted), "places"),
    (next_run(interrupted), "local"),
    (next_run(unwanted_copy), "places"),
    (next_run(unwanted_copy), "local"),
    (next_run(new_source), "places"),
    (next_run(new_source), "local"),
    (copy_is_flipped, "places"),
)


@pytest.mark.parametrize(("disturb", "shape"), CASES, ids=[f"{case.__name__}-{shape}" for case, shape in CASES])
def test_no_disturbance_of_a_run_loses_a_last_copy_or_shows_wrong_bytes(tmp_path, disturb, shape):
    world = World(tmp_path, shape, jobs=1)
    with world.entered():
        assert disturb(world) == []
