"""Files of the `tiercache` file system: reads of one object through the cache, and writes that drop the cached copy."""

from __future__ import annotations

import io
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from io import BytesIO
from threading import Lock
from typing import TYPE_CHECKING, Any

from tiercache.errors import ObjectChanged, StoreError
from tiercache.model import ByteRange
from tiercache.store import Span, StoreFile, redact
from tiercache.store.placement.locations import archived_file_error
from tiercache.store.placement.resolver import is_archived

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
    """Readahead policy of one reader: how many bytes, at most most_bytes, to fetch beyond a read. Needs no lock."""

    def __init__(self, most_bytes: int = MOST_AHEAD_BYTES) -> None:
        self._most_bytes = most_bytes
        self._next, self._n_in_a_row, self._run_bytes = -1, 0, 0

    def readahead_bytes(self, byte_range: ByteRange) -> int:
        """Return the number of bytes to fetch beyond wanted; 0 if wanted does not start where the last read ended."""
        if byte_range.start != self._next:
            self._n_in_a_row = self._run_bytes = 0
        self._next = byte_range.end
        self._n_in_a_row += 1
        self._run_bytes += byte_range.n_bytes
        needed = N_SMALL_IN_A_ROW if byte_range.n_bytes <= SMALL_BYTES else N_LARGE_IN_A_ROW
        if self._n_in_a_row < needed:
            return 0
        # As much as was read in this run: a reader that stops has fetched at most twice the bytes it read.
        return min(max(self._run_bytes, LEAST_AHEAD_BYTES), self._most_bytes)


class ObjectReader:
    """An open object. All bytes come from the object that was opened, whatever its key names now.

    Any thread may read. The lock is held during a read, so reads run one at a time and close() never closes a
    descriptor in use. After a fork, the child continues with its own lease.
    """

    def __init__(self, store: CachedStore, spec: CopySpec) -> None:
        self.store, self.key, self.n_bytes = store, spec.key, spec.n_bytes
        self._spec = spec
        self._lease: CopyLease | None = store.open_copy(spec)
        self._lock = Lock()
        self._block_start, self._block = 0, bytearray()
        _readings.add(self)

    def prefetch(self, ranges: Sequence[ByteRange]) -> None:
        """Start to fetch the missing bytes of the ranges. Returns at once."""
        with self._lock:
            if self._lease is not None:
                self._lease.prefetch(ranges)

    def read(self, byte_range: ByteRange) -> bytes:
        """Return the bytes of a range that ends within the object. Raises as read_into()."""
        # BytesIO returns its own buffer without a copy, because nothing else refers to it.
        whole = BytesIO(bytes(byte_range.n_bytes))
        with whole.getbuffer() as view:
            self.read_into(byte_range, view)
        return whole.getvalue()

    def read_into(self, byte_range: ByteRange, buffer: memoryview, *, ahead_bytes: int = 0) -> None:
        """Fill buffer with a range that ends within the object, and fetch up to ahead_bytes after it.

        The call waits for a small block of the bytes ahead only. Raises NotFound or ObjectChanged if the range is not
        cached and the object is gone or replaced, ArchivedShards if it must be restored first, and StoreError.
        """
        if not byte_range.n_bytes:
            return
        with self._lock:
            start = byte_range.start - self._block_start
            if start >= 0 and start + byte_range.n_bytes <= len(self._block):
                buffer[:] = memoryview(self._block)[start : start + byte_range.n_bytes]
                return
            try:
                if not self._read_cached(byte_range, buffer, ahead_bytes):
                    self._read_block(self._until(byte_range, ahead_bytes), buffer, self._read_source)
            except StoreError as error:
                if is_archived(error):
                    raise archived_file_error(self._spec.source, self.n_bytes) from error
                raise

    def _until(self, byte_range: ByteRange, ahead_bytes: int) -> ByteRange:
        return ByteRange(byte_range.start, min(byte_range.end + ahead_bytes, self.n_bytes))

    def _read_cached(self, byte_range: ByteRange, buffer: memoryview, ahead_bytes: int) -> bool:
        """Read from the copy. Return False if the range will not be cached. A wrong copy is fetched again."""
        for _ in range(2):
            lease = self._lease
            if lease is None:
                return False
            if ahead_bytes:
                lease.prefetch([self._until(byte_range, ahead_bytes)])
            if not (lease.present([byte_range]) or lease.wait([byte_range])):
                return False
            block = self._until(byte_range, min(ahead_bytes, BLOCK_BYTES)) if ahead_bytes else byte_range
            if ahead_bytes and not lease.present([block]):
                block = byte_range
            if self._read_block(block, buffer, self._read_copy):
                return True
            lease.close()
            self._lease = self.store.open_copy(self._spec)
        return False

    def _read_block(self, block: ByteRange, buffer: memoryview, read: Callable[[list[Span]], bool]) -> bool:
        """Read a block that begins with the wanted range; keep a longer one for a sequential reader of small pieces."""
        if block.n_bytes == buffer.nbytes:
            return read([(block, buffer)])
        data = bytearray(block.n_bytes)
        if not read([(block, memoryview(data))]):
            return False
        self._block_start, self._block = block.start, data
        buffer[:] = memoryview(data)[: buffer.nbytes]
        return True

    def _read_copy(self, spans: list[Span]) -> bool:
        """Read cached bytes, and verify each unit's checksum: no other code checks these bytes."""
        # Read through the lease if it is on a partial copy, because the partial copy of a changed object has lost its
        # name. Otherwise read by name, which also removes a wrong copy from the cache.
        lease = self._lease
        return (lease is not None and lease.read(spans)) or self.store.read_copy(self._spec, spans)

    def _read_source(self, spans: list[Span]) -> bool:
        if_match = self._spec.if_match
        self.store.inner.read_into(self._spec.key, spans, if_match=if_match)
        if if_match is None:
            # Without an ETag to check, the object must have the same description after the read.
            found = self.store.spec_of(self._spec.key)
            if found is None or found.name != self._spec.name:
                raise ObjectChanged(
                    url=self._spec.source, expected=self._spec.etag, found=None if found is None else found.etag
                )
        return True

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


