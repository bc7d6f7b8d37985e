"""Objects in the memory of this process, shared by name: for tests, examples and temporary data."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from threading import Event, Lock
from typing import cast

from tiercache.errors import NotFound, StoreError
from tiercache.model import ObjectInfo
from tiercache.stats import Counters
from tiercache.store.contract import Buffer, SequentialUpload, Span, Store, Upload, check_key, check_read, check_spans


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
    """`memory://NAME/FOLDER`: all stores of one name in a process share their objects; a forked child has a copy.

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

    def _object(self, key: str) -> tuple[bytes, ObjectInfo]:
        check_key(key)
        self.counters.add("requests")
        bucket = self._bucket
        with bucket.lock:
            found = bucket.objects.get(self.prefix + key)
        if found is None:
            raise NotFound("no such object", url=self.url_of(key))
        return found[0], _renamed(found[1], key)

    def head(self, key: str) -> ObjectInfo:
        return self._object(key)[1]

    def get(self, key: str) -> bytes:
        data = self._object(key)[0]
        self.counters.add("bytes_read", len(data))
        return data

    def read_tail(self, key: str, n_bytes: int) -> tuple[bytes, ObjectInfo]:
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
        check_spans(spans)
        data, info = self._object(key)
        check_read(info, spans, if_match, self.url_of(key))
        if cancel is not None and cancel.is_set():
            raise StoreError("read_into: cancelled", url=self.url_of(key), retryable=True)
        view = memoryview(data)
        for span, buffer in spans:
            buffer[:] = view[span.start : span.end]
            self.counters.add("bytes_read", span.n_bytes)

    def put(self, key: str, data: Buffer) -> ObjectInfo:
        return cast("ObjectInfo", self._store(key, bytes(data)))

    def put_if_absent(self, key: str, data: Buffer) -> bool:
        return self._store(key, bytes(data), if_absent=True) is not None

    def _store(self, key: str, data: bytes, *, if_absent: bool = False) -> ObjectInfo | None:
        check_key(key)
        self.counters.add("requests")
        bucket = self._bucket
        with bucket.lock:
            if if_absent and self.prefix + key in bucket.objects:
                return None
            info = ObjectInfo(key, len(data), etag=f'"{next(bucket.numbers)}"', modified_s=time.time())
            bucket.objects[self.prefix + key] = data, info
        self.counters.add("bytes_written", len(data))
        return info

    def create(self, key: str) -> Upload:
        return _MemoryUpload(self, check_key(key))

    def delete(self, keys: Iterable[str]) -> None:
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
        return cast("ObjectInfo", self._store(dst, self._object(src)[0]))


def _renamed(info: ObjectInfo, key: str) -> ObjectInfo:
    return ObjectInfo(key, info.n_bytes, etag=info.etag, modified_s=info.modified_s)


class _MemoryUpload(SequentialUpload):
    def __init__(self, store: MemoryStore, key: str) -> None:
        super().__init__(key)
        self._store, self._data = store, bytearray()

    def append(self, data: memoryview) -> None:
        self._data += data

    def make_object(self, *, if_absent: bool) -> ObjectInfo | None:
        return self._store._store(self.key, bytes(self._data), if_absent=if_absent)  # noqa: SLF001 - of one file

    def discard(self) -> None:
        self._data = bytearray()
