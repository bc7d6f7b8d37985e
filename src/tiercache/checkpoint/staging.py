"""The copy of a state to host memory: the only part of a save for which training waits.

The memory consists of slabs that later saves use again: new memory costs a page fault for every page, and pinned
memory a call of the driver. Files lie in it as they will be on the disk, one after another, each from a page on, so
that they are written from there with direct I/O. A file may continue in the next slab.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tiercache.checkpoint.format import PAGE_BYTES, FileLayout, TensorSpec, distribute, lay_out_file
from tiercache.checkpoint.state_tree import EncodedState, TensorSource, flat_bytes

SLAB_BYTES = 64 << 20


class Device:
    """An accelerator through torch's device-independent API; before torch 2.6, through torch.cuda.

    Only the thread that calls save() calls the methods.
    """

    def __init__(self, device: Any) -> None:
        self._torch = sys.modules["torch"]
        self._device = device
        self._module = getattr(self._torch, "accelerator", None) or self._torch.cuda

    def pin(self, n_bytes: int) -> Any:
        """Return uint8[n_bytes] of host memory to which a copy runs beside other work."""
        return self._torch.empty(n_bytes, dtype=self._torch.uint8, pin_memory=True, device="cpu")

    def copy(self, destination: Any, source: Any) -> None:
        """Queue a copy in the current stream, so that it follows the training step."""
        destination.copy_(source, non_blocking=True)

    def wait(self) -> None:
        self._module.current_stream(self._device).synchronize()


FindDevice = Callable[[Any], Device | None]
"""Returns the device of a tensor of torch; None for one in host memory."""


def find_device(tensor: Any) -> Device | None:
    return None if tensor.device.type == "cpu" else _device(tensor.device)


@cache
def _device(device: Any) -> Device:
    return Device(device)


@dataclass(frozen=True, slots=True, eq=False)
class Slab:
    """A piece of host memory that begins at a page."""

    array: NDArray[np.uint8]
    tensor: Any
    is_pinned: bool


class HostMemory:
    """Slabs for staged states, kept for later saves. Thread-safe: the writer returns them."""

    def __init__(self, slab_bytes: int = SLAB_BYTES) -> None:
        self.slab_bytes = slab_bytes
        self._lock = Lock()
        self._free: list[Slab] = []

    def take(self, n_bytes: int, device: Device | None) -> list[Slab]:
        """Return slabs of n_bytes together; pinned by a device if one is given."""
        found: list[Slab] = []
        try:
            while len(found) * self.slab_bytes < n_bytes:
                found.append(self._reused(device is not None) or self._new(device))
        except BaseException:
            self.give(found)
            raise
        return found

    def give(self, slabs: Sequence[Slab]) -> None:
        with self._lock:
            self._free += slabs

    def clear(self) -> None:
        with self._lock:
            self._free.clear()

    def _reused(self, is_pinned: bool) -> Slab | None:
        with self._lock:
            for number, slab in enumerate(self._free):
                if slab.is_pinned == is_pinned:
                    return self._free.pop(number)
        return None

    def _new(self, device: Device | None) -> Slab:
        if device is not None:
            tensor = device.pin(self.slab_bytes)
            return Slab(tensor.numpy(), tensor, is_pinned=True)
        memory = mmap.mmap(-1, self.slab_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a kernel without huge pages; they make the first copy faster
            memory.madvise(mmap.MADV_HUGEPAGE)
        array = np.frombuffer(memory, np.uint8)
        torch = sys.modules.get("torch")
        return Slab(array, None if torch is None else torch.from_numpy(array), is_pinned=False)


@dataclass(frozen=True, slots=True, eq=False)
class StagedFile:
    """A safetensors file in host memory.

    Attributes:
        specs: Tensors by name.
        layout: Header and positions.
        pieces: Its bytes in order; each piece but the last has whole pages.
    """

    specs: Mapping[str, TensorSpec]
    layout: FileLayout
    pieces: tuple[memoryview, ...]


class StagedState:
    """A state in host memory: the files as they will be on the disk, once copy() has returned.

    release() is called when nobody uses the files any more.

    Args:
        state: State whose tensors are copied.
        memory: Memory for the copy. It is pinned if a tensor is on a device.
        n_streams: Number of files that are written in parallel.
        device_of: Function that returns the device of a tensor.

    Attributes:
        files: Files of the state; none after release().
    """

    def __init__(
        self, state: EncodedState, memory: HostMemory, *, n_streams: int, device_of: FindDevice = find_device
    ) -> None:
        torch = sys.modules.get("torch")
        self._devices = {
            name: device_of(source.value)
            for name, source in state.tensors.items()
            if torch is not None and isinstance(source.value, torch.Tensor)
        }
        specs = [TensorSpec(name, one.dtype, one.shape, one.n_bytes) for name, one in state.tensors.items()]
        groups = distribute(specs, n_streams)
        layouts = [lay_out_file(group) for group in groups]
        self._starts, end = [], 0
        for layout in layouts:
            self._starts.append(end)
            end += -(-layout.n_bytes // PAGE_BYTES) * PAGE_BYTES
        pinning = next((device for device in self._devices.values() if device is not None), None)
        self._sources, self._memory = state.tensors, memory
        self._copy = _Copy(memory.take(end, pinning), memory.slab_bytes)
        self.files: Sequence[StagedFile] = [
            StagedFile(
                {one.name: one for one in group},
                layout,
                tuple(slab.array[first:last].data for slab, first, last in self._copy.pieces(start, layout.n_bytes)),
            )
            for group, layout, start in zip(groups, layouts, self._starts, strict=True)
        ]

    def copy(self) -> None:
        """Copy the tensors, and return when all values are there: the state may then be changed."""
        try:
            placed = [*zip(self.files, self._starts, strict=True)]
            for file, start in placed:  # these copies run while the tensors in host memory are copied
                self._copy_file(file, start, on_device=True)
            for file, start in placed:
                self._copy.array(np.frombuffer(file.layout.header, np.uint8), start)
                self._copy_file(file, start, on_device=False)
        finally:
            self._copy.finish()
            self._sources = {}

    def release(self) -> None:
        """Return the memory. Repeated calls have no effect."""
        self.files = ()
        slabs, self._copy.slabs = self._copy.slabs, []
        self._memory.give(slabs)

    def _copy_file(self, file: StagedFile, start: int, *, on_device: bool) -> None:
        for name, offset in file.layout.offsets.items():
            device = self._devices.get(name)
            if (device is not None) == on_device:
                self._copy.tensor(self._sources[name], start + offset, device)


class _Copy:
    """The copies of one state into slabs, whose bytes are numbered through."""

    def __init__(self, slabs: list[Slab], slab_bytes: int) -> None:
        self.slabs, self._slab_bytes = slabs, slab_bytes
        self._devices: dict[Device, None] = {}
        self._sources: list[Any] = []  # of copies that may still run

    def pieces(self, start: int, n_bytes: int) -> list[tuple[Slab, int, int]]:
        """Return the pieces of a range: the slab, and the range in it."""
        found, position, end = [], start, start + n_bytes
        while position < end:
            number, first = divmod(position, self._slab_bytes)
            last = min(self._slab_bytes, first + end - position)
            found.append((self.slabs[number], first, last))
            position += last - first
        return found

    def tensor(self, source: TensorSource, start: int, device: Device | None) -> None:
        """Copy a tensor of torch or an array of NumPy; from a device, only queue the copy."""
        if not source.n_bytes:
            return
        if isinstance(source.value, np.ndarray):
            self.array(np.ascontiguousarray(source.value).reshape(-1).view(np.uint8), start)
            return
        value, pieces = source.value, self.pieces(start, source.n_bytes)
        flat = flat_bytes(value.resolve_conj().resolve_neg().contiguous())
        position = 0
        for slab, first, last in pieces:
            destination, part = _tensor_of(slab)[first:last], flat[position : position + last - first]
            if device is None:
                destination.copy_(part)
            else:
                device.copy(destination, part)
            position += last - first
        if device is not None:
            self._devices[device] = None
            self._sources.append(flat)

    def array(self, data: NDArray[np.uint8], start: int) -> None:
        position = 0
        for slab, first, last in self.pieces(start, data.nbytes):
            np.copyto(slab.array[first:last], data[position : position + last - first])
            position += last - first

    def finish(self) -> None:
        for device in self._devices:
            device.wait()
        self._devices.clear()
        self._sources.clear()


def _tensor_of(slab: Slab) -> Any:
    # A slab that was made before torch was imported has none.
    return sys.modules["torch"].from_numpy(slab.array) if slab.tensor is None else slab.tensor
