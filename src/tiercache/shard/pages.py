"""Pages: reads and checks only the 64 KiB pages that hold given byte ranges of raw chunks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from tiercache._native.checksum import crc32c_many
from tiercache.errors import CorruptShard
from tiercache.model import ByteRange
from tiercache.shard.chunks import Addresses, Chunks, Ids, Verify
from tiercache.shard.layout import PAGE_BYTES, Footer
from tiercache.shard.source import ByteSource, LocalCopy, address_of, aligned_empty

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
