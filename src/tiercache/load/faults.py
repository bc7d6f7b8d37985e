"""Which of a batch's values are not what their column holds, though their checksums are right."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tiercache.errors import CorruptShard, SchemaError
from tiercache.shard.types import Column, Kind, Schema
from tiercache.shard.values import gather_values

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from tiercache.load.window import Loaded

# Shapes have to fit, text has to be UTF-8 and JSON; any bytes are a number, a flag or bytes.
_CHECKED = (Kind.RAGGED, Kind.STR, Kind.JSON)


def bad_cast(schema: Schema, served: Mapping[str, Column], loaded: Loaded, block: int, row: int) -> SchemaError | None:
    """Which column of one row of a window's block has a value that has no equal in its served dtype; None: none has.

    Args:
        schema: of the columns that are served, as stored.
        served: those that are cast.
        loaded: the window.
        block: its number in the window.
        row: its number in the block.
    """
    url = loaded.held[loaded.holder[block]].url
    for column, addresses in _columns(schema, loaded, block):
        if column.name in served:
            try:
                gather_values(column, addresses, *_only(row), url=url, served=served[column.name])
            except SchemaError as error:
                return error
    return None


def bad_value(schema: Schema, loaded: Loaded, block: int, row: int) -> CorruptShard | None:
    """What is wrong with one row of a window's block, which can be read; None if nothing is.

    Args:
        schema: of the columns that are served.
        loaded: the window.
        block: its number in the window.
        row: its number in the block.
    """
    blocks = loaded.held[loaded.holder[block]]
    for column, addresses in _columns(schema, loaded, block):
        if column.kind in _CHECKED:
            try:
                gather_values(column, addresses, *_only(row), url=blocks.url)
            except CorruptShard as error:
                place = int(blocks.blocks[loaded.position[block]])
                return CorruptShard(error.reason, url=blocks.url, block=place, column=column.name)
    return None


def _columns(schema: Schema, loaded: Loaded, block: int) -> Iterator[tuple[Column, NDArray[np.uint64]]]:
    """Each column with the addresses of its streams in one block, uint64[n_streams, 1, 3]."""
    first = 0
    for column in schema.columns:
        stop = first + len(column.streams(0))
        yield column, np.ascontiguousarray(loaded.addresses[first:stop, block : block + 1])
        first = stop


def _only(row: int) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """(block, row) of one row, where there is one block."""
    return np.zeros(1, np.uint32), np.array([row], np.uint32)
