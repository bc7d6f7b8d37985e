"""Formats the lines of a plan's file from columns with Arrow, so that a million moves need no Python object each.

plan_file.py defines the content of the lines. The lines are equal except for the spelling of numbers (1 for 1.0).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tiercache.tier.decided import MoveColumns
from tiercache.tier.listing import NO_CRC
from tiercache.tier.moves import MoveTable, RefusalTable

HEAD_KEYS = ("kind", "action", "src", "dst", "rule", "reason")

# Characters that json.dumps() escapes by number: all except printable ASCII.
_ESCAPED = "[^ -~]"
_MOST_HEADS = 10_000
_LARGE = pa.large_string()


def lines_of_moves(moves: MoveTable) -> Iterator[memoryview]:
    """Yield blocks of whole lines, with line ends; the caller owns each block."""
    heads = _Heads()
    for start, end in moves.parts():
        yield _bytes(_move_lines(moves, start, end, heads))


def lines_of_refusals(refusals: RefusalTable) -> Iterator[memoryview]:
    """Yield blocks of whole lines, with line ends; the caller owns each block."""
    heads = _Heads()
    for start, end in refusals.parts():
        group = refusals.ways.group[start:end]
        lines = _joined(
            '{"line": "refused", "path": ',
            _quoted(refusals.paths.take(pa.array(group))),
            heads.column(refusals.ways, refusals.kind[group], refusals.tiers, (start, end)),
            ', "n_bytes": ',
            _numbers(refusals.n_bytes[start:end]),
            "}\n",
        )
        yield _bytes(lines)


def _move_lines(moves: MoveTable, start: int, end: int, heads: _Heads) -> pa.Array:
    part, dollars = slice(start, end), moves.dollars
    group, starts = moves.ways.group[part], moves.pieces.start[start : end + 1]
    objects = pa.LargeListArray.from_arrays(pa.array(starts - starts[0]), _objects(moves, start, end))
    return _joined(
        '{"line": "move", "id": ',
        _numbers(np.arange(start + 1, end + 1)),
        ', "path": ',
        _quoted(moves.paths.take(pa.array(group))),
        heads.column(moves.ways, moves.kind[group], moves.tiers, (start, end)),
        ', "n_objects": ',
        _numbers(np.diff(starts)),
        ', "n_bytes": ',
        _numbers(moves.n_bytes[part]),
        ', "cost": ',
        _numbers(dollars.once[part]),
        ', "saving_month": ',
        _numbers(dollars.saving_month[part]),
        ', "break_even_days": ',
        _numbers(dollars.days[part], dollars.days[part] == np.inf),
        ', "seconds": ',
        _numbers(moves.seconds(start, end)),
        ', "objects": [',
        pc.binary_join(objects, pa.scalar(", ", _LARGE)),
        "]}\n",
    )


def _objects(moves: MoveTable, start: int, end: int) -> pa.Array:
    """Format the objects of moves from start to end, each as a JSON list."""
    pieces, part = moves.pieces, slice(*moves.pieces.start[[start, end]].tolist())
    row, crc32c = pieces.row[part], pieces.crc32c[part]
    modified_s = pieces.modified_s[row]
    return _joined(
        "[",
        _quoted(pieces.keys.take(pa.array(row))),
        ", ",
        _numbers(pieces.n_bytes[row]),
        ", ",
        _quoted(pieces.etags.take(pa.array(row))),
        ", ",
        _numbers(modified_s, np.isnan(modified_s)),
        ", ",
        _numbers(crc32c, crc32c == NO_CRC),
        "]",
    )


class _Heads(dict[tuple[Any, ...], str]):
    """Cache of the part of a line between path and figures, by the values of HEAD_KEYS, which many lines share."""

    def __missing__(self, values: tuple[Any, ...]) -> str:
        if len(self) > _MOST_HEADS:
            self.clear()
        found = self[values] = f", {json.dumps(dict(zip(HEAD_KEYS, values, strict=True)))[1:-1]}"
        return found

    def column(
        self, ways: MoveColumns, kind: NDArray[np.uint8], tiers: tuple[str, ...], part: tuple[int, int]
    ) -> pa.Array:
        """Return the column for the decisions of a part."""
        return pa.array([self[values] for values in ways.worded(kind, tiers, part)], _LARGE)


def _joined(*columns: pa.Array | str) -> pa.Array:
    parts = [pa.scalar(column, _LARGE) if isinstance(column, str) else column for column in columns]
    return pc.binary_join_element_wise(*parts, pa.scalar("", _LARGE))


def _quoted(texts: pa.Array) -> pa.Array:
    """Format texts as JSON strings; null for missing texts."""
    texts = texts.cast(_LARGE)
    # Every ETag contains quotes, so quotes are escaped here and not in the slow path below.
    plain = pc.replace_substring(pc.replace_substring(texts, "\\", r"\\"), '"', r"\"")
    quoted = _joined('"', plain, '"').fill_null("null")
    escaped = pc.match_substring_regex(texts, _ESCAPED).fill_null(False)
    if not pc.any(escaped).as_py():
        return quoted
    instead = [json.dumps(text) for text in texts.filter(escaped).to_pylist()]
    return pc.replace_with_mask(quoted, escaped, pa.array(instead, _LARGE))


def _numbers(column: NDArray[Any], none: NDArray[np.bool_] | None = None) -> pa.Array:
    """Format finite numbers as JSON; null where `none` is true."""
    return pa.array(column, mask=none).cast(_LARGE).fill_null("null")


def _bytes(lines: pa.Array) -> memoryview:
    _, offsets, data = lines.buffers()
    ends = np.frombuffer(offsets, np.int64)[lines.offset : lines.offset + len(lines) + 1]
    return memoryview(data)[int(ends[0]) : int(ends[-1])]
