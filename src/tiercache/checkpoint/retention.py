"""Retention: which checkpoints stay, deletion in batches, and removal of leftovers and of shared tensors without users.

The rules are keep lists (`keep.py`), which the tier engine evaluates too. plan_retention() decides, Retention acts.

A deletion removes the manifest first, so that no reader sees a checkpoint that lacks files. A checkpoint with shared
tensors has a reference (references/NAME.json), which is put after its manifest, or before it by a late upload. The
reference stays if another program moves the checkpoint, and is turned into a tombstone (references/NAME.deleted.json)
by a deletion. A shared tensor is deleted only if

1. no manifest and no reference refers to it, and every one of them can be read,
2. no tombstone younger than the age of collection refers to it, and
3. the tensor itself is older than this age.

A save may refer to a stored tensor only if a manifest that was visible after the save began refers to it; other tensors
it writes again, which renews their date (rule 3). If that manifest is deleted later, its tombstone is younger than the
save (rule 2). So a save that takes less than the age of collection never loses a tensor, in whichever process it runs.

A deletion that is killed after the tombstone and before the manifest leaves the checkpoint as it was, and the tombstone
goes after the age of collection. A checkpoint that the tier engine moves before that counts as deleted.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tiercache.checkpoint.inventory import CheckpointCopy, CheckpointStores, CheckpointTier, Scan
from tiercache.checkpoint.layout import (
    MANIFEST_NAME,
    NOT_UPLOADED_NAME,
    SHARED_FOLDER,
    Manifest,
    encode_manifest,
    key_of,
    manifest_key,
    metrics_key,
    parse_manifest,
    parse_name,
    reference_key,
    shared_digest,
    tombstone_key,
    written_order,
)
from tiercache.checkpoint.writer import SharedTensors
from tiercache.crash_points import crash_point
from tiercache.errors import CorruptCheckpoint, NotFound, StoreError, UnsupportedFormat
from tiercache.keep import CheckpointColumns, Keep, evaluate_keep_list
from tiercache.model import ObjectInfo
from tiercache.store import LocalFolder, Store
from tiercache.store.placement.resolver import is_archived

GC_AGE_S = 86400.0
"""Age of collection: leftovers of killed saves, and shared tensors without users, are removed once they are older."""


@dataclass(frozen=True, slots=True)
class RetentionPlan:
    """What stays and what is deleted.

    Attributes:
        kept_by: Reasons for which each checkpoint stays, by name and tier.
        deletes: Checkpoints to delete from each tier, written first to last.
        missing: Checkpoints that the remote tier would keep and does not have, written first to last.
    """

    kept_by: Mapping[str, Mapping[CheckpointTier, tuple[str, ...]]]
    deletes: Mapping[CheckpointTier, tuple[str, ...]]
    missing: tuple[str, ...] = ()


def plan_retention(
    scan: Scan,
    keeps: Sequence[Keep],
    tiers: Sequence[CheckpointTier],
    now_s: float,
    unfinished: Collection[str] = (),
) -> RetentionPlan:
    """Return what the rules keep and what they delete. Pure.

    Rules of the local tier count local and remote checkpoints together; those of the remote tier count remote ones. A
    tier without rules keeps everything. Whatever the rules say, these are kept:

    - the checkpoint of the tier, or of a tier behind it, that was written last;
    - pinned checkpoints;
    - a checkpoint that is being uploaded;
    - a local copy of a checkpoint that the remote tier would keep and does not have yet: one that a rule of the remote
      tier names, or, if the remote tier has no rules, one that is still to be uploaded. (Saves that when_busy="drop"
      has dropped are not: they would fill the local disk.)

    Only complete checkpoints are deleted. Files in the local tier without a manifest, such as those of the ranks of one
    machine, count as a copy if the remote tier has the checkpoint; if no tier has it, they are deleted once the remote
    tier has a later one.

    Args:
        scan: Listing of the checkpoints.
        keeps: Rules.
        tiers: Tiers, the nearest first.
        now_s: Time, in seconds since the Unix epoch.
        unfinished: Checkpoints that this process saves now: their local copy is the source of their upload.
    """
    remote = tiers[-1]
    complete = {tier: [n for n in scan.copies if tier in {c.tier for c in scan.complete(n)}] for tier in tiers}
    everywhere = scan.complete_names
    of_remote = _kept(scan, everywhere, _rules_of(keeps, remote), now_s)
    has_remote_rules = bool(_rules_of(keeps, remote))
    awaited = [name for name in everywhere if of_remote[name] and (has_remote_rules or _is_marked(scan, name))]
    kept_by: dict[str, dict[CheckpointTier, tuple[str, ...]]] = {}
    deletes: dict[CheckpointTier, tuple[str, ...]] = {}
    for number, tier in enumerate(tiers):
        behind = [name for name in everywhere if any(name in complete[one] for one in tiers[number:])]
        by_rules = _kept(scan, behind, _rules_of(keeps, tier), now_s)
        parts = [] if tier == remote else _uncommitted(scan, tier)
        here = [name for name in behind if name in complete[tier] or (name in complete[remote] and name in parts)]
        for name in here:
            reasons = [*by_rules[name]]
            reasons += ["latest"] if name == behind[-1] else []  # of the store too: it outlives this machine
            reasons += ["being uploaded"] if name in unfinished and tier != remote else []
            reasons += [] if (why := scan.pin(name)) is None else [f"pinned: {why}" if why else "pinned"]
            is_last_copy = tier == remote or name not in complete[remote]
            if is_last_copy and tier != remote and name in awaited:
                reasons.append("not uploaded yet")
            kept_by.setdefault(name, {})[tier] = tuple(reasons)
        gone = [
            name
            for name in parts
            if any(written_order(name) < written_order(later) for later in complete[remote][-1:])
            and name not in unfinished
            and not any(copy.is_committed for copy in scan.copies[name])
        ]
        deletes[tier] = (*gone, *(name for name in here if not kept_by[name][tier]))
    missing = tuple(
        name
        for name in everywhere
        if name not in complete[remote] and (of_remote[name] or name == everywhere[-1] or scan.pin(name) is not None)
    )
    return RetentionPlan(kept_by, deletes, missing)


def _uncommitted(scan: Scan, tier: CheckpointTier) -> list[str]:
    """Return the names of the checkpoints of which a tier has files without a manifest."""
    copies = [copy for found in scan.copies.values() for copy in found if copy.tier == tier]
    return [copy.name for copy in copies if not copy.is_committed]


def _is_marked(scan: Scan, name: str) -> bool:
    """Return whether a checkpoint is still to be uploaded."""
    return any(NOT_UPLOADED_NAME in copy.objects for copy in scan.copies[name])


def _rules_of(keeps: Sequence[Keep], tier: CheckpointTier) -> list[Keep]:
    return [keep for keep in keeps if keep.tier in (None, tier)]


def _kept(scan: Scan, names: Sequence[str], keeps: Sequence[Keep], now_s: float) -> dict[str, list[str]]:
    """Return the texts of the rules that keep each of the complete checkpoints."""
    if not keeps:
        return {name: ["no rule for this tier"] for name in names}
    columns, rows = _columns(scan, names, now_s), np.arange(len(names))
    found: dict[str, list[str]] = {name: [] for name in names}
    for keep in keeps:
        result = evaluate_keep_list(columns, rows, keep.keep_list)
        for row, name in enumerate(names):
            if result.named[row]:
                found[name].append(str(keep))
            elif result.unscored[row]:
                found[name].append(f"{keep} (no checkpoint has the metric)")
    return found


def _columns(scan: Scan, names: Sequence[str], now_s: float) -> CheckpointColumns:
    """Return complete checkpoints of one run in the form that keep lists take."""
    n = len(names)
    parsed = [parse_name(name) or (0, 0.0) for name in names]
    metrics: dict[str, NDArray[np.float64]] = {}
    for row, name in enumerate(names):
        manifest = scan.manifest(name)
        for metric, value in ({} if manifest is None else manifest.metrics).items():
            metrics.setdefault(metric, np.full(n, np.nan))[row] = value
    return CheckpointColumns(
        now_s=now_s,
        run=np.zeros(n, np.int32),
        step=np.array([step for step, _ in parsed], np.int64),
        created_s=np.array([created_s for _, created_s in parsed], np.float64),
        complete=np.ones(n, np.bool_),
        metrics=metrics,
        unread=np.zeros(n, np.bool_),
    )


@dataclass(frozen=True, slots=True)
class RetentionReport:
    """What retention, a deletion or a collection has removed.

    Attributes:
        deleted: Checkpoints that were deleted from each tier.
        n_leftovers: Number of objects of unfinished saves and of ended deletions.
        n_shared: Number of shared tensors without users.
        n_bytes: Size of all deleted objects.
    """

    deleted: Mapping[CheckpointTier, tuple[str, ...]] = field(default_factory=dict)
    n_leftovers: int = 0
    n_shared: int = 0
    n_bytes: int = 0


class Retention:
    """Deletes checkpoints and leftovers. All methods may be called from any thread and any process.

    Args:
        stores: Stores of the checkpoints.
        keeps: Rules.
        gc_age_s: Age in seconds from which leftovers, and shared tensors without users, are removed.
        unfinished: Function that returns the names of the saves of this process that are not finished: they are never
            leftovers.
        now: Function that returns the time in seconds since the Unix epoch, which is compared with that of the stores.

    Attributes:
        stores: Stores of the checkpoints.
        keeps: Rules.
        gc_age_s: As given.
        claims: Shared tensors of each tier that saves of this process use; none of them is deleted.

    Raises:
        ValueError: A rule is for the tier "local", and there is none.
    """

    def __init__(
        self,
        stores: CheckpointStores,
        keeps: Iterable[Keep] = (),
        *,
        gc_age_s: float = GC_AGE_S,
        unfinished: Callable[[], Collection[str]] = tuple,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.stores, self.keeps = stores, tuple(keeps)
        self.gc_age_s, self._unfinished, self._now = gc_age_s, unfinished, now
        tiers = tuple(stores.tiers)
        self.claims: Mapping[CheckpointTier, SharedTensors] = {tier: SharedTensors() for tier in tiers}
        for keep in self.keeps:
            if not isinstance(keep, Keep):
                raise TypeError(f"keep is a list of tc.Keep(...), got {keep!r}")
            if keep.tier not in (None, *tiers):
                raise ValueError(f"Keep({keep}, tier={keep.tier!r}): these checkpoints have no local folder")

    def plan(self, scan: Scan, before: Collection[str] = ()) -> RetentionPlan:
        """Return what the rules keep and delete now.

        Args:
            scan: Listing of the checkpoints.
            before: Saves that were unfinished before the listing. If they have ended since, the listing has only a part
                of their files.
        """
        unfinished = frozenset((*before, *self._unfinished()))
        return plan_retention(scan, self.keeps, tuple(self.stores.tiers), self._now(), unfinished)

    def run(self, tiers: Collection[CheckpointTier] | None = None) -> RetentionReport:
        """Delete what no rule keeps, and collect(). The background thread calls it after each commit.

        Args:
            tiers: Tiers from which is deleted; None: all.

        Raises:
            StoreError: A store failed; the next run continues.
        """
        deleted: dict[CheckpointTier, tuple[str, ...]] = {}
        n_bytes = 0
        before = tuple(self._unfinished())
        scan = self.stores.scan()
        tiers = self.stores.tiers.keys() if tiers is None else tiers
        if self.keeps:
            deletes = self.plan(scan, before).deletes
            for tier in tiers:
                names = deletes[tier]
                copies = [copy for name in names for copy in scan.copies[name] if copy.tier == tier]
                n_bytes += delete_copies(copies)
                deleted[tier] = names
            self._release(deleted)
        collected = self._collect(self.stores.scan() if any(deleted.values()) else scan, tiers, before)
        return RetentionReport(deleted, collected.n_leftovers, collected.n_shared, n_bytes + collected.n_bytes)

    def delete(self, names: Iterable[str]) -> RetentionReport:
        """Delete checkpoints from all tiers, the nearest first, so that a deletion that ends early can be repeated.

        Of a checkpoint that another program has moved, only the shared tensors are given up.

        Raises:
            NotFound: There is no such checkpoint.
            ValueError: A checkpoint is pinned, or is being saved; nothing was deleted.
            StoreError: A store failed.
        """
        before = tuple(self._unfinished())  # a save that ends during the listing is in it without its manifest
        scan, wanted, n_bytes = self.stores.scan(), list(names), 0
        for name in wanted:
            if name in before or name in self._unfinished():
                raise ValueError(f"{name} is being saved: wait for its save before it is deleted")
            if name not in scan.copies and name not in scan.moved_names:
                raise NotFound("no such checkpoint", url=name)
            if (why := scan.pin(name)) is not None:
                raise ValueError(
                    f"{name} is pinned{f' ({why})' if why else ''} and was not deleted; unpin({name!r}) or `tiercache"
                    f" ckpt unpin` removes the pin"
                )
        deleted: dict[CheckpointTier, tuple[str, ...]] = {}
        for tier in self.stores.tiers:
            copies = [copy for name in wanted for copy in scan.copies.get(name, ()) if copy.tier == tier]
            n_bytes += delete_copies(copies)
            committed = {copy.name for copy in copies if copy.is_committed}
            moved = [name for name in wanted if name in scan.references[tier] and name not in committed]
            _bury(self.stores.tiers[tier], [self._reference(tier, name) for name in moved])
            if moved:
                self.stores.tiers[tier].delete([reference_key(name) for name in moved])
            deleted[tier] = tuple(dict.fromkeys([*(copy.name for copy in copies), *moved]))
        self._release(deleted)
        return RetentionReport(deleted, n_bytes=n_bytes)

    def collect(self) -> RetentionReport:
        """Delete leftovers of unfinished saves and of ended deletions, and shared tensors without users, if old enough.

        Raises:
            StoreError: A store failed; the next collection continues.
        """
        before = tuple(self._unfinished())
        return self._collect(self.stores.scan(), self.stores.tiers, before)

    def _release(self, deleted: Mapping[CheckpointTier, Collection[str]]) -> None:
        """Release the shared tensors of checkpoints, in the tiers from which they were deleted."""
        for tier, names in deleted.items():
            for name in {*names} - {*self._unfinished()}:
                self.claims[tier].release(name)

    def _collect(self, scan: Scan, tiers: Iterable[CheckpointTier], before: Collection[str]) -> RetentionReport:
        n_leftovers = n_shared = n_bytes = 0
        old_s = self._now() - self.gc_age_s
        unfinished = frozenset((*before, *self._unfinished()))
        for tier in tiers:
            store = self.stores.tiers[tier]
            copies = {name: copy for name, found in scan.copies.items() for copy in found if copy.tier == tier}
            folders = [copy for copy in copies.values() if not copy.is_committed and copy.name not in unfinished]
            old = [copy for copy in folders if _newest_s(copy) <= old_s or copy.name in scan.tombstones[tier]]
            unused = {info.key: info for info in self._unused(scan, tier, copies, old_s)}
            tensors = [unused[key] for key in self.claims[tier].delete_unclaimed(unused, store.delete)]
            for copy in copies.values():  # whose save was killed before it put the reference
                if copy.manifest is not None and _shared_keys(copy.manifest) and copy.name not in scan.references[tier]:
                    store.put(reference_key(copy.name), encode_manifest(copy.manifest))
            ended = _ended_references(scan, tier, copies, old_s)
            leftovers = [info for copy in old for info in copy.objects.values()]
            for objects in (ended, leftovers):
                if objects:
                    store.delete([info.key for info in objects])
            if old and tier == "remote":
                store.delete([metrics_key(copy.name) for copy in old])
            if isinstance(store, LocalFolder):
                for copy in old:
                    store.remove_empty(copy.name)
            n_shared, n_leftovers = n_shared + len(tensors), n_leftovers + len(leftovers) + len(ended)
            n_bytes += sum(info.n_bytes for info in (*tensors, *leftovers, *ended))
        return RetentionReport(n_leftovers=n_leftovers, n_shared=n_shared, n_bytes=n_bytes)

    def _reference(self, tier: CheckpointTier, name: str) -> Manifest:
        store, key = self.stores.tiers[tier], reference_key(name)
        return parse_manifest(store.get(key), f"{store.url}/{key}")

    def _unused(
        self, scan: Scan, tier: CheckpointTier, copies: Mapping[str, CheckpointCopy], old_s: float
    ) -> list[ObjectInfo]:
        """Return the shared tensors of a tier that may be deleted; see the module's docstring."""
        store, shared = self.stores.tiers[tier], scan.shared[tier]
        old = [info for info in shared.values() if info.modified_s is not None and info.modified_s <= old_s]
        if not old:
            return []
        used = {key for copy in copies.values() for key in _shared_keys(copy.manifest)}
        read = {reference_key(copy.name) for copy in copies.values() if copy.manifest is not None}
        read |= {info.key for info in _ended_references(scan, tier, copies, old_s)}
        unreadable = [
            f"{copy.url}: {copy.problem}"
            for copy in copies.values()
            if copy.is_committed and copy.manifest is None and copy.name not in scan.references[tier]
        ]
        for info in (*scan.references[tier].values(), *scan.tombstones[tier].values()):
            if info.key in read:
                continue
            try:
                used |= _shared_keys(parse_manifest(store.get(info.key), f"{store.url}/{info.key}"))
            except NotFound:
                continue  # another process has just collected it
            except (CorruptCheckpoint, UnsupportedFormat) as error:
                unreadable.append(error.message)
            except StoreError as error:
                if not is_archived(error):
                    raise
                unreadable.append(error.message)
        if unreadable:
            message = (
                f"{unreadable[0]}; no shared tensor ({SHARED_FOLDER}) is deleted while this manifest cannot be read"
            )
            warnings.warn(message, RuntimeWarning, stacklevel=2)
            return []
        unused = []
        for info in old:
            if info.key in used:
                continue
            with suppress(NotFound):  # the second question narrows the race with a save that writes the tensor again
                now = store.head(info.key)
                if now.modified_s is not None and now.modified_s <= old_s:
                    unused.append(info)
        return unused


