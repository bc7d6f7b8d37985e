"""Chunks and pages of a shard: fetched or mapped, compared with their checksums, decoded, returned as addresses."""

from __future__ import annotations

import ctypes
import importlib.util
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, NoReturn, TypeAlias
from weakref import ReferenceType, ref

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tiercache._native.checksum import crc32c_many
from tiercache._native.zstd import ZstdDecoder
from tiercache.errors import CorruptShard
from tiercache.model import ByteRange
from tiercache.shard.column_types import Kind
from tiercache.shard.format import codec
from tiercache.shard.format.layout import PAGE_BYTES, Footer, align
from tiercache.shard.memory import BUFFER_POOL, Bytes, address_of, aligned_empty
from tiercache.shard.read.source import ByteSource, LocalCopy
from tiercache.waiting import SYSTEM_CLOCK

_Uint64s = npt.NDArray[np.uint64]

_FUNCTIONS = ("ZSTD_createDCtx", "ZSTD_freeDCtx", "ZSTD_decompressDCtx", "ZSTD_getFrameContentSize")
# Creating a decoder costs more than decoding a small frame; a decoder is for one thread at a time.
_here = threading.local()


class BadFrameError(codec.CodecError):
    """A zstd frame is damaged. number: Index of the frame among the given ones."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


@dataclass(frozen=True, slots=True)
class Frames:
    """n frames in memory, uint64[n] each: their addresses, their stored lengths and their decoded lengths in bytes."""

    addresses: _Uint64s
    stored: _Uint64s
    raw: _Uint64s


def decode(frames: Frames) -> tuple[Bytes, _Uint64s]:
    """Decode all frames.

    Returns:
        The memory that holds the decoded content, which the caller owns; and the address of the content of each frame,
        uint64[n], a multiple of 64.

    Raises:
        BadFrameError: A frame does not hold the stated number of bytes. Nothing is written beyond that length.
    """
    lengths = np.array([align(n_bytes) for n_bytes in frames.raw.tolist()], np.uint64)
    ends = np.cumsum(lengths, dtype=np.uint64)
    memory = BUFFER_POOL.allocate(int(ends[-1]) if len(ends) else 0)
    out = np.uint64(address_of(memory)) + ends - lengths
    n_right = _decode_native(frames, out)
    for number in range(n_right, len(out)):  # the first of these may be damaged; _decode_one raises the reason
        _decode_one(frames, number, memory[int(ends[number] - lengths[number]) :][: int(frames.raw[number])])
    return memory, out


def _decode_native(frames: Frames, out: _Uint64s) -> int:
    """Decode frames in one call, until the first bad one. Returns the number of decoded frames; 0 without a libzstd."""
    if not hasattr(_here, "decoder"):
        functions = find_libzstd()
        _here.decoder = None if functions is None else ZstdDecoder(*functions)
    if _here.decoder is None:
        return 0
    columns = [np.ascontiguousarray(numbers, np.uint64) for numbers in (frames.addresses, frames.stored)]
    n_right: int = _here.decoder.decode(*columns, out, np.ascontiguousarray(frames.raw, np.uint64))
    return n_right


def _decode_one(frames: Frames, number: int, content: Bytes) -> None:
    stored = memoryview(pa.foreign_buffer(int(frames.addresses[number]), int(frames.stored[number])))
    try:
        codec.decompress_into(stored, content.data)
    except codec.CodecError as error:
        raise BadFrameError(number, str(error)) from error


@cache
def find_libzstd() -> tuple[int, int, int, int] | None:
    """Return the addresses of the functions that a ZstdDecoder needs, or None.

    They come from the system's libzstd, else from the libzstd that the module zstandard._cffi exports.
    """
    part = importlib.util.find_spec("zstandard._cffi")
    for name in ("libzstd.so.1", part.origin if part is not None else None):
        try:
            if name is None:
                continue
            library = ctypes.CDLL(name)
            create, destroy, decode_frame, promise = (
                ctypes.cast(getattr(library, function), ctypes.c_void_p).value or 0 for function in _FUNCTIONS
            )
        except (OSError, AttributeError):
            continue
        if create and destroy and decode_frame and promise:
            return create, destroy, decode_frame, promise
    return None


Verify: TypeAlias = Literal["first", "always", "never"]
Ids: TypeAlias = npt.NDArray[np.int64]
Addresses: TypeAlias = npt.NDArray[np.uint64]
# Chunks with a smaller gap are read as one range, because the bytes between cost less than another request.
_GAP_BYTES = 4096
# Bytes that arrive in the 20 ms that a request takes. While single pages cost fewer requests than the whole columns,
# and at most 8 times, single pages are fetched; then the whole columns, because records are found in the mapping only
# if the columns are complete. For 10,000 records in random order from 49 shards of 0.8 MB: 97 requests instead of 707.
_BYTES_A_REQUEST = 2 << 20
_MOST_MISSES = 8
# Interval between two fstat() calls on a file, about one tick of the clock that sets the ctime. A call takes 0.3 to 3
# us; a call for each record that is read by index took up to 20 % of its time.
STAT_INTERVAL_S = 0.010


class CheckedPages:
    """Record of the pages of a local copy whose checksums have matched, and of the time of the oldest check.

    Thread-safe without a lock: if two threads reset the flags at once, some pages are checked once more than necessary.

    Attributes:
        flags: uint8[n_pages], 1 for each page that matched. The threads that gather set the flags.
    """

    def __init__(self, n_pages: int) -> None:
        self.flags = np.zeros(n_pages, np.uint8)
        self._changed_ns = 0
        self._look_s = 0.0
        self._since_s = SYSTEM_CLOCK.monotonic()

    def reset_if_written(self, copy: LocalCopy | None) -> int:
        """Reset all flags if the file may have been written to since the pages were checked.

        A rename, a link or a change of permissions counts as a write. The caller calls this before it reads or sets
        flags. The file is examined at most once per STAT_INTERVAL_S.

        Args:
            copy: The open copy. None: the copy is closed, so changes cannot be detected; pages are then checked once
                more, and not again.

        Returns:
            LocalCopy.changed_ns() to which the flags now refer; -1 for a closed copy.
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
        """Reset all flags if a page may have been checked more than age_s seconds ago."""
        if SYSTEM_CLOCK.monotonic() - self._since_s > age_s:
            self._forget()

    def _forget(self) -> None:
        self.flags[:] = 0
        self._since_s = SYSTEM_CLOCK.monotonic()


