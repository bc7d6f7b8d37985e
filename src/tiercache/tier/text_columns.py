"""Operations on columns of strings without Python objects per row: split, search, sort and globs.

In globs, `*` and `?` match within a path segment, and `**` as a whole segment matches any number of segments.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

# Limits the size of temporary arrays; larger parts are not faster.
ROWS_AT_A_TIME = 1 << 16


def split_keys(keys: pa.Array) -> tuple[pa.Array, NDArray[np.int64], pa.Array]:
    """Split keys (large_string, without nulls) at their last slash.

    Returns the distinct folders ("" or ending in "/"), the number of each key's folder, and the last segment of each
    key.
    """
    large, slash = pa.large_string(), pa.scalar("/", pa.large_string())
    folders, names = [], [pa.nulls(0, large)]
    for start in range(0, len(keys), ROWS_AT_A_TIME):
        parts = pc.split_pattern(keys.slice(start, ROWS_AT_A_TIME), "/", max_splits=1, reverse=True)
        segments, ends = parts.values, np.asarray(parts.offsets)
        names.append(segments.take(pa.array(ends[1:] - 1)))
        above = pc.binary_join_element_wise(segments.take(pa.array(ends[:-1])), pa.scalar("", large), slash)
        has_folder = pa.array(np.diff(ends) == 2)
        folders.append(pc.if_else(has_folder, above, pa.scalar("", large)).dictionary_encode())
    number, once = joined_codes(folders, large)
    return once, number, pa.concat_arrays(names)


def joined_codes(encoded: Sequence[pa.DictionaryArray], kind: pa.DataType) -> tuple[NDArray[np.int64], pa.Array]:
    """Unify dictionary-encoded arrays: return the code of every value, and the distinct values."""
    once = pa.concat_arrays([pa.array([], kind), *(one.dictionary for one in encoded)]).dictionary_encode()
    position, codes, start = as_numpy(once.indices, np.int64), [np.empty(0, np.int64)], 0
    for one in encoded:
        codes.append(position[start + as_numpy(one.indices, np.int64)])
        start += len(one.dictionary)
    return np.concatenate(codes), once.dictionary


def sort_order(texts: pa.Array) -> NDArray[np.int64]:
    """Return the row numbers of the texts in sorted order.

    Sorted input is not sorted again: it would take 1 s per million.
    """
    if len(texts) > 1 and not pc.all(pc.less_equal(texts.slice(0, len(texts) - 1), texts.slice(1))).as_py():
        return as_numpy(pc.sort_indices(texts), np.int64)
    return np.arange(len(texts))


def inverse(order: NDArray[np.int64]) -> NDArray[np.int64]:
    position = np.empty(len(order), np.int64)
    position[order] = np.arange(len(order))
    return position


def take_rows(texts: pa.Array, rows: NDArray[np.int64]) -> pa.Array:
    """Return the texts of distinct rows; without a copy if these are all rows in order."""
    if len(rows) == len(texts) and (rows[1:] > rows[:-1]).all():
        return texts
    return texts.take(pa.array(rows))


def match_regex(texts: pa.Array, pattern: str) -> NDArray[np.bool_]:
    found = pc.match_substring_regex(texts, pattern)
    return np.asarray(found.to_numpy(zero_copy_only=False), np.bool_) if len(texts) else np.empty(0, np.bool_)


def index_in(texts: pa.Array, among: pa.Array | pa.ChunkedArray) -> NDArray[np.int64]:
    if not len(texts) or not len(among):
        return np.full(len(texts), -1, np.int64)
    return as_numpy(pc.index_in(texts, value_set=among.cast(texts.type)).fill_null(-1), np.int64)


def as_numpy(column: pa.Array | pa.ChunkedArray, kind: type[Any]) -> NDArray[Any]:
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
        column = column if isinstance(column, pa.Array) else pa.concat_arrays(column.chunks)
    return np.asarray(column.to_numpy(zero_copy_only=False), kind) if len(column) else np.empty(0, kind)


_NOTHING = r"[^\x{0}-\x{10FFFF}]"
_REFUSED = re.compile(r"[\\\[{}\0]")


def first_match(paths: pa.Array, globs: Sequence[tuple[tuple[str, ...], tuple[str, ...]]]) -> NDArray[np.int16]:
    """Return the number of the first rule that matches each path; -1: none. int16[n].

    globs: For each rule, the globs that match, and the globs of exceptions. Raises ValueError for a malformed glob.
    """
    rules = [(translate_globs(match), translate_globs(excepted)) for match, excepted in globs]
    found = np.full(len(paths), -1, np.int16)
    paths = paths.cast(pa.large_string())
    for start in range(0, len(paths), ROWS_AT_A_TIME):
        some = paths.slice(start, ROWS_AT_A_TIME)
        rule_of, is_open = found[start : start + len(some)], np.ones(len(some), np.bool_)
        for number, (match, excepted) in enumerate(rules):
            hit = is_open & match_regex(some, match)
            if excepted != _NOTHING and hit.any():
                hit[hit] = ~match_regex(some.filter(pa.array(hit)), excepted)
            rule_of[hit] = number
            is_open &= ~hit
            if not is_open.any():
                break
    return found


def translate_globs(globs: tuple[str, ...]) -> str:
    parts: list[str] = []
    for glob in globs:
        try:
            parts.append(_translated(glob))
        except ValueError as error:
            raise ValueError(f"not a glob: {glob!r}: {error}") from error
    return rf"\A(?:{'|'.join(parts)})\z" if parts else _NOTHING


def _translated(glob: str) -> str:
    if found := _REFUSED.search(glob):
        raise ValueError(f"{found[0]!r} has no meaning: write a list of globs, or '?' for any one character")
    *folders, name = glob.split("/")
    if any("**" in segment and segment != "**" for segment in (*folders, name)):
        raise ValueError("'**' must be a whole path segment; within a name write '*'")
    above = ("(?s:.*/)?" if segment == "**" else f"{_segment(segment)}/" for segment in folders)
    return "".join(above) + ("(?s:.+)" if name == "**" else _segment(name))


def _segment(segment: str) -> str:
    return re.escape(segment).replace(r"\*", "[^/]*").replace(r"\?", "[^/]")
