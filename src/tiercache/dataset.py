"""The public Dataset: records by index, batches by indices, views, versions and columns; and `concat` and `mix`."""

from __future__ import annotations

import operator
import os
import pickle
import sys
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias, cast, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tiercache._native.record_finder import normalize_indices
from tiercache.errors import SchemaError, renamed_argument
from tiercache.images.decoder import decode_columns
from tiercache.load.output_spec import (
    ColumnLayout,
    LazyRecords,
    NativeAccess,
    OutputSpec,
    Record,
    apply_layouts,
    as_columns,
    image_decode_error,
    record_tuple,
    replace_nulls,
    tuple_columns,
)
from tiercache.opened_version import DatasetLocation, OpenedVersion, Verify
from tiercache.shard.conversion import parse_casts
from tiercache.shard.read.values import ColumnValues, as_records
from tiercache.shard.versions.manifest import list_versions
from tiercache.views import Records, RecordsSpec, arrow_batches, join, spans
from tiercache.views import mix as mixed_records
from tiercache.views.records import FilterStep, RangeStep, SelectStep, ShardStep, Step
from tiercache.views.selection import Selection

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    from tiercache.cache import Cache, WarmProgress
    from tiercache.images.options import DecodeImage
    from tiercache.shard.schema import Schema
    from tiercache.views.records import Records


class SelectionMethods:
    """Mixin with the selection methods of a data set. They return views: fewer records with the same output options.

    A view is a data set in every respect: any loader reads it, `tiercache.DataLoader` by its native path; it can be
    pickled, resumed and selected from again. A range of records costs nothing per record, other selections some bytes.
    Shards and blocks without selected records are never read.
    """

    @property
    @abstractmethod
    def _source(self) -> Records:
        """Opened records of the data set."""

    @abstractmethod
    def _derive(self, source: Records) -> Self:
        """Return the same data set over other records."""

    def select(self, chosen: Any) -> Self:
        """Return the records with these numbers, in this order; or the records for which a mask is true.

        With shuffle=False a loader keeps the order of the numbers; with shuffle=True it shuffles the records as usual.

        Args:
            chosen: Record numbers (a sequence, array or tensor of integers; negative ones count from the end;
                repetitions are allowed), or a mask of len() booleans.

        Raises:
            IndexError: A record does not exist.
            ValueError: The mask has the wrong length.
            TypeError: The argument is neither numbers nor a mask.
        """
        n = self._source.n_records
        if isinstance(chosen, pc.Expression) or callable(chosen):
            raise TypeError("select() takes record numbers or a mask; filter() takes a pyarrow expression")
        if isinstance(chosen, range):
            return self._choose(SelectStep(_of_range(chosen, n)))
        given = np.asarray(chosen)
        if given.ndim != 1:
            found = f"{given.ndim} dimensions" if given.ndim else f"the type {type(chosen).__name__}"
            raise TypeError(f"select() takes a list or array of record numbers or a mask, got {found}")
        if given.dtype == np.bool_:
            if len(given) != n:
                raise ValueError(f"the mask has {len(given)} values for {n} records; it needs one value per record")
            return self._choose(SelectStep(Selection.of(np.flatnonzero(given))))
        return self._choose(SelectStep(Selection.of(record_numbers(given, n))))

    def filter(self, expression: pc.Expression) -> Self:
        """Return the records for which an expression is true, in their order; null is not true.

        The columns of the expression are read now, block by block in bounded memory. Shards whose minimum and maximum
        rule out a match are not read. The columns need not be among the served columns.

        Args:
            expression: Expression such as `pyarrow.compute.field("label") == 3`. It sees images and JSON as bytes and
                text.

        Raises:
            SchemaError: A column does not exist, or the expression is not a condition over the columns.
            TypeError: The argument is not an expression.
        """
        if not isinstance(expression, pc.Expression):
            raise TypeError(
                f"filter() takes a pyarrow expression, such as pyarrow.compute.field('label') == 3, got {expression!r};"
                " for a Python function: dataset.select([i for i, record in enumerate(dataset) if function(record)])"
            )
        return self._choose(FilterStep(expression))

    def shard(self, num_shards: int, index: int) -> Self:
        """Return part `index` of `num_shards` runs of consecutive records, whose lengths differ by at most one.

        Args:
            num_shards: Number of runs, 1 or more.
            index: Number of the run, 0 <= index < num_shards.

        Raises:
            ValueError: num_shards is below 1, or index is outside [0, num_shards).
        """
        num_shards, index = operator.index(num_shards), operator.index(index)
        if num_shards < 1:
            raise ValueError(f"num_shards must be 1 or more, got {num_shards}")
        if not 0 <= index < num_shards:
            raise ValueError(f"index must be 0 to {num_shards - 1}, got {index}")
        return self._choose(ShardStep(num_shards, index))

    def take(self, n: int) -> Self:
        """Return the first n records, or all records if there are fewer.

        Args:
            n: Number of records, 0 or more.

        Raises:
            ValueError: n is negative.
        """
        return self._choose(RangeStep(0, _count(n)))

    def skip(self, n: int) -> Self:
        """Return all records except the first n; none if there are fewer.

        Args:
            n: Number of records, 0 or more.

        Raises:
            ValueError: n is negative.
        """
        return self._choose(RangeStep(_count(n), None))

    def _choose(self, step: Step) -> Self:
        source = self._source
        if source.mixture is not None:
            raise ValueError("cannot select from a mixture: select from the data sets before mix()")
        return self._derive(source.with_step(step))


