"""Bytes fetched per epoch for a data set that is larger than the cache, by policy, compared with the lower bound.

    python benchmarks/bench_cache_epochs.py [--only one two nodes jobs peers] [--resume] [--into FOLDER]

The loader reads a data set of 320 shards, shuffled in groups of 4 shards (as 4 GiB of 320 GiB) and windows of one
shard, through the cache from a store (HTTP on loopback; with --store s3: SeaweedFS). Each epoch of each rank runs in a
process of its own, so that only the cache's folder outlives it, and at most two windows are in memory. The server
counts the bytes.

one, two: one node with one or two ranks; the cache holds a fraction f of the data set, so at least 1 - f is fetched.
nodes: 2, 4 or 8 nodes with a cache each; shards are assigned anew in each epoch (placement="global"); compared with
Belady's MIN; 24 epochs.
jobs: two concurrent jobs, one of them a mixture, compared with the simulator's result for the trace.
peers (only on request): MosaicML Streaming and LitData with their own cache limits, on the same records and with the
same budget, in environments of their own; they copy from a folder.

The rows are written to cache_epochs.jsonl as they are measured; --resume keeps existing rows. --quick uses small data.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parent))  # For processes that this script starts.

from cachebench.bounds import belady, lru_share
from cachebench.data import Packed, Served, Sizes, pack, serving, serving_s3
from cachebench.jobs import Job, Nursery
from cachebench.peers import epochs_of, peer_job
from cachebench.report import show
from ledger import Ledger
from rows import OUT, machine

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

POLICIES = ("plan", "lru")
SHARES = (0.1, 0.25, 0.5, 0.75)
NODES = (2, 4, 8)
# With 8 nodes, MIN itself fetched 0.41, 0.28 and 0.47 in the first three warm epochs, so three epochs say little about
# a cache.
NODES_EPOCHS = 24
# Without the peers, which need environments of their own.
PARTS = ("one", "two", "nodes", "jobs")
PEER_SHARES = (0.25, 0.75)
Case = dict[str, Any]


class Bench:
    """One run: the data, its server, and the processes that read it."""

    def __init__(self, given: argparse.Namespace, stack: ExitStack) -> None:
        self.given, self.folder = given, given.folder / "cache_epochs"
        sizes = Sizes(given.shards, given.shard_kib << 10)
        self.main = pack(self.folder, "main", sizes)
        self.other = pack(self.folder, "other", replace(sizes, n_shards=given.shards // 2))
        serve = serving if given.store == "http" else serving_s3
        self.served: Served = stack.enter_context(serve(self.main, self.other))
        self.nursery = Nursery()

    def job(self, case: Case, *packed: Packed, cache: str = "cache") -> Job:
        """Return a job over these data sets with the cache of the case."""
        room = sum(one.budget(case["f"]) for one in packed)
        return Job(
            urls=tuple(self.served.url(one) for one in packed),
            cache_dir=str(self.folder / cache),
            cache_bytes=room,
            policy=case["policy"],
            epoch=0,
            group_bytes=self.given.group_shards * self.given.shard_kib << 10,
            window_bytes=self.given.shard_kib << 10,
            storage_options=self.served.storage_options,
        )

    def epochs(self, jobs: Sequence[Job], n_epochs: int) -> list[Case]:
        """Run jobs concurrently, epoch by epoch, from empty caches. Return the figures of each epoch."""
        for job in jobs:
            shutil.rmtree(job.cache_dir, ignore_errors=True)
        found = []
        for epoch in range(n_epochs):
            self.served.taken()
            each = self.nursery.run([replace(job, epoch=epoch) for job in jobs])
            taken = self.served.taken()
            sent = sum(n for key, n in taken.items() if key) if taken else sum(one["fetched_bytes"] for one in each)
            for job, one in zip(jobs, each, strict=True):
                # The records of a mixture come from two data sets that both number them from 0.
                twice = len(job.urls) == 1 and one["n_distinct"] != one["n_records"]
                if twice or one["used_bytes"] > one["limit_bytes"]:
                    raise RuntimeError(f"a record was served twice, or the cache exceeded its size: {one}")
            found.append({"bytes": sent, "other_bytes": taken.get("", 0), "ranks": each})
        return found


def summary(found: Sequence[Case], n_cold: int, n_bytes: int) -> Case:
    """Return the summary of epochs for a row."""
    ranks = [rank for epoch in found[n_cold:] for rank in epoch["ranks"]]
    shares = [epoch["bytes"] / n_bytes for epoch in found]
    return {
        "share": mean(shares[n_cold:]),
        "epochs": shares,
        "wall_s": mean(max(rank["wall_s"] for rank in epoch["ranks"]) for epoch in found[n_cold:]),
        "private_mib": max(rank["private_bytes"] for rank in ranks) / 2**20,
        "bytes_from": {name: sum(rank["bytes_from"][name] for rank in ranks) for name in ranks[0]["bytes_from"]},
        "evicted": sum(rank["counters"].get("evicted", 0) for rank in ranks),
    }


def one_node(bench: Bench, case: Case) -> Case:
    """Measure one node with case["ranks"] ranks that share its cache."""
    job, n_ranks = bench.job(case, bench.main), case["ranks"]
    jobs = [replace(job, rank=rank, world_size=n_ranks) for rank in range(n_ranks)]
    found = summary(bench.epochs(jobs, 1 + bench.given.epochs), 1, bench.main.n_bytes)
    return found | {"bound": 1 - case["f"], "bound_of": "1 - f", "expected_of_lru": lru_share(case["f"])}


def nodes(bench: Bench, case: Case) -> Case:
    """Measure several nodes, each with one rank and one cache."""
    n_nodes = case["nodes"]
    n_cold, n_epochs = (1, 1) if bench.given.quick else (n_nodes, max(bench.given.epochs, NODES_EPOCHS))
    jobs = [
        replace(bench.job(case, bench.main, cache=f"cache-{rank}"), rank=rank, world_size=n_nodes, placement="global")
        for rank in range(n_nodes)
    ]
    found = summary(bench.epochs(jobs, n_cold + n_epochs), n_cold, bench.main.n_bytes)
    bound = belady(bench.main, jobs, n_cold, n_epochs, case["f"])
    return found | {"bound": bound, "bound_of": "MIN"}


def jobs(bench: Bench, case: Case) -> Case:
    """Measure a job on one data set concurrent with a job on a mixture, with one cache."""
    job = bench.job(case, bench.main, bench.other)
    both = [replace(job, urls=job.urls[:1]), replace(job, seed=2)]
    n_bytes = bench.main.n_bytes + bench.other.n_bytes
    epochs = bench.epochs(both, 1 + bench.given.epochs)
    return summary(epochs, 1, n_bytes) | {"bound": 1 - case["f"], "bound_of": "1 - f"}


def peers(bench: Bench, case: Case) -> Case:
    """Measure another library's own cache with the same budget on the same records."""
    job = peer_job(case["policy"], bench.main, case["f"], bench.folder)
    return epochs_of(job | {"group_shards": bench.given.group_shards}, case["f"], 1 + bench.given.epochs)


