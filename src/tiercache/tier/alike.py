"""Names that are alike but for their digits: what is a counter or a metric never depends on which digits they are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tiercache.tier.columns import numbers, text_of

# The longest that fits into an int64 whatever it is.
MOST_DIGITS = 18

_ZERO, _NINE = ord("0"), ord("9")


@dataclass(frozen=True, slots=True, eq=False)
class Alike:
    """Names by their shapes.

    Attributes:
        shapes: large_string[k], names with one 0 for each run of digits, each once.
        shape: int64[n], of each name.
        is_long: bool[n], it has a run of more than MOST_DIGITS digits.
    """

    shapes: pa.Array
    shape: NDArray[np.int64]
    is_long: NDArray[np.bool_]
    _text: NDArray[np.uint8]
    _run_start: NDArray[np.int64]
    _run_end: NDArray[np.int64]
    _first_run: NDArray[np.int64]

    @classmethod
    def of(cls, names: pa.Array) -> Alike:
        """Look at names: large_string, without nulls; they are kept."""
        ends, text = text_of(names)
        digit = (text >= _ZERO) & (text <= _NINE)
        starts_run, ends_run = digit.copy(), digit.copy()
        starts_run[1:] &= ~digit[:-1]
        ends_run[:-1] &= ~digit[1:]
        # Where a name begins, a run does, though the one before ends with digits.
        begins = ends[1:-1][(ends[1:-1] > 0) & (ends[1:-1] < len(text))]
        starts_run[begins] = digit[begins]
        ends_run[begins - 1] = digit[begins - 1]
        encoded = _short(text, ends, digit, starts_run).dictionary_encode()
        run_start, run_end = np.flatnonzero(starts_run), np.flatnonzero(ends_run) + 1
        is_long = np.zeros(len(names), np.bool_)
        too_long = run_start[run_end - run_start > MOST_DIGITS]
        is_long[np.searchsorted(ends, too_long, side="right") - 1] = True
        first_run = np.searchsorted(run_start, ends[:-1])
        shape = numbers(encoded.indices, np.int64)
        return cls(encoded.dictionary, shape, is_long, text, run_start, run_end, first_run)

    def number(self, rows: NDArray[np.int64], run: NDArray[np.int64]) -> NDArray[np.int64]:
        """What stands in a run of digits of each row, counted from 1. rows: rising, not long, with so many runs."""
        at = self._first_run[rows] + run - 1
        cuts = np.stack([self._run_start[at], self._run_end[at]], axis=1).ravel()
        # What lies between two of them is a text too.
        texts = pa.LargeStringArray.from_buffers(max(len(cuts) - 1, 0), pa.py_buffer(cuts), pa.py_buffer(self._text))
        return numbers(texts.take(pa.array(np.arange(0, len(texts), 2))).cast(pa.int64()), np.int64)


def _short(
    text: NDArray[np.uint8], ends: NDArray[np.int64], digit: NDArray[np.bool_], starts_run: NDArray[np.bool_]
) -> pa.Array:
    """The texts with one 0 for each run of digits."""
    kept = starts_run | ~digit
    short = np.where(digit, np.uint8(_ZERO), text)[kept]
    short_ends = np.concatenate([[0], np.cumsum(kept)])[ends]
    return pa.LargeStringArray.from_buffers(len(ends) - 1, pa.py_buffer(short_ends), pa.py_buffer(short))