def record_numbers(indices: Any, n: int) -> NDArray[np.int64]:
    """Return record numbers as int64[n], 0 <= number < n, with negative ones counted from the end.

    Raises IndexError and TypeError.
    """
    rows = np.asarray(indices)
    if rows.dtype == np.bool_ or (rows.size and rows.dtype.kind not in "iu"):
        hints = {"O": ": a number is missing or has more than 64 bits"}
        hints["U"] = f" ({indices!r:.60}): columns are chosen by select_columns([...])"
        raise TypeError(f"record numbers must be integers, got {rows.dtype}{hints.get(rows.dtype.kind, '')}")
    if rows.size and rows.dtype == np.uint64 and int(rows.max()) >= n:  # as int64 it may be -1
        raise IndexError(f"record {int(rows.max())} of a data set of {n}")
    return normalize_indices(np.ascontiguousarray(rows, np.int64).reshape(-1), n)


def _of_range(chosen: range, n: int) -> Selection:
    """Return the selection of a range, without an array if the range is contiguous."""
    if not chosen:
        return Selection.span(0, 0)
    for end in (chosen[0], chosen[-1]):
        if not -n <= end < n:
            raise IndexError(f"record {end} of a data set of {n}")
    if chosen.step == 1 and chosen.start >= 0:
        return Selection.span(chosen.start, chosen.stop)
    # np.arange is 100 times faster than converting the range object.
    return Selection.of(record_numbers(np.arange(chosen.start, chosen.stop, chosen.step), n))


def _count(n: int) -> int:
    n = operator.index(n)
    if n < 0:
        raise ValueError(f"the number of records must be 0 or more, got {n}")
    return n


# Complete picklable description of a data set: its records, the transform, and the output spec.
DatasetSpec = tuple[RecordsSpec, Callable[[Record], Any] | None, OutputSpec]
_OF_THE_PROCESS = ("_recipe", "_lock", "_pid", "_opened")


