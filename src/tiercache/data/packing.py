"""Packed rows: documents of a token column as rows of a fixed number of tokens, in the place of stored records.

Documents are packed within units: runs of consecutive stored blocks of one shard. So the number of rows of each shard
and unit is known before anything is shuffled, and does not depend on the epoch: an order shuffles rows, and reads
units, as it shuffles records and reads blocks. `PackedVersion` is therefore a leaf of `Records` as an `OpenedVersion`
is: its records are rows and its blocks are units. Views, joined data sets and mixtures of packed rows need nothing
else.
"""

from __future__ import annotations

import copy
import json
import operator
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from hashlib import sha256
from typing import Any, Literal, TypeAlias, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from tiercache._native import gather, packing
from tiercache.data.dataset import Dataset
from tiercache.data.opened_version import OpenedVersion, ShardSizes
from tiercache.data.output_spec import BOUNDARIES, OutputSpec
from tiercache.data.records import JoinNode, Records, RecordsSpec, StoredOrderStep, build, join
from tiercache.errors import CorruptShard, SchemaError
from tiercache.model import SourcePart
from tiercache.order.window import BlockSizes
from tiercache.shard.blocks import Blocks, renew_checks
from tiercache.shard.schema import INTEGERS, Column, Kind, Ragged, Schema, Stream, Tensor, UserType
from tiercache.shard.values import DTYPE_NUMBERS, ColumnValues
from tiercache.store.remote import call_threads

T = TypeVar("T")

PackMode: TypeAlias = Literal["concatenate", "best_fit", "separate"]
LongDocuments: TypeAlias = Literal["cut", "error"]
# Tokens are served as int64, which holds all values of these dtypes.
TOKEN_DTYPES = INTEGERS - {"uint64"}
_MODES = dict(zip(get_args(PackMode), (packing.CONCATENATE, packing.BEST_FIT, packing.SEPARATE), strict=True))
# A unit is a run of blocks that have at least this many rows, as far as the shard has them: on average, half a row of a
# unit is padding (of 64 rows 0.8 %). A unit of more tokens would take too much of a window, unless its rows are longer.
UNIT_ROWS, UNIT_TOKENS, LEAST_UNIT_ROWS = 64, 1 << 23, 8
# Raw bytes of the blocks whose lengths are read at a time, in each of some threads.
CHUNK_BYTES, THREADS = 32 << 20, 16
MIN_LENGTH, MAX_LENGTH = 2, 1 << 24
# The rows of a data set are part of a run's state. A release that packs otherwise must have another number here.
_FORMAT = 1
LABELS, POSITION_IDS, DOCUMENT_IDS, CU_SEQLENS = "labels", "position_ids", "document_ids", "cu_seqlens"


def _token(name: str, value: Any) -> int:
    try:
        token = operator.index(value)
    except TypeError as error:
        raise TypeError(f"{name} must be a token, which is an integer, got {value!r}") from error
    if not -(2**63) <= token < 2**63:
        raise ValueError(f"{name} must fit int64, got {token}")
    return token


