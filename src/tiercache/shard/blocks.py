"""Blocks of a shard in memory: fetched or mapped, checked and decoded; as addresses for the gather, and as Arrow."""

from __future__ import annotations

import copy
import mmap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal, NoReturn, TypeAlias, get_args
from weakref import ref

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tiercache._native import gather
from tiercache._native.checksum import crc32c_many
from tiercache._native.mapping import are_resident
from tiercache.errors import CorruptShard
from tiercache.model import ByteRange
from tiercache.shard import codec
from tiercache.shard.codec import BUFFER_POOL, Addresses, BadFrameError, Bytes, address_of, align, decode
from tiercache.shard.footer import PAGE_BYTES, Footer
from tiercache.shard.schema import BITS, VAR, Kind, Schema, Stream, build_array
from tiercache.shard.source import READS_AGAIN, ByteSource, LocalCopy, chunks_with_group, merge_ranges
from tiercache.waiting import SYSTEM_CLOCK

Verify: TypeAlias = Literal["first", "always", "never"]
Ids: TypeAlias = npt.NDArray[np.int64]


def check_verify(verify: object) -> None:
    if verify not in get_args(Verify):
        raise ValueError(f"verify must be 'first', 'always' or 'never', got {verify!r}")


# Chunks with a smaller gap are read as one range, because the bytes between cost less than another request.
_CHUNK_GAP_BYTES = 4096
# Bytes that arrive in the 20 ms that a request takes. Single records are fetched until their requests have taken as
# long as the whole columns do; then the whole columns, because records are found in the mapping only if the columns are
# complete. For 10,000 records in random order from 49 shards of 0.8 MB: 97 requests instead of 707.
_BYTES_A_REQUEST = 2 << 20
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python has the name from 3.13 on
# Interval between two fstat() calls on a file, about one tick of the clock that sets the ctime. A call takes 0.3 to 3
# us; a call for each record that is read by index took up to 20 % of its time.
STAT_INTERVAL_S = 0.010


class CheckedPages:
    """The pages of a local copy whose checksums have matched, and the time of the oldest check.

    flags is uint8[n_pages], 1 for each page that matched; the threads that gather set it. There is no lock: if two
    threads reset the flags at once, some pages are checked once more.
    """

    def __init__(self, n_pages: int) -> None:
        self.flags = np.zeros(n_pages, np.uint8)
        self._changed_ns = 0
        self._look_s = 0.0
        self._since_s = SYSTEM_CLOCK.monotonic()

    def reset_if_written(self, copy: LocalCopy | None) -> int:
        """Reset all flags if the file may have been written to; a rename or chmod counts. Returns changed_ns().

        Called before flags are read or set; the file is examined at most once per STAT_INTERVAL_S. -1: the copy is
        closed (None); its pages are checked once more and not again.
        """
        now_s = SYSTEM_CLOCK.monotonic()
        if now_s < self._look_s:
            return self._changed_ns
        self._look_s = now_s + STAT_INTERVAL_S
        changed_ns = -1 if copy is None else copy.changed_ns()
        if changed_ns != self._changed_ns or not changed_ns:
            self._forget()
            self._changed_ns = changed_ns
        return changed_ns

    def reset_if_older(self, age_s: float) -> None:
        if SYSTEM_CLOCK.monotonic() - self._since_s > age_s:
            self._forget()

    def _forget(self) -> None:
        self.flags[:] = 0
        self._since_s = SYSTEM_CLOCK.monotonic()


