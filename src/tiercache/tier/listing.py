"""Lists all tiers in parallel into columns, and finds the copies of groups that the objects form, and conflicts.

1,000,000 objects take about 150 MB.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import combinations
from threading import Event
from typing import NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tiercache.errors import StoreError
from tiercache.model import ObjectInfo, format_bytes
from tiercache.store.remote import call_threads
from tiercache.tier.checkpoint_names import COMPLETING
from tiercache.tier.rules import RuleFile, Tier
from tiercache.tier.snapshot import (
    ARCHIVED,
    READABLE,
    RESTORED,
    RESTORING,
)
from tiercache.tier.stores import Stores, state_of
from tiercache.tier.text_columns import ROWS_AT_A_TIME, as_numpy, index_in

# Callback (tier, number of its objects listed so far), called from several threads.
ListingProgress: TypeAlias = Callable[[str, int], None]

NO_CRC = -1
# Rows that are Python objects at a time, few enough for the processor's cache: 16,384 took 1.5 times as long.
_BATCH = 1 << 10
_LARGE = pa.large_string()
_COLUMNS = {
    "key": _LARGE,
    "etag": _LARGE,
    "tier": pa.int8(),
    "n_bytes": pa.int64(),
    "modified_s": pa.float64(),
    "crc32c": pa.int64(),
    "storage_class": _LARGE,
    "restore": _LARGE,
}


@dataclass(frozen=True, slots=True, eq=False)
class Listing:
    classes: tuple[str, ...]  # names of storage classes; "" is the store's default
    keys: pa.Array  # large_string
    etags: pa.Array  # large_string, null where the store gives none
    tier: NDArray[np.int8]
    n_bytes: NDArray[np.int64]
    modified_s: NDArray[np.float64]  # where the store gives none, the time of the listing, the latest time possible
    crc32c: NDArray[np.int64]  # NO_CRC where it is unknown
    storage_class: NDArray[np.int16]  # indices of `classes`
    state: NDArray[np.uint8]  # READABLE, ARCHIVED, RESTORING or RESTORED

    def __len__(self) -> int:
        return len(self.keys)


def list_tiers(
    file: RuleFile,
    stores: Stores,
    *,
    now_s: float,
    on_progress: ListingProgress | None = None,
) -> Listing:
    """List all tiers; tiers with the same URL share one listing, which one thread makes."""
    stop = Event()

    def batches(names: tuple[str, ...]) -> list[pa.RecordBatch]:
        n_objects = dict.fromkeys(names, 0)
        found = []
        try:
            for batch in _batches(file, stores, names):
                found.append(_columns(batch, now_s))
                numbers = [number for number, _ in batch]
                for name in names:
                    n_objects[name] += numbers.count(file.index(name))
                    if on_progress is not None:
                        on_progress(name, n_objects[name])
                if stop.is_set():
                    break
        except StoreError:
            stop.set()
            raise
        return found

    urls = list(dict.fromkeys(stores.sharing(tier.name) for tier in file.tiers))
    with call_threads(len(urls), "tiercache-listing") as pool:
        parts = [batch for some in pool.map(batches, urls) for batch in some]
    return _joined(pa.Table.from_batches(parts, pa.schema(_COLUMNS)), now_s)


def _batches(file: RuleFile, stores: Stores, names: tuple[str, ...]) -> Iterator[list[tuple[int, ObjectInfo]]]:
    numbers = {name: file.index(name) for name in names}
    archive = stores.s3_classes(names[0])
    batch = []
    for info in stores.store(names[0]).list() if archive is None else archive.list():
        name = names[0] if len(names) == 1 else stores.tier_of(names, info)
        batch.append((numbers[name], info))
        if len(batch) == _BATCH:
            yield batch
            batch = []
    yield batch


def _columns(batch: list[tuple[int, ObjectInfo]], now_s: float) -> pa.RecordBatch:
    infos = [info for _, info in batch]
    columns = [
        keys_of(infos),
        pa.array([info.etag for info in infos], _LARGE),
        pa.array([number for number, _ in batch], pa.int8()),
        pa.array([info.n_bytes for info in infos], pa.int64()),
        pa.array([now_s if info.modified_s is None else info.modified_s for info in infos], pa.float64()),
        pa.array([NO_CRC if info.crc32c is None else info.crc32c for info in infos], pa.int64()),
        pa.array([info.storage_class or "" for info in infos], _LARGE),
        pa.array([info.restore or "" for info in infos], _LARGE),
    ]
    return pa.record_batch(columns, pa.schema(_COLUMNS))


def _joined(table: pa.Table, now_s: float) -> Listing:
    pairs = pc.binary_join_element_wise(table["storage_class"], table["restore"], pa.scalar("\n", _LARGE))
    pair = pairs.combine_chunks().dictionary_encode()
    words = [word.split("\n", 1) for word in pair.dictionary.to_pylist()]
    code = as_numpy(pair.indices, np.int64)
    classes = ["", *sorted({storage_class for storage_class, _ in words} - {""})]
    class_of = [classes.index(storage_class) for storage_class, _ in words]
    states = [state_of(ObjectInfo("", 0, storage_class=word[0], restore=word[1]), now_s) for word in words]
    return Listing(
        classes=tuple(classes),
        keys=table["key"].combine_chunks(),
        etags=table["etag"].combine_chunks(),
        tier=as_numpy(table["tier"], np.int8),
        n_bytes=as_numpy(table["n_bytes"], np.int64),
        modified_s=as_numpy(table["modified_s"], np.float64),
        crc32c=as_numpy(table["crc32c"], np.int64),
        storage_class=np.array(class_of, np.int16)[code],
        state=np.array(states, np.uint8)[code],
    )


def keys_of(infos: Sequence[ObjectInfo]) -> pa.Array:
    """Return the keys as large_string. File names that are not UTF-8 get backslashes, which no valid key contains."""
    keys = [info.key for info in infos]
    try:
        return pa.array(keys, pa.large_string())
    except UnicodeEncodeError:
        return pa.array([key.encode(errors="backslashreplace").decode() for key in keys], pa.large_string())


@dataclass(frozen=True, slots=True, eq=False)
class ObjectTable:
    """The objects of some copies, as row numbers of columns that contain other objects too."""

    start: NDArray[np.int64]  # [n + 1], offsets of each copy's objects in row and crc32c
    row: NDArray[np.int64]  # row of each object in the columns below
    crc32c: NDArray[np.int64]  # of each object; NO_CRC where it is unknown
    keys: pa.Array  # large_string
    etags: pa.Array  # large_string, null where there is none
    n_bytes: NDArray[np.int64]
    modified_s: NDArray[np.float64]  # NaN where it is unknown

    def bytes_of_copies(self) -> NDArray[np.int64]:
        sums = np.concatenate([[0], np.cumsum(self.n_bytes[self.row])])
        return np.asarray(sums[self.start[1:]] - sums[self.start[:-1]], np.int64)

    def named(self, start: int, end: int) -> Iterator[tuple[str, int, str | None, float | None, int | None]]:
        part = slice(*self.start[[start, end]].tolist())
        row = self.row[part]
        return zip(
            self.keys.take(pa.array(row)).to_pylist(),
            self.n_bytes[row].tolist(),
            self.etags.take(pa.array(row)).to_pylist(),
            [None if time_s != time_s else time_s for time_s in self.modified_s[row].tolist()],
            [None if crc == NO_CRC else crc for crc in self.crc32c[part].tolist()],
            strict=True,
        )


def release_memory() -> None:
    """Return free memory to the system: Arrow and the C library keep freed memory for reuse."""
    # The next stage cannot reuse all of it: 200 MB per million objects stayed idle. The second call trims malloc.
    pa.default_memory_pool().release_unused()
    pa.system_memory_pool().release_unused()


# The state of a copy is the state of its least readable object.
_HARDER = np.array([0, 3, 2, 1], np.uint8)
_STATES = np.array([READABLE, RESTORED, RESTORING, ARCHIVED], np.uint8)
_NEVER_S = -np.inf
_TIERS = 256  # above every tier number


@dataclass(frozen=True, slots=True, eq=False)
class Objects:
    row: NDArray[np.int64]  # row in the listing
    key: NDArray[np.int64]  # number of the key, in sorted order
    # Columns of keys.
    group: NDArray[np.int32]
    shard: NDArray[np.int64]  # number of the live shard; -1: not a shard
    rank: NDArray[np.uint8]  # see checkpoint_names.KeyGroups, as the following columns
    unfinished: NDArray[np.bool_]
    on_top: NDArray[np.bool_]
    # Of each live shard, by the manifests.
    shard_bytes: NDArray[np.int64]
    shard_crc32c: NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Copies:
    """Copies of groups. The columns without a description have one row per copy, as in Snapshot."""

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
    n_keys = np.bincount(group[np.unique(key, return_index=True)[1]], minlength=int(group.max(initial=-1)) + 1)
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
        shard = objects.shard[key]
        is_shard = shard >= 0
        n_bytes = listed.n_bytes[row]
        crc32c = listed.crc32c[row].copy()
        verified, self.recorded = np.zeros(len(row), np.bool_), np.zeros(len(row), np.bool_)
        self.written_s = np.full(len(row), np.inf)
        for number in np.unique(listed.tier).tolist():
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
        stated_bytes, stated = (np.append(column, 0)[shard] for column in (objects.shard_bytes, objects.shard_crc32c))
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
    rising = pc.all(pc.less(checksums["key"].slice(0, len(checksums) - 1), checksums["key"].slice(1)))
    entries = checksums if rising.as_py() else checksums.sort_by("key")
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
    return pc.replace_substring_regex(etags, r'^("[0-9a-f]+-[0-9a-f]+-[0-9a-f]+)-[0-9a-f]+"$', r"\1")


def _spread(key: NDArray[np.int64], value: NDArray[np.int64], n_keys: int) -> NDArray[np.bool_]:
    least, most = np.full(n_keys, np.iinfo(np.int64).max), np.full(n_keys, -1, np.int64)
    np.minimum.at(least, key, value)
    np.maximum.at(most, key, value)
    return np.asarray(most > least, np.bool_)


def _reduced(what: np.ufunc, column: NDArray[np.generic], first: NDArray[np.int64]) -> NDArray:  # type: ignore[type-arg]
    return what.reduceat(column, first) if len(first) else column[:0]


def _largest(n_bytes: NDArray[np.int64], first: NDArray[np.int64], n_objects: NDArray[np.int64]) -> NDArray[np.int64]:
    if not len(first):
        return first
    most = np.repeat(_reduced(np.maximum, n_bytes, first), n_objects)
    position = np.where(n_bytes == most, np.arange(len(n_bytes)), len(n_bytes))
    return np.asarray(_reduced(np.minimum, position, first), np.int64)


# -- conflicts ---------------------------------------------------------------------------------------------------------


class _ListedObject(NamedTuple):
    n_bytes: int
    crc32c: int
    modified_s: float
    is_recorded: bool  # whether the catalog has this very object


def find_conflicts(
    listed: Listing,
    copies: Copies,
    paths: pa.Array,
    may_conflict: NDArray[np.bool_],
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

    may_conflict: By group: false for shards, whose checksums are in the manifest, and for checkpoints of our own, whose
    names are unique.
    """
    found: dict[int, str] = {}
    for group in np.flatnonzero(_are_candidates(copies, len(paths)) & may_conflict).tolist():
        path = paths[group].as_py()
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


def _are_candidates(copies: Copies, n_groups: int) -> NDArray[np.bool_]:
    differs, has_recorded, has_other = (np.zeros(n_groups, np.bool_) for _ in range(3))
    differs[copies.group[np.searchsorted(copies.start, copies.differing, side="right") - 1]] = True
    is_recorded = np.logical_and.reduceat(copies.recorded, copies.start[:-1]) if len(copies.group) else copies.whole
    has_recorded[copies.group[is_recorded]] = True
    has_other[copies.group[~is_recorded]] = True
    return np.asarray(differs | (has_recorded & has_other), np.bool_)


def _objects(listed: Listing, copies: Copies, copy: int) -> dict[str, _ListedObject]:
    part = slice(int(copies.start[copy]), int(copies.start[copy + 1]))
    rows = copies.row[part]
    columns = (listed.n_bytes[rows], copies.crc32c[part], listed.modified_s[rows], copies.recorded[part])
    values = map(_ListedObject, *(column.tolist() for column in columns))
    return dict(zip(listed.keys.take(pa.array(rows)).to_pylist(), values, strict=True))


def _differing_key(one: dict[str, _ListedObject], other: dict[str, _ListedObject]) -> str | None:
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
