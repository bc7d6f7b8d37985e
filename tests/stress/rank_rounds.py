"""SIGKILL of ranks: `python -m tests.stress.rank_rounds FOLDER --rounds N --seed S`; prints JSON.

Two ranks save sharded checkpoints with rules of retention, and one of them dies at a point. A run goes on from round to
round, as it was left, with local folders: one for both ranks ("save") or one for each ("machines").

After each round every checkpoint that was committed and that no rule deletes loads bit by bit. In a copy of the run
that is two days older and was collected, nothing is left but what these checkpoints need.
"""

import json
import shutil
import signal
import time
import warnings
from collections import Counter
from pathlib import Path

from tests.stress.kills import PointRounds, Report, points_where, rounds_asked, run_and_report
from tests.support.checkpoint_jobs import digest, state_at
from tests.support.kill_points import KillAt
from tests.support.ranks import Job
from tests.support.warm_python import WarmPython

import tiercache as tc
from tiercache.checkpoint.format import RUN_NAME, list_names, manifest_key, metrics_key
from tiercache.checkpoint.housekeeping import GC_AGE_S, Retention
from tiercache.checkpoint.run_stores import RunStores
from tiercache.keep import Keep
from tiercache.store import LocalFolder
from tiercache.store.local import TEMP_PREFIX

JOBS = "tests.support.checkpoint_jobs"
OF_RANKS = ("dcp.", "checkpoint_write.", "checkpoint_upload.", "checkpoint_commit.", "retention.")
OF_PLAIN_SAVES = (
    "checkpoint_write.begun",
    "checkpoint_write.files_written",
    "checkpoint_upload.marked",
    "checkpoint_upload.unmarked",
)
N_RANKS, N_SAVES, N_KEPT = 2, 3, 2
NEW_RUN_AFTER = 10  # rounds: leftovers wait for their collection


def points_of_ranks() -> dict[str, str]:
    """Every point that ranks reach, and where it stands in the source."""
    return points_where(lambda name: name.startswith(OF_RANKS) and name not in OF_PLAIN_SAVES)


class Rounds(PointRounds[tuple[str, int]]):
    """All rounds over one folder; a place is a job, and the rank that is killed in it."""

    most_hits = 6
    tries = (4, 50)

    def __init__(self, root: Path, seed: int, python: WarmPython, only: str = "") -> None:
        points = {name: at for name, at in points_of_ranks().items() if only in name}
        super().__init__(points, seed, Report())
        self.python, self.root, self.n_rounds = python, root, 0
        self.saving = root / "saving"

    def learn(self) -> None:
        for job in ("save", "machines"):
            self.now = f"job {job}, not struck"
            self.saving.mkdir(parents=True, exist_ok=True)
            self.work(job, 0, None)
            for rank in range(N_RANKS):
                self.hits[job, rank] = Counter(json.loads(Path(f"{self.root}/counts-{rank}").read_text()))
            self.look()

    def round(self, place: tuple[str, int], at: KillAt) -> None:
        job, rank = place
        self.now = f"{job}, rank {rank} struck at {at.point} ({self.points[at.point]}), time {at.nth}"
        self.n_rounds += 1
        if self.n_rounds % NEW_RUN_AFTER == 0:
            shutil.rmtree(self.saving, ignore_errors=True)
        self.saving.mkdir(parents=True, exist_ok=True)
        codes = self.work(job, rank, at)
        if codes[rank] == -signal.SIGKILL:
            self.report.struck[at.point] += 1
        else:
            self.report.missed += 1
        self.look()

    # -- what is done -----------------------------------------------------------------------------------------------

    def work(self, job: str, rank: int, at: KillAt | None) -> list[int | None]:
        """Do a job, in which a rank may be killed; the exit codes."""
        locals_ = [str(self.saving / f"local-{0 if job == 'save' else one}") for one in range(N_RANKS)]
        arguments = {
            "url": str(self.saving / "remote"), "locals_": locals_, "n_saves": N_SAVES,
            "saved": str(self.saving / "saved"), "keep_last": N_KEPT, "rank": rank,
            "kill": None if at is None else {"point": at.point, "nth": at.nth},
            "counts": "" if at else str(self.root / "counts"),
        }  # fmt: skip
        with Job(self.python, f"{JOBS}:save_until_killed", N_RANKS, self.root / "job", arguments) as running:
            codes = running.exit_codes()
            if any(codes) and (at is None or codes[rank] != -signal.SIGKILL):
                self.problem(f"the ranks ended with {codes}: {running.said()}")
            return codes

    # -- what must be true ------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Load every checkpoint; then again in an older copy of the run, of which everything needless was collected."""
        self.look_at(self.saving)
        older = self.root / "older"
        shutil.rmtree(older, ignore_errors=True)
        shutil.copytree(self.saving, older)
        locals_ = sorted(older.glob("local-*"))
        for local in locals_:
            both = RunStores({"local": LocalFolder(local), "remote": LocalFolder(older / "remote")})
            Retention(both, [Keep(last=N_KEPT)], now=lambda: time.time() + 2 * GC_AGE_S).run()
        self.look_at(older)
        for root in (older / "remote", *locals_):
            self.look_for_leaks(root)

    def look_at(self, run: Path) -> None:
        n_saved = _last_saved(run)
        for local in sorted(run.glob("local-*")) or [None]:
            with warnings.catch_warnings(), tc.Checkpoints(run / "remote", local=local) as checkpoints:
                warnings.simplefilter("error")
                names = [info.name for info in checkpoints.list() if info.state == "complete"]
                self.load_all(checkpoints, names, n_saved)

    def load_all(self, checkpoints: tc.Checkpoints, names: list[str], n_saved: int) -> None:
        """Load checkpoints, of which the last must be of the step n_saved or a later one."""
        if n_saved >= 0 and (not names or int(names[-1][5:17]) < n_saved):
            self.problem(f"{checkpoints}: step {n_saved} was saved, and {names[-1:]} is the newest")
        if names and checkpoints.load("latest")["step"] != int(names[-1][5:17]):
            self.problem(f"{checkpoints}: latest is not {names[-1]}")
        for name in names:
            try:
                state = checkpoints.load(name)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is a problem of the round
                self.problem(f"{checkpoints}: {name} cannot be loaded: {error!r}")
                continue
            if digest(state) != digest(state_at(int(name[5:17]))):
                self.problem(f"{checkpoints}: {name} is not what was saved")

    def look_for_leaks(self, root: Path) -> None:
        """Compare what a folder of checkpoints has with what its checkpoints need."""
        store, used = LocalFolder(root), {RUN_NAME}
        for name, manifest in _manifests(store).items():
            used |= {f"{name}/{file.path}" for file in manifest.files} | {manifest_key(name), metrics_key(name)}
        left = {info.key for info in store.list()}
        if left - used:
            self.problem(f"{root.name}: two days later, {sorted(left - used)} are left")
        if temporary := list(root.rglob(f"{TEMP_PREFIX}*")):
            self.problem(f"{root.name}: temporary files are left: {temporary}")


def _manifests(store: LocalFolder) -> dict:
    scan = RunStores({"remote": store}).scan()
    return {name: scan.manifest(name) for name in list_names(store)}


def _last_saved(run: Path) -> int:
    return int(((run / "saved").read_text().split() or [-1])[-1]) if (run / "saved").exists() else -1


def main() -> None:
    asked = rounds_asked().parse_args()
    with WarmPython() as python:
        run_and_report(Rounds(asked.folder, asked.seed, python, asked.only), asked.rounds)


if __name__ == "__main__":
    main()
