"""Interface of a source of records: its schema, its splits in order, and the records of a split in small batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa

from tiercache.shard.schema import Schema


@dataclass(frozen=True, slots=True)
class InputSplit:
    """Split of a source, read by one process: [start, end) of path, counted in files, row groups or bytes.

    Attributes:
        path: Path of the file below the source's root; "" for a split of several files.
        start, end: Half-open range.
        n_bytes: Size of the split, for load balancing and progress.
    """

    path: str
    start: int
    end: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class InputBatch:
    """Some records of a split, as columns.

    Attributes:
        columns: Values by column name, or a record batch.
        n_records: Number of records.
        n_bytes: Bytes of the source.
        place: Function that returns the location in the source of record i of the batch, for messages.
    """

    columns: Mapping[str, Sequence[Any]] | pa.RecordBatch
    n_records: int
    n_bytes: int
    place: Callable[[int], str]


class RecordSource(Protocol):
    """Source that has been inspected and can be read. Picklable."""

    @property
    def schema(self) -> Schema:
        """Schema of all its records."""

    @property
    def parts(self) -> tuple[InputSplit, ...]:
        """Splits; their order, and the order inside each of them, is the order of the data set."""

    def read(self, part: InputSplit, batch_bytes: int) -> Iterator[InputBatch]:
        """Yield the records of a split in batches of about batch_bytes. Only a few batches are in memory at a time.

        Args:
            part: Split to read.
            batch_bytes: Target size of a batch.

        Raises:
            SchemaError: A record cannot be read; the message names its location.
        """
