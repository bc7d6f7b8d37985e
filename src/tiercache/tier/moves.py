"""Takes the moves of a plan through their steps, until they are done or wait; the package's docstring lists these.

Groups are copied one after another, each complete and recorded, or withdrawn. Before the first byte, the journal has
the intent: source, destination, every object with its size and date, and which of them dst lacked
(PlannedObject.was_absent). So a copy that the mover made is recognised after any interruption, and no part of one is
taken for something that a user wrote.

An object in dst that differs from src is a conflict, and is never overwritten, whoever wrote it::

    1. hot has v1 of a key, and home has v2. 2. v1 is copied to the archive, and dropped from hot.
    3. v2 is copied to the archive, and overwrites the last copy of v1.

Only a damaged copy is replaced (see MoveContext.disbelieve), and an archived one that an interrupted move has left in a
store which names no checksum of it.

The last object of a group is its completing object. It is copied when all the others are there, so that an incomplete
copy never looks complete.
"""

from __future__ import annotations

import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import suppress
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import Literal, TypeAlias, TypeVar

from tiercache.crash_points import crash_point
from tiercache.errors import CommitConflict, StoreError, TierCacheError
from tiercache.model import ObjectInfo, format_bytes
from tiercache.store import LocalFolder
from tiercache.tier.context import (
    ApplyResult,
    BatchLimits,
    Heads,
    Infos,
    MoveContext,
    PlacementUpdates,
    RowChanges,
    StoppedMove,
    earliest,
    entry_after_class_change,
    first_written_s,
    in_batches,
    matches_entry,
)
from tiercache.tier.journal import CatalogEntry, JournalRow, PlannedObject
from tiercache.tier.plans import Move, Plan
from tiercache.tier.stores import deletion_block_reason, needs_restore
from tiercache.tier.transfer import MayReplace, is_md5
from tiercache.waiting import SYSTEM_CLOCK

# Receives the bytes that were copied, and all bytes to copy; called from several threads.
ByteProgress: TypeAlias = Callable[[int, int], object]

# A copy of this size is recorded in the catalog at once, so that a killed process does not have to make it again. What
# is smaller is recorded when its group is complete, at most this often.
_AT_ONCE_BYTES = 8 << 20
_RECORD_S = 1.0


@dataclass(slots=True)
class MoveJob:
    """A move in progress. The lock guards the fields that pool threads change."""

    row: JournalRow
    stop_reason: str = ""  # why the move was stopped; "" while it was not
    may_continue: bool = False  # whether the reason may pass, so that the parts stay for the next run: the network
    is_finished: bool = False  # whether nothing is left to do
    made: list[tuple[str, str, CatalogEntry]] = field(default_factory=list)  # verified, not in the catalog yet
    n_bytes: int = 0  # bytes that were copied
    absent: frozenset[str] = frozenset()  # keys of the objects that dst lacked when the move began
    restarts_grace: bool = False  # whether the grace period starts again: the catalog did not have a copy in dst
    is_withdrawn: bool = False  # whether the parts that the move had copied were removed
    n_left: int = 0  # number of objects that are not copied yet, without the completing object
    lock: Lock = field(default_factory=Lock)

    def stop(self, reason: str, *, may_continue: bool = False) -> None:
        """Stop the move. Only the first reason is kept."""
        with self.lock:
            if not self.stop_reason:
                self.stop_reason, self.may_continue = reason, may_continue

    def stop_if(self, reason: str) -> None:
        if reason:
            self.stop(reason)

    @property
    def copies(self) -> bool:
        return self.row.action in ("copy", "move")

    @property
    def is_active(self) -> bool:
        return not (self.stop_reason or self.is_finished)


