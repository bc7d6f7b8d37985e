"""LitData: chunks made by optimize, local or in a store, and StreamingDataLoader."""

from __future__ import annotations

import os
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import litdata
from litdata.streaming import downloader

from images import decode
from peers.job import SEED, Job, Opened, cores
from workloads import KEY

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from source import Source

PIECES = 16


def pack(source: Source, folder: Path) -> None:
    """Optimize ranges of records, with a process per core, in chunks of the size in its guides."""
    n = source.workload.n_records
    step = -(-n // PIECES)
    litdata.optimize(
        fn=partial(_records, source),
        inputs=[(start, min(start + step, n)) for start in range(0, n, step)],
        output_dir=str(folder / "data"),
        chunk_bytes="64MB",
        num_workers=min(cores(), PIECES),
        keep_data_ordered=True,
        verbose=False,
    )


def _records(source: Source, span: tuple[int, int]) -> Iterator[dict[str, Any]]:
    batch = source.batch(*span)
    batch[KEY] = batch[KEY].tolist()
    for values in zip(*batch.values(), strict=True):
        yield dict(zip(batch, values, strict=True))


def _decoded(record: dict[str, Any]) -> dict[str, Any]:
    return {name: decode(value) if isinstance(value, memoryview) else value for name, value in record.items()}


def _copied(record: dict[str, Any]) -> dict[str, Any]:
    return {name: bytes(value) if isinstance(value, memoryview) else value for name, value in record.items()}


@contextmanager
def opened(job: Job) -> Iterator[Opened]:
    """Yield the loader; it shuffles chunks, and inside a chunk blocks of 256 records, or all records with "full"."""
    # LitData serves bytes as views of a chunk, which torch's collate function, used by its own loader, cannot batch.
    transforms = {"jpeg": _decoded, "bytes": _copied}
    transform = next((transforms[field.kind] for field in job.workload.fields if field.kind in transforms), None)
    if job.url:
        # LitData 0.2.76 reads chunks by obstore, with options that allow no plain HTTP, and has no option for it.
        downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True  # noqa: SLF001
    dataset = litdata.StreamingDataset(
        f"{job.url or job.path}/data",
        cache_dir=job.cache_folder if job.url else None,
        storage_options={"endpoint_url": os.environ["AWS_ENDPOINT_URL"]} if job.url else {},
        shuffle=job.shuffled,
        seed=SEED,
        drop_last=False,
        transform=transform,
        item_shuffle_window="full" if job.shuffle == "full" else None,
    )
    loader = litdata.StreamingDataLoader(
        dataset,
        batch_size=job.workload.batch_size,
        num_workers=job.workers,
        persistent_workers=job.workers > 0,
    )
    note = f"{job.workers} workers" + (", never across chunks" if job.shuffled else "")
    yield Opened(lambda: (batch for batch in loader), note)
