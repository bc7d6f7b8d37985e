"""Workloads of the loader benchmarks: the shapes of the records, by name."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

KEY = "label"
IMAGE_WIDTH, IMAGE_HEIGHT, DECODED_SIZE = 500, 375, 224
# Augmentation of pictures: random resized crop, flip, factors of brightness, contrast and saturation of 1 +- JITTER,
# and normalisation to float16 by ImageNet's mean and standard deviation of values 0 to 1.
JITTER, MEAN, STD = 0.4, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, slots=True)
class Field:
    """One column of random values.

    Attributes:
        name: Name of the column.
        kind: "array" (fixed dtype and shape), "bytes" (varying length), "text" (ASCII of fixed length) or "jpeg"
        (images
            that are served decoded, cropped to the centre square and resized).
        dtype, shape: Dtype and shape of an array's record. dtype of "jpeg": "uint8" for the centre square, "float16"
            for augmented pictures.
        n_bytes: Bytes per record; the mean for "bytes", an estimate for "jpeg".
    """

    name: str
    kind: Literal["array", "bytes", "text", "jpeg"]
    dtype: str
    shape: tuple[int, ...]
    n_bytes: int

    @property
    def is_augmented(self) -> bool:
        """Whether pictures are served augmented."""
        return self.kind == "jpeg" and self.dtype == "float16"

    @property
    def word(self) -> np.dtype[Any]:
        """The word that a consumer reads the column in: 8 bytes, or 4 bytes if a record's size is not a multiple of 8.

        A wrapping sum of words is the same for every order of the records and every layout of the batch.
        """
        return np.dtype(np.int64 if self.n_bytes % 8 == 0 else np.uint32)


def array_field(name: str, dtype: str, shape: tuple[int, ...] = ()) -> Field:
    """Return a column of arrays of one shape."""
    return Field(name, "array", dtype, shape, np.dtype(dtype).itemsize * int(np.prod(shape)))


@dataclass(frozen=True, slots=True)
class Workload:
    """Records with several columns and an int64 column KEY, the record's number; served in batches."""

    name: str
    fields: tuple[Field, ...]
    batch_size: int
    n_records: int

    @property
    def record_bytes(self) -> int:
        """Bytes of a record without its number; the mean if lengths vary."""
        return sum(field.n_bytes for field in self.fields)

    @property
    def varied(self) -> bool:
        """Whether a column is served as a list of objects or as one buffer with offsets."""
        return any(field.kind in ("bytes", "text") for field in self.fields)

    @property
    def pictures(self) -> bool:
        """Whether a column is served decoded."""
        return any(field.kind == "jpeg" for field in self.fields)

    @property
    def augmented(self) -> bool:
        """Whether a column is served as augmented pictures."""
        return any(field.is_augmented for field in self.fields)

    def as_json(self) -> dict[str, Any]:
        """Return the JSON form that `workload_of` reads."""
        return asdict(self)

    def describe(self) -> str:
        """Return a description of the columns."""
        texts = {"bytes": "bytes of varied length, mean {0.n_bytes:,}", "text": "text of {0.n_bytes} bytes"}
        decoded = f"{'augmented' if self.augmented else 'decoded'} to {DECODED_SIZE}"
        texts |= {"array": "{0.dtype}{1}", "jpeg": f"JPEG {IMAGE_WIDTH}x{IMAGE_HEIGHT} {decoded}"}
        columns = [texts[field.kind].format(field, list(field.shape)) for field in self.fields]
        return ", ".join([*columns, f"int64 {KEY}"])


def workload_of(value: dict[str, Any]) -> Workload:
    """Return a workload from its JSON form."""
    fields = tuple(Field(**{**field, "shape": tuple(field["shape"])}) for field in value["fields"])
    return Workload(**{**value, "fields": fields})


TOKENS = Workload("tokens", (array_field("values", "uint16", (1024,)),), 64, 1 << 18)
BYTES = Workload("bytes", (Field("values", "bytes", "uint8", (), 20_000),), 256, 1 << 14)
TENSORS = Workload("tensors", (array_field("values", "uint8", (3, 64, 64)),), 256, 1 << 15)
ROWS = Workload(
    "rows", (array_field("vector", "float32", (16,)), Field("text", "text", "uint8", (), 60)), 1024, 1 << 21
)
IMAGES = Workload("images", (Field("image", "jpeg", "uint8", (), 64_000),), 64, 1 << 11)
AUGMENTED = Workload("augmented", (Field("image", "jpeg", "float16", (), 64_000),), 64, 1 << 11)
COLD = Workload("cold", (array_field("values", "uint8", (64 << 10,)),), 64, 1 << 13)
WORKLOADS = {workload.name: workload for workload in (TOKENS, BYTES, TENSORS, ROWS, IMAGES, AUGMENTED, COLD)}


def scaled(workload: Workload, scale: float) -> Workload:
    """Return the workload with its number of records scaled; at least two batches and a short one."""
    return replace(workload, n_records=max(int(workload.n_records * scale), 2 * workload.batch_size + 3))


def first_of(workload: Workload, n_records: int) -> Workload:
    """Return the workload with its first n_records records, or itself if it has no more."""
    return replace(workload, n_records=min(n_records, workload.n_records))