class CopyMaker:
    """Makes the copies of jobs. Use it from one thread at a time."""

    def __init__(self, context: MoveContext, on_bytes: Callable[[int], object]) -> None:
        self._context, self._on_bytes = context, on_bytes
        self._lock = Lock()  # guards what is not recorded or not ended yet
        self._withdrawing = Lock()  # the lock of the tiers announces one withdrawal at a time
        self._unended_bytes: Counter[str] = Counter()  # of the groups that were begun, by name of their tier
        self._unrecorded: list[tuple[str, str, CatalogEntry]] = []
        self._recorded_s = 0.0

    # -- the intent -------------------------------------------------------------------------------------------------

    def note_absent_objects(self, jobs: Sequence[MoveJob]) -> None:
        heads = self._context.heads((job.row.dst, obj.key) for job in jobs for obj in job.row.objects)
        for job in jobs:
            row = job.row
            absent = frozenset(obj.key for obj in row.objects if heads.is_absent(row.dst, obj.key))
            # What an earlier, interrupted attempt of this copy has made is the move's own, too.
            objects = (obj._replace(was_absent=obj.was_absent or obj.key in absent) for obj in row.objects)
            job.row, job.absent = replace(row, objects=tuple(objects)), absent

    # -- groups -----------------------------------------------------------------------------------------------------

    def copy(self, jobs: Sequence[MoveJob]) -> None:
        """Make each job's group complete and verified in dst, and record it in the catalog.

        The groups are copied in their order; further threads begin the next ones. A failure stops its job only, and
        the parts that the job has copied are removed. A group that has no room in dst is not begun.
        """
        crash_point("tier_move.intended")
        tasks: list[Future[None]] = []
        try:
            for job in jobs:
                if self._no_room_reason(job):
                    _wait_for(tasks)  # what unended groups have written already is counted twice: look again
                    job.stop_if(self._no_room_reason(job))
                if job.is_active:
                    self._unended_bytes[job.row.dst] += _absent_bytes(job)
                    members = job.row.objects[:-1]
                    job.n_left = len(members)
                    submit = self._context.pool.submit
                    tasks += [submit(self._copy_member, job, obj) for obj in members] or [submit(self._finish, job)]
            _wait_for(tasks)
        finally:
            for task in tasks:
                task.cancel()
        self._record()
        crash_point("tier_move.recorded")

    def _copy_member(self, job: MoveJob, obj: PlannedObject) -> None:
        """Copy an object, and after the last one the completing object."""
        if job.is_active:
            self._copy_object(job, obj)
        with job.lock:
            job.n_left -= 1
            is_last = job.n_left == 0
        if is_last:
            self._finish(job)

    def _no_room_reason(self, job: MoveJob) -> str:
        row, store = job.row, self._context.stores.store(job.row.dst)
        if not isinstance(store, LocalFolder):
            return ""
        try:
            free_bytes = shutil.disk_usage(store.root).free
        except OSError:  # there is no such folder yet
            return ""
        with self._lock:
            free_bytes -= self._unended_bytes[row.dst]
        n_bytes = _absent_bytes(job)
        if n_bytes <= free_bytes:
            return ""
        need, free = format_bytes(n_bytes), format_bytes(max(free_bytes, 0))
        return f"{store.url}: expected room for {row.path}, {need}, found {free} free: nothing of it was copied"

    def _finish(self, job: MoveJob) -> None:
        if job.is_active:
            self._copy_object(job, job.row.objects[-1])
        if job.is_active:
            crash_point("tier_move.copied")
            with self._lock:
                self._unrecorded += job.made
                job.made.clear()
                is_due = SYSTEM_CLOCK.monotonic() - self._recorded_s >= _RECORD_S
            if is_due:
                self._record()
        elif not job.may_continue:
            with self._withdrawing:
                # If a part cannot be removed now, the end of the move tries again.
                job.is_withdrawn = not withdraw_copy(self._context, job.row)
        with self._lock:
            self._unended_bytes[job.row.dst] -= _absent_bytes(job)

    def _record(self) -> None:
        with self._lock:
            made, self._unrecorded = self._unrecorded, []
            self._recorded_s = SYSTEM_CLOCK.monotonic()
        self._context.catalog.record(made)

    def _copy_object(self, job: MoveJob, obj: PlannedObject) -> None:
        if obj is job.row.objects[-1]:
            crash_point("tier_move.parts_copied")
        try:
            self._ensure(job, obj)
        except CommitConflict:
            raise  # the lock was lost: all work must stop
        except TierCacheError as error:
            if error.details.get("cancelled"):
                raise
            job.stop(str(error), may_continue=isinstance(error, StoreError) and error.retryable)

    # -- one object -------------------------------------------------------------------------------------------------

    def _ensure(self, job: MoveJob, obj: PlannedObject) -> None:
        context, src, dst = self._context, job.row.src, job.row.dst
        info = None if obj.key in job.absent else context.head(dst, obj.key)
        if info is not None and self._is_there(job, obj, info):
            return
        if not job.is_active:
            return
        self._begin_anew(job)
        # Only the object that was seen is replaced, where the store gives it an ETag.
        replaces: MayReplace = False if info is None else info.etag or True
        written_s = first_written_s(obj, context.catalog.entries(src, [obj.key]).get(obj.key))
        copied = context.transfer.copy(src, dst, obj, on_bytes=self._on_bytes, replaces=replaces, written_s=written_s)
        crash_point("tier_move.object")
        crc = copied.crc32c if copied.crc32c is not None else obj.crc32c
        self._record_copy(job, obj, copied._replace(crc32c=crc), copied.n_bytes)

    def _begin_anew(self, job: MoveJob) -> None:
        """Record that the copy in dst is new, before it exists or is recorded as verified.

        Its grace period starts again. Without the record: 1. A move waits, and its copy is lost. 2. The copy is made
        again and recorded. 3. The process is killed. 4. The next run finds a verified copy, and a wait for the same
        deletion that began long before that copy existed.

        This is one write per move, not one per batch: where ETags are derived from the bytes, the catalog knows the new
        copy as soon as it exists, because it still has the entry of the lost copy.
        """
        with job.lock:
            job.restarts_grace = True
            if job.row.since_s > 0:
                job.row = replace(job.row, since_s=0.0, due_s=0.0)
                self._context.catalog.write([job.row])

    def _record_copy(self, job: MoveJob, obj: PlannedObject, copy: CatalogEntry, n_bytes: int) -> None:
        """Record a verified copy in the catalog, and its source: both were read and are equal.

        The copy keeps the date of the object that it copies, also when the source is gone.
        """
        catalog = self._context.catalog
        source = catalog.entries(job.row.src, [obj.key]).get(obj.key)
        first_s = first_written_s(obj, source)
        copy = copy._replace(written_s=earliest(copy.written_s, first_s))
        pair = [(job.row.dst, obj.key, copy)]
        if obj.etag is not None:
            pair.append((job.row.src, obj.key, CatalogEntry(obj.n_bytes, obj.etag, copy.crc32c, first_s)))
        if copy.n_bytes >= _AT_ONCE_BYTES:
            catalog.record(pair)
            pair = []
        with job.lock:
            job.n_bytes += n_bytes
            job.made.extend(pair)

    def _is_there(self, job: MoveJob, obj: PlannedObject, info: ObjectInfo) -> bool:
        """Return whether dst has an equal copy. Stop the job if dst has another object, not to be overwritten."""
        context, dst = self._context, job.row.dst
        entry = context.catalog.entries(dst, [obj.key]).get(obj.key)
        expected = self._expected_checksum(job, obj)
        is_cold = needs_restore(info)
        if info.n_bytes == obj.n_bytes and expected is not None:
            found = context.checksum_of(dst, info, entry)
            # For an object that cannot be read, the checksum that the store reports is all there is.
            if expected == (info.crc32c if found is None else found):
                same = entry if entry is not None and entry.verified and matches_entry(info, entry) else None
                copy = CatalogEntry(info.n_bytes, info.etag, expected, None if same is None else same.written_s)
                return self._found(job, obj, copy, is_recorded=same is not None)
        if obj.was_absent and entry is None and is_cold and info.n_bytes == obj.n_bytes:
            # A killed process has copied it. A readable object was compared above.
            if _is_by_etag(info, obj):
                copy = CatalogEntry(info.n_bytes, info.etag, None)
                return self._found(job, obj, copy, is_recorded=False)
            if info.crc32c is None:
                return False  # nothing tells whether it is complete
        if entry is not None and _is_damaged_copy(info, entry, expected):
            return False
        where = f"{context.stores.store(dst).url}/{obj.key}"
        archived = ", which must be restored before it can be compared" if is_cold else ""
        job.stop(
            f"conflict: {where}: expected nothing there, or a copy of the {obj.n_bytes} bytes in {job.row.src}; found "
            f"another object of {info.n_bytes} bytes{archived}: it is not overwritten; remove or rename one of the two"
        )
        return False

    def _found(self, job: MoveJob, obj: PlannedObject, copy: CatalogEntry, *, is_recorded: bool) -> Literal[True]:
        if not is_recorded:
            self._begin_anew(job)
        self._record_copy(job, obj, copy, 0)
        self._on_bytes(obj.n_bytes)
        return True

    def _expected_checksum(self, job: MoveJob, obj: PlannedObject) -> int | None:
        if obj.crc32c is not None:
            return obj.crc32c
        context, src = self._context, job.row.src
        info = context.head(src, obj.key)
        if info is None or context.change_reason(src, info, obj):
            return None
        return _source_checksum(context, src, obj, info)


