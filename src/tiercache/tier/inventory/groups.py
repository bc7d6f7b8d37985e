"""Builds the inventory: groups, their copies, and the snapshot for the planner.

::

    list all tiers in parallel -> read the manifests of data sets -> recognise checkpoints among the other objects
        -> copies of groups, whole or not, verified or not -> complete or not -> metrics that rules use

Uncertain objects are left out or marked incomplete, and reported in `facts`.
"""

from __future__ import annotations

import os
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import combinations
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tiercache.errors import NotFound, StoreError
from tiercache.keep import PIN_NAME, UNREADABLE_PIN, parse_pin
from tiercache.model import format_bytes
from tiercache.store import LocalFolder
from tiercache.store.uses import read_uses, uses_under
from tiercache.tier.holds import HOLDS_FOLDER, Hold, Holds, read_holds
from tiercache.tier.inventory.datasets import OWN_KEY, SHARD_KEY, FoundDataset, LiveShards, read_datasets
from tiercache.tier.inventory.layouts import (
    COMPLETING,
    LACKS,
    NO_GROUP,
    NOTHING,
    KeyGroups,
    UserLayout,
    group_keys,
)
from tiercache.tier.inventory.listing import NO_CRC, Listing, ListingProgress, ObjectTable, list_tiers, release_memory
from tiercache.tier.inventory.metrics import find_metrics
from tiercache.tier.model import (
    ARCHIVED,
    CHECKPOINT,
    FILE,
    NO_RUN,
    NO_STEP,
    READABLE,
    RESTORED,
    RESTORING,
    SHARD,
    Snapshot,
)
from tiercache.tier.text_columns import ROWS_AT_A_TIME, index_in, inverse, match_regex, sort_order, take_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tiercache.tier.inventory.listing import Listing
    from tiercache.tier.journal import TierCatalog
    from tiercache.tier.rules import RuleFile, Tier
    from tiercache.tier.stores import Stores


# The state of a copy is the state of its least readable object.
_HARDER = np.array([0, 3, 2, 1], np.uint8)
_STATES = np.array([READABLE, RESTORED, RESTORING, ARCHIVED], np.uint8)
_NEVER_S = -np.inf
_TIERS = 256  # above every tier number
_COPY_COLUMNS = (
    *("group", "tier", "n_objects", "n_bytes", "smallest_bytes"),
    *("modified_s", "storage_class", "state", "whole", "verified"),
)


@dataclass(frozen=True, slots=True, eq=False)
class Objects:
    """The listed objects that belong to groups. Row i of row and key is one object."""

    row: NDArray[np.int64]  # row in the listing
    key: NDArray[np.int64]  # number of the key, in sorted order
    # Columns of keys.
    group: NDArray[np.int32]
    shard: NDArray[np.int64]  # row in `shards`, whose manifest gives size and checksum; -1: not a shard
    rank: NDArray[np.uint8]  # see layouts.KeyGroups, as the following columns
    unfinished: NDArray[np.bool_]
    on_top: NDArray[np.bool_]
    shards: LiveShards


@dataclass(frozen=True, slots=True, eq=False)
class Copies:
    """Copies of groups. The columns without a description have one row per copy, as in model.Snapshot."""

    group: NDArray[np.int32]
    tier: NDArray[np.int8]
    n_objects: NDArray[np.int32]
    n_bytes: NDArray[np.int64]
    smallest_bytes: NDArray[np.int64]
    modified_s: NDArray[np.float64]
    written_s: NDArray[np.float64]  # when its newest object was written; a move keeps it
    completing_s: NDArray[np.float64]  # time when its newest completing object was written; -inf: it has none
    rest_s: NDArray[np.float64]  # time when the newest of its other objects was written
    unfinished: NDArray[np.bool_]  # whether it has an object that is still being written
    storage_class: NDArray[np.int16]
    state: NDArray[np.uint8]
    whole: NDArray[np.bool_]
    verified: NDArray[np.bool_]
    start: NDArray[np.int64]  # int64[n + 1], offsets of each copy's objects in the columns below
    row: NDArray[np.int64]  # row in the listing; by copy, its completing object last
    crc32c: NDArray[np.int64]  # checksum of each object; NO_CRC where it is unknown
    recorded: NDArray[np.bool_]  # whether the catalog has this very object
    differing: NDArray[np.int64]  # positions in `row` of objects that have another size or checksum in another tier

    def find(self, group: int, tier: int) -> int | None:
        first, last = np.searchsorted(self.group, [group, group + 1])
        at = int(first) + int(np.searchsorted(self.tier[first:last], tier))
        return at if at < last and self.tier[at] == tier else None