class Dataset(SelectionMethods):
    """Records of a packed data set.

    It is a map-style data set for any loader. `tiercache.DataLoader` reads it by its native path, in which C code
    assembles batches without a Python object per record.

    `dataset[7]` is a dict that holds numpy arrays, scalars of the columns' dtypes, bytes, str and Python objects. A
    null is None; an image is its encoded bytes, or an array if it is decoded. `dataset[[3, 1, 4]]` and `dataset[2:9]`
    are batches: a dict of numpy arrays [n, ...] and lists, with an entry `<column>.valid` for each nullable column.
    With a transform, a batch is a list of the transform's results. The caller owns all of these values and may write to
    them. Negative indices count from the end.

    A data set may be used from any thread and after a fork, and pickles to a few hundred bytes. `select`, `filter`,
    `shard`, `take`, `skip` and `a + b` return data sets with other records; `select_columns` and `as_tuple` return the
    same records in another form (docs/guide/datasets.md). If torch is loaded, the class derives from
    `torch.utils.data.Dataset`.

    Args:
        url: Local path, `s3://`, `gs://`, `az://`, `http(s)://`, `memory://` or any fsspec URL of the data set.
        cache: Cache through which the data set is read. None: local folders are read in place, everything else is read
            through `Cache.default()`. False: no cache.
        columns: Names of the columns to serve, in order. None: all columns.
        version: Number of the version to read. None: the newest version at the time of opening; later commits do not
            change it.
        transform: Function that takes a record and returns what `dataset[i]` is. It must be picklable if worker
            processes are used.
        decode: Mapping from an image column to the `DecodeImage` that decodes its images. The images of other columns
            are served as encoded bytes.
        layouts: Mapping from a column whose records differ in length to its layout in a batch: "list" (the default),
            "padded", "nested" or "buffer" (docs/guide/loader.md). The layout does not change single records.
        fill_nulls: Mapping from a nullable column to the value that replaces its nulls, or to "mask" (the default),
            which adds `<column>.valid` to the batch.
        cast: Mapping from a numeric column to the dtype to serve it as, for example {"tokens": "int64"}. Values are
            converted while they are read. Integers and bool convert to integers or floats of equal value; floats
            convert to floats and are rounded (docs/reference/batches.md).
        verify: When stored bytes are compared with their CRC-32C: "first": when each part is first read, and again
            after its file has changed; "always"; or "never" (table in docs/guide/cache.md).
        storage_options: Options of the store, as docs/guide/storage.md lists them.
        forms, nulls: Old names of layouts and fill_nulls; deprecated.

    Raises:
        NotFound: The URL holds no data set, or the version does not exist.
        CorruptShard: A version or segment object is damaged.
        SchemaError: A column does not exist; or a layout, fill value, cast or decoder does not apply to a column of its
            type. While reading: a value has no equal in the dtype that it is cast to.
        ValueError, TypeError: An argument is invalid; the message names it.
    """

    _opened: Records | None

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        cache: Cache | Literal[False] | None = None,
        columns: Sequence[str] | None = None,
        version: int | None = None,
        transform: Callable[[Record], Any] | None = None,
        decode: Mapping[str, DecodeImage] | None = None,
        layouts: Mapping[str, ColumnLayout] | None = None,
        fill_nulls: Mapping[str, Any] | None = None,
        cast: Mapping[str, Any] | None = None,
        verify: Verify = "first",
        storage_options: Mapping[str, Any] | None = None,
        forms: Mapping[str, ColumnLayout] | None = None,
        nulls: Mapping[str, Any] | None = None,
    ) -> None:
        layouts = renamed_argument("Dataset", "forms", forms, "layouts", layouts)
        fill_nulls = renamed_argument("Dataset", "nulls", nulls, "fill_nulls", fill_nulls)
        if verify not in ("first", "always", "never"):
            raise ValueError(f"verify must be 'first', 'always' or 'never', got {verify!r}")
        columns = None if columns is None else _names(columns)
        if transform is not None and layouts:
            raise ValueError("layouts= cannot be combined with transform=: the transform's results make up a batch")
        location = DatasetLocation(os.fspath(url), cache, verify, dict(storage_options or {}), parse_casts(cast))
        opened = Records((OpenedVersion(location, version, columns),))
        spec = OutputSpec.of(opened.schema, layouts=layouts, fill_nulls=fill_nulls, decode=decode, cast=location.casts)
        self.__setstate__(((opened.spec, transform, spec), {}))
        self._opened = opened

    @property
    def _source(self) -> Records:
        """Opened records, which the loader reads."""
        opened = self._opened
        return self._open() if opened is None else opened

    @property
    def transform(self) -> Callable[[Record], Any] | None:
        """Function given as `transform`, or None."""
        return self._recipe[1]

    def __tiercache__(self) -> NativeAccess:
        """Return what `tiercache.DataLoader` and the command read; an interface of this library, not of its users."""
        return NativeAccess(self._source, self._output_spec, self._is_plain, self._derive)

    @property
    def _output_spec(self) -> OutputSpec:
        """Output spec: the layouts, fill values, casts and decoders that were given."""
        return self._recipe[2]

    @property
    def _is_plain(self) -> bool:
        """Whether records are served as stored: no transform, and no subclass overrides record access."""
        return self.transform is None and not _overrides_record_access(type(self))

    @property
    def schema(self) -> Schema:
        """Schema of the chosen columns as they are served: a cast column has the dtype that it is cast to."""
        return self._output_spec.schema(self._source.schema)

    @property
    def column_names(self) -> list[str]:
        """Names of the chosen columns, in order."""
        return list(self._recipe[0].columns)

    @property
    def version(self) -> int:
        """Number of the version that is read. Raises AttributeError if the data set joins several versions."""
        versions = self._recipe[0].versions
        if len(versions) != 1:
            raise AttributeError(
                f"this data set joins {len(versions)} data sets, each with its own version: {list(versions)}"
            )
        return versions[0]

    @property
    def fingerprint(self) -> str:
        """Hash of the records that are read, for comparing runs.

        For one whole version it is the version's own fingerprint. Otherwise it covers all versions and the selected
        records of each.
        """
        parts = self._source.parts
        if len(parts) == 1 and parts[0].selection is None:
            return parts[0].fingerprint
        facts = [(part.fingerprint, part.selection or "") for part in parts]
        return sha256(repr((facts, self._source.mixture)).encode()).hexdigest()

    def versions(self) -> list[int]:
        """Return the numbers of all versions of the data set, oldest first. Raises ValueError for joined data sets."""
        opened_versions = self._source.opened_versions
        if len(opened_versions) > 1:
            raise ValueError(f"this data set joins {len(opened_versions)} data sets: call versions() of each of them")
        return list_versions(opened_versions[0].inner)

    def select_columns(self, columns: Sequence[str]) -> Self:
        """Return the same records with only these columns, in this order. Raises SchemaError for an unknown column.

        If the data set serves tuples, the columns are the new tuple entries.

        Args:
            columns: Names of the columns, one or more.
        """
        columns = _names(columns)
        if self._output_spec.names is not None:
            return self.as_tuple(*columns)
        self.schema.select(columns)
        return self._derive(self._source.with_columns(columns), self._output_spec.select(columns))

    def as_tuple(self, *names: str) -> Self:
        """Return the same records as tuples, and batches as lists of columns: `for image, label in loader`.

        Only the named columns are read.

        Args:
            names: Names of the tuple entries, in order. An entry is a column, "<column>.valid" (the mask of a nullable
                column) or "<column>.lengths" (the lengths of a padded column).

        Raises:
            SchemaError: A name is unknown; or a nullable column is named without its mask, so that its nulls would go
                unseen.
            ValueError: There are no names, or the data set has a transform, which itself decides what a record is.
        """
        if self.transform is not None:
            raise ValueError("as_tuple() cannot be combined with transform=: return tuples from the transform")
        columns = tuple_columns(names, self._source.schema, self._output_spec)
        return self._derive(self._source.with_columns(columns), replace(self._output_spec.select(columns), names=names))

    def __add__(self, other: object) -> Dataset:
        return concat([self, other]) if isinstance(other, Dataset) else NotImplemented

    def __len__(self) -> int:
        return self._source.n_records

    def __getitem__(self, index: Any) -> Any:
        if type(index) is int:  # first: isinstance(index, Sequence) costs 0.5 us of about 8 us
            return self._record(index)
        if isinstance(index, slice):
            return self._batch(np.arange(*index.indices(len(self)), dtype=np.int64))
        if isinstance(index, Sequence) or getattr(index, "ndim", 0) > 0:
            return self._batch(record_numbers(index, len(self)))
        return self._record(operator.index(index))

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Return the records of many indices, read together; torch's fetcher calls this method."""
        if type(self).__getitem__ is not Dataset.__getitem__:  # a subclass overrides record access
            return [self[index] for index in indices]
        rows = record_numbers(indices, len(self))
        if self.transform is not None:
            return [self.transform(record) for record in as_records(self._columns(rows))]
        return LazyRecords(self._columns(rows), len(rows), self._output_spec)

    def __iter__(self) -> Iterator[Any]:
        for start, stop in spans(self._source):
            yield from self.__getitems__(range(start, stop))

    def to_arrow(self, batch_size: int = 4096) -> Iterator[pa.RecordBatch]:
        """Yield the data set as Arrow record batches, in order.

        Types are the stored types; `cast` has no effect. Arrays are read-only. A batch that lies within one block
        refers to the shard's memory; other batches are copies. Arrays stay valid while anything refers to them.

        Args:
            batch_size: Number of records per batch; the last batch may be shorter.

        Raises:
            ValueError: batch_size is below 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
        table = None
        for block in arrow_batches(self._source):
            part = pa.Table.from_batches([block])
            table = part if table is None or not table.num_rows else pa.concat_tables([table, part])
            while table.num_rows >= batch_size:
                yield _one_batch(table.slice(0, batch_size))
                table = table.slice(batch_size)
        if table is not None and table.num_rows:
            yield _one_batch(table)

    def to_pandas(self) -> pd.DataFrame:
        """Return the whole data set as a pandas DataFrame in memory. Raises ImportError without pandas."""
        frame: pd.DataFrame = pa.Table.from_batches(list(self.to_arrow()), self._source.schema.arrow).to_pandas()
        return frame

    def warm(self, *, jobs: int = 4, on_progress: Callable[[WarmProgress], None] | None = None) -> None:
        """Fetch what this data set serves into the cache: its columns of every shard that holds one of its records.

        For a local folder there is nothing to do.

        Args:
            jobs: Number of shards fetched in parallel.
            on_progress: Function called after each shard. Joined data sets are fetched one after the other, each with
                its own count.

        Raises:
            CacheFull: The data does not fit into the cache.
        """
        self._source.warm(jobs=jobs, on_progress=on_progress)

    def close(self) -> None:
        """Release open shards and connections. The data set may be used again afterwards."""
        if self._opened is not None:
            self._opened.close()

    def __repr__(self) -> str:
        urls, versions = [leaf.url for leaf in self._source.opened_versions], self._recipe[0].versions
        more = f" and {len(urls) - 1} more" if len(urls) > 1 else ""
        numbers = list(dict.fromkeys(versions))
        version = ", ".join(map(str, numbers[:4])) + (", ..." if len(numbers) > 4 else "")
        return f"Dataset({urls[0]!r}{more}, version {version}, {len(self):,} records: {self.schema!r})"

    def __getstate__(self) -> tuple[DatasetSpec, dict[str, Any]]:
        _derive_from_torchs_class()  # pickle compares __class__ with the type
        return self._recipe, self._own()

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        # isinstance() reads __class__ if the type itself does not derive from the class in question. torch may have
        # been imported after this data set was created: the answer then is torch's class, once.
        return _derive_from_torchs_class() or type(self)

    def __setstate__(self, state: tuple[DatasetSpec, dict[str, Any]]) -> None:
        _derive_from_torchs_class()
        self._recipe = state[0]
        self.__dict__.update(state[1])
        self._lock, self._pid = threading.Lock(), os.getpid()
        self._opened = None  # opened on first use, in the process that uses it

    def _own(self) -> dict[str, Any]:
        """Return the attributes that a subclass has set."""
        return {name: value for name, value in vars(self).items() if name not in _OF_THE_PROCESS}

    def _derive(self, source: Records, spec: OutputSpec | None = None) -> Self:
        """Return the same data set over another source, with this output spec or another one."""
        derived = type(self).__new__(type(self))
        recipe = (source.spec, self.transform, self._output_spec if spec is None else spec)
        derived.__setstate__((recipe, self._own()))
        derived._opened = source  # noqa: SLF001 -- of this class
        return derived

    def _open(self) -> Records:
        if self._pid != os.getpid():  # after a fork: a thread of the parent may hold the lock for ever
            self._lock, self._pid = threading.Lock(), os.getpid()
        with self._lock:  # two threads that race share the source that the first one opens
            if self._opened is None:
                self._opened = self._recipe[0].open()
            return self._opened

    def _record(self, index: int) -> Any:
        n, spec = len(self), self._output_spec
        if not -n <= index < n:
            raise IndexError(f"record {index} of a data set of {n}")
        number = index + n if index < 0 else index
        record = None if spec.nulls or spec.decode else self._source.record(number)
        if record is None:
            record = as_records(self._columns(np.array([number], np.int64)))[0]
        if spec.names is not None:
            return record_tuple(record, spec.names, self._source.schema)
        return record if self.transform is None else self.transform(record)

    def _batch(self, rows: NDArray[np.int64]) -> Any:
        if self.transform is not None:
            return self.__getitems__(rows.tolist())
        batch, names = apply_layouts(self._columns(rows), self._output_spec), self._output_spec.names
        return batch if names is None else as_columns(batch, names)

    def _columns(self, rows: NDArray[np.int64]) -> list[ColumnValues]:
        """Return the records' values by column, with nulls filled and images decoded as the output spec says."""
        columns, fills, decode = self._source.values(rows), self._output_spec.nulls, self._output_spec.decode
        if fills:
            columns = [replace_nulls(c, fills[c.column.name]) if c.column.name in fills else c for c in columns]
        if not decode:
            return columns

        def explain(column: str, index: int, reason: str) -> Exception:
            order, served = self._source.record_order, int(rows[index])
            return image_decode_error(self._source, column, served if order is None else int(order[served]), reason)

        return decode_columns(columns, decode, explain)


