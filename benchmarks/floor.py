"""Python side of the plain C gather: compiles floor.c and serves its batches as new tensors over the ring's slots."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from compiled import compiled

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

SOURCE = Path(__file__).with_name("floor.c")

# A ring that stays in the last-level cache is the fastest, and more slots are better as long as it does: on 2 cores
# with 32 MiB of cache, batches of 3 MiB ran at 1,150 thousand records/s with 4 slots and at 630 with 16; batches of 128
# KiB at 1,600 with 4 slots and at 2,900 with 32.
RING_BYTES = 12 << 20
MIN_SLOTS, MAX_SLOTS = 4, 32


def build(folder: Path) -> ctypes.CDLL:
    """Return the compiled library; reuse the one in folder if it is up to date."""
    library = compiled(SOURCE, folder)
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    library.floor_new.restype = library.floor_memory.restype = pointer
    library.floor_new.argtypes = [pointer, size, size, size, size]
    library.floor_memory.argtypes = [pointer, size, size]
    library.floor_begin.argtypes, library.floor_begin.restype = [pointer, pointer, size], size
    library.floor_take.argtypes, library.floor_take.restype = [pointer], ctypes.c_int64
    library.floor_end.argtypes = library.floor_free.argtypes = [pointer]
    library.floor_end.restype = library.floor_free.restype = None
    return library


class Column(ctypes.Structure):
    """The C structure of a column."""

    _fields_: ClassVar = [("source", ctypes.c_void_p), ("offsets", ctypes.c_void_p), ("width", ctypes.c_size_t)]


@dataclass(frozen=True, slots=True)
class Varied:
    """A column of records of varying length. data: uint8[total]; offsets: int64[n + 1]."""

    data: np.ndarray
    offsets: np.ndarray

    @property
    def longest(self) -> int:
        """Bytes of the longest record."""
        return int(np.diff(self.offsets).max())


class Floor:
    """Batches of mapped columns in a given order. One epoch at a time; a batch is valid until the next request.

    columns: C-contiguous arrays of equal length, or Varied; they are kept. folder: Folder of the compiled library.
    """

    def __init__(
        self, columns: Mapping[str, np.ndarray | Varied], batch_size: int, n_threads: int, folder: Path
    ) -> None:
        self._library = build(folder)
        self._columns = dict(columns)
        self._batch_size = batch_size
        made = (Column * len(columns))(*(_column(column) for column in columns.values()))
        n_slots = min(max(RING_BYTES // (batch_size * sum(column.width for column in made)), MIN_SLOTS), MAX_SLOTS)
        self._ring = self._library.floor_new(made, len(made), batch_size, n_slots, n_threads)
        if not self._ring:
            raise MemoryError("the floor's ring could not be made")
        self._slots = [
            {name: self._slot(slot, c, column) for c, (name, column) in enumerate(columns.items())}
            for slot in range(n_slots)
        ]

    def _slot(self, slot: int, c: int, like: np.ndarray | Varied) -> Any:
        address, n = self._library.floor_memory(self._ring, slot, c), self._batch_size
        if isinstance(like, Varied):
            offsets = np.frombuffer((ctypes.c_int64 * (n + 1)).from_address(address), np.int64)
            memory = (ctypes.c_char * (n * like.longest)).from_address(address + offsets.nbytes)
            return np.frombuffer(memory, np.uint8), offsets
        shape = (n, *like.shape[1:])
        memory = (ctypes.c_char * (like.itemsize * int(np.prod(shape)))).from_address(address)
        return np.frombuffer(memory, like.dtype).reshape(shape)

    def epoch(self, order: np.ndarray) -> Iterator[dict[str, Any]]:
        """Yield all batches of int64 row numbers, in order; the last one may be short.

        The value of a column is a tensor, or (uint8 values, int64 offsets) for a Varied column.
        """
        take, ring, left = self._library.floor_take, self._ring, len(order)
        if not self._library.floor_begin(ring, order.ctypes.data, left):
            raise RuntimeError("the floor's threads could not be started")
        try:
            while (slot := take(ring)) >= 0:
                rows = min(left, self._batch_size)
                left -= rows
                yield {name: _tensors(memory, rows) for name, memory in self._slots[slot].items()}
        finally:
            if self._ring:
                self._library.floor_end(ring)

    def close(self) -> None:
        """End a running epoch and free the memory; no batch may be in use. May be called repeatedly."""
        if self._ring:
            self._library.floor_end(self._ring)
            self._library.floor_free(self._ring)
        self._ring = None


def _column(column: np.ndarray | Varied) -> Column:
    if isinstance(column, Varied):
        return Column(column.data.ctypes.data, column.offsets.ctypes.data, column.longest)
    return Column(column.ctypes.data, None, column.nbytes // len(column))


def _tensors(memory: Any, rows: int) -> Any:
    if isinstance(memory, tuple):
        values, offsets = memory
        return torch.from_numpy(values[: offsets[rows]]), torch.from_numpy(offsets[: rows + 1])
    return torch.from_numpy(memory if rows == len(memory) else memory[:rows])
