"""The data set as users see it: records by index, batches by indices, versions, columns."""

from __future__ import annotations

import operator
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from tiercache._native.finder import wrapped
from tiercache.images.values import decode_columns
from tiercache.load.broken import broken_picture
from tiercache.load.fills import filled
from tiercache.load.forms import in_forms
from tiercache.load.records import Record, Records, join, none_of
from tiercache.load.serving import Form, Serving
from tiercache.opened import OpenedVersion, Place, Verify
from tiercache.shard.manifest import list_versions
from tiercache.shard.values import ColumnValues, as_records

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    from tiercache.cache import Cache, WarmProgress
    from tiercache.images.options import DecodeImage
    from tiercache.shard.types import Schema

Recipe = tuple[Place, int, tuple[str, ...], Callable[[Record], Any] | None, Serving]
"""Everything that a data set is: where and how, version, columns, transform, how they are served."""


_OF_THE_PROCESS = ("_recipe", "_lock", "_pid", "_opened")


class Dataset:
    """Records of a packed data set.

    A map-style data set for any loader, and the native path for `tiercache.DataLoader`.

    `dataset[7]` is a dict of numpy arrays and scalars of the columns' dtypes, bytes, str and Python objects (None for
    a null; images are encoded bytes, or arrays where they are decoded); `dataset[[3, 1, 4]]` and `dataset[2:9]` are
    batches: a dict of numpy arrays [n, ...] and lists, with `<column>.valid` beside nullable columns (with a transform:
    a list of what it gives). All of it is the caller's own and writable. Negative indices count from the end. Safe from
    any thread and after a fork; pickles to a few hundred bytes.

    Args:
        url: a local path, `s3://`, `gs://`, `az://`, `http(s)://`, `memory://` or any fsspec URL.
        cache: None: local folders are read in place, everything else through `Cache.default()`; False: never cached; a
            `Cache`: that one.
        columns: which columns, in which order; None: all.
        version: number of a version; None: the newest when the data set is opened, and that one from then on.
        transform: a function of a record that gives what `dataset[i]` is; picklable where processes are used.
        decode: column of images -> `DecodeImage`: how its pictures are decoded; else they are served as encoded bytes.
        forms: column whose records differ in length -> what it is in a batch: "list" (the default), "padded", "nested"
            or "buffer" (docs/guide/loader.md). A single record is the same under all of them.
        nulls: nullable column -> a value to serve instead of nulls, or "mask" (the default): `<column>.valid`.
        verify: when stored bytes are checked against their CRC-32C: at the "first" touch of each part, "always", or
            "never".
        storage_options: for the store, as docs/guide/storage.md lists them.

    Raises:
        NotFound: no data set there, or no such version.
        CorruptShard: a damaged version or segment.
        SchemaError: a column that does not exist; a form, fill value or decoder that is not for a column of its kind.
        ValueError, TypeError: an argument that cannot be, by its name.
    """

    _opened: OpenedVersion | None

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        cache: Cache | Literal[False] | None = None,
        columns: Sequence[str] | None = None,
        version: int | None = None,
        transform: Callable[[Record], Any] | None = None,
        decode: Mapping[str, DecodeImage] | None = None,
        forms: Mapping[str, Form] | None = None,
        nulls: Mapping[str, Any] | None = None,
        verify: Verify = "first",
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        if verify not in ("first", "always", "never"):
            raise ValueError(f"verify must be 'first', 'always' or 'never', got {verify!r}")
        if columns is not None:
            _check_names(columns)
        if transform is not None and forms:
            raise ValueError("forms says what columns are in a batch, and with a transform that is up to its records")
        place = Place(os.fspath(url), cache, verify, dict(storage_options or {}))
        opened = OpenedVersion(place, version, columns)
        serving = Serving.of(opened.schema, forms=forms, nulls=nulls, decode=decode)
        self.__setstate__(((place, opened.version, opened.schema.names, transform, serving), {}))
        self._opened = opened

    @property
    def source(self) -> OpenedVersion:
        """The opened version: what the native path reads by."""
        opened = self._opened
        return self._open() if opened is None else opened

    @property
    def transform(self) -> Callable[[Record], Any] | None:
        """The function that was given, or None."""
        return self._recipe[3]

    @property
    def serving(self) -> Serving:
        """Forms of columns, fills of nulls and decoders, as they were given."""
        return self._recipe[4]

    @property
    def is_plain(self) -> bool:
        """Whether records are served as they are stored: no transform, and no subclass that says what a record is."""
        mine = type(self)
        same = all(getattr(mine, n) is getattr(Dataset, n) for n in ("__getitem__", "__getitems__", "__len__"))
        return same and self.transform is None

    @property
    def schema(self) -> Schema:
        """The chosen columns with their types."""
        return self.source.schema

    @property
    def column_names(self) -> list[str]:
        """Names of the chosen columns, in order."""
        return list(self._recipe[2])

    @property
    def version(self) -> int:
        """Number of the version that is read."""
        return self._recipe[1]

    @property
    def fingerprint(self) -> str:
        """Of the version's contents, for comparing runs."""
        return self.source.fingerprint

    def versions(self) -> list[int]:
        """Numbers of all versions there are, oldest first."""
        return list_versions(self.source.inner)

    def select_columns(self, columns: Sequence[str]) -> Dataset:
        """The same version with only these columns, in this order. Raises SchemaError for one that is not there."""
        _check_names(columns)
        self.schema.select(columns)
        place, version, _, transform, serving = self._recipe
        chosen = type(self).__new__(type(self))
        chosen.__setstate__(((place, version, tuple(columns), transform, serving.select(columns)), self._own()))
        return chosen

    def __len__(self) -> int:
        return int(self.source.table.first_record[-1])

    def __getitem__(self, index: Any) -> Any:
        if type(index) is int:  # first, for asking whether it is a Sequence costs 0.5 us of some 8
            return self._record(index)
        if isinstance(index, slice):
            return self._batch(np.arange(*index.indices(len(self)), dtype=np.int64))
        if isinstance(index, Sequence) or getattr(index, "ndim", 0) > 0:
            return self._batch(self._indices(index))
        return self._record(operator.index(index))

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Records of many indices, gathered in one go: what torch's fetcher asks for."""
        if type(self).__getitem__ is not Dataset.__getitem__:  # a subclass says what a record is
            return [self[index] for index in indices]
        rows = self._indices(indices)
        if self.transform is not None:
            return [self.transform(record) for record in as_records(self._columns(rows))]
        return Records(self._columns(rows), len(rows), self.serving)

    def __iter__(self) -> Iterator[Any]:
        for start, stop in self._block_spans():
            yield from self.__getitems__(range(start, stop))

    def to_arrow(self, batch_size: int = 4096) -> Iterator[pa.RecordBatch]:
        """The data set as Arrow record batches of batch_size records (the last may be shorter), in order.

        Arrays are read-only and over the shards' own memory where a batch lies within one block, else copied together.
        They are good for as long as something refers to them.

        Raises:
            ValueError: batch_size below 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
        table = None
        for block in self._arrow_blocks():
            part = pa.Table.from_batches([block])
            table = part if table is None or not table.num_rows else pa.concat_tables([table, part])
            while table.num_rows >= batch_size:
                yield _one_batch(table.slice(0, batch_size))
                table = table.slice(batch_size)
        if table is not None and table.num_rows:
            yield _one_batch(table)

    def to_pandas(self) -> pd.DataFrame:
        """The whole data set as a pandas frame, in memory. Raises ImportError without pandas."""
        frame: pd.DataFrame = pa.Table.from_batches(list(self.to_arrow()), self.schema.arrow).to_pandas()
        return frame

    def warm(self, *, jobs: int = 4, on_progress: Callable[[WarmProgress], None] | None = None) -> None:
        """Bring every shard into the cache. Nothing to do for a local folder.

        Args:
            jobs: shards fetched side by side.
            on_progress: called after each shard.

        Raises:
            CacheFull: it does not fit.
        """
        source = self.source
        if source.cache is not None:
            wanted = [(info.name, info.identity(source.dataset_id)) for info in source.table.infos()]
            source.cache.warm(source.store, wanted, jobs=jobs, on_progress=on_progress)

    def close(self) -> None:
        """Give shards and connections back; the data set may be used again after it."""
        if self._opened is not None:
            self._opened.close()

    def __repr__(self) -> str:
        source = self.source
        return f"Dataset({source.url!r}, version {source.version}, {len(self):,} records: {self.schema!r})"

    def __getstate__(self) -> tuple[Recipe, dict[str, Any]]:
        return self._recipe, self._own()

    def __setstate__(self, state: tuple[Recipe, dict[str, Any]]) -> None:
        self._recipe = state[0]
        self.__dict__.update(state[1])
        self._lock, self._pid = threading.Lock(), os.getpid()
        self._opened = None  # opened when first used, in whichever process that is

    def _own(self) -> dict[str, Any]:
        """Attributes that a subclass has set."""
        return {name: value for name, value in vars(self).items() if name not in _OF_THE_PROCESS}

    def _open(self) -> OpenedVersion:
        if self._pid != os.getpid():  # of a thread that a fork has left behind, which may hold it for ever
            self._lock, self._pid = threading.Lock(), os.getpid()
        with self._lock:  # of two threads that come first, the second takes what the first has opened
            if self._opened is None:
                self._opened = OpenedVersion(*self._recipe[:3])
            return self._opened

    def _record(self, index: int) -> Any:
        n, serving = len(self), self.serving
        if not -n <= index < n:
            raise IndexError(f"record {index} of a data set of {n}")
        number = index + n if index < 0 else index
        record = None if serving.nulls or serving.decode else self.source.record(number)
        if record is None:
            record = as_records(self._columns(np.array([number], np.int64)))[0]
        return record if self.transform is None else self.transform(record)

    def _indices(self, indices: Any) -> NDArray[np.int64]:
        """Record numbers, 0 <= number < len. Raises IndexError, TypeError."""
        rows = np.asarray(indices)
        if rows.dtype == np.bool_ or (rows.size and rows.dtype.kind not in "iu"):
            raise TypeError(f"records are chosen by integers, got {rows.dtype}")
        if rows.size and rows.dtype == np.uint64 and int(rows.max()) >= len(self):  # as int64 it may be -1
            raise IndexError(f"record {int(rows.max())} of a data set of {len(self)}")
        return wrapped(np.ascontiguousarray(rows, np.int64).reshape(-1), len(self))

    def _batch(self, rows: NDArray[np.int64]) -> Any:
        if self.transform is not None:
            return self.__getitems__(rows.tolist())
        return in_forms(self._columns(rows), self.serving)

    def _columns(self, rows: NDArray[np.int64]) -> list[ColumnValues]:
        """Values of the records, nulls filled and pictures decoded where they are to be."""
        return self._served(self._stored_columns(rows), rows)

    def _served(self, columns: list[ColumnValues], rows: Sequence[int] | NDArray[np.int64]) -> list[ColumnValues]:
        fills, decode = self.serving.nulls, self.serving.decode
        if fills:
            columns = [filled(c, fills[c.column.name]) if c.column.name in fills else c for c in columns]
        if not decode:
            return columns

        def explain(column: str, index: int, said: str) -> Exception:
            return broken_picture(self.source, column, int(rows[index]), said)

        return decode_columns(columns, decode, explain)

    def _stored_columns(self, rows: NDArray[np.int64]) -> list[ColumnValues]:
        """Values of the records: of all shards at once where they are mapped, else shard by shard."""
        source = self.source
        if not len(rows):
            return none_of(source.schema)
        found = source.take_mapped(rows)
        if found is not None:
            return found
        first_record = source.table.first_record
        shards = np.searchsorted(first_record, rows, side="right") - 1
        asked = np.unique(shards)
        places = [np.flatnonzero(shards == shard) for shard in asked]
        within = [rows[where] - first_record[shard] for shard, where in zip(asked, places, strict=True)]
        return join(source.take(asked.tolist(), within), places)

    def _block_spans(self) -> Iterator[tuple[int, int]]:
        """Record numbers [start, stop) of each block, in order."""
        source = self.source
        for shard in range(len(source.table)):
            first = int(source.table.first_record[shard])
            ends = np.cumsum(source.block_tables([shard])[0].records).tolist() if source.shard_records[shard] else []
            for start, stop in zip([0, *ends], ends, strict=False):
                yield first + start, first + stop

    def _arrow_blocks(self) -> Iterator[pa.RecordBatch]:
        source = self.source
        for shard in range(len(source.table)):
            for block in range(len(source.block_tables([shard])[0].records)):
                yield pa.RecordBatch.from_arrays(source.arrays(shard, block), schema=source.schema.arrow)


def _check_names(columns: Sequence[str]) -> None:
    if isinstance(columns, str):
        raise TypeError(f"columns is a list of names, got the str {columns!r}")
    if not columns:
        raise ValueError("columns is empty: name one or more")


def _one_batch(table: pa.Table) -> pa.RecordBatch:
    return table.combine_chunks().to_batches()[0] if table.column(0).num_chunks > 1 else table.to_batches()[0]
