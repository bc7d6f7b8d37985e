"""The error of an image that cannot be decoded, with the location of its record."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tiercache.errors import CorruptShard, TierCacheError

if TYPE_CHECKING:
    from tiercache.load.source import Source


def record_number(source: Source, shard: int, block: int, row: int) -> int:
    """Return the number, in stored order, of the record in a row of a block of a shard. May read a footer."""
    before = source.block_tables([shard])[0].records[:block].sum() + source.shard_records[:shard].sum()
    return int(before) + row


def image_decode_error(source: Source, column: str, record: int, said: str) -> CorruptShard:
    """Return the error of an image that cannot be decoded: url, block, column, record and the decoder's message."""
    ends = np.cumsum(source.shard_records)
    shard = int(np.searchsorted(ends, record, side="right"))
    within = record - int(ends[shard] - source.shard_records[shard])
    block_ends = np.cumsum(source.block_tables([shard])[0].records)
    block = int(np.searchsorted(block_ends, within, side="right"))
    try:
        url = source.load(shard, [block]).url
    except TierCacheError:  # The shard can no longer be read; the image's error is the one to report.
        url = source.url
    message = f"record {record}: the image cannot be decoded: {said}"
    return CorruptShard(message, url=url, block=block, column=column, record=record)
