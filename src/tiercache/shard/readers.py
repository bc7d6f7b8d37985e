"""The pool of open shards of a data set, and a read plan that closes shards after their last read."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import numpy as np

from tiercache import descriptors
from tiercache.errors import CorruptShard, StoreError

if TYPE_CHECKING:
    from collections.abc import Callable

    from tiercache.model import PublishedPlan, ReadingPlan
    from tiercache.shard.mapped import MappedRecords
    from tiercache.shard.reader import ShardReader

# Largest number of open shards of one data set. Each holds a footer (some KiB to 100 KiB) and a mapping.
# descriptors.max_shard_descriptors() limits the file descriptors of all data sets of the process together.
MAX_READERS = 1024


class ReleasingPlan:
    """A published read plan that also closes each shard after its last read.

    An open shard is pinned in the cache. If the cache is smaller than the data set, the pinned shards leave no room for
    others.

    Args:
        following: Published plan that receives each call too.
        readers: Pool of the open shards.
        plan: Read plan, whose shards are numbers in the pool.
    """

    def __init__(self, following: PublishedPlan, readers: ReaderPool, plan: ReadingPlan) -> None:
        self._following = following
        self._readers = readers
        order = np.argsort(plan.last, kind="stable")
        self._shards, self._last = plan.shards[order], plan.last[order]
        self._n_done = 0

    def advance(self, clock: int) -> None:
        """See Following.advance."""
        self._following.advance(clock)
        n_done = int(np.searchsorted(self._last, clock, side="right"))
        for shard in self._shards[self._n_done : n_done].tolist():
            self._readers.drop(shard)
        self._n_done = max(n_done, self._n_done)

    def close(self) -> None:
        """See Following.close."""
        self._following.close()


class ReaderPool:
    """LRU pool of the open shards of a data set. Thread-safe. Reads through `mapped` do not count as uses.

    The lock is not held while a shard is opened: threads open different shards in parallel, and a second thread that
    wants the same shard waits at a lock for this shard. All pools of the process share one limit of file descriptors;
    when it is reached, the pool that holds most of them drops shards.
    """

    def __init__(self, opener: Callable[[int], ShardReader], mapped: MappedRecords) -> None:
        self._opener = opener
        self._mapped = mapped
        self._begin()
        _of_process[id(self)] = self

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._open: OrderedDict[int, tuple[ShardReader, int]] = OrderedDict()  # reader and its number of descriptors
        self.n_descriptors = 0
        self._gates: dict[int, threading.Lock] = {}
        self._mapped.clear()
        self._pid = os.getpid()  # last: a thread that sees the new pid takes the lock, which must be the new one

    def __contains__(self, shard: int) -> bool:
        return self._pid == os.getpid() and shard in self._open

    @property
    def capacity(self) -> int:
        """Largest number of shards that can be open at once."""
        return min(MAX_READERS, descriptors.max_shard_descriptors())

    def get(self, shard: int) -> ShardReader:
        """Return the reader of a shard, and open the shard if necessary. Raises as ShardReader."""
        # In a forked child process the leases belong to the parent, and the copied lock may be locked forever.
        if self._pid != os.getpid():
            self._begin()
        with self._lock:
            found = self._open.get(shard)
            if found is not None:
                self._open.move_to_end(shard)
                return found[0]
            gate = self._gates.setdefault(shard, threading.Lock())
        with gate:
            with self._lock:
                found = self._open.get(shard)
            if found is not None:
                return found[0]
            reader = self._open_shard(shard)
            self._keep(shard, reader)
        return reader

    def _open_shard(self, shard: int) -> ShardReader:
        try:
            return self._opener(shard)
        except StoreError as error:
            # Other files of the process use the descriptors that were meant for open shards: close half of the shards.
            if not error.facts.get("too_many_open") or not (descriptors.raise_limit() or _drop_half()):
                raise
        return self._opener(shard)

    def map_shard(self, shard: int) -> bool:
        """Make the records of a shard available through its mapping, for as long as its reader stays open.

        Returns:
            False if the shard has no mapping or is damaged. A read through the shard's reader then raises the error.
        """
        if shard in self._mapped:
            return True
        try:
            reader = self.get(shard)
            table = self._mapped.table(reader)
        except CorruptShard:
            return False
        if table is None:
            return False
        with self._lock:
            if self._open.get(shard, (None,))[0] is reader:
                self._mapped.put(shard, table)
        return True

    def drop(self, shard: int) -> None:
        """Remove a shard from the pool, so that the next get() opens it again. Reads in progress continue."""
        if self._pid == os.getpid():
            with self._lock:
                self._forget(shard)

    def drop_oldest(self) -> bool:
        """Remove the least recently used shard; in a forked child process, all shards of the parent.

        Returns:
            False if no shard is open.
        """
        if self._pid != os.getpid():
            self._begin()
            return True
        with self._lock:
            oldest = next(iter(self._open), None)
            if oldest is not None:
                self._forget(oldest)
        return oldest is not None

    def clear(self) -> None:
        """Remove all shards from the pool."""
        if self._pid == os.getpid():
            with self._lock:
                self._open.clear()
                self.n_descriptors = 0
                self._mapped.clear()

    def _forget(self, shard: int) -> None:
        # The reader is dropped and not closed, because another thread may be reading from it.
        _, n_descriptors = self._open.pop(shard, (None, 0))
        self.n_descriptors -= n_descriptors
        self._mapped.forget(shard)

    def _keep(self, shard: int, reader: ShardReader) -> None:
        with self._lock:
            self._gates.pop(shard, None)
            self._open[shard] = reader, reader.n_descriptors
            self.n_descriptors += self._open[shard][1]
            while len(self._open) > MAX_READERS:
                self._forget(next(iter(self._open)))
        n_descriptors = sum(readers.n_descriptors for readers in _all())
        descriptors.raise_limit_for(n_descriptors)
        _drop_to(descriptors.max_shard_descriptors())


# The pools of all data sets of this process, by id(): valuerefs() copies a dict in one step, whatever other threads
# add. There is no lock, because a fork could leave it locked.
_of_process: WeakValueDictionary[int, ReaderPool] = WeakValueDictionary()


def _all() -> list[ReaderPool]:
    return [readers for found in _of_process.valuerefs() if (readers := found()) is not None]


def _drop_to(n_descriptors: int) -> bool:
    """Drop shards until all pools together hold at most n_descriptors. Returns whether any shard was dropped."""
    has_dropped = False
    while sum(readers.n_descriptors for readers in _all()) > n_descriptors:
        if not max(_all(), key=lambda readers: readers.n_descriptors).drop_oldest():
            break
        has_dropped = True
    return has_dropped


def _drop_half() -> bool:
    return _drop_to(sum(readers.n_descriptors for readers in _all()) // 2)
