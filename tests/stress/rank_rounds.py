"""SIGKILL of ranks and the tier engine: `python -m tests.stress.rank_rounds FOLDER --rounds N --seed S`; prints JSON.

Two ranks save sharded checkpoints, and one of them dies at a point; or the tier engine dies while it archives their
checkpoints, or recalls one. Two runs go on from round to round, as they were left:

- "saving": rules of retention, and local folders, one for both ranks ("save") or one for each ("machines");
- "tiered": no rules of retention; the tier engine moves all but the newest two to the archive.

After each round every checkpoint that was committed and that no rule deletes loads bit by bit, from wherever it is. In
a copy of the run that is two days older and was collected, nothing is left but what these checkpoints need.
"""

import json
import shutil
import signal
import time
import warnings
from collections import Counter
from contextlib import chdir
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
NEW_RUNS_AFTER = 10  # rounds: the archive grows, and leftovers wait for their collection
RULES = """
state_dir = "state"
[tiers.hot]
url = "hot"

[tiers.archive]
url = "archive"

[[rules]]
match = "run/**"
keep_hot = { last = 2 }
then = "archive"

[tiering]
grace = "0s"
"""


def points_of_ranks() -> dict[str, str]:
    """Every point that ranks reach, and where it stands in the source."""
    return points_where(lambda name: name.startswith(OF_RANKS) and name not in OF_PLAIN_SAVES)


