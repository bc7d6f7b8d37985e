"""Computes the byte ranges of a shard that some of its columns occupy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tiercache.model import ByteRange

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tiercache.model import ShardInfo
    from tiercache.shard.layout import Footer

# Columns that occupy at least 15/16 of a shard are not fetched by ranges: the whole shard takes the same time, and
# other readers can use it.
_MOST, _OF = 15, 16
# Ranges with a smaller gap are merged, because the bytes between cost less than another request.
_GAP_BYTES = 16 << 10


def column_ranges(footer: Footer, info: ShardInfo, columns: Sequence[int]) -> tuple[ByteRange, ...] | None:
    """Return the ranges of all blocks of these columns and of the footer; None if they are nearly the whole shard."""
    chunks = footer.chunks[:, list(columns)].ravel()
    starts = np.sort(chunks["offset"].astype(np.int64))
    ends = (chunks["offset"] + chunks["stored"]).astype(np.int64)[np.argsort(chunks["offset"], kind="stable")]
    starts, ends = np.append(starts, info.footer_offset), np.append(ends, info.n_bytes)
    breaks = np.flatnonzero(starts[1:] > ends[:-1] + _GAP_BYTES) + 1
    first, last = np.append(0, breaks), np.append(breaks, len(starts)) - 1
    if int((ends[last] - starts[first]).sum()) * _OF >= info.n_bytes * _MOST:
        return None
    return tuple(map(ByteRange, starts[first].tolist(), ends[last].tolist()))
