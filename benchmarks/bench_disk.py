"""Speed of a disk past the page cache: writing alone, reading alone, and both concurrently.

    python benchmarks/bench_disk.py [--folder DIR] [--megabytes 512] [--repetitions 5] [--quick]

It decides whether a copy can be read back while the next one is written: if a disk has one total speed for both
directions, reading back costs as much as writing. The ways are interleaved; written files are synced.
"""

from __future__ import annotations

import argparse
import mmap
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rows import OUT, spread, table, write_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PART_BYTES = 8 << 20
THREADS = (1, 2, 4)
TITLES = ("threads", "writing alone MB/s", "reading alone MB/s", "both at once, each MB/s")


def memory() -> memoryview:
    """Return page-aligned memory of one part with random bytes."""
    pages = mmap.mmap(-1, PART_BYTES)
    pages.write(os.urandom(PART_BYTES))
    return memoryview(pages)


def write(path: Path, n_parts: int, n_threads: int, buffers: Sequence[memoryview]) -> None:
    """Write a new file and sync it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_DIRECT)
    try:
        with ThreadPoolExecutor(n_threads) as pool:
            list(pool.map(lambda n: os.pwrite(fd, buffers[n % len(buffers)], n * PART_BYTES), range(n_parts)))
        os.fsync(fd)
    finally:
        os.close(fd)


def read(path: Path, n_parts: int, n_threads: int, buffers: Sequence[memoryview]) -> None:
    """Read a whole file. The content is not examined, so threads may share memory."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        with ThreadPoolExecutor(n_threads) as pool:
            list(pool.map(lambda n: os.preadv(fd, [buffers[n % len(buffers)]], n * PART_BYTES), range(n_parts)))
    finally:
        os.close(fd)


def measure(folder: Path, n_parts: int, n_threads: int, repetitions: int) -> dict[str, Any]:
    """Return the bytes per second of the three ways."""
    source, target = folder / "source", folder / "target"
    noise, landing = [memory() for _ in range(n_threads)], [memory() for _ in range(n_threads)]
    write(source, n_parts, n_threads, noise)

    def both() -> None:
        with ThreadPoolExecutor(1) as other:
            writing = other.submit(write, target, n_parts, n_threads, noise)
            read(source, n_parts, n_threads, landing)
            writing.result()

    ways: dict[str, Callable[[], None]] = {
        "write": lambda: write(target, n_parts, n_threads, noise),
        "read": lambda: read(source, n_parts, n_threads, landing),
        "both": both,
    }
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repetitions):
        for name, way in ways.items():
            target.unlink(missing_ok=True)
            os.sync()
            start_s = time.perf_counter()
            way()
            speeds[name].append(n_parts * PART_BYTES / (time.perf_counter() - start_s))
    return {"benchmark": "disk", "n_threads": n_threads, **{name: spread(found) for name, found in speeds.items()}}


def main(given: list[str] | None = None) -> None:
    """Measure, print a table, write the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--folder", type=Path, default=OUT / "disk", help="Folder on the disk to measure.")
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="Smoke test: little data, and no meaningful figures.")
    asked = parser.parse_args(given)
    n_parts, repetitions = (2, 1) if asked.quick else (max((asked.megabytes << 20) // PART_BYTES, 1), asked.repetitions)
    data = asked.folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    try:
        rows = [measure(data, n_parts, n_threads, repetitions) for n_threads in THREADS]
    finally:
        shutil.rmtree(data)
    lines = [
        [str(row["n_threads"]), *(f"{row[name]['median'] / 1e6:,.0f}" for name in ("write", "read", "both"))]
        for row in rows
    ]
    print(table(TITLES, lines))
    write_rows(asked.folder / "disk.jsonl", rows)
    print(f"rows: {asked.folder / 'disk.jsonl'}")


if __name__ == "__main__":
    main()
