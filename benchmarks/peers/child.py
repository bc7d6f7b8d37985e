"""One task of one contender, in a process of its own: `python -m peers.child JSON`, whose last line is the result."""

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
from peers.spans import Stream, read_for, timing
from processes import PeakMemory, private_bytes

TUNE_S = 0.5
PACK_TIMES, PACK_S = 3, 10.0


def stored_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
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
    """Pack the records anew, and say how fast, all of it on the disk, and how large."""
    ways = {"pack": "records_per_s", "pack_one_by_one": "one_by_one_records_per_s"}
    found: dict[str, Any] = {}
    for way, measure in reversed(ways.items()):
        if hasattr(adapter, way):
            found[measure] = job.workload.n_records / seconds_to_pack(getattr(adapter, way), job)
            found["stored_bytes"] = stored_bytes(job.path)
    return found


def seconds_to_pack(way: Any, job: Job) -> float:
    """The median of PACK_TIMES times, or of as many as begin within PACK_S: the first one maps the source's pages."""
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
    """How fast the batches come for a little while, with the job's number of workers; the first one is not counted."""
    consumer = Consumer(job.source)
    with adapter.opened(job) as opened:
        stream = Stream(opened.epoch)
        stream.first()
        stream.read(consumer.read, 0.0)
        found = timing(consumer, consumer.read, stream, TUNE_S)
        stream.close()
    return {"samples_per_s": found["samples_per_s"]}


def measure(adapter: Any, job: Job) -> dict[str, Any]:
    """One repetition: first batch, the checked epoch if there is to be one, warming up, then the timed spans."""
    consumer, idle_bytes, checked = Consumer(job.source), private_bytes(), {}
    started = time.perf_counter()
    with adapter.opened(job) as opened:
        stream = Stream(opened.epoch)
        stream.first()
        first_batch_s = time.perf_counter() - started
        with PeakMemory() as peak:
            if job.check_s:
                checked = check(consumer, stream, job)
            # What a loader has read ahead when the clock starts shall be what it has when it stops, and what it does in
            # its first epoch only shall be over.
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
    """An epoch checked record by record, or what of it comes in time: its share, and what the shuffle is worth."""
    stream.read(consumer.check_records, time.perf_counter() + job.check_s)
    share = len(consumer.order) / job.workload.n_records
    return {"checked_share": share, **shuffle_quality(consumer.order, job.workload.n_records)}


def run(job: Job) -> dict[str, Any]:
    """Do the task. Returns its figures, or why it cannot be done as "unsupported"."""
    if job.task == "measure":
        # A training process has torch in memory, and so has each contender here, whether it needs it or not.
        importlib.import_module("torch")
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
