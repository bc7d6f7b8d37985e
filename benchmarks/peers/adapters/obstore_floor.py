"""The plain client of a store: obstore reads raw shards by ranges in threads, which also write them to the disk."""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import obstore
import obstore.store

from peers import raw_shards
from peers.job import Job, Opened

if TYPE_CHECKING:
    from collections.abc import Iterator

pack = raw_shards.pack
RANGE_BYTES = 8 << 20
N_THREADS = 16


@contextmanager
def opened(job: Job) -> Iterator[Opened]:
    """Yield the reader. Its address and keys are those of the environment."""
    store = obstore.store.from_url(
        job.url, config={"endpoint": os.environ["AWS_ENDPOINT_URL"]}, client_options={"allow_http": True}
    )
    with ThreadPoolExecutor(N_THREADS) as pool:
        yield Opened(lambda: _epoch(job, store, pool), f"{N_THREADS} threads, ranges of {RANGE_BYTES >> 20} MiB")


def _epoch(job: Job, store: Any, pool: ThreadPoolExecutor) -> Iterator[dict[str, Any]]:
    """Yield batches that are views of the ranges."""
    kind, step, fds = raw_shards.record_type(job.workload), job.workload.batch_size, []

    def read(name: str, fd: int, start: int, stop: int) -> np.ndarray:
        piece = memoryview(obstore.get_range(store, name, start=start * kind.itemsize, end=stop * kind.itemsize))
        os.pwrite(fd, piece, start * kind.itemsize)
        return np.frombuffer(piece, kind)

    def batches(records: np.ndarray) -> Iterator[dict[str, Any]]:
        for start in range(0, len(records), step):
            yield {name: records[name][start : start + step] for name in kind.names or ()}

    waiting: deque[Any] = deque()
    n_ranged = max(RANGE_BYTES // kind.itemsize // step, 1) * step
    try:
        for name, numbers in raw_shards.shards(job.workload):
            path = Path(job.cache_folder, Path(name).name)
            fds.append(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
            for start in range(0, len(numbers), n_ranged):
                stop = min(start + n_ranged, len(numbers))
                waiting.append(pool.submit(read, name, fds[-1], start, stop))
                if len(waiting) >= N_THREADS:
                    yield from batches(waiting.popleft().result())
        while waiting:
            yield from batches(waiting.popleft().result())
    finally:
        wait(waiting)  # after an error, threads may still write
        for fd in fds:
            os.close(fd)
