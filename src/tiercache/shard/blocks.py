"""Blocks: loaded and decoded blocks, as addresses for the native gather and as Arrow arrays."""

from __future__ import annotations

import copy
import mmap
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tiercache._native import gather
from tiercache._native.mapping import are_resident
from tiercache.errors import CorruptShard
from tiercache.shard.chunks import Addresses, LoadedChunks
from tiercache.shard.layout import Footer
from tiercache.shard.schema import VAR, Kind, Schema, Stream, build_array

Indices: TypeAlias = npt.NDArray[np.uint32]
_MEMORY_PAGE_BYTES = np.uint64(mmap.PAGESIZE)
# Pages that were checked longer ago are checked again. Checking data in memory takes less than a hundredth of this time
# (7 GB/s per core), and an epoch that takes longer is bound by the disk or the consumer.
CHECKED_FOR_S = 600.0


class Blocks:
    """Loaded blocks of a shard, with some of its columns.

    Immutable and thread-safe. The object keeps its memory until it is dropped; a mapping pins its file without a file
    descriptor.

    Attributes:
        schema: Schema of the shard.
        url: URL of the shard, for errors.
        blocks: Numbers of the blocks in the shard.
        columns: Indices of the columns in the schema.
        n_rows: int64[n_blocks], number of records of each block.
        streams: Streams of the columns, in order.
        addresses: uint64[n_streams, n_blocks, 3], (values, offsets, number of elements) of each stream and block, 0 if
            there is none; an argument of the native gather.
        private_bytes: Number of bytes of memory that is not a mapping.
        is_cached: Whether the blocks were read from a local copy.
        reports_residency: See LocalCopy.reports_residency; False without a local copy.
    """

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
            first = self._footer.chunks["first_buffer"][list(self.blocks), stream.column]
            values = self._footer.buffers[first + np.uint64(stream.values_buffer)]
            addresses[number, :, 0] = bases + values[:, 0]
            if stream.role == "valid":
                addresses[number, values[:, 1] == 0, 0] = 0
            if stream.offsets_buffer is not None:
                addresses[number, :, 1] = bases + self._footer.buffers[first + np.uint64(stream.offsets_buffer), 0]
                addresses[number, :, 2] = values[:, 1] // np.uint64(stream.width_bytes)
        return addresses

    def select(self, blocks: Sequence[int]) -> Blocks:
        """Return some of the blocks over the same memory; this object must hold all blocks. Raises IndexError."""
        chosen = tuple(blocks)
        if chosen == self.blocks:
            return self
        check_indices("blocks", chosen, len(self.blocks))
        found = copy.copy(self)
        found._choose(chosen)  # noqa: SLF001 -- a method of the same class
        return found

    def _choose(self, chosen: tuple[int, ...]) -> None:
        """Restrict this object to the chosen blocks. Only the caller holds a reference to it yet."""
        places = np.array(chosen, np.int64)
        self.blocks, self.n_rows = tuple(map(int, chosen)), self.n_rows[places]
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
        by_column = rows.reshape(len(self.blocks), len(self.columns), 4).transpose(1, 0, 2)
        return np.ascontiguousarray(by_column[numbers])

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
        """Return the slice of `streams` that belongs to a column, given by its index in the schema."""
        numbers = [number for number, stream in enumerate(self.streams) if stream.column == column]
        return slice(numbers[0], numbers[-1] + 1) if numbers else slice(0)

    def array(self, position: int, column: int) -> pa.Array:
        """Return a column of a block, by its position here and the column's index, as Arrow without a copy.

        The array keeps the block's memory alive. All values are checked before, because Arrow uses them unchecked.
        Raises CorruptShard.
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
        row = self._footer.chunks[block, column]
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
        """Raise CorruptShard for the first damaged one of some rows of a column; return if none is.

        block: uint32[n], positions in `blocks`; row: uint32[n], numbers in the block.
        """
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
        """Check the unchecked pages and the offsets of a column of blocks; positions and column as in array().

        Raises CorruptShard.
        """
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
        """Return whether the offsets of a column never decrease, and stay within the values of the block."""
        return all(
            gather.offsets_ok(int(address[1]), int(self.n_rows[position]), int(address[2]))
            for stream, address in zip(self.streams, self.addresses[:, position], strict=True)
            if stream.column == column and stream.kind == VAR
        )


def renew_checks(blocks: Blocks) -> None:
    """Mark blocks unchecked if they will be read from the disk again, or were checked long ago."""
    if not blocks.reports_residency or are_resident(blocks.pages):
        blocks.reset_old_checks(CHECKED_FOR_S)
    else:
        blocks.reset_checks()


def merge_pages(addresses: Addresses, n_bytes: Addresses) -> Addresses:
    """Return the memory pages that ranges occupy, merged: uint64[m, 2], (address, bytes), ascending.

    addresses, n_bytes: uint64[n]; two ranges may be equal, but must not overlap otherwise.
    """
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


def check_indices(what: str, numbers: Iterable[int], n: int) -> None:
    for number in numbers:
        if not 0 <= number < n:
            raise IndexError(f"{what} must be 0 to {n - 1}, got {number}")


def damage_message(page: int | None) -> str:
    """Return the description of damage that gather.locate found: a page with a wrong checksum, or None for offsets."""
    return "offsets decrease or exceed the chunk" if page is None else f"CRC-32C of page {page} does not match"
