"""SIGKILL at the points of tiers: `python -m tests.stress.tier_rounds FOLDER --rounds N --seed S`; prints JSON.

A warm parent without threads lays a world as it was before a job, and forks a child that does the job and dies at the
n-th time that it reaches one point. The oracle of tests/tier looks at the tiers as they lie, and after each of the runs
that come then, in processes of their own and with no help, days apart: in the end all is where the rules want it.
"""

import argparse
import gc
import json
import os
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.tier.jobs import JOBS, TierJob, heal
from tests.tier.world import SHAPES, World

import tiercache
from tiercache.testing.forks import Ended, run_forked
from tiercache.testing.kill_points import Strike, points_in, reached, strike

DEADLINE_S = 120.0
MOST_HITS = 6  # of one job that a strike waits for
HEALING_DAYS = (0.0, 1.5, 1.5)  # before each of the runs after a death


def points_of_tiers() -> dict[str, str]:
    """Every point of an area of tiers, and where it stands in the source."""
    points = points_in(Path(tiercache.__file__).parent)
    return {name: place for name, place in points.items() if name.startswith("tier_")}


@dataclass
class Report:
    """Counts of one run. struck: by point; missed: rounds whose job ended before it got to the point."""

    struck: Counter = field(default_factory=Counter)
    by_job: Counter = field(default_factory=Counter)
    missed: int = 0
    never_reached: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def n_struck(self) -> int:
        return sum(self.struck.values())

    def to_json(self) -> str:
        rounds_per_s = (self.n_struck + self.missed) / max(self.seconds, 1e-9)
        return json.dumps(vars(self) | {"n_struck": self.n_struck, "rounds_per_s": round(rounds_per_s, 1)})


class Scenes:
    """Worlds as they are before each job, kept beside the one that is worked in."""

    def __init__(self, root: Path) -> None:
        self.root, self.here = root, root / "world"

    def make(self, job: TierJob, shape: str) -> Ended:
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


class Rounds:
    """All rounds over one folder."""

    def __init__(self, root: Path, seed: int, only: str = "", shapes: tuple[str, ...] = SHAPES) -> None:
        self.shapes = shapes
        self.scenes = Scenes(root)
        self.random = random.Random(seed)
        self.points = {name: place for name, place in points_of_tiers().items() if only in name}
        self.report = Report()
        self.hits: dict[tuple[str, str], Counter] = {}
        self.now = ""

    def run(self, n_rounds: int) -> Report:
        """Strike until n_rounds have struck, or something is wrong."""
        gc.freeze()  # a child's collector would copy every page of the parent's
        began_s = time.monotonic()
        self.learn()
        n_tries = 0
        while self.report.n_struck < n_rounds and not self.report.problems:
            n_tries += 1
            chosen = self.choose()
            if chosen is None or n_tries > 4 * n_rounds + 50:
                self.problem(f"{n_tries} tries struck {self.report.n_struck} times")
                break
            self.round(*chosen)
        self.report.seconds = time.monotonic() - began_s
        return self.report

    def learn(self) -> None:
        """Let every job run once, to its end: what it reaches is where it can be struck."""
        for job in JOBS.values():
            for shape in sorted({*job.shapes} & {*self.shapes}):
                self.now = f"{job.name} ({shape}), not struck"
                if not self.took(self.scenes.make(job, shape), "making it ready"):
                    continue
                world = self.scenes.lay(job, shape)
                with world.entered():
                    world.begin_job()
                    hits, ended = reached(self.work(job, world), deadline_s=DEADLINE_S)
                    self.hits[job.name, shape] = Counter(hits)
                    self.took(ended, "it")
                    self.report.problems += [f"{self.now}: {problem}" for problem in world.look()]
        everywhere = set().union(*self.hits.values())
        self.report.never_reached = [f"{n} ({at})" for n, at in self.points.items() if n not in everywhere]

    def choose(self) -> tuple[TierJob, str, Strike] | None:
        """The point that was struck least, in one of the jobs that reach it, at one of the times."""
        reachable = [point for point in self.points if any(point in hits for hits in self.hits.values())]
        if not reachable:
            return None
        point = min(reachable, key=lambda p: (self.report.struck[p], self.random.random()))
        name, shape = self.random.choice([where for where, hits in self.hits.items() if point in hits])
        nth = self.random.randint(1, min(self.hits[name, shape][point], MOST_HITS))
        return JOBS[name], shape, Strike(point, nth)

    def round(self, job: TierJob, shape: str, at: Strike) -> None:
        """Strike once, and look what it did."""
        self.now = f"{job.name} ({shape}) struck at {at.point} ({self.points[at.point]}), time {at.nth}"
        world = self.scenes.lay(job, shape)
        with world.entered():
            world.begin_job()
            struck = strike(self.work(job, world), at, deadline_s=DEADLINE_S)
            if struck.hit:
                self.report.struck[at.point] += 1
                self.report.by_job[f"{job.name} ({shape})"] += 1
            else:
                self.report.missed += 1
                self.took(struck.ended, "it")
            self.report.problems += [f"{self.now}: as it lies: {problem}" for problem in world.look()]
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
            self.report.problems += [f"{self.now}: after run {number}: {problem}" for problem in found]

    def took(self, ended: Ended, who: str) -> bool:
        """Whether a child ended well; the problem is noted where it did not."""
        if ended.code:
            self.problem(f"{who} {'hung' if ended.hung else 'failed'}: {ended.error}")
        return not ended.code

    def problem(self, text: str) -> None:
        self.report.problems.append(f"{self.now}: {text}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="points whose name holds this")
    parser.add_argument("--shapes", nargs="*", default=SHAPES, choices=SHAPES, help="worlds, see tests/tier/world.py")
    asked = parser.parse_args()
    report = Rounds(asked.folder, asked.seed, asked.only, tuple(asked.shapes)).run(asked.rounds)
    print(report.to_json())
    sys.exit(1 if report.problems else 0)


if __name__ == "__main__":
    main()
