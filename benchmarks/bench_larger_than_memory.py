"""A data set three times as large as the available memory, with fully shuffled groups, read from a cold disk.

    python benchmarks/bench_larger_than_memory.py [--limit-mib 512] [--times 3] [--window-mib 64] [--repetitions 3]

Each epoch runs in a process of its own in a control group with a memory limit, after all pages of the data set were
dropped: with page prefetch, without it, and, as the baseline, large sequential reads of the same files. The output has
MB/s and the major faults (waits for the disk) of the process.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import tiercache as tc
from rows import OUT, spread, table, write_rows
from support import MemoryGroup, NoCgroup, drop_pages, memory_group
from tiercache.load.windows import PagePrefetcher

RECORD_BYTES = 2048
READ_BYTES = 4 << 20
BATCH = 256
# A way that waits for the disk at each record is stopped after this time.
LONGEST_S = 20.0
WAYS = ("ahead", "not_ahead", "sequential")


def write(folder: Path, n_bytes: int) -> int:
    """Pack uncompressed records of random bytes that contain their number. Return their count."""
    n, step = n_bytes // RECORD_BYTES, 4096
    schema = {"id": "int64", "content": tc.Tensor("uint8", (RECORD_BYTES - 8,))}
    random = np.random.default_rng(0)
    with tc.Writer(folder, schema=schema, shard_size="64MiB", compression="none") as writer:
        for first in range(0, n, step):
            ids = np.arange(first, min(first + step, n))
            content = random.integers(0, 256, (len(ids), RECORD_BYTES - 8), np.uint8)
            writer.write_batch({"id": ids, "content": content})
    return n


def load(url: str, window_mib: str) -> int:
    """Read an epoch, or as much as LONGEST_S allows, with the loader. Return the number of records, all distinct."""
    stop_s = time.perf_counter() + LONGEST_S
    options = tc.LoaderOptions(
        seed=1, shuffle_group_bytes="all", shuffle_window_bytes="all" if window_mib == "all" else f"{window_mib}MiB"
    )
    dataset = tc.Dataset(url)
    seen = np.zeros(len(dataset), np.uint8)
    for batch in tc.DataLoader(dataset, batch_size=BATCH, shuffle=True, options=options):
        seen[batch["id"].numpy()] += 1
        if time.perf_counter() > stop_s:
            break
    else:
        if not seen.all():
            raise RuntimeError("a record was not served")
    dataset.close()
    if seen.max() > 1:
        raise RuntimeError("a record was served twice")
    return int(seen.sum())


def read(url: str) -> int:
    """Read every file sequentially. Return the number of records that would fit."""
    memory, n_bytes = memoryview(bytearray(READ_BYTES)), 0
    for path in sorted(Path(url).rglob("*.tcs")):
        with path.open("rb", buffering=0) as file:
            while n_read := file.readinto(memory):
                n_bytes += n_read
    return n_bytes // RECORD_BYTES


def child(way: str, url: str, window_mib: str) -> None:
    """Measure one way in this process and print a row."""
    if way == "not_ahead":
        PagePrefetcher.prefetch_pages = lambda *_: []  # There is no option for it, because no user needs one.
    before, start_s = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    n_records = read(url) if way == "sequential" else load(url, window_mib)
    wall_s, after = time.perf_counter() - start_s, resource.getrusage(resource.RUSAGE_SELF)
    row = {"way": way, "wall_s": wall_s, "mb_s": n_records * RECORD_BYTES / wall_s / 1e6}
    print(json.dumps({**row, "major_faults": after.ru_majflt - before.ru_majflt, "peak_rss_kib": after.ru_maxrss}))


def measure(group: MemoryGroup, folder: Path, way: str, window_mib: str) -> dict[str, float]:
    """Measure one cold epoch."""
    drop_pages(folder)
    command = group.command([sys.executable, __file__, "--child", way, str(folder), window_mib])
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure, print and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit-mib", type=int, default=512)
    parser.add_argument(
        "--times", type=float, default=3.0, help="Size of the data set, in multiples of the memory limit."
    )
    parser.add_argument("--window-mib", default="64", help="Size of a window in MiB, or all.")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="Folder on the disk to measure.")
    parser.add_argument("--child", nargs=3, default=None, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(*given.child)
        return
    limit_bytes = given.limit_mib << 20
    try:
        with memory_group(limit_bytes) as group, tempfile.TemporaryDirectory(dir=given.folder) as name:
            folder = Path(name) / "data"
            write(folder, int(limit_bytes * given.times))
            rows = [measure(group, folder, way, given.window_mib) for _ in range(given.repetitions) for way in WAYS]
    except NoCgroup as error:
        print(f"skipped: {error}")
        return
    facts = {"limit_bytes": limit_bytes, "window_mib": given.window_mib, "times": given.times}
    write_rows(OUT / "larger_than_memory.jsonl", [{**facts, **row} for row in rows])
    report(rows)


def report(rows: list[dict[str, float]]) -> None:
    """Print medians, and speeds relative to the sequential read."""
    of = {way: [row for row in rows if row["way"] == way] for way in WAYS}
    speeds = {way: spread([row["mb_s"] for row in of[way]]) for way in WAYS}
    lines = [
        [
            way,
            *(f"{speeds[way][figure]:.0f}" for figure in ("min", "median", "max")),
            f"{speeds[way]['median'] / speeds['sequential']['median']:.2f}",
            f"{statistics.median(row['major_faults'] for row in of[way]):.0f}",
        ]
        for way in WAYS
    ]
    print(table(["way", "MB/s min", "median", "max", "of sequential", "major faults"], lines))


if __name__ == "__main__":
    main()
