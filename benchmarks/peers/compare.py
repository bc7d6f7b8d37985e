"""The comparison: generates data, packs it for each contender, interleaves all contenders, returns a row per case.

Cold epochs take the same way, but the packed data is uploaded to an S3 server in processes of its own.
"""

from __future__ import annotations

import shutil
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from generate import generate
from ledger import Ledger
from peers.catalogue import COLD, PEERS, Peer, manner
from peers.cold_store import ColdStore, cold_store
from peers.environments import NotInstalledError, interpreter
from peers.job import USUAL, Job, cores
from peers.runner import FailedError, Runner
from rows import spread
from workloads import first_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from workloads import Workload

# Measured in each repetition, also in the one that checks.
SPREAD = ("first_batch_s", "peak_private_bytes", "idle_private_bytes")
CHECKED = ("rank_correlation", "neighbour_distance", "checked_share")
READS = ("every", "first")
# A span of the usual length holds a dozen batches of images, so that one batch more or less would be several percent.
LONGER = 3
TIMED = ("samples_per_s", "cpu_s_per_million", "wait_share")
COLD_FIGURES = ("epoch_s", "first_batch_s", "cpu_s", "samples_per_s", "sent_bytes", *CHECKED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Extent of a comparison.

    Attributes:
        folder: Folder for data, packed data and logs.
        environments: Folder of the virtual environments.
        peers: Names of the contenders.
        shuffles: Orders that are run: "none", "full", "default".
        workers: Numbers of workers to try; the fastest is used.
        repetitions: Number of repetitions of each case.
        min_s: Seconds of a timing.
        check_s: Maximum seconds of the checked epoch, once per case.
        timeout_s: Timeout of a child process in seconds.
        reuse: Whether existing packed data is used.
        resume: Whether results of an earlier run with the same folder are used.
    """

    folder: Path
    environments: Path
    peers: tuple[str, ...]
    shuffles: tuple[str, ...]
    workers: tuple[int, ...]
    repetitions: int
    min_s: float
    check_s: float
    timeout_s: float
    reuse: bool
    resume: bool


@dataclass(frozen=True, slots=True)
class Case:
    """One row: a contender in one of its ways. python: None if it cannot be run, with the reason."""

    job: Job
    python: Path | None
    missing: str = ""

    @property
    def name(self) -> str:
        """Name in the output."""
        job = self.job
        said = (f"{job.workload.name}: {PEERS[job.peer].title}", f"shuffle {job.shuffle}", manner(job.shown_form))
        return ", ".join(filter(None, said))


class Tasks:
    """Runs tasks in processes of their own, or returns results from the ledger."""

    def __init__(self, plan: Plan) -> None:
        self._runner = Runner(plan.folder / "logs", plan.timeout_s)
        self._ledger = Ledger(plan.folder / "ledger.jsonl", resume=plan.resume)
        self._folder = plan.folder
        self._store: ColdStore | None = None

    @contextmanager
    def store(self) -> Iterator[ColdStore]:
        """Run an S3 server inside the block, which tasks with a URL read."""
        with cold_store(self._folder / "server") as store:
            self._store = store
            yield store
        self._store = None

    def known(self, job: Job, repetition: int = 0) -> dict[str, Any] | None:
        """Return the stored result of a task, if any."""
        return self._ledger.get(_task(job, repetition))

    def run(self, python: Path, job: Job, repetition: int = 0) -> dict[str, Any]:
        """Return the result of a task.

        Raises:
            FailedError: The task failed. Failures are not stored, so another run tries again.
        """
        if self._store is not None and job.url:
            found = self._store.run(self._runner, python, job)
        else:
            found = self._runner.run(python, job)
        self._ledger.put(_task(job, repetition), found)
        return found


def _task(job: Job, repetition: int) -> list[Any]:
    """Return the key of a task, without the places of its data, which may move."""
    key = replace(job, source_folder="", folder="", library_folder="").as_json()
    return [{name: value for name, value in key.items() if name not in ("url", "cache_folder")}, repetition]


def compare(workload: Workload, plan: Plan, tasks: Tasks) -> list[dict[str, Any]]:
    """Return all rows of a workload: per contender (packing) and per case (loading), even without figures.

    The workload of a row has the records that its contender got; whole_records are those of the other contenders.
    """
    generate(workload, plan.folder / "data" / workload.name)
    with tasks.store() if workload.name == COLD else nullcontext() as store:
        return _compare(workload, plan, tasks, store)


def _compare(workload: Workload, plan: Plan, tasks: Tasks, store: ColdStore | None) -> list[dict[str, Any]]:
    rows, running = [], []
    for name in plan.peers:
        if workload.name not in PEERS[name].workloads:
            continue
        case, packed = pack(_job(name, workload, plan), PEERS[name], plan, tasks)
        rows.append({"benchmark": "pack", **_fixed(case), **packed})
        if "records_per_s" in packed:
            _say(f"{workload.name}: {PEERS[name].title}, packed: {packed['records_per_s']:,.0f} records/s")
        if store is not None and not case.missing:
            case = replace(case, job=replace(case.job, url=store.upload(case.job.path, name)))
        workers: dict[str, Case] = {}
        for found in cases(case, plan):
            ready = found if found.missing else tuned(found, workers, plan, tasks)
            if ready.missing:
                _say(f"{ready.name}: {ready.missing}")
                rows.append({"benchmark": _benchmark(ready), **_fixed(ready), "missing": ready.missing})
            else:
                running.append(ready)
    rows += measure(running, plan, tasks)
    return [{**row, "whole_records": workload.n_records} for row in rows]


def _job(name: str, workload: Workload, plan: Plan) -> Job:
    mine = first_of(workload, PEERS[name].fewer.get(workload.name, workload.n_records))
    # Data packed with another number of records for the same contender must not be reused.
    place = workload.name if mine == workload else f"{workload.name}-{mine.n_records}"
    return Job(
        task="pack",
        peer=name,
        workload=mine,
        source_folder=str(plan.folder / "data" / workload.name),
        folder=str(plan.folder / "packed" / name / place),
        library_folder=str(plan.folder),
        cache_folder=str(plan.folder / "cache"),
        min_s=plan.min_s * (LONGER if workload.pictures else 1),
        check_s=0.0,
    )


def _benchmark(case: Case) -> str:
    return "cold" if case.job.workload.name == COLD else "load"


def _fixed(case: Case) -> dict[str, Any]:
    job, cache = case.job, "cold" if case.job.workload.name == COLD else "warm"
    fixed = {"peer": job.peer, "title": PEERS[job.peer].title, "workload": job.workload.as_json(), "cache": cache}
    return {**fixed, "shuffle": job.shuffle, "form": job.shown_form, "workers": job.workers}


def _say(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


def pack(job: Job, peer: Peer, plan: Plan, tasks: Tasks) -> tuple[Case, dict[str, Any]]:
    """Return a contender with its environment made and its data packed, and the row of the packing."""
    done, task = job.path.with_name(f"{job.path.name}.done"), replace(job, min_s=0.0)
    try:
        python = interpreter(job.peer, peer, plan.environments)
        found = tasks.known(task) if done.exists() else None
        if found is None and plan.reuse and done.exists():
            return Case(job, python), {"missing": "packed before"}
        if found is None:
            done.unlink(missing_ok=True)
            found = tasks.run(python, task)
    except (NotInstalledError, FailedError) as error:
        _say(f"{peer.title}: {error}")
        return Case(job, None, str(error)), {"missing": str(error)}
    if job.path.exists():
        done.touch()
    if "unsupported" in found:
        return Case(job, None, found["unsupported"]), {"missing": found["unsupported"]}
    return Case(job, python), found if "records_per_s" in found else {"missing": "reads the generated records"}


def forms(peer: Peer, workload: Workload) -> tuple[str, ...]:
    """Return the layouts of a contender's jobs for a workload."""
    if workload.varied:
        return peer.forms
    return (USUAL, *peer.picture_forms) if workload.pictures else (USUAL,)


def cases(packed: Case, plan: Plan) -> Iterator[Case]:
    """Yield the ways in which a contender is run."""
    peer = PEERS[packed.job.peer]
    for shuffle in plan.shuffles:
        if shuffle in peer.shuffles:
            for form in forms(peer, packed.job.workload):
                yield replace(packed, job=replace(packed.job, task="measure", shuffle=shuffle, form=form))


def tuned(case: Case, chosen: dict[str, Case], plan: Plan, tasks: Tasks) -> Case:
    """Return the case with the number of workers that is fastest in a short run; missing if none runs.

    chosen: Results so far. Layouts share them, and so do orders, unless they are read in different ways: cold epochs of
        every kind of shuffle, and of some contenders the shuffled ones.
    """
    peer, job = PEERS[case.job.peer], case.job
    key = job.shuffle if job.url else str(job.shuffled and peer.tuned == "orders")
    able = [workers for workers in plan.workers if workers >= peer.min_workers] or [cores()]
    candidates = [0] if peer.tuned == "never" else able
    if case.python is None or len(candidates) == 1:
        return replace(case, job=replace(job, workers=candidates[0]))
    if key in chosen:
        return replace(case, job=replace(job, workers=chosen[key].job.workers))
    rates, why = {}, "no number of workers was tried"
    for workers in candidates:
        task = replace(job, task="tune", workers=workers, min_s=0.0)
        try:
            found = tasks.known(task) or tasks.run(case.python, task)
        except FailedError as error:
            why = str(error)
            continue
        if "unsupported" in found:
            why = found["unsupported"]
        else:
            rates[workers] = found["samples_per_s"]
    if not rates:
        return replace(case, python=None, missing=why)
    chosen[key] = replace(case, job=replace(job, workers=max(rates, key=rates.__getitem__)))
    return chosen[key]


def measure(running: Sequence[Case], plan: Plan, tasks: Tasks) -> list[dict[str, Any]]:
    """Return a row for each case; cases are interleaved, so that disturbances affect all of them alike."""
    found: dict[int, list[dict[str, Any]]] = {i: [] for i in range(len(running))}
    missing: dict[int, str] = {}
    for repetition in range(plan.repetitions):
        for i, case in enumerate(running):
            if i in missing:
                continue
            result = _repetition(case, repetition, plan, tasks)
            if "unsupported" in result:
                missing[i] = result["unsupported"]
                _say(f"{case.name}: {missing[i]}")
                continue
            found[i].append(result)
            rate = result.get("every", result)["samples_per_s"]
            _say(f"{case.name}, {repetition + 1}/{plan.repetitions}: {rate:,.0f} samples/s")
    return [
        {
            "benchmark": _benchmark(case),
            **_fixed(case),
            **({"missing": missing[i]} if i in missing else _summary(found[i])),
        }
        for i, case in enumerate(running)
    ]


def _repetition(case: Case, repetition: int, plan: Plan, tasks: Tasks) -> dict[str, Any]:
    """Return the result of one repetition. The first one checks each record; all of them check counts and sums."""
    task = replace(case.job, check_s=0.0 if repetition else plan.check_s)
    found = tasks.known(task, repetition)
    if found is not None or case.python is None:
        return found or {"unsupported": case.missing}
    try:
        return tasks.run(case.python, task, repetition)
    except FailedError as error:
        return {"unsupported": str(error)}


def _summary(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    if "every" not in results[0]:
        return _cold_summary(results)
    timed = {f"{name}.{read}": spread([r[read][name] for r in results]) for read in READS for name in TIMED}
    others = {name: spread([result[name] for result in results]) for name in SPREAD}
    checked = {name: spread([result[name] for result in results if name in result]) for name in CHECKED}
    return {
        "repetitions": len(results),
        "note": results[0]["note"],
        "version": results[0]["version"],
        **others,
        **checked,
        **timed,
    }


def _cold_summary(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    figures = {name: spread([r[name] for r in results]) for name in COLD_FIGURES if name in results[0]}
    return {"repetitions": len(results), "note": results[0]["note"], "version": results[0]["version"], **figures}


def drop(plan: Plan) -> None:
    """Remove the generated and the packed data, and local copies of it."""
    for name in ("data", "packed", "cache"):
        if (plan.folder / name).exists():
            shutil.rmtree(plan.folder / name)
