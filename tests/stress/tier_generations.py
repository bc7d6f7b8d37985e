"""Interrupted generations of tier moves: `python -m tests.stress.tier_generations FOLDER --rounds N --seed S`.

Prints JSON. A round: new checkpoints are saved, the command (a run, or a recall) is interrupted, sometimes more
checkpoints are saved, and later runs are not interrupted. The oracle of tests/support/named_checkpoints.py looks after
each of these steps. A world lives for several rounds, so that each generation moves what earlier ones left. All that
happens is in the text of a problem; a problem ends a world, not the rounds, so that the report counts the rounds that
fail.
"""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.stress.kills import points_where, rounds_asked
from tests.support.named_checkpoints import LAYOUTS, OWN
from tests.tier.generations import (
    ENDS,
    INTERRUPTED,
    KEEP_LAST,
    AfterTime,
    AtCall,
    AtCopy,
    AtPoint,
    Interruption,
    Outcome,
    S3Tiers,
    Setting,
    World,
    s3_client,
)

from tiercache.demo.s3_server import S3Server

N_GENERATIONS = 6  # of a world, at most
MOST_PROBLEMS = 40  # that are printed
MOST_NTH = 12  # time at which a crash point is waited for
GRACES_S = (0.0, 0.0, 86_400.0)


@dataclass
class Report:
    """Counts of one run.

    Attributes:
        n_rounds: Rounds with a command that was interrupted.
        n_failed: Those of them in which the oracle found something.
        missed: Commands that ended before the interruption.
        by_end, by_layout, by_kind, failed_by_layout: Rounds by what interrupted, by layout and by command.
        points: Interruptions by crash point.
        problems: The first problems, each with its history.
    """

    n_rounds: int = 0
    n_failed: int = 0
    missed: int = 0
    by_end: Counter[str] = field(default_factory=Counter)
    by_kind: Counter[str] = field(default_factory=Counter)
    by_layout: Counter[str] = field(default_factory=Counter)
    failed_by_layout: Counter[str] = field(default_factory=Counter)
    points: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def to_json(self) -> str:
        """Return the report as one JSON object."""
        return json.dumps(vars(self) | {"rounds_per_s": round(self.n_rounds / max(self.seconds, 1e-9), 2)})


