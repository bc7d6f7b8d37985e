"""The record order: speed of computing it, time to resume a run, size of a state, and quality of the shuffle.

    python benchmarks/bench_order.py [--only speed resume state quality training] [--repetitions 5] [--seeds 5]

speed: indices per second of the keyed permutation and rows of windows, compared with numpy's shuffle and with a copy of
the indices. resume: time from nothing to the first piece of rows at several offsets of 10^9 records (synthetic shards),
also for a mixture. quality: correlation of stored and output order, and similarity of the records in a run. training:
small networks on real data that is stored sorted by label. The rows are written to order.jsonl. --quick uses small
data.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from order_quality import RECORD_BYTES, Setting, Task, Training, clumping, digits, rank_correlation, sources, train
from rows import OUT, spread, table, write_rows
from tiercache._native.permute import RowFinder, permute
from tiercache.load.epoch import RunState
from tiercache.load.pieces import cut_pieces
from tiercache.model import SourcePart
from tiercache.order.epoch_order import EpochOrder
from tiercache.order.mixture import MixtureOrder, MixtureSpec
from tiercache.order.rank_plan import RankPlan
from tiercache.order.window import BlockSizes, DatasetSizes, OrderOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tiercache.order.window import Order

KEY = (1, 2)
STAGES = ("speed", "resume", "state", "quality", "training")

# By default a group is 32 shards of 128 MiB and 16 windows of 256 MiB. The same for data as small as the real data
# here: shards of a few records.
FULL = Setting("numpy's shuffle", 0)
SETTINGS = (
    FULL,
    Setting("all in one group and window", 1, 640),
    Setting("one group, 320 windows", 1, 640, 320),
    Setting("5 groups of 32 shards", 5, 160, 80),
    Setting("20 groups of 128 shards", 20, 2560, 320),
    Setting("20 groups of 32 shards (defaults)", 20, 640, 320),
    Setting("20 groups of 32, windows of 1/80", 20, 640, 80),
    Setting("20 groups of 32, 4 streams", 20, 640, 320, streams=4),
    Setting("80 groups of 32 shards", 80, 2560, 1280),
    Setting("20 groups of 8 shards", 20, 160, 320),
    Setting("20 groups of 1 shard", 20, 20, 320),
    Setting("stored order", None),
)


def timed(work: Callable[[], Any], repetitions: int) -> list[float]:
    """Return the seconds of each repetition, after one that is not counted."""
    found = []
    for _ in range(repetitions + 1):
        start_s = time.perf_counter()
        work()
        found.append(time.perf_counter() - start_s)
    return found[1:]


def speed(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Return million indices per second, interleaved, also relative to numpy's shuffle and to a copy."""
    n = 1 << (18 if given.quick else 22)
    out, source = np.empty(n, np.uint64), np.arange(n, dtype=np.uint64)
    block, row = np.empty(n, np.uint32), np.empty(n, np.uint32)
    finder = RowFinder(np.arange(0, n + 1, 512).astype(np.int64), KEY)
    random = np.random.default_rng(0)
    ways: dict[str, Callable[[], Any]] = {
        "permutation, one go": lambda: permute(KEY, n, 0, out),
        "permutation of 10^9, a piece": lambda: permute(KEY, 10**9, 10**8, out),
        "rows of a window": lambda: finder.find(0, block, row),
        "numpy's shuffle": lambda: random.permutation(n),
        "copy": lambda: np.copyto(out, source),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(given.repetitions):
        for name, work in ways.items():
            found[name] += timed(work, 1)
    median = {name: statistics.median(times) for name, times in found.items()}
    rows = [
        {
            "stage": "speed",
            "case": name,
            "million_per_s": spread([n / time_s / 1e6 for time_s in times]),
            "of_shuffle": median["numpy's shuffle"] / median[name],
            "of_copy": median["copy"] / median[name],
        }
        for name, times in found.items()
    ]
    lines = [
        [row["case"], f"{row['million_per_s']['median']:.0f}", f"{row['of_shuffle']:.2f}", f"{row['of_copy']:.3f}"]
        for row in rows
    ]
    print(table(["indices", "million/s", "x numpy's shuffle", "x copy"], lines), end="\n\n")
    return rows


def made_up(n_records: int, n_shards: int, n_blocks: int) -> DatasetSizes:
    """Return the sizes of equal shards with equal blocks; reading a block table costs as much as making two arrays."""
    per_block = n_records // n_shards // n_blocks

    def tables(shards: Sequence[int]) -> list[BlockSizes]:
        return [BlockSizes(np.full(n_blocks, per_block), np.full(n_blocks, per_block * RECORD_BYTES)) for _ in shards]

    records = np.full(n_shards, per_block * n_blocks)
    return DatasetSizes(records, records * RECORD_BYTES, tables)


def resume(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the milliseconds from the sizes of a data set and an offset to the first piece's rows."""
    n_shards = 250 if given.quick else 10_000
    sizes = made_up(n_shards * 100_000, n_shards, 100)
    options = OrderOptions(1, True, 4 << 30, 256 << 20, 8)
    spec = MixtureSpec((0, n_shards // 2, n_shards * 9 // 10), (0.7, 0.2, 0.1))
    orders: dict[str, Callable[[], Order]] = {
        "one data set": lambda: EpochOrder(sizes, options, 3),
        "mixture of three": lambda: MixtureOrder(sizes, spec, options, 3),
    }
    rows = []
    for name, make in orders.items():
        n = make().n_records
        for share in (0.0, 0.33, 0.9999):

            def first_piece(make: Callable[[], Order] = make, offset: int = int(n * share), n: int = n) -> None:
                next(cut_pieces(make(), RankPlan(offset, 8, 5, 256, False, n, 8))).rows()

            times_ms = [time_s * 1e3 for time_s in timed(first_piece, given.repetitions)]
            rows.append({"stage": "resume", "case": name, "records": n, "at": share, "ms": spread(times_ms)})
    lines = [[r["case"], f"{r['records']:.2e}", f"{r['at']:.2%}", f"{r['ms']['median']:.1f}"] for r in rows]
    print(table(["order", "records", "resumed at", "ms to the first piece"], lines), end="\n\n")
    return rows


def state(_: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the bytes of a state as JSON."""
    part = SourcePart("01234567-89ab-cdef-0123-456789abcdef", 1234, "0123456789abcdef" * 2)
    rows = []
    for name, n_parts in (("one data set", 1), ("mixture of three", 3)):
        mixture = {"weights": [7, 2, 1], "stop": "first"} if n_parts > 1 else None
        run = RunState(
            parts=(part,) * n_parts,
            seed=2**63,
            epoch=123,
            offset=10**9,
            shuffle=True,
            drop_last=False,
            streams=64,
            placement="sticky",
            group_bytes=4 << 30,
            window_bytes=256 << 20,
            mixture=mixture,
        )
        rows.append({"stage": "state", "case": name, "bytes": len(json.dumps(run.to_dict()))})
    print(table(["state", "bytes"], [[row["case"], str(row["bytes"])] for row in rows]), end="\n\n")
    return rows


def quality(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Return statistics of the order alone, over several seeds; no data is needed."""
    n = 3_000 if given.quick else 28_672
    rows = []
    for setting in SETTINGS:
        orders = [setting.order(n, seed, epoch=seed) for seed in range(given.seeds)]
        figures = {
            "correlation": [rank_correlation(order) for order in orders],
            "clumping_32": [clumping(order, 32) for order in orders],
            "clumping_group": [clumping(order, n // 20) for order in orders],
        }
        rows.append({"stage": "quality", "case": setting.name, **{k: spread(v) for k, v in figures.items()}})
        rows[-1]["mean_abs_correlation"] = statistics.mean(map(abs, figures["correlation"]))
    lines = [
        [
            row["case"],
            f"{row['mean_abs_correlation']:.3f}",
            f"{row['clumping_32']['median']:.2f}",
            f"{row['clumping_group']['median']:.1f}",
        ]
        for row in rows
    ]
    print(table(["order", "|correlation|", "runs of 32", "runs of 1/20"], lines), end="\n\n")
    return rows


def training(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Return held-out loss and accuracy of networks trained with each setting, over several seeds."""
    torch.set_num_threads(1)
    tasks = [(digits(), Training(2 if given.quick else 10, 16, 0.02, decays=True))]
    if not given.quick:
        tasks.append((sources(2048), Training(3, 32, 0.02, decays=True)))
    return [row for task, how in tasks for row in trained(task, how, given.seeds)]


def trained(task: Task, how: Training, n_seeds: int) -> list[dict[str, Any]]:
    """Train all settings on one task."""
    jobs = [(setting, seed) for setting in SETTINGS for seed in range(n_seeds)]
    losses, hits = (found.reshape(len(SETTINGS), n_seeds) for found in train(task, jobs, how))
    rows = [
        {
            "stage": "training",
            "task": task.name,
            "records": len(task.y),
            "case": setting.name,
            "epochs": how.epochs,
            "loss": {"mean": float(loss.mean()), "deviation": float(loss.std(ddof=1))},
            "accuracy": {"mean": float(hit.mean()), "deviation": float(hit.std(ddof=1))},
        }
        for setting, loss, hit in zip(SETTINGS, losses, hits, strict=True)
    ]
    lines = [
        [row["case"], *(f"{row[what]['mean']:.4f} +- {row[what]['deviation']:.4f}" for what in ("loss", "accuracy"))]
        for row in rows
    ]
    print(table([f"{task.name}, {n_seeds} seeds", "held-out loss", "held-out accuracy"], lines), end="\n\n", flush=True)
    return rows


def main() -> None:
    """Measure, print and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=5, help="Number of seeds, 2 or more.")
    parser.add_argument("--folder", type=Path, default=OUT, help="Folder for the rows.")
    parser.add_argument("--quick", action="store_true", help="Smoke test: small data.")
    given = parser.parse_args()
    stages = {"speed": speed, "resume": resume, "state": state, "quality": quality, "training": training}
    write_rows(given.folder / "order.jsonl", [row for name in given.only for row in stages[name](given)])


if __name__ == "__main__":
    main()
