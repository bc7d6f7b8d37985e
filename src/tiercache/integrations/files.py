"""File objects of the file system: one reads through the cache, the other writes and drops the cached copy."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from tiercache.integrations.reading import MOST_AHEAD_BYTES, ReadaheadPolicy
from tiercache.model import ByteRange
from tiercache.store import redact

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

    from tiercache.integrations.reading import ObjectReader

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
        raw = _Raw(reading, ReadaheadPolicy(block_bytes or MOST_AHEAD_BYTES))
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
        self._source.read_into(ByteRange(position, position + n_bytes), view[:n_bytes])
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


class _Raw(io.RawIOBase):
    """A raw file: the position of one reader in a Reading, which it owns."""

    def __init__(self, reading: ObjectReader, ahead: ReadaheadPolicy) -> None:
        super().__init__()
        self._reading, self._ahead, self._position = reading, ahead, 0

    def read_range(self, wanted: ByteRange) -> bytes:
        """Return the bytes of a range; the position stays."""
        ahead_bytes = self._ahead.readahead_bytes(wanted)
        if ahead_bytes:
            self._reading.prefetch([ByteRange(wanted.start, min(wanted.end + ahead_bytes, self._reading.n_bytes))])
        return self._reading.read(wanted)

    def read_into(self, wanted: ByteRange, buffer: memoryview) -> None:
        """Fill buffer with a range; the position stays."""
        self._reading.read_into(wanted, buffer, ahead_bytes=self._ahead.readahead_bytes(wanted))

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        view = memoryview(buffer).cast("B")
        n_bytes = min(len(view), max(self._reading.n_bytes - self._position, 0))
        self.read_into(ByteRange(self._position, self._position + n_bytes), view[:n_bytes])
        self._position += n_bytes
        return n_bytes

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        starts = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._reading.n_bytes}
        if whence not in starts:
            raise ValueError(f"whence must be 0, 1 or 2, got {whence}")
        position = starts[whence] + offset
        if position < 0:
            raise ValueError(f"cannot seek to {position}: the position must not be negative")
        self._position = position
        return position

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
