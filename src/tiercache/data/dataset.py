"""The public Dataset: records by index, batches by indices, views, versions and columns; `concat` and `mix`."""

from __future__ import annotations

import operator
import os
import pickle
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import partial
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tiercache._native.record_finder import normalize_indices
from tiercache.data.opened_layout import open_leaf
from tiercache.data.opened_version import DatasetLocation
from tiercache.data.output_spec import (
    Layouts,
    NativeAccess,
    OutputSpec,
    ReadRecords,
    Record,
    apply_layouts,
    as_columns,
    image_decode_error,
    record_tuple,
    replace_nulls,
    tuple_columns,
)
from tiercache.data.records import (
    RangeStep,
    Records,
    RecordsSpec,
    Selection,
    SelectStep,
    ShardStep,
    ShuffleStep,
    Step,
    join,
)
from tiercache.data.records import mix as mixed_records
from tiercache.data.scan import FilterStep, Split, SplitStep, arrow_batches, class_counts, hash_splits, spans
from tiercache.errors import SchemaError
from tiercache.images.decoder import decode_columns
from tiercache.model import short_repr
from tiercache.shard.blocks import Verify, check_verify
from tiercache.shard.values import ColumnValues, as_records, parse_casts
from tiercache.store.access import absolute_url
from tiercache.transform_rng import use_fresh_key

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    from tiercache.cache import Cache, WarmProgress
    from tiercache.images.decode_image import DecodeImage
    from tiercache.shard.schema import Column, Schema


# Arguments of the constructor, and the field of OutputSpec that has each of them by column.
_SETTINGS = {"decode": "decode", "cast": "cast", "layouts": "layouts", "fill_nulls": "nulls"}
# Complete picklable description of a data set: its records, the transform, the output spec, and the batch transform.
DatasetSpec = tuple[RecordsSpec, Callable[[Record], Any] | None, OutputSpec, Callable[[Any], Any] | None]
_OF_THE_PROCESS = ("_recipe", "_lock", "_pid", "_opened")


MixStop: TypeAlias = Literal["first_exhausted", "all_exhausted"]
_MIX_STOPS = get_args(MixStop)


# The weight of each data set, in their order or by their names; or a list of (position, such weights).
MixWeights: TypeAlias = (
    Iterable[float] | Mapping[str, float] | Iterable[tuple[int, Sequence[float] | Mapping[str, float]]]
)


