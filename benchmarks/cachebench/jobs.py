"""Epochs of jobs, each in a process of its own, forked from a warm process that never had threads."""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import resource
import threading
import time
import traceback
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tiercache as tc
from tiercache.cache import Cache

if TYPE_CHECKING:
    from collections.abc import Sequence
    from multiprocessing.connection import Connection

BATCH = 256
SAMPLE_S = 0.02
LONGEST_S = 120.0


@dataclass(frozen=True)
class Job:
    """One rank of one job over one epoch.

    Attributes:
        urls: URLs of the data sets; several are mixed in equal parts.
        cache_dir, cache_bytes, policy: Cache of the job; several jobs may use the same folder.
        epoch, seed, rank, world_size, placement, group_bytes, window_bytes: Options of the loader.
        storage_options: Options of the data sets' store.
    """

    urls: tuple[str, ...]
    cache_dir: str
    cache_bytes: int
    policy: str
    epoch: int
    seed: int = 1
    rank: int = 0
    world_size: int = 1
    placement: str = "sticky"
    group_bytes: int = 4 << 20
    window_bytes: int = 1 << 20
    storage_options: dict[str, Any] = field(default_factory=dict)


class _PrivateMemory:
    """Samples the private memory of this process from a thread."""

    def __init__(self) -> None:
        self.first_bytes = self.most_bytes = self._now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    @staticmethod
    def _now() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:"))

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            self.most_bytes = max(self.most_bytes, self._now())

    def end(self) -> int:
        """Stop sampling. Return the maximum growth in bytes."""
        self._stop.set()
        self._thread.join()
        return max(self.most_bytes, self._now()) - self.first_bytes


def run(job: Job) -> dict[str, Any]:
    """Read the epoch and return the figures of this process. Each record must be served exactly once."""
    # Expected here: the data set is larger than the cache.
    warnings.filterwarnings("ignore", message=".*will be fetched again in every epoch", category=RuntimeWarning)
    memory, started_s = _PrivateMemory(), time.perf_counter()
    cache = Cache(job.cache_dir, size=job.cache_bytes, policy=job.policy, min_free="0%")
    datasets = [tc.Dataset(url, cache=cache, storage_options=job.storage_options) for url in job.urls]
    dataset = datasets[0] if len(datasets) == 1 else tc.mix(datasets, [1.0] * len(datasets))
    options = tc.LoaderOptions(
        seed=job.seed,
        rank=job.rank,
        world_size=job.world_size,
        placement=job.placement,
        shuffle_group_bytes=job.group_bytes,
        shuffle_window_bytes=job.window_bytes,
        memory_bytes=2 * job.window_bytes,
    )
    loader = tc.DataLoader(dataset, batch_size=BATCH, shuffle=True, options=options)
    loader.set_epoch(job.epoch)
    ids: list[int] = []
    for batch in loader:
        ids += batch["id"].tolist()
    wall_s, stats, limit_bytes = time.perf_counter() - started_s, loader.stats(), cache.limit_bytes
    found = cache.stats()
    for one in datasets:
        one.close()
    cache.close()
    return {
        "pid": os.getpid(),
        "wall_s": wall_s,
        "n_records": len(ids),
        "n_distinct": len(set(ids)),
        "private_bytes": memory.end(),
        "cpu_s": sum(resource.getrusage(resource.RUSAGE_SELF)[:2]),
        "used_bytes": found["bytes_used"],
        "limit_bytes": limit_bytes,
        "fetched_bytes": stats["bytes_fetched"],
        "bytes_from": stats["bytes_from"],
        "counters": {name: int(value) for name, value in cache.counters.snapshot().items()},
    }


def _child(job: Job, answer: Connection) -> None:
    faulthandler.dump_traceback_later(LONGEST_S, exit=True)  # Dumps the stacks if the job does not end.
    try:
        answer.send(("found", run(job)))
    except BaseException:
        answer.send(("failed", traceback.format_exc()))
        raise
    finally:
        answer.close()


class Nursery:
    """Forks processes from one that has everything imported and nothing opened."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["torch", "cachebench.jobs"])

    def run(self, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        """Run jobs concurrently to their ends, each in a new process.

        Raises:
            RuntimeError: A job failed (with its traceback), or took longer than LONGEST_S.
        """
        started = []
        for job in jobs:
            here, there = self._context.Pipe(duplex=False)
            process = self._context.Process(target=_child, args=(job, there))
            process.start()
            there.close()
            started.append((job, process, here))
        found = []
        for job, process, here in started:
            if not here.poll(LONGEST_S):
                process.kill()
                raise RuntimeError(f"a job took longer than {LONGEST_S:.0f} s: {job}")
            kind, value = here.recv()
            process.join()
            if kind == "failed":
                raise RuntimeError(f"{json.dumps(job.__dict__)}\n{value}")
            found.append(value)
        return found
