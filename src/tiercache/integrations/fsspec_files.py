"""Files of the `tiercache` file system: reads of one object through the cache, and writes that drop the cached copy."""

from __future__ import annotations

import io
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from io import BytesIO
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol

from tiercache.errors import ObjectChanged
from tiercache.model import ByteRange
from tiercache.store import StoreFile, redact

if TYPE_CHECKING:
    from collections.abc import Sequence

    from _typeshed import WriteableBuffer

    from tiercache.cache import CachedStore
    from tiercache.cache.lease import CopyLease
    from tiercache.cache.names import CopySpec


# Table readers request whole column chunks; readers of text and archives request a few KiB at a time. A read larger
# than SMALL_BYTES is probably a deliberate choice, so readahead starts only after many such reads in a row.
SMALL_BYTES = 64 << 10
N_SMALL_IN_A_ROW = 3
N_LARGE_IN_A_ROW = 8
LEAST_AHEAD_BYTES = 128 << 10
MOST_AHEAD_BYTES = 8 << 20
# Size that is verified and copied at once for small sequential reads: for 8 KiB, the overhead exceeds the copy itself.
BLOCK_BYTES = 256 << 10


class ReadaheadPolicy:
    """Readahead policy of one reader: how many bytes to fetch beyond a read. Pure; needs no lock."""

    def __init__(self, most_bytes: int = MOST_AHEAD_BYTES) -> None:
        """Start without history. most_bytes: Maximum readahead in bytes."""
        self._most_bytes = most_bytes
        self._next, self._n_in_a_row, self._run_bytes = -1, 0, 0

    def readahead_bytes(self, wanted: ByteRange) -> int:
        """Return the number of bytes to fetch beyond wanted; 0 if wanted does not start where the last read ended."""
        if wanted.start != self._next:
            self._n_in_a_row = self._run_bytes = 0
        self._next = wanted.end
        self._n_in_a_row += 1
        self._run_bytes += wanted.n_bytes
        needed = N_SMALL_IN_A_ROW if wanted.n_bytes <= SMALL_BYTES else N_LARGE_IN_A_ROW
        if self._n_in_a_row < needed:
            return 0
        # As much as was read in this run: a reader that stops has fetched at most twice the bytes it read.
        return min(max(self._run_bytes, LEAST_AHEAD_BYTES), self._most_bytes)