_readings: weakref.WeakSet[ObjectReader] = weakref.WeakSet()


def _renew_locks() -> None:
    # A thread of the parent may have held a lock at the fork.
    for reading in list(_readings):
        reading._lock = Lock()  # noqa: SLF001 - same module


os.register_at_fork(after_in_child=_renew_locks)


# Two units of the cache: the maximum overhead of a small random read.
BUFFER_BYTES = 8192


class CachedFile(io.BufferedReader):
    """A file of the cache, open for reading. It reads the object that was opened, even if the object is replaced.

    It owns `reading`; block_bytes limits its readahead. Safe for threads, which share one position. A pickled file
    opens the path again at the same position.
    """

    def __init__(self, fs: Any, path: str, reading: ObjectReader, block_bytes: int | None = None) -> None:
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
        return str(self.fs.unstrip_protocol(self.path))

    @property
    def details(self) -> Mapping[str, Any]:
        """The target's present description of the path."""
        return self.info()

    def info(self) -> Mapping[str, Any]:
        """Return the target's present description of the path."""
        found: Mapping[str, Any] = self.fs.info(self.path)
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (self.fs, self.path, self.tell(), self.blocksize)

    def __reduce_ex__(self, protocol: Any, /) -> tuple[Any, ...]:
        return self.__reduce__()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {redact(self.path)!r}>"


def _reopened(fs: Any, path: str, position: int, block_bytes: int) -> Any:
    file = fs.open(path, "rb", block_size=block_bytes)
    file.seek(position)
    return file


class _RawFile(StoreFile):
    """A raw file: the position of one reader in an ObjectReader, which it owns."""

    def __init__(self, reading: ObjectReader, ahead: ReadaheadPolicy) -> None:
        super().__init__(reading.store, reading.key, reading.n_bytes)
        self._reading, self._ahead = reading, ahead

    def read_range(self, byte_range: ByteRange) -> bytes:
        """Return the bytes of a range; the position stays."""
        ahead_bytes = self._ahead.readahead_bytes(byte_range)
        if ahead_bytes:
            self._reading.prefetch([ByteRange(byte_range.start, min(byte_range.end + ahead_bytes, self.n_bytes))])
        return self._reading.read(byte_range)

    def fill(self, byte_range: ByteRange, buffer: memoryview) -> None:
        """Fill buffer with a range; the position stays."""
        self._reading.read_into(byte_range, buffer, ahead_bytes=self._ahead.readahead_bytes(byte_range))

    def close(self) -> None:
        if not self.closed:
            self._reading.close()
        super().close()


class WrittenFile:
    """A file of the target, open for writing. Closing it drops the cached copy of its former contents."""

    def __init__(self, file: Any, drop: Callable[[], None]) -> None:
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
