"""Builds the copies of groups from the listed objects: their contents, and whether they are whole and verified.

Pure.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tiercache.catalog.tiers import EntryTable
from tiercache.tier.columns import ROWS_AT_A_TIME, index_in
from tiercache.tier.layouts import MARK
from tiercache.tier.listing import NO_CRC
from tiercache.tier.model import ARCHIVED, READABLE, RESTORED, RESTORING

if TYPE_CHECKING:
    from tiercache.tier.listing import Listing

# Known checksums of a tier: key -> (n_bytes, etag, crc32c, verified, written_s).
ChecksumTable: TypeAlias = Mapping[str, tuple[int, str | None, int | None, bool, float | None]]

# The state of a copy is the state of its least readable object.
_HARDER = np.array([0, 3, 2, 1], np.uint8)
_STATES = np.array([READABLE, RESTORED, RESTORING, ARCHIVED], np.uint8)
_NEVER_S = -np.inf
_TIERS = 256  # above every tier number


@dataclass(frozen=True, slots=True, eq=False)
class Objects:
    """The listed objects that belong to groups. Row i of every column is one object.

    Attributes:
        row: int64[m], row in the listing.
        key: int64[m], number of the key, in sorted order.
        group: int32[m].
        rank: uint8[m], see layouts.Layout.
        is_shard: bool[m], whether a manifest gives size and checksum.
        n_bytes: int64[m], size of a shard in the manifest; unused for other objects.
        crc32c: int64[m], checksum of a shard in the manifest; unused for other objects.
        unfinished: bool[m], whether the name says that the object is still being written.
        on_top: bool[m], whether the object lies directly in the group's folder.
    """

    row: NDArray[np.int64]
    key: NDArray[np.int64]
    group: NDArray[np.int32]
    rank: NDArray[np.uint8]
    is_shard: NDArray[np.bool_]
    n_bytes: NDArray[np.int64]
    crc32c: NDArray[np.int64]
    unfinished: NDArray[np.bool_]
    on_top: NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Copies:
    """Copies of groups. The columns without a description have one row per copy, as in model.Snapshot.

    Attributes:
        written_s: float64[n], latest first-write time of its objects, preserved across moves.
        marked_s: float64[n], time when its newest final object was written; -inf: it has none.
        rest_s: float64[n], time when the newest of its other objects was written.
        unfinished: bool[n], whether it has an object that is still being written.
        start: int64[n + 1], offsets of each copy's objects in the columns below.
        row: int64[m], row in the listing; by copy, its final object last.
        crc32c: int64[m], checksum of each object; NO_CRC where it is unknown.
        differing: int64[k], positions in `row` of objects that have another size or checksum in another tier.
    """

    group: NDArray[np.int32]
    tier: NDArray[np.int8]
    n_objects: NDArray[np.int32]
    n_bytes: NDArray[np.int64]
    smallest_bytes: NDArray[np.int64]
    modified_s: NDArray[np.float64]
    written_s: NDArray[np.float64]
    marked_s: NDArray[np.float64]
    rest_s: NDArray[np.float64]
    unfinished: NDArray[np.bool_]
    storage_class: NDArray[np.int16]
    state: NDArray[np.uint8]
    whole: NDArray[np.bool_]
    verified: NDArray[np.bool_]
    start: NDArray[np.int64]
    row: NDArray[np.int64]
    crc32c: NDArray[np.int64]
    differing: NDArray[np.int64]

    def find(self, group: int, tier: int) -> int | None:
        """Return the number of a group's copy in a tier; None: there is none."""
        first, last = np.searchsorted(self.group, [group, group + 1])
        at = int(first) + int(np.searchsorted(self.tier[first:last], tier))
        return at if at < last and self.tier[at] == tier else None


def copies_at(
    group: NDArray[np.int32], tier: NDArray[np.int8], groups: NDArray[np.int64], tiers: NDArray[np.int8]
) -> NDArray[np.int64]:
    """Return the number of each group's copy in the tier at the same index; -1: none. int64[len(groups)].

    Args:
        group: Group of each copy, ascending.
        tier: Tier of each copy, ascending within a group.
        groups: Groups to look up.
        tiers: Tier to look up for each of them.
    """
    known = group.astype(np.int64) * _TIERS + tier
    asked = groups.astype(np.int64) * _TIERS + tiers
    at = np.searchsorted(known, asked)
    there = np.append(known, -1)[at] == asked
    return np.where(there, at, -1)


