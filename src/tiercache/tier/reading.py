"""What an opened data set has of tiers: a store that follows the placement, counted uses, copies to the hot tier."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tiercache.tier.placed import PlacedFolder, PlacedStore, check_readable
from tiercache.tier.promote import Promoter
from tiercache.tier.usage import Recorder

if TYPE_CHECKING:
    from collections.abc import Callable

    import pyarrow as pa

    from tiercache.model import ShardIdentity
    from tiercache.store import LocalFolder, Store


class TieredReading:
    """How one process reads one data set whose shards may be moved. Safe from any thread, and in a forked child.

    Nothing is asked of a store for it before a run begins, or a shard is not where it was.

    Args:
        placed: the data set's own store, following its placement.
        store: what it is read through: the same, or the cache round it.
    """

    def __init__(self, placed: PlacedStore, store: Store) -> None:
        self._placed, self._places = placed, placed.places
        self._recorder = Recorder(self._places)
        self._promoter = Promoter(self._places, lambda: store)

    def opened(self, key: str, identity: ShardIdentity) -> LocalFolder | None:
        """Count that a shard is opened, and offer it to the hot tier; a folder near by that has it, or None."""
        self._recorder.note(key)
        if not self.has_moved:
            return None
        self._promoter.offer(key, identity)
        return self.near(key, identity)

    @property
    def has_moved(self) -> bool:
        """Whether anything lies elsewhere, as far as is known."""
        return bool(self._places.placed)

    def near(self, key: str, identity: ShardIdentity) -> LocalFolder | None:
        """A folder of this machine, not the home, that has a shard; None: there is none."""
        return self._places.near(key, identity.n_bytes)

    def is_far(self, key: str) -> bool:
        """Whether a shard of a home that is a folder here lies in another kind of store."""
        return isinstance(self._placed, PlacedFolder) and self._placed.is_far(key)

    def far(self) -> Store | None:
        """What reads shards through the cache that a home which is a folder here has elsewhere; None: it has none."""
        return self._placed.far if self._places.has_far and isinstance(self._placed, PlacedFolder) else None

    def distrust(self, key: str, identity: ShardIdentity) -> bool:
        """Hear that a shard was found to be wrong. True: it was read from a folder near by, which is passed by now."""
        return self.has_moved and self._places.distrust_near(key, identity.n_bytes)

    def make_ready(self, keys: pa.ChunkedArray, is_here: Callable[[int], bool], *, reads_all: bool) -> None:
        """Hear that a run begins that reads these shards, and see that it can. See check_readable."""
        check_readable(self._placed, keys, is_here)
        if self._places.is_adopted:
            self._recorder.begin(None if reads_all else keys.to_pylist())

    def close(self) -> None:
        """Report what was used, and stop copying. It may be used again."""
        self._recorder.close()
        self._promoter.close()
