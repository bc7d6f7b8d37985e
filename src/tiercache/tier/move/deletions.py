"""Deferred deletions: drops, deletions of last copies, class changes that end readability, after their grace period.

The deletion guard lists and plans once more, whatever an earlier plan said. Every condition is checked again, directly
before the deletion; mover.py gives the reasons. A deletion whose conditions no longer hold is cancelled if the objects
or rules have changed, and its redirect is reverted; or it keeps waiting if the reason may pass.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
import pyarrow as pa

from tiercache.catalog.tiers import CatalogEntry, JournalObject, JournalRow
from tiercache.crash_points import crash_point
from tiercache.errors import CommitConflict, StoreError, TierCacheError
from tiercache.prices import prices_if_known
from tiercache.store import LocalFolder
from tiercache.tier.inventory.groups import take_inventory
from tiercache.tier.model import CHECKPOINT, DELETE, DROP, MOVE, READABLE, RECLASS, SHARD
from tiercache.tier.move.checks import (
    ApplyResult,
    BatchLimits,
    Infos,
    Progress,
    StoppedMove,
    entry_after_class_change,
    in_batches,
    is_readable,
)
from tiercache.tier.move.executor import has_class
from tiercache.tier.move.placement_updates import Heads, PlacementUpdates, RowChanges, found_in, found_infos
from tiercache.tier.plan.policy import decide
from tiercache.tier.plan.selection import find_newest
from tiercache.tier.stores import deletion_block_reason, unavailable_tiers
from tiercache.waiting import SYSTEM_CLOCK

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tiercache.catalog.tiers import TierCatalog
    from tiercache.tier.model import Decisions, Snapshot
    from tiercache.tier.move.checks import MoveContext
    from tiercache.tier.move.lock import TierLock
    from tiercache.tier.rules import RuleFile
    from tiercache.tier.stores import Stores


@dataclass(frozen=True, slots=True)
class DeletionGuard:
    """State of the tiers, as far as deletions depend on it. Paths are paths of groups.

    Attributes:
        in_use: Paths that a reader uses now.
        protected: Newest complete checkpoint of each run, and the newest one that can be read now.
        deletes: Paths whose last copies the rules delete now.
        asked: (path, tier) pairs from which the rules take a copy away now.
        linked: (path, tier) -> symbolic link in that tier that leads to the group.
        used_s: Path -> last read of a file or checkpoint through a cache of this machine, in seconds since the epoch.
    """

    in_use: frozenset[str] = frozenset()
    protected: frozenset[str] = frozenset()
    deletes: frozenset[str] = frozenset()
    asked: frozenset[tuple[str, str]] = frozenset()
    linked: Mapping[tuple[str, str], str] = field(default_factory=dict)
    used_s: Mapping[str, float] = field(default_factory=dict)


def take_deletion_guard(file: RuleFile, stores: Stores, catalog: TierCatalog, now_s: float) -> DeletionGuard:
    """List all tiers and plan once more. Raises as take_inventory()."""
    snapshot = take_inventory(file, stores, catalog, now_s=now_s).snapshot
    prices = [prices_if_known(tier) for tier in file.tiers]
    capacity = [stores.capacity(tier.name) for tier in file.tiers]
    missing = unavailable_tiers(file, stores, catalog)
    return deletion_guard_of(snapshot, decide(snapshot, file, prices, capacity_bytes=capacity, missing=missing))


def deletion_guard_of(snapshot: Snapshot, decisions: Decisions) -> DeletionGuard:
    """Return the guard that a snapshot and the decisions on it make."""
    tiers = snapshot.tiers
    is_used = np.isfinite(snapshot.uses_recorded_since_s) & (snapshot.kind != SHARD)
    moves = decisions.moves
    takes, deletes = np.isin(moves.action, (MOVE, DROP, RECLASS)), moves.action == DELETE
    return DeletionGuard(
        in_use=_paths(snapshot, snapshot.in_use),
        protected=_paths(snapshot, find_newest(snapshot) | find_newest(_readable(snapshot))),
        deletes=frozenset(snapshot.paths.take(pa.array(moves.group[deletes])).to_pylist()),
        asked=frozenset(
            zip(
                snapshot.paths.take(pa.array(moves.group[takes])).to_pylist(),
                [tiers[src] for src in moves.src[takes].tolist()],
                strict=True,
            )
        ),
        linked={
            (snapshot.paths[int(snapshot.group[copy])].as_py(), tiers[snapshot.tier[copy]]): link
            for copy, link in snapshot.links.items()
        },
        used_s={snapshot.paths[row].as_py(): snapshot.last_use_s[row] for row in np.flatnonzero(is_used).tolist()},
    )


def _readable(snapshot: Snapshot) -> Snapshot:
    """Return the snapshot where a checkpoint is complete only if one copy is complete, readable now and permanent."""
    can_be_read = np.zeros(snapshot.n_groups, np.bool_)
    can_be_read[snapshot.group[snapshot.whole & (snapshot.state == READABLE)]] = True
    return replace(snapshot, complete=snapshot.complete & can_be_read & (snapshot.kind == CHECKPOINT))


def _paths(snapshot: Snapshot, groups: NDArray[np.bool_]) -> frozenset[str]:
    return frozenset(snapshot.paths[int(group)].as_py() for group in np.flatnonzero(groups))


# go: no check speaks against the deletion. done: nothing is left to delete. keep: it waits, the reason may pass.
# cancel: objects or rules have changed.
Verdict: TypeAlias = Literal["go", "done", "keep", "cancel"]

# Small batches: between the checks and the deletions lie the queries of one batch, and the reading of its local copies.
_BATCH_LIMITS = BatchLimits(64, 1000, 64 << 30)
_CLOCK_SKEW_S = 60.0
# Maximum age of the deletion guard.
_GUARD_S = 600.0


@dataclass(slots=True)
class DueDeletion:
    """A move whose grace period is over.

    Attributes:
        row: Journal row of the move.
        verdict: Decision of the checks so far.
        why: Reason of the decision.
        present: Objects that exist where something is deleted, as (tier, object).
        is_whole: Whether these are all the objects that there were.
        is_begun: Whether deletions may have been made already.
    """

    row: JournalRow
    verdict: Verdict = "go"
    why: str = ""
    present: list[tuple[str, JournalObject]] = field(default_factory=list)
    is_whole: bool = True
    is_begun: bool = False

    def set_verdict(self, verdict: Verdict, why: str) -> None:
        """Set the verdict. Only the first call counts."""
        if self.verdict == "go":
            self.verdict, self.why = verdict, why


class DeferredDeletions:
    """One call of Mover.settle().

    Args:
        context: Stores, catalog and checks.
        lock: Lock of the home tier, held by the caller.
        take_guard: Function that returns the DeletionGuard at a time in seconds since the epoch.
        now_s: Current time, in seconds since the epoch.
        guard: Guard that the caller has already, and when its listing began, by SYSTEM_CLOCK. None: taken if needed.
        only_begun: Whether to finish interrupted deletions only.
        on_progress: Function that receives how many bytes of copies were read back, and how many there are; called from
            several threads. A lock guards the counts.
    """

    def __init__(
        self,
        context: MoveContext,
        lock: TierLock,
        take_guard: Callable[[float], DeletionGuard],
        now_s: float,
        *,
        guard: tuple[DeletionGuard, float] | None = None,
        only_begun: bool = False,
        on_progress: Callable[[Progress], object] | None = None,
    ) -> None:
        self._context, self._lock, self._now_s, self._only_begun = context, lock, now_s, only_begun
        self._take_guard, self._guard, self._on_progress = take_guard, guard, on_progress
        self._lock_counts, self._n_due, self._due_bytes = Lock(), 0, 0
        self._file, self._catalog = context.file, context.catalog
        self._placing = PlacementUpdates(context)
        self._by_use = {rule.name for rule in context.file.rules if rule.idle_s or rule.uses_below is not None}
        self._n_done = self._n_waiting = self._n_bytes = self._proof_bytes = 0
        self._stopped: list[StoppedMove] = []

    def run(self) -> ApplyResult:
        """Make the deletions that are due, and return the counts. Raises as Mover.settle()."""
        due = self._due()
        proven = [row for row in due if _needs_proof(row) and self._context.transfer.needs_disk_check(row.dst)]
        self._n_due, self._due_bytes = len(due), sum(one.n_bytes for row in proven for one in row.objects)
        for batch in in_batches(due, lambda row: row, _BATCH_LIMITS):
            # Reading the copies of earlier batches may have taken hours.
            if self._guard is None or SYSTEM_CLOCK.monotonic() - self._guard[1] > _GUARD_S:
                asked_s = SYSTEM_CLOCK.monotonic()
                self._guard = self._take_guard(self._now_s), asked_s
            self._work(batch, self._guard[0])
        return ApplyResult(self._n_done, tuple(self._stopped), self._n_waiting, self._n_bytes, self._proof_bytes)

    def _due(self) -> list[JournalRow]:
        due, again = [], []
        for row in self._catalog.open_moves(self._file.home.url, "waiting", "dropping"):
            if row.state == "dropping" or (not self._only_begun and row.due_s <= self._now_s):
                due.append(row)
                continue
            self._n_waiting += 1
            if row.since_s > self._now_s + _CLOCK_SKEW_S:
                # The clock was ahead when the grace period began: without this it would last that much longer.
                due_s = self._now_s + self._file.tiering.grace_s
                again.append(replace(row, since_s=self._now_s, due_s=due_s, changed_s=self._now_s))
        self._catalog.write(again)
        return due

    def _work(self, rows: Sequence[JournalRow], guard: DeletionGuard) -> None:
        self._lock.check()
        self._placing.forget_placements()
        due = [DueDeletion(row, is_begun=row.state == "dropping") for row in rows]
        self._check(due, guard)
        self._part(due)
        self._prove([one for one in due if one.verdict == "go" and _needs_proof(one.row)])
        self._heed_pins(due)
        crash_point("tier_drop.checked")
        self._carry_out([one for one in due if one.verdict == "go"])
        self._end(due)
        crash_point("tier_drop.ended")

    # -- checks -----------------------------------------------------------------------------------------------------

    def _check(self, due: Sequence[DueDeletion], guard: DeletionGuard) -> None:
        for one in due:
            if why := self._misnamed(one.row):
                one.set_verdict("cancel", why)
        fit = [one for one in due if one.verdict == "go"]
        pinned = self._pins_of(fit)
        wanted = [pair for one in fit for pair in self._asked_of(one.row)]
        heads = self._context.heads(list(dict.fromkeys(wanted)))
        missing = unavailable_tiers(self._file, self._context.stores, self._catalog)
        for one in fit:
            if why := _out_of_sight(one.row, missing):
                one.set_verdict("keep", why)
                continue
            try:
                self._check_one(one, heads, guard, pinned.get((one.row.plan, one.row.number), ""))
            except TierCacheError as error:
                one.set_verdict("keep", str(error))

    def _pins_of(self, due: Sequence[DueDeletion]) -> Mapping[tuple[str, int], str]:
        """Return the moves that a pin protects now, with reasons. All are kept where the pins are unknown."""
        try:
            return self._context.pin_reasons([one.row for one in due], self._now_s)
        except TierCacheError as error:
            for one in due:
                one.set_verdict("keep", str(error))
            return {}

    def _heed_pins(self, due: Sequence[DueDeletion]) -> None:
        """Cancel what was pinned since the first check: reading copies may have taken hours."""
        going = [one for one in due if one.verdict == "go"]
        pinned = self._pins_of(going)
        for one in going:
            if pin := pinned.get((one.row.plan, one.row.number)):
                one.set_verdict("keep" if one.is_begun and not one.is_whole else "cancel", pin)

    def _misnamed(self, row: JournalRow) -> str:
        """Return why the rule file no longer has the tiers of a move; "" if it has."""
        places = {tier.name: tier.url for tier in self._file.tiers}
        for name, place in ((row.src, row.src_place), (row.dst, row.dst_place)):
            if name and places.get(name) != place:
                return f"expected tier {name!r} at {place}, found {places.get(name, 'no such tier')} in the rule file"
        gone = {one.where for one in row.objects} - places.keys()
        return f"expected tiers {', '.join(sorted(gone))}, found none of that name in the rule file" if gone else ""

    def _asked_of(self, row: JournalRow) -> list[tuple[str, str]]:
        if row.action == "delete":
            return [(tier.name, one.key) for tier in self._file.tiers for one in row.objects]
        tiers = {row.src, row.dst, self._placing.home}
        return [(tier, one.key) for tier in tiers for one in row.objects]

    def _check_one(self, one: DueDeletion, heads: Heads, guard: DeletionGuard, pin: str) -> None:
        row = one.row
        if changed := self._look(one, heads):
            one.set_verdict("cancel", changed)
            return
        if not one.present and (one.is_begun or row.action in ("delete", "reclass")):
            one.set_verdict("done", "")
            return
        if row.action == "delete":
            self._check_delete(one, guard)
        else:
            self._check_target(one, heads, guard)
        if pin:
            one.set_verdict("cancel", pin)
        links = [guard.linked.get((row.path, where)) for where in sorted({where for where, _ in one.present})]
        # A link cannot use a group whose objects are partly deleted already: such a deletion is finished.
        if (link := next(filter(None, links), None)) and (one.is_whole or not one.is_begun):
            one.set_verdict("keep", f"{row.path}: expected no symbolic link to it, found {link}")
        if row.rule in self._by_use and guard.used_s.get(row.path, 0.0) > row.since_s > 0:
            # No placement redirects readers of plain files to the copy: a reader that uses the URL reads the source.
            one.set_verdict("cancel", f"{row.path}: expected no reader since it was copied, found that it was read")
        if row.path in guard.in_use:
            one.set_verdict("keep", f"{row.path}: expected no reader, found that a machine reads it now")
        if row.rules != self._file.sha256 and row.action != "delete" and (row.path, row.src) not in guard.asked:
            one.set_verdict("cancel", f"{row.path}: the rule file was changed and no longer asks for this")
        if one.verdict == "cancel" and one.is_begun and not one.is_whole:
            one.verdict = "keep"  # some objects are gone: the rest must be deleted when that is possible again

    def _look(self, one: DueDeletion, heads: Heads) -> str:
        """Compare the objects to delete with those that the journal recorded, and note which of them exist."""
        row, context, changed = one.row, self._context, ""
        for obj in row.objects:
            where = obj.where if row.action == "delete" else row.src
            info = found_in(heads, where, obj.key)
            if info is None:
                one.is_whole = False
                continue
            if row.action == "reclass" and has_class(context, row.dst, info) and info.n_bytes == obj.n_bytes:
                continue
            one.present.append((where, obj))
            changed = changed or context.change_reason(where, info, obj)
        if row.action == "reclass" and not one.is_whole:
            changed = changed or f"{row.src_place}/{row.path}: expected {len(row.objects)} objects, some are missing"
        for where in sorted({obj.where for obj in row.objects} if row.action == "delete" else {row.src}):
            changed = changed or context.extra_object_reason(where, row.path, [obj.key for obj in row.objects])
        return changed or (self._new_copies(row, heads) if row.action == "delete" else "")

    def _new_copies(self, row: JournalRow, heads: Heads) -> str:
        """Return why there are more copies than the last copies that were to be deleted; "" if there are not."""
        stores, known = self._context.stores, {(one.where, one.key) for one in row.objects}
        for tier in self._file.tiers:
            for info in found_infos(heads, tier.name, row).values():
                if info is None or (tier.name, info.key) in known:
                    continue
                if stores.tier_of(stores.sharing(tier.name), info) == tier.name:
                    return f"{tier.url}/{info.key}: expected no copy there, found one of {info.n_bytes} bytes"
        return ""

    def _check_delete(self, one: DueDeletion, guard: DeletionGuard) -> None:
        row = one.row
        if row.path in guard.protected:
            one.set_verdict("cancel", f"{row.path}: it is the newest complete checkpoint of its run")
        elif one.is_whole and row.path not in guard.deletes:
            one.set_verdict("cancel", f"{row.path}: no rule deletes it now")

    def _check_target(self, one: DueDeletion, heads: Heads, guard: DeletionGuard) -> None:
        row, context = one.row, self._context
        there = found_infos(heads, row.dst, row)
        if row.action != "reclass":
            if why := self._context.unconfirmed_move_reason(row, there):
                one.set_verdict("cancel", why)
            if since_s := self._lock.unreliable_copies.get((row.dst_place, row.path)):
                one.set_verdict(
                    "keep",
                    f"{row.dst_place}/{row.path}: another process lost the tier lock {self._now_s - since_s:.0f} s ago "
                    f"and may still delete this copy: it is not relied on for a week",
                )
            if not one.present:
                one.set_verdict("done", "")
            elif why := context.shared_location_reason(row.src, row.dst):
                one.set_verdict("cancel", why)
        stays = row.action != "reclass" and all(info is not None and is_readable(info) for info in there.values())
        if row.path in guard.protected and not stays:
            one.set_verdict(
                "cancel", f"{row.path}: the newest complete checkpoint of its run stays where it can be read"
            )
        between = not self._placing.is_home(row.src) and not self._placing.is_home(row.dst)
        at_home: Infos = found_infos(heads, self._placing.home, row) if between else {}
        if one.verdict == "go" and (why := self._placing.unredirected_reason(row, at_home)):
            one.set_verdict("cancel", why)

    def _part(self, due: Sequence[DueDeletion]) -> None:
        """Postpone a deletion if its source proves another deletion of the batch, or the reverse, for any paths.

        Without this: 1. A drops from src, because dst has a copy. 2. B drops from dst, because src has a copy. 3. Both
        were checked before either was made. One row per path and one placement per key prevent this already; this check
        is cheap.
        """
        counted: set[tuple[str, str]] = set()
        dropped: set[tuple[str, str]] = set()
        for one in due:
            if one.verdict != "go" or one.row.action == "reclass":
                continue
            takes = {(where, obj.key) for where, obj in one.present}
            needs = {(one.row.dst, obj.key) for obj in one.row.objects} if one.row.action != "delete" else set()
            if takes & counted or needs & dropped:
                one.set_verdict("keep", f"{one.row.path}: another move of the same objects comes first")
                continue
            counted |= needs
            dropped |= takes

    def _prove(self, due: Sequence[DueDeletion]) -> None:
        """Read local copies back from disk, once, before their sources are deleted: no store verifies their bytes."""
        copies: list[tuple[DueDeletion, str, CatalogEntry | None]] = []
        for one in due:
            if self._context.transfer.needs_disk_check(one.row.dst):
                keys = [obj.key for obj in one.row.objects]
                books = self._catalog.entries(one.row.dst, keys)
                copies += [(one, key, books.get(key)) for key in keys]
        for (one, _, _), (verdict, why) in zip(copies, self._context.pool.map(self._proof, copies), strict=True):
            if why:
                # Where some source objects are gone, the deletion is finished when that is possible again, not
                # forgotten.
                one.set_verdict("keep" if one.is_begun and not one.is_whole else verdict, why)

    def _proof(self, copy: tuple[DueDeletion, str, CatalogEntry | None]) -> tuple[Verdict, str]:
        one, key, known = copy
        try:
            return "cancel", self._context.proof(one.row.dst, key, known, self._have_read)
        except TierCacheError as error:
            is_half_gone = one.is_begun and not one.is_whole  # then the copy is the only one of the deleted objects
            if (why := str(error)) != one.row.note or known is None or is_half_gone:
                return "keep", why
            # The same error as last time: a broken disk does not repair itself, and readers cannot read the copy
            # either.
            self._context.disbelieve(one.row.dst, key, known)
            return "cancel", why

    def _have_read(self, n_bytes: int) -> None:
        with self._lock_counts:
            self._proof_bytes += n_bytes
            done_bytes = self._proof_bytes
        if self._on_progress is not None:
            self._on_progress(Progress(self._n_done, self._n_due, done_bytes, max(self._due_bytes, done_bytes)))

    # -- deletions --------------------------------------------------------------------------------------------------

    def _carry_out(self, due: Sequence[DueDeletion]) -> None:
        if not due:
            return
        self._catalog.write([replace(one.row, state="dropping", changed_s=self._now_s) for one in due])
        for one in due:
            one.is_begun = True
        self._catalog.source_deleted([(o.row.dst, one.key) for o in due if o.row.dst for one in o.row.objects])
        crash_point("tier_drop.journaled")
        self._unplace([one for one in due if one.row.action == "delete"])
        self._look_again(due)
        self._heed_pins(due)
        crash_point("tier_drop.decided")  # a pin that is added from here on is too late for this batch
        going = [one for one in due if one.verdict == "go"]
        drops = [one for one in going if one.row.action != "reclass"]
        places = {tier.name: tier.url for tier in self._file.tiers}
        # From here to the deletions there are no further queries: see lock.py.
        self._lock.announce(sorted({(places[where], one.row.path) for one in drops for where, _ in one.present}))
        self._drop(drops)
        self._reclass([one for one in going if one.row.action == "reclass"])

    def _look_again(self, due: Sequence[DueDeletion]) -> None:
        """Keep what was written, or has lost its other copy, since the first check, which may be hours ago."""
        drops = [one for one in due if one.verdict == "go" and one.row.action != "reclass"]
        wanted = [(where, obj.key) for one in drops for where, obj in one.present]
        placed = [one for one in drops if one.row.dst]
        wanted += [(one.row.dst, obj.key) for one in placed for obj in one.row.objects]
        heads = self._context.heads(list(dict.fromkeys(wanted)))
        for one in placed:
            try:
                if why := self._context.unconfirmed_move_reason(one.row, found_infos(heads, one.row.dst, one.row)):
                    one.set_verdict("keep", why)  # the next run checks it again
            except TierCacheError as error:
                one.set_verdict("keep", str(error))
        for one in drops:
            for where, obj in one.present:
                try:
                    info = found_in(heads, where, obj.key)
                    why = "" if info is None else self._context.change_reason(where, info, obj)
                except TierCacheError as error:
                    one.set_verdict("keep", str(error))
                    continue
                if why:
                    one.set_verdict("cancel", why)
        crash_point("tier_drop.looked_again")

    def _unplace(self, due: Sequence[DueDeletion]) -> None:
        """Remove placement rows of last copies, so that readers find no object rather than a location without one."""
        changes: dict[str, RowChanges] = defaultdict(dict)
        chains: dict[str, list[DueDeletion]] = defaultdict(list)
        for one in due:
            try:
                folder = self._placing.folder(one.row)
                changes[folder].update(self._placing.wanted(one.row, {}, {}))
                chains[folder].append(one)
            except TierCacheError as error:
                one.set_verdict("keep", str(error))
        for folder, why in self._placing.commit(changes).items():
            for one in chains[folder]:
                one.set_verdict("keep", why)
        crash_point("tier_drop.unplaced")

    def _drop(self, due: Sequence[DueDeletion]) -> None:
        """Delete the objects that make groups complete, so that no partial group looks complete; then all others."""
        # By tier: the object that makes the group complete may exist in one of several tiers, and only there comes
        # last.
        rows = [one.row for one in due if len(one.row.objects) > 1]
        keys = {(row.plan, row.number, obj.where): obj.key for row in rows for obj in row.objects}
        first: list[tuple[DueDeletion, str, JournalObject]] = []
        rest: list[tuple[DueDeletion, str, JournalObject]] = []
        for one in due:
            for where, obj in one.present:
                last = keys.get((one.row.plan, one.row.number, obj.where))
                (first if obj.key == last else rest).append((one, where, obj))
        self._delete(first)
        crash_point("tier_drop.unmade")
        self._delete(rest)
        crash_point("tier_drop.dropped")

    def _delete(self, objects: Iterable[tuple[DueDeletion, str, JournalObject]]) -> None:
        by_tier: dict[str, list[tuple[DueDeletion, JournalObject]]] = defaultdict(list)
        for one, where, obj in objects:
            if one.verdict == "go":
                by_tier[where].append((one, obj))
        for tier, pairs in by_tier.items():
            try:
                self._context.transfer.delete_objects(tier, [obj for _, obj in pairs])
            except StoreError as error:  # some may be gone: the row says "dropping", and the next run deletes the rest
                for one, _ in pairs:
                    one.set_verdict("keep", str(error))

    def _reclass(self, due: Sequence[DueDeletion]) -> None:
        pairs = [(one, obj) for one in due for _, obj in one.present]
        for one in due:
            self._context.remember_dates(one.row.dst, [obj for _, obj in one.present])
        made = [copy for copy in self._context.pool.map(self._reclassed, pairs) if copy is not None]
        crash_point("tier_drop.reclassed")
        self._catalog.record(made)

    def _reclassed(self, pair: tuple[DueDeletion, JournalObject]) -> tuple[str, str, CatalogEntry] | None:
        one, obj = pair
        dst = one.row.dst
        try:
            known = self._catalog.entries(dst, [obj.key]).get(obj.key)
            changed = self._context.transfer.change_class(dst, obj)
        except CommitConflict:
            raise
        except TierCacheError as error:
            one.set_verdict("keep", str(error))
            return None
        copy = entry_after_class_change(obj, known, changed)
        return None if copy is None else (dst, obj.key, copy)

    # -- results ----------------------------------------------------------------------------------------------------

    def _end(self, due: Sequence[DueDeletion]) -> None:
        back = [one for one in due if one.verdict == "cancel" and one.is_whole and one.present]
        # The placement of a last copy changes when its deletion begins, not before.
        self._take_back([one for one in back if one.is_begun or one.row.action != "delete"])
        rows, gone, lasting = [], [], []
        for one in due:
            row = one.row
            if one.verdict in ("go", "done"):
                rows.append(replace(row, state="done", note="", changed_s=self._now_s))
                self._n_done += 1
                if row.action != "reclass":
                    lasting += [(row.dst, obj.key) for obj in row.objects if row.dst]
                    gone += [(where, obj.key) for where, obj in one.present]
                if row.action == "delete":  # and the catalog entries of copies that others have deleted
                    gone += [(tier.name, obj.key) for tier in self._file.tiers for obj in row.objects]
                self._n_bytes += sum(obj.n_bytes for _, obj in one.present) if one.verdict == "go" else 0
                continue
            if one.verdict == "cancel":
                rows.append(replace(row, state="cancelled", note=one.why, changed_s=self._now_s))
            else:
                kept = replace(row, state="dropping" if one.is_begun else row.state)
                rows.append(replace(kept, note=one.why, changed_s=self._now_s))
                self._n_waiting += 1
            self._stopped.append(StoppedMove(row.number, one.why, row.path, row.plan))
        self._remove_folders([one for one in due if one.verdict in ("go", "done") and one.row.action != "reclass"])
        self._catalog.source_deleted(lasting)  # also of sources that somebody else deleted
        self._catalog.write(rows)
        crash_point("tier_drop.done")
        self._catalog.forget(gone)

    def _remove_folders(self, due: Sequence[DueDeletion]) -> None:
        """Remove empty folders of deleted checkpoints from local tiers: frameworks would try to resume from them."""
        for one in due:
            row = one.row
            if row.kind != "checkpoint" or any(obj.key == row.path for obj in row.objects):
                continue
            for where in sorted({obj.where or row.src for obj in row.objects}):
                store = self._context.stores.store(where)
                if isinstance(store, LocalFolder):
                    with suppress(StoreError):  # the objects are gone; an empty folder is only cosmetic
                        store.remove_empty(row.path)

    def _take_back(self, due: Sequence[DueDeletion]) -> None:
        """Revert the placement where src stays, before the redirect is forgotten."""
        failed = self._placing.take_back([one.row for one in due])
        for one in due:
            if why := failed.get((one.row.plan, one.row.number)):
                one.verdict, one.why = "keep", f"{one.why}; {why}"
        crash_point("tier_drop.taken_back")


def _needs_proof(row: JournalRow) -> bool:
    """Return whether a move deletes a source whose copy must be verified."""
    return row.action in ("move", "drop")


def _out_of_sight(row: JournalRow, missing: Mapping[str, str]) -> str:
    """Return why the state of what a move deletes is unknown; "" if it is known. missing: Tiers, with reasons.

    Where dst cannot be seen, its copies cannot be confirmed: the checks of the copies find that.
    """
    if row.action == "delete":
        return deletion_block_reason(missing)
    return missing.get(row.src, "")
