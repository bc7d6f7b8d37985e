"""The plan executor: takes the moves of one plan from the first check of their sources until they are done or wait.

mover.py describes the steps and the races.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from threading import Lock
from typing import TYPE_CHECKING

from tiercache.catalog.tiers import JournalObject, JournalRow
from tiercache.errors import TierCacheError
from tiercache.points import crash_point
from tiercache.tier.copying import CopyMaker, MoveJob
from tiercache.tier.marks import deletion_block_reason
from tiercache.tier.outcome import ApplyResult, Progress, StoppedMove
from tiercache.tier.placing import Heads, PlacementUpdates, RowChanges, ends_readability, found_infos
from tiercache.tier.steps import Infos, MoveContext, as_journaled

if TYPE_CHECKING:
    from tiercache.tier.lock import TierLock
    from tiercache.tier.model import Move, Plan

# Moves that go through the steps together: all moves of a batch share one placement object.
_BATCH_MOVES, _BATCH_OBJECTS, _BATCH_BYTES = 1024, 4096, 64 << 30


class PlanExecutor:
    """One call of Mover.apply(). Use it from one thread."""

    def __init__(
        self,
        sight: MoveContext,
        lock: TierLock,
        plan: Plan,
        clock: Callable[[], float],
        on_progress: Callable[[Progress], object] | None,
    ) -> None:
        self._sight, self._lock, self._plan, self._clock = sight, lock, plan, clock
        self._now_s = clock()
        self._file, self._catalog = sight.file, sight.catalog
        self._placing = PlacementUpdates(sight)
        self._copying = CopyMaker(sight, self._moved_bytes)
        self._home = sight.file.home.url
        self._open: dict[str, list[JournalRow]] = defaultdict(list)
        self._on_progress, self._guard = on_progress, Lock()
        self._n_done, self._done_bytes, self._copied_bytes = 0, 0, 0
        self._n_bytes = sum(move.n_bytes for move in plan.moves if move.action in ("copy", "move"))
        self._stopped: list[StoppedMove] = []
        self._missing: dict[str, str] = {}

    def run(self) -> ApplyResult:
        """Apply the plan and return the result. Raises as Mover.apply()."""
        self._catalog.prune(self._now_s)
        before = self._catalog.of_plan(self._plan.id)
        for old in self._catalog.open_moves(self._home):
            self._open[old.path].append(old)
        jobs = []
        paths = Counter(move.path for move in self._plan.moves)
        self._missing = self._missing_tiers()
        for move in self._plan.moves:
            earlier = before.get(move.number)
            if earlier is not None and earlier.state in ("waiting", "dropping", "done"):
                self._n_done += 1
            elif why := self._unfit(move) or ("expected one move of it in the plan" if paths[move.path] > 1 else ""):
                self._stopped.append(StoppedMove(move.number, why, move.path, self._plan.id))
            else:
                jobs.append(MoveJob(move, self._row(move)))
        for batch in _batches_of_jobs(jobs):
            self._work(batch)
        n_waiting = len(self._catalog.open_moves(self._home, "waiting", "dropping"))
        return ApplyResult(self._n_done, tuple(self._stopped), n_waiting, self._copied_bytes)

    def _missing_tiers(self) -> dict[str, str]:
        """Return for each tier the reason why it may not be the tier used before, "" if it is.

        Tiers used first get a marker.
        """
        gets = {move.dst for move in self._plan.moves if move.action in ("copy", "move", "drop")}
        return {
            tier.name: self._sight.tier_unavailable_reason(tier.name, gets=tier.name in gets)
            for tier in self._file.tiers
        }

    def _moved_bytes(self, n_bytes: int) -> None:
        with self._guard:
            self._done_bytes += n_bytes
        self._tell()

    def _tell(self) -> None:
        if self._on_progress is not None:
            done_moves = self._n_done + len(self._stopped)
            n_bytes = max(self._n_bytes, self._done_bytes)
            self._on_progress(Progress(done_moves, len(self._plan.moves), self._done_bytes, n_bytes))

    # -- which moves are allowed ------------------------------------------------------------------------------------

    def _unfit(self, move: Move) -> str:
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
        if move.action == "delete":
            missing = sorted(now.keys() - planned.keys())
            if missing:
                return f"expected the tiers of the plan, found {', '.join(missing)} too: plan anew"
            return deletion_block_reason(self._missing)
        if move.dst is None or move.dst == move.src:
            return f"expected two different tiers, found {move.src} and {move.dst}"
        is_one = self._sight.stores.same_url(move.src, move.dst)
        if is_one != (move.action == "reclass"):
            return f"expected {'one location' if not is_one else 'two locations'}, found {move.src} and {move.dst}"
        if any(row.state == "dropping" for row in self._open[move.path]):
            return "deletions of an earlier move of it were interrupted: `tiercache tier run --once` finishes them"
        return self._missing.get(move.dst, "")

    def _row(self, move: Move) -> JournalRow:
        objects = tuple(as_journaled(one, move.src) for one in move.objects)
        return JournalRow(
            plan=self._plan.id,
            number=move.number,
            path=move.path,
            kind=move.kind,
            action=move.action,
            src=move.src,
            dst=move.dst or "",
            src_place=self._file.tier(move.src).url,
            dst_place="" if move.dst is None else self._file.tier(move.dst).url,
            home=self._home,
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

    def _work(self, jobs: Sequence[MoveJob]) -> None:
        self._lock.check()
        self._look(jobs)
        self._check_pins(jobs)
        self._begin([job for job in jobs if job.is_active])
        crash_point("tier_move.begun")
        self._make([job for job in jobs if job.is_active])
        self._look([job for job in jobs if job.is_active and job.row.action in ("move", "drop")])
        crash_point("tier_move.looked")
        self._place([job for job in jobs if job.is_active])
        crash_point("tier_move.placed")
        self._end(jobs)
        crash_point("tier_move.ended")

    def _look(self, jobs: Sequence[MoveJob]) -> None:
        """Compare the objects in src with the plan. For a delete: compare all tiers, and update the row."""
        wanted = [(tier, one.key) for job in jobs for tier in self._tiers_of(job) for one in job.row.objects]
        heads = self._sight.heads(list(dict.fromkeys(wanted)))
        for job in jobs:
            try:
                if job.row.action == "delete":
                    self._look_everywhere(job, heads)
                else:
                    self._look_at_source(job, heads)
            except TierCacheError as error:
                job.stop(str(error))

    def _tiers_of(self, job: MoveJob) -> list[str]:
        return [tier.name for tier in self._file.tiers] if job.row.action == "delete" else [job.row.src]

    def _look_at_source(self, job: MoveJob, heads: Heads) -> None:
        row, found = job.row, found_infos(heads, job.row.src, job.row)
        if row.action in ("move", "drop") and not any(found.values()) and self._was_made(row):
            job.is_finished = True
            return
        for one in row.objects:
            info = found[one.key]
            if info is None:
                job.stop(f"{row.src_place}/{one.key}: expected {one.n_bytes} bytes, found nothing")
                return
            has_class = row.action == "reclass" and info.storage_class == self._sight.stores.class_of(row.dst)
            if not (has_class and info.n_bytes == one.n_bytes) and (
                why := self._sight.change_reason(row.src, info, one)
            ):
                job.stop(why)
                return
        if why := self._sight.extra_object_reason(row.src, row.path, found):
            job.stop(why)

    def _was_made(self, row: JournalRow) -> bool:
        """Return whether a move whose source is gone was made before: as far as can be told, dst is complete."""
        books = self._catalog.entries(row.dst, [one.key for one in row.objects])
        for one in row.objects:
            info = self._sight.head(row.dst, one.key)
            if info is None or info.n_bytes != one.n_bytes:
                return False
            found = self._sight.checksum_of(row.dst, info, books.get(one.key)) if one.crc32c is not None else None
            if found is not None and found != one.crc32c:
                return False
        return True

    def _look_everywhere(self, job: MoveJob, heads: Heads) -> None:
        row, stores = job.row, self._sight.stores
        objects: list[JournalObject] = []
        for tier in self._file.tiers:
            found = found_infos(heads, tier.name, row)
            for one in job.move.objects:
                info = found[one.key]
                if info is None or stores.tier_of(stores.sharing(tier.name), info) != tier.name:
                    continue
                planned = as_journaled(one, tier.name)
                if tier.name == row.src and (why := self._sight.change_reason(tier.name, info, planned)):
                    job.stop(why)
                elif info.n_bytes != one.n_bytes:
                    at = f"{tier.url}/{one.key}"
                    job.stop(f"{at}: expected a copy of {one.n_bytes} bytes, found {info.n_bytes}")
                objects.append(replace_object(planned, info.etag, info.modified_s))
            if why := self._sight.extra_object_reason(tier.name, row.path, found):
                job.stop(why)
        if not any(one.where == row.src for one in objects):
            job.is_finished = not objects
            job.stop(
                "" if not objects else f"{row.src_place}/{row.path}: expected the copy that was planned, found none"
            )
        job.row = replace(row, objects=tuple(objects) or row.objects)

    def _check_pins(self, jobs: Sequence[MoveJob]) -> None:
        asked = [job for job in jobs if job.row.action != "copy"]
        try:
            pinned = self._sight.pin_reasons([job.row for job in asked], self._now_s)
        except TierCacheError as error:
            for job in asked:
                job.stop(str(error))
            return
        for job in asked:
            if why := pinned.get((job.row.plan, job.row.number)):
                job.stop(why)

    def _begin(self, jobs: Sequence[MoveJob]) -> None:
        """Write the jobs into the journal. Earlier moves of the same paths are cancelled in the same transaction.

        A wait for the very same deletion continues where it was. Otherwise, with one plan a day, the wait would never
        end.
        """
        rows: list[JournalRow] = []
        gone: list[tuple[str, int]] = []
        for job in jobs:
            gone += self._stopped_before(job)
            for old in self._open.pop(job.row.path, ()):
                if _asks_the_same(old, job.row):
                    job.row = replace(job.row, since_s=old.since_s, due_s=old.due_s, note=old.note)
                note = f"plan {job.row.plan} moves it"
                rows.append(replace(old, state="cancelled", note=note, changed_s=self._now_s))
            rows.append(job.row)
        self._catalog.write(rows, instead_of=gone)

    def _stopped_before(self, job: MoveJob) -> list[tuple[str, int]]:
        """Return the earlier, stopped moves of the job's path, whose rows the job's row replaces.

        Otherwise a move that is stopped every day would leave one row a day.
        """
        begun = [old for old in self._open[job.row.path] if old.state == "begun"]
        self._open[job.row.path] = [old for old in self._open[job.row.path] if old.state != "begun"]
        others = [old for old in begun if (old.plan, old.number) != (job.row.plan, job.row.number)]
        for old in others:
            if _asks_the_same(old, job.row):
                job.row = replace(job.row, since_s=old.since_s, due_s=old.due_s)
        return [(old.plan, old.number) for old in others]

    def _make(self, jobs: Sequence[MoveJob]) -> None:
        """Make the copies, and the class changes that leave objects readable."""
        self._copying.copy([job for job in jobs if job.row.action in ("copy", "move")])
        reclassed = [j for j in jobs if j.row.action == "reclass" and not ends_readability(self._sight, j.row)]
        self._check_pins(reclassed)  # again, because the copies may have taken hours
        crash_point("tier_move.decided")
        self._copying.reclass([job for job in reclassed if job.is_active])

    def _place(self, jobs: Sequence[MoveJob]) -> None:
        """Confirm the copies in dst, and commit the placement."""
        placed = [job for job in jobs if job.row.action != "delete"]
        heads = self._sight.heads(self._around([job.row for job in placed]))
        changes: dict[str, RowChanges] = defaultdict(dict)
        chains: dict[str, list[MoveJob]] = defaultdict(list)
        for job in placed:
            try:
                there = found_infos(heads, job.row.dst, job.row)
                if why := self._unconfirmed(job.row, there):
                    job.stop(why)
                    continue
                if job.row.action == "copy" and not self._placing.is_home(job.row.dst):
                    continue  # readers keep reading the source
                at_home = found_infos(heads, self._placing.home, job.row) if self._has_home_between(job.row) else {}
                folder = self._placing.folder(job.row)
                changes[folder].update(self._placing.wanted(job.row, there, at_home))
                chains[folder].append(job)
            except TierCacheError as error:
                job.stop(str(error))
        self._lock.check()
        for folder, why in self._placing.commit(changes).items():
            for job in chains[folder]:
                job.stop(why)

    def _around(self, rows: Sequence[JournalRow]) -> list[tuple[str, str]]:
        """Return the (tier, key) pairs to query: those of dst, and those of home where home is neither src nor dst."""
        wanted = []
        for row in rows:
            tiers = [row.dst, *([self._placing.home] if self._has_home_between(row) else [])]
            wanted += [(tier, one.key) for tier in tiers for one in row.objects]
        return list(dict.fromkeys(wanted))

    def _has_home_between(self, row: JournalRow) -> bool:
        return not self._placing.is_home(row.src) and not self._placing.is_home(row.dst)

    def _unconfirmed(self, row: JournalRow, there: Infos) -> str:
        if row.action == "reclass":
            return ""
        books = self._catalog.entries(row.dst, [one.key for one in row.objects])
        for one in row.objects:
            why = self._sight.unconfirmed_reason(row.dst, one.key, there[one.key], books.get(one.key))
            if why:
                return why
        return ""

    def _end(self, jobs: Sequence[MoveJob]) -> None:
        """Journal the moves that wait, the moves that are done, and the moves that stopped, with reasons.

        The grace period begins now, when the placement is committed, not when apply() began: the copies may have taken
        days.
        """
        grace_s, now_s, rows = self._file.tiering.grace_s, self._clock(), []
        gone: list[tuple[str, int]] = []
        for job in jobs:
            if job.is_finished and not job.stop_reason:
                rows.append(replace(job.row, state="done"))
                self._keep(job.row)
            elif job.stop_reason:
                gone += self._stopped_before(job)
                rows.append(replace(job.row, note=job.stop_reason))
            elif job.row.action == "copy" or (
                job.row.action == "reclass" and not ends_readability(self._sight, job.row)
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
            else:
                self._n_done += 1
        self._tell()

    def _keep(self, row: JournalRow) -> None:
        """Record that the source is gone, whoever deleted it: the copy in dst may be the last one."""
        self._catalog.source_deleted([(row.dst, one.key) for one in row.objects if row.dst])


def _asks_the_same(old: JournalRow, new: JournalRow) -> bool:
    """Return whether two moves wait for the same deletion (or end of readability) of the same objects."""
    drops = ("move", "drop")
    same_action = old.action == new.action or (old.action in drops and new.action in drops)
    same_places = (old.src_place, old.dst_place, old.src, old.dst) == (new.src_place, new.dst_place, new.src, new.dst)
    facts = [sorted((one.where, one.key, one.n_bytes, one.etag or "") for one in row.objects) for row in (old, new)]
    return old.since_s > 0 and new.action != "copy" and same_action and same_places and facts[0] == facts[1]


def replace_object(one: JournalObject, etag: str | None, modified_s: float | None) -> JournalObject:
    """Return the same object with the ETag and the date that it has in another tier."""
    return one._replace(etag=etag, modified_s=modified_s)


def _batches_of_jobs(jobs: Sequence[MoveJob]) -> Iterator[list[MoveJob]]:
    batch: list[MoveJob] = []
    n_objects = n_bytes = 0
    for job in jobs:
        if batch and (
            len(batch) >= _BATCH_MOVES
            or n_objects + len(job.row.objects) > _BATCH_OBJECTS
            or n_bytes + job.move.n_bytes > _BATCH_BYTES
        ):
            yield batch
            batch, n_objects, n_bytes = [], 0, 0
        batch.append(job)
        n_objects += len(job.row.objects)
        n_bytes += job.move.n_bytes
    if batch:
        yield batch
