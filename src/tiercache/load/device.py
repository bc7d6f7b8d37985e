"""Devices that batches are copied to: torch's API behind a small interface, pinned memory, and what a loader keeps.

AcceleratorBackend uses only torch's device-independent API, so it serves every accelerator with streams. PinnedMemory
lends memory for the ring's slots, for decoded images and for tensors that lie elsewhere, and finds the slot that
contains a tensor. BatchDevice is what the pipelines of one loader share from epoch to epoch.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from tiercache._native.ring import SLOT_ALIGN
from tiercache.load.batch import BatchMemory, Bytes, aligned
from tiercache.stats import WaitHistogram

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from tiercache.load.options import LoaderOptions
    from tiercache.load.pipeline import ClosingPipeline, PipelineInputs
    from tiercache.load.device_pipeline import DevicePipeline


class Event(Protocol):
    """A point in a stream's work: the part of torch.Event that is used here."""

    def query(self) -> bool:
        """Return whether the work before the event is done."""

    def synchronize(self) -> None:
        """Wait until the work before the event is done."""

    def elapsed_time(self, end_event: Any, /) -> float:
        """Return the milliseconds between two events that are done and were recorded with timing."""


class DeviceStream(Protocol):
    """A queue of work of a device: the part of torch.Stream that is used here. Equal objects are one stream."""

    def wait_stream(self, other: Any, /) -> None:
        """Let further work of this stream wait for the present work of another."""

    def wait_event(self, event: Any, /) -> None:
        """Let further work of this stream wait for an event."""

    def synchronize(self) -> None:
        """Wait until the present work of this stream is done."""


class Backend(Protocol):
    """What the loader needs of a device. The consumer's thread calls all methods; any thread may use the events."""

    device: torch.device

    def pin(self, n_bytes: int) -> torch.Tensor:
        """Return uint8[n_bytes] of host memory from which a copy to the device runs beside other work."""

    def allocate(self, n_bytes: int) -> torch.Tensor:
        """Return uint8[n_bytes] on the device, allocated on the caller's current stream."""

    def current_stream(self) -> DeviceStream:
        """Return the caller's current stream on the device."""

    def new_stream(self) -> DeviceStream:
        """Return a stream of its own."""

    def record(self, stream: DeviceStream, *, timed: bool = False) -> Event:
        """Return an event after the present work of a stream. timed: whether elapsed_time() will be asked for."""

    def copy(self, destination: torch.Tensor, source: torch.Tensor, stream: DeviceStream) -> None:
        """Queue a copy in a stream. The caller keeps both tensors until an event after the copy is done."""