def delete_copies(copies: Sequence[CheckpointCopy]) -> int:
    """Delete copies of checkpoints of one tier by a few requests, whatever their number. Return the number of bytes.

    Shared tensors stay: Retention.collect() deletes those without users.

    Raises:
        StoreError: The store failed. Checkpoints whose manifests were deleted are gone; collect() removes their files.
    """
    if not copies:
        return 0
    store = copies[0].store
    _bury(store, [copy.manifest for copy in copies if copy.manifest is not None])
    crash_point("retention.tombstones")
    store.delete([manifest_key(copy.name) for copy in copies if copy.is_committed])
    crash_point("retention.manifests")
    store.delete(
        [
            *(metrics_key(copy.name) for copy in copies if copy.tier == "remote"),  # a collection knows only folders
            *(info.key for copy in copies for path, info in copy.objects.items() if path != MANIFEST_NAME),
            *(reference_key(copy.name) for copy in copies if _shared_keys(copy.manifest)),
        ]
    )
    crash_point("retention.files")
    if isinstance(store, LocalFolder):
        for copy in copies:
            store.remove_empty(copy.name)
    return sum(info.n_bytes for copy in copies for info in copy.objects.values())


def _bury(store: Store, manifests: Iterable[Manifest]) -> None:
    """Write the tombstones of checkpoints with shared tensors."""
    for manifest in manifests:
        if _shared_keys(manifest):
            store.put(tombstone_key(manifest.name), encode_manifest(manifest))


