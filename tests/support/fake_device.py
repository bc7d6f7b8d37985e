"""A device without hardware: streams are queues of operations, which run when a test says so.

Its memory is host memory. Memory that nothing refers to any more is lent again at once, as torch's allocator does, and
is poisoned in stream order. A copy checks that its source is still what it was when the copy was queued. So a loader
that breaks a rule of stream memory hands out wrong values here, or raises an AssertionError. All operations may be
called from any thread, as long as the device does not capture a graph.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from tiercache.load.batch import BatchMemory
from tiercache.load.device import BACKENDS

POISON = 0xA5


class Point:
    """A point in a stream's work, where an event was recorded; the event may be recorded again, elsewhere."""

    is_done = False
    at_ms = 0.0


class FakeEvent:
    """An event that is done when its stream has come to it."""

    def __init__(self, device: FakeDevice) -> None:
        device.check_not_capturing("the creation of an event")
        self._device = device
        self.point = Point()

    def record(self, stream: FakeStream) -> None:
        self.point = Point()
        stream.submit(partial(self._complete, self.point))

    def query(self) -> bool:
        self._device.check_not_capturing("the query of an event")
        return self.point.is_done

    def synchronize(self) -> None:
        self._device.check_not_capturing("a wait on the host")
        self._device.n_synchronised += 1
        self._device.run_until(lambda: self.point.is_done)

    def elapsed_time(self, end_event: FakeEvent) -> float:
        assert self.point.is_done
        assert end_event.point.is_done
        return end_event.point.at_ms - self.point.at_ms

    def _complete(self, point: Point) -> None:
        point.is_done, point.at_ms = True, self._device.now_ms


class FakeStream:
    """A queue of operations; an operation that is a point waits for it."""

    def __init__(self, device: FakeDevice) -> None:
        self._device = device
        self.operations: deque[Point | Callable[[], None]] = deque()

    def submit(self, operation: Point | Callable[[], None]) -> None:
        if self is self._device.current:
            self._device.check_not_capturing("work on the stream that is captured")
        with self._device.lock:
            self.operations.append(operation)
            if self._device.is_eager:
                self._device.run_all()

    def wait_event(self, event: FakeEvent) -> None:
        self.submit(event.point)

    def wait_stream(self, other: FakeStream) -> None:
        self.wait_event(self._device.record(other))

    def synchronize(self) -> None:
        self._device.check_not_capturing("a wait on the host")
        self._device.run_until(lambda: not self.operations)

    @property
    def can_run(self) -> bool:
        return bool(self.operations) and (not isinstance(self.operations[0], Point) or self.operations[0].is_done)

    def run_one(self) -> None:
        operation = self.operations.popleft()
        if not isinstance(operation, Point):
            operation()


class AlignedMemory(BatchMemory):
    """Lends memory that is aligned as a device's is, when the streams that used it have come so far."""

    used_on: dict[int, FakeStream]

    def _allocate(self, n_bytes: int) -> np.ndarray:
        return torch.empty(n_bytes, dtype=torch.uint8).numpy()

    def take_back(self, memory: np.ndarray) -> None:
        stream, back = self.used_on.pop(memory.ctypes.data, None), partial(super().take_back, memory)
        if stream is None:
            back()
        else:
            stream.submit(back)


