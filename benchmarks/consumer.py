"""A consumer that reads every byte of the batches, as a training step would, and verifies them."""

from __future__ import annotations

import math
import time
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from source import Source, cells
from workloads import DECODED_SIZE, KEY, MEAN, STD, Field

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    # By column: a tensor or array; a list of bytes, str or 1-d arrays; or (uint8 values, int64 offsets), one buffer.
    Batch = dict[str, Any]

# Decoders differ in rounding, in the transform and in the resize method by less than this; other pictures differ by
# several tens.
IMAGE_TOLERANCE = 6.0
# Augmented pictures vary at least by this, in standard deviations of their channels.
LEAST_SPREAD = 0.01


class WrongBatchesError(ValueError):
    """A loader did not serve each record once with its own content."""


def as_array(value: Any) -> np.ndarray:
    """Return the numpy view of a tensor or array."""
    return value.numpy() if hasattr(value, "numpy") else np.asarray(value)


def total(value: Any, word: np.dtype[Any]) -> int:
    """Return the wrapping sum of all words of a batch's column. Each byte is read once."""
    if isinstance(value, list):
        if not value:
            return 0
        if isinstance(value[0], str):
            return int(np.add.reduce(np.frombuffer("".join(value).encode(), word), dtype=word))
        return sum(int(np.add.reduce(np.frombuffer(item, word), dtype=word)) for item in value)
    flat = as_array(value[0] if isinstance(value, tuple) else value).reshape(-1)
    return int(np.add.reduce(flat.view(word), dtype=word))


def first_word(value: Any) -> int:
    """Return a word of the first record only."""
    if isinstance(value, list):
        return ord(value[0][0]) if isinstance(value[0], str) else int(value[0][0])
    return int(as_array(value[0] if isinstance(value, tuple) else value).reshape(-1)[0])