def copies_of(listed: Listing, objects: Objects, book: Callable[[int], ChecksumTable]) -> Copies:
    """Return the copies that the objects form.

    A copy is whole if it has every key that any copy of its group has, each with the same size in all copies; of two
    copies that differ, neither is whole. A copy is verified if the catalog says so of each of its objects in their
    present state, and the objects with the same keys in other tiers are known to be equal.

    Args:
        listed: Listing of the tiers.
        objects: Objects that belong to groups.
        book: Function that returns the known checksums of a tier; called for one tier after another.
    """
    order = np.lexsort((objects.key, objects.rank, listed.tier[objects.row], objects.group))
    row, key, group = objects.row[order], objects.key[order], objects.group[order]
    tier = listed.tier[row]
    is_first = np.ones(len(row), np.bool_)
    is_first[1:] = (group[1:] != group[:-1]) | (tier[1:] != tier[:-1])
    first = np.flatnonzero(is_first)
    facts = _Facts(listed, objects, order, book)
    n_objects = np.diff(np.append(first, len(row)))
    n_keys = np.bincount(_group_of_each_key(key, group), minlength=int(group.max(initial=-1)) + 1)
    n_bytes, modified_s = listed.n_bytes[row], listed.modified_s[row]
    is_mark = (objects.rank[order] == MARK) & objects.on_top[order]
    return Copies(
        group=group[first],
        tier=tier[first],
        n_objects=n_objects.astype(np.int32),
        n_bytes=_reduced(np.add, n_bytes, first),
        smallest_bytes=_reduced(np.minimum, n_bytes, first),
        modified_s=_reduced(np.maximum, modified_s, first),
        written_s=_reduced(np.maximum, np.minimum(modified_s, facts.written_s), first),
        marked_s=_reduced(np.maximum, np.where(is_mark, modified_s, _NEVER_S), first),
        rest_s=_reduced(np.maximum, np.where(is_mark, _NEVER_S, modified_s), first),
        unfinished=_reduced(np.logical_or, objects.unfinished[order], first),
        storage_class=listed.class_of[listed.word[row]][_largest(n_bytes, first, n_objects)],
        state=_STATES[_reduced(np.maximum, _HARDER[listed.state_of[listed.word[row]]], first)],
        whole=(n_objects == n_keys[group[first]]) & ~_reduced(np.logical_or, facts.differs, first),
        verified=_reduced(np.logical_and, facts.verified, first),
        start=np.append(first, len(row)),
        row=row,
        crc32c=facts.crc32c,
        differing=np.flatnonzero(facts.differs),
    )


class _Facts:
    """Properties of each object, in the given order.

    Attributes:
        crc32c: int64[m].
        differs: bool[m], whether it differs from the manifest, or from the object with the same key in another tier.
        verified: bool[m], whether the catalog says so, and the object with the same key in other tiers is equal.
        written_s: float64[m], time of the first write in the catalog; inf: unknown.
    """

    def __init__(
        self, listed: Listing, objects: Objects, order: NDArray[np.int64], book: Callable[[int], ChecksumTable]
    ) -> None:
        row, key, is_shard = objects.row[order], objects.key[order], objects.is_shard[order]
        n_bytes = listed.n_bytes[row]
        crc32c, verified = listed.crc32c[row].copy(), np.zeros(len(row), np.bool_)
        self.written_s = np.full(len(row), np.inf)
        for number in listed.tiers:
            at = np.flatnonzero(listed.tier[row] == number)
            for same, found in _look_up(listed, row, at[np.argsort(key[at])], book(number)):
                verified[same] = found["verified"].to_numpy()
                crcs = found["crc32c"].fill_null(NO_CRC).to_numpy()
                crc32c[same] = np.where(crcs == NO_CRC, crc32c[same], crcs)
                self.written_s[same] = found["written_s"].fill_null(np.inf).to_numpy()
        stated = objects.crc32c[order]
        wrong = is_shard & ((n_bytes != objects.n_bytes[order]) | ((crc32c != NO_CRC) & (crc32c != stated)))
        # The manifest's checksum identifies a shard in every tier, regardless of who wrote it.
        crc32c = np.where(is_shard & ~wrong, stated, crc32c)
        n_keys = int(key.max(initial=-1)) + 1
        free = ~is_shard
        two_sizes = _spread(key[free], n_bytes[free], n_keys)
        known_crc = free & (crc32c != NO_CRC)
        two_crcs = _spread(key[known_crc], crc32c[known_crc], n_keys)
        unsure = np.zeros(n_keys, np.bool_)
        unsure[key[crc32c == NO_CRC]] = True
        shared = np.bincount(key, minlength=n_keys) > 1
        self.crc32c = crc32c
        self.differs = wrong | (free & (two_sizes | two_crcs)[key])
        self.verified = verified & ~self.differs & ~(free & (unsure & shared)[key])


