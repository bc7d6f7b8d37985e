"""SPDL: its pipeline of threads and its image decoder. It has no format, so it reads raw mapped columns."""

from __future__ import annotations

from contextlib import contextmanager
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
    """A pipeline an epoch: rows of a batch, gathered by threads, served in order."""
    if job.workers < 1:
        raise UnsupportedError("it always has a thread")
    source, rng = Source(job.workload, job.path), np.random.default_rng(SEED)
    for field in job.workload.fields:
        if field.kind == "jpeg":
            _try_decoder(source.batch(0, 1)[field.name])
    gathers = numpy_memmap.columns(source, job.form, _decode)
    yield Opened(lambda: _epoch(job, source, gathers, rng), f"{job.workers} threads")


def _try_decoder(encoded: list[bytes]) -> None:
    try:
        _decode(encoded)
    except RuntimeError as error:
        raise UnsupportedError("its decoder needs FFmpeg's shared libraries, with libavdevice") from error


def _decode(encoded: list[bytes]) -> np.ndarray:
    buffer = spdl.io.load_image_batch(encoded, width=None, height=None, pix_fmt=None, filter_desc=FILTER)
    return spdl.io.to_numpy(buffer)


def _epoch(job: Job, source: Source, gathers: dict[str, Any], rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    n = job.workload.n_records
    order = rng.permutation(n) if job.shuffled else np.arange(n)

    def gather(rows: np.ndarray) -> dict[str, Any]:
        return {**{name: column(rows) for name, column in gathers.items()}, KEY: source.keys[rows]}

    pipeline = (
        PipelineBuilder()
        .add_source(chunks(order, job.workload.batch_size))
        .pipe(gather, concurrency=job.workers, output_order="input")
        .add_sink(QUEUE)
        .build(num_threads=job.workers)
    )
    with pipeline.auto_stop():
        yield from pipeline
