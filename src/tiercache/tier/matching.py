"""Matches globs against columns of paths: each rule's globs become one RE2 expression, which Arrow evaluates.

`*` and `?` match within a path segment; `**` as a whole segment matches any number of segments; `[a-z]` and `[!a-z]`
match one character except `/`; `{a,b}` matches either. There is no escape character: `[*]` matches a star.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tiercache.tier.columns import ROWS_AT_A_TIME, match_regex, split_keys, take_rows

# Limit for the globs that one glob with braces expands to.
_MOST_ALTERNATIVES = 1000
_MOST_BRACES = 100
_SLASH_CODE, _LAST_CODE = ord("/"), 0x10FFFF
# Replaces `**` before braces are expanded: `*{,x}*` must yield two stars and not `**`. No key contains a NUL.
_DEEP = "\0"
_NOT_ALONE = "'**' must be a whole path segment; within a name write '*'"
_NOTHING = rf"[^\x{{0}}-\x{{{_LAST_CODE:X}}}]"


def first_match(paths: pa.Array, globs: Sequence[tuple[tuple[str, ...], tuple[str, ...]]]) -> NDArray[np.int16]:
    """Return the number of the first rule that matches each path; -1: none.

    Args:
        paths: Strings without nulls.
        globs: For each rule, the globs that match, and the globs of exceptions.

    Returns:
        int16[n].

    Raises:
        ValueError: A glob is malformed; the message names the glob and the error.
    """
    rules = [(_patterns(match), _patterns(excepted)) for match, excepted in globs]
    found = np.full(len(paths), -1, np.int16)
    for start in range(0, len(paths), ROWS_AT_A_TIME):
        some = _Paths(paths.slice(start, ROWS_AT_A_TIME))
        left = np.arange(len(some.names))
        for number, (match, excepted) in enumerate(rules):
            hit = some.hits(left, match)
            hit[hit] = ~some.hits(left[hit], excepted)
            found[start + left[hit]] = number
            left = left[~hit]
            if not len(left):
                break
    return found


# Expression of a folder (with the final slash) to the expression of the last segments in it.
_Patterns: TypeAlias = Mapping[str, str]


class _Paths:
    """Paths cut at their last slash, so that a folder expression runs once per folder and not once per file."""

    def __init__(self, paths: pa.Array) -> None:
        self.folders, self.folder, self.names = split_keys(paths.cast(pa.large_string()))

    def hits(self, rows: NDArray[np.int64], patterns: _Patterns) -> NDArray[np.bool_]:
        """Return which rows match; bool[len(rows)], owned by the caller."""
        hit = np.zeros(len(rows), np.bool_)
        for of_folder, of_name in patterns.items():
            near = np.flatnonzero(~hit & match_regex(self.folders, of_folder)[self.folder[rows]])
            if len(near):
                hit[near] = match_regex(take_rows(self.names, rows[near]), of_name)
        return hit


def _patterns(globs: tuple[str, ...]) -> _Patterns:
    """Return the expressions that together match what any of the globs matches."""
    names: dict[str, list[str]] = defaultdict(list)
    for glob in globs:
        try:
            for one in _without_braces(_marked(glob)):
                for of_folder, of_name in _split_glob(one):
                    names[of_folder].append(of_name)
        except ValueError as error:
            raise ValueError(f"not a glob: {glob!r}: {error}") from error
    return {rf"\A(?:{of_folder})\z": rf"\A(?:{'|'.join(some)})\z" for of_folder, some in names.items()}


# -- translation of one glob -----------------------------------------------------------------------------------------


def _marked(glob: str) -> str:
    """Return the glob with _DEEP in place of each `**`."""
    if _DEEP in glob:
        raise ValueError("a path cannot contain a NUL character")
    out, runs, n_braces = [], "", 0
    for at, sign in _signs(glob):
        n_braces += sign == "{"
        if n_braces > _MOST_BRACES:
            raise ValueError(f"it has more than {_MOST_BRACES} braces")
        runs = runs + sign if sign == "*" else ""
        if runs != "**":
            out.append(sign)
            continue
        before, after = glob[: at - 1][-1:], glob[at + 1 : at + 2]
        if before not in ("", "/", "{", ",") or after not in ("", "/", "}", ","):
            raise ValueError(_NOT_ALONE)
        out[-1] = _DEEP
    return "".join(out)


def _without_braces(glob: str) -> list[str]:
    """Expand the braces of a glob to a list of globs without braces."""
    opened = closed = depth = 0
    commas: list[int] = []
    for at, sign in _signs(glob):
        if sign == "{":
            depth += 1
            opened = at if depth == 1 else opened
        elif sign == "," and depth == 1:
            commas.append(at)
        elif sign == "}":
            depth -= 1
            if depth < 0:
                raise ValueError("a '}' has no matching '{'; write '[}]' for the character")
            if depth == 0:
                closed = at
                break
    if depth:
        raise ValueError("a '{' is not closed; write '[{]' for the character")
    if not closed:
        return [glob]
    ends = [opened, *commas, closed]
    found: list[str] = []
    for start, end in pairwise(ends):
        found += _without_braces(glob[:opened] + glob[start + 1 : end] + glob[closed + 1 :])
        if len(found) > _MOST_ALTERNATIVES:
            raise ValueError(f"its braces expand to more than {_MOST_ALTERNATIVES} globs")
    return found


def _signs(glob: str) -> Iterator[tuple[int, str]]:
    """Yield (position, token) of each token: a character, or a whole character class with its brackets."""
    at = 0
    while at < len(glob):
        end = at + 1
        if glob[at] == "[":
            # A closing bracket right after the opening one is literal.
            end = glob.find("]", at + (3 if glob[at + 1 : at + 2] in ("!", "^") else 2)) + 1
            if not end:
                raise ValueError("a '[' is not closed; write '[[]' for the character")
        elif glob[at] == "\\":
            raise ValueError("there is no escape by '\\'; write '[*]' for a star")
        yield at, glob[at:end]
        at = end


def _split_glob(glob: str) -> Iterator[tuple[str, str]]:
    """Yield pairs of expressions, for folder and last segment, that together match the glob without braces."""
    end = max((at + 1 for at, sign in _signs(glob) if sign == "/"), default=0)
    folder, name = _translated(glob[:end]), glob[end:]
    if name == _DEEP:
        # `**` may match folders too. A path that ends with a slash has an empty last segment.
        yield rf"{folder}(?s:.*)", "(?s:.+)"
        yield rf"{folder}(?s:.+)", ""
    else:
        yield folder, _translated(name)


def _translated(glob: str) -> str:
    """Translate a glob without braces to RE2."""
    out: list[str] = []
    skipped = -1
    for at, sign in _signs(glob):
        if at == skipped:  # the slash of `**/`, translated together with it
            continue
        if sign == "*":
            out.append("[^/]*")
        elif sign == "?":
            out.append("[^/]")
        elif sign == _DEEP:
            if glob[:at][-1:] not in ("", "/") or glob[at + 1 : at + 2] not in ("", "/"):
                raise ValueError(_NOT_ALONE)
            out.append("(?s:.*/)?" if glob[at + 1 :] else "(?s:.+)")
            skipped = at + 1
        elif sign[0] == "[":
            out.append(_class(sign))
        else:
            out.append(re.escape(sign))
    return "".join(out)


def _class(sign: str) -> str:
    """Translate a character class to RE2. No class matches the slash."""
    body = sign[1:-1]
    negated = body[:1] in ("!", "^")
    body = body[1:] if negated else body
    ranges, at = [], 0
    while at < len(body):
        ranged = body[at + 1 : at + 2] == "-" and at + 2 < len(body)
        first, last = ord(body[at]), ord(body[at + 2 if ranged else at])
        if first > last:
            raise ValueError(f"the range {body[at : at + 3]!r} is reversed")
        ranges.append((first, last))
        at += 3 if ranged else 1
    if negated:
        return "[^" + "".join(map(_range, [*ranges, (_SLASH_CODE, _SLASH_CODE)])) + "]"
    parts = [part for first, last in ranges for part in _around_slash(first, last)]
    return "[" + "".join(map(_range, parts)) + "]" if parts else _NOTHING


def _around_slash(first: int, last: int) -> list[tuple[int, int]]:
    if not first <= _SLASH_CODE <= last:
        return [(first, last)]
    return [(a, b) for a, b in ((first, _SLASH_CODE - 1), (_SLASH_CODE + 1, last)) if a <= b]


def _range(ends: tuple[int, int]) -> str:
    return rf"\x{{{ends[0]:X}}}-\x{{{ends[1]:X}}}"