class ObjectReader:
    """An open object. All bytes come from the object that was opened, whatever its key names now.

    Any thread may read. The lock is held during a read, so reads run one at a time and close() never closes a
    descriptor in use. After a fork, the child continues with its own lease.
    """

    def __init__(self, store: CachedStore, wanted: CopySpec) -> None:
        """Take a lease on the cached copy, which may still have to be fetched."""
        self.store, self.key, self.n_bytes = store, wanted.key, wanted.n_bytes
        self._wanted = wanted
        self._lease: CopyLease | None = store.open_copy(wanted)
        self._lock = Lock()
        self._block_start, self._block = 0, bytearray()
        _readings.add(self)

    def prefetch(self, ranges: Sequence[ByteRange]) -> None:
        """Start to fetch the missing bytes of the ranges. Returns at once."""
        with self._lock:
            if self._lease is not None:
                self._lease.prefetch(ranges)

    def read(self, wanted: ByteRange) -> bytes:
        """Return the bytes of a range that ends within the object. Raises as read_into()."""
        # BytesIO returns its own buffer without a copy, because nothing else refers to it.
        whole = BytesIO(bytes(wanted.n_bytes))
        with whole.getbuffer() as view:
            self.read_into(wanted, view)
        return whole.getvalue()

    def read_into(self, wanted: ByteRange, buffer: memoryview, *, ahead_bytes: int = 0) -> None:
        """Fill buffer with a range that ends within the object.

        Args:
            wanted: Range of the object.
            buffer: Writable uint8 memory of the length of the range.
            ahead_bytes: Number of bytes after the range that are fetched too. The call waits for a small block of them
                only.

        Raises:
            NotFound: The object is gone, and the range is not cached.
            ObjectChanged: The object was replaced, and the range is not cached.
            StoreError: The source failed.
        """
        if not wanted.n_bytes:
            return
        with self._lock:
            start = wanted.start - self._block_start
            if start >= 0 and start + wanted.n_bytes <= len(self._block):
                buffer[:] = memoryview(self._block)[start : start + wanted.n_bytes]
                return
            if not self._read_cached(wanted, buffer, ahead_bytes):
                self._read_source(wanted, buffer, ahead_bytes)

    def _read_cached(self, wanted: ByteRange, buffer: memoryview, ahead_bytes: int) -> bool:
        """Read from the copy. Return False if the range will not be cached. A wrong copy is fetched again."""
        for _ in range(2):
            lease = self._lease
            if lease is None:
                return False
            if ahead_bytes:
                lease.prefetch([self._until(wanted, ahead_bytes)])
            if not (lease.present([wanted]) or lease.wait([wanted])):
                return False
            block = self._until(wanted, min(ahead_bytes, BLOCK_BYTES))
            if block != wanted and lease.present([block]) and self._keep_block(lease, block, buffer):
                return True
            if self._checked(lease, wanted, buffer):
                return True
            lease.close()
            self._lease = self.store.open_copy(self._wanted)
        return False

    def _checked(self, lease: CopyLease, wanted: ByteRange, buffer: memoryview) -> bool:
        """Read cached bytes, and verify each unit's checksum: no other code checks these bytes."""
        spans = [(wanted, buffer)]
        # Read through the lease if it is on a partial copy, because the partial copy of a changed object has lost its
        # name. Otherwise read by name, which also removes a wrong copy from the cache.
        return lease.read(spans) or self.store.read_copy(self._wanted, spans)

    def _keep_block(self, lease: CopyLease, block: ByteRange, buffer: memoryview) -> bool:
        """Read a cached block into memory for a sequential reader of small pieces.

        Return False if the block is wrong.
        """
        data = bytearray(block.n_bytes)
        if not self._checked(lease, block, memoryview(data)):
            return False
        self._block_start, self._block = block.start, data
        buffer[:] = memoryview(data)[: buffer.nbytes]
        return True

    def _until(self, wanted: ByteRange, ahead_bytes: int) -> ByteRange:
        return ByteRange(wanted.start, min(wanted.end + ahead_bytes, self.n_bytes))

    def _read_source(self, wanted: ByteRange, buffer: memoryview, ahead_bytes: int) -> None:
        """Read ranges from the source. A sequential reader of small pieces is served from a larger block."""
        block = self._until(wanted, ahead_bytes)
        if block == wanted:
            self._from_source(wanted, buffer)
            return
        data = bytearray(block.n_bytes)
        self._from_source(block, memoryview(data))
        self._block_start, self._block = block.start, data
        buffer[:] = memoryview(data)[: wanted.n_bytes]

    def _from_source(self, wanted: ByteRange, buffer: memoryview) -> None:
        if_match = self._wanted.if_match
        self.store.inner.read_into(self._wanted.key, [(wanted, buffer)], if_match=if_match)
        if if_match is not None:
            return
        # Without an ETag to check, the object must have the same description after the read.
        found = self.store.spec_of(self._wanted.key)
        if found is None or found.name != self._wanted.name:
            raise ObjectChanged(
                url=self._wanted.source, expected=self._wanted.etag, found=None if found is None else found.etag
            )

    def close(self) -> None:
        """Release the lease. Repeated calls have no effect."""
        with self._lock:
            lease, self._lease, self._block = self._lease, None, bytearray()
        if lease is not None:
            lease.close()

    def __enter__(self) -> ObjectReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _renew_lock(self) -> None:
        """Create a new lock in a forked child, because a thread of the parent may have held the old one."""
        self._lock = Lock()


_readings: weakref.WeakSet[ObjectReader] = weakref.WeakSet()


def _renew_locks() -> None:
    for reading in list(_readings):
        reading._renew_lock()  # noqa: SLF001 - same module


os.register_at_fork(after_in_child=_renew_locks)


# Two units of the cache: the maximum overhead of a small random read.
BUFFER_BYTES = 8192


class FileSystem(Protocol):
    """The methods of the file system that a file uses."""

    def open(self, path: str, mode: str, **options: Any) -> Any:
        """Open a file of that path."""

    def info(self, path: str) -> dict[str, Any]:
        """Return the target's description of the path."""

    def unstrip_protocol(self, name: str) -> str:
        """Return the URL of a path."""


