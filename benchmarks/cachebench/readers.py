"""Many concurrent readers of one cache: threads of a process, or processes."""

from __future__ import annotations

import multiprocessing
import resource
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from cachebench.hits import by_hand, paths_of, through_cache
from tiercache.cache import Cache
from tiercache.shard.versions import latest, read_shards
from tiercache.store import open_store

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

    import numpy as np

    from cachebench.hits import Objects
    from tiercache.cache.cache import CachedStore

STEP = 16
START_S = 60.0


def objects_of(url: str) -> Objects:
    """Return keys and identities of a data set's shards."""
    store = open_store(url)
    version = latest(store)
    return [(info.name, info.identity(version.dataset_id)) for info in read_shards(store, version).infos()]


def opened(folder: str, url: str) -> tuple[Cache, CachedStore]:
    """Return a cache that holds a whole data set, and the data set's store through it."""
    cache = Cache(folder, size="1TB", policy="lru", min_free="0%")
    return cache, cache.store(open_store(url))


def timed(hit: Callable[[int, int], None], n_objects: int, min_s: float, first: int = 0) -> tuple[int, float]:
    """Hit repeatedly for at least min_s. Return (number of hits, seconds)."""
    at, n, started_s = first % n_objects, 0, time.perf_counter()
    while True:
        last = min(at + STEP, n_objects)
        hit(at, last)
        n += last - at
        at = last % n_objects
        took_s = time.perf_counter() - started_s
        if took_s >= min_s:
            return n, took_s


def rate_of_threads(
    hit: Callable[[int, int], None], n_objects: int, n_threads: int, min_s: float
) -> tuple[float, float]:
    """Return the hits per second of all threads, and the voluntary context switches per hit (waits for a lock)."""
    gate, rates, counts = threading.Barrier(n_threads), [0.0] * n_threads, [0] * n_threads
    waits = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw

    def read(number: int) -> None:
        gate.wait()
        n, took_s = timed(hit, n_objects, min_s, number * n_objects // n_threads)
        rates[number], counts[number] = n / took_s, n

    threads = [threading.Thread(target=read, args=(number,)) for number in range(n_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(rates), (resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw - waits) / sum(counts)


def _child(how: str, folder: str, url: str, min_s: float, number: int, pipe: Connection) -> None:
    objects = objects_of(url)
    cache, store = opened(folder, url)
    hit = through_cache(store, objects) if how == "cache" else by_hand(paths_of(Path(folder), objects))
    hit(0, len(objects))
    pipe.send("ready")
    pipe.recv()
    n, took_s = timed(hit, len(objects), min_s, number * 7)
    pipe.send(n / took_s)
    cache.close()


def rate_of_processes(how: str, folder: str, url: str, n_processes: int, min_s: float) -> float:
    """Return the hits per second of several processes together. how: "cache" or "by hand"."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cachebench.readers"])
    pipes, processes = [], []
    for number in range(n_processes):
        here, there = context.Pipe()
        process = context.Process(target=_child, args=(how, folder, url, min_s, number, there))
        process.start()
        there.close()
        pipes.append(here)
        processes.append(process)
    for pipe in pipes:
        if not pipe.poll(START_S) or pipe.recv() != "ready":
            raise RuntimeError("a reader did not start")
    for pipe in pipes:
        pipe.send("go")
    rate = sum(pipe.recv() for pipe in pipes)
    for process in processes:
        process.join()
    return float(rate)


def spread_us(times: np.ndarray) -> dict[str, float]:
    """Return minimum, median and 99th percentile of times in seconds, in microseconds."""
    times.sort()
    n = len(times)
    return {"min": times[0] * 1e6, "median": times[n // 2] * 1e6, "p99": times[n * 99 // 100] * 1e6}