class FakeDevice:
    """A backend (tiercache.load.device.Backend) for tests.

    Args:
        device: Device that it stands for.
        is_eager: Whether every operation runs when it is submitted.
    """

    def __init__(self, device: torch.device, *, is_eager: bool = False) -> None:
        self.device, self.is_eager = device, is_eager
        self.lock = threading.RLock()
        self.is_capturing = False
        self.violations: list[str] = []  # what a capture does not allow
        self._was_copied = threading.Condition(self.lock)
        self._used_on: dict[int, FakeStream] = {}  # by address
        self.now_ms = 0.0
        self.choose: Callable[[list[FakeStream]], FakeStream] = lambda streams: streams[0]
        self.streams: list[FakeStream] = []
        self.current = self.new_stream()
        self.n_copies = self.n_synchronised = 0
        self.pinned_bytes: list[int] = []
        self.copied_bytes: list[int] = []
        self.sources: list[tuple[int, int]] = []  # addresses from which copies read
        self.fail_allocation = self.fail_copy = False
        self._memory: dict[int, AlignedMemory] = {}  # by stream, as torch's allocator keeps it
        # memory that is never freed, so that operations can refer to it by address
        self._owned: list[np.ndarray] = []
        self._pinned: list[np.ndarray] = []

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        """Capture a graph on the current stream, which CUDA allows only if no thread does certain things meanwhile."""
        self.is_capturing = True
        try:
            yield
        finally:
            self.is_capturing = False
        assert not self.violations

    def check_not_capturing(self, what: str) -> None:
        if self.is_capturing:
            self.violations.append(f"{what} in {threading.current_thread().name}")
            raise RuntimeError(f"{what} is not allowed while a graph is captured")

    def wait_for_copies(self, n_copies: int) -> None:
        """Wait until so many copies were issued."""
        with self._was_copied:
            assert self._was_copied.wait_for(lambda: self.n_copies >= n_copies, 60), f"only {self.n_copies} copies"

    def use_device(self) -> None:
        pass

    def holds(self, tensor: torch.Tensor) -> bool:
        return self._owner(tensor) is not None and not self.is_pinned(tensor)

    def keep_until_used(self, tensor: torch.Tensor, stream: FakeStream) -> None:
        owner = self._owner(tensor)
        assert owner is not None
        self._used_on[owner.ctypes.data] = stream

    def pin(self, n_bytes: int) -> torch.Tensor:
        self.check_not_capturing("an allocation of pinned memory")
        self.pinned_bytes.append(n_bytes)
        pinned = torch.full((n_bytes,), POISON, dtype=torch.uint8)
        self._owned.append(pinned.numpy())
        self._pinned.append(pinned.numpy())
        return pinned

    def allocate(self, n_bytes: int) -> torch.Tensor:
        self.check_not_capturing("an allocation of the device's memory")
        if self.fail_allocation:
            raise RuntimeError("out of memory")
        memory = self._memory.setdefault(id(self.current), AlignedMemory(keep=1000))
        memory.used_on = self._used_on
        lent = memory.lend(max(n_bytes, 1), -(-max(n_bytes, 1) // 512) * 512)
        block = torch.frombuffer(lent, dtype=torch.uint8)[:n_bytes]
        if not any(_contains(owned, block.data_ptr()) for owned in self._owned):
            self._owned.append(lent.base)
        there = self.raw(block)
        self.current.submit(lambda: there.fill(POISON))
        return block

    def current_stream(self) -> FakeStream:
        return self.current

    def new_stream(self) -> FakeStream:
        self.streams.append(FakeStream(self))
        return self.streams[-1]

    def record(self, stream: FakeStream, *, timed: bool = False) -> FakeEvent:
        event = FakeEvent(self)
        event.record(stream)
        return event

    def copy(self, destination: torch.Tensor, source: torch.Tensor, stream: FakeStream) -> None:
        if self.fail_copy:
            raise RuntimeError("the device failed")
        with self._was_copied:
            self.n_copies += 1
            self.copied_bytes.append(source.nbytes)
            self.sources.append((source.data_ptr(), source.data_ptr() + source.nbytes))
            self._was_copied.notify_all()
        is_from_host = self.is_pinned(source)
        is_pageable = self._owner(source) is None
        to, origin = self.raw(destination), source.numpy().copy() if is_pageable else self.raw(source)
        before = origin.copy()

        def run() -> None:
            if is_from_host:
                assert np.array_equal(origin, before), "the source was rewritten before its copy was done"
            to[...] = origin

        stream.submit(run)

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return any(_contains(memory, tensor.data_ptr()) for memory in self._pinned)

    def raw(self, tensor: torch.Tensor) -> np.ndarray:
        """The tensor's memory, without a reference to the tensor: it may be lent again meanwhile."""
        start, dtype = tensor.data_ptr(), str(tensor.dtype).removeprefix("torch.")
        if tensor.nbytes == 0:
            return np.empty(tuple(tensor.shape), dtype)
        owned = self._owner(tensor)
        assert owned is not None, "the tensor is neither on the device nor in pinned memory"
        first = start - owned.ctypes.data
        return owned[first : first + tensor.nbytes].view(dtype).reshape(tuple(tensor.shape))

    def _owner(self, tensor: torch.Tensor) -> np.ndarray | None:
        return next((owned for owned in self._owned if _contains(owned, tensor.data_ptr())), None)

    def run_one(self) -> bool:
        with self.lock:
            ready = [stream for stream in self.streams if stream.can_run]
            if not ready:
                return False
            self.now_ms += 1
            self.choose(ready).run_one()
            return True

    def run_until(self, is_done: Callable[[], bool]) -> None:
        while not is_done():
            assert self.run_one(), "the host waits for work that nothing can begin"

    def run_all(self) -> None:
        while self.run_one():
            pass


def _contains(memory: np.ndarray, address: int) -> bool:
    return bool(memory.ctypes.data <= address < memory.ctypes.data + memory.size)


def install(monkeypatch: Any, **options: Any) -> list[FakeDevice]:
    """Let `LoaderOptions(device="privateuseone:n")` name fake devices; return the list of those that loaders made."""
    made: list[FakeDevice] = []

    def make(device: torch.device) -> FakeDevice:
        made.append(FakeDevice(device, **options))
        return made[-1]

    monkeypatch.setitem(BACKENDS, "privateuseone", make)
    return made
