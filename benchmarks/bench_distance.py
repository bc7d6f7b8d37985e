"""Epochs whose batches are written through the caches, past them, or as the loader decides, interleaved.

    python benchmarks/bench_distance.py [--mib 512] [--seconds 20] [--folder ON_THE_DISK]

Between cores that share a cache, a batch arrives faster through the cache; between cores with different caches, through
memory. The host of a virtual machine may move its processors between the two at any time, so rounds of three epochs are
sorted by the distance that the loader measured in them. The consumer sums every byte. The output has the median
microseconds per batch. If all rounds are of one kind, so is the machine.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tiercache as tc
from rows import OUT, table, write_rows
from tiercache._native.ring import is_far, override_distance

# Kind: (schema of the wide column, bytes per record, batch size).
KINDS: dict[str, tuple[Any, int, int]] = {
    "tokens": (tc.Tensor("uint16", (1024,)), 2048, 64),
    "tensors": (tc.Tensor("uint8", (3, 64, 64)), 12288, 256),
    "bytes": ("bytes", 20000, 256),
    "rows": (tc.Tensor("float32", (16,)), 64, 1024),
}
WAYS = {"caches": False, "memory": True, "found": None}


def write(folder: Path, kind: str, n: int) -> None:
    """Pack n records of random bytes."""
    spec, n_bytes, _ = KINDS[kind]
    random = np.random.default_rng(0)
    with tc.Writer(folder, schema={"wide": spec, "label": "int64"}, compression="none") as writer:
        for first in range(0, n, 4096):
            m = min(4096, n - first)
            raw = random.integers(0, 256, (m, n_bytes), np.uint8)
            wide = [row.tobytes() for row in raw] if kind == "bytes" else raw.view(spec.dtype).reshape(m, *spec.shape)
            writer.write_batch({"wide": wide, "label": np.arange(first, first + m)})


def epoch(loader: tc.DataLoader) -> float:
    """Return the seconds of one epoch in which every byte is read."""
    start_s, total = time.perf_counter(), 0
    for batch in loader:
        for value in batch.values():
            tensor = value if torch.is_tensor(value) else value.values
            words = tensor.numpy().reshape(-1).view(np.uint8)
            total += int(words[: words.size // 8 * 8].view(np.uint64).sum())
    return time.perf_counter() - start_s


def measure(folder: Path, kind: str, seconds: float, *, shuffled: bool) -> list[dict[str, Any]]:
    """Return a row for each measured distance."""
    batch_size = KINDS[kind][2]
    options = tc.LoaderOptions(seed=1, shuffle_group_bytes="all", shuffle_window_bytes="all")
    dataset = tc.Dataset(folder / kind, layouts={"wide": "buffer"} if kind == "bytes" else {})
    loader = tc.DataLoader(dataset, batch_size=batch_size, shuffle=shuffled, options=options if shuffled else None)
    epoch(loader)
    rounds: dict[bool, list[list[float]]] = {False: [], True: []}
    end_s = time.perf_counter() + seconds
    while time.perf_counter() < end_s:
        took = []
        for pretended in WAYS.values():
            override_distance(pretended)
            took.append(epoch(loader) / len(loader) * 1e6)
        rounds[is_far()].append(took)
    override_distance(None)
    order = "shuffled" if shuffled else "stored"
    medians = {far: [statistics.median(times) for times in zip(*every, strict=True)] for far, every in rounds.items()}
    return [
        {"kind": kind, "order": order, "far": far, "rounds": len(every), **dict(zip(WAYS, medians[far], strict=True))}
        for far, every in rounds.items()
        if every
    ]


def main() -> None:
    """Measure, print and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--kinds", nargs="+", choices=[*KINDS], default=[*KINDS])
    parser.add_argument("--folder", type=Path, default=None)
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        for kind in given.kinds:
            write(Path(name) / kind, kind, (given.mib << 20) // KINDS[kind][1])
            for shuffled in (True, False):
                rows += measure(Path(name), kind, given.seconds, shuffled=shuffled)
    write_rows(OUT / "distance.jsonl", rows)
    lines = [
        [
            row["kind"],
            row["order"],
            "far" if row["far"] else "near",
            str(row["rounds"]),
            *(f"{row[way]:.1f}" for way in WAYS),
        ]
        for row in rows
    ]
    print(table(["records", "order", "cores", "rounds", "through caches", "past them", "as found"], lines))


if __name__ == "__main__":
    main()
