"""The bytes of one object into one file, in parts, with the checksum of the whole."""

from __future__ import annotations

import os
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING

from tiercache._native.checksum import combine, crc32c
from tiercache.model import ByteRange

if TYPE_CHECKING:
    from tiercache.cache.record import Wanted
    from tiercache.store import Store

PART_BYTES = 8 << 20
N_PARTS_IN_FLIGHT = 4


class Download:
    """One attempt. run() is called once; it and its helper threads share the parts under the lock.

    Memory: a buffer of PART_BYTES for each of at most N_PARTS_IN_FLIGHT threads. What was fetched is summed before it
    is written: the checksum says what the source sent.
    """

    def __init__(self, wanted: Wanted, store: Store, fd: int, cancel: Event) -> None:
        """fd: the file, empty, open for writing and owned by the caller. cancel: ends run() soon with StoreError."""
        self._wanted, self._store, self._fd, self._cancel = wanted, store, fd, cancel
        n_bytes = wanted.n_bytes
        self._parts = [ByteRange(i, min(i + PART_BYTES, n_bytes)) for i in range(0, n_bytes, PART_BYTES)]
        self._sums = [0] * len(self._parts)
        self._lock = Lock()
        self._next = 0
        self._error: BaseException | None = None

    def run(self) -> int:
        """Fetch all. Returns the CRC-32C of the whole.

        Raises:
            StoreError: the source failed.
            OSError: the file could not be written.
        """
        n_helpers = min(N_PARTS_IN_FLIGHT, len(self._parts)) - 1
        helpers = [Thread(target=self._work, name="tiercache-part", daemon=True) for _ in range(n_helpers)]
        for helper in helpers:
            helper.start()
        self._work()
        for helper in helpers:
            helper.join()
        if self._error is not None:
            raise self._error
        whole = 0
        for part, part_sum in zip(self._parts, self._sums, strict=True):
            whole = combine(whole, part_sum, part.n_bytes)
        return whole

    def _work(self) -> None:
        try:
            buffer = memoryview(bytearray(min(PART_BYTES, self._wanted.n_bytes)))
            while (number := self._take()) is not None:
                part = self._parts[number]
                data = buffer[: part.n_bytes]
                self._store.read_into(
                    self._wanted.key, [(part, data)], if_match=self._wanted.if_match, cancel=self._cancel
                )
                self._sums[number] = crc32c(data)
                write_all(self._fd, data, part.start)
        except BaseException as error:  # noqa: BLE001 - thread top: run() raises the first
            with self._lock:
                self._error = self._error or error

    def _take(self) -> int | None:
        """The next part's number; None: all are taken, or one failed."""
        with self._lock:
            if self._error is not None or self._next == len(self._parts):
                return None
            self._next += 1
            return self._next - 1


def write_all(fd: int, data: memoryview, offset: int) -> None:
    """Write all of data at offset."""
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)


def checksum_of(fd: int, n_bytes: int) -> int:
    """CRC-32C of the first n_bytes of a file; a shorter one gives another sum. Raises OSError: it cannot be read."""
    buffer = memoryview(bytearray(min(PART_BYTES, n_bytes)))
    whole, offset = 0, 0
    while offset < n_bytes:
        n_read = os.preadv(fd, [buffer[: n_bytes - offset]], offset)
        if not n_read:
            break
        whole = crc32c(buffer[:n_read], whole)
        offset += n_read
    return whole
