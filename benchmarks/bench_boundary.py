"""Wait of a training loop between two epochs, compared with the wait between two batches.

    python benchmarks/bench_boundary.py [--mib 96] [--window-mib 16] [--step-ms 5] [--epochs 6]

A loop takes a batch and works for step-ms, epoch after epoch. The gap of a batch is the time from its request to its
arrival. The gap of an epoch boundary is the time from the request after the last batch to the arrival of the first
batch of the next epoch, including the end of the iterator and iter(). Data: uncompressed and zstd in a local folder,
and zstd on an HTTP server in another process, through a cache that holds half of it. Each is compared with the same
loop without the preparation of the next epoch (`not_ready`). Times are in milliseconds; the first epoch, which may be
cold, is left out.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np

import tiercache as tc
from rows import OUT, spread, table, write_rows
from tiercache.load.planner import NextEpoch

TOKENS, BATCH = 1024, 256
SERVE = """
import sys
from pathlib import Path
from support import HttpFaultServer
folder = Path(sys.argv[1])
paths = [path for path in folder.rglob("*") if path.is_file()]
files = {f"data/{path.relative_to(folder).as_posix()}": path.read_bytes() for path in paths}
with HttpFaultServer(files) as server:
    print(server.url, flush=True)
    sys.stdin.read()
"""


def write(folder: Path, n_bytes: int, compression: str) -> None:
    """Pack records of 1,024 tokens with a word-like distribution."""
    random, step = np.random.default_rng(0), 2048
    schema = {"tokens": tc.Tensor("uint16", (TOKENS,))}
    with tc.Writer(folder, schema=schema, compression=compression, shard_size="4MiB") as writer:
        for first in range(0, n_bytes // (2 * TOKENS), step):
            shape = (min(step, n_bytes // (2 * TOKENS) - first), TOKENS)
            writer.write_batch({"tokens": random.zipf(1.3, shape).clip(0, 65535).astype(np.uint16)})


def gaps(loader: tc.DataLoader, n_epochs: int, step_s: float) -> tuple[list[float], list[float]]:
    """Return the gaps (of batches, of boundaries) in ms, after the first epoch."""
    of_batches, of_boundaries = [], []
    iterator, asked_s, first = iter(loader), time.perf_counter(), True
    epoch = 0
    while epoch < n_epochs:
        batch = next(iterator, None)
        if batch is None:
            iterator, epoch, first = iter(loader), epoch + 1, True
            continue
        int(batch["tokens"][0, 0])
        if epoch:
            (of_boundaries if first else of_batches).append(1e3 * (time.perf_counter() - asked_s))
        end_s = time.perf_counter() + step_s
        while time.perf_counter() < end_s:
            time.sleep(step_s / 10)  # Like a loop that waits for its accelerator.
        asked_s, first = time.perf_counter(), False
    iterator.close()
    return of_batches, of_boundaries


def measure(dataset: tc.Dataset, given: argparse.Namespace, *, ready: bool) -> tuple[list[float], list[float]]:
    """Return the gaps of one loader, with or without preparation of the next epoch."""
    options = tc.LoaderOptions(seed=1, shuffle_group_bytes="all", shuffle_window_bytes=f"{given.window_mib}MiB")
    loader = tc.DataLoader(dataset, batch_size=BATCH, shuffle=True, options=options)
    prepare = NextEpoch.prepare
    if not ready:
        NextEpoch.prepare = lambda *_: None  # type: ignore[method-assign]  # the baseline
    try:
        return gaps(loader, given.epochs, given.step_ms / 1e3)
    finally:
        NextEpoch.prepare = prepare  # type: ignore[method-assign]


def main() -> None:
    """Measure, print and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=96)
    parser.add_argument("--window-mib", type=int, default=16)
    parser.add_argument("--step-ms", type=float, default=5.0)
    parser.add_argument("--epochs", type=int, default=6)
    given = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*will be fetched again in every epoch.*")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind, compression in (("raw", "none"), ("zstd", "zstd:3")):
            write(folder / kind, given.mib << 20, compression)
        stored_bytes = sum(path.stat().st_size for path in (folder / "zstd").rglob("*") if path.is_file())
        command = [sys.executable, "-c", SERVE, str(folder / "zstd")]
        with (
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server,
            tc.Cache(folder / "cache", size=stored_bytes // 2, min_free=0) as cache,
        ):
            url = server.stdout.readline().strip() if server.stdout else ""
            places = {"raw": folder / "raw", "zstd": folder / "zstd", "remote": f"{url}/data"}
            for kind, place in places.items():
                for ready in (True, False):
                    dataset = tc.Dataset(place, cache=cache if kind == "remote" else None)
                    of_batches, of_boundaries = measure(dataset, given, ready=ready)
                    dataset.close()
                    way = "ready" if ready else "not_ready"
                    tail = float(np.percentile(of_batches, 99))
                    row = {"data": kind, "way": way, "batch_ms": spread(of_batches), "batch_p99_ms": tail}
                    rows.append({**row, "boundary_ms": spread(of_boundaries), "step_ms": given.step_ms})
            if server.stdin:
                server.stdin.close()
    write_rows(OUT / "boundary.jsonl", rows)
    lines = [
        [
            f"{row['data']}, {row['way']}",
            *(f"{figure:.2f}" for figure in (row["batch_ms"]["median"], row["batch_p99_ms"], row["batch_ms"]["max"])),
            *(f"{row['boundary_ms'][figure]:.2f}" for figure in ("min", "median", "max")),
        ]
        for row in rows
    ]
    print(table(["", "batch median", "p99", "max", "boundary min", "median", "max"], lines))
    print(f"a batch every {given.step_ms} ms: a boundary below this costs no more than a batch")


if __name__ == "__main__":
    main()
