"""Random access: dataset[i] and dataset[[...]] compared with numpy's memmap and a map-style data set of torch.

    python benchmarks/bench_records.py [--repetitions 7] [--quick] [--folder benchmarks/out/records]

All contenders read the same random records in the same process, interleaved in each repetition. Reported are medians
and ratios to numpy, which copies what it returns, as we do. Warm: the records are in the page cache and checked. Cold:
the pages are dropped from the page cache, if the system allows it, and the data set has just been opened, so that pages
are checked too. Remote: requests and bytes of a record that was never read, from a server in this process, without a
cache.
"""

from __future__ import annotations

import argparse
import os
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

import tiercache as tc
from generate import generate
from rows import OUT, spread, table, write_rows
from source import Source
from support import HttpFaultServer
from workloads import KEY, ROWS, TOKENS, Workload, scaled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

SHARD_BYTES = 16 << 20
SIZES = (1, 64, 256)
READS = {1: 500, 64: 50, 256: 20}
COLD_READS = 64
REMOTE_SCALE = 0.05


def pack(source: Source, path: Path) -> Path:
    """Pack the workload into many uncompressed shards: the benchmark measures finding and copying."""
    if not path.exists():
        names = [field.name for field in source.workload.fields]
        schema = {KEY: "int64", **{name: _type_of(source, name) for name in names}}
        with tc.Writer(path, schema=schema, shard_size=SHARD_BYTES, compression="none") as writer:
            for start in range(0, source.workload.n_records, 4096):
                writer.write_batch(source.batch(start, min(start + 4096, source.workload.n_records)))
    return path


def _type_of(source: Source, name: str) -> Any:
    field = next(field for field in source.workload.fields if field.name == name)
    return "str" if field.kind == "text" else tc.Tensor(field.dtype, field.shape)


class Memmap(Dataset[dict[str, Any]]):
    """The same records as numpy memmaps; also a map-style data set of torch."""

    def __init__(self, source: Source, *, in_memory: bool) -> None:
        def held(array: np.ndarray) -> np.ndarray:
            return np.array(array) if in_memory else array

        fields = source.workload.fields
        self.arrays = {KEY: held(source.keys), **{f.name: held(source.array(f)) for f in fields if f.kind == "array"}}
        self.texts = {f.name: (held(source.data(f)), held(source.offsets(f))) for f in fields if f.kind == "text"}

    def __len__(self) -> int:
        return len(self.arrays[KEY])

    def __getitem__(self, i: int) -> dict[str, Any]:
        record: dict[str, Any] = {name: array[i].copy() for name, array in self.arrays.items()}
        for name, (data, at) in self.texts.items():
            record[name] = data[at[i] : at[i + 1]].tobytes().decode()
        return record

    def take(self, indices: Sequence[int]) -> dict[str, Any]:
        """Return several records by fancy indexing."""
        batch: dict[str, Any] = {name: array[indices] for name, array in self.arrays.items()}
        for name, (data, at) in self.texts.items():
            batch[name] = [data[at[i] : at[i + 1]].tobytes().decode() for i in indices]
        return batch


def seconds_each(read: Callable[[Any], Any], asked: Sequence[Any]) -> float:
    """Return the mean seconds per read."""
    begin = time.perf_counter()
    for indices in asked:
        read(indices)
    return (time.perf_counter() - begin) / len(asked)


def warm(source: Source, dataset: tc.Dataset, size: int, repetitions: int) -> dict[str, Any]:
    """Return the seconds of a read of `size` records for each contender."""
    rng, plain = np.random.default_rng(size), Memmap(source, in_memory=False)
    readers: dict[str, Callable[[Any], Any]] = {
        "tiercache": dataset.__getitem__,
        "numpy_memmap": plain.__getitem__ if size == 1 else plain.take,
    }
    found: dict[str, list[float]] = {name: [] for name in readers}
    for repetition in range(repetitions + 1):
        asked = rng.integers(0, len(dataset), (READS[size], size)).tolist()
        asked = [indices[0] for indices in asked] if size == 1 else asked
        for name, read in readers.items():
            read(asked[0])
            seconds = seconds_each(read, asked)
            if repetition:  # The first repetition touches and checks the pages.
                found[name].append(seconds)
    return {name: spread(seconds) for name, seconds in found.items()}


