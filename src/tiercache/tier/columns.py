"""Columns of texts: cut at their last slash, searched, put in order; a million at a time, none a Python object."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

# What is made of texts on the way stays small; larger parts are no faster.
ROWS_AT_A_TIME = 1 << 16
_SLASH = ord("/")


def split_keys(keys: pa.Array) -> tuple[pa.Array, NDArray[np.int64], pa.Array]:
    """The folders of keys, "" or with a "/" at the end, each once; the number of each key's; and the last segments.

    keys: large_string, without nulls.
    """
    folders, names = [], []
    for start in range(0, len(keys), ROWS_AT_A_TIME):
        both = _cut(keys.slice(start, ROWS_AT_A_TIME))
        places = np.arange(0, len(both), 2)
        folders.append(both.take(pa.array(places)).dictionary_encode())
        names.append(both.take(pa.array(places + 1)))
    number, once = joined_codes(folders, keys.type)
    return once, number, pa.concat_arrays([pa.array([], keys.type), *names])


def _cut(keys: pa.Array) -> pa.Array:
    """Folder and last segment of each key, one after the other, in the memory of the keys."""
    # A million took an expression 0.4 to 0.9 s, and take this 0.05 to 0.15.
    ends, text = text_of(keys)
    slashes = np.flatnonzero(text == _SLASH) + 1
    last = np.append(slashes, 0)[np.searchsorted(slashes, ends[1:], side="right") - 1]
    cuts = np.empty(2 * len(keys) + 1, np.int64)
    cuts[::2], cuts[1::2] = ends, np.maximum(last, ends[:-1])
    return pa.LargeStringArray.from_buffers(2 * len(keys), pa.py_buffer(cuts), pa.py_buffer(text))


def text_of(texts: pa.Array) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Where each of some large_strings ends, after a 0; and the bytes of all, one after the other."""
    _, offsets, data = texts.buffers()
    if not len(texts):
        return np.zeros(1, np.int64), np.empty(0, np.uint8)
    ends = np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + len(texts) + 1]
    return ends - ends[0], np.frombuffer(data or b"", np.uint8)[ends[0] : ends[-1]]


def joined_codes(encoded: Sequence[pa.DictionaryArray], kind: pa.DataType) -> tuple[NDArray[np.int64], pa.Array]:
    """The numbers of all values of some encoded texts among their values, and these, each once."""
    once = pa.concat_arrays([pa.array([], kind), *(one.dictionary for one in encoded)]).dictionary_encode()
    place, codes, start = numbers(once.indices, np.int64), [np.empty(0, np.int64)], 0
    for one in encoded:
        codes.append(place[start + numbers(one.indices, np.int64)])
        start += len(one.dictionary)
    return np.concatenate(codes), once.dictionary


def rising(texts: pa.Array) -> NDArray[np.int64]:
    """The numbers of texts in their order. Sorted ones are not sorted again: a second a million."""
    if len(texts) > 1 and not pc.all(pc.less_equal(texts.slice(0, len(texts) - 1), texts.slice(1))).as_py():
        return numbers(pc.sort_indices(texts), np.int64)
    return np.arange(len(texts))


def taken(texts: pa.Array, rows: NDArray[np.int64]) -> pa.Array:
    """The texts of rows, which are rising or each once; not copied where they are all, in their order."""
    if len(rows) == len(texts) and (rows[1:] > rows[:-1]).all():
        return texts
    return texts.take(pa.array(rows))


def matches(texts: pa.Array, pattern: str) -> NDArray[np.bool_]:
    """Whether the pattern is found in each text; bool[len(texts)]."""
    found = pc.match_substring_regex(texts, pattern)
    return np.asarray(found.to_numpy(zero_copy_only=False), np.bool_) if len(texts) else np.empty(0, np.bool_)


def find(texts: pa.Array, among: pa.Array | pa.ChunkedArray) -> NDArray[np.int64]:
    """The first row of each text in `among`, -1 where it is not; int64[len(texts)]."""
    if not len(texts) or not len(among):
        return np.full(len(texts), -1, np.int64)
    return numbers(pc.index_in(texts, value_set=among.cast(texts.type)).fill_null(-1), np.int64)


def numbers(column: pa.Array | pa.ChunkedArray, kind: type[np.int64] | type[np.float64]) -> NDArray[np.int64]:
    """A column without nulls as numpy. Not through pandas."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
        column = column if isinstance(column, pa.Array) else pa.concat_arrays(column.chunks)
    return np.asarray(column.to_numpy(zero_copy_only=False), kind) if len(column) else np.empty(0, kind)