def copies_at(
    group: NDArray[np.int32], tier: NDArray[np.int8], groups: NDArray[np.int64], tiers: NDArray[np.int8]
) -> NDArray[np.int64]:
    """Return the number of each group's copy in the tier at the same index; -1: none. int64[len(groups)].

    group, tier: Group and tier of each copy, sorted by group, then by tier. groups, tiers: Pairs to look up.
    """
    numbers, sought = group.astype(np.int64) * _TIERS + tier, groups.astype(np.int64) * _TIERS + tiers
    at = np.searchsorted(numbers, sought)
    return np.where(np.append(numbers, -1)[at] == sought, at, -1)


def copies_of(listed: Listing, objects: Objects, checksums_of: Callable[[int], pa.Table]) -> Copies:
    """Return the copies that the objects form. checksums_of: Known checksums of a tier.

    A copy is whole if it has every key that any copy of its group has, each with the same size in all copies; of two
    copies that differ, neither is whole. A copy is verified if the catalog says so of each of its objects in their
    present state, and the objects with the same keys in other tiers are known to be equal.
    """
    order = np.lexsort((objects.key, objects.rank[objects.key], listed.tier[objects.row], objects.group[objects.key]))
    row, key = objects.row[order], objects.key[order]
    group, tier = objects.group[key], listed.tier[row]
    is_first = np.ones(len(row), np.bool_)
    is_first[1:] = (group[1:] != group[:-1]) | (tier[1:] != tier[:-1])
    first = np.flatnonzero(is_first)
    facts = _ObjectFacts(listed, row, key, objects, checksums_of)
    n_objects = np.diff(np.append(first, len(row)))
    n_keys = np.bincount(_group_of_each_key(key, group), minlength=int(group.max(initial=-1)) + 1)
    n_bytes, modified_s = listed.n_bytes[row], listed.modified_s[row]
    is_completing = (objects.rank[key] == COMPLETING) & objects.on_top[key]
    return Copies(
        group=group[first],
        tier=tier[first],
        n_objects=n_objects.astype(np.int32),
        n_bytes=_reduced(np.add, n_bytes, first),
        smallest_bytes=_reduced(np.minimum, n_bytes, first),
        modified_s=_reduced(np.maximum, modified_s, first),
        written_s=_reduced(np.maximum, np.minimum(modified_s, facts.written_s), first),
        completing_s=_reduced(np.maximum, np.where(is_completing, modified_s, _NEVER_S), first),
        rest_s=_reduced(np.maximum, np.where(is_completing, _NEVER_S, modified_s), first),
        unfinished=_reduced(np.logical_or, objects.unfinished[key], first),
        storage_class=listed.storage_class[row][_largest(n_bytes, first, n_objects)],
        state=_STATES[_reduced(np.maximum, _HARDER[listed.state[row]], first)],
        whole=(n_objects == n_keys[group[first]]) & ~_reduced(np.logical_or, facts.differs, first),
        verified=_reduced(np.logical_and, facts.verified, first),
        start=np.append(first, len(row)),
        row=row,
        crc32c=facts.crc32c,
        recorded=facts.recorded,
        differing=np.flatnonzero(facts.differs),
    )


