"""Prefetch of mapped pages into the page cache before the gather touches them.

A mapped page is read from the disk when it is first touched, and rows in random order are the slowest way to read a
disk. The blocks of a window are known before its first row is served. So the threads that load windows read these
blocks whole, in file order, while the window before is served.

Rows at random places miss the TLB with nearly every row unless the file is cached and mapped in huge pages of 2 MiB.
Linux does that on file systems with large folios (ext4 since 6.16) if the mapping is advised before its first fault.
Shuffled rows then come 1.0 to 1.07 times as fast, and reading 512 MiB takes 0.007 s of a processor; with WILLNEED,
which makes pages of 4 KiB, it takes 0.18 s.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from concurrent.futures import Future
from functools import cache
from typing import TYPE_CHECKING, cast

import numpy as np

from tiercache import config
from tiercache._native.residence import are_resident

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from tiercache.load.window import LoadedWindow, LoadThreads
    from tiercache.order import Window
    from tiercache.shard.read.blocks import Blocks

# Share of the memory that the process does not use, for the pages of one window of each stream. Two windows are
# prefetched at a time; more pages would evict pages that are still to be served.
NEAR_SHARE = 3
# Bytes per request: enough to read any disk at full speed, and close() never waits for more.
STEP_BYTES = 4 << 20
_HUGE_BYTES = 2 << 20
# With huge pages the kernel reads the neighbours of scattered blocks as well. The limits are the bytes read over the
# bytes wanted: if the whole data set stays in memory anyway, and if it does not.
_MOST_BESIDE, _MOST_BESIDE_IF_LARGER = 4.0, 1.25
_LINUX = sys.platform == "linux"
# Linux's numbers; COLD since 5.4, POPULATE_READ since 5.14.
_RANDOM, _WILLNEED, _DONTNEED, _HUGEPAGE, _NOHUGEPAGE, _COLD, _POPULATE_READ = 1, 3, 4, 14, 15, 20, 22
# Before this version, advising huge pages on ext4 makes larger reads of small pages, fewer at a time.
_HUGE_SINCE = (6, 16)


class PagePrefetcher:
    """Keeps the mapped pages of an epoch's windows in the page cache while they are served. For the planner's thread.

    stored_bytes: size of the whole data set: if it fits memory, served pages stay for the next epoch.
    """

    def __init__(self, threads: LoadThreads, stored_bytes: int) -> None:
        self._threads = threads
        self._stored_bytes = stored_bytes
        self._near: list[tuple[Window, list[Blocks]]] = []

    def prefetch_pages(
        self, windows: Sequence[LoadedWindow], serving: Sequence[Window], *, is_served: bool = False
    ) -> list[Future[int]]:
        """Start to read the mapped pages of windows, as far as there is room; returns at once.

        Pages without room are read when their rows are gathered; for shuffled rows the kernel then does not read their
        neighbours. The pages of earlier windows that are no longer served may be evicted.

        Args:
            windows: Windows that were loaded.
            serving: Windows that are served now or next, including `windows`.
            is_served: Whether rows of these windows are being gathered already. If those may be in any order, no huge
                pages are read: the first batch would wait for one per row.

        Returns:
            A future of the number of bytes read for each Blocks. A range that cannot be read is not an error here: the
            gather finds it and names it.
        """
        if not _LINUX or not windows:
            return []  # The advice numbers are Linux's.
        free_bytes = self._threads.limit_bytes - config.private_bytes()
        fits = self._stored_bytes <= free_bytes
        self._let_go(serving, larger=not fits)
        room_bytes = free_bytes // NEAR_SHARE
        reads: list[Future[int]] = []
        for loaded in windows:
            sizes = [int(blocks.pages[:, 1].sum()) for blocks in loaded.block_groups]
            n_near = count_near(sizes, room_bytes)
            room_bytes -= sum(sizes[:n_near])
            if loaded.window.key is not None:
                for blocks in loaded.block_groups[n_near:]:
                    _expect_single_rows(blocks.pages)
            # These mappings are kept until the window is served. Decoded blocks are not: others may need their memory
            # before.
            self._near.append((loaded.window, [blocks for blocks in loaded.block_groups if not blocks.private_bytes]))
            waits = is_served and not loaded.window.is_in_order
            most = 0.0 if waits else _MOST_BESIDE if fits else _MOST_BESIDE_IF_LARGER
            reads += [self._start(blocks, most) for blocks in loaded.block_groups[:n_near] if len(blocks.pages)]
        return reads

    def _start(self, blocks: Blocks, most: float) -> Future[int]:
        # The query takes 0.2 ms for 512 MiB that are mapped; populating them again takes 18 to 33 ms of a core in each
        # epoch.
        pages = blocks.pages
        if is_in_memory(blocks):
            near: Future[int] = Future()
            near.set_result(int(pages[:, 1].sum()))
            return near
        huge = _kernel() >= _HUGE_SINCE and share_of_huge_pages(pages) <= most and _expect(pages, _HUGEPAGE)
        return self._threads.executor.submit(_read, blocks, self._threads.stop, huge)

    def _let_go(self, serving: Sequence[Window], *, larger: bool) -> None:
        """Forget windows that were served; if the data set is larger than memory, let their pages be evicted first."""
        ids = set(map(id, serving))
        gone = [near for near in self._near if id(near[0]) not in ids]
        self._near = [near for near in self._near if id(near[0]) in ids]
        for blocks in [blocks for _, of_window in gone for blocks in of_window] if larger else []:
            self._threads.executor.submit(_release_pages, blocks)


def is_in_memory(blocks: Blocks) -> bool:
    """Whether all mapped pages of blocks are in memory, as far as the file system reports that reliably."""
    return _LINUX and blocks.reports_residency and are_resident(blocks.pages)


def plan_steps(pages: NDArray[np.uint64]) -> list[tuple[int, int]]:
    """Cut pages into steps of at most STEP_BYTES, in order, at multiples of STEP_BYTES.

    Args:
        pages: uint64[n, 2], (address, bytes) of each range, rising.

    Returns:
        (address, bytes) of each step.
    """
    return [
        (max(at, start), min(at + STEP_BYTES, start + n_bytes) - max(at, start))
        for start, n_bytes in pages.tolist()
        for at in range(start // STEP_BYTES * STEP_BYTES, start + n_bytes, STEP_BYTES)
    ]


def count_near(sizes: Sequence[int], room_bytes: int) -> int:
    """Return how many of the first parts fit room_bytes together."""
    return int(np.searchsorted(np.cumsum(np.array(sizes, np.int64)), room_bytes, side="right"))


def share_of_huge_pages(pages: NDArray[np.uint64]) -> float:
    """Return the bytes of the huge pages that contain these pages over the bytes of the pages.

    pages: at least one, as in plan_steps.
    """
    firsts, lasts = pages[:, 0] // _HUGE_BYTES, (pages.sum(axis=1) - 1) // _HUGE_BYTES
    n_pages = int((lasts - firsts + 1).sum()) - int((firsts[1:] == lasts[:-1]).sum())
    return n_pages * _HUGE_BYTES / int(pages[:, 1].sum())


def _expect_single_rows(pages: NDArray[np.uint64]) -> None:
    """Advise the kernel to read only the touched pages from the first page to the last.

    Otherwise the kernel reads the neighbours too, and evicts what it read before: 336 MiB instead of 1 MiB for 256
    rows, if huge pages were advised before.
    """
    if len(pages):
        _expect(pages, _NOHUGEPAGE)
        _expect(pages, _RANDOM)


def _expect(pages: NDArray[np.uint64], advice: int) -> bool:
    """Advise the kernel about the whole range from the first page to the last.

    The range is not split by block: each part with other advice counts against the process's limit of mappings.
    """
    start, stop = int(pages[0, 0]), int(pages[-1].sum())
    return _advise(start, stop - start, advice)


def _read(blocks: Blocks, stop: Future[None], huge: bool) -> int:
    """Read and map the pages of blocks step by step; return the number of bytes done."""
    steps = plan_steps(blocks.pages)
    # The disk gets all requests at once; the steps then wait for them.
    for address, n_bytes in steps if not huge else ():
        _advise(address, n_bytes, _WILLNEED)
    near_bytes = 0
    for address, n_bytes in steps:
        # A kernel before 5.14 refuses to populate, but its reads are under way and serve the first touches. For a
        # truncated file the call fails (EFAULT) and raises no signal.
        if stop.done() or not _advise(address, n_bytes, _POPULATE_READ):
            break
        near_bytes += n_bytes
    return near_bytes


def _release_pages(blocks: Blocks) -> None:
    """Unmap pages that were served, so that the page cache evicts them first.

    Looking for pages to evict among mapped ones cost half of the disk's speed: 300 and 426 MB/s without this call, 625
    with it, and 510 to 900 for reads that map nothing. DONTNEED alone is worse: it counts unmapped pages as used.
    """
    steps = plan_steps(blocks.pages)
    for advice in (_COLD, _DONTNEED):
        for address, n_bytes in steps:
            _advise(address, n_bytes, advice)


def _advise(address: int, n_bytes: int, advice: int) -> bool:
    """Call madvise and return whether it succeeded. ctypes is used because mmap.madvise holds the GIL."""
    return _libc_madvise()(address, n_bytes, advice) == 0


@cache
def _kernel() -> tuple[int, int]:
    """Return the kernel's version; (0, 0) if it cannot be parsed."""
    found = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return (int(found[1]), int(found[2])) if found else (0, 0)


@cache
def _libc_madvise() -> Callable[[int, int, int], int]:
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes, madvise.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    return cast("Callable[[int, int, int], int]", madvise)
