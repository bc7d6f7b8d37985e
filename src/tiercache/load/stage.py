"""Stages between the native pipeline and the consumer: their threads change batches, some ahead, in order.

`StageQueue` is the queue of the batches of a stage, and `StagePipeline` the stage as the consumer sees it: decoding
(decode.py) and the user's functions in worker processes (transform_workers.py) are such stages.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from tiercache.load.pipeline import CLOSED_MESSAGE, ClosingPipeline

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tiercache.load.pipeline import PipelineInputs

# A thread of a stage ends after the image that it decodes, or the batch that it sends. close() waits for it no longer
# than this.
THREAD_END_S = 1.0


@dataclass(slots=True, eq=False)
class StageJob:
    """A batch in a stage. The queue's lock guards what the threads of the stage change.

    Attributes:
        batch: The batch, once the stage has made it.
        number: Number of the batch in the share.
        n_rows: Number of its records; 0: there is no batch, because the epoch ends or the stage before failed.
        n_bytes: Bytes that the stage before served for it.
        n_replaced: Number of its records that replace corrupt ones.
        n_left: Number of tasks of the stage that are not done; 0: the consumer may take the batch.
        error: Error that the consumer raises in place of the batch.
    """

    batch: Any = None
    number: int = 0
    n_rows: int = 0
    n_bytes: int = 0
    n_replaced: int = 0
    n_left: int = 0
    error: BaseException | None = None


JobT = TypeVar("JobT", bound=StageJob)


class StageQueue(Generic[JobT]):
    """The batches between the stage before and the consumer, oldest first. One lock guards everything.

    The lock is re-entrant: the garbage collector may drop, and so close, a pipeline in a thread that holds the lock.

    Args:
        ahead: Maximum number of batches in the queue.
    """

    def __init__(self, ahead: int) -> None:
        lock = threading.RLock()
        self._lock = lock
        self._ready, self._room = threading.Condition(lock), threading.Condition(lock)
        self._jobs: deque[JobT] = deque()
        self._ahead = ahead
        self._has_ended = self._is_closed = False
        self._error: BaseException | None = None  # raised in place of the first batch that is not done
        self._n_added = 0
        self.busy_ns = 0  # time in which threads or processes worked on batches

    @property
    def n_taken(self) -> int:
        """Number of batches that were added and are no longer in the queue."""
        with self._lock:
            return self._n_added - sum(job.n_rows > 0 for job in self._jobs)

    @property
    def is_closed(self) -> bool:
        """Whether close() was called."""
        return self._is_closed

    def wait_for_room(self, has_worker: Callable[[], bool] = lambda: True) -> bool:
        """Wait until a batch may be added. Returns False once no batch may be added any more.

        has_worker: Function that says whether a worker can take the batch; after it has changed call wake().
        """
        with self._lock:
            self._room.wait_for(lambda: self._has_ended or (len(self._jobs) < self._ahead and has_worker()))
            return not self._has_ended

    def add(self, job: JobT) -> None:
        """Append a batch. One without records is the last one."""
        with self._lock:
            self._has_ended = self._has_ended or not job.n_rows
            if not self._is_closed:
                self._jobs.append(job)
                self._n_added += job.n_rows > 0
            self.wake()

    def fail(self, error: BaseException) -> None:
        """Raise an error in place of the first batch that is not done; no batch is added any more."""
        with self._lock:
            self._error, self._has_ended = self._error or error, True
            self.wake()

    def next_done(self, timeout_s: float | None) -> StageJob:
        """Wait for the oldest batch and return it.

        Raises:
            TimeoutError: timeout_s passed.
            RuntimeError: The queue is closed.
        """
        with self._lock:
            if not self._ready.wait_for(lambda: self._is_closed or self._error or self._is_first_done(), timeout_s):
                raise TimeoutError(f"no batch within {timeout_s} s")
            if self._is_closed:
                raise RuntimeError(CLOSED_MESSAGE)
            if not self._is_first_done():
                return StageJob(error=self._error)
            job = self._jobs.popleft()
            self._room.notify_all()
            return job

    def wake(self) -> None:
        """Let all waiting threads look again whether they can go on."""
        with self._lock:
            self._ready.notify_all()
            self._room.notify_all()

    def close(self) -> None:
        """Wake all threads; nothing is added or returned any more."""
        with self._lock:
            self._is_closed = self._has_ended = True
            dropped, self._jobs = self._jobs, deque()
            self.wake()
        dropped.clear()

    def _count_done(self, job: JobT, took_ns: int) -> None:
        """Count a task of a batch as done. The caller holds the lock."""
        self.busy_ns += took_ns
        job.n_left -= 1
        if not job.n_left:
            self.wake()

    def _is_first_done(self) -> bool:
        return bool(self._jobs) and not self._jobs[0].n_left


class StagePipeline(ClosingPipeline):
    """A stage whose threads change the batches of another pipeline, with the same guarantees.

    All methods may be called from any thread. A subclass calls _begin() with what its threads run.

    Args:
        name: Name of the stage, in the names of its threads and of its counter.
        inputs: Inputs of the pipeline.
        gathered: Pipeline whose batches are changed; this object owns it from now on.
        queue: Queue between the threads and the consumer.
    """

    def __init__(self, name: str, inputs: PipelineInputs, gathered: ClosingPipeline, queue: StageQueue[Any]) -> None:
        self._name = name
        self._waits = inputs.waits
        self._first_batch = inputs.first_batch
        self._gathered = gathered
        self._queue = queue
        self._n_rows = self._n_batches = self._n_bytes = self._n_replaced = 0
        self._threads: list[threading.Thread] = []

    def _begin(self, runs: Sequence[Callable[[], None]]) -> None:
        """Start a thread for each function. They must not refer to this object: its last reference closes it."""
        self._threads = [
            threading.Thread(target=run, name=f"tiercache-{self._name}-{i}", daemon=True) for i, run in enumerate(runs)
        ]
        self._register()
        for thread in self._threads:
            thread.start()

    def take(self, timeout_s: float = -1.0) -> Any:
        """Return the next batch; None at the end of the epoch. Raises as Pipeline.take(), and the stage's errors."""
        if self.is_forked_copy:
            raise RuntimeError(CLOSED_MESSAGE)
        start_s = time.perf_counter()
        job = self._queue.next_done(None if timeout_s < 0 else timeout_s)
        self._waits.add(time.perf_counter() - start_s)
        if job.error is not None or not job.n_rows:
            # The error's traceback would form a cycle with the job, and hold the memory of its batch.
            error, job.error, job.batch = job.error, None, None
            self.close()
            if error is not None:
                raise error
            return None
        self._n_rows += job.n_rows
        self._n_batches += 1
        self._n_bytes += job.n_bytes
        self._n_replaced += job.n_replaced
        return job.batch

    def close(self) -> None:
        """End all threads; batches that were taken stay valid. See Pipeline.close."""
        if self.is_forked_copy:
            return
        self._queue.close()
        self._gathered.close()
        threads, self._threads = self._threads, []  # waited for once, even if close() is called again
        end_s = time.monotonic() + THREAD_END_S
        for thread in threads:
            if thread is not threading.current_thread() and thread.is_alive():
                thread.join(max(0.0, end_s - time.monotonic()))
        self._unregister()

    @property
    def n_taken(self) -> int:
        return self._first_batch + self._queue.n_taken

    @property
    def corrupt_shard(self) -> int | None:  # type: ignore[override]
        return self._gathered.corrupt_shard

    def figures(self) -> dict[str, float]:
        """See Pipeline.figures, for the batches handed out; also the time that the stage worked on batches."""
        handed_out = {"samples": self._n_rows, "batches": self._n_batches, "bytes_served": self._n_bytes}
        busy = {f"{self._name}_ns": self._queue.busy_ns}
        return {**self._gathered.figures(), **handed_out, **busy, "skipped": self._n_replaced}
