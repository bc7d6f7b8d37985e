"""`CachedStore`: a store that reads another store through the cache."""

from __future__ import annotations

from collections import OrderedDict
from threading import Event, Lock
from typing import TYPE_CHECKING

from tiercache.cache.record import CopySpec, name_of_identity, name_of_object
from tiercache.catalog import read_log
from tiercache.model import OWN_FOLDER
from tiercache.store import Buffer, Lease, Span, Store, Upload, check_key, redact

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import numpy as np
    import numpy.typing as npt

    from tiercache.cache.cache import Cache
    from tiercache.model import ByteRange, ObjectInfo, PublishedPlan, ReadingPlan, ShardIdentity

N_KNOWN = 4096


class CachedStore(Store):
    """A Store and a LocalStore around another Store. Reads use the cache; all other methods call the inner store.

    `counters` are those of the inner store; cache_hits and cache_misses of this store are added to them. All methods
    may be called from any thread; the lock guards the table of opened keys.

    Args:
        cache: Cache through which objects are read.
        inner: Store that holds the objects. close() closes it.
    """

    def __init__(self, cache: Cache, inner: Store) -> None:
        self.cache, self.inner = cache, inner
        self.url, self.counters, self.min_part_bytes = inner.url, inner.counters, inner.min_part_bytes
        self._source = redact(inner.url).rstrip("/")
        self._lock = Lock()
        self._known: OrderedDict[str, CopySpec] = OrderedDict()

    def __repr__(self) -> str:
        return f"CachedStore({self.cache!r}, {self.inner!r})"

    def __reduce__(self) -> tuple[type[CachedStore], tuple[Cache, Store]]:
        return CachedStore, (self.cache, self.inner)

    # -- a LocalStore -----------------------------------------------------------------------------------------------

    def open_local(self, key: str, identity: ShardIdentity | None = None) -> Lease | None:
        """Return a lease on a copy, cached or still to be fetched; None: not admitted, read the object by ranges.

        Args:
            key: Key of the object.
            identity: Identity of a shard or segment; None for another object, whose attributes are then requested from
                the inner store.
        """
        if identity is None:
            self._note_use(key)
        wanted = self.wanted(key, identity)
        if wanted is None:
            return None
        return self.cache.open(wanted, self.inner, self._tell)

    def _note_use(self, key: str) -> None:
        """Count a read of an object that no manifest describes.

        A `Dataset` counts the reads of its shards itself. Reads of versions, segments and
        placements are not counted as uses of data.
        """
        if not key.startswith(OWN_FOLDER) and f"/{OWN_FOLDER}" not in key:
            read_log.record_use(f"{self._source}/{key}")

    def _tell(self, is_hit: bool) -> None:
        self.counters.add("cache_hits" if is_hit else "cache_misses")

    def fetch_ahead(self, key: str, identity: ShardIdentity, ranges: Sequence[ByteRange] | None = None) -> None:
        """Start to prefetch an object that a reader will open soon, and return at once.

        Args:
            key: Key of the object.
            identity: Identity of the object.
            ranges: Byte ranges of the object to fetch; None fetches the whole object.
        """
        wanted = self.wanted(key, identity)
        if wanted is not None:
            self.cache.fetch_ahead(wanted, self.inner, ranges)

    def is_here(self, key: str, identity: ShardIdentity, ranges: Sequence[ByteRange] | None = None) -> bool:
        """Return whether these byte ranges of the object are cached now.

        Args:
            key: Key of the object.
            identity: Identity of the object.
            ranges: Byte ranges of the object; None stands for the whole object.
        """
        wanted = self.wanted(key, identity)
        return wanted is not None and self.cache.is_here(wanted, ranges)

    def publish(self, names: npt.NDArray[np.uint8], plan: ReadingPlan) -> PublishedPlan:
        """Publish the reading plan of this job to all processes that use the cache's folder.

        Args:
            names: Names of the copies (record.name_of_identity, as bytes), uint8[m, 20], in the order of plan.shards.
            plan: When the job reads each shard.
        """
        return self.cache.publish(names, plan)

    def wanted(self, key: str, identity: ShardIdentity | None = None) -> CopySpec | None:
        """Return the specification of the copy of an object; None: nothing identifies the version of the object.

        Args:
            key: Key of the object.
            identity: Identity of a shard or segment; without it, the inner store is asked for the object's attributes.

        Raises:
            NotFound: The inner store has no such object.
        """
        if identity is not None:
            known = self._known.get(key)  # without computing the name, a hit takes a third less time
            if known is not None and known.identity == identity:
                return known
        check_key(key)
        source = f"{redact(self.url)}/{key}"
        if identity is not None:
            name = name_of_identity(identity)
            wanted = CopySpec(name, key, source, identity.n_bytes, identity.crc32c, identity)
        else:
            info = self.inner.head(key)
            object_name = name_of_object(source, info)
            if object_name is None:
                return None
            wanted = CopySpec(object_name, key, source, info.n_bytes, info.crc32c, etag=info.etag)
        with self._lock:
            self._known[key] = wanted
            if len(self._known) > N_KNOWN:
                self._known.popitem(last=False)
        return wanted

    def verify_copy(self, key: str, identity: ShardIdentity | None = None) -> bool:
        """Verify the cached copy after a reader found it corrupt.

        Args:
            key: Key of the object.
            identity: Identity of a shard or segment; None for another object.

        Returns:
            True: The copy was corrupt and is removed; the caller opens the object again. False: The copy is what the
                source sent.
        """
        wanted = self.wanted(key, identity)
        return wanted is not None and self.cache.verify_copy(wanted)

    # -- reading ----------------------------------------------------------------------------------------------------

    def read_into(
        self,
        key: str,
        spans: Sequence[Span],
        *,
        if_match: str | None = None,
        deadline_s: float | None = None,
        cancel: Event | None = None,
    ) -> None:
        """See Store.read_into. The spans come from the cached copy of an object that was opened under key, if possible.

        The copy is used only if it has the ETag in if_match, or if the object has an identity and if_match is None.
        """
        with self._lock:
            wanted = self._known.get(key)
        guarded = wanted is not None and (if_match is not None and wanted.etag == if_match)
        is_ours = wanted is not None and (guarded or (if_match is None and wanted.identity is not None))
        if wanted is None or wanted.identity is None:
            self._note_use(key)
        if wanted is not None and is_ours and self.cache.read(wanted, spans):
            return
        self.inner.read_into(key, spans, if_match=if_match, deadline_s=deadline_s, cancel=cancel)

    def head(self, key: str) -> ObjectInfo:
        """See Store.head. The inner store answers."""
        return self.inner.head(key)

    def get(self, key: str) -> bytes:
        """See Store.get. The inner store answers."""
        self._note_use(key)
        return self.inner.get(key)

    def read_tail(self, key: str, n_bytes: int) -> tuple[bytes, ObjectInfo]:
        """See Store.read_tail. The inner store answers."""
        self._note_use(key)
        return self.inner.read_tail(key, n_bytes)

    # -- writing ----------------------------------------------------------------------------------------------------

    def put(self, key: str, data: Buffer) -> ObjectInfo:
        """See Store.put. The copy of the former object is evicted."""
        try:
            return self.inner.put(key, data)
        finally:
            self._drop([key])

    def put_if_absent(self, key: str, data: Buffer) -> bool:
        """See Store.put_if_absent. The copy of the former object is evicted."""
        try:
            return self.inner.put_if_absent(key, data)
        finally:
            self._drop([key])

    def create(self, key: str, *, if_absent: bool = False) -> Upload:
        """See Store.create.

        The copy of the former object is evicted at once; the new object has another ETag and name.
        """
        self._drop([key])
        return self.inner.create(key, if_absent=if_absent)

    def delete(self, keys: Iterable[str]) -> None:
        """See Store.delete. The copies are evicted."""
        gone = list(keys)
        try:
            self.inner.delete(gone)
        finally:
            self._drop(gone)

    def copy(self, src: str, dst: str) -> ObjectInfo:
        """See Store.copy. The copy of the former object at dst is evicted."""
        try:
            return self.inner.copy(src, dst)
        finally:
            self._drop([dst])

    def _drop(self, keys: list[str]) -> None:
        # A copy with an identity stays: its manifest defines its contents, whatever happens to the object under this
        # key.
        with self._lock:
            for key in keys:
                self._known.pop(key, None)
        self.cache.drop_objects([f"{redact(self.url)}/{key}" for key in keys])

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See Store.list. The inner store answers."""
        return self.inner.list(prefix)

    def close(self) -> None:
        """Close the inner store. The cache stays open, because other stores may use it."""
        self.inner.close()
