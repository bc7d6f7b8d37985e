"""Writing a data set: write_batch() and write(), compared with disk, checksum and numpy on the same bytes.

    python benchmarks/bench_write.py [--workload tokens ...] [--megabytes 512] [--repetitions 5] [--quick]

The records are in memory, as arrays, bytes and str, and are written repeatedly until the requested size is reached. All
files are durable when the clock stops (fsync), and the disk is idle when it starts. The ways are interleaved, and each
repetition begins with another one.

    python benchmarks/bench_write.py --packers [images tokens rows] [--only tiercache mosaic ...] [--repetitions 3]

--packers instead compares `tiercache.pack` with the packers of other libraries on the same files: 3,000 JPEGs in ten
folders, 60 million tokens as documents, and a Parquet table of a million rows. Each packing runs in a process
(`peers/packers.py`) in an environment of its own below benchmarks/out/envs, which is made on first use; one that cannot
be made is left out. The time ends when all files are on the disk. Peak memory is that of one more packing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import tiercache as tc
from generate import generate
from peers.catalogue import MEGATRON, PEERS
from peers.environments import NotInstalledError, interpreter
from peers.runner import FailedError, run_child
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


# By case: number of records, and its part with --quick.
PACKED = {"images": (3_000, 20), "tokens": (100_000, 300), "rows": (1_000_000, 2_000)}
PACKERS = {
    name: PEERS[name] for name in ("tiercache", "mosaic", "lit", "wds", "beton", "grain_ar", "lance_arrow", "hf")
}
PACKERS["megatron"] = MEGATRON
# With processes of its own, of which each number is one contender; the others pack in one process.
PARALLEL = ("tiercache", "lit", "beton", "hf")
WDS_ROWS = 100_000
PACKER_TITLES = (
    "packer",
    "k records/s",
    "MB/s",
    "min - max",
    "tiercache is times as fast",
    "CPU s",
    "MB stored",
    "peak MB",
)


def make_input(case: str, n: int, folder: Path) -> int:
    """Write the files that all packers pack. Return their bytes."""
    rng = np.random.default_rng(3)
    if case == "images":
        made = generate(replace(WORKLOADS["images"], n_records=n), folder / "made")
        images = made.batch(0, n)["image"]
        for number in range(n):
            path = folder / "images" / f"class-{number % 10}" / f"{number:06d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(images[number])
    elif case == "tokens":
        lengths = np.maximum(rng.lognormal(5.9, 1.0, n), 1).astype(np.int64)
        (folder / "tokens").mkdir(parents=True)
        np.save(folder / "tokens" / "lengths.npy", lengths)
        np.save(folder / "tokens" / "tokens.npy", rng.integers(0, 50_000, lengths.sum(), np.uint16))
    else:
        (folder / "rows").mkdir(parents=True)
        letters = rng.integers(ord("a"), ord("z") + 1, (n, 60), np.uint8)
        numbers = {"id": np.arange(n), "count": rng.integers(0, 1000, n, np.int32)}
        floats = {"price": rng.random(n, np.float32), "score": rng.standard_normal(n)}
        text = [row.tobytes().decode() for row in letters]
        pq.write_table(
            pa.table({**numbers, **floats, "text": text}), folder / "rows/rows.parquet", row_group_size=WDS_ROWS
        )
    return sum(path.stat().st_size for path in (folder / case).rglob("*") if path.is_file())


def compare_packers(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each case and packer, and print a table for each case."""
    environments, work = (OUT / "envs").resolve(), (asked.folder / "packers").resolve()
    rows: list[dict[str, Any]] = []
    for case in asked.packers or PACKED:
        n = PACKED[case][asked.quick]
        shutil.rmtree(work, ignore_errors=True)
        n_bytes = make_input(case, n, work)
        found: dict[str, list[dict[str, Any]]] = {}
        jobs: dict[str, tuple[list[str], dict[str, Any]]] = {}
        for name in asked.only or (["tiercache"] if asked.quick else PACKERS):
            if case != "tokens" and name == "megatron":
                continue
            try:
                python = interpreter(name, PACKERS[name], environments)
            except NotInstalledError as error:
                print(f"{PACKERS[name].title}: not installed: {error}", file=sys.stderr)
                continue
            for workers in (1, 2) if name in PARALLEL else (1,):
                title = PACKERS[name].title + (f", {workers} processes" if workers > 1 else "")
                job = {"peer": name, "case": case, "source": str(work / case), "workers": workers}
                jobs[title] = [str(python), "-m", "peers.packers"], job
                found[title] = []
        for repetition in range(-1, 1 if asked.quick else asked.repetitions):
            for title, (command, job) in list(jobs.items()):
                target = work / "packed"
                target.mkdir()
                # The first packing warms the page cache, and its memory is sampled, which takes time.
                of_it = {**job, "target": str(target), "memory": repetition < 0}
                try:
                    found[title].append(run_child([*command, json.dumps(of_it)], work / "log", asked.timeout))
                except FailedError as error:
                    print(f"{title}, {case}: {error}", file=sys.stderr)
                    del jobs[title], found[title]
                shutil.rmtree(target)
        ours_s = float(np.median([one["seconds"] for one in found["tiercache"][1:]]))
        of_case = [packer_row(case, title, n, n_bytes, ours_s, of_it) for title, of_it in found.items()]
        print(f"{case}: {n:,} records, {n_bytes / 1e6:,.0f} MB in files\n")
        print(f"{table(PACKER_TITLES, [packer_line(row) for row in of_case])}\n", flush=True)
        rows += of_case
    shutil.rmtree(work)
    return rows


