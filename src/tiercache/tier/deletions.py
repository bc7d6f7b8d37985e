"""Deferred deletions: drops, deletions of last copies, class changes that end readability, after their grace period.

In names and texts here, "deletion" covers all three.

What depends on the state of all tiers comes from a listing and a plan that are at most 10 minutes old (DeletionFacts):
those of this run, or new ones. All else is checked again directly before the deletion; the package's docstring gives
the reasons. A deletion whose conditions no longer hold is cancelled if the objects or rules have changed, and its
redirect is reverted; or it keeps waiting if the reason may pass.
"""

from __future__ import annotations

import secrets
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tiercache.crash_points import crash_point
from tiercache.errors import StoreError, TierCacheError
from tiercache.model import ObjectInfo
from tiercache.store import LocalFolder
from tiercache.tier.context import (
    ApplyResult,
    BatchLimits,
    Heads,
    MoveContext,
    PlacementUpdates,
    RowChanges,
    StoppedMove,
    in_batches,
    is_readable,
)
from tiercache.tier.inventory import Inventory, take_inventory
from tiercache.tier.journal import CatalogEntry, JournalRow, PlannedObject, TierCatalog
from tiercache.tier.moves import change_classes, remove_empty_folders
from tiercache.tier.policy import decide_now, find_newest
from tiercache.tier.rules import RuleFile
from tiercache.tier.snapshot import CHECKPOINT, DELETE, DROP, KINDS, MOVE, READABLE, RECLASS, SHARD, Decisions, Snapshot
from tiercache.tier.stores import Stores, deletion_block_reason, needs_restore, unavailable_tiers
from tiercache.waiting import SYSTEM_CLOCK


@dataclass(frozen=True, slots=True)
class DeletionFacts:
    in_use: frozenset[str] = frozenset()  # paths that a reader uses now
    protected: frozenset[str] = frozenset()  # newest complete checkpoint of each run, and newest that can be read
    deletes: frozenset[str] = frozenset()  # paths whose last copies the rules delete now
    asked: frozenset[tuple[str, str]] = frozenset()  # (path, tier) from which the rules take a copy away now
    # (path, tier) -> symbolic link that leads to the group there, or lies in it
    linked: Mapping[tuple[str, str], str] = field(default_factory=dict)
    used_s: Mapping[str, float] = field(default_factory=dict)  # last read through a cache of this machine


def take_deletion_facts(file: RuleFile, stores: Stores, catalog: TierCatalog, now_s: float) -> DeletionFacts:
    snapshot = take_inventory(file, stores, catalog, now_s=now_s).snapshot
    return deletion_facts_of(snapshot, decide_now(snapshot, file, stores, catalog)[0])


