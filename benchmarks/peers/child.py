"""One task of one contender, in its own process: `python -m peers.child JSON`; the last line is the result."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import statistics
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from consumer import Consumer, shuffle_quality
from peers.catalogue import PEERS
from peers.job import Job, UnsupportedError, job_of
from peers.spans import Batches, Stream, read_for, timing
from processes import PeakMemory, cpu_s, private_bytes

TUNE_S = 0.5
PACK_TIMES, PACK_S = 3, 10.0


def stored_bytes(folder: Path) -> int:
    """Return the bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def sync(folder: Path) -> None:
    """Wait until all files below a folder are on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)


def pack(adapter: Any, job: Job) -> dict[str, Any]:
    """Pack the records anew. Return the speed, with all files on the disk, and the size."""
    ways = {"pack": "records_per_s", "pack_one_by_one": "one_by_one_records_per_s"}
    found: dict[str, Any] = {}
    for way, measure in reversed(ways.items()):
        if hasattr(adapter, way):
            found[measure] = job.workload.n_records / seconds_to_pack(getattr(adapter, way), job)
            found["stored_bytes"] = stored_bytes(job.path)
    return found


def seconds_to_pack(way: Any, job: Job) -> float:
    """Return the median of up to PACK_TIMES times that begin within PACK_S; the first one maps the source's pages."""
    took: list[float] = []
    while len(took) < PACK_TIMES and sum(took) < PACK_S:
        if job.path.exists():
            shutil.rmtree(job.path)
        job.path.mkdir(parents=True)
        started = time.perf_counter()
        way(job.source, job.path)
        sync(job.path)
        took.append(time.perf_counter() - started)
    return statistics.median(took)


def tune(adapter: Any, job: Job) -> dict[str, Any]:
    """Return the speed of a short run with the job's number of workers; the first batch is not counted."""
    consumer = Consumer(job.source)
    with adapter.opened(job) as opened:
        stream = Stream(opened.epoch)
        stream.first()
        stream.read(consumer.read, 0.0)
        found = timing(consumer, consumer.read, stream, TUNE_S)
        stream.close()
    return {"samples_per_s": found["samples_per_s"]}


def measure(adapter: Any, job: Job) -> dict[str, Any]:
    """Measure one repetition: first batch, the checked epoch if there is one, warm-up, then the timed spans."""
    consumer, idle_bytes, checked = Consumer(job.source), private_bytes(), {}
    started = time.perf_counter()
    with adapter.opened(job) as opened:
        stream = Stream(opened.epoch)
        stream.first()
        first_batch_s = time.perf_counter() - started
        with PeakMemory() as peak:
            if job.check_s:
                checked = check(consumer, stream, job)
            # The loader must have read ahead as much when the clock starts as when it stops, and the special work of
            # the first epoch must be over.
            read_for(consumer.read_and_forget, stream, job.min_s / 2)
        every = timing(consumer, consumer.read, stream, job.min_s)
        consumer.check_sums(every["n_epochs"], whole=every["whole"])
        touched = timing(consumer, consumer.merge_reads, stream, job.min_s / 2)
        stream.close()
    return {
        "first_batch_s": first_batch_s,
        "peak_private_bytes": peak.n_bytes,
        "idle_private_bytes": idle_bytes,
        "note": opened.note,
        **checked,
        "every": every,
        "first": touched,
    }


def check(consumer: Consumer, stream: Stream, job: Job) -> dict[str, Any]:
    """Check an epoch, or the part that comes in time, record by record. Return its share and the shuffle quality."""
    stream.read(consumer.check_records, time.perf_counter() + job.check_s)
    share = len(consumer.order) / job.workload.n_records
    return {"checked_share": share, **shuffle_quality(consumer.order, job.workload.n_records)}


def cold(adapter: Any, job: Job) -> dict[str, Any]:
    """Measure an epoch that begins without local copies. Each record is checked when it comes.

    Raises:
        WrongBatchesError: A record is not what was written, or was not served exactly once.
    """
    cache, consumer = Path(job.cache_folder), Consumer(job.source)
    if cache.exists():
        shutil.rmtree(cache)
    cache.mkdir(parents=True)
    # The pages that an earlier task wrote must not be written to the disk while this one is measured.
    os.sync()
    arrived_s: list[float] = []
    cpu_before_s, started_s = cpu_s(), time.perf_counter()
    with adapter.opened(job) as opened:
        consumer.check_records(noting(opened.epoch(), arrived_s))
        took_cpu_s = cpu_s() - cpu_before_s
    epoch_s = arrived_s[-1] - started_s
    return {
        "epoch_s": epoch_s,
        "first_batch_s": arrived_s[0] - started_s,
        "cpu_s": took_cpu_s,
        "samples_per_s": job.workload.n_records / epoch_s,
        "note": opened.note,
        **shuffle_quality(consumer.order, job.workload.n_records),
    }


def noting(batches: Batches, arrived_s: list[float]) -> Batches:
    """Yield the batches, and append the time at which each one came."""
    for batch in batches:
        arrived_s.append(time.perf_counter())
        yield batch


def run(job: Job) -> dict[str, Any]:
    """Run the task. Return its figures, or the reason why it cannot be run as "unsupported"."""
    if job.task == "measure" or job.url:
        # A training process has torch in memory, so each contender here does, whether it needs torch or not.
        importlib.import_module("torch")
    adapter = importlib.import_module(f"peers.adapters.{job.peer}")
    try:
        found = (cold if job.url else {"pack": pack, "tune": tune, "measure": measure}[job.task])(adapter, job)
    except UnsupportedError as error:
        return {"unsupported": str(error)}
    return {**found, "version": version(adapter, PEERS[job.peer].distribution)}


def version(adapter: Any, distribution: str) -> str:
    """Return the version of the contender, from the adapter or else from the installed distribution."""
    return getattr(adapter, "VERSION", "") or (metadata.version(distribution) if distribution else "")


if __name__ == "__main__":
    print("\n" + json.dumps(run(job_of(json.loads(sys.argv[1])))), flush=True)
