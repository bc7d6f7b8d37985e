"""Jobs of the kill tests: what a process does to tiers before it dies, and what later processes do."""

from collections.abc import Callable
from dataclasses import dataclass

from tests.support.disk_bucket import Died
from tests.support.tier_world import SHAPES, World, content

from tiercache import crash_points
from tiercache.errors import ArchivedShards
from tiercache.tier.plans import read_plan, write_plan

SIZES = (20_000, 700, 300)  # of the parts of a checkpoint, the last of which makes it whole


@dataclass(frozen=True)
class TierJob:
    """A job. prepare: Sets up the world, undisturbed. work: The work during which the process is killed."""

    name: str
    prepare: Callable[[World], object]
    work: Callable[[World], object]
    shapes: tuple[str, ...] = SHAPES


UNWANTED = "checkpoints/solo/step-10.pt"
INTERRUPTED = tuple(f"checkpoints/run/step-20/{part}" for part in ("__0_0.distcp", "__1_0.distcp", ".metadata"))


def write(world: World, place: str, name: str, version: int = 0) -> None:
    """Write a group."""
    for key, n_bytes in zip(world.oracle.groups[name].keys, SIZES, strict=False):
        world.write(place, key, content(key, version, n_bytes))


def fill(world: World, step: int = 0) -> None:
    """Write checkpoints of two runs into hot, some of them also into home, and files; all of it three days old."""
    for step in (10, 20, 30):
        write(world, "hot", f"checkpoints/run/step-{step}")
        write(world, "hot" if step > 10 else "home", f"checkpoints/solo/step-{step}.pt")
    write(world, "home", "checkpoints/run/step-10")
    write(world, "hot", "files/a.bin")
    write(world, "home", "files/b.bin")
    write(world, "hot", "scratch/x")
    write(world, "home", "scratch/x")
    world.days_pass(3)


def planned(world: World) -> None:
    """A plan in a file, not applied yet."""
    fill(world)
    write_plan(world.plan(), world.root / "plan.jsonl")


def apply(world: World) -> None:
    world.apply(read_plan(world.root / "plan.jsonl"))


def once(world: World) -> None:
    world.begin_job()
    world.run_once()
    assert world.look() == []


def waiting(world: World) -> None:
    """All was copied, and grace is over."""
    fill(world)
    once(world)
    world.days_pass(1.5)


def old(world: World) -> None:
    """What may be deleted by now lies in the last tier."""
    waiting(world)
    once(world)
    write(world, "hot", "checkpoints/run/step-100")
    write(world, "hot", "checkpoints/solo/step-100.pt")
    world.days_pass(40)


def changed(world: World) -> None:
    """Grace is over, and the world is another by now."""
    waiting(world)
    write(world, "hot", "files/a.bin", version=1)
    world.pin("checkpoints/run/step-10")


def archived(world: World) -> None:
    waiting(world)
    once(world)


def read(world: World) -> None:
    """As a training does, from wherever the shards lie."""
    try:
        wrong = world.read_data_set()
    except ArchivedShards:
        return
    assert wrong == "", wrong


def recall(world: World) -> None:
    """Bring two groups back to hot, as `tiercache tier get` does; from then on, a hold keeps them there."""
    names = ["checkpoints/run/step-10", "files/b.bin"]
    world.oracle.pins(key for name in names for key in world.oracle.groups[name].keys)
    world.recall(names)


def unwanted(world: World) -> None:
    """As archived(), with a checkpoint that somebody is going to remove."""
    archived(world)
    world.oracle.removed_by_hand.add(UNWANTED)


def remove(world: World) -> None:
    world.remove_checkpoints([UNWANTED])


def interrupted(world: World) -> None:
    """A run has died when a checkpoint lay in parts in the tier that it is copied to."""
    fill(world)

    def die(name: str) -> None:
        there = world.picture()["home"].keys()
        if world.script.dead or (name == "tier_move.parts_copied" and {*INTERRUPTED[:-1]} <= there):
            world.script.dead = True
            raise Died

    before = crash_points.set_hook(die)
    try:
        once(world)
    except Died:
        pass
    finally:
        crash_points.set_hook(before)
        world.script.dead = False
    assert world.look() == []
    assert INTERRUPTED[-1] not in world.picture()["home"]


def unwanted_copy(world: World) -> None:
    """As interrupted(), and the rules are others by now."""
    interrupted(world)
    world.pin("files/b.bin")


def new_source(world: World) -> None:
    """As interrupted(), and the checkpoint was written again."""
    interrupted(world)
    write(world, "hot", "checkpoints/run/step-20", version=1)


def heal(world: World, is_last: bool) -> None:
    """What the next run does, with no help; the last one leaves nothing open."""
    read(world)
    world.run_once()
    read(world)
    if is_last:
        left = world.open_moves()
        assert left == [], f"moves are not over: {left}"


JOBS = {
    job.name: job
    for job in (
        TierJob("apply", planned, apply),
        TierJob("first_run", fill, World.run_once),
        TierJob("settle", waiting, World.run_due_deletions),
        TierJob("second_run", waiting, World.run_once),
        TierJob("delete", old, World.run_once),
        TierJob("changed", changed, World.run_once),
        TierJob("recall", archived, recall),
        TierJob("remove", unwanted, remove),
        TierJob("finish", interrupted, World.run_once),
        TierJob("withdraw", unwanted_copy, World.run_once),
        TierJob("withdraw_older", new_source, World.run_once),
        TierJob("read", archived, read, ("warm", "local")),
    )
}
