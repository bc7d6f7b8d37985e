"""Parts of some memory, such as the values of a column between others, copied together without the GIL."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tiercache._native import gather
from tiercache.layouts.contract import Numbers
from tiercache.shard.codec import address_of

Bytes = NDArray[np.uint8]


def take_spans(memory: Bytes, starts: Numbers, ends: Numbers) -> tuple[Bytes, Numbers]:
    """Return the bytes [starts[i], ends[i]) of some memory, one after the other, and their offsets, int64[n + 1].

    Parts that follow each other in the memory are not copied. Raises ValueError for a part outside of the memory.
    """
    n, lengths = len(starts), ends - starts
    if n and (int(starts.min()) < 0 or int(lengths.min()) < 0 or int(ends.max()) > len(memory)):
        raise ValueError("a value extends beyond its record")
    offsets = np.zeros(n + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    if n and np.array_equal(starts[1:], ends[:-1]):
        return memory[int(starts[0]) : int(ends[-1])], offsets
    out = np.empty(int(offsets[-1]), np.uint8)
    if len(out):
        # Rows 0, 2, 4, ... of a stream whose offsets are all bounds: the rows between are what lies between the parts.
        bounds = np.stack([starts, ends], axis=1).reshape(-1)
        source = np.array([[address_of(memory), address_of(bounds), len(memory)]], np.uint64)
        rows = np.arange(0, 2 * n, 2, dtype=np.uint32)
        gather.gather(gather.VAR, 1, source, np.zeros(n, np.uint32), rows, out, offsets)
    return out, offsets


def bytes_at(memory: Bytes, starts: Numbers, ends: Numbers, width: int) -> Bytes:
    """Return the first `width` bytes of each part: uint8[n, width]. Raises ValueError for a part that is shorter."""
    if len(starts) and (int((ends - starts).min()) < width or int(starts.min()) < 0 or int(ends.max()) > len(memory)):
        raise ValueError("a value is shorter than its header")
    found: Bytes = memory[starts[:, None] + np.arange(width)]
    return found


def text_array(memory: Bytes, starts: Numbers, ends: Numbers, valid: NDArray[np.bool_] | None = None) -> pa.Array:
    """Return parts as Arrow text, which is not checked to be UTF-8. Raises as take_spans()."""
    values, offsets = take_spans(memory, starts, ends)
    bits = None if valid is None else pa.py_buffer(np.packbits(valid, bitorder="little"))
    buffers = [bits, pa.py_buffer(offsets), pa.py_buffer(values)]
    return pa.Array.from_buffers(pa.large_string(), len(starts), buffers)
