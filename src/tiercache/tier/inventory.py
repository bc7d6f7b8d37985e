"""Takes the inventory: groups, their copies, and the snapshot for the planner.

::

    list all tiers in parallel -> read the manifests of data sets -> recognise checkpoints among the other objects
        -> copies of groups, whole or not, verified or not -> complete or not -> metrics that rules use

Uncertain objects are left out or marked incomplete, and reported in `facts`. Metrics that the names of checkpoints do
not contain are read from small JSON files in their folders, in parallel, and only if a rule uses them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tiercache.errors import CorruptShard, NotFound, StoreError, UnsupportedFormat
from tiercache.keep import PIN_NAME, UNREADABLE_PIN, parse_pin
from tiercache.model import OWN_FOLDER, ObjectInfo
from tiercache.shard import versions as manifest
from tiercache.shard.versions import VERSIONS_FOLDER, SegmentRef, ShardTable, Version, read_segments
from tiercache.store import LocalFolder, Store, placement_log, uses
from tiercache.store.placement_log import prefix_store
from tiercache.store.remote import call_threads
from tiercache.store.uses import read_uses, uses_under
from tiercache.tier.checkpoint_names import (
    LACKS,
    NO_GROUP,
    NOTHING,
    KeyGroups,
    UserLayout,
    finite_metric,
    group_keys,
    metrics_in_names,
)
from tiercache.tier.journal import TierCatalog
from tiercache.tier.listing import (
    Copies,
    Listing,
    ListingProgress,
    Objects,
    ObjectTable,
    copies_at,
    copies_of,
    find_conflicts,
    list_tiers,
    release_memory,
)
from tiercache.tier.rules import RuleFile
from tiercache.tier.snapshot import (
    CHECKPOINT,
    FILE,
    NO_RUN,
    NO_STEP,
    READABLE,
    RESTORED,
    SHARD,
    Snapshot,
)
from tiercache.tier.stores import HOLDS_FOLDER, Hold, Holds, Stores, read_holds
from tiercache.tier.text_columns import (
    ROWS_AT_A_TIME,
    index_in,
    inverse,
    match_regex,
    sort_order,
    split_keys,
    take_rows,
)

_COPY_COLUMNS = (
    *("group", "tier", "n_objects", "n_bytes", "smallest_bytes"),
    *("modified_s", "storage_class", "state", "whole", "verified"),
)


# A checkpoint without a completing object is complete if none of its files has changed for this time.
QUIET_PERIOD_S = 600.0
# Number of example names that a fact contains.
_MANY = 10


@dataclass(frozen=True, slots=True, eq=False)
class Inventory:
    """The content of all tiers. Immutable; safe from any thread.

    `facts` contains further findings, by name:

    - `datasets`: tuple of FoundDataset.
    - Findings with a count and example names: `orphans` (shards that no version names), `missing` (shards that no tier
      has), `unfinished` (objects that are still being written), `no_keys` (names that are not valid keys),
      `conflicts` (groups of which two tiers have different objects), `differing` (objects of other groups that differ
      between two tiers).
    - `incomplete`: number of incomplete checkpoints, by what they lack; `incomplete_names`: example names of each.
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
) -> Inventory:
    """List all tiers and return their content.

    on_progress: Called from several threads. Raises StoreError if a tier cannot be listed, or an object that decides
    about moves cannot be read now.
    """
    listed = list_tiers(file, stores, now_s=now_s, on_progress=on_progress)
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
    may_conflict = (grouped.of >= 0) & ~grouped.from_layout(grouped.layout.own, otherwise=False)
    conflicts = find_conflicts(
        listed, copies, grouped.paths, may_conflict, file.tiers, interrupted=interrupted, recalled=holds.recalled
    )
    complete = _complete(grouped, copies, now_s=now_s)
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
        links=_links(file, stores, grouped.paths, copies),
        complete=complete,
        metrics=found.columns,
        unread=unread,
        immovable=_shards_elsewhere(file, stores, grouped, datasets) | conflicts,
        **read_own_pins(file, stores, listed, grouped, copies),
        held=_held_groups(holds.in_force(), grouped.paths),
    )
    return Inventory(snapshot, _facts(listed, grouped, copies, complete, datasets, conflicts), listed, copies)


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
        objects=Objects(
            rows, key, group.astype(np.int32), shard, rank, unfinished, on_top, shards.n_bytes, shards.crc32c
        ),
        orphans=keys.take(pa.array(np.flatnonzero(is_orphan))),
        unfinished=keys.take(pa.array(others[~in_layout & layout.unfinished])),
        no_keys=keys.take(pa.array(others[~in_layout & ~layout.unfinished])),
    )


