"""FFCV with its own fields and decoders, and the system's page cache.

Its decoder always uses libjpeg-turbo's fast transform (TJFLAG_FASTDCT), so pictures are equal in both layouts. Its
colour operations have one order, and adjust each image with a probability, which is 1 here.
"""

from __future__ import annotations

import io
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from ffcv.fields import BytesField, IntField, NDArrayField, RGBImageField
from ffcv.fields.rgb_image import CenterCropRGBImageDecoder, RandomResizedCropRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.transforms import (
    NormalizeImage,
    RandomBrightness,
    RandomContrast,
    RandomHorizontalFlip,
    RandomSaturation,
    ToTensor,
)
from ffcv.writer import DatasetWriter
from PIL import Image

from peers.columns import even_offsets, texts
from peers.job import SEED, Job, Opened, UnsupportedError
from workloads import DECODED_SIZE, JITTER, KEY, MEAN, STD, Field, Workload

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from source import Source

# FFCV stores no length of records of varying length, so this column does.
LENGTH = "n_bytes"


class Indexed:
    """The records as FFCV's writer needs them: tuples by index."""

    def __init__(self, source: Source) -> None:
        self._n_records = source.workload.n_records
        self._columns = [
            (field, np.asarray(source.array(field)), None)
            if field.kind == "array"
            else (field, np.asarray(source.data(field)), np.asarray(source.offsets(field)))
            for field in source.workload.fields
        ]

    def __len__(self) -> int:
        return self._n_records

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        values: list[Any] = []
        for field, column, offsets in self._columns:
            if offsets is None:
                values.append(np.array(column[index]))
                continue
            data = np.array(column[offsets[index] : offsets[index + 1]])
            values.append(np.asarray(Image.open(io.BytesIO(data.tobytes()))) if field.kind == "jpeg" else data)
            if field.kind == "bytes":
                values.append(len(data))
        return (*values, index)


def _fields(workload: Workload) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for field in workload.fields:
        if field.kind == "array":
            found[field.name] = NDArrayField(np.dtype(field.dtype), field.shape)
        elif field.kind == "text":
            found[field.name] = NDArrayField(np.dtype(np.uint8), (field.n_bytes,))
        elif field.kind == "jpeg":
            found[field.name] = RGBImageField(write_mode="jpg")
        else:
            found |= {field.name: BytesField(), LENGTH: IntField()}
    return {**found, KEY: IntField()}


def pack(source: Source, folder: Path) -> None:
    """Write by index, with a process per core; FFCV always encodes images again."""
    DatasetWriter(str(folder / "data.beton"), _fields(source.workload)).from_indexed_dataset(Indexed(source))


def _pipeline(field: Field) -> list[Any]:
    """Return the decoder of a picture, and the operations after it."""
    size = (DECODED_SIZE, DECODED_SIZE)
    if not field.is_augmented:
        return [CenterCropRGBImageDecoder(size, 1), ToTensor()]
    return [
        RandomResizedCropRGBImageDecoder(size),
        RandomHorizontalFlip(),
        RandomBrightness(JITTER, p=1),
        RandomContrast(JITTER, p=1),
        RandomSaturation(JITTER, p=1),
        NormalizeImage(np.array(MEAN) * 255, np.array(STD) * 255, np.float16),
        ToTensor(),
    ]


@contextmanager
def opened(job: Job) -> Iterator[Opened]:
    """Yield the loader; bytes are rows of a padded matrix, text is a matrix."""
    decoders: dict[str, Any] = {field.name: _pipeline(field) for field in job.workload.fields if field.kind == "jpeg"}
    loader = Loader(
        str(job.path / "data.beton"),
        batch_size=job.workload.batch_size,
        num_workers=job.workers,
        os_cache=True,
        order=OrderOption.RANDOM if job.shuffled else OrderOption.SEQUENTIAL,
        seed=SEED,
        drop_last=False,
        pipelines=decoders,
    )
    if job.form == "buffer" and any(field.kind == "bytes" for field in job.workload.fields):
        raise UnsupportedError("it pads records of varied length")
    yield Opened(lambda: _batches(loader, job), f"{job.workers} threads")


def _batches(loader: Any, job: Job) -> Iterator[dict[str, Any]]:
    names = list(_fields(job.workload))
    for values in loader:
        batch = dict(zip(names, values, strict=True))
        batch[KEY] = batch[KEY].reshape(-1)
        for field in job.workload.fields:
            batch[field.name] = _column(field, batch, job.form)
        yield batch


def _column(field: Field, batch: dict[str, Any], form: str) -> Any:
    value = batch[field.name]
    if field.kind == "bytes":
        return [row[:n] for row, n in zip(value.numpy(), batch[LENGTH].reshape(-1).tolist(), strict=True)]
    if field.kind == "text":
        flat = value.numpy().reshape(-1)
        return texts(flat, field.n_bytes) if form == "list" else (flat, even_offsets(len(value), field.n_bytes))
    # NormalizeImage writes the bits of float16 into integers.
    return value.numpy().view(np.float16) if field.is_augmented else value
