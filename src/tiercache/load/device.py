"""Devices that batches are copied to: torch's API behind a small interface, and the stage that copies batches ahead.

Rules of memory, which hold without record_stream:

1. The destination is allocated on the consumer's current stream, and the side stream waits for that stream before it
   copies. So the memory's earlier users, which the allocator ordered by that stream, are done.
2. The consumer's stream waits for the copy before the batch is handed out. A destination that is dropped earlier is
   dropped only after the stream on which it was allocated waits for the copy, or after the copy is done.
3. The host's tensors, and with them the slot of the ring, are kept until the copy's event is done.

A batch whose tensors lie in one slot of pinned memory takes one copy: the range that the tensors cover. Other tensors
(results of a transform, a batch that outgrew its slot) are copied into pinned memory first. Small tensors of a larger
batch take a copy each, to device memory of their own: a label that is kept, or saved by torch.save, is only the label.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from typing import Any, TypeAlias

import torch

from tiercache.data.output_spec import Buffer
from tiercache.load.batch import PinnedMemory, aligned
from tiercache.load.loader_options import LoaderOptions
from tiercache.load.pipeline import ClosingPipeline, LaterStage
from tiercache.load.planner import PipelineInputs
from tiercache.stats import WaitHistogram

# A point in a stream's work, and a queue of work of a device: torch's objects. Equal streams are one stream.
Event: TypeAlias = Any
DeviceStream: TypeAlias = Any


class Backend:
    """What the loader needs of a device: torch.accelerator, torch.Stream and torch.Event; before 2.7, torch.cuda.

    ROCm's devices are torch.cuda devices. The consumer's thread calls all methods; any thread may use the events.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._is_generic = hasattr(torch.Stream, "__enter__")

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
    ahead, including the one that is handed out next; fixed: device memory of the fixed batch.
    """

    def __init__(self, backend: Backend, max_issued: int, *, is_fixed: bool) -> None:
        self.backend = backend
        self.max_issued = max_issued
        # Copies that are not done yet: one more, so that a host that runs ahead of the device can issue the next step.
        self.max_running = max_issued + 1
        self.is_fixed = is_fixed
        self.fixed: Any = None
        self.fixed_stream: DeviceStream | None = None
        # A pipeline of Python stages may take one slot ahead of the copies; see DevicePipeline and Pipeline.
        self.pinned = PinnedMemory(backend.pin, self.max_running + 1)
        self.copy_stream: DeviceStream = backend.new_stream()
        self._lock = threading.Lock()
        self._steps: deque[tuple[Event, Event]] = deque()  # begin and end of waits that the device has not passed yet
        self._exposed = WaitHistogram()

    def note_step(self, begin: Event, end: Event) -> None:
        """Note two timed events of the consumer's stream: its earlier work was done, and its batch had arrived."""
        with self._lock:
            self._steps.append((begin, end))
        self._settle()

    def pipeline(self, inputs: PipelineInputs, before: ClosingPipeline) -> DevicePipeline:
        return DevicePipeline(inputs, self, before)

    def exposed_waits(self) -> WaitHistogram:
        """Return the waits of the consumer's stream for batches, of the steps that the device has passed."""
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

