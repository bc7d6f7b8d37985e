"""The lease on a local file, and the upload that writes a local file in parts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from threading import Condition

from tiercache.model import ByteRange, ObjectInfo
from tiercache.stats import Counters
from tiercache.store.contract import Buffer, Upload
from tiercache.store.direct import CACHED_BYTES, MIN_BYTES, DirectWriter
from tiercache.store.parts import parts_in_order
from tiercache.store.posix import UnpublishedFile, copy_bytes, file_info, os_errors, write_all


class FileLease:
    """A lease on a whole local file: an open descriptor. All bytes are local."""

    def __init__(self, fd: int, n_bytes: int) -> None:
        self._fd, self._n_bytes = fd, n_bytes

    @property
    def fd(self) -> int:
        """Descriptor of the file, -1 after close()."""
        return self._fd

    @property
    def n_bytes(self) -> int:
        """Size of the file when it was opened."""
        return self._n_bytes

    @property
    def n_descriptors(self) -> int:
        """Number of descriptors: 1."""
        return 1

    def present(self, ranges: Sequence[ByteRange]) -> bool:
        """Return whether the ranges lie inside the file."""
        return all(wanted.end <= self._n_bytes for wanted in ranges)

    def prefetch(self, ranges: Sequence[ByteRange]) -> None:
        """Ask the kernel to read the ranges ahead."""
        for wanted in ranges:
            if wanted.n_bytes:
                os.posix_fadvise(self._fd, wanted.start, wanted.n_bytes, os.POSIX_FADV_WILLNEED)

    def wait(self, ranges: Sequence[ByteRange], *, deadline_s: float | None = None) -> bool:  # noqa: ARG002 - the contract
        """Return present(): there is nothing to wait for."""
        return self.present(ranges)

    def close(self) -> None:
        """Close the descriptor."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> FileLease:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class FileUpload(Upload):
    """An upload that appends parts to an unpublished file as they come. complete() reorders them if necessary.

    The lock guards the table of parts and the number of writers; bytes are written outside the lock. The file is closed
    only when no writer is left, because a descriptor closed during a write could by then refer to another file.
    """

    def __init__(self, file: UnpublishedFile, name: str, key: str, url: str, counters: Counters) -> None:
        self._file, self._name, self._key, self._url, self._counters = file, name, key, url, counters
        self._changed = Condition()
        self._end = 0
        self._n_writers = 0
        self._parts: dict[int, ByteRange] = {}
        self._direct: DirectWriter | None = None  # created for the first part that may bypass the page cache
        self._open = True

    def put_part(self, number: int, data: Buffer) -> None:
        """Append the part to the file."""
        flat = memoryview(data).cast("B")
        with self._changed:
            if number < 0 or not self._open:
                raise ValueError(
                    f"{self._key}: part {number}: numbers start at 0, and parts must come before complete() or abort()"
                )
            if self._direct is None and flat.nbytes >= MIN_BYTES and self._counters["bytes_written"] >= CACHED_BYTES:
                self._direct = DirectWriter(self._file.fd)
            place = ByteRange(self._end, self._end + flat.nbytes)
            self._end = place.end
            self._n_writers += 1
        written = False
        try:
            with os_errors(f"put_part {number}", self._url):
                n_direct = self._direct.write(flat, place.start) if self._direct is not None else 0
                write_all(self._file.fd, flat[n_direct:], place.start + n_direct)
            written = True
        finally:
            with self._changed:
                self._n_writers -= 1
                if written:
                    self._parts[number] = place
                self._changed.notify_all()
        self._counters.add("bytes_written", flat.nbytes)

    def complete(self, *, if_absent: bool = False) -> ObjectInfo | None:
        """Publish the file, after reordering the parts if necessary."""
        if not self._stop_writing():
            raise ValueError(f"{self._key}: the upload is already completed or aborted")
        try:
            with os_errors("complete", self._url):
                places = parts_in_order(self._parts, self._key)
                if _is_contiguous(places, self._end):
                    return self._publish(self._file, if_absent=if_absent)
                ordered = self._file.sibling()
                try:
                    self._reorder(places, ordered.fd)
                    return self._publish(ordered, if_absent=if_absent)
                finally:
                    ordered.close()
        finally:
            self._close()

    def _publish(self, file: UnpublishedFile, *, if_absent: bool) -> ObjectInfo | None:
        if not if_absent:
            file.publish(self._name)
        elif not file.publish_if_absent(self._name):
            return None
        return file_info(self._key, os.fstat(file.fd))

    def _reorder(self, places: Sequence[ByteRange], dst_fd: int) -> None:
        end = 0
        for place in places:
            copy_bytes(self._file.fd, dst_fd, place.n_bytes, place.start, end)
            end += place.n_bytes

    def abort(self) -> None:
        """Discard the file."""
        if self._stop_writing():
            self._close()

    def _close(self) -> None:
        if self._direct is not None:
            self._direct.close()
        self._file.close()

    def _stop_writing(self) -> bool:
        """Refuse further parts and wait for writers. Return False if the upload was stopped before."""
        with self._changed:
            was_open, self._open = self._open, False
            self._changed.wait_for(lambda: not self._n_writers)
            return was_open


def _is_contiguous(places: Sequence[ByteRange], end: int) -> bool:
    starts = [place.start for place in places]
    ends = [place.end for place in places]
    return starts == [0, *ends][: len(starts)] and (ends[-1] if ends else 0) == end
