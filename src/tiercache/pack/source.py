"""What a source gives: its schema, its parts in order, and a part's records in small batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa

from tiercache.shard.types import Schema


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a source that one process reads: [start, end) of path, in files, row groups or bytes.

    n_bytes: how much source that is, to share the work out and to show progress.
    """

    path: str
    start: int
    end: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Some records of a part, as columns. place: where in the source record i of the batch stands, for errors."""

    columns: Mapping[str, Sequence[Any]] | pa.RecordBatch
    n_records: int
    n_bytes: int
    place: Callable[[int], str]


class Source(Protocol):
    """A source that has been looked at and can be read. Picklable."""

    @property
    def schema(self) -> Schema:
        """The schema of all its records."""

    @property
    def parts(self) -> tuple[Part, ...]:
        """Its parts; their order, and the order inside each, is the order of the data set."""

    def read(self, part: Part, batch_bytes: int) -> Iterator[Batch]:
        """A part's records, in batches of about batch_bytes. Memory is bounded by a few batches.

        Raises:
            SchemaError: a record that cannot be read, naming where it stands.
        """
