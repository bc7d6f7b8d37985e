"""Where a picture lies that cannot be decoded, as an error that names it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tiercache.errors import CorruptShard, TierCacheError

if TYPE_CHECKING:
    from tiercache.load.source import Source
    from tiercache.order import EpochOrder


def record_at(order: EpochOrder, source: Source, position: int) -> int:
    """The record, by its number in the data set, that an order has at a position. May read a footer."""
    window = order.window_at(position)
    blocks, rows = window.rows(position - window.start, position - window.start + 1)
    shard, block = int(window.shards[blocks[0]]), int(window.blocks[blocks[0]])
    before = source.block_tables([shard])[0].records[:block].sum() + source.shard_records[:shard].sum()
    return int(before) + int(rows[0])


def broken_picture(source: Source, column: str, record: int, said: str) -> CorruptShard:
    """The error of a picture that cannot be decoded: url, block, column, record, and what the decoder said."""
    ends = np.cumsum(source.shard_records)
    shard = int(np.searchsorted(ends, record, side="right"))
    within = record - int(ends[shard] - source.shard_records[shard])
    block_ends = np.cumsum(source.block_tables([shard])[0].records)
    block = int(np.searchsorted(block_ends, within, side="right"))
    try:
        url = source.load(shard, [block]).url
    except TierCacheError:  # the shard can no longer be read; the picture's error is the one to tell
        url = source.url
    message = f"record {record}: the picture cannot be decoded: {said}"
    return CorruptShard(message, url=url, block=block, column=column, record=record)
