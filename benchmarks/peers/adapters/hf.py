"""Hugging Face datasets: a mapped Arrow file, and the "arrow" format, whose buffers become arrays without a copy."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import torch

from images import decode
from peers.columns import from_arrow
from peers.job import SEED, Job, Opened, cores
from workloads import KEY

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from source import Source
    from workloads import Field

datasets.disable_progress_bars()
OBJECTS = {"bytes": "large_binary", "text": "string", "jpeg": "binary"}


def _feature(field: Field) -> Any:
    if field.kind == "array":
        return datasets.Sequence(datasets.Value(field.dtype), length=field.n_bytes // np.dtype(field.dtype).itemsize)
    return datasets.Value(OBJECTS[field.kind])


def _writer(source: Source, folder: Path) -> Any:
    features = {field.name: _feature(field) for field in source.workload.fields}
    return datasets.arrow_writer.ArrowWriter(
        path=str(folder / "data.arrow"), features=datasets.Features({**features, KEY: datasets.Value("int64")})
    )


def pack(source: Source, folder: Path) -> None:
    """Write batches of columns with its Arrow writer."""
    with _writer(source, folder) as writer:
        for batch in source.batches():
            for field in source.workload.fields:
                if field.kind == "array":
                    batch[field.name] = np.asarray(batch[field.name]).reshape(len(batch[KEY]), -1)
            writer.write_batch(batch)
        writer.finalize()


def pack_one_by_one(source: Source, folder: Path) -> None:
    """Write examples with its Arrow writer, which collects them in batches of its own."""
    arrays = [field.name for field in source.workload.fields if field.kind == "array"]
    with _writer(source, folder) as writer:
        for record in source.records():
            writer.write({**record, **{name: np.asarray(record[name]).reshape(-1) for name in arrays}})
        writer.finalize()


@contextmanager
def opened(job: Job) -> Iterator[Opened]:
    """Yield batches of rows through torch's loader, as its guide shows; direct iteration for the stored order."""
    dataset = datasets.Dataset.from_file(str(job.path / "data.arrow")).with_format("arrow")
    with ThreadPoolExecutor(cores()) as pool:
        to_batch = Batches(job, pool if job.workers == 0 else None)
        if job.shuffled or job.workers:
            sampler = torch.utils.data.RandomSampler if job.shuffled else torch.utils.data.SequentialSampler
            rows = torch.utils.data.BatchSampler(sampler(dataset), job.workload.batch_size, drop_last=False)
            loader = torch.utils.data.DataLoader(
                dataset,
                sampler=rows,
                batch_size=None,
                collate_fn=to_batch,
                num_workers=job.workers,
                persistent_workers=job.workers > 0,
                generator=torch.Generator().manual_seed(SEED),
            )
            yield Opened(lambda: (batch for batch in loader), f"{job.workers} workers")
        else:
            yield Opened(lambda: map_batches(dataset, to_batch, job.workload.batch_size), "straight iteration")


def map_batches(dataset: Any, to_batch: Batches, batch_size: int) -> Iterator[dict[str, Any]]:
    """Yield batches in the stored order."""
    for table in dataset.iter(batch_size):
        yield to_batch(table)


class Batches:
    """Converts Arrow tables to batches. pool: Threads that decode images, if any."""

    def __init__(self, job: Job, pool: ThreadPoolExecutor | None) -> None:
        self._fields, self._form = job.workload.fields, job.form
        self._map = pool.map if pool else map

    def __call__(self, table: Any) -> dict[str, Any]:
        """Return the columns of one table."""
        batch = table.combine_chunks().to_batches()[0]
        found: dict[str, Any] = {KEY: batch.column(KEY).to_numpy()}
        for field in self._fields:
            value = from_arrow(batch.column(field.name), field, "list" if field.kind == "jpeg" else self._form)
            found[field.name] = np.stack(list(self._map(decode, value))) if field.kind == "jpeg" else value
        return found
