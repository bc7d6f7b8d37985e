"""tiercache: default options, but for the full shuffle."""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

import tiercache as tc
from images import decode
from peers.job import SEED, Job, Opened, UnsupportedError
from tiercache import DataLoader, Dataset, LoaderOptions, Tensor, Writer
from workloads import DECODED_SIZE, KEY

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from source import Source
    from workloads import Field, Workload

VERSION = tc.__version__
COLUMN_TYPES = {"bytes": "bytes", "text": "str", "jpeg": "bytes"}


def schema(workload: Workload) -> dict[str, Any]:
    """The columns as tiercache has them."""
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


@contextmanager
def opened(job: Job) -> Iterator[Opened]:
    """The loader; epochs follow each other in it."""
    arguments, note = _columns(job)
    loader = DataLoader(
        Dataset(job.path / "data", **arguments),
        batch_size=job.workload.batch_size,
        shuffle=job.shuffled,
        num_workers=job.workers,
        persistent_workers=job.workers > 0,
        options=None if "transform" in arguments else _options(job),
        generator=torch.Generator().manual_seed(SEED),
    )
    buffers = [field.name for field in _varied(job)] if job.form == "buffer" else []
    yield Opened(lambda: _batches(loader, buffers), note)


def _options(job: Job) -> LoaderOptions:
    full = {"shuffle_group_bytes": "all", "shuffle_window_bytes": "all"} if job.shuffle == "full" else {}
    return LoaderOptions(seed=SEED, **full)


def _varied(job: Job) -> list[Field]:
    return [field for field in job.workload.fields if field.kind in ("bytes", "text")]


def _columns(job: Job) -> tuple[dict[str, Any], str]:
    """Arguments of the data set for what this tiercache has, and a note where the loader does not decode yet."""
    known, images = inspect.signature(Dataset).parameters, [f for f in job.workload.fields if f.kind == "jpeg"]
    if job.form == "buffer" and "forms" not in known:
        raise UnsupportedError("not yet: this version has no forms= for buffers")
    arguments: dict[str, Any] = {}
    if job.form == "buffer":
        arguments["forms"] = {field.name: "buffer" for field in _varied(job)}
    if images and hasattr(tc, "DecodeImage"):
        made = tc.DecodeImage(size=DECODED_SIZE, crop="center", dtype="uint8")
        return {**arguments, "decode": {field.name: made for field in images}}, ""
    if images:
        return {
            **arguments,
            "transform": _decode_images,
        }, f"Pillow in a transform, {job.workers} workers: the loader decodes not yet"
    return arguments, ""


def _decode_images(record: dict[str, Any]) -> dict[str, Any]:
    return {name: decode(value) if isinstance(value, bytes) else value for name, value in record.items()}


def _batches(loader: Any, buffers: list[str]) -> Iterator[dict[str, Any]]:
    for batch in loader:
        for name in buffers:
            batch[name] = (batch[name].values, batch[name].offsets)
        yield batch