def _derive_from_torchs_class() -> type | None:
    """Add torch's Dataset class to the bases of Dataset once torch is loaded. Returns it if this call added it."""
    torchs_class = getattr(sys.modules.get("torch.utils.data.dataset"), "Dataset", None)
    if torchs_class is None or issubclass(Dataset, torchs_class):
        return None
    try:
        Dataset.__bases__ = (SelectionMethods, torchs_class)
    except TypeError:  # a subclass derives from both, torch's class first: no order of bases is valid for it
        return None
    return cast("type", torchs_class)


_derive_from_torchs_class()


def concat(datasets: Iterable[Dataset]) -> Dataset:
    """Return one data set that holds the records of several data sets, one after the other: `a + b` for many.

    The data sets may lie in different stores and caches, and may be views or joined data sets themselves. A loader
    shuffles over all of them by its native path.

    Args:
        datasets: One or more data sets. Their columns must have the same names, types and order and the same output
            options.

    Raises:
        SchemaError: Columns or their output options differ; the message names the first difference.
        ValueError: There are no data sets; or one is a mixture, has a different transform, or is of a subclass that
            overrides record access.
        TypeError: An item is not a tiercache data set.
    """
    datasets = _alike(datasets, "concat")
    return _over(join([dataset._source for dataset in datasets]), datasets[0])  # noqa: SLF001 -- of this class


