"""The open shards of a data set."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np

from tiercache.errors import CorruptShard

if TYPE_CHECKING:
    from collections.abc import Callable

    from tiercache.model import Following, ReadingPlan
    from tiercache.shard.mapped import MappedRecords
    from tiercache.shard.reader import ShardReader

# Open shards: each costs two descriptors and a mapping. Of the usual 1,024 descriptors this leaves half to the user.
MAX_READERS = 256


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
    wait for the first at its gate.
    """

    def __init__(self, opener: Callable[[int], ShardReader], mapped: MappedRecords) -> None:
        self._opener = opener
        self._mapped = mapped
        self._begin()

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._open: OrderedDict[int, ShardReader] = OrderedDict()
        self._gates: dict[int, threading.Lock] = {}
        self._mapped.clear()
        self._pid = os.getpid()  # last: whoever sees it takes the lock, which must not be the parent's any more

    def __contains__(self, shard: int) -> bool:
        return self._pid == os.getpid() and shard in self._open

    def get(self, shard: int) -> ShardReader:
        """The shard, opened if it is not. Raises as ShardReader."""
        # In a forked child the parent's leases are not ours, and its lock may be held for ever.
        if self._pid != os.getpid():
            self._begin()
        with self._lock:
            reader = self._open.get(shard)
            if reader is not None:
                self._open.move_to_end(shard)
                return reader
            gate = self._gates.setdefault(shard, threading.Lock())
        with gate:
            with self._lock:
                reader = self._open.get(shard)
            if reader is None:
                reader = self._opener(shard)
                self._keep(shard, reader)
        return reader

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
            if self._open.get(shard) is reader:
                self._mapped.put(shard, table)
        return True

    def drop(self, shard: int) -> None:
        """Forget a shard, so that it is opened anew; readers in use stay good."""
        if self._pid == os.getpid():
            with self._lock:
                self._open.pop(shard, None)
                self._mapped.forget(shard)

    def clear(self) -> None:
        """Forget all shards."""
        if self._pid == os.getpid():
            with self._lock:
                self._open.clear()
                self._mapped.clear()

    def _keep(self, shard: int, reader: ShardReader) -> None:
        with self._lock:
            self._gates.pop(shard, None)
            self._open[shard] = reader
            while len(self._open) > MAX_READERS:
                oldest, _ = self._open.popitem(last=False)  # dropped, not closed: another thread may be reading from it
                self._mapped.forget(oldest)
