"""Loaders on fixed-shape records, local, warm, fully shuffled: ours, torch's DataLoader and a plain C gather.

    python benchmarks/bench_loader.py [--repetitions 5] [--workload tokens] [--read first] [--quick]

Contenders run in turn, each in a process of its own, with default options; what is compared are medians of one run.
Each process first reads an epoch that is not timed and compares every record with what was written; the timed epochs
are read to the last byte (summed as 8-byte words), and their sums and counts are compared after. torch's loader reads a
map-style data set in memory with each of several numbers of workers; the best one counts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tiercache as tc
from rows import OUT, spread, table, write_rows
from workloads import WORKLOADS, Workload, generate

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

CHILD = Path(__file__).with_name("contenders.py")
MEASURES = ("samples_per_s", "bytes_per_s", "cpu_s_per_million", "wait_share")


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is run. workers: the numbers of workers that torch's loader is tried with; min_s: of a timing."""

    repetitions: int
    workers: tuple[int, ...]
    min_s: float
    read: str
    folder: Path


def pack(workload: Workload, folder: Path) -> None:
    """Make the data set of the generated columns, unless it is there already."""
    packed, done = folder / "packed", folder / "packed.done"
    if done.exists() and done.read_text() == (folder / "done").read_text():
        return
    columns = workload.columns(folder)
    schema = {"values": tc.Tensor(workload.dtype, workload.shape), "label": "int64"}
    step = max((32 << 20) // workload.record_bytes, 1)
    mode = "overwrite" if packed.exists() else "create"
    with tc.Writer(packed, schema=schema, mode=mode) as writer:
        for start in range(0, workload.n_records, step):
            writer.write_batch({name: column[start : start + step] for name, column in columns.items()})
    done.write_text((folder / "done").read_text())


def run_child(workload: Workload, contender: str, workers: int, plan: Plan) -> dict[str, Any]:
    """One repetition of one contender. Raises CalledProcessError when it failed or served wrong records."""
    job = {
        "contender": contender,
        "workers": workers,
        "workload": asdict(workload),
        "folder": str(plan.folder / workload.name),
        "library_folder": str(plan.folder),
        "read": plan.read,
        "min_s": plan.min_s,
    }
    child = subprocess.run([sys.executable, str(CHILD), json.dumps(job)], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(child.stdout.splitlines()[-1])


def cases(plan: Plan) -> Iterator[tuple[str, str, int]]:
    """(case, contender, workers) in the order they take turns in."""
    yield "tiercache", "tiercache", 0
    for workers in plan.workers:
        yield f"torch, {workers} workers", "torch", workers
    yield "C floor", "floor", 0


def measure(workload: Workload, plan: Plan) -> list[dict[str, Any]]:
    """A row for each case of a workload."""
    found: dict[str, list[dict[str, Any]]] = {}
    for repetition in range(plan.repetitions):
        for case, contender, workers in cases(plan):
            found.setdefault(case, []).append(run_child(workload, contender, workers, plan))
            rate = found[case][-1]["samples_per_s"]
            print(
                f"  {workload.name} {repetition + 1}/{plan.repetitions} {case}: {rate:,.0f} samples/s", file=sys.stderr
            )
    fixed = {"benchmark": "loader", "workload": asdict(workload), "read": plan.read, "cache": "warm", "shuffle": "all"}
    return [
        {
            **fixed,
            "case": case,
            "repetitions": len(results),
            "epochs_per_repetition": [result["epochs"] for result in results],
            **{name: spread([result[name] for result in results]) for name in MEASURES},
        }
        for case, results in found.items()
    ]


def report(workload: Workload, rows: Sequence[dict[str, Any]]) -> str:
    """A table of one workload's rows, and the two ratios that count."""
    rates = {row["case"]: row["samples_per_s"]["median"] for row in rows}
    best_torch = max((case for case in rates if case.startswith("torch")), key=rates.__getitem__)
    lines = [
        [
            row["case"],
            f"{row['samples_per_s']['median'] / 1e3:,.1f}",
            f"{row['samples_per_s']['min'] / 1e3:,.1f} - {row['samples_per_s']['max'] / 1e3:,.1f}",
            f"{row['bytes_per_s']['median'] / 1e9:.2f}",
            f"{row['cpu_s_per_million']['median']:.2f}",
            f"{row['wait_share']['median']:.0%}",
            f"{rates[row['case']] / rates[best_torch]:.2f}",
            f"{rates[row['case']] / rates['C floor']:.2f}",
        ]
        for row in rows
    ]
    titles = ["case", "k samples/s", "min - max", "GB/s", "CPU s/M", "waiting", "x torch", "x floor"]
    ours = rates["tiercache"]
    record = f"{workload.dtype}{list(workload.shape)} + int64 label"
    above = f"{workload.name}: {workload.n_records:,} records of {record}, batch {workload.batch_size}"
    ratios = (
        f"{ours / rates[best_torch]:.2f} x torch's best ({best_torch}), {ours / rates['C floor']:.0%} of the C floor"
    )
    return f"\n{above}, read: {rows[0]['read']}\n{table(titles, lines)}\ntiercache: {ratios}"


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--workload", choices=[*WORKLOADS], action="append", help="default: all")
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[0, 1, 2, 4], help="that torch's loader is tried with"
    )
    parser.add_argument("--read", choices=["every", "first"], default="every", help="bytes of each batch that are read")
    parser.add_argument("--folder", type=Path, default=OUT / "loader", help="for the data (2 GB) and the rows")
    parser.add_argument("--quick", action="store_true", help="a smoke test: few records, one repetition; no figures")
    return parser.parse_args()


def main() -> None:
    """Make the data, run the contenders in turn, print the tables and write the rows."""
    given = arguments()
    plan = Plan(given.repetitions, tuple(given.workers), 1.5, given.read, given.folder)
    chosen = [WORKLOADS[name] for name in given.workload or WORKLOADS]
    if given.quick:
        plan = replace(plan, repetitions=1, workers=(0,), min_s=0.0)
        chosen = [replace(workload, n_records=4 * workload.batch_size + 3) for workload in chosen]
    rows = []
    for workload in chosen:
        generate(workload, plan.folder / workload.name)
        pack(workload, plan.folder / workload.name)
        rows.append(measure(workload, plan))
        print(report(workload, rows[-1]), flush=True)
    path = plan.folder / "loader.jsonl"
    write_rows(path, [row for group in rows for row in group])
    print(f"\nrows: {path}")


if __name__ == "__main__":
    main()
