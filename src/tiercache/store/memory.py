"""Objects in the memory of this process, shared by name: for tests, examples and temporary data."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from threading import Event

from tiercache.errors import NotFound, StoreError
from tiercache.model import ObjectInfo
from tiercache.stats import Counters
from tiercache.store.contract import Buffer, SequentialUpload, Span, Store, Upload, check_key, check_read, check_spans

# The objects of each name, and the numbers of their ETags. Every access is one operation of a dict, which is atomic, so
# threads and forks need no lock.
_buckets: dict[str, dict[str, tuple[bytes, ObjectInfo]]] = {}
_numbers = count(1)


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

    def parent(self) -> tuple[Store, str] | None:
        folder, _, name = self.prefix.rstrip("/").rpartition("/")
        return (MemoryStore(self.name, folder), name) if name else None

    @property
    def _objects(self) -> dict[str, tuple[bytes, ObjectInfo]]:
        return _buckets.setdefault(self.name, {})

    def _object(self, key: str) -> tuple[bytes, ObjectInfo]:
        check_key(key)
        self.counters.add("requests")
        found = self._objects.get(self.prefix + key)
        if found is None:
            raise NotFound("no such object", url=self.url_of(key))
        return found[0], replace(found[1], key=key)

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
        self, key: str, spans: Sequence[Span], *, if_match: str | None = None, cancel: Event | None = None
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
        new = self._new_object(key, data)
        self._objects[self.prefix + key] = new
        return new[1]

    def put_if_absent(self, key: str, data: Buffer) -> bool:
        new = self._new_object(key, data)
        return self._objects.setdefault(self.prefix + key, new) is new

    def _new_object(self, key: str, data: Buffer) -> tuple[bytes, ObjectInfo]:
        check_key(key)
        self.counters.add("requests")
        self.counters.add("bytes_written", len(data))
        return bytes(data), ObjectInfo(key, len(data), etag=f'"{next(_numbers)}"', modified_s=time.time())

    def create(self, key: str) -> Upload:
        return _MemoryUpload(self, check_key(key))

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            self.counters.add("requests")
            self._objects.pop(self.prefix + check_key(key), None)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        if prefix:
            check_key(prefix.removesuffix("/"))
        start = self.prefix + (prefix.removesuffix("/") + "/" if prefix else "")
        self.counters.add("requests")
        for name, (_, info) in sorted(self._objects.copy().items()):
            if name.startswith(start):
                yield replace(info, key=name[len(self.prefix) :])


class _MemoryUpload(SequentialUpload):
    def __init__(self, store: MemoryStore, key: str) -> None:
        super().__init__(key)
        self._store, self._data = store, bytearray()

    def append(self, data: memoryview) -> None:
        self._data += data

    def make_object(self, *, if_absent: bool) -> ObjectInfo | None:
        if not if_absent:
            return self._store.put(self.key, self._data)
        return self._store.head(self.key) if self._store.put_if_absent(self.key, self._data) else None

    def discard(self) -> None:
        self._data = bytearray()
