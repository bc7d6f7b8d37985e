"""Records one by one into batches: checked values of each column, until they are about a block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tiercache.errors import SchemaError
from tiercache.shard.cutter import Parts
from tiercache.shard.fit import MisfitError
from tiercache.shard.ingest import build_part, converter
from tiercache.shard.parts import Part
from tiercache.shard.spec import Kind
from tiercache.shard.types import Column


class RecordBuffer:
    """Records that are not written yet, in memory of its own. One thread."""

    def __init__(self, columns: tuple[Column, ...], block_bytes: int) -> None:
        self._converters = [(column.name, column, converter(column)) for column in columns]
        self._values: list[_Values] = [_Rows(c) if c.kind is Kind.TENSOR else _List(c) for c in columns]
        self._block_bytes = block_bytes
        self._n_bytes = 0
        self.n_records = 0

    @property
    def full(self) -> bool:
        """Whether it holds about a block."""
        return self._n_bytes >= self._block_bytes

    def add(self, record: Mapping[str, Any], number: int) -> None:
        """Keep a record, which has no other names than the columns'. number: its own, for the error.

        Raises:
            SchemaError: a value does not fit; nothing of the record is kept.
        """
        converted = []
        for name, column, convert in self._converters:
            try:
                converted.append(convert(record.get(name)))
            except MisfitError as error:
                raise misfit_error(column, error, number) from error
        for values, value in zip(self._values, converted, strict=True):
            self._n_bytes += values.append(value)
        self.n_records += 1

    def take(self) -> Parts:
        """All records, as parts that are valid until the next add()."""
        parts = [values.take() for values in self._values]
        self._n_bytes = self.n_records = 0
        return parts


def misfit_error(column: Column, error: MisfitError, record: int) -> SchemaError:
    """A misfit as the error that users see. record: its number in the whole input."""
    return SchemaError(str(error), column=column.name, record=record, expected=error.expected, got=error.got)


class _Values(Protocol):
    """Values of one column, as its converter() gives them."""

    def append(self, value: Any) -> int:
        """Keep a value; returns about how many bytes that took."""

    def take(self) -> Part:
        """All values, and begin anew."""


class _List:
    def __init__(self, column: Column) -> None:
        self._column = column
        self._values: list[Any] = []

    def append(self, value: Any) -> int:
        n_bytes = 8
        kind = type(value)
        if kind is bytes:
            n_bytes += len(value)
        elif kind is np.ndarray:
            n_bytes += value.nbytes
            value = value.copy()  # it may be the caller's
        elif isinstance(value, pa.Array):
            n_bytes += value.nbytes
        self._values.append(value)
        return n_bytes

    def take(self) -> Part:
        part = build_part(self._column, self._values)
        self._values = []
        return part


class _Rows:
    """Tensors, copied into one array as they come: an array a record would cost more than the record's copy."""

    def __init__(self, column: Column) -> None:
        self._column = column
        self._row_bytes = column.row_bytes
        self._rows: npt.NDArray[Any] = np.empty((16, *(d or 0 for d in column.shape)), column.stored)
        self._valid: list[bool] = []

    def append(self, value: Any) -> int:
        n = len(self._valid)
        if n == len(self._rows):
            grown = np.empty((2 * n, *self._rows.shape[1:]), self._rows.dtype)
            grown[:n] = self._rows
            self._rows = grown
        self._rows[n] = 0 if value is None else value
        self._valid.append(value is not None)
        return 8 if value is None else 8 + self._row_bytes

    def take(self) -> Part:
        n, valid = len(self._valid), None if all(self._valid) else np.array(self._valid, bool)
        self._valid = []
        return Part(n, self._rows[:n].reshape(n, self._column.n_elements), valid=valid)
