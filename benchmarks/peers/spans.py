"""Timed spans of a loader's epochs: whole epochs if they are short, parts of one if it is long."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from processes import cpu_s

if TYPE_CHECKING:
    from consumer import Consumer

Batches = Iterator[dict[str, Any]]
Epoch = Callable[[], Batches]
Reader = Callable[[Batches, float], bool]

# A span ends at the end of an epoch, unless it would take more than this factor of the requested time.
CUT_AFTER = 2.0


class Stream:
    """The batches of consecutive epochs; a reader that stops in the middle of an epoch continues there.

    n_epochs: Number of epochs begun.
    """

    def __init__(self, epoch: Epoch) -> None:
        self._epoch = epoch
        self._left: Batches | None = None
        self.n_epochs = 0

    @property
    def at_start(self) -> bool:
        """Whether the next batch is the first one of an epoch."""
        return self._left is None

    def first(self) -> None:
        """Wait for the very first batch, which stays the first one to be read."""
        batches = self._batches()
        self._left = itertools.chain([next(batches)], batches)

    def read(self, reader: Reader, until_s: float = math.inf) -> bool:
        """Read to the end of the current epoch, or else of the next one. Return False if until_s passed before."""
        ended = reader(self._batches(), until_s)
        if ended:
            self._left = None
        return ended

    def close(self) -> None:
        """Drop the current epoch, if there is one, before its loader is dropped."""
        self._left = None

    def _batches(self) -> Batches:
        if self._left is None:
            self._left = self._epoch()
            self.n_epochs += 1
        return self._left


def read_for(reader: Reader, stream: Stream, min_s: float) -> None:
    """Read epochs until min_s have passed; the last one is cut if it is long."""
    started = time.perf_counter()
    until_s = started + CUT_AFTER * min_s if min_s else math.inf
    while stream.read(reader, until_s):
        if time.perf_counter() - started >= min_s:
            break


def timing(consumer: Consumer, reader: Reader, stream: Stream, min_s: float) -> dict[str, float]:
    """Read epochs for min_s (read_for). Return figures, and what was read.

    Returns:
        samples_per_s, cpu_s_per_million, wait_share; n_samples; n_epochs, complete or not; whole: 1 if all were
        complete.

    Raises:
        WrongBatchesError: A record was not served once per epoch.
    """
    consumer.reset()
    begun, whole = stream.n_epochs, stream.at_start
    cpu_before, started = cpu_s(), time.perf_counter()
    read_for(reader, stream, min_s)
    took_s, took_cpu_s = time.perf_counter() - started, cpu_s() - cpu_before
    n_epochs = stream.n_epochs - begun + (not whole)
    whole = whole and stream.at_start
    consumer.check_counts(n_epochs, whole=whole)
    n_samples = consumer.n_samples
    return {
        "samples_per_s": n_samples / took_s,
        "cpu_s_per_million": took_cpu_s / n_samples * 1e6,
        "wait_share": consumer.wait_s / took_s,
        "n_samples": n_samples,
        "n_epochs": n_epochs,
        "whole": whole,
    }