class _ObjectFacts:
    """Properties of each object, in the given order.

    crc32c; written_s: first-write time in the catalog, inf if unknown; differs: from the manifest, or from the object
    with the same key in another tier; verified: by the catalog, and equal to the objects with this key in other tiers;
    recorded: the catalog has this object, as far as the store tells; only the ctime of a file may have changed.
    """

    def __init__(
        self,
        listed: Listing,
        row: NDArray[np.int64],
        key: NDArray[np.int64],
        objects: Objects,
        checksums_of: Callable[[int], pa.Table],
    ) -> None:
        shard, shards = objects.shard[key], objects.shards
        is_shard = shard >= 0
        n_bytes = listed.n_bytes[row]
        crc32c = listed.crc32c[row].copy()
        verified, self.recorded = np.zeros(len(row), np.bool_), np.zeros(len(row), np.bool_)
        self.written_s = np.full(len(row), np.inf)
        for number in listed.tiers:
            at = np.flatnonzero(listed.tier[row] == number)
            for recorded, found, has_date, is_same in _look_up(
                listed, row, at[np.argsort(key[at])], checksums_of(number)
            ):
                self.recorded[recorded] = True
                here, entries, is_same = recorded[has_date], found.filter(pa.array(has_date)), is_same[has_date]
                self.written_s[here] = entries["written_s"].fill_null(np.inf).to_numpy()
                same, found = here[is_same], entries.filter(pa.array(is_same))
                verified[same] = found["verified"].to_numpy()
                crcs = found["crc32c"].fill_null(NO_CRC).to_numpy()
                crc32c[same] = np.where(crcs == NO_CRC, crc32c[same], crcs)
        stated_bytes, stated = (np.append(column, 0)[shard] for column in (shards.n_bytes, shards.crc32c))
        wrong = is_shard & ((n_bytes != stated_bytes) | ((crc32c != NO_CRC) & (crc32c != stated)))
        # The manifest's checksum identifies a shard in every tier, regardless of who wrote it.
        crc32c = np.where(is_shard & ~wrong, stated, crc32c)
        n_keys = int(key.max(initial=-1)) + 1
        free = ~is_shard
        two_sizes = _spread(key[free], n_bytes[free], n_keys)
        has_crc = free & (crc32c != NO_CRC)
        two_crcs = _spread(key[has_crc], crc32c[has_crc], n_keys)
        unsure = np.zeros(n_keys, np.bool_)
        unsure[key[crc32c == NO_CRC]] = True
        shared = np.bincount(key, minlength=n_keys) > 1
        self.crc32c = crc32c
        self.differs = wrong | (free & (two_sizes | two_crcs)[key])
        self.verified = verified & ~self.differs & ~(free & (unsure & shared)[key])


def _look_up(
    listed: Listing, row: NDArray[np.int64], at: NDArray[np.int64], checksums: pa.Table
) -> Iterator[tuple[NDArray[np.int64], pa.Table, NDArray[np.bool_], NDArray[np.bool_]]]:
    """Yield parts of four columns: objects, their entries, whether the entry's date is theirs, whether ETags are equal.

    Of a local file, the fourth column is False and the third one True if only the ctime differs, by chmod, chown or a
    hard link: its bytes may be others, but the date of its writing is still that of the entry. Both are False where the
    store gives no ETag. Objects without an entry, or that differ otherwise, are left out.

    at: The tier's objects, sorted by key, so that a part is searched in the matching range of the catalog only.
    """
    if not len(checksums) or not len(at):
        return
    entries = checksums if _is_rising(checksums["key"]) else checksums.sort_by("key")
    rows, key_of = range(len(entries)), lambda number: entries["key"][number].as_py()
    for start in range(0, len(at), ROWS_AT_A_TIME):
        some = at[start : start + ROWS_AT_A_TIME]
        keys = listed.keys.take(pa.array(row[some]))
        first = bisect_left(rows, keys[0].as_py(), key=key_of)
        part = entries.slice(first, bisect_right(rows, keys[-1].as_py(), key=key_of) - first)
        hit = index_in(keys, part["key"])
        some, found = some[hit >= 0], part.drop_columns(["key"]).take(pa.array(hit[hit >= 0])).combine_chunks()
        # Without an ETag, a rewritten object cannot be detected, so that the catalog's entry does not apply.
        etags = pa.chunked_array([listed.etags.take(pa.array(row[some]))])
        is_size = listed.n_bytes[row[some]] == found["n_bytes"].to_numpy()
        is_same = is_size & _are_equal(found["etag"], etags)
        has_date = is_same
        if not is_same.all():
            has_date = is_size & _are_equal(_without_ctime(found["etag"]), _without_ctime(etags))
        recorded = has_date | (is_size & np.asarray(etags.is_null().to_numpy(), np.bool_))
        yield some[recorded], found.filter(pa.array(recorded)), has_date[recorded], is_same[recorded]


def _are_equal(one: pa.ChunkedArray, other: pa.ChunkedArray) -> NDArray[np.bool_]:
    return np.asarray(pc.equal(one, other).fill_null(False).to_numpy(), np.bool_)