def _numbered(keys: pa.Array) -> tuple[pa.Array, NDArray[np.int64]]:
    encoded = keys.dictionary_encode()
    order = sort_order(encoded.dictionary)
    position = inverse(order)
    return take_rows(encoded.dictionary, order), position[np.asarray(encoded.indices.to_numpy(), np.int64)]


# -- completeness, links, use, and the snapshot ----------------------------------------------------------------------


def _complete(grouped: Grouped, copies: Copies, *, now_s: float) -> NDArray[np.bool_]:
    """Return whether each checkpoint is complete in some tier: by its names, and because nobody writes it any more.

    A copy is finished if it was verified (only complete checkpoints are moved), if its completing object exists and no
    other object is newer, or if no object has changed for QUIET_PERIOD_S.
    """
    settled = now_s - copies.modified_s >= QUIET_PERIOD_S
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


def _links(file: RuleFile, stores: Stores, paths: pa.Array, copies: Copies) -> dict[int, str]:
    folders = {
        number: store
        for number, tier in enumerate(file.tiers)
        if isinstance(store := stores.store(tier.name), LocalFolder)
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
    above = [key, *(key[:end] for end in range(len(key) - 1, 0, -1) if key[end] == "/")] if key else []
    for row in index_in(pa.array(above, pa.large_string()), paths).tolist():
        copy = copies.find(row, tier) if row >= 0 else None
        if copy is not None:
            return copy
    return None


def _interrupted_copies(file: RuleFile, catalog: TierCatalog) -> frozenset[tuple[int, str]]:
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


def _last_uses(file: RuleFile, listed: Listing, grouped: Grouped) -> NDArray[np.float64]:
    """Return the last use of each group, from the read logs of caches on this machine; NaN: unknown.

    The use of any object, in any tier, is a use of its group.
    """
    last_s = np.full(len(grouped.kind), np.nan)
    try:
        uses = read_uses()
    except (OSError, ValueError):  # there is no usable state folder, so that no use is known
        uses = {}
    for number, tier in enumerate(file.tiers if uses else ()):
        found = uses_under(uses, tier.url)
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
    return len(keys), tuple(keys.slice(0, _MANY).to_pylist())


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

    with call_threads(_THREADS, "tiercache-pins") as pool:
        pins = list(pool.map(read, hits.tolist(), copy_of.tolist()))
    groups = copies.group[copy_of].tolist()
    return {"pinned": frozenset(group for group, pin in zip(groups, pins, strict=True) if pin is not None)}


OWN_KEY = rf"(?:^|/){re.escape(OWN_FOLDER)}"
SHARD_KEY = r"\.tcs$"

_VERSION_KEY = rf"^(?P<folder>(?:.*/)?){re.escape(VERSIONS_FOLDER)}(?P<number>[0-9]{{20}})\.json$"


@dataclass(frozen=True, slots=True)
class FoundDataset:
    folder: str  # folder below the URL of a tier; "" or ending in "/"
    tier: str  # name of the tier from which its versions were read
    is_tracked: bool = False  # whether machines report uses of the data set
    problem: str = ""  # reason why the data set is left alone; "": there is none


@dataclass(frozen=True, slots=True, eq=False)
class LiveShards:
    """The live shards of all data sets. Row i of every column is one; keys are unique."""

    keys: pa.Array  # large_string[n], below the URL of a tier
    n_bytes: NDArray[np.int64]  # from the manifests
    crc32c: NDArray[np.int64]  # from the manifests
    last_use_s: NDArray[np.float64]  # NaN where no use was reported
    in_use: NDArray[np.bool_]
    unreported: NDArray[np.bool_]  # whether a machine that may read the data set has not reported
    uses_tracked_since_s: NDArray[np.float64]  # time since which machines report uses; inf: they do not yet

    def __len__(self) -> int:
        return len(self.keys)


def _no_shards() -> LiveShards:
    ints, floats, flags = np.empty(0, np.int64), np.empty(0, np.float64), np.empty(0, np.bool_)
    keys = pa.nulls(0, pa.large_string())  # pa.array() of a list imports pandas, which costs 150 ms
    return LiveShards(keys, ints, ints, floats, flags, flags, floats)


def read_datasets(
    file: RuleFile, stores: Stores, listed: Listing, own: pa.Array, *, now_s: float
) -> tuple[LiveShards, tuple[FoundDataset, ...]]:
    shards, found = [], []
    own_keys = listed.keys.take(own)
    for (folder, tier), numbers in sorted(_versions_of(file, listed, own, own_keys).items()):
        reader = _DatasetReader(stores, folder, file.tiers[tier].name)
        some, dataset = reader.read(numbers, own_keys, now_s)
        shards.append(some)
        found.append(dataset)
    return _joined(shards), tuple(found)


def _versions_of(
    file: RuleFile, listed: Listing, own: pa.Array, own_keys: pa.Array
) -> dict[tuple[str, int], list[int]]:
    parts = pc.extract_regex(own_keys, _VERSION_KEY)
    rows = np.flatnonzero(np.asarray(pc.is_valid(parts).to_numpy(zero_copy_only=False), np.bool_))
    parts = parts.take(pa.array(rows, pa.int64()))
    tiers = listed.tier[np.asarray(own.to_numpy(zero_copy_only=False), np.int64)[rows]].tolist()
    everywhere: dict[str, dict[int, list[int]]] = {}
    for folder, number, tier in zip(
        pc.struct_field(parts, "folder").to_pylist(), pc.struct_field(parts, "number").to_pylist(), tiers, strict=True
    ):
        if int(number):
            everywhere.setdefault(folder, {}).setdefault(tier, []).append(int(number))
    home = file.index(file.home_tier.name)
    chosen = {folder: home if home in by_tier else min(by_tier) for folder, by_tier in everywhere.items()}
    return {(folder, tier): sorted(everywhere[folder][tier]) for folder, tier in chosen.items()}


class _DatasetReader:
    def __init__(self, stores: Stores, folder: str, tier: str) -> None:
        self._folder, self._tier = folder, tier
        self._store = prefix_store(stores.store(tier), folder)

    def read(self, numbers: Sequence[int], own_keys: pa.Array, now_s: float) -> tuple[LiveShards, FoundDataset]:
        try:
            versions = self._versions(numbers)
            table = self._table(versions)
        except (CorruptShard, UnsupportedFormat) as error:
            return _no_shards(), FoundDataset(self._folder, self._tier, problem=str(error))
        has_tracking_marker = bool(
            match_regex(own_keys, f"^{re.escape(self._folder + placement_log.TRACKING_MARKER_KEY)}$").any()
        )
        reports = match_regex(own_keys, f"^{re.escape(self._folder + uses.USAGE_FOLDER)}").any()
        found = uses.read_reports(self._store) if reports else []
        used = uses.merge_reports(found, table.names, now_s=now_s)
        # Without the tracking marker, readers do not report: a data set that is read daily must not be archived on the
        # day of the first rules. A marker may have no date: uses have been tracked for long then.
        since_s = (placement_log.tracked_since_s(self._store) or 0.0) if has_tracking_marker else np.inf
        names = pa.concat_arrays([pa.nulls(0, pa.large_string()), *table.names.chunks])
        shards = LiveShards(
            keys=pc.binary_join_element_wise(pa.scalar(self._folder, names.type), names, pa.scalar("", names.type)),
            n_bytes=table.n_bytes,
            crc32c=table.crc32c.astype(np.int64),
            last_use_s=used.last_use_s,
            in_use=used.in_use,
            unreported=np.full(len(table), used.unreported),
            uses_tracked_since_s=np.full(len(table), since_s),
        )
        return shards, FoundDataset(self._folder, self._tier, is_tracked=has_tracking_marker)

    def _versions(self, numbers: Sequence[int]) -> list[Version]:
        def read(number: int) -> Version | None:
            try:
                return manifest.read_version(self._store, number)
            except NotFound:
                return None

        with call_threads(min(_THREADS, len(numbers)), "tiercache-versions") as pool:
            found = list(pool.map(read, numbers))
        return [version for version in found if version is not None]

    def _table(self, versions: Sequence[Version]) -> ShardTable:
        refs: dict[tuple[str, str], SegmentRef] = {}
        for version in versions:
            for ref in version.segments:
                refs[version.dataset_id, ref.name] = ref
        tables: list[pa.Table] = []
        for dataset_id in dict.fromkeys(dataset_id for dataset_id, _ in refs):
            tables += read_segments(self._store, dataset_id, [ref for key, ref in refs.items() if key[0] == dataset_id])
        table = ShardTable(tables)
        first = np.flatnonzero(index_in(table.names, table.names) == np.arange(len(table)))
        return table if len(first) == len(table) else ShardTable([table.arrow.take(pa.array(first))])


def _joined(shards: Sequence[LiveShards]) -> LiveShards:
    every = [_no_shards(), *shards]
    keys = pa.concat_arrays([one.keys for one in every])
    rows = np.flatnonzero(index_in(keys, keys) == np.arange(len(keys)))

    def column(name: str) -> NDArray[np.float64]:
        joined: NDArray[np.float64] = np.concatenate([getattr(one, name) for one in every])
        return joined[rows]

    columns = {one.name: column(one.name) for one in fields(LiveShards) if one.name != "keys"}
    return LiveShards(keys=keys.take(pa.array(rows, pa.int64())), **columns)  # type: ignore[arg-type]


# In ascending precedence. The first is Orbax's: a file "metrics" in a folder "metrics".
METRIC_FILES = ("metrics/metrics", "metadata.json", "trainer_state.json", "metrics.json")
# The Trainer log of a long run has some MiB.
MAX_BYTES = 16 << 20
# Matches the keys of objects that read_metrics() may read.
MAY_HOLD = rf"(?:^|/)(?:{'|'.join(map(re.escape, METRIC_FILES))})$"
# Keys of a Trainer log line that describe progress and are not metrics.
_NO_METRICS = ("step", "epoch", "total_flos")


def files_of(objects: Iterable[ObjectInfo]) -> tuple[ObjectInfo, ...]:
    """Return the objects of a checkpoint that may hold metrics, in the order of METRIC_FILES.

    Of two with the same name, the one nearest to the top is used; objects above MAX_BYTES are left out.
    """
    found: dict[str, ObjectInfo] = {}
    for one in objects:
        name = _file_name(one.key)
        if name in METRIC_FILES and (name not in found or one.key.count("/") < found[name].key.count("/")):
            found[name] = one
    return tuple(found[name] for name in METRIC_FILES if name in found and found[name].n_bytes <= MAX_BYTES)


def _file_name(key: str) -> str:
    parts = key.split("/")
    name = "/".join(parts[-2:])
    return name if name in METRIC_FILES else parts[-1]


def read_metrics(store: Store, objects: Sequence[ObjectInfo]) -> dict[str, float]:
    """Return the metrics in the small files of a checkpoint. Raises StoreError if one cannot be read now."""
    found: dict[str, float] = {}
    for one in files_of(objects):
        try:
            data, info = store.read_tail(one.key, MAX_BYTES)
        except NotFound:  # deleted since it was listed
            continue
        if info.n_bytes <= MAX_BYTES:
            found |= parse_metrics(_file_name(one.key), data)
    return found


def parse_metrics(name: str, data: bytes) -> dict[str, float]:
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(body, dict):
        return {}
    return _of_trainer(body) if name == "trainer_state.json" else dict(_numbers(body))


def _of_trainer(body: Mapping[str, Any]) -> dict[str, float]:
    """Return what Trainer logged at the step of the checkpoint. best_metric is ignored: it is the best value so far."""
    step, log = body.get("global_step"), body.get("log_history")
    found: dict[str, float] = {}
    for line in log if isinstance(log, list) else ():
        if isinstance(line, dict) and line.get("step") == step:
            found |= {name: value for name, value in _numbers(line) if name not in _NO_METRICS}
    return found


def _numbers(body: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield names and numbers of a table, and of nested tables as "table/name"; names in `metrics` get no prefix."""
    for name, value in body.items():
        inner = value.items() if isinstance(value, dict) else [("", value)]
        for key, one in inner:
            if isinstance(one, int | float) and not isinstance(one, bool):
                joined = key if name == "metrics" and key else f"{name}/{key}".rstrip("/")
                yield from finite_metric(joined, one).items()


_MAY_NAME = r"=|\d\.\d"


@dataclass(frozen=True, slots=True, eq=False)
class CheckpointMetrics:
    columns: Mapping[str, NDArray[np.float64]]  # by name, of all groups; NaN where there is none
    unread: NDArray[np.int64]  # ascending: groups with files that may hold metrics, none of which can be read


def find_metrics(
    file: RuleFile, stores: Stores, listed: Listing, copies: Copies, paths: pa.Array, checkpoints: NDArray[np.int64]
) -> CheckpointMetrics:
    """Find the metrics that keep lists use, in the names and files of checkpoints. checkpoints: Numbers of groups.

    No file is read if no rule uses a metric, or if a checkpoint's name contains each metric. Raises
    StoreError if a file exists and cannot be read now, so that the best checkpoints are unknown.
    """
    names = sorted({best.metric for rule in file.rules for keep in rule.keep.values() for best in keep.best})
    columns = {name: np.full(len(paths), np.nan) for name in names}
    if not names:
        return CheckpointMetrics(columns, np.empty(0, np.int64))
    for groups in _parts(checkpoints):
        texts = paths.take(pa.array(groups))
        may_name = match_regex(texts, _MAY_NAME)
        last = split_keys(texts.filter(pa.array(may_name)))[2]
        for name, column in metrics_in_names(last, names).items():
            columns[name][groups[may_name]] = column
    lacking = checkpoints[np.isnan(np.array([column[checkpoints] for column in columns.values()])).any(axis=0)]
    copy_of = _copies_to_read(listed, copies, lacking)
    unread = [group for group, copy in copy_of.items() if copy is None]
    readable = {group: copy for group, copy in copy_of.items() if copy is not None}

    def read(group: int) -> Mapping[str, float] | None:
        copy = readable[group]
        start, end = copies.start[copy : copy + 2].tolist()
        rows = copies.row[start:end]
        rows = rows[_may_hold(listed, rows)]
        keys = listed.keys.take(pa.array(rows)).to_pylist()
        objects = [ObjectInfo(*one) for one in zip(keys, listed.n_bytes[rows].tolist(), strict=True)]
        store = stores.store(file.tiers[int(copies.tier[copy])].name)
        try:
            return read_metrics(store, objects)
        except StoreError as error:
            if error.retryable:
                raise
            return None

    with call_threads(_THREADS, "tiercache-metrics") as pool:
        for group, metrics in zip(readable, pool.map(read, readable), strict=True):
            if metrics is None:
                unread.append(group)
                continue
            for name, column in columns.items():
                if name in metrics and np.isnan(column[group]):  # a metric in the name has precedence
                    column[group] = metrics[name]
    return CheckpointMetrics(columns, np.array(sorted(unread), np.int64))


def _copies_to_read(listed: Listing, copies: Copies, groups: NDArray[np.int64]) -> dict[int, int | None]:
    is_asked_for = np.zeros(int(copies.group.max(initial=-1)) + 1, np.bool_)
    is_asked_for[groups] = True
    copy_of = np.repeat(np.arange(len(copies.group)), copies.n_objects)
    at = np.flatnonzero(is_asked_for[copies.group[copy_of]])
    at = np.concatenate([at[:0], *(some[_may_hold(listed, copies.row[some])] for some in _parts(at))])
    found: dict[int, int | None] = {}
    for copy in np.unique(copy_of[at]).tolist():
        group = int(copies.group[copy])
        if found.get(group) is None:
            found[group] = copy if copies.state[copy] in (READABLE, RESTORED) else None
    return found


def _may_hold(listed: Listing, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    return match_regex(listed.keys.take(pa.array(rows)), MAY_HOLD)


def _parts(rows: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    for start in range(0, len(rows), ROWS_AT_A_TIME):
        yield rows[start : start + ROWS_AT_A_TIME]
