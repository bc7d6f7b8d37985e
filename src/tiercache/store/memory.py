"""Objects in the memory of this process, shared by name: for tests, examples and temporary data."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from threading import Event, Lock

from tiercache.errors import NotFound, ObjectChanged, StoreError
from tiercache.model import ObjectInfo
from tiercache.stats import Counters
from tiercache.store.contract import Buffer, Span, Store, Upload, check_key, check_part, parts_in_order
from tiercache.store.range_reads import check_spans


class _Bucket:
    """The objects of one name. Every access holds the lock; the bytes are immutable and used outside it."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.objects: dict[str, tuple[bytes, ObjectInfo]] = {}
        self.numbers = count(1)


_buckets: dict[str, _Bucket] = {}
_buckets_lock = Lock()


def _renew_locks() -> None:
    # A thread of the parent may have held a lock at the fork. Each dict operation is atomic, so the objects are whole.
    global _buckets_lock
    _buckets_lock = Lock()
    for bucket in _buckets.values():
        bucket.lock = Lock()


os.register_at_fork(after_in_child=_renew_locks)


class MemoryStore(Store):
    """`memory://NAME/FOLDER`: all stores of one name in a process share their objects.

    A forked child has a copy of them.

    A pickled store becomes a store of the same name in the process that unpickles it, with the objects of that process.
    """

    def __init__(self, name: str = "", prefix: str = "") -> None:
        self.name = name
        self.prefix = f"{check_key(prefix.strip('/'))}/" if prefix.strip("/") else ""
        self.url = f"memory://{name}/{self.prefix}".rstrip("/") if self.prefix else f"memory://{name}"
        self.counters = Counters("requests", "bytes_read", "bytes_written")

    def __repr__(self) -> str:
        return f"MemoryStore({self.url!r})"

    def __reduce__(self) -> tuple[type[MemoryStore], tuple[str, str]]:
        return MemoryStore, (self.name, self.prefix)

    @property
    def _bucket(self) -> _Bucket:
        with _buckets_lock:
            return _buckets.setdefault(self.name, _Bucket())

    def _at(self, key: str) -> str:
        return f"{self.url}/{key}"

    def _object(self, key: str) -> tuple[bytes, ObjectInfo]:
        check_key(key)
        self.counters.add("requests")
        bucket = self._bucket
        with bucket.lock:
            found = bucket.objects.get(self.prefix + key)
        if found is None:
            raise NotFound("no such object", url=self._at(key))
        return found[0], _renamed(found[1], key)

    def head(self, key: str) -> ObjectInfo:
        """Return the description of the stored object."""
        return self._object(key)[1]

    def get(self, key: str) -> bytes:
        """Return the stored bytes without a copy."""
        data = self._object(key)[0]
        self.counters.add("bytes_read", len(data))
        return data

    def read_tail(self, key: str, n_bytes: int) -> tuple[bytes, ObjectInfo]:
        """Return a slice of the stored bytes."""
        data, info = self._object(key)
        tail = data[max(len(data) - n_bytes, 0) :]
        self.counters.add("bytes_read", len(tail))
        return tail, info

    def read_into(
        self,
        key: str,
        spans: Sequence[Span],
        *,
        if_match: str | None = None,
        deadline_s: float | None = None,  # noqa: ARG002 - the call never waits
        cancel: Event | None = None,
    ) -> None:
        """Copy slices of the stored bytes."""
        check_spans(spans)
        data, info = self._object(key)
        if if_match is not None and info.etag != if_match:
            raise ObjectChanged(url=self._at(key), expected=if_match, found=info.etag)
        if cancel is not None and cancel.is_set():
            raise StoreError("read_into: cancelled", url=self._at(key), retryable=True)
        last = max((span.end for span, _ in spans), default=0)
        if last > len(data):
            raise StoreError(f"a range ends at byte {last}, the object at byte {len(data)}", url=self._at(key))
        view = memoryview(data)
        for span, buffer in spans:
            buffer[:] = view[span.start : span.end]
            self.counters.add("bytes_read", span.n_bytes)

    def put(self, key: str, data: Buffer) -> ObjectInfo:
        """Store a copy of data."""
        return self._store(key, bytes(data))

    def put_if_absent(self, key: str, data: Buffer) -> bool:
        """Store a copy of data if the key is free."""
        return self._store_absent(key, bytes(data)) is not None

    def _store(self, key: str, data: bytes) -> ObjectInfo:
        bucket = self._bucket
        with bucket.lock:
            return self._keep(bucket, key, data)

    def _store_absent(self, key: str, data: bytes) -> ObjectInfo | None:
        bucket = self._bucket
        with bucket.lock:
            return None if self.prefix + key in bucket.objects else self._keep(bucket, key, data)

    def _keep(self, bucket: _Bucket, key: str, data: bytes) -> ObjectInfo:
        check_key(key)
        self.counters.add("requests")
        info = ObjectInfo(key, len(data), etag=f'"{next(bucket.numbers)}"', modified_s=time.time())
        bucket.objects[self.prefix + key] = data, info
        self.counters.add("bytes_written", len(data))
        return info

    def create(self, key: str) -> Upload:
        """Start an upload that holds its parts in memory."""
        return _MemoryUpload(self, check_key(key))

    def delete(self, keys: Iterable[str]) -> None:
        """Remove the objects."""
        bucket = self._bucket
        for key in keys:
            self.counters.add("requests")
            with bucket.lock:
                bucket.objects.pop(self.prefix + check_key(key), None)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """List a snapshot, sorted by key."""
        if prefix:
            check_key(prefix.removesuffix("/"))
        start = self.prefix + (prefix.removesuffix("/") + "/" if prefix else "")
        self.counters.add("requests")
        bucket = self._bucket
        with bucket.lock:
            found = [(name, info) for name, (_, info) in bucket.objects.items() if name.startswith(start)]
        for name, info in sorted(found, key=lambda item: item[0]):
            yield _renamed(info, name[len(self.prefix) :])

    def copy(self, src: str, dst: str) -> ObjectInfo:
        """Store the same bytes under a second key."""
        return self._store(dst, self._object(src)[0])


def _renamed(info: ObjectInfo, key: str) -> ObjectInfo:
    return ObjectInfo(key, info.n_bytes, etag=info.etag, modified_s=info.modified_s)


class _MemoryUpload(Upload):
    """Parts in memory; the lock guards the table."""

    def __init__(self, store: MemoryStore, key: str) -> None:
        self._store, self._key = store, key
        self._lock = Lock()
        self._is_open = True
        self._parts: dict[int, bytes] = {}

    def put_part(self, number: int, data: Buffer) -> None:
        """Keep a copy of the part."""
        with self._lock:
            check_part(self._key, number, is_open=self._is_open)
            self._parts[number] = bytes(data)

    def complete(self, *, if_absent: bool = False) -> ObjectInfo | None:
        """Join the parts and publish the object."""
        with self._lock:
            was_open, self._is_open = self._is_open, False
        if not was_open:
            raise ValueError(f"{self._key}: the upload is already completed or aborted")
        data = b"".join(parts_in_order(self._parts, self._key))
        if if_absent:
            return self._store._store_absent(self._key, data)  # noqa: SLF001 - of one file
        return self._store._store(self._key, data)  # noqa: SLF001

    def abort(self) -> None:
        """Discard the parts."""
        with self._lock:
            self._is_open = False
            self._parts.clear()
