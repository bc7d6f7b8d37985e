"""Devices that batches are copied to: torch's API behind a small interface, and the stage that copies batches ahead.

A thread of the stage takes batches, packs what does not lie in pinned memory, and issues the copies. The consumer's
thread allocates all memory and asks all events, within next(): in another thread either would break a CUDA graph that
the training loop captures at that moment. If the thread finds no memory, the consumer's thread issues the copy.

Rules of memory, which hold without record_stream:

1. The destination is allocated on the consumer's current stream, and the side stream waits for that stream before it
   copies. So the memory's earlier users, which the allocator ordered by that stream, are done.
2. The consumer's stream waits for the copy before the batch is handed out. The stage keeps the destination until the
   copy is done.
3. The stage keeps the host's tensors, and with them the slot of the ring, until the copy's event is done.

A batch whose tensors lie in one slot of pinned memory takes one copy: the range that the tensors cover. Other tensors
(results of a transform, a batch that outgrew its slot) are copied into pinned memory first. Small tensors of a larger
batch take a copy each, to device memory of their own: a label that is kept, or saved by torch.save, is only the label.
"""

from __future__ import annotations

import contextlib
import operator
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from queue import SimpleQueue
from typing import Any, TypeAlias

import torch

from tiercache.data.output_spec import Buffer
from tiercache.load.batch import Bytes, PinnedMemory, aligned
from tiercache.load.loader_options import LoaderOptions
from tiercache.load.pipeline import ClosingPipeline, StageJob, StagePipeline, StageQueue
from tiercache.load.planner import PipelineInputs
from tiercache.stats import WaitHistogram

# A point in a stream's work, and a queue of work of a device: torch's objects. Equal streams are one stream.
Event: TypeAlias = Any
DeviceStream: TypeAlias = Any


class Backend:
    """What the loader needs of a device: torch.accelerator, torch.Stream and torch.Event; before 2.7, torch.cuda.

    ROCm's devices are torch.cuda devices. The stage's thread calls use_device(), holds() and copy(), and records events
    that exist; all else is for the consumer's thread.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._is_generic = hasattr(torch.Stream, "__enter__")

    def use_device(self) -> None:
        """Make the device the current one of the calling thread. Otherwise torch may begin to use device 0, too."""
        (torch.accelerator.set_device_index if self._is_generic else torch.cuda.set_device)(self.device)

    def holds(self, tensor: torch.Tensor) -> bool:
        return tensor.device == self.device

    def keep_until_used(self, tensor: torch.Tensor, stream: DeviceStream) -> None:
        """Let the allocator keep a tensor's memory, after it is dropped, until the work of a stream so far is done."""
        tensor.record_stream(stream)

    def pin(self, n_bytes: int) -> torch.Tensor:
        return torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True, device="cpu")

    def allocate(self, n_bytes: int) -> torch.Tensor:
        """Return uint8[n_bytes] on the device, allocated on the caller's current stream."""
        return torch.empty(n_bytes, dtype=torch.uint8, device=self.device)

    def current_stream(self) -> DeviceStream:
        return (torch.accelerator if self._is_generic else torch.cuda).current_stream(self.device)

    def new_stream(self) -> DeviceStream:
        return (torch.Stream if self._is_generic else torch.cuda.Stream)(device=self.device)

    def record(self, stream: DeviceStream, *, timed: bool = False) -> Event:
        make: Any = torch.Event if self._is_generic else torch.cuda.Event  # torch's stubs know neither's arguments
        event = make(self.device, enable_timing=timed) if self._is_generic else make(enable_timing=timed)
        event.record(stream)
        return event

    def copy(self, destination: torch.Tensor, source: torch.Tensor, stream: DeviceStream) -> None:
        """Queue a copy in a stream. The caller keeps both tensors until an event after the copy is done."""
        with stream if self._is_generic else torch.cuda.stream(stream):
            destination.copy_(source, non_blocking=True)


# Batches whose copies are issued at a time: the next one, and one that is copied beside the step of the present one.
BATCHES = 2