class Consumer:
    """Reads batches and verifies their content.

    Attributes:
        seen: Number of times that each record was served, int64[n]; computed when a check needs it.
        totals: Sum of all words read, by column.
        order: Record numbers in the order of the checked epoch, int64[up to n].
        wait_s: Time spent waiting for batches.
    """

    def __init__(self, source: Source) -> None:
        self._workload = source.workload
        self._expected = {field.name: source.expected(field) for field in source.workload.fields}
        self._words = {
            field.name: np.zeros(source.workload.n_records, field.word)
            for field in source.workload.fields
            if field.kind == "jpeg"
        }
        self._known = np.zeros(source.workload.n_records, bool)
        self.order = np.empty(0, np.int64)
        self.reset()

    def reset(self) -> None:
        """Discard everything that was recorded."""
        self.totals = {field.name: 0 for field in self._workload.fields}
        self.wait_s = 0.0
        self._keys: list[np.ndarray] = []

    @property
    def seen(self) -> np.ndarray:
        """Return how often each record was served since the last reset, int64[n]."""
        keys = np.concatenate(self._keys) if self._keys else np.empty(0, np.int64)
        self._check_numbers(keys)
        return np.bincount(keys, minlength=self._workload.n_records)

    @property
    def n_samples(self) -> int:
        """Number of records read since the last reset."""
        return sum(map(len, self._keys))

    def read(self, batches: Iterable[Batch], until_s: float = math.inf) -> bool:
        """Read all batches of an epoch, each byte once. Return False if until_s passed before its end."""
        # Numbers are copied here and counted after the clock has stopped. Counting 64 numbers takes 7 us on a busy
        # machine, four times as long as copying them; reading their tokens takes 12 us.
        return self._read(batches, until_s, self._keys.append)

    def read_and_forget(self, batches: Iterable[Batch], until_s: float = math.inf) -> bool:
        """Like read(), but record nothing: at 30 M records/s the records' numbers take 250 MB per second."""
        return self._read(batches, until_s, len)

    def _read(self, batches: Iterable[Batch], until_s: float, keep: Callable[[np.ndarray], object]) -> bool:
        columns = [(field.name, field.word) for field in self._workload.fields]
        clock, totals = time.perf_counter, self.totals
        asked = clock()
        for batch in batches:
            self.wait_s += clock() - asked
            for name, word in columns:
                totals[name] += total(batch[name], word)
            keep(as_array(batch[KEY]).copy())
            asked = clock()
            if asked > until_s:
                return False
        self.wait_s += clock() - asked
        return True

    def merge_reads(self, batches: Iterable[Batch], until_s: float = math.inf) -> bool:
        """Read the numbers and one word of each batch's first record, to measure the loader without the reading."""
        names = [field.name for field in self._workload.fields]
        clock, keep = time.perf_counter, self._keys.append
        asked = clock()
        for batch in batches:
            self.wait_s += clock() - asked
            for name in names:
                first_word(batch[name])
            keep(as_array(batch[KEY]).copy())
            asked = clock()
            if asked > until_s:
                return False
        self.wait_s += clock() - asked
        return True

    def check_records(self, batches: Iterable[Batch], until_s: float = math.inf) -> bool:
        """Check each record of an epoch that is not timed. Return False if until_s passed before its end.

        Raises:
            WrongBatchesError: A record is not what was written, was served twice, or was missing in a complete epoch.
        """
        self.reset()
        whole = True
        for batch in batches:
            keys = as_array(batch[KEY]).reshape(-1)
            if len(keys) > self._workload.batch_size:
                raise WrongBatchesError(f"a batch has {len(keys)} records, expected {self._workload.batch_size}")
            self._check_numbers(keys)
            for field in self._workload.fields:
                if not self._same(field, batch[field.name], keys):
                    raise WrongBatchesError(
                        f"contents of {field.name!r} differ in the batch with records {keys[:4].tolist()}..."
                    )
            self._known[keys] = True
            self._keys.append(keys.copy())
            if time.perf_counter() > until_s:
                whole = False
                break
        self.order = np.concatenate([np.empty(0, np.int64), *self._keys])
        self.check_counts(1, whole=whole)
        return whole

    def _check_numbers(self, keys: np.ndarray) -> None:
        if len(keys) and not 0 <= keys.min() <= keys.max() < self._workload.n_records:
            raise WrongBatchesError(f"unexpected record numbers from {keys.min()} to {keys.max()}")

    def _same(self, field: Field, value: Any, keys: np.ndarray) -> bool:
        expected = self._expected[field.name][keys]
        if field.kind == "jpeg":
            return self._same_images(field, as_array(value), keys)
        if field.kind == "array":
            array = as_array(value)
            if array.shape != (len(keys), *field.shape) or array.dtype != field.dtype:
                return False
            found = array.reshape(len(keys), -1).view(field.word).sum(axis=1, dtype=field.word)
        else:
            found = np.array([total([item], field.word) for item in self._items(value)], field.word)
        return np.array_equal(found, expected)

    def _same_images(self, field: Field, served: np.ndarray, keys: np.ndarray) -> bool:
        """Return whether decoded images look right. Their sums are learnt here: pixels depend on the decoder."""
        images = served if served.shape[-1] == 3 else served.transpose(0, 2, 3, 1)
        if images.shape != (len(keys), DECODED_SIZE, DECODED_SIZE, 3) or images.dtype != field.dtype:
            return False
        if field.is_augmented:
            return self._are_normalised(images)
        words = np.ascontiguousarray(served).reshape(len(keys), -1).view(field.word)
        self._words[field.name][keys] = words.sum(axis=1, dtype=field.word)
        return bool(np.abs(cells(images) - self._expected[field.name][keys]).max(initial=0) <= IMAGE_TOLERANCE)

    def _are_normalised(self, images: np.ndarray) -> bool:
        """Return whether pictures have values that a normalised picture can have, and are not of one colour.

        Their crops and colours are random, so that their content cannot be compared.
        """
        values, (mean, std) = images.astype(np.float32), np.array([MEAN, STD], np.float32)
        is_inside = (values >= -mean / std - 0.01).all() and (values <= (1 - mean) / std + 0.01).all()
        return bool(is_inside and (values.std(axis=(1, 2)).max(axis=1) > LEAST_SPREAD).all())

    def _items(self, value: Any) -> list[Any]:
        if isinstance(value, list):
            return value
        values, offsets = as_array(value[0]), as_array(value[1]).tolist()
        return [values[a:b] for a, b in pairwise(offsets)]

    def check_sums(self, n_epochs: int, *, whole: bool = True) -> None:
        """Compare the sums of epochs, or of parts of them, with what was written. Raises WrongBatchesError.

        Images are compared only if all served images were checked record by record before; augmented ones are not.
        """
        self.check_counts(n_epochs, whole=whole)
        seen = self.seen
        for field in self._workload.fields:
            if field.is_augmented or (field.kind == "jpeg" and not self._known[seen > 0].all()):
                continue
            words = self._words[field.name] if field.kind == "jpeg" else self._expected[field.name]
            expected = int(np.add.reduce(words * seen.astype(field.word), dtype=field.word))
            if (self.totals[field.name] - expected) % 2 ** (8 * field.word.itemsize):
                raise WrongBatchesError(f"the sum of the {int(seen.sum()):,} records read of {field.name!r} is wrong")

    def check_counts(self, n_epochs: int, *, whole: bool = True) -> None:
        """Raise WrongBatchesError unless each record came once per epoch, or at most once if epochs were cut."""
        seen = self.seen
        wrong = np.flatnonzero(seen != n_epochs if whole else seen > n_epochs)
        if len(wrong):
            example = f"record {wrong[0]} was served {seen[wrong[0]]} times"
            raise WrongBatchesError(f"{len(wrong)} records were not served {n_epochs} times: {example}")


def shuffle_quality(order: np.ndarray, n_records: int) -> dict[str, float]:
    """Return how far an order, or the beginning of one, is from the stored order.

    Returns:
        rank_correlation: Correlation of stored and served position; 1 if unshuffled, near 0 if shuffled.
        neighbour_distance: Mean distance of records served one after the other, relative to a uniform order; near 0 if
            they are stored together, 1 if shuffled.
    """
    n = len(order)
    if n < 3:
        return {"rank_correlation": 1.0, "neighbour_distance": 0.0}
    correlation = float(np.corrcoef(np.arange(n), order)[0, 1])
    distance = float(np.abs(np.diff(order)).mean() / ((n_records + 1) / 3))
    return {"rank_correlation": round(correlation, 4), "neighbour_distance": round(distance, 4)}
