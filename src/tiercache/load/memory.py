"""Reuse of batch memory: decoded batches return it when their last tensor is dropped; malloc keeps that of lists."""

from __future__ import annotations

import ctypes
import itertools
import weakref
from collections import defaultdict, deque
from functools import cache

import numpy as np
import numpy.typing as npt

from tiercache._native.ring import SpareMemory

Bytes = npt.NDArray[np.uint8]

# A little less than the largest block for which glibc changes its thresholds.
_LARGEST_BYTES = (32 << 20) - (64 << 10)

_lent: dict[int, int] = {}  # token -> bytes, for the whole process; single dict operations need no lock
_tokens = itertools.count()


class BatchMemory:
    """Lends byte arrays, which return by themselves in the thread that drops the last reference.

    A loader keeps one for its life: an epoch that began with fresh pages decoded its first 200 images at 1,050 us each,
    later ones at 800. All methods and `keep` may be used from any thread.

    Attributes:
        keep: Maximum number of returned arrays of one size that are kept; others are freed.
    """

    def __init__(self, keep: int = 0) -> None:
        self.keep = keep
        self._rings_spare = SpareMemory()  # keeps the ring's pages for the next epoch in the same way
        # By size. Any thread, including finalizers, appends and pops by single operations, which need no lock.
        self._free: defaultdict[int, deque[Bytes]] = defaultdict(deque)

    def lend(self, n_bytes: int, size_bytes: int) -> Bytes:
        """Return uint8[n_bytes], writable, with arbitrary content.

        The memory returns when nothing refers to *this* array any more. A tensor made by torch.frombuffer refers to it;
        a NumPy view does not (NumPy's views refer to the array that owns the memory).

        Args:
            n_bytes: Size of the array, at most size_bytes.
            size_bytes: Size of the memory behind it; requests of the same size reuse each other's memory.
        """
        try:
            memory = self._free[size_bytes].pop()  # the last one returned: part of it is still in a processor's cache
        except IndexError:
            memory = np.empty(size_bytes, np.uint8)
        lent = memory[:n_bytes]
        token = next(_tokens)
        _lent[token] = size_bytes
        weakref.finalize(lent, _give_back, token, memory, self).atexit = False
        return lent

    @property
    def free_bytes(self) -> int:
        """Bytes of memory that are kept for later requests."""
        return sum(size_bytes * len(free) for size_bytes, free in list(self._free.items()))

    def take_back(self, memory: Bytes) -> None:
        """Keep returned memory for the next request of its size."""
        free = self._free[memory.size]
        if len(free) < self.keep:
            free.append(memory)


def lent_bytes() -> int:
    """Return the bytes of memory that are lent now, in the whole process."""
    return sum(list(_lent.values()))


@cache
def keep_freed_memory() -> None:
    """Let malloc keep up to 64 MiB that lists of objects free, for the objects of the next batches.

    glibc returns the end of its heap to the system as soon as 128 KiB there are free: the objects of each batch of 5 MB
    took 200 fresh pages, and half of the processor time was the kernel's. glibc stops doing so after one large block is
    freed, as in any program that frees a large array; no page of the block is touched. MALLOC_* settings and other
    malloc libraries keep their behaviour.
    """
    libc = ctypes.CDLL(None)
    libc.malloc.argtypes, libc.malloc.restype = (ctypes.c_size_t,), ctypes.c_void_p
    libc.free.argtypes, libc.free.restype = (ctypes.c_void_p,), None
    libc.free(libc.malloc(_LARGEST_BYTES))


def _give_back(token: int, memory: Bytes, owner: BatchMemory) -> None:
    _lent.pop(token, None)
    owner.take_back(memory)
