"""Rounds of SIGKILL at named points: `python -m tests.stress.kill_rounds FOLDER --rounds N --seed S`; prints JSON.

A warm parent without threads forks a child that does one of JOBS and dies at the n-th time that it reaches one point.
Then the folder is looked at as it lies, opened with no help by another child that reads everything again, closed, and
looked at again. In some rounds a witness has the cache open all the while.
"""

import os
import random
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tests.stress import kills
from tests.stress.inspection import DEADLINE_S, Inspection
from tests.stress.jobs import JOBS, Job, read_doubting
from tests.stress.kills import PointRounds, points_where, rounds_asked, run_and_report
from tests.stress.scene import SIZES, Model, Scene
from tests.support.forks import ChildEnd, ForkedChild
from tests.support.kill_points import KillAt, count_points, kill_at

EVERY_WITNESS = 4
# These delete what the witness has open.
WITHOUT_WITNESS = ("new_folder", "lost_catalog")


def points_here() -> dict[str, str]:
    """Every point of the source and where it stands, but those of tiers and checkpoints, which other tests strike."""
    return points_where(lambda name: not name.startswith(("tier_", "checkpoint_", "dcp.", "retention.", "packing.")))


@dataclass
class Report(kills.Report):
    """witnessed: rounds in which another had the cache open."""

    witnessed: int = 0


class Rounds(PointRounds[str]):
    """All rounds over one folder; a place is a job."""

    most_hits = 5
    # Where locks lie one try in 3.4 strikes: a job often finds done what the strike waits for.
    tries = (10, 100)
    report: Report

    def __init__(self, root: Path, seed: int, only: str = "") -> None:
        super().__init__({n: place for n, place in points_here().items() if only in n}, seed, Report())
        self.scene = Scene(root)
        self.model = Model({self.scene.names[key]: self.scene.data[key] for key in SIZES})
        self.inspection = Inspection(self.scene, self.model, seed)

    def learn(self) -> None:
        for name in JOBS:
            self.inspection.plant()
            self.now = f"job {name}, not struck"
            work = self.work_of(name)
            hits, ended = count_points(work, deadline_s=DEADLINE_S)
            self.hits[name] = Counter(hits)
            self.take_in(ended, "it")
            self.problem(*self.inspection.problems())

    def round(self, place: str, at: KillAt) -> None:
        self.inspection.plant()
        self.now = f"job {place} struck at {at.point} ({self.points[at.point]}), time {at.nth}"
        is_watched = self.report.n_struck % EVERY_WITNESS == 0 and place not in WITHOUT_WITNESS
        witness = Witness(self.scene) if is_watched else None
        struck = kill_at(self.work_of(place), at, deadline_s=DEADLINE_S)
        if struck.hit:
            self.model.take_in(struck.lines)
            self.report.struck[at.point] += 1
        else:
            self.report.missed += 1
            self.take_in(struck.ended, "it")
        if witness is not None:
            self.report.witnessed += 1
            self.take_in(witness.go_on(), "who had the cache open")
        self.problem(*self.inspection.problems())

    def work_of(self, job: str):
        seed = self.random.random()
        return lambda tell: JOBS[job](Job(self.scene, tell, random.Random(seed)))

    def take_in(self, ended: ChildEnd, who: str) -> None:
        if not ended.hung:  # what it told stands between the lines of its traceback
            self.model.take_in(ended.lines)
        self.took(ended, who)


class Witness:
    """A child that has the cache open before the strike, and uses it after."""

    def __init__(self, scene: Scene) -> None:
        go_r, self._go_w = os.pipe()
        ready_r, ready_w = os.pipe()

        def work(tell) -> None:
            os.close(self._go_w)
            os.close(ready_r)
            warnings.simplefilter("ignore", RuntimeWarning)
            with scene.cache() as cache:
                store = cache.store(scene.source)
                scene.read(store, "c")
                os.close(ready_w)
                os.read(go_r, 1)
                tell("dropping")  # the other may have opened it with less
                for key in SIZES:
                    read_doubting(scene, store, key)

        self._child = ForkedChild(work)
        os.close(ready_w)
        os.close(go_r)
        os.read(ready_r, 1)  # b"": it has closed its end, or died
        os.close(ready_r)

    def go_on(self) -> ChildEnd:
        """Let it use the cache; how it ended."""
        os.close(self._go_w)
        return self._child.wait(DEADLINE_S)


def main() -> None:
    parser = rounds_asked()
    asked = parser.parse_args()
    run_and_report(Rounds(asked.folder, asked.seed, asked.only), asked.rounds)


if __name__ == "__main__":
    main()
