"""Raw shards: files of records of one length, for contenders that have no format of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from workloads import KEY

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from source import Source
    from workloads import Workload

SHARD_BYTES = 64 << 20
# Enough for all workers, also of small data.
MIN_SHARDS = 8


def record_type(workload: Workload) -> np.dtype[Any]:
    """Return the dtype of a stored record: its number, then its arrays."""
    return np.dtype([(KEY, np.int64), *((field.name, field.dtype, field.shape) for field in workload.fields)])


def shards(workload: Workload) -> Iterator[tuple[str, range]]:
    """Yield the path of each shard below the folder of the packed records, and the numbers of its records."""
    n = workload.n_records
    step = min(max(SHARD_BYTES // record_type(workload).itemsize, 1), -(-n // MIN_SHARDS))
    for start in range(0, n, step):
        yield f"shards/{start:09d}.bin", range(start, min(start + step, n))


def ranges(workload: Workload) -> list[tuple[str, int, int]]:
    """Return for each record the path of its shard, and where it begins and ends there."""
    size = record_type(workload).itemsize
    return [(name, at * size, (at + 1) * size) for name, numbers in shards(workload) for at in range(len(numbers))]


def stored(source: Source, numbers: range) -> np.ndarray:
    """Return consecutive records as they are stored, record_type[n]."""
    batch, records = source.batch(numbers.start, numbers.stop), np.empty(len(numbers), record_type(source.workload))
    for name in batch:
        records[name] = batch[name]
    return records


def pack(source: Source, folder: Path) -> None:
    """Write the shards."""
    (folder / "shards").mkdir()
    for name, numbers in shards(source.workload):
        stored(source, numbers).tofile(folder / name)


def batch_of(pieces: Iterable[bytes], workload: Workload) -> dict[str, torch.Tensor]:
    """Return the records of some pieces of shards as one batch. pieces: Whole records."""
    kind = record_type(workload)
    records = [np.frombuffer(piece, kind) for piece in pieces]
    return {name: torch.from_numpy(np.concatenate([r[name] for r in records])) for name in kind.names or ()}
