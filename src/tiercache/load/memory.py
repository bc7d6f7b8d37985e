"""Memory of batches that is used again: of decoded ones once the last tensor over it is dropped, of lists by malloc."""

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

_lent: dict[int, int] = {}  # token -> bytes, of the whole process; single dict operations, so no lock
_tokens = itertools.count()


class BatchMemory:
    """Arrays of bytes that are lent and come back by themselves, on whatever thread drops the last reference.

    A loader's, for its life: an epoch that began with fresh pages decoded its first 200 pictures at 1,050 us each
    where later ones took 800. All methods and `keep` may be used from any thread.

    Attributes:
        keep: how many returned arrays of a size to keep for the next ones; more are given back to the system.
    """

    def __init__(self, keep: int = 0) -> None:
        self.keep = keep
        self._rings_spare = SpareMemory()  # a ring's pages are kept for the next epoch's in the same way
        # By size. Appended and popped from any thread, finalisers included, by single operations: no lock.
        self._free: defaultdict[int, deque[Bytes]] = defaultdict(deque)

    def lend(self, n_bytes: int, size_bytes: int) -> Bytes:
        """uint8[n_bytes], writable, of any content. It is given back when nothing refers to *this* array any more.

        A tensor made by torch.frombuffer refers to it; a numpy view of it does not (numpy's views refer to the array
        that owns the memory).

        Args:
            n_bytes: at most size_bytes.
            size_bytes: of the memory behind it: those that ask for one size use one another's again.
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
        """Memory that is kept for the next ones."""
        return sum(size_bytes * len(free) for size_bytes, free in list(self._free.items()))

    def take_back(self, memory: Bytes) -> None:
        """What was lent, for the next one that asks for its size."""
        free = self._free[memory.size]
        if len(free) < self.keep:
            free.append(memory)


def lent_bytes() -> int:
    """Memory that is lent now, of the whole process."""
    return sum(list(_lent.values()))


@cache
def keep_freed_memory() -> None:
    """Let malloc keep up to 64 MiB that lists of objects free, for the objects of the next batches.

    glibc gives memory at the end of its heap back to the system as soon as 128 KiB of it are free: the objects of each
    batch of 5 MB were 200 fresh pages, and half of the processor time was the kernel's. It stops doing so when one
    large block is freed, as in any program that once frees a large array; no page of it is touched. Who has set
    MALLOC_* or another malloc keeps what he has.
    """
    libc = ctypes.CDLL(None)
    libc.malloc.argtypes, libc.malloc.restype = (ctypes.c_size_t,), ctypes.c_void_p
    libc.free.argtypes, libc.free.restype = (ctypes.c_void_p,), None
    libc.free(libc.malloc(_LARGEST_BYTES))


def _give_back(token: int, memory: Bytes, owner: BatchMemory) -> None:
    _lent.pop(token, None)
    owner.take_back(memory)