MixStop: TypeAlias = Literal["first_exhausted", "all_exhausted", "first", "all"]
_MIX_STOPS = get_args(MixStop)


def mix(datasets: Iterable[Dataset], weights: Iterable[float], stop: MixStop = "first_exhausted") -> Dataset:
    """Return data sets mixed by weight: every range of records holds each data set's share.

    It is made for `tiercache.DataLoader`, which reads it by its native path: each data set is shuffled by itself and
    has its own epochs. A data set that is larger than its share of an epoch continues in the next epoch where it
    stopped; a smaller one starts again. By index, and in other loaders, the mixture is the same unshuffled first epoch
    each time: record i is the record at position i.

    Args:
        datasets: Data sets as for `concat`, each with one record or more.
        weights: Positive number for each data set. Only their ratio counts, and it is exact (a float stands for its
            decimal digits).
        stop: End of an epoch: "first_exhausted": before any data set would repeat a record; "all_exhausted": when every
            data set has been served completely. "first" and "all" are short forms of these.

    Raises:
        SchemaError, TypeError: See `concat`.
        ValueError: See `concat`; or the weights are invalid, or a data set has no records.
    """
    datasets = _alike(datasets, "mix")
    if stop not in _MIX_STOPS:
        raise ValueError(f"stop must be {', '.join(map(repr, _MIX_STOPS))}, got {stop!r}")
    sources = [dataset._source for dataset in datasets]  # noqa: SLF001 -- of this class
    short: Literal["first", "all"] = "first" if stop.startswith("first") else "all"
    return _over(mixed_records(sources, tuple(weights), short), datasets[0])