# Counters of the batches that were handed out; a stage counts batches that were only copied, too.
_COUNTED = ("samples", "batches", "bytes_served", "skipped")


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
    memory of the small tensors, which are the blocks from 1 on. held: objects that keep the pinned memory.
    """

    layouts: list[_TensorLayout]
    ranges: list[tuple[int, torch.Tensor]]
    n_bytes: int
    held: list[Any]
    own: list[torch.Tensor] = field(default_factory=list)

    @staticmethod
    def of(value: Any, pinned: PinnedMemory) -> _HostBatch:
        layouts = [_TensorLayout(column, tensor) for column, tensor in _tensors_of(value)]
        batch = _HostBatch(layouts, [], 0, [])
        outside = batch._take_slot(pinned)
        if any(layout.tensor.nbytes for layout in outside) and batch.n_bytes <= SMALL_RANGE_BYTES:
            batch.ranges, batch.n_bytes, batch.held = [], 0, []
            outside = [layout for layout in layouts if _is_plain(layout.tensor)]
        if outside:
            batch._copy_to_pinned(outside, pinned)
        if batch.n_bytes > SMALL_RANGE_BYTES:
            batch._set_small_apart()
        return batch

    def copies(self, blocks: Sequence[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (destination in the blocks, pinned source) of each copy."""
        for first, memory in self.ranges:
            yield blocks[0][first : first + memory.numel()], memory
        yield from zip(blocks[1:], self.own, strict=True)

    def allocate(self, backend: Backend) -> list[torch.Tensor]:
        return [backend.allocate(n_bytes) for n_bytes in (self.n_bytes, *(memory.numel() for memory in self.own))]

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

    def _take_slot(self, pinned: PinnedMemory) -> list[_TensorLayout]:
        """Place the tensors of the first slot that is found, by one copy; return the other plain tensors."""
        slot: torch.Tensor | None = None
        begin = end = 0  # addresses of the slot
        inside: list[tuple[_TensorLayout, int, int]] = []
        outside: list[_TensorLayout] = []
        for layout in self.layouts:
            tensor = layout.tensor
            if not _is_plain(tensor):
                continue
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

    def _copy_to_pinned(self, outside: list[_TensorLayout], pinned: PinnedMemory) -> None:
        """Copy the tensors into pinned memory, each from a multiple of 64 bytes on; dense strides are kept."""
        begin = self.n_bytes
        for layout in outside:
            layout.stride = torch.empty_like(layout.tensor, device="meta").stride()
            layout.offset, layout.n_bytes = self.n_bytes, layout.tensor.nbytes
            self.n_bytes += aligned(layout.tensor.nbytes)
        n_bytes = self.n_bytes - begin
        if n_bytes == 0:
            return
        lent, host = pinned.lend_tensor(n_bytes)
        storage, first_byte = host.untyped_storage(), int(host.storage_offset()) - begin
        for layout in outside:
            layout.over(storage, first_byte).copy_(layout.tensor.detach())
        self.ranges.append((begin, host))
        self.held.append(lent)


@dataclass(slots=True)
class _Copy:
    """A copy that was issued. stream: The consumer's stream on which `blocks`, the destination, were allocated."""

    host: _HostBatch
    blocks: list[torch.Tensor]
    event: Event
    stream: DeviceStream


@dataclass(slots=True)
class _Entry:
    """A batch between the stage before and the consumer. value: None if `error` takes its place, or the epoch ends."""

    value: Any
    counted: tuple[float, ...] = ()
    error: Exception | None = None
    copy: _Copy | None = None


@dataclass(slots=True)
class _FixedBatch:
    """The device memory at which every batch is served. signature: (column, dtype, shape) of each tensor."""

    blocks: list[torch.Tensor]
    tensors: list[torch.Tensor]
    offsets: list[tuple[int, int]]  # (block, byte position in it)
    signature: list[tuple[str, torch.dtype, torch.Size]] = field(default_factory=list)