def deletion_facts_of(snapshot: Snapshot, decisions: Decisions) -> DeletionFacts:
    tiers = snapshot.tiers
    is_used = np.isfinite(snapshot.uses_tracked_since_s) & (snapshot.kind != SHARD)
    moves = decisions.moves
    takes, deletes = np.isin(moves.action, (MOVE, DROP, RECLASS)), moves.action == DELETE
    return DeletionFacts(
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


# go: no check speaks against the deletion. done: nothing is left to delete. wait: the next run checks it again, because
# the reason may pass. cancel: objects or rules have changed.
Verdict: TypeAlias = Literal["go", "done", "wait", "cancel"]

# Small batches: between the checks and the deletions lie the queries of one batch, and the reading of its local copies.
_BATCH_LIMITS = BatchLimits(64, 1000, 64 << 30)
_CLOCK_SKEW_S = 60.0
# Maximum age of DeletionFacts when a batch begins.
_FACTS_MAX_AGE_S = 600.0


@dataclass(slots=True)
class DueDeletion:
    """A move whose grace period is over: something is deleted, or gets a class that ends its readability."""

    row: JournalRow
    verdict: Verdict = "go"
    reason: str = ""
    present: list[tuple[str, PlannedObject]] = field(default_factory=list)  # what exists, as (tier, object)
    is_whole: bool = True  # whether `present` has all the objects that there were
    is_begun: bool = False  # whether deletions may have been made already
    is_unwanted: bool = False  # cancelled because a rule, a pin, a hold or a reader speaks against it

    def set_verdict(self, verdict: Verdict, reason: str) -> None:
        """Set the verdict, if there is a reason and no earlier verdict.

        Where some objects are gone already, a deletion is not cancelled: the rest is deleted when that is possible.
        """
        if reason and self.verdict == "go":
            self.verdict, self.reason = "wait" if verdict == "cancel" and self.is_half_made else verdict, reason

    def cancel_changed(self, reason: str) -> None:
        """Cancel the deletion, even a half-made one, because its objects have changed; "": they have not."""
        if reason and self.verdict == "go":
            self.verdict, self.reason = "cancel", reason

    def cancel_unwanted(self, reason: str) -> None:
        """Cancel the deletion because a rule, a pin, a hold or a reader speaks against it.

        Nothing has failed then, and the result does not count it among the stopped moves. A half-made drop is finished
        nevertheless: what is left in src is of no use, and dst has all of it.
        """
        if not (self.is_half_made and self.row.action in ("move", "drop")):
            self.is_unwanted |= bool(reason) and self.verdict == "go"
            self.set_verdict("cancel", reason)

    @property
    def is_half_made(self) -> bool:
        return self.is_begun and not self.is_whole


def run_due_deletions(
    context: MoveContext,
    *,
    facts: tuple[DeletionFacts, float] | None = None,
    only_begun: bool = False,
) -> ApplyResult:
    """Make the deletions and class changes whose grace period is over, and finish those that were interrupted.

    What is not in the required state stays, and is reported. Raises as apply_plan(). facts: Of a listing that was made
    already, and when it began, by SYSTEM_CLOCK. None: the tiers are listed and planned again, before anything is
    deleted. only_begun: Whether to finish interrupted deletions only.
    """
    return DeferredDeletions(context, facts).run(only_begun=only_begun)


class DeferredDeletions:
    def __init__(
        self,
        context: MoveContext,
        facts: tuple[DeletionFacts, float] | None,
    ) -> None:
        self._context, self._facts = context, facts
        self._file, self._catalog, self._now_s = context.file, context.catalog, context.clock()
        self._placements = PlacementUpdates(context)
        self._by_use = {rule.name for rule in context.file.rules if rule.idle_s}
        self._n_done = self._n_waiting = self._n_bytes = 0
        self._stopped: list[StoppedMove] = []

    def run(self, *, only_begun: bool) -> ApplyResult:
        due = self._due(only_begun=only_begun)
        for batch in in_batches(due, _BATCH_LIMITS):
            # Reading the copies of earlier batches may have taken hours.
            if self._facts is None or SYSTEM_CLOCK.monotonic() - self._facts[1] > _FACTS_MAX_AGE_S:
                listed_s, context = SYSTEM_CLOCK.monotonic(), self._context
                found = take_deletion_facts(context.file, context.stores, context.catalog, self._now_s)
                self._facts = found, listed_s
            self._run_batch(batch, self._facts[0])
        return ApplyResult(self._n_done, tuple(self._stopped), self._n_waiting, self._n_bytes)

    def remove(self, due: Sequence[DueDeletion]) -> None:
        facts = DeletionFacts(deletes=frozenset(deletion.row.path for deletion in due))
        for batch in in_batches(due, _BATCH_LIMITS):
            self._context.lock.check()
            self._placements.forget_placements()
            self._check(batch, facts)
            going = [deletion for deletion in batch if deletion.verdict == "go"]
            paths = {deletion.row.path for deletion in going}
            # Moves of the paths that wait would delete, or bring back, what is removed now.
            waiting = [row for row in self._catalog.open_moves(self._file.home_tier.url) if row.path in paths]
            self._catalog.write([], instead_of=[(row.plan, row.number) for row in waiting])
            self._carry_out(going)
            self._end(batch)

    def _due(self, *, only_begun: bool) -> list[DueDeletion]:
        due, again = [], []
        for row in self._catalog.open_moves(self._file.home_tier.url, "waiting", "dropping"):
            if row.state == "dropping" or (not only_begun and row.due_s <= self._now_s):
                due.append(DueDeletion(row, is_begun=row.state == "dropping"))
                continue
            self._n_waiting += 1
            if row.since_s > self._now_s + _CLOCK_SKEW_S:
                # The clock was ahead when the grace period began: without this it would last that much longer.
                due_s = self._now_s + self._file.tiering.grace_s
                again.append(replace(row, since_s=self._now_s, due_s=due_s, changed_s=self._now_s))
        self._catalog.write(again)
        return due

    def _run_batch(self, due: Sequence[DueDeletion], facts: DeletionFacts) -> None:
        self._context.lock.check()
        self._placements.forget_placements()
        self._check(due, facts)
        self._postpone_overlaps(due)
        drops = [one for one in due if one.verdict == "go" and one.row.action in ("move", "drop")]
        self._read_back([one for one in drops if isinstance(self._context.stores.store(one.row.dst), LocalFolder)])
        self._check_pins(due)  # again, because reading copies may have taken hours
        crash_point("tier_drop.checked")
        self._carry_out([deletion for deletion in due if deletion.verdict == "go"])
        self._end(due)
        crash_point("tier_drop.ended")

    # -- checks -----------------------------------------------------------------------------------------------------

    def _check(self, due: Sequence[DueDeletion], facts: DeletionFacts) -> None:
        for deletion in due:
            deletion.set_verdict("cancel", self._context.changed_tiers_reason(deletion.row))
        due = [deletion for deletion in due if deletion.verdict == "go"]
        pinned = self._pin_reasons(due)
        heads = self._context.heads(
            (tier, obj.key)
            for deletion in due
            for tier in self._tiers_to_query(deletion.row)
            for obj in deletion.row.objects
        )
        unavailable = unavailable_tiers(self._file, self._context.stores, self._catalog)
        for deletion in due:
            # Where dst cannot be seen, its copies cannot be confirmed: the checks of the copies find that.
            is_delete = deletion.row.action == "delete"
            deletion.set_verdict(
                "wait", deletion_block_reason(unavailable) if is_delete else unavailable.get(deletion.row.src, "")
            )
            if deletion.verdict == "go":
                try:
                    self._check_one(deletion, heads, facts, pinned.get((deletion.row.plan, deletion.row.number), ""))
                except TierCacheError as error:
                    deletion.set_verdict("wait", str(error))

    def _pin_reasons(self, due: Sequence[DueDeletion]) -> Mapping[tuple[str, int], str]:
        try:
            return self._context.pin_reasons([deletion.row for deletion in due], self._now_s)
        except TierCacheError as error:
            for deletion in due:
                deletion.set_verdict("wait", str(error))
            return {}

    def _check_pins(self, due: Sequence[DueDeletion]) -> None:
        due = [deletion for deletion in due if deletion.verdict == "go"]
        pinned = self._pin_reasons(due)
        for deletion in due:
            deletion.cancel_unwanted(pinned.get((deletion.row.plan, deletion.row.number), ""))

    def _tiers_to_query(self, row: JournalRow) -> set[str]:
        if row.action == "delete":
            return {tier.name for tier in self._file.tiers}
        return {row.src, row.dst, self._placements.home_name}

    def _check_one(self, deletion: DueDeletion, heads: Heads, facts: DeletionFacts, pin: str) -> None:
        row = deletion.row
        deletion.cancel_changed(self._change_reason(deletion, heads))
        if deletion.verdict != "go":
            return
        if not deletion.present and (deletion.is_begun or row.action in ("delete", "reclass")):
            deletion.verdict = "done"
            return
        if row.action == "delete":
            self._check_delete(deletion, facts)
        else:
            self._check_target(deletion, heads, facts)
        deletion.cancel_unwanted(pin)
        links = (facts.linked.get((row.path, tier)) for tier in sorted({tier for tier, _ in deletion.present}))
        # A link cannot use a group whose objects are partly deleted already: such a deletion is finished.
        if (link := next(filter(None, links), None)) and not deletion.is_half_made:
            deletion.set_verdict("wait", f"{row.path}: expected no symbolic link to it, found {link}")
        if row.rule in self._by_use and facts.used_s.get(row.path, 0.0) > row.since_s > 0:
            # No placement redirects readers of plain files to the copy: a reader that uses the URL reads the source.
            deletion.cancel_unwanted(f"{row.path}: expected no reader since it was copied, found that it was read")
        if row.path in facts.in_use:
            deletion.set_verdict("wait", f"{row.path}: expected no reader, found that a machine reads it now")
        if row.rules != self._file.sha256 and row.action != "delete" and (row.path, row.src) not in facts.asked:
            deletion.cancel_unwanted(f"{row.path}: the rule file was changed and no longer asks for this")

    def _change_reason(self, deletion: DueDeletion, heads: Heads) -> str:
        row, context, changed = deletion.row, self._context, ""
        where_of = {obj: obj.tier if row.action == "delete" else row.src for obj in row.objects}
        for planned, tier in where_of.items():
            obj, info = planned, heads.info(tier, planned.key)
            if info is None:
                deletion.is_whole = False
                continue
            if row.action == "reclass" and context.has_class(row.dst, info) and info.n_bytes == obj.n_bytes:
                continue
            reason = context.change_reason(tier, info, obj)
            if reason and deletion.is_begun and self._equals_copy(row, info):
                # Half-made: chmod or chown has changed the ctime of a file, and with it its ETag, and no byte.
                obj, reason = obj._replace(etag=info.etag, modified_s=info.modified_s), ""
            deletion.present.append((tier, obj))
            changed = changed or reason
        if row.action == "reclass" and not deletion.is_whole:
            changed = changed or f"{row.src_url}/{row.path}: expected {len(row.objects)} objects, some are missing"
        for tier in sorted(set(where_of.values())):
            changed = changed or context.extra_object_reason(tier, row.path, [obj.key for obj in row.objects])
        return changed or (self._new_copy_reason(row, heads) if row.action == "delete" else "")

    def _equals_copy(self, row: JournalRow, info: ObjectInfo) -> bool:
        if row.action not in ("move", "drop") or needs_restore(info):
            return False
        entry = self._catalog.entries(row.dst, [info.key]).get(info.key)
        if entry is None or not entry.verified or entry.n_bytes != info.n_bytes:
            return False
        return self._context.transfer.checksum_of(row.src, info) == entry.crc32c

    def _new_copy_reason(self, row: JournalRow, heads: Heads) -> str:
        stores, planned = self._context.stores, {(obj.tier, obj.key) for obj in row.objects}
        for tier in self._file.tiers:
            for info in heads.infos(tier.name, row).values():
                if info is None or (tier.name, info.key) in planned:
                    continue
                if stores.tier_of(stores.sharing(tier.name), info) == tier.name:
                    return f"{tier.url}/{info.key}: expected no copy there, found one of {info.n_bytes} bytes"
        return ""

    def _check_delete(self, deletion: DueDeletion, facts: DeletionFacts) -> None:
        path = deletion.row.path
        if path in facts.protected:
            deletion.set_verdict("cancel", f"{path}: it is the newest complete checkpoint of its run")
        elif deletion.is_whole and path not in facts.deletes:
            deletion.set_verdict("cancel", f"{path}: no rule deletes it now")

    def _check_target(self, deletion: DueDeletion, heads: Heads, facts: DeletionFacts) -> None:
        row, context = deletion.row, self._context
        copies = heads.infos(row.dst, row)
        if row.action != "reclass":
            deletion.set_verdict("cancel", context.unconfirmed_move_reason(row, copies))
            if since_s := context.lock.doomed_copies.get((row.dst_url, row.path)):
                deletion.set_verdict(
                    "wait",
                    f"{row.dst_url}/{row.path}: another process lost the tier lock {self._now_s - since_s:.0f} s ago "
                    f"and may still delete this copy: it is not relied on for a week",
                )
            if deletion.verdict == "go" and not deletion.present:
                deletion.verdict = "done"
            if deletion.present:
                deletion.set_verdict("cancel", context.probe_shared_location(row.src, row.dst))
        stays = row.action != "reclass" and all(info is not None and is_readable(info) for info in copies.values())
        if row.path in facts.protected and not stays:
            deletion.cancel_unwanted(
                f"{row.path}: the newest complete checkpoint of its run stays where it can be read"
            )
        if deletion.verdict == "go":
            at_home = self._placements.copies_at_home(row, heads)
            deletion.set_verdict("cancel", self._placements.stale_placement_reason(row, at_home))

    def _postpone_overlaps(self, due: Sequence[DueDeletion]) -> None:
        """Postpone a deletion if its source proves another deletion of the batch, or the reverse, for any paths.

        Without this: 1. A drops from src, because dst has a copy. 2. B drops from dst, because src has a copy. 3. Both
        were checked before either was made. One row per path and one placement per key prevent this already; this check
        is cheap.
        """
        needed: set[tuple[str, str]] = set()
        dropped: set[tuple[str, str]] = set()
        for deletion in due:
            if deletion.verdict != "go" or deletion.row.action == "reclass":
                continue
            drops = {(tier, obj.key) for tier, obj in deletion.present}
            needs = (
                {(deletion.row.dst, obj.key) for obj in deletion.row.objects}
                if deletion.row.action != "delete"
                else set()
            )
            if drops & needed or needs & dropped:
                deletion.set_verdict("wait", f"{deletion.row.path}: another move of the same objects comes first")
                continue
            needed |= needs
            dropped |= drops

    def _read_back(self, due: Sequence[DueDeletion]) -> None:
        """Read local copies back from disk, once, before their sources are deleted."""
        copies: list[tuple[DueDeletion, str, CatalogEntry | None]] = []
        for deletion in due:
            keys = [obj.key for obj in deletion.row.objects]
            entries = self._catalog.entries(deletion.row.dst, keys)
            copies += [(deletion, key, entries.get(key)) for key in keys]
        for (deletion, _, _), finding in zip(copies, self._context.pool.map(self._read_back_copy, copies), strict=True):
            if finding is not None:
                deletion.set_verdict(*finding)

    def _read_back_copy(self, copy: tuple[DueDeletion, str, CatalogEntry | None]) -> tuple[Verdict, str] | None:
        (deletion, key, entry), context = copy, self._context
        dst = deletion.row.dst
        try:
            info = context.head(dst, key)
            if reason := context.unconfirmed_reason(dst, key, info, entry):
                return "cancel", reason
            at = f"{context.stores.store(dst).url}/{key}"
            if info is None or entry is None or entry.crc32c is None:
                return "cancel", f"{at}: its checksum is not known: it cannot be compared"
            found = context.transfer.checksum_on_disk(dst, info)
        except TierCacheError as error:
            reason = str(error)
            if (
                reason != deletion.row.note or entry is None or deletion.is_half_made
            ):  # half made: the copy is the only one
                return "wait", reason
            # The same error as last time: a broken disk does not repair itself, and readers cannot read the copy
            # either.
            context.disbelieve(dst, key, entry)
            return "cancel", reason
        if found == entry.crc32c:
            return None
        context.disbelieve(dst, key, entry)
        return "cancel", (
            f"{at}: expected CRC-32C {entry.crc32c:08x}, found {found:08x} on its disk: what it was made from stays, "
            f"and the next plan makes this copy again; look at that disk"
        )

    # -- deletions --------------------------------------------------------------------------------------------------

    def _carry_out(self, due: Sequence[DueDeletion]) -> None:
        if not due:
            return
        self._catalog.write([replace(deletion.row, state="dropping", changed_s=self._now_s) for deletion in due])
        for deletion in due:
            deletion.is_begun = True
        crash_point("tier_drop.journaled")
        self._remove_placements([deletion for deletion in due if deletion.row.action == "delete"])
        self._look_again(due)
        self._check_pins(due)
        crash_point("tier_drop.decided")  # a pin that is added from here on is too late for this batch
        going = [deletion for deletion in due if deletion.verdict == "go"]
        drops = [deletion for deletion in going if deletion.row.action != "reclass"]
        urls = {tier.name: tier.url for tier in self._file.tiers}
        # From here to the deletions there are no further queries: see lock.py.
        self._context.lock.announce(
            sorted({(urls[tier], deletion.row.path) for deletion in drops for tier, _ in deletion.present})
        )
        self._drop([deletion for deletion in drops if deletion.verdict == "go"])
        reclassed = [deletion for deletion in going if deletion.row.action == "reclass"]
        objects = [(deletion, deletion.row.dst, [obj for _, obj in deletion.present]) for deletion in reclassed]
        change_classes(self._context, objects, lambda deletion, reason: deletion.set_verdict("wait", reason))
        crash_point("tier_drop.reclassed")

    def _look_again(self, due: Sequence[DueDeletion]) -> None:
        """Postpone what was written, or has lost its other copy, since the first check, which may be hours ago."""
        drops = [deletion for deletion in due if deletion.verdict == "go" and deletion.row.action != "reclass"]
        moved = [deletion for deletion in drops if deletion.row.dst]
        heads = self._context.heads(
            [(tier, obj.key) for deletion in drops for tier, obj in deletion.present]
            + [(deletion.row.dst, obj.key) for deletion in moved for obj in deletion.row.objects]
        )
        for deletion in moved:
            try:  # the next run checks it again
                deletion.set_verdict(
                    "wait",
                    self._context.unconfirmed_move_reason(deletion.row, heads.infos(deletion.row.dst, deletion.row)),
                )
            except TierCacheError as error:
                deletion.set_verdict("wait", str(error))
        for deletion in drops:
            for tier, obj in deletion.present:
                try:
                    info = heads.info(tier, obj.key)
                    deletion.cancel_changed("" if info is None else self._context.change_reason(tier, info, obj))
                except TierCacheError as error:
                    deletion.set_verdict("wait", str(error))
        crash_point("tier_drop.looked_again")

    def _remove_placements(self, due: Sequence[DueDeletion]) -> None:
        """Remove placement rows of last copies, so that readers find no object rather than a location without one."""
        changes: list[tuple[DueDeletion, str, RowChanges]] = []
        for deletion in due:
            try:
                changes.append((deletion, *self._placements.changes(deletion.row, {}, {})))
            except TierCacheError as error:
                deletion.set_verdict("wait", str(error))
        for deletion, reason in self._placements.commit(changes):
            deletion.set_verdict("wait", reason)
        crash_point("tier_drop.unplaced")

    def _drop(self, due: Sequence[DueDeletion]) -> None:
        """Delete the completing objects first, so that no partial group looks complete; then all others."""
        first: list[tuple[DueDeletion, str, PlannedObject]] = []
        rest: list[tuple[DueDeletion, str, PlannedObject]] = []
        for deletion in due:
            # By tier: the completing object may exist in one of several tiers, and only there comes last.
            last = {obj.tier: obj.key for obj in deletion.row.objects} if len(deletion.row.objects) > 1 else {}
            for tier, obj in deletion.present:
                (first if obj.key == last.get(obj.tier) else rest).append((deletion, tier, obj))
        self._delete(first)
        crash_point("tier_drop.unmade")
        self._delete(rest)
        crash_point("tier_drop.dropped")

    def _delete(self, objects: Sequence[tuple[DueDeletion, str, PlannedObject]]) -> None:
        by_tier: dict[str, list[tuple[DueDeletion, PlannedObject]]] = defaultdict(list)
        for deletion, tier, obj in objects:
            if deletion.verdict == "go":
                by_tier[tier].append((deletion, obj))
        for tier, pairs in by_tier.items():
            try:
                self._context.transfer.delete_objects(tier, [obj for _, obj in pairs])
            except StoreError as error:  # some may be gone: the row says "dropping", and the next run deletes the rest
                failed = error.details.get("failed")
                keys = failed if isinstance(failed, tuple) else tuple(obj.key for _, obj in pairs)
                for deletion, obj in pairs:
                    if obj.key in keys:
                        deletion.set_verdict("wait", str(error))

    # -- results ----------------------------------------------------------------------------------------------------

    def _end(self, due: Sequence[DueDeletion]) -> None:
        back = [deletion for deletion in due if deletion.verdict == "cancel" and deletion.is_whole and deletion.present]
        # The placement of a last copy changes when its deletion begins, not before.
        self._revert_placements([deletion for deletion in back if deletion.is_begun or deletion.row.action != "delete"])
        rows, gone = [], []
        for deletion in due:
            row = deletion.row
            if deletion.verdict in ("go", "done"):
                rows.append(replace(row, state="done", note="", changed_s=self._now_s))
                self._n_done += 1
                if row.action != "reclass":
                    gone += [(tier, obj.key) for tier, obj in deletion.present]
                if row.action == "delete":  # and the catalog entries of copies that others have deleted
                    gone += [(tier.name, obj.key) for tier in self._file.tiers for obj in row.objects]
                self._n_bytes += sum(obj.n_bytes for _, obj in deletion.present) if deletion.verdict == "go" else 0
                continue
            if deletion.verdict == "cancel":
                rows.append(replace(row, state="cancelled", note=deletion.reason, changed_s=self._now_s))
                if deletion.is_unwanted:
                    continue
            else:
                waits = replace(row, state="dropping" if deletion.is_begun else row.state)
                rows.append(replace(waits, note=deletion.reason, changed_s=self._now_s))
                self._n_waiting += 1
            self._stopped.append(StoppedMove(row.number, deletion.reason, row.path, row.plan))
        self._remove_folders(
            [deletion for deletion in due if deletion.verdict in ("go", "done") and deletion.row.action != "reclass"]
        )
        self._catalog.write(rows)
        crash_point("tier_drop.done")
        self._catalog.forget(gone)

    def _remove_folders(self, due: Sequence[DueDeletion]) -> None:
        for deletion in due:
            row = deletion.row
            for tier in sorted({obj.tier or row.src for obj in row.objects}):
                remove_empty_folders(self._context, row, tier)

    def _revert_placements(self, due: Sequence[DueDeletion]) -> None:
        failed = self._placements.revert([deletion.row for deletion in due])
        for deletion in due:
            if reason := failed.get((deletion.row.plan, deletion.row.number)):
                deletion.verdict, deletion.reason = "wait", f"{deletion.reason}; {reason}"
        crash_point("tier_drop.taken_back")


# -- removal of checkpoints at a user's request ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Removal:
    path: str
    n_bytes: int
    tiers: tuple[str, ...]
    reason: str = ""


def remove_groups(context: MoveContext, inventory: Inventory, groups: Sequence[int]) -> list[Removal]:
    """Delete checkpoints from all tiers, without a rule and a grace period. Return what was done, by group.

    The steps are those of a deletion that is due, so that the next run finishes a removal that was killed. A checkpoint
    stays if a pin or a hold protects it, or if an object has changed since the inventory. Nothing is deleted while a
    tier cannot be seen, because a copy in it would stay. A job that reads a checkpoint is not noticed.

    Raises CommitConflict if the tier lock was lost, StoreError if a tier cannot be seen.
    """
    unavailable = unavailable_tiers(context.file, context.stores, context.catalog)
    for tier, reason in unavailable.items():
        raise StoreError(
            f"nothing is removed while tier {tier} cannot be seen: {reason}", url=context.file.tier(tier).url
        )
    plan = f"rm-{secrets.token_hex(8)}"
    due = [DueDeletion(_row(context, inventory, group, plan, number)) for number, group in enumerate(groups, start=1)]
    for deletion, group in zip(due, groups, strict=True):
        if group in inventory.snapshot.pinned:
            deletion.set_verdict("cancel", "it is pinned in its pin.json, or that file cannot be read")
    DeferredDeletions(context, None).remove(due)
    found = []
    for deletion in due:
        objects, is_gone = deletion.row.objects, deletion.verdict in ("go", "done")
        tiers = tuple(dict.fromkeys(obj.tier for obj in objects))
        reason = "" if is_gone else deletion.reason
        found.append(Removal(deletion.row.path, sum(obj.n_bytes for obj in objects), tiers, reason))
    return found


def _row(context: MoveContext, inventory: Inventory, group: int, plan: str, number: int) -> JournalRow:
    snapshot, file = inventory.snapshot, context.file
    objects: list[PlannedObject] = []
    tiers = snapshot.tier[snapshot.group == group]
    table = inventory.objects_of(np.full(len(tiers), group), tiers)
    for copy, tier in enumerate(tiers.tolist()):
        name = snapshot.tiers[tier]
        objects += [PlannedObject(*one)._replace(tier=name) for one in table.named(copy, copy + 1)]
    return JournalRow(
        plan=plan,
        number=number,
        path=snapshot.paths[group].as_py(),
        kind=KINDS[snapshot.kind[group]],
        action="delete",
        src=objects[0].tier,
        dst="",
        src_url=file.tier(objects[0].tier).url,
        dst_url="",
        home=file.home_tier.url,
        rules=file.sha256,
        rule="ckpt rm",
        state="cancelled",
        objects=tuple(objects),
        changed_s=context.clock(),
    )
