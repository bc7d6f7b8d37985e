"""One contender, one repetition, in a process of its own: checks an untimed epoch, times some, prints one JSON object.

Run by bench_loader.py as `python contenders.py JSON`, where JSON is a Job.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tiercache as tc
from floor import Floor
from workloads import Consumer, Workload

SEED = 7
Epoch = Callable[[], Iterator[dict[str, torch.Tensor]]]


@dataclass(frozen=True, slots=True)
class Job:
    """What a child process does.

    Attributes:
        contender: "tiercache", "torch" or "floor".
        workers: worker processes of torch's loader.
        workload: as the fields of a Workload.
        folder: of the generated columns, with the packed data set in "packed".
        library_folder: where the compiled floor lies.
        read: "every" byte or the "first" word of each batch.
        min_s: epochs are repeated until they took so long together.
    """

    contender: str
    workers: int
    workload: dict[str, Any]
    folder: str
    library_folder: str
    read: str
    min_s: float


class InMemory(torch.utils.data.Dataset[dict[str, Any]]):
    """A map-style data set of tensors in memory: the simplest that torch's loader can be given, and its fastest."""

    def __init__(self, columns: dict[str, np.ndarray]) -> None:
        self._values = torch.from_numpy(np.array(columns["values"]))
        self._labels = torch.from_numpy(np.array(columns["label"]))

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"values": self._values[index], "label": self._labels[index]}


@contextmanager
def tiercache_epochs(workload: Workload, job: Job) -> Iterator[Epoch]:
    """Our loader with default options, but for the full shuffle."""
    options = tc.LoaderOptions(seed=SEED, shuffle_group_bytes="all", shuffle_window_bytes="all")
    dataset = tc.Dataset(Path(job.folder, "packed"))
    loader = tc.DataLoader(dataset, batch_size=workload.batch_size, shuffle=True, options=options)
    yield lambda: iter(loader)


@contextmanager
def torch_epochs(workload: Workload, job: Job) -> Iterator[Epoch]:
    """The loader of torch; its workers stay over the epochs, so that starting them is not timed."""
    warnings.filterwarnings(
        "ignore", message="This DataLoader will create"
    )  # more workers than cores are tried on purpose
    loader = torch.utils.data.DataLoader(
        InMemory(workload.columns(Path(job.folder))),
        batch_size=workload.batch_size,
        shuffle=True,
        num_workers=job.workers,
        persistent_workers=job.workers > 0,
        generator=torch.Generator().manual_seed(SEED),
    )
    yield lambda: iter(loader)


@contextmanager
def floor_epochs(workload: Workload, job: Job) -> Iterator[Epoch]:
    """The plain C gather, a thread a core."""
    n_threads = len(os.sched_getaffinity(0))
    floor = Floor(workload.columns(Path(job.folder)), workload.batch_size, n_threads, Path(job.library_folder))
    rng = np.random.default_rng(SEED)
    yield lambda: floor.epoch(rng.permutation(workload.n_records))
    floor.close()


CONTENDERS = {"tiercache": tiercache_epochs, "torch": torch_epochs, "floor": floor_epochs}


def cpu_s() -> float:
    """Processor seconds of this process and its living workers."""
    ticks = 0
    for pid in (os.getpid(), *(child.pid for child in active_children())):
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(after_name[11]) + int(after_name[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def measure(job: Job) -> dict[str, float]:
    """Run the job. Raises WrongBatchesError if a record is missing, doubled or changed."""
    workload = Workload(**{**job.workload, "shape": tuple(job.workload["shape"])})
    consumer = Consumer(workload, np.load(Path(job.folder, "sums.npy")))
    read = {"every": consumer.read, "first": consumer.read_first}[job.read]
    with CONTENDERS[job.contender](workload, job) as epoch:
        consumer.check_records(epoch())
        consumer.reset()
        n_epochs, cpu_before, started = 0, cpu_s(), time.perf_counter()
        while n_epochs == 0 or time.perf_counter() - started < job.min_s:
            read(epoch())
            n_epochs += 1
        took_s, took_cpu_s = time.perf_counter() - started, cpu_s() - cpu_before
    if job.read == "every":
        consumer.check_sums(n_epochs)
    else:
        consumer.check_counts(n_epochs)
    n_samples = n_epochs * workload.n_records
    return {
        "samples_per_s": n_samples / took_s,
        "bytes_per_s": n_samples * (workload.record_bytes + 8) / took_s,
        "cpu_s_per_million": took_cpu_s / n_samples * 1e6,
        "wait_share": consumer.wait_s / took_s,
        "epochs": n_epochs,
    }


if __name__ == "__main__":
    print(json.dumps(measure(Job(**json.loads(sys.argv[1])))))