class Rounds:
    """Rounds in one folder, one world after the other.

    Args:
        root: Folder of the worlds.
        layouts: Layouts from which each world takes one or two.
        n_tiers: Number of tiers.
        deletes: Whether the rules delete old checkpoints.
        server: Server of the tiers; None: they are folders.
    """

    def __init__(
        self,
        root: Path,
        seed: int,
        *,
        layouts: tuple[str, ...],
        n_tiers: int = 3,
        deletes: bool = False,
        server: S3Server | None = None,
    ) -> None:
        self.report, self.random = Report(), random.Random(seed)
        self._root, self._layouts, self._n_tiers, self._deletes = root, layouts, n_tiers, deletes
        self._server = server
        self._client = None
        if server is not None:
            self._client = s3_client(server.endpoint, server.access_key_id, server.secret_access_key)
        self._points = sorted(points_where(lambda name: name.startswith(("tier_", "catalog."))))
        self._reached: Counter[str] = Counter()  # most often in one command
        self._tried: Counter[str] = Counter()  # by crash point
        self._n_calls, self._seconds = 50, 0.3  # of the longest commands so far
        self._n_worlds = 0
        self._history: list[str] = []

    def run(self, n_rounds: int) -> Report:
        """Make rounds until n_rounds of them were interrupted."""
        gc.freeze()  # a child's collector would copy every page of the parent's
        began_s = time.monotonic()
        with suppress(KeyboardInterrupt):  # the report is that of the rounds so far
            while self.report.n_rounds < n_rounds:
                world = self._new_world()
                for _ in range(self.random.randint(2, N_GENERATIONS)):
                    if self.report.n_rounds >= n_rounds or not self._round(world):
                        break
        self.report.seconds = round(time.monotonic() - began_s, 1)
        return self.report

    def _new_world(self) -> World:
        chance = self.random
        layouts = tuple(chance.sample(self._layouts, min(len(self._layouts), chance.choice((1, 1, 2)))))
        setting = Setting(layouts, self._n_tiers, self._deletes, chance.choice(GRACES_S), chance.choice((1, 2, 8)))
        self._n_worlds += 1
        tiers = None
        if self._server is not None:
            tiers = S3Tiers(self._client, self._server.bucket, f"{self._root.name}/{self._n_worlds}")
        self._history = [repr(setting)]
        world = World(self._root / "world", setting, tiers)
        if self._n_worlds == 1 or chance.random() < 0.8:  # a first generation that is not interrupted
            self._save(world, chance.randint(2, 6))
            self._learn(world.run())
            self._history.append("run")
            self._check(self._heal(world))
        return world

    def _round(self, world: World) -> bool:
        """Make one round; return whether the world can be used on."""
        chance, report = self.random, self.report
        self._save(world, chance.choice((1, 2, 3, 3)))
        if self._deletes or chance.random() < 0.3:
            self._pass_days(world, chance.choice((0.2, 1.5, 4.0)))
        far = [save.path for save in world.oracle.saves if world.oracle.rank(save) >= KEEP_LAST[self._n_tiers][0]]
        far = [path for path in far if path not in world.oracle.may_be_gone]
        recalled = chance.choice(far) if far and chance.random() < 0.2 else ""
        at = self._interruption()
        outcome = world.recall(recalled, at) if recalled else world.run(at)
        self._history.append(f"{f'get {recalled}' if recalled else 'run'} {at} -> {outcome.code}")
        kind = "get" if recalled else "run"
        if not outcome.is_struck:
            report.missed += 1
            if outcome.code:
                return self._check([f"it ended with {outcome.code}: {outcome.text}"])
            self._learn(outcome)
            return self._check(world.look())
        report.n_rounds += 1
        report.by_end[at.end] += 1
        report.by_kind[f"{kind} {type(at).__name__}"] += 1
        report.by_layout.update(world.setting.layouts)
        if isinstance(at, AtPoint):
            report.points[at.point] += 1
        wrong = [f"directly after the interruption: {text}" for text in world.look()]
        has_begun = outcome.code == INTERRUPTED and outcome.text != ""
        if has_begun and kind == "run" and "nothing was lost" not in outcome.text:
            wrong.append(f"the interrupted command printed {outcome.text!r}")
        if not wrong and chance.random() < 0.3:
            self._save(world, 1)
        if not wrong and recalled and chance.random() < 0.7:
            again = world.recall(recalled)
            self._history.append(f"get {recalled} -> {again.code}")
            wrong = [f"the same recall ended with {again.code}: {again.text}"] if again.code else world.look()
        wrong = wrong or self._heal(world)
        if wrong:
            report.n_failed += 1
            report.failed_by_layout.update(world.setting.layouts)
        return self._check(wrong)

    def _save(self, world: World, n: int) -> None:
        world.save(n)
        self._history.append(f"save {n}")

    def _pass_days(self, world: World, days: float) -> None:
        world.days_pass(days)
        self._history.append(f"{days} days pass")

    def _learn(self, outcome: Outcome) -> None:
        self._reached |= outcome.reached
        self._n_calls = max(self._n_calls, outcome.n_calls)
        self._seconds = 0.7 * self._seconds + 0.3 * outcome.seconds

    def _interruption(self) -> Interruption:
        """Return the crash point that was chosen least, or any change of a file, or any instant."""
        chance = self.random
        end = chance.choice(ENDS)
        on_files = 0 if self._server else 3
        kind = chance.choices(("point", "call", "copy", "time"), (4, on_files, on_files, 1))[0]
        if kind == "call":
            return AtCall(chance.randint(1, chance.randint(10, self._n_calls)), end)
        if kind == "copy":
            return AtCopy(chance.randint(1, 10), end)
        known = [point for point in self._points if self._reached[point]]
        if kind == "time" or not known:
            return AfterTime(chance.uniform(0.0, self._seconds), end)
        point = min(known, key=lambda name: (self._tried[name], chance.random()))
        self._tried[point] += 1
        return AtPoint(point, chance.randint(1, chance.randint(1, min(self._reached[point], MOST_NTH))), end)

    def _heal(self, world: World) -> list[str]:
        self._history.append("heal")
        return world.heal()

    def _check(self, wrong: list[str]) -> bool:
        """Note what is wrong, with its history; return whether nothing is."""
        if wrong and len(self.report.problems) < MOST_PROBLEMS:
            self.report.problems.append(f"{'; '.join(self._history)}: {' | '.join(wrong)}")
        return not wrong


def main() -> None:
    parser = rounds_asked()
    names = (*LAYOUTS, OWN)
    parser.add_argument("--layout", nargs="*", default=names, choices=names)
    parser.add_argument("--stores", default="folders", choices=("folders", "s3"))
    parser.add_argument("--tiers", type=int, default=3, choices=(2, 3))
    parser.add_argument("--delete-after", action="store_true", help="the rule deletes old checkpoints")
    asked = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with ExitStack() as stack:
        server = stack.enter_context(S3Server()) if asked.stores == "s3" else None
        if server is not None:
            os.environ.update(server.environment)
        rounds = Rounds(
            asked.folder,
            asked.seed,
            layouts=tuple(asked.layout),
            n_tiers=asked.tiers,
            deletes=asked.delete_after,
            server=server,
        )
        report = rounds.run(asked.rounds)
    print(report.to_json())
    sys.exit(1 if report.n_failed or report.problems else 0)


if __name__ == "__main__":
    main()