class Rounds(PointRounds[tuple[str, int]]):
    """All rounds over one folder; a place is a job, and the rank that is killed in it."""

    most_hits = 6
    tries = (4, 50)

    def __init__(self, root: Path, seed: int, python: WarmPython, only: str = "") -> None:
        tier_points = points_where(lambda name: name.startswith("tier_"))
        points = {name: at for name, at in (points_of_ranks() | tier_points).items() if only in name}
        super().__init__(points, seed, Report())
        self.python, self.root, self.n_rounds = python, root, 0
        self.saving, self.tiered = root / "saving", root / "tiered"
        self.chosen: list[str] = []  # checkpoint that is recalled

    def learn(self) -> None:
        for job, n_places in (("save", N_RANKS), ("machines", N_RANKS), ("archive", 1), ("recall", 1)):
            self.now = f"job {job}, not struck"
            self.prepare(job)
            self.work(job, 0, None)
            for rank in range(n_places):
                self.hits[job, rank] = Counter(json.loads(Path(f"{self.root}/counts-{rank}").read_text()))
            self.look(job)
        everywhere = set().union(*self.hits.values())
        self.points = {n: at for n, at in self.points.items() if n in everywhere or n.startswith(OF_RANKS)}

    def round(self, place: tuple[str, int], at: KillAt) -> None:
        job, rank = place
        self.now = f"{job}, rank {rank} struck at {at.point} ({self.points[at.point]}), time {at.nth}"
        self.n_rounds += 1
        if self.n_rounds % NEW_RUNS_AFTER == 0:
            for run in (self.saving, self.tiered):
                shutil.rmtree(run, ignore_errors=True)
        self.prepare(job)
        codes = self.work(job, rank, at)
        if codes[rank] == -signal.SIGKILL:
            self.report.struck[at.point] += 1
        else:
            self.report.missed += 1
        self.look(job)
        if job == "archive":
            self.run_engine()
        if job == "recall":  # the same command continues
            self.work(job, 0, None)
        if job in ("archive", "recall"):
            self.look(job)

    # -- what is done -----------------------------------------------------------------------------------------------

    def prepare(self, job: str) -> None:
        """Lay a run that a rank, or the tier engine, can work on; before a recall, choose a checkpoint."""
        if job in ("save", "machines"):
            self.saving.mkdir(parents=True, exist_ok=True)
            return
        url, saved = self.tiered / "hot" / "run", self.tiered / "saved"
        if not self.tiered.exists():
            self.tiered.mkdir()
            (self.tiered / "tiercache.toml").write_text(RULES)
            self.ranks_save(url, [], saved, n_saves=4, keep_last=0)
            self.tier_command(["run", "--once"], None)  # copies two; the next run deletes them
        if job == "archive":
            self.ranks_save(url, [], saved, n_saves=2, keep_last=0)
        while job == "recall" and not self.archived():
            self.ranks_save(url, [], saved, n_saves=2, keep_last=0)
            self.run_engine()
        self.chosen = self.archived()[:1]

    def work(self, job: str, rank: int, at: KillAt | None) -> list[int | None]:
        """Do a job, in which a rank may be killed; the exit codes."""
        if job == "archive":  # delete what the run before has copied, and copy what is new
            return self.tier_command(["run", "--once"], at)
        if job == "recall":
            (name,) = self.chosen
            codes = self.tier_command(["get", f"run/{name}", "--to", "hot", "--yes", "--hold", "1s"], at)
            if codes == [0]:
                self.load_by_ranks(int(name[5:17]))
            return codes
        locals_ = [str(self.saving / f"local-{0 if job == 'save' else one}") for one in range(N_RANKS)]
        saved = self.saving / "saved"
        return self.ranks_save(self.saving / "remote", locals_, saved, rank=rank, at=at, keep_last=N_KEPT)

    def run_engine(self) -> None:
        """Let the tier engine do all that is due: the second run deletes what the first has copied."""
        for _ in range(2):
            self.tier_command(["run", "--once"], None)

    def ranks_save(self, url: Path, locals_: list[str], saved: Path, *, rank=0, at=None, n_saves=N_SAVES, keep_last):
        arguments = {
            "url": str(url), "locals_": locals_, "n_saves": n_saves, "saved": str(saved), "keep_last": keep_last,
            "kill": _as_json(at), "rank": rank, "counts": "" if at else str(self.root / "counts"),
        }  # fmt: skip
        return self.run_job("save_until_killed", N_RANKS, arguments, rank if at else None)

    def tier_command(self, arguments: list[str], at: KillAt | None) -> list[int | None]:
        counts = "" if at else str(self.root / "counts-0")
        found = {"cwd": str(self.tiered), "arguments": arguments, "kill": _as_json(at), "counts": counts}
        return self.run_job("run_tier_command", 1, found, 0 if at else None)

    def load_by_ranks(self, step: int) -> None:
        arguments = {"url": str(self.tiered / "hot" / "run"), "step": step}
        with Job(self.python, f"{JOBS}:load_exactly", N_RANKS, self.root / "job", arguments) as job:
            if job.results() != [True] * N_RANKS:
                self.problem(f"the ranks load other bits of step {step}")

    def run_job(self, function: str, n_ranks: int, arguments: dict, killed: int | None) -> list[int | None]:
        """Run a function, and note a problem if it ends in another way than by the death of the rank that is killed."""
        with Job(self.python, f"{JOBS}:{function}", n_ranks, self.root / "job", arguments) as job:
            codes = job.exit_codes()
            if any(codes) and (killed is None or codes[killed] != -signal.SIGKILL):
                self.problem(f"{function} ended with {codes}: {job.said()}")
            return codes

    def archived(self) -> list[str]:
        """Names of the checkpoints that are in the archive only, oldest first."""
        hot = {*list_names(LocalFolder(self.tiered / "hot" / "run"))}
        return [name for name in list_names(LocalFolder(self.tiered / "archive" / "run")) if name not in hot]

    # -- what must be true ------------------------------------------------------------------------------------------

    def look(self, job: str) -> None:
        """Load every checkpoint; then again in an older copy of the run, of which everything needless was collected."""
        run = self.saving if job in ("save", "machines") else self.tiered
        (self.look_at_saving if run is self.saving else self.look_at_tiered)(run)
        older = self.root / "older"
        shutil.rmtree(older, ignore_errors=True)
        shutil.copytree(run, older)
        if run is self.saving:
            stores = [(older / "remote", local, [Keep(last=N_KEPT)]) for local in sorted(older.glob("local-*"))]
        else:
            stores = [(older / "hot" / "run", None, [])]
        for remote, local, keeps in stores:
            tiers = {} if local is None else {"local": LocalFolder(local)}
            both = RunStores({**tiers, "remote": LocalFolder(remote)})
            Retention(both, keeps, now=lambda: time.time() + 2 * GC_AGE_S).run()
        (self.look_at_saving if run is self.saving else self.look_at_tiered)(older)
        for root in {folder for remote, local, _ in stores for folder in (remote, local) if folder is not None}:
            self.look_for_leaks(root, older)

    def look_at_saving(self, run: Path) -> None:
        n_saved = _last_saved(run)
        for local in sorted(run.glob("local-*")) or [None]:
            with warnings.catch_warnings(), tc.Checkpoints(run / "remote", local=local) as checkpoints:
                warnings.simplefilter("error")
                names = [info.name for info in checkpoints.list() if info.state == "complete"]
                self.load_all(checkpoints, names, n_saved)

    def look_at_tiered(self, run: Path) -> None:
        hot, archive = LocalFolder(run / "hot" / "run"), LocalFolder(run / "archive" / "run")
        with chdir(run), tc.Checkpoints(hot.root) as checkpoints:
            names = sorted({*list_names(hot), *list_names(archive)})
            self.load_all(checkpoints, names, _last_saved(run))
            steps = [int(name[5:17]) for name in names]
            if steps != [*range(_last_saved(run) + 1)]:
                self.problem(f"{run.name}: the steps {steps} are there of {_last_saved(run) + 1}")

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

    def look_for_leaks(self, root: Path, run: Path) -> None:
        """Compare what a folder of checkpoints has with what its checkpoints, and those that were moved, need."""
        store, used = LocalFolder(root), {RUN_NAME}
        used |= {metrics_key(name) for name in list_names(LocalFolder(run / "archive" / "run"))}
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


def _as_json(at: KillAt | None) -> dict | None:
    return None if at is None else {"point": at.point, "nth": at.nth}


def main() -> None:
    asked = rounds_asked().parse_args()
    with WarmPython() as python:
        run_and_report(Rounds(asked.folder, asked.seed, python, asked.only), asked.rounds)


if __name__ == "__main__":
    main()
