"""SIGKILL in retention: `python -m tests.stress.retention_rounds FOLDER --rounds N --seed S`; prints JSON.

A warm parent without threads lays two folders with checkpoints, and forks a child that deletes old
ones and dies at a point. Every checkpoint that is still visible must read back bit by bit, and the one written last
must be there. Then retention runs with no help, and a day later nothing is left but what the kept checkpoints need.
"""

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
from tests.stress.kills import PointRounds, Report, points_where, rounds_asked, run_and_report
from tests.support.checkpoint_files import START_S, write_checkpoint
from tests.support.checkpoint_reader import leftovers, read_checkpoint, same
from tests.support.forks import run_forked
from tests.support.kill_points import KillAt, count_points, kill_at

from tiercache.checkpoint.format import list_names
from tiercache.checkpoint.housekeeping import GC_AGE_S, Retention
from tiercache.checkpoint.run_stores import RunStores
from tiercache.keep import Keep
from tiercache.store import LocalFolder

DEADLINE_S = 120.0
N_CHECKPOINTS, N_KEPT = 5, 2


def points_of_retention() -> dict[str, str]:
    """Every point of retention, and where it stands in the source."""
    return points_where(lambda name: name.startswith("retention."))


def state_at(step: int) -> dict:
    """The state of a step: a part that never changes, and one that does."""
    return {"frozen": np.full(100, 7, np.uint8), "moving": np.full(100, step, np.int64), "epoch": step}


class Rounds(PointRounds[str]):
    """All rounds over one folder; there is one job."""

    most_hits = 2
    tries = (4, 50)

    def __init__(self, root: Path, seed: int, only: str = "") -> None:
        points = {name: place for name, place in points_of_retention().items() if only in name}
        super().__init__(points, seed, Report())
        self.kept, self.world = root / "kept", root / "world"
        self.newest = ""

    def stores(self, root: Path) -> dict[str, LocalFolder]:
        return {tier: LocalFolder(root / tier) for tier in ("local", "remote")}

    def learn(self) -> None:
        for store in self.stores(self.kept).values():
            for step in range(N_CHECKPOINTS):
                self.newest = write_checkpoint(store, step, state_at(step))
        self.now = "retention, not struck"
        self.lay()
        hits, ended = count_points(lambda _tell: self.retain(), deadline_s=DEADLINE_S)
        self.hits["retention"] = Counter(hits)
        self.took(ended, "it")
        self.look(n_visible=N_KEPT)

    def round(self, place: str, at: KillAt) -> None:
        self.now = f"{place} struck at {at.point} ({self.points[at.point]}), time {at.nth}"
        self.lay()
        struck = kill_at(lambda _tell: self.retain(), at, deadline_s=DEADLINE_S)
        if struck.hit:
            self.report.struck[at.point] += 1
        else:
            self.report.missed += 1
            self.took(struck.ended, "it")
        self.look()
        ended = run_forked(lambda _tell: self.retain(), deadline_s=DEADLINE_S)
        self.took(ended, "the next run")
        self.look(n_visible=N_KEPT)

    def lay(self) -> None:
        shutil.rmtree(self.world, ignore_errors=True)
        shutil.copytree(self.kept, self.world)

    def retain(self) -> None:
        """Retention as the thread of a run executes it, and once more some days later."""
        stores = RunStores(self.stores(self.world))
        Retention(stores, [Keep(last=N_KEPT)], now=lambda: START_S).run()
        newest_s = max(info.modified_s for store in stores.tiers.values() for info in store.list())
        Retention(stores, now=lambda: newest_s + 2 * GC_AGE_S).collect()

    def look(self, n_visible: int | None = None) -> None:
        """Read everything. n_visible: how many checkpoints there must be, without anything else; None: any number."""
        for tier, store in self.stores(self.world).items():
            names = list_names(store)
            if not names or names[-1] != self.newest:
                self.problem(f"{tier}: the checkpoint written last is gone")
            for name in names:
                try:
                    manifest, state = read_checkpoint(store, name)
                except Exception as error:  # noqa: BLE001 - whatever it is, it is a problem of the round
                    self.problem(f"{tier}: {name} cannot be read: {error!r}")
                    continue
                if not same(state, state_at(manifest.step)):
                    self.problem(f"{tier}: {name} is not what was saved")
            if n_visible is None:
                continue
            if len(names) != n_visible or leftovers(store):
                self.problem(f"{tier}: {names} and {leftovers(store)} are left")


def main() -> None:
    asked = rounds_asked().parse_args()
    run_and_report(Rounds(asked.folder, asked.seed, asked.only), asked.rounds)


if __name__ == "__main__":
    main()