class DevicePipeline(LaterStage):
    """The batches of another pipeline on a device, in order, with the same guarantees.

    `take` is called by one thread at a time, under a lock, and `close` by any thread.
    """

    def __init__(self, inputs: PipelineInputs, device: BatchDevice, before: ClosingPipeline) -> None:
        super().__init__(before)
        self._device = device
        self._waits = inputs.waits
        self._queue: deque[_Entry] = deque()
        self._copying: deque[tuple[Event, list[Any]]] = deque()  # copies that are not known to be done, oldest first
        self._ended = False
        self._seen: tuple[float, ...] = (0.0,) * len(_COUNTED)  # counters of the stage before
        self._handed_out = [0.0] * len(_COUNTED)
        self._taking = threading.RLock()
        self._register()

    def take(self, timeout_s: float = -1.0) -> Any | None:
        self._check_not_forked()
        with self._taking:
            return self._take(timeout_s)

    @property
    def n_taken(self) -> int:
        return self._before.n_taken - sum(entry.value is not None for entry in self._queue)

    def figures(self) -> dict[str, float]:
        return {**self._before.figures(), **dict(zip(_COUNTED, self._handed_out, strict=True))}

    def close(self) -> None:
        """End the threads and wait for the copies; batches that were taken stay valid. See Pipeline.close."""
        if self.is_forked_copy:
            return
        self._before.close()
        with self._taking:
            # A device in an error state runs no copies, and the consumer's next call reports the error.
            with contextlib.suppress(RuntimeError):
                for event, _ in self._copying:
                    event.synchronize()
            self._copying.clear()
            self._queue.clear()
        self._unregister()

    def _take(self, timeout_s: float) -> Any | None:
        backend = self._device.backend
        stream = backend.current_stream()
        begin = backend.record(stream, timed=True)
        if self._queue:
            self._waits.add_zero()
        elif self._ended:
            return None
        else:
            start_s = time.perf_counter()
            try:
                self._receive(timeout_s)
            finally:
                self._waits.add(time.perf_counter() - start_s)
        entry = self._queue[0]
        if entry.value is None:
            self._ended = entry.error is None
            self.close()
            if entry.error is not None:
                raise entry.error
            return None
        copy = entry.copy
        if copy is None or copy.stream != stream:
            while not self._has_room():
                self._copying[0][0].synchronize()
            copy = self._issue(entry, stream)
        while len(self._queue) < self._device.max_issued and self._queue[-1].value is not None and self._receive(0.0):
            pass
        for later in islice(self._queue, 1, None):
            if later.value is None or not self._has_room():
                break
            if later.copy is None or later.copy.stream != stream:
                self._issue(later, stream)
        batch = self._on_device(entry.value, copy)
        self._queue.popleft()
        self._handed_out = [a + b for a, b in zip(self._handed_out, entry.counted, strict=True)]
        self._device.note_step(begin, backend.record(stream, timed=True))
        return batch

    def _receive(self, timeout_s: float) -> bool:
        """Append the next batch of the stage before to the queue, or its error, or the end.

        Returns False if none is ready. Raises TimeoutError for a timeout other than 0.
        """
        try:
            # C code moves the batch into the queue: Ctrl-C loses only a batch that the stage before has not returned.
            self._queue.extend(map(self._counted, map(self._before.take, (timeout_s,))))
        except TimeoutError:
            if timeout_s:
                raise
            return False
        except Exception as error:
            if not self._queue:  # this is its place
                self.close()
                raise
            self._queue.append(_Entry(None, error=error.with_traceback(None)))
        return True

    def _counted(self, value: Any) -> _Entry:
        figures = self._before.figures()
        now = tuple(figures.get(name, 0.0) for name in _COUNTED)
        counted, self._seen = tuple(a - b for a, b in zip(now, self._seen, strict=True)), now
        return _Entry(value, counted)

    def _issue(self, entry: _Entry, stream: DeviceStream) -> _Copy:
        """Queue a batch's copy, for the consumer's present stream, and return it."""
        backend, side, earlier = self._device.backend, self._device.copy_stream, entry.copy
        host = _HostBatch.of(entry.value, self._device.pinned) if earlier is None else earlier.host
        if earlier is not None:  # The consumer has changed its stream since.
            earlier.stream.wait_event(earlier.event)
            entry.copy = None
        try:
            blocks = host.allocate(backend)
            side.wait_stream(stream)
            for destination, source in host.copies(blocks):
                backend.copy(destination, source, side)
            event = backend.record(side)
            self._copying.append((event, host.held))
        except BaseException:  # Ctrl-C included: nothing may refer to the memory of a copy that is running
            side.synchronize()
            raise
        entry.copy = _Copy(host, blocks, event, stream)
        return entry.copy

    def _has_room(self) -> bool:
        """Release the host's memory of copies that are done. Returns whether a further copy may be issued."""
        while self._copying and self._copying[0][0].query():
            self._copying.popleft()
        return len(self._copying) < self._device.max_running

    def _on_device(self, value: Any, copy: _Copy) -> Any:
        copy.stream.wait_event(copy.event)
        if self._device.is_fixed:
            copy.event.synchronize()  # no graph that is captured from now on depends on another stream
            tensors = self._into_fixed(copy)
        else:
            tensors = _tensors_over(copy.blocks, copy.host.layouts)
        return _with_tensors(value, tensors)

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
                        f"layout {layout.tensor.layout}, which has no fixed address: make it a plain tensor"
                    )
            with torch.inference_mode(False):  # else only code in that mode could write to the memory
                memory = host.allocate(device.backend)
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
