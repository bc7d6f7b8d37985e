"""Parallel range requests into a caller's buffers, which no thread touches after the call has returned."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from queue import Empty, SimpleQueue
from threading import Condition, Event
from typing import Generic, TypeVar

import numpy as np

from tiercache.errors import StoreError
from tiercache.store.contract import Buffer
from tiercache.store.retry import CallLimit, run_within
from tiercache.store.spans import Request

T = TypeVar("T")

# numpy releases the GIL while it copies; below this size, releasing it costs more than the copy.
_GIL_DROP_BYTES = 32 << 10
# Maximum delay of a cancellation: a thread cannot wait for an Event and for futures at the same time.
_CANCEL_POLL_S = 0.05


class BufferGuard:
    """Guard of the caller's buffers: copies succeed only while the call runs.

    The lock guards the closed state and the number of running copies; bytes are copied outside the lock.

    Attributes:
        closed: Event that is set when the call is over, so that worker threads stop.
        stop: Event that is set together with closed, and earlier if the store is closed and retries must end.
    """

    def __init__(self) -> None:
        self.closed, self.stop = Event(), Event()
        self._changed = Condition()
        self._n_copies = 0

    def copy(self, target: memoryview, data: Buffer) -> bool:
        """Copy data (of the same length) into target. Returns False, and writes nothing, when the call is over."""
        with self._changed:
            if self.closed.is_set():
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
            self.closed.set()
            self.stop.set()
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
            made = self._make()
            value = self._values.setdefault(pid, made)  # atomic: if two threads create a value, the first one is kept
            if value is not made:
                self._dispose(made)
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
    landing: BufferGuard | None = None,
) -> None:
    """Execute all requests in parallel. After the call has returned or raised, no buffer is written.

    If the caller cannot end the call, a single request runs in the calling thread.

    Args:
        requests: Requests of one call.
        read_one: Function that sends one request and copies its bytes through the Landing.
        pool: Threads of the store.
        limit: Time limits of the call.
        landing: Guard of this call's buffers; None: a new one.

    Raises:
        StoreError: The first error of a request, or the error of the limit.
    """
    limit.check()
    landing = landing or BufferGuard()
    if len(requests) <= 1 and limit.is_endless:
        try:
            for request in requests:
                read_one(request, landing)
        finally:
            landing.close()  # an abandoned attempt may still run
        return
    # Get the pool once: if the store is closed between two requests, another get() would create a pool without owner.
    threads = pool.get()

    def read_bounded(request: Request) -> None:
        with run_within(limit), limit.running():
            read_one(request, landing)

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
        landing.close()
        for future in futures:
            future.cancel()


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