def _over(source: Records, first: Dataset) -> Dataset:
    made = Dataset.__new__(Dataset)
    made.__setstate__(((source.spec, first.transform, first.__tiercache__().output_spec), {}))
    made._opened = source  # noqa: SLF001 -- of this class
    return made


def _alike(given: Iterable[Any], what: str) -> list[Dataset]:
    """Return the data sets as a list after checking that they can be joined. Raises as `concat`."""
    datasets = [] if isinstance(given, Dataset) else list(given)
    if isinstance(given, Dataset) or not all(isinstance(dataset, Dataset) for dataset in datasets):
        others = [type(one).__name__ for one in datasets if not isinstance(one, Dataset)]
        found = f"one with a {others[0]}" if others else f"the data set alone: {what}([a, b])"
        raise TypeError(
            f"{what}() takes a list of tiercache data sets, got {found}; use torch's ConcatDataset for other data sets"
        )
    if not datasets:
        raise ValueError(f"{what}() needs one or more data sets, got none")
    for number, dataset in enumerate(datasets):
        if _overrides_record_access(type(dataset)):
            reason = f"data set {number} is a {type(dataset).__name__}, which overrides record access"
            raise ValueError(f"{reason}: join such data sets with torch's ConcatDataset")
        if dataset.__tiercache__().source.mixture is not None:
            raise ValueError(f"data set {number} is a mixture: pass the data sets that it mixes to {what}() instead")
        if dataset.transform != datasets[0].transform:
            raise ValueError(
                f"data set {number} and data set 0 have different transforms; all must use the same function"
            )
        _check_output_spec(dataset.__tiercache__().output_spec, datasets[0].__tiercache__().output_spec, number)
    return datasets


def _check_output_spec(spec: OutputSpec, first: OutputSpec, number: int) -> None:
    """Raise SchemaError if data set `number` has other output options for a column than data set 0."""
    if spec.names != first.names:
        message = f"data set {number} serves {spec.names or 'dicts'}, data set 0 {first.names or 'dicts'}"
        raise SchemaError(f"{message}: call as_tuple() on both", expected=str(first.names), got=str(spec.names))
    for argument in (f.name for f in fields(OutputSpec) if f.name != "names"):
        own, other = getattr(first, argument), getattr(spec, argument)
        for column in sorted({*own, *other}):
            if pickle.dumps(own.get(column)) != pickle.dumps(other.get(column)):
                message = f"data set {number} has {argument}={other.get(column)!r}, data set 0 {own.get(column)!r}"
                if argument == "cast":
                    message += "; joined columns must also be stored with the same dtype"
                raise SchemaError(message, column=column, expected=repr(own.get(column)), got=repr(other.get(column)))


def _overrides_record_access(kind: type[Dataset]) -> bool:
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
