"""What one process has of an open cache: owner file, accounts, fetch threads. A forked child makes its own."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from tiercache import config
from tiercache.cache import poison
from tiercache.cache.check import distrust
from tiercache.cache.folder import Folder
from tiercache.cache.lease import CopyLease, open_leased
from tiercache.cache.machine import is_disk_full
from tiercache.cache.partial import Held, hold_part, wrong_units
from tiercache.cache.policy import POLICIES
from tiercache.cache.trace import Tracer
from tiercache.cache.units import bytes_of
from tiercache.cache.verified import read_plain, read_verified
from tiercache.cache.writing import Writing
from tiercache.catalog import charge_bytes
from tiercache.model import ByteRange, format_bytes, parse_bytes
from tiercache.waiting import SYSTEM_CLOCK

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import numpy as np
    import numpy.typing as npt

    from tiercache.cache.notices import Notices
    from tiercache.cache.record import Wanted
    from tiercache.model import Following, ReadingPlan
    from tiercache.stats import Counters
    from tiercache.store import Span, Store

USES_PER_FLUSH = 1024
# Copies that were fetched ahead and are not opened yet: a prefetch runs some hundred shards ahead at most.
MOST_AHEAD = 65_536


@dataclass(frozen=True, slots=True)
class CacheOptions:
    """How a cache was asked for. size: bytes, "200GB" or "80%" of the disk; free_floor: what stays free of the disk.

    shared: "group": the folder's group may read it, and somebody else's folder is trusted; None: as the folder is.
    """

    path: Path
    size: int | str
    policy: str = "plan"
    free_floor: str = "5%"
    shared: Literal["group"] | None = None

    def __post_init__(self) -> None:
        """Raises ValueError or TypeError for what cannot be."""
        parse_bytes(self.size, whole_bytes=1)
        parse_bytes(self.free_floor, whole_bytes=1)
        if self.policy not in POLICIES:
            raise ValueError(f"no policy is called {self.policy!r}; there are {', '.join(sorted(POLICIES))}")
        if self.shared not in (None, "group"):
            raise ValueError(f"shared is None or 'group', got {self.shared!r}")


class Opened:
    """An open cache in one process. writing: None where the folder can only be read: then only hits are served."""

    def __init__(
        self, options: CacheOptions, counters: Counters, notices: Notices, *, keep: Callable[[], object]
    ) -> None:
        """Open the folder, sweep it, and register. keep: see Fetcher.

        Raises:
            ValueError, OSError: it cannot be a cache's folder.
        """
        self.pid = os.getpid()
        self._distrusted: set[str] = set()
        # Parts that were found wrong though the disk holds what was sent; those of which a second one was, and when.
        self._suspected: set[str] = set()
        self._given_up: dict[str, float] = {}
        self._ahead: dict[str, bool] = {}  # asked for by fetch_ahead(), and not opened since
        self.folder = Folder(options.path, shared=options.shared)
        self.notices, self.counters = notices, counters
        self._tracer = self._open_trace(config.load().cache_trace)
        self.writing: Writing | None = None
        self.waits_for_room = False
        self._open_to_write = partial(self._open_writing, options, keep)
        if self.folder.network:
            notices.warn(
                "network",
                f"cache {options.path}: lies on {self.folder.network}, which other machines share; using the folder "
                f"{self.folder.root.name} of this machine alone. A local disk is faster",
            )
        if self.folder.owner is not None:
            notices.warn("read-only", f"cache {options.path}: shared by {self.folder.owner}; serving what it holds")
            return
        try:
            self.writing = self._open_to_write()
        except OSError as error:
            if not (self.folder.copies).is_dir():
                raise
            notices.warn("read-only", f"cache {options.path}: cannot be written ({error}); serving what it holds")
            self.waits_for_room = is_disk_full(error)

    def _open_trace(self, path: Path | None) -> Tracer | None:
        try:
            return None if path is None else Tracer(path)
        except OSError as error:
            self.notices.warn("trace", f"cache {self.folder.root}: no trace is written to {path}: {error}")
            return None

    def write_after_all(self) -> None:
        """Try again to open what needs a folder that can be written: the disk was full when the cache was opened."""
        with suppress(OSError):
            self.writing = self._open_to_write()
            self.waits_for_room = False

    def _open_writing(self, options: CacheOptions, keep: Callable[[], object]) -> Writing:
        writing = Writing(self.folder, options, self.counters, self.notices, keep=keep)
        try:
            writing.sweep()
            writing.keep_to_limit()
        except BaseException:
            writing.close()
            raise
        return writing

    # -- what is here -----------------------------------------------------------------------------------------------

    def hit(self, name: str, n_bytes: int) -> CopyLease | None:
        """A lease on a whole copy that is there; None: a miss. No SQLite but a flush after USES_PER_FLUSH copies."""
        lease = self.look(name, n_bytes)
        if lease is not None:
            self._note_use(name)
        return lease

    def _note_use(self, name: str) -> None:
        writing = self.writing
        if writing is None:
            return
        try:
            # What was fetched ahead for this opening is used by it for the first time, as what is fetched by it is.
            if writing.evictor.note_use(name, 0 if name in self._ahead else 1) >= USES_PER_FLUSH:
                writing.evictor.flush_uses()
        except OSError as error:
            writing.publisher.disk_failed(error)

    def look(self, name: str, n_bytes: int) -> CopyLease | None:
        """As hit(), but no use of the copy."""
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
        return CopyLease(n_bytes, Held(fd))

    def _look_at_part(self, wanted: Wanted) -> Held | None:
        """A hold on the part of a copy that is there."""
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

    def is_here(self, wanted: Wanted, ranges: Sequence[ByteRange] | None = None) -> bool:
        """Whether these ranges of a copy are there; None: all of it. It counts as no use."""
        if self.folder.size_of(wanted.name) == wanted.n_bytes:
            return True
        held = None if ranges is None else self._look_at_part(wanted)
        if held is None or ranges is None:
            return False
        try:
            return held.presence is None or held.presence.covers(ranges)
        finally:
            held.close()

    def peek(self, wanted: Wanted, ranges: Sequence[ByteRange]) -> CopyLease | None:
        """A lease on what is there, if that is all of ranges."""
        lease = self.hit(wanted.name, wanted.n_bytes)
        if lease is None:
            held = self._look_at_part(wanted)
            lease = None if held is None else CopyLease(wanted.n_bytes, held)
        if lease is None or lease.present(ranges):
            return lease
        lease.close()
        return None

    def read(self, wanted: Wanted, spans: Sequence[Span]) -> bool:
        """Fill spans from what is there; False: it is not, or is wrong, and then gone.

        What has no identity has no checksums inside either: each unit is held against the map.
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
            distrust(self, wanted)
        else:
            self.distrust_part(wanted)
        return False

    # -- what is to come --------------------------------------------------------------------------------------------

    def open(self, wanted: Wanted, store: Store, tell: Callable[[bool], object] = bool) -> CopyLease | None:
        """A lease on a copy, there or to come; None: read past the cache. tell: told whether it is a hit, once."""
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

    def _open_part(self, wanted: Wanted, store: Store, tell: Callable[[bool], object]) -> CopyLease | None:
        """A lease on a part, or on nothing yet; None: there is neither that nor room for it.

        Whether a part is a hit shows when its reader asks for the first ranges.
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

    def _count(self, wanted: Wanted, tell: Callable[[bool], object], hit_bytes: int) -> None:
        """Count a hit of so many bytes, or a miss; of an empty copy it is a hit if its file is there.

        What this process has fetched ahead for this very opening came from the store: it is a miss, that cost no time.
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

    def _trace(self, wanted: Wanted, *, is_hit: bool) -> None:
        tracer = self._tracer
        try:
            if tracer is not None:
                tracer.add(wanted.name, wanted.n_bytes, hit=is_hit)
        except OSError as error:
            self._tracer = None
            self.notices.warn("trace", f"cache {self.folder.root}: the trace ends here: {error}")

    def fetch_ahead(self, wanted: Wanted, store: Store, ranges: Sequence[ByteRange] | None = None) -> None:
        """Start fetching what is not here of ranges (None: all). Nobody waits for it, and it counts as no use."""
        writing = self.writing
        if writing is None or not writing.breaker.allows() or self.is_here(wanted, ranges) or self._is_bad(wanted.name):
            return
        asked = [ByteRange(0, wanted.n_bytes)] if ranges is None else list(ranges)
        need_bytes = wanted.n_bytes if ranges is None else sum(one.n_bytes for one in asked)
        if self._admits(writing, wanted, need_bytes):
            if len(self._ahead) >= MOST_AHEAD:
                self._ahead.clear()
            self._ahead[wanted.name] = True
            with CopyLease(wanted.n_bytes, join=partial(writing.fetcher.join, wanted, store)) as lease:
                lease.want(asked)

    def _admits(self, writing: Writing, wanted: Wanted, need_bytes: int | None = None) -> bool:
        need_bytes = wanted.n_bytes if need_bytes is None else need_bytes
        try:
            writing.owners.ensure()  # of a deleted folder one cannot ask how much room it has
            writing.quarantine.settle()
            coming = writing.fetcher.is_coming(wanted.name) or wanted.name in writing.publisher.unrecorded
            if coming or not writing.evictor.would_refuse(wanted.name, charge_bytes(need_bytes)):
                return True
            if wanted.identity is None:
                self._tell_if_too_large(wanted, need_bytes, writing.accounts.limit_bytes())
            else:
                writing.publisher.tell_of_no_room(wanted, charge_bytes(need_bytes))
        except OSError as error:
            writing.publisher.disk_failed(error)
        return False

    def _tell_if_too_large(self, wanted: Wanted, need_bytes: int, limit_bytes: int) -> None:
        """Warn once of an object that no eviction makes room for."""
        if charge_bytes(need_bytes) > limit_bytes:
            self.notices.warn(
                "too-large",
                f"cache {self.folder.root}: {wanted.source} has {format_bytes(need_bytes)}, more than all of the cache "
                f"({format_bytes(limit_bytes)}): it is read past the cache and fetched each time, as is all that is "
                "larger; a larger cache (TIERCACHE_CACHE_SIZE, or Cache(path, size=...)) avoids that",
            )

    def publish(self, names: npt.NDArray[np.uint8], plan: ReadingPlan) -> Following | None:
        """Let all who use the folder know when this job reads which copies; None: it is only read. Raises OSError."""
        return None if self.writing is None else self.writing.plans.publish(names, plan)

    # -- what is wrong ----------------------------------------------------------------------------------------------

    def _is_bad(self, name: str) -> bool:
        """Whether the object is known to be bad at its source."""
        given_up_s = self._given_up.get(name)
        if given_up_s is not None and SYSTEM_CLOCK.monotonic() - given_up_s < poison.POISON_S:
            return True
        return poison.poison_of(self.folder, name) is not None

    def discard(self, name: str) -> None:
        """Remove a copy that is wrong; where it cannot be removed it is never served by this process again."""
        try:
            if self.writing is not None:
                self.writing.publisher.remove(name)
                return
        except OSError as error:
            self.notices.warn("discard", f"cache {self.folder.root}: a damaged copy cannot be removed: {error}")
        self._distrusted.add(name)

    def distrust_part(self, wanted: Wanted) -> bool:
        """Hear that a reader found a part of a copy wrong. True: it is gone, open it again.

        A part has no checksum of the whole. Where the disk holds what was sent, sending may have gone wrong, so it is
        fetched once more; found wrong again (False) it is bad at its source, and read past the cache for a while.
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
        with suppress(OSError):  # a full disk: nobody else hears of it
            if is_bad_there:
                self._given_up[wanted.name] = SYSTEM_CLOCK.monotonic()
                self.counters.add("poisoned")
                self._remember_poison(wanted)
            elif not wrong:
                self._suspected.add(wanted.name)
            else:
                self.counters.add("quarantined")
                self._report_part(wanted, wrong)
        if self.writing is not None:
            self.writing.fetcher.abandon(wanted.name)
        self.discard(wanted.name)
        return not is_bad_there

    def _remember_poison(self, wanted: Wanted) -> None:
        if self.writing is not None:
            poison.remember(self.folder, wanted.name, poison.Poison(wanted.source, wanted.crc32c, None))

    def _report_part(self, wanted: Wanted, wrong: list[int]) -> None:
        """Say which units rotted. The part is not kept: unit by unit its map has said already what differs."""
        if self.writing is not None:
            verdict = f"{len(wrong):,} units of 4 KiB are not what was fetched, the first at {wrong[0]}"
            reason = "a reader found it wrong; a copy in part"
            self.writing.quarantine.tell(wanted.name, wanted.n_bytes, reason=reason, verdict=verdict)

    def close(self) -> None:
        """Give everything back. In a forked child: nothing, it is the parent's."""
        tracer, self._tracer = self._tracer, None
        if tracer is not None:
            tracer.close()
        if self.writing is not None and self.pid == os.getpid():
            self.writing.close()