# Device memory for the next copies has room for the largest of this many batches.
RECENT_BATCHES = 8

# Backends of further types of devices; tests add one that needs no hardware.
BACKENDS: dict[str, Callable[[torch.device], Backend]] = {}


def find_device(wanted: Any) -> torch.device | None:
    """Return the device that `LoaderOptions.device` names; None for the CPU, which takes the plain path."""
    if wanted is None:
        return None
    try:
        device = torch.device(wanted)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device={wanted!r} names no device of torch: {str(error).splitlines()[0]}") from error
    if device.type == "cpu":
        return None
    if device.type in BACKENDS:
        return device
    if device.type == "mps":
        raise ValueError(
            f"device={wanted!r}: MPS has no streams and no pinned memory, so batches cannot be copied beside the "
            'computation: remove device=, and move each batch with .to("mps")'
        )
    module: Any = getattr(torch, "accelerator", torch.cuda)  # torch.accelerator: 2.6 and later
    if not module.is_available():
        raise ValueError(
            f"device={wanted!r} needs an accelerator, and torch {torch.__version__} finds none here: remove device=, "
            "or install a driver and a build of torch for your accelerator"
        )
    found = "cuda" if module is torch.cuda else module.current_accelerator().type
    if device.type != found:
        raise ValueError(f"device={wanted!r}: the accelerator of this machine is {found!r}")
    if (_index(device) or 0) >= module.device_count():
        raise ValueError(f"device={wanted!r}: this machine has {module.device_count()} devices, from {found}:0 on")
    return device


def _index(device: Any) -> int | None:
    index: int | None = device.index  # torch's stubs say int
    return index


class BatchDevice:
    """The device of a loader's batches, and what its pipelines share from epoch to epoch.

    The consumer's thread uses it; any thread may call exposed_waits(). max_issued: batches whose copies are issued
    before they are handed out; fixed: device memory of the fixed batch; sizes: bytes of the blocks of the last batches.
    """

    def __init__(self, backend: Backend, max_issued: int, *, is_fixed: bool) -> None:
        self.backend = backend
        self.max_issued = max_issued
        # Copies that are not done yet: one more, so that a host that runs ahead of the device can issue the next step.
        self.max_running = max_issued + 1
        self.is_fixed = is_fixed
        self.fixed: Any = None
        self.fixed_stream: DeviceStream | None = None
        self.sizes: deque[list[int]] = deque(maxlen=RECENT_BATCHES)
        # A pipeline of Python stages may take one slot ahead of the copies; see DevicePipeline and Pipeline.
        self.pinned = PinnedMemory(backend.pin, self.max_running + 1)
        self.copy_stream: DeviceStream = backend.new_stream()
        self._lock = threading.Lock()
        self._steps: deque[tuple[Event, Event]] = deque()  # begin and end of waits that the device has not passed yet
        self._exposed = WaitHistogram()
        self._consumer = 0  # the thread that may ask the events

    def note_step(self, begin: Event, end: Event) -> None:
        """Note two timed events of the consumer's stream: its earlier work was done, and its batch had arrived."""
        self._consumer = threading.get_ident()
        with self._lock:
            self._steps.append((begin, end))
        self._settle()

    def note_sizes(self, sizes: list[int]) -> None:
        if self.sizes and len(self.sizes[0]) != len(sizes):
            self.sizes.clear()
        self.sizes.append(sizes)

    def pipeline(self, inputs: PipelineInputs, before: ClosingPipeline) -> DevicePipeline:
        return DevicePipeline(inputs, self, before)

    def exposed_waits(self) -> WaitHistogram:
        """Return the waits of the consumer's stream for batches, of the steps that the device has passed."""
        if threading.get_ident() == self._consumer:
            self._settle()
        return self._exposed

    def _settle(self) -> None:
        with self._lock:
            while self._steps and self._steps[0][1].query():
                begin, end = self._steps.popleft()
                self._exposed.add(max(0.0, begin.elapsed_time(end) / 1e3))


