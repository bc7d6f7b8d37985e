"""Generated records on disk, made once and mapped by their users, with checksums to verify batches."""

from __future__ import annotations

from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from workloads import KEY

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from workloads import Field, Workload

PIECE_BYTES = 32 << 20
# The means of GRID x GRID cells identify a decoded image, independently of the decoder's rounding.
GRID = 4


class Source:
    """The records of a workload in a folder that `generate` filled. Columns are mapped read-only and not cached.

    The folder may hold more records than the workload, which then consists of the first ones.
    """

    def __init__(self, workload: Workload, folder: Path) -> None:
        self.workload = workload
        self.folder = folder

    @cached_property
    def keys(self) -> np.ndarray:
        """Return the record numbers, int64[n]."""
        return np.memmap(self.folder / KEY, np.int64, "r", shape=(self.workload.n_records,))

    def array(self, field: Field) -> np.ndarray:
        """Return all values of an array column, [n, *shape]."""
        return np.memmap(self.folder / field.name, field.dtype, "r", shape=(self.workload.n_records, *field.shape))

    def data(self, field: Field) -> np.ndarray:
        """Return all bytes of a column of fixed or varying length: uint8[total]."""
        n_bytes = self.workload.n_records * field.n_bytes if field.kind == "array" else int(self.offsets(field)[-1])
        return np.memmap(self.folder / field.name, np.uint8, "r", shape=(n_bytes,))

    def offsets(self, field: Field) -> np.ndarray:
        """Return the offsets of the records in `data`, int64[n + 1]."""
        return np.memmap(self.folder / f"{field.name}.offsets", np.int64, "r", shape=(self.workload.n_records + 1,))

    def expected(self, field: Field) -> np.ndarray:
        """Return the sum of each record's words [n], or the mean of each image's cells [n, GRID, GRID, 3]."""
        every = np.load(self.folder / f"{field.name}.expected.npy", mmap_mode="r")
        # A copy, so that records outside the workload do not count as memory of the process.
        return np.array(every[: self.workload.n_records])

    def batch(self, start: int, stop: int) -> dict[str, Any]:
        """Return consecutive records by column: arrays, or lists of bytes or str."""
        found: dict[str, Any] = {}
        for field in self.workload.fields:
            if field.kind == "array":
                found[field.name] = self.array(field)[start:stop]
                continue
            at = self.offsets(field)[start : stop + 1]
            piece = self.data(field)[at[0] : at[-1]].tobytes()
            ends = (at - at[0]).tolist()
            items = [piece[a:b] for a, b in pairwise(ends)]
            found[field.name] = [item.decode("ascii") for item in items] if field.kind == "text" else items
        found[KEY] = self.keys[start:stop]
        return found

    def batches(self, piece_bytes: int = PIECE_BYTES) -> Iterator[dict[str, Any]]:
        """Yield all records in order, a few megabytes at a time."""
        step = max(piece_bytes // self.workload.record_bytes, 1)
        for start in range(0, self.workload.n_records, step):
            yield self.batch(start, min(start + step, self.workload.n_records))

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield all records in order, one by one: numpy arrays, bytes, str, and an int for the number."""
        for batch in self.batches():
            # Plain arrays: a row of a memmap takes 1 us to create, which is not the contender's work.
            columns = {name: np.asarray(x) if isinstance(x, np.ndarray) else x for name, x in batch.items()}
            columns[KEY] = batch[KEY].tolist()
            for values in zip(*columns.values(), strict=True):
                yield dict(zip(columns, values, strict=True))


def cells(images: np.ndarray) -> np.ndarray:
    """Return the mean of each grid cell of uint8[n, size, size, 3], float64[n, GRID, GRID, 3]."""
    side = images.shape[1] // GRID
    return images.reshape(len(images), GRID, side, GRID, side, 3).mean(axis=(2, 4))
