"""`WriteSession`: the parts of an open cache that change its folder: owner file, accounts, evictor, threads."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from tiercache.cache import leftovers, poison
from tiercache.cache.breaker import Breaker
from tiercache.cache.evictor import Evictor, EvictorOptions
from tiercache.cache.fetch import Fetcher
from tiercache.cache.locks import NameLock
from tiercache.cache.machine import boot_id, room
from tiercache.cache.owners import Owners
from tiercache.cache.plans import ReadingPlans
from tiercache.cache.publisher import Publisher
from tiercache.cache.quarantine import Quarantine
from tiercache.catalog import Accounts
from tiercache.model import format_bytes, parse_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from tiercache.cache.folder import Folder
    from tiercache.cache.notices import Notices
    from tiercache.cache.opened import CacheOptions
    from tiercache.stats import Counters


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
        rules = EvictorOptions(options.policy, options.free_floor)
        self.evictor = Evictor(folder, self.accounts, counters, self.plans, rules)
        self.quarantine = Quarantine(folder, self.owners, self.accounts, counters)
        self.breaker = Breaker()
        self.publisher = Publisher(
            folder, self.owners, self.accounts, self.evictor, self.quarantine, self.breaker, notices, counters
        )
        self.fetcher = Fetcher(self.publisher.run, keep)

    def sweep(self) -> None:
        """Remove the files of dead processes and records without copies, and make the accounts agree with the files."""
        self.owners.remove_files_of_dead()
        leftovers.sweep_temp_files(self.folder)
        self.accounts.reconcile()
        self.publisher.unrecorded |= self.accounts.unrecorded()
        sizes = self.folder.sizes()
        beside = {name for kind in (".json", ".pin", ".map") for name in self.folder.names(kind)}
        doubtful = (beside - sizes.keys()) | set(self.folder.names(".part"))
        for name in doubtful:
            self._sweep_beside(name)
        if doubtful:
            self.accounts.reconcile()
        for path in self.folder.locks.iterdir():
            lock = NameLock(path)
            if lock.try_acquire():
                lock.release()
        self.quarantine.sweep()
        poison.sweep_corrupt_sources(self.folder)

    def _sweep_beside(self, name: str) -> None:
        """Remove useless files beside a copy, or without one, unless the copy is being published at this moment.

        These are a partial copy whose copy is complete, its unit map if that is not kept, a partial copy or a unit map
        alone, and the record and the pin of a missing copy.
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
                    if not self.quarantine.knows(name):  # a corrupt copy stays pinned when it is fetched again
                        self.folder.unpin(name)
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
        for last in (self.quarantine.close, self.evictor.flush_uses, self.accounts.unregister):
            with suppress(OSError):
                last()
        self.accounts.close()
        self.owners.close()