class Dataset:
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
    same records in another form (docs/guide/datasets.md).

    Args:
        url: Local path, `s3://`, `gs://`, `az://`, `http(s)://`, `memory://` or any fsspec URL of the data set; or
            `hf://datasets/OWNER/NAME/SPLIT` for files on the Hugging Face Hub (docs/guide/in-place.md).
        cache: Cache through which the data set is read. None: local folders are read in place and `memory://` directly;
            everything else is read through `Cache.default()`. False: no cache.
        columns: Names of the columns to serve, in order. None: all columns.
        version: Number or tag of the version to read. None: the newest version at the time of opening; later commits do
            not change it. A pickled data set and the state of a loader keep the number.
        transform: Function that takes a record and returns what `dataset[i]` is. It must be picklable if worker
            processes are used (docs/guide/transforms.md).
        batch_transform: Function that takes a batch, as the loader would serve it, and returns what the loader serves
            instead. It does not change `dataset[...]`.
        decode: Mapping from an image column to the `DecodeImage` that decodes its images. The images of other columns
            are served as encoded bytes.
        layouts: Mapping from a column whose records differ in length to its layout in a batch: "list" (the default),
            "padded" or a `Padded`, "nested" or "buffer" (docs/guide/loader.md). The layout does not change single
            records.
        fill_nulls: Mapping from a nullable column to the value that replaces its nulls, or to "mask" (the default),
            which adds `<column>.valid` to the batch.
        cast: Mapping from a numeric column to the dtype to serve it as, for example {"tokens": "int64"}. Values are
            converted while they are read. Integers and bool convert to integers or floats of equal value; floats
            convert to floats and are rounded (docs/reference/batches.md).
        verify: When stored bytes are compared with their CRC-32C: "first": when each part is first read, and again
            after its file has changed; "always"; or "never" (table in docs/guide/cache.md).
        storage_options: Options of the store, as docs/guide/storage.md lists them.

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
        version: int | str | None = None,
        transform: Callable[[Record], Any] | None = None,
        batch_transform: Callable[[Any], Any] | None = None,
        decode: Mapping[str, DecodeImage] | None = None,
        layouts: Layouts | None = None,
        fill_nulls: Mapping[str, Any] | None = None,
        cast: Mapping[str, Any] | None = None,
        verify: Verify = "first",
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        check_verify(verify)
        columns = None if columns is None else _names(columns)
        if transform is not None and layouts:
            raise ValueError("layouts= cannot be combined with transform=: the transform's results make up a batch")
        location = DatasetLocation(absolute_url(url), cache, verify, dict(storage_options or {}), parse_casts(cast))
        opened = Records((open_leaf(location, version, columns, os.fspath(url)),))
        spec = OutputSpec.of(opened.schema, layouts=layouts, fill_nulls=fill_nulls, decode=decode, cast=location.casts)
        self.__setstate__(((opened.spec, transform, spec, batch_transform), {}))
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

    @property
    def batch_transform(self) -> Callable[[Any], Any] | None:
        """Function given as `batch_transform`, or None."""
        return self._recipe[3]

    def __tiercache__(self) -> NativeAccess:
        """Return what `tiercache.DataLoader` and the command read; an interface of this library, not of its users."""
        return NativeAccess(
            self._source, self._output_spec, self.transform, self.batch_transform, _overrides_record_access(type(self))
        )

    @property
    def _output_spec(self) -> OutputSpec:
        """Output spec: the layouts, fill values, casts and decoders that were given."""
        return self._recipe[2]

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

    @property
    def classes(self) -> list[str]:
        """Names of the classes 0, 1, 2, ..., of the first column whose metadata lists them, as `tc.pack` writes it.

        The column need not be among the served ones. Raises AttributeError if no column has class names.
        """
        return list(self._classes_column.classes)

    def class_counts(self, column: str | None = None) -> dict[Any, int]:
        """Return the number of records of each class.

        Only this column is read, in several threads.

        Args:
            column: Column of integers, bool or text, served or not. None: the column that `classes` names.

        Returns:
            Counts by class name if the column has class names, in their order and with zeros; otherwise by stored
            value, in rising order. Values without a name, and then null (None), come last, if there are any.

        Raises:
            SchemaError: The column does not exist, or its values are no classes.
            AttributeError: No column is given, and none has class names.
            ValueError: This is a mixture.
        """
        source = self._unmixed_source()
        schema = source.stored_schema
        found = self._classes_column if column is None else schema.columns[schema.index(column)]
        counts = class_counts(source, found.name)
        named = {name: counts.pop(value, 0) for value, name in enumerate(found.classes)}
        return named | counts

    @property
    def _classes_column(self) -> Column:
        for column in self._source.stored_schema.columns:
            if column.classes:
                return column
        raise AttributeError("no column of this data set has class names; class_counts(column) counts any column")

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

    def __getitems__(self, indices: Sequence[int]) -> Sequence[Any]:
        """Return the records of many indices, read together; torch's fetcher calls this method."""
        if type(self).__getitem__ is not Dataset.__getitem__:  # a subclass overrides record access
            return [self[index] for index in indices]
        rows = record_numbers(indices, len(self))
        if self.transform is not None:
            pairs = zip(as_records(self._columns(rows)), rows.tolist(), strict=True)
            return [self._transformed(record, number) for record, number in pairs]
        return ReadRecords(self._columns(rows), len(rows), self._output_spec, partial(self._stored_number, rows))

    def __iter__(self) -> Iterator[Any]:
        for start, stop in spans(self._source):
            yield from self.__getitems__(range(start, stop))

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

        The columns of the expression are read now, block by block in bounded memory. They need not be among the served
        columns.

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

    def shuffle(self, seed: int) -> Self:
        """Return the records in a random order, which is the same each time.

        Every order of the records is as likely as any other, so `shuffle(0).take(100)` is a fair sample. The order
        follows from the seed and the number of records; it is computed when it is read and takes no memory, while a
        selection from the view takes 8 to 24 bytes for each of its records. With shuffle=False a loader serves that
        order, in which neighbours lie in different blocks: it is fast if the data is local and uncompressed, or fits
        into the memory of a window. For training use the loader's own shuffle=True, which reads whole blocks and does
        not depend on this order.

        Args:
            seed: Any integer.
        """
        return self._choose(ShuffleStep(operator.index(seed)))

    def split(
        self, fractions: Mapping[str, float], *, seed: int = 0, by: str | None = None, by_hash: str | None = None
    ) -> dict[str, Self]:
        """Return disjoint parts that together are all records, each in the order of this data set.

        Without `by` and `by_hash`, and with `by`, the records are drawn: the first part has the records that
        `shuffle(seed)` puts first, the second part the next ones, and so on. The sizes are the exact fractions, rounded
        by the largest remainder. With `by`, each class is split so by itself: each part gets its exact share of the
        class, rounded down or up. With `by_hash`, the key of a record decides its part: records of equal keys stay
        together, a record keeps its part if data is appended or repacked, and the sizes are only about the fractions.

        The same seed, records and fractions give the same parts on every machine and in every later release. Splitting
        takes about 40 bytes per record; the parts keep 16 bytes for each run of consecutive records.

        Args:
            fractions: Fraction of the records by name of the part, each above 0; they sum up to 1. A float stands for
                its decimal digits.
            seed: Any integer.
            by: Column of classes (integers, bool or text) of which each part gets its share; null is a class too.
            by_hash: Column of keys (integers, text or bytes). The part is found by the first 8 bytes of BLAKE2b of the
                key (docs/guide/datasets.md). Hashing takes 1 to 3 us for each key.

        Raises:
            SchemaError: A column does not exist, or its values are no classes or keys.
            ValueError: The fractions do not sum up to 1; a part would have no records; both `by` and `by_hash` are
                given; this is a part of a split by the same hash and seed; or this is a mixture.
            TypeError: The fractions are not a mapping to numbers.
        """
        split = Split.of(fractions, operator.index(seed), by, by_hash)
        source = self._unmixed_source()
        if by_hash is not None and (by_hash, split.seed) in hash_splits(source.node):
            raise ValueError(
                f"these records are a part of a split by the hash of {by_hash!r} with seed={split.seed}, and the same "
                "hash would not divide them by the fractions: give another seed="
            )
        steps = [SplitStep(split, part) for part in range(len(split.names))]
        chosen = zip(split.names, steps, split.parts(source), strict=True)
        return {name: self._derive(source.with_step(step, part)) for name, step, part in chosen}

    def _choose(self, step: Step) -> Self:
        return self._derive(self._unmixed_source().with_step(step))

    def _unmixed_source(self) -> Records:
        source = self._source
        if source.mixture is not None:
            raise ValueError("cannot select from a mixture: select from the data sets before mix()")
        return source

    def to_arrow(self, batch_size: int = 4096) -> pa.RecordBatchReader:
        """Return a reader of the data set as Arrow record batches, in order, which DuckDB, polars and pyarrow take.

        It is an iterator of record batches, and reads in bounded memory. Types are the stored types; `cast`, `decode`
        and a transform have no effect. Arrays are read-only. A batch that lies within one block refers to the shard's
        memory; other batches are copies. Arrays stay valid while anything refers to them.

        Args:
            batch_size: Number of records per batch; the last batch may be shorter.

        Raises:
            ValueError: batch_size is below 1, or these are packed rows.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
        source = self._source
        return pa.RecordBatchReader.from_batches(source.schema.arrow, _batches_of(arrow_batches(source), batch_size))

    def to_pandas(self) -> pd.DataFrame:
        """Return the whole data set as a pandas DataFrame in memory. Raises ImportError without pandas."""
        frame: pd.DataFrame = self.to_arrow().read_all().to_pandas()
        return frame

    def warm(self, *, jobs: int = 4, on_progress: Callable[[WarmProgress], None] | None = None) -> None:
        """Fetch what this data set serves into the cache: its columns of every shard that holds one of its records.

        For a local folder there is nothing to do.

        Args:
            jobs: Number of shards fetched in parallel.
            on_progress: Function called after each shard. Joined data sets are fetched one after the other, each with
                its own count.

        Raises:
            StoreError: The data does not fit into the cache.
        """
        self._source.storage.warm(jobs=jobs, on_progress=on_progress)

    def close(self) -> None:
        """Release open shards and connections. The data set may be used again afterwards."""
        if self._opened is not None:
            self._opened.storage.close()

    def __repr__(self) -> str:
        source, urls = self._source, [version.url for version in self._source.storage.versions]
        numbers = list(dict.fromkeys(self._recipe[0].versions))
        names = [*map(repr, urls[:2]), *([f"{len(urls) - 2} more"] if len(urls) > 2 else [])]
        is_concat = source.n_joined > 1 and source.mixture is None
        url = (f"concat of {source.n_joined} data sets, " if is_concat else "") + " and ".join(names)
        foreign = list(
            dict.fromkeys(one.manifest.kind for one in self._source.storage.versions if not one.spec.version)
        )
        known = [number for number in numbers if number]
        versions = [f"version {', '.join(map(str, known[:4]))}{', ...' if len(known) > 4 else ''}"] if known else []
        version = " and ".join([*foreign, *versions])
        steps = source.steps if source.mixture is None else (f"mix(weights={list(source.mixture.weights)})",)
        view = f" by {'.'.join(steps)}" if steps else ""
        records = f"{url}, {version}, {len(self):,} record{'' if len(self) == 1 else 's'}{view}"
        served = "".join(f", {name}={text}" for name, text in self._served())
        return f"{type(self).__name__}({records}: {self.schema!r}{served})"

    def _served(self) -> Iterator[tuple[str, str]]:
        """Yield (argument, text) of each way in which columns are not served as they are stored."""
        spec = self._output_spec
        for argument, field in _SETTINGS.items():
            if settings := getattr(spec, field):
                yield argument, "{" + ", ".join(f"{n!r}: {_shown(value)}" for n, value in settings.items()) + "}"
        if spec.names is not None:
            yield "as_tuple", repr(spec.names)
        if self.transform is not None:
            yield "transform", getattr(self.transform, "__qualname__", type(self.transform).__name__)

    def __getstate__(self) -> tuple[DatasetSpec, dict[str, Any]]:
        return self._recipe, self._own()

    def __setstate__(self, state: tuple[DatasetSpec, dict[str, Any]]) -> None:
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
        recipe = (source.spec, self.transform, self._output_spec if spec is None else spec, self.batch_transform)
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
        source = self._source
        # One call less for each record of a whole version.
        find = source.leaves[0].record if source.node is None else source.record
        record = None if spec.nulls or spec.decode else find(number)
        if record is None:
            record = as_records(self._columns(np.array([number], np.int64)))[0]
        if spec.names is not None:
            return record_tuple(record, spec.names, self._source.schema)
        return record if self.transform is None else self._transformed(record, number)

    def _transformed(self, record: Record, number: int) -> Any:
        assert self.transform is not None  # noqa: S101 -- the callers' invariant
        with use_fresh_key():
            try:
                return self.transform(record)
            except Exception as error:
                error.add_note(f"tiercache: in the transform of {self._source.describe(number)}")
                raise

    def _batch(self, rows: NDArray[np.int64]) -> Any:
        if self.transform is not None:
            return self.__getitems__(rows.tolist())
        number, names = partial(self._stored_number, rows), self._output_spec.names
        batch = apply_layouts(self._columns(rows), self._output_spec, number)
        return batch if names is None else as_columns(batch, names)

    def _columns(self, rows: NDArray[np.int64]) -> list[ColumnValues]:
        """Return the records' values by column, with nulls filled and images decoded as the output spec says."""
        columns, fills, decode = self._source.values(rows), self._output_spec.nulls, self._output_spec.decode
        if fills:
            columns = [replace_nulls(c, fills[c.column.name]) if c.column.name in fills else c for c in columns]
        if not decode:
            return columns

        def explain(column: str, index: int, reason: str) -> Exception:
            return image_decode_error(self._source, column, self._stored_number(rows, index), reason)

        return decode_columns(columns, decode, explain)

    def _stored_number(self, rows: NDArray[np.int64], index: int) -> int:
        """Return the number, in stored order, of a record of `rows`."""
        order, served = self._source.record_order, int(rows[index])
        return served if order is None else int(order[served])


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
    datasets = alike_datasets(datasets, "concat")
    return _over_records(join([dataset._source for dataset in datasets]), datasets[0])  # noqa: SLF001 -- of this class


