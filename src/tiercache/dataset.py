"""The data set as users see it: records by index, batches by indices, versions, columns."""

from __future__ import annotations

import operator
import os
import pickle
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import pyarrow as pa

from tiercache.cache.place import Place, Verify
from tiercache.errors import SchemaError
from tiercache.images.values import decode_columns
from tiercache.load.broken import broken_picture
from tiercache.load.fills import filled
from tiercache.load.forms import in_forms
from tiercache.load.records import Record, Records
from tiercache.load.serving import Form, Serving
from tiercache.load.tuples import as_tuple, record_tuple, tuple_columns
from tiercache.opened import OpenedVersion
from tiercache.shard.cast import checked_casts
from tiercache.shard.values import ColumnValues, as_records
from tiercache.views import Choosing, Joined, Mixed, Plan, Readable, arrow_batches, record_numbers, spans

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    from tiercache.cache import Cache, WarmProgress
    from tiercache.images.options import DecodeImage
    from tiercache.shard.types import Schema

Recipe = tuple[Plan, Callable[[Record], Any] | None, Serving]
"""Everything that a data set is: what opens it (place, version, columns, views), transform, how columns are served."""


_OF_THE_PROCESS = ("_recipe", "_lock", "_pid", "_opened")


class Dataset(Choosing):
    """Records of a packed data set.

    A map-style data set for any loader, and the native path for `tiercache.DataLoader`.

    `dataset[7]` is a dict of numpy arrays and scalars of the columns' dtypes, bytes, str and Python objects (None for
    a null; images are encoded bytes, or arrays where they are decoded); `dataset[[3, 1, 4]]` and `dataset[2:9]` are
    batches: a dict of numpy arrays [n, ...] and lists, with `<column>.valid` beside nullable columns (with a transform:
    a list of what it gives). All of it is the caller's own and writable. Negative indices count from the end. Safe from
    any thread and after a fork; pickles to a few hundred bytes. `select`, `filter`, `shard`, `take`, `skip` and `a + b`
    give data sets of other records, `select_columns` and `as_tuple` serve them otherwise (docs/guide/datasets.md).

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
        cast: column of numbers -> dtype to serve it as, converted while it is read: {"tokens": "int64"}. Integers and
            bool become integers or floats that are equal, floats become floats, rounded (docs/reference/batches.md).
        verify: when stored bytes are checked against their CRC-32C: at the "first" touch of each part and when its file
            has changed since, "always", or "never" (the table in docs/guide/cache.md).
        storage_options: for the store, as docs/guide/storage.md lists them.

    Raises:
        NotFound: no data set there, or no such version.
        CorruptShard: a damaged version or segment.
        SchemaError: a column that does not exist; a form, fill value, cast or decoder that is not for a column of its
            kind; when it is read, a value that has no equal in the dtype that it is cast to.
        ValueError, TypeError: an argument that cannot be, by its name.
    """

    _opened: Readable | None

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
        cast: Mapping[str, Any] | None = None,
        verify: Verify = "first",
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        if verify not in ("first", "always", "never"):
            raise ValueError(f"verify must be 'first', 'always' or 'never', got {verify!r}")
        columns = None if columns is None else _names(columns)
        if transform is not None and forms:
            raise ValueError("forms says what columns are in a batch, and with a transform that is up to its records")
        place = Place(os.fspath(url), cache, verify, dict(storage_options or {}), checked_casts(cast))
        opened = OpenedVersion(place, version, columns)
        serving = Serving.of(opened.schema, forms=forms, nulls=nulls, decode=decode, cast=place.casts)
        self.__setstate__(((opened.plan, transform, serving), {}))
        self._opened = opened

    @property
    def source(self) -> Readable:
        """The opened version, a view of it, or several joined: what the native path reads by."""
        opened = self._opened
        return self._open() if opened is None else opened

    @property
    def transform(self) -> Callable[[Record], Any] | None:
        """The function that was given, or None."""
        return self._recipe[1]

    @property
    def serving(self) -> Serving:
        """Forms of columns, fills of nulls and decoders, as they were given."""
        return self._recipe[2]

    @property
    def is_plain(self) -> bool:
        """Whether records are served as they are stored: no transform, and no subclass that says what a record is."""
        return self.transform is None and not _says_what_records_are(type(self))

    @property
    def schema(self) -> Schema:
        """The chosen columns with their types, as they are served: what is cast has the dtype that it is cast to."""
        return self.serving.schema(self.source.schema)

    @property
    def column_names(self) -> list[str]:
        """Names of the chosen columns, in order."""
        return list(self._recipe[0].columns)

    @property
    def version(self) -> int:
        """Number of the version that is read. Raises AttributeError where there are several, of data sets joined."""
        versions = self._recipe[0].versions
        if len(versions) != 1:
            raise AttributeError(f"{len(versions)} data sets that were joined have a version each: {list(versions)}")
        return versions[0]

    @property
    def fingerprint(self) -> str:
        """Of what is read, for comparing runs: the version's own, or of all versions and which records of them."""
        parts = self.source.parts
        if len(parts) == 1 and parts[0].selection is None:
            return parts[0].fingerprint
        facts = [(part.fingerprint, part.selection or "") for part in parts]
        return sha256(repr((facts, self.source.mixture)).encode()).hexdigest()

    def versions(self) -> list[int]:
        """Numbers of all versions there are, oldest first. Raises ValueError of several data sets joined."""
        leaves = self.source.leaves
        if len(leaves) > 1:
            raise ValueError(f"{len(leaves)} data sets that were joined have versions each: ask them one by one")
        return leaves[0].versions()

    def select_columns(self, columns: Sequence[str]) -> Self:
        """The same records with only these columns, in this order. Raises SchemaError for one that is not there.

        Of a data set that serves tuples the columns are what the tuples are of.
        """
        columns = _names(columns)
        if self.serving.names is not None:
            return self.as_tuple(*columns)
        self.schema.select(columns)
        return self._derive(self.source.with_columns(columns), self.serving.select(columns))

    def as_tuple(self, *names: str) -> Self:
        """The same records as tuples, and batches as tuples of columns: `for image, label in loader`.

        Only these columns are read. Beside columns a name may be what goes with them in a batch: "<column>.valid" of a
        nullable one, "<column>.lengths" of a padded one.

        Raises:
            SchemaError: one that is not there; a column whose nulls nobody would see, for its mask is not named.
            ValueError: no names; a data set with a transform, which says itself what a record is.
        """
        if self.transform is not None:
            raise ValueError("with a transform, records are what it gives: let it give tuples")
        columns = tuple_columns(names, self.source.schema, self.serving)
        return self._derive(self.source.with_columns(columns), replace(self.serving.select(columns), names=names))

    def __add__(self, other: object) -> Dataset:
        return concat([self, other]) if isinstance(other, Dataset) else NotImplemented

    def __len__(self) -> int:
        return self.source.n_records

    def __getitem__(self, index: Any) -> Any:
        if type(index) is int:  # first, for asking whether it is a Sequence costs 0.5 us of some 8
            return self._record(index)
        if isinstance(index, slice):
            return self._batch(np.arange(*index.indices(len(self)), dtype=np.int64))
        if isinstance(index, Sequence) or getattr(index, "ndim", 0) > 0:
            return self._batch(record_numbers(index, len(self)))
        return self._record(operator.index(index))

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Records of many indices, gathered in one go: what torch's fetcher asks for."""
        if type(self).__getitem__ is not Dataset.__getitem__:  # a subclass says what a record is
            return [self[index] for index in indices]
        rows = record_numbers(indices, len(self))
        if self.transform is not None:
            return [self.transform(record) for record in as_records(self._columns(rows))]
        return Records(self._columns(rows), len(rows), self.serving)

    def __iter__(self) -> Iterator[Any]:
        for start, stop in spans(self.source):
            yield from self.__getitems__(range(start, stop))

    def to_arrow(self, batch_size: int = 4096) -> Iterator[pa.RecordBatch]:
        """The data set as Arrow record batches of batch_size records (the last may be shorter), in order.

        Types are those that are stored, whatever `cast` says. Arrays are read-only and over the shards' own memory
        where a batch lies within one block, else copied together.
        They are good for as long as something refers to them.

        Raises:
            ValueError: batch_size below 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
        table = None
        for block in arrow_batches(self.source):
            part = pa.Table.from_batches([block])
            table = part if table is None or not table.num_rows else pa.concat_tables([table, part])
            while table.num_rows >= batch_size:
                yield _one_batch(table.slice(0, batch_size))
                table = table.slice(batch_size)
        if table is not None and table.num_rows:
            yield _one_batch(table)

    def to_pandas(self) -> pd.DataFrame:
        """The whole data set as a pandas frame, in memory. Raises ImportError without pandas."""
        frame: pd.DataFrame = pa.Table.from_batches(list(self.to_arrow()), self.source.schema.arrow).to_pandas()
        return frame

    def warm(self, *, jobs: int = 4, on_progress: Callable[[WarmProgress], None] | None = None) -> None:
        """Bring what this data set serves into the cache: its columns of every shard that holds one of its records.

        Nothing to do for a local folder.

        Args:
            jobs: shards fetched side by side.
            on_progress: called after each shard; of data sets joined they come one after the other, each counted anew.

        Raises:
            CacheFull: it does not fit.
        """
        shards = range(len(self.source.shard_records))
        self.source.warm(shards, jobs=jobs, on_progress=on_progress)

    def close(self) -> None:
        """Give shards and connections back; the data set may be used again after it."""
        if self._opened is not None:
            self._opened.close()

    def __repr__(self) -> str:
        urls, versions = [leaf.url for leaf in self.source.leaves], self._recipe[0].versions
        more = f" and {len(urls) - 1} more" if len(urls) > 1 else ""
        numbers = list(dict.fromkeys(versions))
        version = ", ".join(map(str, numbers[:4])) + (", ..." if len(numbers) > 4 else "")
        return f"Dataset({urls[0]!r}{more}, version {version}, {len(self):,} records: {self.schema!r})"

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

    def over(self, source: Readable) -> Self:
        """The same data set over another source: with its transform, its forms and its attributes. For loaders."""
        return self._derive(source)

    def _derive(self, source: Readable, serving: Serving | None = None) -> Self:
        """The same data set over another source, served as this one or otherwise."""
        derived = type(self).__new__(type(self))
        recipe = (source.plan, self.transform, self.serving if serving is None else serving)
        derived.__setstate__((recipe, self._own()))
        derived._opened = source  # noqa: SLF001 -- of this class
        return derived

    def _open(self) -> Readable:
        if self._pid != os.getpid():  # of a thread that a fork has left behind, which may hold it for ever
            self._lock, self._pid = threading.Lock(), os.getpid()
        with self._lock:  # of two threads that come first, the second takes what the first has opened
            if self._opened is None:
                self._opened = self._recipe[0].open({})
            return self._opened

    def _record(self, index: int) -> Any:
        n, serving = len(self), self.serving
        if not -n <= index < n:
            raise IndexError(f"record {index} of a data set of {n}")
        number = index + n if index < 0 else index
        record = None if serving.nulls or serving.decode else self.source.record(number)
        if record is None:
            record = as_records(self._columns(np.array([number], np.int64)))[0]
        if serving.names is not None:
            return record_tuple(record, serving.names, self.source.schema)
        return record if self.transform is None else self.transform(record)

    def _batch(self, rows: NDArray[np.int64]) -> Any:
        if self.transform is not None:
            return self.__getitems__(rows.tolist())
        batch, names = in_forms(self._columns(rows), self.serving), self.serving.names
        return batch if names is None else as_tuple(batch, names)

    def _columns(self, rows: NDArray[np.int64]) -> list[ColumnValues]:
        """Values of the records, nulls filled and pictures decoded where they are to be."""
        return self._served(self.source.values(rows), rows)

    def _served(self, columns: list[ColumnValues], rows: Sequence[int] | NDArray[np.int64]) -> list[ColumnValues]:
        fills, decode = self.serving.nulls, self.serving.decode
        if fills:
            columns = [filled(c, fills[c.column.name]) if c.column.name in fills else c for c in columns]
        if not decode:
            return columns

        def explain(column: str, index: int, said: str) -> Exception:
            listed, served = self.source.listed, int(rows[index])
            return broken_picture(self.source, column, served if listed is None else int(listed[served]), said)

        return decode_columns(columns, decode, explain)


def concat(datasets: Iterable[Dataset]) -> Dataset:
    """Data sets one after the other, as one: `a + b` of many.

    They may lie in different stores and caches, and be views or joined themselves. A loader shuffles over all of them,
    by the native path.

    Args:
        datasets: one or more, whose columns have the same names, types and order and are served in the same way.

    Raises:
        SchemaError: columns or their serving differ; names the first difference.
        ValueError: no data sets, a mixture, other transforms, a subclass that says what a record is.
        TypeError: not data sets of tiercache.
    """
    datasets = _alike(datasets, "concat")
    parts = [dataset.source for dataset in datasets]
    flat = [below for part in parts for below in (part.below if type(part) is Joined else (part,))]
    return _over(Joined(flat), datasets[0])


def mix(datasets: Iterable[Dataset], weights: Iterable[float], stop: Literal["first", "all"] = "first") -> Dataset:
    """Data sets mixed: of any stretch of records each one has its share of them, by weight.

    For `tiercache.DataLoader`, natively: each data set is shuffled by itself and has epochs of its own. One that is
    larger than its share of an epoch goes on where it stopped in the next epoch, a smaller one begins anew. By index,
    and under other loaders, it is the same first epoch each time, unshuffled: record i is what comes at position i.

    Args:
        datasets: as for `concat`, each with one record or more.
        weights: a number above 0 for each; only their ratio counts, taken exactly (a float as its decimal digits).
        stop: an epoch ends before it would take more records of a data set than that has ("first"), or when each was
            served whole ("all").

    Raises:
        SchemaError, TypeError: as `concat`.
        ValueError: as `concat`; weights that are none; a data set without records.
    """
    datasets = _alike(datasets, "mix")
    return _over(Mixed([dataset.source for dataset in datasets], tuple(weights), stop), datasets[0])


def _over(source: Readable, first: Dataset) -> Dataset:
    made = Dataset.__new__(Dataset)
    made.__setstate__(((source.plan, first.transform, first.serving), {}))
    made._opened = source  # noqa: SLF001 -- of this class
    return made


def _alike(given: Iterable[Any], what: str) -> list[Dataset]:
    """Data sets that can be joined. Raises as `concat`."""
    datasets = [] if isinstance(given, Dataset) else list(given)
    if isinstance(given, Dataset) or not all(isinstance(dataset, Dataset) for dataset in datasets):
        others = [type(one).__name__ for one in datasets if not isinstance(one, Dataset)]
        found = f"one with a {others[0]}" if others else f"the data set alone: {what}([a, b])"
        raise TypeError(
            f"{what}() takes a list of tiercache data sets, got {found}; torch's ConcatDataset joins others"
        )
    if not datasets:
        raise ValueError(f"{what}() of no data sets: it takes one or more")
    for number, dataset in enumerate(datasets):
        if _says_what_records_are(type(dataset)):
            why = f"data set {number} is a {type(dataset).__name__}, which says itself what a record is"
            raise ValueError(f"{why}: join them by torch's ConcatDataset")
        if dataset.source.mixture is not None:
            raise ValueError(f"data set {number} is a mixture: {what}() what it is mixed of")
        if dataset.transform != datasets[0].transform:
            raise ValueError(f"data set {number} has another transform than data set 0: they need the same function")
        _check_serving(dataset.serving, datasets[0].serving, number)
    return datasets


def _check_serving(serving: Serving, first: Serving, number: int) -> None:
    """Raise SchemaError where a column is served otherwise in data set `number` than in data set 0."""
    if serving.names != first.names:
        message = f"data set {number} serves {serving.names or 'dicts'}, data set 0 {first.names or 'dicts'}"
        raise SchemaError(f"{message}: as_tuple() both", expected=str(first.names), got=str(serving.names))
    for argument in (f.name for f in fields(Serving) if f.name != "names"):
        mine, theirs = getattr(first, argument), getattr(serving, argument)
        for column in sorted({*mine, *theirs}):
            if pickle.dumps(mine.get(column)) != pickle.dumps(theirs.get(column)):
                message = f"data set {number} has {argument}={theirs.get(column)!r}, data set 0 {mine.get(column)!r}"
                if argument == "cast":
                    message += "; what is joined is stored as the same dtype too"
                raise SchemaError(message, column=column, expected=repr(mine.get(column)), got=repr(theirs.get(column)))


def _says_what_records_are(kind: type[Dataset]) -> bool:
    return any(getattr(kind, n) is not getattr(Dataset, n) for n in ("__getitem__", "__getitems__", "__len__"))


def _names(columns: Iterable[str]) -> tuple[str, ...]:
    if isinstance(columns, str):
        raise TypeError(f"columns is a list of names, got the str {columns!r}")
    names = tuple(columns)
    if not names:
        raise ValueError("columns is empty: name one or more")
    return names


def _one_batch(table: pa.Table) -> pa.RecordBatch:
    return table.combine_chunks().to_batches()[0] if table.column(0).num_chunks > 1 else table.to_batches()[0]
