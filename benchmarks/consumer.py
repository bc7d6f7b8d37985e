"""The one who reads the batches: every byte of them, as a training step would, and keeps the books."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from source import Source, cells
from workloads import DECODED_SIZE, KEY, Field

if TYPE_CHECKING:
    from collections.abc import Iterable

    # By column: a tensor or array; a list of bytes, str or 1-d arrays; or (uint8 values, int64 offsets), one buffer.
    Batch = dict[str, Any]

# Decoders differ in rounding, in the transform and in how they resize; other pictures differ by some tens.
IMAGE_TOLERANCE = 6.0


class WrongBatchesError(ValueError):
    """A loader did not give each record once, with its own content."""


def as_array(value: Any) -> np.ndarray:
    """The numpy view of a tensor or array."""
    return value.numpy() if hasattr(value, "numpy") else np.asarray(value)


def total(value: Any, word: np.dtype[Any]) -> int:
    """The sum of all words of a column of a batch, wrapping, each byte read once."""
    if isinstance(value, list):
        if not value:
            return 0
        if isinstance(value[0], str):
            return int(np.add.reduce(np.frombuffer("".join(value).encode(), word), dtype=word))
        return sum(int(np.add.reduce(np.frombuffer(item, word), dtype=word)) for item in value)
    flat = as_array(value[0] if isinstance(value, tuple) else value).reshape(-1)
    return int(np.add.reduce(flat.view(word), dtype=word))


def first_word(value: Any) -> int:
    """Something of the first record only."""
    if isinstance(value, list):
        return ord(value[0][0]) if isinstance(value[0], str) else int(value[0][0])
    return int(as_array(value[0] if isinstance(value, tuple) else value).reshape(-1)[0])


class Consumer:
    """Reads batches and knows what they must hold.

    Attributes:
        seen: how often each record came, int32[n].
        totals: by column, the sum of all words read.
        order: the records' numbers as they came in the epoch that was checked, int64[n].
        wait_s: time spent waiting for batches.
    """

    def __init__(self, source: Source) -> None:
        self._workload = source.workload
        self._expected = {field.name: source.expected(field) for field in source.workload.fields}
        self.order = np.empty(0, np.int64)
        self.reset()

    def reset(self) -> None:
        """Forget what was read."""
        self.totals = {field.name: 0 for field in self._workload.fields}
        self.seen = np.zeros(self._workload.n_records, np.int32)
        self.wait_s = 0.0

    def read(self, batches: Iterable[Batch]) -> None:
        """Read all batches of an epoch: values and numbers, each byte once."""
        columns = [(field.name, field.word) for field in self._workload.fields]
        clock, seen, totals = time.perf_counter, self.seen, self.totals
        asked = clock()
        for batch in batches:
            self.wait_s += clock() - asked
            for name, word in columns:
                totals[name] += total(batch[name], word)
            seen[as_array(batch[KEY])] += 1
            asked = clock()
        self.wait_s += clock() - asked

    def read_first(self, batches: Iterable[Batch]) -> None:
        """Read the numbers and something of each batch's first record: what is left without the reading."""
        names = [field.name for field in self._workload.fields]
        clock, seen = time.perf_counter, self.seen
        asked = clock()
        for batch in batches:
            self.wait_s += clock() - asked
            for name in names:
                first_word(batch[name])
            seen[as_array(batch[KEY])] += 1
            asked = clock()
        self.wait_s += clock() - asked

    def check_records(self, batches: Iterable[Batch]) -> None:
        """Read an epoch comparing each record's content with its number; slow, for an epoch that is not timed.

        Raises:
            WrongBatchesError: a record is not what was written, or came twice or never.
        """
        self.reset()
        order = [np.empty(0, np.int64)]
        for batch in batches:
            keys = as_array(batch[KEY]).reshape(-1)
            if len(keys) > self._workload.batch_size:
                raise WrongBatchesError(f"a batch of {len(keys)} records, not {self._workload.batch_size}")
            for field in self._workload.fields:
                if not self._same(field, batch[field.name], keys):
                    raise WrongBatchesError(
                        f"contents of {field.name!r} differ in the batch with records {keys[:4].tolist()}..."
                    )
            self.seen[keys] += 1
            order.append(keys.copy())
        self.order = np.concatenate(order)
        self.check_counts(1)

    def _same(self, field: Field, value: Any, keys: np.ndarray) -> bool:
        expected = self._expected[field.name][keys]
        if field.kind == "jpeg":
            self._learn(field, value)
            images = as_array(value)
            images = images if images.shape[-1] == 3 else images.transpose(0, 2, 3, 1)
            if images.shape != (len(keys), DECODED_SIZE, DECODED_SIZE, 3) or images.dtype != np.uint8:
                return False
            return bool(np.abs(cells(images) - expected).max(initial=0) <= IMAGE_TOLERANCE)
        if field.kind == "array":
            array = as_array(value)
            if array.shape != (len(keys), *field.shape) or array.dtype != field.dtype:
                return False
            found = array.reshape(len(keys), -1).view(field.word).sum(axis=1, dtype=field.word)
        else:
            found = np.array([total([item], field.word) for item in self._items(value)], field.word)
        return np.array_equal(found, expected)

    def _items(self, value: Any) -> list[Any]:
        if isinstance(value, list):
            return value
        values, offsets = as_array(value[0]), as_array(value[1]).tolist()
        return [values[a:b] for a, b in pairwise(offsets)]

    def _learn(self, field: Field, value: Any) -> None:
        """Pixels are the decoder's own: what an epoch sums up to is learnt from the one whose pictures are checked."""
        if not self.seen.any():
            self._expected[f"{field.name}.words"] = np.zeros(1, object)
        self._expected[f"{field.name}.words"] += total(value, field.word)

    def check_sums(self, n_epochs: int) -> None:
        """Compare what was read in some epochs with what they hold in all. Raises WrongBatchesError."""
        self.check_counts(n_epochs)
        for field in self._workload.fields:
            sums = self._expected[f"{field.name}.words" if field.kind == "jpeg" else field.name]
            expected = int(np.add.reduce(sums.astype(object))) * n_epochs
            if (self.totals[field.name] - expected) % 2 ** (8 * field.word.itemsize):
                raise WrongBatchesError(f"{n_epochs} epochs of {field.name!r} do not sum up to what was written")

    def check_counts(self, n_epochs: int) -> None:
        """Raises WrongBatchesError unless each record came once an epoch."""
        wrong = np.flatnonzero(self.seen != n_epochs)
        if len(wrong):
            example = f"record {wrong[0]} came {self.seen[wrong[0]]} times"
            raise WrongBatchesError(f"{len(wrong)} records did not come {n_epochs} times: {example}")


def shuffle_quality(order: np.ndarray) -> dict[str, float]:
    """How far an order is from the stored one.

    Returns:
        rank_correlation: of stored and served place; 1 as stored, near 0 shuffled.
        neighbour_distance: the mean distance of records served one after the other, over that of a uniform order; near
            0 where they lie together, 1 shuffled.
    """
    n = len(order)
    if n < 3:
        return {"rank_correlation": 1.0, "neighbour_distance": 0.0}
    correlation = float(np.corrcoef(np.arange(n), order)[0, 1])
    distance = float(np.abs(np.diff(order)).mean() / ((n + 1) / 3))
    return {"rank_correlation": round(correlation, 4), "neighbour_distance": round(distance, 4)}
