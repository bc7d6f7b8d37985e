"""The open shards of a data set."""

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

    from tiercache.model import Following, ReadingPlan
    from tiercache.shard.mapped import MappedRecords
    from tiercache.shard.reader import ShardReader

# Open shards of one data set: each holds its footer (some KiB to 100 KiB) and a mapping. Their descriptors are limited
# for all data sets of the process together, by descriptors.shard_share().
MAX_READERS = 1024


class Letting:
    """A published plan (`model.Following`) by which shards are let go when they have been read for the last time.

    A shard that is open is held in the cache: where the cache is smaller than the data set, nothing else has room.

    Args:
        following: what is told too.
        readers: whose shards they are.
        plan: of their numbers.
    """

    def __init__(self, following: Following, readers: Readers, plan: ReadingPlan) -> None:
        self._following = following
        self._readers = readers
        order = np.argsort(plan.last, kind="stable")
        self._shards, self._last = plan.shards[order], plan.last[order]
        self._n_done = 0

    def advance(self, clock: int) -> None:
        """As Following.advance."""
        self._following.advance(clock)
        n_done = int(np.searchsorted(self._last, clock, side="right"))
        for shard in self._shards[self._n_done : n_done].tolist():
            self._readers.drop(shard)
        self._n_done = max(n_done, self._n_done)

    def close(self) -> None:
        """As Following.close."""
        self._following.close()


class Readers:
    """Open shards, the least recently used dropped first; whoever reads by `mapped` passes by here, and does not count.

    The lock is never held while a shard is opened: threads open shards side by side, and two that want the same one
    wait for the first at its gate. All Readers of the process share one limit of descriptors; where it is reached, the
    Readers that hold most drop theirs.
    """

    def __init__(self, opener: Callable[[int], ShardReader], mapped: MappedRecords) -> None:
        self._opener = opener
        self._mapped = mapped
        self._begin()
        _of_process[id(self)] = self

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._open: OrderedDict[int, tuple[ShardReader, int]] = OrderedDict()  # with its descriptors
        self.n_descriptors = 0
        self._gates: dict[int, threading.Lock] = {}
        self._mapped.clear()
        self._pid = os.getpid()  # last: whoever sees it takes the lock, which must not be the parent's any more

    def __contains__(self, shard: int) -> bool:
        return self._pid == os.getpid() and shard in self._open

    @property
    def capacity(self) -> int:
        """Number of shards that can be open at once."""
        return min(MAX_READERS, descriptors.shard_share())

    def get(self, shard: int) -> ShardReader:
        """The shard, opened if it is not. Raises as ShardReader."""
        # In a forked child the parent's leases are not ours, and its lock may be held for ever.
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
            # Other files of the process took what open shards may use: use less.
            if not error.facts.get("too_many_open") or not (descriptors.raise_limit() or _drop_half()):
                raise
        return self._opener(shard)

    def map(self, shard: int) -> bool:
        """Let records of a shard be found in its mapping, which is kept as long as its reader.

        False: it has none, or is damaged: whoever asks the shard itself hears how, and may heal it.
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
        """Forget a shard, so that it is opened anew; readers in use stay good."""
        if self._pid == os.getpid():
            with self._lock:
                self._forget(shard)

    def drop_oldest(self) -> bool:
        """Forget the shard that was used least recently, in a forked child all of its parent's. False: none is open."""
        if self._pid != os.getpid():
            self._begin()
            return True
        with self._lock:
            oldest = next(iter(self._open), None)
            if oldest is not None:
                self._forget(oldest)
        return oldest is not None

    def clear(self) -> None:
        """Forget all shards."""
        if self._pid == os.getpid():
            with self._lock:
                self._open.clear()
                self.n_descriptors = 0
                self._mapped.clear()

    def _forget(self, shard: int) -> None:
        # Dropped, not closed: another thread may be reading from it.
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
        descriptors.allow(n_descriptors)
        _drop_to(descriptors.shard_share())


# Of all data sets of this process. By id, because the list of its references is made in one step, whatever other
# threads add meanwhile; there is no lock, for a fork could leave it locked.
_of_process: WeakValueDictionary[int, Readers] = WeakValueDictionary()


def _all() -> list[Readers]:
    return [readers for found in _of_process.valuerefs() if (readers := found()) is not None]


def _drop_to(n_descriptors: int) -> bool:
    """Drop shards until all Readers together hold at most n_descriptors. True: some were dropped."""
    has_dropped = False
    while sum(readers.n_descriptors for readers in _all()) > n_descriptors:
        if not max(_all(), key=lambda readers: readers.n_descriptors).drop_oldest():
            break
        has_dropped = True
    return has_dropped


def _drop_half() -> bool:
    return _drop_to(sum(readers.n_descriptors for readers in _all()) // 2)
