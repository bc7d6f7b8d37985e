"""The inventory: all objects of all tiers as groups and copies in columns, for the planner and the mover.

::

    list all tiers in parallel -> read the manifests of data sets -> recognise checkpoints among the other objects
        -> copies of groups, whole or not, verified or not -> complete or not -> metrics that rules use

Uncertain objects are left out or marked incomplete, and reported in `facts`: shards that no version names, objects that
are still being written, and data sets that cannot be read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tiercache.catalog import use_log
from tiercache.model import ObjectInfo
from tiercache.store import LocalFolder
from tiercache.tier.columns import index_in, match_regex, sort_order, take_rows
from tiercache.tier.copies import Copies, Objects, copies_at, copies_of
from tiercache.tier.datasets import OWN_KEY, SHARD_KEY, FoundDataset, LiveShards, read_datasets
from tiercache.tier.layouts import LACKS, MEMBER, NO_GROUP, NOTHING, Layout, recognise_layout
from tiercache.tier.listing import Listing, Progress, list_tiers, release_memory
from tiercache.tier.model import CHECKPOINT, FILE, NO_SERIES, NO_STEP, SHARD, Snapshot
from tiercache.tier.moves import ObjectTable
from tiercache.tier.scores import MetricReader, wanted_metrics

if TYPE_CHECKING:
    from tiercache.tier.stores import Stores
    from tiercache.tierfile import RuleFile

# Number of example names that a fact contains.
_MANY = 10


class KnownChecksums(Protocol):
    """The catalog's knowledge of copies."""

    def checksums(self, tier: str, /) -> Mapping[str, tuple[int, str | None, int | None, bool, float | None]]:
        """Return, by key: size, ETag, CRC-32C, whether the bytes were verified, and the time of the first write."""


@dataclass(frozen=True, slots=True, eq=False)
class Inventory:
    """The content of all tiers. Immutable; safe from any thread.

    Attributes:
        snapshot: Snapshot for the planner.
        facts: Further findings, by name:

            - `datasets`: tuple of FoundDataset.
            - `missed`: tiers that were not listed.
            - `n_objects`: number of listed objects; `n_own`: number of tiercache's own objects among them.
            - Findings with a count and example names: `orphans` (shards that no version names), `missing` (shards that
              no tier has), `unfinished` (objects that are still being written), `no_keys` (names that are not valid
              keys), `differing` (objects that differ between two tiers), `unread` (checkpoints whose metrics cannot be
              read).
            - `incomplete`: number of incomplete checkpoints, by what they lack.
            - `in_files`: group to the names of the metrics in its files, for groups whose files were read.
            - `missing_shards`: keys of all shards that no tier has and that are not placed elsewhere, and the time when
              each was first named, in seconds since the epoch.
    """

    snapshot: Snapshot
    facts: Mapping[str, Any]
    _listed: Listing = field(repr=False)
    _copies: Copies = field(repr=False)

    def objects(self, group: int, tier: int) -> tuple[ObjectInfo, ...]:
        """Return the objects of a group's copy in a tier; empty: there is no such copy. The final objects come last.

        Their crc32c comes from the store, the manifest or the catalog, if it is valid for the current object.
        """
        copy = self._copies.find(group, tier)
        if copy is None:
            return ()
        start, end = self._copies.start[copy : copy + 2].tolist()
        return self._listed.objects(self._copies.row[start:end], self._copies.crc32c[start:end])

    def lies(self, keys: pa.Array) -> NDArray[np.bool_]:
        """Return whether an object with each key was listed in any tier; bool[len(keys)]."""
        return index_in(keys, self._listed.keys) >= 0

    def pieces(self, groups: NDArray[np.int64], tiers: NDArray[np.int8]) -> ObjectTable:
        """Return the objects of many copies as columns: for each group, its copy in the tier at the same index.

        See objects().
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
    known: KnownChecksums,
    *,
    now_s: float,
    on_progress: Progress | None = None,
    may_miss: Collection[str] = (),
) -> Inventory:
    """List all tiers and return their content.

    Args:
        file: Rule file.
        stores: Stores of its tiers.
        known: Catalog.
        now_s: Current time, in seconds since the epoch.
        on_progress: Callback that receives (tier, number of objects listed so far), from several threads.
        may_miss: Tiers that are left out if they cannot be listed; `facts["missed"]` names them.

    Raises:
        StoreError: A tier cannot be listed, or an object that decides about moves cannot be read now.
        ValueError: The URL or the options of a tier's store are invalid.
    """
    listed = list_tiers(file, stores, now_s=now_s, on_progress=on_progress, may_miss=may_miss)
    release_memory()
    own = match_regex(listed.keys, OWN_KEY)
    shards, datasets = read_datasets(file, stores, listed, pa.array(np.flatnonzero(own)), now_s=now_s)
    grouped = _grouped(listed, own, shards)
    release_memory()
    copies = copies_of(listed, grouped.objects, lambda tier: known.checksums(file.tiers[tier].name))
    complete = _complete(grouped, copies, now_s=now_s, settle_s=file.tiering.quiet_period_s)
    scores = MetricReader(stores, tuple(tier.name for tier in file.tiers), listed, copies)
    metrics = scores.of(wanted_metrics(file), grouped.paths, np.flatnonzero(grouped.kind == CHECKPOINT))
    links = _links(file, stores, listed, grouped.paths, copies)
    of_groups = {
        "links": links,
        "complete": complete,
        "metrics": metrics,
        "unread": _unread(scores.unread, copies, len(grouped.kind)),
    }
    used = _Used.of(file, listed, grouped)
    snapshot = _snapshot(file, listed, grouped, copies, used, now_s=now_s, **of_groups)
    facts = _facts(listed, grouped, copies, complete, datasets)
    more = {
        "n_own": int(own.sum()),
        "unread": _some(grouped.paths.take(pa.array(scores.unread))),
        "in_files": scores.in_files,
    }
    return Inventory(snapshot, facts | more, listed, copies)


# -- groups -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Grouped:
    """All groups, sorted by path.

    Attributes:
        paths: Paths of the groups.
        kind: uint8[n_groups].
        shard: int64[n_groups], row of the group in `shards`; -1: no shard.
        of: int64[n_groups], number of the group in `layout`; -1: a shard.
        layout: Files and checkpoints.
        shards: Live shards of all data sets.
        objects: Objects that belong to groups.
        orphans: Keys of shards that no version names.
        unfinished: Keys that are still being written.
        no_keys: Names that are not valid keys.
    """

    paths: pa.Array
    kind: NDArray[np.uint8]
    shard: NDArray[np.int64]
    of: NDArray[np.int64]
    layout: Layout
    shards: LiveShards
    objects: Objects
    orphans: pa.Array
    unfinished: pa.Array
    no_keys: pa.Array

    def from_layout(self, column: NDArray[Any], otherwise: object) -> NDArray[Any]:
        """Expand a column of the layout's groups to all groups."""
        found = np.full(len(self.kind), otherwise, column.dtype)
        found[self.of >= 0] = column[self.of[self.of >= 0]]
        return found