RUNS = {"one": one_node, "two": one_node, "nodes": nodes, "jobs": jobs, "peers": peers}


def cases(given: argparse.Namespace) -> Iterator[Case]:
    """Yield the cases of this run."""
    quick = given.quick
    shares = (0.25,) if quick else SHARES
    policies = ("plan", "lru") if quick else POLICIES
    yield from ({"part": "one", "ranks": 1, "policy": p, "f": f} for p in policies for f in shares)
    yield from ({"part": "two", "ranks": 2, "policy": "plan", "f": f} for f in shares)
    yield from ({"part": "two", "ranks": 2, "policy": p, "f": 0.25} for p in policies[1:])
    for n in (2,) if quick else NODES:
        yield from ({"part": "nodes", "nodes": n, "policy": p, "f": 0.25} for p in policies[:2])
    yield from ({"part": "jobs", "policy": p, "f": 0.25} for p in policies)
    yield from ({"part": "peers", "policy": p, "f": f} for p in ("mosaic", "lit") for f in PEER_SHARES)


def main() -> None:
    """Measure, print and write the rows, and write a table into a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=RUNS, default=PARTS)
    parser.add_argument("--policy", nargs="+", default=None, help="Policies to run. Default: all.")
    parser.add_argument("--shards", type=int, default=320)
    parser.add_argument("--shard-kib", type=int, default=512)
    parser.add_argument("--group-shards", type=int, default=4, help="Number of shards in a shuffle group.")
    parser.add_argument(
        "--epochs", type=int, default=3, help="Number of measured epochs, after those that fill the cache."
    )
    parser.add_argument("--store", choices=("http", "s3"), default="http")
    parser.add_argument("--folder", type=Path, default=OUT, help="Folder for data, caches and rows.")
    parser.add_argument("--resume", action="store_true", help="Keep existing rows, and measure only the missing cases.")
    parser.add_argument("--into", type=Path, help="Folder for cache_epochs.md.")
    parser.add_argument("--quick", action="store_true", help="Smoke test: small data.")
    given = parser.parse_args()
    if given.quick:
        given.shards, given.shard_kib, given.epochs = 24, 64, 1
    ledger = Ledger(given.folder / "cache_epochs.jsonl", resume=given.resume)
    with ExitStack() as stack:
        bench = Bench(given, stack)
        facts = {"shards": given.shards, "shard_kib": given.shard_kib, "store": given.store, "n_epochs": given.epochs}
        facts["group_shards"] = given.group_shards
        for case in cases(given):
            wanted = case["part"] in given.only and (given.policy is None or case["policy"] in given.policy)
            if wanted and ledger.get(case | facts) is None:
                found = RUNS[case["part"]](bench, case)
                ledger.put(case | facts, machine() | found)
                print(json.dumps(case | {name: found.get(name) for name in ("share", "bound")}), flush=True)
    text = show([case | found for case, found in ledger.all()])
    print(text)
    if given.into:
        (given.into / "cache_epochs.md").write_text(f"# Bytes that an epoch fetches\n\n{text}")


if __name__ == "__main__":
    main()
