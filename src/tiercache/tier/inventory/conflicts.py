"""Finds conflicts: different objects under one name in two tiers, of which no rule can tell which one is wanted.

Somebody has written a name again whose earlier copy was moved, or has put a copy back by hand. No move touches either
copy until a person has deleted or renamed one of them. These are no conflict:

- A copy that the mover is making: the journal has it (see tier/move/interrupted_copies.py).
- Objects of one bucket that have several storage classes: they are one copy.
- While sizes and known checksums are equal: copies none of which the catalog knows, because the catalog was lost, and
  copies of a group that another machine has recalled, whose catalog knows them (a hold names the group). The mover
  compares their bytes before it relies on one.

Own checkpoints are left out, because their names are unique, and shards, whose checksums are in the manifest.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from itertools import combinations
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa

from tiercache.model import format_bytes
from tiercache.tier.inventory.listing import NO_CRC

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tiercache.tier.inventory.groups import Copies, Grouped
    from tiercache.tier.inventory.listing import Listing
    from tiercache.tier.rules import Tier


class _ListedObject(NamedTuple):
    n_bytes: int
    crc32c: int
    modified_s: float
    is_recorded: bool  # whether the catalog has this very object


def find_conflicts(
    listed: Listing,
    grouped: Grouped,
    copies: Copies,
    tiers: Sequence[Tier],
    *,
    interrupted: Collection[tuple[int, str]],
    recalled: Collection[str],
) -> dict[int, str]:
    """Return the groups of which two tiers have different objects, with the reason for people.

    Args:
        listed: Objects of all tiers.
        grouped: Their groups.
        copies: Copies of the groups.
        tiers: Tiers of the rule file, in its order.
        interrupted: (tier, path) of copies that the mover has begun to make and has not finished.
        recalled: Paths of groups that any machine has recalled.
    """
    found: dict[int, str] = {}
    for group in _candidates(grouped, copies).tolist():
        path = grouped.paths[group].as_py()
        first, last = np.searchsorted(copies.group, [group, group + 1]).tolist()
        numbers = [copy for copy in range(first, last) if (int(copies.tier[copy]), path) not in interrupted]
        for one, other in combinations(numbers, 2):
            tier, other_tier = tiers[copies.tier[one]], tiers[copies.tier[other]]
            if tier.url == other_tier.url:
                continue
            objects, other_objects = _objects(listed, copies, one), _objects(listed, copies, other)
            key = _differing_key(objects, other_objects)
            if key is None and path not in recalled:
                key = _unrecorded_key(objects, other_objects)
            if key is not None:
                sides = f"{_side(tier, objects, key)}, {_side(other_tier, other_objects, key)}"
                found[group] = (
                    f"conflict: two tiers have different objects under this name ({key}: {sides}): no rule touches "
                    f"either; delete or rename the one that is not wanted"
                )
                break
    return found


def _candidates(grouped: Grouped, copies: Copies) -> NDArray[np.int64]:
    """Return the groups of which two copies differ, or of which the catalog knows one copy and not another."""
    n_groups = len(grouped.kind)
    differs, has_recorded, has_other = (np.zeros(n_groups, np.bool_) for _ in range(3))
    differs[copies.group[np.searchsorted(copies.start, copies.differing, side="right") - 1]] = True
    is_recorded = np.logical_and.reduceat(copies.recorded, copies.start[:-1]) if len(copies.group) else copies.whole
    has_recorded[copies.group[is_recorded]] = True
    has_other[copies.group[~is_recorded]] = True
    is_free = (grouped.of >= 0) & ~grouped.from_layout(grouped.layout.own, otherwise=False)
    return np.flatnonzero((differs | (has_recorded & has_other)) & is_free)


def _objects(listed: Listing, copies: Copies, copy: int) -> dict[str, _ListedObject]:
    """Return the objects of a copy by key."""
    part = slice(int(copies.start[copy]), int(copies.start[copy + 1]))
    rows = copies.row[part]
    columns = (listed.n_bytes[rows], copies.crc32c[part], listed.modified_s[rows], copies.recorded[part])
    values = map(_ListedObject, *(column.tolist() for column in columns))
    return dict(zip(listed.keys.take(pa.array(rows)).to_pylist(), values, strict=True))


def _differing_key(one: dict[str, _ListedObject], other: dict[str, _ListedObject]) -> str | None:
    """Return a key whose objects have different sizes or checksums; None if there is none."""
    for key in sorted(one.keys() & other.keys()):
        sums = one[key].crc32c, other[key].crc32c
        if one[key].n_bytes != other[key].n_bytes or (NO_CRC not in sums and sums[0] != sums[1]):
            return key
    return None


def _unrecorded_key(one: dict[str, _ListedObject], other: dict[str, _ListedObject]) -> str | None:
    """Return a key of an object that somebody else than the mover has written; None if there is none.

    The catalog has both sides of each copy that the mover has made. So where it has one copy completely, an object of
    the other that it does not have is not the mover's.
    """
    for known, written in ((one, other), (other, one)):
        if all(obj.is_recorded for obj in known.values()):
            strange = [key for key, obj in written.items() if not obj.is_recorded]
            if strange:
                return min(strange, key=lambda key: (key not in known, key))
    return None


def _side(tier: Tier, objects: dict[str, _ListedObject], key: str) -> str:
    obj = objects.get(key)
    if obj is None:
        return f"no such object in {tier.name}"
    date = datetime.fromtimestamp(obj.modified_s, UTC)
    return f"{format_bytes(obj.n_bytes)} of {date:%Y-%m-%dT%H:%MZ} in {tier.name}"
