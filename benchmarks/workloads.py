"""What the loaders are measured on: generated records, how a consumer reads them, and how it is checked what it got."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

PIECE_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class Workload:
    """Records of one fixed-shape column of random values and an int64 label, which is the record's number."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    batch_size: int
    n_records: int

    @property
    def record_bytes(self) -> int:
        """Bytes of a record without its label."""
        return np.dtype(self.dtype).itemsize * int(np.prod(self.shape))

    def columns(self, folder: Path) -> dict[str, np.ndarray]:
        """The columns, mapped read-only from the files that `generate` wrote."""
        values = np.memmap(folder / "values", self.dtype, "r", shape=(self.n_records, *self.shape))
        return {"values": values, "label": np.memmap(folder / "label", np.int64, "r", shape=(self.n_records,))}


TOKENS = Workload("tokens", "uint16", (1024,), 64, 1 << 18)
TENSORS = Workload("tensors", "uint8", (3, 64, 64), 256, 1 << 15)
WORKLOADS = {workload.name: workload for workload in (TOKENS, TENSORS)}


def generate(workload: Workload, folder: Path) -> None:
    """Write the columns and the sums of the records to a folder, unless they are there already.

    Files: values, label, sums.npy (int64 sum of each record's 8-byte words, wrapping), done (the workload as JSON).
    """
    done, text = folder / "done", json.dumps(asdict(workload))
    if done.exists() and done.read_text() == text:
        return
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(11)
    n_words = workload.record_bytes // 8
    step = max(PIECE_BYTES // workload.record_bytes, 1)
    sums = np.empty(workload.n_records, np.int64)
    with (folder / "values").open("wb") as file:
        for start in range(0, workload.n_records, step):
            n = min(step, workload.n_records - start)
            words = rng.integers(-(2**63), 2**63, (n, n_words), np.int64)
            sums[start : start + n] = words.sum(axis=1)
            file.write(words.data)
    np.arange(workload.n_records, dtype=np.int64).tofile(folder / "label")
    np.save(folder / "sums.npy", sums)
    done.write_text(text)


class WrongBatchesError(ValueError):
    """A loader did not give each record once, with its own content."""


class Consumer:
    """Reads batches as a training step would, every byte of them, and keeps the books.

    words: the sum of all 8-byte words read; seen: how often each record came; wait_s: time spent waiting for batches.
    """

    def __init__(self, workload: Workload, sums: np.ndarray) -> None:
        self._workload = workload
        self._sums = sums
        self.reset()

    def reset(self) -> None:
        """Forget what was read."""
        self.words = 0
        self.seen = np.zeros(self._workload.n_records, np.int32)
        self.wait_s = 0.0
        self.n_batches = 0

    def read(self, batches: Iterable[dict[str, Any]]) -> None:
        """Read all batches of an epoch: values and labels, each byte once."""
        clock, seen = time.perf_counter, self.seen
        asked = clock()
        for batch in batches:
            self.wait_s += clock() - asked
            labels = batch["label"].numpy()
            self.words += int(np.add.reduce(batch["values"].numpy().reshape(-1).view(np.int64)))
            seen[labels] += 1
            self.n_batches += 1
            asked = clock()
        self.wait_s += clock() - asked

    def read_first(self, batches: Iterable[dict[str, Any]]) -> None:
        """Read the first word and the labels of each batch only: what the hand-over costs without the reading."""
        clock, seen = time.perf_counter, self.seen
        asked = clock()
        for batch in batches:
            self.wait_s += clock() - asked
            self.words += int(batch["values"].numpy().reshape(-1).view(np.int64)[0])
            seen[batch["label"].numpy()] += 1
            self.n_batches += 1
            asked = clock()
        self.wait_s += clock() - asked

    def check_records(self, batches: Iterable[dict[str, Any]]) -> None:
        """Read an epoch comparing each record's content with its label's; slow, for an epoch that is not timed.

        Raises:
            WrongBatchesError: a record is not what was written, or came twice or never.
        """
        self.reset()
        for batch in batches:
            labels, values = batch["label"].numpy(), batch["values"].numpy()
            if len(labels) > self._workload.batch_size or values.shape != (len(labels), *self._workload.shape):
                raise WrongBatchesError(f"a batch of shape {values.shape}, {len(labels)} labels")
            found = values.reshape(len(labels), -1).view(np.int64).sum(axis=1)
            if not np.array_equal(found, self._sums[labels]):
                raise WrongBatchesError(f"contents differ in the batch with records {labels[:4].tolist()}...")
            self.seen[labels] += 1
        self.check_counts(1)

    def check_sums(self, n_epochs: int) -> None:
        """Compare what was read in some epochs with what they hold in all. Raises WrongBatchesError."""
        self.check_counts(n_epochs)
        expected = int(self._sums.astype(object).sum()) * n_epochs
        if (self.words - expected) % 2**64:
            raise WrongBatchesError(f"{n_epochs} epochs sum up to {self.words % 2**64}, not {expected % 2**64}")

    def check_counts(self, n_epochs: int) -> None:
        """Raises WrongBatchesError unless each record came once an epoch."""
        wrong = np.flatnonzero(self.seen != n_epochs)
        if len(wrong):
            example = f"record {wrong[0]} came {self.seen[wrong[0]]} times"
            raise WrongBatchesError(f"{len(wrong)} records did not come {n_epochs} times: {example}")