def loaders(source: Source, dataset: tc.Dataset, repetitions: int) -> dict[str, Any]:
    """Return the seconds per batch of torch's DataLoader over our data set and over a map-style data set in memory."""
    plain, batch_size = Memmap(source, in_memory=True), source.workload.batch_size
    over: dict[str, tuple[Any, Any]] = {"tiercache": (dataset, tc.collate), "torch_map": (plain, None)}
    found: dict[str, list[float]] = {name: [] for name in over}
    n_batches = min(20, len(dataset) // batch_size)
    for _ in range(repetitions):
        for name, (records, collate) in over.items():
            batches = iter(DataLoader(records, batch_size, sampler=_order(len(dataset)), collate_fn=collate))
            next(batches)
            begin = time.perf_counter()
            for _ in range(n_batches - 1):
                next(batches)
            found[name].append((time.perf_counter() - begin) / max(n_batches - 1, 1))
    return {name: spread(seconds) for name, seconds in found.items()}


def _order(n: int) -> list[int]:
    return torch.randperm(n, generator=torch.Generator().manual_seed(1)).tolist()


def cold(source: Source, path: Path, repetitions: int) -> dict[str, Any]:
    """Return the seconds of the first record of a newly opened data set, and of numpy's."""
    found: dict[str, list[float]] = {"tiercache": [], "numpy_memmap": []}
    asked = np.random.default_rng(3).integers(0, source.workload.n_records, COLD_READS).tolist()
    for _ in range(repetitions):
        drop([*path.rglob("*.tcs"), *source.folder.iterdir()])
        with opened(path) as dataset:
            found["tiercache"].append(seconds_each(dataset.__getitem__, asked))
        found["numpy_memmap"].append(seconds_each(Memmap(source, in_memory=False).__getitem__, asked))
    return {name: spread(seconds) for name, seconds in found.items()}


def drop(files: Sequence[Path]) -> None:
    """Ask the system to drop the files' pages; it may ignore the request."""
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


@contextmanager
def opened(url: Any, **options: Any) -> Iterator[tc.Dataset]:
    """Open a data set, and close it at the end of the block."""
    dataset = tc.Dataset(url, **options)
    try:
        yield dataset
    finally:
        dataset.close()


def remote(path: Path) -> list[dict[str, Any]]:
    """Return the requests and bytes of a shard's first record, of the next one, and of 64 records of one shard."""
    files = {f"d/{f.relative_to(path).as_posix()}": f.read_bytes() for f in path.rglob("*") if f.is_file()}
    found = []
    with HttpFaultServer(files) as server, opened(f"{server.url}/d", cache=False) as dataset:
        n = int(dataset.__tiercache__().source.shard_records[0])
        asked = {"the first record": n // 2, "another record": n // 3, "64 records": list(range(0, n, -(-n // 64)))}
        for name, index in asked.items():
            server.log.clear()
            dataset[index]
            sent = sum(seen.n_bytes for seen in server.log)
            found.append({"what": name, "requests": len(server.log), "bytes": sent})
    return found


def measure(workload: Workload, folder: Path, repetitions: int) -> list[dict[str, Any]]:
    """Return all rows of a workload."""
    source = generate(workload, folder / f"{workload.name}-source")
    path = pack(source, folder / f"{workload.name}-{workload.n_records}")
    base = {"benchmark": "records", "workload": workload.as_json()}
    with opened(path) as dataset:
        rows = [{**base, "case": f"warm {n}", "s": warm(source, dataset, n, repetitions)} for n in SIZES]
        rows.append({**base, "case": "torch's loader", "s": loaders(source, dataset, repetitions)})
    rows.append({**base, "case": "cold 1", "s": cold(source, path, repetitions)})
    small = scaled(workload, min(REMOTE_SCALE, 4000 / workload.n_records))
    away = pack(generate(small, folder / f"{workload.name}-small-source"), folder / f"{small.name}-{small.n_records}")
    return [*rows, {**base, "case": "remote cold", "fetched": remote(away)}]


def report(rows: Sequence[dict[str, Any]]) -> str:
    """Return a table in microseconds, with the speed relative to the other contender."""
    lines, fetched = [], []
    for row in rows:
        name = row["workload"]["name"]
        for other in row.get("s", {}):
            if other == "tiercache":
                continue
            ours, theirs = (row["s"][who]["median"] for who in ("tiercache", other))
            lines.append(
                [f"{name}, {row['case']}", f"{ours * 1e6:,.1f}", f"{theirs * 1e6:,.1f}", other, f"{theirs / ours:.2f}"]
            )
        fetched += [
            [f"{name}, {what['what']}", str(what["requests"]), f"{what['bytes']:,}"] for what in row.get("fetched", [])
        ]
    times = table(["read", "ours, us", "other, us", "other", "times as fast"], lines)
    return f"{times}\n\n{table(['remote, cold', 'requests', 'bytes'], fetched)}"


def main() -> None:
    """Measure, print and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="Smoke test: few and small records.")
    parser.add_argument("--folder", type=Path, default=OUT / "records")
    asked = parser.parse_args()
    scale, repetitions = (0.002, 1) if asked.quick else (0.25, asked.repetitions)
    rows = [row for w in (TOKENS, ROWS) for row in measure(scaled(w, scale), asked.folder, repetitions)]
    write_rows(asked.folder / "records.jsonl", rows)
    print(report(rows))


if __name__ == "__main__":
    main()
