"""Blocks: loaded, checked and decoded blocks as addresses for the native gather and as Arrow arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tiercache._native import gather
from tiercache.errors import CorruptShard
from tiercache.shard.chunks import Addresses, LoadedChunks
from tiercache.shard.layout import Footer
from tiercache.shard.nested import build_array
from tiercache.shard.types import Kind, Schema, Stream


@dataclass(frozen=True, slots=True)
class _Memory:
    """What Arrow buffers keep alive: everything that owns the bytes they point at."""

    owners: tuple[Any, ...]


class Blocks:
    """Some blocks of a shard, some columns of each.

    Immutable and thread-safe; keeps its memory and lease until it is dropped.

    blocks: their numbers; columns: indices in the shard's schema; n_rows: int64[n_blocks]; streams: of the columns,
    in order; addresses: uint64[n_streams, n_blocks, 2], (values, offsets) of each, 0 for none, ready for the native
    gather.
    """

    def __init__(
        self, footer: Footer, url: str, blocks: tuple[int, ...], columns: tuple[int, ...], loaded: LoadedChunks
    ) -> None:
        self.schema: Schema = footer.schema
        self.url = url
        self.blocks = blocks
        self.columns = columns
        self.private_bytes = loaded.private_bytes
        self.n_rows: npt.NDArray[np.int64] = footer.block_records[list(blocks)].astype(np.int64)
        self.streams: tuple[Stream, ...] = tuple(s for c in columns for s in footer.schema.columns[c].streams(c))
        self._footer = footer
        self._bases = loaded.addresses.reshape(len(blocks), len(columns))
        self._memory = _Memory(tuple(loaded.owners))
        self._arrays: dict[tuple[int, int], pa.Array] = {}
        self.addresses = self._find()

    def _find(self) -> Addresses:
        addresses = np.zeros((len(self.streams), len(self.blocks), 2), np.uint64)
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
        return addresses

    def of_column(self, column: int) -> Addresses:
        """The part of addresses that belongs to a column of the schema: uint64[its streams, n_blocks, 2]."""
        numbers = [number for number, stream in enumerate(self.streams) if stream.column == column]
        return self.addresses[numbers[0] : numbers[-1] + 1] if numbers else self.addresses[:0]

    def n_elements(self, stream: int, position: int) -> int:
        """Elements that a VAR stream (a number in `streams`) has in a block (a position in `blocks`)."""
        found = self.streams[stream]
        row = self._footer.chunks[self.blocks[position], found.column]
        n_bytes = int(self._footer.buffers[int(row["first_buffer"]) + found.values_buffer, 1])
        return n_bytes // found.width_bytes

    def array(self, position: int, column: int) -> pa.Array:
        """A block's column as an Arrow array over the block's memory, without a copy; it keeps the memory alive.

        Args:
            position: in `blocks`.
            column: index in the schema.

        Raises:
            CorruptShard: a nested column whose buffers contradict each other.
        """
        key = (position, column)
        if key not in self._arrays:
            self._arrays[key] = self._build(position, column)
        return self._arrays[key]

    def _build(self, position: int, column: int) -> pa.Array:
        block, kind = self.blocks[position], self.schema.columns[column]
        n_nodes, n_buffers = kind.layout()
        row = self._footer.chunks[block, column]
        nodes = self._footer.nodes[int(row["first_node"]) :][:n_nodes].tolist()
        base = int(self._bases[position, self.columns.index(column)])
        buffers = [
            pa.foreign_buffer(base + offset, length, self._memory)
            for offset, length in self._footer.buffers[int(row["first_buffer"]) :][:n_buffers].tolist()
        ]
        try:
            array = build_array(kind.storage_type, iter(nodes), iter(buffers))
            if kind.kind is Kind.ARROW:
                array.validate(full=True)
        except (pa.ArrowException, ValueError) as error:
            raise CorruptShard(
                f"not an array of {kind}: {error}", url=self.url, block=block, column=kind.name
            ) from error
        if isinstance(kind.arrow.type, pa.BaseExtensionType):
            return pa.ExtensionArray.from_storage(kind.arrow.type, array)
        return array


def check_offsets(blocks: Blocks, stream: int, position: int) -> None:
    """See that the offsets of a VAR stream (a number in blocks.streams) rise and stay inside its block's values.

    Raises:
        CorruptShard: they do not, or the mapping cannot be read.
    """
    column = blocks.schema.columns[blocks.streams[stream].column].name
    address, n_rows = int(blocks.addresses[stream, position, 1]), int(blocks.n_rows[position])
    try:
        fits = gather.offsets_ok(address, n_rows, blocks.n_elements(stream, position))
    except OSError as error:
        message = f"the local copy cannot be read: {error.strerror}"
        raise CorruptShard(message, url=blocks.url, block=blocks.blocks[position], column=column) from error
    if not fits:
        message = "offsets fall, or point outside the chunk"
        raise CorruptShard(message, url=blocks.url, block=blocks.blocks[position], column=column)
