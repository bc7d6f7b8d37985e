"""Tiering of one opened data set: a store that follows the placement, use counts, and promotion to the hot tier."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tiercache.tier.placed import RedirectingLocalStore, RedirectingStore, check_readable
from tiercache.tier.promote import Promoter
from tiercache.tier.usage import UseRecorder

if TYPE_CHECKING:
    from collections.abc import Callable

    import pyarrow as pa

    from tiercache.model import ShardIdentity
    from tiercache.store import LocalFolder, Store


class TieredReader:
    """How one process reads one data set whose shards may be moved. Thread-safe, and fork-safe.

    It queries no store before a run begins, or before a shard is missing from its known location.

    Args:
        placed: The data set's own store, which follows the placement.
        store: Store that reads go through: the same store, or the cache around it.
    """

    def __init__(self, placed: RedirectingStore, store: Store) -> None:
        self._placed, self._places = placed, placed.places
        self._recorder = UseRecorder(self._places)
        self._promoter = Promoter(self._places, lambda: store)

    def opened(self, key: str, identity: ShardIdentity) -> LocalFolder | None:
        """Count an opened shard, and offer it for promotion. Return a local folder that has it, or None."""
        self._recorder.note(key)
        if not self.has_moved:
            return None
        self._promoter.offer(key, identity)
        return self.local_copy(key, identity)

    @property
    def has_moved(self) -> bool:
        """Whether any object is away from home, as far as is known."""
        return bool(self._places.known_placement)

    def local_copy(self, key: str, identity: ShardIdentity) -> LocalFolder | None:
        """Return a folder of this machine, other than the home, that has the shard; None if there is none."""
        return self._places.local_copy(key, identity.n_bytes)

    def is_remote(self, key: str) -> bool:
        """Return whether a shard of a local home is in a remote store."""
        return isinstance(self._placed, RedirectingLocalStore) and self._placed.is_remote(key)

    def far(self) -> Store | None:
        """Return the store that reads the moved shards of a local home through the cache; None if there are none."""
        return (
            self._placed.remote_store
            if self._places.has_remote and isinstance(self._placed, RedirectingLocalStore)
            else None
        )

    def reject_local_copy(self, key: str, identity: ShardIdentity) -> bool:
        """Stop using a damaged local copy of a shard. Return True if the shard was read from a local tier's folder."""
        return self.has_moved and self._places.reject_local_copy(key, identity.n_bytes)

    def prepare_reading(self, keys: pa.ChunkedArray, is_here: Callable[[int], bool], *, reads_all: bool) -> None:
        """Prepare for a run that reads these shards, and check that they can be read. See check_readable."""
        check_readable(self._placed, keys, is_here)
        if self._places.is_tracked:
            self._recorder.begin(None if reads_all else keys.to_pylist())

    def close(self) -> None:
        """Report the uses, and stop promotion. The object may be used again."""
        self._recorder.close()
        self._promoter.close()
