"""Catalog entries of a tier's objects, in columns: a million take 100 MB, and four times that as Python objects."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import pyarrow as pa

# n_bytes, etag, crc32c, verified, written_s.
EntryTuple: TypeAlias = tuple[int, str | None, int | None, bool, float | None]

_ENTRY_SCHEMA = pa.schema(
    [
        ("key", pa.large_string()),
        ("n_bytes", pa.int64()),
        ("etag", pa.large_string()),
        ("crc32c", pa.int64()),
        ("verified", pa.bool_()),
        ("written_s", pa.float64()),
    ]
)


class EntryTable(Mapping[str, EntryTuple]):
    """Key -> (n_bytes, etag, crc32c, verified, written_s). A mapping for few keys, and a table for many.

    `table` has the columns key, n_bytes, etag, crc32c, verified, written_s; keys are unique and in the order of the
    input. Immutable, apart from the dict that the first look-up of a key makes. Not thread-safe.
    """

    def __init__(self, batches: Sequence[pa.RecordBatch]) -> None:
        self.table = pa.Table.from_batches(batches, _ENTRY_SCHEMA)
        self._by_key: dict[str, EntryTuple] | None = None

    @classmethod
    def of(cls, known: Mapping[str, EntryTuple]) -> EntryTable:
        """Return any mapping as Checksums."""
        return known if isinstance(known, EntryTable) else cls([batch_of((key, *one) for key, one in known.items())])

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __iter__(self) -> Iterator[str]:
        for batch in self.table["key"].iterchunks():
            yield from batch.to_pylist()

    def __getitem__(self, key: str) -> EntryTuple:
        if self._by_key is None:
            columns = (column.to_pylist() for column in self.table.columns)
            self._by_key = {name: (*rest,) for name, *rest in zip(*columns, strict=True)}
        return self._by_key[key]


def batch_of(rows: Iterable[Sequence[Any]]) -> pa.RecordBatch:
    """Return a batch of rows (key, n_bytes, etag, crc32c, verified, written_s)."""
    columns = [*zip(*rows, strict=True)] or [()] * len(_ENTRY_SCHEMA)
    columns[4] = tuple(map(bool, columns[4]))
    arrays = [pa.array(column, field.type) for column, field in zip(columns, _ENTRY_SCHEMA, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=_ENTRY_SCHEMA)
