"""The loader on compressed columns, compared with decompression of the same frames alone on as many threads.

    python benchmarks/bench_decode.py [--mib 128] [--window-mib 8] [--repetitions 5]

The baseline is threads that decode whole frames with python-zstandard, one call per frame, and drop the result.
Compared are the loader's decode stage alone (the same load tasks as its windows, with as many threads: read, checked,
decoded), and the whole loader, which shuffles fully and whose consumer reads the first byte of every batch. All are
interleaved; figures are MB/s of decoded bytes.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import zstandard

import tiercache as tc
from rows import OUT, spread, table, write_rows
from tiercache import config
from tiercache.load.windows import cut_load_tasks
from tiercache.order.epoch_order import EpochOrder
from tiercache.order.window import DatasetSizes, OrderOptions

TOKENS, BATCH = 1024, 64
_here = threading.local()


def write(folder: Path, n_bytes: int) -> int:
    """Pack records of 1,024 tokens with a word-like distribution, compressed. Return their bytes."""
    n, step = n_bytes // (2 * TOKENS), 2048
    random = np.random.default_rng(0)
    with tc.Writer(folder, schema={"tokens": tc.Tensor("uint16", (TOKENS,))}, compression="zstd:3") as writer:
        for first in range(0, n, step):
            shape = (min(step, n - first), TOKENS)
            writer.write_batch({"tokens": random.zipf(1.3, shape).clip(0, 65535).astype(np.uint16)})
    return n * 2 * TOKENS


def frames_of(folder: Path) -> list[bytes]:
    """Return every frame of the data set, as stored."""
    dataset = tc.Dataset(folder)
    found = []
    for shard in range(len(dataset.__tiercache__().source.shard_records)):
        rows = dataset.__tiercache__().source._footer(shard).chunks.ravel()  # noqa: SLF001 -- no public way to frames as stored
        data = (folder / dataset.__tiercache__().source.leaves[0].table.info(shard).name).read_bytes()
        found += [data[offset : offset + stored] for offset, stored in rows[["offset", "stored"]].tolist()]
    dataset.close()
    return found


def decode(frame: bytes) -> None:
    """Decode one frame with a context of the thread."""
    if not hasattr(_here, "context"):
        _here.context = zstandard.ZstdDecompressor()
    _here.context.decompress(frame)


def load(folder: Path, window_mib: int) -> None:
    """Read one epoch with the loader."""
    dataset = tc.Dataset(folder)
    options = tc.LoaderOptions(shuffle_group_bytes="all", shuffle_window_bytes=f"{window_mib}MiB", seed=1)
    for batch in tc.DataLoader(dataset, batch_size=BATCH, shuffle=True, options=options):
        int(batch["tokens"][0, 0])
    dataset.close()


def tasks_of(dataset: tc.Dataset, window_mib: int, n_threads: int) -> list[tuple[int, list[int]]]:
    """Return (shard, blocks) of every load task, in the order of an epoch."""
    source = dataset.__tiercache__().source
    sizes = DatasetSizes(source.shard_records, source.shard_bytes, source.block_sizes)
    order = EpochOrder(sizes, OrderOptions(seed=1, shuffle=True, group_bytes=None, window_bytes=window_mib << 20), 0)
    found = []
    for window in order.windows(0):
        _, tasks = cut_load_tasks(window, np.ones(len(window.blocks), bool), n_threads, lambda _: False)
        found += [(int(window.shards[places[0]]), window.blocks[places].tolist()) for places in tasks]
    return found


def main() -> None:
    """Measure, print and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=128)
    parser.add_argument(
        "--window-mib", type=int, default=8, help="Size of a window; small, for many windows per epoch."
    )
    parser.add_argument("--repetitions", type=int, default=5)
    given = parser.parse_args()
    n_threads = config.available_cpus()
    seconds: dict[str, list[float]] = {"frames alone": [], "windows": [], "loader": []}
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(n_threads) as pool:
        folder = Path(name) / "data"
        n_bytes = write(folder, given.mib << 20)
        frames = frames_of(folder)
        dataset = tc.Dataset(folder)
        tasks = tasks_of(dataset, given.window_mib, n_threads)

        def load_task(task: tuple[int, list[int]]) -> None:
            dataset.__tiercache__().source.load_blocks(*task)

        ways = {
            "frames alone": lambda: list(pool.map(decode, frames)),
            "windows": lambda: list(pool.map(load_task, tasks)),
            "loader": lambda: load(folder, given.window_mib),
        }
        for _ in range(given.repetitions):
            for way, run in ways.items():
                start_s = time.perf_counter()
                run()
                seconds[way].append(time.perf_counter() - start_s)
        dataset.close()
    speeds = {way: spread([n_bytes / taken / 1e6 for taken in found]) for way, found in seconds.items()}
    write_rows(
        OUT / "decode.jsonl", [{"way": way, "mb_s": speed, "n_threads": n_threads} for way, speed in speeds.items()]
    )
    lines = [[way, *(f"{speed[figure]:.0f}" for figure in ("min", "median", "max"))] for way, speed in speeds.items()]
    print(table(["way", "MB/s min", "median", "max"], lines))
    for way in ("windows", "loader"):
        ratio = speeds[way]["median"] / speeds["frames alone"]["median"]
        print(f"{way} / frames alone: {ratio:.2f} ({n_threads} threads, {len(frames)} frames)")


if __name__ == "__main__":
    main()
