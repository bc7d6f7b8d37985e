"""tiercache with default options, except for the full shuffle, the fast transform of pictures, and the cache."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import tiercache as tc
from peers.catalogue import PICTURE_FORMS
from peers.job import SEED, Job, Opened
from tiercache import Cache, DataLoader, Dataset, Image, LoaderOptions, Tensor, Writer
from workloads import DECODED_SIZE, JITTER, KEY, MEAN, STD

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from source import Source
    from workloads import Workload

VERSION = tc.__version__
CACHE_BYTES = 1 << 40  # The folder never holds more than the data set.
COLUMN_TYPES: dict[str, Any] = {"bytes": "bytes", "text": "str", "jpeg": Image("jpeg")}


def schema(workload: Workload) -> dict[str, Any]:
    """Return the columns as a tiercache schema."""
    columns: dict[str, Any] = {
        field.name: COLUMN_TYPES.get(field.kind) or Tensor(field.dtype, field.shape) for field in workload.fields
    }
    return {**columns, KEY: "int64"}


def pack(source: Source, folder: Path) -> None:
    """Write batches of columns."""
    with Writer(folder / "data", schema=schema(source.workload)) as writer:
        for batch in source.batches():
            writer.write_batch(batch)


def pack_one_by_one(source: Source, folder: Path) -> None:
    """Write record by record."""
    with Writer(folder / "data", schema=schema(source.workload)) as writer:
        for record in source.records():
            writer.write(record)


def decode_options(job: Job) -> tc.DecodeImage:
    """Return the options for the pictures of a job."""
    how: dict[str, Any] = {"dct": "fast" if job.form in PICTURE_FORMS else "accurate"}
    if job.workload.augmented:
        how |= dict.fromkeys(("brightness", "contrast", "saturation"), JITTER)
        how |= {"crop": "random", "flip": True, "dtype": "float16", "mean": MEAN, "std": STD}
    return tc.DecodeImage(DECODED_SIZE, **how)


@contextmanager
def opened(job: Job) -> Iterator[Opened]:
    """Yield the loader; all epochs use it."""
    fields = job.workload.fields
    varied = [field.name for field in fields if field.kind in ("bytes", "text")] if job.form == "buffer" else []
    decoded = decode_options(job)
    layouts, decode = dict.fromkeys(varied, "buffer"), {f.name: decoded for f in fields if f.kind == "jpeg"}
    full = {"shuffle_group_bytes": "all", "shuffle_window_bytes": "all"} if job.shuffle == "full" else {}
    with Cache(job.cache_folder, size=CACHE_BYTES) if job.url else nullcontext(False) as cache:
        dataset = Dataset(f"{job.url or job.path}/data", cache=cache, layouts=layouts, decode=decode)
        loader = DataLoader(
            dataset,
            batch_size=job.workload.batch_size,
            shuffle=job.shuffled,
            options=LoaderOptions(seed=SEED, **full),
        )
        yield Opened((lambda: _pairs(loader, varied)) if varied else (lambda: iter(loader)))


def _pairs(loader: Any, varied: list[str]) -> Iterator[dict[str, Any]]:
    """Yield batches with buffers in the consumer's form: values and offsets."""
    for batch in loader:
        for name in varied:
            batch[name] = (batch[name].values, batch[name].offsets)
        yield batch
