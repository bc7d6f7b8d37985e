"""`Download`: the transfer of one fetch from the store into a partial copy, piece by piece, urgent units first."""

from __future__ import annotations

from threading import Lock, Thread
from typing import TYPE_CHECKING

import numpy as np

from tiercache._native.checksum import combine
from tiercache.cache.partial import PartialCopy
from tiercache.cache.record import name_of_object
from tiercache.cache.units import (
    LITTLE_BYTES,
    PIECE_BYTES,
    UNIT_BYTES,
    Mask,
    bytes_of,
    first_piece,
    mask_of,
    n_units,
    to_fetch,
)
from tiercache.errors import NotFound, ObjectChanged, StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tiercache.cache.fetch import Fetch
    from tiercache.model import ByteRange
    from tiercache.stats import Counters

N_PIECES_IN_FLIGHT = 4


class Download:
    """The transfer of one fetch into one partial copy, for as long as units are requested.

    Threads share the unit masks under the lock; each thread has a buffer of at most PIECE_BYTES. New requests are
    admitted, under the lock, by the thread that takes the next piece.
    """

    def __init__(
        self,
        fetch: Fetch,
        part: Callable[[], PartialCopy],
        admit: Callable[[Mask], bool],
        counters: Counters,
        present: Mask,
    ) -> None:
        """Create a transfer that has not started.

        Args:
            fetch: Fetch that says which units are requested, and is told which have come.
            part: Function that returns the partial copy to write to. The first call creates it, under the lock.
            admit: Function that reserves space for a mask of all units admitted so far; it returns False if there is no
                space.
            counters: Counters whose bytes_fetched is increased.
            present: Units that are present at the start.
        """
        self._fetch, self._part, self._admit, self._counters = fetch, part, admit, counters
        self._wanted = fetch.wanted
        self._present = present.copy()
        self._admitted = present.copy()
        self._taken = present.copy()
        self._lock = Lock()
        self._error: BaseException | None = None
        # CRC-32C and length of each piece that was written as a whole, by offset
        self._sums: dict[int, tuple[int, int]] = {}

    def run(self) -> None:
        """Fetch the requested units until none is left, or until space for them is refused.

        Raises:
            StoreError: The source failed.
            OSError: The disk failed.
        """
        self._error, self._taken = None, self._present.copy()  # units that an earlier run took but lost are taken again
        while (ranges := self._take()) is not None:
            left_bytes = UNIT_BYTES * int((self._admitted & ~self._taken).sum())
            helpers: list[Thread] = []
            try:
                self._start(min(N_PIECES_IN_FLIGHT - 1, -(-left_bytes // PIECE_BYTES)), helpers)
                self._work(ranges)
            finally:
                # Even after an error: the helpers write to the partial copy, which is closed afterwards.
                for helper in helpers:
                    helper.join()
            if self._error is not None:
                raise self._error

    def _start(self, n_helpers: int, helpers: list[Thread]) -> None:
        """Start helper threads and append them to helpers."""
        for _ in range(n_helpers):
            helper = Thread(target=self._work, name="tiercache-part", daemon=True)
            try:
                helper.start()
            except RuntimeError:  # the system allows no more threads; the existing ones do all the work
                return
            helpers.append(helper)

    def whole_sum(self) -> int | None:
        """Return the CRC-32C of the whole file from its pieces.

        None if other processes wrote some of it: it must be read back.
        """
        whole = offset = 0
        while offset in self._sums and (offset < self._wanted.n_bytes or not offset):
            piece_sum, n_bytes = self._sums[offset]
            whole = combine(whole, piece_sum, n_bytes)
            offset += n_bytes
            if not n_bytes:
                break
        return whole if offset == self._wanted.n_bytes else None

    def _work(self, ranges: list[ByteRange] | None = None) -> None:
        try:
            buffer = np.empty(min(PIECE_BYTES, n_units(self._wanted.n_bytes) * UNIT_BYTES), np.uint8)
            ranges = self._take() if ranges is None else ranges
            while ranges is not None:
                self._fetch_ranges(ranges, buffer)
                ranges = self._take()
        except BaseException as error:  # noqa: BLE001 - top of a thread: run() raises the first error
            with self._lock:
                self._error = self._error or error

    def _take(self) -> list[ByteRange] | None:
        """Return the ranges of the next request, urgent units first; None: nothing is left, or a thread failed."""
        n_bytes = self._wanted.n_bytes
        with self._lock:
            if self._error is not None:
                return None
            units, urgent = self._fetch.missing_units()
            self._grow(units & ~self._admitted)
            todo = self._admitted & ~self._taken
            # A small rest is fetched in one request, urgent or not: a second request would take longer than its bytes.
            first = todo if bytes_of(todo, n_bytes) <= LITTLE_BYTES else urgent & todo
            ranges = first_piece(first, n_bytes) or first_piece(todo, n_bytes)
            self._taken |= mask_of(ranges, n_bytes)
            if ranges:
                self._part()  # created here, under the lock, so that there is only one
            return ranges or None

    def _grow(self, units: Mask) -> None:
        """Admit requested units, and with them the rest of the file if it is small."""
        if not units.any():
            return
        for more in (to_fetch(self._admitted, units, self._wanted.n_bytes), units):
            if self._admit(self._admitted | more):
                self._admitted |= more
                return
        self._fetch.refuse(units)

    def _fetch_ranges(self, ranges: Sequence[ByteRange], buffer: np.ndarray) -> None:
        """Fetch ranges into the buffer, one after another, and write them to the partial copy."""
        part = self._part()  # _take() has created it
        position = 0
        spans = []
        for wanted in ranges:
            spans.append((wanted, buffer[position : position + wanted.n_bytes]))
            position += wanted.n_bytes
        if position:  # an empty object has nothing to read
            self._read([(wanted, data.data) for wanted, data in spans])
        for wanted, data in spans:
            piece_sum = part.write(wanted.start, data)
            if piece_sum is not None:
                self._sums[wanted.start] = piece_sum, wanted.n_bytes
        with self._lock:
            self._present |= mask_of(ranges, self._wanted.n_bytes)
        self._counters.add("bytes_fetched", position)
        self._fetch.see(part.present)

    def _read(self, spans: list[tuple[ByteRange, memoryview]]) -> None:
        """Read from the source, in the version that was named; retry once if that may help."""
        wanted, store = self._wanted, self._fetch.store
        try:
            self._ask(spans)
        except (NotFound, ObjectChanged):
            raise
        except StoreError as error:
            if error.retryable or self._fetch.cancel.is_set():
                raise  # the store has already retried
            self._ask(spans)
        if wanted.identity is None and wanted.if_match is None:
            # Without a strong ETag as a guard, the object must have the same attributes after the read.
            info = store.head(wanted.key)
            if name_of_object(wanted.source, info) != wanted.name:
                raise ObjectChanged(url=wanted.source, expected=wanted.etag, found=info.etag)

    def _ask(self, spans: list[tuple[ByteRange, memoryview]]) -> None:
        wanted = self._wanted
        try:
            self._fetch.store.read_into(wanted.key, spans, if_match=wanted.if_match, cancel=self._fetch.cancel)
        except OSError as error:  # a network error that the store did not convert; not an error of the cache's disk
            if isinstance(error, StoreError):
                raise
            raise StoreError(f"reading failed: {error}", url=wanted.source, retryable=True) from error