def _source_checksum(context: MoveContext, src: str, obj: PlannedObject, info: ObjectInfo) -> int | None:
    """Return the CRC-32C of an unchanged object in src, which is read if nothing records it; None if it is archived."""
    if obj.crc32c is not None:
        return obj.crc32c
    return context.checksum_of(src, info, context.catalog.entries(src, [obj.key]).get(obj.key))


def _is_damaged_copy(info: ObjectInfo, entry: CatalogEntry, expected: int | None) -> bool:
    return not entry.verified and expected is not None and entry.crc32c == expected and matches_entry(info, entry)


def _is_by_etag(info: ObjectInfo, obj: PlannedObject) -> bool:
    """Return whether the ETag alone shows that a copy equals src, as for server-side copies without a checksum.

    Without this: 1. The object is copied, and the process is killed. 2. src rots, with its old ETag. 3. The copy in dst
    is the last good one. Copying again would overwrite it first, and compare afterwards.
    """
    has_sum = info.crc32c is not None or obj.crc32c is not None
    return not has_sum and info.etag is not None and info.etag == obj.etag and is_md5(info.etag)


def _absent_bytes(job: MoveJob) -> int:
    return sum(obj.n_bytes for obj in job.row.objects if obj.key in job.absent)


def _wait_for(tasks: Sequence[Future[None]]) -> None:
    for task in wait(tasks, return_when=FIRST_EXCEPTION).done:
        task.result()