def mix(
    datasets: Iterable[Dataset] | Mapping[str, Dataset],
    weights: MixWeights,
    stop: MixStop = "first_exhausted",
    *,
    source: str | None = None,
) -> Dataset:
    """Return data sets mixed by weight: every range of records holds each data set's share.

    It is made for `tiercache.DataLoader`, which reads it by its native path: each data set is shuffled by itself and
    has its own epochs. A data set that is larger than its share of an epoch continues in the next epoch where it
    stopped; a smaller one starts again. By index, and in other loaders, the mixture is the same unshuffled first epoch
    each time: record i is the record at position i.

    Args:
        datasets: Data sets as for `concat`, each with one record or more. A dict names them for `weights`.
        weights: Positive number for each data set: a list, or a dict by the names of `datasets`. Only their ratio
            counts, and it is exact (a float stands for its decimal digits). For weights that change, a list of
            (position, weights): the first position is 0, the others rise, and the weights hold from that position of an
            epoch on. There a weight may be 0, and a dict may leave out a name for that. Each epoch begins with the
            first weights.
        stop: End of an epoch: "first_exhausted": before any data set would repeat a record; "all_exhausted": when every
            data set has been served completely.
        source: Name of an int32 column that is added to the records, as the last one: the number of the data set that
            the record is from, in the order of `datasets`. None: there is none.

    Raises:
        SchemaError, TypeError: See `concat`; or the data sets have a column of the name `source`.
        ValueError: See `concat`; or the weights are invalid, or a data set has no records.
    """
    names = tuple(datasets) if isinstance(datasets, Mapping) else None
    datasets = alike_datasets(datasets.values() if isinstance(datasets, Mapping) else datasets, "mix")
    if stop not in _MIX_STOPS:
        raise ValueError(f"stop must be {', '.join(map(repr, _MIX_STOPS))}, got {stop!r}")
    sources = [dataset._source for dataset in datasets]  # noqa: SLF001 -- of this class
    short: Literal["first", "all"] = "first" if stop.startswith("first") else "all"
    return _over_records(mixed_records(sources, _weights_in_order(weights, names), short, source), datasets[0])


