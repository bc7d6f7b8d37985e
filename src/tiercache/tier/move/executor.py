"""The plan executor: takes the moves of one plan from the first check of their sources until they are done or wait.

The package's docstring lists the steps and the races. An object in dst is never overwritten, with one exception: a move
made it from this very src, it is unchanged since, and src has a different object now. A copy whose source was dropped,
or that came from another tier, is never overwritten::

    1. hot has v1 of a key, and home has v2. 2. v1 is copied to the archive, and dropped from hot.
    3. v2 is copied to the archive, and overwrites the last copy of v1.

The last object of a group is its completing object. It is copied when all the others are there, so that an incomplete
copy never looks complete.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import TYPE_CHECKING, Literal, TypeVar

from tiercache.catalog.tiers import CatalogEntry, JournalRow, PlannedObject
from tiercache.crash_points import crash_point
from tiercache.errors import CommitConflict, StoreError, TierCacheError
from tiercache.tier.inventory.layouts import undated_path
from tiercache.tier.move.checks import (
    ApplyResult,
    BatchLimits,
    Heads,
    MoveContext,
    Progress,
    StoppedMove,
    earliest,
    entry_after_class_change,
    first_written_s,
    in_batches,
    matches_entry,
)
from tiercache.tier.move.hand_copies import HandCopy, find_hand_copy, held_reason, hold_hand_copies
from tiercache.tier.move.placement_updates import PlacementUpdates, RowChanges
from tiercache.tier.move.renames import finish_renames, rename_older_copy
from tiercache.tier.move.transfer import MayReplace, is_md5
from tiercache.tier.stores import CLASSES_TO_RESTORE, deletion_block_reason, needs_restore

if TYPE_CHECKING:
    from tiercache.model import ObjectInfo
    from tiercache.tier.model import Move, Plan


T = TypeVar("T")

# A copy of this size is recorded in the catalog at once, so that a killed process does not have to make it again.
_AT_ONCE_BYTES = 8 << 20
# Assumed difference between the clocks of stores.
_STORE_SKEW_S = 60.0


@dataclass(slots=True)
class MoveJob:
    """A move in progress. The lock guards the fields that pool threads change.

    Attributes:
        stop_reason: Reason why the move was stopped; "" while it was not.
        hand_copy: Copy that the move would take away, and that somebody made by hand; None: there is none.
        is_finished: Whether nothing is left to do.
        made: Verified copies that are not in the catalog yet, as (tier, key, entry).
        n_bytes: Bytes that were copied.
        is_new: Whether a copy in dst was not in the catalog before.
    """

    row: JournalRow
    stop_reason: str = ""
    hand_copy: HandCopy | None = None
    is_finished: bool = False
    made: list[tuple[str, str, CatalogEntry]] = field(default_factory=list)
    n_bytes: int = 0
    is_new: bool = False
    lock: Lock = field(default_factory=Lock)

    def stop(self, reason: str) -> None:
        """Stop the move. Only the first reason is kept. reason: Not empty; see stop_if()."""
        with self.lock:
            self.stop_reason = self.stop_reason or reason

    def stop_if(self, reason: str) -> None:
        """Stop the move if a check gave a reason; "" means that the check found nothing."""
        if reason:
            self.stop(reason)

    @property
    def is_active(self) -> bool:
        """Whether there is more to do."""
        return not (self.stop_reason or self.hand_copy or self.is_finished)


class CopyMaker:
    """Makes the copies of jobs in parallel. Use it from one thread at a time."""

    def __init__(self, context: MoveContext, on_bytes: Callable[[int], object]) -> None:
        self._context, self._on_bytes = context, on_bytes

    def copy(self, jobs: Sequence[MoveJob]) -> None:
        """Make each job's group complete and verified in dst, and record it in the catalog.

        A failure stops its job only.
        """
        self._intend(jobs)
        crash_point("tier_move.intended")
        self._for_each(self._ensure, [(job, obj) for job in jobs for obj in job.row.objects[:-1]])
        crash_point("tier_move.parts_copied")
        self._for_each(self._ensure, [(job, job.row.objects[-1]) for job in jobs])
        crash_point("tier_move.copied")
        self._record(jobs)
        crash_point("tier_move.recorded")

    def _intend(self, jobs: Sequence[MoveJob]) -> None:
        """Record the copies that are about to be made in archive classes, where they cannot be read afterwards.

        Without the record: 1. An object is copied into an archive class. 2. The process is killed before it records the
        copy. 3. Nobody can compare the copy, and a copy that was never compared is not overwritten: it and its source
        would stay for good.
        """
        jobs = [job for job in jobs if self._context.stores.class_of(job.row.dst) in CLASSES_TO_RESTORE]
        objects = [(job.row, obj) for job in jobs for obj in job.row.objects]
        heads = self._context.heads((row.dst, obj.key) for row, obj in objects)
        self._context.catalog.record(
            (row.dst, obj.key, CatalogEntry(obj.n_bytes, None, None, row.src_url))
            for row, obj in objects
            if heads.is_absent(row.dst, obj.key)
        )

    def _record(self, jobs: Sequence[MoveJob]) -> None:
        self._context.catalog.record([copy for job in jobs for copy in job.made])
        for job in jobs:
            job.made.clear()

    def _for_each(
        self, work: Callable[[MoveJob, PlannedObject], None], objects: Sequence[tuple[MoveJob, PlannedObject]]
    ) -> None:
        def work_on(pair: tuple[MoveJob, PlannedObject]) -> None:
            job, obj = pair
            if job.is_active:
                try:
                    work(job, obj)
                except CommitConflict:
                    raise  # the lock was lost: all work must stop
                except TierCacheError as error:
                    job.stop(str(error))

        for _ in self._context.pool.map(work_on, objects):
            pass

    # -- one object -------------------------------------------------------------------------------------------------

    def _ensure(self, job: MoveJob, obj: PlannedObject) -> None:
        context, src, dst = self._context, job.row.src, job.row.dst
        info = context.head(dst, obj.key)
        if info is not None and self._is_there(job, obj, info):
            return
        if not job.is_active:
            return
        self._begin_anew(job)
        source = src
        # Only the object that was seen is replaced, where the store gives it an ETag.
        replaces: MayReplace = False if info is None else info.etag or True
        try:
            copied = context.transfer.copy(src, dst, obj, on_bytes=self._on_bytes, replaces=replaces)
        except StoreError as error:
            if not error.details.get("corrupt"):
                raise
            source, copied = self._copied_from_others(job, obj, replaces, error)
        crash_point("tier_move.object")
        crc = copied.crc32c if copied.crc32c is not None else obj.crc32c
        # A copy that was made from a third tier must not be replaced by one from src: a damaged object of src may
        # have a newer date.
        copied = copied._replace(crc32c=crc, made_from=context.file.tier(source).url)
        self._record_copy(job, obj, copied, copied.n_bytes, of_source=source == src)

    def _begin_anew(self, job: MoveJob) -> None:
        """Record that the copy in dst is new, before it exists or is recorded as verified.

        Its grace period starts again. Without the record: 1. A move waits, and its copy is lost. 2. The copy is made
        again and recorded. 3. The process is killed. 4. The next run finds a verified copy, and a wait for the same
        deletion that began long before that copy existed.

        This is one write per move, not one per batch: where ETags are derived from the bytes, the catalog knows the new
        copy as soon as it exists, because it still has the entry of the lost copy.
        """
        with job.lock:
            job.is_new = True
            if job.row.since_s > 0:
                job.row = replace(job.row, since_s=0.0, due_s=0.0)
                self._context.catalog.write([job.row])

    def _copied_from_others(
        self, job: MoveJob, obj: PlannedObject, replaces: MayReplace, failure: StoreError
    ) -> tuple[str, CatalogEntry]:
        """Copy an object that has rotted in src from another tier with an equal object. Return that tier and the copy.

        Raises `failure` if no tier has one. Without this, the group would stay incomplete in dst on every run until
        somebody looked.
        """
        context, dst = self._context, job.row.dst
        for tier in context.file.tiers:
            if any(context.stores.same_url(tier.name, other) for other in (job.row.src, dst)):
                continue
            entry = context.catalog.entries(tier.name, [obj.key]).get(obj.key)
            if entry is None or not entry.is_verified or (entry.n_bytes, entry.crc32c) != (obj.n_bytes, obj.crc32c):
                continue
            equal = obj._replace(etag=entry.etag, modified_s=None)
            with suppress(StoreError):  # the error to report is the one of src
                copied = context.transfer.copy(tier.name, dst, equal, on_bytes=self._on_bytes, replaces=replaces)
                return tier.name, copied
        raise failure

    def _record_copy(
        self, job: MoveJob, obj: PlannedObject, copy: CatalogEntry, n_bytes: int, *, of_source: bool = True
    ) -> None:
        """Record a verified copy in the catalog. If src was the source, record src too: both were read and are equal.

        The copy keeps the date of the object that it copies, also when the source is gone.
        """
        catalog = self._context.catalog
        source = catalog.entries(job.row.src, [obj.key]).get(obj.key)
        came_from = source.made_from if source is not None and source.etag == obj.etag else ""
        first_s = first_written_s(obj, source)
        copy = copy._replace(written_s=earliest(copy.written_s, first_s))
        pair = [(job.row.dst, obj.key, copy)]
        if of_source and obj.etag is not None:
            pair.append((job.row.src, obj.key, CatalogEntry(obj.n_bytes, obj.etag, copy.crc32c, came_from, first_s)))
        if copy.n_bytes >= _AT_ONCE_BYTES:
            catalog.record(pair)
            pair = []
        with job.lock:
            job.n_bytes += n_bytes
            job.made.extend(pair)

    def _is_there(self, job: MoveJob, obj: PlannedObject, info: ObjectInfo) -> bool:
        """Return whether dst has an equal copy.

        Stop the job if dst has a different object that must not be overwritten.
        """
        context, dst = self._context, job.row.dst
        entry = context.catalog.entries(dst, [obj.key]).get(obj.key)
        expected = self._expected_checksum(job, obj)
        is_cold = needs_restore(info)
        if info.n_bytes == obj.n_bytes and expected is not None:
            found = context.checksum_of(dst, info, entry)
            # For an object that cannot be read, the checksum that the store reports is all there is.
            if expected == (info.crc32c if found is None else found):
                same = entry if entry is not None and entry.is_verified and matches_entry(info, entry) else None
                came_from, first_s = ("", None) if same is None else (same.made_from, same.written_s)
                copy = CatalogEntry(info.n_bytes, info.etag, expected, came_from, first_s)
                return self._found(job, obj, copy, is_new=same is None)
        if entry is not None and entry.made_from == job.row.src_url:
            is_size = entry.n_bytes == info.n_bytes == obj.n_bytes
            if entry.is_intended and is_size and is_cold:  # a readable object was compared above
                if _is_by_etag(info, obj):
                    copy = CatalogEntry(info.n_bytes, info.etag, None, job.row.src_url)
                    return self._found(job, obj, copy, is_new=True)
                if self._may_make_again(job, obj, info):
                    return False
            if matches_entry(info, entry) and len(job.row.objects) == 1:
                return False  # a copy of an earlier object of src: it may be replaced
        where = f"{context.stores.store(dst).url}/{obj.key}"
        archived = ", which must be restored before it can be compared" if is_cold else ""
        job.stop(
            f"{where}: expected nothing there, or a copy of the {obj.n_bytes} bytes in {job.row.src}; found another "
            f"object of {info.n_bytes} bytes{archived}: it is not overwritten, remove or rename one of the two"
        )
        return False

    def _found(self, job: MoveJob, obj: PlannedObject, copy: CatalogEntry, *, is_new: bool) -> Literal[True]:
        """Record that dst has a copy already."""
        if is_new:
            self._begin_anew(job)
        self._record_copy(job, obj, copy, 0)
        self._on_bytes(obj.n_bytes)
        return True

    def _may_make_again(self, job: MoveJob, obj: PlannedObject, info: ObjectInfo) -> bool:
        """Return whether src may replace an archived, never verified copy that a killed process has left.

        If the store reports a checksum of the copy, it differs from that of src: one of the two is wrong, and it may be
        src::

            1. The object is copied, and the process is killed. 2. src rots. 3. The copy in dst is the last good one.

        So src must have been written again since, and the group must not look complete in dst, because replacing one
        part may fail.
        """
        if info.crc32c is None:
            return True
        if obj.modified_s is None or info.modified_s is None or obj.modified_s <= info.modified_s + _STORE_SKEW_S:
            return False
        objects = job.row.objects
        return len(objects) == 1 or self._context.head(job.row.dst, objects[-1].key) is None

    def _expected_checksum(self, job: MoveJob, obj: PlannedObject) -> int | None:
        """Return the CRC-32C that a copy must have; None where nothing records it and src cannot be read."""
        if obj.crc32c is not None:
            return obj.crc32c
        context, src = self._context, job.row.src
        info = context.head(src, obj.key)
        if info is None or context.change_reason(src, info, obj):
            return None
        return context.checksum_of(src, info, context.catalog.entries(src, [obj.key]).get(obj.key))


def _is_by_etag(info: ObjectInfo, obj: PlannedObject) -> bool:
    """Return whether the ETag alone shows that a copy equals src, as for server-side copies without a checksum.

    Without this: 1. The object is copied, and the process is killed. 2. src rots, with its old ETag. 3. The copy in dst
    is the last good one. Copying again would overwrite it first, and compare afterwards.
    """
    has_sum = info.crc32c is not None or obj.crc32c is not None
    return not has_sum and info.etag is not None and info.etag == obj.etag and is_md5(info.etag)


def change_classes(
    context: MoveContext,
    moves: Sequence[tuple[T, str, Sequence[PlannedObject]]],
    on_failure: Callable[[T, str], object],
) -> None:
    """Give the objects of moves the storage class of a tier, in parallel, and record them in the catalog.

    moves: Each with the tier and its objects. on_failure: Receives a move and the reason; the others go on.
    """

    def change(work: tuple[T, str, PlannedObject]) -> list[tuple[str, str, CatalogEntry]]:
        move, dst, obj = work
        try:
            info = context.head(dst, obj.key)
            # Left by an earlier attempt that was killed: its change of class may have changed the ETag.
            if info is not None and info.n_bytes == obj.n_bytes and context.has_class(dst, info):
                return []
            entry = context.catalog.entries(dst, [obj.key]).get(obj.key)
            changed = context.transfer.change_class(dst, obj)
            crash_point("tier_move.class_changed")
        except CommitConflict:
            raise
        except TierCacheError as error:
            on_failure(move, str(error))
            return []
        after = entry_after_class_change(obj, entry, changed)
        return [] if after is None else [(dst, obj.key, after)]

    for _, dst, objects in moves:
        context.remember_dates(dst, objects)
    made = context.pool.map(change, [(move, dst, obj) for move, dst, objects in moves for obj in objects])
    context.catalog.record([entry for entries in made for entry in entries])


# Moves that go through the steps together: all moves of a batch share one placement object.
_BATCH_LIMITS = BatchLimits(1024, 4096, 64 << 30)


def apply_plan(
    context: MoveContext, plan: Plan, *, on_progress: Callable[[Progress], object] | None = None
) -> ApplyResult:
    """Make the moves of a plan, exactly as planned. Moves that were made earlier stay as they are.

    A move is stopped where the objects are not as the plan saw them; the other moves go on. Deletions wait for
    run_due_deletions(). on_progress: Receives the progress; called from several threads.

    Raises:
        CommitConflict: The tier lock was lost to another process.
        StoreError: The store of the home tier failed.
        OSError: The catalog of this machine cannot be written.
    """
    return PlanExecutor(context, plan, on_progress).run()


class PlanExecutor:
    """One call of apply_plan(). Use it from one thread."""

    def __init__(self, context: MoveContext, plan: Plan, on_progress: Callable[[Progress], object] | None) -> None:
        self._context, self._plan, self._on_progress = context, plan, on_progress
        self._file, self._catalog, self._now_s = context.file, context.catalog, context.clock()
        self._placements = PlacementUpdates(context)
        self._copies = CopyMaker(context, self._count_bytes)
        self._open: dict[str, list[JournalRow]] = defaultdict(list)
        self._count_lock = Lock()
        self._n_done, self._done_bytes, self._copied_bytes = 0, 0, 0
        self._n_bytes = sum(move.n_bytes for move in plan.moves if move.action in ("copy", "move"))
        self._stopped: list[StoppedMove] = []
        self._held: list[StoppedMove] = []
        self._unavailable: dict[str, str] = {}

    def run(self) -> ApplyResult:
        """Apply the plan and return the result."""
        self._catalog.prune(self._now_s)
        before = self._catalog.of_plan(self._plan.id)
        for old in self._catalog.open_moves(self._file.home_tier.url):
            self._open[old.path].append(old)
        jobs = []
        self._stopped += finish_renames(self._context)
        paths = Counter(move.path for move in self._plan.moves if move.action != "rename")
        receiving = {move.dst for move in self._plan.moves if move.action in ("copy", "move")}
        self._unavailable = {
            tier.name: self._context.ensure_tier_marker(tier.name, gets=tier.name in receiving)
            for tier in self._file.tiers
        }
        for move in self._plan.moves:
            if move.action == "rename":
                self._rename(move, before.get(move.number))
        held = {one.path for one in self._held}  # by a rename whose name a copy has that was made by hand
        for move in self._plan.moves:
            if move.action == "rename" or move.path in held:
                continue
            earlier = before.get(move.number)
            if earlier is not None and earlier.state in ("waiting", "dropping", "done"):
                self._n_done += 1
            elif reason := self._unfit_reason(move) or (
                "expected one move of it in the plan" if paths[move.path] > 1 else ""
            ):
                self._stopped.append(StoppedMove(move.number, reason, move.path, self._plan.id))
            else:
                jobs.append(MoveJob(self._row(move)))
        for batch in in_batches(jobs, _BATCH_LIMITS):
            self._run_batch(batch)
        n_waiting = len(self._catalog.open_moves(self._file.home_tier.url, "waiting", "dropping"))
        return ApplyResult(self._n_done, tuple(self._stopped), n_waiting, self._copied_bytes, held=tuple(self._held))

    def _rename(self, move: Move, earlier: JournalRow | None) -> None:
        """Free a name that was written again. Renames come first, because other moves of the plan need the names."""
        reason, hand_copy = "", None
        if earlier is None or earlier.state != "done":
            reason = self._unfit_reason(move)
            if not reason:
                reason, hand_copy = rename_older_copy(self._context, self._placements, self._row(move))
        if reason:
            self._stopped.append(StoppedMove(move.number, reason, move.path, self._plan.id))
        elif hand_copy is not None:
            path = undated_path(move.path)
            self._held.append(StoppedMove(move.number, held_reason(hand_copy), path, self._plan.id))
        else:
            self._n_done += 1

    def _count_bytes(self, n_bytes: int) -> None:
        with self._count_lock:
            self._done_bytes += n_bytes
        self._report_progress()

    def _report_progress(self) -> None:
        if self._on_progress is not None:
            done_moves = self._n_done + len(self._stopped)
            n_bytes = max(self._n_bytes, self._done_bytes)
            self._on_progress(Progress(done_moves, len(self._plan.moves), self._done_bytes, n_bytes))

    # -- which moves are allowed ------------------------------------------------------------------------------------

    def _unfit_reason(self, move: Move) -> str:
        """Return the reason why the rule file, as it is now, does not allow a move; "" if it does."""
        if not move.objects:
            return "expected the objects of the move, found none in the plan"
        planned = {tier.name: tier for tier in self._plan.tiers}
        now = {tier.name: tier for tier in self._file.tiers}
        for name in planned if move.action == "delete" else [n for n in (move.src, move.dst) if n is not None]:
            was, tier = planned.get(name), now.get(name)
            if was is None or tier is None:
                return f"expected tier {name!r} in plan and rule file, the {'plan' if was is None else 'file'} lacks it"
            facts = (was.url, was.role, was.storage_class), (tier.url, tier.role, tier.storage_class)
            if facts[0] != facts[1]:
                return f"tiers.{name}: expected {facts[0]} as planned, found {facts[1]} in the rule file: plan anew"
        if move.action == "rename":
            return self._unavailable.get(move.src, "")
        if move.action == "delete":
            added = sorted(now.keys() - planned.keys())
            if added:
                return f"expected the tiers of the plan, found {', '.join(added)} too: plan anew"
            return deletion_block_reason(self._unavailable)
        if move.dst is None or move.dst == move.src:
            return f"expected two different tiers, found {move.src} and {move.dst}"
        is_one = self._context.stores.same_url(move.src, move.dst)
        if is_one != (move.action == "reclass"):
            return f"expected {'one location' if not is_one else 'two locations'}, found {move.src} and {move.dst}"
        if any(row.state == "dropping" for row in self._open[move.path]):
            return "deletions of an earlier move of it were interrupted: `tiercache tier run --once` finishes them"
        return self._unavailable.get(move.dst, "")

    def _row(self, move: Move) -> JournalRow:
        objects = tuple(obj._replace(tier=move.src) for obj in move.objects)
        return JournalRow(
            plan=self._plan.id,
            number=move.number,
            path=move.path,
            kind=move.kind,
            action=move.action,
            src=move.src,
            dst=move.dst or "",
            src_url=self._file.tier(move.src).url,
            dst_url="" if move.dst is None else self._file.tier(move.dst).url,
            home=self._file.home_tier.url,
            rules=self._file.sha256,
            rule=move.rule,
            state="begun",
            since_s=0.0,
            due_s=0.0,
            objects=objects,
            note="",
            changed_s=self._now_s,
        )

    # -- a batch, step by step --------------------------------------------------------------------------------------

    def _run_batch(self, jobs: Sequence[MoveJob]) -> None:
        self._context.lock.check()
        self._check_sources(jobs)
        self._check_pins(jobs)
        self._hold_hand_copies([job for job in jobs if job.is_active])
        self._begin([job for job in jobs if job.is_active])
        crash_point("tier_move.begun")
        self._make([job for job in jobs if job.is_active])
        self._check_sources([job for job in jobs if job.is_active and job.row.action in ("move", "drop")])
        crash_point("tier_move.looked")
        self._commit_placements([job for job in jobs if job.is_active])
        crash_point("tier_move.placed")
        self._end(jobs)
        crash_point("tier_move.ended")

    def _check_sources(self, jobs: Sequence[MoveJob]) -> None:
        """Compare the objects in src with the plan. For a delete: compare all tiers, and update the row."""
        names = [tier.name for tier in self._file.tiers]
        heads = self._context.heads(
            (tier, obj.key)
            for job in jobs
            for tier in (names if job.row.action == "delete" else [job.row.src])
            for obj in job.row.objects
        )
        for job in jobs:
            compare = self._compare_all_tiers if job.row.action == "delete" else self._compare_source
            try:
                compare(job, heads)
            except TierCacheError as error:
                job.stop(str(error))

    def _compare_source(self, job: MoveJob, heads: Heads) -> None:
        context, row = self._context, job.row
        found = heads.infos(row.src, row)
        if row.action in ("move", "drop") and not any(found.values()) and self._was_made(row):
            job.is_finished = True
            return
        for obj in row.objects:
            info = found[obj.key]
            if info is None:
                job.stop(f"{row.src_url}/{obj.key}: expected {obj.n_bytes} bytes, found nothing")
                return
            # An earlier attempt may have changed the class already, and the ETag with it.
            is_made = row.action == "reclass" and context.has_class(row.dst, info) and info.n_bytes == obj.n_bytes
            if not is_made and (reason := context.change_reason(row.src, info, obj)):
                job.stop(reason)
                return
        job.stop_if(context.extra_object_reason(row.src, row.path, found))

    def _was_made(self, row: JournalRow) -> bool:
        """Return whether a move whose source is gone was made before: as far as can be told, dst is complete."""
        entries = self._catalog.entries(row.dst, [obj.key for obj in row.objects])
        for obj in row.objects:
            info = self._context.head(row.dst, obj.key)
            if info is None or info.n_bytes != obj.n_bytes:
                return False
            found = self._context.checksum_of(row.dst, info, entries.get(obj.key)) if obj.crc32c is not None else None
            if found is not None and found != obj.crc32c:
                return False
        return True

    def _compare_all_tiers(self, job: MoveJob, heads: Heads) -> None:
        row, stores = job.row, self._context.stores
        objects: list[PlannedObject] = []
        for tier in self._file.tiers:
            found = heads.infos(tier.name, row)
            for obj in row.objects:
                info = found[obj.key]
                if info is None or stores.tier_of(stores.sharing(tier.name), info) != tier.name:
                    continue
                if tier.name == row.src:
                    job.stop_if(self._context.change_reason(tier.name, info, obj))
                elif info.n_bytes != obj.n_bytes:
                    at = f"{tier.url}/{obj.key}"
                    job.stop(f"{at}: expected a copy of {obj.n_bytes} bytes, found {info.n_bytes}")
                objects.append(obj._replace(etag=info.etag, modified_s=info.modified_s, tier=tier.name))
            job.stop_if(self._context.extra_object_reason(tier.name, row.path, found))
        if not objects:
            job.is_finished = True
        elif not any(obj.tier == row.src for obj in objects):
            job.stop(f"{row.src_url}/{row.path}: expected the copy that was planned, found none")
        job.row = replace(row, objects=tuple(objects) or row.objects)

    def _check_pins(self, jobs: Sequence[MoveJob]) -> None:
        jobs = [job for job in jobs if job.row.action != "copy"]
        try:
            pinned = self._context.pin_reasons([job.row for job in jobs], self._now_s)
        except TierCacheError as error:
            pinned = {(job.row.plan, job.row.number): str(error) for job in jobs}
        for job in jobs:
            job.stop_if(pinned.get((job.row.plan, job.row.number), ""))

    def _hold_hand_copies(self, jobs: Sequence[MoveJob]) -> None:
        """Hold the groups of which a move would take away a copy that somebody made by hand; their moves end here."""
        for job in jobs if self._file.tiering.hold_s > 0 else ():
            try:
                job.hand_copy = find_hand_copy(self._context, job.row)
            except TierCacheError as error:
                job.stop(str(error))
        hold_hand_copies(self._context, {job.row.path: job.hand_copy for job in jobs if job.hand_copy is not None})
        crash_point("tier_move.held")

    def _begin(self, jobs: Sequence[MoveJob]) -> None:
        """Write the jobs into the journal. Earlier moves of the same paths are cancelled in the same transaction.

        A wait for the very same deletion continues where it was. Otherwise, with one plan a day, the wait would never
        end.
        """
        rows: list[JournalRow] = []
        gone: list[tuple[str, int]] = []
        for job in jobs:
            gone += self._take_stopped(job)
            for old in self._open.pop(job.row.path, ()):
                if _is_same_deletion(old, job.row):
                    job.row = replace(job.row, since_s=old.since_s, due_s=old.due_s, note=old.note)
                note = f"plan {job.row.plan} moves it"
                rows.append(replace(old, state="cancelled", note=note, changed_s=self._now_s))
            rows.append(job.row)
        self._catalog.write(rows, instead_of=gone)

    def _take_stopped(self, job: MoveJob) -> list[tuple[str, int]]:
        """Return the earlier, stopped moves of the job's path, whose rows the job's row replaces.

        Otherwise a move that is stopped every day would leave one row a day.
        """
        begun = [old for old in self._open[job.row.path] if old.state == "begun"]
        self._open[job.row.path] = [old for old in self._open[job.row.path] if old.state != "begun"]
        others = [old for old in begun if (old.plan, old.number) != (job.row.plan, job.row.number)]
        for old in others:
            if _is_same_deletion(old, job.row):
                job.row = replace(job.row, since_s=old.since_s, due_s=old.due_s)
        return [(old.plan, old.number) for old in others]

    def _make(self, jobs: Sequence[MoveJob]) -> None:
        """Make the copies, and the class changes that leave objects readable."""
        self._copies.copy([job for job in jobs if job.row.action in ("copy", "move")])
        reclassed = [j for j in jobs if j.row.action == "reclass" and not self._context.ends_readability(j.row)]
        self._check_pins(reclassed)  # again, because the copies may have taken hours
        crash_point("tier_move.decided")
        active = [job for job in reclassed if job.is_active]
        change_classes(self._context, [(job, job.row.dst, job.row.objects) for job in active], MoveJob.stop)
        crash_point("tier_move.reclassed")

    def _commit_placements(self, jobs: Sequence[MoveJob]) -> None:
        """Confirm the copies in dst, and commit the placement."""
        jobs = [job for job in jobs if job.row.action != "delete"]
        heads = self._context.heads(
            (tier, obj.key)
            for job in jobs
            for tier in self._placements.deciding_tiers(job.row)
            for obj in job.row.objects
        )
        changes: list[tuple[MoveJob, str, RowChanges]] = []
        for job in jobs:
            row = job.row
            try:
                copies = heads.infos(row.dst, row)
                if row.action != "reclass" and (reason := self._context.unconfirmed_move_reason(row, copies)):
                    job.stop(reason)
                elif row.action != "copy" or self._placements.is_home(row.dst):
                    # After a copy to another tier than home, readers keep reading the source.
                    at_home = self._placements.copies_at_home(row, heads)
                    changes.append((job, *self._placements.changes(row, copies, at_home)))
            except TierCacheError as error:
                job.stop(str(error))
        self._context.lock.check()
        for job, reason in self._placements.commit(changes):
            job.stop(reason)

    def _end(self, jobs: Sequence[MoveJob]) -> None:
        """Journal the moves that wait, the moves that are done, and the moves that stopped, with reasons.

        The grace period begins now, when the placement is committed, not when apply() began: the copies may have taken
        days.
        """
        grace_s, now_s, rows = self._file.tiering.grace_s, self._context.clock(), []
        gone: list[tuple[str, int]] = []
        for job in jobs:
            if job.is_finished and not job.stop_reason:
                rows.append(replace(job.row, state="done"))
                # The source was deleted by somebody, so the copy in dst may be the last one.
                self._catalog.source_deleted([(job.row.dst, obj.key) for obj in job.row.objects if job.row.dst])
            elif job.stop_reason or job.hand_copy:
                gone += self._take_stopped(job)
                rows.append(replace(job.row, note=job.stop_reason or held_reason(job.hand_copy)))
            elif job.row.action == "copy" or (
                job.row.action == "reclass" and not self._context.ends_readability(job.row)
            ):
                rows.append(replace(job.row, state="done"))
            else:
                # A new copy did not exist yet when an earlier wait for the same deletion began.
                goes_on = 0 < job.row.since_s <= now_s and not job.is_new
                since_s = job.row.since_s if goes_on else now_s
                rows.append(replace(job.row, state="waiting", since_s=since_s, due_s=since_s + grace_s))
        self._catalog.write([replace(row, changed_s=now_s) for row in rows], instead_of=gone)
        for job in jobs:
            self._copied_bytes += job.n_bytes
            if job.stop_reason:
                self._stopped.append(StoppedMove(job.row.number, job.stop_reason, job.row.path, job.row.plan))
            elif job.hand_copy:
                self._held.append(StoppedMove(job.row.number, held_reason(job.hand_copy), job.row.path, job.row.plan))
            else:
                self._n_done += 1
        self._report_progress()


def _is_same_deletion(old: JournalRow, new: JournalRow) -> bool:
    """Return whether two moves wait for the same deletion (or end of readability) of the same objects."""
    drops = ("move", "drop")
    same_action = old.action == new.action or (old.action in drops and new.action in drops)
    same_urls = (old.src_url, old.dst_url, old.src, old.dst) == (new.src_url, new.dst_url, new.src, new.dst)
    facts = [sorted((obj.tier, obj.key, obj.n_bytes, obj.etag or "") for obj in row.objects) for row in (old, new)]
    return old.since_s > 0 and new.action != "copy" and same_action and same_urls and facts[0] == facts[1]