class AcceleratorBackend:
    """A device through torch.accelerator, torch.Stream and torch.Event; before torch 2.7, through torch.cuda.

    ROCm's devices are torch.cuda devices.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._is_generic = hasattr(torch.Stream, "__enter__")

    def pin(self, n_bytes: int) -> torch.Tensor:
        """See Backend."""
        return torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True, device="cpu")

    def allocate(self, n_bytes: int) -> torch.Tensor:
        """See Backend."""
        return torch.empty(n_bytes, dtype=torch.uint8, device=self.device)

    def current_stream(self) -> DeviceStream:
        """See Backend."""
        module: Any = torch.accelerator if self._is_generic else torch.cuda
        stream: DeviceStream = module.current_stream(self.device)
        return stream

    def new_stream(self) -> DeviceStream:
        """See Backend."""
        make: Any = torch.Stream if self._is_generic else torch.cuda.Stream
        stream: DeviceStream = make(device=self.device)
        return stream

    def record(self, stream: DeviceStream, *, timed: bool = False) -> Event:
        """See Backend."""
        make: Any = torch.Event if self._is_generic else torch.cuda.Event
        event = make(self.device, enable_timing=timed) if self._is_generic else make(enable_timing=timed)
        event.record(stream)
        recorded: Event = event
        return recorded

    def copy(self, destination: torch.Tensor, source: torch.Tensor, stream: DeviceStream) -> None:
        """See Backend."""
        entered: Any = stream
        within: AbstractContextManager[Any] = entered if self._is_generic else torch.cuda.stream(entered)
        with within:
            destination.copy_(source, non_blocking=True)


# Batches whose copies are issued at a time: the next one, and one that is copied beside the step of the present one.
BATCHES = 2

# Backends of further types of devices; tests add one that needs no hardware.
BACKENDS: dict[str, Callable[[torch.device], Backend]] = {}


def find_device(wanted: Any) -> torch.device | None:
    """Return the device that `LoaderOptions.device` names; None for the CPU, which takes the plain path.

    Raises:
        ValueError: torch does not know the device, this machine does not have it, or it has no streams.
    """
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


def _with_index(device: torch.device) -> torch.device:
    """Return the device with its number: that of the current device if it has none."""
    if _index(device) is not None or device.type in BACKENDS:
        return device
    module: Any = getattr(torch, "accelerator", None)
    return torch.device(device.type, module.current_device_index() if module else torch.cuda.current_device())


@dataclass(frozen=True, slots=True)
class PinnedSlot:
    """A part of pinned memory that holds one batch. start, end: addresses; memory: uint8 tensor over [start, end)."""

    start: int
    end: int
    memory: torch.Tensor


class PinnedMemory(BatchMemory):
    """Lends pinned memory and finds the slot of an address. See BatchMemory; all methods may be called from any thread.

    The memory of a ring is allocated once and kept from epoch to epoch; an iterator that overlaps another gets memory
    of its own. When a batch outgrew its slot, the next ring gets larger slots.

    Memory may return in any thread and at any instant, because the garbage collector runs finalizers. So containers are
    changed by single operations only, which need no lock.

    Args:
        pin: Function that returns uint8[n] of pinned memory.
        n_held: Number of slots that the consumer's side of a ring holds at a time.
    """

    def __init__(self, pin: Callable[[int], torch.Tensor], n_held: int) -> None:
        super().__init__(n_held)
        self._pin = pin
        self.n_held = n_held
        self._blocks: dict[int, tuple[torch.Tensor, int]] = {}  # by address: memory, and the bytes of its slots
        self._free_arenas: deque[tuple[Bytes, int]] = deque()  # memory, and the bytes of its slots
        self._largest_bytes = 0

    def slot_bytes(self, expected_bytes: int) -> int:
        """Return the size of a ring's slots, if a batch has about expected_bytes."""
        return aligned(max(expected_bytes + 1, self._largest_bytes))

    def note_largest(self, n_bytes: int) -> None:
        """Note the bytes of a slot that the largest batch of an epoch needed."""
        self._largest_bytes = max(self._largest_bytes, n_bytes)

    def lend_arena(self, slot_bytes: int, n_slots: int) -> tuple[Bytes, int]:
        """Return memory for the slots of a ring, and their size: slot_bytes or more, a multiple of SLOT_ALIGN.

        The memory returns when nothing refers to the array any more.
        """
        memory: Bytes | None = None
        while memory is None and self._free_arenas:
            kept, kept_bytes = self._free_arenas.popleft()
            if kept_bytes >= slot_bytes and kept.size >= kept_bytes * n_slots:
                memory, slot_bytes = kept, kept_bytes
            else:  # outgrown
                self._forget(kept)
        if memory is None:
            memory = self._allocate(slot_bytes * n_slots, slot_bytes)
        lent = memory[:]
        weakref.finalize(lent, self._free_arenas.append, (memory, slot_bytes)).atexit = False
        return lent, slot_bytes

    def lend_tensor(self, n_bytes: int) -> tuple[Bytes, torch.Tensor]:
        """Return lent memory of n_bytes, and a tensor over it, which does not keep it."""
        # sizes that vary a little share memory
        step = max(SLOT_ALIGN, 1 << max(0, n_bytes.bit_length() - 3))
        lent = self.lend(n_bytes, -(-n_bytes // step) * step)
        return lent, self._blocks[lent.ctypes.data][0][:n_bytes]

    def take_back(self, memory: Bytes) -> None:
        """See BatchMemory."""
        free = self._free[memory.size]
        free.append(memory)
        while len(free) > self.keep:
            self._forget(free.popleft())

    def find_slot(self, address: int) -> PinnedSlot | None:
        """Return the slot that contains an address; None if it is not in pinned memory of this object."""
        for start, (memory, slot_bytes) in list(self._blocks.items()):
            if start <= address < start + memory.numel():
                first = (address - start) // slot_bytes * slot_bytes
                part = memory[first : first + slot_bytes]
                return PinnedSlot(start + first, start + first + part.numel(), part)
        return None

    def _allocate(self, n_bytes: int, slot_bytes: int | None = None) -> Bytes:
        pinned = self._pin(n_bytes)
        self._blocks[pinned.data_ptr()] = pinned, slot_bytes or n_bytes
        memory: Bytes = pinned.numpy()
        return memory

    def _forget(self, memory: Bytes) -> None:
        self._blocks.pop(memory.ctypes.data, None)


class BatchDevice:
    """The device of a loader's batches, and what its pipelines share from epoch to epoch.

    The consumer's thread uses it; any thread may call exposed_waits().

    Attributes:
        backend: Access to the device.
        max_issued: Maximum number of batches whose copies are issued ahead, including the one that is handed out next.
        is_fixed: Whether every batch is served at the same addresses.
        fixed: Device memory of the fixed batch, once the first batch was served, and what describes it.
        fixed_stream: Stream on which `fixed` was used last.
        pinned: Pinned memory of the batches.
    """

    def __init__(self, backend: Backend, max_issued: int, *, is_fixed: bool) -> None:
        self.backend = backend
        self.max_issued = max_issued
        self.is_fixed = is_fixed
        self.fixed: Any = None
        self.fixed_stream: DeviceStream | None = None
        # A pipeline of Python stages may take one slot ahead of the copies; see DevicePipeline and Pipeline.
        self.pinned = PinnedMemory(backend.pin, self.max_running + 1)
        self._copy_stream: DeviceStream | None = None
        self._lock = threading.Lock()
        self._steps: deque[tuple[Event, Event]] = deque()  # begin and end of waits that the device has not passed yet
        self._exposed = WaitHistogram()

    @property
    def max_running(self) -> int:
        """Maximum number of copies that are not done yet.

        One more than are issued ahead, so that a host that runs ahead of the device can issue the next step.
        """
        return self.max_issued + 1

    @property
    def copy_stream(self) -> DeviceStream:
        """The side stream on which batches are copied."""
        if self._copy_stream is None:
            self._copy_stream = self.backend.new_stream()
        return self._copy_stream

    def note_step(self, begin: Event, end: Event) -> None:
        """Note two timed events of the consumer's stream: its earlier work was done, and its batch had arrived."""
        with self._lock:
            self._steps.append((begin, end))
        self._settle()

    def pipeline(self, inputs: PipelineInputs, before: ClosingPipeline) -> DevicePipeline:
        """Return the stage that copies the batches of the pipeline `before` to the device."""
        return DevicePipeline(self, inputs, before)

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
    """Return what the pipelines of a loader share, made anew if the current device has changed."""
    device = _with_index(device)
    if existing is not None and existing.backend.device == device:
        return existing
    backend = BACKENDS.get(device.type, AcceleratorBackend)(device)
    return BatchDevice(backend, options.device_batches or BATCHES, is_fixed=options.device_buffers == "fixed")
