"""Reading many requests at once into a caller's buffers, which nobody touches once the call has returned."""

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
from tiercache.store.retry import CallLimit, bounded
from tiercache.store.spans import Request

T = TypeVar("T")

# numpy drops the GIL while it copies; below this the hand-over costs more than the copy.
_GIL_DROP_BYTES = 32 << 10
# How late a cancelled call may notice: Events cannot be waited for together with futures.
_CANCEL_POLL_S = 0.05


class Landing:
    """The door to the caller's buffers: open while its call runs. closed: set when it is over, so that workers stop.

    stop: set then too, and before that where nothing is to be tried again because the store is being closed. The lock
    guards the door and the count of copies under way; bytes are copied outside it.
    """

    def __init__(self) -> None:
        self.closed, self.stop = Event(), Event()
        self._changed = Condition()
        self._n_copies = 0

    def copy(self, target: memoryview, data: Buffer) -> bool:
        """Copy data (of the same length) into target; False, and nothing is written, when the call is over."""
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
        """Shut the door and wait for copies under way."""
        with self._changed:
            self.closed.set()
            self.stop.set()
            self._changed.wait_for(lambda: not self._n_copies)


class PerProcess(Generic[T]):
    """A value that every process makes for itself when it needs it. Without a lock, which a fork could leave held.

    What a parent made is kept in the child but never used or dropped: dropping clients of a runtime whose threads are
    gone may hang.
    """

    def __init__(self, make: Callable[[], T], dispose: Callable[[T], object]) -> None:
        self._make, self._dispose = make, dispose
        self._values: dict[int, T] = {}

    def get(self) -> T:
        """This process's value."""
        pid = os.getpid()
        value = self._values.get(pid)
        if value is None:
            made = self._make()
            value = self._values.setdefault(pid, made)  # atomic: of two threads that made one, the first wins
            if value is not made:
                self._dispose(made)
        return value

    def is_current(self, value: T) -> bool:
        """Whether it is this process's value still: nobody has dropped it."""
        return self._values.get(os.getpid()) is value

    def drop(self) -> None:
        """Dispose of this process's value; the next get() makes another."""
        value = self._values.pop(os.getpid(), None)
        if value is not None:
            self._dispose(value)


def worker_pool(n_threads: int) -> PerProcess[ThreadPoolExecutor]:
    """Threads for requests, made when first used; close with drop()."""
    return PerProcess(
        lambda: ThreadPoolExecutor(n_threads, thread_name_prefix="tiercache-store"),
        lambda pool: pool.shutdown(wait=False, cancel_futures=True),
    )


def read_requests(
    requests: Sequence[Request],
    read_one: Callable[[Request, Landing], None],
    pool: PerProcess[ThreadPoolExecutor],
    limit: CallLimit,
    landing: Landing | None = None,
) -> None:
    """Carry out all requests, many at a time; after it has returned or raised, no buffer is written.

    A single request of a call that the caller cannot end runs in the calling thread. landing: a new one, of this call.

    Raises:
        StoreError: the first that a request raised, or the one that the limit gives.
    """
    limit.check()
    landing = landing or Landing()
    if len(requests) <= 1 and limit.is_endless:
        try:
            for request in requests:
                read_one(request, landing)
        finally:
            landing.close()  # an attempt that was given up may still run
        return
    threads = (
        pool.get()
    )  # once: of a store that is closed between two requests it would be another pool, left to nobody

    def read_bounded(request: Request) -> None:
        with bounded(limit), limit.running():
            read_one(request, landing)

    futures: list[Future[None]] = []
    limit.queue()
    try:
        for request in requests:
            try:
                futures.append(threads.submit(read_bounded, request))
            except RuntimeError as error:
                if pool.is_current(threads):  # no thread can be started
                    raise
                raise _closed(limit) from error
        _wait_all(futures, limit)
    finally:
        landing.close()
        for future in futures:
            future.cancel()


def _wait_all(futures: Sequence[Future[None]], limit: CallLimit) -> None:
    # Not concurrent.futures.wait: a request that close() cancels before a thread took it never ends for that.
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
    return StoreError(f"{limit.doing}: the store was closed meanwhile", url=limit.url, retryable=True)