def packer_row(
    case: str, title: str, n: int, n_bytes: int, ours_s: float, found: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return the row of a packer. found: First the packing whose memory was sampled."""
    part = min(WDS_ROWS / n, 1) if case == "rows" and title == PEERS["wds"].title else 1.0
    seconds = [one["seconds"] / part for one in found[1:]]
    return {
        "benchmark": "pack",
        "case": case,
        "packer": title,
        "n_bytes": n_bytes,
        "records_per_s": spread([n / s for s in seconds]),
        "bytes_per_s": spread([n_bytes / s for s in seconds]),
        "of_ours": spread([s / ours_s for s in seconds]),
        "cpu_s": spread([one["cpu_s"] / part for one in found[1:]]),
        "stored_bytes": found[0]["stored_bytes"] / part,
        "peak_bytes": found[0]["peak_bytes"],
    }


def packer_line(row: dict[str, Any]) -> list[str]:
    """Return the printed cells of a packer's row."""
    speed = row["bytes_per_s"]
    return [
        row["packer"],
        f"{row['records_per_s']['median'] / 1e3:,.1f}",
        f"{speed['median'] / 1e6:,.0f}",
        f"{speed['min'] / 1e6:,.0f} - {speed['max'] / 1e6:,.0f}",
        f"{row['of_ours']['median']:.2f}",
        f"{row['cpu_s']['median']:.1f}",
        f"{row['stored_bytes'] / 1e6:,.0f}",
        f"{row['peak_bytes'] / 1e6:,.0f}",
    ]


def main(given: list[str] | None = None) -> None:
    """Measure, print a table for each workload, write the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--workload", nargs="+", choices=[*WORKLOADS], default=[*DEFAULT])
    parser.add_argument("--megabytes", type=int, default=512, help="Megabytes that each way writes in each repetition.")
    parser.add_argument("--packers", nargs="*", choices=[*PACKED], help="Compare packers, on these cases or all.")
    parser.add_argument("--only", nargs="+", choices=[*PACKERS], help="Packers to compare; tiercache must be one.")
    parser.add_argument("--timeout", type=float, default=600.0, help="Timeout of one packing in seconds.")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=OUT / "write", help="Folder on the disk to measure.")
    parser.add_argument("--quick", action="store_true", help="Smoke test: little data, and no meaningful figures.")
    asked = parser.parse_args(given)
    if asked.packers is not None:
        write_rows(asked.folder / "packers.jsonl", compare_packers(asked))
        return
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