@dataclass(frozen=True, slots=True)
class SequenceOptions:
    """Arguments of `pack_sequences`, checked. Plain values, so that equal arguments have equal digests."""

    column: str
    length: int
    mode: PackMode
    long_documents: LongDocuments
    eos: int | None
    pad: int
    mask_borders: bool
    loss_mask: str | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        object.__setattr__(self, "length", operator.index(self.length))
        if not MIN_LENGTH <= self.length <= MAX_LENGTH:
            raise ValueError(f"length must be {MIN_LENGTH} to {MAX_LENGTH} tokens, got {self.length}")
        if self.mode not in _MODES:
            raise ValueError(f"mode must be {', '.join(map(repr, _MODES))}, got {self.mode!r}")
        if self.long_documents not in get_args(LongDocuments):
            raise ValueError(f"long_documents must be 'cut' or 'error', got {self.long_documents!r}")
        if self.mode == "concatenate" and self.long_documents == "error":
            raise ValueError("mode='concatenate' cuts documents where rows end: remove long_documents='error'")
        object.__setattr__(self, "pad", _token("pad", self.pad))
        if self.eos is not None:
            object.__setattr__(self, "eos", _token("eos", self.eos))
        if self.column in (LABELS, POSITION_IDS, DOCUMENT_IDS, CU_SEQLENS, "max_seqlen"):
            message = "batches of packed rows have another entry of this name: give the column another name"
            raise SchemaError(message, column=self.column)

        if self.loss_mask == self.column:
            raise ValueError(f"loss_mask={self.loss_mask!r} is the column of the tokens: name a column of masks")

    @property
    def needs_lengths(self) -> bool:
        """Whether the number of rows depends on the length of each document; else the number of tokens decides it."""
        return self.mode != "concatenate"

    @property
    def unit_positions(self) -> int:
        """Least number of positions of a unit, as far as its shard has them."""
        return max(min(UNIT_ROWS * self.length, UNIT_TOKENS), LEAST_UNIT_ROWS * self.length)

    @property
    def digest(self) -> str:
        """Hash of everything that decides the rows: 32 hex digits."""
        values = {name: value for name, value in asdict(self).items() if name != "loss_mask" or value is not None}
        text = json.dumps([_FORMAT, values], sort_keys=True)
        return sha256(text.encode()).hexdigest()[:32]

    @property
    def columns(self) -> list[str]:
        """Stored columns that are read: the tokens, and their masks if there are any."""
        return [self.column, *([] if self.loss_mask is None else [self.loss_mask])]

    def native(self, dtype: str, mask_dtype: str | None) -> packing.Packing:
        """Return the options as the kernels take them. dtype, mask_dtype: Stored dtypes of the tokens and masks."""
        return packing.Packing(
            self.length,
            _MODES[self.mode],
            DTYPE_NUMBERS[dtype],
            cuts_long=self.long_documents == "cut",
            pad=self.pad,
            end=self.eos,
            masks_borders=self.mask_borders,
            mask_dtype=0 if mask_dtype is None else DTYPE_NUMBERS[mask_dtype],
        )


@dataclass(frozen=True, slots=True)
class PackedColumn(Column):
    """A column of packed rows that the gather writes. kind_word: Kind of its stream (csrc/packing.h)."""

    kind_word: int

    def streams(self, index: int) -> tuple[Stream, ...]:
        """See Column.streams."""
        return (Stream(index, "values", self.kind_word, self.row_bytes, 0),)


def _packed_schema(options: SequenceOptions) -> Schema:
    types: dict[str, tuple[UserType, int]] = {
        options.column: (Tensor("int64", (options.length,)), packing.TOKENS),
        LABELS: (Tensor("int64", (options.length,)), packing.LABELS),
        POSITION_IDS: (Tensor("int64", (options.length,)), packing.POSITION_IDS),
        DOCUMENT_IDS: (Tensor("int32", (options.length,)), packing.DOCUMENT_IDS),
    }
    columns: list[Column] = []
    for name, (user, output) in types.items():
        plain = Column.of(name, user)
        values = {field.name: getattr(plain, field.name) for field in fields(Column)}
        columns.append(PackedColumn(**values, kind_word=packing.stream_kind(output)))
    return Schema([*columns, Column.of(CU_SEQLENS, Ragged("int32", (None,)))])


@dataclass(frozen=True, slots=True, eq=False)
class PackIndex:
    """Units and rows of all shards: about 24 bytes for each unit, nothing for each document. Immutable."""

    first_unit: NDArray[np.int64]  # [n_shards + 1], units before each shard, then of all
    n_blocks: NDArray[np.int64]  # [n_units], consecutive stored blocks of each unit
    n_rows: NDArray[np.int64]  # [n_units]
    n_tokens: int  # of all documents, with their end tokens

    def __reduce__(self) -> tuple[Any, ...]:
        arrays = [np.diff(self.first_unit), self.n_blocks, self.n_rows]
        packed = [zlib.compress(array.astype(np.uint32).tobytes()) for array in arrays]
        return _unpacked_index, (*packed, self.n_tokens)


def _unpacked_index(n_units: bytes, n_blocks: bytes, n_rows: bytes, n_tokens: int) -> PackIndex:
    units, blocks, rows = (
        np.frombuffer(zlib.decompress(one), np.uint32).astype(np.int64) for one in (n_units, n_blocks, n_rows)
    )
    return PackIndex(np.append(0, np.cumsum(units)), blocks, rows, n_tokens)


@dataclass(frozen=True, slots=True)
class PackedSpec:
    """Spec of a packed version: everything needed to open it again. Picklable."""

    below: RecordsSpec
    options: SequenceOptions
    index: PackIndex
    columns: tuple[str, ...]

    @property
    def version(self) -> int:
        """Number of the version whose documents are packed."""
        return self.below.versions[0]

    def open(self) -> PackedVersion:
        """Open the version."""
        return PackedVersion(self.below.open(), self.options, self.index, self.columns)


