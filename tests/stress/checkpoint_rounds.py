"""SIGKILL at the points of saves: `python -m tests.stress.checkpoint_rounds FOLDER --rounds N --seed S`; prints JSON.

A warm parent without threads lays folders with some committed checkpoints, and forks a child that saves more and dies
at the n-th time that it reaches one point. Whatever was committed must read back bit by bit, and what was not must be
one folder without a manifest for each save that was under way. Then another child saves with no help.
"""

import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tests.stress import retention_rounds
from tests.stress.kills import PointRounds, Report, points_where, rounds_asked, run_and_report
from tests.support.checkpoint_reader import leftovers, newest, read_checkpoint, same
from tests.support.faults import Fault, FaultStore
from tests.support.forks import SendLine, run_forked
from tests.support.kill_points import KillAt, count_points, kill_at

from tiercache.checkpoint.checkpoints import Checkpoints
from tiercache.checkpoint.format import list_names, parse_name
from tiercache.errors import StoreError
from tiercache.store import LocalFolder
from tiercache.store.local import TEMP_PREFIX

DEADLINE_S = 120.0
N_BEFORE, N_SAVES, PENDING = 2, 3, 2
LARGE_BYTES = 1 << 14


def points_of_checkpoints() -> dict[str, str]:
    """Every point of an area of checkpoints, and where it stands in the source."""
    return points_where(lambda name: name.startswith("checkpoint_"))


def state_at(step: int) -> dict:
    """The state of a step: one large part, and small ones."""
    values = np.random.default_rng(step)
    return {
        "moving": values.integers(0, 255, LARGE_BYTES, np.uint8),
        "small": [values.normal(size=(3, 5)), values.integers(0, 9, 4)],
        "epoch": step,
    }


@dataclass(frozen=True)
class World:
    """The two folders of a run."""

    root: Path

    def stores(self) -> dict[str, LocalFolder]:
        return {target: LocalFolder(self.root / target) for target in ("local", "remote")}


def save_steps(world: World, tell: SendLine, steps: range, *, remote=None, **options) -> None:
    """Save some steps, and tell each commit once it is known."""
    checkpoints = Checkpoints(remote or world.root / "remote", **options)
    saves = []
    for step in steps:
        with suppress(StoreError):  # of an earlier save, where the store fails
            saves.append(checkpoints.save(step, state_at(step), metrics={"loss": step}))
    for saved in saves:
        for target in checkpoints.targets:
            with suppress(StoreError):
                if saved.wait(target):
                    tell(f"committed {target} {saved.name}")
    with suppress(StoreError):
        checkpoints.close()


def direct(world: World, tell: SendLine, steps: range) -> None:
    save_steps(world, tell, steps)


def through_local(world: World, tell: SendLine, steps: range) -> None:
    save_steps(world, tell, steps, local=world.root / "local", pending=PENDING)


def failing(world: World, tell: SendLine, steps: range) -> None:
    faults = [Fault("complete", keys="*state.json", retryable=False)]
    save_steps(world, tell, steps, remote=FaultStore(LocalFolder(world.root / "remote"), faults))


JOBS: dict[str, Callable[[World, SendLine, range], None]] = {
    "direct": direct,
    "through_local": through_local,
    "failing": failing,
}


class Rounds(PointRounds[str]):
    """All rounds over one folder; a place is a job."""

    most_hits = 6
    tries = (4, 50)

    def __init__(self, root: Path, seed: int, only: str = "") -> None:
        points = {name: place for name, place in points_of_checkpoints().items() if only in name}
        super().__init__(points, seed, Report())
        self.kept, self.world = World(root / "kept"), World(root / "world")

    def learn(self) -> None:
        self.now = "making it ready"
        ended = run_forked(lambda tell: through_local(self.kept, tell, range(N_BEFORE)), deadline_s=DEADLINE_S)
        if not self.took(ended, "it"):
            return
        for name, job in JOBS.items():
            self.now = f"job {name}, not struck"
            self.lay()
            hits, ended = count_points(self.work(job), deadline_s=DEADLINE_S)
            self.hits[name] = Counter(hits)
            self.took(ended, "it")
            self.look(ended.lines, n_under_way=0)

    def round(self, place: str, at: KillAt) -> None:
        self.now = f"job {place} struck at {at.point} ({self.points[at.point]}), time {at.nth}"
        self.lay()
        struck = kill_at(self.work(JOBS[place]), at, deadline_s=DEADLINE_S)
        if struck.hit:
            self.report.struck[at.point] += 1
        else:
            self.report.missed += 1
            self.took(struck.ended, "it")
        self.look(struck.lines, n_under_way=PENDING)
        ended = run_forked(lambda tell: through_local(self.world, tell, range(90, 91)), deadline_s=DEADLINE_S)
        self.took(ended, "the next process")
        self.look((*struck.lines, *ended.lines), n_under_way=PENDING)
        for target, store in self.world.stores().items():
            if parse_name(newest(store) or "")[0] != 90:
                self.problem(f"{target}: the newest checkpoint is not the one of the next process")
        names = {target: set(list_names(store)) for target, store in self.world.stores().items()}
        if missing := names["local"] - names["remote"]:
            self.problem(f"the next process has not uploaded {sorted(missing)}")

    def work(self, job: Callable) -> Callable[[SendLine], None]:
        return lambda tell: job(self.world, tell, range(N_BEFORE, N_BEFORE + N_SAVES))

    def lay(self) -> None:
        """The folders as they were before the job."""
        shutil.rmtree(self.world.root, ignore_errors=True)
        shutil.copytree(self.kept.root, self.world.root)

    def look(self, lines: tuple[str, ...], n_under_way: int) -> None:
        """Read everything; n_under_way: how many saves may have left a folder behind in each store."""
        told = [line.split() for line in lines if line.startswith("committed ")]
        for target, store in self.world.stores().items():
            names = list_names(store)
            kept = list_names(LocalFolder(self.kept.root / target))
            wanted = [*kept, *(name for _, where, name in told if where == target)]
            if missing := set(wanted) - set(names):
                self.problem(f"{target}: {sorted(missing)} were committed and are gone")
            if wanted and names and parse_name(names[-1])[1] < max(parse_name(name)[1] for name in wanted):
                self.problem(f"{target}: the newest checkpoint is older than one that was committed")
            for name in names:
                try:
                    manifest, state = read_checkpoint(store, name)
                except Exception as error:  # noqa: BLE001 - whatever it is, it is a problem of the round
                    self.problem(f"{target}: {name} cannot be read: {error!r}")
                    continue
                if not same(state, state_at(manifest.step)):
                    self.problem(f"{target}: {name} is not what was saved")
            left = leftovers(store)
            if len(left) > n_under_way:
                self.problem(f"{target}: {len(left)} folders without a manifest: {left}")
            if temporary := list(Path(store.url).rglob(f"{TEMP_PREFIX}*")):
                self.problem(f"{target}: temporary files are left: {temporary}")


def main() -> None:
    parser = rounds_asked()
    parser.add_argument("--retention", type=int, default=0, help="rounds of retention, which come first")
    asked = parser.parse_args()
    if asked.retention:
        retention = retention_rounds.Rounds(asked.folder / "retention", asked.seed, asked.only)
        retention.run(asked.retention)
        print(retention.report.to_json())
    run_and_report(Rounds(asked.folder, asked.seed, asked.only), asked.rounds)


if __name__ == "__main__":
    main()
