"""What users see: numpy arrays, bytes, text and objects, gathered from blocks of any number of shards.

All arrays are new, writable and owned by the caller. A null is None in a record; in a batch it is zero (None in a
list), and "<column>.valid" says which are none.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tiercache._native import gather
from tiercache.errors import CorruptShard, SchemaError
from tiercache.shard.blocks import Blocks
from tiercache.shard.types import Column, Kind

Places: TypeAlias = npt.NDArray[np.uint32]
Addresses: TypeAlias = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class ColumnValues:
    """n values of a column: an array [n, ...], a bfloat16 torch tensor, or a list.

    valid: bool[n] if the column is nullable.
    """

    column: Column
    values: Any
    valid: npt.NDArray[np.bool_] | None = None

    def record(self, index: int) -> Any:
        """One value, in memory of its own; None for a null."""
        if self.valid is not None and not self.valid[index]:
            return None
        value = self.values[index]
        if len(self.values) > 1 and isinstance(value, np.ndarray):
            return value.copy()
        return value.clone() if hasattr(value, "clone") else value


def gather_values(column: Column, addresses: Addresses, block: Places, row: Places, *, url: str) -> ColumnValues:
    """Rows of a column (not ARROW) of blocks anywhere.

    Args:
        column: what they are.
        addresses: uint64[streams of the column, n_blocks, 2], as Blocks.of_column(); kept alive by the caller.
        block: uint32[n], below n_blocks.
        row: uint32[n], below the rows of that block.
        url: for errors.

    Raises:
        CorruptShard: the mapping cannot be read, or the values are not what the column holds.
        SchemaError: bfloat16 without torch.
    """
    with corrupt_as(column, url):
        valid = None
        if column.nullable:
            flags = np.empty(len(row), np.uint8)
            gather.gather(gather.BITS, 0, addresses[-1], block, row, flags)
            valid = flags.view(np.bool_)
        values = _HOW[column.kind](column, addresses, block, row)
        if valid is not None and not valid.all():
            _blank(values, valid)
    return ColumnValues(column, values, valid)


@contextmanager
def corrupt_as(column: Column, url: str) -> Iterator[None]:
    """Errors of reading values as CorruptShard."""
    try:
        yield
    except OSError as error:
        raise CorruptShard(f"the local copy cannot be read: {error.strerror}", url=url, column=column.name) from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError, _NotAShapeError) as error:
        raise CorruptShard(str(error), url=url, column=column.name) from error


class _NotAShapeError(ValueError):
    """A ragged record's shape does not multiply to its elements."""


def _blank(values: Any, valid: npt.NDArray[np.bool_]) -> None:
    if isinstance(values, list):
        for index in np.flatnonzero(~valid).tolist():
            values[index] = None
    elif isinstance(values, np.ndarray):
        values[~valid] = 0
    else:
        for index in np.flatnonzero(~valid).tolist():  # a torch tensor
            values[index] = 0


def _fixed(addresses: Addresses, width_bytes: int, block: Places, row: Places) -> npt.NDArray[np.uint8]:
    out = np.empty(len(row) * width_bytes, np.uint8)
    if width_bytes:
        gather.gather(gather.FIXED, width_bytes, addresses, block, row, out)
    return out


def _numbers(column: Column, addresses: Addresses, block: Places, row: Places) -> Any:
    out = _fixed(addresses[0], column.row_bytes, block, row)
    return _as_dtype(column, out.view(column.stored).reshape(len(row), *(d or 0 for d in column.shape)))


def _as_dtype(column: Column, stored: npt.NDArray[Any]) -> Any:
    """Stored elements as elements of the column's dtype."""
    if column.dtype == "bool":
        return stored != 0
    if column.dtype != "bfloat16":
        return stored
    torch = sys.modules.get("torch")
    if torch is None:
        message = "values of dtype bfloat16 are torch tensors: import torch first (numpy has no such dtype)"
        raise SchemaError(message, column=column.name, expected="torch", got="no torch")
    return torch.from_numpy(stored.view(np.int16)).view(torch.bfloat16)


def _bools(_: Column, addresses: Addresses, block: Places, row: Places) -> npt.NDArray[np.bool_]:
    flags = np.empty(len(row), np.uint8)
    gather.gather(gather.BITS, 0, addresses[0], block, row, flags)
    return flags.view(np.bool_)


