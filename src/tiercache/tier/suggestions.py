"""Suggests what a user meant: layouts of checkpoints that are single files, and globs near one that matches nothing."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from difflib import get_close_matches

import pyarrow as pa
import pyarrow.compute as pc

from tiercache.tier.inventory.layouts import SUFFIXES

_DIGITS = re.compile(r"[0-9]+")
_IS_STATE = re.compile(rf"(?i){SUFFIXES}$|\.(?:h5|pkl|weights|msgpack|onnx)$")
# Names that begin with a shard number and state the total are parts of one checkpoint.
_PART = re.compile(r"-[0-9]+-of-[0-9]+")
_MIN_FILES = 2


def suggest_layouts(paths: Iterable[str]) -> dict[str, int]:
    """Return patterns such as "model_{step}.pt", each with the number of files that it describes, most files first.

    A pattern describes at least two files of one folder, whose names differ in one number only and have the suffix of
    files with weights. Of several patterns for a file, the one with most files is used.
    """
    names = defaultdict(set)
    for path in paths:
        folder, _, name = path.rpartition("/")
        if _IS_STATE.search(name) and not _PART.search(name):
            for match in _DIGITS.finditer(name[: name.rfind(".")]):
                names[folder, f"{name[: match.start()]}{{step}}{name[match.end() :]}"].add(path)
    left, found = set().union(*names.values()), defaultdict[str, int](int)
    for (_, pattern), files in sorted(names.items(), key=lambda item: (-len(item[1]), item[0])):
        mine = files & left
        if len(mine) >= _MIN_FILES and not any(sign in pattern.replace("{step}", "") for sign in "*{}\\"):
            found[pattern] += len(mine)
            left -= mine
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


_WILDCARD = re.compile(r"[*?\[{]")


def nearest_glob(glob: str, paths: pa.Array) -> str | None:
    """Return the glob with the first folder or name in it that no path has replaced by a similar one; None: none is.

    paths: large_string.
    """
    segments, above = glob.split("/"), ""
    for number, segment in enumerate(segments):
        if _WILDCARD.search(segment):
            return None
        rest = pc.utf8_slice_codeunits(paths.filter(pc.starts_with(paths, above)), start=len(above))
        names = pc.replace_substring_regex(rest, "/(?s:.*)", "").unique().to_pylist()
        if segment not in names:
            near = get_close_matches(segment, names, n=1)
            return "/".join([*segments[:number], near[0], *segments[number + 1 :]]) if near else None
        above += f"{segment}/"
    return None
