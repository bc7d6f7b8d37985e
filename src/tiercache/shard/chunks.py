"""Whole chunks: fetched or mapped, summed, decoded; each becomes the address of its raw bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn, TypeAlias
from weakref import ReferenceType, ref

import numpy as np
import numpy.typing as npt

from tiercache._native.checksum import crc32c_many
from tiercache.errors import CorruptShard
from tiercache.model import ByteRange
from tiercache.shard import codec
from tiercache.shard.decode import BadFrameError, Frames, decode
from tiercache.shard.layout import PAGE_BYTES, Footer, align
from tiercache.shard.memory import POOL
from tiercache.shard.source import LocalCopy, Source, address_of
from tiercache.shard.spec import Kind
from tiercache.waiting import SYSTEM_CLOCK

Verify: TypeAlias = Literal["first", "always", "never"]
Ids: TypeAlias = npt.NDArray[np.int64]
Addresses: TypeAlias = npt.NDArray[np.uint64]
# Chunks that lie so close are read as one range: the bytes between cost less than another request's overhead.
_GAP_BYTES = 4096
# What comes in the 20 ms that a request takes. Single pages are asked for as long as their requests cost less than the
# columns whole, and 8 times at most: records are found in the mapping only where all of them are here. An epoch of
# 10,000 records in random order over 49 shards of 0.8 MB took 707 requests by 8 pages a shard, and takes 97 so.
_BYTES_A_REQUEST = 2 << 20
_MOST_MISSES = 8
# A file is not looked at again for so long, a tick of the clock that stamps it. Looking takes 0.3 to 3 us, by the
# machine: at each record that is read by index that was up to 20 % of its time.
LOOK_AGAIN_S = 0.010


class CheckedPages:
    """The pages of a local copy that matched their checksums, and since when that is known.

    Safe from any thread, without a lock: where two threads forget at once, pages are checked once more than needed.

    flags: uint8[n_pages], 1 for each page that matched; set by the threads that gather.
    """

    def __init__(self, n_pages: int) -> None:
        self.flags = np.zeros(n_pages, np.uint8)
        self._changed_ns = 0
        self._look_s = 0.0
        self._since_s = SYSTEM_CLOCK.monotonic()

    def forget_if_written(self, copy: LocalCopy | None) -> int:
        """Have all pages checked again if the file may have been written to since they were checked.

        Renaming, linking or a change of rights counts as a write. To be called before flags are read or set. The file
        is looked at once in LOOK_AGAIN_S.

        Args:
            copy: the open copy; None: it is closed, so that nobody can tell: pages are checked once more, and then no
                more.

        Returns:
            LocalCopy.changed_ns(), for which the flags hold from now on; -1 of a closed copy.
        """
        now_s = SYSTEM_CLOCK.monotonic()
        if now_s < self._look_s:
            return self._changed_ns
        self._look_s = now_s + LOOK_AGAIN_S
        changed_ns = -1 if copy is None else copy.changed_ns()
        if changed_ns != self._changed_ns or not changed_ns:
            self._forget()
            self._changed_ns = changed_ns
        return changed_ns

    def forget_if_older(self, age_s: float) -> None:
        """Have all pages checked again if some may have been checked longer than age_s ago."""
        if SYSTEM_CLOCK.monotonic() - self._since_s > age_s:
            self._forget()

    def _forget(self) -> None:
        self.flags[:] = 0
        self._since_s = SYSTEM_CLOCK.monotonic()


class Unchecked:
    """Raw chunks in a mapping whose pages are checked by whoever reads them first, as gather.pyi says.

    Args:
        rows: uint64[n_chunks, 4], zeros where there is nothing to check.
        checked: the shard's pages that need no check; shared, and held.
        crcs: uint32[n_pages], held.
        copy: whose mapping it is; not held, for it has a descriptor, and blocks that are kept need none.
    """

    def __init__(
        self, rows: Addresses, checked: CheckedPages, crcs: npt.NDArray[np.uint32], copy: ReferenceType[LocalCopy]
    ) -> None:
        self._checked = checked
        self._rows = rows
        self._flags = flags = checked.flags
        self._crcs = crcs
        self._copy = copy
        n_pages = -(-rows[:, 1].astype(np.int64) // PAGE_BYTES)
        self._first = np.where(n_pages, rows[:, 3] - np.uint64(address_of(flags)), np.uint64(0)).astype(np.int64)
        self._last = self._first + n_pages

    def only(self, blocks: Ids, n_columns: int) -> Unchecked:
        """Of some blocks of a shard of which all chunks are here, int64[n], by their numbers."""
        rows = self._rows.reshape(-1, n_columns, 4)[blocks]
        return Unchecked(rows.reshape(-1, 4), self._checked, self._crcs, self._copy)

    def see_changes(self) -> int:
        """As CheckedPages.forget_if_written."""
        return self._checked.forget_if_written(self._copy())

    def forget_if_older(self, age_s: float) -> None:
        """As CheckedPages.forget_if_older."""
        self._checked.forget_if_older(age_s)

    def forget(self) -> None:
        """Let all of them be checked again."""
        for first, last in zip(self._first.tolist(), self._last.tolist(), strict=True):
            self._flags[first:last] = 0

    def rows(self) -> Addresses | None:
        """The rows of chunks in which pages are left to check, zeros for others; None: there are none.

        All of them are, where the file was written to since they were checked.
        """
        self.see_changes()
        if self._flags.all():  # from the second epoch on, where all columns are served
            return None
        # How many pages were right before each page of the shard: some 10 us for a GiB.
        right = np.concatenate([[0], np.cumsum(self._flags, dtype=np.int64)])
        done = right[self._last] - right[self._first] == self._last - self._first
        if done.all():
            return None
        left = self._rows.copy()
        left[done] = 0
        return left


@dataclass(frozen=True, slots=True)
class LoadedChunks:
    """Addresses of the raw bytes of chunks; valid while `owners` are kept.

    private_bytes: memory that is not a mapping. mapped_bytes: uint64[n], stored bytes of chunks that lie in one, 0 of
    others, None: none does. left: what of them is to be checked by whoever reads it first, None: nothing. copy: the
    local copy that was read.
    """

    addresses: Addresses
    owners: list[Any] = field(default_factory=list)
    private_bytes: int = 0
    mapped_bytes: Addresses | None = None
    left: Unchecked | None = None
    copy: LocalCopy | None = None


@dataclass(frozen=True, slots=True)
class _Run:
    """Chunks that are read as one range, to `position` of the memory that they are read to."""

    start: int
    end: int
    position: int


class Chunks:
    """The chunks of an open shard, numbered block by block (block * n_columns + column). Safe from any thread.

    Chunks that are fetched, or read into memory of our own, are checked each time. `pages` records which pages of a
    mapping matched their checksums. Two threads may check the same page, which does no harm.
    """

    def __init__(self, source: Source, footer: Footer, verify: Verify) -> None:
        self._source = source
        self._footer = footer
        self._verify = verify
        self._rows = footer.chunks.ravel()
        self.pages = CheckedPages(len(footer.pages))
        arrow = np.array([column.kind is Kind.ARROW for column in footer.schema.columns], bool)
        # Arrow walks its arrays without our SIGBUS guard: columns that it decodes are read, not mapped.
        self._mappable = (self._rows["codec"] == codec.RAW) & ~np.tile(arrow, footer.n_blocks)
        self._mappable_columns = self._mappable.reshape(footer.n_blocks, len(arrow)).all(axis=0)

    def ranges(self, ids: Ids) -> list[ByteRange]:
        """Where chunks lie in the file; neighbours as one range. ids: int64[n], of chunks."""
        return [ByteRange(run.start, run.end) for run in self._runs(np.unique(ids))]

    def is_here(self, ids: Ids) -> bool:
        """Whether a local copy, whole or in part, holds these chunks by now."""
        copy = self._source.copy
        if copy is None:
            return False
        # Of a whole copy the answer takes a microsecond; to find where the chunks of a shard lie takes tens.
        return copy.lease.present([ByteRange(0, copy.n_bytes)]) or copy.lease.present(self.ranges(ids))

    def are_mapped(self, ids: Ids) -> bool:
        """Whether chunks are read where they lie in the mapping."""
        return bool(self._mappable[ids].all()) and self.is_here(ids)

    def can_be_kept(self, columns: Sequence[int]) -> bool:
        """Whether can_stay_mapped() says so of all chunks of these columns; False where it is not quickly told."""
        copy = self._source.copy
        if copy is None or self._verify == "always" or not self._mappable_columns[list(columns)].all():
            return False
        return copy.lease.present([ByteRange(0, copy.n_bytes)])

    def can_stay_mapped(self, ids: Ids) -> bool:
        """The same, time and again without another check."""
        return self._verify != "always" and self.are_mapped(ids)

    def bring_whole(self, columns: Sequence[int], deadline_s: float | None) -> bool:
        """Have a local copy fetch columns whole of which single records are read, once that is as cheap.

        False: not yet. True: they are on their way, or there is no copy to bring them to; ask no more.

        Raises:
            StoreError: the store failed, or the deadline passed.
        """
        if self._source.copy is None:
            return True
        ids = chunk_ids(range(self._footer.n_blocks), columns, len(self._footer.schema))
        n_bytes = int(self._rows["stored"][ids].sum())
        if n_bytes <= _BYTES_A_REQUEST:
            self._source.local(self.ranges(ids), deadline_s)
        elif self._source.n_misses < min(n_bytes // _BYTES_A_REQUEST, _MOST_MISSES):
            return False
        else:
            self._source.want(self.ranges(ids))
        return True

    def load(self, ids: Ids, deadline_s: float | None) -> LoadedChunks:
        """Have these chunks in memory, checked and decoded.

        Raises:
            CorruptShard: a checksum or a length does not match; it names block and column.
            StoreError: the store failed.
        """
        if not len(ids):
            return LoadedChunks(np.zeros(0, np.uint64))
        ids, inverse = np.unique(ids, return_inverse=True)
        # A copy that has them is not asked for what it has: a call a range, which on a cold disk waits for reads.
        copy = self._source.copy if self.is_here(ids) else self._source.local(self.ranges(ids), deadline_s)
        addresses = np.zeros(len(ids), np.uint64)
        mapped = self._mappable[ids] if copy is not None else np.zeros(len(ids), bool)
        owners: list[Any] = []
        if copy is not None and mapped.any():
            memory = copy.mapped()
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
    ) -> Unchecked | None:
        """Summing what stays in the mapping is left to whoever touches it: 500 MB would hold up the first batch."""
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
        return Unchecked(rows[inverse.ravel()], checked, self._footer.pages, ref(copy))

    def _runs(self, ids: Ids) -> Iterator[_Run]:
        """Ranges that hold chunks, given in the order of the file, close ones together."""
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
        """The stored bytes of chunks in memory of our own; each as aligned as it is in the file."""
        runs = list(self._runs(ids))
        memory = POOL.lend(align(runs[-1].position + runs[-1].end - runs[-1].start) if runs else 0)
        spans = [(ByteRange(r.start, r.end), memory[r.position : r.position + r.end - r.start].data) for r in runs]
        if copy is not None:
            copy.read(spans)
        elif spans:
            self._source.read(spans, deadline_s)
        offsets = self._rows["offset"][ids]
        run_starts = np.array([run.start for run in runs], np.uint64)
        shifts = np.array([address_of(memory) + run.position - run.start for run in runs], np.int64)
        of_run = np.searchsorted(run_starts, offsets, side="right") - 1
        addresses = (offsets.astype(np.int64) + shifts[of_run]).astype(np.uint64)
        return LoadedChunks(addresses, [memory], memory.nbytes)

    def _check(self, ids: Ids, addresses: Addresses) -> None:
        """Compare checksums of stored bytes that were read to memory of our own."""
        if self._verify == "never" or not len(ids):
            return
        rows = self._rows[ids]
        sums = np.empty(len(rows), np.uint32)
        crc32c_many(addresses, np.ascontiguousarray(rows["stored"]), sums)
        wrong = sums != rows["crc"]
        if wrong.any():
            self.fail(int(ids[np.argmax(wrong)]), "CRC-32C does not match")

    def _decode(self, ids: Ids, addresses: Addresses) -> LoadedChunks:
        """Replace addresses of frames by those of their content, all in one piece of memory."""
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
        """Raise CorruptShard for a chunk."""
        block, column = divmod(chunk, len(self._footer.schema))
        name = self._footer.schema.columns[column].name
        raise CorruptShard(message, url=self._source.url, block=block, column=name) from cause


def chunk_ids(blocks: Sequence[int], columns: Sequence[int], n_columns: int) -> Ids:
    """Numbers of chunks, block by block: int64[n_blocks * n_columns]."""
    numbers: Ids = np.asarray(blocks, np.int64)[:, None] * n_columns + np.asarray(columns, np.int64)[None, :]
    return numbers.ravel()