class CachedFile(io.BufferedReader):
    """A file of the cache, open for reading.

    It always reads the object that was opened, even if the object is replaced.

    Safe for threads, which share one position. A pickled file opens the path again at the same position.
    """

    def __init__(self, fs: FileSystem, path: str, reading: ObjectReader, block_bytes: int | None = None) -> None:
        """Take ownership of reading.

        Args:
            fs: File system that opened the file.
            path: Path of the file.
            reading: Open object.
            block_bytes: Maximum readahead for a sequential reader.
        """
        raw = _RawFile(reading, ReadaheadPolicy(block_bytes or MOST_AHEAD_BYTES))
        super().__init__(raw, BUFFER_BYTES)
        self._source = raw
        self.fs, self.path, self.size = fs, path, reading.n_bytes
        self.blocksize = block_bytes or MOST_AHEAD_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        """Return up to size bytes; None or a negative size: the rest. A read larger than the buffer is one request."""
        position = self.tell()
        n_left = max(self.size - position, 0)
        n_bytes = n_left if size is None or size < 0 else min(size, n_left)
        if n_bytes <= BUFFER_BYTES:
            return super().read(n_bytes)
        data = self._source.read_range(ByteRange(position, position + n_bytes))
        self.seek(position + n_bytes)
        return data

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        """As read(), into the caller's memory."""
        view = memoryview(buffer).cast("B")
        position = self.tell()
        n_bytes = min(len(view), max(self.size - position, 0))
        if n_bytes <= BUFFER_BYTES:
            return super().readinto(view)
        self._source.fill(ByteRange(position, position + n_bytes), view[:n_bytes])
        self.seek(position + n_bytes)
        return n_bytes

    @property
    def loc(self) -> int:
        """Position in the file."""
        return self.tell()

    @property
    def mode(self) -> str:
        """Mode of the file: "rb"."""
        return "rb"

    @property
    def full_name(self) -> str:
        """URL that opens the file again."""
        return self.fs.unstrip_protocol(self.path)

    @property
    def details(self) -> Mapping[str, Any]:
        """The target's present description of the path."""
        return self.fs.info(self.path)

    def info(self) -> Mapping[str, Any]:
        """Return the target's present description of the path."""
        return self.details

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (self.fs, self.path, self.tell(), self.blocksize)

    def __reduce_ex__(self, protocol: Any, /) -> tuple[Any, ...]:
        return self.__reduce__()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {redact(self.path)!r}>"


def _reopened(fs: FileSystem, path: str, position: int, block_bytes: int) -> Any:
    file = fs.open(path, "rb", block_size=block_bytes)
    file.seek(position)
    return file


class _RawFile(StoreFile):
    """A raw file: the position of one reader in an ObjectReader, which it owns."""

    def __init__(self, reading: ObjectReader, ahead: ReadaheadPolicy) -> None:
        super().__init__(reading.store, reading.key, reading.n_bytes)
        self._reading, self._ahead = reading, ahead

    def read_range(self, wanted: ByteRange) -> bytes:
        """Return the bytes of a range; the position stays."""
        ahead_bytes = self._ahead.readahead_bytes(wanted)
        if ahead_bytes:
            self._reading.prefetch([ByteRange(wanted.start, min(wanted.end + ahead_bytes, self.n_bytes))])
        return self._reading.read(wanted)

    def fill(self, wanted: ByteRange, buffer: memoryview) -> None:
        """Fill buffer with a range; the position stays."""
        self._reading.read_into(wanted, buffer, ahead_bytes=self._ahead.readahead_bytes(wanted))

    def close(self) -> None:
        if not self.closed:
            self._reading.close()
        super().close()


class WrittenFile:
    """A file of the target, open for writing. Closing it drops the cached copy of its former contents."""

    def __init__(self, file: Any, drop: Callable[[], None]) -> None:
        """Take ownership of file."""
        self._file, self._drop = file, drop

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # cannot be pickled or copied: there is one writer
            raise AttributeError(name)
        return getattr(self.__dict__["_file"], name)

    def close(self) -> None:
        """Close the target's file."""
        try:
            self._file.close()
        finally:
            self._drop()

    def commit(self) -> None:
        """Publish the bytes written."""
        try:
            self._file.commit()
        finally:
            self._drop()

    def __enter__(self) -> WrittenFile:
        self._file.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            self._file.__exit__(*exc)
        finally:
            self._drop()

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._file)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {type(self._file).__name__}>"