def _ended_references(
    scan: Scan, tier: CheckpointTier, copies: Mapping[str, CheckpointCopy], old_s: float
) -> list[ObjectInfo]:
    """Return the references that protect nothing any more: old tombstones, and those of checkpoints that are gone.

    A checkpoint whose folder, or manifest, is gone without a tombstone may have been moved by the tier engine, or is
    being moved, and its copy elsewhere needs the tensors. If one of our own tiers behind this one has the checkpoint,
    that copy has tensors of its own.

    copies: Copies of the tier by name.
    """
    tombstones = scan.tombstones[tier]
    ended = [info for name, info in tombstones.items() if _modified_s(info, name) <= old_s]
    behind = [*scan.references][[*scan.references].index(tier) + 1 :]
    for name, info in scan.references[tier].items():
        is_behind = any(copy.tier in behind for copy in scan.complete(name))
        is_gone = name not in copies or not copies[name].is_committed
        if is_gone and (name in tombstones or is_behind) and _modified_s(info, name) <= old_s:
            ended.append(info)
    return ended


def _newest_s(copy: CheckpointCopy) -> float:
    return max((_modified_s(info, copy.name) for info in copy.objects.values()), default=0.0)


def _modified_s(info: ObjectInfo, name: str) -> float:
    """Return when an object was written; for a store that does not tell, when its save began."""
    parsed = parse_name(name)
    return info.modified_s if info.modified_s is not None else 0.0 if parsed is None else parsed[1]


def _shared_keys(manifest: Manifest | None) -> set[str]:
    if manifest is None:
        return set()
    return {key_of(manifest.name, file.path) for file in manifest.files if shared_digest(file.path)}


def referenced_tensors(stores: CheckpointStores, tier: CheckpointTier) -> frozenset[str]:
    """Return the keys of the shared tensors to which a save that has begun may refer without writing them.

    Args:
        stores: Stores of the checkpoints.
        tier: Tier of the save.

    Raises:
        StoreError: The tier cannot be listed or read.
    """
    store = stores.tiers[tier]
    copies = [copy for found in CheckpointStores({tier: store}).scan().copies.values() for copy in found]
    return frozenset(key for copy in copies if copy.is_complete for key in _shared_keys(copy.manifest))
