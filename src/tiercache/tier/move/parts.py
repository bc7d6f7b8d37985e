"""The parts in which an object is copied: their byte ranges, their buffers, and the rate limit of reads."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Event, Lock

from tiercache.errors import StoreError
from tiercache.model import ByteRange, ObjectInfo
from tiercache.store import Store
from tiercache.waiting import Clock, pause

PART_BYTES = 8 << 20
# Limit of S3 for one object.
MOST_PARTS = 10_000


def ranges_of(n_bytes: int) -> list[tuple[int, ByteRange]]:
    """Return the numbered parts of an object: of 8 MiB, or longer where there would be more parts than S3 allows."""
    step = max(PART_BYTES, -(-n_bytes // MOST_PARTS))
    starts = range(0, n_bytes, step) or (0,)
    return [(number, ByteRange(start, min(start + step, n_bytes))) for number, start in enumerate(starts)]


@dataclass(frozen=True, slots=True)
class PartReader:
    """An object that is read in parts. All parts are of the object version in `info`."""

    store: Store
    info: ObjectInfo
    cancel: Event

    def read(self, span: ByteRange, data: memoryview) -> None:
        """Fill data with the bytes of span."""
        if self.cancel.is_set():
            raise cancelled(f"{self.store.url}/{self.info.key}")
        if not span.n_bytes:
            return
        try:
            self.store.read_into(self.info.key, [(span, data)], if_match=self.info.etag, cancel=self.cancel)
        except StoreError as error:
            if self.cancel.is_set():
                raise cancelled(error.url) from error
            raise


@dataclass(frozen=True, slots=True)
class CopiedPart:
    """A part that was read. buffer: Holds its bytes where they are still to be written, otherwise None."""

    crc32c: int
    n_bytes: int
    buffer: PartBuffer | None


class PartBuffer:
    """Memory of a part. It consists of whole pages, which a local folder writes with direct I/O."""

    def __init__(self, n_bytes: int) -> None:
        # Private pages: the first touch of 128 MiB took 65 ms of CPU time, of shared pages 95 ms.
        self._pages = mmap.mmap(-1, max(n_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.data = memoryview(self._pages)

    @property
    def n_bytes(self) -> int:
        """Length of the buffer, in bytes."""
        return self.data.nbytes


class PartBufferPool:
    """Pool of buffers: new memory costs a page fault for every 4 KiB. Small buffers are not kept. Thread-safe."""

    def __init__(self) -> None:
        self._free: SimpleQueue[PartBuffer] = SimpleQueue()

    def take(self, n_bytes: int) -> PartBuffer:
        """Return a buffer of at least n_bytes."""
        if n_bytes < PART_BYTES:
            return PartBuffer(n_bytes)
        try:
            buffer = self._free.get_nowait()
        except Empty:
            return PartBuffer(n_bytes)
        return buffer if buffer.n_bytes >= n_bytes else PartBuffer(n_bytes)

    def give(self, buffer: PartBuffer | None) -> None:
        """Return a buffer to the pool."""
        if buffer is not None and buffer.n_bytes == PART_BYTES:
            self._free.put(buffer)

    def clear(self) -> None:
        """Drop all free buffers."""
        self._free = SimpleQueue()


class RateLimit:
    """Rate limit of reads, in the order of the requests. The lock guards the time until which the rate is used up."""

    def __init__(self, rate_bytes_s: int | None, clock: Clock, cancel: Event) -> None:
        self._rate_bytes_s, self._clock, self._cancel = rate_bytes_s, clock, cancel
        self._lock = Lock()
        self._free_s = clock.monotonic()

    def take(self, n_bytes: int) -> None:
        """Wait until n_bytes may be read, or until cancelled."""
        if self._rate_bytes_s is None:
            return
        with self._lock:
            now_s = self._clock.monotonic()
            start_s = max(self._free_s, now_s)
            self._free_s = start_s + n_bytes / self._rate_bytes_s
        if start_s > now_s:
            pause(start_s - now_s, self._clock, self._cancel)


def cancelled(where: str) -> StoreError:
    """Return the error of a cancelled copy."""
    return StoreError("cancelled", url=where, retryable=True, cancelled=True)