def _look_up(
    listed: Listing, row: NDArray[np.int64], at: NDArray[np.int64], known: ChecksumTable
) -> Iterator[tuple[NDArray[np.int64], pa.Table]]:
    """Yield, in parts, the objects whose size and ETag equal the catalog's, and the catalog's entry of each.

    at: The tier's objects, sorted by key, so that a part is searched in the matching range of the catalog only.
    """
    if not known or not len(at):
        return
    book = EntryTable.of(known).table
    if not _is_rising(book["key"]):
        book = book.sort_by("key")
    places, name = range(len(book)), lambda place: book["key"][place].as_py()
    for start in range(0, len(at), ROWS_AT_A_TIME):
        some = at[start : start + ROWS_AT_A_TIME]
        keys = listed.keys.take(pa.array(row[some]))
        first = bisect_left(places, keys[0].as_py(), key=name)
        part = book.slice(first, bisect_right(places, keys[-1].as_py(), key=name) - first)
        hit = index_in(keys, part["key"])
        some, found = some[hit >= 0], part.drop_columns(["key"]).take(pa.array(hit[hit >= 0])).combine_chunks()
        # Without an ETag, a rewritten object cannot be detected, so that the catalog's entry does not apply.
        etags = pa.chunked_array([listed.etags.take(pa.array(row[some]))])
        same_etag = pc.equal(found["etag"], etags).fill_null(False)
        same = np.asarray(same_etag.to_numpy(), np.bool_) & (listed.n_bytes[row[some]] == found["n_bytes"].to_numpy())
        yield some[same], found.filter(pa.array(same))


def _is_rising(keys: pa.ChunkedArray) -> bool:
    return bool(pc.all(pc.less(keys.slice(0, len(keys) - 1), keys.slice(1))).as_py())


def _group_of_each_key(key: NDArray[np.int64], group: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return the group of each distinct key."""
    return group[np.unique(key, return_index=True)[1]]


def _spread(key: NDArray[np.int64], value: NDArray[np.int64], n_keys: int) -> NDArray[np.bool_]:
    """Return whether each key has two different values; bool[n_keys]."""
    least, most = np.full(n_keys, np.iinfo(np.int64).max), np.full(n_keys, -1, np.int64)
    np.minimum.at(least, key, value)
    np.maximum.at(most, key, value)
    return np.asarray(most > least, np.bool_)


def _reduced(what: np.ufunc, column: NDArray[np.generic], first: NDArray[np.int64]) -> NDArray:  # type: ignore[type-arg]
    """Reduce the column over the objects of each copy."""
    return what.reduceat(column, first) if len(first) else column[:0]


def _largest(n_bytes: NDArray[np.int64], first: NDArray[np.int64], n_objects: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the largest object of each copy, the first among equals: the copy has its storage class."""
    if not len(first):
        return first
    most = np.repeat(_reduced(np.maximum, n_bytes, first), n_objects)
    place = np.where(n_bytes == most, np.arange(len(n_bytes)), len(n_bytes))
    return np.asarray(_reduced(np.minimum, place, first), np.int64)
