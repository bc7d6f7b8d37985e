"""Range reads: a planner coalesces spans into requests, and threads execute them into the caller's buffers."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Condition
from typing import Generic, TypeVar

import numpy as np

from tiercache.errors import ObjectChanged, StoreError
from tiercache.model import ByteRange, ObjectInfo
from tiercache.store.contract import Buffer, Span
from tiercache.store.retry import CallLimit


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


@dataclass(frozen=True, slots=True)
class RequestSizes:
    """Largest gap between two spans that is read and discarded to save a request, and the maximum size of a request."""

    gap_bytes: int = 64 << 10
    part_bytes: int = 8 << 20


def plan_requests(spans: Sequence[Span], sizes: RequestSizes) -> tuple[Request, ...]:
    """Coalesce neighbouring spans and split long ones. Each byte of each span is in exactly one piece of one request.

    Spans may overlap and come in any order; the overlap is read more than once. An empty span needs no request.
    """
    requests: list[Request] = []
    start = end = 0
    targets: list[tuple[int, memoryview]] = []
    for span, buffer in sorted(_cut(spans, sizes.part_bytes), key=lambda item: item[0].start):
        joins = targets and end <= span.start <= end + sizes.gap_bytes and span.end - start <= sizes.part_bytes
        if not joins:
            if targets:
                requests.append(Request(ByteRange(start, end), tuple(targets)))
            start, targets = span.start, []
        targets.append((span.start - start, buffer))
        end = span.end
    if targets:
        requests.append(Request(ByteRange(start, end), tuple(targets)))
    return tuple(requests)


def _cut(spans: Sequence[Span], part_bytes: int) -> list[Span]:
    """Return the non-empty spans, split into spans of nearly equal length of at most part_bytes."""
    parts: list[Span] = []
    for span, buffer in spans:
        n_parts = -(-span.n_bytes // part_bytes)
        if n_parts <= 1:
            parts.extend([(span, buffer)] if span.n_bytes else [])
            continue
        step = -(-span.n_bytes // n_parts)
        for offset in range(0, span.n_bytes, step):
            piece = buffer[offset : offset + step]
            parts.append((ByteRange(span.start + offset, span.start + offset + piece.nbytes), piece))
    return parts


T = TypeVar("T")

# numpy releases the GIL while it copies; below this size, releasing it costs more than the copy.
_GIL_DROP_BYTES = 32 << 10
# Maximum delay of a cancellation: a thread cannot wait for an Event and for futures at the same time.
_CANCEL_POLL_S = 0.05


class BufferGuard:
    """Guard of the caller's buffers: copies succeed only while the call runs.

    The lock guards the closed state and the number of running copies; bytes are copied outside the lock.
    """

    def __init__(self) -> None:
        self.is_closed = False
        self._changed = Condition()
        self._n_copies = 0

    def copy(self, target: memoryview, data: Buffer) -> bool:
        """Copy data (of the same length) into target. Returns False, and writes nothing, when the call is over."""
        with self._changed:
            if self.is_closed:
                return False
            self._n_copies += 1
        try:
            if target.nbytes < _GIL_DROP_BYTES:
                target[:] = data
            else:
                np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(data, np.uint8))
        finally:
            with self._changed:
                self._n_copies -= 1
                self._changed.notify_all()
        return True

    def close(self) -> None:
        """Refuse further copies and wait for running copies."""
        with self._changed:
            self.is_closed = True
            self._changed.wait_for(lambda: not self._n_copies)


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

    def is_current(self, value: T) -> bool:
        """Return whether value is still this process's value, that is, no thread has dropped it."""
        return self._values.get(os.getpid()) is value

    def drop(self) -> None:
        """Dispose of this process's value; the next get() creates a new one."""
        value = self._values.pop(os.getpid(), None)
        if value is not None:
            self._dispose(value)


def worker_pool(n_threads: int) -> ProcessLocal[ThreadPoolExecutor]:
    """Return the threads for requests, created at first use. The owner closes them with drop()."""
    return ProcessLocal(
        lambda: ThreadPoolExecutor(n_threads, thread_name_prefix="tiercache-store"),
        lambda pool: pool.shutdown(wait=False, cancel_futures=True),
    )


def read_requests(
    requests: Sequence[Request],
    read_one: Callable[[Request, BufferGuard], None],
    pool: ProcessLocal[ThreadPoolExecutor],
    limit: CallLimit,
) -> None:
    """Execute all requests in parallel. After the call has returned or raised, no buffer is written.

    A single request runs in the calling thread, unless the caller may end the call early. read_one sends one request
    and copies its bytes through the BufferGuard. Raises the first error of a request, or the error of the limit.
    """
    limit.check()
    guard = BufferGuard()
    if runs_in_caller(requests, limit):
        try:
            for request in requests:
                read_one(request, guard)
        finally:
            guard.close()  # an abandoned attempt may still run
        return
    # Get the pool once: if the store is closed between two requests, another get() would create a pool without owner.
    threads = pool.get()

    def read_bounded(request: Request) -> None:
        with limit.running():
            read_one(request, guard)

    futures: list[Future[None]] = []
    limit.queue()
    try:
        for request in requests:
            try:
                futures.append(threads.submit(read_bounded, request))
            except RuntimeError as error:
                if pool.is_current(threads):  # the system cannot start a thread
                    raise
                raise _closed(limit) from error
        _wait_all(futures, limit)
    finally:
        guard.close()
        limit.stop.set()
        for future in futures:
            future.cancel()


def runs_in_caller(requests: Sequence[Request], limit: CallLimit) -> bool:
    """Return whether read_requests() executes the requests in the calling thread."""
    return len(requests) <= 1 and limit.is_endless


def _wait_all(futures: Sequence[Future[None]], limit: CallLimit) -> None:
    # Not concurrent.futures.wait(): it never sees the end of a request that close() cancels before a thread starts it.
    ended: SimpleQueue[Future[None]] = SimpleQueue()
    for future in futures:
        future.add_done_callback(ended.put)
    n_pending = len(futures)
    while n_pending:
        timeout_s = limit.left_s
        if limit.cancel is not None:
            timeout_s = _CANCEL_POLL_S if timeout_s is None else min(timeout_s, _CANCEL_POLL_S)
        try:
            ended.get(timeout=None if timeout_s is None else max(timeout_s, 0.0)).result()
            n_pending -= 1
        except Empty:
            pass
        except CancelledError as error:
            raise _closed(limit) from error
        if n_pending:
            limit.check()


def _closed(limit: CallLimit) -> StoreError:
    return StoreError(f"{limit.doing}: the store was closed during the call", url=limit.url, retryable=True)
