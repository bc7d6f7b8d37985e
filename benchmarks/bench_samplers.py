"""Samplers on the native path, compared with torch's DataLoader with `tc.collate`, over the same mapped data set.

    python benchmarks/bench_samplers.py [--repetitions 5] [--records 160000] [--folder benchmarks/out/samplers]

Whole epochs of records of 520 bytes in the page cache, in batches of 256; the ways are interleaved in each repetition.
Reported are the median records per second, and the median ratio to torch's loader with the same sampler and no workers.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, SequentialSampler

import tiercache as tc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

BATCH = 256


class OfTheUser(RandomSampler):
    """A sampler type that our loader does not know."""


def pack(folder: Path, n_records: int) -> tc.Dataset:
    """Return the data set, packed unless it exists."""
    path = folder / f"records-{n_records}"
    if not path.exists():
        numbers = np.random.default_rng(1)
        with tc.Writer(path, schema={"id": "int64", "tokens": tc.Tensor("uint16", (256,))}, shard_size="32MiB") as out:
            for start in range(0, n_records, 20_000):
                n = min(20_000, n_records - start)
                tokens = numbers.integers(0, 65536, (n, 256)).astype(np.uint16)
                out.write_batch({"id": np.arange(start, start + n), "tokens": tokens})
    return tc.Dataset(path)


def ways(data: tc.Dataset) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return functions that make a loader's arguments, by name."""
    return {
        "RandomSampler": lambda: {"batch_size": BATCH, "sampler": RandomSampler(data)},
        "SequentialSampler": lambda: {"batch_size": BATCH, "sampler": SequentialSampler(data)},
        "DistributedSampler": lambda: {"batch_size": BATCH, "sampler": DistributedSampler(data, 2, 0)},
        "BatchSampler": lambda: {"batch_sampler": BatchSampler(RandomSampler(data), BATCH, False)},
        "a sampler of the user's, 0 workers": lambda: {"batch_size": BATCH, "sampler": OfTheUser(data)},
    }


def records_per_s(make: Callable[[], Iterable[Any]]) -> float:
    """Return the records per second of one epoch, including the construction of the loader."""
    begin = time.perf_counter()
    n = sum(len(batch["id"]) for batch in make())
    return n / (time.perf_counter() - begin)


def main() -> None:
    """Run all ways and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--records", type=int, default=160_000)
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/out/samplers"))
    asked = parser.parse_args()
    data = pack(asked.folder, asked.records)
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in ways(data)}
    for _ in range(asked.repetitions):
        for name, arguments in ways(data).items():
            ours = records_per_s(lambda a=arguments: tc.DataLoader(data, **a()))
            torchs = records_per_s(
                lambda a=arguments: DataLoader(data, collate_fn=tc.collate, **{**a(), "num_workers": 0})
            )
            rates[name].append((ours, torchs))
    for name, pairs in rates.items():
        ours, torchs = (median(pair[i] for pair in pairs) / 1e3 for i in (0, 1))
        print(f"{name:36s} {ours:7.0f} k/s, torch {torchs:7.0f} k/s, ratio {median(a / b for a, b in pairs):.2f}")


if __name__ == "__main__":
    main()
