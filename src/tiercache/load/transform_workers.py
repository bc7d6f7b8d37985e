"""Worker processes that run the user's functions on gathered batches, as torch's workers would.

The training process gathers; a worker only runs Python. Each worker has blocks of shared memory of its own: some for
gathered batches on their way to it, some for batches on their way back. A batch that comes back lies in its block as
long as the consumer refers to it, and the block is used again afterwards. Messages on a pipe say which block holds
what; a worker that is done with an input block says so by its answer.

A block is an anonymous file in memory (memfd). It has no name, so nothing is left behind however its processes end, and
the size of /dev/shm does not limit it. An object is stored as its pickled structure and, apart from it, the memory of
its arrays and tensors. One process writes a block, the other one reads it, and messages say which of them may.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import mmap
import os
import pickle
import random
import signal
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import connection, reduction
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import numpy.typing as npt
import torch.multiprocessing
from torch._utils import ExceptionWrapper
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.data import default_collate
from torch.utils.data._utils import worker as torch_worker

from tiercache._native.ring import ColumnMemory
from tiercache.load.batch import Batch, BatchMemory, lend
from tiercache.load.collate import collate_into
from tiercache.load.pipeline import ClosingPipeline, SelfClosing, StageJob, StagePipeline, StageQueue
from tiercache.load.planner import PipelineInputs
from tiercache.load.transform import BatchFunction, BatchKeys, as_batch_error, note_origin
from tiercache.transform_rng import seed_global_generators, worker_seed

Bytes = npt.NDArray[np.uint8]

_ALIGN = 64

# Smaller arrays are pickled: a span of its own would cost more than it saves.
_SMALL_BYTES = 256

# When an object is read, its smallest arrays are copied to memory of their own, as long as they take at most this part
# (1/16) of it, or one page, together. Otherwise the labels of a batch would keep its block.
_SMALL_PART, _PAGE_BYTES = 16, 4096

# Growing by less would map a block again for each batch that is a little longer than the ones before.
_GROW_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class StoredObject:
    """Where an object lies in a block: its pickled structure, and the spans of its arrays, as (offset, n_bytes).

    n_bytes: Bytes of the block from its start that hold the object.
    """

    structure: tuple[int, int]
    arrays: Sequence[tuple[int, int]]
    n_bytes: int


class SharedBlock:
    """A block of shared memory, mapped in this process. It grows and never shrinks. For use by one thread at a time."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.memory: Bytes = np.empty(0, np.uint8)  # tensors and arrays over it keep the mapping, also after close()
        self._n_reserved = 0
        _live.add(self)

    @classmethod
    def create(cls) -> SharedBlock:
        return cls(os.memfd_create("tiercache-transform", os.MFD_CLOEXEC))

    def close(self) -> None:
        """Close the descriptor. Objects that were read stay valid."""
        if self.fd >= 0:
            os.close(self.fd)
        self.fd, self.memory = -1, np.empty(0, np.uint8)

    def clear(self) -> None:
        self._n_reserved = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor | None:
        """Return a tensor over memory of the block for an object that write() stores without a copy; None: no room."""
        numel = math.prod(shape)
        start, end = self._n_reserved, self._n_reserved + numel * dtype.itemsize
        if end > self.memory.size or not numel:
            return None
        self._n_reserved = _aligned(end)
        return torch.frombuffer(self.memory, dtype=dtype, count=numel, offset=start).view(tuple(shape))

    def write(self, value: Any) -> StoredObject:
        """Store an object. Its tensors must be on the CPU, otherwise they are pickled."""
        buffers: list[pickle.PickleBuffer] = []
        structure = io.BytesIO()

        def keep_apart(buffer: pickle.PickleBuffer) -> bool:
            if buffer.raw().nbytes < _SMALL_BYTES:
                return True
            buffers.append(buffer)
            return False

        _Pickler(structure, protocol=5, buffer_callback=keep_apart).dump(value)
        parts = [np.frombuffer(buffer.raw(), np.uint8) for buffer in buffers]
        parts.append(np.frombuffer(structure.getbuffer(), np.uint8))
        first, n_mapped = self.memory.ctypes.data, self.memory.size
        spans, end = [], self._n_reserved
        for part in parts:
            offset = part.ctypes.data - first
            if 0 <= offset < n_mapped:  # in this block already, see empty()
                spans.append((offset, part.size))
            else:
                spans.append((end, part.size))
                end = _aligned(end + part.size)
        self.map(end)
        for part, (offset, n_bytes) in zip(parts, spans, strict=True):
            if not 0 <= part.ctypes.data - first < n_mapped:
                self.memory[offset : offset + n_bytes] = part
        return StoredObject(spans[-1], spans[:-1], end)

    def map(self, n_bytes: int) -> None:
        """Map at least n_bytes, and let the block grow to them."""
        if n_bytes <= self.memory.size:
            return
        n_file = os.fstat(self.fd).st_size
        if n_file < n_bytes:
            n_file = -(-(n_bytes + n_bytes // 8) // _GROW_BYTES) * _GROW_BYTES
            os.ftruncate(self.fd, n_file)
        self.memory = np.frombuffer(mmap.mmap(self.fd, n_file), np.uint8)


_live: weakref.WeakSet[SharedBlock] = weakref.WeakSet()


def _close_inherited() -> None:
    # A forked process, such as a worker of another loader, would keep the memory of these blocks as long as it lives.
    for block in list(_live):
        block.close()


os.register_at_fork(after_in_child=_close_inherited)


def read(memory: Bytes | ColumnMemory, stored: StoredObject) -> Any:
    """Return the object that lies in memory. Small arrays and tensors are copied; others keep `memory` alive."""
    # NumPy's views refer to the array at the bottom of their chain, not to `memory`; views of a memoryview refer to it.
    view = memoryview(memory)  # type: ignore[arg-type]  # NumPy's stubs do not say that an array is a buffer
    start, n_bytes = stored.structure
    buffers = [view[first : first + n] for first, n in stored.arrays]
    budget_bytes = max(stored.n_bytes // _SMALL_PART, _PAGE_BYTES)
    for number in sorted(range(len(buffers)), key=lambda number: buffers[number].nbytes):
        budget_bytes -= buffers[number].nbytes
        if budget_bytes < 0:
            break
        buffers[number] = memoryview(ColumnMemory(buffers[number]))
    return pickle.loads(view[start : start + n_bytes], buffers=buffers)  # noqa: S301 -- written by this loader's process


class _Pickler(pickle.Pickler):
    """Pickles the structure of an object, with the memory of its tensors as buffers, as NumPy does for arrays."""

    def reducer_override(self, value: Any) -> Any:
        """Return how an object is pickled, if it is a tensor of the CPU."""
        if not isinstance(value, torch.Tensor) or value.device.type != "cpu":
            return NotImplemented
        is_wrapper: Any = is_traceable_wrapper_subclass(value)  # mypy believes that no tensor can be one
        if value.layout is torch.jagged:
            nested: Any = value
            return _nested_over, (nested.values(), nested.offsets())
        if value.layout is torch.sparse_coo:
            parts = value.detach().coalesce()
            return _sparse_over, (parts.indices(), parts.values(), tuple(value.shape))
        if value.layout is not torch.strided or value.is_quantized or is_wrapper:
            return NotImplemented
        if type(value) is not torch.Tensor:
            plain = value.detach().as_subclass(torch.Tensor)
            return _as_subclass, (type(value), plain, value.requires_grad, dict(vars(value)))
        plain = value.detach().resolve_conj().resolve_neg()
        if not plain.numel():
            return _empty_tensor, (tuple(plain.shape), plain.dtype)
        if not _is_dense(plain):
            plain = plain.contiguous()
        flat = plain.as_strided((plain.numel(),), (1,))
        data = pickle.PickleBuffer(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]  # as in read()
        return _tensor_over, (data, plain.dtype, tuple(plain.shape), plain.stride(), value.requires_grad)


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill one run of memory, in any order of dimensions (channels last, for example)."""
    expected = 1
    for stride, size in sorted((tensor.stride(i), tensor.size(i)) for i in range(tensor.dim()) if tensor.size(i) != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _tensor_over(
    data: Any, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...], requires_grad: bool
) -> torch.Tensor:
    return torch.frombuffer(data, dtype=dtype).as_strided(shape, stride).requires_grad_(requires_grad)


def _empty_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cpu")


def _nested_over(values: torch.Tensor, offsets: torch.Tensor) -> Any:
    # torch keeps the offsets of every nested tensor that it has seen, and with them the memory below.
    return torch.nested.nested_tensor_from_jagged(values, offsets.clone())


def _sparse_over(indices: torch.Tensor, values: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    # torch's own function keeps every sparse tensor that it has read, until torch.load() is called.
    return torch.sparse_coo_tensor(indices, values, shape, is_coalesced=True, check_invariants=False)


def _as_subclass(kind: type[torch.Tensor], plain: torch.Tensor, requires_grad: bool, state: dict[str, Any]) -> Any:
    value = plain.as_subclass(kind).requires_grad_(requires_grad)
    vars(value).update(state)
    return value


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // _ALIGN) * _ALIGN


# Batches of each worker that wait for the consumer, beyond those that are in the worker: it gets its next batch before
# the consumer has taken the one that it made.
WAITING = 1

# Blocks for batches that the consumer holds, beyond those that are ahead: the one that it processes, and the one
# before, to which loops still refer. If it holds more, batches are copied out of their blocks.
HELD_BY_CONSUMER = 2

# A worker looks this often whether its parent lives: other processes may hold the parent's end of its pipe open.
PARENT_CHECK_S = 5.0

# A worker that runs a user's function when the loader is closed ends after it, or is killed after this time.
END_S, TERMINATE_S = 1.0, 5.0


@dataclass(slots=True, eq=False)
class Job(StageJob):
    """A batch in this stage. gathered: the batch to make it of; None: a worker has it, it is made, or there is none."""

    gathered: Batch | None = None
    keys: BatchKeys | None = None


class JobQueue(StageQueue[Job]):
    """The batches of one pipeline in its workers, at most `most` of them.

    There are as many as fit into memory_bytes in shared memory, as they are gathered and as they are made, but at least
    `least`. That is also their number until the size of the first one is known.
    """

    def __init__(self, inputs: PipelineInputs, least: int, most: int, memory_bytes: int) -> None:
        super().__init__(least)
        self.inputs = inputs
        self._least, self._most, self._memory_bytes = least, most, memory_bytes
        self._batch_bytes = 1  # of the largest one

    def done(self, job: Job, batch: Any, error: BaseException | None, took_ns: int, n_bytes: int = 0) -> None:
        """Note that a batch is made, or why it cannot be: then no further batch is added.

        n_bytes: Shared memory that the batch takes.
        """
        with self._lock:
            job.gathered, job.batch, job.error = None, batch, error
            self._has_ended = self._has_ended or error is not None
            self._batch_bytes = max(self._batch_bytes, n_bytes)
            self._ahead = max(self._least, min(self._most, self._memory_bytes // self._batch_bytes))
            self._count_done(job, took_ns)


def _jobs(inputs: PipelineInputs, gathered: ClosingPipeline) -> Iterator[Job]:
    """Yield the gathered batches as jobs; the last one has no records, because the epoch ends, or has an error."""
    for number in itertools.count(inputs.first_batch):
        try:
            before, batch, after = gathered.figures(), gathered.take(), gathered.figures()
        except Exception as error:  # noqa: BLE001 -- top of a thread: the consumer raises it in its place
            yield Job(error=error)
            return
        if batch is None:
            yield Job()
            return
        keys = BatchKeys.of(inputs.share, number)
        n_bytes, n_replaced = (int(after[name] - before[name]) for name in ("bytes_served", "skipped"))
        job = Job(None, number, len(keys.positions), n_bytes, n_replaced, n_left=1, gathered=batch, keys=keys)
        del batch
        yield job
        del job  # a waiting thread must not hold a batch


@dataclass(frozen=True, slots=True)
class _Request:
    job: int
    input: int
    stored: StoredObject
    output: int
    keys: BatchKeys


@dataclass(frozen=True, slots=True)
class _Answer:
    """A worker's answer: where the batch lies in its block, or the error of a user's function; and the time it took.

    current: See BatchKeys.
    """

    job: int
    stored: StoredObject | None
    error: bytes
    took_ns: int
    current: int | None


@dataclass(frozen=True, slots=True)
class _Start:
    """A worker's first message: it has started, or its worker_init_fn raised an error."""

    error: bytes


@dataclass(slots=True, eq=False)
class _Worker:
    """A worker process, as its parent sees it.

    `free_inputs` and `free_outputs` are numbers of blocks; the block that was used last is used next, because blocks
    that are never used have no memory. The finalizer of a batch appends to `free_outputs`; single operations of a deque
    need no lock.
    """

    number: int
    process: Any
    pipe: Connection
    has_started: bool = False
    inputs: list[SharedBlock] = field(default_factory=list)
    outputs: list[SharedBlock] = field(default_factory=list)
    free_inputs: deque[int] = field(default_factory=deque)
    free_outputs: deque[int] = field(default_factory=deque)
    requests: dict[int, tuple[_Request, JobQueue, Job]] = field(default_factory=dict)  # by number, not answered

    def make_blocks(self, n_inputs: int, n_outputs: int) -> None:
        self.pipe.send((n_inputs, n_outputs))
        blocks = (self.inputs, self.free_inputs, n_inputs), (self.outputs, self.free_outputs, n_outputs)
        for made, free, n_blocks in blocks:
            for number in range(n_blocks):
                made.append(SharedBlock.create())
                reduction.send_handle(self.pipe, made[-1].fd, self.process.pid)
                free.append(number)

    @property
    def has_room(self) -> bool:
        return bool(self.free_inputs) and bool(self.free_outputs)

    def send(self, number: int, queue: JobQueue, job: Job) -> None:
        """Give the worker a batch. Raises ConnectionError if it has died."""
        assert job.keys is not None  # noqa: S101 -- the caller's invariant
        block = self.free_inputs.pop()
        try:
            stored = self.inputs[block].write(job.gathered)
        except BaseException:
            self.free_inputs.append(block)
            raise
        job.gathered = None
        request = _Request(number, block, stored, self.free_outputs.pop(), job.keys)
        self.requests[number] = request, queue, job
        self.pipe.send(request)

    def finish(self, answer: _Answer) -> JobQueue:
        request, queue, job = self.requests.pop(answer.job)
        self.free_inputs.append(request.input)
        batch: Any = None
        error: BaseException | None = None
        n_bytes = request.stored.n_bytes
        if answer.stored is None:
            self.free_outputs.append(request.output)
            error = _error_of(answer.error)
            note_origin(error, queue.inputs, replace(request.keys, current=answer.current))
        else:
            n_bytes += answer.stored.n_bytes
            try:
                batch = self._batch(request.output, answer.stored)
            except Exception as raised:  # noqa: BLE001 -- top of a thread: the batch cannot be unpickled here
                error = raised
        queue.done(job, batch, error, answer.took_ns, n_bytes)
        return queue

    def _batch(self, number: int, stored: StoredObject) -> Any:
        block = self.outputs[number]
        block.map(stored.n_bytes)
        if not self.free_outputs:  # the consumer holds many batches: without this block the worker could not go on
            memory: Any = ColumnMemory(block.memory[: stored.n_bytes])
            self.free_outputs.append(number)
        else:
            memory = lend(block.memory, stored.n_bytes, partial(self.free_outputs.append, number))
        return read(memory, stored)


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """The worker processes of a loader, and the user's functions that they run."""

    function: BatchFunction
    n_workers: int
    context: Any = None
    worker_init_fn: Callable[[int], None] | None = None
    prefetch_factor: int = 2
    keeps_workers: bool = False

    def start(self, seed: int) -> WorkerPool:
        return WorkerPool(self, seed)


class WorkerPipeline(StagePipeline):
    """The batches that worker processes make of those of a native pipeline, in order, with the same guarantees."""

    def __init__(self, pool: WorkerPool, memory_bytes: int, inputs: PipelineInputs, gathered: ClosingPipeline) -> None:
        self._pool = pool
        n_workers, n_ahead = pool.settings.n_workers, pool.settings.prefetch_factor + WAITING
        queue = JobQueue(inputs, n_workers, n_workers * n_ahead, memory_bytes)
        super().__init__("transform", inputs, gathered, queue)
        self._begin([partial(pool.send_all, queue, _jobs(inputs, gathered)), partial(pool.receive_all, queue)])

    def close(self) -> None:
        if not self.is_forked_copy:
            self._queue.close()
            self._pool.wake()
        super().close()


class WorkerPool(SelfClosing):
    """The worker processes of a loader. They serve one pipeline at a time, and may serve the pipelines of many epochs.

    send_all() and receive_all() each run in a thread of the pipeline. The pool closes itself when its last reference is
    dropped; at interpreter exit multiprocessing ends the processes.
    """

    def __init__(self, settings: WorkerSettings, seed: int) -> None:
        self.settings = settings
        self.is_used = False  # by a pipeline
        self._numbers = itertools.count()
        self._wake_reader, self._wake_writer = connection.Pipe(duplex=False)
        self._is_closed = self._is_broken = False
        self._workers: list[_Worker] = []
        self._pid = os.getpid()
        # A thread of the pipeline before may run a little longer than its pipeline.
        self._sending, self._receiving = threading.Lock(), threading.Lock()
        try:
            for number in range(settings.n_workers):
                worker = _start_worker(settings, number, worker_seed(seed, number))
                self._workers.append(worker)
                n_inputs = settings.prefetch_factor
                try:
                    worker.make_blocks(n_inputs, n_inputs + WAITING + HELD_BY_CONSUMER)
                except ConnectionError:
                    raise self._death_of(worker) from None
        except BaseException:
            self.close()
            raise

    def stage(self, memory_bytes: int) -> Callable[[PipelineInputs, ClosingPipeline], ClosingPipeline]:
        """Return the function that makes the pipeline. memory_bytes: Shared memory for batches ahead."""
        return partial(WorkerPipeline, self, memory_bytes)

    @property
    def is_reusable(self) -> bool:
        return not (self.is_used or self._is_closed or self._is_broken or self.is_forked_copy)

    def release(self) -> None:
        """End the use by a pipeline; close the pool unless its processes are to live on."""
        self.is_used = False
        if self._is_broken or not self.settings.keeps_workers:
            self.close()

    def wake(self) -> None:
        """Let receive_all() look whether its queue is closed."""
        if not (self._is_closed or self.is_forked_copy):
            self._wake_writer.send_bytes(b"w")

    def send_all(self, queue: JobQueue, jobs: Iterator[Job]) -> None:
        with self._sending:
            while queue.wait_for_room(lambda: any(worker.has_room for worker in self._workers)):
                job = next(jobs)
                queue.add(job)
                if job.gathered is not None:
                    worker = min((one for one in self._workers if one.has_room), key=lambda one: len(one.requests))
                    try:
                        worker.send(next(self._numbers), queue, job)
                    except ConnectionError:  # receive_all() says how the worker ended
                        return
                    except Exception as error:  # noqa: BLE001 -- top of a thread: the batch cannot be pickled
                        queue.done(job, None, error, 0)
                del job  # a waiting thread must not hold a batch

    def receive_all(self, queue: JobQueue) -> None:
        try:
            with self._receiving:
                self._receive_until_closed(queue)
        except Exception as error:  # noqa: BLE001 -- top of a thread: the consumer would wait for ever
            queue.fail(error)

    def close(self) -> None:
        """End the processes; batches that were taken stay valid. May be called repeatedly."""
        if self._is_closed or self.is_forked_copy:
            return
        self._is_closed = True
        for worker in self._workers:
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(worker.pipe.fileno())) as end:
                end.shutdown(socket.SHUT_RDWR)  # workers that were forked later hold this end of the pipe, too
            worker.pipe.close()  # an idle worker ends at once
        for sent, wait_s in ((None, END_S), ("terminate", TERMINATE_S), ("kill", None)):
            end_s = None if wait_s is None else time.monotonic() + wait_s
            for process in [worker.process for worker in self._workers if worker.process.is_alive()]:
                if sent is not None:
                    getattr(process, sent)()
                process.join(None if end_s is None else max(0.0, end_s - time.monotonic()))
        for worker in self._workers:
            worker.process.close()
            for block in (*worker.inputs, *worker.outputs):
                block.close()
        self._wake_reader.close()
        self._wake_writer.close()

    def _receive_until_closed(self, queue: JobQueue) -> None:
        sources: dict[Any, _Worker] = {}
        for worker in self._workers:
            sources |= {worker.pipe: worker, worker.process.sentinel: worker}
        while not queue.is_closed:
            ready = connection.wait([self._wake_reader, *sources])
            if self._wake_reader in ready:
                self._wake_reader.recv_bytes()
            for worker in {id(sources[source]): sources[source] for source in ready if source in sources}.values():
                if not self._receive(worker, queue):
                    return

    def _receive(self, worker: _Worker, queue: JobQueue) -> bool:
        try:
            if not worker.pipe.poll():  # only the sentinel was ready
                raise EOFError
            answer = worker.pipe.recv()
        except (EOFError, OSError):
            queue.fail(self._death_of(worker))
            return False
        if isinstance(answer, _Start):
            worker.has_started = True
            if answer.error:
                self._is_broken = True
                error = _error_of(answer.error)
                error.add_note(
                    f"tiercache: DataLoader worker {worker.number} could not start: its worker_init_fn failed"
                )
                queue.fail(error)
            return not answer.error
        if worker.finish(answer) is not queue:  # the batch was of an earlier pipeline, which left it in the worker
            queue.wake()
        return True

    def _death_of(self, worker: _Worker) -> RuntimeError:
        if self._is_closed:
            return RuntimeError("this iterator is closed")
        self._is_broken = True
        worker.process.join(END_S)
        code = worker.process.exitcode
        how = f"exit code {code}"
        if code is not None and code < 0:
            how += f", killed by {signal.Signals(-code).name}"
        name = f"DataLoader worker {worker.number} (pid {worker.process.pid})"
        if not worker.has_started:
            return RuntimeError(
                f"{name} could not start ({how}), so no transform has run: if it printed an error, that is the cause. "
                "A worker that is not forked imports the main script again, which must therefore begin its work below "
                "`if __name__ == '__main__':`, and it imports the modules of the functions that it is given"
            )
        return RuntimeError(
            f"{name} ended unexpectedly ({how}) while it ran transforms: perhaps a library crashed in a transform, or "
            "the machine has run out of memory"
        )


def _error_of(pickled: bytes) -> BaseException:
    try:
        pickle.loads(pickled).reraise()  # noqa: S301 -- written by a process of this loader
    except BaseException as raised:  # noqa: BLE001 -- the user's code: the consumer raises it in its place
        return as_batch_error(raised.with_traceback(None))  # torch's frame in it would form a cycle with the error
    raise AssertionError("a wrapped error was not raised")


def _start_worker(settings: WorkerSettings, number: int, seed: int) -> _Worker:
    context = settings.context or torch.multiprocessing
    ours, theirs = (context or connection).Pipe(duplex=True)
    process = context.Process(
        target=_run_worker,
        args=(theirs, ours, settings.function, settings.worker_init_fn, number, settings.n_workers, seed),
        name=f"tiercache-transform-worker-{number}",
        daemon=True,
    )
    process.start()
    theirs.close()
    return _Worker(number, process, ours)


def _run_worker(
    pipe: Connection,
    parents: Connection,
    function: BatchFunction,
    init_fn: Callable[[int], None] | None,
    number: int,
    n_workers: int,
    seed: int,
) -> None:
    """Run a worker process. parents: The parent's end of the pipe, which is closed here."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends its workers
    # A handler of the training script, which may only note that the job is to end, must not keep the worker alive.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parents.close()
    parent = os.getppid()
    torch.set_num_threads(1)
    random.seed(seed)
    torch.manual_seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch_worker._worker_info = torch_worker.WorkerInfo(  # noqa: SLF001 -- what torch's get_worker_info() returns
        id=number, num_workers=n_workers, seed=seed, dataset=function.dataset
    )
    failed = b""
    if init_fn is not None:
        try:
            init_fn(number)
        except BaseException:  # noqa: BLE001 -- the user's code: the consumer raises it in place of a batch
            failed = _wrapped(number)
    try:
        pipe.send(_Start(failed))
        n_inputs, n_outputs = pipe.recv()
        blocks = [SharedBlock(reduction.recv_handle(pipe)) for _ in range(n_inputs + n_outputs)]
        maker = _Maker(function, number, blocks[:n_inputs], blocks[n_inputs:])
        while os.getppid() == parent:
            if pipe.poll(PARENT_CHECK_S):
                pipe.send(maker.answer(pipe.recv()))
    except (EOFError, OSError):  # the parent closed the pipe, or has died
        return


@dataclass(slots=True)
class _Maker:
    """Makes the batches in a worker process."""

    function: BatchFunction
    number: int
    inputs: list[SharedBlock]
    outputs: list[SharedBlock]
    memory: BatchMemory = field(default_factory=lambda: BatchMemory(keep=2))

    def answer(self, request: _Request) -> _Answer:
        start_ns, stored, error = time.perf_counter_ns(), None, b""
        try:
            stored = self._make(request)
        except BaseException:  # noqa: BLE001 -- the user's code: the consumer raises it in place of the batch
            error = _wrapped(self.number)
        return _Answer(request.job, stored, error, time.perf_counter_ns() - start_ns, request.keys.current)

    def _make(self, request: _Request) -> StoredObject:
        block, output = self.inputs[request.input], self.outputs[request.output]
        n_bytes = request.stored.n_bytes
        block.map(n_bytes)
        # The user's functions may keep parts of a batch, and the parent reuses the block.
        own = self.memory.lend(n_bytes, 1 << (n_bytes - 1).bit_length())
        own[:] = block.memory[:n_bytes]
        output.clear()
        function, keys = self.function, request.keys
        if function.collate_fn is default_collate and not function.batch_transforms:
            function = replace(function, collate_fn=collate_into(output.empty))
        seed_global_generators(keys.seed, keys.epoch, keys.positions[0])
        return output.write(function.make(read(own, request.stored), keys))


def _wrapped(number: int) -> bytes:
    """Return the exception that is being handled as torch's workers report it, pickled."""
    wrap: Any = ExceptionWrapper
    wrapped = wrap(where=f"in DataLoader worker process {number}")
    try:
        return pickle.dumps(wrapped)
    except Exception:  # noqa: BLE001 -- the user's code: an exception's class that cannot be pickled
        wrapped.exc_type = RuntimeError
        return pickle.dumps(wrapped)