# -- withdrawal -------------------------------------------------------------------------------------------------------


def withdraw_copy(context: MoveContext, row: JournalRow) -> str:
    """Remove the parts of a copy that a move has not made. Return why parts of the copy remain; "" if none does.

    Only objects that dst lacked before are removed, and only if they equal objects of src, where no object of the group
    has changed or is gone. So nothing is removed that src does not have. A complete copy is no part: it stays, and
    rules apply to it. If src was written again, the parts stay, and the next plan reports a conflict.
    """
    pairs = [(tier, obj.key) for obj in row.objects for tier in (row.src, row.dst)]
    try:
        heads = _heads(context, pairs) if any(obj.was_absent for obj in row.objects) else Heads({})
        parts = [obj for obj in row.objects if obj.was_absent and heads.info(row.dst, obj.key) is not None]
        if not parts:
            return ""
        if is_complete(context, row, heads.infos(row.dst, row)):
            _record_complete(context, row, heads)
            return ""
        missing = [obj.key for obj in row.objects if heads.info(row.src, obj.key) is None]
        if missing:
            return (
                f"{row.src_url}/{missing[0]}: expected the source of an interrupted copy, found nothing: what was "
                f"copied of it, {len(parts)} of {len(row.objects)} objects in {row.dst_url}/{row.path}, stays; delete "
                f"it if it is not wanted"
            )
        if not _is_unchanged(context, row, heads):
            return ""
        ours = [(obj, info) for obj in parts if (info := _own_part(context, row, obj, heads)) is not None]
        crash_point("tier_move.withdrawing")
        now = _heads(context, pairs)  # reading the objects may have taken hours
        if any(now.info(*pair) != heads.info(*pair) for pair in pairs):
            return f"{row.path}: {row.src_url} or {row.dst_url} changed while an interrupted copy was compared"
        context.lock.announce([(row.dst_url, row.path)])
        context.transfer.delete_objects(row.dst, [obj._replace(etag=info.etag) for obj, info in ours])
        crash_point("tier_move.withdrawn")
        remove_empty_folders(context, row, row.dst)
        context.catalog.forget((row.dst, obj.key) for obj, _ in ours)
    except CommitConflict:
        raise
    except TierCacheError as error:
        return str(error)
    return ""


