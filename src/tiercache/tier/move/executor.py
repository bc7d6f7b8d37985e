"""The move executor: takes moves from the first check of their sources until they are done or wait.

The package's docstring lists the steps and the races; copies.py makes the copies.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from threading import Lock
from typing import TYPE_CHECKING, TypeVar

from tiercache.crash_points import crash_point
from tiercache.errors import CommitConflict, TierCacheError
from tiercache.tier.journal import CatalogEntry, JournalRow, PlannedObject
from tiercache.tier.move.checks import (
    ApplyResult,
    BatchLimits,
    Heads,
    MoveContext,
    Progress,
    StoppedMove,
    entry_after_class_change,
    in_batches,
)
from tiercache.tier.move.copies import CopyMaker, MoveJob, is_complete, withdraw_copy
from tiercache.tier.move.placement_updates import PlacementUpdates, RowChanges
from tiercache.tier.stores import deletion_block_reason

if TYPE_CHECKING:
    from tiercache.tier.model import Move, Plan


T = TypeVar("T")


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


# Moves that go through the steps together: all moves of a batch share one placement object, and readers follow when the
# batch is copied.
_BATCH_LIMITS = BatchLimits(1024, 4096, 4 << 30)


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
    made = MoveExecutor(context, on_progress, n_moves=len(plan.moves), n_earlier=n_earlier + len(stopped)).run(jobs)
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
        since_s=0.0,
        due_s=0.0,
        objects=tuple(obj._replace(tier=move.src) for obj in move.objects),
        note="",
        changed_s=context.clock(),
    )


def _with_absent_of(row: JournalRow, old: JournalRow) -> tuple[PlannedObject, ...]:
    """Return the objects of a row, where those were absent that an older row of the same copy has as absent."""
    absent = {obj.key for obj in old.objects if obj.was_absent}
    return tuple(obj._replace(was_absent=obj.was_absent or obj.key in absent) for obj in row.objects)


class _PlanChecks:
    """Which moves of a plan the rule file, as it is now, allows."""

    def __init__(self, context: MoveContext, plan: Plan) -> None:
        self._context, self._plan = context, plan
        self._n_of_path = Counter(move.path for move in plan.moves)
        self._open = defaultdict(list)
        for row in context.catalog.open_moves(context.file.home_tier.url):
            self._open[row.path].append(row)
        receiving = {move.dst for move in plan.moves if move.action in ("copy", "move")}
        self._unavailable = {
            tier.name: context.ensure_tier_marker(tier.name, gets=tier.name in receiving) for tier in context.file.tiers
        }

    def unfit_reason(self, move: Move) -> str:
        """Return the reason why the rule file, as it is now, does not allow a move; "" if it does."""
        if not move.objects:
            return "expected the objects of the move, found none in the plan"
        if self._n_of_path[move.path] > 1:
            return "expected one move of it in the plan"
        planned = {tier.name: tier for tier in self._plan.tiers}
        now = {tier.name: tier for tier in self._context.file.tiers}
        for name in planned if move.action == "delete" else [n for n in (move.src, move.dst) if n is not None]:
            was, tier = planned.get(name), now.get(name)
            if was is None or tier is None:
                return f"expected tier {name!r} in plan and rule file, the {'plan' if was is None else 'file'} lacks it"
            facts = (was.url, was.role, was.storage_class), (tier.url, tier.role, tier.storage_class)
            if facts[0] != facts[1]:
                return f"tiers.{name}: expected {facts[0]} as planned, found {facts[1]} in the rule file: plan anew"
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


class MoveExecutor:
    """Takes moves through the steps, batch by batch. Use it from one thread."""

    def __init__(
        self,
        context: MoveContext,
        on_progress: Callable[[Progress], object] | None,
        *,
        n_moves: int,
        n_earlier: int = 0,
    ) -> None:
        """Do nothing yet. n_moves, n_earlier: For the progress: number of all moves, and of those that are over."""
        self._context, self._on_progress, self._n_moves, self._n_over = context, on_progress, n_moves, n_earlier
        self._file, self._catalog, self._now_s = context.file, context.catalog, context.clock()
        self._placements = PlacementUpdates(context)
        self._copies = CopyMaker(context, self._count_bytes)
        self._open: dict[str, list[JournalRow]] = defaultdict(list)
        self._count_lock = Lock()
        self._n_done = self._n_bytes = self._done_bytes = self._copied_bytes = 0
        self._stopped: list[StoppedMove] = []

    def run(self, jobs: Sequence[MoveJob]) -> ApplyResult:
        """Make the moves. A move that cannot be made is stopped, and the others go on. Raises as apply_plan()."""
        self._n_bytes = sum(obj.n_bytes for job in jobs if job.copies for obj in job.row.objects)
        for old in self._catalog.open_moves(self._file.home_tier.url):
            self._open[old.path].append(old)
        for batch in in_batches(jobs, _BATCH_LIMITS):
            self._run_batch(batch)
        return ApplyResult(self._n_done, tuple(self._stopped), n_bytes=self._copied_bytes)

    def _count_bytes(self, n_bytes: int) -> None:
        with self._count_lock:
            self._done_bytes += n_bytes
        self._report_progress()

    def _report_progress(self) -> None:
        if self._on_progress is not None:
            n_over = self._n_over + self._n_done + len(self._stopped)
            n_bytes = max(self._n_bytes, self._done_bytes)
            self._on_progress(Progress(n_over, self._n_moves, self._done_bytes, n_bytes))

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
        """Note in the row of a job what interrupted copies of its path to the same tier have made."""
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
        """Make the copies, and the class changes that leave objects readable."""
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
        self._report_progress()

    def _stopped_row(self, job: MoveJob) -> JournalRow:
        """Return the journal row of a move that was not made, after removing what it has copied."""
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
    """Return whether a journal row is that of a copy which was interrupted, so that dst may have parts of it."""
    return row.state == "begun" and row.action in ("copy", "move")


def _is_same_deletion(old: JournalRow, new: JournalRow) -> bool:
    """Return whether two moves wait for the same deletion (or end of readability) of the same objects."""
    drops = ("move", "drop")
    same_action = old.action == new.action or (old.action in drops and new.action in drops)
    same_urls = (old.src_url, old.dst_url, old.src, old.dst) == (new.src_url, new.dst_url, new.src, new.dst)
    facts = [sorted((obj.tier, obj.key, obj.n_bytes, obj.etag or "") for obj in row.objects) for row in (old, new)]
    return old.since_s > 0 and new.action != "copy" and same_action and same_urls and facts[0] == facts[1]