@dataclass(frozen=True, slots=True, eq=False)
class _Documents:
    """Selected documents of some loaded blocks. addresses, masks, lengths: [n]; first: int64[n_blocks + 1]."""

    addresses: NDArray[np.uint64]
    masks: NDArray[np.uint64] | None
    lengths: NDArray[np.int64]
    first: NDArray[np.int64]


class PackedBlocks(Blocks):
    """Loaded units of a shard: their documents in memory, and the plans of their rows. Immutable and thread-safe.

    All pages were checked when the units were loaded. Rows are gathered; array() has none.
    """

    def __init__(self, inner: Blocks, units: packing.PackedUnits, numbers: tuple[int, ...], schema: Schema) -> None:
        self._inner, self._unchecked = inner, None
        self.units = units
        self.schema, self.columns = schema, tuple(range(len(schema)))
        self.streams = tuple(stream for index, column in enumerate(schema.columns) for stream in column.streams(index))
        self.url = inner.url
        self.blocks, self.n_rows = numbers, units.n_rows
        self.private_bytes = inner.private_bytes + units.n_bytes
        self.is_cached, self.reports_residency = inner.is_cached, inner.reports_residency
        parts: list[NDArray[np.uint64]] = []
        for column in schema.columns:
            parts += [units.addresses] if isinstance(column, PackedColumn) else [units.boundaries, units.counts]
        self.addresses: NDArray[np.uint64] = np.stack(parts)

    @property
    def stored(self) -> Blocks:
        """See Blocks.stored."""
        return self._inner

    @property
    def pages(self) -> NDArray[np.uint64]:
        """See Blocks.pages."""
        return self._inner.pages

    def reset_checks(self) -> None:
        """See Blocks.reset_checks. The pages are checked again when a unit is loaded the next time."""
        self._inner.reset_checks()

    def find_fault(self) -> CorruptShard | None:
        """Check all pages again; return the error of the first one that is corrupt or cannot be read."""
        self._inner.reset_checks()
        try:
            _check(self._inner)
        except CorruptShard as error:
            return error.with_traceback(None)
        return None


def _check(blocks: Blocks) -> None:
    """Check all unchecked pages and all offsets of loaded blocks. Raises CorruptShard."""
    for column in blocks.columns:
        blocks.check_whole(range(len(blocks.blocks)), column)