def _heads(context: MoveContext, pairs: Sequence[tuple[str, str]]) -> Heads:
    """Return the metadata of objects, asked for in this thread: the threads of the pool copy, or wait for this one."""
    return Heads({pair: context.head(*pair) for pair in pairs})


def is_complete(context: MoveContext, row: JournalRow, copies: Infos) -> bool:
    """Return whether dst has every object of a move, with the planned size and, where it is known, checksum.

    copies: Metadata of the move's objects in dst.
    """
    entries = context.catalog.entries(row.dst, [obj.key for obj in row.objects])
    for obj in row.objects:
        info = copies[obj.key]
        if info is None or info.n_bytes != obj.n_bytes:
            return False
        found = None if obj.crc32c is None else context.checksum_of(row.dst, info, entries.get(obj.key))
        if found is not None and found != obj.crc32c:
            return False
    return True


def _is_unchanged(context: MoveContext, row: JournalRow, heads: Heads) -> bool:
    infos = ((obj, heads.info(row.src, obj.key)) for obj in row.objects)
    return not any(info is not None and context.change_reason(row.src, info, obj) for obj, info in infos)


def _own_part(context: MoveContext, row: JournalRow, obj: PlannedObject, heads: Heads) -> ObjectInfo | None:
    info, source = heads.info(row.dst, obj.key), heads.info(row.src, obj.key)
    if info is None or source is None:
        return None
    expected = _source_checksum(context, row.src, obj, source)
    return info if _is_equal_copy(context, row.dst, obj, info, expected) else None


def _is_equal_copy(context: MoveContext, dst: str, obj: PlannedObject, info: ObjectInfo, expected: int | None) -> bool:
    if info.n_bytes != obj.n_bytes:
        return False
    if needs_restore(info):
        # The store may name no checksum of it: the journal decides.
        return info.crc32c is None or info.crc32c == expected
    return expected == context.checksum_of(dst, info, context.catalog.entries(dst, [obj.key]).get(obj.key))


def _record_complete(context: MoveContext, row: JournalRow, heads: Heads) -> None:
    made: list[tuple[str, str, CatalogEntry]] = []
    for obj in row.objects:
        info, source = heads.info(row.dst, obj.key), heads.info(row.src, obj.key)
        if info is None or source is None or context.change_reason(row.src, source, obj):
            return
        crc = _source_checksum(context, row.src, obj, source)
        if crc is None or not _is_equal_copy(context, row.dst, obj, info, crc):
            return
        first_s = first_written_s(obj, context.catalog.entries(row.src, [obj.key]).get(obj.key))
        made.append((row.dst, obj.key, CatalogEntry(info.n_bytes, info.etag, crc, first_s)))
        made.append((row.src, obj.key, CatalogEntry(source.n_bytes, source.etag, crc, first_s)))
    context.catalog.record(made)


def remove_empty_folders(context: MoveContext, row: JournalRow, tier: str) -> None:
    """Remove the folders that deletions of a group have emptied: frameworks would try to resume from an empty one."""
    store = context.stores.store(tier)
    if isinstance(store, LocalFolder):
        with suppress(StoreError):  # the objects are gone; an empty folder is only cosmetic
            if row.kind == "checkpoint" and all(obj.key != row.path for obj in row.objects):
                store.remove_empty(row.path)
            store.remove_empty_above(row.path)


T = TypeVar("T")


