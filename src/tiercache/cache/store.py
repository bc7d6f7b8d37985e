"""The cache's face: a store round a store. Whoever reads through it cannot tell, except by the time it takes."""

from __future__ import annotations

from collections import OrderedDict
from threading import Event, Lock
from typing import TYPE_CHECKING

from tiercache.cache.record import Wanted, name_of_identity, name_of_object
from tiercache.catalog import read_log
from tiercache.model import OWN_FOLDER
from tiercache.store import Buffer, Lease, Span, Store, Upload, check_key, redact

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import numpy as np
    import numpy.typing as npt

    from tiercache.cache.cache import Cache
    from tiercache.model import ByteRange, Following, ObjectInfo, ReadingPlan, ShardIdentity

N_KNOWN = 4096


class CachedStore(Store):
    """A Store and a LocalStore round a Store. Every verb but reading passes through.

    counters are the inner store's: what was asked of it, and cache_hits and cache_misses of this store beside that. All
    methods may be called from any thread; the lock guards the table of keys that were opened.
    """

    def __init__(self, cache: Cache, inner: Store) -> None:
        self.cache, self.inner = cache, inner
        self.url, self.counters, self.min_part_bytes = inner.url, inner.counters, inner.min_part_bytes
        self._source = redact(inner.url).rstrip("/")
        self._lock = Lock()
        self._known: OrderedDict[str, Wanted] = OrderedDict()

    def __repr__(self) -> str:
        return f"CachedStore({self.cache!r}, {self.inner!r})"

    def __reduce__(self) -> tuple[type[CachedStore], tuple[Cache, Store]]:
        return CachedStore, (self.cache, self.inner)

    # -- a LocalStore -----------------------------------------------------------------------------------------------

    def open_local(self, key: str, identity: ShardIdentity | None = None) -> Lease | None:
        """A lease on the cached copy, which may still have to be fetched; None: it is not admitted, read by ranges."""
        if identity is None:
            self._note_use(key)
        wanted = self.wanted(key, identity)
        if wanted is None:
            return None
        return self.cache.open(wanted, self.inner, self._tell)

    def _note_use(self, key: str) -> None:
        """Count a read of an object that no manifest describes; a `Dataset` counts the shards that it reads.

        Reads of versions, segments and placements are not uses of data.
        """
        if not key.startswith(OWN_FOLDER) and f"/{OWN_FOLDER}" not in key:
            read_log.note(f"{self._source}/{key}")

    def _tell(self, is_hit: bool) -> None:
        self.counters.add("cache_hits" if is_hit else "cache_misses")

    def fetch_ahead(self, key: str, identity: ShardIdentity, ranges: Sequence[ByteRange] | None = None) -> None:
        """Start fetching what a reader will open soon; returns at once. ranges: of the object; None: all of it."""
        wanted = self.wanted(key, identity)
        if wanted is not None:
            self.cache.fetch_ahead(wanted, self.inner, ranges)

    def is_here(self, key: str, identity: ShardIdentity, ranges: Sequence[ByteRange] | None = None) -> bool:
        """Whether these ranges of the object are here now; None: all of it."""
        wanted = self.wanted(key, identity)
        return wanted is not None and self.cache.is_here(wanted, ranges)

    def publish(self, names: npt.NDArray[np.uint8], plan: ReadingPlan) -> Following:
        """Let all who use the cache's folder know when this job reads which copies.

        Args:
            names: uint8[m, 20], names of copies (record.name_of_identity, as bytes) in the order of plan.shards.
            plan: when each is read.
        """
        return self.cache.publish(names, plan)

    def wanted(self, key: str, identity: ShardIdentity | None = None) -> Wanted | None:
        """What is to be cached under key; None: nothing tells this object from the next one of that name.

        Without identity the store is asked. Raises NotFound.
        """
        if identity is not None:
            known = self._known.get(key)  # a hit takes a third less without a name to be computed
            if known is not None and known.identity == identity:
                return known
        check_key(key)
        source = f"{redact(self.url)}/{key}"
        if identity is not None:
            name = name_of_identity(identity)
            wanted = Wanted(name, key, source, identity.n_bytes, identity.crc32c, identity)
        else:
            info = self.inner.head(key)
            object_name = name_of_object(source, info)
            if object_name is None:
                return None
            wanted = Wanted(object_name, key, source, info.n_bytes, info.crc32c, etag=info.etag)
        with self._lock:
            self._known[key] = wanted
            if len(self._known) > N_KNOWN:
                self._known.popitem(last=False)
        return wanted

    def distrust(self, key: str, identity: ShardIdentity | None = None) -> bool:
        """Check the cached copy after a reader found it wrong.

        True: it was wrong, and is gone: open it again. False: it is what the source sent.
        """
        wanted = self.wanted(key, identity)
        return wanted is not None and self.cache.distrust(wanted)

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
        """From the copy of what was opened under key, if it is here and has the ETag asked for; else passed on."""
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
        """Passed on."""
        return self.inner.head(key)

    def get(self, key: str) -> bytes:
        """Passed on."""
        self._note_use(key)
        return self.inner.get(key)

    def read_tail(self, key: str, n_bytes: int) -> tuple[bytes, ObjectInfo]:
        """Passed on."""
        self._note_use(key)
        return self.inner.read_tail(key, n_bytes)

    # -- writing ----------------------------------------------------------------------------------------------------

    def put(self, key: str, data: Buffer) -> ObjectInfo:
        """Passed on; the copy of what was there is dropped."""
        try:
            return self.inner.put(key, data)
        finally:
            self._drop([key])

    def put_if_absent(self, key: str, data: Buffer) -> bool:
        """Passed on; the copy of what was there is dropped."""
        try:
            return self.inner.put_if_absent(key, data)
        finally:
            self._drop([key])

    def create(self, key: str, *, if_absent: bool = False) -> Upload:
        """Passed on; the copy of what is there now is dropped. What the upload publishes has another ETag and name."""
        self._drop([key])
        return self.inner.create(key, if_absent=if_absent)

    def delete(self, keys: Iterable[str]) -> None:
        """Passed on; the copies are dropped."""
        gone = list(keys)
        try:
            self.inner.delete(gone)
        finally:
            self._drop(gone)

    def copy(self, src: str, dst: str) -> ObjectInfo:
        """Passed on; the copy of what was at dst is dropped."""
        try:
            return self.inner.copy(src, dst)
        finally:
            self._drop([dst])

    def _drop(self, keys: list[str]) -> None:
        # Copies with an identity stay: they are what their manifest says, whatever happens to the object.
        with self._lock:
            for key in keys:
                self._known.pop(key, None)
        self.cache.drop_objects([f"{redact(self.url)}/{key}" for key in keys])

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Passed on."""
        return self.inner.list(prefix)

    def close(self) -> None:
        """Close the inner store. The cache stays open: other stores may use it."""
        self.inner.close()
