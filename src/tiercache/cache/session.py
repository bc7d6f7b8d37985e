"""`CacheSession`: the cache as one process has it open, and `WriteSession`, the parts that change its folder.

Hits need only the folder; evictor, publisher, fetch threads and accounts exist only if the folder is writable. A forked
child opens its own session.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from tiercache import config
from tiercache.cache import corrupt_sources
from tiercache.cache import folder as folder_module
from tiercache.cache.evict.evictor import Evictor, EvictorOptions
from tiercache.cache.evict.policy import POLICIES
from tiercache.cache.evict.reading_plans import ReadingPlans
from tiercache.cache.fetch.download import Fetcher
from tiercache.cache.fetch.partial import CopyHandle, hold_part, read_plain, read_verified, wrong_units
from tiercache.cache.fetch.publish import Publisher
from tiercache.cache.fetch.units import bytes_of, read_checksum
from tiercache.cache.folder import Folder, Owners
from tiercache.cache.lease import CopyLease, open_leased
from tiercache.cache.machine import Breaker, NameLock, boot_id, is_disk_full, room
from tiercache.cache.simulate import Tracer
from tiercache.catalog import Accounts, charge_bytes
from tiercache.model import ByteRange, format_bytes, parse_bytes
from tiercache.waiting import SYSTEM_CLOCK

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import numpy as np
    import numpy.typing as npt

    from tiercache.cache.machine import Notices
    from tiercache.cache.names import CopySpec
    from tiercache.model import PublishedPlan, ReadingPlan
    from tiercache.stats import Counters
    from tiercache.store import Span, Store


class WriteSession:
    """The parts of an open cache that require a writable folder."""

    def __init__(
        self, folder: Folder, options: CacheOptions, counters: Counters, notices: Notices, *, keep: Callable[[], object]
    ) -> None:
        self.limit_bytes = parse_bytes(options.size, whole_bytes=room(folder.root).total_bytes)
        self.folder, self.notices = folder, notices
        self.owners = Owners(folder, self.limit_bytes)
        me = str(self.owners.me)
        self.accounts = Accounts(folder.catalog, me, self.owners, wal=folder.network is None, boot=boot_id())
        self.plans = ReadingPlans(folder, self.owners)
        rules = EvictorOptions(options.policy, options.min_free)
        self.evictor = Evictor(folder, self.accounts, counters, self.plans, rules)
        self.breaker = Breaker()
        self.publisher = Publisher(folder, self.owners, self.accounts, self.evictor, self.breaker, notices, counters)
        self.fetcher = Fetcher(self.publisher.run, keep)

    def sweep(self) -> None:
        """Remove the files of dead processes and records without copies, and make the accounts agree with the files."""
        self.owners.remove_files_of_dead()
        folder_module.sweep_temp_files(self.folder)
        self.accounts.reconcile()
        self.publisher.unrecorded |= self.accounts.unrecorded()
        sizes = self.folder.sizes()
        beside = {name for kind in (".json", ".map") for name in self.folder.names(kind)}
        doubtful = (beside - sizes.keys()) | set(self.folder.names(".part"))
        for name in doubtful:
            self._sweep_beside(name)
        if doubtful:
            self.accounts.reconcile()
        for path in self.folder.locks.iterdir():
            lock = NameLock(path)
            if lock.try_acquire():
                lock.release()
        self.folder.remove_quarantine()
        corrupt_sources.sweep_corrupt_sources(self.folder)

    def _sweep_beside(self, name: str) -> None:
        """Remove useless files beside a copy, or without one, unless the copy is being published at this moment.

        These are a partial copy whose copy is complete, its unit map if that is not kept, a partial copy or a unit map
        alone, and the record of a missing copy. The pin of a missing copy stays: a corrupt copy is pinned again when
        it is fetched again.
        """
        lock = NameLock(self.folder.locks / name)
        if lock.try_acquire():
            try:
                is_whole = self.folder.has_copy(name)
                if is_whole or not self.folder.has_part(name):
                    record = self.folder.read_record(name)
                    self.folder.remove_part(name, keep_map=is_whole and record is not None and record.shard_id is None)
                if self.folder.charge_of(name) is None and not self.accounts.is_reserved(name):
                    self.folder.remove_record(name)
                    self.accounts.remove([name])  # a partial copy without a map was in the accounts
            finally:
                lock.release()

    def keep_to_limit(self) -> None:
        """Register the size limit, and evict copies if the limit is smaller than before."""
        smallest = self.accounts.register(self.limit_bytes)
        self.folder.remember_size(self.limit_bytes)
        if smallest < self.limit_bytes:
            self.notices.warn(
                "limit",
                f"cache {self.folder.root}: opened with size {format_bytes(self.limit_bytes)}, but another process has "
                f"it open with {format_bytes(smallest)}; the smaller limit applies",
            )
        self.evictor.shrink()

    def close(self) -> None:
        """Stop the fetches, withdraw the plans, write the recorded uses, and remove the owner file."""
        self.fetcher.close()
        self.plans.close()
        for last in (self.evictor.flush_uses, self.accounts.unregister):
            with suppress(OSError):
                last()
        self.accounts.close()
        self.owners.close()


USES_PER_FLUSH = 1024
# Limit of remembered prefetches whose copies were not opened yet. A prefetch runs a few hundred shards ahead at most.
MOST_AHEAD = 65_536


@dataclass(frozen=True, slots=True)
class CacheOptions:
    """The arguments of Cache.

    Attributes:
        path: Folder of the cache.
        size: Size limit: a number of bytes, "200GB", or "80%" of the disk.
        policy: Name of the eviction policy.
        min_free: Disk space that stays free.
        shared: "group": The folder's group may read the copies, and a folder of another user is trusted. None: The mode
            of the folder decides.
    """

    path: Path
    size: int | str
    policy: str = "plan"
    min_free: int | str = "5%"
    shared: Literal["group"] | None = None

    def __post_init__(self) -> None:
        """Check the values. Raises ValueError or TypeError."""
        parse_bytes(self.size, whole_bytes=1)
        parse_bytes(self.min_free, whole_bytes=1)
        if self.policy not in POLICIES:
            raise ValueError(f"no policy is called {self.policy!r}; there are {', '.join(sorted(POLICIES))}")
        if self.shared not in (None, "group"):
            raise ValueError(f"shared is None or 'group', got {self.shared!r}")


class CacheSession:
    """An open cache in one process. A forked child opens its own.

    Attributes:
        writing: The parts that change the cache; None if the folder can only be read. Then only hits are served.
        waits_for_disk_space: Whether the folder could not be opened for writing because the disk was full.
    """

    def __init__(
        self, options: CacheOptions, counters: Counters, notices: Notices, *, keep: Callable[[], object]
    ) -> None:
        """Open the folder, sweep it, and register this process.

        Args:
            options: Arguments of the cache.
            counters: Counters of this process.
            notices: Warnings that are given once.
            keep: See Fetcher.

        Raises:
            ValueError, OSError: The folder cannot be used as a cache.
        """
        self.pid = os.getpid()
        self._distrusted: set[str] = set()
        # Partial copies that a reader found corrupt although the disk holds what the source sent; and those for which
        # that happened twice, with the time.
        self._suspected: set[str] = set()
        self._given_up: dict[str, float] = {}
        self._ahead: dict[str, bool] = {}  # requested by fetch_ahead() and not opened since
        self.folder = Folder(options.path, shared=options.shared)
        self.notices, self.counters = notices, counters
        self._tracer = self._open_trace(config.load().cache_trace)
        self.writing: WriteSession | None = None
        self.waits_for_disk_space = False
        self._open_to_write = partial(self._open_writing, options, keep)
        if self.folder.network:
            notices.warn(
                "network",
                f"cache {options.path}: is on {self.folder.network}, which other machines share; this machine uses "
                f"only the subfolder {self.folder.root.name}; a local disk is faster",
            )
        if self.folder.owner is not None:
            notices.warn("read-only", f"cache {options.path}: shared by {self.folder.owner}; no copies are added")
            return
        try:
            self.writing = self._open_to_write()
        except OSError as error:
            if not (self.folder.copies).is_dir():
                raise
            notices.warn("read-only", f"cache {options.path}: cannot be written ({error}); no copies are added")
            self.waits_for_disk_space = is_disk_full(error)

    def _open_trace(self, path: Path | None) -> Tracer | None:
        try:
            return None if path is None else Tracer(path)
        except OSError as error:
            self.notices.warn("trace", f"cache {self.folder.root}: no trace is written to {path}: {error}")
            return None

    def retry_writing(self) -> None:
        """Try again to open the cache for writing, after the disk was full when it was opened first."""
        with suppress(OSError):
            self.writing = self._open_to_write()
            self.waits_for_disk_space = False

    def _open_writing(self, options: CacheOptions, keep: Callable[[], object]) -> WriteSession:
        writing = WriteSession(self.folder, options, self.counters, self.notices, keep=keep)
        try:
            writing.sweep()
            writing.keep_to_limit()
        except BaseException:
            writing.close()
            raise
        return writing

    # -- cached copies -------------------------------------------------------------------------------------------------

    def hit(self, name: str, n_bytes: int) -> CopyLease | None:
        """Return a lease on a whole copy; None: a miss.

        SQLite is used only to flush the recorded uses after USES_PER_FLUSH copies.
        """
        lease = self.look(name, n_bytes)
        if lease is not None:
            self._note_use(name)
        return lease

    def _note_use(self, name: str) -> None:
        writing = self.writing
        if writing is None:
            return
        try:
            # A prefetched copy is used for the first time by this opening, like a copy that is fetched during an
            # opening.
            if writing.evictor.note_use(name, 0 if name in self._ahead else 1) >= USES_PER_FLUSH:
                writing.evictor.flush_uses()
        except OSError as error:
            writing.publisher.disk_failed(error)

    def look(self, name: str, n_bytes: int) -> CopyLease | None:
        """Return a lease like hit(), without recording a use of the copy."""
        writing = self.writing
        if name in self._distrusted or (writing is not None and name in writing.publisher.unrecorded):
            return None
        try:
            fd = open_leased(self.folder, name, n_bytes)
        except OSError as error:
            self._disk_failed(error)
            return None
        if fd is None:
            return None
        if writing is not None and writing.breaker.is_open:
            writing.breaker.mend()
        return CopyLease(n_bytes, CopyHandle(fd))

    def _look_at_part(self, wanted: CopySpec) -> CopyHandle | None:
        """Return an open partial copy; None: there is none."""
        if wanted.name in self._distrusted:
            return None
        try:
            return hold_part(self.folder, wanted.name, wanted.n_bytes)
        except OSError as error:
            self._disk_failed(error)
            return None

    def _disk_failed(self, error: Exception) -> None:
        if self.writing is not None:
            self.writing.publisher.disk_failed(error)

    def is_cached(self, wanted: CopySpec, ranges: Sequence[ByteRange] | None = None) -> bool:
        """Return whether these ranges of a copy are cached; None stands for the whole copy.

        It is not recorded as a use.
        """
        if self.folder.size_of(wanted.name) == wanted.n_bytes:
            return True
        held = None if ranges is None else self._look_at_part(wanted)
        if held is None or ranges is None:
            return False
        try:
            return held.presence is None or held.presence.covers(ranges)
        finally:
            held.close()

    def peek(self, wanted: CopySpec, ranges: Sequence[ByteRange]) -> CopyLease | None:
        """Return a lease on a whole or partial copy that has all of the ranges; None: there is none."""
        lease = self.hit(wanted.name, wanted.n_bytes)
        if lease is None:
            held = self._look_at_part(wanted)
            lease = None if held is None else CopyLease(wanted.n_bytes, held)
        if lease is None or lease.present(ranges):
            return lease
        lease.close()
        return None

    def read(self, wanted: CopySpec, spans: Sequence[Span]) -> bool:
        """Fill spans from the cached copy; return False if it is missing, or if it is corrupt (it is then removed).

        The copy of an object without identity has no checksums inside; each unit is verified against the unit map.
        """
        lease = self.peek(wanted, [span for span, _ in spans])
        if lease is None:
            return False
        with lease:
            if wanted.identity is not None:
                return read_plain(lease.fd, spans)
            if read_verified(self.folder, wanted.name, lease.fd, wanted.n_bytes, spans):
                return True
            is_whole = lease.is_whole
        if is_whole:
            self.verify_copy(wanted)
        else:
            self._verify_partial_copy(wanted)
        return False

    # -- fetches -------------------------------------------------------------------------------------------------------

    def open(self, wanted: CopySpec, store: Store, tell: Callable[[bool], object] = bool) -> CopyLease | None:
        """Return a lease on a copy that is cached or will be fetched; None: bypass the cache."""
        writing = self.writing
        if writing is None or writing.breaker.allows():
            lease = self.hit(wanted.name, wanted.n_bytes)
            if lease is not None:
                self._count(wanted, tell, wanted.n_bytes)
                return lease
            if not self._is_bad(wanted.name):
                lease = self._open_part(wanted, store, tell)
                if lease is not None:
                    return lease
        self._count(wanted, tell, 0)
        return None

    def _open_part(self, wanted: CopySpec, store: Store, tell: Callable[[bool], object]) -> CopyLease | None:
        """Return a lease on a partial copy or on a future one; None: there is no partial copy and no space for one.

        A partial copy counts as a hit or a miss when its reader asks for the first ranges.
        """
        held, writing = self._look_at_part(wanted), self.writing
        if held is None and (writing is None or not self._admits(writing, wanted)):
            return None
        join = None if writing is None else partial(writing.fetcher.join, wanted, store)
        if held is None:
            self._count(wanted, tell, 0)
            return CopyLease(wanted.n_bytes, join=join)
        self._note_use(wanted.name)
        presence = held.presence

        def tell_when_asked(is_here: bool) -> None:
            there = 0 if presence is None or not is_here else bytes_of(presence.mask(), wanted.n_bytes)
            self._count(wanted, tell, there)

        return CopyLease(wanted.n_bytes, held, join=join, tell=tell_when_asked)

    def _count(self, wanted: CopySpec, tell: Callable[[bool], object], hit_bytes: int) -> None:
        """Count a hit of hit_bytes, or a miss if that is 0. An empty copy is a hit if its file exists.

        A copy that this process prefetched for this opening came from the store: it counts as a miss that took no time.
        """
        is_here, is_ours = hit_bytes > 0 or wanted.n_bytes == 0, self._ahead.pop(wanted.name, False)
        is_hit = is_here and not is_ours
        if is_here and is_ours:
            self.counters.add("prefetched")
        if is_hit:
            self.counters.add("hits")
            self.counters.add("bytes_hit", hit_bytes)
        else:
            self.counters.add("misses")
        if self._tracer is not None:
            self._trace(wanted, is_hit=is_hit)
        tell(is_hit)

    def _trace(self, wanted: CopySpec, *, is_hit: bool) -> None:
        tracer = self._tracer
        try:
            if tracer is not None:
                tracer.add(wanted.name, wanted.n_bytes, hit=is_hit)
        except OSError as error:
            self._tracer = None
            self.notices.warn("trace", f"cache {self.folder.root}: the trace ends here: {error}")

    def fetch_ahead(self, wanted: CopySpec, store: Store, ranges: Sequence[ByteRange] | None = None) -> None:
        """Start to fetch what is missing of ranges (None: of the whole copy). It is not recorded as a use."""
        writing = self.writing
        if (
            writing is None
            or not writing.breaker.allows()
            or self.is_cached(wanted, ranges)
            or self._is_bad(wanted.name)
        ):
            return
        asked = [ByteRange(0, wanted.n_bytes)] if ranges is None else list(ranges)
        need_bytes = wanted.n_bytes if ranges is None else sum(one.n_bytes for one in asked)
        if self._admits(writing, wanted, need_bytes):
            if len(self._ahead) >= MOST_AHEAD:
                self._ahead.clear()
            self._ahead[wanted.name] = True
            writing.fetcher.prefetch(wanted, store, asked)

    def _admits(self, writing: WriteSession, wanted: CopySpec, need_bytes: int | None = None) -> bool:
        need_bytes = wanted.n_bytes if need_bytes is None else need_bytes
        try:
            writing.owners.ensure()  # a deleted folder cannot be asked for its free space
            coming = writing.fetcher.is_fetching(wanted.name) or wanted.name in writing.publisher.unrecorded
            if coming or not writing.evictor.would_refuse(wanted.name, charge_bytes(need_bytes)):
                return True
            if wanted.identity is None:
                self._tell_if_too_large(wanted, need_bytes, writing.accounts.limit_bytes())
            else:
                writing.publisher.warn_no_space(wanted, charge_bytes(need_bytes))
        except OSError as error:
            writing.publisher.disk_failed(error)
        return False

    def _tell_if_too_large(self, wanted: CopySpec, need_bytes: int, limit_bytes: int) -> None:
        """Warn once about an object for which no eviction can make space."""
        if charge_bytes(need_bytes) > limit_bytes:
            self.notices.warn(
                "too-large",
                f"cache {self.folder.root}: {wanted.source} ({format_bytes(need_bytes)}) is larger than the whole "
                f"cache ({format_bytes(limit_bytes)}): it is not cached and is fetched on every read, like all larger "
                "objects; a larger cache (TIERCACHE_CACHE_SIZE, or Cache(path, size=...)) avoids that",
            )

    def publish(self, names: npt.NDArray[np.uint8], plan: ReadingPlan) -> PublishedPlan | None:
        """Publish a reading plan to all users of the folder; return None if the folder cannot be written."""
        try:
            return None if self.writing is None else self.writing.plans.publish(names, plan)
        except OSError as error:
            self.notices.warn("plan", f"cache {self.folder.root}: a reading plan cannot be published ({error})")
            return None

    # -- corrupt copies ------------------------------------------------------------------------------------------------

    def _is_bad(self, name: str) -> bool:
        """Return whether the object is known to be corrupt at its source."""
        given_up_s = self._given_up.get(name)
        if given_up_s is not None and SYSTEM_CLOCK.monotonic() - given_up_s < corrupt_sources.POISON_S:
            return True
        return corrupt_sources.corrupt_source_of(self.folder, name) is not None

    def discard(self, name: str) -> None:
        """Remove a corrupt copy. If it cannot be removed, this process never serves it again."""
        try:
            if self.writing is not None:
                self.writing.publisher.remove(name)
                return
        except OSError as error:
            self.notices.warn("discard", f"cache {self.folder.root}: a corrupt copy cannot be removed: {error}")
        self._distrusted.add(name)

    def verify_copy(self, wanted: CopySpec) -> bool:
        """Verify a copy that a reader found corrupt; return False if it is what the source sent.

        A corrupt copy is removed. If the disk does not allow the check, the copy is removed too, or at least not served
        by this process again.
        """
        try:
            fd = self.folder.open_copy(wanted.name)
            if fd is None:
                return self._verify_partial_copy(wanted)
            try:
                record = self.folder.read_record(wanted.name)
                expected = wanted.crc32c if wanted.crc32c is not None or record is None else record.crc32c
                found, offset, _ = read_checksum(fd, wanted.n_bytes)
                if offset == wanted.n_bytes == os.fstat(fd).st_size and found == expected:
                    return False
                self.remove_corrupt(wanted.name, fd)
            finally:
                os.close(fd)
        except OSError:
            self.discard(wanted.name)
        return True

    def remove_corrupt(self, name: str, fd: int) -> bool:
        """Remove the corrupt copy that fd is open on; return False if it is gone, or the folder is read-only.

        In a read-only folder, this process does not serve the copy any more.
        """
        if self.writing is None:
            self.discard(name)
            return False
        return self.writing.publisher.remove_corrupt(name, fd)

    def _verify_partial_copy(self, wanted: CopySpec) -> bool:
        """Handle a partial copy that a reader found corrupt; return True if it was removed and can be opened again.

        A partial copy has no checksum of the whole. If the disk holds what the source sent, the transfer may have
        failed, so the copy is fetched once more. If the reader finds it corrupt again, the object is corrupt at its
        source: the result is False, and the object is read from the store for some time.
        """
        held = self._look_at_part(wanted)
        if held is None:
            return True
        try:
            wrong = [] if held.presence is None else wrong_units(held.fd, held.presence)
        finally:
            held.close()
        is_bad_there = not wrong and wanted.name in self._suspected
        self._suspected.discard(wanted.name)
        with suppress(OSError):  # a full disk: no other process is informed
            if is_bad_there:
                self._given_up[wanted.name] = SYSTEM_CLOCK.monotonic()
                self.counters.add("poisoned")
                if self.writing is not None:
                    corrupt = corrupt_sources.CorruptSource(wanted.source, wanted.crc32c, None)
                    corrupt_sources.record_corrupt_source(self.folder, wanted.name, corrupt)
            elif not wrong:
                self._suspected.add(wanted.name)
            else:
                self.counters.add("quarantined")
        if self.writing is not None:
            self.writing.fetcher.abandon(wanted.name)
        self.discard(wanted.name)
        return not is_bad_there

    def close(self) -> None:
        """Close the traces and the parts that write.

        In a forked child, only the trace: the rest belongs to the parent.
        """
        tracer, self._tracer = self._tracer, None
        if tracer is not None:
            tracer.close()
        if self.writing is not None and self.pid == os.getpid():
            self.writing.close()