def change_classes(
    context: MoveContext,
    moves: Sequence[tuple[T, str, Sequence[PlannedObject]]],
    on_failure: Callable[[T, str], object],
) -> None:
    """Give the objects of moves the storage class of a tier, in parallel. on_failure: The other moves go on."""

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


# Moves that go through the steps together: all moves of a batch share one placement object, and readers follow when the
# batch is copied.
_BATCH_LIMITS = BatchLimits(1024, 4096, 4 << 30)


def apply_plan(context: MoveContext, plan: Plan, *, on_progress: ByteProgress | None = None) -> ApplyResult:
    """Make the moves of a plan, exactly as planned. Moves that were made earlier stay as they are.

    A move is stopped where the objects are not as the plan saw them; the other moves go on. Deletions wait for
    run_due_deletions(). on_progress: See ByteProgress.

    Raises CommitConflict if the tier lock was lost, StoreError if the store of the home tier failed, and OSError if the
    catalog of this machine cannot be written.
    """
    catalog, home = context.catalog, context.file.home_tier.url
    catalog.prune(context.clock())
    before = catalog.of_plan(plan.id)
    checks = _PlanChecks(context, plan)
    n_earlier, jobs, stopped = 0, [], []
    for move in plan.moves:
        earlier = before.get(move.number)
        if earlier is not None and earlier.state in ("waiting", "dropping", "done"):
            n_earlier += 1
        elif reason := checks.unfit_reason(move):
            stopped.append(StoppedMove(move.number, reason, move.path, plan.id))
        else:
            jobs.append(MoveJob(_row(context, plan, move)))
    made = MoveExecutor(context, on_progress).run(jobs)
    n_waiting = len(catalog.open_moves(home, "waiting", "dropping"))
    return replace(made, n_made=n_earlier + made.n_made, stopped=(*stopped, *made.stopped), waiting_drops=n_waiting)


def _row(context: MoveContext, plan: Plan, move: Move) -> JournalRow:
    file = context.file
    return JournalRow(
        plan=plan.id,
        number=move.number,
        path=move.path,
        kind=move.kind,
        action=move.action,
        src=move.src,
        dst=move.dst or "",
        src_url=file.tier(move.src).url,
        dst_url="" if move.dst is None else file.tier(move.dst).url,
        home=file.home_tier.url,
        rules=file.sha256,
        rule=move.rule,
        state="begun",
        objects=tuple(obj._replace(tier=move.src) for obj in move.objects),
        changed_s=context.clock(),
    )


def _with_absent_of(row: JournalRow, old: JournalRow) -> tuple[PlannedObject, ...]:
    absent = {obj.key for obj in old.objects if obj.was_absent}
    return tuple(obj._replace(was_absent=obj.was_absent or obj.key in absent) for obj in row.objects)


class _PlanChecks:
    def __init__(self, context: MoveContext, plan: Plan) -> None:
        self._context, self._plan = context, plan
        self._open = defaultdict(list)
        for row in context.catalog.open_moves(context.file.home_tier.url):
            self._open[row.path].append(row)
        receiving = {move.dst for move in plan.moves if move.action in ("copy", "move")}
        self._unavailable = {
            tier.name: context.ensure_tier_marker(tier.name, gets=tier.name in receiving) for tier in context.file.tiers
        }

    def unfit_reason(self, move: Move) -> str:
        planned = {tier.name: tier for tier in self._plan.tiers}
        now = {tier.name: tier for tier in self._context.file.tiers}
        for name in planned if move.action == "delete" else [n for n in (move.src, move.dst) if n is not None]:
            was, tier = planned.get(name), now.get(name)
            if was is None or tier is None:
                return f"expected tier {name!r} in plan and rule file, the {'plan' if was is None else 'file'} lacks it"
            facts = (was.url, was.storage_class), (tier.url, tier.storage_class)
            if facts[0] != facts[1]:
                return f"tiers.{name}: expected {facts[0]} as planned, found {facts[1]} in the rule file: plan anew"
        if move.action == "delete":
            added = sorted(now.keys() - planned.keys())
            if added:
                return f"expected the tiers of the plan, found {', '.join(added)} too: plan anew"
            return deletion_block_reason(self._unavailable)
        dst = move.dst or ""  # only deletes have none
        is_one = self._context.stores.same_url(move.src, dst)
        if is_one != (move.action == "reclass"):
            return f"expected {'one location' if not is_one else 'two locations'}, found {move.src} and {dst}"
        if any(row.state == "dropping" for row in self._open[move.path]):
            return "deletions of an earlier move of it were interrupted: `tiercache tier run --once` finishes them"
        return self._unavailable.get(dst, "")


