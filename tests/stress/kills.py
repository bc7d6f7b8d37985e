"""SIGKILL in a child's work, counted only where it struck: at random instants, or in rounds at named points."""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import signal
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

from tests.support.forks import ChildEnd
from tests.support.kill_points import KillAt, points_in
from tests.support.warm_python import WITHOUT_THREADS, WarmPython

import tiercache
from tiercache.waiting import SYSTEM_CLOCK, wait_for

Place = TypeVar("Place")  # a job, and what else tells where a point can be struck

LONGEST_RUN_S = 60.0


class KillLoop:
    """A module that is run and killed again and again over the same folders.

    It writes lines to its progress file (its first argument): "begin" when its work begins and "end" when it
    is done. A kill counts only if it came between the two.
    """

    def __init__(
        self, python: WarmPython, module: str, progress: Path, arguments: list[str], *, work_s: float, seed: int
    ) -> None:
        self.random = random.Random(seed)
        self.n_struck = 0
        self._python = python
        self._command = ["-m", module, str(progress), *arguments]
        self._progress = progress
        self._work_s = work_s

    def lines(self) -> list[str]:
        """What the latest run wrote, without a torn last line."""
        text = self._progress.read_text() if self._progress.exists() else ""
        return text[: text.rfind("\n") + 1].splitlines()

    def kill_once(self) -> bool:
        """Run it and kill it somewhere in its work; whether the kill struck."""
        code, errors = self._run(self.random.uniform(0, self._work_s))
        assert code in (0, -signal.SIGKILL), errors
        struck = code == -signal.SIGKILL and "begin" in self.lines() and "end" not in self.lines()
        self.n_struck += struck
        return struck

    def finish(self) -> None:
        """Let it run to its end, with no help."""
        code, errors = self._run(None)
        assert code == 0, errors
        assert self.lines()[-1] == "end", errors

    def _run(self, killed_after_s: float | None) -> tuple[int | None, str]:
        """Run it, and kill it so many seconds after its first line; its exit code, and what it wrote as errors."""
        self._progress.unlink(missing_ok=True)
        with tempfile.TemporaryFile("w+") as errors:
            child = self._python.start(self._command, out=errors, errors=errors, is_strict=True)
            assert wait_for(lambda: self.lines() or child.poll() is not None, LONGEST_RUN_S), "the child never began"
            if killed_after_s is not None:
                SYSTEM_CLOCK.sleep(killed_after_s)
                child.kill()
            code = child.wait()
            errors.seek(0)
            return code, errors.read()

    def run(self, n_kills: int, check: Callable[[], None]) -> None:
        """Kill until n_kills have struck, checking after each; every now and then, and at last, let it finish."""
        n_tries = 0
        while self.n_struck < n_kills:
            n_tries += 1
            assert n_tries <= 4 * n_kills + 10, f"only {self.n_struck} of {n_tries} kills struck"
            self.kill_once()
            check()
            if self.random.random() < 0.2 or self.n_struck == n_kills:
                self.finish()
                check()


def points_where(belongs: Callable[[str], bool]) -> dict[str, str]:
    """The points of the source whose names belong, and where each stands."""
    return {name: at for name, at in points_in(Path(tiercache.__file__).parent).items() if belongs(name)}


@dataclass
class Report:
    """Counts of one run. struck: by point; missed: rounds whose job ended before it got to the point."""

    struck: Counter = field(default_factory=Counter)
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


class PointRounds(ABC, Generic[Place]):
    """Rounds of SIGKILL at named points. hits: what each job reaches, how often; now: what is done, for problems.

    most_hits: of one job that a strike waits for; tries: so many for each strike that is asked for, and so many more.
    """

    most_hits: ClassVar[int]
    tries: ClassVar[tuple[int, int]]

    def __init__(self, points: Mapping[str, str], seed: int, report: Report) -> None:
        self.points, self.report = points, report
        self.random = random.Random(seed)
        self.hits: dict[Place, Counter] = {}
        self.now = ""

    @abstractmethod
    def learn(self) -> None:
        """Let every job run once, to its end, and note in hits what it reaches: there it can be struck."""

    @abstractmethod
    def round(self, place: Place, at: KillAt) -> None:
        """Strike once, and look what it did."""

    def run(self, n_rounds: int) -> None:
        """Strike until n_rounds have struck, or something is wrong."""
        gc.freeze()  # a child's collector would copy every page of the parent's
        began_s = time.monotonic()
        self.learn()
        everywhere = set().union(*self.hits.values())
        self.report.never_reached = [f"{n} ({at})" for n, at in self.points.items() if n not in everywhere]
        each, more = self.tries
        n_tries = 0
        while self.report.n_struck < n_rounds and not self.report.problems:
            n_tries += 1
            chosen = self._choose()
            if chosen is None or n_tries > each * n_rounds + more:
                self.problem(f"{n_tries} tries struck {self.report.n_struck} times")
                break
            self.round(*chosen)
        self.report.seconds = time.monotonic() - began_s

    def _choose(self) -> tuple[Place, KillAt] | None:
        """The point that was struck least, in one of the jobs that reach it, at one of the times."""
        reachable = [point for point in self.points if any(point in hits for hits in self.hits.values())]
        if not reachable:
            return None
        point = min(reachable, key=lambda p: (self.report.struck[p], self.random.random()))
        place = self.random.choice([where for where, hits in self.hits.items() if point in hits])
        return place, KillAt(point, self.random.randint(1, min(self.hits[place][point], self.most_hits)))

    def took(self, ended: ChildEnd, who: str) -> bool:
        """Whether a child ended well; the problem is noted where it did not."""
        if ended.code:
            self.problem(f"{who} {'hung' if ended.hung else 'failed'}: {ended.error}")
        return not ended.code

    def problem(self, *texts: str) -> None:
        """Note what is wrong with what is done now."""
        self.report.problems += [f"{self.now}: {text}" for text in texts]


def rounds_asked() -> argparse.ArgumentParser:
    """What the commands of rounds have in common; begins anew where libraries would have started threads."""
    if any(os.environ.get(name) != value for name, value in WITHOUT_THREADS.items()):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **WITHOUT_THREADS})
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="points whose name holds this")
    return parser


def run_and_report(rounds: PointRounds, n_rounds: int) -> None:
    """Run them, print the report, and end with 1 where there are problems."""
    rounds.run(n_rounds)
    print(rounds.report.to_json())
    sys.exit(1 if rounds.report.problems else 0)
