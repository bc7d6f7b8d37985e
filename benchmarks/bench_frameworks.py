"""Loader speed when a framework rebuilds the loader, compared with the native path and with torch's DataLoader.

    python benchmarks/bench_frameworks.py [--repetitions 7] [--quick] [--folder benchmarks/out/frameworks]

Whole shuffled epochs of the same records in one process; the ways are interleaved in each repetition. Reported are the
median records per second and the ratio to torch's DataLoader over a map-style data set with the same records in memory.
The bytes of a batch are not read: the benchmark compares the overhead of each way.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

import tiercache as tc
from bench_records import Memmap, pack
from generate import generate
from rows import OUT, spread, table, write_rows
from tiercache.integrations.accelerate import prepare
from workloads import ROWS, TOKENS, Workload, scaled

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

BASE = "torch's loader, records in memory"


def columns_removed(records: Sequence[dict[str, Any]]) -> Any:
    """Collate as Hugging Face's Trainer does by default: a new dict for each record, then the collate function."""
    return tc.collate([dict(record) for record in records])


def ways(dataset: tc.Dataset, plain: Memmap, batch_size: int) -> dict[str, Iterable[Any]]:
    """Return the iterables that are compared, by name."""
    accelerator = Accelerator(cpu=True)

    def ours(**chosen: Any) -> tc.DataLoader:
        return tc.DataLoader(dataset, batch_size, **chosen)

    return {
        "native path": ours(shuffle=True),
        "integrations.accelerate.prepare": prepare(ours(shuffle=True), accelerator),
        "accelerator.prepare": accelerator.prepare(ours(shuffle=True)),
        "tc.DataLoader with a DistributedSampler": ours(sampler=DistributedSampler(dataset, 1, 0)),
        "torch's loader, tc.collate": DataLoader(dataset, batch_size, shuffle=True, collate_fn=tc.collate),
        "torch's loader, columns removed": DataLoader(dataset, batch_size, shuffle=True, collate_fn=columns_removed),
        BASE: DataLoader(plain, batch_size, shuffle=True),
    }


def records_per_s(batches: Iterable[Any], n_records: int) -> float:
    """Return the records per second of one epoch, which must have n_records records."""
    begin = time.perf_counter()
    n_found = sum(len(next(iter(batch.values()))) for batch in batches)
    seconds = time.perf_counter() - begin
    if n_found != n_records:
        raise ValueError(f"{n_found} records instead of {n_records}")
    return n_records / seconds


def measure(workload: Workload, folder: Path, repetitions: int) -> dict[str, Any]:
    """Return the row of a workload: records per second of each way."""
    source = generate(workload, folder / f"{workload.name}-source")
    dataset = tc.Dataset(pack(source, folder / f"{workload.name}-{workload.n_records}"))
    compared = ways(dataset, Memmap(source, in_memory=True), workload.batch_size)
    found: dict[str, list[float]] = {name: [] for name in compared}
    for repetition in range(repetitions + 1):
        for name, batches in compared.items():
            figure = records_per_s(batches, len(dataset))
            if repetition:  # The first epoch touches and checks the pages.
                found[name].append(figure)
    dataset.close()
    speeds = {name: spread(figures) for name, figures in found.items()}
    return {"benchmark": "frameworks", "workload": workload.as_json(), "records_per_s": speeds}


def report(rows: Sequence[dict[str, Any]]) -> str:
    """Return a table: thousands of records per second, and the ratios to torch's DataLoader and the native path."""
    lines = []
    for row in rows:
        speeds = {name: figures["median"] for name, figures in row["records_per_s"].items()}
        for name, speed in speeds.items():
            shares = (f"{speed / 1e3:,.0f}", f"{speed / speeds[BASE]:.1f}", f"{speed / speeds['native path']:.2f}")
            lines.append((f"{row['workload']['name']}: {name}", *shares))
    return table(["way", "1000 records/s", "x torch's", "of native"], lines)


def main() -> None:
    """Measure, print and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="Smoke test: small data, two repetitions.")
    parser.add_argument("--scale", type=float, default=0.05, help="Factor on the numbers of records of the workloads.")
    parser.add_argument("--folder", type=Path, default=OUT / "frameworks")
    given = parser.parse_args()
    torch.set_num_threads(1)
    scale, repetitions = (0.002, 2) if given.quick else (given.scale, given.repetitions)
    rows = [measure(scaled(workload, scale), given.folder, repetitions) for workload in (TOKENS, ROWS)]
    write_rows(given.folder / "frameworks.jsonl", rows)
    print(report(rows))


if __name__ == "__main__":
    main()
