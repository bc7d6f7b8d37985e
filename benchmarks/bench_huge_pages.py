"""Shuffled epochs over records in the page cache, in pages of 4 KiB and in huge pages.

    python benchmarks/bench_huge_pages.py [--mib 512] [--epochs 15] [--folder ON_THE_DISK]

Each data set has two copies: one was read page by page, the other with large sequential reads. Epochs of both are
interleaved in one process; the consumer sums every byte. The output has the median and the quartiles of the speed
ratios, and how much of each copy is in huge pages. If the kernel has no huge pages for the file system, this is 0, and
the ratios are noise.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tiercache as tc
from peers.runner import read_through
from rows import OUT, table, write_rows
from support import drop_pages

PAGE = 4096
# Kind: (schema of the wide column, bytes per record, batch size).
KINDS: dict[str, tuple[Any, int, int]] = {
    "tokens": (tc.Tensor("uint16", (1024,)), 2048, 64),
    "tensors": (tc.Tensor("uint8", (3, 64, 64)), 12288, 256),
    "bytes": ("bytes", 20000, 256),
    "rows": (tc.Tensor("float32", (16,)), 64, 1024),
}


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


def read(folder: Path, *, by_pages: bool) -> None:
    """Read a data set into the page cache, page by page or with large reads."""
    drop_pages(folder)
    for path in sorted(folder.rglob("*.tcs")) if by_pages else ():
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            while file.read(PAGE):
                pass
    read_through(folder)


def epoch(loader: tc.DataLoader) -> float:
    """Return the seconds of one epoch in which every byte is read."""
    start_s, total = time.perf_counter(), 0
    for batch in loader:
        for value in batch.values():
            tensor = value if torch.is_tensor(value) else value.values
            words = tensor.numpy().reshape(-1).view(np.uint8)
            total += int(words[: words.size // 8 * 8].view(np.uint64).sum())
    return time.perf_counter() - start_s


def huge_mib(folder: Path) -> int:
    """Return how many MiB of a data set this process has mapped with huge pages."""
    found, is_ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            is_ours = words[-1].startswith(str(folder))
        elif is_ours and words[0] == "FilePmdMapped:":
            found += int(words[1])
    return found >> 10


def measure(folder: Path, kind: str, n_bytes: int, n_epochs: int) -> dict[str, Any]:
    """Return the row of one kind."""
    _, record_bytes, batch_size = KINDS[kind]
    n, loaders = n_bytes // record_bytes, {}
    options = tc.LoaderOptions(seed=1, shuffle_group_bytes="all", shuffle_window_bytes="all")
    for way in ("pages", "huge"):
        write(folder / kind / way, kind, n)
        read(folder / kind / way, by_pages=way == "pages")
        dataset = tc.Dataset(folder / kind / way, layouts={"wide": "buffer"} if kind == "bytes" else {})
        loaders[way] = tc.DataLoader(dataset, batch_size=batch_size, shuffle=True, options=options)
        epoch(loaders[way])
    seconds = [(epoch(loaders["pages"]), epoch(loaders["huge"])) for _ in range(n_epochs)]
    low, middle, high = statistics.quantiles([pages / huge for pages, huge in seconds], n=4)
    in_huge = {way: huge_mib(folder / kind / way) for way in loaders}
    return {"kind": kind, "ratio": middle, "low": low, "high": high, "mib": n_bytes >> 20, "huge_mib": in_huge}


def main() -> None:
    """Measure, print and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--kinds", nargs="+", choices=[*KINDS], default=[*KINDS])
    parser.add_argument("--folder", type=Path, default=None, help="Folder on the file system to measure.")
    given = parser.parse_args()
    rows = []
    for kind in given.kinds:
        with tempfile.TemporaryDirectory(dir=given.folder) as name:
            rows.append(measure(Path(name), kind, given.mib << 20, given.epochs))
    write_rows(OUT / "huge_pages.jsonl", rows)
    lines = [
        [
            row["kind"],
            f"{row['ratio']:.2f}",
            f"{row['low']:.2f} - {row['high']:.2f}",
            f"{row['huge_mib']['pages']} and {row['huge_mib']['huge']} of {row['mib']}",
        ]
        for row in rows
    ]
    print(table(["records", "huge pages / pages of 4 KiB", "quartiles", "MiB in huge pages"], lines))


if __name__ == "__main__":
    main()
