"""Rounds of SIGKILL at named points: `python -m tests.stress.kill_rounds FOLDER --rounds N --seed S`; prints JSON.

A warm parent without threads forks a child that does one of JOBS and dies at the n-th time that it reaches one point.
Then the folder is looked at as it lies, opened with no help by another child that reads everything again, closed, and
looked at again. In some rounds a witness has the cache open all the while.
"""

import argparse
import fcntl
import gc
import json
import os
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.stress.inspection import DEADLINE_S, Inspection
from tests.stress.jobs import JOBS, Job
from tests.stress.scene import SIZES, Model, Scene

import tiercache
from tiercache.testing.forks import Ended, ForkedChild
from tiercache.testing.kill_points import Strike, points_in, reached, strike

MOST_HITS = 5  # of one job that a strike waits for
EVERY_WITNESS = 4
# These delete what the witness has open.
WITHOUT_WITNESS = ("new_folder", "lost_catalog")


def points_here() -> dict[str, str]:
    """Every point of the source and where it stands, but those of tiers, which tests/stress/tier_rounds.py strikes."""
    points = points_in(Path(tiercache.__file__).parent)
    return {name: place for name, place in points.items() if not name.startswith("tier_")}


@dataclass
class Report:
    """Counts of one run. struck: by point; missed: rounds whose job ended before it got to the point."""

    struck: Counter = field(default_factory=Counter)
    missed: int = 0
    witnessed: int = 0
    never_reached: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def n_struck(self) -> int:
        return sum(self.struck.values())

    def to_json(self) -> str:
        rounds_per_s = (self.n_struck + self.missed) / max(self.seconds, 1e-9)
        return json.dumps(vars(self) | {"n_struck": self.n_struck, "rounds_per_s": round(rounds_per_s, 1)})


class Rounds:
    """All rounds over one folder."""

    def __init__(self, root: Path, seed: int, only: str = "") -> None:
        self.scene = Scene(root)
        self.random = random.Random(seed)
        self.points = {n: place for n, place in points_here().items() if only in n}
        self.report = Report()
        self.model = Model({self.scene.names[key]: self.scene.data[key] for key in SIZES})
        self.inspection = Inspection(self.scene, self.model, seed)
        self.hits: dict[str, Counter] = {}
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
            # Where locks lie one try in 3.4 strikes: a job often finds done what the strike waits for.
            if chosen is None or n_tries > 10 * n_rounds + 100:
                self.problem(f"{n_tries} tries struck {self.report.n_struck} times")
                break
            self.round(*chosen)
        self.report.seconds = time.monotonic() - began_s
        return self.report

    def learn(self) -> None:
        """Let every job run once, to its end: what it reaches is where it can be struck."""
        for name in JOBS:
            self.inspection.plant()
            self.now = f"job {name}, not struck"
            work = self.work_of(name)
            hits, ended = reached(work, deadline_s=DEADLINE_S)
            self.hits[name] = Counter(hits)
            self.take_in(ended, "it")
            self.report.problems += [f"{self.now}: {problem}" for problem in self.inspection.problems()]
        everywhere = set().union(*self.hits.values())
        self.report.never_reached = [f"{n} ({at})" for n, at in self.points.items() if n not in everywhere]

    def choose(self) -> tuple[str, Strike] | None:
        """The point that was struck least, in one of the jobs that reach it, at one of the times."""
        reachable = [point for point in self.points if any(point in hits for hits in self.hits.values())]
        if not reachable:
            return None
        point = min(reachable, key=lambda p: (self.report.struck[p], self.random.random()))
        job = self.random.choice([name for name, hits in self.hits.items() if point in hits])
        return job, Strike(point, self.random.randint(1, min(self.hits[job][point], MOST_HITS)))

    def round(self, job: str, at: Strike) -> None:
        """Strike once, and look what it did."""
        self.inspection.plant()
        self.now = f"job {job} struck at {at.point} ({self.points[at.point]}), time {at.nth}"
        is_watched = self.report.n_struck % EVERY_WITNESS == 0 and job not in WITHOUT_WITNESS
        witness = Witness(self.scene) if is_watched else None
        struck = strike(self.work_of(job), at, deadline_s=DEADLINE_S)
        if struck.hit:
            self.model.take_in(struck.lines)
            self.report.struck[at.point] += 1
        else:
            self.report.missed += 1
            self.take_in(struck.ended, "it")
        if witness is not None:
            self.report.witnessed += 1
            self.take_in(witness.go_on(), "who had the cache open")
        self.report.problems += [f"{self.now}: {problem}" for problem in self.inspection.problems()]

    def work_of(self, job: str):
        seed = self.random.random()
        return lambda tell: JOBS[job](Job(self.scene, tell, random.Random(seed)))

    def take_in(self, ended: Ended, who: str) -> None:
        if not ended.hung:  # what it told stands between the lines of its traceback
            self.model.take_in(ended.lines)
        if ended.code:
            self.problem(f"{who} {'hung' if ended.hung else 'failed'}: {ended.error}")

    def problem(self, text: str) -> None:
        self.report.problems.append(f"{self.now}: {text}")


class Witness:
    """A child that has the cache open before the strike, and uses it after."""

    def __init__(self, scene: Scene) -> None:
        go_r, self._go_w = os.pipe()
        ready_r, ready_w = os.pipe()

        def work(tell) -> None:
            os.close(self._go_w)
            os.close(ready_r)
            job = Job(scene, tell, random.Random(0))
            with scene.cache() as cache:
                store = cache.store(scene.source)
                scene.read(store, "c")
                os.close(ready_w)
                os.read(go_r, 1)
                tell("dropping")  # the other may have opened it with less
                for key in SIZES:
                    job.read_doubting(store, key)

        self._child = ForkedChild(work)
        os.close(ready_w)
        os.close(go_r)
        os.read(ready_r, 1)  # b"": it has closed its end, or died
        os.close(ready_r)

    def go_on(self) -> Ended:
        """Let it use the cache; how it ended."""
        os.close(self._go_w)
        return self._child.wait(DEADLINE_S)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="points whose name holds this")
    parser.add_argument(
        "--locks", choices=["hold", "lie"], default="hold", help="lie: flock does nothing and says it did"
    )
    asked = parser.parse_args()
    if asked.locks == "lie":
        fcntl.flock = lambda fd, operation: None
    report = Rounds(asked.folder, asked.seed, asked.only).run(asked.rounds)
    print(report.to_json())
    sys.exit(1 if report.problems else 0)


if __name__ == "__main__":
    main()