class PendingChecks:
    """Pending checks of raw chunks in a mapping: the first reader of a page checks it (see gather.pyi).

    rows, uint64[n_chunks, 4], are the check arguments of each chunk, zeros if there is nothing to check; they point
    into crcs and checked. The copy is referenced weakly, so that blocks that are kept do not hold its descriptor.
    """

    def __init__(
        self, rows: Addresses, checked: CheckedPages, crcs: npt.NDArray[np.uint32], copy: Callable[[], LocalCopy | None]
    ) -> None:
        self.checked = checked
        self._rows = rows
        self._flags = flags = checked.flags
        self._crcs = crcs
        self._copy = copy
        n_pages = -(-rows[:, 1].astype(np.int64) // PAGE_BYTES)
        self._first = np.where(n_pages, rows[:, 3] - np.uint64(address_of(flags)), np.uint64(0)).astype(np.int64)
        self._last = self._first + n_pages

    def select(self, blocks: Ids, n_columns: int) -> PendingChecks:
        """Return the pending checks of the blocks at these positions; this object must have all columns of each."""
        rows = self._rows.reshape(-1, n_columns, 4)[blocks]
        return PendingChecks(rows.reshape(-1, 4), self.checked, self._crcs, self._copy)

    def reset_if_written(self) -> int:
        return self.checked.reset_if_written(self._copy())

    def reset(self) -> None:
        for first, last in zip(self._first.tolist(), self._last.tolist(), strict=True):
            self._flags[first:last] = 0

    def rows(self) -> Addresses | None:
        """Return the rows of chunks with unchecked pages, zeros for the others; None if all pages are checked."""
        self.reset_if_written()
        if self._flags.all():  # the usual case from the second epoch on, if all columns are served
            return None
        # Number of checked pages before each page of the shard: about 10 us for a shard of 1 GiB.
        right = np.concatenate([[0], np.cumsum(self._flags, dtype=np.int64)])
        done = right[self._last] - right[self._first] == self._last - self._first
        if done.all():
            return None
        left = self._rows.copy()
        left[done] = 0
        return left


@dataclass(frozen=True, slots=True)
class LoadedChunks:
    """Addresses of the raw bytes of chunks; valid while `owners` are referenced."""

    addresses: Addresses
    owners: list[Any] = field(default_factory=list)
    private_bytes: int = 0  # of the memory that is not mapped
    mapped_bytes: Addresses | None = None  # stored bytes of each chunk in a mapping, 0 for others
    pending_checks: PendingChecks | None = None
    copy: LocalCopy | None = None  # None if the store was read


# Byte ranges of rows: the chunk of each row, and start and end in the chunk; int64[n] each.
_RowRanges: TypeAlias = tuple[Ids, Ids, Ids]


class Chunks:
    """The chunks of an open shard, numbered by block (block * n_columns + column). Thread-safe.

    Chunks in private memory are checked at each read, pages of a mapping once (two threads may check the same page).
    """

    def __init__(self, source: ByteSource, footer: Footer, verify: Verify) -> None:
        self._byte_source = source
        self._footer = footer
        self._verify = verify
        self._rows = footer.chunks.ravel()
        self.pages = CheckedPages(len(footer.pages))
        arrow = np.array([column.kind is Kind.ARROW for column in footer.schema.columns], bool)
        # Arrow reads ARROW columns outside the SIGBUS guard, so these columns are read into memory and not mapped.
        self._mappable = (self._rows["codec"] == codec.RAW) & ~np.tile(arrow, footer.n_blocks)
        self._mappable_columns = self._mappable.reshape(footer.n_blocks, len(arrow)).all(axis=0)

    def ranges(self, ids: Ids) -> list[ByteRange]:
        """Return the ranges of the file that hold these chunks, int64[n]; neighbours form one range."""
        ids = np.flatnonzero(np.bincount(ids))  # distinct; a first np.unique() takes 6 ms
        starts = self._rows["offset"][ids].astype(np.int64)
        return merge_ranges(starts, starts + self._rows["stored"][ids].astype(np.int64), _CHUNK_GAP_BYTES)

    def is_cached(self, ids: Ids) -> bool:
        copy = self._byte_source.local_copy
        if copy is None:
            return False
        # The check for a complete copy takes 1 us; computing the ranges of a shard's chunks takes tens of us.
        return copy.lease.present([ByteRange(0, copy.n_bytes)]) or copy.lease.present(self.ranges(ids))

    def are_mapped(self, ids: Ids) -> bool:
        """Return whether these chunks are read in place in the mapping of a local copy."""
        return bool(self._mappable[ids].all()) and self.is_cached(ids)

    def can_keep_blocks(self, columns: Sequence[int]) -> bool:
        """Return whether a complete copy is mapped, whose pages of these columns need no new check at each read."""
        copy = self._byte_source.local_copy
        if copy is None or self._verify == "always" or not self._mappable_columns[list(columns)].all():
            return False
        return copy.lease.present([ByteRange(0, copy.n_bytes)])

    def prefetch_columns(self, columns: Sequence[int]) -> bool:
        """Fetch whole columns whose single records are read, once that is as cheap. Returns whether it is done."""
        if self._byte_source.local_copy is None:
            return True
        ids = chunk_ids(range(self._footer.n_blocks), columns, len(self._footer.schema))
        n_bytes = int(self._rows["stored"][ids].sum())
        if n_bytes <= _BYTES_A_REQUEST:
            self._byte_source.ensure_cached(self.ranges(ids))
        elif self._byte_source.n_misses < n_bytes // _BYTES_A_REQUEST:
            return False
        else:
            self._byte_source.prefetch_ranges(self.ranges(ids))
        return True

    def prefetch_blocks(self, blocks: Sequence[int], columns: Sequence[int]) -> None:
        copy = self._byte_source.local_copy
        # A complete copy costs 1 us here; computing the ranges takes tens of us.
        if copy is not None and not copy.lease.present([ByteRange(0, copy.n_bytes)]):
            ids = chunks_with_group(self._footer, blocks, columns)
            self._byte_source.prefetch_ranges(self.ranges(ids), urgent=True)

    def whole_columns(self, blocks: Ids, columns: Sequence[int], position: Ids, row: Ids) -> list[int]:
        """Return the columns of which whole chunks are loaded for single rows of blocks; of the others, only pages.

        The pages of one record may take several requests, one after the other: those of its offsets, and then those of
        its values. Its whole block takes one. position, row: as for load_rows().
        """
        n_columns = len(self._footer.schema)
        whole = [c for c in columns if self._needs_whole(blocks, c)]
        others = [c for c in columns if c not in whole]
        if len(blocks) != 1 or not others:
            return whole
        rows, runs = self._row_ranges(chunk_ids(blocks, others, n_columns), len(others), position, row)
        is_cached = not whole or self.is_cached(chunk_ids(blocks, whole, n_columns))
        n_requests = len(self._pages(rows)) + bool(runs) + (not is_cached)
        ids = chunk_ids(blocks, columns, n_columns)
        is_cheaper = n_requests > len(self.ranges(ids)) and int(self._rows["stored"][ids].sum()) <= _BYTES_A_REQUEST
        return list(columns) if is_cheaper else whole

    def _needs_whole(self, blocks: Ids, column: int) -> bool:
        ids = blocks * len(self._footer.schema) + column
        if self._footer.schema.columns[column].kind is Kind.ARROW or self.is_cached(ids):
            return True
        return not (self._rows["codec"][ids] == codec.RAW).any()

    def load_whole(self, ids: Ids) -> LoadedChunks:
        """Load these chunks into memory, checked and decoded. Raises CorruptShard and StoreError."""
        if not len(ids):
            return LoadedChunks(np.zeros(0, np.uint64))
        ids, inverse = np.unique(ids, return_inverse=True)
        # If the copy has the chunks, ensure_cached() is not called: it touches each range, and waits for a cold disk.
        copy = (
            self._byte_source.local_copy if self.is_cached(ids) else self._byte_source.ensure_cached(self.ranges(ids))
        )
        addresses = np.zeros(len(ids), np.uint64)
        mapped = self._mappable[ids] if copy is not None else np.zeros(len(ids), bool)
        owners: list[Any] = []
        if copy is not None and mapped.any():
            memory = copy.map_file()
            addresses[mapped] = np.uint64(address_of(memory)) + self._rows["offset"][ids[mapped]]
            owners.append(memory)
        read, addresses[~mapped] = self._read_checked(ids[~mapped], copy)
        decoded, contents = self._decode(ids, addresses)
        keep_read = (self._rows["codec"][ids[~mapped]] == codec.RAW).any()
        private = [*(read if keep_read else []), *decoded]
        mapped_bytes = np.where(mapped, self._rows["stored"][ids].astype(np.uint64), np.uint64(0))
        return LoadedChunks(
            contents[inverse.ravel()],
            owners + private,
            sum(memory.nbytes for memory in private),
            mapped_bytes[inverse.ravel()],
            None if copy is None else self._pending(ids, addresses, mapped, copy, inverse.ravel()),
            copy,
        )

    def load_rows(self, blocks: Ids, columns: Sequence[int], position: Ids, row: Ids) -> LoadedChunks:
        """Load chunks as load_whole() does, but of raw chunks only the pages that hold some rows. No column is ARROW.

        A page lies as in the file: in the mapping of the local copy, or in private memory of the shard's size, of which
        only the pages that are read take memory. position: index of each row's block in blocks.
        """
        ids = chunk_ids(blocks, columns, len(self._footer.schema))
        raw = self._rows["codec"][ids] == codec.RAW
        whole = self.load_whole(ids[~raw])
        rows, runs = self._row_ranges(ids, len(columns), position, row)
        pages = self._pages(rows)
        copy = self._byte_source.ensure_cached(pages) if pages else None
        memory = self._row_memory(pages, copy)
        # The offsets in memory say where the elements of rows of varying length are.
        more = self._pages([self._run_ranges(memory, *run) for run in runs])
        if more and copy is not None and self._byte_source.ensure_cached(more) is None:
            copy, memory = None, self._row_memory(pages, None)
        if more and copy is None:
            self._read_pages(memory, more)
        return self._in_pages(ids, raw, whole, memory, copy)

    def load_buffer(self, ids: Ids, buffer: int) -> LoadedChunks:
        """Load chunks as load_rows() does, but only the pages that hold a buffer, given by its index."""
        raw = self._rows["codec"][ids] == codec.RAW
        whole = self.load_whole(ids[~raw])
        offset, length = self._buffer(ids[raw], buffer)
        pages = self._pages([(ids[raw], offset, offset + length)])
        copy = self._byte_source.ensure_cached(pages) if pages else None
        return self._in_pages(ids, raw, whole, self._row_memory(pages, copy), copy)

    def _in_pages(
        self, ids: Ids, raw: npt.NDArray[np.bool_], whole: LoadedChunks, memory: Bytes, copy: LocalCopy | None
    ) -> LoadedChunks:
        addresses = np.uint64(address_of(memory)) + self._rows["offset"][ids]
        addresses[~raw] = whole.addresses
        pending = self._pending(ids, addresses, raw, copy, np.arange(len(ids)))
        return LoadedChunks(addresses, [memory, *whole.owners], pending_checks=pending, copy=copy)

    def _row_memory(self, pages: Sequence[ByteRange], copy: LocalCopy | None) -> Bytes:
        """Return memory of the shard's size that holds these pages: the mapping of the copy, or private memory."""
        if copy is not None:
            return copy.map_file()
        n_bytes = int((self._rows["offset"] + self._rows["stored"]).max(initial=np.uint64(1)))
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        memory = np.frombuffer(mmap.mmap(-1, n_bytes, flags=flags), np.uint8)
        self._read_pages(memory, pages)
        return memory

    def _read_pages(self, memory: Bytes, pages: Sequence[ByteRange]) -> None:
        if pages:
            self._byte_source.read([(page, memory[page.start : page.end].data) for page in pages])

    def _row_ranges(
        self, ids: Ids, n_columns: int, position: Ids, row: Ids
    ) -> tuple[list[_RowRanges], list[tuple[Stream, Ids, Ids]]]:
        """Return the ranges of raw chunks that hold rows or their offsets; and where streams with offsets have them."""
        ranges: list[_RowRanges] = []
        runs: list[tuple[Stream, Ids, Ids]] = []
        for index in range(n_columns):
            chunks = ids[position * n_columns + index]
            number = int(ids[index]) % len(self._footer.schema)
            for stream in self._footer.schema.columns[number].streams(number):
                item, n_bytes = stream.width_bytes * row, stream.width_bytes
                if stream.kind == VAR:
                    item, n_bytes = 8 * row, 16
                elif stream.kind == BITS:
                    item, n_bytes = row // 8, 1
                which = stream.values_buffer if stream.offsets_buffer is None else stream.offsets_buffer
                offset, length = self._buffer(chunks, which)
                kept = (self._rows["codec"][chunks] == codec.RAW) & (length > 0)
                start = (offset + item)[kept]
                ranges.append((chunks[kept], start, start + n_bytes))
                if stream.kind == VAR:
                    runs.append((stream, chunks[kept], start))
        return ranges, runs

    def _buffer(self, chunks: Ids, buffer: int) -> tuple[Ids, Ids]:
        rows = self._footer.buffers[self._rows["first_buffer"][chunks] + np.uint64(buffer)].astype(np.int64)
        return rows[:, 0], rows[:, 1]

    def _run_ranges(self, memory: Bytes, stream: Stream, chunks: Ids, start: Ids) -> _RowRanges:
        """Return the ranges of the elements of rows, by their offsets in memory. The gather finds wrong offsets."""
        sources, n = np.zeros((len(chunks), 3), np.uint64), np.arange(len(chunks), dtype=np.uint32)
        sources[:, 0] = np.uint64(address_of(memory)) + self._rows["offset"][chunks] + start.astype(np.uint64)
        bounds = np.empty((len(chunks), 2), np.int64)
        try:
            gather.gather(gather.FIXED, 16, sources, n, np.zeros_like(n), bounds.view(np.uint8).reshape(-1))
        except OSError as error:
            raise CorruptShard(f"the local copy cannot be read: {error.strerror}", url=self._byte_source.url) from error
        offset, length = self._buffer(chunks, stream.values_buffer)
        fits = (bounds[:, 0] >= 0) & (bounds[:, 1] >= bounds[:, 0]) & (bounds[:, 1] <= length // stream.width_bytes)
        ends = (offset[:, None] + bounds * stream.width_bytes)[fits]
        return chunks[fits], ends[:, 0], ends[:, 1]

    def _pages(self, ranges: Sequence[_RowRanges]) -> list[ByteRange]:
        if not ranges:
            return []
        chunks, starts, ends = (np.concatenate([one[i] for one in ranges]) for i in range(3))
        rows = self._rows[chunks[ends > starts]]
        starts, ends = starts[ends > starts], ends[ends > starts]
        offset, stored = rows["offset"].astype(np.int64), rows["stored"].astype(np.int64)
        first = offset + starts // PAGE_BYTES * PAGE_BYTES
        return merge_ranges(first, offset + np.minimum(-(-ends // PAGE_BYTES) * PAGE_BYTES, stored), 0)

    def _pending(
        self, ids: Ids, addresses: Addresses, paged: npt.NDArray[np.bool_], copy: LocalCopy | None, order: Ids
    ) -> PendingChecks | None:
        """Return the checks of chunks whose pages the gather checks when it first reads them. copy None: own memory."""
        if self._verify == "never" or not paged.any():
            return None
        is_kept = self._verify == "first" and copy is not None
        checked = self.pages if is_kept else CheckedPages(len(self.pages.flags))
        rows = np.zeros((len(ids), 4), np.uint64)
        first_page = self._rows["first_page"][ids]
        rows[:, 0] = addresses
        rows[:, 1] = self._rows["stored"][ids]
        rows[:, 2] = np.uint64(address_of(self._footer.pages)) + np.uint64(4) * first_page
        rows[:, 3] = np.uint64(address_of(checked.flags)) + first_page
        rows[~paged] = 0
        return PendingChecks(rows[order], checked, self._footer.pages, _no_copy if copy is None else ref(copy))

    def _read(self, ids: Ids, copy: LocalCopy | None) -> tuple[Bytes, Addresses]:
        """Read stored bytes of chunks into private memory, aligned as in the file. Returns memory and addresses."""
        ranges = self.ranges(ids)
        positions = list(accumulate((align(r.n_bytes) for r in ranges), initial=0))
        memory = BUFFER_POOL.allocate(positions[-1])
        spans = [(r, memory[at : at + r.n_bytes].data) for r, at in zip(ranges, positions, strict=False)]
        if copy is not None:
            copy.read(spans)
        elif spans:
            self._byte_source.read(spans)
        starts = np.array([r.start for r in ranges], np.int64)
        offsets = self._rows["offset"][ids].astype(np.int64)
        of_range = np.searchsorted(starts, offsets, side="right") - 1
        shifts = address_of(memory) + np.array(positions[:-1], np.int64) - starts
        return memory, (offsets + shifts[of_range]).astype(np.uint64)

    def _read_checked(self, ids: Ids, copy: LocalCopy | None) -> tuple[list[Bytes], Addresses]:
        """Read stored bytes of chunks into private memory and compare their checksums; on damage, read again."""
        memory, addresses = self._read(ids, copy)
        parts, wrong = [memory], self._wrong(ids, addresses)
        for _ in range(READS_AGAIN if copy is None else 0):
            if not len(wrong):
                break
            memory, addresses[wrong] = self._read(ids[wrong], None)
            parts.append(memory)
            wrong = wrong[self._wrong(ids[wrong], addresses[wrong])]
        if len(wrong):
            self.fail(int(ids[wrong[0]]), "CRC-32C does not match")
        return parts, addresses

    def _wrong(self, ids: Ids, addresses: Addresses) -> Ids:
        if self._verify == "never" or not len(ids):
            return np.zeros(0, np.int64)
        rows = self._rows[ids]
        sums = np.empty(len(rows), np.uint32)
        crc32c_many(addresses, np.ascontiguousarray(rows["stored"]), sums)
        return np.flatnonzero(sums != rows["crc"])

    def _decode(self, ids: Ids, addresses: Addresses) -> tuple[list[Bytes], Addresses]:
        """Decode compressed chunks. Returns the memory, if any, and the addresses with those of the decoded content."""
        rows = self._rows[ids]
        frames = np.flatnonzero(rows["codec"] == codec.ZSTD)
        if not len(frames):
            return [], addresses
        stored, raw = (rows[field][frames].astype(np.uint64) for field in ("stored", "raw"))
        decoded = addresses.copy()
        try:
            memory, decoded[frames] = decode(addresses[frames], stored, raw)
        except BadFrameError as error:
            self.fail(int(ids[frames[error.number]]), str(error), error)
        return [memory], decoded

    def fail(self, chunk: int, message: str, cause: BaseException | None = None) -> NoReturn:
        block, column = divmod(chunk, len(self._footer.schema))
        name = self._footer.schema.columns[column].name
        raise CorruptShard(message, url=self._byte_source.url, block=block, column=name) from cause


def chunk_ids(blocks: npt.ArrayLike, columns: Sequence[int], n_columns: int) -> Ids:
    """Return the numbers of the chunks of blocks and columns, by block: int64[len(blocks) * len(columns)]."""
    numbers: Ids = np.asarray(blocks, np.int64)[:, None] * n_columns + np.asarray(columns, np.int64)[None, :]
    return numbers.ravel()


def _no_copy() -> None: ...


Indices: TypeAlias = npt.NDArray[np.uint32]
_MEMORY_PAGE_BYTES = np.uint64(mmap.PAGESIZE)
# Pages that were checked longer ago are checked again. Checking data in memory takes less than a hundredth of this time
# (7 GB/s per core), and an epoch that takes longer is bound by the disk or the consumer.
CHECKED_FOR_S = 600.0


class Blocks:
    """Loaded blocks of a shard, with some of its columns. Immutable and thread-safe.

    The object keeps its memory; a mapping pins its file without a file descriptor.

    Attributes:
        blocks, columns: Numbers in the shard and in the schema.
        n_rows: int64[n_blocks], number of records of each block.
        addresses: uint64[n_streams, n_blocks, 3], (values, offsets, number of elements) of each stream and block, 0 if
            there is none; an argument of the native gather.
        private_bytes: Number of bytes of memory that is not a mapping.
        reports_residency: See LocalCopy.reports_residency; False without a local copy.
    """

    _constant: npt.NDArray[np.int32] | None = None  # the memory of with_constant()

    def __init__(
        self, footer: Footer, url: str, blocks: tuple[int, ...], columns: tuple[int, ...], loaded: LoadedChunks
    ) -> None:
        self.schema: Schema = footer.schema
        self.url = url
        self.blocks = blocks
        self.columns = columns
        self.private_bytes = loaded.private_bytes
        self.is_cached = loaded.copy is not None
        self.reports_residency = loaded.copy is not None and loaded.copy.reports_residency
        self._rows = blocks  # of the footer's tables
        self.n_rows: npt.NDArray[np.int64] = footer.block_records[list(blocks)].astype(np.int64)
        self.streams: tuple[Stream, ...] = tuple(s for c in columns for s in footer.schema.columns[c].streams(c))
        self._footer = footer
        self._bases = loaded.addresses.reshape(len(blocks), len(columns))
        mapped_bytes = np.zeros_like(loaded.addresses) if loaded.mapped_bytes is None else loaded.mapped_bytes
        self._mapped_bytes = mapped_bytes.reshape(self._bases.shape)
        self._pages: Addresses | None = None
        self._owners = tuple(loaded.owners)
        self._unchecked = loaded.pending_checks
        self._arrays: dict[tuple[int, int], pa.Array] = {}
        self.addresses = self._find()

    def _find(self) -> Addresses:
        addresses = np.zeros((len(self.streams), len(self.blocks), 3), np.uint64)
        position = {column: number for number, column in enumerate(self.columns)}
        for number, stream in enumerate(self.streams):
            bases = self._bases[:, position[stream.column]]
            first = self._footer.chunks["first_buffer"][list(self._rows), stream.column]
            values = self._footer.buffers[first + np.uint64(stream.values_buffer)]
            addresses[number, :, 0] = bases + values[:, 0]
            if stream.role == "valid":
                addresses[number, values[:, 1] == 0, 0] = 0
            if stream.offsets_buffer is not None:
                addresses[number, :, 1] = bases + self._footer.buffers[first + np.uint64(stream.offsets_buffer), 0]
                addresses[number, :, 2] = values[:, 1] // np.uint64(stream.width_bytes)
        return addresses

    def numbered(self, blocks: Sequence[int]) -> Blocks:
        """Return these blocks with other numbers, for a footer that describes only them."""
        found = copy.copy(self)
        found.blocks = tuple(blocks)
        return found

    @property
    def stored(self) -> Blocks:
        """The stored blocks: this object, unless it is made from others."""
        return self

    @property
    def stored_bytes(self) -> int:
        return int(self._footer.chunks["stored"][np.ix_(self._rows, self.columns)].sum())

    def with_constant(self, value: int) -> Blocks:
        """Return the same blocks, over the same memory, with one more stream: an int32 column of one value, at last."""
        found = copy.copy(self)
        found._constant = values = np.full(int(self.n_rows.max(initial=0)), value, np.int32)  # noqa: SLF001 -- of this class
        one = np.zeros((1, *self.addresses.shape[1:]), np.uint64)
        one[:, :, 0] = values.ctypes.data
        found.addresses = np.concatenate([self.addresses, one])
        return found

    def select(self, blocks: Sequence[int]) -> Blocks:
        """Return some of the blocks over the same memory; this object must hold all blocks."""
        chosen = tuple(blocks)
        if chosen == self.blocks:
            return self
        found = copy.copy(self)
        found._choose(chosen)  # noqa: SLF001 -- a method of the same class
        return found

    def _choose(self, chosen: tuple[int, ...]) -> None:
        """Restrict this object to the chosen blocks. Only the caller holds a reference to it yet."""
        places = np.array(chosen, np.int64)
        self.blocks = self._rows = tuple(map(int, chosen))
        self.n_rows = self.n_rows[places]
        self.addresses = np.ascontiguousarray(self.addresses[:, places])
        self._bases, self._mapped_bytes = self._bases[places], self._mapped_bytes[places]
        self._unchecked = None if self._unchecked is None else self._unchecked.select(places, len(self.columns))
        self._pages, self._arrays = None, {}

    @property
    def pages(self) -> Addresses:
        """Memory pages that the mapped chunks occupy: uint64[m, 2]. See merge_pages."""
        if self._pages is None:
            self._pages = merge_pages(self._bases.ravel(), self._mapped_bytes.ravel())
        return self._pages

    @property
    def pending_checks(self) -> Addresses | None:
        """Pending checks for the gather: uint64[n_streams, n_blocks, 4] as in gather.pyi; None if none are left.

        Computed at each access, about 20 us for 100 chunks, because each gather checks what it touches.
        """
        rows = None if self._unchecked is None else self._unchecked.rows()
        if rows is None:
            return None
        position = {column: number for number, column in enumerate(self.columns)}
        numbers = [position[stream.column] for stream in self.streams]
        checks = np.zeros((len(self.addresses), len(self.blocks), 4), np.uint64)  # a constant needs no check
        checks[: len(numbers)] = rows.reshape(len(self.blocks), len(self.columns), 4).transpose(1, 0, 2)[numbers]
        return checks

    def reset_checks(self) -> None:
        """Mark all pages of the blocks as unchecked: they may have been damaged since they were checked."""
        if self._unchecked is not None:
            self._unchecked.reset()

    def reset_old_checks(self, age_s: float) -> None:
        """Mark all pages of the shard as unchecked if a page may have been checked more than age_s seconds ago."""
        if self._unchecked is not None:
            self._unchecked.checked.reset_if_older(age_s)

    def reset_if_written(self) -> int | None:
        """Mark all pages as unchecked if the file was written to. Returns LocalCopy.changed_ns(), or None."""
        return None if self._unchecked is None else self._unchecked.reset_if_written()

    def column_streams(self, column: int) -> slice:
        numbers = [number for number, stream in enumerate(self.streams) if stream.column == column]
        return slice(numbers[0], numbers[-1] + 1) if numbers else slice(0)

    def array(self, position: int, column: int) -> pa.Array:
        """Return a column of a block, by its position here, as Arrow without a copy; the array keeps the memory alive.

        All values are checked before, because Arrow uses them unchecked. Raises CorruptShard.
        """
        if self.schema.columns[column].kind is not Kind.ARROW:
            return self._build(position, column)  # built at each call, because the file of a mapping may have changed
        key = (position, column)
        if key not in self._arrays:
            self._arrays[key] = self._build(position, column)
        return self._arrays[key]

    def _build(self, position: int, column: int) -> pa.Array:
        block, kind = self.blocks[position], self.schema.columns[column]
        n_nodes, n_buffers = kind.layout()
        row = self._footer.chunks[self._rows[position], column]
        nodes = self._footer.nodes[int(row["first_node"]) :][:n_nodes].tolist()
        self.check_whole([position], column)
        base = int(self._bases[position, self.columns.index(column)])
        buffers = [
            pa.foreign_buffer(base + offset, length, self._owners)
            for offset, length in self._footer.buffers[int(row["first_buffer"]) :][:n_buffers].tolist()
        ]
        try:
            array = build_array(kind.storage_type, iter(nodes), iter(buffers))
            # Arrow code relies on valid UTF-8, and on a null count that equals that of the validity bits.
            if kind.nullable or kind.kind in (Kind.ARROW, Kind.STR, Kind.JSON):
                array.validate(full=True)
        except (pa.ArrowException, ValueError) as error:
            raise CorruptShard(
                f"not an array of {kind}: {error}", url=self.url, block=block, column=kind.name
            ) from error
        if isinstance(kind.arrow.type, pa.BaseExtensionType):
            return pa.ExtensionArray.from_storage(kind.arrow.type, array)
        return array

    def raise_damage(self, column: int, block: Indices, row: Indices) -> None:
        """Raise CorruptShard for the first damaged one of rows of a column (block: positions in `blocks`)."""
        checks = self.pending_checks
        for number, stream in enumerate(self.streams):
            if stream.column != column:
                continue
            check = None if checks is None else checks[number]
            found = gather.locate(stream.kind, stream.width_bytes, self.addresses[number], check, block, row)
            if found is not None:
                raise CorruptShard(
                    damage_message(found[1]),
                    url=self.url,
                    block=self.blocks[int(block[found[0]])],
                    column=self.schema.columns[column].name,
                )

    def check_whole(self, positions: Iterable[int], column: int) -> None:
        """Check the unchecked pages and the offsets of a column of blocks, as array() does. Raises CorruptShard."""
        left = None if self._unchecked is None else self._unchecked.rows()
        for position in positions:
            self._check_block(position, column, left)

    def _check_block(self, position: int, column: int, left: Addresses | None) -> None:
        place, name = position * len(self.columns) + self.columns.index(column), self.schema.columns[column].name
        message = ""
        try:
            page = None if left is None else gather.check_chunk(left[place])
            if page is not None:
                message = damage_message(page)
            elif not self._has_right_offsets(position, column):
                message = damage_message(None)
        except OSError as error:
            message = f"the local copy cannot be read: {error.strerror}"
            raise CorruptShard(message, url=self.url, block=self.blocks[position], column=name) from error
        if message:
            raise CorruptShard(message, url=self.url, block=self.blocks[position], column=name)

    def _has_right_offsets(self, position: int, column: int) -> bool:
        return all(
            gather.offsets_ok(int(address[1]), int(self.n_rows[position]), int(address[2]))
            for stream, address in zip(self.streams, self.addresses[: len(self.streams), position], strict=True)
            if stream.column == column and stream.kind == VAR
        )


def renew_checks(blocks: Blocks) -> None:
    """Mark blocks unchecked if they will be read from the disk again, or were checked long ago."""
    if not blocks.reports_residency or are_resident(blocks.pages):
        blocks.reset_old_checks(CHECKED_FOR_S)
    else:
        blocks.reset_checks()


def merge_pages(addresses: Addresses, n_bytes: Addresses) -> Addresses:
    """Return the memory pages that ranges (equal or disjoint) occupy, merged: uint64[m, 2], (address, bytes)."""
    is_filled = n_bytes > 0
    starts = addresses[is_filled]
    ends = starts + n_bytes[is_filled]
    if not (starts[1:] > starts[:-1]).all():  # the chunks of a shard are usually in file order
        order = np.argsort(starts)
        starts, ends = starts[order], ends[order]
    starts = starts // _MEMORY_PAGE_BYTES * _MEMORY_PAGE_BYTES
    ends = (ends + (_MEMORY_PAGE_BYTES - np.uint64(1))) // _MEMORY_PAGE_BYTES * _MEMORY_PAGE_BYTES
    is_first, is_last = np.ones((2, len(starts)), bool)
    is_first[1:] = is_last[:-1] = starts[1:] > ends[:-1]  # other ranges share a page or are adjacent
    return np.stack([starts[is_first], ends[is_last] - starts[is_first]], axis=1)


def damage_message(page: int | None) -> str:
    """Return the description of damage that gather.locate found: a page with a wrong checksum, or None for offsets."""
    return "offsets decrease or exceed the chunk" if page is None else f"CRC-32C of page {page} does not match"