def _weights_in_order(weights: Any, names: tuple[str, ...] | None) -> tuple[Any, ...]:
    """Return the weights of a mixture, or a schedule of weights, with the weights in the order of the data sets."""
    if isinstance(weights, Mapping):
        missing = [name for name in names or () if name not in weights]
        if missing:
            raise ValueError(f"weights has no weight of the data set {missing[0]!r}")
        return _by_name(weights, names)
    return tuple(
        (entry[0], _by_name(entry[1], names) if isinstance(entry[1], Mapping) else tuple(entry[1]))
        if isinstance(entry, tuple | list) and len(entry) == 2 and isinstance(entry[1], Iterable)
        else entry
        for entry in weights
    )


def _by_name(weights: Mapping[str, float], names: tuple[str, ...] | None) -> tuple[float, ...]:
    if names is None:
        raise ValueError("weights by name need data sets by name: mix({'web': a, 'code': b}, ...)")
    unknown = [name for name in weights if name not in names]
    if unknown:
        raise ValueError(f"weights names {unknown[0]!r}, and the data sets are {list(names)}")
    return tuple(weights.get(name, 0) for name in names)


def _over_records(source: Records, first: Dataset) -> Dataset:
    """Return a plain data set of opened records, with the output options and functions of another one."""
    made = Dataset.__new__(Dataset)
    made.__setstate__(((source.spec, *first._recipe[1:]), {}))  # noqa: SLF001 -- of this class
    made._opened = source  # noqa: SLF001 -- of this class
    return made


