"""SPDL: its pipeline of threads and its image decoder. SPDL has no format, so it reads raw mapped columns."""

from __future__ import annotations

from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import spdl.io
from spdl.pipeline import PipelineBuilder

from peers.adapters import numpy_memmap
from peers.columns import chunks
from peers.job import SEED, Job, Opened, UnsupportedError
from source import Source
from workloads import DECODED_SIZE, IMAGE_HEIGHT, IMAGE_WIDTH, KEY

if TYPE_CHECKING:
    from collections.abc import Iterator

pack = numpy_memmap.pack
QUEUE = 4
SIDE = min(IMAGE_WIDTH, IMAGE_HEIGHT)
FILTER = f"crop={SIDE}:{SIDE},scale=w={DECODED_SIZE}:h={DECODED_SIZE}:flags=bilinear,format=pix_fmts=rgb24"


@contextmanager
def opened(job: Job) -> Iterator[Opened]:
    """Yield one pipeline for all epochs, because making one takes longer than a short epoch; batches come in order."""
    source, rng = Source(job.workload, job.path), np.random.default_rng(SEED)
    for field in job.workload.fields:
        if field.kind == "jpeg":
            _try_decoder(source.batch(0, 1)[field.name])
    gathers = numpy_memmap.columns(source, job.form, _decode)

    def gather(rows: np.ndarray) -> dict[str, Any]:
        return {**{name: column(rows) for name, column in gathers.items()}, KEY: source.keys[rows]}

    pipeline = (
        PipelineBuilder()
        .add_source(_rows(job, rng))
        .pipe(gather, concurrency=job.workers, output_order="input")
        .add_sink(QUEUE)
        .build(num_threads=job.workers)
    )
    n_batches = -(-job.workload.n_records // job.workload.batch_size)
    with pipeline.auto_stop():
        batches = iter(pipeline)
        yield Opened(lambda: (batch for batch in islice(batches, n_batches)), f"{job.workers} threads")


def _rows(job: Job, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield the rows of each batch, one epoch after the other, without end."""
    n = job.workload.n_records
    while True:
        yield from chunks(rng.permutation(n) if job.shuffled else np.arange(n), job.workload.batch_size)


def _try_decoder(encoded: list[bytes]) -> None:
    try:
        _decode(encoded)
    except RuntimeError as error:
        raise UnsupportedError("its decoder needs FFmpeg's shared libraries, with libavdevice") from error


def _decode(encoded: list[bytes]) -> np.ndarray:
    buffer = spdl.io.load_image_batch(encoded, width=None, height=None, pix_fmt=None, filter_desc=FILTER)
    return spdl.io.to_numpy(buffer)
