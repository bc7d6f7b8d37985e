"""One task of one contender, in a process of its own: `python -m peers.child JSON`, whose last line is the result."""

from __future__ import annotations

import importlib
import itertools
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from consumer import Consumer, shuffle_quality
from peers.catalogue import PEERS
from peers.job import Job, UnsupportedError, job_of
from processes import PeakMemory, cpu_s, private_bytes

TUNE_S = 1.5

Epoch = Callable[[], Iterator[dict[str, Any]]]
Reader = Callable[[Iterator[dict[str, Any]]], None]


def stored_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def pack(adapter: Any, job: Job) -> dict[str, Any]:
    """Pack the records anew, and say how fast and how large."""
    ways = {"pack": "records_per_s", "pack_one_by_one": "one_by_one_records_per_s"}
    found: dict[str, Any] = {}
    for way, measure in reversed(ways.items()):
        if not hasattr(adapter, way):
            continue
        if job.path.exists():
            shutil.rmtree(job.path)
        job.path.mkdir(parents=True)
        started = time.perf_counter()
        getattr(adapter, way)(job.source, job.path)
        found[measure] = job.workload.n_records / (time.perf_counter() - started)
        found["stored_bytes"] = stored_bytes(job.path)
    return found


def tune(adapter: Any, job: Job) -> dict[str, Any]:
    """How fast the batches come for a little while, with the job's number of workers; the first one is not counted."""
    consumer, n_samples = Consumer(job.source), 0
    with adapter.opened(job) as opened:
        batches = opened.epoch()
        next(batches)
        started = time.perf_counter()
        for batch in batches:
            consumer.read([batch])
            n_samples += len(batch["label"])
            if time.perf_counter() - started > TUNE_S:
                break
        took_s = time.perf_counter() - started
        batches.close()
    return {"samples_per_s": n_samples / took_s if n_samples else 0.0}


def measure(adapter: Any, job: Job) -> dict[str, Any]:
    """One repetition: a checked epoch, which also gives first batch, memory and order; then the timed ones."""
    consumer, idle_bytes = Consumer(job.source), private_bytes()
    started = time.perf_counter()
    with adapter.opened(job) as opened:
        batches = opened.epoch()
        first = next(batches)
        first_batch_s = time.perf_counter() - started
        with PeakMemory() as peak:
            consumer.check_records(itertools.chain([first], batches))
        del first, batches
        # What a loader has read ahead when the clock starts shall be what it has when it stops, not what it gathered
        # while records were checked: some epochs go before.
        timing(consumer, consumer.read, opened.epoch, job.min_s / 2)
        every, n_epochs = timing(consumer, consumer.read, opened.epoch, job.min_s)
        touching = Consumer(job.source)
        touched, _ = timing(touching, touching.read_first, opened.epoch, job.min_s)
        consumer.check_sums(n_epochs)
    return {
        "first_batch_s": first_batch_s,
        "peak_private_bytes": peak.n_bytes,
        "idle_private_bytes": idle_bytes,
        "note": opened.note,
        **shuffle_quality(consumer.order),
        "every": every,
        "first": touched,
    }


def timing(consumer: Consumer, read: Reader, epoch: Epoch, min_s: float) -> tuple[dict[str, float], int]:
    """Whole epochs read until they took min_s together: the figures, and how many there were.

    Raises:
        WrongBatchesError: a record did not come once an epoch.
    """
    consumer.reset()
    n_epochs, cpu_before, started = 0, cpu_s(), time.perf_counter()
    while n_epochs == 0 or time.perf_counter() - started < min_s:
        read(epoch())
        n_epochs += 1
    took_s, took_cpu_s = time.perf_counter() - started, cpu_s() - cpu_before
    consumer.check_counts(n_epochs)
    n_samples = n_epochs * len(consumer.seen)
    figures = {
        "samples_per_s": n_samples / took_s,
        "cpu_s_per_million": took_cpu_s / n_samples * 1e6,
        "wait_share": consumer.wait_s / took_s,
    }
    return figures, n_epochs


def run(job: Job) -> dict[str, Any]:
    """Do the task. Returns its figures, or why it cannot be done as "unsupported"."""
    adapter = importlib.import_module(f"peers.adapters.{job.peer}")
    try:
        found = {"pack": pack, "tune": tune, "measure": measure}[job.task](adapter, job)
    except UnsupportedError as error:
        return {"unsupported": str(error)}
    return {**found, "version": version(adapter, PEERS[job.peer].distribution)}


def version(adapter: Any, distribution: str) -> str:
    """Of what is measured: as the adapter says, else as it was installed."""
    return getattr(adapter, "VERSION", "") or (metadata.version(distribution) if distribution else "")


if __name__ == "__main__":
    print("\n" + json.dumps(run(job_of(json.loads(sys.argv[1])))), flush=True)
