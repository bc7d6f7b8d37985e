"""A read-only file object over an object of a store, for libraries that read files (zipfile, pyarrow, Pillow)."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from tiercache.model import ByteRange

if TYPE_CHECKING:
    from tiercache.store.contract import Store


class StoreFile(io.RawIOBase):
    """A seekable raw file over an object. Each read is one range request. Only one thread may use it at a time."""

    def __init__(self, store: Store, key: str, n_bytes: int, etag: str | None = None) -> None:
        """Open the object as a file, without a request.

        Args:
            store: Store that holds the object.
            key: Key of the object.
            n_bytes: Size of the object.
            etag: ETag that the object must have; a read of a changed object raises ObjectChanged. None: do not check.
        """
        super().__init__()
        self.store, self.key, self.n_bytes, self.etag = store, key, n_bytes, etag
        self._position = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Set and return the position. Raises ValueError if the position is negative."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.n_bytes}[whence]
        if base + offset < 0:
            raise ValueError(f"cannot seek to {base + offset}: the position must not be negative")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill buffer from the position on.

        Return the number of bytes read, 0 at the end. Raises as Store.read_into().
        """
        view = memoryview(buffer).cast("B")
        end = min(self._position + view.nbytes, self.n_bytes)
        wanted = ByteRange(self._position, max(self._position, end))
        if wanted.n_bytes:
            self.fill(wanted, view[: wanted.n_bytes])
            self._position = end
        return wanted.n_bytes

    def fill(self, wanted: ByteRange, buffer: memoryview) -> None:
        """Fill buffer with a byte range of the object."""
        self.store.read_into(self.key, [(wanted, buffer)], if_match=self.etag)
