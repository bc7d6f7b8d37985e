"""Makes a complete and verified copy in another tier: equal objects that are there stay, the others are copied.

An object in dst is never overwritten, with one exception: a move made it from this very src, it is unchanged since, and
src has a different object now. A copy whose source was dropped, or that came from another tier, is never overwritten::

    1. hot has v1 of a key, and home has v2. 2. v1 is copied to the archive, and dropped from hot.
    3. v2 is copied to the archive, and overwrites the last copy of v1.

The last object of a group makes the group complete. It is copied when all the others are there, so that an incomplete
copy never looks complete.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import TYPE_CHECKING, Literal

from tiercache.catalog.tiers import CatalogEntry, JournalObject, JournalRow
from tiercache.errors import CommitConflict, StoreError, TierCacheError
from tiercache.points import crash_point
from tiercache.tier.model import ARCHIVED, RESTORING, PlannedObject
from tiercache.tier.steps import (
    Infos,
    MoveContext,
    as_planned,
    earliest,
    entry_after_class_change,
    first_written_s,
    matches_entry,
)
from tiercache.tier.stores import RESTORED_FIRST, state_of
from tiercache.tier.transfer import is_md5

if TYPE_CHECKING:
    from tiercache.model import ObjectInfo
    from tiercache.tier.model import Move
    from tiercache.tier.transfer import VerifiedCopy

# A copy of this size is recorded in the catalog at once, so that a killed process does not have to make it again.
_AT_ONCE_BYTES = 8 << 20
# Assumed difference between the clocks of stores.
_STORE_SKEW_S = 60.0


@dataclass(slots=True)
class MoveJob:
    """A move in progress.

    Attributes:
        move: Move of the plan.
        row: Journal row of the move.
        why: Reason why the move was stopped; "" while it was not.
        over: Whether nothing is left to do.
        made: Verified copies that are not in the catalog yet, as (tier, key, entry).
        n_bytes: Bytes that were copied.
        is_new: Whether a copy in dst was not in the catalog before.
        lock: Guards the fields that pool threads change.
    """

    move: Move
    row: JournalRow
    stop_reason: str = ""
    is_finished: bool = False
    there: Infos = field(default_factory=dict)
    made: list[tuple[str, str, CatalogEntry]] = field(default_factory=list)
    n_bytes: int = 0
    is_new: bool = False
    lock: Lock = field(default_factory=Lock)

    def stop(self, why: str) -> None:
        """Stop the move. Only the first reason is kept."""
        with self.lock:
            self.stop_reason = self.stop_reason or why

    @property
    def is_active(self) -> bool:
        """Whether there is more to do."""
        return not self.stop_reason and not self.is_finished


class CopyMaker:
    """Makes the copies of jobs in parallel. Use it from one thread at a time."""

    def __init__(self, sight: MoveContext, on_bytes: Callable[[int], object]) -> None:
        self._sight, self._on_bytes = sight, on_bytes

    def copy(self, jobs: Sequence[MoveJob]) -> None:
        """Make each job's group complete and verified in dst, and record it in the catalog.

        A failure stops its job only.
        """
        self._intend(jobs)
        crash_point("tier_move.intended")
        self._all(self._ensure, [(job, one) for job in jobs for one in job.row.objects[:-1]])
        crash_point("tier_move.parts_copied")
        self._all(self._ensure, [(job, job.row.objects[-1]) for job in jobs])
        crash_point("tier_move.copied")
        self._record(jobs)
        crash_point("tier_move.recorded")

    def reclass(self, jobs: Sequence[MoveJob]) -> None:
        """Give the objects of each job the storage class of dst."""
        for job in jobs:
            self._sight.remember_dates(job.row.dst, job.row.objects)
        self._all(self._change_class, [(job, one) for job in jobs for one in job.row.objects])
        crash_point("tier_move.reclassed")
        self._record(jobs)

    def _intend(self, jobs: Sequence[MoveJob]) -> None:
        """Record the copies that are about to be made in archive classes, where they cannot be read afterwards.

        Without the record: 1. An object is copied into an archive class. 2. The process is killed before it records the
        copy. 3. Nobody can compare the copy, and a copy that was never compared is not overwritten: it and its source
        would stay for good.
        """
        jobs = [job for job in jobs if self._sight.stores.class_of(job.row.dst) in RESTORED_FIRST]
        wanted = {
            (job.row.dst, one.key): CatalogEntry(one.n_bytes, None, None, job.row.src_place)
            for job in jobs
            for one in job.row.objects
        }
        found = self._sight.heads(list(wanted))
        self._sight.catalog.record([(*at, copy) for at, copy in wanted.items() if found[at] is None])

    def _record(self, jobs: Sequence[MoveJob]) -> None:
        self._sight.catalog.record([copy for job in jobs for copy in job.made])
        for job in jobs:
            job.made.clear()

    def _all(
        self, work: Callable[[MoveJob, JournalObject], None], objects: Sequence[tuple[MoveJob, JournalObject]]
    ) -> None:
        def one_of(pair: tuple[MoveJob, JournalObject]) -> None:
            job, one = pair
            if job.is_active:
                try:
                    work(job, one)
                except CommitConflict:
                    raise  # the lock was lost: all work must stop
                except TierCacheError as error:
                    job.stop(str(error))

        for _ in self._sight.pool.map(one_of, objects):
            pass

    # -- one object -------------------------------------------------------------------------------------------------

    def _ensure(self, job: MoveJob, one: JournalObject) -> None:
        sight, src, dst = self._sight, job.row.src, job.row.dst
        info = sight.head(dst, one.key)
        if info is not None and self._is_there(job, one, info):
            return
        if not job.is_active:
            return
        self._begin_anew(job)
        replaces = False if info is None else info.etag or True
        source = src
        try:
            copied = sight.transfer.copy(src, dst, as_planned(one), on_bytes=self._on_bytes, replaces=replaces)
        except StoreError as error:
            if not error.facts.get("spoilt"):
                raise
            source, copied = self._copied_from_others(job, one, replaces, error)
        crash_point("tier_move.object")
        crc = copied.crc32c if copied.crc32c is not None else one.crc32c
        # A copy made from a third tier may not be replaced from src: an object that rots there may look new one day.
        copy = CatalogEntry(copied.n_bytes, copied.etag, crc, sight.file.tier(source).url)
        self._note(job, one, copy, copied.n_bytes, of_source=source == src)

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
                self._sight.catalog.write([job.row])

    def _copied_from_others(
        self, job: MoveJob, one: JournalObject, replaces: bool | str, spoilt: StoreError
    ) -> tuple[str, VerifiedCopy]:
        """Copy an object that has rotted in src from another tier with an equal object. Return that tier and the copy.

        Raises `spoilt` if no tier has one. Without this, the group would stay incomplete in dst on every run until
        somebody looked.
        """
        sight, dst = self._sight, job.row.dst
        for tier in sight.file.tiers:
            if any(sight.stores.same_url(tier.name, other) for other in (job.row.src, dst)):
                continue
            known = sight.catalog.entries(tier.name, [one.key]).get(one.key)
            if known is None or not known.verified or (known.n_bytes, known.crc32c) != (one.n_bytes, one.crc32c):
                continue
            asked = PlannedObject(one.key, one.n_bytes, known.etag, None, one.crc32c)
            with suppress(StoreError):  # the error to report is the one of src
                return tier.name, sight.transfer.copy(tier.name, dst, asked, on_bytes=self._on_bytes, replaces=replaces)
        raise spoilt

    def _note(
        self, job: MoveJob, one: JournalObject, copy: CatalogEntry, n_bytes: int, *, of_source: bool = True
    ) -> None:
        """Record a verified copy in the catalog. If src was the source, record src too: both were read and are equal.

        The copy keeps the date of the object that it copies, also when the source is gone.
        """
        books = self._sight.catalog
        source = books.entries(job.row.src, [one.key]).get(one.key)
        came_from = source.made_from if source is not None and source.etag == one.etag else ""
        first_s = first_written_s(one, source)
        copy = copy._replace(written_s=earliest(copy.written_s, first_s))
        pair = [(job.row.dst, one.key, copy)]
        if of_source and one.etag is not None:
            pair.append((job.row.src, one.key, CatalogEntry(one.n_bytes, one.etag, copy.crc32c, came_from, first_s)))
        if copy.n_bytes >= _AT_ONCE_BYTES:
            books.record(pair)
            pair = []
        with job.lock:
            job.n_bytes += n_bytes
            job.made.extend(pair)

    def _is_there(self, job: MoveJob, one: JournalObject, info: ObjectInfo) -> bool:
        """Return whether dst has an equal copy.

        Stop the job if dst has a different object that must not be overwritten.
        """
        sight, dst = self._sight, job.row.dst
        known = sight.catalog.entries(dst, [one.key]).get(one.key)
        expected = self._source_sum(job, one)
        is_cold = state_of(info) in (ARCHIVED, RESTORING)
        if info.n_bytes == one.n_bytes and expected is not None:
            found = sight.checksum_of(dst, info, known)
            # For an object that cannot be read, the checksum that the store reports is all there is.
            if expected == (info.crc32c if found is None else found):
                same = known if known is not None and known.verified and matches_entry(info, known) else None
                came_from, first_s = ("", None) if same is None else (same.made_from, same.written_s)
                copy = CatalogEntry(info.n_bytes, info.etag, expected, came_from, first_s)
                return self._found(job, one, copy, is_new=same is None)
        if known is not None and known.made_from == job.row.src_place:
            is_size = known.n_bytes == info.n_bytes == one.n_bytes
            if known.is_intended and is_size and is_cold:  # a readable object was compared above
                if _is_by_etag(info, one):
                    copy = CatalogEntry(info.n_bytes, info.etag, None, job.row.src_place)
                    return self._found(job, one, copy, is_new=True)
                if self._may_make_again(job, one, info):
                    return False
            if matches_entry(info, known) and len(job.row.objects) == 1:
                return False  # a copy of an earlier object of src: it may be replaced
        where = f"{sight.stores.store(dst).url}/{one.key}"
        archived = ", which must be restored before it can be compared" if is_cold else ""
        job.stop(
            f"{where}: expected nothing there, or a copy of the {one.n_bytes} bytes in {job.row.src}; found another "
            f"object of {info.n_bytes} bytes{archived}: it is not overwritten, remove or rename one of the two"
        )
        return False

    def _found(self, job: MoveJob, one: JournalObject, copy: CatalogEntry, *, is_new: bool) -> Literal[True]:
        """Record that dst has a copy already."""
        if is_new:
            self._begin_anew(job)
        self._note(job, one, copy, 0)
        self._on_bytes(one.n_bytes)
        return True

    def _may_make_again(self, job: MoveJob, one: JournalObject, info: ObjectInfo) -> bool:
        """Return whether src may replace an archived, never verified copy that a killed process has left.

        If the store reports a checksum of the copy, it differs from that of src: one of the two is wrong, and it may be
        src::

            1. The object is copied, and the process is killed. 2. src rots. 3. The copy in dst is the last good one.

        So src must have been written again since, and the group must not look complete in dst, because replacing one
        part may fail.
        """
        if info.crc32c is None:
            return True
        if one.modified_s is None or info.modified_s is None or one.modified_s <= info.modified_s + _STORE_SKEW_S:
            return False
        objects = job.row.objects
        return len(objects) == 1 or self._sight.head(job.row.dst, objects[-1].key) is None

    def _source_sum(self, job: MoveJob, one: JournalObject) -> int | None:
        """Return the CRC-32C that a copy must have; None where nothing records it and src cannot be read."""
        if one.crc32c is not None:
            return one.crc32c
        sight, src = self._sight, job.row.src
        info = sight.head(src, one.key)
        if info is None or sight.change_reason(src, info, one):
            return None
        return sight.checksum_of(src, info, sight.catalog.entries(src, [one.key]).get(one.key))

    def _change_class(self, job: MoveJob, one: JournalObject) -> None:
        sight, dst = self._sight, job.row.dst
        info = sight.head(dst, one.key)
        # Left by an earlier attempt that was killed: its change of class may have changed the ETag.
        if info is not None and info.n_bytes == one.n_bytes and has_class(sight, dst, info):
            return
        known = sight.catalog.entries(dst, [one.key]).get(one.key)
        changed = sight.transfer.change_class(dst, as_planned(one))
        crash_point("tier_move.class_changed")
        if (copy := entry_after_class_change(one, known, changed)) is not None:
            with job.lock:
                job.made.append((dst, one.key, copy))


def _is_by_etag(info: ObjectInfo, one: JournalObject) -> bool:
    """Return whether the ETag alone shows that a copy equals src, as for server-side copies without a checksum.

    Without this: 1. The object is copied, and the process is killed. 2. src rots, with its old ETag. 3. The copy in dst
    is the last good one. Copying again would overwrite it first, and compare afterwards.
    """
    has_sum = info.crc32c is not None or one.crc32c is not None
    return not has_sum and info.etag is not None and info.etag == one.etag and is_md5(info.etag)


def has_class(sight: MoveContext, tier: str, info: ObjectInfo) -> bool:
    """Return whether an object already has the storage class of a tier."""
    return (info.storage_class or "STANDARD") == sight.stores.class_of(tier)
