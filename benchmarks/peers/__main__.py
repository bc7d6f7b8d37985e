"""Compare tiercache with other libraries: `python -m peers` in the benchmarks' folder, or `make bench-peers`.

Each library runs in processes of its own, in an environment of its own that is made on first use. Each repetition first
checks each record of an epoch that is not timed, then times epochs of which every byte is read, and epochs whose
batches are only touched. docs/benchmarks.md describes the method.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peers import report
from peers.catalogue import ALL, PEERS, PLOTS
from peers.compare import Plan, Tasks, compare, drop
from peers.environments import NotInstalledError, interpreter
from peers.job import cores
from peers.runner import BENCHMARKS
from rows import OUT, machine, write_rows
from workloads import WORKLOADS, scaled

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

QUICK_SCALE = 0.0
QUICK_PEERS = ("tiercache", "torch_map", "numpy_memmap", "c_floor", "obstore_floor")


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="peers", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--only", nargs="+", choices=[*PEERS], metavar="PEER", help=f"Contenders to run, of {', '.join(PEERS)}."
    )
    parser.add_argument("--workload", nargs="+", choices=[*WORKLOADS], default=[*WORKLOADS])
    parser.add_argument(
        "--shuffle", nargs="+", choices=ALL, default=[*ALL], help="Orders to run; default is the library's own shuffle."
    )
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument(
        "--scale", type=float, default=1.0, help="Factor on the numbers of records; 1 is 1.5 GB of data."
    )
    parser.add_argument(
        "--workers", type=int, nargs="+", help="Numbers of workers to try. Default: 0 and one per core."
    )
    parser.add_argument("--min-s", type=float, default=0.5, help="Seconds of a timing.")
    parser.add_argument("--check-s", type=float, default=8.0, help="Maximum seconds of the checked epoch.")
    parser.add_argument("--timeout", type=float, default=900.0, help="Timeout of one task in seconds.")
    parser.add_argument("--folder", type=Path, default=OUT / "peers", help="Folder for data, logs, rows and tables.")
    parser.add_argument(
        "--environments", type=Path, default=OUT / "envs", help="Folder for the contenders' environments."
    )
    parser.add_argument("--reuse", action="store_true", help="Use existing packed data; no figures for packing.")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="Continue an interrupted run, or add to a run that was started with --keep.",
    )
    parser.add_argument("--keep", action="store_true", help="Keep the data after the run.")
    parser.add_argument("--plots", action="store_true", help="Also draw plots; makes an environment with matplotlib.")
    parser.add_argument("--quick", action="store_true", help="Smoke test: few records, and no meaningful figures.")
    return parser.parse_args(given)


def plan_of(given: argparse.Namespace) -> Plan:
    """Return the plan of the command line."""
    quick = given.quick
    return Plan(
        folder=given.folder.resolve(),
        environments=given.environments.resolve(),
        peers=tuple(given.only or (QUICK_PEERS if quick else PEERS)),
        shuffles=tuple(given.shuffle),
        workers=tuple((given.workers or [0])[:1] if quick else given.workers or (0, cores())),
        repetitions=1 if quick else given.repetitions,
        min_s=0.0 if quick else given.min_s,
        check_s=given.check_s,
        timeout_s=given.timeout,
        reuse=given.reuse,
        resume=given.resume,
    )


def merged(rows: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return all rows, with new rows in place of old ones of the same case."""

    def case(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["benchmark"], row["peer"], row["shuffle"], row["form"], row["workload"]["name"]

    replaced = {case(row) for row in new}
    return [*(row for row in rows if case(row) not in replaced), *new]


def durations(took_s: Mapping[str, float]) -> str:
    """Return the duration of each workload and of all. took_s: Seconds by name."""
    every = {**took_s, "all": sum(took_s.values())}
    return "took " + ", ".join(f"{name} {seconds / 60:.1f} min" for name, seconds in every.items())


def draw(plan: Plan) -> None:
    """Draw the rows with matplotlib, which is in an environment of its own."""
    try:
        python = interpreter("plots", PLOTS, plan.environments)
    except NotInstalledError as error:
        print(f"no plots: {error}")
        return
    subprocess.run([str(python), "-m", "peers.plots", str(plan.folder / "peers.jsonl")], check=True, cwd=BENCHMARKS)


def main(arguments_given: list[str] | None = None) -> None:
    """Run the comparison, print the tables, write the rows."""
    given = arguments(arguments_given)
    plan, scale = plan_of(given), QUICK_SCALE if given.quick else given.scale
    path, tasks = plan.folder / "peers.jsonl", Tasks(plan)
    rows = report.read(path) if plan.resume and path.exists() else []
    took_s: dict[str, float] = {}
    for name in given.workload:
        started = time.perf_counter()
        new = [{**machine(), **row} for row in compare(scaled(WORKLOADS[name], scale), plan, tasks)]
        rows = merged(rows, new)
        write_rows(path, rows)
        took_s[name] = time.perf_counter() - started
    text = report.markdown(report.read(path))
    (plan.folder / "peers.md").write_text(text)
    print(text)
    if given.plots:
        draw(plan)
    if not given.keep:
        drop(plan)
    print(f"rows and tables: {plan.folder}")
    print(durations(took_s), file=sys.stderr)


if __name__ == "__main__":
    main()
