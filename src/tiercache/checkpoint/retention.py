"""Retention: which checkpoints stay, deletion in batches, and removal of what killed saves and deletions have left.

The rules are keep lists (`keep.py`), which the tier engine evaluates too. plan_retention() decides, Retention acts. A
deletion removes the manifest first, so that no reader sees a checkpoint that lacks files.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tiercache.checkpoint.inventory import CheckpointCopy, CheckpointStores, CheckpointTier, Scan
from tiercache.checkpoint.layout import MANIFEST_NAME, manifest_key, metrics_key, parse_name, written_order
from tiercache.crash_points import crash_point
from tiercache.errors import NotFound
from tiercache.keep import CheckpointColumns, Keep, evaluate_keep_list
from tiercache.model import ObjectInfo
from tiercache.store import LocalFolder

GC_AGE_S = 86400.0
"""Age from which leftovers of killed saves are removed."""


@dataclass(frozen=True, slots=True)
class RetentionPlan:
    """What stays and what is deleted.

    Attributes:
        kept_by: Reasons for which each checkpoint stays, by name and tier.
        deletes: Checkpoints to delete from each tier, written first to last.
        missing: Checkpoints that the remote tier would keep and never had, written first to last.
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
    - a local copy of a checkpoint that the remote tier would keep and does not have yet.

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
    absent = [name for name in everywhere if name not in complete[remote] and name not in scan.departed]
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
            reasons += ["not uploaded yet"] if tier != remote and name in absent and of_remote[name] else []
            kept_by.setdefault(name, {})[tier] = tuple(reasons)
        gone = [
            name
            for name in parts
            if any(written_order(name) < written_order(later) for later in complete[remote][-1:])
            and name not in unfinished
            and not any(copy.is_committed for copy in scan.copies[name])
        ]
        deletes[tier] = (*gone, *(name for name in here if not kept_by[name][tier]))
    missing = [name for name in absent if of_remote[name] or name == everywhere[-1] or scan.pin(name) is not None]
    return RetentionPlan(kept_by, deletes, tuple(missing))


def _uncommitted(scan: Scan, tier: CheckpointTier) -> list[str]:
    """Return the names of the checkpoints of which a tier has files without a manifest."""
    copies = [copy for found in scan.copies.values() for copy in found if copy.tier == tier]
    return [copy.name for copy in copies if not copy.is_committed]


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
        n_bytes: Size of all deleted objects.
    """

    deleted: Mapping[CheckpointTier, tuple[str, ...]] = field(default_factory=dict)
    n_leftovers: int = 0
    n_bytes: int = 0


class Retention:
    """Deletes checkpoints and leftovers. All methods may be called from any thread and any process."""

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
        """Delete what no rule keeps, and collect(). The background thread calls it after each commit."""
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
        collected = self._collect(self.stores.scan() if any(deleted.values()) else scan, tiers, before)
        return RetentionReport(deleted, collected.n_leftovers, n_bytes + collected.n_bytes)

    def delete(self, names: Iterable[str]) -> RetentionReport:
        """Delete checkpoints from all tiers, the nearest first, so that a deletion that ends early can be repeated.

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
            if name not in scan.copies:
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
            deleted[tier] = tuple(copy.name for copy in copies)
        return RetentionReport(deleted, n_bytes=n_bytes)

    def collect(self) -> RetentionReport:
        """Delete leftovers of unfinished saves and of ended deletions, if they are old enough."""
        before = tuple(self._unfinished())
        return self._collect(self.stores.scan(), self.stores.tiers, before)

    def _collect(self, scan: Scan, tiers: Iterable[CheckpointTier], before: Collection[str]) -> RetentionReport:
        leftovers: list[ObjectInfo] = []
        old_s = self._now() - self.gc_age_s
        unfinished = frozenset((*before, *self._unfinished()))
        for tier in tiers:
            store = self.stores.tiers[tier]
            copies = [copy for found in scan.copies.values() for copy in found if copy.tier == tier]
            old = [copy for copy in copies if not copy.is_committed and copy.name not in unfinished]
            old = [copy for copy in old if _newest_s(copy) <= old_s]
            if not old:
                continue
            objects = [info for copy in old for info in copy.objects.values()]
            metrics = [metrics_key(copy.name) for copy in old] if tier == "remote" else []
            store.delete([*(info.key for info in objects), *metrics])
            _remove_folders(old)
            leftovers += objects
        return RetentionReport(n_leftovers=len(leftovers), n_bytes=sum(info.n_bytes for info in leftovers))


def delete_copies(copies: Sequence[CheckpointCopy]) -> int:
    """Delete copies of checkpoints of one tier by a few requests, whatever their number. Return the number of bytes.

    Raises:
        StoreError: The store failed. Checkpoints whose manifests were deleted are gone; collect() removes their files.
    """
    if not copies:
        return 0
    store = copies[0].store
    store.delete([manifest_key(copy.name) for copy in copies if copy.is_committed])
    crash_point("retention.manifests")
    store.delete(
        [
            *(metrics_key(copy.name) for copy in copies if copy.tier == "remote"),  # a collection knows only folders
            *(info.key for copy in copies for path, info in copy.objects.items() if path != MANIFEST_NAME),
        ]
    )
    crash_point("retention.files")
    _remove_folders(copies)
    return sum(info.n_bytes for copy in copies for info in copy.objects.values())


def _remove_folders(copies: Iterable[CheckpointCopy]) -> None:
    for copy in copies:
        if isinstance(copy.store, LocalFolder):
            copy.store.remove_empty(copy.name)


def _newest_s(copy: CheckpointCopy) -> float:
    """Return when the newest object was written; for a store that does not tell, when its save began."""
    began_s = (parse_name(copy.name) or (0, 0.0))[1]
    return max((began_s if one.modified_s is None else one.modified_s for one in copy.objects.values()), default=0.0)
