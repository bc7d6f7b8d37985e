"""The ring's description of a schema: the kind of each stream, and the table of column layouts and fill values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tiercache._native import gather
from tiercache.load.fills import stream_fills
from tiercache.load.serving import OutputSpec, is_stack_of_rows
from tiercache.shard.conversion import cast_kind, size_ratio
from tiercache.shard.schema import Column, Kind, Schema

if TYPE_CHECKING:
    from numpy.typing import NDArray

PADDED = 4  # csrc/forms.h
# Words of a stream's row in the table of layouts (struct tc_form).
_EARLY, _VALID, _FILL, _FILL_BYTES, _SHAPE, _DIMS, _N_DIMS, _IN_ROWS, _N_WORDS = range(9)
_NONE = 2**64 - 1
_BYTES_LIKE = (Kind.BYTES, Kind.STR, Kind.IMAGE, Kind.JSON)


def gather_streams(schema: Schema, serving: OutputSpec | None = None) -> NDArray[np.uint32]:
    """Return (kind, width in bytes) of each stream of the columns, uint32[n_streams, 2], as the ring takes them.

    schema: as stored. The higher bytes of a kind state how its column is cast.
    """
    served = serving or OutputSpec()
    streams: list[tuple[int, int]] = []
    for column in schema.columns:
        for stream in column.streams(0):
            kind = _values_kind(column, served) if stream.role == "values" else None
            kind = stream.kind if kind is None else kind
            if stream.role == "values":
                kind = cast_kind(kind, column, served.column(column))
            streams.append((kind, stream.width_bytes))
    return np.array(streams, np.uint32).reshape(-1, 2)


def _values_kind(column: Column, serving: OutputSpec) -> int | None:
    """Return the kind of a stream of values if it differs from the stored one."""
    form = serving.layout(column)
    if form == "padded":
        return PADDED
    return gather.REF if form == "list" and column.kind in (Kind.BYTES, Kind.IMAGE) else None


def slot_bytes(streams: NDArray[np.uint32], n_rows: int) -> int:
    """Return the bytes of a batch's streams that are known in advance (only the offsets for varying lengths)."""
    widths = {gather.FIXED: 0, gather.BITS: 1, gather.VAR: 8, gather.REF: 16, PADDED: 16}
    sizes = []
    for kind, width in streams.tolist():
        size = widths[kind & 0xFF] or width
        is_of_elements = kind & 0xFF in (gather.FIXED, gather.BITS)
        sizes.append((size * size_ratio(kind) if is_of_elements else size) * n_rows)
    return sum(-(-(int(size) + 8) // 64) * 64 for size in sizes)


def layout_table(schema: Schema, serving: OutputSpec) -> NDArray[np.uint64] | None:
    """Return the table of column layouts and fill values, as Plan takes it; None if no stream needs it.

    Returns:
        uint64[n]: a struct tc_form for each stream, followed by the data that they point to, in the same array. So the
        array must not be copied or moved.
    """
    tail = bytearray()
    rows: list[list[int]] = []
    for column in schema.columns:
        rows += _column_rows(column, serving, len(rows), tail)
    if not any(row[_EARLY] or row[_N_DIMS] or row[_VALID] != _NONE for row in rows):
        return None
    table = np.zeros(len(rows) * _N_WORDS + len(tail) // 8, np.uint64)
    n_words = len(rows) * _N_WORDS
    words = table[:n_words].reshape(-1, _N_WORDS)
    words[:] = rows
    words[:, [_FILL, _DIMS]] += np.uint64(table.ctypes.data + 8 * n_words)
    table[n_words:] = np.frombuffer(tail, np.uint64)
    return table


def _column_rows(column: Column, serving: OutputSpec, first: int, tail: bytearray) -> list[list[int]]:
    """Return a column's rows of the table; its streams begin with number `first`. Pointers are offsets into `tail`."""
    column = serving.column(column)  # fill values have the served dtype; a cast column has the same streams
    streams, form = column.streams(0), serving.layout(column)
    rows = [[0, _NONE, 0, 0, _NONE, 0, 0, 0] for _ in streams]
    if not rows:
        return rows
    ragged = column.kind is Kind.RAGGED
    if column.name in serving.nulls:
        for row, fill in zip(rows, stream_fills(column, serving.nulls[column.name]), strict=False):
            row[_VALID], row[_FILL], row[_FILL_BYTES] = first + len(streams) - 1, _put(tail, fill), len(fill)
        rows[-1][_EARLY] = 1
    if ragged or form == "padded":
        dims = np.array([-1 if d is None else d for d in column.shape] or [-1], np.int64)
        rows[0][_DIMS], rows[0][_N_DIMS] = _put(tail, dims.tobytes()), len(dims)
    if ragged:
        rows[0][_SHAPE] = first + 1
        rows[0][_IN_ROWS] = int(form in ("buffer", "nested") and is_stack_of_rows(column))
        rows[1][_EARLY] = 1
    return rows


def _put(tail: bytearray, data: Any) -> int:
    """Append data to the tail at a multiple of 8 bytes; return its offset."""
    start = len(tail)
    tail += data
    tail += bytes(-len(tail) % 8)
    return start
