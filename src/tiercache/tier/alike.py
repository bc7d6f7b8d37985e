"""Groups names into templates that differ only in digits, so that counters and metrics are parsed once per template."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tiercache.tier.columns import as_numpy, text_of

# Every number with so many digits fits into an int64.
MOST_DIGITS = 18

_ZERO, _NINE = ord("0"), ord("9")


@dataclass(frozen=True, slots=True, eq=False)
class NameTemplates:
    """Names, grouped by template.

    Attributes:
        shapes: large_string[k], distinct templates: names with one 0 for each run of digits.
        shape: int64[n], template of each name.
        is_long: bool[n], whether the name has a run of more than MOST_DIGITS digits.
    """

    shapes: pa.Array
    shape: NDArray[np.int64]
    is_long: NDArray[np.bool_]
    _text: NDArray[np.uint8]
    _run_start: NDArray[np.int64]
    _run_end: NDArray[np.int64]
    _first_run: NDArray[np.int64]

    @classmethod
    def of(cls, names: pa.Array) -> NameTemplates:
        """Find the templates of names: large_string without nulls, which the object keeps."""
        ends, text = text_of(names)
        digit = (text >= _ZERO) & (text <= _NINE)
        starts_run, ends_run = digit.copy(), digit.copy()
        starts_run[1:] &= ~digit[:-1]
        ends_run[:-1] &= ~digit[1:]
        # A run of digits does not extend from the end of one name to the start of the next.
        begins = ends[1:-1][(ends[1:-1] > 0) & (ends[1:-1] < len(text))]
        starts_run[begins] = digit[begins]
        ends_run[begins - 1] = digit[begins - 1]
        encoded = _short(text, ends, digit, starts_run).dictionary_encode()
        run_start, run_end = np.flatnonzero(starts_run), np.flatnonzero(ends_run) + 1
        is_long = np.zeros(len(names), np.bool_)
        too_long = run_start[run_end - run_start > MOST_DIGITS]
        is_long[np.searchsorted(ends, too_long, side="right") - 1] = True
        first_run = np.searchsorted(run_start, ends[:-1])
        shape = as_numpy(encoded.indices, np.int64)
        return cls(encoded.dictionary, shape, is_long, text, run_start, run_end, first_run)

    def number(self, rows: NDArray[np.int64], run: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the number in one digit run of each row.

        Args:
            rows: Names: ascending, without is_long, with enough runs.
            run: Digit run of each row, counted from 1.
        """
        at = self._first_run[rows] + run - 1
        cuts = np.stack([self._run_start[at], self._run_end[at]], axis=1).ravel()
        # Every second text is the gap between two runs, and is dropped.
        texts = pa.LargeStringArray.from_buffers(max(len(cuts) - 1, 0), pa.py_buffer(cuts), pa.py_buffer(self._text))
        return as_numpy(texts.take(pa.array(np.arange(0, len(texts), 2))).cast(pa.int64()), np.int64)


def _short(
    text: NDArray[np.uint8], ends: NDArray[np.int64], digit: NDArray[np.bool_], starts_run: NDArray[np.bool_]
) -> pa.Array:
    """Replace each run of digits in the texts by one 0."""
    kept = starts_run | ~digit
    short = np.where(digit, np.uint8(_ZERO), text)[kept]
    short_ends = np.concatenate([[0], np.cumsum(kept)])[ends]
    return pa.LargeStringArray.from_buffers(len(ends) - 1, pa.py_buffer(short_ends), pa.py_buffer(short))