def _ragged(column: Column, addresses: Addresses, block: Places, row: Places) -> list[Any]:
    offsets = gather.measure(addresses[0], block, row)
    flat = np.empty(int(offsets[-1]) * column.stored.itemsize, np.uint8)
    gather.gather(gather.VAR, column.stored.itemsize, addresses[0], block, row, flat, offsets)
    n_dimensions = len(column.shape)
    shapes = _fixed(addresses[1], 4 * n_dimensions, block, row).view(np.dtype("<i4")).reshape(len(row), n_dimensions)
    _check_shapes(column, shapes, np.diff(offsets))
    elements = _as_dtype(column, flat.view(column.stored))
    bounds, dimensions = offsets.tolist(), shapes.tolist()
    return [
        elements[start:end].reshape(shape) for start, end, shape in zip(bounds, bounds[1:], dimensions, strict=False)
    ]


def _check_shapes(column: Column, shapes: npt.NDArray[Any], lengths: npt.NDArray[np.int64]) -> None:
    # int64 may wrap to the right number; float64 cannot, and is exact where it is right
    wrong = (shapes < 0).any(axis=1) | (shapes.prod(axis=1, dtype=np.int64) != lengths)
    wrong |= shapes.prod(axis=1, dtype=np.float64) != lengths
    for number, dimension in enumerate(column.shape):
        if dimension is not None:
            wrong |= shapes[:, number] != dimension
    if wrong.any():
        index = int(np.argmax(wrong))
        raise _NotAShapeError(
            f"{lengths[index]} elements of the shape {tuple(shapes[index].tolist())} are not {column}"
        )


def _bytes(_: Column, addresses: Addresses, block: Places, row: Places) -> list[Any]:
    return gather.gather_bytes(addresses[0], block, row)


def _texts(_: Column, addresses: Addresses, block: Places, row: Places) -> list[Any]:
    return gather.gather_str(addresses[0], block, row)


def _objects(_: Column, addresses: Addresses, block: Places, row: Places) -> list[Any]:
    # below a null there is no text to parse
    return [json.loads(text) if text else None for text in gather.gather_bytes(addresses[0], block, row)]


_HOW = {
    Kind.SCALAR: _numbers,
    Kind.TENSOR: _numbers,
    Kind.BOOL: _bools,
    Kind.RAGGED: _ragged,
    Kind.BYTES: _bytes,
    Kind.IMAGE: _bytes,
    Kind.STR: _texts,
    Kind.JSON: _objects,
}


def arrow_values(column: Column, arrays: Sequence[pa.Array], block: Places, row: Places) -> ColumnValues:
    """Rows of an ARROW column as Python objects. arrays: one a block; block, row: uint32[n].

    Raises:
        SchemaError: a value that Python has no object for, such as a timestamp of the year 20000.
    """
    values: list[Any] = [None] * len(row)
    for number in np.unique(block).tolist():
        places = np.flatnonzero(block == number)
        try:
            found = arrays[number].take(pa.array(row[places])).to_pylist()
        except (OverflowError, ValueError) as error:
            message = f"Python cannot hold a value of the type {column}: {error}; read it as Arrow, with to_arrow()"
            raise SchemaError(message, column=column.name) from error
        for place, value in zip(places.tolist(), found, strict=True):
            values[place] = value
    valid = np.array([value is not None for value in values], np.bool_) if column.nullable else None
    return ColumnValues(column, values, valid)


def block_values(blocks: Blocks, columns: Sequence[int], block: Places, row: Places) -> list[ColumnValues]:
    """Rows of columns of loaded blocks.

    columns: indices in the schema, all loaded; block: uint32[n], positions in blocks.blocks.
    """
    found = []
    for number in columns:
        column = blocks.schema.columns[number]
        if column.kind is Kind.ARROW:
            arrays = [blocks.array(position, number) for position in range(len(blocks.blocks))]
            found.append(arrow_values(column, arrays, block, row))
        else:
            found.append(gather_values(column, blocks.of_column(number), block, row, url=blocks.url))
    return found


def as_batch(columns: Sequence[ColumnValues]) -> dict[str, Any]:
    """What dataset[[...]] gives: column -> array or list, and "<column>.valid" of nullable ones."""
    batch: dict[str, Any] = {}
    for values in columns:
        batch[values.column.name] = values.values
        if values.valid is not None:
            batch[f"{values.column.name}.valid"] = values.valid
    return batch


def as_records(columns: Sequence[ColumnValues]) -> list[dict[str, Any]]:
    """What dataset[i] gives, for each of the n records."""
    n = len(columns[0].values) if columns else 0
    return [{values.column.name: values.record(index) for values in columns} for index in range(n)]
