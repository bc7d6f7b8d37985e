"""Memory that two processes share, and Python objects in it: arrays and tensors lie there, nothing of them is pickled.

A block is an anonymous file in memory (memfd). It has no name, so nothing is left behind however its processes end, and
the size of /dev/shm does not limit it. An object is stored as its pickled structure and, apart from it, the memory of
its arrays and tensors. One process writes a block, the other one reads it, and messages say which of them may.
"""

from __future__ import annotations

import io
import math
import mmap
import os
import pickle
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tiercache._native.ring import ColumnMemory

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
    """A block of shared memory, mapped in this process. It grows and never shrinks. For use by one thread at a time.

    Args:
        fd: Descriptor of the block, which this object owns from now on.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.memory: Bytes = np.empty(0, np.uint8)  # tensors and arrays over it keep the mapping, also after close()
        self._n_reserved = 0
        _live.add(self)

    @classmethod
    def create(cls) -> SharedBlock:
        """Return a new block without any memory."""
        return cls(os.memfd_create("tiercache-transform", os.MFD_CLOEXEC))

    def close(self) -> None:
        """Close the descriptor. Objects that were read stay valid."""
        if self.fd >= 0:
            os.close(self.fd)
        self.fd, self.memory = -1, np.empty(0, np.uint8)

    def clear(self) -> None:
        """Forget what was reserved, for the next object."""
        self._n_reserved = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor | None:
        """Return a tensor over memory of the block for an object that write() then stores without a copy.

        None: it does not fit into the block's present size, or has no elements.
        """
        numel = math.prod(shape)
        start, end = self._n_reserved, self._n_reserved + numel * dtype.itemsize
        if end > self.memory.size or not numel:
            return None
        self._n_reserved = _aligned(end)
        return torch.frombuffer(self.memory, dtype=dtype, count=numel, offset=start).view(tuple(shape))

    def write(self, value: Any) -> StoredObject:
        """Store an object. Its tensors must be on the CPU, otherwise they are pickled.

        Raises:
            Exception: Any error of pickling the object.
        """
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
    """Return the object that lies in memory.

    Its small arrays and tensors are copied; the others are over `memory` and keep it alive.

    memory: uint8[n] that begins as the block does.
    """
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
        if value.layout is torch.jagged:
            nested: Any = value
            return _nested_over, (nested.values(), nested.offsets())
        if value.layout is torch.sparse_coo:
            parts = value.detach().coalesce()
            return _sparse_over, (parts.indices(), parts.values(), tuple(value.shape))
        if value.layout is not torch.strided or value.is_quantized or _is_wrapper(value):
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


def _is_wrapper(value: Any) -> bool:
    return bool(is_traceable_wrapper_subclass(value))


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
