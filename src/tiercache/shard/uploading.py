"""Uploads that go on behind the one who writes: parts and the making durable of whole files, by a thread, in order."""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from tiercache.errors import StoreError
from tiercache.shard.memory import POOL
from tiercache.store.contract import Store, Upload

Memory: TypeAlias = npt.NDArray[np.uint8]
Task: TypeAlias = Callable[[], None]

# Larger than the least part of every store, and large enough that a request's overhead does not show. Large, too,
# because the thread gets the GIL back only after Python's 5 ms while the writer is busy: it should need it seldom.
PART_BYTES = 8 << 20
# With the part that is filled and the one that is sent, four parts are in memory. One alone would have writer and
# thread wait for each other in turn where both are equally fast.
_MAX_WAITING = 2
# Room behind a part for the piece that fills it: a chunk of the usual size. A whole huge page, as the parts are.
_SLACK_BYTES = 2 << 20


class _Tasks:
    """Tasks that a thread does in order. The lock guards all attributes; tasks run outside it.

    It knows nothing of who gives the tasks, so that a writer that is forgotten is collected while its thread waits.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[Task] = deque()
        self._busy = self._cancelled = False
        self.error: BaseException | None = None
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._work, name="tiercache-upload", daemon=True)
        self._thread.start()

    def put(self, task: Task) -> None:
        """Hand a task over; waits while too many are waiting. Raises the error of an earlier one."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._waiting) < _MAX_WAITING or self.error is not None)
            self._check()
            self._waiting.append(task)
            self._changed.notify_all()

    def wait(self) -> None:
        """Wait until all tasks are done. Raises the error of one."""
        with self._changed:
            self._changed.wait_for(lambda: not (self._waiting or self._busy) or self.error is not None)
            self._check()

    def _check(self) -> None:
        if self.error is not None:
            raise self.error

    def cancel(self) -> None:
        """Drop the tasks that wait, and end the thread after the one it is at.

        Does nothing in a forked process, which has no thread and where the lock may be held for ever.
        """
        if os.getpid() == self._pid:
            with self._changed:
                # The thread clears what waits: the garbage collector may call this in the middle of _next().
                self._cancelled = True
                self._changed.notify_all()

    def join(self) -> None:
        """Wait for the thread's end."""
        self._thread.join()

    def _work(self) -> None:
        self._do_all()
        self._waiting.clear()  # cancelled: nobody hands over any more

    def _do_all(self) -> None:
        while (task := self._next()) is not None:
            try:
                task()
            except BaseException as error:  # noqa: BLE001 -- a thread's top: the writer raises it at its next call
                with self._changed:
                    self.error = error
                    self._waiting.clear()
            finally:
                del task  # it holds a part's memory
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()

    def _next(self) -> Task | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._cancelled)
            if self._cancelled:
                return None
            self._busy = True
            task = self._waiting.popleft()
            self._changed.notify_all()
            return task


class Uploads:
    """The uploads of one writer. All methods are for the writer's thread; the store is called from another one.

    An error of the store is raised by the next call that hands something over, or by wait(); then only abort() is
    left. The thread starts with the first part; who holds an Uploads calls wait() or abort().
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self.part_bytes = max(PART_BYTES, store.min_part_bytes)
        self._tasks: _Tasks | None = None
        self._pid: int | None = None
        self._open: list[Upload] = []
        self._free: list[Memory] = []  # its append and pop are atomic; the thread gives back what was sent

    @property
    def failed(self) -> bool:
        """Whether the thread met an error that the next call will raise."""
        return self._tasks is not None and self._tasks.error is not None

    @property
    def is_here(self) -> bool:
        """False in a process that was forked since claim(): what is under way does not belong to it."""
        return self._pid in (None, os.getpid())

    def claim(self) -> None:
        """Say that from now on all belongs to this process.

        Raises:
            ValueError: it belongs to the one that this process was forked from.
        """
        if not self.is_here:
            raise ValueError("a writer belongs to the process that began to write; this one was forked from it")
        self._pid = os.getpid()

    def begin(self, key: str) -> Upload:
        """A new upload, for send() and complete()."""
        self.claim()
        upload = self._store.create(key)
        self._open.append(upload)
        return upload

    def memory(self, n_bytes: int) -> Memory:
        """Memory for a part and what comes after it, of n_bytes or more; send() takes it back."""
        usual_bytes = self.part_bytes + _SLACK_BYTES
        if n_bytes <= usual_bytes and self._free:
            return self._free.pop()
        return POOL.lend(max(n_bytes, usual_bytes))

    def send(self, upload: Upload, number: int, memory: Memory, n_bytes: int) -> int:
        """Upload the first n_bytes of memory as parts from `number` on; returns the number of the next.

        memory: from memory(), not to be touched any more.
        """
        parts = [memory[start : min(start + self.part_bytes, n_bytes)] for start in range(0, n_bytes, self.part_bytes)]
        free, reusable = self._free, len(memory) == self.part_bytes + _SLACK_BYTES

        def send() -> None:
            for i, part in enumerate(parts):
                upload.put_part(number + i, part.data)
            if reusable:
                free.append(memory)

        self._put(send)
        return number + len(parts)

    def complete(self, upload: Upload) -> None:
        """Publish an upload once all its parts are there."""
        open_uploads = self._open

        def complete() -> None:
            upload.complete()
            open_uploads.remove(upload)

        self._put(complete)

    def _put(self, task: Task) -> None:
        self.claim()
        if self._tasks is None:
            self._tasks = _Tasks()
            weakref.finalize(self, self._tasks.cancel)
        self._tasks.put(task)

    def wait(self) -> None:
        """Wait until everything handed over is done, and end the thread.

        Raises:
            StoreError: of whatever failed.
        """
        self.claim()
        if self._tasks is not None:
            self._tasks.wait()
            self._end()

    def abort(self) -> None:
        """Drop what was not completed, once the thread has done what it is at. Harmless when repeated.

        What a store then cannot drop is left to it: the error that made us abort is the one to show.
        """
        if not self.is_here:
            return
        self._end()
        while self._open:
            with suppress(StoreError):
                self._open[-1].abort()
            self._open.pop()

    def _end(self) -> None:
        if self._tasks is not None:
            self._tasks.cancel()
            self._tasks.join()
        self._free.clear()
