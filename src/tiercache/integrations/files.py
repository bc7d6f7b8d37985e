"""What the file system hands out: a file that is read through the cache, and one whose writing drops the copy."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from tiercache.integrations.reading import MOST_AHEAD_BYTES, Ahead
from tiercache.model import ByteRange
from tiercache.store import redact

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

    from tiercache.integrations.reading import Reading

# Two units of the cache: what a small random read costs at most beyond itself.
BUFFER_BYTES = 8192


class FileSystem(Protocol):
    """What a file needs of the file system that made it."""

    def open(self, path: str, mode: str, **options: Any) -> Any:
        """Another file of that path."""

    def info(self, path: str) -> dict[str, Any]:
        """What the target says of it."""

    def unstrip_protocol(self, name: str) -> str:
        """The URL of a path."""


class CachedFile(io.BufferedReader):
    """An open file of the cache, for reading. Its bytes are those of the object that was opened.

    Any thread may use it; it has one position for all. A pickle opens the path again at the same position.
    """

    def __init__(self, fs: FileSystem, path: str, reading: Reading, block_bytes: int | None = None) -> None:
        """Take over reading. block_bytes: most to be fetched ahead of a reader who reads on and on."""
        raw = _Raw(reading, Ahead(block_bytes or MOST_AHEAD_BYTES))
        super().__init__(raw, BUFFER_BYTES)
        self._source = raw
        self.fs, self.path, self.size = fs, path, reading.n_bytes
        self.blocksize = block_bytes or MOST_AHEAD_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        """Up to size bytes; None or negative: all that is left. One request where it is larger than the buffer."""
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
        """The position."""
        return self.tell()

    @property
    def mode(self) -> str:
        """Always "rb"."""
        return "rb"

    @property
    def full_name(self) -> str:
        """URL that opens it again."""
        return self.fs.unstrip_protocol(self.path)

    @property
    def details(self) -> Mapping[str, Any]:
        """What the target says of the path now."""
        return self.fs.info(self.path)

    def info(self) -> Mapping[str, Any]:
        """What the target says of the path now."""
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
    """The position of one reader in a Reading, which it owns."""

    def __init__(self, reading: Reading, ahead: Ahead) -> None:
        super().__init__()
        self._reading, self._ahead, self._position = reading, ahead, 0

    def read_range(self, wanted: ByteRange) -> bytes:
        """Bytes of a range; the position stays."""
        ahead_bytes = self._ahead.after(wanted)
        if ahead_bytes:
            self._reading.want([ByteRange(wanted.start, min(wanted.end + ahead_bytes, self._reading.n_bytes))])
        return self._reading.read(wanted)

    def read_into(self, wanted: ByteRange, buffer: memoryview) -> None:
        """Fill buffer with a range; the position stays."""
        self._reading.read_into(wanted, buffer, ahead_bytes=self._ahead.after(wanted))

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
            raise ValueError(f"whence is 0, 1 or 2, got {whence}")
        position = starts[whence] + offset
        if position < 0:
            raise ValueError(f"cannot seek to {position}: a position is not negative")
        self._position = position
        return position

    def close(self) -> None:
        if not self.closed:
            self._reading.close()
        super().close()


class WrittenFile:
    """A file of the target that is open for writing; the cached copy of what was there goes when it is closed."""

    def __init__(self, file: Any, drop: Callable[[], None]) -> None:
        """Take over file."""
        self._file, self._drop = file, drop

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # no pickle, no copy: there is one writer
            raise AttributeError(name)
        return getattr(self.__dict__["_file"], name)

    def close(self) -> None:
        """Close the target's file."""
        try:
            self._file.close()
        finally:
            self._drop()

    def commit(self) -> None:
        """Make what was written the file."""
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
