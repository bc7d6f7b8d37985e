"""Range reads: a planner coalesces spans into requests; a landing stores their bytes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from typing import Generic, TypeVar

import numpy as np

from tiercache.errors import ObjectChanged, StoreError
from tiercache.model import ByteRange, ObjectInfo
from tiercache.store.coalescing import RequestCosts, cheapest_ranges
from tiercache.store.contract import Receive, Span


def check_spans(spans: Sequence[Span]) -> None:
    """Check that each range can be read into its buffer. Raises ValueError."""
    for span, buffer in spans:
        if buffer.nbytes != span.n_bytes:
            raise ValueError(
                f"the buffer of [{span.start}, {span.end}) has {buffer.nbytes} bytes, expected {span.n_bytes}"
            )
        if buffer.readonly or not buffer.c_contiguous or buffer.itemsize != 1 or buffer.ndim != 1:
            raise ValueError(f"the buffer of [{span.start}, {span.end}) must be writable, contiguous, flat bytes")


def check_read(info: ObjectInfo, spans: Sequence[Span], if_match: str | None, url: str) -> None:
    """Raise ObjectChanged if the object does not match if_match, and StoreError if a range ends beyond the object."""
    if if_match is not None and info.etag != if_match:
        raise ObjectChanged(url=url, expected=if_match, found=info.etag)
    last = max((span.end for span, _ in spans), default=0)
    if last > info.n_bytes:
        raise StoreError(f"a range ends at byte {last}, the object at byte {info.n_bytes}", url=url)


@dataclass(frozen=True, slots=True)
class Request:
    """One range request, and the destinations of its answer as (offset in the answer, buffer)."""

    range: ByteRange
    targets: tuple[tuple[int, memoryview], ...]


def plan_requests(spans: Sequence[Span], costs: RequestCosts) -> tuple[Request, ...]:
    """Return the cheapest requests for the spans. Each byte of each span is in exactly one target of one request.

    Spans may overlap and come in any order; the overlap is read more than once, so that the targets of a request do not
    overlap. An empty span needs no request.
    """
    layers: list[list[Span]] = []  # each without overlap; there is only one unless spans overlap
    for span, buffer in sorted((item for item in spans if item[0].n_bytes), key=lambda item: item[0].start):
        layer = next((one for one in layers if one[-1][0].end <= span.start), None)
        if layer is None:
            layers.append(layer := [])
        layer.append((span, buffer))
    requests = [request for layer in layers for request in _plan_layer(layer, costs)]
    return tuple(sorted(requests, key=lambda request: request.range.start))


def _plan_layer(spans: Sequence[Span], costs: RequestCosts) -> list[Request]:
    """Return the cheapest requests for spans in ascending order that do not overlap."""
    ranges = cheapest_ranges([span for span, _ in spans], costs)
    targets: list[list[tuple[int, memoryview]]] = [[] for _ in ranges]
    number = 0
    for span, buffer in spans:
        at = span.start
        while at < span.end:
            while ranges[number].end <= at:
                number += 1
            end = min(ranges[number].end, span.end)
            targets[number].append((at - ranges[number].start, buffer[at - span.start : end - span.start]))
            at = end
    return [Request(one, tuple(pieces)) for one, pieces in zip(ranges, targets, strict=True)]


T = TypeVar("T")

# numpy releases the GIL while it copies; below this size, releasing it costs more than the copy.
_GIL_DROP_BYTES = 32 << 10


class Landing:
    """Destination of the bytes of one request, for all attempts of the request. Safe for threads.

    Each byte is stored once, by the attempt that brings it first, and in order. The lock is held while bytes are
    stored, so that none are after close() has returned.

    Args:
        store: Function that stores the bytes from an offset of the request on.

    Attributes:
        n_bytes: Number of bytes from the start of the request that are stored.
        error: Error that store() raised; the request is over then.
    """

    def __init__(self, store: Callable[[int, memoryview], object]) -> None:
        self.n_bytes = 0
        self.error: BaseException | None = None
        self._store = store
        self._lock = Lock()
        self._is_closed = False

    def add(self, offset: int, data: memoryview) -> bool:
        """Store the bytes from this offset of the request on, as far as they are new; return whether any were.

        The offset is at most n_bytes. An error of store() is kept, not raised: it is none of the store's own errors.
        """
        with self._lock:
            n_known = self.n_bytes - offset
            if self._is_closed or n_known >= data.nbytes:
                return False
            try:
                self._store(self.n_bytes, data[n_known:] if n_known else data)
            except BaseException as error:  # noqa: BLE001 - the user's code; the attempt raises it
                self.error, self._is_closed = error, True
                return False
            self.n_bytes = offset + data.nbytes
            return True

    def close(self) -> None:
        """Refuse further bytes, and wait until none are being stored."""
        with self._lock:
            self._is_closed = True


def land_in_buffers(request: Request) -> Landing:
    """Return the landing of a request in the buffers of its spans."""

    def copy(start: int, buffer: memoryview, at: int, data: memoryview) -> None:
        _copy(buffer[at - start : at - start + data.nbytes], data)

    return _landing(request, copy)


def land_in_pieces(request: Request, receive: Receive) -> Landing:
    """Return the landing of a request whose spans are received in pieces; the buffers of the spans are not touched."""
    return _landing(request, lambda _start, _buffer, at, data: receive(request.range.start + at, data))


def _landing(request: Request, store_part: Callable[[int, memoryview, int, memoryview], object]) -> Landing:
    """Return a landing that passes each arrived part of a target to store_part(start, buffer, at, data).

    start and buffer are those of the target; the part begins at offset `at` of the request.
    """

    def store(offset: int, data: memoryview) -> None:
        for start, buffer in request.targets:
            at, end = max(start, offset), min(start + buffer.nbytes, offset + data.nbytes)
            if at < end:
                store_part(start, buffer, at, data[at - offset : end - offset])

    return Landing(store)


def untouched_spans(ranges: Sequence[ByteRange]) -> list[Span]:
    """Return spans of which only the lengths count: views of one byte, repeated."""
    return [(wanted, np.broadcast_to(np.uint8(0), wanted.n_bytes).data) for wanted in ranges]


def _copy(target: memoryview, data: memoryview) -> None:
    if target.nbytes < _GIL_DROP_BYTES:
        target[:] = data
    else:
        np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(data, np.uint8))


class ProcessLocal(Generic[T]):
    """A value that each process creates at first use. It has no lock, because a fork could leave a lock held.

    A child keeps a value of its parent but never uses or disposes of it: disposing of clients whose runtime threads do
    not exist any more may hang.
    """

    def __init__(self, make: Callable[[], T], dispose: Callable[[T], object]) -> None:
        self._make, self._dispose = make, dispose
        self._values: dict[int, T] = {}

    def get(self) -> T:
        """Return this process's value."""
        pid = os.getpid()
        value = self._values.get(pid)
        if value is None:
            created = self._make()
            value = self._values.setdefault(
                pid, created
            )  # atomic: if two threads create a value, the first one is kept
            if value is not created:
                self._dispose(created)
        return value

    def find(self) -> T | None:
        """Return this process's value if there is one."""
        return self._values.get(os.getpid())

    def drop(self) -> None:
        """Dispose of this process's value; the next get() creates a new one."""
        value = self._values.pop(os.getpid(), None)
        if value is not None:
            self._dispose(value)


def worker_pool(n_threads: int) -> ProcessLocal[ThreadPoolExecutor]:
    """Return the threads of a pool, created at first use. The owner closes them with drop()."""
    return ProcessLocal(
        lambda: ThreadPoolExecutor(n_threads, thread_name_prefix="tiercache-store"),
        lambda pool: pool.shutdown(wait=False, cancel_futures=True),
    )
