"""The loader's access to a data set: `Records` as its source, and the error that names a record of it.

load/ knows neither stores nor caches, only `Records`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from tiercache.errors import CorruptShard, TierCacheError
from tiercache.model import CloseListener, SourcePart
from tiercache.views import Records as Source

if TYPE_CHECKING:
    from tiercache.load.output_spec import OutputSpec

__all__ = ["CloseListener", "Source", "SourcePart"]


@dataclass(frozen=True, slots=True)
class NativeAccess:
    """What a tiercache data set gives to the loader, by its method `__tiercache__`.

    Attributes:
        source: The records that are read.
        output_spec: Layouts, fill values, casts and decoders of the columns.
        is_plain: Whether records are served as stored: no transform, and no subclass that overrides record access.
        with_source: Function that returns the same data set over another source.
    """

    source: Source
    output_spec: OutputSpec
    is_plain: bool
    with_source: Callable[[Any], Any]


@runtime_checkable
class NativeDataset(Protocol):
    """A data set that the loader reads by its native path: `tiercache.Dataset`."""

    def __len__(self) -> int: ...

    def __tiercache__(self) -> NativeAccess:
        """Return what the loader reads."""


def native_access(dataset: object) -> NativeAccess | None:
    """Return the access to a tiercache data set; None for any other data set."""
    return dataset.__tiercache__() if isinstance(dataset, NativeDataset) else None


def record_number(source: Source, shard: int, block: int, row: int) -> int:
    """Return the number, in stored order, of the record in a row of a block of a shard. May read a footer."""
    before = source.block_tables([shard])[0].records[:block].sum() + source.shard_records[:shard].sum()
    return int(before) + row


def image_decode_error(source: Source, column: str, record: int, reason: str) -> CorruptShard:
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
    message = f"record {record}: the image cannot be decoded: {reason}"
    return CorruptShard(message, url=url, block=block, column=column, record=record)