def _without_ctime(etags: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return ETags, those of local files without their last part (see file_info() of store/local.py)."""
    return pc.replace_substring_regex(etags, r'^("[0-9a-f]+-[0-9a-f]+-[0-9a-f]+)-[0-9a-f]+"$', r"\1")


def _is_rising(keys: pa.ChunkedArray) -> bool:
    return bool(pc.all(pc.less(keys.slice(0, len(keys) - 1), keys.slice(1))).as_py())


def _group_of_each_key(key: NDArray[np.int64], group: NDArray[np.int32]) -> NDArray[np.int32]:
    return group[np.unique(key, return_index=True)[1]]


def _spread(key: NDArray[np.int64], value: NDArray[np.int64], n_keys: int) -> NDArray[np.bool_]:
    """Return whether each key has two different values; bool[n_keys]."""
    least, most = np.full(n_keys, np.iinfo(np.int64).max), np.full(n_keys, -1, np.int64)
    np.minimum.at(least, key, value)
    np.maximum.at(most, key, value)
    return np.asarray(most > least, np.bool_)


def _reduced(what: np.ufunc, column: NDArray[np.generic], first: NDArray[np.int64]) -> NDArray:  # type: ignore[type-arg]
    return what.reduceat(column, first) if len(first) else column[:0]


def _largest(n_bytes: NDArray[np.int64], first: NDArray[np.int64], n_objects: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the largest object of each copy, the first among equals: the copy has its storage class."""
    if not len(first):
        return first
    most = np.repeat(_reduced(np.maximum, n_bytes, first), n_objects)
    position = np.where(n_bytes == most, np.arange(len(n_bytes)), len(n_bytes))
    return np.asarray(_reduced(np.minimum, position, first), np.int64)


# Number of example names that a fact contains.
_MANY = 10


@dataclass(frozen=True, slots=True, eq=False)
class Inventory:
    """The content of all tiers. Immutable; safe from any thread.

    `facts` contains further findings, by name:

    - `datasets`: tuple of FoundDataset; `unlisted`: tiers that were not listed.
    - `n_objects`: number of listed objects; `n_own`: number of tiercache's own objects among them.
    - Findings with a count and example names: `orphans` (shards that no version names), `missing` (shards that no tier
      has), `unfinished` (objects that are still being written), `no_keys` (names that are not valid keys),
      `conflicts` (groups of which two tiers have different objects), `differing` (objects of other groups that differ
      between two tiers), `unread` (checkpoints whose metrics cannot be read).
    - `incomplete`: number of incomplete checkpoints, by what they lack; `incomplete_names`: example names of each.
    - `in_files`: group to the names of the metrics in its files, for groups whose files were read.
    """

    snapshot: Snapshot
    facts: Mapping[str, Any]
    _listed: Listing = field(repr=False)
    _copies: Copies = field(repr=False)

    def objects_of(self, groups: NDArray[np.int64], tiers: NDArray[np.int8]) -> ObjectTable:
        """Return the objects of many copies as columns: for each group, its copy in the tier at the same index.

        Their crc32c comes from the store, the manifest or the catalog, if it is valid for the current object.
        Completing objects come last.
        """
        listed, copies = self._listed, self._copies
        copy = copies_at(copies.group, copies.tier, groups, tiers)
        n_objects = np.where(copy < 0, 0, np.append(copies.n_objects, 0)[copy]).astype(np.int64)
        start = np.concatenate([[0], np.cumsum(n_objects)])
        at = np.arange(start[-1]) + np.repeat(copies.start[copy] - start[:-1], n_objects)
        row, crc32c = copies.row[at], copies.crc32c[at]
        return ObjectTable(start, row, crc32c, listed.keys, listed.etags, listed.n_bytes, listed.modified_s)


def take_inventory(
    file: RuleFile,
    stores: Stores,
    catalog: TierCatalog,
    *,
    now_s: float,
    on_progress: ListingProgress | None = None,
    may_miss: Collection[str] = (),
) -> Inventory:
    """List all tiers and return their content.

    Args:
        file: Rule file.
        stores: Stores of its tiers.
        catalog: Catalog of this machine, whose checksums and dates of copies are used.
        now_s: Current time, in seconds since the epoch.
        on_progress: Callback that receives (tier, number of objects listed so far), from several threads.
        may_miss: Tiers that are left out if they cannot be listed; `facts["unlisted"]` names them.

    Raises StoreError if a tier cannot be listed, or an object that decides about moves cannot be read now.
    """
    listed = list_tiers(file, stores, now_s=now_s, on_progress=on_progress, may_miss=may_miss)
    release_memory()
    own = match_regex(listed.keys, OWN_KEY)
    shards, datasets = read_datasets(file, stores, listed, pa.array(np.flatnonzero(own)), now_s=now_s)
    grouped = _grouped(listed, own, shards, file.layouts)
    release_memory()

    def checksums_of(tier: int) -> pa.Table:
        return catalog.checksums(file.tiers[tier].name)

    copies = copies_of(listed, grouped.objects, checksums_of)
    holds = _holds(file, stores, listed, own, now_s)
    interrupted = _interrupted_copies(file, catalog)
    copies = _without_interrupted(grouped, copies, interrupted)
    conflicts = find_conflicts(listed, grouped, copies, file.tiers, interrupted=interrupted, recalled=holds.recalled)
    complete = _complete(grouped, copies, now_s=now_s, quiet_period_s=file.tiering.quiet_period_s)
    # Nobody knows which one of two checkpoints is meant: neither displaces another one.
    complete[[group for group in conflicts if grouped.kind[group] == CHECKPOINT]] = False
    checkpoints = np.flatnonzero(grouped.kind == CHECKPOINT)
    found = find_metrics(file, stores, listed, copies, grouped.paths, checkpoints)
    unread = np.zeros(len(grouped.kind), np.bool_)
    unread[found.unread] = True
    # A checkpoint that the mover has moved was not among the best while its metrics were readable.
    unread[copies.group[copies.verified]] = False
    snapshot = _snapshot(
        file,
        listed,
        grouped,
        copies,
        now_s=now_s,
        links=_links(file, stores, listed, grouped.paths, copies),
        complete=complete,
        metrics=found.columns,
        unread=unread,
        immovable=_shards_elsewhere(file, stores, grouped, datasets) | conflicts,
        **read_own_pins(file, stores, listed, grouped, copies),
        held=_held_groups(holds.in_force(), grouped.paths),
    )
    facts = _facts(listed, grouped, copies, complete, datasets, conflicts)
    facts |= {"n_own": int(own.sum()), "unread": _some(grouped.paths.take(pa.array(found.unread)))}
    return Inventory(snapshot, facts | {"in_files": found.in_files}, listed, copies)


# -- groups -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Grouped:
    paths: pa.Array  # paths of the groups
    kind: NDArray[np.uint8]
    shard: NDArray[np.int64]  # row of the group in `shards`; -1: no shard
    of: NDArray[np.int64]  # number of the group in `layout`; -1: a shard
    layout: KeyGroups  # files and checkpoints
    shards: LiveShards  # live shards of all data sets
    objects: Objects  # objects that belong to groups
    orphans: pa.Array  # keys of shards that no version names
    unfinished: pa.Array  # keys that are still being written
    no_keys: pa.Array  # names that are not valid keys

    def from_layout(self, column: NDArray[Any], otherwise: object) -> NDArray[Any]:
        """Expand a column of the layout's groups to all groups."""
        found = np.full(len(self.kind), otherwise, column.dtype)
        found[self.of >= 0] = column[self.of[self.of >= 0]]
        return found


def _grouped(listed: Listing, own: NDArray[np.bool_], shards: LiveShards, layouts: Sequence[UserLayout]) -> Grouped:
    rows = np.flatnonzero(~own)
    keys, key = _numbered(take_rows(listed.keys, rows))
    release_memory()
    shard = index_in(keys, shards.keys)
    is_orphan = (shard < 0) & match_regex(keys, SHARD_KEY)
    others = np.flatnonzero((shard < 0) & ~is_orphan)
    layout = group_keys(take_rows(keys, others), layouts)
    release_memory()
    is_shard = np.flatnonzero(shard >= 0)
    # A checkpoint folder may have the name of a shard; paths of the snapshot must be unique, so the folder wins.
    is_shard = is_shard[index_in(keys.take(pa.array(is_shard)), layout.paths) < 0]
    paths = pa.concat_arrays([layout.paths, keys.take(pa.array(is_shard))]) if len(is_shard) else layout.paths
    order = sort_order(paths)
    position = inverse(order)
    group = np.full(len(keys), NO_GROUP, np.int64)
    in_layout = layout.group != NO_GROUP
    group[others[in_layout]] = position[layout.group[in_layout]]
    group[is_shard] = position[len(layout.paths) :]
    of = np.where(order < len(layout.paths), order, -1)
    shard_of = np.full(len(order), -1, np.int64)
    shard_of[group[is_shard]] = shard[is_shard]
    kind = np.full(len(order), FILE, np.uint8)
    kind[of >= 0] = np.where(layout.checkpoint[of[of >= 0]], CHECKPOINT, FILE)
    kind[of < 0] = SHARD
    rank = np.zeros(len(keys), np.uint8)
    unfinished, on_top = np.zeros(len(keys), np.bool_), np.zeros(len(keys), np.bool_)
    rank[others], unfinished[others], on_top[others] = layout.rank, layout.unfinished, layout.on_top
    is_in_group = group[key] != NO_GROUP
    rows, key = rows[is_in_group], key[is_in_group]
    return Grouped(
        paths=take_rows(paths, order),
        kind=kind,
        shard=shard_of,
        of=of,
        layout=layout,
        shards=shards,
        objects=Objects(rows, key, group.astype(np.int32), shard, rank, unfinished, on_top, shards),
        orphans=keys.take(pa.array(np.flatnonzero(is_orphan))),
        unfinished=keys.take(pa.array(others[~in_layout & layout.unfinished])),
        no_keys=keys.take(pa.array(others[~in_layout & ~layout.unfinished])),
    )


def _numbered(keys: pa.Array) -> tuple[pa.Array, NDArray[np.int64]]:
    """Return the distinct keys, sorted, and the number of each key."""
    encoded = keys.dictionary_encode()
    order = sort_order(encoded.dictionary)
    position = inverse(order)
    return take_rows(encoded.dictionary, order), position[np.asarray(encoded.indices.to_numpy(), np.int64)]


# -- completeness, links, use, and the snapshot ----------------------------------------------------------------------


def _complete(grouped: Grouped, copies: Copies, *, now_s: float, quiet_period_s: float) -> NDArray[np.bool_]:
    """Return whether each checkpoint is complete in some tier: by its names, and because nobody writes it any more.

    A copy is finished if it was verified (only complete checkpoints are moved), if its completing object exists and no
    other object is newer, or if no object has changed for quiet_period_s.
    """
    settled = now_s - copies.modified_s >= quiet_period_s
    # The manifest of our own checkpoints is put last; only their pin is written later.
    is_own = grouped.from_layout(grouped.layout.own, otherwise=False)[copies.group]
    closed = (copies.completing_s > -np.inf) & ((copies.rest_s <= copies.completing_s) | is_own) & ~copies.unfinished
    good = copies.whole & (copies.verified | settled | closed)
    complete = np.zeros(len(grouped.kind), np.bool_)
    complete[copies.group[good]] = True
    lacks = grouped.from_layout(grouped.layout.lacks, NOTHING)
    complete &= lacks == NOTHING
    complete[grouped.kind != CHECKPOINT] = True
    return complete


def _links(file: RuleFile, stores: Stores, listed: Listing, paths: pa.Array, copies: Copies) -> dict[int, str]:
    """Return the symbolic links of local tiers, by each copy that a link leads to or lies in."""
    folders = {
        number: store
        for number in listed.tiers
        if isinstance(store := stores.store(file.tiers[number].name), LocalFolder)
    }
    roots = {number: os.path.realpath(store.root).rstrip("/") + "/" for number, store in folders.items()}
    links: dict[int, str] = {}
    for number, store in folders.items():
        for link, path in sorted(store.symlinks()):
            places = [(link.rpartition("/")[0], number)]
            # The target may be the group, or lie in a folder that is one.
            places += [(path.removeprefix(root), tier) for tier, root in roots.items() if path.startswith(root)][:1]
            for key, tier in places:
                if (copy := _copy_above(paths, copies, key, tier)) is not None:
                    links.setdefault(copy, link if tier == number else f"{store.url}/{link}")
    return links


def _copy_above(paths: pa.Array, copies: Copies, key: str, tier: int) -> int | None:
    """Return the copy, in a tier, of the group that is this key or a folder above it; None: there is none."""
    above = _with_folders(key) if key else []
    for row in index_in(pa.array(above, pa.large_string()), paths).tolist():
        copy = copies.find(row, tier) if row >= 0 else None
        if copy is not None:
            return copy
    return None


def _interrupted_copies(file: RuleFile, catalog: TierCatalog) -> frozenset[tuple[int, str]]:
    """Return (tier, path) of the copies that the mover has begun to make and has not finished, by the journal."""
    numbers = {tier.url: number for number, tier in enumerate(file.tiers)}
    rows = catalog.open_moves(file.home_tier.url, "begun")
    return frozenset(
        (numbers[row.dst_url], row.path) for row in rows if row.action in ("copy", "move") and row.dst_url in numbers
    )


def _without_interrupted(grouped: Grouped, copies: Copies, interrupted: Collection[tuple[int, str]]) -> Copies:
    """Return the copies, where no interrupted one is whole: a part of a copy never counts as a checkpoint."""
    if not interrupted:
        return copies
    rows = index_in(pa.array([path for _, path in interrupted], pa.large_string()), grouped.paths).tolist()
    whole = copies.whole.copy()
    for (tier, _), group in zip(interrupted, rows, strict=True):
        copy = copies.find(group, tier) if group >= 0 else None
        if copy is not None:
            whole[copy] = False
    return replace(copies, whole=whole)


def _shards_elsewhere(
    file: RuleFile, stores: Stores, grouped: Grouped, datasets: Collection[FoundDataset]
) -> dict[int, str]:
    """Return the shards of data sets outside the home tier, with the reason why none of them can be moved."""
    found: dict[int, str] = {}
    home, shards = file.home_tier, np.flatnonzero(grouped.kind == SHARD)
    paths = grouped.paths.take(pa.array(shards))
    for dataset in datasets:
        if not stores.same_url(dataset.tier, home.name):
            reason = (
                f"its data set lies in tier {dataset.tier}, and readers follow only moves of data sets in the home "
                f"tier: copy the data set to {home.url} to let rules move it"
            )
            hits = np.asarray(pc.starts_with(paths, dataset.folder).to_numpy(zero_copy_only=False), np.bool_)
            found |= dict.fromkeys(shards[hits].tolist(), reason)
    return found


def _holds(file: RuleFile, stores: Stores, listed: Listing, own: NDArray[np.bool_], now_s: float) -> Holds:
    home = file.home_tier.name
    sharing = [file.index(name) for name in stores.sharing(home)]
    keys = listed.keys.take(pa.array(np.flatnonzero(own & np.isin(listed.tier, sharing))))
    keys = keys.filter(pc.starts_with(keys, HOLDS_FOLDER)).to_pylist()
    return read_holds(stores.store(home), now_s, keys)


def _held_groups(holds: Mapping[str, Hold], paths: pa.Array) -> dict[int, str]:
    groups = index_in(pa.array([*holds], pa.large_string()), paths).tolist()
    return {group: hold.reason for group, hold in zip(groups, holds.values(), strict=True) if group >= 0}


def _with_folders(key: str) -> list[str]:
    return [key, *(key[:end] for end in range(len(key) - 1, 0, -1) if key[end] == "/")]


def _last_uses(file: RuleFile, listed: Listing, grouped: Grouped) -> NDArray[np.float64]:
    """Return the last use of each group, from the read logs of caches on this machine; NaN: unknown.

    The use of any object, in any tier, is a use of its group.
    """
    last_s = np.full(len(grouped.kind), np.nan)
    try:
        uses = read_uses()
    except (OSError, ValueError):  # there is no usable state folder, so that no use is known
        uses = {}
    for number in listed.tiers if uses else ():
        found = uses_under(uses, file.tiers[number].url)
        rows = np.flatnonzero(listed.tier[grouped.objects.row] == number)
        keys = take_rows(listed.keys, grouped.objects.row[rows])
        at = index_in(keys, pa.array(list(found), pa.large_string()))
        rows, at = rows[at >= 0], at[at >= 0]
        group = grouped.objects.group[grouped.objects.key[rows]]
        np.fmax.at(last_s, group, np.array(list(found.values()), np.float64)[at])
    return last_s


def _snapshot(
    file: RuleFile, listed: Listing, grouped: Grouped, copies: Copies, *, now_s: float, **columns: Any
) -> Snapshot:
    log_use_s = _last_uses(file, listed, grouped)
    created_s, last_use_s = np.full(len(grouped.kind), np.inf), np.full(len(grouped.kind), np.inf)
    np.minimum.at(created_s, copies.group, copies.written_s)
    in_name_s = grouped.from_layout(grouped.layout.written_s, np.nan)
    # Names of our own checkpoints have the time of their save, which a pin that is written later must not change.
    created_s = np.where(np.isnan(in_name_s), created_s, np.minimum(in_name_s, now_s))
    # A group without a known use counts as used when it was first written: a move is no use.
    np.minimum.at(last_use_s, copies.group, copies.written_s)
    of_shard, shard = grouped.shard >= 0, grouped.shard[grouped.shard >= 0]
    in_use, unreported = np.zeros_like(of_shard), np.zeros_like(of_shard)
    in_use[of_shard], unreported[of_shard] = grouped.shards.in_use[shard], grouped.shards.unreported[shard]
    last_use_s = np.fmax(last_use_s, log_use_s)
    last_use_s[of_shard] = np.fmax(last_use_s[of_shard], grouped.shards.last_use_s[shard])
    uses_tracked_since_s = np.where(np.isnan(log_use_s), np.inf, log_use_s)
    uses_tracked_since_s[of_shard] = grouped.shards.uses_tracked_since_s[shard]
    return Snapshot(
        now_s=now_s,
        tiers=tuple(tier.name for tier in file.tiers),
        classes=listed.classes,
        paths=grouped.paths,
        kind=grouped.kind,
        step=grouped.from_layout(grouped.layout.step, NO_STEP),
        run=grouped.from_layout(grouped.layout.run, NO_RUN),
        created_s=created_s,
        last_use_s=last_use_s,
        uses_tracked_since_s=uses_tracked_since_s,
        unreported=unreported,
        in_use=in_use,
        **{name: getattr(copies, name) for name in _COPY_COLUMNS},
        **columns,
    )


def _facts(
    listed: Listing,
    grouped: Grouped,
    copies: Copies,
    complete: NDArray[np.bool_],
    datasets: tuple[FoundDataset, ...],
    conflicts: Collection[int],
) -> dict[str, Any]:
    is_partial = ~complete
    is_partial[[*conflicts]] = False
    lacks = grouped.from_layout(grouped.layout.lacks, NOTHING)[is_partial]
    partial: dict[str, list[str]] = {}
    for number, path in zip(lacks.tolist(), grouped.paths.filter(pa.array(is_partial)).to_pylist(), strict=True):
        partial.setdefault(LACKS[number] or "time to settle, or a whole copy", []).append(path)
    is_listed = np.zeros(len(grouped.shards), np.bool_)
    is_listed[grouped.shard[grouped.shard >= 0]] = True
    missing = grouped.shards.keys.take(pa.array(np.flatnonzero(~is_listed)))
    group_of = copies.group[np.searchsorted(copies.start, copies.differing, side="right") - 1]
    differing = copies.differing[~np.isin(group_of, [*conflicts])]
    return {
        "datasets": datasets,
        "unlisted": listed.unlisted,
        "n_objects": len(listed),
        "orphans": _some(grouped.orphans),
        "missing": _some(missing),
        "unfinished": _some(grouped.unfinished),
        "no_keys": _some(grouped.no_keys),
        "conflicts": _some(grouped.paths.take(pa.array(sorted(conflicts), pa.int64()))),
        "differing": _some(listed.keys.take(pa.array(copies.row[differing])).unique()),
        "incomplete": {lack: len(paths) for lack, paths in partial.items()},
        "incomplete_names": {lack: tuple(paths[:_MANY]) for lack, paths in partial.items()},
    }


def _some(keys: pa.Array) -> tuple[int, tuple[str, ...]]:
    """Return the number of keys, and the first few."""
    return len(keys), tuple(keys.slice(0, _MANY).to_pylist())


# -- conflicts ---------------------------------------------------------------------------------------------------------


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

    Somebody has written a name again whose earlier copy was moved, or has put a copy back by hand: no rule can tell
    which one is wanted. No move touches either until a person has deleted or renamed one of them. No conflict are:

    - A copy that the mover is making (interrupted, as (tier, path)): the journal has it.
    - Objects of one bucket that have several storage classes: they are one copy.
    - While sizes and known checksums are equal: copies none of which the catalog knows, because the catalog was lost,
      and copies of a group that another machine has recalled, whose catalog knows them (a hold names the group). The
      mover compares their bytes before it relies on one.

    Own checkpoints are left out, because their names are unique, and shards, whose checksums are in the manifest.
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


# -- pins of our own checkpoints ---------------------------------------------------------------------------------------

_THREADS = 16


def read_own_pins(file: RuleFile, stores: Stores, listed: Listing, grouped: Grouped, copies: Copies) -> dict[str, Any]:
    """Return the pins of our own checkpoints: `pinned` of a Snapshot, the groups of which any copy is pinned.

    A file that cannot be read counts as a pin, so that nothing is deleted.
    """
    is_own = grouped.from_layout(grouped.layout.own, otherwise=False)
    at = np.flatnonzero(np.repeat(is_own[copies.group], np.diff(copies.start)))
    keys = listed.keys.take(pa.array(copies.row[at]))
    hits = at[match_regex(keys, rf"/{PIN_NAME}$")] if len(at) else at
    copy_of = np.searchsorted(copies.start, hits, side="right") - 1

    def read(hit: int, copy: int) -> str | None:
        key = listed.keys[int(copies.row[hit])].as_py()
        try:
            return parse_pin(stores.store(file.tiers[int(copies.tier[copy])].name).get(key))
        except NotFound:  # deleted since it was listed
            return None
        except StoreError as error:
            if error.retryable:
                raise
            return UNREADABLE_PIN

    with ThreadPoolExecutor(_THREADS, "tiercache-pins") as pool:
        pins = list(pool.map(read, hits.tolist(), copy_of.tolist()))
    groups = copies.group[copy_of].tolist()
    return {"pinned": frozenset(group for group, pin in zip(groups, pins, strict=True) if pin is not None)}