class PendingChecks:
    """Pending checks of raw chunks in a mapping: the first reader of a page checks it (see gather.pyi).

    Args:
        rows: uint64[n_chunks, 4], the check arguments of each chunk; zeros if there is nothing to check.
        checked: Flags of the shard's checked pages. Shared with others; this object keeps a reference.
        crcs: uint32[n_pages], CRC-32C of the pages. This object keeps a reference, because rows points into it.
        copy: Weak reference to the mapped copy, so that blocks that are kept do not hold its file descriptor.
    """

    def __init__(
        self, rows: Addresses, checked: CheckedPages, crcs: npt.NDArray[np.uint32], copy: ReferenceType[LocalCopy]
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
        """Return the pending checks of some blocks.

        Args:
            blocks: Positions of the blocks, int64[n].
            n_columns: Number of columns; this object must have all chunks of each block.
        """
        rows = self._rows.reshape(-1, n_columns, 4)[blocks]
        return PendingChecks(rows.reshape(-1, 4), self.checked, self._crcs, self._copy)

    def reset_if_written(self) -> int:
        """See CheckedPages.reset_if_written."""
        return self.checked.reset_if_written(self._copy())

    def reset(self) -> None:
        """Reset the flags of these chunks' pages, so that they are checked again."""
        for first, last in zip(self._first.tolist(), self._last.tolist(), strict=True):
            self._flags[first:last] = 0

    def rows(self) -> Addresses | None:
        """Return the rows of chunks with unchecked pages, zeros for the others; None if all pages are checked.

        If the file has been written to, all pages count as unchecked.
        """
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
    """Addresses of the raw bytes of chunks; valid while `owners` are referenced.

    Attributes:
        addresses: uint64[n].
        owners: Objects that own the memory.
        private_bytes: Number of bytes of memory that is not a mapping.
        mapped_bytes: uint64[n], stored bytes of each chunk in a mapping, 0 for other chunks; None if no chunk is
            mapped.
        pending_checks: Pending checks of the mapped chunks; None if nothing is left to check.
        copy: The local copy that was read; None if the store was read.
    """

    addresses: Addresses
    owners: list[Any] = field(default_factory=list)
    private_bytes: int = 0
    mapped_bytes: Addresses | None = None
    pending_checks: PendingChecks | None = None
    copy: LocalCopy | None = None


@dataclass(frozen=True, slots=True)
class _Run:
    """A range [start, end) of the file that holds neighbouring chunks, and its position in the receiving memory."""

    start: int
    end: int
    position: int


class Chunks:
    """The chunks of an open shard, numbered by block (block * n_columns + column). Thread-safe.

    Chunks that are fetched, or read into private memory, are checked at each read. `pages` records which pages of a
    mapping have matched their checksums. Two threads may check the same page, which is harmless.
    """

    def __init__(self, source: ByteSource, footer: Footer, verify: Verify) -> None:
        self._source = source
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
        return [ByteRange(run.start, run.end) for run in self._runs(np.unique(ids))]

    def is_cached(self, ids: Ids) -> bool:
        """Return whether a complete or partial local copy holds these chunks now."""
        copy = self._source.local_copy
        if copy is None:
            return False
        # The check for a complete copy takes 1 us; computing the ranges of a shard's chunks takes tens of us.
        return copy.lease.present([ByteRange(0, copy.n_bytes)]) or copy.lease.present(self.ranges(ids))

    def are_mapped(self, ids: Ids) -> bool:
        """Return whether these chunks are read in place in the mapping of a local copy."""
        return bool(self._mappable[ids].all()) and self.is_cached(ids)

    def can_keep_blocks(self, columns: Sequence[int]) -> bool:
        """Return whether a complete copy is mapped, whose pages of these columns need no new check at each read."""
        copy = self._source.local_copy
        if copy is None or self._verify == "always" or not self._mappable_columns[list(columns)].all():
            return False
        return copy.lease.present([ByteRange(0, copy.n_bytes)])

    def prefetch_columns(self, columns: Sequence[int], deadline_s: float | None) -> bool:
        """Have the local copy fetch whole columns whose single records are read, once that is as cheap.

        Returns:
            True if the fetch has started or is done, or if there is no local copy: no further call is needed.

        Raises:
            StoreError: The store failed, or the deadline passed.
        """
        if self._source.local_copy is None:
            return True
        ids = chunk_ids(range(self._footer.n_blocks), columns, len(self._footer.schema))
        n_bytes = int(self._rows["stored"][ids].sum())
        if n_bytes <= _BYTES_A_REQUEST:
            self._source.ensure_cached(self.ranges(ids), deadline_s)
        elif self._source.n_misses < min(n_bytes // _BYTES_A_REQUEST, _MOST_MISSES):
            return False
        else:
            self._source.prefetch(self.ranges(ids))
        return True

    def load(self, ids: Ids, deadline_s: float | None) -> LoadedChunks:
        """Load these chunks into memory, checked and decoded.

        Raises:
            CorruptShard: A checksum or a length does not match; the error names the block and the column.
            StoreError: The store failed.
        """
        if not len(ids):
            return LoadedChunks(np.zeros(0, np.uint64))
        ids, inverse = np.unique(ids, return_inverse=True)
        # If the copy has the chunks, ensure_cached() is not called: it touches each range, and waits for a cold disk.
        copy = (
            self._source.local_copy if self.is_cached(ids) else self._source.ensure_cached(self.ranges(ids), deadline_s)
        )
        addresses = np.zeros(len(ids), np.uint64)
        mapped = self._mappable[ids] if copy is not None else np.zeros(len(ids), bool)
        owners: list[Any] = []
        if copy is not None and mapped.any():
            memory = copy.map_file()
            addresses[mapped] = np.uint64(address_of(memory)) + self._rows["offset"][ids[mapped]]
            owners.append(memory)
        read = self._read(ids[~mapped], copy, deadline_s)
        addresses[~mapped] = read.addresses
        self._check(ids[~mapped], read.addresses)
        decoded = self._decode(ids, addresses)
        keep_read = (self._rows["codec"][ids[~mapped]] == codec.RAW).any()
        owners += (read.owners if keep_read else []) + decoded.owners
        private_bytes = (read.private_bytes if keep_read else 0) + decoded.private_bytes
        mapped_bytes = np.where(mapped, self._rows["stored"][ids].astype(np.uint64), np.uint64(0))
        return LoadedChunks(
            decoded.addresses[inverse.ravel()],
            owners,
            private_bytes,
            mapped_bytes[inverse.ravel()],
            None if copy is None else self._left(ids, addresses, mapped, inverse, copy),
            copy,
        )

    def _left(
        self, ids: Ids, addresses: Addresses, mapped: npt.NDArray[np.bool_], inverse: Ids, copy: LocalCopy
    ) -> PendingChecks | None:
        """Return the pending checks of mapped chunks; None if there are none.

        The gather checks mapped pages when it first reads them: checking 500 MB here would delay the first batch.
        """
        if self._verify == "never" or not mapped.any():
            return None
        checked = self.pages if self._verify == "first" else CheckedPages(len(self.pages.flags))
        rows = np.zeros((len(ids), 4), np.uint64)
        first_page = self._rows["first_page"][ids]
        rows[:, 0] = addresses
        rows[:, 1] = self._rows["stored"][ids]
        rows[:, 2] = np.uint64(address_of(self._footer.pages)) + np.uint64(4) * first_page
        rows[:, 3] = np.uint64(address_of(checked.flags)) + first_page
        rows[~mapped] = 0
        return PendingChecks(rows[inverse.ravel()], checked, self._footer.pages, ref(copy))

    def _runs(self, ids: Ids) -> Iterator[_Run]:
        """Yield the ranges that hold these chunks, which are in file order; close chunks form one range."""
        position = 0
        starts = self._rows["offset"][ids]
        ends = starts + self._rows["stored"][ids]
        breaks = np.flatnonzero(starts[1:] > ends[:-1] + np.uint64(_GAP_BYTES)) + 1
        for first, last in zip([0, *breaks.tolist()], [*breaks.tolist(), len(ids)], strict=True):
            if first < last:
                run = _Run(int(starts[first]), int(ends[last - 1]), position)
                position = align(position + run.end - run.start)
                yield run

    def _read(self, ids: Ids, copy: LocalCopy | None, deadline_s: float | None) -> LoadedChunks:
        """Read the stored bytes of chunks into private memory; each chunk keeps its alignment in the file."""
        runs = list(self._runs(ids))
        memory = BUFFER_POOL.allocate(align(runs[-1].position + runs[-1].end - runs[-1].start) if runs else 0)
        spans = [(ByteRange(r.start, r.end), memory[r.position : r.position + r.end - r.start].data) for r in runs]
        if copy is not None:
            copy.read(spans)
        elif spans:
            self._source.read(spans, deadline_s)
        offsets = self._rows["offset"][ids]
        run_starts = np.array([run.start for run in runs], np.uint64)
        shifts = np.array([address_of(memory) + run.position - run.start for run in runs], np.int64)
        from_finder = np.searchsorted(run_starts, offsets, side="right") - 1
        addresses = (offsets.astype(np.int64) + shifts[from_finder]).astype(np.uint64)
        return LoadedChunks(addresses, [memory], memory.nbytes)

    def _check(self, ids: Ids, addresses: Addresses) -> None:
        """Compare the checksums of stored bytes that were read into private memory."""
        if self._verify == "never" or not len(ids):
            return
        rows = self._rows[ids]
        sums = np.empty(len(rows), np.uint32)
        crc32c_many(addresses, np.ascontiguousarray(rows["stored"]), sums)
        wrong = sums != rows["crc"]
        if wrong.any():
            self.fail(int(ids[np.argmax(wrong)]), "CRC-32C does not match")

    def _decode(self, ids: Ids, addresses: Addresses) -> LoadedChunks:
        """Decode compressed chunks into one allocation, and return the addresses with those of the decoded content."""
        rows = self._rows[ids]
        frames = np.flatnonzero(rows["codec"] == codec.ZSTD)
        if not len(frames):
            return LoadedChunks(addresses)
        stored, raw = (rows[field][frames].astype(np.uint64) for field in ("stored", "raw"))
        try:
            memory, contents = decode(Frames(addresses[frames], stored, raw))
        except BadFrameError as error:
            self.fail(int(ids[frames[error.number]]), str(error), error)
        decoded = addresses.copy()
        decoded[frames] = contents
        return LoadedChunks(decoded, [memory], memory.nbytes)

    def fail(self, chunk: int, message: str, cause: BaseException | None = None) -> NoReturn:
        """Raise CorruptShard for the chunk with this number."""
        block, column = divmod(chunk, len(self._footer.schema))
        name = self._footer.schema.columns[column].name
        raise CorruptShard(message, url=self._source.url, block=block, column=name) from cause


def chunk_ids(blocks: Sequence[int], columns: Sequence[int], n_columns: int) -> Ids:
    """Return the numbers of the chunks of blocks and columns, by block: int64[len(blocks) * len(columns)]."""
    numbers: Ids = np.asarray(blocks, np.int64)[:, None] * n_columns + np.asarray(columns, np.int64)[None, :]
    return numbers.ravel()


Numbers: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ChunkRanges:
    """n byte ranges [start, end) of raw chunks.

    Attributes:
        chunk: int64[n], numbers of the chunks.
        start, end: int64[n], relative to the start of the chunk.
    """

    chunk: Ids
    start: Numbers
    end: Numbers


@dataclass(frozen=True, slots=True)
class LoadedRanges:
    """Addresses of byte ranges, uint64[n]; valid while `owners` are referenced."""

    addresses: Addresses
    owners: list[Any] = field(default_factory=list)


class Pages:
    """The pages of an open shard's raw chunks. Thread-safe. Chunks.pages records the checked pages of a local copy."""

    def __init__(self, source: ByteSource, footer: Footer, verify: Verify, chunks: Chunks) -> None:
        self._source = source
        self._footer = footer
        self._verify = verify
        self._chunks = chunks
        self._rows = footer.chunks.ravel()

    def load(self, pieces: ChunkRanges, deadline_s: float | None) -> LoadedRanges:
        """Load byte ranges into memory and check their pages. The caller ensures that they are inside raw chunks.

        Raises:
            CorruptShard: The checksum of a page does not match.
            StoreError: The store failed.
        """
        pages, chunk_of_page = self._pages_of(pieces)
        starts = self._starts(pages, chunk_of_page)
        ends = np.minimum(starts + PAGE_BYTES, self._ends(chunk_of_page))
        runs = _runs(starts, ends)
        copy = self._source.ensure_cached(runs, deadline_s)
        if copy is not None:
            memory = copy.map_file()
            self._check(pages, chunk_of_page, starts + address_of(memory), ends - starts, copy)
            in_file = self._rows["offset"][pieces.chunk].astype(np.int64) + pieces.start
            return LoadedRanges((in_file + address_of(memory)).astype(np.uint64), [copy, memory])
        memory = self._read(runs, starts, pages, deadline_s)
        slots = address_of(memory) + PAGE_BYTES * np.arange(len(pages), dtype=np.int64)
        self._check(pages, chunk_of_page, slots, ends - starts, None)
        first = self._rows["first_page"][pieces.chunk].astype(np.int64) + pieces.start // PAGE_BYTES
        slot = np.searchsorted(pages, first)
        addresses = address_of(memory) + PAGE_BYTES * slot + pieces.start % PAGE_BYTES
        return LoadedRanges(addresses.astype(np.uint64), [memory])

    def _pages_of(self, pieces: ChunkRanges) -> tuple[Numbers, Ids]:
        """Return the pages that the ranges touch, ascending and without repetition, and the chunk of each page."""
        first, last = pieces.start // PAGE_BYTES, (pieces.end - 1) // PAGE_BYTES
        counts = np.where(pieces.end > pieces.start, last - first + 1, 0)
        within = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
        base = self._rows["first_page"][pieces.chunk].astype(np.int64) + first
        pages, where = np.unique(np.repeat(base, counts) + within, return_index=True)
        return pages, np.repeat(pieces.chunk, counts)[where]

    def _starts(self, pages: Numbers, chunk: Ids) -> Numbers:
        """Return the offsets of pages in the file."""
        rows = self._rows[chunk]
        starts: Numbers = rows["offset"].astype(np.int64) + (pages - rows["first_page"].astype(np.int64)) * PAGE_BYTES
        return starts

    def _ends(self, chunk: Ids) -> Numbers:
        rows = self._rows[chunk]
        ends: Numbers = (rows["offset"] + rows["stored"]).astype(np.int64)
        return ends

    def _read(
        self, runs: list[ByteRange], starts: Numbers, pages: Numbers, deadline_s: float | None
    ) -> npt.NDArray[np.uint8]:
        """Fetch runs of pages into memory with PAGE_BYTES for each page, so that neighbouring pages stay adjacent."""
        memory = aligned_empty(len(pages) * PAGE_BYTES)
        spans = []
        for run in runs:
            slot = int(np.searchsorted(starts, run.start)) * PAGE_BYTES
            spans.append((run, memory[slot : slot + run.n_bytes].data))
        if spans:
            self._source.read(spans, deadline_s)
        return memory

    def _check(self, pages: Numbers, chunk: Ids, addresses: Numbers, lengths: Numbers, copy: LocalCopy | None) -> None:
        """Compare the checksums of pages. copy: Local copy whose mapping holds the pages; None: private memory."""
        if self._verify == "never":
            return
        todo = np.ones(len(pages), bool)
        checked = self._chunks.pages if copy is not None and self._verify == "first" else None
        if copy is not None and checked is not None:
            checked.reset_if_written(copy)
            todo = checked.flags[pages] == 0
        if not todo.any():
            return
        sums = np.empty(int(todo.sum()), np.uint32)
        try:
            crc32c_many(addresses[todo].astype(np.uint64), lengths[todo].astype(np.uint64), sums)
        except OSError as error:
            raise CorruptShard(f"the local copy cannot be read: {error.strerror}", url=self._source.url) from error
        wrong = sums != self._footer.pages[pages[todo]]
        if wrong.any():
            place = int(np.flatnonzero(todo)[np.argmax(wrong)])
            page = int(pages[place]) - int(self._rows["first_page"][chunk[place]])
            self._chunks.fail(int(chunk[place]), f"CRC-32C of page {page} does not match")
        if checked is not None:
            checked.flags[pages[todo]] = 1


def _runs(starts: Numbers, ends: Numbers) -> list[ByteRange]:
    """Return the ranges of pages, with adjacent pages merged.

    A page that is not full ends its range, so that all pages of a range have PAGE_BYTES in memory as in the file.
    """
    breaks = np.flatnonzero((starts[1:] != ends[:-1]) | (ends[:-1] - starts[:-1] != PAGE_BYTES)) + 1
    edges = zip([0, *breaks.tolist()], [*breaks.tolist(), len(starts)], strict=True)
    return [ByteRange(int(starts[first]), int(ends[last - 1])) for first, last in edges if first < last]
