"""Writing a data set: write_batch() and write(), compared with disk, checksum and numpy on the same bytes.

    python benchmarks/bench_write.py [--workload tokens ...] [--megabytes 512] [--repetitions 5] [--quick]

The records are in memory, as arrays, bytes and str, and are written repeatedly until the requested size is reached. All
files are durable when the clock stops (fsync), and the disk is idle when it starts. The ways are interleaved, and each
repetition begins with another one.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import tiercache as tc
from generate import generate
from rows import OUT, spread, table, write_rows
from source import PIECE_BYTES
from tiercache._native.checksum import crc32c
from workloads import KEY, WORKLOADS, Workload, scaled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DEFAULT = ("tokens", "bytes", "tensors", "rows")
PART_BYTES = 8 << 20
QUICK_BYTES = 1 << 20
COLUMN_TYPES = {"bytes": "bytes", "text": "str", "jpeg": "bytes"}
TITLES = ("way", "k records/s", "MB/s", "min - max", "x disk", "CPU s / GB")


@dataclass(frozen=True)
class Piece:
    """Records in memory that are written `rounds` times.

    columns: For write_batch(). records: The same records for write(). flat: The same bytes in one array.
    """

    workload: Workload
    columns: dict[str, Any]
    records: list[dict[str, Any]]
    flat: np.ndarray
    rounds: int

    @property
    def n_records(self) -> int:
        """Total number of records that a way writes."""
        return len(self.records) * self.rounds

    @property
    def n_bytes(self) -> int:
        """Total size of the values that a way writes."""
        return self.flat.nbytes * self.rounds

    @property
    def schema(self) -> dict[str, Any]:
        """The columns as a tiercache schema."""
        fields = self.workload.fields
        types = {f.name: COLUMN_TYPES.get(f.kind) or tc.Tensor(f.dtype, f.shape) for f in fields}
        return {**types, KEY: "int64"}


def load(workload: Workload, n_bytes: int, folder: Path) -> Piece:
    """Load the first n_bytes of a workload."""
    piece_bytes = min(n_bytes, PIECE_BYTES)
    small = scaled(workload, piece_bytes / workload.record_bytes / workload.n_records)
    found = generate(small, folder / "data" / small.name).batch(0, small.n_records)
    columns = {name: value if isinstance(value, list) else np.array(value) for name, value in found.items()}
    names = list(columns)
    plain = {**columns, KEY: columns[KEY].tolist()}
    records = [dict(zip(names, values, strict=True)) for values in zip(*plain.values(), strict=True)]
    flat = np.concatenate([flat_bytes(value) for value in columns.values()])
    return Piece(small, columns, records, flat, max(round(n_bytes / flat.nbytes), 1))


def flat_bytes(values: Any) -> np.ndarray:
    """Return the bytes of a column."""
    if isinstance(values, np.ndarray):
        return values.reshape(-1).view(np.uint8)
    return np.frombuffer(b"".join(v.encode() if isinstance(v, str) else v for v in values), np.uint8)


def write_disk(piece: Piece, folder: Path) -> None:
    """Write one file with large writes and fsync: the speed of the disk."""
    with synced(folder / "disk") as fd:
        for _ in range(piece.rounds):
            for start in range(0, piece.flat.nbytes, PART_BYTES):
                os.write(fd, piece.flat[start : start + PART_BYTES])


def copy_sum_write(piece: Piece, folder: Path) -> None:
    """Copy each part to a buffer, checksum it and write it: the minimum for a writer with checksums."""
    buffer = np.empty(PART_BYTES, np.uint8)
    with synced(folder / "summed") as fd:
        for _ in range(piece.rounds):
            for start in range(0, piece.flat.nbytes, PART_BYTES):
                part = buffer[: min(PART_BYTES, piece.flat.nbytes - start)]
                part[:] = piece.flat[start : start + PART_BYTES]
                crc32c(part)
                os.write(fd, part)


def numpy_tofile(piece: Piece, folder: Path) -> None:
    """Write a file per column with numpy; for varying lengths, one file of bytes and one of offsets."""
    for name, values in piece.columns.items():
        with (folder / name).open("wb") as file, (folder / f"{name}.offsets").open("wb") as offsets:
            for _ in range(piece.rounds):
                flat_bytes(values).tofile(file)
                if isinstance(values, list):
                    np.cumsum([len(v) for v in values]).tofile(offsets)
            os.fsync(file.fileno())
            os.fsync(offsets.fileno())


def sum_only(piece: Piece, folder: Path) -> None:  # noqa: ARG001 -- writes nothing
    """Compute only the checksum of bytes in memory."""
    for _ in range(piece.rounds):
        crc32c(piece.flat)


def write_batch(piece: Piece, folder: Path) -> None:
    """Write with tiercache by columns, with default options."""
    with tc.Writer(folder / "batches", schema=piece.schema) as writer:
        for _ in range(piece.rounds):
            writer.write_batch(piece.columns)


def write_records(piece: Piece, folder: Path) -> None:
    """Write with tiercache record by record, with default options."""
    with tc.Writer(folder / "records", schema=piece.schema) as writer:
        for _ in range(piece.rounds):
            for record in piece.records:
                writer.write(record)


WAYS: dict[str, Callable[[Piece, Path], None]] = {
    "disk: write, fsync": write_disk,
    "copy, sum, write": copy_sum_write,
    "numpy tofile": numpy_tofile,
    "checksum alone": sum_only,
    "write_batch": write_batch,
    "write": write_records,
}


@contextmanager
def synced(path: Path) -> Iterator[int]:
    """Open a new file and yield its descriptor. Its content is on the disk when the block ends."""
    with path.open("wb", buffering=0) as file:
        yield file.fileno()
        os.fsync(file.fileno())


def measure(piece: Piece, repetitions: int, folder: Path) -> list[dict[str, Any]]:
    """Return one row per way."""
    wall_s: dict[str, list[float]] = {name: [] for name in WAYS}
    cpu_s: dict[str, list[float]] = {name: [] for name in WAYS}
    names = [*WAYS]
    for name in names:  # Imports and first allocations are not measured.
        (folder / "written" / name).mkdir(parents=True)
        WAYS[name](replace(piece, rounds=1), folder / "written" / name)
    shutil.rmtree(folder / "written")
    for repetition in range(repetitions):
        for name in names[repetition % len(names) :] + names[: repetition % len(names)]:
            target = folder / "written" / str(names.index(name))
            target.mkdir(parents=True)
            os.sync()
            start_s, start_cpu_s = time.perf_counter(), time.process_time()
            WAYS[name](piece, target)
            wall_s[name].append(time.perf_counter() - start_s)
            cpu_s[name].append(time.process_time() - start_cpu_s)
        # Not between two ways, because the disk may discard the deleted blocks while the next way waits for it.
        shutil.rmtree(folder / "written")
    disk_s = wall_s["disk: write, fsync"]
    return [
        {
            "benchmark": "write",
            "way": name,
            "workload": piece.workload.as_json(),
            "n_bytes": piece.n_bytes,
            "records_per_s": spread([piece.n_records / s for s in wall_s[name]]),
            "bytes_per_s": spread([piece.n_bytes / s for s in wall_s[name]]),
            "of_disk": spread([disk / s for disk, s in zip(disk_s, wall_s[name], strict=True)]),
            "cpu_s_per_gb": spread([s / piece.n_bytes * 1e9 for s in cpu_s[name]]),
        }
        for name in WAYS
    ]


def line(row: dict[str, Any]) -> list[str]:
    """Return the printed cells of a row."""
    speed = row["bytes_per_s"]
    return [
        row["way"],
        f"{row['records_per_s']['median'] / 1e3:,.1f}",
        f"{speed['median'] / 1e6:,.0f}",
        f"{speed['min'] / 1e6:,.0f} - {speed['max'] / 1e6:,.0f}",
        f"{row['of_disk']['median']:.2f}",
        f"{row['cpu_s_per_gb']['median']:.2f}",
    ]


def main(given: list[str] | None = None) -> None:
    """Measure, print a table for each workload, write the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--workload", nargs="+", choices=[*WORKLOADS], default=[*DEFAULT])
    parser.add_argument("--megabytes", type=int, default=512, help="Megabytes that each way writes in each repetition.")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=OUT / "write", help="Folder on the disk to measure.")
    parser.add_argument("--quick", action="store_true", help="Smoke test: little data, and no meaningful figures.")
    asked = parser.parse_args(given)
    n_bytes, repetitions = (QUICK_BYTES, 1) if asked.quick else (asked.megabytes << 20, asked.repetitions)
    rows: list[dict[str, Any]] = []
    for name in asked.workload:
        piece = load(WORKLOADS[name], n_bytes, asked.folder)
        found = measure(piece, repetitions, asked.folder)
        print(f"{name}: {piece.workload.describe()}; {piece.n_bytes / 1e6:,.0f} MB\n")
        print(f"{table(TITLES, [line(row) for row in found])}\n", flush=True)
        rows += found
    write_rows(asked.folder / "write.jsonl", rows)
    shutil.rmtree(asked.folder / "data")
    print(f"rows: {asked.folder / 'write.jsonl'}")


if __name__ == "__main__":
    main()
