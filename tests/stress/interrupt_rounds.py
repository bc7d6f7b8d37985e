"""Ctrl-C between any two lines of ours: `python -m tests.stress.interrupt_rounds FOLDER --rounds N --seed S`.

A warm parent forks a child for each round, which is interrupted at a line of the package that its main thread comes
to (tests.support.interrupts): each line the first time that it is come to, and the last, in an order that the
seed gives. Prints JSON.
"""

import gc
import json
import random
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tests.stress.errno_rounds import wait_shortly
from tests.stress.interrupt_lives import (
    N_PACKED,
    CachedLife,
    CacheLife,
    Life,
    LoopLife,
    PackLife,
    VerbLife,
    write_cached,
    write_set,
)
from tests.stress.kills import rounds_asked
from tests.stress.life import CHAPTERS
from tests.support.interrupts import DROPPED, SWALLOWED

MOST_PROBLEMS = 20
CACHE = ["--cache", "{root}/cache", "--cache-size", "50MB"]


def lives_in(root: Path) -> list[Life]:
    """All that can be interrupted, each in a folder of its own."""
    made: list[Life] = []

    def room() -> Path:
        return root / str(len(made))

    made += (LoopLife(root / f"loop-{s}-{c}", by_state=s, cached=c) for s in (False, True) for c in (False, True))
    for chapter in CHAPTERS:
        made.append(CacheLife(room(), chapter))
    for mode, n_before in (("create", 0), ("append", N_PACKED)):
        made.append(PackLife(room(), mode, n_before))
    made.append(CachedLife(room(), ["warm", "{root}/out", *CACHE], write_set))
    made.append(CachedLife(room(), ["evict", "--all", "--yes", *CACHE], write_cached))
    made.append(CachedLife(room(), ["warm", "{root}/out", "--pin", *CACHE], write_cached))
    return made


@dataclass
class Report:
    """Counts of one run. struck: by life; swallowed: by line, what Python drops; n_lines: that there are, by life."""

    struck: Counter = field(default_factory=Counter)
    swallowed: Counter = field(default_factory=Counter)
    n_lines: dict[str, int] = field(default_factory=dict)
    missed: int = 0
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def to_json(self) -> str:
        return json.dumps(vars(self) | {"n_struck": self.struck.total()})


def run(lives: Iterable[Life], n_rounds: int, seed: int) -> Report:
    """Interrupt until n_rounds have struck, or every line of every life was."""
    report, began_s, positions = Report(), time.monotonic(), []
    gc.freeze()
    for life in lives:
        lines = life.learn()
        report.n_lines[life.name] = len(lines.times)
        if lines.ended.code:
            report.problems.append(f"{life.name}, not interrupted: {lines.ended.error}")
        positions += [(life, nth) for nth in lines.positions()]
    random.Random(seed).shuffle(positions)
    for life, nth in positions:
        if report.struck.total() >= n_rounds or len(report.problems) > MOST_PROBLEMS:
            break
        done = life.interrupt(nth)
        if not done.where:
            report.missed += 1
            continue
        report.struck[life.name] += 1
        report.swallowed[done.where] += done.outcome in (SWALLOWED, DROPPED) and not isinstance(life, VerbLife)
        report.problems += [f"{life.name}, before {done.where} (line {nth}): {problem}" for problem in life.look(done)]
    report.swallowed = +report.swallowed
    report.seconds = time.monotonic() - began_s
    return report


def main() -> None:
    warnings.simplefilter("ignore", RuntimeWarning)
    wait_shortly()
    asked = rounds_asked().parse_args()
    lives = [life for life in lives_in(asked.folder) if asked.only in life.name]
    report = run(lives, asked.rounds, asked.seed)
    print(report.to_json())
    sys.exit(1 if report.problems else 0)


if __name__ == "__main__":
    main()
