"""Which of a batch's values are not what their column holds, though their checksums are right."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tiercache.errors import CorruptShard, SchemaError
from tiercache.shard.types import Column, Kind, Schema
from tiercache.shard.values import gather_values

if TYPE_CHECKING:
    from collections.abc import Mapping

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
    blocks = loaded.held[loaded.holder[block]]
    first, nowhere = 0, np.zeros(1, np.uint32)
    for column in schema.columns:
        n_streams = len(column.streams(0))
        if column.name in served:
            addresses = np.ascontiguousarray(loaded.addresses[first : first + n_streams, block : block + 1])
            place = addresses, nowhere, np.array([row], np.uint32)
            try:
                gather_values(column, *place, url=blocks.url, served=served[column.name])
            except SchemaError as error:
                return error
        first += n_streams
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
    first, nowhere = 0, np.zeros(1, np.uint32)
    for column in schema.columns:
        n_streams = len(column.streams(0))
        if column.kind in _CHECKED:
            addresses = np.ascontiguousarray(loaded.addresses[first : first + n_streams, block : block + 1])
            try:
                gather_values(column, addresses, nowhere, np.array([row], np.uint32), url=blocks.url)
            except CorruptShard as error:
                place = int(blocks.blocks[loaded.position[block]])
                return CorruptShard(error.reason, url=blocks.url, block=place, column=column.name)
        first += n_streams
    return None
