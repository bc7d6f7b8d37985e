"""Another order of the records of a packing, and duplicates left out, in bounded memory: an external sort.

A first pass writes the records as runs: as many as fit in memory, sorted or shuffled there, as one shard each. They lie
below the records of the packing, with which they are removed. A bucket is a range of the whole order that fits in
memory; it consists of a range of each run. The second pass reads one bucket after the other. Both passes are packings
of their own, so any number of processes runs them, and they continue after a kill.

Duplicates are found by a hash of each record and its position: these are sorted by the hash, and the positions of all
records but the first of each hash are sorted again. The source is then read once more, without these positions.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt
from numpy.typing import NDArray

from tiercache._native.block_builder import ADDED, NEEDS_CONVERSION
from tiercache.errors import SchemaError, StoreError
from tiercache.layouts.reader import blocks_of
from tiercache.model import ShardInfo
from tiercache.order.epoch_order import derive_key, permutation
from tiercache.packer.files import InputBatch, InputSplit, RecordSource
from tiercache.packer.transform import taken, write_good
from tiercache.shard.reader import FooterCache, ShardReader
from tiercache.shard.schema import Column, Kind, Schema
from tiercache.shard.shard_file import BlockData, ColumnData, join_column_data, record_bytes
from tiercache.shard.writer import RecordBuffer, ShardOptions, ShardWriter, convert_batch
from tiercache.store import Store, open_store
from tiercache.store.remote import call_threads

# Bytes of records of a run, and of a bucket. If the sort column is most of the record, a process needs up to eight
# times as much memory. N runs give N^2 ranges: a million reads of 100 KB for 100 GB.
RUN_BYTES = 96 << 20
# Small blocks, because both ends of a range lie somewhere in a block. A run is one shard.
_RUN_OPTIONS = ShardOptions(shard_bytes=1 << 62, block_bytes=256 << 10, compression="none")
_BLOCK_BYTES = 1 << 20
_STEP_BYTES = 4 << 20
_PARALLEL_READS = 16
_MOST_SAMPLES = 1 << 20

Numbers = NDArray[np.int64]


class TooManyRecordsError(Exception):
    """The records of a source do not fit into one run."""


class StoredRecords:
    """Records in stored form in memory, in the place of a ShardWriter."""

    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        self.n_records = self.n_bytes = 0
        self._rows = RecordBuffer(schema, _BLOCK_BYTES)
        self._blocks: list[BlockData] = []

    def write(self, record: Mapping[str, Any]) -> None:
        """See ShardWriter.write."""
        kept = self._rows.add_fast(record)
        if kept == NEEDS_CONVERSION:
            kept = self._rows.add(record, self.n_records)
        self.n_records += 1
        if kept != ADDED:
            self._keep_rows()

    def write_batch(self, columns: Mapping[str, Any] | pa.RecordBatch) -> None:
        """See ShardWriter.write_batch."""
        data = convert_batch(self.schema, columns, self.n_records)
        self._keep_rows()
        self.n_records += data[0].n
        self._keep([one.own() for one in data])

    def take(self) -> BlockData:
        """Remove and return the records: the data of each column."""
        self._keep_rows()
        blocks, self._blocks, self.n_bytes = self._blocks, [], 0
        return [join_column_data([block[i] for block in blocks]) for i in range(len(self.schema))] if blocks else []

    def _keep_rows(self) -> None:
        if self._rows.n_records:
            self._keep(self._rows.take(self._rows.n_records))

    def _keep(self, data: BlockData) -> None:
        if data[0].n:
            self._blocks.append(data)
            for column, one in zip(self.schema.columns, data, strict=True):
                n_bytes = record_bytes(column, one)
                self.n_bytes += n_bytes * one.n if isinstance(n_bytes, int) else int(n_bytes.sum())


class SortOrder(ABC):
    """An order of records. Picklable."""

    @abstractmethod
    def indices(self, records: pa.Table, *where: int) -> NDArray[Any]:
        """Return the order of some records that are in memory. where: Numbers of the run, or of the bucket."""

    @abstractmethod
    def bucket_bounds(self, runs: Runs, n_buckets: int) -> NDArray[np.int32]:
        """Return the first record of each bucket in each run, int32[n_runs, n_buckets + 1]."""


@dataclass(frozen=True)
class Shuffle(SortOrder):
    """A random order: each run is shuffled, its records are dealt to buckets, and each bucket is shuffled."""

    seed: int

    def indices(self, records: pa.Table, *where: int) -> NDArray[Any]:
        return permutation(derive_key(self.seed, "pack", *where), len(records))

    def bucket_bounds(self, runs: Runs, n_buckets: int) -> NDArray[np.int32]:
        """See SortOrder. A bucket is drawn for each record; runs are shuffled, so only the counts of draws matter."""
        found = np.zeros((len(runs.infos), n_buckets + 1), np.int32)
        for number, info in enumerate(runs.infos):
            key = int.from_bytes(derive_key(self.seed, "pack", "buckets", number), "little")
            drawn = np.random.Philox(key=key).random_raw(info.n_records) >> np.uint64(32)
            buckets = (drawn * np.uint64(n_buckets)) >> np.uint64(32)
            np.cumsum(np.bincount(buckets.astype(np.int64), minlength=n_buckets), out=found[number, 1:])
        return found


@dataclass(frozen=True)
class SortBy(SortOrder):
    """The order of the values of some columns, nulls last; records with equal values stay in the order of the source.

    A bucket begins at a record, not at a value, so no value is too frequent for a bucket.
    """

    columns: tuple[str, ...]

    def indices(self, records: pa.Table, *where: int) -> NDArray[Any]:  # noqa: ARG002
        keys = [(str(i), "ascending") for i in range(len(self.columns))]
        found: NDArray[Any] = pc.sort_indices(self._keys(records), keys).to_numpy()
        return found

    def _keys(self, records: pa.Table) -> pa.Table:
        """Return the values to sort by, in columns "0", "1", ...."""
        chosen = [records.column(name) for name in self.columns]
        return pa.table({str(i): values for i, values in enumerate(chosen)})

    def bucket_bounds(self, runs: Runs, n_buckets: int) -> NDArray[np.int32]:
        """See SortOrder. Blocks have about equal sizes, so their first records divide the order into equal sizes."""
        n_runs, names = len(runs.infos), [str(i) for i in range(len(self.columns))]
        samples = []
        for run in range(n_runs):
            keys, starts = self._keys(runs.read(run, names=self.columns)), runs.block_starts(run)
            starts = starts[:: -(-len(starts) * n_runs // _MOST_SAMPLES) or 1]
            where = {"run": np.full(len(starts), run, np.int32), "row": starts.astype(np.int32)}
            samples.append(pa.table({**dict(zip(names, keys.take(starts).columns, strict=True)), **where}))
        sample = pa.concat_tables(samples)
        sample = sample.take(pc.sort_indices(sample, [(name, "ascending") for name in (*names, "run", "row")]))
        bounds = sample.take(np.arange(1, n_buckets) * len(sample) // n_buckets)
        of_run, row = bounds["run"].to_numpy(), bounds["row"].to_numpy()
        found = np.zeros((n_runs, n_buckets + 1), np.int32)
        for run, info in enumerate(runs.infos):
            keys = self._keys(runs.read(run, names=self.columns))
            # Where values are equal, the records of earlier runs come first.
            ties = np.concatenate([np.zeros(len(keys), np.int8), np.sign(of_run - run).astype(np.int8)])
            both = pa.concat_tables([keys, bounds.select(names)]).append_column("tie", pa.array(ties))
            order = pc.sort_indices(both, [(name, "ascending") for name in (*names, "tie")]).to_numpy()
            before = np.flatnonzero(order >= len(keys)) - np.arange(len(bounds))
            found[run, 1:-1] = np.where(of_run == run, row, before)
            found[run, -1] = info.n_records
        return found


@dataclass(frozen=True)
class RunPlan:
    """How a pass orders its records.

    run_bytes: Limit of the records of a run, in stored form. is_whole: All records must fit into one run, which is
    written as the final shards.
    """

    order: SortOrder
    run_bytes: int
    is_whole: bool = False


class RunWriter(StoredRecords):
    """Writer of records as runs, with the methods of a ShardWriter. A context manager: an exception deletes the runs.

    number: That of the task. options: Those of the shards if the plan says that the records are the result.
    """

    def __init__(self, store: Store, schema: Schema, options: ShardOptions, plan: RunPlan, number: int) -> None:
        super().__init__(schema)
        self._store, self._plan, self._number = store, plan, number
        self._options = options if plan.is_whole else _RUN_OPTIONS
        self._infos: list[ShardInfo] = []
        self._n_runs = 0

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None and self._infos:
            try:
                self._store.delete([info.name for info in self._infos])
            except StoreError:  # what is left is removed with the records of the packing
                return

    def write(self, record: Mapping[str, Any]) -> None:
        super().write(record)
        self._end_full_run()

    def write_batch(self, columns: Mapping[str, Any] | pa.RecordBatch) -> None:
        super().write_batch(columns)
        self._end_full_run()

    def _end_full_run(self) -> None:
        if self.n_bytes >= self._plan.run_bytes:
            if self._plan.is_whole:
                raise TooManyRecordsError(f"more than {self._plan.run_bytes} bytes")
            self._write_run()

    def finish(self) -> list[ShardInfo]:
        """Write the last run. Returns the shards."""
        self._write_run()
        return list(self._infos)

    def _write_run(self) -> None:
        n_bytes = self.n_bytes
        if not (data := self.take()):
            return
        records = as_table(self.schema, data)
        del data
        order = self._plan.order.indices(records, self._number, self._n_runs)
        with ShardWriter(self._store, self.schema, self._options) as writer:
            for rows in in_steps(len(records), n_bytes, _STEP_BYTES):
                writer.write_batch(records.take(order[rows]))
            self._infos += writer.finish()
        self._n_runs += 1


def in_steps(n: int, n_bytes: int, step_bytes: int) -> Iterator[slice]:
    """Yield slices of n records of about step_bytes."""
    step = max(1, n * step_bytes // max(n_bytes, 1))
    yield from (slice(start, start + step) for start in range(0, n, step))


def as_table(schema: Schema, data: BlockData) -> pa.Table:
    """Return records in stored form as Arrow, over the same memory."""
    chosen = range(len(schema))
    loaded = blocks_of(schema, "", [0], chosen, [data])
    return pa.Table.from_arrays([loaded.array(0, i) for i in chosen], schema=schema.arrow)


@dataclass(frozen=True)
class Runs:
    """Runs that a pass has written, in the order of the source. Picklable."""

    url: str
    schema: Schema
    infos: tuple[ShardInfo, ...]
    storage_options: Mapping[str, Any] = field(repr=False)  # may hold credentials

    @cached_property
    def _footers(self) -> FooterCache:
        return FooterCache()

    def __reduce__(self) -> tuple[Any, ...]:
        return Runs, (self.url, self.schema, self.infos, self.storage_options)

    def read(self, run: int, *, names: Sequence[str]) -> pa.Table:
        """Return all records of a run, with some columns."""
        with closing(open_store(self.url, **self.storage_options)) as store:
            return self._read(store, run, 0, self.infos[run].n_records, names)

    def read_ranges(self, starts: NDArray[np.int32], stops: NDArray[np.int32]) -> pa.Table:
        """Return the records [starts[i], stops[i]) of each run i, one after the other."""
        chosen = np.flatnonzero(stops > starts).tolist()
        names = self.schema.names
        if not chosen:
            return self.schema.arrow.empty_table()
        with (
            closing(open_store(self.url, **self.storage_options)) as store,
            call_threads(_PARALLEL_READS, "tiercache-runs") as pool,
        ):
            tables = list(pool.map(lambda i: self._read(store, i, int(starts[i]), int(stops[i]), names), chosen))
        return pa.concat_tables(tables).combine_chunks()

    def block_starts(self, run: int) -> Numbers:
        """Return the first record of each block of a run that has been read."""
        with closing(open_store(self.url, **self.storage_options)) as store, self._opened(store, run) as reader:
            return reader.footer.block_first[:-1].astype(np.int64)

    def _opened(self, store: Store, run: int) -> ShardReader:
        info = self.infos[run]
        reader = ShardReader(store, info.name, info=info, footer=self._footers.get(run))
        self._footers.put(run, reader.footer)
        return reader

    def _read(self, store: Store, run: int, start: int, stop: int, names: Sequence[str]) -> pa.Table:
        schema = self.schema.select(names)
        with self._opened(store, run) as reader:
            first = reader.footer.block_first.astype(np.int64)
            blocks = range(int(np.searchsorted(first, start, "right")) - 1, int(np.searchsorted(first, stop, "left")))
            columns = [self.schema.index(name) for name in names]
            loaded = reader.load_blocks(blocks, columns)
            arrays = [[loaded.array(i, column) for column in columns] for i in range(len(blocks))]
            batches = [pa.RecordBatch.from_arrays(one, schema=schema.arrow) for one in arrays]
        table, skipped = pa.Table.from_batches(batches, schema=schema.arrow), int(first[blocks.start])
        if len(table) == stop - start:
            return table
        return table.take(np.arange(start - skipped, stop - skipped))  # a slice would keep the whole blocks in memory


@dataclass(frozen=True, slots=True)
class BucketSplit(InputSplit):
    """A bucket of a part, whose name is path: records [starts[i], stops[i]) of each run i."""

    number: int
    starts: NDArray[np.int32] = field(repr=False, compare=False)
    stops: NDArray[np.int32] = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class NumberedSplit(InputSplit):
    """A split of a source, `inner`, with its number there."""

    number: int
    inner: InputSplit


@dataclass(frozen=True, slots=True)
class UniqueSplit(NumberedSplit):
    """A split of a source that is read without the positions [starts[i], stops[i]) of each run i of positions."""

    starts: NDArray[np.int32] = field(repr=False, compare=False)
    stops: NDArray[np.int32] = field(repr=False, compare=False)


def bucket_splits(runs: Mapping[str, Runs], order: SortOrder, bucket_bytes: int) -> tuple[BucketSplit, ...]:
    """Return the buckets of the runs of each part, in order."""
    found: list[BucketSplit] = []
    for part, of_part in runs.items():
        sizes = np.array([(info.n_records, info.n_bytes) for info in of_part.infos], np.int64).reshape(-1, 2)
        n_buckets = -(-int(sizes[:, 1].sum()) // bucket_bytes)
        if n_buckets > 1:
            cuts = order.bucket_bounds(of_part, n_buckets)
        else:
            cuts = np.stack([np.zeros(len(sizes), np.int32), sizes[:, 0].astype(np.int32)], axis=1)
        record_sizes = sizes[:, 1] / np.maximum(sizes[:, 0], 1)
        for number in range(n_buckets):
            starts, stops = cuts[:, number], cuts[:, number + 1]
            if (stops > starts).any():
                n_bytes = int(((stops - starts) * record_sizes).sum())
                found.append(BucketSplit(part, number, number + 1, n_bytes, number, starts, stops))
    return tuple(found)


@dataclass(frozen=True)
class Buckets:
    """The records of the runs of each part, in their whole order, a files.RecordSource. A split is a bucket."""

    runs: Mapping[str, Runs]
    order: SortOrder
    schema: Schema
    splits: tuple[BucketSplit, ...]

    def read(self, split: InputSplit, batch_bytes: int) -> Iterator[InputBatch]:
        bucket = cast("BucketSplit", split)
        records = self.runs[bucket.path].read_ranges(bucket.starts, bucket.stops)
        order = self.order.indices(records, bucket.number)
        for rows in in_steps(len(records), split.n_bytes, max(batch_bytes, _STEP_BYTES)):
            (batch,) = records.take(order[rows]).combine_chunks().to_batches()
            yield InputBatch(
                batch, len(batch), split.n_bytes * len(batch) // len(records), "record {} of a bucket".format
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.runs, self.order, self.schema, ())  # a task is sent with its splits


# A position is the number of the split, and below that of the record in it.
_POSITION_BITS = 36
BY_HASH, BY_POSITION = SortBy(("high", "low")), SortBy(("position",))
POSITIONS = Schema.of({"position": "int64"})


@dataclass(frozen=True)
class Hashes:
    """The hashes of the good records of a source, with their positions, a files.RecordSource.

    column: Column whose values are hashed; None: all.
    """

    source: RecordSource
    column: str | None
    schema: Schema = Schema.of({"high": "uint64", "low": "uint64", "position": "int64"})  # noqa: RUF009 - immutable

    @property
    def splits(self) -> tuple[NumberedSplit, ...]:
        return tuple(
            NumberedSplit(one.path, one.start, one.end, one.n_bytes, number, one)
            for number, one in enumerate(self.source.splits)
        )

    def read(self, split: InputSplit, batch_bytes: int) -> Iterator[InputBatch]:
        numbered, schema = cast("NumberedSplit", split), self.source.schema
        position = numbered.number << _POSITION_BITS
        chosen = range(len(schema)) if self.column is None else [schema.index(self.column)]
        for batch in self.source.read(numbered.inner, batch_bytes):
            records = StoredRecords(schema)
            numbers, _ = write_good(records, batch)  # the bad ones are reported when they are left out
            found = np.zeros((0, 2), np.uint64)
            if data := records.take():
                found = hash_records([schema.columns[i] for i in chosen], [data[i] for i in chosen])
            columns = {
                "high": found[:, 0].copy(),
                "low": found[:, 1].copy(),
                "position": position + np.array(numbers, np.int64),
            }
            yield InputBatch(columns, len(numbers), batch.n_bytes, batch.location)
            position += batch.n_records

    def __reduce__(self) -> tuple[Any, ...]:
        return Hashes, (self.source, self.column)


def hash_records(columns: Sequence[Column], data: Sequence[ColumnData]) -> NDArray[np.uint64]:
    """Return a hash of 128 bits of the values of each record, uint64[n, 2]. Equal values have equal bytes."""
    n = data[0].n
    fixed: list[NDArray[np.uint8]] = []
    varying: list[tuple[Any, list[int], list[int]]] = []
    for column, one in zip(columns, data, strict=True):
        valid, values, offsets, shapes, width = one.valid, one.values, one.offsets, one.shapes, column.stored.itemsize
        if one.array is not None:
            valid, values, offsets, width = *_bytes_of(one.array), 1
        is_valid = np.ones(n, bool) if valid is None else valid
        if column.nullable:
            fixed.append(is_valid.view(np.uint8).reshape(n, 1))
        content = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        if offsets is None:
            fixed.append(np.where(is_valid[:, None], content.reshape(n, -1), 0).astype(np.uint8, copy=False))
            continue
        starts = offsets[:-1] * width
        lengths = np.where(is_valid, np.diff(offsets) * width, 0)
        fixed.append(lengths.astype(np.int64).view(np.uint8).reshape(n, 8))
        if shapes is not None:
            fixed.append(np.where(is_valid[:, None], shapes, 0).astype(np.int32).view(np.uint8).reshape(n, -1))
        varying.append((content.data, starts.tolist(), (starts + lengths).tolist()))
    matrix = np.concatenate(fixed, axis=1)
    width, rows, digests = matrix.shape[1], matrix.tobytes(), []
    for i in range(n):
        digest = hashlib.blake2b(rows[i * width : (i + 1) * width], digest_size=16)
        for of_column, first, last in varying:
            digest.update(of_column[first[i] : last[i]])
        digests.append(digest.digest())
    return np.frombuffer(b"".join(digests), np.uint64).reshape(n, 2)


def _bytes_of(array: pa.Array) -> tuple[Any, Any, Any]:
    """Return which values of an Arrow column are valid, bytes of them, and the offsets of each value's bytes."""
    valid = np.asarray(array.is_valid().to_numpy(zero_copy_only=False), bool)
    texts = [repr(value).encode(errors="surrogatepass") for value in array.to_pylist()]
    return valid, np.frombuffer(b"".join(texts), np.uint8), np.cumsum([0, *map(len, texts)])


