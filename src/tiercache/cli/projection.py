"""Byte ranges of shards that hold some columns, read from the shards' footers in parallel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from tiercache.shard.read.source import column_ranges, fetch_footer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from tiercache.cli.opening import OpenDataSet
    from tiercache.cli.output import Advance
    from tiercache.model import ByteRange

# Footers are a few KiB, so the time to read them is round trips.
FOOTER_THREADS = 16


def read_column_ranges(
    data_set: OpenDataSet, shards: NDArray[np.int64], columns: Sequence[str], advance: Advance
) -> Mapping[str, tuple[ByteRange, ...]]:
    """Return the ranges of the columns, by shard name; shards of which nearly all bytes are needed are left out.

    Args:
        data_set: Version whose shards are read.
        shards: Numbers of the shards, int64[m].
        columns: Names of the columns.
        advance: Called with the number of footers read, and their total.

    Raises:
        SchemaError: There is no such column.
        NotFound, StoreError, CorruptShard: A footer cannot be read.
    """
    schema = data_set.version.schema
    numbers = [schema.index(name) for name in schema.select(columns).names]
    infos = [data_set.shards.info(i) for i in shards.tolist()]
    ranges: dict[str, tuple[ByteRange, ...]] = {}
    with ThreadPoolExecutor(FOOTER_THREADS, "tiercache-footer") as pool:
        footers = pool.map(lambda info: fetch_footer(data_set.store, info.name, info), infos)
        for n_done, (info, footer) in enumerate(zip(infos, footers, strict=True), start=1):
            found = column_ranges(footer, info, numbers)
            if found is not None:
                ranges[info.name] = found
            advance(n_done, len(infos))
    return ranges
