"""Making a copy whole and verified in another tier: objects that are there and equal stay, all else is copied.

What lies in dst under a key is never overwritten, unless it is as a move made it from this very src, which has another
object now. Never a copy whose source was dropped, or that came from another tier::

    1. hot has v1 of a key, and home v2. 2. v1 is copied to the archive, and dropped from hot.
    3. v2 is copied to the archive, in the place of the last v1.

A group's last object, which makes it whole, is copied when all others are there: a copy never looks whole and is not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import TYPE_CHECKING, Literal

from tiercache.catalog.tiers import JournalObject, JournalRow, KnownCopy
from tiercache.errors import CommitConflict, StoreError, TierCacheError
from tiercache.points import reach
from tiercache.tier.model import ARCHIVED, RESTORING, PlannedObject
from tiercache.tier.steps import Infos, Sight, as_planned, as_reclassed, earliest, first_written_s, is_same
from tiercache.tier.stores import RESTORED_FIRST, state_of
from tiercache.tier.transfer import is_md5

if TYPE_CHECKING:
    from tiercache.model import ObjectInfo
    from tiercache.tier.model import Move
    from tiercache.tier.transfer import Copied

# Who copies for so long writes it into the books at once, and has nothing to copy again when he is killed.
_AT_ONCE_BYTES = 8 << 20
# By which clocks of stores may differ.
_SKEW_S = 60.0


@dataclass(slots=True)
class Job:
    """A move in work. why: it is stopped, "" while it is not; over: nothing is left to do.

    made: verified copies that are not on the books yet, (tier, key, what it is) each. is_new: not all of what is in
    dst was on the books before. The lock guards what threads add.
    """

    move: Move
    row: JournalRow
    why: str = ""
    over: bool = False
    there: Infos = field(default_factory=dict)
    made: list[tuple[str, str, KnownCopy]] = field(default_factory=list)
    n_bytes: int = 0
    is_new: bool = False
    lock: Lock = field(default_factory=Lock)

    def stop(self, why: str) -> None:
        """Stop it; the first reason counts."""
        with self.lock:
            self.why = self.why or why

    @property
    def goes_on(self) -> bool:
        """Whether there is more to do."""
        return not self.why and not self.over


class Copying:
    """Copies for jobs, side by side. Not for two threads at once."""

    def __init__(self, sight: Sight, on_bytes: Callable[[int], object]) -> None:
        self._sight, self._on_bytes = sight, on_bytes

    def copy(self, jobs: Sequence[Job]) -> None:
        """Make each job's group whole and verified in its dst, and put it on the books. What fails stops its job."""
        self._intend(jobs)
        reach("tier_move.intended")
        self._all(self._ensure, [(job, one) for job in jobs for one in job.row.objects[:-1]])
        reach("tier_move.parts_copied")
        self._all(self._ensure, [(job, job.row.objects[-1]) for job in jobs])
        reach("tier_move.copied")
        self._record(jobs)
        reach("tier_move.recorded")

    def reclass(self, jobs: Sequence[Job]) -> None:
        """Give each job's objects the class of its dst."""
        for job in jobs:
            self._sight.remember_dates(job.row.dst, job.row.objects)
        self._all(self._change_class, [(job, one) for job in jobs for one in job.row.objects])
        reach("tier_move.reclassed")
        self._record(jobs)

    def _intend(self, jobs: Sequence[Job]) -> None:
        """Note what is about to be made where it cannot be read afterwards.

        1. It is copied into an archive class. 2. The process is killed before it is on the books. 3. Nobody can compare
        it, and what nobody has compared is not overwritten: it would lie there for good, and its source too.
        """
        jobs = [job for job in jobs if self._sight.stores.class_of(job.row.dst) in RESTORED_FIRST]
        wanted = {
            (job.row.dst, one.key): KnownCopy(one.n_bytes, None, None, job.row.src_place)
            for job in jobs
            for one in job.row.objects
        }
        found = self._sight.heads(list(wanted))
        self._sight.catalog.record([(*at, copy) for at, copy in wanted.items() if found[at] is None])

    def _record(self, jobs: Sequence[Job]) -> None:
        self._sight.catalog.record([copy for job in jobs for copy in job.made])
        for job in jobs:
            job.made.clear()

    def _all(self, work: Callable[[Job, JournalObject], None], objects: Sequence[tuple[Job, JournalObject]]) -> None:
        def one_of(pair: tuple[Job, JournalObject]) -> None:
            job, one = pair
            if job.goes_on:
                try:
                    work(job, one)
                except CommitConflict:
                    raise  # the lock was lost: nothing at all goes on
                except TierCacheError as error:
                    job.stop(str(error))

        for _ in self._sight.pool.map(one_of, objects):
            pass

    # -- one object -------------------------------------------------------------------------------------------------

    def _ensure(self, job: Job, one: JournalObject) -> None:
        sight, src, dst = self._sight, job.row.src, job.row.dst
        info = sight.head(dst, one.key)
        if info is not None and self._is_there(job, one, info):
            return
        if not job.goes_on:
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
        reach("tier_move.object")
        crc = copied.crc32c if copied.crc32c is not None else one.crc32c
        # What another tier had is not src's to replace: what rotted there may look like a new object one day.
        copy = KnownCopy(copied.n_bytes, copied.etag, crc, sight.file.tier(source).url)
        self._note(job, one, copy, copied.n_bytes, of_source=source == src)

    def _begin_anew(self, job: Job) -> None:
        """Note that what is in dst is new, and has a grace of its own, before it is there or on the books as verified.

        1. A move waits, and its copy is lost. 2. It is made again, and on the books. 3. The process is killed. 4. The
        next one finds a verified copy, and a wait for the same deletion that began long before there was that copy.

        A write for each such move, and not one a batch before the books: where ETags are made of bytes these know the
        new copy as soon as it lies there, for they have not forgotten the lost one.
        """
        with job.lock:
            job.is_new = True
            if job.row.since_s > 0:
                job.row = replace(job.row, since_s=0.0, due_s=0.0)
                self._sight.catalog.write([job.row])

    def _copied_from_others(
        self, job: Job, one: JournalObject, replaces: bool | str, spoilt: StoreError
    ) -> tuple[str, Copied]:
        """A copy of an object that has rotted in src, made of the same one in another tier, and which.

        Raises spoilt: there is none.

        Else its group would stay in dst in parts, each day anew, until somebody came to look.
        """
        sight, dst = self._sight, job.row.dst
        for tier in sight.file.tiers:
            if any(sight.stores.same_place(tier.name, other) for other in (job.row.src, dst)):
                continue
            known = sight.catalog.known(tier.name, [one.key]).get(one.key)
            if known is None or not known.verified or (known.n_bytes, known.crc32c) != (one.n_bytes, one.crc32c):
                continue
            asked = PlannedObject(one.key, one.n_bytes, known.etag, None, one.crc32c)
            with suppress(StoreError):  # what is to be told is what befell src
                return tier.name, sight.transfer.copy(tier.name, dst, asked, on_bytes=self._on_bytes, replaces=replaces)
        raise spoilt

    def _note(self, job: Job, one: JournalObject, copy: KnownCopy, n_bytes: int, *, of_source: bool = True) -> None:
        """Put a verified copy on the books, and its source if it is of it: they were read whole, and were equal.

        The copy is as old as the object that it is of, also when its source is gone.
        """
        books = self._sight.catalog
        source = books.known(job.row.src, [one.key]).get(one.key)
        came_from = source.made_from if source is not None and source.etag == one.etag else ""
        first_s = first_written_s(one, source)
        copy = copy._replace(written_s=earliest(copy.written_s, first_s))
        pair = [(job.row.dst, one.key, copy)]
        if of_source and one.etag is not None:
            pair.append((job.row.src, one.key, KnownCopy(one.n_bytes, one.etag, copy.crc32c, came_from, first_s)))
        if copy.n_bytes >= _AT_ONCE_BYTES:
            books.record(pair)
            pair = []
        with job.lock:
            job.n_bytes += n_bytes
            job.made.extend(pair)

    def _is_there(self, job: Job, one: JournalObject, info: ObjectInfo) -> bool:
        """Whether what lies in dst is an equal copy; where it is another object that may not go, the job is stopped."""
        sight, dst = self._sight, job.row.dst
        known = sight.catalog.known(dst, [one.key]).get(one.key)
        expected = self._source_sum(job, one)
        is_cold = state_of(info) in (ARCHIVED, RESTORING)
        if info.n_bytes == one.n_bytes and expected is not None:
            found = sight.sum_of(dst, info, known)
            # What cannot be read is known by the store's own word alone.
            if expected == (info.crc32c if found is None else found):
                same = known if known is not None and known.verified and is_same(info, known) else None
                came_from, first_s = ("", None) if same is None else (same.made_from, same.written_s)
                copy = KnownCopy(info.n_bytes, info.etag, expected, came_from, first_s)
                return self._found(job, one, copy, is_new=same is None)
        if known is not None and known.made_from == job.row.src_place:
            is_size = known.n_bytes == info.n_bytes == one.n_bytes
            if known.is_intended and is_size and is_cold:  # what can be read is compared, and another's
                if _is_by_etag(info, one):
                    copy = KnownCopy(info.n_bytes, info.etag, None, job.row.src_place)
                    return self._found(job, one, copy, is_new=True)
                if self._may_make_again(job, one, info):
                    return False
            if is_same(info, known) and len(job.row.objects) == 1:
                return False  # a copy of what src was before: it may be replaced
        where = f"{sight.stores.store(dst).url}/{one.key}"
        archived = ", which must be restored before it can be compared" if is_cold else ""
        job.stop(
            f"{where}: expected nothing there, or a copy of the {one.n_bytes} bytes in {job.row.src}; found another "
            f"object of {info.n_bytes} bytes{archived}: it is not overwritten, remove or rename one of the two"
        )
        return False

    def _found(self, job: Job, one: JournalObject, copy: KnownCopy, *, is_new: bool) -> Literal[True]:
        """Note that a copy lies in dst already."""
        if is_new:
            self._begin_anew(job)
        self._note(job, one, copy, 0)
        self._on_bytes(one.n_bytes)
        return True

    def _may_make_again(self, job: Job, one: JournalObject, info: ObjectInfo) -> bool:
        """Whether src may take the place of an archived copy that a killed process has left, and nobody has verified.

        Where the store says a checksum of it, that is not src's: then one of the two is wrong, and perhaps src::

            1. It is copied, and the process is killed. 2. src rots. 3. What is in dst is the last of its bytes.

        So src must have been written anew since, and the group not look whole in dst: a part that is replaced may fail.
        """
        if info.crc32c is None:
            return True
        if one.modified_s is None or info.modified_s is None or one.modified_s <= info.modified_s + _SKEW_S:
            return False
        objects = job.row.objects
        return len(objects) == 1 or self._sight.head(job.row.dst, objects[-1].key) is None

    def _source_sum(self, job: Job, one: JournalObject) -> int | None:
        """The CRC-32C that a copy must have; None where nothing says it and src cannot be read."""
        if one.crc32c is not None:
            return one.crc32c
        sight, src = self._sight, job.row.src
        info = sight.head(src, one.key)
        if info is None or sight.moved(src, info, one):
            return None
        return sight.sum_of(src, info, sight.catalog.known(src, [one.key]).get(one.key))

    def _change_class(self, job: Job, one: JournalObject) -> None:
        sight, dst = self._sight, job.row.dst
        info = sight.head(dst, one.key)
        # Of an earlier try that was killed: another ETag may be what its change of class left.
        if info is not None and info.n_bytes == one.n_bytes and has_class(sight, dst, info):
            return
        known = sight.catalog.known(dst, [one.key]).get(one.key)
        changed = sight.transfer.reclass(dst, as_planned(one))
        reach("tier_move.class_changed")
        if (copy := as_reclassed(one, known, changed)) is not None:
            with job.lock:
                job.made.append((dst, one.key, copy))


def _is_by_etag(info: ObjectInfo, one: JournalObject) -> bool:
    """Whether an ETag alone says that a copy is src, as it does of copies by a server that knows no checksum.

    1. It is copied, and the process is killed. 2. src rots, under its old ETag. 3. What is in dst is the last of its
    bytes: made again, it would be overwritten first, and compared then.
    """
    has_sum = info.crc32c is not None or one.crc32c is not None
    return not has_sum and info.etag is not None and info.etag == one.etag and is_md5(info.etag)


def has_class(sight: Sight, tier: str, info: ObjectInfo) -> bool:
    """Whether an object has the class of a tier already."""
    return (info.storage_class or "STANDARD") == sight.stores.class_of(tier)