class MoveExecutor:
    """Takes moves through the steps, batch by batch. Use it from one thread."""

    def __init__(self, context: MoveContext, on_progress: ByteProgress | None) -> None:
        self._context, self._on_progress = context, on_progress
        self._file, self._catalog, self._now_s = context.file, context.catalog, context.clock()
        self._placements = PlacementUpdates(context)
        self._copies = CopyMaker(context, self._count_bytes)
        self._open: dict[str, list[JournalRow]] = defaultdict(list)
        self._count_lock = Lock()
        self._n_done = self._n_bytes = self._done_bytes = self._copied_bytes = 0
        self._stopped: list[StoppedMove] = []

    def run(self, jobs: Sequence[MoveJob]) -> ApplyResult:
        self._n_bytes = sum(obj.n_bytes for job in jobs if job.copies for obj in job.row.objects)
        for old in self._catalog.open_moves(self._file.home_tier.url):
            self._open[old.path].append(old)
        for batch in in_batches(jobs, _BATCH_LIMITS):
            self._run_batch(batch)
        return ApplyResult(self._n_done, tuple(self._stopped), n_bytes=self._copied_bytes)

    def _count_bytes(self, n_bytes: int) -> None:
        with self._count_lock:
            self._done_bytes += n_bytes
        if self._on_progress is not None:
            self._on_progress(self._done_bytes, max(self._n_bytes, self._done_bytes))

    # -- a batch, step by step --------------------------------------------------------------------------------------

    def _run_batch(self, jobs: Sequence[MoveJob]) -> None:
        self._context.lock.check()
        self._check_sources(jobs)
        self._check_pins(jobs)
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
        if row.action in ("move", "drop") and not any(found.values()):
            copies = context.heads((row.dst, obj.key) for obj in row.objects).infos(row.dst, row)
            if is_complete(context, row, copies):
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

    def _begin(self, jobs: Sequence[MoveJob]) -> None:
        """Write the jobs into the journal, before the first byte. Earlier moves of the same paths are cancelled.

        A wait for the very same deletion continues where it was. Otherwise, with one plan a day, the wait would never
        end. The parts of an interrupted copy are the job's own if it copies to the same tier, and are removed if not.
        """
        rows: list[JournalRow] = []
        gone: list[tuple[str, int]] = []
        for job in jobs:
            job.stop_if(self._take_over_parts(job))
        jobs = [job for job in jobs if job.is_active]
        self._copies.note_absent_objects([job for job in jobs if job.copies])
        for job in jobs:
            gone += self._take_replaced(job)
            for old in self._open.pop(job.row.path, ()):
                if _is_same_deletion(old, job.row):
                    job.row = replace(job.row, since_s=old.since_s, due_s=old.due_s, note=old.note)
                note = f"plan {job.row.plan} moves it"
                rows.append(replace(old, state="cancelled", note=note, changed_s=self._now_s))
            rows.append(job.row)
        self._catalog.write(rows, instead_of=gone)

    def _take_over_parts(self, job: MoveJob) -> str:
        """Take over, or remove, the parts of interrupted copies of the job's path. Return why that is impossible."""
        self._merge_parts(job)
        for old in [*self._open[job.row.path]]:
            if not _has_parts(old) or (job.copies and old.dst_url == job.row.dst_url):
                continue
            if reason := withdraw_copy(self._context, old):
                return reason
            self._open[job.row.path].remove(old)
            self._catalog.write([], instead_of=[(old.plan, old.number)])
        return ""

    def _merge_parts(self, job: MoveJob) -> None:
        for old in self._open[job.row.path] if job.copies else ():
            if _has_parts(old) and old.dst_url == job.row.dst_url:
                job.row = replace(job.row, objects=_with_absent_of(job.row, old))

    def _take_replaced(self, job: MoveJob) -> list[tuple[str, int]]:
        """Return the earlier moves of the job's path that were not made, whose rows the job's row replaces.

        Otherwise a move that is stopped every day would leave one row a day. The row of an interrupted copy to another
        tier stays: it alone names its parts.
        """
        open_rows = self._open[job.row.path]
        not_made = [old for old in open_rows if old.state in ("begun", "stopped")]
        not_made = [old for old in not_made if not _has_parts(old) or old.dst_url == job.row.dst_url]
        self._open[job.row.path] = [old for old in open_rows if old not in not_made]
        others = [old for old in not_made if (old.plan, old.number) != (job.row.plan, job.row.number)]
        for old in others:
            if _is_same_deletion(old, job.row):
                job.row = replace(job.row, since_s=old.since_s, due_s=old.due_s)
        return [(old.plan, old.number) for old in others]

    def _make(self, jobs: Sequence[MoveJob]) -> None:
        self._copies.copy([job for job in jobs if job.copies])
        reclassed = [j for j in jobs if j.row.action == "reclass" and not self._context.ends_readability(j.row)]
        self._check_pins(reclassed)  # again, because the copies may have taken hours
        crash_point("tier_move.decided")
        active = [job for job in reclassed if job.is_active]
        change_classes(self._context, [(job, job.row.dst, job.row.objects) for job in active], MoveJob.stop)
        crash_point("tier_move.reclassed")

    def _commit_placements(self, jobs: Sequence[MoveJob]) -> None:
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
        # Readers may be led to these copies from now on: nothing withdraws them.
        placed = [job for job, _, _ in changes if any(obj.was_absent for obj in job.row.objects)]
        for job in placed:
            job.row = replace(job.row, objects=tuple(obj._replace(was_absent=False) for obj in job.row.objects))
        self._catalog.write([job.row for job in placed])
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
            elif job.stop_reason:
                rows.append(self._stopped_row(job))
                gone += self._take_replaced(job)
            elif job.row.action == "copy" or (
                job.row.action == "reclass" and not self._context.ends_readability(job.row)
            ):
                rows.append(replace(job.row, state="done"))
            else:
                # A new copy did not exist yet when an earlier wait for the same deletion began.
                goes_on = 0 < job.row.since_s <= now_s and not job.restarts_grace
                since_s = job.row.since_s if goes_on else now_s
                rows.append(replace(job.row, state="waiting", since_s=since_s, due_s=since_s + grace_s))
        self._catalog.write([replace(row, changed_s=now_s) for row in rows], instead_of=gone)
        for job in jobs:
            self._copied_bytes += job.n_bytes
            if job.stop_reason:
                self._stopped.append(StoppedMove(job.row.number, job.stop_reason, job.row.path, job.row.plan))
            else:
                self._n_done += 1

    def _stopped_row(self, job: MoveJob) -> JournalRow:
        self._merge_parts(job)
        row = job.row
        if job.copies:
            if job.may_continue and any(obj.was_absent for obj in row.objects):
                return replace(row, note=job.stop_reason)
            if not job.is_withdrawn and (reason := withdraw_copy(self._context, row)):
                job.stop_reason += f"; {reason}"
                return replace(row, note=job.stop_reason)
        return replace(row, state="stopped", note=job.stop_reason)


def _has_parts(row: JournalRow) -> bool:
    return row.state == "begun" and row.action in ("copy", "move")


def _is_same_deletion(old: JournalRow, new: JournalRow) -> bool:
    """Return whether two moves wait for the same deletion (or end of readability) of the same objects."""
    drops = ("move", "drop")
    same_action = old.action == new.action or (old.action in drops and new.action in drops)
    same_urls = (old.src_url, old.dst_url, old.src, old.dst) == (new.src_url, new.dst_url, new.src, new.dst)
    facts = [sorted((obj.tier, obj.key, obj.n_bytes, obj.etag or "") for obj in row.objects) for row in (old, new)]
    return old.since_s > 0 and new.action != "copy" and same_action and same_urls and facts[0] == facts[1]
