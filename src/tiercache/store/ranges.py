"""Range reads: which requests read a set of spans at the lowest cost, and where their bytes land."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock

import numpy as np

from tiercache.errors import ObjectChanged, StoreError
from tiercache.model import ByteRange, ObjectInfo
from tiercache.store.contract import Receive, Span


@dataclass(frozen=True, slots=True)
class RequestCosts:
    """Costs and limits of range requests. The defaults are those of an object store with 16 or more requests in flight.

    Attributes:
        request_s: Cost of one more request in seconds. With many requests in flight, this is less than their latency.
        bytes_per_s: Bandwidth in bytes per second, at which unwanted bytes are read.
        max_gap_bytes: Maximum length of a gap between two wanted ranges that one request may read, in bytes.
        max_bytes: Maximum length of a request in bytes, at least 1.
    """

    request_s: float = 0.0005
    bytes_per_s: float = 125e6
    max_gap_bytes: int = 64 << 10
    max_bytes: int = 8 << 20

    @property
    def gap_bytes(self) -> int:
        """Maximum length of a gap that may be read and costs less than a request, in bytes."""
        affordable = self.request_s * self.bytes_per_s
        if affordable > self.max_gap_bytes:
            return self.max_gap_bytes
        return max(-int(-affordable // 1) - 1, 0)  # strictly less: at equal cost, fewer bytes are better


def cheapest_ranges(wanted: Sequence[ByteRange], costs: RequestCosts) -> list[ByteRange]:
    """Return ranges that read all wanted ranges at a low cost, by the fewest requests that pay.

    The cost is the number of requests times request_s, plus the time to read the gaps between wanted ranges. A gap is
    read if that costs less than a request and the gap is at most max_gap_bytes long.

    Args:
        wanted: Ranges in any order. They may overlap, touch or be empty.
        costs: Costs and limits of the requests.

    Returns:
        Ranges in ascending order, without overlap, of 1 to max_bytes bytes each. A wanted range longer than max_bytes
        that has no near neighbours is split into nearly equal parts.
    """
    result: list[ByteRange] = []
    cluster: list[ByteRange] = []
    for run in _merged(wanted):
        if cluster and run.start - cluster[-1].end > costs.gap_bytes:
            result += _cover(cluster, costs.max_bytes)
            cluster = []
        cluster.append(run)
    return result + (_cover(cluster, costs.max_bytes) if cluster else [])


def _merged(wanted: Sequence[ByteRange]) -> list[ByteRange]:
    """Return the union of the ranges as ascending ranges that do not touch."""
    runs: list[ByteRange] = []
    for span in sorted((span for span in wanted if span.n_bytes), key=lambda span: span.start):
        if runs and span.start <= runs[-1].end:
            runs[-1] = ByteRange(runs[-1].start, max(runs[-1].end, span.end))
        else:
            runs.append(span)
    return runs


def _cover(runs: Sequence[ByteRange], max_bytes: int) -> list[ByteRange]:
    """Return the fewest ranges for runs between which each gap costs less than a request."""
    start, end = runs[0].start, runs[-1].end
    if len(runs) == 1:
        step = -(-(end - start) // -(-(end - start) // max_bytes))
        return [ByteRange(at, min(at + step, end)) for at in range(start, end, step)]
    ranges: list[ByteRange] = []
    number = 0  # of the first run that is not covered to its end
    while number < len(runs):
        start = max(runs[number].start, ranges[-1].end if ranges else 0)
        end = start
        while number < len(runs) and runs[number].start < start + max_bytes:
            end = min(runs[number].end, start + max_bytes)
            if end < runs[number].end:
                break
            number += 1
        ranges.append(ByteRange(start, end))
    return ranges


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
