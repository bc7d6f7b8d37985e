"""Generated records on disk: made once, mapped by those who pack or read them, with sums to check what is served."""

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
# Means of this many by as many cells of a decoded image say whether it is the right one, whatever the decoder rounds.
GRID = 4


class Source:
    """The records of a workload in a folder that `generate` filled; columns are mapped read-only, nothing is kept.

    The folder may hold more records than the workload: then these are its first ones.
    """

    def __init__(self, workload: Workload, folder: Path) -> None:
        self.workload = workload
        self.folder = folder

    @cached_property
    def keys(self) -> np.ndarray:
        """The records' numbers, int64[n]."""
        return np.memmap(self.folder / KEY, np.int64, "r", shape=(self.workload.n_records,))

    def array(self, field: Field) -> np.ndarray:
        """All values of an array column, [n, *shape]."""
        return np.memmap(self.folder / field.name, field.dtype, "r", shape=(self.workload.n_records, *field.shape))

    def data(self, field: Field) -> np.ndarray:
        """All bytes of a column, whether its records vary in length or not: uint8[total]."""
        n_bytes = self.workload.n_records * field.n_bytes if field.kind == "array" else int(self.offsets(field)[-1])
        return np.memmap(self.folder / field.name, np.uint8, "r", shape=(n_bytes,))

    def offsets(self, field: Field) -> np.ndarray:
        """Where records begin and end in `data`, int64[n + 1]."""
        return np.memmap(self.folder / f"{field.name}.offsets", np.int64, "r", shape=(self.workload.n_records + 1,))

    def expected(self, field: Field) -> np.ndarray:
        """The sum of each record's words [n], or the means of each image's cells [n, GRID, GRID, 3]."""
        every = np.load(self.folder / f"{field.name}.expected.npy", mmap_mode="r")
        # A copy, as what is not of the workload shall not count as memory of who reads its first records.
        return np.array(every[: self.workload.n_records])

    def batch(self, start: int, stop: int) -> dict[str, Any]:
        """Consecutive records by column: arrays, or lists of bytes or str."""
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
        """All records in order, some megabytes at a time."""
        step = max(piece_bytes // self.workload.record_bytes, 1)
        for start in range(0, self.workload.n_records, step):
            yield self.batch(start, min(start + step, self.workload.n_records))

    def records(self) -> Iterator[dict[str, Any]]:
        """All records in order, one by one: numpy arrays, bytes, str, and an int for the number."""
        for batch in self.batches():
            # Plain arrays: a row of a memmap takes a microsecond to make, which is no contender's work.
            columns = {name: np.asarray(x) if isinstance(x, np.ndarray) else x for name, x in batch.items()}
            columns[KEY] = batch[KEY].tolist()
            for values in zip(*columns.values(), strict=True):
                yield dict(zip(columns, values, strict=True))


def cells(images: np.ndarray) -> np.ndarray:
    """The mean of each cell of a grid over uint8[n, size, size, 3], as float64[n, GRID, GRID, 3]."""
    side = images.shape[1] // GRID
    return images.reshape(len(images), GRID, side, GRID, side, 3).mean(axis=(2, 4))
