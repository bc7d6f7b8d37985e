"""Uploads: a background thread that sends the parts of a writer's uploads and completes them, in order."""

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
from tiercache.shard.memory import BUFFER_POOL
from tiercache.store.contract import Store, Upload

Memory: TypeAlias = npt.NDArray[np.uint8]
Task: TypeAlias = Callable[[], None]

# At least the minimum part size of every store, and large enough to make the overhead of a request negligible. While
# the writer is busy, the thread waits 5 ms for the GIL each time, so it should need the GIL rarely.
PART_BYTES = 8 << 20
# With the part that is being filled and the part that is being sent, four parts are in memory. With a queue of one,
# writer and thread would wait for each other in turn if both are equally fast.
_MAX_WAITING = 2
# Space after a part for the rest of the chunk that fills it; one huge page, because parts consist of huge pages.
_SLACK_BYTES = 2 << 20


class _Tasks:
    """A thread that runs tasks in order. The lock guards all attributes; tasks run outside the lock.

    The object holds no reference to its owner, so that an abandoned writer can be collected while its thread waits.
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
        """Queue a task; wait while the queue is full. Raises the error of an earlier task."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._waiting) < _MAX_WAITING or self.error is not None)
            self._check()
            self._waiting.append(task)
            self._changed.notify_all()

    def wait(self) -> None:
        """Wait until all tasks are done. Raises the error of a failed task."""
        with self._changed:
            self._changed.wait_for(lambda: not (self._waiting or self._busy) or self.error is not None)
            self._check()

    def _check(self) -> None:
        if self.error is not None:
            raise self.error

    def cancel(self) -> None:
        """Discard the queued tasks, and end the thread after its current task.

        In a forked child process the call does nothing: the child has no thread, and the lock may be locked forever.
        """
        if os.getpid() == self._pid:
            with self._changed:
                # The thread clears the queue, because the garbage collector may call this method in the middle of
                # _next().
                self._cancelled = True
                self._changed.notify_all()

    def join(self) -> None:
        """Wait for the thread to end."""
        self._thread.join()

    def _work(self) -> None:
        self._do_all()
        self._waiting.clear()  # after cancel(), no thread queues tasks

    def _do_all(self) -> None:
        while (task := self._next()) is not None:
            try:
                task()
            except BaseException as error:  # noqa: BLE001 -- top of a thread: the writer raises it at its next call
                with self._changed:
                    self.error = error
                    self._waiting.clear()
            finally:
                del task  # the task references the memory of a part
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


class UploadQueue:
    """The uploads of a writer. The writer's thread calls all methods; a background thread calls the store.

    The next call that queues a task, or wait(), raises an error of the store; after that the owner can only call
    abort(). The thread starts with the first part. The owner must call wait() or abort() at the end.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self.part_bytes = max(PART_BYTES, store.min_part_bytes)
        self._tasks: _Tasks | None = None
        self._pid: int | None = None
        self._open: list[Upload] = []
        self._free: list[Memory] = []  # append and pop are atomic; the thread returns the memory of sent parts

    @property
    def failed(self) -> bool:
        """Whether a task has failed; the next call raises its error."""
        return self._tasks is not None and self._tasks.error is not None

    @property
    def is_owner(self) -> bool:
        """Whether the uploads belong to this process; False in a child process that was forked after claim()."""
        return self._pid in (None, os.getpid())

    def claim_process(self) -> None:
        """Make this process the owner of the uploads.

        Raises:
            ValueError: The uploads belong to the parent process.
        """
        if not self.is_owner:
            raise ValueError(
                "a writer can be used only in the process that began to write, not in a forked child of it"
            )
        self._pid = os.getpid()

    def begin(self, key: str) -> Upload:
        """Return a new upload for the object with this key, for send() and complete()."""
        self.claim_process()
        upload = self._store.create(key)
        self._open.append(upload)
        return upload

    def memory(self, n_bytes: int) -> Memory:
        """Return memory of at least n_bytes, and at least a part and some slack. send() takes it back."""
        usual_bytes = self.part_bytes + _SLACK_BYTES
        if n_bytes <= usual_bytes and self._free:
            return self._free.pop()
        return BUFFER_POOL.allocate(max(n_bytes, usual_bytes))

    def send(self, upload: Upload, number: int, memory: Memory, n_bytes: int) -> int:
        """Queue the first n_bytes of memory for upload, as parts with the numbers from `number` on.

        Args:
            upload: Upload that begin() returned.
            number: Number of the first part.
            memory: Memory that memory() returned. The caller must not use it afterwards.
            n_bytes: Number of bytes to upload.

        Returns:
            Number of the next part.
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
        """Queue the completion of an upload, which publishes the object after all its parts are sent."""
        open_uploads = self._open

        def complete() -> None:
            upload.complete()
            open_uploads.remove(upload)

        self._put(complete)

    def _put(self, task: Task) -> None:
        self.claim_process()
        if self._tasks is None:
            self._tasks = _Tasks()
            weakref.finalize(self, self._tasks.cancel)
        self._tasks.put(task)

    def wait(self) -> None:
        """Wait until all tasks are done, and end the thread.

        Raises:
            StoreError: The store failed.
        """
        self.claim_process()
        if self._tasks is not None:
            self._tasks.wait()
            self._end()

    def abort(self) -> None:
        """Abort the uploads that are not complete, after the current task of the thread. A repeated call does nothing.

        Errors of the store are ignored here, so that the caller sees the error that led to the abort.
        """
        if not self.is_owner:
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
