"""Every system call fails once: `python -m tests.stress.errno_rounds FOLDER`, started with the shim of testing/errnos.

A warm parent forks a child for each position; the child lives a cache's whole life in a new folder, in which one call
of one kind fails, or all from there on. Prints JSON.
"""

import argparse
import gc
import itertools
import json
import shutil
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.stress.inspection import DEADLINE_S, Inspection
from tests.stress.life import life
from tests.stress.scene import Model, Scene

from tiercache.cache import evictor, publisher
from tiercache.catalog import database
from tiercache.testing.errnos import FOR_EVER, KINDS, Failed, Position, counted, failing


@dataclass
class Report:
    """Counts of one run. calls: what one life makes of each kind; struck: positions that failed, by kind and error."""

    calls: dict[str, int] = field(default_factory=dict)
    struck: Counter = field(default_factory=Counter)
    not_reached: int = 0
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def to_json(self) -> str:
        return json.dumps(vars(self) | {"n_struck": sum(self.struck.values())})


class Rounds:
    """One life for each position. Problems are collected, not more than a few of them."""

    MOST_PROBLEMS = 20

    def __init__(self, root: Path) -> None:
        self.scene = Scene(root)
        self.report = Report()

    def run(self, kinds: list[str], stride: int, *, for_ever: bool) -> Report:
        """Every stride-th position of each kind, until one is not reached; errors in turn, or each of them."""
        gc.freeze()
        began_s = time.monotonic()
        self.report.calls = self.learn()
        for kind in kinds:
            if for_ever and kind == "lock":
                continue  # SQLite asks again for ten seconds, at every statement: right, and too slow for rounds
            for i, nth in enumerate(itertools.count(1, stride)):
                errors = KINDS[kind]
                if stride > 1 or for_ever:
                    errors = (errors[i % len(errors)],)
                hits = [self.round(Position(kind, error, nth, FOR_EVER if for_ever else 1)) for error in errors]
                if not any(hits) or len(self.report.problems) > self.MOST_PROBLEMS:
                    break
        self.report.seconds = time.monotonic() - began_s
        return self.report

    def learn(self) -> dict[str, int]:
        shutil.rmtree(self.scene.cache_root, ignore_errors=True)
        calls, ended = counted(lambda tell: life(self.scene, tell), self.scene.cache_root, deadline_s=DEADLINE_S)
        if ended.code:
            self.report.problems.append(f"without a fault: {ended.error}")
        return dict(calls)

    def round(self, position: Position) -> bool:
        """Whether the position was reached."""
        shutil.rmtree(self.scene.cache_root, ignore_errors=True)
        work = lambda tell: life(self.scene, tell)  # noqa: E731 - a closure for the child
        failed = failing(work, self.scene.cache_root, position, deadline_s=DEADLINE_S)
        if failed.n_struck:
            self.report.struck[f"{position.kind} {position.error}"] += 1
        else:
            self.report.not_reached += 1
        self.report.problems += [f"{position} at {failed.where}: {problem}" for problem in self.look(failed)]
        return failed.n_struck > 0

    def look(self, failed: Failed) -> list[str]:
        found = []
        if failed.ended.code:
            found.append(f"it {'hung' if failed.ended.hung else 'failed'}: {failed.ended.error}")
        model = Model({self.scene.names[key]: self.scene.data[key] for key in self.scene.names})
        if not failed.ended.hung:  # what it told stands between the lines of its traceback
            model.take_in(failed.ended.lines)
        model.have.clear()  # of a disk that fails nothing is certain but that what is read is right
        return found + Inspection(self.scene, model, seed=1).problems()


def wait_shortly() -> None:
    """A lock that is never to be had is waited for as always, only not as long: some lives would take half an hour."""
    database.BUSY_S = publisher.LOCK_WAIT_S = evictor.ROOM_WAIT_S = 0.1
    publisher.SLOWEST_BYTES_S = 1e12


def main() -> None:
    wait_shortly()
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--stride", type=int, default=1)
    parser.add_argument("--for-ever", action="store_true")
    asked = parser.parse_args()
    report = Rounds(asked.folder).run(asked.kinds, asked.stride, for_ever=asked.for_ever)
    print(report.to_json())
    sys.exit(1 if report.problems else 0)


if __name__ == "__main__":
    main()
