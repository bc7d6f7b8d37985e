"""Rows of a column of an Arrow record batch, by ranges of its file: a large batch can be read in pieces.

Arrow stores a column as buffers, depth first. The rows of a fixed-width column are one range of a buffer; those of a
column of lists or of text are a range of its offsets and, at the values of the first and last of them, a range of its
children. So the offsets at the borders of the pieces must be known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.types as pt
from numpy.typing import NDArray

from tiercache.layouts.contract import Numbers
from tiercache.model import ByteRange

Find: TypeAlias = Callable[[ByteRange], memoryview]
Build: TypeAlias = Callable[[Find], pa.Array]


def storage_of(arrow_type: pa.DataType) -> pa.DataType:
    return arrow_type.storage_type if isinstance(arrow_type, pa.BaseExtensionType) else arrow_type


def children_of(arrow_type: pa.DataType) -> list[pa.DataType]:
    """Return the types of the children of a type in a record batch."""
    stored = storage_of(arrow_type)
    return [] if pt.is_dictionary(stored) else [stored.field(i).type for i in range(stored.num_fields)]


def offset_width(arrow_type: pa.DataType) -> int:
    """Return the bytes of an offset: 4 or 8; 0 for a type without offsets."""
    if pt.is_string(arrow_type) or pt.is_binary(arrow_type) or pt.is_list(arrow_type) or pt.is_map(arrow_type):
        return 4
    large = pt.is_large_string(arrow_type) or pt.is_large_binary(arrow_type) or pt.is_large_list(arrow_type)
    return 8 if large else 0


def count_buffers(arrow_type: pa.DataType) -> int:
    """Return the number of buffers of a column; 0 for a type whose rows cannot be read by ranges."""
    stored = storage_of(arrow_type)
    nested = pt.is_struct(stored) or pt.is_fixed_size_list(stored)
    if pt.is_null(stored) or not (nested or offset_width(stored) or _width_bits(stored)):
        return 0
    children = [count_buffers(child) for child in children_of(stored)]
    return 0 if 0 in children else 1 + (not nested) + _has_data(stored) + sum(children)


def _has_data(stored: pa.DataType) -> bool:
    return bool(offset_width(stored)) and not stored.num_fields


def _width_bits(stored: pa.DataType) -> int:
    return (
        stored.bit_width if pt.is_primitive(stored) or pt.is_decimal(stored) or pt.is_fixed_size_binary(stored) else 0
    )


def cut_children(
    arrow_type: pa.DataType,
    rows: Numbers,
    buffers: Iterator[ByteRange],
    offsets_at: Callable[[ByteRange, int, Numbers], Numbers],
) -> Iterator[Numbers]:
    """Yield, for each node with offsets, their values at these rows.

    offsets_at(buffer, width, rows) returns the offsets at rows of a buffer.
    """
    stored = storage_of(arrow_type)
    next(buffers)
    width = offset_width(stored)
    if width:
        rows = offsets_at(next(buffers), width, rows)
        yield rows
        if _has_data(stored):
            next(buffers)
    elif pt.is_fixed_size_list(stored):
        rows = rows * stored.list_size
    elif _width_bits(stored):
        next(buffers)
    for child in children_of(stored):
        yield from cut_children(child, rows, buffers, offsets_at)


class RowRanges:
    """The ranges of rows of columns: `ranges` after rows_of() was called for each column.

    buffers: of the record batch, in order. cuts: first and last offset of each node with offsets, [n_nodes, 2].
    """

    def __init__(self, buffers: Iterator[ByteRange], cuts: Iterator[Sequence[int]]) -> None:
        self._buffers, self._cuts = buffers, cuts
        self.ranges: list[ByteRange] = []

    def skip(self, arrow_type: pa.DataType) -> None:
        """Leave out a column."""
        n_ranges = len(self.ranges)
        self.rows_of(arrow_type, 0, 0)
        del self.ranges[n_ranges:]

    def _span(self, start: int, n_bytes: int) -> Callable[[Find], NDArray[np.uint8]]:
        one = ByteRange(start, start + n_bytes)
        if not n_bytes:
            return lambda _: np.zeros(0, np.uint8)
        self.ranges.append(ByteRange(start - start % 8, one.end))  # so that memory is aligned as the file is
        return lambda find: np.frombuffer(find(one), np.uint8)

    def _bits(self, buffer: ByteRange, start: int, n: int) -> Callable[[Find], Any]:
        first = start // 8
        get = self._span(buffer.start + first, -(-(start + n) // 8) - first)
        if start % 8 == 0:
            return get
        return lambda find: np.packbits(np.unpackbits(get(find), bitorder="little")[start % 8 :][:n], bitorder="little")

    def rows_of(self, arrow_type: pa.DataType, start: int, n: int) -> Build:
        """Return how to build the array of rows [start, start + n) of the next column from the ranges."""
        stored = storage_of(arrow_type)
        validity = next(self._buffers)
        parts: list[Callable[[Find], Any]] = []
        is_valid = self._bits(validity, start, n) if validity.n_bytes and n else None
        width, children = offset_width(stored), children_of(stored)
        if width:
            offsets, (first, last) = next(self._buffers), next(self._cuts)
            parts.append(self._offsets(offsets, width, start, n, first))
            if children:
                start, n_children = first, last - first
            else:
                parts.append(self._span(next(self._buffers).start + first, last - first))
        elif pt.is_fixed_size_list(stored):
            start, n_children = start * stored.list_size, n * stored.list_size
        elif children or pt.is_struct(stored):
            n_children = n
        elif pt.is_boolean(stored):
            parts.append(self._bits(next(self._buffers), start, n))
        else:
            n_bytes = _width_bits(stored) // 8
            parts.append(self._span(next(self._buffers).start + start * n_bytes, n * n_bytes))
        inner = [self.rows_of(child, start, n_children) for child in children]

        def build(find: Find) -> pa.Array:
            buffers = [None if is_valid is None else pa.py_buffer(is_valid(find))]
            buffers += [pa.py_buffer(part(find)) for part in parts]
            return pa.Array.from_buffers(
                stored, n, buffers, -1 if is_valid else 0, children=[one(find) for one in inner]
            )

        return build

    def _offsets(self, buffer: ByteRange, width: int, start: int, n: int, first: int) -> Callable[[Find], Any]:
        get = self._span(buffer.start + width * start, width * (n + 1) if n else 0)
        dtype = f"<i{width}"

        def build(find: Find) -> Any:
            found = get(find).view(dtype)
            return found - found.dtype.type(first) if first else found if n else np.zeros(1, dtype)

        return build
