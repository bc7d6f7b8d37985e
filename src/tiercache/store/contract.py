"""The Store contract: what every back end gives, and what nobody may assume beyond it.

Keys are relative paths of plain segments joined by "/" ("" is never a key); check_key() is the one rule. A store never
keeps a buffer that it was given after the call has returned, and never writes to one after it has returned. All
methods may be called from any thread of any process that holds the store: clients are made lazily, one a process.
Errors are StoreError (NotFound, ObjectChanged): they name the redacted URL and say in `.retryable` whether the same
call may succeed later; a back end has done its retrying by then.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from threading import Event
from typing import Protocol, TypeAlias, runtime_checkable

from tiercache.model import ByteRange, ObjectInfo, ShardIdentity
from tiercache.stats import Counters

Buffer: TypeAlias = bytes | bytearray | memoryview
Span: TypeAlias = tuple[ByteRange, memoryview]
"""A range of an object and the writable, contiguous uint8 memory of the same length that it goes to."""


def check_key(key: str) -> str:
    """Return key if it is a valid key.

    Raises:
        ValueError: empty, absolute, with a backslash, NUL, scheme, or an empty, "." or ".." segment.
    """
    segments = key.split("/")
    if "\\" in key or "\0" in key or "://" in key or any(s in ("", ".", "..") for s in segments):
        raise ValueError(
            f"not a valid key: {key!r}; a key is a relative path without empty, '.' or '..' segments, '\\' or NUL"
        )
    return key


class Upload(ABC):
    """An object in the making.

    Nothing is visible under its key before complete() returns. Use as a context manager: leaving it without
    complete() aborts.
    """

    @abstractmethod
    def put_part(self, number: int, data: Buffer) -> None:
        """Add part `number` (0, 1, 2 and so on, without gaps at the end; in any order, from any thread).

        data is held for the call only. Every part but the last has at least min_part_bytes.
        """

    @abstractmethod
    def complete(self, *, if_absent: bool = False) -> ObjectInfo | None:
        """Join the parts in the order of their numbers and publish them, atomically.

        None if if_absent and the key exists.
        """

    @abstractmethod
    def abort(self) -> None:
        """Drop what was uploaded. Never raises for an upload that is already gone."""

    def __enter__(self) -> Upload:
        return self

    def __exit__(self, *exc: object) -> None:
        self.abort()  # harmless after complete()


class Store(ABC):
    """Objects under a root URL.

    Url: for people, without credentials; counters: requests, bytes_read, bytes_written of this process.
    """

    url: str
    counters: Counters
    min_part_bytes: int = 5 << 20

    @abstractmethod
    def head(self, key: str) -> ObjectInfo:
        """Size and identity of an object. Raises NotFound."""

    @abstractmethod
    def get(self, key: str) -> bytes:
        """A whole (small) object. Raises NotFound."""

    @abstractmethod
    def read_tail(self, key: str, n_bytes: int) -> tuple[bytes, ObjectInfo]:
        """The last n_bytes of an object (all of it if it is shorter) and its size and ETag, in one request.

        Raises NotFound.
        """

    @abstractmethod
    def read_into(
        self,
        key: str,
        spans: Sequence[Span],
        *,
        if_match: str | None = None,
        deadline_s: float | None = None,
        cancel: Event | None = None,
    ) -> None:
        """Fill each span's buffer with its range, in as few and as parallel requests as pays.

        if_match: an ETag from head() or read_tail(); deadline_s: seconds from now for the whole call; cancel: when
            set, ends the call
        soon with StoreError. Buffers are undefined after an error.

        Raises:
            NotFound: no such object.
            ObjectChanged: if_match does not match.
            StoreError: a range ends beyond the object (not retryable), the deadline passed (retryable), or the store
            failed.
        """

    @abstractmethod
    def put(self, key: str, data: Buffer) -> ObjectInfo:
        """Write a whole object, atomically, replacing what is there. One request; at most a few MiB."""

    @abstractmethod
    def put_if_absent(self, key: str, data: Buffer) -> bool:
        """Write a whole object if the key is free, atomically, in one request.

        Exactly one of many racing calls returns True.

        Raises:
            StoreError: with .maybe_done True where the answer was lost and the object may have been written.
        """

    @abstractmethod
    def create(self, key: str, *, if_absent: bool = False) -> Upload:
        """Start an upload of any size. if_absent: say here already that complete(if_absent=True) will be asked for.

        Without it, a large upload may refuse that with ValueError: not every store can decide it at the end.
        """

    @abstractmethod
    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; one that is not there is no error."""

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Objects whose key starts with the folder `prefix` ("" or ending in "/"), at any depth, in no promised order.

        Temporary objects of unfinished writes are never listed. A folder that is not there lists nothing.
        """

    @abstractmethod
    def copy(self, src: str, dst: str) -> ObjectInfo:
        """Copy within the store, by the server where it can. Raises NotFound."""

    def close(self) -> None:  # noqa: B027 -- a store without connections has nothing to drop
        """Drop connections and descriptors. The store may be used again after it."""


class Lease(Protocol):
    """A reader's hold on a local copy: while it is open, the bytes stay readable whatever is evicted."""

    @property
    def fd(self) -> int:
        """Descriptor of the copy, owned by the lease; valid where present() is true or wait() returned True."""

    @property
    def n_bytes(self) -> int:
        """Size of the whole object."""

    @property
    def n_descriptors(self) -> int:
        """Number of descriptors that the lease holds, or will hold when the copy is here."""

    def present(self, ranges: Sequence[ByteRange]) -> bool:
        """Whether all these bytes are here now."""

    def want(self, ranges: Sequence[ByteRange]) -> None:
        """Start fetching what is missing, or join who is; returns at once."""

    def wait(self, ranges: Sequence[ByteRange], *, deadline_s: float | None = None) -> bool:
        """Wait until the bytes are here.

        False: they will not come by this way (no room, disk fault): read by ranges instead.

        Raises:
            StoreError: the source failed, or deadline_s (seconds from now) passed; the message says who was waited for.
        """

    def close(self) -> None:
        """Give the copy back. Harmless when repeated."""


@runtime_checkable
class LocalStore(Protocol):
    """A store whose objects can be had as local files: local folders, and the cache round any other store."""

    def open_local(self, key: str, identity: ShardIdentity | None = None) -> Lease | None:
        """A lease on key's local copy (perhaps still to be fetched: see Lease.want).

        None: not here and not to be, read by ranges.

        identity: what the manifest says the object is; a copy that does not match is a miss. Raises NotFound.
        """

    def distrust(self, key: str, identity: ShardIdentity | None = None) -> bool:
        """Hear that key's local copy was found to be wrong.

        True: it was, and is gone: open it again. False: it is right, or the object itself.
        """
