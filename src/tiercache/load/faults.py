"""Search for the value of a batch that is invalid although its checksum is right."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tiercache.errors import CorruptShard, SchemaError
from tiercache.shard.read.values import gather_values
from tiercache.shard.schema import Column, Kind, Schema

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from tiercache.load.window import LoadedWindow

# Shapes must fit, text must be UTF-8, JSON must parse. Any bytes are a valid number, flag or bytes value.
_CHECKED = (Kind.RAGGED, Kind.STR, Kind.JSON)


def bad_cast(
    schema: Schema, served: Mapping[str, Column], loaded: LoadedWindow, block: int, row: int
) -> SchemaError | None:
    """Return the error of a row's value that its served dtype cannot represent; None if there is none.

    Args:
        schema: Served columns, as stored.
        served: Columns that are cast, by name.
        loaded: Loaded window.
        block: Number of the block in the window.
        row: Number of the row in the block.
    """
    url = loaded.block_groups[loaded.group_of_block[block]].url
    for column, addresses in _columns(schema, loaded, block):
        if column.name in served:
            try:
                gather_values(column, addresses, *_only(row), url=url, served=served[column.name])
            except SchemaError as error:
                return error
    return None


def bad_value(schema: Schema, loaded: LoadedWindow, block: int, row: int) -> CorruptShard | None:
    """Return the error of a row that can be read and has an invalid value; None if there is none.

    Args:
        schema: Served columns.
        loaded: Loaded window.
        block: Number of the block in the window.
        row: Number of the row in the block.
    """
    blocks = loaded.block_groups[loaded.group_of_block[block]]
    for column, addresses in _columns(schema, loaded, block):
        if column.kind in _CHECKED:
            try:
                gather_values(column, addresses, *_only(row), url=blocks.url)
            except CorruptShard as error:
                place = int(blocks.blocks[loaded.position[block]])
                return CorruptShard(error.reason, url=blocks.url, block=place, column=column.name)
    return None


def _columns(schema: Schema, loaded: LoadedWindow, block: int) -> Iterator[tuple[Column, NDArray[np.uint64]]]:
    """Yield each column with the addresses of its streams in one block, uint64[n_streams, 1, 3]."""
    first = 0
    for column in schema.columns:
        stop = first + len(column.streams(0))
        yield column, np.ascontiguousarray(loaded.addresses[first:stop, block : block + 1])
        first = stop


def _only(row: int) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Return (block, row) arrays for one row of a single block."""
    return np.zeros(1, np.uint32), np.array([row], np.uint32)