@dataclass(frozen=True)
class DuplicatePositions(Buckets):
    """The positions of the records, but the first, that have one hash. The runs are those of Hashes."""

    def read(self, split: InputSplit, batch_bytes: int) -> Iterator[InputBatch]:  # noqa: ARG002
        bucket = cast("BucketSplit", split)
        # With the record of each run that comes before the bucket: the first of a hash may be one of them.
        records = self.runs[bucket.path].read_ranges(np.maximum(bucket.starts - 1, 0), bucket.stops)
        records = records.take(self.order.indices(records))
        high, low, position = (records.column(name).to_numpy() for name in ("high", "low", "position"))
        is_repeated = np.zeros(len(records), bool)
        is_repeated[1:] = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
        is_repeated[: np.count_nonzero(bucket.starts)] = False
        found = position[is_repeated]
        yield InputBatch({"position": found}, len(found), split.n_bytes, str)


@dataclass(frozen=True)
class WithoutDuplicates:
    """A source without the records at some positions, a files.RecordSource."""

    source: RecordSource
    positions: Runs
    splits: tuple[UniqueSplit, ...]

    @staticmethod
    def of(source: RecordSource, positions: Runs) -> WithoutDuplicates:
        """Return the source without the records at positions, whose runs are sorted."""
        bounds = np.arange(len(source.splits) + 1) << _POSITION_BITS
        found = [positions.read(run, names=["position"])["position"] for run in range(len(positions.infos))]
        cuts = np.array([np.searchsorted(one.to_numpy(), bounds) for one in found], np.int32).reshape(-1, len(bounds))
        splits = [
            UniqueSplit(one.path, one.start, one.end, one.n_bytes, number, one, cuts[:, number], cuts[:, number + 1])
            for number, one in enumerate(source.splits)
        ]
        return WithoutDuplicates(source, positions, tuple(splits))

    @property
    def schema(self) -> Schema:
        return self.source.schema

    def read(self, split: InputSplit, batch_bytes: int) -> Iterator[InputBatch]:
        chosen = cast("UniqueSplit", split)
        positions = self.positions.read_ranges(chosen.starts, chosen.stops)["position"].to_numpy()
        left_out = np.sort(positions) - (chosen.number << _POSITION_BITS)
        first = 0
        for batch in self.source.read(chosen.inner, batch_bytes):
            start, stop = np.searchsorted(left_out, [first, first + batch.n_records])
            yield taken(batch, np.delete(np.arange(batch.n_records), left_out[start:stop] - first))
            first += batch.n_records

    def __reduce__(self) -> tuple[Any, ...]:
        return WithoutDuplicates, (self.source, self.positions, ())  # a task is sent with its splits


def check_sortable(schema: Schema, name: str) -> None:
    """Raise SchemaError if a column is not in the schema, or has values without an order."""
    column = schema.columns[schema.index(name)]
    is_sortable = column.kind in (Kind.SCALAR, Kind.BOOL, Kind.STR, Kind.BYTES) and column.dtype != "bfloat16"
    if column.kind is Kind.ARROW and not pt.is_nested(column.storage_type):
        is_sortable = True
    if not is_sortable:
        raise SchemaError(f"sort= takes a column of numbers, text, bytes or times, and this is {column}", column=name)
