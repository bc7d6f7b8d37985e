"""Reading of a source from end to end in served order: as ranges of record numbers, and as Arrow batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tiercache.views.contract import Readable

# Records per range of a source with an explicit order. Neighbours lie anywhere: within a range, each block is read
# once.
LISTED_RECORDS = 4096


def spans(source: Readable) -> Iterator[tuple[int, int]]:
    """Yield ranges of record numbers [start, stop), in order; one per block if the source is in stored order."""
    if not source.is_in_stored_order:
        for start in range(0, source.n_records, LISTED_RECORDS):
            yield start, min(start + LISTED_RECORDS, source.n_records)
        return
    for shard in np.flatnonzero(source.shard_records).tolist():
        start = int(source.first_record[shard])
        for n in source.block_tables([shard])[0].records.tolist():
            if n:
                yield start, start + n
            start += n


def arrow_batches(source: Readable) -> Iterator[pa.RecordBatch]:
    """Yield record batches in order.

    A batch refers to the block's memory if its records are one run of the block; otherwise it is a copy.
    """
    schema = source.schema.arrow
    if not source.is_in_stored_order:
        for start, stop in spans(source):
            yield pa.RecordBatch.from_arrays(source.take_arrow(np.arange(start, stop)), schema=schema)
        return
    for shard in np.flatnonzero(source.shard_records).tolist():
        records = source.block_tables([shard])[0].records
        for block in np.flatnonzero(records).tolist():
            rows = _block_rows(source, shard, block, int(records[block]))
            arrays = source.arrays(shard, block)
            if bool((np.diff(rows.astype(np.int64)) == 1).all()):
                arrays = [array.slice(int(rows[0]), len(rows)) for array in arrays]
            else:
                arrays = [array.take(pa.array(rows)) for array in arrays]
            yield pa.RecordBatch.from_arrays(arrays, schema=schema)


def _block_rows(source: Readable, shard: int, block: int, n: int) -> NDArray[np.uint32]:
    where = (np.array([shard], np.int32), np.array([block], np.int32))
    return source.stored_rows(*where, np.zeros(n, np.uint32), np.arange(n, dtype=np.uint32))