def make_batch_device(device: torch.device, options: LoaderOptions, existing: BatchDevice | None) -> BatchDevice:
    if _index(device) is None and device.type not in BACKENDS:
        module: Any = getattr(torch, "accelerator", None)
        device = torch.device(device.type, module.current_device_index() if module else torch.cuda.current_device())
    if existing is not None and existing.backend.device == device:
        return existing
    backend = BACKENDS.get(device.type, Backend)(device)
    return BatchDevice(backend, options.device_batches or BATCHES, is_fixed=options.device_buffers == "fixed")


# If a batch has tensors outside its slot, this much of the slot is copied with them: copying 64 KiB takes less time
# than issuing a second copy.
SMALL_RANGE_BYTES = 64 << 10

# In larger batches, the smallest tensors get device memory of their own: so many of them at most, because issuing a
# copy takes some microseconds, and only those that are at most this part (1/16) of the batch.
MAX_OWN_COPIES, SMALL_PART = 8, 16

BUFFER_TENSORS = 3  # tensors of a Buffer; a column of more is a list, which would use up the copies


def _is_jagged(value: Any) -> bool:
    """Whether a tensor is a jagged nested tensor as the loader makes it: values and offsets."""
    return bool(value.is_nested and value.layout is torch.jagged and value.lengths() is None and value._ragged_idx == 1)  # noqa: SLF001


def _has_tensors(value: Any) -> bool:
    return any(isinstance(item, torch.Tensor | Buffer | Mapping | list | tuple) for item in value)


def _map_tensors(value: Any, column: str, replaced: Callable[[str, torch.Tensor], Any]) -> Any:
    if isinstance(value, torch.Tensor):
        return replaced(column, value)
    if isinstance(value, Buffer):
        members = (value.values, value.offsets, value.shapes)
        return Buffer(*(replaced(column, m) if isinstance(m, torch.Tensor) else m for m in members))
    if isinstance(value, Mapping):
        items = {name: _map_tensors(item, column or str(name), replaced) for name, item in value.items()}
        return items if type(value) is dict else type(value)(items)  # type: ignore[call-arg]  # as torch's pin_memory
    if isinstance(value, list | tuple) and _has_tensors(value):
        parts = [_map_tensors(item, column or str(index), replaced) for index, item in enumerate(value)]
        if isinstance(value, list):
            return parts
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def _tensors_of(batch: Any) -> list[tuple[str, torch.Tensor]]:
    found: list[tuple[str, Any]] = []

    def note(column: str, tensor: Any) -> Any:
        parts = (tensor.values(), tensor.offsets()) if _is_jagged(tensor) else (tensor,)
        found.extend((column, part) for part in parts)
        return tensor

    _map_tensors(batch, "", note)
    return found


def _with_tensors(batch: Any, tensors: Iterable[torch.Tensor]) -> Any:
    rest = iter(tensors)

    def next_of(_: str, tensor: torch.Tensor) -> Any:
        if _is_jagged(tensor):
            return torch.nested.nested_tensor_from_jagged(next(rest), next(rest))
        return next(rest)

    return _map_tensors(batch, "", next_of)


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor's bytes can be copied as they are: neither sparse nor quantised, nor of a class of its own."""
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and not (tensor.is_nested or tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
    )


def _span_bytes(tensor: torch.Tensor) -> int:
    if tensor.is_contiguous():
        return tensor.nbytes
    if tensor.numel() == 0:
        return 0
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.itemsize