def _grouped(listed: Listing, own: NDArray[np.bool_], shards: LiveShards) -> _Grouped:
    rows = np.flatnonzero(~own)
    keys, key = _numbered(take_rows(listed.keys, rows))
    release_memory()
    shard = index_in(keys, shards.keys)
    is_orphan = (shard < 0) & match_regex(keys, SHARD_KEY)
    others = np.flatnonzero((shard < 0) & ~is_orphan)
    layout = recognise_layout(take_rows(keys, others))
    release_memory()
    is_shard = np.flatnonzero(shard >= 0)
    # A checkpoint folder may have the name of a shard; paths of the snapshot must be unique, so the folder wins.
    is_shard = is_shard[index_in(keys.take(pa.array(is_shard)), layout.paths) < 0]
    paths = pa.concat_arrays([layout.paths, keys.take(pa.array(is_shard))]) if len(is_shard) else layout.paths
    order = sort_order(paths)
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    group = np.full(len(keys), NO_GROUP, np.int64)
    in_layout = layout.group != NO_GROUP
    group[others[in_layout]] = place[layout.group[in_layout]]
    group[is_shard] = place[len(layout.paths) :]
    of = np.where(order < len(layout.paths), order, -1)
    shard_of = np.full(len(order), -1, np.int64)
    shard_of[group[is_shard]] = shard[is_shard]
    kind = np.full(len(order), FILE, np.uint8)
    kind[of >= 0] = np.where(layout.checkpoint[of[of >= 0]], CHECKPOINT, FILE)
    kind[of < 0] = SHARD
    left = ~in_layout
    return _Grouped(
        paths=take_rows(paths, order),
        kind=kind,
        shard=shard_of,
        of=of,
        layout=layout,
        shards=shards,
        objects=_objects(rows, keys, key, _Columns(group, shard, others), (layout, shards)),
        orphans=keys.take(pa.array(np.flatnonzero(is_orphan))),
        unfinished=keys.take(pa.array(others[left & layout.unfinished])),
        no_keys=keys.take(pa.array(others[left & ~layout.unfinished])),
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Columns:
    """Columns by key: the group and the row among the shards; and the keys that the layout covers."""

    group: NDArray[np.int64]
    shard: NDArray[np.int64]
    others: NDArray[np.int64]


def _numbered(keys: pa.Array) -> tuple[pa.Array, NDArray[np.int64]]:
    """Return the distinct keys, sorted, and the number of each key."""
    encoded = keys.dictionary_encode()
    order = sort_order(encoded.dictionary)
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    return take_rows(encoded.dictionary, order), place[np.asarray(encoded.indices.to_numpy(), np.int64)]


def _objects(
    rows: NDArray[np.int64], keys: pa.Array, key: NDArray[np.int64], of: _Columns, known: tuple[Layout, LiveShards]
) -> Objects:
    layout, shards = known
    rank, unfinished = np.full(len(keys), MEMBER, np.uint8), np.zeros(len(keys), np.bool_)
    rank[of.others], unfinished[of.others] = layout.rank, layout.unfinished
    on_top = np.zeros(len(keys), np.bool_)
    on_top[of.others] = layout.on_top
    mine = of.group[key] != NO_GROUP
    rows, key = rows[mine], key[mine]
    is_shard = of.shard[key] >= 0
    at = of.shard[key][is_shard]
    n_bytes, crc32c = np.zeros(len(key), np.int64), np.zeros(len(key), np.int64)
    n_bytes[is_shard], crc32c[is_shard] = shards.n_bytes[at], shards.crc32c[at]
    return Objects(
        row=rows,
        key=key,
        group=of.group[key].astype(np.int32),
        rank=rank[key],
        is_shard=is_shard,
        n_bytes=n_bytes,
        crc32c=crc32c,
        unfinished=unfinished[key],
        on_top=on_top[key],
    )


# -- completeness, links, use, and the snapshot ----------------------------------------------------------------------


def _complete(grouped: _Grouped, copies: Copies, *, now_s: float, settle_s: float) -> NDArray[np.bool_]:
    """Return whether each checkpoint is complete in some tier: by its names, and because nobody writes it any more.

    A copy is finished if it was verified (only complete checkpoints are moved), if its final object exists and no other
    object is newer, or if no object has changed for settle_s.
    """
    settled = now_s - copies.modified_s >= settle_s
    closed = (copies.marked_s > -np.inf) & (copies.rest_s <= copies.marked_s) & ~copies.unfinished
    good = copies.whole & (copies.verified | settled | closed)
    complete = np.zeros(len(grouped.kind), np.bool_)
    complete[copies.group[good]] = True
    lacks = grouped.from_layout(grouped.layout.lacks, NOTHING)
    complete &= lacks == NOTHING
    complete[grouped.kind != CHECKPOINT] = True
    return complete


def _unread(groups: NDArray[np.int64], copies: Copies, n_groups: int) -> NDArray[np.bool_]:
    """Return the groups whose metrics cannot be read, without those that the mover has put where they are.

    A checkpoint that the mover has moved was not among the best while its metrics were readable.
    """
    found = np.zeros(n_groups, np.bool_)
    found[groups] = True
    found[copies.group[copies.verified]] = False
    return found


def _links(file: RuleFile, stores: Stores, listed: Listing, paths: pa.Array, copies: Copies) -> dict[int, str]:
    """Return, by copy, a symbolic link in its tier that points to the copy or into it."""
    found: dict[int, str] = {}
    for number in listed.tiers:
        store = stores.store(file.tiers[number].name)
        if not isinstance(store, LocalFolder):
            continue
        # The target may be the group, or lie in a folder that is one.
        pairs = [(link, above) for link, key in sorted(store.links()) for above in _with_folders(key)]
        pairs = [(link, above) for link, above in pairs if not link.startswith(f"{above}/")]  # moves with the group
        rows = index_in(pa.array([above for _, above in pairs], pa.large_string()), paths)
        for (link, _), row in zip(pairs, rows.tolist(), strict=True):
            copy = copies.find(row, number) if row >= 0 else None
            if copy is not None:
                found.setdefault(copy, link)
    return found


def _with_folders(key: str) -> list[str]:
    """Return the key and the folders that contain it."""
    return [key, *(key[:end] for end in range(len(key) - 1, 0, -1) if key[end] == "/")]


@dataclass(frozen=True, slots=True, eq=False)
class _Used:
    """Uses of each group, from the read logs of caches on this machine. last_s: NaN if the logs have none."""

    last_s: NDArray[np.float64]
    uses: NDArray[np.int64]

    @classmethod
    def of(cls, file: RuleFile, listed: Listing, grouped: _Grouped) -> _Used:
        """Aggregate the logs: the use of any object, in any tier, is a use of its group."""
        n_groups = len(grouped.kind)
        last_s, counts = np.full(n_groups, np.nan), np.zeros(n_groups, np.int64)
        try:
            known = use_log.read_uses()
        except (OSError, ValueError):  # there is no usable state folder, so that no use is known
            known = {}
        for number in listed.tiers if known else ():
            found = use_log.uses_under(known, file.tiers[number].url)
            rows = np.flatnonzero(listed.tier[grouped.objects.row] == number)
            keys = take_rows(listed.keys, grouped.objects.row[rows])
            at = index_in(keys, pa.array(list(found), pa.large_string()))
            rows, at = rows[at >= 0], at[at >= 0]
            group = grouped.objects.group[rows]
            columns = np.array(list(found.values()), np.float64).reshape(-1, 2)[at]
            np.fmax.at(last_s, group, columns[:, 0])
            np.add.at(counts, group, columns[:, 1].astype(np.int64))
        return cls(last_s, counts)


def _snapshot(
    file: RuleFile, listed: Listing, grouped: _Grouped, copies: Copies, used: _Used, *, now_s: float, **columns: Any
) -> Snapshot:
    created_s, last_use_s = np.full(len(grouped.kind), np.inf), np.full(len(grouped.kind), np.inf)
    np.minimum.at(created_s, copies.group, copies.written_s)
    # A group without a known use counts as used when its oldest copy was written: a restored copy is not idle at once.
    np.minimum.at(last_use_s, copies.group, copies.modified_s)
    of_shard, shard = grouped.shard >= 0, grouped.shard[grouped.shard >= 0]
    n_uses, in_use, unreported = used.uses.copy(), np.zeros_like(of_shard), np.zeros_like(of_shard)
    n_uses[of_shard] += grouped.shards.uses[shard]
    in_use[of_shard], unreported[of_shard] = grouped.shards.in_use[shard], grouped.shards.unreported[shard]
    last_use_s = np.fmax(last_use_s, used.last_s)
    last_use_s[of_shard] = np.fmax(last_use_s[of_shard], grouped.shards.last_use_s[shard])
    counted_since_s = np.where(np.isnan(used.last_s), np.inf, used.last_s)
    counted_since_s[of_shard] = grouped.shards.counted_since_s[shard]
    return Snapshot(
        now_s=now_s,
        tiers=tuple(tier.name for tier in file.tiers),
        classes=listed.classes,
        paths=grouped.paths,
        kind=grouped.kind,
        step=grouped.from_layout(grouped.layout.step, NO_STEP),
        series=grouped.from_layout(grouped.layout.series, NO_SERIES),
        created_s=created_s,
        last_use_s=last_use_s,
        uses=n_uses,
        uses_recorded_since_s=counted_since_s,
        unreported=unreported,
        in_use=in_use,
        tags={},
        group=copies.group,
        tier=copies.tier,
        n_objects=copies.n_objects,
        n_bytes=copies.n_bytes,
        smallest_bytes=copies.smallest_bytes,
        modified_s=copies.modified_s,
        storage_class=copies.storage_class,
        state=copies.state,
        whole=copies.whole,
        verified=copies.verified,
        **columns,
    )


def _facts(
    listed: Listing, grouped: _Grouped, copies: Copies, complete: NDArray[np.bool_], datasets: tuple[FoundDataset, ...]
) -> dict[str, Any]:
    lacks = grouped.from_layout(grouped.layout.lacks, NOTHING)[~complete]
    there = np.zeros(len(grouped.shards), np.bool_)
    there[grouped.shard[grouped.shard >= 0]] = True
    missing = grouped.shards.keys.take(pa.array(np.flatnonzero(~there)))
    lacking = np.flatnonzero(~there & ~grouped.shards.elsewhere)
    differing = listed.keys.take(pa.array(copies.row[copies.differing])).unique()
    return {
        "datasets": datasets,
        "missed": listed.missed,
        "n_objects": len(listed),
        "orphans": _some(grouped.orphans),
        "missing": _some(missing),
        "missing_shards": (grouped.shards.keys.take(pa.array(lacking)), grouped.shards.named_s[lacking]),
        "unfinished": _some(grouped.unfinished),
        "no_keys": _some(grouped.no_keys),
        "differing": _some(differing),
        "incomplete": dict(Counter(LACKS[number] or "time to settle, or a whole copy" for number in lacks.tolist())),
    }


def _some(keys: pa.Array) -> tuple[int, tuple[str, ...]]:
    """Return the number of keys, and the first few."""
    return len(keys), tuple(keys.slice(0, _MANY).to_pylist())
