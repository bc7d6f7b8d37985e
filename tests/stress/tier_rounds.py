"""SIGKILL at the points of tiers: `python -m tests.stress.tier_rounds FOLDER --rounds N --seed S`; prints JSON.

A warm parent without threads lays a world as it was before a job, and forks a child that does the job and dies at the
n-th time that it reaches one point. The oracle looks at the tiers as they lie, and after each of the runs
that come then, in processes of their own and with no help, days apart: in the end all is where the rules want it.
"""

import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.stress import kills
from tests.stress.kills import PointRounds, points_where, rounds_asked, run_and_report
from tests.support.forks import ChildEnd, run_forked
from tests.support.kill_points import KillAt, count_points, kill_at
from tests.support.tier_jobs import JOBS, TierJob, heal
from tests.support.tier_world import SHAPES, World

DEADLINE_S = 120.0
HEALING_DAYS = (0.0, 1.5, 1.5)  # before each of the runs after a death


def points_of_tiers() -> dict[str, str]:
    """Every point of an area of tiers, and where it stands in the source."""
    return points_where(lambda name: name.startswith("tier_"))


@dataclass
class Report(kills.Report):
    """by_job: strikes by job and world."""

    by_job: Counter = field(default_factory=Counter)


class Scenes:
    """Worlds as they are before each job, kept beside the one that is worked in."""

    def __init__(self, root: Path) -> None:
        self.root, self.here = root, root / "world"

    def make(self, job: TierJob, shape: str) -> ChildEnd:
        """Let a child make it ready; what it knows is written beside it."""
        shutil.rmtree(self.here, ignore_errors=True)
        self.here.mkdir(parents=True)

        def ready(tell) -> None:
            world = World(self.here, shape)
            with world.entered():
                job.prepare(world)
                problems = world.look()
                assert problems == [], problems
                world.save()

        ended = run_forked(ready, deadline_s=DEADLINE_S)
        if not ended.code:
            shutil.rmtree(self._kept(job, shape), ignore_errors=True)
            shutil.copytree(self.here, self._kept(job, shape), copy_function=_link_or_copy)
        return ended

    def lay(self, job: TierJob, shape: str) -> World:
        """The world as it was."""
        shutil.rmtree(self.here, ignore_errors=True)
        shutil.copytree(self._kept(job, shape), self.here, copy_function=_link_or_copy)
        return World.load(self.here, shape)

    def _kept(self, job: TierJob, shape: str) -> Path:
        return self.root / "kept" / f"{job.name}-{shape}"


def _link_or_copy(src: str, dst: str) -> None:
    """Objects are never changed in place, and are known by inode and date; books are."""
    (shutil.copy2 if "/state/" in src or src.endswith(".lock") else os.link)(src, dst)


class Rounds(PointRounds[tuple[str, str]]):
    """All rounds over one folder; a place is a job and the shape of its world."""

    most_hits = 6
    tries = (4, 50)
    report: Report

    def __init__(self, root: Path, seed: int, only: str = "", shapes: tuple[str, ...] = SHAPES) -> None:
        points = {name: place for name, place in points_of_tiers().items() if only in name}
        super().__init__(points, seed, Report())
        self.shapes = shapes
        self.scenes = Scenes(root)

    def learn(self) -> None:
        for job in JOBS.values():
            for shape in sorted({*job.shapes} & {*self.shapes}):
                self.now = f"{job.name} ({shape}), not struck"
                if not self.took(self.scenes.make(job, shape), "making it ready"):
                    continue
                world = self.scenes.lay(job, shape)
                with world.entered():
                    world.begin_job()
                    hits, ended = count_points(self.work(job, world), deadline_s=DEADLINE_S)
                    self.hits[job.name, shape] = Counter(hits)
                    self.took(ended, "it")
                    self.problem(*world.look())

    def round(self, place: tuple[str, str], at: KillAt) -> None:
        job, shape = JOBS[place[0]], place[1]
        self.now = f"{job.name} ({shape}) struck at {at.point} ({self.points[at.point]}), time {at.nth}"
        world = self.scenes.lay(job, shape)
        with world.entered():
            world.begin_job()
            struck = kill_at(self.work(job, world), at, deadline_s=DEADLINE_S)
            if struck.hit:
                self.report.struck[at.point] += 1
                self.report.by_job[f"{job.name} ({shape})"] += 1
            else:
                self.report.missed += 1
                self.took(struck.ended, "it")
            self.problem(*(f"as it lies: {problem}" for problem in world.look()))
            self.heal(world)

    def work(self, job: TierJob, world: World) -> Callable:
        return lambda tell: job.work(world)

    def heal(self, world: World) -> None:
        """Runs that come later, days apart; they need no hand."""
        for number, days in enumerate(HEALING_DAYS, start=1):
            world.days_pass(days)
            is_last = number == len(HEALING_DAYS)
            if not self.took(run_forked(lambda tell, last=is_last: heal(world, last), deadline_s=DEADLINE_S), "a run"):
                return
            found = world.look() + (world.oracle.at_rest(world.picture()) if is_last else [])
            self.problem(*(f"after run {number}: {problem}" for problem in found))


def main() -> None:
    parser = rounds_asked()
    parser.add_argument(
        "--shapes", nargs="*", default=SHAPES, choices=SHAPES, help="worlds, see tests/support/tier_world.py"
    )
    asked = parser.parse_args()
    run_and_report(Rounds(asked.folder, asked.seed, asked.only, tuple(asked.shapes)), asked.rounds)


if __name__ == "__main__":
    main()
