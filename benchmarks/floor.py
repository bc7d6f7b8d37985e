"""The floor's Python side: compiles floor.c once and serves its batches as new tensors over the ring's slots."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

SOURCE = Path(__file__).with_name("floor.c")
FLAGS = ["-std=c11", "-D_GNU_SOURCE", "-O3", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread"]

# A ring that stays in the last cache level is the fastest one, and more slots are better as long as it does: on 2 cores
# with 32 MiB of cache, batches of 3 MiB ran at 1,150 thousand records/s with 4 slots and at 630 with 16; batches of
# 128 KiB at 1,600 with 4 slots and at 2,900 with 32.
RING_BYTES = 12 << 20
MIN_SLOTS, MAX_SLOTS = 4, 32


def build(folder: Path) -> ctypes.CDLL:
    """The compiled floor, from folder if it is there already."""
    digest = hashlib.sha256(SOURCE.read_bytes() + " ".join(FLAGS).encode()).hexdigest()[:16]
    target = folder / f"floor-{digest}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}")
        subprocess.run([*shlex.split(os.environ.get("CC", "cc")), *FLAGS, str(SOURCE), "-o", str(partial)], check=True)
        partial.rename(target)
    library = ctypes.CDLL(str(target))
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    library.floor_new.restype = library.floor_memory.restype = pointer
    library.floor_new.argtypes = [pointer, pointer, size, size, size, size]
    library.floor_memory.argtypes = [pointer, size, size]
    library.floor_begin.argtypes, library.floor_begin.restype = [pointer, pointer, size], size
    library.floor_take.argtypes, library.floor_take.restype = [pointer], ctypes.c_int64
    library.floor_end.argtypes = library.floor_free.argtypes = [pointer]
    library.floor_end.restype = library.floor_free.restype = None
    return library


class Floor:
    """Batches of mapped columns in a given order. One epoch at a time; a batch is valid until the next is asked for.

    columns: C-contiguous arrays of one length, kept; folder: where the compiled library lies.
    """

    def __init__(self, columns: Mapping[str, np.ndarray], batch_size: int, n_threads: int, folder: Path) -> None:
        self._library = build(folder)
        self._columns = dict(columns)
        self._batch_size = batch_size
        sources = (ctypes.c_void_p * len(columns))(*(array.ctypes.data for array in columns.values()))
        widths = (ctypes.c_size_t * len(columns))(*(array.nbytes // len(array) for array in columns.values()))
        n_slots = min(max(RING_BYTES // (batch_size * sum(widths)), MIN_SLOTS), MAX_SLOTS)
        self._ring = self._library.floor_new(sources, widths, len(columns), batch_size, n_slots, n_threads)
        if not self._ring:
            raise MemoryError("the floor's ring could not be made")
        self._slots = [
            {name: self._slot(slot, c, array) for c, (name, array) in enumerate(columns.items())}
            for slot in range(n_slots)
        ]

    def _slot(self, slot: int, column: int, like: np.ndarray) -> np.ndarray:
        shape = (self._batch_size, *like.shape[1:])
        n_bytes = like.itemsize * int(np.prod(shape))
        memory = (ctypes.c_char * n_bytes).from_address(self._library.floor_memory(self._ring, slot, column))
        return np.frombuffer(memory, like.dtype).reshape(shape)

    def epoch(self, order: np.ndarray) -> Iterator[dict[str, torch.Tensor]]:
        """All batches of int64 row numbers, in order; the last may be short."""
        take, ring, left = self._library.floor_take, self._ring, len(order)
        if not self._library.floor_begin(ring, order.ctypes.data, left):
            raise RuntimeError("the floor's threads could not be started")
        try:
            while (slot := take(ring)) >= 0:
                rows = min(left, self._batch_size)
                left -= rows
                arrays = self._slots[slot]
                if rows == self._batch_size:
                    yield {name: torch.from_numpy(array) for name, array in arrays.items()}
                else:
                    yield {name: torch.from_numpy(array[:rows]) for name, array in arrays.items()}
        finally:
            self._library.floor_end(ring)

    def close(self) -> None:
        """Give the memory back; no batch may be in use."""
        self._library.floor_free(self._ring)
        self._ring = None
