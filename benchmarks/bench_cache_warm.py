"""Planning of `tiercache warm` for many shards: the metadata of a very large data set in a store without the bytes.

    python benchmarks/bench_cache_warm.py [--shards 100000] [--here 10000] [--repetitions 5]

open: read the newest version and its segments. choose: the shards of one rank of eight in its reading order. plan:
which shards are missing and whether they fit, for an empty cache and for a cache with some shards (files without
bytes). names: the lower bound of `plan`, without a cache. dry run: the whole command in a process of its own, including
imports. The rows are written to cache_warm.jsonl. --quick uses small data.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rows import OUT, spread, table, write_rows
from tiercache.cache import Cache
from tiercache.cache.names import name_of_identity
from tiercache.cli.selection import ShardSelection, Training
from tiercache.model import ShardInfo
from tiercache.shard.schema import Schema
from tiercache.shard.versions.commit import commit
from tiercache.shard.versions.manifest import latest, read_shards
from tiercache.store import open_store

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tiercache.model import ShardIdentity

SHARD_BYTES = 1 << 20
N_RANKS = 8


def make(folder: Path, n_shards: int) -> list[tuple[str, ShardIdentity]]:
    """Write a data set with a version and segments only. Return keys and identities of its shards."""
    sizes = np.random.default_rng(0).integers(SHARD_BYTES // 2, SHARD_BYTES * 3 // 2, n_shards).tolist()
    infos = [
        ShardInfo(f"shards/{i:012d}.tcs", f"{i:032x}", 100, size, i, size - 1200, 1168) for i, size in enumerate(sizes)
    ]
    store = open_store(str(folder))
    version = commit(store, infos, schema=Schema.of({"x": "int64"}), mode="create")
    return read_shards(store, version).objects(version.dataset_id, np.arange(n_shards))


def fill(path: Path, url: str, objects: Sequence[tuple[str, ShardIdentity]]) -> None:
    """Put copies of the objects into the cache: sparse files of the right size, and their catalog entries."""
    with Cache(path, size="100TB", min_free="0%") as cache:
        store = cache.store(open_store(url))
        for key, identity in objects:
            wanted = store.spec_of(key, identity)
            if wanted is None:
                raise RuntimeError("a shard has no identity")
            copy = path / "copies" / wanted.name
            copy.touch(0o600)
            os.truncate(copy, identity.n_bytes)
            copy.chmod(0o400)
            record = path / "copies" / f"{wanted.name}.json"
            record.write_text(wanted.record(identity.crc32c).to_json() + "\n")
            record.chmod(0o600)


def timed(work: Callable[[], Any], repetitions: int) -> dict[str, float]:
    """Return the seconds of several repetitions, after one that is not counted."""
    found = []
    for _ in range(repetitions + 1):
        start_s = time.perf_counter()
        work()
        found.append(time.perf_counter() - start_s)
    return spread(found[1:])


def dry_run(url: str, cache: Path) -> None:
    """Run the whole command."""
    command = [sys.executable, "-m", "tiercache.cli", "warm", url, "--cache", str(cache), "--cache-size", "100TB"]
    subprocess.run([*command, "--dry-run", "--seed", "1"], check=True, stdout=subprocess.DEVNULL)


def measure(given: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Measure all cases on one data set and two caches."""
    url = str(folder / "set")
    objects = make(folder / "set", given.shards)
    fill(folder / "some", url, objects[:: max(given.shards // given.here, 1)])
    store = open_store(url)
    shards = read_shards(store, latest(store))
    choice = ShardSelection(training=Training(1, ranks=(3,), world_size=N_RANKS))
    with (
        Cache(folder / "empty", size="100TB", min_free="0%") as empty,
        Cache(folder / "some", size="100TB", min_free="0%") as some,
    ):
        cases: dict[str, Callable[[], Any]] = {
            "open": lambda: read_shards(store, latest(store)),
            "choose, one rank of 8": lambda: choice.shards(shards),
            "names": lambda: [name_of_identity(identity) for _, identity in objects],
            "plan, empty cache": lambda: empty.plan_warm(store, objects),
            f"plan, {given.here:,} here": lambda: some.plan_warm(store, objects),
            "dry run, the command": lambda: dry_run(url, folder / "some"),
        }
        facts = {"shards": given.shards, "here": given.here, "data_bytes": int(shards.n_bytes.sum())}
        return [{"case": name, **facts, "seconds": timed(work, given.repetitions)} for name, work in cases.items()]


def main() -> None:
    """Measure, write the rows, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--here", type=int, default=10_000, help="Number of shards in the fuller cache.")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    if given.quick:
        given.shards, given.here, given.repetitions = 1000, 100, 1
    folder = Path(tempfile.mkdtemp(prefix="bench-cache-warm-"))
    try:
        rows = measure(given, folder)
    finally:
        shutil.rmtree(folder)
    write_rows(OUT / "cache_warm.jsonl", rows)
    lines = [
        [row["case"], f"{row['seconds']['median']:.3f}", f"{1e6 * row['seconds']['median'] / given.shards:.1f}"]
        for row in rows
    ]
    print(table([f"{given.shards:,} shards", "s", "us per shard"], lines))


if __name__ == "__main__":
    main()
