"""Finds names that were written again while an older copy under the same name lies in another tier.

The newer objects keep the name. The older copy is a group of its own from then on, with the date of its writing in its
name: step_100.pt and step_100.20261101T120000Z.pt. The planner proposes to rename its objects; until that is done, they
have their old keys. Own checkpoints are not looked at (their names are unique), nor are shards (they do not change).

While the newer objects are not a complete checkpoint yet, the older copy keeps the name, so that its readers find a
complete one. A copy is an older one only if that is certain: without the catalog, the date of a copy is the date of its
move, so that a copy in a colder tier may look newer than its source. Then the group stays as it is, and its moves are
refused.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from tiercache.tier.inventory.layouts import DATE, dated_name, undated_path
from tiercache.tier.inventory.listing import NO_CRC

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tiercache.tier.inventory.groups import Copies, Grouped
    from tiercache.tier.inventory.listing import Listing

# Assumed difference between the clocks of two stores.
_SKEW_S = 60.0
_DATED = re.compile(rf"(?i){DATE}")


def renamed_key(key: str, path: str) -> str:
    """Return the key that an object gets when its group is renamed to a path with a date."""
    return f"{path}{key.removeprefix(undated_path(path))}"


def find_older_copies(
    listed: Listing, grouped: Grouped, copies: Copies, urls: Sequence[str], *, held: Collection[str] = ()
) -> dict[int, str]:
    """Return the older copies of names that were written again, by number, with the paths that they shall have.

    Args:
        listed: Objects of all tiers.
        grouped: Their groups.
        copies: Copies of the groups.
        urls: URL of each tier. Objects of two tiers with one URL are one copy, some of whose objects have another
            storage class.
        held: Paths of groups that a hold protects: their copies keep their names.
    """
    found: dict[int, str] = {}
    for group in _candidates(grouped, copies):
        path = grouped.paths[group].as_py()
        if path in held or _DATED.search(path.rpartition("/")[2]):
            continue
        first, last = np.searchsorted(copies.group, [group, group + 1]).tolist()
        newest = max(range(first, last), key=lambda copy: (copies.written_s[copy], -copies.tier[copy]))
        for copy in range(first, last):
            if (
                urls[copies.tier[copy]] != urls[copies.tier[newest]]
                and not _is_being_written(copies, copy, newest)
                and _is_older(listed, copies, copy, newest)
            ):
                is_file = (
                    copies.n_objects[copy] == 1 and listed.keys[int(copies.row[copies.start[copy]])].as_py() == path
                )
                found[copy] = _free_path(grouped, path, float(copies.written_s[copy]), is_file)
    return found


def _candidates(grouped: Grouped, copies: Copies) -> NDArray[np.int64]:
    """Return the groups of which two copies differ, or may differ because one was written after the other."""
    n_groups = len(grouped.kind)
    copy_of = np.searchsorted(copies.start, copies.differing, side="right") - 1
    may = np.zeros(n_groups, np.bool_)
    may[copies.group[copy_of]] = True
    has_known, has_unknown = np.zeros(n_groups, np.bool_), np.zeros(n_groups, np.bool_)
    has_known[copies.group[copies.catalogued]] = True
    has_unknown[copies.group[~copies.catalogued]] = True
    is_free = (grouped.of >= 0) & ~grouped.from_layout(grouped.layout.own, otherwise=False)
    return np.flatnonzero((may | (has_known & has_unknown)) & is_free)


def _is_being_written(copies: Copies, copy: int, newest: int) -> bool:
    """Return whether the newest copy is not complete yet.

    It has an object that is still being written, or lacks the completing object, which the older copy has.
    """
    has_completing = copies.completing_s > -np.inf
    return bool(copies.unfinished[newest]) or (bool(has_completing[copy]) and not has_completing[newest])


def _is_older(listed: Listing, copies: Copies, copy: int, newest: int) -> bool:
    """Return whether a copy is certainly older than the newest one, and differs from it as far as can be told."""
    if copies.written_s[newest] <= copies.written_s[copy] + _SKEW_S:
        return False
    is_dated = bool(copies.catalogued[copy])
    if not is_dated and copies.tier[copy] < copies.tier[newest]:
        return False
    old, new = _objects(listed, copies, copy), _objects(listed, copies, newest)
    pairs = [(old[key], new[key]) for key in old.keys() & new.keys()]
    if any(a[0] != b[0] or (NO_CRC not in (a[1], b[1]) and a[1] != b[1]) for a, b in pairs):
        return True
    if not is_dated or copies.catalogued[newest]:
        return False
    # Equal sizes: the bytes decide, which the mover compares. A checkpoint with fewer files was written again, too.
    return bool(old.keys() - new.keys()) or any(NO_CRC in (a[1], b[1]) for a, b in pairs)


def _objects(listed: Listing, copies: Copies, copy: int) -> Mapping[str, tuple[int, int]]:
    """Return size and CRC-32C of each object of a copy, by key."""
    part = slice(int(copies.start[copy]), int(copies.start[copy]) + int(copies.n_objects[copy]))
    rows = copies.row[part]
    keys = listed.keys.take(pa.array(rows)).to_pylist()
    return dict(zip(keys, zip(listed.n_bytes[rows].tolist(), copies.crc32c[part].tolist(), strict=True), strict=True))


def _free_path(grouped: Grouped, path: str, written_s: float, is_file: bool) -> str:
    """Return the dated path, at a later second if a group has it already: a rename was killed and its journal lost."""
    folder, slash, name = path.rpartition("/")
    while True:
        dated = f"{folder}{slash}{dated_name(name, written_s, is_file=is_file)}"
        if _row_of(grouped.paths, dated) is None:
            return dated
        written_s += 1.0


def _row_of(paths: pa.Array, path: str) -> int | None:
    """Return the row of a path among sorted paths."""
    low, high = 0, len(paths)
    while low < high:
        middle = (low + high) // 2
        if paths[middle].as_py() < path:
            low = middle + 1
        else:
            high = middle
    return low if low < len(paths) and paths[low].as_py() == path else None


def with_dated_keys(listed: Listing, copies: Copies, older: Mapping[int, str]) -> Listing:
    """Return the listing with the keys that the objects of older copies shall have."""
    keys = listed.keys.to_pylist()
    for copy, path in older.items():
        start = int(copies.start[copy])
        for row in copies.row[start : start + int(copies.n_objects[copy])].tolist():
            keys[row] = renamed_key(keys[row], path)
    return replace(listed, keys=pa.array(keys, pa.large_string()))