@dataclass(slots=True)
class _TensorLayout:
    """Where a tensor lies in the device memory of its batch."""

    column: str
    tensor: torch.Tensor
    offset: int = -1  # bytes; -1: it is not plain and moves by itself
    n_bytes: int = 0  # from the first to the last element
    stride: tuple[int, ...] = ()
    block: int = 0

    def over(self, storage: torch.UntypedStorage, first_byte: int) -> torch.Tensor:
        """Return the tensor over the storage of its block, which begins at first_byte.

        It has a version counter of its own. With views of the block, autograd would take a change of one column for a
        change of all.
        """
        tensor = self.tensor
        if self.offset < 0:
            return tensor.to(storage.device)
        out = torch.empty(0, dtype=tensor.dtype, device=storage.device)
        return out.set_(storage, (first_byte + self.offset) // tensor.itemsize, tensor.shape, self.stride)


def _tensors_over(blocks: Iterable[torch.Tensor], layouts: Iterable[_TensorLayout]) -> list[torch.Tensor]:
    memory = [(block.untyped_storage(), int(block.storage_offset())) for block in blocks]
    return [layout.over(*memory[layout.block]) for layout in layouts]


@dataclass(slots=True)
class _HostBatch:
    """The tensors of a batch in pinned memory, and where they go on the device.

    ranges: (byte position in block 0, pinned memory), one for each copy to it. n_bytes: size of block 0. own: pinned
    memory of the small tensors, which are the blocks from 1 on. held: objects that keep the pinned memory. n_packed:
    bytes that did not lie in pinned memory.
    """

    layouts: list[_TensorLayout]
    ranges: list[tuple[int, torch.Tensor]]
    n_bytes: int
    held: list[Any]
    own: list[torch.Tensor] = field(default_factory=list)
    n_packed: int = 0

    @staticmethod
    def of(
        value: Any, device: BatchDevice, lend: Callable[[int], tuple[Bytes, torch.Tensor] | None]
    ) -> _HostBatch | None:
        """Return the batch; None if lend(), which lends pinned memory for what does not lie there, returns None."""
        layouts = [_TensorLayout(column, tensor) for column, tensor in _tensors_of(value)]
        # The memory of the tests' device is host memory, too.
        plain = [one for one in layouts if _is_plain(one.tensor) and not device.backend.holds(one.tensor)]
        batch = _HostBatch(layouts, [], 0, [])
        outside = batch._take_slot(plain, device.pinned)
        if any(layout.tensor.nbytes for layout in outside) and batch.n_bytes <= SMALL_RANGE_BYTES:
            batch.ranges, batch.n_bytes, batch.held = [], 0, []
            outside = plain
        if outside and not batch._copy_to_pinned(outside, lend):
            return None
        if batch.n_bytes > SMALL_RANGE_BYTES:
            batch._set_small_apart()
        return batch

    @property
    def sizes(self) -> list[int]:
        """Bytes of each block."""
        return [self.n_bytes, *(memory.numel() for memory in self.own)]

    def copies(self, blocks: Sequence[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (destination in the blocks, pinned source) of each copy."""
        for first, memory in self.ranges:
            yield blocks[0][first : first + memory.numel()], memory
        yield from zip(blocks[1:], self.own, strict=True)

    def _set_small_apart(self) -> None:
        """Give the small tensors blocks of their own. A range with other tensors is copied to block 0 as a whole."""
        plain = [layout for layout in self.layouts if layout.offset >= 0 and layout.n_bytes]
        n_tensors = Counter(layout.column for layout in plain)
        single = [layout for layout in plain if n_tensors[layout.column] <= BUFFER_TENSORS]
        for layout in sorted(single, key=lambda layout: layout.n_bytes)[:MAX_OWN_COPIES]:
            if layout.n_bytes * SMALL_PART > self.n_bytes:
                break
            first, memory = next(one for one in self.ranges if one[0] <= layout.offset < one[0] + one[1].numel())
            begin = layout.offset - first
            self.own.append(memory[begin : begin + layout.n_bytes])
            layout.block, layout.offset = len(self.own), 0
        left = [layout.offset for layout in plain if not layout.block]
        self.ranges = [
            (first, memory)
            for first, memory in self.ranges
            if any(first <= offset < first + memory.numel() for offset in left)
        ]

    def _take_slot(self, plain: list[_TensorLayout], pinned: PinnedMemory) -> list[_TensorLayout]:
        """Place the plain tensors of the first slot that is found, by one copy; return the others."""
        slot: torch.Tensor | None = None
        begin = end = 0  # addresses of the slot
        inside: list[tuple[_TensorLayout, int, int]] = []
        outside: list[_TensorLayout] = []
        for layout in plain:
            tensor = layout.tensor
            n_bytes = _span_bytes(tensor)
            start = tensor.data_ptr()
            if slot is None and n_bytes:
                slot = pinned.find_slot(start)
                if slot is not None:
                    begin, end = slot.data_ptr(), slot.data_ptr() + slot.numel()
            if n_bytes and begin <= start <= end - n_bytes and start % tensor.itemsize == 0:
                inside.append((layout, start, start + n_bytes))
            else:
                outside.append(layout)
        if slot is None or not inside:
            return outside
        first = min(start for _, start, _ in inside)
        first -= (first - begin) % 64  # columns of the slot keep their alignment
        for layout, start, stop in inside:
            layout.offset, layout.n_bytes, layout.stride = start - first, stop - start, layout.tensor.stride()
        self.held += [layout.tensor for layout, _, _ in inside]
        last = max(stop for _, _, stop in inside)
        self.ranges.append((0, slot[first - begin : last - begin]))
        self.n_bytes = aligned(last - first)
        return outside

    def _copy_to_pinned(
        self, outside: list[_TensorLayout], lend: Callable[[int], tuple[Bytes, torch.Tensor] | None]
    ) -> bool:
        """Copy the tensors into pinned memory, each from a multiple of 64 bytes on; dense strides are kept.

        Returns False if there is no such memory.
        """
        begin = self.n_bytes
        for layout in outside:
            layout.stride = torch.empty_like(layout.tensor, device="meta").stride()
            layout.offset, layout.n_bytes = self.n_bytes, layout.tensor.nbytes
            self.n_bytes += aligned(layout.tensor.nbytes)
        self.n_packed = self.n_bytes - begin
        if self.n_packed == 0:
            return True
        memory = lend(self.n_packed)
        if memory is None:
            return False
        lent, host = memory
        storage, first_byte = host.untyped_storage(), int(host.storage_offset()) - begin
        for layout in outside:
            layout.over(storage, first_byte).copy_(layout.tensor.detach())
        self.ranges.append((begin, host))
        self.held.append(lent)
        return True


@dataclass(slots=True, eq=False)
class _Destination:
    """Device memory for a copy. event: After its allocation, on `stream`, the consumer's; then after the copy."""

    blocks: list[torch.Tensor]
    event: Event
    stream: DeviceStream

    def fits(self, sizes: list[int]) -> bool:
        """Whether it has room for blocks of these sizes, and not more than twice the memory that they need."""
        own = [block.numel() for block in self.blocks]
        return len(own) == len(sizes) and all(map(operator.le, sizes, own)) and sum(own) <= 2 * max(sum(sizes), 1)


@dataclass(slots=True)
class _Copy:
    """A copy that was issued. stream: The consumer's stream on which `blocks`, the destination, were allocated."""

    host: _HostBatch
    blocks: list[torch.Tensor]
    event: Event
    stream: DeviceStream


@dataclass(slots=True, eq=False)
class _Job(StageJob):
    """A batch in this stage. host, copy: None if the stage's thread had no memory for them.

    made: Event after the work that a transform in the consumer's thread has queued on the device.
    """

    host: _HostBatch | None = None
    copy: _Copy | None = None
    made: Event | None = None


def _take_job(before: ClosingPipeline, timeout_s: float = -1.0) -> _Job:
    """Return the next batch of the stage before as a job; a job without records has its error, or is the end."""
    earlier = before.figures()
    try:
        batch = before.take(timeout_s)
    except TimeoutError:
        raise
    except Exception as error:  # noqa: BLE001 -- the user's code: the consumer raises it in its place
        return _Job(error=error)
    if batch is None:
        return _Job()
    figures = before.figures()
    n_rows, n_bytes, n_replaced = (int(figures[n] - earlier[n]) for n in ("samples", "bytes_served", "skipped"))
    return _Job(batch, 0, n_rows, n_bytes, n_replaced, n_left=1)


class _CopyQueue(StageQueue[_Job]):
    """The batches whose copies are issued. The stage's thread calls run(), and the consumer's thread the others."""

    def __init__(self, device: BatchDevice) -> None:
        super().__init__(device.max_issued)
        self._device = device
        # copies that are not known to be done, oldest first, and what keeps their memory
        self._copying: deque[tuple[Event, Any]] = deque()
        self._destinations: list[_Destination] = []  # for the next copies

    def run(self, next_job: Callable[[], _Job]) -> None:
        """Issue the copies of batches as soon as they are ready, until the queue is closed."""
        try:
            self._device.backend.use_device()
            while self.wait_for_room(self._has_host_memory):
                job = next_job()
                self.add(job)
                if job.n_left:
                    self._issue_ahead(job)
                del job  # a waiting thread must not hold a batch
        except Exception as error:  # noqa: BLE001 -- top of a thread: the consumer would wait for ever
            self.fail(error)

    def release_done(self) -> None:
        """Release the memory of copies that are done. If no batch could be taken otherwise, wait for the oldest one."""
        with self._lock:
            while self._copying:
                oldest = self._copying[0][0]
                if not oldest.query():
                    if self._jobs or self._has_host_memory():
                        break
                    oldest.synchronize()
                self._copying.popleft()
            self.wake()

    def issue_missing(self, first: _Job, stream: DeviceStream) -> None:
        """Issue the copies that the thread could not issue, and allocate device memory for the next ones.

        The first batch, which is handed out now, is copied again if its memory was allocated on another stream.
        """
        if first.copy is None or first.copy.stream != stream:
            self._issue_here(first, stream)
        assert first.host is not None  # noqa: S101 -- its copy was issued
        self._device.note_sizes(first.host.sizes)
        self.allocate_destinations(stream, first)
        with self._lock:
            left = [job for job in self._jobs if job.n_rows and job.copy is None and not (job.n_left or job.error)]
        for job in left:
            self._issue_here(job, stream)

    def allocate_destinations(self, stream: DeviceStream, first: _Job | None = None) -> None:
        """Allocate device memory for the copies that may be issued. first: Batch that is handed out now."""
        sizes = [max(block) for block in zip(*self._device.sizes, strict=True)]
        with self._lock:
            self._destinations = [one for one in self._destinations if one.stream == stream and one.fits(sizes)]
            n_issued = sum(job.copy is not None and job is not first for job in self._jobs)
            n_missing = self._device.max_issued - n_issued - len(self._destinations)
        for _ in range(n_missing if sizes and not self._has_ended else 0):
            destination = self._allocate(sizes, stream)
            with self._lock:
                self._destinations.append(destination)

    def wait_for_copies(self) -> None:
        """Wait until no copy is running, and drop the memory. The queue is closed."""
        with self._lock:
            # A device in an error state runs no copies, and the consumer's next call reports the error.
            with contextlib.suppress(RuntimeError):
                for event, _ in self._copying:
                    event.synchronize()
            self._copying.clear()
            self._destinations.clear()

    def _has_host_memory(self) -> bool:
        """Whether a further batch may take pinned memory: a slot, or memory into which it is packed."""
        n_unissued = sum(job.copy is None and job.n_rows > 0 for job in self._jobs)
        return len(self._copying) + n_unissued < self._device.max_running

    def _issue_ahead(self, job: _Job) -> None:
        start_ns = time.perf_counter_ns()
        job.host = _HostBatch.of(job.batch, self._device, self._device.pinned.lend_tensor)
        with self._lock:  # held while a copy is issued, so that none is issued after close()
            destination = None if job.host is None else self._take_destination(job.host.sizes)
            if job.host is not None and destination is not None and not self._is_closed:
                self._issue(job, job.host, destination)
            self._count_done(job, time.perf_counter_ns() - start_ns)

    def _issue_here(self, job: _Job, stream: DeviceStream) -> None:
        job.host = job.host or _HostBatch.of(job.batch, self._device, self._device.pinned.allocate_tensor)
        assert job.host is not None  # noqa: S101 -- allocate_tensor() always returns memory
        with self._lock:
            destination = self._take_destination(job.host.sizes)
        if destination is None or destination.stream != stream:
            destination = self._allocate(job.host.sizes, stream)
        with self._lock:
            self._issue(job, job.host, destination)

    def _take_destination(self, sizes: list[int]) -> _Destination | None:
        found = next((one for one in self._destinations if one.fits(sizes)), None)
        if found is not None:
            self._destinations.remove(found)
        return found

    def _allocate(self, sizes: list[int], stream: DeviceStream) -> _Destination:
        backend = self._device.backend
        with torch.inference_mode(False):  # else only code in that mode could write to the memory
            blocks = [backend.allocate(n_bytes) for n_bytes in sizes]
        return _Destination(blocks, backend.record(stream), stream)

    def _issue(self, job: _Job, host: _HostBatch, destination: _Destination) -> None:
        backend, side = self._device.backend, self._device.copy_stream
        blocks = [block[:n_bytes] for block, n_bytes in zip(destination.blocks, host.sizes, strict=True)]
        try:
            side.wait_event(destination.event)
            for there, source in host.copies(blocks):
                backend.copy(there, source, side)
            destination.event.record(side)
            job.copy = _Copy(host, blocks, destination.event, destination.stream)
            self._copying.append((job.copy.event, (host.held, blocks)))
        except BaseException:  # Ctrl-C included: nothing may refer to the memory of a copy that is running
            side.synchronize()
            raise


@dataclass(slots=True)
class _FixedBatch:
    """The device memory at which every batch is served. signature: (column, dtype, shape) of each tensor."""

    blocks: list[torch.Tensor]
    tensors: list[torch.Tensor]
    offsets: list[tuple[int, int]]  # (block, byte position in it)
    signature: list[tuple[str, torch.dtype, torch.Size]] = field(default_factory=list)


class DevicePipeline(StagePipeline):
    """The batches of another pipeline on a device, in order, with the same guarantees.

    A thread takes the batches of the stage before, unless that stage runs the user's functions in the consumer's
    thread. Then take() takes them, always the same number ahead, so that the draws of a seeded script do not depend on
    timing. `take` is called by one thread at a time, under a lock, and `close` by any thread.
    """

    def __init__(self, inputs: PipelineInputs, device: BatchDevice, before: ClosingPipeline) -> None:
        self._copies = _CopyQueue(device)
        super().__init__("copy", inputs, before, self._copies)
        self._device = device
        self._made: SimpleQueue[_Job] | None = SimpleQueue() if before.runs_in_caller else None
        self._n_made, self._has_made_last = 0, False  # batches that were made and not handed out
        self._n_unpinned = 0
        self._taking = threading.RLock()
        self._copies.allocate_destinations(device.backend.current_stream())
        self._begin([partial(self._copies.run, partial(_take_job, before) if self._made is None else self._made.get)])

    def take(self, timeout_s: float = -1.0) -> Any | None:
        self._check_not_forked()
        with self._taking:
            backend = self._device.backend
            stream = backend.current_stream()
            begin = backend.record(stream, timed=True)
            start_s = time.perf_counter()
            try:
                if self._made is not None:
                    self._make_ahead(self._made, stream, timeout_s)
                self._copies.release_done()
                job = self._copies.first_done(None if timeout_s < 0 else timeout_s)
            finally:
                self._waits.add(time.perf_counter() - start_s)
            if isinstance(job, _Job) and job.error is None and job.n_rows:
                self._copies.issue_missing(job, stream)
                batch = self._on_device(job, stream)
                self._device.note_step(begin, backend.record(stream, timed=True))
                job.batch = batch
            self._copies.remove(job)
            self._n_made -= 1
            return self._hand_out(job)

    def figures(self) -> dict[str, float]:
        return {**super().figures(), "unpinned": self._n_unpinned}

    def close(self) -> None:
        """End the threads and wait for the copies; batches that were taken stay valid. See Pipeline.close."""
        if self.is_forked_copy:
            return
        self._copies.close()
        if self._made is not None:
            self._made.put(_Job())  # the thread may wait for a batch
        super().close()
        with self._taking:
            self._copies.wait_for_copies()

    def _make_ahead(self, made: SimpleQueue[_Job], stream: DeviceStream, timeout_s: float) -> None:
        while self._n_made < self._device.max_issued and not self._has_made_last:
            n_taken = self._before.n_taken
            try:
                job = _take_job(self._before, timeout_s)
                job.made = self._device.backend.record(stream)
                made.put(job)
                self._n_made += 1
            except BaseException:  # Ctrl-C
                if self._before.n_taken > n_taken:  # a batch was lost: the next one must not be served in its place
                    self.close()
                raise
            self._has_made_last = not job.n_rows

    def _on_device(self, job: _Job, stream: DeviceStream) -> Any:
        copy = job.copy
        assert copy is not None  # noqa: S101 -- issue_missing() has issued it
        stream.wait_event(copy.event)
        if job.made is not None:
            stream.wait_event(job.made)
        backend, host = self._device.backend, copy.host
        for layout in host.layouts:
            if layout.offset < 0 and layout.tensor.layout is torch.strided and backend.holds(layout.tensor):
                backend.keep_until_used(layout.tensor, stream)
        if self._device.is_fixed:
            copy.event.synchronize()  # no graph that is captured from now on depends on another stream
            tensors = self._into_fixed(copy)
        else:
            tensors = _tensors_over(copy.blocks, host.layouts)
        self._n_unpinned += 2 * host.n_packed > host.n_bytes
        return _with_tensors(job.batch, tensors)

    def _into_fixed(self, copy: _Copy) -> list[torch.Tensor]:
        device, host, blocks, stream = self._device, copy.host, copy.blocks, copy.stream
        signature = [(layout.column, layout.tensor.dtype, layout.tensor.shape) for layout in host.layouts]
        offsets = [(layout.block, layout.offset) for layout in host.layouts]
        fixed: _FixedBatch | None = device.fixed
        if fixed is None:
            for layout in host.layouts:
                if layout.offset < 0:
                    raise ValueError(
                        f'device_buffers="fixed": column {layout.column!r} is a {type(layout.tensor).__name__} of '
                        f"layout {layout.tensor.layout} on {layout.tensor.device}, which has no fixed address: make it "
                        "a plain tensor in host memory"
                    )
            with torch.inference_mode(False):  # else only code in that mode could write to the memory
                memory = [device.backend.allocate(n_bytes) for n_bytes in host.sizes]
                fixed = _FixedBatch(memory, _tensors_over(memory, host.layouts), offsets, signature)
            device.fixed = fixed
        _check_signature(fixed.signature, signature)
        if device.fixed_stream is not None and device.fixed_stream != stream:
            stream.wait_stream(device.fixed_stream)
        device.fixed_stream = stream
        if offsets == fixed.offsets:
            for destination, made in zip(fixed.blocks, blocks, strict=True):
                device.backend.copy(destination, made, stream)
        else:  # A batch that outgrew its slot was copied: the same tensors, in other places.
            for tensor, source in zip(fixed.tensors, _tensors_over(blocks, host.layouts), strict=True):
                device.backend.copy(tensor, source, stream)
        return fixed.tensors


def _check_signature(
    expected: list[tuple[str, torch.dtype, torch.Size]], got: list[tuple[str, torch.dtype, torch.Size]]
) -> None:
    for one, other in zip_longest(expected, got):
        if one != other:
            raise ValueError(
                f'device_buffers="fixed": the first batch has {_described(one)}, and this one has {_described(other)}: '
                'fixed buffers need batches of one layout (full batches; layouts= "list" keeps text on the '
                'host; other columns of varying length need device_buffers="new")'
            )


def _described(tensor: tuple[str, torch.dtype, torch.Size] | None) -> str:
    return "no tensor" if tensor is None else f"column {tensor[0]!r} as {tensor[1]}{list(tensor[2])}"
