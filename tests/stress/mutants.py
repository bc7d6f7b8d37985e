"""A cache that is broken on purpose, one way at a time: does the rig say so? `python -m tests.stress.mutants FOLDER`.

Each mutant is laid into a forked process, in which one of the rig's own trials then runs: it must find a problem, and
none where nothing was broken. Prints JSON: problems by mutant, with and without it.
"""

import argparse
import gc
import json
import random
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from tests.stress.errno_rounds import wait_shortly
from tests.stress.inspection import Inspection
from tests.stress.jobs import JOBS, Job
from tests.stress.scene import Model, Scene
from tests.support.cache_machine import CacheMachine
from tests.support.forks import run_forked
from tests.support.kill_points import KillAt, kill_at

from tiercache.cache import copy_file, eviction
from tiercache.cache.accounts import Accounts
from tiercache.cache.fetch import Fetch
from tiercache.cache.folder import Folder
from tiercache.crash_points import crash_point

DEADLINE_S = 60.0


# -- trials: each returns the problems that it finds ------------------------------------------------------------------


def struck(root: Path, job: str, point: str, before: tuple[str, ...] = ()) -> list[str]:
    """A round of the kill points, in which a job dies at a point ("": it lives); before: jobs that lived.

    A point of a mutant is not reached where nothing is broken.
    """
    scene = Scene(root)
    model = Model({scene.names[key]: scene.data[key] for key in scene.names})
    inspection, found = Inspection(scene, model, seed=1), []
    for number, name in enumerate((*before, job)):
        inspection.plant()
        chance = random.Random(number)
        work = lambda tell, name=name, chance=chance: JOBS[name](Job(scene, tell, chance))  # noqa: E731 - the child's
        if point and number == len(before):
            dead = kill_at(work, KillAt(point), deadline_s=DEADLINE_S)
            model.take_in(dead.lines)
            found += [dead.ended.error] if dead.ended.error else []
        else:
            ended = run_forked(work, deadline_s=DEADLINE_S)
            model.take_in(ended.lines)
            found += [ended.error] if ended.code else []
    return found + inspection.problems()


def stepped(root: Path, steps: Callable) -> list[str]:
    """Rules of the state machine, one after the other, with its invariant after each."""
    machine = CacheMachine()
    try:
        machine.fill([9_000] * 5)
        for _ in steps(machine):
            machine.nothing_is_wrong()
    except AssertionError as error:
        return [str(error) or repr(error)]
    finally:
        machine.teardown()
    return []


# -- mutants: each is a context in which the cache is broken -----------------------------------------------------------


@contextmanager
def flags_before_data() -> Iterator[None]:
    """A unit is said to be here before it is."""
    really, waiting, lock = copy_file.write_all, [], threading.Lock()

    def write_all(fd, data, at):
        if Path(f"/proc/self/fd/{fd}").readlink().suffix == ".part":
            with lock:
                waiting.append((fd, memoryview(bytes(data)), at))
            return
        really(fd, data, at)
        if set(bytes(data)) == {1}:  # the flags
            crash_point("mutant.flagged")
            with lock:
                while waiting:
                    really(*waiting.pop())

    with patch.object(copy_file, "write_all", write_all):
        yield


@contextmanager
def whole_sum_not_checked() -> Iterator[None]:
    """What was fetched is published whatever it is."""
    really = Fetch._complete

    def complete(self, part, crc):
        return really(self, part, self.spec.crc32c)

    with patch.object(Fetch, "_complete", complete):
        yield


@contextmanager
def no_reservation() -> Iterator[None]:
    """Bytes come before there is room for them."""
    with patch.object(Accounts, "reserve", lambda self, name, charge_bytes, *, usable_bytes: True):
        yield


@contextmanager
def readers_not_asked() -> Iterator[None]:
    """What is being read is evicted."""
    with patch.object(eviction, "try_exclusive", lambda fd: True):
        yield


@contextmanager
def pins_ignored() -> Iterator[None]:
    """What a person holds is evicted."""
    names = Folder.names
    with (
        patch.object(Folder, "is_pinned", lambda self, name: False),
        patch.object(Folder, "names", lambda self, suffix: [] if suffix == ".pin" else names(self, suffix)),
    ):
        yield


@contextmanager
def reservations_kept() -> Iterator[None]:
    """What a dead process has reserved stays reserved."""
    with patch.object(Accounts, "_forget", lambda self, db, owner: None):
        yield


# -- who notices what -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Case:
    """A mutant, the trial that must notice it, and a word of what it must say."""

    mutant: Callable
    trial: Callable[[Path], list[str]]
    says: str


def evict_what_is_leased(machine):
    yield machine.open_a_lease(number=0, key="b")
    yield machine.evict(number=0, chosen={"b"})


CASES = {
    case.mutant.__name__: case
    for case in (
        Case(flags_before_data, lambda root: struck(root, "fetch_in_part", "mutant.flagged"), "is said to be here"),
        Case(whole_sum_not_checked, lambda root: struck(root, "poison", ""), "bad at its source"),
        Case(no_reservation, lambda root: struck(root, "press_lru", "", ("press_lru",) * 2), "more than the limit"),
        Case(readers_not_asked, lambda root: stepped(root, evict_what_is_leased), "is being read"),
        Case(pins_ignored, lambda root: struck(root, "evict", "", ("pin",)), "pin"),
        Case(reservations_kept, lambda root: struck(root, "fetch", "fetch.data"), "stay reserved"),
    )
}


def invalid_statistics(case: Case, root: Path, *, broken: bool) -> list[str]:
    """What the trial finds, in a process of its own."""

    def work(tell):
        shutil.rmtree(root, ignore_errors=True)
        if broken:
            with case.mutant():
                found = case.trial(root)
        else:
            found = case.trial(root)
        for problem in found:
            tell(f"problem {problem}")

    ended = run_forked(work, deadline_s=DEADLINE_S)
    found = [line.removeprefix("problem ") for line in ended.lines if line.startswith("problem ")]
    return [*found, f"the trial itself failed: {ended.error}"] if ended.code else found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="*", default=list(CASES))
    asked = parser.parse_args()
    warnings.simplefilter("ignore", RuntimeWarning)
    wait_shortly()
    gc.freeze()
    answer = {}
    for name in asked.only:
        case = CASES[name]
        answer[name] = {
            "broken": invalid_statistics(case, asked.folder / name, broken=True),
            "whole": invalid_statistics(case, asked.folder / name, broken=False),
        }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
