"""A view of a store: a folder of another store as a store of its own, such as a data set below a tier's URL."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from threading import Event
from typing import TYPE_CHECKING

from tiercache.store import Store, check_key

if TYPE_CHECKING:
    from tiercache.model import ObjectInfo
    from tiercache.store import Buffer, Span, Upload


def prefix_store(store: Store, folder: str) -> Store:
    """Return the store of a folder; the store itself for ""."""
    return PrefixStore(store, folder) if folder else store


class PrefixStore(Store):
    """Store of the keys below a folder of another store. It uses that store's connections, and never closes them."""

    def __init__(self, store: Store, folder: str) -> None:
        self._store = store
        self._prefix = f"{check_key(folder.strip('/'))}/"
        self.url = f"{store.url.rstrip('/')}/{self._prefix.rstrip('/')}"
        self.counters = store.counters
        self.min_part_bytes = store.min_part_bytes

    def __repr__(self) -> str:
        return f"Below({self.url!r})"

    def _at(self, key: str) -> str:
        return self._prefix + check_key(key)

    def _mine(self, info: ObjectInfo) -> ObjectInfo:
        return replace(info, key=info.key.removeprefix(self._prefix))

    def head(self, key: str) -> ObjectInfo:
        """See Store. All keys are relative to the folder."""
        return self._mine(self._store.head(self._at(key)))

    def get(self, key: str) -> bytes:
        """See Store."""
        return self._store.get(self._at(key))

    def read_tail(self, key: str, n_bytes: int) -> tuple[bytes, ObjectInfo]:
        """See Store."""
        data, info = self._store.read_tail(self._at(key), n_bytes)
        return data, self._mine(info)

    def read_into(
        self,
        key: str,
        spans: Sequence[Span],
        *,
        if_match: str | None = None,
        deadline_s: float | None = None,
        cancel: Event | None = None,
    ) -> None:
        """See Store."""
        self._store.read_into(self._at(key), spans, if_match=if_match, deadline_s=deadline_s, cancel=cancel)

    def put(self, key: str, data: Buffer) -> ObjectInfo:
        """See Store."""
        return self._mine(self._store.put(self._at(key), data))

    def put_if_absent(self, key: str, data: Buffer) -> bool:
        """See Store."""
        return self._store.put_if_absent(self._at(key), data)

    def create(self, key: str, *, if_absent: bool = False) -> Upload:
        """See Store."""
        return self._store.create(self._at(key), if_absent=if_absent)

    def delete(self, keys: Iterable[str]) -> None:
        """See Store."""
        self._store.delete([self._at(key) for key in keys])

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See Store."""
        for info in self._store.list(self._prefix + prefix):
            yield self._mine(info)

    def copy(self, src: str, dst: str) -> ObjectInfo:
        """See Store."""
        return self._mine(self._store.copy(self._at(src), self._at(dst)))
