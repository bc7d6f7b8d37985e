"""Time of a cache hit, loader speed on cached copies, and hit rate of many concurrent readers.

    python benchmarks/bench_cache.py [--only hit records readers] [--repetitions 7] [--quick]

hit: time to look up, lease, map and release a copy in an open data set, compared with open, flock, fstat, mmap and
close in plain Python and in C. The required median is below 20 us.
records: shuffled epochs of the loader on copies in the cache and on the same files in a local folder, interleaved.
readers: hits per second of 1 to 32 threads and processes, compared with the same system calls in plain Python; for
threads also the voluntary context switches per hit.

The rows are written to cache.jsonl. On a busy machine, run it under `chrt -f 10` (as root), but not with --kind
processes, because each process would then have a processor to itself, one after the other.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))  # For processes that this script starts.

import tiercache as tc
from cachebench.data import Sizes, pack
from cachebench.hits import by_hand, in_c, paths_of, through_cache
from cachebench.readers import objects_of, opened, rate_of_processes, rate_of_threads, spread_us
from rows import OUT, spread, table, write_rows
from tiercache.cache import Cache

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

REQUIRED_US = 20.0
READERS = (1, 2, 8, 32)
KINDS = ("threads", "processes")
Row = dict[str, Any]


def warmed(folder: Path, url: str) -> None:
    """Fill a cache with the whole data set."""
    shutil.rmtree(folder, ignore_errors=True)
    cache, store = opened(str(folder), url)
    cache.warm(store, objects_of(url))
    cache.close()


def hit(given: argparse.Namespace, folder: Path, url: str) -> list[Row]:
    """Return the times of single hits, interleaved."""
    objects = objects_of(url)
    cache, store = opened(str(folder), url)
    paths = paths_of(folder, objects)
    ways = {
        "through the cache": through_cache(store, objects),
        "by hand, Python": by_hand(paths),
        "by hand, C": in_c(paths, given.folder),
    }
    times: dict[str, list[np.ndarray]] = {name: [] for name in ways}
    for way in ways.values():
        way(0, len(objects))
    for _ in range(given.repetitions):
        for name, way in ways.items():
            times[name].append(_each(way, len(objects)))
    cache.close()
    rows = [{"stage": "hit", "case": name, **spread_us(np.concatenate(found))} for name, found in times.items()]
    floor = rows[1]["median"]
    return [row | {"of_floor": row["median"] / floor, "required_us": REQUIRED_US} for row in rows]


def _each(way: Callable[[int, int], None], n: int) -> np.ndarray:
    times, clock = np.zeros(n), time.perf_counter
    for number in range(n):
        started_s = clock()
        way(number, number + 1)
        times[number] = clock() - started_s
    return times


def records(given: argparse.Namespace, folder: Path, url: str) -> list[Row]:
    """Return the records per second of shuffled epochs of both ways, interleaved."""
    cache = Cache(folder, size="1TB", policy="lru", min_free="0%")
    ways = {"through the cache": tc.Dataset(url, cache=cache), "local folder": tc.Dataset(url, cache=False)}
    options = tc.LoaderOptions(seed=1, rank=0, world_size=1)
    loaders = {n: tc.DataLoader(one, batch_size=256, shuffle=True, options=options) for n, one in ways.items()}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for repetition in range(given.repetitions + 1):
        # The second loader finds the processor's caches filled with the other's data, so the order alternates.
        for name, loader in list(loaders.items())[:: 1 if repetition % 2 else -1]:
            started_s = time.perf_counter()
            n = sum(len(batch["id"]) for batch in loader)
            if repetition:  # The first epoch checks the pages.
                rates[name].append(n / (time.perf_counter() - started_s))
    for one in ways.values():
        one.close()
    cache.close()
    ratio = statistics.median(a / b for a, b in zip(*rates.values(), strict=True))
    return [{"stage": "records", "case": name, **spread(found), "ratio": ratio} for name, found in rates.items()]


def readers(given: argparse.Namespace, folder: Path, url: str) -> list[Row]:
    """Return the hits per second of many readers."""
    objects, min_s = objects_of(url), 0.05 if given.quick else 0.5
    cache, store = opened(str(folder), url)
    in_threads = {"cache": through_cache(store, objects), "by hand": by_hand(paths_of(folder, objects))}
    rows = []
    for n in READERS[:2] if given.quick else READERS:
        found: dict[tuple[str, str], list[float]] = {}
        waits: dict[tuple[str, str], list[float]] = {}
        for _ in range(given.repetitions):
            for how, way in in_threads.items():
                if "threads" in given.kind:
                    rate, n_waits = rate_of_threads(way, len(objects), n, min_s)
                    found.setdefault(("threads", how), []).append(rate)
                    waits.setdefault(("threads", how), []).append(n_waits)
                if "processes" in given.kind:
                    rate = rate_of_processes(how, str(folder), url, n, min_s)
                    found.setdefault(("processes", how), []).append(rate)
        rows += [
            {"stage": "readers", "kind": kind, "case": how, "n": n, **spread(rates)}
            | ({"waits": statistics.median(waits[kind, how])} if kind == "threads" else {})
            for (kind, how), rates in found.items()
        ]
    cache.close()
    return _scaled(rows)


def _scaled(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with their rate relative to one reader of the same kind."""
    alone = {(row["kind"], row["case"]): row["median"] for row in rows if row["n"] == 1}
    return [row | {"of_one": row["median"] / alone[row["kind"], row["case"]]} for row in rows]


def lines(rows: Sequence[Row]) -> Iterator[list[str]]:
    """Yield the cells of the printed table."""
    for row in rows:
        if row["stage"] == "hit":
            figure = f"{row['median']:.1f} us (p99 {row['p99']:.1f})"
            yield ["hit", row["case"], figure, f"{row['of_floor']:.2f} x by hand in Python"]
        elif row["stage"] == "records":
            yield [
                "records",
                row["case"],
                f"{row['median'] / 1e3:,.0f} thousand/s",
                f"cache : folder {row['ratio']:.2f}",
            ]
        else:
            figure = f"{row['median'] / 1e3:,.1f} thousand hits/s"
            waits = f", {row['waits']:.1f} waits a hit" if "waits" in row else ""
            yield [f"{row['n']} {row['kind']}", row["case"], figure, f"{row['of_one']:.2f} x one{waits}"]


STAGES = {"hit": hit, "records": records, "readers": readers}


def main() -> None:
    """Measure, print and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=KINDS, help="Kinds of readers.")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--shards", type=int, default=320)
    parser.add_argument("--folder", type=Path, default=OUT, help="Folder for data, cache and rows.")
    parser.add_argument("--into", type=Path, help="Folder for cache_hits.md.")
    parser.add_argument("--quick", action="store_true", help="Smoke test: small data.")
    given = parser.parse_args()
    if given.quick:
        given.shards, given.repetitions = 20, 2
    packed = pack(given.folder / "cache_hits", "hits", Sizes(given.shards, 512 << 10))
    folder, url = given.folder / "cache_hits" / "cache", str(packed.folder)
    warmed(folder, url)
    rows = [row for name in given.only for row in STAGES[name](given, folder, url)]
    write_rows(given.folder / "cache.jsonl", rows)
    found = list(lines(rows))
    print(table(["stage", "way", "median", "beside"], found))
    if given.into:
        header = (["stage", "way", "median", "beside"], ["---"] * 4)
        text = "\n".join("| " + " | ".join(cells) + " |" for cells in (*header, *found))
        (given.into / "cache_hits.md").write_text(f"# Hits of the cache\n\n{text}\n")


if __name__ == "__main__":
    main()
