"""Every system call fails once: `python -m tests.stress.errno_rounds FOLDER`, started with the shim of support/errnos.

A warm parent forks a child for each position; the child lives one chapter of a cache's life, in the folder that the
chapters before have left, and one call of one kind fails in it, or all from there on. Prints JSON.
"""

import argparse
import gc
import itertools
import json
import shutil
import subprocess
import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.stress.inspection import DEADLINE_S, Inspection
from tests.stress.jobs import change_heads
from tests.stress.life import CHAPTERS, Chapter
from tests.stress.scene import Model, Scene
from tests.support.errnos import FOR_EVER, KINDS, FailedCalls, Position, count_calls, fail_calls
from tests.support.forks import ChildEnd, SendLine, run_forked

from tiercache.cache import eviction, fetch
from tiercache.store import shared_files


@dataclass
class Report:
    """Counts of one run: calls of each kind in each chapter; positions that failed, by kind and error."""

    calls: dict[str, dict[str, int]] = field(default_factory=dict)
    struck: Counter = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def to_json(self) -> str:
        return json.dumps(vars(self) | {"n_struck": sum(self.struck.values())})


class Rounds:
    """One chapter of a life for each position. Problems are collected, not more than a few of them."""

    MOST_PROBLEMS = 20

    def __init__(self, root: Path, only: list[str], *, for_ever: bool, each_error: bool) -> None:
        """only: names of chapters that meet faults, [] for all; for_ever: all calls from a position on fail.

        each_error: a position fails with each error of its kind, one after the other; else they take turns.
        """
        self.scene = Scene(root)
        self.before = root / "before"
        self.only = only or [chapter.work.__name__ for chapter in CHAPTERS]
        self.chapter = CHAPTERS[0]
        self.times = FOR_EVER if for_ever else 1
        self.each_error = each_error
        self.report = Report()

    def run(self, kinds: list[str], stride: int) -> Report:
        """Every stride-th position of each kind in each chapter."""
        gc.freeze()
        began_s = time.monotonic()
        for chapter in CHAPTERS:
            self.turn_to(chapter)
            for kind in kinds if chapter.work.__name__ in self.only else ():
                if self.times == FOR_EVER and kind == "lock":
                    continue  # SQLite asks again and again, at every statement: right, and too slow for rounds
                self.fail_each(kind, stride)
            self.bring_back()
            self.without_fault(chapter.work)
        self.report.seconds = time.monotonic() - began_s
        return self.report

    def turn_to(self, chapter: Chapter) -> None:
        """Keep the folder as it is when the chapter begins, and learn what calls it makes."""
        self.chapter = chapter
        if chapter.prepare is not None:
            prepare = chapter.prepare
            self.without_fault(lambda scene, tell: prepare(scene))
        self.keep()
        calls, ended = count_calls(self.work, self.scene.cache_root, deadline_s=DEADLINE_S)
        self.report.calls[chapter.work.__name__] = {kind: n for kind, n in calls.items() if n}
        self.take_in(ended, f"{chapter.work.__name__} without a fault")

    def work(self, tell: SendLine) -> None:
        self.chapter.work(self.scene, tell)

    def without_fault(self, work) -> None:
        self.take_in(run_forked(lambda tell: work(self.scene, tell), deadline_s=DEADLINE_S), "without a fault")

    def take_in(self, ended: ChildEnd, what: str) -> None:
        if ended.code:
            self.report.problems.append(f"{what}: {ended.error}")

    def keep(self) -> None:
        shutil.rmtree(self.before, ignore_errors=True)
        if self.scene.cache_root.exists():
            copy_sparse(self.scene.cache_root, self.before)

    def bring_back(self) -> None:
        shutil.rmtree(self.scene.cache_root, ignore_errors=True)
        if self.before.exists():
            copy_sparse(self.before, self.scene.cache_root)
            change_heads(self.scene.cache_root)

    def fail_each(self, kind: str, stride: int) -> None:
        n_calls = self.report.calls[self.chapter.work.__name__].get(kind, 0)
        for i, nth in enumerate(itertools.count(1, stride)):
            errors = KINDS[kind]
            if not self.each_error:
                errors = (errors[i % len(errors)],)
            hits = [self.round(Position(kind, error, nth, self.times)) for error in errors]
            is_end = nth + stride > n_calls and (stride > 1 or not any(hits))  # threads make a call more or less
            if is_end or len(self.report.problems) > self.MOST_PROBLEMS:
                break

    def round(self, position: Position) -> bool:
        """Whether the position was reached."""
        self.bring_back()
        failed = fail_calls(self.work, self.scene.cache_root, position, deadline_s=DEADLINE_S)
        if failed.n_struck:
            self.report.struck[f"{position.kind} {position.error}"] += 1
        where = f"{self.chapter.work.__name__}, {position} at {failed.where}"
        self.report.problems += [f"{where}: {problem}" for problem in self.look(failed)]
        return failed.n_struck > 0

    def look(self, failed: FailedCalls) -> list[str]:
        found = []
        if failed.ended.code:
            found.append(f"it {'hung' if failed.ended.hung else 'failed'}: {failed.ended.error}")
        model = Model({self.scene.names[key]: self.scene.data[key] for key in self.scene.names})
        if not failed.ended.hung:  # what it told stands between the lines of its traceback
            model.take_in(failed.ended.lines)
        model.have.clear()  # of a disk that fails nothing is certain but that what is read is right
        return found + Inspection(self.scene, model, seed=1).problems()


def copy_sparse(source: Path, target: Path) -> None:
    """Copy a folder; what is not allocated of a part stays so: the books count blocks."""
    subprocess.run(["cp", "-a", "--sparse=always", source, target], check=True, timeout=60)


def wait_shortly() -> None:
    """A lock that is never to be had is waited for as always, only not as long: some lives would take half an hour."""
    shared_files.BUSY_S = fetch.LOCK_WAIT_S = eviction.SPACE_WAIT_S = 0.1
    fetch.SLOWEST_BYTES_S = 1e12


def main() -> None:
    warnings.simplefilter("ignore", RuntimeWarning)  # notices say that the disk fails
    wait_shortly()
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--stride", type=int, default=1)
    parser.add_argument("--chapters", nargs="*", default=[])
    parser.add_argument("--for-ever", action="store_true")
    parser.add_argument("--each-error", action="store_true")
    asked = parser.parse_args()
    rounds = Rounds(asked.folder, asked.chapters, for_ever=asked.for_ever, each_error=asked.each_error)
    report = rounds.run(asked.kinds, asked.stride)
    print(report.to_json())
    sys.exit(1 if report.problems else 0)


if __name__ == "__main__":
    main()
