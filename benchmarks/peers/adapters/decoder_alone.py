"""The baseline of decoding: a decoder and OpenCV's linear resize, with as many threads as cores, and no loader."""

from __future__ import annotations

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import simplejpeg

from peers.catalogue import PICTURE_FORMS
from peers.columns import chunks
from peers.job import SEED, Job, Opened, cores
from workloads import DECODED_SIZE, KEY

if TYPE_CHECKING:
    from collections.abc import Iterator

# One batch per thread, and one more, so that no thread waits.
AHEAD = cores() + 1


@contextmanager
def opened(job: Job) -> Iterator[Opened]:
    """Yield threads that decode whole batches of the mapped JPEGs."""
    # OpenCV's own threads would compete with ours: a picture is too small to be divided.
    cv2.setNumThreads(1)
    rng, n = np.random.default_rng(SEED), job.workload.n_records
    with ThreadPoolExecutor(cores()) as pool:
        yield Opened(
            lambda: _epoch(job, rng.permutation(n) if job.shuffled else np.arange(n), pool),
            f"{cores()} threads, simplejpeg and OpenCV",
        )


def _epoch(job: Job, order: np.ndarray, pool: ThreadPoolExecutor) -> Iterator[dict[str, Any]]:
    source, fastdct = job.source, job.form in PICTURE_FORMS
    (field,) = source.workload.fields
    data, offsets, keys = memoryview(source.data(field)), source.offsets(field).tolist(), source.keys

    def batch(rows: np.ndarray) -> dict[str, Any]:
        out = np.empty((len(rows), DECODED_SIZE, DECODED_SIZE, 3), np.uint8)
        for i, row in enumerate(rows.tolist()):
            decode_into(data[offsets[row] : offsets[row + 1]], out[i], fastdct=fastdct)
        return {field.name: out, KEY: keys[rows]}

    waiting: deque[Any] = deque()
    for rows in chunks(order, source.workload.batch_size):
        waiting.append(pool.submit(batch, rows))
        if len(waiting) >= AHEAD:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def decode_into(encoded: Any, out: np.ndarray, *, fastdct: bool) -> None:
    """Decode a JPEG, crop the centre square and resize it into out, uint8[size, size, 3]. fastdct: As in simplejpeg."""
    image = simplejpeg.decode_jpeg(encoded, fastdct=fastdct)
    height, width, _ = image.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    cv2.resize(image[top : top + side, left : left + side], out.shape[:2], out, interpolation=cv2.INTER_LINEAR)
