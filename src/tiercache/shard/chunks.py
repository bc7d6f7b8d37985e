"""Whole chunks: fetched or mapped, summed, decoded; each becomes the address of its raw bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tiercache._native.checksum import crc32c_many
from tiercache.errors import CorruptShard
from tiercache.model import ByteRange
from tiercache.shard import codec
from tiercache.shard.layout import Footer, align
from tiercache.shard.source import LocalCopy, Source, address_of, aligned_empty
from tiercache.shard.spec import Kind

Verify: TypeAlias = Literal["first", "always", "never"]
Ids: TypeAlias = npt.NDArray[np.int64]
Addresses: TypeAlias = npt.NDArray[np.uint64]
# Chunks that lie so close are read as one range: the bytes between cost less than another request's overhead.
_GAP_BYTES = 4096


@dataclass(frozen=True, slots=True)
class LoadedChunks:
    """Addresses of the raw bytes of chunks; valid while `owners` are kept.

    private_bytes: memory that is not a mapping.
    """

    addresses: Addresses
    owners: list[Any] = field(default_factory=list)
    private_bytes: int = 0


@dataclass(frozen=True, slots=True)
class _Run:
    """Chunks that are read as one range, to `position` of the memory that they are read to."""

    start: int
    end: int
    position: int


class Chunks:
    """The chunks of an open shard, numbered block by block (block * n_columns + column). Safe from any thread.

    Remembers which chunks of the local copy were found to be whole; two threads may both check one, which does no harm.
    """

    def __init__(self, source: Source, footer: Footer, verify: Verify) -> None:
        self._source = source
        self._footer = footer
        self._verify = verify
        self._rows = footer.chunks.ravel()
        self.checked = np.zeros(len(self._rows), bool)
        arrow = np.array([column.kind is Kind.ARROW for column in footer.schema.columns], bool)
        # Arrow walks its arrays without our SIGBUS guard: columns that it decodes are read, not mapped.
        self._mappable = (self._rows["codec"] == codec.RAW) & ~np.tile(arrow, footer.n_blocks)

    def ranges(self, ids: Ids) -> list[ByteRange]:
        """Where chunks lie in the file; neighbours as one range. ids: int64[n], of chunks."""
        return [ByteRange(run.start, run.end) for run in self._runs(np.unique(ids))]

    def load(self, ids: Ids, deadline_s: float | None) -> LoadedChunks:
        """Have these chunks in memory, checked and decoded.

        Raises:
            CorruptShard: a checksum or a length does not match; it names block and column.
            StoreError: the store failed.
        """
        if not len(ids):
            return LoadedChunks(np.zeros(0, np.uint64))
        ids, inverse = np.unique(ids, return_inverse=True)
        copy = self._source.local(self.ranges(ids), deadline_s)
        addresses = np.zeros(len(ids), np.uint64)
        mapped = self._mappable[ids] if copy is not None else np.zeros(len(ids), bool)
        owners: list[Any] = []
        if copy is not None and mapped.any():
            memory = copy.mapped()
            addresses[mapped] = np.uint64(address_of(memory)) + self._rows["offset"][ids[mapped]]
            owners += [copy, memory]
        read = self._read(ids[~mapped], copy, deadline_s)
        addresses[~mapped] = read.addresses
        self._check(ids, addresses, local=copy is not None)
        decoded = self._decode(ids, addresses)
        keep_read = (self._rows["codec"][ids[~mapped]] == codec.RAW).any()
        owners += (read.owners if keep_read else []) + decoded.owners
        private_bytes = (read.private_bytes if keep_read else 0) + decoded.private_bytes
        return LoadedChunks(decoded.addresses[inverse.ravel()], owners, private_bytes)

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
        memory = aligned_empty(align(runs[-1].position + runs[-1].end - runs[-1].start) if runs else 0)
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

    def _check(self, ids: Ids, addresses: Addresses, *, local: bool) -> None:
        """Compare checksums of stored bytes: of what came from the store always, of the local copy as `verify` says."""
        if self._verify == "never":
            return
        todo = ~self.checked[ids] if local and self._verify == "first" else np.ones(len(ids), bool)
        if not todo.any():
            return
        rows = self._rows[ids[todo]]
        sums = np.empty(len(rows), np.uint32)
        try:
            crc32c_many(addresses[todo], np.ascontiguousarray(rows["stored"]), sums)
        except OSError as error:
            raise CorruptShard(f"the local copy cannot be read: {error.strerror}", url=self._source.url) from error
        wrong = sums != rows["crc"]
        if wrong.any():
            self.fail(int(ids[todo][np.argmax(wrong)]), "CRC-32C does not match")
        if local:
            self.checked[ids[todo]] = True

    def _decode(self, ids: Ids, addresses: Addresses) -> LoadedChunks:
        """Replace addresses of frames by those of their content, all in one piece of memory."""
        rows = self._rows[ids]
        frames = np.flatnonzero(rows["codec"] == codec.ZSTD)
        if not len(frames):
            return LoadedChunks(addresses)
        ends = np.cumsum([align(n_bytes) for n_bytes in rows["raw"][frames].tolist()])
        memory = aligned_empty(int(ends[-1]))
        decoded = addresses.copy()
        for number, frame in enumerate(frames.tolist()):
            start = int(ends[number - 1]) if number else 0
            content = memory[start : start + int(rows["raw"][frame])]
            stored = memoryview(pa.foreign_buffer(int(addresses[frame]), int(rows["stored"][frame])))
            try:
                codec.decompress_into(stored, content.data)
            except codec.CodecError as error:
                self.fail(int(ids[frame]), str(error), error)
            decoded[frame] = address_of(content)
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