class PackedVersion:
    """Packed rows of the documents of one version: a `Leaf`. Safe from any thread.

    below: Documents: records of one version, in stored order. index: Index that an equal object has made. None: it is
    made now, from the footers of all shards, and in other modes than "concatenate" from the lengths of all documents.
    """

    def __init__(
        self,
        below: Records,
        options: SequenceOptions,
        index: PackIndex | None = None,
        columns: Sequence[str] | None = None,
    ) -> None:
        self._below = below.with_columns(options.columns)
        self.stored = self._below.leaves[0].stored
        self._options = options
        column, *masks = self._below.schema.columns
        for mask in masks:
            if mask.kind is not Kind.RAGGED or mask.shape != (None,) or mask.dtype not in TOKEN_DTYPES | {"bool"}:
                expected = "one-dimensional integers or bool, such as tiercache.Ragged('bool', (None,))"
                message = f"loss_mask names a column with a mask for each token, and this is {mask} (takes {expected})"
                raise SchemaError(message, column=mask.name, expected=expected, got=str(mask))
        if column.kind is not Kind.RAGGED or column.shape != (None,) or column.dtype not in TOKEN_DTYPES:
            expected = "one-dimensional integers that fit int64, such as tiercache.Ragged('uint16', (None,))"
            message = f"pack_sequences() packs a column of token lists, and this is {column}"
            raise SchemaError(
                f"{message} (takes {expected})", column=options.column, expected=expected, got=str(column)
            )
        limits = np.iinfo(column.dtype)
        if options.eos is not None and not limits.min <= options.eos <= limits.max:
            raise ValueError(
                f"{self.stored.url}: eos={options.eos} is no token of the column {options.column!r}, whose "
                f"{column.dtype} tokens are {limits.min} to {limits.max}: give the tokenizer's end token, or store "
                "the tokens with a wider dtype"
            )
        self._packing = options.native(column.dtype, masks[0].dtype if masks else None)
        if index is None:
            index = _make_index(below.with_columns([options.column]), options, self._packing)
        self.index = index
        self._first_row = np.append(0, np.cumsum(self.index.n_rows))
        self._first_block = self._blocks_before()
        self.stored_schema = _packed_schema(options)
        first_record = self._first_row[self.index.first_unit]
        self.table = ShardSizes(np.diff(first_record), self._below.shard_bytes, first_record)
        self._serve(self.stored_schema.names if columns is None else tuple(columns))

    def _serve(self, columns: tuple[str, ...]) -> None:
        self.schema = self.stored_schema.select(columns)
        self.spec = PackedSpec(self._below.spec, self._options, self.index, columns)

    def _blocks_before(self) -> NDArray[np.int64]:
        """Return the first block of each unit in its shard, int64[n_units]."""
        before = np.append(0, np.cumsum(self.index.n_blocks))
        first: NDArray[np.int64] = before[:-1] - np.repeat(
            before[self.index.first_unit[:-1]], np.diff(self.index.first_unit)
        )
        return first

    @property
    def part(self) -> SourcePart:
        """The version as a state names it; the selection also says how documents are packed."""
        (part,), digest = self._below.parts, self._options.digest
        text = f"{part.selection or ''}/{digest}"
        return replace(part, selection=sha256(text.encode()).hexdigest()[: len(digest)])

    @property
    def fill_ratio(self) -> float:
        """Share of the positions of all rows that are not padding; 1 if there are no rows."""
        n_positions = int(self._first_row[-1]) * self._options.length
        return self.index.n_tokens / n_positions if n_positions else 1.0

    def block_sizes(self, shards: Sequence[int]) -> list[BlockSizes]:
        """Return the rows and the raw bytes of each unit of these shards. Reads footers. Raises as `load`."""
        return [
            self._unit_sizes(shard, table) for shard, table in zip(shards, self._below.block_sizes(shards), strict=True)
        ]

    def _unit_sizes(self, shard: int, table: BlockSizes) -> BlockSizes:
        units = self._units(shard)
        raw_bytes = np.append(0, np.cumsum(np.where(table.records > 0, table.raw_bytes, 0)))
        first, n_blocks = self._first_block[units], self.index.n_blocks[units]
        if len(first) and int(first[-1] + n_blocks[-1]) >= len(raw_bytes):
            message = f"its footer lists {len(raw_bytes) - 1} blocks, fewer than when its documents were packed"
            raise CorruptShard(message, url=self.stored.url, part="footer")
        return BlockSizes(self.index.n_rows[units], raw_bytes[first + n_blocks] - raw_bytes[first])

    def _units(self, shard: int) -> slice:
        return slice(int(self.index.first_unit[shard]), int(self.index.first_unit[shard + 1]))

    def load_blocks(self, shard: int, units: Sequence[int]) -> PackedBlocks:
        """Load units of a shard: read and check their documents, and plan their rows."""
        return _read_checked(self.stored, shard, lambda: self._load(shard, units))

    def _load(self, shard: int, units: Sequence[int]) -> PackedBlocks:
        numbers = np.asarray(units, np.int64)
        of_shard = self._units(shard)
        blocks, n_blocks = self._blocks_of(shard, numbers), self.index.n_blocks[of_shard][numbers]
        (table,) = self._below.block_sizes([shard])
        filled = table.records[blocks] > 0
        unit_of_block = np.repeat(np.arange(len(numbers)), n_blocks)[filled]
        inner, documents = _load_documents(self._below, shard, blocks[filled], table)
        first_block = np.append(np.searchsorted(unit_of_block, np.arange(len(numbers))), len(unit_of_block))
        planned = packing.PackedUnits(
            self._packing, documents.lengths, documents.addresses, documents.first[first_block], documents.masks
        )
        if not np.array_equal(planned.n_rows, self.index.n_rows[of_shard][numbers]):
            raise CorruptShard("the lengths of its documents changed since they were packed", url=inner.url)
        return PackedBlocks(inner, planned, tuple(numbers.tolist()), self.schema)

    def _blocks_of(self, shard: int, units: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the stored blocks of units of a shard, unit by unit."""
        of_shard = self._units(shard)
        first, n_blocks = self._first_block[of_shard][units], self.index.n_blocks[of_shard][units]
        blocks: NDArray[np.int64] = np.repeat(first - np.append(0, np.cumsum(n_blocks)[:-1]), n_blocks)
        return blocks + np.arange(int(n_blocks.sum()))

    def record(self, _number: int) -> None:
        """Return None: rows are never found in a mapping. See OpenedVersion.record."""

    def values(self, records: NDArray[np.int64]) -> list[ColumnValues]:
        """Return rows, int64[n] of their numbers, by column. See OpenedVersion.values."""
        n, length = len(records), self._options.length
        out: dict[str, Any] = {}
        for column in self.schema.columns:
            is_packed = isinstance(column, PackedColumn)
            out[column.name] = np.empty((n, length), column.stored) if is_packed else [None] * n
        units = np.searchsorted(self._first_row, records, side="right") - 1
        shards = np.searchsorted(self.index.first_unit, units, side="right") - 1
        for shard in np.unique(shards).tolist():
            where = np.flatnonzero(shards == shard)
            chosen, position = np.unique(units[where], return_inverse=True)
            loaded = self.load_blocks(shard, (chosen - self.index.first_unit[shard]).tolist())
            rows = (records[where] - self._first_row[units[where]]).astype(np.uint32)
            for column, values in self._gathered(loaded, position.reshape(-1).astype(np.uint32), rows):
                if isinstance(values, np.ndarray):
                    out[column.name][where] = values
                else:
                    for index, value in zip(where.tolist(), values, strict=True):
                        out[column.name][index] = value
        return [ColumnValues(column, out[column.name]) for column in self.schema.columns]

    def _gathered(
        self, loaded: PackedBlocks, unit: NDArray[np.uint32], row: NDArray[np.uint32]
    ) -> list[tuple[Column, Any]]:
        """Return (column, values of rows) of loaded units: an array [n, length], or a list of arrays."""
        found: list[tuple[Column, Any]] = []
        for column in self.schema.columns:
            if isinstance(column, PackedColumn):
                values = np.empty((len(row), self._options.length), column.stored)
                with _as_corrupt(loaded):
                    packing.gather_rows(column.kind_word, loaded.units, unit, row, values.view(np.uint8))
                found.append((column, values))
            else:
                offsets = gather.measure(loaded.units.boundaries, unit, row)
                flat = np.empty(int(offsets[-1]), np.int32)
                gather.gather(gather.VAR, 4, loaded.units.boundaries, unit, row, flat.view(np.uint8), offsets)
                found.append((column, [part.copy() for part in np.split(flat, offsets[1:-1])]))
        return found

    def is_mapped(self, _shard: int) -> bool:
        """Return False: loading a unit is work, which threads share. See OpenedVersion.is_mapped."""
        return False

    def count_read(self, shard: int, loaded: Blocks) -> dict[str, int]:
        """See OpenedVersion.count_read."""
        return self.stored.count_read(shard, loaded.stored)

    def prefetch_blocks(self, shard: int, units: Sequence[int]) -> None:
        """See OpenedVersion.prefetch_blocks."""
        self.stored.prefetch_blocks(shard, self._blocks_of(shard, np.asarray(units, np.int64)).tolist())

    def at_version(self, number: int) -> PackedVersion:
        """Return the documents of another version, packed in the same way. See OpenedVersion.at_version."""
        return PackedVersion(self._below.at_versions([number]), self._options, None, self.schema.names)

    def with_columns(self, columns: Sequence[str]) -> PackedVersion:
        """Return the same rows with other columns. Raises SchemaError."""
        other = copy.copy(self)
        other._serve(tuple(columns))  # noqa: SLF001 -- of this class
        return other


def _read_checked(leaf: OpenedVersion, shard: int, read: Callable[[], T]) -> T:
    """Return the result of read(). After CorruptShard it is called once more, unless there is no copy to replace.

    `OpenedVersion` does the same, but mapped pages are checked here, and not when it loads them.
    """
    try:
        return read()
    except CorruptShard:
        if not leaf.remove_if_corrupt(shard) and leaf.cache is None:
            raise
    return read()


def _selected_rows(
    below: Records, shard: int, blocks: NDArray[np.int64], table: BlockSizes
) -> tuple[NDArray[np.int64], NDArray[np.uint32], NDArray[np.uint32]]:
    """Return the selected documents of blocks: the first one of each block, int64[n_blocks + 1], and (block, row)."""
    counts = table.records[blocks]
    first = np.append(0, np.cumsum(counts))
    block = np.repeat(np.arange(len(blocks), dtype=np.uint32), counts)
    row = (np.arange(int(first[-1])) - np.repeat(first[:-1], counts)).astype(np.uint32)
    return first, block, below.stored_rows(np.full(len(blocks), shard, np.int32), blocks.astype(np.int32), block, row)


def _load_documents(
    below: Records, shard: int, blocks: NDArray[np.int64], table: BlockSizes
) -> tuple[Blocks, _Documents]:
    """Load and check blocks of a shard, and find their selected documents."""
    inner = below.load_blocks(shard, blocks.tolist())
    renew_checks(inner)
    _check(inner)
    first, block, row = _selected_rows(below, shard, blocks, table)
    (addresses, lengths), *masks = (_document_ranges(inner, number, block, row) for number in inner.columns)
    if not masks:
        return inner, _Documents(addresses, None, lengths, first)
    wrong = np.flatnonzero(masks[0][1] != lengths)
    if len(wrong):
        at = int(wrong[0])
        of_block = int(block[at])
        record = below.describe_at(shard, int(blocks[of_block]), at - int(first[of_block]))
        tokens, mask = (column.name for column in below.schema.columns)
        raise SchemaError(
            f"{record} has {lengths[at]} tokens in {tokens!r} and a loss mask of {masks[0][1][at]} in {mask!r}: a mask "
            "has one number for each token",
            column=mask,
            expected=int(lengths[at]),
            got=int(masks[0][1][at]),
        )
    return inner, _Documents(addresses, masks[0][0], lengths, first)


def _document_ranges(
    inner: Blocks, column: int, block: NDArray[np.uint32], row: NDArray[np.uint32]
) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Return the addresses, uint64[n], and lengths, int64[n], of documents in a column of loaded blocks."""
    number = next(n for n, s in enumerate(inner.streams) if s.column == column and s.role == "values")
    source, width = inner.addresses[number], np.uint64(inner.streams[number].width_bytes)
    offsets = np.zeros((len(source), 3), np.uint64)
    offsets[:, 0] = source[:, 1]
    starts = np.empty(len(row), np.int64)
    with _as_corrupt(inner):
        lengths = np.diff(gather.measure(source, block, row))
        gather.gather(gather.FIXED, 8, offsets, block, row, starts.view(np.uint8))
    n_elements = source[block, 2].astype(np.int64)
    if ((starts < 0) | (starts + lengths > n_elements)).any():
        raise CorruptShard("offsets decrease or exceed the chunk", url=inner.url)
    return source[block, 0] + starts.astype(np.uint64) * width, lengths


@contextmanager
def _as_corrupt(blocks: Blocks) -> Iterator[None]:
    """Turn errors of the gather into CorruptShard."""
    try:
        yield
    except (OSError, gather.CorruptError) as error:
        message = f"the local copy cannot be read: {error.strerror}" if isinstance(error, OSError) else str(error)
        raise CorruptShard(message, url=blocks.url) from error


@dataclass(frozen=True, slots=True)
class _ShardRows:
    """Blocks and rows of each unit of a shard, and its tokens."""

    n_blocks: list[int]
    n_rows: list[int]
    n_tokens: int


def _make_index(below: Records, options: SequenceOptions, how: packing.Packing) -> PackIndex:
    """Return the index of all shards. Raises as `load`, and ValueError for a document that is too long."""
    shards = np.flatnonzero(below.shard_records).tolist()
    below.storage.prepare_reading(np.array(shards, np.int64))
    with call_threads(min(THREADS, max(len(shards), 1)), "tiercache-packing") as pool:
        found = dict(zip(shards, pool.map(lambda shard: _pack_shard(below, options, how, shard), shards), strict=True))
    nothing = _ShardRows([], [], 0)
    every = [found.get(shard, nothing) for shard in range(len(below.shard_records))]
    first_unit = np.append(0, np.cumsum([len(one.n_rows) for one in every], dtype=np.int64))
    n_blocks, n_rows = (
        np.array([n for one in every for n in getattr(one, name)], np.int64) for name in ("n_blocks", "n_rows")
    )
    return PackIndex(first_unit, n_blocks, n_rows, sum(one.n_tokens for one in every))


def _pack_shard(below: Records, options: SequenceOptions, how: packing.Packing, shard: int) -> _ShardRows:
    """Return the units of a shard and count their rows."""
    leaf = below.leaves[0].stored
    elements = None if options.needs_lengths else leaf.block_elements(shard)
    (table,) = below.block_sizes([shard])
    tokens, is_known = np.zeros(len(table.records), np.int64), np.zeros(len(table.records), np.bool_)
    if elements is not None:  # of all documents of each block
        is_known = table.records == leaf.block_sizes([shard])[0].records
        tokens[is_known] = elements[is_known]
    measured = np.flatnonzero((table.records > 0) & ~is_known)
    lengths = _lengths_of_blocks(below, shard, measured, table)
    tokens[measured] = [int(one.sum()) for one in lengths]
    positions = tokens + table.records * (options.eos is not None)
    bounds = _cut_units(positions, options.unit_positions)
    if options.needs_lengths:
        by_block = dict(zip(measured.tolist(), lengths, strict=True))
        nothing = np.empty(0, np.int64)
        every = [by_block.get(block, nothing) for block in range(len(positions))]
        first = np.append(0, np.cumsum(table.records))[bounds]
        try:
            rows = packing.count_rows(how, np.concatenate([nothing, *every]), first)
        except packing.TooLongError as error:
            raise _too_long(options, error.n_tokens, below, int(error.document + below.first_record[shard])) from error
    else:
        sums = np.append(0, np.cumsum(positions))
        rows = -(-np.diff(sums[bounds]) // options.length)
    return _ShardRows(np.diff(bounds).tolist(), rows.tolist(), int(positions.sum()))


def _lengths_of_blocks(
    below: Records, shard: int, blocks: NDArray[np.int64], table: BlockSizes
) -> list[NDArray[np.int64]]:
    """Return the lengths of the selected documents of each of these blocks. Their tokens are not read if possible."""
    leaf, lengths = below.leaves[0].stored, []
    sums = np.cumsum(table.raw_bytes[blocks])
    begin = 0
    while begin < len(blocks):
        done = int(sums[begin - 1]) if begin else 0
        end = max(int(np.searchsorted(sums, done + CHUNK_BYTES, side="right")), begin + 1)
        some = blocks[begin:end]
        lengths += _read_checked(leaf, shard, lambda some=some: _shapes(below, shard, some, table))  # type: ignore[misc]
        begin = end
    return lengths


def _shapes(below: Records, shard: int, blocks: NDArray[np.int64], table: BlockSizes) -> list[NDArray[np.int64]]:
    loaded = below.leaves[0].stored.load_shapes(shard, blocks.tolist())
    first, block, row = _selected_rows(below, shard, blocks, table)
    found, checks = np.empty(len(row), np.int32), loaded.pending_checks
    with _as_corrupt(loaded):
        stream = loaded.addresses[1], block, row
        gather.gather(gather.FIXED, 4, *stream, found.view(np.uint8), checks=None if checks is None else checks[1])
    if len(found) and int(found.min()) < 0:
        raise CorruptShard("a document has a negative length", url=loaded.url)
    return np.split(found.astype(np.int64), first[1:-1])


def _cut_units(positions: NDArray[np.int64], least: int) -> NDArray[np.int64]:
    """Cut blocks into units of at least `least` positions each, as far as there are as many: int64[n_units + 1].

    The last unit may have half as many; a smaller rest belongs to the unit before.
    """
    sums = np.append(0, np.cumsum(positions))
    bounds = [0]
    while bounds[-1] < len(positions):
        end = int(np.searchsorted(sums, sums[bounds[-1]] + least))
        bounds.append(min(max(end, bounds[-1] + 1), len(positions)))
    if len(bounds) > 2 and 2 * (sums[bounds[-1]] - sums[bounds[-2]]) < least:
        del bounds[-2]
    return np.array(bounds, np.int64)


def _too_long(options: SequenceOptions, n_tokens: int, below: Records, number: int) -> ValueError:
    extra = " with the end token" if options.eos is not None else ""
    return ValueError(
        f"{below.url}: document {number} has {n_tokens} tokens, and a row has {options.length}{extra}: use a larger "
        "length, filter such documents, or cut them with long_documents='cut'"
    )


def pack_records(source: Records, options: SequenceOptions) -> Records:
    """Return the packed rows of documents. Joined data sets are packed one by one. Raises as `pack_sequences`."""
    if source.mixture is not None:
        raise ValueError(
            "a mixture cannot be packed: pack the data sets, then mix() them. The weights then count rows, which all "
            "have the same number of tokens"
        )
    if isinstance(source.node, JoinNode):
        leaves = iter(source.leaves)
        return join([pack_records(build(node, leaves), options) for node in source.node.below])
    if len(source.leaves) > 1:
        raise ValueError(
            "these records were selected from joined data sets: select from each data set, then join and pack them"
        )
    below = source if source.is_in_stored_order else source.with_step(StoredOrderStep())
    return Records((PackedVersion(below, options),))


def pack_sequences(
    dataset: Dataset,
    column: str,
    length: int,
    *,
    mode: PackMode = "concatenate",
    long_documents: LongDocuments = "cut",
    eos: int | None = None,
    pad: int = 0,
    mask_borders: bool = False,
    loss_mask: str | None = None,
) -> Dataset:
    """Return a data set whose records are rows of `length` tokens, made of the documents of a token column.

    A batch of n rows has the entries

    - `column`, int64[n, length]: the tokens.
    - `labels`, int64[n, length]: the next token of the same document, also across a cut at the end of a row. -100 in
      padding, at the last position of a row whose document ends there, and where `loss_mask` says so.
    - `position_ids`, int64[n, length]: 0, 1, 2, ... in each piece of a document, and in the padding.
    - `document_ids`, int32[n, length]: number of the piece in its row, from 0; -1 in padding.
    - `cu_seqlens`, int32[m + 1], and `max_seqlen`, int: bounds of the m pieces (and paddings) of the flattened batch, 0
      to n * length, and the longest of them, for attention over sequences of varying length.

    `select_columns` leaves out what a model does not need. A loader shuffles, splits and resumes rows as it does
    records. Which documents share a row does not depend on the epoch, so all epochs have len() rows. Documents are
    packed in stored order within runs of blocks, each 64 rows or more; a list of record numbers is packed in stored
    order too. Joined data sets are packed one by one. Pack data sets before `mix`: its weights then count rows.

    In mode "concatenate", this function reads the footers of all shards, and nothing else.
    Otherwise it reads the lengths of all documents once: the pages of 64 KiB that hold them, or the whole column if it
    is compressed. A pickle of the result contains the result of this reading.

    Args:
        dataset: Documents: a data set or a view, without a transform. Only `column` and `loss_mask` are read.
        column: Name of the column of tokens: `Ragged` of integers with one dimension. Nulls are empty documents.
        length: Tokens of a row, 2 to 2**24.
        mode: "concatenate": documents follow each other without gaps, and are cut where rows end. "best_fit": documents
            are not cut; the longest ones are placed first, each into the row where it leaves the least room.
            "separate": each document begins a row of its own.
        long_documents: In the modes that do not cut: whether to "cut" a document that is longer than a row, or to raise
            an "error" now.
        eos: End token, which is added to each document, also to an empty one. It must fit the stored dtype of the
            tokens. None: no token is added.
        pad: Token that fills a row behind its last piece.
        mask_borders: Whether the label of a document's last token is -100 also if another document follows in the row.
            Otherwise it is the first token of that document.
        loss_mask: Name of a column with a mask for each token, as long as the tokens: `Ragged` of integers or bool with
            one dimension. A label is -100 if the mask of the token that it is (not of the token before) is 0. An end
            token has the mask of the last token of its document. None: all tokens are labels.

    Raises:
        SchemaError: A column does not exist or has another type. While reading: a document's mask has another length
            than its tokens; the message names the record.
        ValueError: An argument is invalid; or a document is too long; or the data set is a mixture, has a transform, or
            is packed already.
        TypeError: An argument is of another type.
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(f"pack_sequences() takes a tiercache.Dataset, got {dataset!r}")
    access = dataset.__tiercache__()
    if not access.is_plain or access.batch_transform is not None:
        raise ValueError(
            "pack_sequences() packs stored documents, and this data set has a transform, or its class overrides how "
            "records are read; LoaderOptions(batch_transform=) applies to packed rows"
        )
    if access.source.is_packed:
        raise ValueError("the data set is packed already")
    options = SequenceOptions(column, length, mode, long_documents, eos, pad, mask_borders, loss_mask)
    rows = pack_records(access.source, options)
    return dataset._derive(rows, OutputSpec({CU_SEQLENS: BOUNDARIES}))  # noqa: SLF001 -- of this package