def alike_datasets(given: Iterable[Any], what: str) -> list[Dataset]:
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
        first = datasets[0]
        if dataset._source.is_packed != first._source.is_packed:  # noqa: SLF001 -- of this class
            kinds = ["packed rows" if one._source.is_packed else "plain records" for one in (first, dataset)]  # noqa: SLF001
            raise SchemaError(
                f"data set 0 has {kinds[0]}, data set {number} {kinds[1]}: packed rows can be joined only with packed "
                f"rows; call pack_sequences() on each data set, then {what}() on the results",
                expected=kinds[0],
                got=kinds[1],
            )
        if (dataset.transform, dataset.batch_transform) != (first.transform, first.batch_transform):
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


def _shown(setting: Any) -> str:
    return short_repr(setting) if is_dataclass(setting) else repr(setting)


def _names(columns: Iterable[str]) -> tuple[str, ...]:
    if isinstance(columns, str):
        raise TypeError(f"columns is a list of names, got the str {columns!r}")
    names = tuple(columns)
    if not names:
        raise ValueError("columns is empty: name one or more")
    return names


def _batches_of(blocks: Iterable[pa.RecordBatch], batch_size: int) -> Iterator[pa.RecordBatch]:
    table = None
    for block in blocks:
        part = pa.Table.from_batches([block])
        table = part if table is None or not table.num_rows else pa.concat_tables([table, part])
        while table.num_rows >= batch_size:
            yield _one_batch(table.slice(0, batch_size))
            table = table.slice(batch_size)
    if table is not None and table.num_rows:
        yield _one_batch(table)


def _one_batch(table: pa.Table) -> pa.RecordBatch:
    return table.combine_chunks().to_batches()[0] if table.column(0).num_chunks > 1 else table.to_batches()[0]


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
