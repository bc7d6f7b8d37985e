"""The baseline of augmentation: tiercache's decoder and its transforms on as many threads as cores, and no loader."""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

import tiercache as tc
from peers.adapters.tiercache import decode_options
from peers.columns import chunks
from peers.job import SEED, Job, Opened, cores
from tiercache.images.decode_image import ImageDraws
from tiercache.images.decoder import Decoder
from workloads import KEY

if TYPE_CHECKING:
    from collections.abc import Iterator

VERSION = tc.__version__
# One batch per thread, and one more, so that no thread waits.
AHEAD = cores() + 1


@contextmanager
def opened(job: Job) -> Iterator[Opened]:
    """Yield threads that decode whole batches of the mapped JPEGs."""
    cv2.setNumThreads(1)  # OpenCV's own threads would compete with ours
    rng, n = np.random.default_rng(SEED), job.workload.n_records
    with ThreadPoolExecutor(cores()) as pool:
        yield Opened(
            lambda: _epoch(job, rng.permutation(n) if job.shuffled else np.arange(n), pool), f"{cores()} threads"
        )


def _epoch(job: Job, order: np.ndarray, pool: ThreadPoolExecutor) -> Iterator[dict[str, Any]]:
    source, options, own = job.source, decode_options(job), threading.local()
    (field,) = source.workload.fields
    data, offsets, keys = np.asarray(source.data(field)), source.offsets(field).tolist(), source.keys
    draws = ImageDraws(SEED, 0, [options])
    shape = source.workload.batch_size, *options.batch_shape
    # Memory is used again, as by the loader: for the batches ahead, and for the one of the consumer and the one before.
    memory = [np.empty(shape, field.dtype) for _ in range(AHEAD + 2)]

    def batch(first: int, rows: np.ndarray) -> dict[str, Any]:
        if not hasattr(own, "decoder"):
            own.decoder = Decoder(options)
        out = memory[first // source.workload.batch_size % len(memory)][: len(rows)]
        drawn = draws.of(np.arange(first, first + len(rows)))
        for i, row in enumerate(rows.tolist()):
            own.decoder.decode_into(data[offsets[row] : offsets[row + 1]], drawn[i], out[i])
        return {field.name: out, KEY: keys[rows]}

    waiting: deque[Any] = deque()
    first = 0
    for rows in chunks(order, source.workload.batch_size):
        waiting.append(pool.submit(batch, first, rows))
        first += len(rows)
        if len(waiting) >= AHEAD:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
