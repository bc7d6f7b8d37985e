"""The bytes of one fetch into one part: piece by piece, what somebody waits for first."""

from __future__ import annotations

from threading import Lock, Thread
from typing import TYPE_CHECKING

import numpy as np

from tiercache._native.checksum import combine
from tiercache.cache.partial import Part
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
    """What one fetch brings into one part, as long as units are asked for.

    Threads share the masks under the lock; each holds a buffer of at most PIECE_BYTES. What is asked for meanwhile is
    admitted by whichever thread takes the next piece, with the lock held: the others are busy with theirs.
    """

    def __init__(
        self, fetch: Fetch, part: Callable[[], Part], admit: Callable[[Mask], bool], counters: Counters, present: Mask
    ) -> None:
        """Nothing is fetched yet.

        Args:
            fetch: asked by units, and told what has come.
            part: gives the part to write to, made at the first call, which is under the lock.
            admit: reserves room for a mask of units, together with all that was admitted before; False: no room.
            counters: bytes_fetched is added to.
            present: units that are there from the start.
        """
        self._fetch, self._part, self._admit, self._counters = fetch, part, admit, counters
        self._wanted = fetch.wanted
        self._present = present.copy()
        self._admitted = present.copy()
        self._taken = present.copy()
        self._lock = Lock()
        self._error: BaseException | None = None
        self._sums: dict[int, tuple[int, int]] = {}  # CRC-32C and length of what came in one piece, by where it begins

    def run(self) -> None:
        """Bring what is asked for until nothing is left, or room for it is refused.

        Raises:
            StoreError: the source failed.
            OSError: the disk did.
        """
        self._error, self._taken = None, self._present.copy()  # what an earlier run took and lost is taken again
        while (ranges := self._take()) is not None:
            left_bytes = UNIT_BYTES * int((self._admitted & ~self._taken).sum())
            helpers: list[Thread] = []
            try:
                self._start(min(N_PIECES_IN_FLIGHT - 1, -(-left_bytes // PIECE_BYTES)), helpers)
                self._work(ranges)
            finally:
                for helper in helpers:  # whatever was raised: they write to the part, which is closed after this
                    helper.join()
            if self._error is not None:
                raise self._error

    def _start(self, n_helpers: int, helpers: list[Thread]) -> None:
        """Start threads that help, and add them to helpers."""
        for _ in range(n_helpers):
            helper = Thread(target=self._work, name="tiercache-part", daemon=True)
            try:
                helper.start()
            except RuntimeError:  # the system gives no more threads: those that there are do it all
                return
            helpers.append(helper)

    def whole_sum(self) -> int | None:
        """CRC-32C of the whole file as the source sent it, where all of it came by this; None: read it back."""
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
                self._bring(ranges, buffer)
                ranges = self._take()
        except BaseException as error:  # noqa: BLE001 - thread top: run() raises the first
            with self._lock:
                self._error = self._error or error

    def _take(self) -> list[ByteRange] | None:
        """The next ranges to fetch in one request, urgent ones first; None: nothing is left, or a thread failed."""
        n_bytes = self._wanted.n_bytes
        with self._lock:
            if self._error is not None:
                return None
            units, urgent = self._fetch.open_units()
            self._grow(units & ~self._admitted)
            todo = self._admitted & ~self._taken
            # Little is fetched in one request, whoever waits for what of it: a second would take longer than the bytes.
            first = todo if bytes_of(todo, n_bytes) <= LITTLE_BYTES else urgent & todo
            ranges = first_piece(first, n_bytes) or first_piece(todo, n_bytes)
            self._taken |= mask_of(ranges, n_bytes)
            if ranges:
                self._part()  # made here, under the lock: two would not be the same
            return ranges or None

    def _grow(self, units: Mask) -> None:
        """Admit units that were asked for, and the rest of the file along with them where that is little."""
        if not units.any():
            return
        for more in (to_fetch(self._admitted, units, self._wanted.n_bytes), units):
            if self._admit(self._admitted | more):
                self._admitted |= more
                return
        self._fetch.refuse(units)

    def _bring(self, ranges: Sequence[ByteRange], buffer: np.ndarray) -> None:
        """Fetch ranges into the buffer, one after another, and write them."""
        part = self._part()  # _take() has made it
        position = 0
        spans = []
        for wanted in ranges:
            spans.append((wanted, buffer[position : position + wanted.n_bytes]))
            position += wanted.n_bytes
        if position:  # of an empty object there is nothing to read
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
        """Read from the source, as the object was when it was named; once more where that may help."""
        wanted, store = self._wanted, self._fetch.store
        try:
            self._ask(spans)
        except (NotFound, ObjectChanged):
            raise
        except StoreError as error:
            if error.retryable or self._fetch.cancel.is_set():
                raise  # the back end has tried again already
            self._ask(spans)
        if wanted.identity is None and wanted.if_match is None:
            # Where no strong ETag could guard the reading, the object must look the same after it.
            info = store.head(wanted.key)
            if name_of_object(wanted.source, info) != wanted.name:
                raise ObjectChanged(url=wanted.source, expected=wanted.etag, found=info.etag)

    def _ask(self, spans: list[tuple[ByteRange, memoryview]]) -> None:
        wanted = self._wanted
        try:
            self._fetch.store.read_into(wanted.key, spans, if_match=wanted.if_match, cancel=self._fetch.cancel)
        except OSError as error:  # of the network, by a back end that lets it through: no fault of the cache's disk
            if isinstance(error, StoreError):
                raise
            raise StoreError(f"reading failed: {error}", url=wanted.source, retryable=True) from error
