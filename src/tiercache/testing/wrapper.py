"""A Store that wraps another Store and passes every call through one method."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from threading import Event
from typing import TypeVar

from tiercache.model import ObjectInfo
from tiercache.store.contract import Buffer, Span, Store, Upload

T = TypeVar("T")

VERBS = (
    "head", "get", "read_tail", "read_into", "put", "put_if_absent", "create", "delete", "list", "copy",
    "put_part", "complete", "abort",
)  # fmt: skip


class WrapperStore(Store):
    """Passes every call, including the three of its uploads, to inner through around().

    It is never a LocalStore, even if inner is: readers read it by ranges.

    Args:
        inner: Store that makes the calls.
    """

    def __init__(self, inner: Store) -> None:
        self.inner = inner
        self.url = inner.url
        self.counters = inner.counters
        self.min_part_bytes = inner.min_part_bytes

    def around(self, verb: str, key: str, call: Callable[[], T]) -> T:
        """Make the call. Subclasses act before it, after it or instead of it.

        Args:
            verb: Name of the call, one of VERBS.
            key: Key of the object.
            call: Function that makes the call.
        """
        del verb, key
        return call()

    def head(self, key: str) -> ObjectInfo:
        """Pass the call to inner."""
        return self.around("head", key, lambda: self.inner.head(key))

    def get(self, key: str) -> bytes:
        """Pass the call to inner."""
        return self.around("get", key, lambda: self.inner.get(key))

    def read_tail(self, key: str, n_bytes: int) -> tuple[bytes, ObjectInfo]:
        """Pass the call to inner."""
        return self.around("read_tail", key, lambda: self.inner.read_tail(key, n_bytes))

    def read_into(
        self,
        key: str,
        spans: Sequence[Span],
        *,
        if_match: str | None = None,
        deadline_s: float | None = None,
        cancel: Event | None = None,
    ) -> None:
        """Pass the call to inner."""
        read = self.inner.read_into
        self.around("read_into", key, lambda: read(key, spans, if_match=if_match, deadline_s=deadline_s, cancel=cancel))

    def put(self, key: str, data: Buffer) -> ObjectInfo:
        """Pass the call to inner."""
        return self.around("put", key, lambda: self.inner.put(key, data))

    def put_if_absent(self, key: str, data: Buffer) -> bool:
        """Pass the call to inner."""
        return self.around("put_if_absent", key, lambda: self.inner.put_if_absent(key, data))

    def create(self, key: str, *, if_absent: bool = False) -> Upload:
        """Pass the call to inner, and wrap the upload."""
        inner = self.around("create", key, lambda: self.inner.create(key, if_absent=if_absent))
        return WrapperUpload(self, key, inner)

    def delete(self, keys: Iterable[str]) -> None:
        """Pass the call to inner; around() gets the first key."""
        wanted = [*keys]
        self.around("delete", wanted[0] if wanted else "", lambda: self.inner.delete(wanted))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Pass the call to inner; around() covers the start of the listing only."""
        yield from self.around("list", prefix, lambda: self.inner.list(prefix))

    def copy(self, src: str, dst: str) -> ObjectInfo:
        """Pass the call to inner; around() gets the source key."""
        return self.around("copy", src, lambda: self.inner.copy(src, dst))

    def close(self) -> None:
        """Pass the call to inner."""
        self.inner.close()


class WrapperUpload(Upload):
    """Passes the calls of an upload through its store's around()."""

    def __init__(self, store: WrapperStore, key: str, inner: Upload) -> None:
        self._store, self._key, self._inner = store, key, inner

    def put_part(self, number: int, data: Buffer) -> None:
        """Pass the call to inner."""
        self._store.around("put_part", self._key, lambda: self._inner.put_part(number, data))

    def complete(self, *, if_absent: bool = False) -> ObjectInfo | None:
        """Pass the call to inner."""
        return self._store.around("complete", self._key, lambda: self._inner.complete(if_absent=if_absent))

    def abort(self) -> None:
        """Pass the call to inner."""
        self._store.around("abort", self._key, self._inner.abort)
